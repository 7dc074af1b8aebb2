package admin

import (
	"context"
	"errors"
	"io"
	"time"

	"sallyport/internal/live"
)

// API is where the answers of /api/v1 come from. Each func may be called from
// several goroutines. Where one is nil, its endpoint answers 501.
type API struct {
	Version string
	Node    string
	Started time.Time
	// LogDropped returns the number of log lines lost since the start.
	LogDropped func() uint64
	// TunnelCount returns how many tunnels are open.
	TunnelCount func() int

	// Policy returns the policy in force. The caller changes nothing in it.
	Policy func() (*PolicyDetail, error)
	// Explain returns what "sallyport explain --json" prints. A question that cannot be
	// understood is an error wrapping ErrBadRequest.
	Explain func(ExplainQuery) ([]byte, error)
	// Tunnels returns live tunnels, newest first, limit at most, and how many there are.
	Tunnels func(limit int) ([]Tunnel, int)
	// CloseTunnel closes one for whoever by names, and reports whether there was one.
	CloseTunnel func(id, by string) bool
	// Recent returns the newest decisions that the filter takes, newest first.
	Recent func(f live.Filter, limit int) []live.Decision
	// Follow returns a reader of decisions from now on, or from the one after resume
	// (a Cursor's ID). The caller closes it.
	Follow func(resume string) *live.Cursor
	// Top returns the n most frequent.
	Top func(by live.By, n int) live.Top
	// Series returns the last minutes in steps.
	Series func(minutes int) Series
	// Discovery returns what was seen, the most frequent first.
	Discovery func(DiscoveryQuery) ([]Pair, error)
	// Proposal writes what "sallyport learn" prints.
	Proposal func(io.Writer, ProposalQuery) error
	// Report writes what "sallyport report" prints.
	Report func(io.Writer, ReportQuery) error
	// Reload reads settings and policy again, as SIGHUP does, and returns how that went.
	// If ctx ends first the error is its; the reload goes on.
	Reload func(ctx context.Context, by string) (Outcome, error)
	// Drain ends the process as SIGTERM does. It returns at once.
	Drain func(by string)
}

// PolicyDetail is the policy in force, as it was written.
type PolicyDetail struct {
	Revision        string        `json:"revision"`
	LoadedAt        time.Time     `json:"loaded_at"`
	UnmatchedSource string        `json:"unmatched_source"`
	Deny            []RuleDetail  `json:"deny"`
	Groups          []GroupDetail `json:"groups"`
	// Truncated says that there are more rules than are shown.
	Truncated bool `json:"truncated"`
}

// GroupDetail is a group of the policy.
type GroupDetail struct {
	Name         string       `json:"name"`
	Sources      []string     `json:"sources"`
	Users        []string     `json:"users"`
	Extends      []string     `json:"extends"`
	Mode         string       `json:"mode"` // enforce or observe, now
	ObserveUntil string       `json:"observe_until,omitempty"`
	Allow        []RuleDetail `json:"allow"`
	Deny         []RuleDetail `json:"deny"`
}

// RuleDetail is a rule of the policy.
type RuleDetail struct {
	ID        string   `json:"id"` // as in events
	Names     []string `json:"names"`
	NameCount int      `json:"name_count"` // of Names before it was cut
	Addresses []string `json:"addresses"`
	Ports     []string `json:"ports"`
	Protocol  string   `json:"protocol,omitempty"`
	QTypes    []string `json:"qtypes"`
	// PrivateDestinations are the addresses that are not public where the rule leads to.
	PrivateDestinations []string     `json:"private_destinations"`
	TLS                 *TLSDetail   `json:"tls,omitempty"` // nil: the defaults
	Lists               []ListDetail `json:"lists"`         // of Names that begin with @
	Owner               string       `json:"owner,omitempty"`
	Reason              string       `json:"reason,omitempty"`
	Expires             string       `json:"expires,omitempty"`
	Where               string       `json:"where"`               // file:line:column
	Hits                *uint64      `json:"hits,omitempty"`      // nil: not known
	LastUsed            *time.Time   `json:"last_used,omitempty"` // nil: never, or not known
}

