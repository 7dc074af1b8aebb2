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
	entryOverhead = 400              // bytes an entry takes beside its message and name
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
	mu    sync.Mutex       // guards what follows
	nodes map[string]*node // by key.wire
	ring  node             // before the node that came last, and after the one to look at next
	bytes int64
	limit int64
}

// A node is a cached entry with what changes about it.
type node struct {
	e          *entry
	used       bool      // since it was linked
	retry      time.Time // a stale entry is not refreshed before
	k          string
	cost       int64 // bytes
	prev, next *node // those linked just after, and just before
}

func newCache(c Cache) *cache {
	cc := &cache{seed: maphash.MakeSeed(), stale: c.ServeStale}
	for i := range cc.shards {
		s := &cc.shards[i]
		s.nodes, s.limit = make(map[string]*node), c.Size/cacheShards
		s.ring.prev, s.ring.next = &s.ring, &s.ring
	}
	return cc
}

func (c *cache) shard(k []byte) *shard {
	return &c.shards[maphash.Bytes(c.seed, k)%cacheShards]
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
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.nodes[string(k)]
	if !ok {
		return nil, nil, false
	}
	switch {
	case now.Before(n.e.expires):
		n.used = true
		return n.e, nil, false
	case n.e.err == nil && now.Before(n.e.expires.Add(c.stale)):
		n.used = true
		return nil, n.e, !now.Before(n.retry)
	}
	s.remove(n)
	return nil, nil, false
}

// put remembers e. The failure of a refresh leaves in place what is stale, to be
// refreshed again after staleRetry.
func (c *cache) put(k key, e *entry, now time.Time) {
	var buf [keySize]byte
	w := k.appendWire(buf[:0])
	s := c.shard(w)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.nodes[string(w)]; ok {
		if e.err != nil && n.e.err == nil && now.Before(n.e.expires.Add(c.stale)) {
			n.retry = now.Add(staleRetry)
			return
		}
		s.remove(n)
	}
	if !now.Before(e.expires) || s.limit < cost(w, e) {
		return // a TTL of 0, or too large
	}
	n := &node{k: string(w), e: e, cost: cost(w, e)}
	s.nodes[n.k] = n
	s.link(n)
	s.bytes += n.cost
	c.shrink(s)
}

// grow counts bytes more for k, as long as e is what is remembered of it.
func (c *cache) grow(k []byte, e *entry, bytes int64) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.nodes[string(k)]; ok && n.e == e {
		n.cost += bytes
		s.bytes += bytes
		c.shrink(s)
	}
}

// shrink forgets what is not used until s is within its limit. The
// caller holds s.mu.
func (c *cache) shrink(s *shard) {
	for s.bytes > s.limit {
		n := s.ring.prev
		if n.used { // which can be so once for each node
			n.used = false
			n.unlink()
			s.link(n)
			continue
		}
		s.remove(n)
		c.evicted.Add(1)
	}
}

// link makes n the last to be looked at. The caller holds mu, as for those below.
func (s *shard) link(n *node) {
	n.prev, n.next = &s.ring, s.ring.next
	n.prev.next, n.next.prev = n, n
}

func (n *node) unlink() {
	n.prev.next, n.next.prev = n.next, n.prev
	n.prev, n.next = nil, nil
}

// remove forgets n.
func (s *shard) remove(n *node) {
	n.unlink()
	delete(s.nodes, n.k)
	s.bytes -= n.cost
}

// cost is what an entry counts for, in bytes.
func cost(k []byte, e *entry) int64 {
	return int64(cap(e.wire)+len(k)) + entryOverhead
}

// size returns how many entries there are, and their bytes.
func (c *cache) size() (entries int, bytes int64) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		entries += len(s.nodes)
		bytes += s.bytes
		s.mu.Unlock()
	}
	return entries, bytes
}
