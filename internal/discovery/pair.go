package discovery

import (
	"time"
)

// A Pair is a destination that a group asked for, in one way, and what became of it.
// Group, Name, Port, QType, Protocol, Verdict, Reason and Rule together are its identity.
type Pair struct {
	Group string `json:"group"` // "" for sources without one
	// Name is a name in canonical form, or an address. Where a client sent something
	// that is neither, it is that, escaped and cut: see Strange.
	Name     string   `json:"name"`
	Port     uint16   `json:"port"`            // 0 for DNS
	QType    string   `json:"qtype,omitempty"` // of a question for anything but A, AAAA, CNAME, HTTPS and SVCB, which are ""
	Protocol Protocol `json:"protocol"`
	Verdict  string   `json:"verdict"` // allow, deny or observe
	Reason   string   `json:"reason"`
	Rule     string   `json:"rule,omitempty"`
	Strange  bool     `json:"strange,omitempty"` // Name is neither a name nor an address

	Listeners []string `json:"listeners"` // doors, sorted
	Count     uint64   `json:"count"`     // in the time asked for
	BytesUp   uint64   `json:"bytes_up"`
	BytesDown uint64   `json:"bytes_down"`
	// Sources is the number of distinct client addresses. Up to MaxExactSources it is
	// exact; above, SourcesEstimated says that it is an estimate (about 13 % off), of
	// all time and not only of the time asked for.
	Sources          int       `json:"sources"`
	SourcesEstimated bool      `json:"sources_estimated,omitempty"`
	FirstSeen        time.Time `json:"first_seen"` // ever, to the second
	LastSeen         time.Time `json:"last_seen"`

	clients sources // who they were, so that several pairs can be counted together
	since   uint16  // day from which on they count
}

// MaxExactSources is how many distinct sources of a Pair are counted one by one.
const MaxExactSources = 8

// Protocol is what a client spoke to a destination, as far as it was seen.
type Protocol string

// The protocols.
const (
	TLS     Protocol = "tls"
	HTTP    Protocol = "http"
	TCP     Protocol = "tcp"
	DNS     Protocol = "dns"
	Unknown Protocol = "unknown" // a CONNECT that ended before anything was spoken
)

// A Query chooses pairs. Its zero value takes all.
type Query struct {
	Group   string
	Verdict string // allow, deny or observe
	// Since leaves out what happened before that day (UTC): counts and bytes are those
	// of the days from then on. Zero: everything that is known.
	Since    time.Time
	MinCount uint64 // of one Pair
	Limit    int    // pairs, at most; 0: all
}

// A RuleKey names a rule as events do: by the group whose traffic it decided, which
// may have inherited it, and its ID. Deny rules for all groups count in each group.
type RuleKey struct {
	Group, Rule string
	Deny        bool
}

// Use is how often a rule decided, and when last.
type Use struct {
	Hits     uint64    `json:"hits"`
	LastUsed time.Time `json:"last_used"`
}

// Stats are a Store's numbers.
type Stats struct {
	Pairs       int       // remembered now
	Evicted     uint64    // pairs forgotten for others, since the start
	EvictedHits uint64    // what they had counted
	Rules       int       // remembered now
	RulesLost   uint64    // hits of rules that there was no room for, since the start
	Writes      uint64    // times that changes were written, since the start
	WriteErrors uint64    // times that they could not be
	LastWrite   time.Time // zero: never
	Since       time.Time // when what is remembered begins
}

// A ProposalOptions says what to propose.
type ProposalOptions struct {
	Group    string    // "": every group that has observed something
	Since    time.Time // as Query.Since; for the heading
	MinCount uint64    // of all pairs of a name together; 0 is 1
	Now      time.Time // when the policy is judged
}

// A Format is how a proposal or a report is written.
type Format string

// The formats.
const (
	YAML     Format = "yaml"     // proposals
	JSON     Format = "json"     // both
	CSV      Format = "csv"      // both
	Markdown Format = "markdown" // reports
	HTML     Format = "html"     // reports
)
