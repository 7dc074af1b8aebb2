package replay

import (
	"cmp"
	"encoding/json"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/publicsuffix"

	"sallyport/policy"
)

// Bounds of a Report.
const (
	maxRows     = 50_000 // by name; what comes later is folded into the registrable domain
	maxAllRows  = 2 * maxRows
	maxExamples = 3
	maxProblems = 10
)

// A Report says what a Replay has found.
type Report struct {
	Revision string    `json:"policy"` // of the policy that decided
	Lines    uint64    `json:"lines"`
	First    time.Time `json:"first,omitzero"` // of the requests
	Last     time.Time `json:"last,omitzero"`

	Decided     uint64            `json:"decided"`   // requests that could be compared
	Same        uint64            `json:"unchanged"` // of them
	Open        uint64            `json:"open"`      // counted as unchanged, for a change would hang on what the log does not say
	Changes     Counts            `json:"totals"`
	Refused     uint64            `json:"not_policy"`  // refused for what is not the policy's to say: limits, passwords, malformed requests
	Undecidable uint64            `json:"undecidable"` // no source, name or port that can be read, or another scheme
	Other       uint64            `json:"other_lines"` // messages, reloads
	Malformed   uint64            `json:"malformed"`   // lines
	Folded      uint64            `json:"folded"`      // changes counted under a registrable domain or all together
	Assumed     map[string]uint64 `json:"assumed"`     // by the keys of Assumptions
	Groups      map[string]*Group `json:"groups"`      // by the group of the new policy, "" for none
	Problems    []Problem         `json:"problems"`    // the first malformed lines
	Rows        []*Row            `json:"changes"`     // most frequent first
}

// A Group counts the requests of one group.
type Group struct {
	Decided uint64 `json:"decided"`
	Changes Counts `json:"totals"`
}

// Counts has a number for each Change.
type Counts [changes]uint64

// MarshalJSON implements json.Marshaler: an object with the names of the changes.
func (c Counts) MarshalJSON() ([]byte, error) {
	m := map[string]uint64{}
	for i, n := range c {
		m[Change(i).String()] = n
	}
	return json.Marshal(m)
}

// A Problem is a line that could not be read.
type Problem struct {
	File  string `json:"file"`
	Line  uint64 `json:"line"`
	Error string `json:"error"`
}

// A Row counts the same change of requests for the same destination.
type Row struct {
	Change   Change    `json:"-"`
	Kind     string    `json:"change"`
	Group    string    `json:"group"` // in the new policy
	Name     string    `json:"name"`  // or address; *.example.com and (others) if folded
	Event    string    `json:"event"` // connect, http, dns …
	Port     uint16    `json:"port,omitempty"`
	QType    string    `json:"qtype,omitempty"`
	Was      string    `json:"was"` // of the latest: verdict and reason
	Now      string    `json:"now"` // of the latest: verdict, reason and rule
	Count    uint64    `json:"count"`
	First    time.Time `json:"first"`
	Last     time.Time `json:"last"`
	Examples []Example `json:"examples"`
}

// Traffic is what was asked for in a few words, such as connect 443.
func (r *Row) Traffic() string {
	switch {
	case r.QType != "":
		return r.Event + " " + r.QType
	case r.Port != 0:
		return r.Event + " " + strconv.Itoa(int(r.Port))
	}
	return r.Event
}

// An Example is one of the requests.
type Example struct {
	Time   time.Time  `json:"time"`
	Source netip.Addr `json:"src"`
	ID     string     `json:"id,omitempty"`
}

// others is the name of the row for what has no other.
const others = "(others)"

type rowKey struct {
	change             Change
	group, name, event string
	port               uint16
	qtype              string
}

func (r *Replay) period(at time.Time) {
	if r.rep.First.IsZero() || at.Before(r.rep.First) {
		r.rep.First = at
	}
	if at.After(r.rep.Last) {
		r.rep.Last = at
	}
}

