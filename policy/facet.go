package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
)

// A standing is one rule that covers a destination and counts for a group.
type standing struct {
	ref *ref
	hit hit
}

// A side is what one policy says about one destination.
type side struct {
	p     *Policy
	g     *group // nil: the source has no group, and everything is denied
	rules []standing
}

// side returns what p's group g (-1: none) says about the destination that hits cover.
func (p *Policy) side(g int, hits []hit) side {
	s := side{p: p}
	if g < 0 {
		return s
	}
	s.g = &p.groups[g]
	for _, h := range hits {
		refs := p.postings.sets[h.refs]
		for i := range refs {
			if slices.Contains(s.g.owners, refs[i].owner) {
				s.rules = append(s.rules, standing{&refs[i], h})
			}
		}
	}
	return s
}

func (s *side) rule(i int) *rule { return &s.p.rules[s.rules[i].ref.rule] }

// with returns s with the deny rules for addresses that hold at dest too.
func (s side) with(dest netip.Addr) side {
	refs, ok := s.p.addresses.Lookup(dest)
	if s.g == nil || !ok {
		return s
	}
	h := hit{refs: refs}
	there := s.p.side(slices.IndexFunc(s.p.groups, func(g group) bool { return g.name == s.g.name }), []hit{h})
	s.rules = slices.Clone(s.rules)
	for i := range there.rules {
		if there.rule(i).deny {
			s.rules = append(s.rules, there.rules[i])
		}
	}
	return s
}

// decide answers r from the rules of s alone, in the given mode.
func (s *side) decide(r Request, mode Mode, counts func(*rule) bool) Decision {
	if s.g == nil {
		return Decision{Reason: ReasonUnmatchedSource}
	}
	e := eval{p: s.p, g: s.g, named: !r.Name.IsZero()}
	for i := range s.rules {
		if counts == nil || counts(s.rule(i)) {
			e.judge(s.rules[i].ref, s.rules[i].hit, &r)
		}
	}
	d := Decision{Mode: mode}
	e.verdict(&r, &d)
	return d
}

// A cell is one kind of traffic to a destination: all that a rule can tell apart.
type cell struct {
	dest  netip.Addr // where the name leads; zero: to a globally reachable address
	port  uint16     // with kinds other than kindDNS
	kind  uint8      // a ClientHello below helloKinds, or one of those behind it
	qtype uint16     // with kindDNS
}

// The kinds of cells. The ClientHellos are numbered sni*8 + version*2 + ech, where
// sni is 0 (as expected), 1 (absent) or 2 (another listed name), and version is 0
// (TLS 1.0) to 3 (TLS 1.3).
const (
	helloAbsent  = 1 * 8
	helloListed  = 2 * 8
	helloKinds   = 3 * 8
	helloECH     = 1
	helloPlain13 = 3 * 2 // what current clients send

	kindHTTP    = helloKinds
	kindTCP     = helloKinds + 1 // neither TLS nor HTTP
	kindUnseen  = helloKinds + 2 // whatever the client likes, relayed without looking
	kindConnect = helloKinds + 3 // a CONNECT is answered, whatever comes of it
	connKinds   = helloKinds + 4
	kindDNS     = connKinds
)

// passes reports whether s lets c through, and the decision.
func (s *side) passes(base Request, c cell, mode Mode) (bool, Decision) {
	r := base
	if c.dest.IsValid() {
		r.Destination = c.dest
	}
	r.Port = c.port
	var counts func(*rule) bool
	switch c.kind {
	case kindDNS:
		r.Port, r.Protocol, r.QType = 0, ProtocolDNS, c.qtype
	case kindHTTP:
		r.Protocol = ProtocolHTTP
	case kindTCP:
		r.Protocol = ProtocolTCP
	case kindUnseen, kindConnect:
	default:
		r.Protocol = ProtocolTLS
		r.TLS = TLS{Seen: true, SNI: r.Name, MaxVersion: 0x0301 + uint16(c.kind%8/2), ECH: c.kind%2 == helloECH}
		switch c.kind &^ 7 {
		case helloAbsent:
			r.TLS.SNI = Name{}
		case helloListed: // to those rules any listed name is as good as the expected one
			counts = func(rule *rule) bool {
				return rule.deny || rule.tls.sni == sniListed || rule.protocols&forTCP != 0
			}
		}
	}
	d := s.decide(r, mode, counts)
	return d.Passes() && (c.kind != kindUnseen || d.Inspect&InspectNone != 0), d
}

