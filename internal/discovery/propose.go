package discovery

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/policy"
)

// A Proposal is policy that would allow what was observed.
type Proposal struct {
	Generated time.Time       `json:"generated"`
	Since     time.Time       `json:"since"` // zero: everything that is known
	Policy    string          `json:"policy"`
	MinCount  uint64          `json:"min_count"`
	Groups    []GroupProposal `json:"groups"`
}

// A GroupProposal is what to add to the allow section of one group.
type GroupProposal struct {
	Group   string         `json:"group"`
	Rules   []ProposedRule `json:"rules"`
	Remarks []Remark       `json:"remarks"` // what is not proposed
	Allowed int            `json:"allowed"` // destinations left out because the policy allows them already
	Rare    int            `json:"rare"`    // and because they were seen less than MinCount times
}

// A ProposedRule is a rule, or with neither protocol nor ports nor qtypes a run of bare names.
type ProposedRule struct {
	Protocol  string   `json:"protocol,omitempty"`
	Ports     []uint16 `json:"ports,omitempty"`
	QTypes    []string `json:"qtypes,omitempty"`
	Addresses bool     `json:"addresses,omitempty"` // the lines are addresses, not names
	Lines     []Line   `json:"lines"`
}

// A Line is one name, pattern or address, and the evidence for it.
type Line struct {
	Pattern          string    `json:"pattern"`
	Covers           []string  `json:"covers,omitempty"` // of a pattern: some of the names that were seen
	Names            int       `json:"names"`            // how many were
	Count            uint64    `json:"count"`
	Sources          int       `json:"sources"`
	SourcesEstimated bool      `json:"sources_estimated,omitempty"`
	FirstSeen        time.Time `json:"first_seen"`
	LastSeen         time.Time `json:"last_seen"`
	Unseen           bool      `json:"unseen,omitempty"` // what was spoken there was never seen

	clients sources
	since   uint16
}

// A Remark says why something is not proposed.
type Remark struct {
	Name     string    `json:"name"`
	Port     uint16    `json:"port,omitempty"`
	Why      string    `json:"why"`
	Count    uint64    `json:"count"`
	LastSeen time.Time `json:"last_seen"`
}

// maxCovers bounds the names that a pattern is said to stand for.
const maxCovers = 5

// Propose returns what to add to p so that it allows what pairs observed: what a group
// that observes let pass. p may be nil: then nothing is allowed already. Denials are
// looked at for remarks alone.
func Propose(pairs []Pair, p *policy.Policy, o ProposalOptions) *Proposal {
	out := &Proposal{Generated: o.Now, Since: o.Since, MinCount: max(o.MinCount, 1), Groups: []GroupProposal{}}
	if p != nil {
		out.Policy = p.Revision()
	}
	byGroup := map[string][]*Pair{}
	observed := map[string]bool{o.Group: o.Group != ""}
	for i := range pairs {
		pair := &pairs[i]
		byGroup[pair.Group] = append(byGroup[pair.Group], pair)
		observed[pair.Group] = observed[pair.Group] || pair.Verdict == policy.Observe.String()
	}
	for group, yes := range observed {
		if yes && (o.Group == "" || o.Group == group) {
			g := proposer{group: group, policy: p, now: o.Now, wanted: map[want]*Line{}}
			out.Groups = append(out.Groups, g.propose(byGroup[group], out.MinCount))
		}
	}
	slices.SortFunc(out.Groups, func(a, b GroupProposal) int { return strings.Compare(a.Group, b.Group) })
	return out
}

// A want is one way in which a destination was wanted.
type want struct {
	name     string
	port     uint16
	protocol Protocol
	qtype    string
}

// A proposer makes the proposal for one group.
type proposer struct {
	group  string
	policy *policy.Policy
	now    time.Time
	out    GroupProposal
	wanted map[want]*Line
}

