package dnsfilter

import (
	"hash/maphash"
	"net/netip"
	"sync/atomic"
	"time"

	"sallyport/policy"
)

// Events says which queries the Observer is told of.
type Events string

// What the Observer is told of. A query that a group which observes lets pass counts as denied.
const (
	EventsAll    Events = "all"    // every query
	EventsDenied Events = "denied" // those that policy denies
	EventsSample Events = "sample" // those, and of the allowed ones with one source, name, type and response code one a minute
)

// tell reports whether the Observer is to be told of a query that d decides, as far
// as that does not depend on others.
func (e Events) tell(d *policy.Decision) bool { return e != EventsDenied || d.Verdict != policy.Allow }

const (
	sampleWindow = time.Minute // between events of a repeated query
	sampleSlots  = 1 << 16     // 8 bytes each: queries remembered, at most
	sampleClock  = 1<<24 - 1   // seconds after which the clock of the slots begins again
)

// A sampler tells queries that are repeated within sampleWindow from others. It
// remembers the last in each slot, so what it takes for repeated is, but for one in
// 2^40, while of many queries some repeated ones are taken for new.
type sampler struct {
	seed  maphash.Seed
	began time.Time
	slots [sampleSlots]atomic.Uint64 // 40 bits of a hash, and when in seconds
}

func newSampler(now time.Time) *sampler { return &sampler{seed: maphash.MakeSeed(), began: now} }

// first reports whether k, a key on the wire, has not been answered with rcode to
// source lately. It appends to k.
func (s *sampler) first(k []byte, source netip.Addr, rcode int, now time.Time) bool {
	from := source.As16()
	k = append(append(k, from[:]...), byte(rcode))
	h := maphash.Bytes(s.seed, k)
	slot := &s.slots[h%sampleSlots]
	at := uint64(now.Sub(s.began)/time.Second) & sampleClock
	was := slot.Load()
	if was>>24 == h>>24 && (at-was)&sampleClock < uint64(sampleWindow/time.Second) && was != 0 {
		return false
	}
	slot.Store(h&^sampleClock | at)
	return true
}
