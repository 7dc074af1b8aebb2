package dnsfilter

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/dnsfilter/wire"
)

const (
	cacheShards   = 16
	minTable      = 64               // of a shard: room for entries to begin with
	entryOverhead = 400              // bytes an entry takes beside its message
	staleRetry    = 30 * time.Second // between attempts to refresh what is stale (RFC 8767, section 4)
	keySize       = 255 + 3          // bytes of a key on the wire, at most
)

// A cache remembers entries within a bound in bytes. Those go first that were not used
// since they were last looked at with that in mind, as far as there are such (the clock
// algorithm). It is sharded by name, so that queries seldom wait for each other.
type cache struct {
	seed    maphash.Seed
	stale   time.Duration // how long entries stay useful after they expired
	shards  [cacheShards]shard
	evicted atomic.Uint64
}

type shard struct {
	mu      sync.Mutex // guards what follows
	table   []hashed   // open addressing, linear probing; a power of two
	entries int        // in it: three of four at most
	ring    entry      // after the entry that came last, and before the one to look at next
	bytes   int64
	limit   int64
}

// hashed is an entry with the hash of its key, which tells nearly all others apart
// without a look at them. The zero value is none.
type hashed struct {
	hash  uint64
	entry *entry
}

// A place is where an entry is in the cache. The lock of its shard guards it.
type place struct {
	hash         uint64 // of its key
	newer, older *entry // those linked just after, and just before
	cost         int64  // bytes
	used         bool   // since it was linked
	bits         byte   // the last byte of its key
}

func newCache(c Cache) *cache {
	cc := &cache{seed: maphash.MakeSeed(), stale: c.ServeStale}
	for i := range cc.shards {
		s := &cc.shards[i]
		s.table, s.limit = make([]hashed, minTable), c.Size/cacheShards
		s.ring.newer, s.ring.older = &s.ring, &s.ring
	}
	return cc
}

// shard returns where k belongs, with its hash.
func (c *cache) shard(k []byte) (*shard, uint64) {
	h := maphash.Bytes(c.seed, k)
	return &c.shards[h%cacheShards], h
}

// home returns where in the table a hash belongs. What finds that taken is as near behind
// it as can be. The caller holds mu, as for those below.
func (s *shard) home(h uint64) int { return int(h>>32) & (len(s.table) - 1) }

// lookup returns the entry of k, nil if there is none.
func (s *shard) lookup(k []byte, h uint64) *entry {
	for i := s.home(h); ; i = (i + 1) & (len(s.table) - 1) {
		if e := s.table[i].entry; e == nil || s.table[i].hash == h && e.is(k) {
			return e
		}
	}
}

// is reports whether e is what is known of k. An entry has the name and the type of its key
// in its question.
func (e *entry) is(k []byte) bool {
	n := len(k) - 1
	return len(e.wire) >= headerSize+n && string(e.wire[headerSize:headerSize+n]) == string(k[:n]) && e.bits == k[n]
}

// appendWire appends k as the cache holds it, and as [wire.Query.Key] returns it.
func (k key) appendWire(dst []byte) []byte {
	return wire.AppendKey(wire.AppendName(dst, k.name.String()), k.qtype, k.do, k.cd)
}

// get returns what is known of k: an entry within its TTL, or one that may stand
// in for a failed upstream and whether it is time to try one again. Either may be nil.
func (c *cache) get(k key, now time.Time) (fresh, stale *entry, retry bool) {
	var buf [keySize]byte
	return c.find(k.appendWire(buf[:0]), now)
}

// find is get for a key on the wire, which it does not keep.
func (c *cache) find(k []byte, now time.Time) (fresh, stale *entry, retry bool) {
	s, h := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.lookup(k, h)
	switch {
	case e == nil:
		return nil, nil, false
	case now.Before(e.expires):
		e.used = true
		return e, nil, false
	case e.err == nil && now.Before(e.expires.Add(c.stale)):
		e.used = true
		return nil, e, !now.Before(e.retry)
	}
	s.remove(e)
	return nil, nil, false
}

// put remembers e, which has not been remembered before. The failure of a refresh leaves in
// place what is stale, to be refreshed again after staleRetry.
func (c *cache) put(k key, e *entry, now time.Time) {
	var buf [keySize]byte
	w := k.appendWire(buf[:0])
	s, h := c.shard(w)
	s.mu.Lock()
	defer s.mu.Unlock()
	if was := s.lookup(w, h); was != nil {
		if e.err != nil && was.err == nil && now.Before(was.expires.Add(c.stale)) {
			was.retry = now.Add(staleRetry)
			return
		}
		s.remove(was)
	}
	if !now.Before(e.expires) || s.limit < cost(e) {
		return // a TTL of 0, or too large
	}
	e.hash, e.bits, e.cost = h, w[len(w)-1], cost(e)
	s.insert(e)
	c.shrink(s)
}

// grow counts bytes more for e, if it is what is remembered of k.
func (c *cache) grow(k []byte, e *entry, bytes int64) {
	s, h := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lookup(k, h) == e {
		e.cost += bytes
		s.bytes += bytes
		c.shrink(s)
	}
}

// shrink forgets what is not used until s is within its limit. The
// caller holds s.mu.
func (c *cache) shrink(s *shard) {
	for s.bytes > s.limit {
		e := s.ring.newer
		if e.used { // which can be so once for each entry
			e.used = false
			e.unlink()
			s.link(e)
			continue
		}
		s.remove(e)
		c.evicted.Add(1)
	}
}

// insert adds e.
func (s *shard) insert(e *entry) {
	if s.entries++; 4*s.entries > 3*len(s.table) {
		old := s.table
		s.table = make([]hashed, 2*len(old))
		for _, other := range old { // others wait: no look at the entries themselves
			if other.entry != nil {
				s.enter(other)
			}
		}
	}
	s.enter(hashed{e.hash, e})
	s.link(e)
	s.bytes += e.cost
}

// enter writes h into the table, which has room.
func (s *shard) enter(h hashed) {
	i := s.home(h.hash)
	for s.table[i].entry != nil {
		i = (i + 1) & (len(s.table) - 1)
	}
	s.table[i] = h
}

// link makes e the last to be looked at.
func (s *shard) link(e *entry) {
	e.newer, e.older = &s.ring, s.ring.older
	e.newer.older, e.older.newer = e, e
}

func (e *entry) unlink() {
	e.newer.older, e.older.newer = e.older, e.newer
	e.newer, e.older = nil, nil
}

// remove forgets e. What is behind it in the table moves up, unless that were before its home.
func (s *shard) remove(e *entry) {
	e.unlink()
	s.entries--
	s.bytes -= e.cost
	last := len(s.table) - 1
	gap := s.home(e.hash)
	for s.table[gap].entry != e {
		gap = (gap + 1) & last
	}
	for i := (gap + 1) & last; s.table[i].entry != nil; i = (i + 1) & last {
		if (i-s.home(s.table[i].hash))&last >= (i-gap)&last {
			s.table[gap] = s.table[i]
			gap = i
		}
	}
	s.table[gap] = hashed{}
}

// cost is what an entry counts for, in bytes.
func cost(e *entry) int64 {
	n := int64(cap(e.wire)) + entryOverhead
	if p := e.packed.Load(); p != nil {
		n += p.size(e)
	}
	return n
}

// size returns how many entries there are, and their bytes.
func (c *cache) size() (entries int, bytes int64) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		entries += s.entries
		bytes += s.bytes
		s.mu.Unlock()
	}
	return entries, bytes
}
