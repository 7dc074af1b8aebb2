package policy

import (
	"sync"
	"sync/atomic"
)

// A Store holds the Policy in force. The zero Store denies everything. Readers
// never wait; Swap is for one caller at a time and waits its turn.
type Store struct {
	current atomic.Pointer[Policy]

	swapping sync.Mutex // guards changed, and lets one Swap run at a time
	changed  []func(*Policy)
}

// Decide asks the policy in force. Without one it denies, unmatched_source.
func (s *Store) Decide(r Request) Decision {
	p := s.current.Load()
	if p == nil {
		return Decision{Reason: ReasonUnmatchedSource}
	}
	return p.Decide(r)
}

// DecideWire returns the decision of the current policy for a DNS question whose
// name is n; without a policy, a denial.
func (s *Store) DecideWire(n *WireName, r Request) Decision {
	p := s.current.Load()
	if p == nil {
		return Decision{Reason: ReasonUnmatchedSource}
	}
	return p.DecideWire(n, r)
}

// Revision returns the revision of the policy in force, or "" if there never was one.
func (s *Store) Revision() string {
	if p := s.current.Load(); p != nil {
		return p.revision
	}
	return ""
}

// Policy returns the policy in force, or nil if there never was one.
func (s *Store) Policy() *Policy { return s.current.Load() }

// OnChange has f called after each Swap, in the order of registration and in
// Swap's goroutine. f must not call Swap or OnChange.
func (s *Store) OnChange(f func(*Policy)) {
	s.swapping.Lock()
	defer s.swapping.Unlock()
	s.changed = append(s.changed, f)
}

// Swap puts p in force. When it returns, everybody registered has been told.
func (s *Store) Swap(p *Policy) {
	s.swapping.Lock()
	defer s.swapping.Unlock()
	s.current.Store(p)
	for _, f := range s.changed {
		f(p)
	}
}
