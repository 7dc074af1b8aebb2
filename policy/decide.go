package policy

import (
	"net/netip"
	"slices"
	"time"
)

// Decide returns the decision for r. A user that a group lists chooses that group,
// and otherwise the source's most specific prefix; within it any deny beats every allow, whatever their order. What no
// rule matches is denied. Facts of r that are not known yet (zero) do not fail a
// rule: callers ask again when they know more.
//
// Decide performs no I/O, does not allocate and is safe for concurrent use.
func (p *Policy) Decide(r Request) (d Decision) {
	e := eval{p: p}
	e.decide(&r, nil, &d)
	return d
}

// DecideWire is Decide for a DNS question whose name is n, which stands for r.Name.
// It gives the same answers, without making a Name first.
func (p *Policy) DecideWire(n *WireName, r Request) (d Decision) {
	e := eval{p: p}
	e.decide(&r, n, &d)
	return d
}

// eval is one evaluation of a Request. It lives on the stack, and is kept small
// because it is cleared for every decision; the Request is handed along beside it,
// since what an eval points to would have to be on the heap.
type eval struct {
	p *Policy
	g *group

	allow, guard, deny found
	builtin            found  // a built-in guardrail
	fail               found  // the allow rule that came closest
	stage              stage  // how close
	reason             Reason // why it failed
	inspect            Inspect
	named              bool // the request is for a name, not for a literal address
	exact              bool // an allow rule names the destination exactly, which lifts built-in guardrails
	privateNamed       bool // an allow rule that covers the name names Destination's prefix
	look               bool // a deny rule waits for the protocol to be known

	trace *[]Candidate // for Explain; nil otherwise
}

// found is the ID of a rule that matched, "" for none. Of several, the one that
// sorts first is kept.
type found string

func (f *found) offer(id string) {
	if *f == "" || id < string(*f) {
		*f = found(id)
	}
}

// stage orders the ways in which an allow rule can fail to match, by how much of
// the request it agreed to before.
type stage uint8

const (
	stageNone stage = iota
	stagePort
	stageProtocol
	stageExpired
	stageTLS
	stagePrivate
)

// decide answers r, which is for n if that is not nil.
func (e *eval) decide(r *Request, n *WireName, d *Decision) {
	r.Source = r.Source.Unmap().WithZone("")
	r.Destination = r.Destination.Unmap().WithZone("")
	d.Reason, d.Revision = ReasonUnmatchedSource, e.p.revision
	i, ok := e.p.group(r)
	if !ok {
		return
	}
	e.g = &e.p.groups[i]
	e.decideInGroup(r, n, d)
}

// decideInGroup is decide once the group is known.
func (e *eval) decideInGroup(r *Request, n *WireName, d *Decision) {
	d.Group, d.Mode = e.g.name, e.g.modeAt(r.Time)

	switch {
	case n != nil:
		e.named = true
		e.p.names.matchWire(n, e, r)
	case !r.Name.IsZero():
		e.named = true
		e.p.names.match(r.Name.s, e, r)
	default:
		e.collectLiteral(r)
	}
	if r.Destination.IsValid() {
		e.denyAddress(r, r.Destination)
		if inner, ok := embedded(r.Destination); ok {
			e.denyAddress(r, inner)
		}
	}
	if r.TLS.Seen && !r.TLS.SNI.IsZero() && r.TLS.SNI != r.Name {
		e.collectSNI(r)
	}
	e.verdict(r, d)
}

// group returns the index of the group for the user of r, or else for its source.
func (p *Policy) group(r *Request) (int, bool) {
	if r.User != "" {
		if i, ok := p.users[r.User]; ok {
			return int(i), true
		}
	}
	if r.Source.IsValid() {
		if i, ok := p.sources.Lookup(r.Source); ok {
			return int(i), true
		}
	}
	return p.unmatched, p.unmatched >= 0
}

// collectLiteral considers every rule whose addresses hold the literal address.
func (e *eval) collectLiteral(r *Request) {
	if a := r.Address.Unmap().WithZone(""); a.IsValid() {
		if refs, ok := e.p.addresses.Lookup(a); ok {
			e.consider(hit{refs: refs}, r)
		}
		if inner, ok := embedded(a); ok {
			e.denyAddress(r, inner)
		}
	}
}

// denyAddress considers the deny rules whose addresses hold a, and no others: a
// name does not take a denied address out of their reach.
func (e *eval) denyAddress(r *Request, a netip.Addr) {
	refs, ok := e.p.addresses.Lookup(a)
	if !ok {
		return
	}
	for _, ref := range e.p.postings.sets[refs] {
		if rule := &e.p.rules[ref.rule]; rule.deny && e.owns(ref.owner) && e.denies(rule, r) {
			e.offerDeny(ref.owner, rule.id)
		}
	}
}

