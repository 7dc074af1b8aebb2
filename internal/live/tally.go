package live

import (
	"cmp"
	"container/heap"
	"context"
	"slices"
	"sync"
	"time"

	"sallyport/policy"
)

const (
	// tallyKeys bounds what is counted by each key and period.
	tallyKeys = 1000
	// tallyPeriod is how long a period lasts. There are two: the present and the last.
	tallyPeriod = 30 * time.Minute
	// tallyPause is how often decisions are counted, if not more often for their number.
	tallyPause = time.Second
	// tallyRate bounds the decisions counted a second, and so what counting costs.
	tallyRate = 10_000
)

// A Tally counts who and what is seen most in a Ring, over the last half hour to
// hour, in bounded memory: by the space-saving algorithm (Metwally, Agrawal, El
// Abbadi, 2005).
type Tally struct {
	ring *Ring

	mu       sync.Mutex // guards what follows
	now, was period
	skipped  uint64
}

// A period is counted on its own.
type period struct {
	since                          time.Time
	names, sources, groups, denied summary
}

// NewTally returns a Tally of what r sees from now on. Run counts.
func NewTally(r *Ring) *Tally { return &Tally{ring: r, now: newPeriod(r.began)} }

func newPeriod(since time.Time) period {
	return period{since, newSummary(), newSummary(), newSummary(), newSummary()}
}

// Run counts until ctx ends.
func (t *Tally) Run(ctx context.Context) error {
	tick := time.NewTicker(tallyPause)
	defer tick.Stop()
	c := t.ring.Follow("")
	c.at = 0
	left := tallyRate
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			left = tallyRate
			t.turn(now)
		case <-t.ring.wake:
		}
		left -= t.count(c, left)
	}
}

// turn begins another period when it is time.
func (t *Tally) turn(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.now.since) >= tallyPeriod {
		t.was, t.now = t.now, newPeriod(now)
	}
}

// count counts at most limit of what c has not read, and returns how many there were.
func (t *Tally) count(c *Cursor, limit int) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := c.scan(limit, func(s *slot) bool {
		t.now.add(s)
		return true
	})
	t.skipped = c.lost
	return n
}

func (p *period) add(s *slot) {
	var b [64]byte
	p.names.add(s.bytes(textName), s)
	p.groups.add(s.bytes(textGroup), s)
	if s.source.IsValid() {
		p.sources.add(s.source.Addr().AppendTo(b[:0]), s)
	}
	if s.verdict != policy.Allow {
		p.denied.add(s.bytes(textName), s)
	}
}

// Top returns the n most frequent by a key.
func (t *Tally) Top(by By, n int) Top {
	t.mu.Lock()
	defer t.mu.Unlock()
	top := Top{Since: t.now.since.UTC(), Skipped: t.skipped, Talkers: []Talker{}}
	sum := map[string]*Talker{}
	for _, p := range []*period{&t.was, &t.now} { // so that the last group and reason are the present ones
		if p.since.IsZero() {
			continue
		}
		if p.since.Before(top.Since) {
			top.Since = p.since.UTC()
		}
		for _, it := range p.by(by).items {
			had := sum[it.Key]
			if had == nil {
				had = &Talker{Key: it.Key}
				sum[it.Key] = had
			}
			had.Group, had.Reason, had.Verdict = it.Group, it.Reason, it.Verdict
			had.Count += it.Count
			had.Error += it.Error
			had.BytesUp += it.BytesUp
			had.BytesDown += it.BytesDown
		}
	}
	for _, it := range sum {
		top.Talkers = append(top.Talkers, *it)
	}
	slices.SortFunc(top.Talkers, func(a, b Talker) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Key, b.Key))
	})
	top.Talkers = top.Talkers[:min(n, len(top.Talkers))]
	return top
}

func (p *period) by(by By) *summary {
	switch by {
	case BySource:
		return &p.sources
	case ByGroup:
		return &p.groups
	case ByDenied:
		return &p.denied
	}
	return &p.names
}

// A summary counts the most frequent keys. A key that is new when there are
// tallyKeys takes the place, and the count, of the least frequent one: that count is
// by how much its own may be too high.
type summary struct {
	byKey map[string]*item
	items leastFirst
}

type item struct {
	Talker
	at int // in items
}

func newSummary() summary { return summary{byKey: map[string]*item{}} }

func (m *summary) add(key []byte, s *slot) {
	it := m.byKey[string(key)]
	switch {
	case it != nil:
	case len(m.items) < tallyKeys:
		it = &item{Talker: Talker{Key: string(key)}}
		m.byKey[it.Key] = it
		heap.Push(&m.items, it)
	default:
		it = m.items[0]
		delete(m.byKey, it.Key)
		it.Talker = Talker{Key: string(key), Count: it.Count, Error: it.Count}
		m.byKey[it.Key] = it
	}
	it.Count++
	it.BytesUp += s.up
	it.BytesDown += s.down
	if g := s.bytes(textGroup); it.Group != string(g) {
		it.Group = string(g)
	}
	it.Reason, it.Verdict = s.reason.String(), s.verdict.String()
	heap.Fix(&m.items, it.at)
}

// leastFirst is a heap.
type leastFirst []*item

// Len implements heap.Interface.
func (h leastFirst) Len() int { return len(h) }

// Less implements heap.Interface.
func (h leastFirst) Less(i, j int) bool { return h[i].Count < h[j].Count }

// Swap implements heap.Interface.
func (h leastFirst) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].at, h[j].at = i, j
}

// Push implements heap.Interface.
func (h *leastFirst) Push(x any) {
	it := x.(*item)
	it.at = len(*h)
	*h = append(*h, it)
}

// Pop implements heap.Interface.
func (h *leastFirst) Pop() any {
	old := *h
	it := old[len(old)-1]
	*h = old[:len(old)-1]
	return it
}
