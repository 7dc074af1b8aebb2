package dnsfilter

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/dnsfilter/wire"
	"sallyport/policy"
)

func testEntry(k key, records int, now time.Time) *entry {
	m := new(dns.Msg).SetQuestion(k.fqdn(), k.qtype)
	m.Response = true
	for i := range records {
		m.Answer = append(m.Answer, addressRR(k.fqdn(), netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 60))
	}
	return newEntry(k, m, now, Cache{MaxTTL: defaultMaxTTL})
}

func testKey(i int) key {
	return key{name: policy.MustName(fmt.Sprintf("host-%07d.example.test", i)), qtype: dns.TypeA}
}

func TestCacheStaysWithinItsBound(t *testing.T) {
	const size = 1 << 20
	c, now := newCache(Cache{Size: size}), time.Now()
	const n = 10000
	for i := range n {
		c.put(testKey(i), testEntry(testKey(i), 1, now), now)
		c.get(testKey(0), now) // in use all the time
	}
	entries, bytes := c.size()
	if bytes > size || bytes < size*9/10 || entries+int(c.evicted.Load()) != n {
		t.Errorf("%d entries of %d bytes, %d evicted", entries, bytes, c.evicted.Load())
	}
	if fresh, _, _ := c.get(testKey(0), now); fresh == nil {
		t.Error("what was used last is forgotten")
	}
	if fresh, _, _ := c.get(testKey(1), now); fresh != nil {
		t.Error("what was not used for long is kept")
	}
	c.put(testKey(n), testEntry(testKey(n), 5000, now), now)
	if fresh, _, _ := c.get(testKey(n), now); fresh != nil {
		t.Error("an entry larger than its share is kept")
	}
	now = now.Add(time.Hour)
	for i := range n {
		c.get(testKey(i), now)
	}
	if entries, bytes := c.size(); entries != 0 || bytes != 0 {
		t.Errorf("%d entries of %d bytes after all have expired", entries, bytes)
	}
}

// plainAnswerTo returns what an upstream that uses the room says to k: records addresses.
func plainAnswerTo(k key, records int) (p []byte, end int) {
	p = wire.AppendName([]byte{0, 0, 0x81, 0x80, 0, 1, byte(records >> 8), byte(records), 0, 0, 0, 0}, k.name.String())
	p = append(p, 0, byte(k.qtype), 0, dns.ClassINET)
	end = len(p)
	for i := range records {
		p = append(p, 0xC0, headerSize, 0, byte(k.qtype), 0, dns.ClassINET, 0, 0, 0, 60, 0, 4, 198, 41, 0, byte(i))
	}
	return p, end
}

// TestCacheCountsManyAddresses is TestCacheCountsWhatItTakes for plain answers of any length.
func TestCacheCountsManyAddresses(t *testing.T) {
	const size = 8 << 20
	for _, records := range []int{1, 3, maxPackedAddrs, maxPackedAddrs + 1, 65, 200} {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		c, now := newCache(Cache{Size: size}), time.Now()
		for i := 0; c.evicted.Load() < 1000; i++ {
			k := testKey(i)
			p, end := plainAnswerTo(k, records)
			e, ok := plainEntry(k, p, end, true, now, Cache{MaxTTL: defaultMaxTTL})
			if !ok {
				t.Fatalf("%x is not plain", p)
			}
			c.put(k, e, now)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		taken := int64(after.HeapAlloc) - int64(before.HeapAlloc)
		if _, bytes := c.size(); taken > size*5/4 {
			t.Errorf("%d records: %d bytes of heap for %d counted", records, taken, bytes)
		}
		runtime.KeepAlive(c)
	}
}

// TestCacheCountsWhatItTakes holds the count of bytes against the heap.
func TestCacheCountsWhatItTakes(t *testing.T) {
	const size = 16 << 20
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	c, now := newCache(Cache{Size: size}), time.Now()
	for i := range 60000 {
		c.put(testKey(i), testEntry(testKey(i), 1+i%4, now), now)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	taken := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	if _, bytes := c.size(); taken > size*5/4 {
		t.Errorf("%d bytes of heap for %d counted", taken, bytes)
	}
	runtime.KeepAlive(c)
}