// collectSNI considers the deny rules for a server_name that is not the name asked
// for. Inlined, its inner evaluation would be cleared in every decision.
//
//go:noinline
func (e *eval) collectSNI(r *Request) {
	inner := eval{p: e.p, g: e.g, named: true}
	e.p.names.match(r.TLS.SNI.s, &inner, r)
	inner.liftBuiltin()
	if inner.guard != "" {
		e.guard.offer(string(inner.guard))
	}
	if inner.deny != "" {
		e.deny.offer(string(inner.deny))
	}
}

// verdict turns what was found into the answer.
func (e *eval) verdict(r *Request, d *Decision) {
	private := r.Destination.IsValid() && !e.privateNamed && !r.zoned() && !IsGlobal(r.Destination)
	e.liftBuiltin()
	switch {
	case e.guard != "":
		d.Reason, d.Rule = ReasonExplicitDeny, string(e.guard)
		return // guardrails hold in every mode
	case e.deny != "":
		d.Reason, d.Rule = ReasonExplicitDeny, string(e.deny)
	case e.allow != "":
		d.Verdict, d.Reason, d.Rule, d.Inspect = Allow, ReasonMatched, string(e.allow), e.inspect
		if e.look && d.Inspect&InspectNone != 0 {
			d.Inspect = InspectTLS | InspectHTTP // what is neither is asked about as ProtocolTCP
		}
		return
	case e.fail != "":
		d.Reason, d.Rule = e.reason, string(e.fail)
	case !e.named && r.Address.IsValid():
		d.Reason = ReasonIPLiteral
	default:
		d.Reason = ReasonNotListed
	}
	if d.Mode != ModeObserve || d.Reason == ReasonPrivateDestination {
		return
	}
	if private { // address checks hold in every mode
		d.Reason, d.Rule = ReasonPrivateDestination, ""
		return
	}
	d.Verdict, d.Inspect = Observe, InspectTLS|InspectHTTP|InspectNone
}

// liftBuiltin makes a built-in guardrail one like any other, unless an allow rule
// names the destination exactly, which lifts it.
func (e *eval) liftBuiltin() {
	if e.builtin != "" && !e.exact {
		e.guard.offer(string(e.builtin))
	}
}

// owns reports whether rules of owner count for the source's group.
func (e *eval) owns(owner uint32) bool {
	for _, o := range e.g.owners {
		if o == owner {
			return true
		}
	}
	return false
}

// consider judges every rule of h that counts for the source's group: refs and
// owners are both sorted by owner.
func (e *eval) consider(h hit, r *Request) {
	refs := e.p.postings.sets[h.refs]
	for _, owner := range e.g.owners {
		refs = refs[before(refs, owner):]
		for len(refs) > 0 && refs[0].owner == owner {
			e.judge(&refs[0], h, r)
			refs = refs[1:]
		}
		if len(refs) == 0 {
			return
		}
	}
}

// before returns how many refs, which are sorted, stand before those of owner.
func before(refs []ref, owner uint32) int {
	i, end := 0, len(refs)
	for end-i > 16 { // fewer are looked through sooner than halved, each time a toss-up
		if mid := (i + end) / 2; refs[mid].owner < owner {
			i = mid + 1
		} else {
			end = mid
		}
	}
	for i < end && refs[i].owner < owner {
		i++
	}
	return i
}

// judge weighs one rule that covers the name or address asked for.
func (e *eval) judge(ref *ref, h hit, r *Request) {
	rule := &e.p.rules[ref.rule]
	id := rule.id
	if id == "" {
		id = h.id(ref.form)
	}
	if rule.deny {
		denies := e.denies(rule, r)
		switch {
		case denies && rule.builtin:
			e.builtin.offer(id)
		case denies:
			e.offerDeny(ref.owner, id)
		}
		if e.trace != nil {
			e.record(ref, id, h, denies, ReasonExplicitDeny)
		}
		return
	}
	stage, reason := e.test(rule, r)
	e.exact = e.exact || h.text != "" && !h.glob && !h.below
	if e.trace != nil {
		e.record(ref, id, h, reason == ReasonMatched, reason)
	}
	switch {
	case reason == ReasonMatched:
		e.allow.offer(id)
		e.inspect |= inspection(rule, r)
	case stage > e.stage:
		e.stage, e.reason, e.fail = stage, reason, found(id)
	case stage == e.stage && (id < string(e.fail) || id == string(e.fail) && reason < e.reason):
		e.reason, e.fail = reason, found(id)
	}
}

func (e *eval) offerDeny(owner uint32, id string) {
	if owner == 0 {
		e.guard.offer(id)
	} else {
		e.deny.offer(id)
	}
}

