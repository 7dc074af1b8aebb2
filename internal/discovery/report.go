package discovery

import (
	"io"
	"time"
)

// Evidence is what a report is made of.
type Evidence struct {
	Pairs []Pair // of the days from Since on
	Rules map[RuleKey]Use
	Stats Stats
	Since time.Time
	Now   time.Time
	Node  string
	// Policy is the policy in force; nil if it is not known.
	Policy *PolicyFacts
}

// PolicyFacts are what a report says of a policy.
type PolicyFacts struct {
	Revision string
	Groups   []GroupFacts
	Rules    []RuleFacts
}

// GroupFacts is a group of the policy.
type GroupFacts struct {
	Name         string
	Extends      []string
	ObserveUntil time.Time // zero: it enforces
}

// RuleFacts is a rule of the policy.
type RuleFacts struct {
	Group   string // that wrote it; "" for deny rules of all groups
	ID      string
	Deny    bool
	Owner   string
	Reason  string
	Expires time.Time // zero: never
	Where   string    // file:line:column
}

// Summary is a report.
type Summary struct{}

// Report sums up e.
func Report(e Evidence) *Summary { return &Summary{} }

// Write writes s as Markdown, HTML, CSV or JSON.
func (s *Summary) Write(w io.Writer, f Format) error { return nil }
