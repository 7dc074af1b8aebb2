package discovery

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"sallyport/policy"
	"sallyport/policy/event"
)

// Options say what a Store remembers and where.
type Options struct {
	// File keeps it over restarts. Its folder must exist. "": memory alone.
	File string
	// Entries bounds the pairs remembered, and the rules; 0 is DefaultEntries.
	Entries int
	// Retention is how long days are told apart, and how long a pair is remembered
	// after it was last seen; 0 is DefaultRetention.
	Retention time.Duration
	// Interval is how often changes are written to File; 0 is one minute. That is what
	// a crash loses.
	Interval time.Duration
	Logger   zerolog.Logger   // for what an operator should act on
	Now      func() time.Time // nil is time.Now
}

// The defaults of Options.
const (
	DefaultEntries   = 200_000
	DefaultRetention = 90 * 24 * time.Hour

	defaultInterval = time.Minute
)

// A Store remembers. It is an [event.Observer] that neither blocks nor allocates for
// what it knows already.
type Store struct {
	options Options
	table   *table

	writing sync.Mutex // held while changes are written; guards the next three
	lastID  uint64
	tidied  uint16 // day on which what is too old was last removed
	failing bool   // the last attempt to write failed, which was told

	open sync.RWMutex // guards file
	file *file        // nil: memory alone, for good or for now

	history history // days that are over, as long as there is no file

	writes, writeErrors atomic.Uint64
	lastWrite           atomic.Int64 // Unix time
	since               atomic.Int64 // Unix time at which what is remembered begins
}

var _ event.Observer = (*Store)(nil)

// Open returns a Store with what File remembers. A file that cannot be understood is
// renamed, with a warning, and a new one begun. While another process has the file, and
// while the disk does not take it, memory alone is used, with a warning. The error is
// about Options.
func Open(o Options) (*Store, error) {
	if o.Entries < 0 || o.Retention < 0 || o.Interval < 0 {
		return nil, fmt.Errorf("discovery: entries, retention and interval must not be negative (%d, %v, %v)", o.Entries, o.Retention, o.Interval)
	}
	o.Entries = cmp.Or(o.Entries, DefaultEntries)
	o.Retention = cmp.Or(o.Retention, DefaultRetention)
	o.Interval = cmp.Or(o.Interval, defaultInterval)
	if o.Now == nil {
		o.Now = time.Now
	}
	s := newStore(o)
	if o.File != "" {
		s.attach()
	}
	return s, nil
}

func newStore(o Options) *Store {
	s := &Store{options: o, table: newTable(o.Entries)}
	s.since.Store(o.Now().Unix())
	s.history.room = o.Entries
	return s
}

// Observe implements event.Observer.
func (s *Store) Observe(ev *event.Event) {
	d := &ev.Decision
	if ev.Kind == event.Config || ev.Kind == event.Connect && ev.Protocol == policy.ProtocolHTTP && d.Passes() {
		return // each request inside that CONNECT has an event of its own
	}
	at := s.endOf(ev)
	var buf [maxName]byte
	i := identity{
		group: d.Group, rule: d.Rule, name: canonical(ev.Name, &buf), port: ev.Port,
		protocol: spoken(ev), verdict: d.Verdict, reason: d.Reason,
	}
	if ev.Kind == event.DNS {
		i.port, i.qtype = 0, qtypeOf(ev.QType)
	}
	var source uint64
	if a := ev.Source.Addr(); a.IsValid() {
		source = sourceHash(a)
	}
	sh, h := s.table.find(&i)
	sh.mu.Lock()
	e := s.table.get(sh, h, &i, at)
	e.hit(at, usage{1, uint64(max(ev.BytesUp, 0)), uint64(max(ev.BytesDown, 0))}, source, listenerBit(ev.Listener))
	rule := e.rule
	sh.mu.Unlock()
	switch {
	case i.rule == "" || !used(d):
	case rule.lost:
		s.table.uses.lost.Add(1)
	default:
		rule.hit(at)
	}
}

