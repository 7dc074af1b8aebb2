package dnsfilter

import (
	"encoding/binary"
	"hash/maphash"
	"net/netip"
	"sync/atomic"
	"time"
)

const (
	meterSlots = 1 << 16   // 8 bytes each: sources that a meter knows
	meterWays  = 4         // slots that a source may be in
	meterClock = 1<<40 - 1 // microseconds after which the clock of the slots begins again
)

// A meter counts what comes from each source and says who is over a rate. It remembers
// of each source when the rate allows the next one (GCRA), in a table of one size: when
// more sources than it holds are busy at a time, the one that is nearest to being idle
// is forgotten. nil lets everything pass.
type meter struct {
	seed         maphash.Seed
	began        time.Time
	every, burst uint64                    // microseconds: from one to the next, and how far a source may run ahead
	slots        [meterSlots]atomic.Uint64 // 40 bits of time, 24 bits of a hash
}

// newMeter returns a meter for one in each time, and as many as burst at once.
func newMeter(every time.Duration, burst int, now time.Time) *meter {
	us := max(uint64(every/time.Microsecond), 1)
	return &meter{seed: maphash.MakeSeed(), began: now, every: us, burst: us * uint64(max(burst, 1)-1)}
}

// perSecond returns a meter for rate a second with a burst, 0 for as many as a second;
// nil if there is no rate.
func perSecond(rate, burst int, now time.Time) *meter {
	if rate == 0 {
		return nil
	}
	if burst == 0 {
		burst = rate
	}
	return newMeter(time.Second/time.Duration(rate), burst, now)
}

// over counts one of a kind from source, which prefix has been made of, and reports
// whether that is too many. What is too many does not count.
func (m *meter) over(source netip.Addr, kind byte, now time.Time) bool {
	var k [17]byte
	from := source.As16()
	copy(k[:], from[:])
	k[16] = kind
	h := maphash.Bytes(m.seed, k[:])
	at := uint64(now.Sub(m.began) / time.Microsecond)
	for {
		slot, was, ahead := m.find(h, at)
		if ahead > m.burst {
			return true
		}
		if slot.CompareAndSwap(was, (at+ahead+m.every)&meterClock<<24|h&(1<<24-1)) {
			return false
		}
	}
}

// find returns the slot of a source, or the one to use for it, what is in it, and how
// far the source is ahead, in microseconds.
func (m *meter) find(h, at uint64) (slot *atomic.Uint64, was, ahead uint64) {
	first := h >> 40 % (meterSlots / meterWays) * meterWays
	least := ^uint64(0)
	for i := range uint64(meterWays) {
		s := &m.slots[first+i]
		v := s.Load()
		d := (v>>24 - at) & meterClock
		if d > m.burst+m.every { // further than anybody gets: it lies in the past
			d = 0
		}
		if v&(1<<24-1) == h&(1<<24-1) && v != 0 {
			return s, v, d
		}
		if d < least {
			least, slot, was = d, s, v
		}
	}
	return slot, was, 0
}

// prefixOf returns the first address of the prefix of a that counts as one source.
func prefixOf(a netip.Addr, bits4, bits6 int) netip.Addr {
	if a.Is4() {
		b := a.As4()
		v := binary.BigEndian.Uint32(b[:]) & (^uint32(0) << (32 - bits4))
		binary.BigEndian.PutUint32(b[:], v)
		return netip.AddrFrom4(b)
	}
	b := a.As16()
	keep := func(p []byte, bits int) {
		v := binary.BigEndian.Uint64(p) & (^uint64(0) << (64 - max(min(bits, 64), 0)))
		binary.BigEndian.PutUint64(p, v)
	}
	keep(b[:8], bits6)
	keep(b[8:], bits6-64)
	return netip.AddrFrom16(b)
}
