package dashboard

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"sallyport/internal/admin"
	"sallyport/internal/live"
	"sallyport/policy"
)

// Bounds of what a page shows; what is left out is said on it.
const (
	maxDecisions = 60              // on the overview, before the stream brings more
	maxDenied    = 12              // on the overview
	maxPairs     = 500             // on the discovery page
	maxTunnels   = 1000            // on the tunnels page
	maxProposal  = 256 << 10       // bytes of a proposal on the discovery page; a download has all
	deniedAge    = 5 * time.Second // how long one look at the top denied serves every reader
	looked       = 2000            // decisions searched for an example of something denied
)

var verdicts = []string{"allow", "deny", "observe"}

// groups returns the names of the policy's groups that have sources or users.
func (d *dashboard) groups() []string {
	var names []string
	if p := d.policyDetail(); p != nil {
		for i := range p.Groups {
			if g := &p.Groups[i]; len(g.Sources)+len(g.Users) > 0 {
				names = append(names, g.Name)
			}
		}
	}
	return names
}

// policyDetail returns the policy in force, or nil if it is not known.
func (d *dashboard) policyDetail() *admin.PolicyDetail {
	if d.API.Policy == nil {
		return nil
	}
	p, err := d.API.Policy()
	if err != nil {
		return nil
	}
	return p
}

// A tile is one number of the overview.
type tile struct {
	Label, Value, Note string
	Bad                bool
	Code               bool // Value is an identifier
}

// tiles sums up st and the last step of the series.
func (d *dashboard) tiles(st *admin.Status, now time.Time) []tile {
	health := tile{Label: "Health", Value: "Ready", Note: "every listener is up"}
	if !st.Ready() {
		health = tile{"Health", "Not ready", strings.Join(problems(st), "; "), true, false}
	}
	revision := tile{Label: "Policy", Value: cmp.Or(st.Policy.Revision, "none"), Note: "in force for " + span(now.Sub(st.Policy.LoadedAt)), Code: true}
	switch {
	case st.Policy.Revision == "":
		revision.Note, revision.Bad = "nothing passes", true
	case st.Policy.LastReload.Error != "" && !st.Policy.LastReload.OK:
		revision.Note, revision.Bad = "the last reload was refused", true
	case st.Policy.LastGood:
		revision.Note, revision.Bad = "last good copy; the source could not be used", true
	}
	all := []tile{health, revision}
	if d.API.Series != nil {
		s := d.API.Series(2)
		open := last(s.Tunnels)
		if d.API.TunnelCount != nil {
			open = d.API.TunnelCount()
		}
		all = append(all,
			verdictTile("Proxy decisions / s", &s.Decisions), verdictTile("DNS queries / s", &s.DNSQueries),
			tile{Label: "Traffic / s", Value: "↓ " + binary(last(s.BytesDown)), Note: "↑ " + binary(last(s.BytesUp))},
			tile{Label: "Tunnels", Value: number(open), Note: "open now"},
		)
	}
	if d.API.LogDropped != nil {
		if n := d.API.LogDropped(); n > 0 {
			all = append(all, tile{"Log lines lost", number(n), "the output is too slow, or full", true, false})
		}
	}
	return all
}

func verdictTile(label string, v *admin.Verdicts) tile {
	allow, deny, observe := last(v.Allow), last(v.Deny), last(v.Observe)
	note := rate(allow) + " allowed, " + rate(deny) + " denied"
	if observe > 0 {
		note += ", " + rate(observe) + " observed"
	}
	return tile{Label: label, Value: rate(allow + deny + observe), Note: note}
}

func last[T any](s []T) (zero T) {
	if len(s) == 0 {
		return zero
	}
	return s[len(s)-1]
}

// problems says why st is not ready.
func problems(st *admin.Status) []string {
	var why []string
	if st.Draining {
		why = append(why, "draining")
	}
	for _, l := range listeners(st) {
		if !l.Up {
			why = append(why, "listener "+l.Name+" is down")
		}
	}
	if !st.Upstream.OK {
		why = append(why, "no DNS upstream answers")
	}
	if st.Policy.Revision == "" {
		why = append(why, "no policy")
	}
	return why
}

type listener struct {
	Name string
	Up   bool
}

