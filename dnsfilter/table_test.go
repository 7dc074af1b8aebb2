package dnsfilter

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestCacheIsAMap holds the cache against a map while entries come, are replaced, and expire,
// with so few hashes that most of them collide.
func TestCacheIsAMap(t *testing.T) {
	const keys = 300
	random := rand.New(rand.NewPCG(1, 2))
	now := time.Unix(1_800_000_000, 0)
	s := &newCache(Cache{Size: mib}).shards[0]
	known := map[int]*entry{}
	name := func(i int) ([]byte, uint64) {
		return testKey(i).appendWire(nil), uint64(i%23)<<32*0x9E3779B9 | uint64(i)%3
	}
	for range 20_000 {
		i := random.IntN(keys)
		k, h := name(i)
		if e := s.lookup(k, h); e != known[i] {
			t.Fatalf("key %d: %p, want %p", i, e, known[i])
		} else if e != nil {
			s.remove(e)
			delete(known, i)
		}
		if random.IntN(3) > 0 {
			e := testEntry(testKey(i), 1, now)
			e.hash, e.cost = h, 1
			s.insert(e)
			known[i] = e
		}
		if s.entries != len(known) || s.bytes != int64(len(known)) {
			t.Fatalf("%d entries of %d bytes, want %d", s.entries, s.bytes, len(known))
		}
	}
	for i := range keys {
		if k, h := name(i); s.lookup(k, h) != known[i] {
			t.Errorf("key %d is lost", i)
		}
	}
	n := 0
	for e := s.ring.newer; e != &s.ring; e = e.newer {
		n++
	}
	if n != len(known) || n == 0 {
		t.Errorf("%d in the ring, want %d", n, len(known))
	}
}