// count adds a decided record to the report.
func (r *Replay) count(a *answer, verdict policy.Verdict, reason policy.Reason, was outcome, at time.Time) {
	if was == neither {
		r.rep.Refused++
		return
	}
	r.rep.Decided++
	for i, yes := range a.assumed {
		if yes {
			r.rep.Assumed[Assumptions[i].Key]++
		}
	}
	if r.rec.ended && len(a.rec.user) > 0 {
		r.rep.Assumed[Assumptions[userNotKnown].Key]++
	}
	g := r.rep.Groups[a.Group]
	if g == nil {
		g = new(Group)
		r.rep.Groups[strings.Clone(a.Group)] = g
	}
	g.Decided++
	change, changed := changeOf(verdict, was, a.Decision)
	switch {
	case !changed:
		r.rep.Same++
		return
	case a.open:
		r.rep.Same++
		r.rep.Open++
		return
	}
	g.Changes[change]++
	r.rep.Changes[change]++
	row := r.row(change, a)
	row.Count++
	if row.First.IsZero() || at.Before(row.First) {
		row.First = at
	}
	if at.After(row.Last) {
		row.Last = at
	}
	if len(row.Examples) < maxExamples {
		row.Examples = append(row.Examples, Example{at, a.req.Source, string(clip(r.rec.id))})
	}
	if row.Count == 1 {
		row.Was = words(verdict.String(), reason.String())
		row.Now = words(a.Verdict.String(), a.Reason.String(), a.Rule)
	}
}

// changeOf compares what was with what would be.
func changeOf(verdict policy.Verdict, was outcome, now policy.Decision) (Change, bool) {
	switch {
	case was == passed && !now.Passes():
		return Denied, true
	case was == denied && now.Passes(), verdict == policy.Observe && now.Verdict == policy.Allow:
		return Allowed, true
	case verdict == policy.Allow && now.Verdict == policy.Observe:
		return Observed, true
	}
	return 0, false
}

func words(s ...string) string { return strings.TrimSpace(strings.Join(s, " ")) }

// clip bounds what is kept of a text.
func clip(b []byte) []byte { return b[:min(len(b), 128)] }

// row returns the row that a belongs to.
func (r *Replay) row(c Change, a *answer) *Row {
	k := rowKey{c, a.Group, a.req.Name.String(), string(a.rec.event), a.req.Port, string(clip(a.rec.qtype))}
	if a.req.Address.IsValid() {
		k.name = a.req.Address.String()
	}
	if row := r.rows[k]; row != nil {
		return row
	}
	if len(r.rows) >= maxRows {
		r.rep.Folded++
		if domain, err := publicsuffix.EffectiveTLDPlusOne(k.name); err == nil && !a.req.Address.IsValid() {
			k.name = "*." + domain
		} else {
			k.name = others
		}
		k.port, k.qtype = 0, ""
		if r.rows[k] == nil && len(r.rows) >= maxAllRows {
			k = rowKey{change: c, name: others, event: "any"}
		}
		if row := r.rows[k]; row != nil {
			return row
		}
	}
	row := &Row{Change: c, Kind: c.String(), Group: strings.Clone(k.group), Name: strings.Clone(k.name), Event: k.event, Port: k.port, QType: k.qtype}
	r.rows[k] = row
	return row
}

// Report returns what was found so far. The Replay must not be used afterwards.
func (r *Replay) Report() *Report {
	r.rep.Rows = make([]*Row, 0, len(r.rows))
	for _, row := range r.rows {
		r.rep.Rows = append(r.rep.Rows, row)
	}
	slices.SortFunc(r.rep.Rows, func(a, b *Row) int {
		return cmp.Or(cmp.Compare(a.Change, b.Change), cmp.Compare(a.Group, b.Group), cmp.Compare(b.Count, a.Count),
			cmp.Compare(a.Name, b.Name), cmp.Compare(a.Event, b.Event), cmp.Compare(a.Port, b.Port), cmp.Compare(a.QType, b.QType))
	})
	return &r.rep
}