func listeners(st *admin.Status) []listener {
	var all []listener
	for name, up := range st.Listeners {
		all = append(all, listener{name, up})
	}
	slices.SortFunc(all, func(a, b listener) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// A decision is a row of the live table. app.js makes the same of JSON.
type decision struct {
	live.Decision
	What, Target, Link, Bytes, MS string
}

func newDecision(d live.Decision) decision {
	v := decision{Decision: d, What: cmp.Or(d.QType, d.Method, d.Event), Target: d.Name, MS: number(int64(d.DurationMS + .5))}
	if d.Port != 0 {
		v.Target = fmt.Sprintf("%s:%d", d.Name, d.Port)
		if strings.Contains(d.Name, ":") && !strings.HasPrefix(d.Name, "[") {
			v.Target = fmt.Sprintf("[%s]:%d", d.Name, d.Port)
		}
	}
	if d.BytesUp != 0 || d.BytesDown != 0 {
		v.Bytes = byteSize(d.BytesUp) + " / " + byteSize(d.BytesDown)
	}
	if d.Seq != 0 {
		r := refused(&d)
		v.Link = r.link()
	}
	return v
}

// refused is what a remedy for d depends on.
func refused(d *live.Decision) refusal {
	r := refusal{
		Group: d.Group, Source: d.Src, User: d.User, Name: d.Name, Port: d.Port, DNS: d.Event == "dns", HTTP: d.Event == "http",
		QType: d.QType, SNI: d.SNI, Reason: d.Reason, Rule: d.Rule,
	}
	r.Destination, _ = netip.ParseAddr(d.Dst) // zero if it is not known
	if ap, err := netip.ParseAddrPort(d.Dst); err == nil {
		r.Destination = ap.Addr()
	}
	return r
}

// link is the explain page with the form filled in; what cannot be explained stands
// in it all the same, for the page to say what is wrong with it.
func (r *refusal) link() string {
	q := url.Values{}
	set := func(key, value string) {
		if value != "" {
			q.Set(key, value)
		}
	}
	target := r.Target()
	if target == "" {
		target = r.Name
	}
	set("source", r.Source)
	set("target", target)
	set("user", r.User)
	if r.DNS {
		set("dns", cmp.Or(r.QType, "A"))
	} else if !r.HTTP {
		set("sni", r.SNI)
	}
	return "/explain?" + q.Encode()
}

// A denial is a line of the top denied.
type denial struct {
	Key, Shown, Group, Verdict, Reason string
	Count                              uint64
	Last                               time.Time
	Remedy                             remedy
}

// topDenied returns what was denied, or would have been, most often.
func (d *dashboard) topDenied() []denial {
	d.deniedMu.Lock()
	defer d.deniedMu.Unlock()
	if now := time.Now(); now.Sub(d.deniedAt) > deniedAge {
		d.denied, d.deniedAt = d.findDenied(), now
	}
	return d.denied
}

// findDenied asks discovery what was denied, and the newest decisions for an example
// of each, which says what discovery does not keep: a source, a server name.
func (d *dashboard) findDenied() []denial {
	recent := d.recent(live.Filter{}, looked)
	var pairs []admin.Pair
	if d.API.Discovery != nil {
		for _, verdict := range []string{"deny", "observe"} {
			if some, err := d.API.Discovery(admin.DiscoveryQuery{Verdict: verdict, Since: time.Now().AddDate(0, 0, -1)}); err == nil {
				pairs = append(pairs, some[:min(len(some), maxDenied)]...)
			}
		}
	} else {
		pairs = deniedOf(recent)
	}
	slices.SortStableFunc(pairs, func(a, b admin.Pair) int { return cmp.Compare(b.Count, a.Count) })
	var all []denial
	for i := range pairs[:min(len(pairs), maxDenied)] {
		p := &pairs[i]
		r := refusal{Group: p.Group, Name: p.Name, Port: p.Port, DNS: p.Protocol == "dns", HTTP: p.Protocol == "http", QType: p.QType, Reason: p.Reason, Rule: p.Rule}
		for j := range recent {
			if e := &recent[j]; e.Group == p.Group && e.Reason == p.Reason && e.Port == p.Port && strings.EqualFold(e.Name, p.Name) && (e.Event == "dns") == r.DNS {
				r = refused(e)
				break
			}
		}
		if r.Source == "" {
			r.Source = d.anySource(p.Group)
		}
		m := remedyFor(r)
		if m.Explain != "" {
			m.Link = r.link()
		}
		shown := r.Target()
		if shown == "" {
			shown = p.Name
		}
		if r.DNS {
			shown += " " + cmp.Or(r.QType, "(DNS)")
		}
		all = append(all, denial{
			Key: visible(strings.Join([]string{p.Group, p.Name, fmt.Sprint(p.Port), p.Protocol, p.Verdict, p.Reason}, " ")), Shown: shown,
			Group: p.Group, Verdict: p.Verdict, Reason: p.Reason, Count: p.Count, Last: p.LastSeen, Remedy: m,
		})
	}
	return all
}

// deniedOf counts what recent decisions denied, where there is no discovery.
func deniedOf(recent []live.Decision) []admin.Pair {
	type key struct {
		group, name, event, verdict, reason string
		port                                uint16
	}
	index := map[key]int{}
	var pairs []admin.Pair
	for i := range recent {
		e := &recent[i]
		if e.Verdict == "allow" || e.Verdict == "" {
			continue
		}
		k := key{e.Group, e.Name, e.Event, e.Verdict, e.Reason, e.Port}
		j, ok := index[k]
		if !ok {
			j = len(pairs)
			index[k] = j
			pairs = append(pairs, admin.Pair{
				Group: e.Group, Name: e.Name, Port: e.Port, Protocol: e.Event, Verdict: e.Verdict, Reason: e.Reason, Rule: e.Rule, LastSeen: e.Time,
			})
		}
		pairs[j].Count++
	}
	return pairs
}

// anySource returns an address of the group, for a command that needs one; "" if it
// has none.
func (d *dashboard) anySource(group string) string {
	p := d.policyDetail()
	if p == nil || group == "" {
		return ""
	}
	for i := range p.Groups {
		if p.Groups[i].Name != group || len(p.Groups[i].Sources) == 0 {
			continue
		}
		src := p.Groups[i].Sources[0]
		if prefix, err := netip.ParsePrefix(src); err == nil {
			return prefix.Addr().String()
		}
		return src
	}
	return ""
}

func (d *dashboard) recent(f live.Filter, limit int) []live.Decision {
	if d.API.Recent == nil {
		return nil
	}
	return d.API.Recent(f, limit)
}

func (d *dashboard) overview(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	f := live.Filter{Group: q.Get("group"), Verdict: q.Get("verdict"), Reason: q.Get("reason"), Listener: q.Get("listener"), Name: q.Get("name")}
	st := d.Status(r.Context())
	v := struct {
		Status                               *admin.Status
		Tiles                                []tile
		Denied                               []denial
		DeniedSince                          string
		Filter                               live.Filter
		Verdicts, Reasons, Groups, Listeners []string
		Decisions                            []decision
		Blank                                decision
		Cursor                               string // the stream goes on from there
	}{
		Status: &st, Tiles: d.tiles(&st, time.Now()), Denied: d.topDenied(), DeniedSince: "of the newest decisions", Filter: f,
		Blank: decision{Link: "/explain"}, Verdicts: verdicts, Groups: d.groups(), Listeners: []string{"dns", "dns_tls", "dns_https", "proxy", "proxy_tls"},
	}
	if d.API.Discovery != nil {
		v.DeniedSince = "since yesterday"
	}
	for _, reason := range policy.Reasons() {
		v.Reasons = append(v.Reasons, reason.String())
	}
	if d.API.Follow != nil { // before the rest: what comes meanwhile comes twice, and app.js knows it
		v.Cursor = d.API.Follow("").ID()
	}
	for _, e := range d.recent(f, maxDecisions) {
		v.Decisions = append(v.Decisions, newDecision(e))
	}
	d.render(w, r, http.StatusOK, "overview", "Overview", v)
}

// sinces are the times that the discovery page offers.
var sinces = []string{"1 day", "7 days", "30 days"}

func (d *dashboard) discovery(w http.ResponseWriter, r *http.Request) {
	type chip struct {
		Name, Link string
		Current    bool
	}
	q := r.URL.Query()
	v := struct {
		Name, Group, Verdict, Since, MinCount string
		Groups, Verdicts, Sinces              []string
		Filtered                              bool
		Error, Proposal, ProposalError        string
		Chips                                 []chip
		File                                  string
		YAML, JSON, CSV                       string // addresses of downloads
		Pairs                                 []admin.Pair
		Total                                 int
	}{
		Name: q.Get("name"), Group: q.Get("group"), Verdict: q.Get("verdict"), Since: q.Get("since"), MinCount: q.Get("min_count"),
		Groups: d.groups(), Verdicts: verdicts, Sinces: sinces,
	}
	query := admin.DiscoveryQuery{Group: v.Group, Verdict: v.Verdict}
	if _, err := fmt.Sscan(v.MinCount, &query.MinCount); err != nil {
		v.MinCount = ""
	}
	var days int
	if slices.Contains(sinces, v.Since) {
		_, _ = fmt.Sscan(v.Since, &days) // each begins with a number
		query.Since = time.Now().AddDate(0, 0, -days)
	}
	v.Filtered = v.Name != "" || query != admin.DiscoveryQuery{}
	if d.API.Discovery == nil {
		v.Error = "Discovery is not in use here."
	} else {
		pairs, err := d.API.Discovery(query)
		if err != nil {
			v.Error = err.Error()
		}
		if v.Name != "" {
			pairs = slices.DeleteFunc(slices.Clone(pairs), func(p admin.Pair) bool {
				return !strings.Contains(strings.ToLower(p.Name), strings.ToLower(v.Name))
			})
		}
		v.Total = len(pairs)
		v.Pairs = pairs[:min(len(pairs), maxPairs)]
	}
	if d.API.Proposal != nil {
		for _, g := range v.Groups {
			c := url.Values{}
			for key, values := range q {
				if key != "proposal" {
					c[key] = values
				}
			}
			c.Set("proposal", g)
			v.Chips = append(v.Chips, chip{g, "/discovery?" + c.Encode() + "#groups-title", g == q.Get("proposal")})
		}
		if g := q.Get("proposal"); g != "" {
			v.File = "sallyport-" + strings.Map(fileRune, g)
			download := func(output string) string {
				p := url.Values{"group": {g}, "output": {output}}
				if days > 0 {
					p.Set("since", fmt.Sprintf("%dd", days))
				}
				if v.MinCount != "" {
					p.Set("min_count", v.MinCount)
				}
				return "/api/v1/proposal?" + p.Encode()
			}
			v.YAML, v.JSON, v.CSV = download("yaml"), download("json"), download("csv")
			out := &bounded{left: maxProposal}
			err := d.API.Proposal(out, admin.ProposalQuery{Group: g, Since: query.Since, MinCount: query.MinCount, Output: "yaml"})
			switch {
			case err != nil && !errors.Is(err, errTooLong):
				v.ProposalError = err.Error()
			case out.String() == "":
				v.ProposalError = "There is nothing to propose: everything this group asked for is allowed."
			default:
				v.Proposal = visibleText(out.String())
			}
			if errors.Is(err, errTooLong) {
				v.ProposalError = "The proposal is cut here; the download has all of it."
			}
		}
	}
	d.render(w, r, http.StatusOK, "discovery", "Discovery", v)
}

// fileRune keeps what is harmless in the name of a file.
func fileRune(r rune) rune {
	if strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", r) {
		return r
	}
	return '_'
}

var errTooLong = errors.New("too long for a page")

// A bounded keeps the first bytes that are written to it, and then refuses.
type bounded struct {
	strings.Builder
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.left)
	b.left -= n
	b.Builder.Write(p[:n])
	if n < len(p) {
		return n, errTooLong
	}
	return n, nil
}