func (g *proposer) propose(pairs []*Pair, min uint64) GroupProposal {
	g.out = GroupProposal{Group: g.group, Rules: []ProposedRule{}, Remarks: []Remark{}}
	allowed := map[string]bool{}
	for _, pair := range pairs {
		why, isAllowed := g.consider(pair)
		switch {
		case isAllowed:
			allowed[pair.Name] = true
		case why != "":
			g.out.Remarks = append(g.out.Remarks, Remark{pair.Name, pair.Port, why, pair.Count, pair.LastSeen})
		case pair.Verdict == policy.Observe.String():
			w := want{pair.Name, pair.Port, pair.Protocol, pair.QType}
			if g.wanted[w] == nil {
				g.wanted[w] = &Line{}
			}
			g.wanted[w].add(pair)
		}
	}
	g.dropRare(min)
	g.out.Allowed = len(allowed)
	g.rules()
	slices.SortFunc(g.out.Remarks, func(a, b Remark) int {
		return cmp.Or(strings.Compare(a.Why, b.Why), compareNames(a.Name, b.Name), cmp.Compare(a.Port, b.Port))
	})
	return g.out
}

// consider says whether pair is allowed already, or else why it is not to be proposed;
// "" if it may be, or nobody let it pass.
func (g *proposer) consider(pair *Pair) (why string, allowed bool) {
	observed := pair.Verdict == policy.Observe.String()
	reason, _ := policy.ParseReason(pair.Reason)
	switch {
	case !observed && reason == policy.ReasonPrivateDestination:
		return "leads to a private address, which is refused while observing too; if that is meant, write private_destinations", false
	case !observed && reason == policy.ReasonExplicitDeny:
		return "denied by rule " + pair.Rule, false
	case !observed:
		return "", false
	case pair.Strange:
		return "neither a name nor an address", false
	}
	switch reason {
	case policy.ReasonSNIMissing, policy.ReasonSNIMismatch, policy.ReasonTLSVersion, policy.ReasonECHNotAllowed:
		return "covered by rule " + pair.Rule + ", but the TLS is not as it wants (" + pair.Reason + "); if that must be, relax tls in that rule", false
	}
	r, ok := requestOf(pair, g.now)
	if !ok {
		return "a question of a type that no rule can allow", false
	}
	if g.policy == nil {
		return "", false
	}
	d, known := g.policy.DecideFor(g.group, r)
	switch {
	case !known:
		return "", false
	case d.Verdict == policy.Allow:
		return "", true
	case d.Reason == policy.ReasonExplicitDeny:
		return "denied by rule " + d.Rule, false
	case d.Reason == policy.ReasonRuleExpired:
		return "rule " + d.Rule + " covers it and has expired; move its date if it is still needed", false
	}
	return "", false
}

// requestOf returns what was asked; false if nothing can allow that.
func requestOf(pair *Pair, now time.Time) (r policy.Request, ok bool) {
	r = policy.Request{Port: pair.Port, Time: now}
	if a, err := netip.ParseAddr(pair.Name); err == nil {
		r.Address = a
	} else if r.Name, err = policy.ParseName(pair.Name); err != nil {
		return r, false
	}
	switch pair.Protocol {
	case TLS:
		r.Protocol = policy.ProtocolTLS
	case HTTP:
		r.Protocol = policy.ProtocolHTTP
	case TCP:
		r.Protocol = policy.ProtocolTCP
	case DNS:
		r.Protocol, r.QType = policy.ProtocolDNS, 1
		if pair.QType != "" {
			r.QType, ok = policy.ParseQType(pair.QType)
			return r, ok
		}
	}
	return r, true
}

// add adds the evidence of pair.
func (l *Line) add(pair *Pair) {
	l.merge(&Line{
		Count: pair.Count, clients: pair.clients, since: pair.since,
		FirstSeen: pair.FirstSeen, LastSeen: pair.LastSeen, Unseen: pair.Protocol == Unknown,
	})
}

// merge adds the evidence of m, without its names.
func (l *Line) merge(m *Line) {
	if l.Count == 0 {
		l.Unseen = m.Unseen
	}
	l.Unseen = l.Unseen && m.Unseen
	l.Count += m.Count
	l.clients.merge(&m.clients)
	l.since = m.since
	l.Sources, l.SourcesEstimated = l.clients.count(l.since)
	if l.FirstSeen.IsZero() || m.FirstSeen.Before(l.FirstSeen) {
		l.FirstSeen = m.FirstSeen
	}
	if m.LastSeen.After(l.LastSeen) {
		l.LastSeen = m.LastSeen
	}
}

