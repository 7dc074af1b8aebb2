package dnsfilter

import (
	"container/list"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
)

const (
	cacheShards   = 16
	entryOverhead = 400              // bytes an entry takes beside its message and name
	staleRetry    = 30 * time.Second // between attempts to refresh what is stale (RFC 8767, section 4)
)

// A cache remembers entries within a bound in bytes. The least recently used go
// first. It is sharded by name, so that queries seldom wait for each other.
type cache struct {
	seed    maphash.Seed
	stale   time.Duration // how long entries stay useful after they expired
	shards  [cacheShards]shard
	evicted atomic.Uint64
}

type shard struct {
	mu    sync.Mutex // guards what follows
	nodes map[key]*list.Element
	used  *list.List // of *node, the most recently used first
	bytes int64
	limit int64
}

// A node is a cached entry with what changes about it.
type node struct {
	k     key
	e     *entry
	retry time.Time // a stale entry is not refreshed before
}

func newCache(c Cache) *cache {
	cc := &cache{seed: maphash.MakeSeed(), stale: c.ServeStale}
	for i := range cc.shards {
		s := &cc.shards[i]
		s.nodes, s.used, s.limit = make(map[key]*list.Element), list.New(), c.Size/cacheShards
	}
	return cc
}

func (c *cache) shard(k key) *shard {
	return &c.shards[maphash.String(c.seed, k.name.String())%cacheShards]
}

// get returns what is known of k: an entry within its TTL, or one that may stand
// in for a failed upstream and whether it is time to try one again. Either may be nil.
func (c *cache) get(k key, now time.Time) (fresh, stale *entry, retry bool) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	el, ok := s.nodes[k]
	if !ok {
		return nil, nil, false
	}
	n := el.Value.(*node)
	switch {
	case now.Before(n.e.expires):
		s.used.MoveToFront(el)
		return n.e, nil, false
	case n.e.err == nil && now.Before(n.e.expires.Add(c.stale)):
		s.used.MoveToFront(el)
		return nil, n.e, !now.Before(n.retry)
	}
	s.remove(el)
	return nil, nil, false
}

// put remembers e. The failure of a refresh leaves in place what is stale, to be
// refreshed again after staleRetry.
func (c *cache) put(k key, e *entry, now time.Time) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if el, ok := s.nodes[k]; ok {
		n := el.Value.(*node)
		if e.err != nil && n.e.err == nil && now.Before(n.e.expires.Add(c.stale)) {
			n.retry = now.Add(staleRetry)
			return
		}
		s.remove(el)
	}
	if !now.Before(e.expires) || s.limit < cost(k, e) {
		return // a TTL of 0, or too large
	}
	s.nodes[k] = s.used.PushFront(&node{k: k, e: e})
	s.bytes += cost(k, e)
	for s.bytes > s.limit {
		s.remove(s.used.Back())
		c.evicted.Add(1)
	}
}

// remove forgets el. The caller holds mu.
func (s *shard) remove(el *list.Element) {
	n := s.used.Remove(el).(*node)
	delete(s.nodes, n.k)
	s.bytes -= cost(n.k, n.e)
}

// cost is what an entry counts for, in bytes.
func cost(k key, e *entry) int64 {
	return int64(cap(e.wire)+len(k.name.String())) + entryOverhead
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