// An answer is what "sallyport explain --json" prints.
type answer struct {
	Source, Target, Verdict, Reason, Rule, Group, Mode, User, Prefix, Policy string

	Candidates []struct {
		Effect, Rule, Group, Pattern, Reason string
		Matched                              bool
		Outcome                              string `json:"-"`
	}
}

func (d *dashboard) explain(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	v := struct {
		Query    admin.ExplainQuery
		More     bool
		Error    string
		Answer   *answer
		RuleLink string
		Remedy   *remedy
	}{Query: admin.ExplainQuery{
		Source: strings.TrimSpace(q.Get("source")), Target: strings.TrimSpace(q.Get("target")), User: q.Get("user"), DNS: strings.TrimSpace(q.Get("dns")),
		SNI: strings.TrimSpace(q.Get("sni")), Destination: strings.TrimSpace(q.Get("destination")), At: strings.TrimSpace(q.Get("at")),
	}}
	v.More = v.Query.User+v.Query.DNS+v.Query.SNI+v.Query.Destination+v.Query.At != ""
	status := http.StatusOK
	switch {
	case d.API.Explain == nil:
		v.Error = "Decisions cannot be explained here."
	case v.Query.Source != "" || v.Query.Target != "":
		text, err := d.API.Explain(v.Query)
		a := &answer{}
		if err == nil {
			err = json.Unmarshal(text, a)
		}
		switch {
		case errors.Is(err, admin.ErrBadRequest):
			status, v.Error = http.StatusBadRequest, err.Error()
		case err != nil:
			status, v.Error = http.StatusInternalServerError, "This could not be explained: "+err.Error()
		default:
			a.finish()
			v.Answer = a
			v.RuleLink = "/policy?" + url.Values{"q": {a.Rule}}.Encode()
			m := remedyFor(asked(v.Query, a))
			v.Remedy = &m
		}
	}
	d.render(w, r, status, "explain", "Explain", v)
}