// dropRare forgets names that were wanted less than min times in all.
func (g *proposer) dropRare(min uint64) {
	sum := map[string]uint64{}
	for w, l := range g.wanted {
		sum[w.name] += l.Count
	}
	for w := range g.wanted {
		if sum[w.name] < min {
			delete(g.wanted, w)
		}
	}
	for _, n := range sum {
		if n < min {
			g.out.Rare++
		}
	}
}

// A form is what a rule says besides its destinations.
type form struct {
	protocol  string
	ports     string // in decimal, with commas
	qtypes    string // likewise
	addresses bool
}

// rules turns what was wanted into rules.
func (g *proposer) rules() {
	byName := map[string]map[want]*Line{}
	for w, l := range g.wanted {
		if byName[w.name] == nil {
			byName[w.name] = map[want]*Line{}
		}
		byName[w.name][w] = l
	}
	lines := map[form]map[string]*Line{}
	for name, wants := range byName {
		_, err := netip.ParseAddr(name)
		for f, l := range forms(wants) {
			f.addresses = err == nil
			if lines[f] == nil {
				lines[f] = map[string]*Line{}
			}
			lines[f][name] = l
		}
	}
	for f, names := range lines {
		g.out.Rules = append(g.out.Rules, ruleOf(f, names))
	}
	slices.SortFunc(g.out.Rules, func(a, b ProposedRule) int {
		return cmp.Or(compareBool(a.Addresses, b.Addresses), strings.Compare(a.Protocol, b.Protocol),
			slices.Compare(a.Ports, b.Ports), slices.Compare(a.QTypes, b.QTypes))
	})
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// forms returns the rules that allow wants, which are all of one destination: what a bare
// name allows as that, the rest by protocol.
func forms(wants map[want]*Line) map[form]*Line {
	spoken := map[uint16]map[Protocol]bool{} // by port
	for w := range wants {
		if w.protocol != DNS {
			if spoken[w.port] == nil {
				spoken[w.port] = map[Protocol]bool{}
			}
			spoken[w.port][w.protocol] = true
		}
	}
	ports := map[string][]uint16{} // by protocol, of rules with ports
	homes := map[want]string{}     // the protocol whose rule allows a want; "" is the bare name
	connected := map[string]bool{} // protocols in use
	for w := range wants {
		if w.protocol == DNS {
			continue
		}
		home := protocolFor(w, spoken[w.port])
		homes[w] = home
		connected[home] = true
		if home != "" && !slices.Contains(ports[home], w.port) {
			ports[home] = append(ports[home], w.port)
		}
	}
	out := map[form]*Line{}
	add := func(f form, l *Line) {
		if out[f] == nil {
			out[f] = &Line{}
		}
		out[f].merge(l)
	}
	formOf := func(protocol string) form {
		f := form{protocol: protocol}
		slices.Sort(ports[protocol])
		f.ports = join(ports[protocol], func(p uint16) string { return strconv.Itoa(int(p)) })
		return f
	}
	var qtypes []string
	for w := range wants {
		if w.protocol == DNS && w.qtype != "" && !slices.Contains(qtypes, w.qtype) {
			qtypes = append(qtypes, w.qtype)
		}
	}
	slices.Sort(qtypes)
	for w, l := range wants {
		switch {
		case w.protocol != DNS:
			add(formOf(homes[w]), l)
		case w.qtype != "" || len(qtypes) > 0 && len(connected) == 0:
			add(form{protocol: "dns", qtypes: strings.Join(qtypes, ",")}, l)
		case len(connected) == 0:
			add(form{protocol: "dns"}, l)
		default: // whatever allows a connection allows to resolve the name
			for _, home := range []string{"", "web", "tls", "http", "tcp"} {
				if connected[home] {
					add(formOf(home), l)
					break
				}
			}
		}
	}
	return out
}

func join[T any](items []T, text func(T) string) string {
	all := make([]string, len(items))
	for i, v := range items {
		all[i] = text(v)
	}
	return strings.Join(all, ",")
}

// protocolFor returns the protocol of the rule that allows w, where spoken is what was
// spoken on that port in all: "" is a bare name.
func protocolFor(w want, spoken map[Protocol]bool) string {
	protocol := w.protocol
	if protocol == Unknown { // whatever else was seen there; nothing else, then what is usual there
		switch {
		case spoken[TLS]:
			protocol = TLS
		case spoken[HTTP]:
			protocol = HTTP
		case spoken[TCP]:
			protocol = TCP
		case w.port == 443:
			protocol = TLS
		case w.port == 80:
			protocol = HTTP
		default:
			return "web"
		}
	}
	switch {
	case protocol == TLS && w.port == 443, protocol == HTTP && w.port == 80:
		return ""
	case protocol == TLS && spoken[TCP]:
		return "tcp" // which lets TLS pass too
	case protocol == TLS && spoken[HTTP] && w.port != 80, protocol == HTTP && spoken[TLS] && !spoken[TCP] && w.port != 443:
		return "web"
	}
	return string(protocol)
}

// ruleOf makes the rule for names with the form f.
func ruleOf(f form, names map[string]*Line) ProposedRule {
	r := ProposedRule{Protocol: f.protocol, Addresses: f.addresses}
	for s := range strings.SplitSeq(f.ports, ",") {
		if p, ok := policy.ParsePort(s); ok {
			r.Ports = append(r.Ports, p)
		}
	}
	if f.qtypes != "" {
		r.QTypes = strings.Split(f.qtypes, ",")
	}
	all := make([]string, 0, len(names))
	for n := range names {
		all = append(all, n)
	}
	slices.SortFunc(all, compareNames)
	var patterns []folded
	if f.addresses {
		for _, a := range all {
			patterns = append(patterns, folded{a, []string{a}})
		}
	} else {
		patterns = fold(all)
	}
	for _, p := range patterns {
		l := Line{Pattern: p.pattern, Names: len(p.names)}
		if p.pattern != p.names[0] || len(p.names) > 1 {
			l.Covers = p.names[:min(maxCovers, len(p.names))]
		}
		for _, n := range p.names {
			l.merge(names[n])
		}
		r.Lines = append(r.Lines, l)
	}
	return r
}

// Document returns p as the groups of a policy, to be compiled or compared.
func (p *Proposal) Document() *policy.Document {
	doc := &policy.Document{Version: policy.Version}
	for i := range p.Groups {
		g := policy.Group{Name: p.Groups[i].Group}
		for j := range p.Groups[i].Rules {
			r := &p.Groups[i].Rules[j]
			g.Allow = append(g.Allow, r.rules()...)
		}
		doc.Groups = append(doc.Groups, g)
	}
	return doc
}

// isBare reports whether the lines of r are rules on their own.
func (r *ProposedRule) isBare() bool {
	return r.Protocol == "" && len(r.Ports) == 0 && len(r.QTypes) == 0 && !r.Addresses
}

func (r *ProposedRule) rules() (out []policy.Rule) {
	whole := policy.Rule{Protocol: r.Protocol, QTypes: r.QTypes}
	for _, p := range r.Ports {
		whole.Ports = append(whole.Ports, strconv.Itoa(int(p)))
	}
	for i := range r.Lines {
		switch pattern := r.Lines[i].Pattern; {
		case r.isBare():
			out = append(out, policy.Rule{Names: []string{pattern}})
		case r.Addresses:
			whole.Addresses = append(whole.Addresses, pattern)
		default:
			whole.Names = append(whole.Names, pattern)
		}
	}
	if !r.isBare() {
		out = append(out, whole)
	}
	return out
}

// evidence says in words what speaks for l.
func (l *Line) evidence() string {
	sources := "from " + plural(uint64(l.Sources), "source")
	if l.SourcesEstimated {
		sources = "from about " + plural(uint64(l.Sources), "source")
	}
	text := fmt.Sprintf("%s %s, last %s", plural(l.Count, "time"), sources, l.LastSeen.UTC().Format(time.DateOnly))
	if l.Names > 1 || len(l.Covers) > 0 {
		text += fmt.Sprintf("; %s: %s", plural(uint64(l.Names), "name"), strings.Join(l.Covers, ", "))
		if l.Names > len(l.Covers) {
			text += ", ..."
		}
	}
	if l.Unseen {
		text += "; what was spoken was not seen"
	}
	return text
}

func plural(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
