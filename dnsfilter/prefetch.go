package dnsfilter

import "time"

const (
	prefetchHits = 2    // in its TTL so far, before an answer is worth to be asked for again
	prefetchPart = 10   // in the last of so many parts of its TTL
	maxPrefetch  = 1024 // questions under way beyond which nothing is prefetched: those of clients go first
)

// used notes that e was answered. In the last tenth of its TTL an entry that has been
// answered before is asked for again, once. Whoever answers from the cache calls it.
func (r *Resolver) used(k key, e *entry, now time.Time) {
	if r.due(e, now) {
		r.prefetch(k, e)
	}
}

// due is the part of used that counts, and says whether to call prefetch.
func (r *Resolver) due(e *entry, now time.Time) bool {
	if !r.cfg.Cache.Prefetch {
		return false
	}
	if e.hits.Load() < prefetchHits {
		e.hits.Add(1)
		return false
	}
	return e.err == nil && e.expires.Sub(now) <= e.expires.Sub(e.stored)/prefetchPart && e.refreshing.CompareAndSwap(false, true)
}

// prefetch asks for e, of k, again, unless there is too much to do.
func (r *Resolver) prefetch(k key, e *entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.flights[k] != nil || len(r.flights) >= maxPrefetch {
		e.refreshing.Store(false)
		return
	}
	r.counts.prefetched.Add(1)
	r.launch(k)
}