// denies reports whether a deny rule that covers the destination applies. Its
// restrictions narrow it; without them it denies everything there.
func (e *eval) denies(rule *rule, r *Request) bool {
	if rule.expired(r.Time) {
		return false
	}
	if r.Protocol == ProtocolDNS {
		return rule.protocols&forDNS != 0 && rule.ports == nil &&
			(len(rule.qtypes) == 0 || slices.Contains(rule.qtypes, r.QType))
	}
	if len(rule.qtypes) > 0 {
		return false
	}
	if r.Protocol == ProtocolUnknown && rule.protocols != forAny {
		e.look = e.look || rule.on(r.Port) != 0
		return false
	}
	return rule.on(r.Port)&r.Protocol.set() != 0
}

// set returns the protocols that p may turn out to be.
func (p Protocol) set() protocols {
	switch p {
	case ProtocolTLS:
		return forTLS | forTCP
	case ProtocolHTTP:
		return forHTTP
	case ProtocolTCP:
		return forTCP
	case ProtocolDNS:
		return forDNS
	}
	return forTLS | forHTTP | forTCP
}

// expired reports whether the rule no longer holds at t. The zero t lies after
// every date.
func (r *rule) expired(t time.Time) bool {
	return !r.expires.IsZero() && (t.IsZero() || !t.Before(r.expires))
}

// test reports whether an allow rule that covers the name matches the rest of
// the request: ReasonMatched, or how far it came and why it failed.
func (e *eval) test(rule *rule, r *Request) (stage, Reason) {
	named := r.Destination.IsValid() && !rule.expired(r.Time) &&
		(r.zoned() || namesAddr(rule.private, r.Destination) || !e.named && namesAddr(rule.literal, r.Destination))
	e.privateNamed = e.privateNamed || named
	switch {
	case r.Protocol == ProtocolDNS:
		if !usualQType(r.QType) && !slices.Contains(rule.qtypes, r.QType) {
			return stageProtocol, ReasonQTypeNotAllowed
		}
	default:
		switch on := rule.on(r.Port); {
		case on == 0:
			return stagePort, ReasonPortNotAllowed
		case on&r.Protocol.set() != 0:
		case r.Protocol == ProtocolTCP && on&forTLS != 0:
			return stageProtocol, ReasonNotTLS
		default:
			return stageProtocol, ReasonProtocolNotAllowed
		}
	}
	if rule.expired(r.Time) {
		return stageExpired, ReasonRuleExpired
	}
	if r.Protocol == ProtocolTLS && r.TLS.Seen && rule.protocols&forTCP == 0 {
		if reason := e.testTLS(&rule.tls, r); reason != ReasonMatched {
			return stageTLS, reason
		}
	}
	if r.Destination.IsValid() && !named && !IsGlobal(r.Destination) {
		return stagePrivate, ReasonPrivateDestination
	}
	return stagePrivate, ReasonMatched
}

// testTLS holds the ClientHello against t.
func (e *eval) testTLS(t *tlsRule, r *Request) Reason {
	hello := &r.TLS
	switch {
	case hello.SNI.IsZero():
		// Whoever asked for a literal address has no name to send (RFC 6066, section 3).
		if t.sni != sniOptional && e.named {
			return ReasonSNIMissing
		}
	case hello.SNI == r.Name:
	case t.sni == sniListed || !e.named:
		if !e.listed(hello.SNI, r) {
			return ReasonSNIMismatch
		}
	default:
		return ReasonSNIMismatch
	}
	switch {
	case hello.MaxVersion < t.minVersion:
		return ReasonTLSVersion
	case hello.ECH && !t.allowECH:
		return ReasonECHNotAllowed
	}
	return ReasonMatched
}

// listed reports whether the source may reach n by TLS on the same port. Not
// inlined for the same reason as collectSNI.
//
//go:noinline
func (e *eval) listed(n Name, r *Request) bool {
	asked := *r
	asked.Name, asked.Protocol, asked.TLS, asked.Destination = n, ProtocolTLS, TLS{}, netip.Addr{}
	inner := eval{p: e.p, g: e.g, named: true}
	e.p.names.match(n.s, &inner, &asked)
	inner.liftBuiltin()
	return inner.allow != "" && inner.deny == "" && inner.guard == ""
}

// inspection returns what a CONNECT that rule allows may carry.
func inspection(rule *rule, r *Request) Inspect {
	if r.Protocol != ProtocolUnknown {
		return 0
	}
	// The three bits of both types stand in the same order.
	return Inspect(rule.on(r.Port) & (forTLS | forHTTP | forTCP))
}

// zoned reports whether the settings expect Destination behind Name. What clouds give
// a meaning to on every machine, a rule must name.
func (r *Request) zoned() bool {
	return r.PrivateZone && !slices.Contains(platformAddresses, r.Destination)
}

// namesAddr reports whether one of ps names a: holds it or, for an address that
// clouds give a meaning to on every machine, is exactly that address.
func namesAddr(ps []netip.Prefix, a netip.Addr) bool {
	platform := slices.Contains(platformAddresses, a)
	for _, p := range ps {
		if p.Contains(a) && (!platform || p.IsSingleIP()) {
			return true
		}
	}
	return false
}
