package policy

import "net/netip"

// A Candidate is one rule that covers the name or address of a Request, and what
// became of it.
type Candidate struct {
	Rule    string // its ID
	Group   string // the group that wrote it; "" for the document's deny rules
	Deny    bool   // a deny rule
	Pattern string // what matched: a pattern, or "" for an address
	Matched bool   // the rest of the rule agreed too
	Reason  Reason // for an allow rule that did not match: why
}

// An Explanation is a Decision with the way to it.
type Explanation struct {
	Decision   Decision
	User       string       // the user who chose the group; "" if none did
	Prefix     netip.Prefix // the source prefix that chose the group; zero if none did
	Candidates []Candidate  // every rule that covers the destination and counts for the group
}

// Explain decides r as Decide does and shows how.
func (p *Policy) Explain(r Request) Explanation {
	var x Explanation
	e := eval{p: p, trace: &x.Candidates}
	e.decide(&r, nil, &x.Decision)
	if _, ok := p.users[r.User]; ok {
		x.User = r.User
	} else {
		_, x.Prefix = p.Source(r.Source)
	}
	return x
}

// record notes one judged rule for Explain.
func (e *eval) record(ref *ref, id string, h hit, matched bool, reason Reason) {
	c := Candidate{Rule: id, Deny: e.p.rules[ref.rule].deny, Matched: matched, Reason: reason}
	if ref.owner > 0 {
		c.Group = e.p.groups[ref.owner-1].name
	}
	switch {
	case h.text == "":
	case h.glob:
		c.Pattern = h.text
	case h.below:
		c.Pattern = h.id(formBelow)
	default:
		c.Pattern = h.id(formExact)
	}
	if matched {
		c.Reason = ReasonNone
	}
	*e.trace = append(*e.trace, c)
}
