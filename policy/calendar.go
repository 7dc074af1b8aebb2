package policy

import (
	"iter"
	"time"
)

// Observing yields the name of each group in mode observe, in the order of the
// document, with the time from which on it enforces.
func (p *Policy) Observing() iter.Seq2[string, time.Time] {
	return func(yield func(string, time.Time) bool) {
		for i := range p.groups {
			if g := &p.groups[i]; g.mode == ModeObserve && !yield(g.name, g.observeUntil) {
				return
			}
		}
	}
}

// NextExpiry returns when the next rule expires after t; the zero time if none does.
func (p *Policy) NextExpiry(t time.Time) (next time.Time) {
	for i := range p.rules {
		if e := p.rules[i].expires; e.After(t) && (next.IsZero() || e.Before(next)) {
			next = e
		}
	}
	return next
}

// Rules returns how many rules the policy has, without those that are built in. All
// bare names of a section count as one.
func (p *Policy) Rules() (n int) {
	for i := range p.rules {
		if !p.rules[i].builtin {
			n++
		}
	}
	return n
}