// connections returns which kinds of cells s lets through on port, as bits.
func (s *side) connections(base Request, dest netip.Addr, port uint16, mode Mode) (bits uint32) {
	c := cell{dest: dest, port: port, kind: kindConnect}
	ok, d := s.passes(base, c, mode)
	if !ok && mode == ModeEnforce {
		return 0 // what is refused before it is looked at is refused altogether
	}
	if ok {
		bits |= 1 << kindConnect
	}
	if ok && d.Inspect&InspectNone != 0 && mode == ModeEnforce {
		bits |= 1 << kindUnseen
	}
	for c.kind = range uint8(kindUnseen) {
		if c.kind >= 8 && c.kind < helloKinds && base.Name.IsZero() {
			continue // a literal address expects no server_name
		}
		if ok, _ := s.passes(base, c, mode); ok {
			bits |= 1 << c.kind
		}
	}
	if mode == ModeObserve { // whether it is looked at decides nothing there
		bits |= bits >> kindTCP & 1 << kindUnseen
	}
	return bits
}

// String returns the port, or first-last.
func (p portRange) String() string {
	if p.first == p.last {
		return strconv.Itoa(int(p.first))
	}
	return fmt.Sprintf("%d-%d", p.first, p.last)
}

// portSpans cuts the ports where a rule of one of the sides begins or ends.
func portSpans(sides ...*side) []portRange {
	starts := []uint16{1, portHTTP, portHTTP + 1, portTLS, portTLS + 1}
	for _, s := range sides {
		for i := range s.rules {
			for _, r := range s.rule(i).ports {
				starts = append(starts, r.first)
				if r.last < 65535 {
					starts = append(starts, r.last+1)
				}
			}
		}
	}
	slices.Sort(starts)
	starts = slices.Compact(starts)
	spans := make([]portRange, len(starts))
	for i, first := range starts {
		spans[i] = portRange{first, 65535}
		if i+1 < len(starts) {
			spans[i].last = starts[i+1] - 1
		}
	}
	return spans
}

// qtypeOther stands for the types that no rule names; it is in the range for private use.
const qtypeOther = 65399

var usualQTypes = []uint16{1, 5, 28, 64, 65}

// questionTypes returns the DNS types that the rules of the sides tell apart.
func questionTypes(sides ...*side) []uint16 {
	types := append([]uint16{qtypeOther}, usualQTypes...)
	for _, s := range sides {
		for i := range s.rules {
			types = append(types, s.rule(i).qtypes...)
		}
	}
	slices.Sort(types)
	return slices.Compact(types)
}

// privateRanges returns the parts of special address space that a rule of one of
// the sides names, cut where any rule or the registries make a difference.
func privateRanges(sides ...*side) []addrRange {
	var part partition
	var named []netip.Prefix
	for _, s := range sides {
		for i := range s.rules {
			named = append(named, s.rule(i).private...)
		}
	}
	if len(named) == 0 {
		return nil
	}
	for _, pfx := range named {
		part.add(pfx)
		for _, s := range sides { // where rules deny addresses
			for inner := range s.p.addresses.Subnets(pfx) {
				part.add(inner)
			}
		}
	}
	part.addSpecial()
	return slices.DeleteFunc(part.segments(), func(r addrRange) bool {
		return IsGlobal(r.first) || !slices.ContainsFunc(named, func(p netip.Prefix) bool { return p.Contains(r.first) })
	})
}

// A delta is one line of a difference: what is open on one side only, towards one
// set of addresses.
type delta struct {
	opened   bool // on the new side
	facets   []string
	to       []netip.Prefix // special addresses; nil: globally reachable ones
	observed bool           // it changes only what passes because the group observes
	sample   cell           // one of its cells
}

// key is equal for equal deltas.
func (x *delta) key() string {
	return fmt.Sprint(x.opened, x.observed, x.to, x.facets)
}

// cellDiff is what differs between two sides, towards one address.
type cellDiff struct {
	spans []portRange
	conn  []uint32 // by span: kinds of cells
	types []uint16
	dns   []bool // by type
}

