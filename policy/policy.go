package policy

import (
	"net/netip"
	"time"

	"github.com/gaissmai/bart"
)

// A Policy is a compiled Document. It never changes and is safe for concurrent use.
type Policy struct {
	revision  string
	groups    []group // in document order
	rules     []rule
	names     nameIndex
	postings  postings
	addresses bart.Table[posting] // of rules; a prefix holds the refs of the wider ones too
	sources   bart.Table[uint32]  // index into groups
	users     map[string]uint32   // index into groups; nil if no group lists any
	unmatched int                 // group for sources without a prefix, or -1: deny
	nameCount int
	text      []keptText // what it was compiled from, for Document
}

// A group is a compiled Group.
type group struct {
	name         string
	owners       []uint32 // whose rules count here: 0 (guardrails), this group, its ancestors; sorted
	mode         Mode
	observeUntil time.Time
}

// modeAt returns the group's mode at t. The zero t lies after every date.
func (g *group) modeAt(t time.Time) Mode {
	if g.mode == ModeObserve && !t.IsZero() && t.Before(g.observeUntil) {
		return ModeObserve
	}
	return ModeEnforce
}

// A rule is a compiled Rule, or all the bare strings of one allow or deny section.
type rule struct {
	id        string // "": the ID is the pattern that matched
	deny      bool
	builtin   bool // one of the built-in guardrails
	protocols protocols
	ports     []portRange    // nil: the defaults of the protocols; of a deny rule: all
	qtypes    []uint16       // in addition to the usual ones; of a deny rule: only these
	private   []netip.Prefix // where its names may lead beyond global space
	literal   []netip.Prefix // its own addresses there, for those who ask by address
	tls       tlsRule
	expires   time.Time // zero: never
}

// protocols is a set of what a rule is for.
type protocols uint8

const (
	forTLS protocols = 1 << iota
	forHTTP
	forTCP
	forDNS

	forAny = forTLS | forHTTP | forTCP | forDNS
)

type portRange struct{ first, last uint16 }

// tlsRule is a compiled TLSRule; the zero value is the strictest.
type tlsRule struct {
	sni        sniRule
	allowECH   bool
	minVersion uint16
}

type sniRule uint8

const (
	sniMatch sniRule = iota
	sniListed
	sniOptional
)

// Well-known ports of the two halves of protocol web.
const (
	portTLS  = 443
	portHTTP = 80
)

// on returns what the rule is for on port.
func (r *rule) on(port uint16) protocols {
	switch {
	case r.ports != nil:
		for _, p := range r.ports {
			if p.first <= port && port <= p.last {
				return r.protocols &^ forDNS
			}
		}
		return 0
	case r.deny:
		return r.protocols
	case port == portTLS:
		return r.protocols & forTLS
	case port == portHTTP:
		return r.protocols & forHTTP
	}
	return 0
}

// usualQType reports whether every rule that covers a name covers type t of it.
func usualQType(t uint16) bool {
	switch t {
	case 1, 5, 28, 64, 65: // A, CNAME (RFC 1035), AAAA (RFC 3596), SVCB, HTTPS (RFC 9460)
		return true
	}
	return false
}

// Revision identifies the policy's content: equal documents and lists have equal
// revisions. It is short enough for a log line and a metric label.
func (p *Policy) Revision() string { return p.revision }

// Names returns how many name patterns the policy holds, counting one that
// several rules share once for each.
func (p *Policy) Names() int { return p.nameCount }

// GroupNames returns the names of all groups in the order of the document.
func (p *Policy) GroupNames() []string {
	names := make([]string, len(p.groups))
	for i, g := range p.groups {
		names[i] = g.name
	}
	return names
}

// HasUsers reports whether any group lists users, so that credentials can change
// what a client may reach.
func (p *Policy) HasUsers() bool { return len(p.users) > 0 }

// Source returns the group that src belongs to and the prefix that put it there.
// The prefix is zero if no prefix matched and unmatched_source names the group;
// the group is "" if there is none.
func (p *Policy) Source(src netip.Addr) (group string, prefix netip.Prefix) {
	src = src.Unmap().WithZone("")
	if src.IsValid() {
		if pfx, i, ok := p.sources.LookupPrefixLPM(netip.PrefixFrom(src, src.BitLen())); ok {
			return p.groups[i].name, pfx
		}
	}
	if p.unmatched >= 0 {
		return p.groups[p.unmatched].name, netip.Prefix{}
	}
	return "", netip.Prefix{}
}
