package proxy

import (
	"errors"
	"net/netip"
	"sync"
	"time"
)

const (
	// sourceBits is how much of an IPv6 address tells sources apart in limits. One
	// machine has a whole /64 to choose addresses from (RFC 4291, section 2.5.4).
	sourceBits = 64

	// maxRated bounds the sources whose rate is remembered, some 64 bytes each.
	// Beyond it a source may be forgotten early, which grants it another burst.
	maxRated = 1 << 16

	// rateSweep is how many remembered sources are looked at, and forgotten if
	// their time is over, for each one that is added. More than one lets the table
	// shrink.
	rateSweep = 4
)

var (
	errTooFast            = errors.New("proxy.limits.connections_per_second exceeded")
	errTooManyConnections = errors.New("proxy.limits.connections_per_source reached")
)

// limitKey is a as limits count it: IPv6 by /64.
func limitKey(a netip.Addr) netip.Addr {
	if !a.Is6() {
		return a
	}
	p, err := a.Prefix(sourceBits)
	if err != nil {
		return a // only an invalid address has no prefix
	}
	return p.Addr()
}

// rates bounds how often each source does something: a token bucket in the form of
// the generic cell rate algorithm, whose whole state is one time. (With
// golang.org/x/time/rate it would be a hundred bytes, and no easier.)
type rates struct {
	every time.Duration // between two, in the long run
	burst time.Duration // how far ahead of that a source may be, less one
	start time.Time     // of the server, with the monotonic clock

	mu   sync.Mutex                   // guards next
	next map[netip.Addr]time.Duration // after start: when the bucket is full again
}

// newRates returns rates of perSecond with bursts of burst, or nil for no limit.
func newRates(perSecond, burst int) *rates {
	if perSecond <= 0 {
		return nil
	}
	if burst <= 0 {
		burst = perSecond
	}
	every := time.Second / time.Duration(perSecond)
	return &rates{
		every: every, burst: every * time.Duration(burst-1),
		start: time.Now(), next: make(map[netip.Addr]time.Duration),
	}
}

// exceeded counts one more from source at the time now, and reports whether that
// was one too many, which then does not count.
func (r *rates) exceeded(source netip.Addr, now time.Time) bool {
	if r == nil {
		return false
	}
	key, at := limitKey(source), now.Sub(r.start)
	r.mu.Lock()
	defer r.mu.Unlock()
	next, known := r.next[key]
	if next > at+r.burst {
		return true
	}
	if !known {
		r.makeRoom(at)
	}
	r.next[key] = max(next, at) + r.every
	return false
}

// makeRoom forgets some of the sources whose bucket is full again, and if there is
// no room then any one. The caller holds mu.
func (r *rates) makeRoom(at time.Duration) {
	seen := 0
	for k, next := range r.next {
		if seen++; next <= at {
			delete(r.next, k)
		} else if seen >= rateSweep && len(r.next) >= maxRated {
			delete(r.next, k)
		}
		if seen >= rateSweep {
			return
		}
	}
}

// crowd counts the connections of each source that are no tunnels: that wait for a
// request, are served by net/http, or are on the way to a tunnel.
type crowd struct {
	limit int // of one source; 0: nothing is counted

	mu   sync.Mutex         // guards open
	open map[netip.Addr]int // by limitKey
}

// enter counts one more of source, which has to leave, unless there are too many.
func (c *crowd) enter(source netip.Addr) (counted netip.Addr, ok bool) {
	if c.limit <= 0 {
		return netip.Addr{}, true
	}
	key := limitKey(source)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[key] >= c.limit {
		return netip.Addr{}, false
	}
	c.open[key]++
	return key, true
}

// leave takes back one that enter has counted. The zero address was not.
func (c *crowd) leave(counted netip.Addr) {
	if !counted.IsValid() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[counted]--; c.open[counted] == 0 {
		delete(c.open, counted)
	}
}