// endOf returns when ev ended, in Unix time.
func (s *Store) endOf(ev *event.Event) uint32 {
	t := ev.Time
	if t.IsZero() {
		t = s.options.Now()
	}
	return uint32(min(max(t.Add(ev.Duration).Unix(), 0), math.MaxUint32))
}

// Run writes what has changed every Interval, until ctx ends; then it writes what is
// left and closes the file. What is observed later is not written.
func (s *Store) Run(ctx context.Context) error {
	tick := time.NewTicker(s.options.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			s.flush()
			return s.Close()
		case <-tick.C:
			s.flush()
		}
	}
}

// Close closes the file. Run does so at its end.
func (s *Store) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.open.Lock()
	defer s.open.Unlock()
	f := s.file
	s.file = nil
	if f == nil {
		return nil
	}
	if err := f.close(); err != nil {
		return fmt.Errorf("discovery: close %s: %w", s.options.File, err)
	}
	return nil
}

// A found is an entry that a query may be about, as it was when it was looked at.
type found struct {
	e      *entry
	id     uint64
	before *dayUsage
	today  dayUsage
	sum    usage
}

// Pairs returns the pairs that q chooses, the most frequent first, then in the order of
// group, name and port. An error says that the file could not be read; then the counts
// are those of memory.
func (s *Store) Pairs(q Query) ([]Pair, error) {
	since := uint16(0)
	if !q.Since.IsZero() {
		since = dayOf(q.Since)
	}
	var all []found
	s.table.each(func(e *entry) {
		switch {
		case q.Group != "" && e.group() != q.Group:
		case q.Verdict != "" && e.verdict.String() != q.Verdict:
		case uint16(e.last/secondsADay) < since:
		default:
			f := found{e: e, id: e.id, before: e.before, today: dayUsage{e.today, e.day}, sum: e.total}
			if since > 0 && uint16(e.first/secondsADay) < since {
				f.sum = usage{} // of days
			} else {
				f.id = 0 // everything is recent enough
			}
			all = append(all, f)
		}
	})
	var err error
	if since > 0 {
		err = s.sumDays(all, since)
	}
	all = slices.DeleteFunc(all, func(f found) bool { return f.sum.count < max(q.MinCount, 1) })
	slices.SortFunc(all, func(a, b found) int {
		return cmp.Or(cmp.Compare(b.sum.count, a.sum.count), compareEntries(a.e, b.e))
	})
	if q.Limit > 0 && len(all) > q.Limit {
		all = all[:q.Limit]
	}
	pairs := make([]Pair, len(all))
	for i := range all {
		pairs[i] = s.pair(&all[i], since)
	}
	return pairs, err
}

// sumDays fills in the sums of those in all that were known before the day since.
func (s *Store) sumDays(all []found, since uint16) error {
	byID := map[uint64]int{}
	for i := range all {
		f := &all[i]
		if f.sum.count > 0 {
			continue
		}
		if f.id != 0 {
			byID[f.id] = i
		}
		if f.today.day >= since {
			f.sum.add(f.today.usage)
		}
		if f.before != nil && f.before.day >= since {
			f.sum.add(f.before.usage)
		}
	}
	if len(byID) == 0 {
		return nil
	}
	add := func(day uint16, id uint64, u usage) {
		i, ok := byID[id]
		if !ok {
			return
		}
		// What memory knows of a day is newer.
		if f := &all[i]; day != f.today.day && (f.before == nil || day != f.before.day) {
			f.sum.add(u)
		}
	}
	s.open.RLock()
	defer s.open.RUnlock()
	if s.file == nil {
		s.history.each(since, add)
		return nil
	}
	if err := s.file.days(since, add); err != nil {
		return fmt.Errorf("discovery: read %s: %w", s.options.File, err)
	}
	return nil
}

