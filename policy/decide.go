package policy

import (
	"net/netip"
	"slices"
)

// Decide returns the decision for r. A user that a group lists chooses that group,
// and otherwise the source's most specific prefix; within it any deny beats every allow, whatever their order. What no
// rule matches is denied. Facts of r that are not known yet (zero) do not fail a
// rule: callers ask again when they know more.
//
// Decide performs no I/O, does not allocate and is safe for concurrent use.
func (p *Policy) Decide(r Request) Decision {
	e := eval{p: p, r: r}
	return e.decide()
}

// eval is one evaluation of a Request. It lives on the stack.
type eval struct {
	p *Policy
	r Request
	g *group

	allow, guard, deny found
	builtin            found  // a built-in guardrail
	exact              bool   // an allow rule names the destination exactly, which lifts built-in guardrails
	fail               found  // the allow rule that came closest
	stage              stage  // how close
	reason             Reason // why it failed
	inspect            Inspect
	privateNamed       bool // an allow rule that covers the name names Destination's prefix
	look               bool // a deny rule waits for the protocol to be known

	trace *[]Candidate // for Explain; nil otherwise
}

// found is a rule that matched. Of several, the one whose ID sorts first is kept.
type found struct {
	ok bool
	id string
}

func (f *found) offer(id string) {
	if !f.ok || id < f.id {
		f.ok, f.id = true, id
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

// decide answers the request of e.
func (e *eval) decide() Decision {
	r := &e.r
	r.Source = r.Source.Unmap().WithZone("")
	r.Destination = r.Destination.Unmap().WithZone("")
	d := Decision{Reason: ReasonUnmatchedSource, Revision: e.p.revision}
	i, ok := e.p.group(r)
	if !ok {
		return d
	}
	e.g = &e.p.groups[i]
	d.Group, d.Mode = e.g.name, e.g.modeAt(r.Time)

	e.collect(r.Name, r.Address)
	if r.Destination.IsValid() {
		e.collectDestination()
	}
	if r.TLS.Seen && !r.TLS.SNI.IsZero() && r.TLS.SNI != r.Name {
		e.collectSNI()
	}
	e.verdict(&d)
	return d
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

// collect considers every rule that covers the name, or else the literal address.
func (e *eval) collect(n Name, a netip.Addr) {
	if !n.IsZero() {
		e.p.names.match(n.s, e)
		return
	}
	if a = a.Unmap().WithZone(""); a.IsValid() {
		if refs, ok := e.p.addresses.Lookup(a); ok {
			e.consider(hit{refs: refs})
		}
		if inner, ok := embedded(a); ok {
			e.denyAddress(inner)
		}
	}
}

// collectDestination considers the deny rules whose addresses hold Destination:
// a name does not take a denied address out of reach of the rule.
func (e *eval) collectDestination() {
	e.denyAddress(e.r.Destination)
	if inner, ok := embedded(e.r.Destination); ok {
		e.denyAddress(inner)
	}
}

// denyAddress considers the deny rules whose addresses hold a, and no others.
func (e *eval) denyAddress(a netip.Addr) {
	refs, ok := e.p.addresses.Lookup(a)
	if !ok {
		return
	}
	for _, ref := range e.p.postings.sets[refs] {
		if rule := &e.p.rules[ref.rule]; rule.deny && e.owns(ref.owner) && e.denies(rule) {
			e.offerDeny(ref.owner, rule.id)
		}
	}
}

// collectSNI considers the deny rules for a server_name that is not the name asked
// for. Inlined, its inner evaluation would be cleared in every decision.
//
//go:noinline
func (e *eval) collectSNI() {
	inner := eval{p: e.p, r: e.r, g: e.g}
	inner.collect(e.r.TLS.SNI, netip.Addr{})
	inner.liftBuiltin()
	if inner.guard.ok {
		e.guard.offer(inner.guard.id)
	}
	if inner.deny.ok {
		e.deny.offer(inner.deny.id)
	}
}

// verdict turns what was found into the answer.
func (e *eval) verdict(d *Decision) {
	private := e.r.Destination.IsValid() && !e.privateNamed && !IsGlobal(e.r.Destination)
	e.liftBuiltin()
	switch {
	case e.guard.ok:
		d.Reason, d.Rule = ReasonExplicitDeny, e.guard.id
		return // guardrails hold in every mode
	case e.deny.ok:
		d.Reason, d.Rule = ReasonExplicitDeny, e.deny.id
	case e.allow.ok:
		d.Verdict, d.Reason, d.Rule, d.Inspect = Allow, ReasonMatched, e.allow.id, e.inspect
		if e.look && d.Inspect&InspectNone != 0 {
			d.Inspect = InspectTLS | InspectHTTP // what is neither is asked about as ProtocolTCP
		}
		return
	case e.fail.ok:
		d.Reason, d.Rule = e.reason, e.fail.id
	case e.r.Name.IsZero() && e.r.Address.IsValid():
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
	if e.builtin.ok && !e.exact {
		e.guard.offer(e.builtin.id)
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
func (e *eval) consider(h hit) {
	refs := e.p.postings.sets[h.refs]
	for _, owner := range e.g.owners {
		i, end := 0, len(refs)
		for i < end { // the first ref of owner, or of a later one
			mid := int(uint(i+end) / 2)
			if refs[mid].owner < owner {
				i = mid + 1
			} else {
				end = mid
			}
		}
		for ; i < len(refs) && refs[i].owner == owner; i++ {
			e.judge(&refs[i], h)
		}
		refs = refs[i:]
	}
}

// judge weighs one rule that covers the name or address asked for.
func (e *eval) judge(ref *ref, h hit) {
	rule := &e.p.rules[ref.rule]
	id := rule.id
	if id == "" {
		id = h.id(ref.form)
	}
	if rule.deny {
		denies := e.denies(rule)
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
	stage, reason := e.test(rule)
	e.exact = e.exact || h.text != "" && !h.glob && !h.below
	if e.trace != nil {
		e.record(ref, id, h, reason == ReasonMatched, reason)
	}
	switch {
	case reason == ReasonMatched:
		e.allow.offer(id)
		e.inspect |= e.inspection(rule)
	case stage > e.stage:
		e.stage, e.reason, e.fail = stage, reason, found{true, id}
	case stage == e.stage && (id < e.fail.id || id == e.fail.id && reason < e.reason):
		e.reason, e.fail = reason, found{true, id}
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
func (e *eval) denies(rule *rule) bool {
	if e.expired(rule) {
		return false
	}
	if e.r.Protocol == ProtocolDNS {
		return rule.protocols&forDNS != 0 && rule.ports == nil &&
			(len(rule.qtypes) == 0 || slices.Contains(rule.qtypes, e.r.QType))
	}
	if len(rule.qtypes) > 0 {
		return false
	}
	if e.r.Protocol == ProtocolUnknown && rule.protocols != forAny {
		e.look = e.look || rule.on(e.r.Port) != 0
		return false
	}
	return rule.on(e.r.Port)&e.r.Protocol.set() != 0
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

func (e *eval) expired(rule *rule) bool {
	return !rule.expires.IsZero() && (e.r.Time.IsZero() || !e.r.Time.Before(rule.expires))
}

// test reports whether an allow rule that covers the name matches the rest of
// the request: ReasonMatched, or how far it came and why it failed.
func (e *eval) test(rule *rule) (stage, Reason) {
	r := &e.r
	named := r.Destination.IsValid() && !e.expired(rule) &&
		(namesAddr(rule.private, r.Destination) || r.Name.IsZero() && namesAddr(rule.literal, r.Destination))
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
	if e.expired(rule) {
		return stageExpired, ReasonRuleExpired
	}
	if r.Protocol == ProtocolTLS && r.TLS.Seen && rule.protocols&forTCP == 0 {
		if reason := e.testTLS(&rule.tls); reason != ReasonMatched {
			return stageTLS, reason
		}
	}
	if r.Destination.IsValid() && !named && !IsGlobal(r.Destination) {
		return stagePrivate, ReasonPrivateDestination
	}
	return stagePrivate, ReasonMatched
}

// testTLS holds the ClientHello against t.
func (e *eval) testTLS(t *tlsRule) Reason {
	hello := &e.r.TLS
	switch {
	case hello.SNI.IsZero():
		// Whoever asked for a literal address has no name to send (RFC 6066, section 3).
		if t.sni != sniOptional && !e.r.Name.IsZero() {
			return ReasonSNIMissing
		}
	case hello.SNI == e.r.Name:
	case t.sni == sniListed || e.r.Name.IsZero():
		if !e.listed(hello.SNI) {
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
func (e *eval) listed(n Name) bool {
	r := e.r
	r.Name, r.Protocol, r.TLS, r.Destination = n, ProtocolTLS, TLS{}, netip.Addr{}
	inner := eval{p: e.p, r: r, g: e.g}
	inner.collect(n, netip.Addr{})
	inner.liftBuiltin()
	return inner.allow.ok && !inner.deny.ok && !inner.guard.ok
}

// inspection returns what a CONNECT that rule allows may carry.
func (e *eval) inspection(rule *rule) Inspect {
	if e.r.Protocol != ProtocolUnknown {
		return 0
	}
	// The three bits of both types stand in the same order.
	return Inspect(rule.on(e.r.Port) & (forTLS | forHTTP | forTCP))
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
