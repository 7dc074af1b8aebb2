package discovery

import (
	"io"

	"sallyport/policy"
)

// A Proposal is policy that would allow what was observed.
type Proposal struct{}

// Propose returns what to add to p so that it allows what pairs observed. p may be
// nil: then nothing is allowed already.
func Propose(pairs []Pair, p *policy.Policy, o ProposalOptions) *Proposal { return &Proposal{} }

// Write writes p as YAML to paste into a policy, as JSON or as CSV.
func (p *Proposal) Write(w io.Writer, f Format) error { return nil }