// finish says what became of each candidate, as the command does.
func (a *answer) finish() {
	for i := range a.Candidates {
		c := &a.Candidates[i]
		switch {
		case c.Matched:
			c.Outcome = "matched"
		case c.Effect == "deny":
			c.Outcome = "does not apply"
		default:
			c.Outcome = c.Reason
		}
	}
}

// asked is what a remedy for a, the answer to q, depends on.
func asked(q admin.ExplainQuery, a *answer) refusal {
	r := refusal{Group: a.Group, Source: q.Source, User: q.User, SNI: q.SNI, Reason: a.Reason, Rule: a.Rule}
	r.Destination, _ = netip.ParseAddr(q.Destination) // zero if it is not known
	if q.DNS != "" {
		r.DNS, r.QType, r.Name = true, strings.ToUpper(q.DNS), q.Target
		return r
	}
	authority := q.Target
	if rest, ok := strings.CutPrefix(authority, "http://"); ok {
		r.HTTP = true
		authority, _, _ = strings.Cut(rest, "/")
		if u, err := url.Parse(q.Target); err == nil && u.Port() == "" {
			authority += ":80"
		}
	}
	name, addr, port, err := policy.ParseAuthority(authority)
	if err != nil {
		return r
	}
	r.Name, r.Port = name.String(), port
	if addr.IsValid() {
		r.Name = addr.String()
	}
	return r
}