// TLSDetail is what a rule, or else the group that has it, wants of a ClientHello; "" is the default.
type TLSDetail struct {
	SNI        string `json:"sni,omitempty"`
	ECH        string `json:"ech,omitempty"`
	MinVersion string `json:"min_version,omitempty"`
}

// ListDetail is a list of names.
type ListDetail struct {
	Name string `json:"name"`
	File string `json:"file,omitempty"` // that its names come from, as it was written
}

// ExplainQuery is a question as people write it; see "sallyport explain --help".
type ExplainQuery struct {
	Source, Target, User, DNS, SNI, Destination, At string
}

// Tunnel is a live tunnel.
type Tunnel struct {
	ID        string    `json:"id"` // as in X-Sallyport-Id and in its event
	Src       string    `json:"src"`
	Group     string    `json:"group"`
	User      string    `json:"user,omitempty"`
	Name      string    `json:"name"`
	Port      uint16    `json:"port"`
	Dst       string    `json:"dst"`
	Rule      string    `json:"rule"`
	Since     time.Time `json:"since"`
	BytesUp   int64     `json:"bytes_up"`
	BytesDown int64     `json:"bytes_down"`
}

// Verdicts has a value for each verdict and step of a Series.
type Verdicts struct {
	Allow   []float64 `json:"allow"`
	Deny    []float64 `json:"deny"`
	Observe []float64 `json:"observe"`
}

// Series is what happened over time, oldest first; all slices have equal length.
// All but Tunnels are per second, over the step that ends at Time.
type Series struct {
	StepSeconds int       `json:"step_seconds"`
	Time        []int64   `json:"time"`        // Unix seconds, as charts want them
	Decisions   Verdicts  `json:"decisions"`   // of the proxy
	DNSQueries  Verdicts  `json:"dns_queries"` // of the resolver
	BytesUp     []float64 `json:"bytes_up"`
	BytesDown   []float64 `json:"bytes_down"`
	Tunnels     []int     `json:"tunnels"` // at Time
}

// DiscoveryQuery chooses pairs; zero fields take all.
type DiscoveryQuery struct {
	Group, Verdict string
	Since          time.Time // last seen then or later
	MinCount       uint64
}

// Pair is a destination that a group asked for.
type Pair struct {
	Group     string   `json:"group"`
	Name      string   `json:"name"`
	Port      uint16   `json:"port"`
	QType     string   `json:"qtype,omitempty"` // of DNS, if it is no usual one
	Protocol  string   `json:"protocol"`
	Listeners []string `json:"listeners"`
	Verdict   string   `json:"verdict"`
	Reason    string   `json:"reason"`
	Rule      string   `json:"rule"`
	Count     uint64   `json:"count"`
	BytesUp   int64    `json:"bytes_up"`
	BytesDown int64    `json:"bytes_down"`
	Strange   bool     `json:"strange,omitempty"` // Name is neither a name nor an address
	Sources   int      `json:"sources"`           // distinct client addresses
	// SourcesEstimated says that Sources is an estimate.
	SourcesEstimated bool `json:"sources_estimated,omitempty"`

	FirstSeen time.Time `json:"first_seen"`
	LastSeen  time.Time `json:"last_seen"`
}

// ProposalQuery says what is proposed.
type ProposalQuery struct {
	Group    string
	Since    time.Time
	MinCount uint64
	Output   string // yaml, json or csv
}

// ReportQuery says what is reported.
type ReportQuery struct {
	Since  time.Time
	Output string // markdown, html, csv or json
}

// Outcome is how a reload went.
type Outcome struct {
	OK       bool      `json:"ok"`
	Revision string    `json:"revision"` // of the policy in force now
	Changed  bool      `json:"changed"`  // it is another one than before
	At       time.Time `json:"at"`
	Errors   []string  `json:"errors"`            // why not, one mistake each; what was in force stays so
	Pending  bool      `json:"pending,omitempty"` // it goes on, and took too long to wait for
}

// ErrBadRequest is wrapped by errors about what was asked, whose text is for who asked.
var ErrBadRequest = errors.New("bad request")

// ErrUnavailable is wrapped by errors about what there is not yet, or no longer.
var ErrUnavailable = errors.New("not available")