// facets names the cells of x.
func (x *cellDiff) facets() []string {
	var out []string
	byLabel := map[string][]portRange{}
	for i, bits := range x.conn {
		for _, l := range labels(bits) {
			spans := byLabel[l]
			if n := len(spans); n > 0 && spans[n-1].last+1 == x.spans[i].first {
				spans[n-1].last = x.spans[i].last
			} else {
				byLabel[l] = append(spans, x.spans[i])
			}
		}
	}
	for _, l := range labelOrder {
		for _, span := range byLabel[l] {
			out = append(out, span.String()+"/"+l)
		}
	}
	return append(out, x.questions()...)
}

// questions names the DNS types of x.
func (x *cellDiff) questions() (out []string) {
	usual := 0
	for i, t := range x.types {
		if x.dns[i] && usualQType(t) {
			usual++
		}
	}
	if usual == len(usualQTypes) {
		out = append(out, "dns")
	}
	for i, t := range x.types {
		if x.dns[i] && (usual < len(usualQTypes) || !usualQType(t)) {
			out = append(out, "dns:"+qtypeName(t))
		}
	}
	return out
}

// qtypeName returns the mnemonic of t, or TYPEn.
func qtypeName(t uint16) string {
	if t == qtypeOther {
		return "other"
	}
	for name, n := range qtypes {
		if n == t {
			return name
		}
	}
	return fmt.Sprintf("TYPE%d", t)
}

// first returns one cell of x, the most usual one.
func (x *cellDiff) first() (cell, bool) {
	for _, kind := range []uint8{helloPlain13, kindHTTP, kindTCP} {
		for i, bits := range x.conn {
			if bits>>kind&1 != 0 {
				return cell{port: x.spans[i].first, kind: kind}, true
			}
		}
	}
	for i, bits := range x.conn {
		for kind := range uint8(connKinds) {
			if bits>>kind&1 != 0 {
				return cell{port: x.spans[i].first, kind: kind}, true
			}
		}
	}
	for i, t := range x.types {
		if x.dns[i] {
			return cell{kind: kindDNS, qtype: t}, true
		}
	}
	return cell{}, false
}

// labelOrder has every label, in the order in which they are shown.
var labelOrder = []string{
	"tls", "tls1.0+", "tls1.1+", "tls1.0", "tls1.1", "tls1.2", "tls1.3",
	"tls+ech", "tls+no_sni", "tls+listed_sni", "tls+other", "http", "tcp", "unseen", "connect",
}

// labels names kinds of cells, without those that go without saying.
func labels(bits uint32) (out []string) {
	has := func(kind int) bool { return bits>>kind&1 != 0 }
	hellos := bits & (1<<helloKinds - 1)
	if has(kindTCP) && has(kindUnseen) {
		hellos = 0 // part of what is relayed without looking
	}
	if hellos != 0 {
		out = append(out, helloLabels(has)...)
	}
	if has(kindHTTP) {
		out = append(out, "http")
	}
	switch {
	case has(kindTCP):
		out = append(out, "tcp")
	case has(kindUnseen):
		out = append(out, "unseen")
	}
	if len(out) == 0 && has(kindConnect) {
		out = append(out, "connect")
	}
	return out
}

// helloLabels names kinds of ClientHellos by what is unusual about them.
func helloLabels(has func(kind int) bool) (out []string) {
	versions := ""
	for v := range 4 {
		if has(v * 2) {
			versions += strconv.Itoa(v)
		}
	}
	switch versions {
	case "23":
		out = append(out, "tls")
	case "123":
		out = append(out, "tls1.1+")
	case "0123":
		out = append(out, "tls1.0+")
	default:
		for _, v := range versions {
			out = append(out, "tls1."+string(v))
		}
	}
	for _, axis := range []struct {
		kind  int
		label string
	}{{helloPlain13 + helloECH, "tls+ech"}, {helloPlain13 + helloAbsent, "tls+no_sni"}, {helloPlain13 + helloListed, "tls+listed_sni"}} {
		if has(axis.kind) {
			out = append(out, axis.label)
		}
	}
	if len(out) == 0 {
		out = append(out, "tls+other")
	}
	return out
}