// compareEntries orders by what does not change.
func compareEntries(a, b *entry) int {
	return cmp.Or(
		strings.Compare(a.group(), b.group()), strings.Compare(a.name, b.name), cmp.Compare(a.port, b.port),
		cmp.Compare(a.qtype, b.qtype), cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.verdict, b.verdict),
		cmp.Compare(a.reason, b.reason), strings.Compare(a.ruleID(), b.ruleID()),
	)
}

func (s *Store) pair(f *found, since uint16) Pair {
	e := f.e
	sh := s.table.shardOf(e)
	sh.mu.Lock()
	first, last, listeners, sources := e.first, e.last, e.listeners, e.sources
	sh.mu.Unlock()
	n, guess := sources.count(since)
	return Pair{
		Group: e.group(), Name: e.name, Port: e.port, QType: qtypeName(e.qtype), Protocol: protocolNames[e.protocol],
		Verdict: e.verdict.String(), Reason: e.reason.String(), Rule: e.ruleID(), Strange: isStrange(e.name),
		Listeners: listenerSets[int(listeners)%len(listenerSets)], Count: f.sum.count, BytesUp: f.sum.up, BytesDown: f.sum.down,
		Sources: n, SourcesEstimated: guess, clients: sources, since: since, FirstSeen: time.Unix(int64(first), 0).UTC(), LastSeen: time.Unix(int64(last), 0).UTC(),
	}
}

// Rules returns the use of every rule that was used.
func (s *Store) Rules() map[RuleKey]Use {
	us := &s.table.uses
	us.mu.Lock()
	defer us.mu.Unlock()
	out := make(map[RuleKey]Use, len(us.known))
	for k, u := range us.known {
		if hits := u.hits.Load(); hits > 0 {
			out[RuleKey{k.group, k.rule, k.deny}] = Use{hits, time.Unix(int64(u.last.Load()), 0).UTC()}
		}
	}
	return out
}

// Stats returns a snapshot.
func (s *Store) Stats() Stats {
	us := &s.table.uses
	us.mu.Lock()
	rules := len(us.known)
	us.mu.Unlock()
	st := Stats{
		Pairs: s.table.size(), Evicted: s.table.evicted.Load(), EvictedHits: s.table.evictedHits.Load(),
		Rules: rules, RulesLost: us.lost.Load(), Writes: s.writes.Load(), WriteErrors: s.writeErrors.Load(),
		Since: time.Unix(s.since.Load(), 0).UTC(),
	}
	if at := s.lastWrite.Load(); at > 0 {
		st.LastWrite = time.Unix(at, 0).UTC()
	}
	return st
}

// A history has the traffic of days that are over, of a Store without a file.
type history struct {
	mu   sync.Mutex // guards days and rows
	days map[uint16]map[uint64]usage
	rows int
	room int // rows, at most: beyond, the oldest days go
}

// put keeps the traffic of an entry on a day.
func (h *history) put(id uint64, u dayUsage) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.days[u.day] == nil {
		if h.days == nil {
			h.days = map[uint16]map[uint64]usage{}
		}
		h.days[u.day] = map[uint64]usage{}
	}
	if _, there := h.days[u.day][id]; !there {
		h.rows++
	}
	h.days[u.day][id] = u.usage
	for h.rows > h.room {
		h.dropOldest()
	}
}

func (h *history) dropOldest() {
	oldest := uint16(math.MaxUint16)
	for day := range h.days {
		oldest = min(oldest, day)
	}
	h.rows -= len(h.days[oldest])
	delete(h.days, oldest)
}

// tidy forgets the days before day.
func (h *history) tidy(day uint16) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for d, rows := range h.days {
		if d < day {
			h.rows -= len(rows)
			delete(h.days, d)
		}
	}
}

// clear forgets everything.
func (h *history) clear() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.days, h.rows = nil, 0
}

// each calls f with the traffic of each entry on each day from since on.
func (h *history) each(since uint16, f func(day uint16, id uint64, u usage)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for day, rows := range h.days {
		if day < since {
			continue
		}
		for id, u := range rows {
			f(day, id, u)
		}
	}
}