func (d *dashboard) tunnels(w http.ResponseWriter, r *http.Request) {
	type row struct {
		admin.Tunnel
		Text string
	}
	v := struct {
		Text          string
		Unknown       bool
		Total, Looked int
		Tunnels       []row
	}{Text: r.URL.Query().Get("q"), Unknown: d.API.Tunnels == nil}
	if d.API.Tunnels != nil {
		var all []admin.Tunnel
		all, v.Total = d.API.Tunnels(maxTunnels)
		v.Looked = len(all)
		for _, t := range all {
			text := strings.Join([]string{t.Src, t.User, t.Group, fmt.Sprintf("%s:%d", t.Name, t.Port), t.Dst, t.Rule, t.ID}, " ")
			if contains(text, v.Text) {
				v.Tunnels = append(v.Tunnels, row{t, text})
			}
		}
	}
	d.render(w, r, http.StatusOK, "tunnels", "Tunnels", v)
}

// contains reports whether text has every word of words, whatever the case.
func contains(text, words string) bool {
	text = strings.ToLower(text)
	for word := range strings.FieldsSeq(strings.ToLower(words)) {
		if !strings.Contains(text, word) {
			return false
		}
	}
	return true
}

func (d *dashboard) health(w http.ResponseWriter, r *http.Request) {
	st := d.Status(r.Context())
	v := struct {
		Listeners    []listener
		Tunnels      int
		TunnelsKnown bool
		LogLost      uint64
		Started      time.Time
	}{Listeners: listeners(&st), TunnelsKnown: d.API.TunnelCount != nil, Started: d.API.Started}
	if v.TunnelsKnown {
		v.Tunnels = d.API.TunnelCount()
	}
	if d.API.LogDropped != nil {
		v.LogLost = d.API.LogDropped()
	}
	d.render(w, r, http.StatusOK, "health", "Health", v)
}