// compare returns what differs between old and new. base holds the destination.
// only, if not nil, restricts it to some cells.
func compare(base Request, old, new side, observing bool) []delta {
	spans, types := portSpans(&old, &new), questionTypes(&old, &new)
	if base.Name.IsZero() {
		types = nil // nobody asks the resolver for an address
	}
	g := grid{base: base, old: old, new: new, spans: spans, types: types, observing: observing}
	deltas := g.towards(netip.Addr{})
	if base.Destination.IsValid() {
		return deltas
	}
	return append(deltas, g.private()...)
}

// A grid is two sides and the cells on which they may differ.
type grid struct {
	base      Request
	old, new  side
	spans     []portRange
	types     []uint16
	observing bool // both sides observe
}

// private returns what differs towards the special addresses that rules name.
func (g *grid) private() []delta {
	var out []delta
	ranges := map[string][]addrRange{}
	for _, r := range privateRanges(&g.old, &g.new) {
		for _, x := range g.towards(r.first) {
			key := x.key()
			if ranges[key] == nil {
				out = append(out, x)
			}
			ranges[key] = append(ranges[key], r)
		}
	}
	for i := range out {
		out[i].to = toPrefixes(ranges[out[i].key()])
	}
	return out
}

// towards returns what differs towards dest.
func (g *grid) towards(dest netip.Addr) (out []delta) {
	opened, closed := g.diffThere(dest, ModeEnforce)
	out = append(out, opened.delta(dest, true, false)...)
	out = append(out, closed.delta(dest, false, false)...)
	if g.observing {
		o, c := g.diffThere(dest, ModeObserve)
		o.without(&opened)
		c.without(&closed)
		out = append(out, o.delta(dest, true, true)...)
		out = append(out, c.delta(dest, false, true)...)
	}
	return out
}

// diffThere is diff without what makes no difference because rules for addresses
// deny it on one of the sides.
func (g *grid) diffThere(dest netip.Addr, mode Mode) (opened, closed cellDiff) {
	opened, closed = g.diff(dest, mode)
	if !dest.IsValid() {
		return opened, closed
	}
	there := *g
	there.old, there.new = g.old.with(dest), g.new.with(dest)
	if len(there.old.rules) == len(g.old.rules) && len(there.new.rules) == len(g.new.rules) {
		return opened, closed
	}
	o, c := there.diff(dest, mode)
	opened.within(&o)
	closed.within(&c)
	return opened, closed
}

// diff returns the cells that let through dest on one side only.
func (g *grid) diff(dest netip.Addr, mode Mode) (opened, closed cellDiff) {
	opened = cellDiff{spans: g.spans, conn: make([]uint32, len(g.spans)), types: g.types, dns: make([]bool, len(g.types))}
	closed = cellDiff{spans: g.spans, conn: make([]uint32, len(g.spans)), types: g.types, dns: make([]bool, len(g.types))}
	for i, span := range g.spans {
		o, n := g.old.connections(g.base, dest, span.first, mode), g.new.connections(g.base, dest, span.first, mode)
		opened.conn[i], closed.conn[i] = n&^o, o&^n
	}
	for i, t := range g.types {
		c := cell{dest: dest, kind: kindDNS, qtype: t}
		o, _ := g.old.passes(g.base, c, mode)
		n, _ := g.new.passes(g.base, c, mode)
		opened.dns[i], closed.dns[i] = n && !o, o && !n
	}
	return opened, closed
}

// without takes the cells of y out of x.
func (x *cellDiff) without(y *cellDiff) {
	for i := range x.conn {
		x.conn[i] &^= y.conn[i]
	}
	for i := range x.dns {
		x.dns[i] = x.dns[i] && !y.dns[i]
	}
}

// within leaves only the cells of y in x.
func (x *cellDiff) within(y *cellDiff) {
	for i := range x.conn {
		x.conn[i] &= y.conn[i]
	}
	for i := range x.dns {
		x.dns[i] = x.dns[i] && y.dns[i]
	}
}

// delta returns x as a delta, if there is anything in it.
func (x *cellDiff) delta(dest netip.Addr, opened, observed bool) []delta {
	c, ok := x.first()
	if !ok {
		return nil
	}
	c.dest = dest
	return []delta{{opened: opened, observed: observed, facets: x.facets(), sample: c}}
}
