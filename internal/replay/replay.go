// Package replay decides recorded requests again under another policy and counts
// what would change. It reads the gate's own events and Squid's native access.log,
// line by line, and holds no more than a bounded number of counts.
//
// A log does not say everything that the gate knew, or would have found out had it
// gone on. What is missing is assumed to be in order, and each such assumption is
// counted. Where a record's own verdict shows that it was not (an address that was
// private, a protocol that was no TLS), that is taken into account; a change that
// would hang on what nobody knows is counted as open, and not as a change.
package replay

import (
	"bytes"
	"net/netip"
	"strconv"
	"time"

	"sallyport/policy"
)

// Format is how lines look.
type Format string

// The formats.
const (
	Auto  Format = "auto"  // each line is one or the other
	JSON  Format = "json"  // the gate's own events
	Squid Format = "squid" // Squid's native access.log
)

// A Change is what becomes of a request.
type Change int

// The changes.
const (
	Denied   Change = iota // it passed and would not
	Allowed                // it was denied, or only observed, and would be allowed
	Observed               // it was allowed and would pass only because its group observes
	changes
)

var changeNames = [changes]string{"newly_denied", "newly_allowed", "newly_observed"}

// String returns newly_denied, newly_allowed or newly_observed.
func (c Change) String() string { return changeNames[c] }

// Assumptions are what a Replay may have to assume: the keys in reports, and what they mean.
var Assumptions = []struct{ Key, Text string }{
	{"address_not_known", "the log has no address for the name: assumed to be one that the policy lets through"},
	{"hello_not_seen", "no ClientHello was seen: assumed to be TLS with the name asked for"},
	{"content_not_seen", "relayed without a look at its content, which the policy wants to look at: assumed to be what it allows"},
	{"user_not_known", "Squid's user is taken for proved"},
}

const (
	addressNotKnown = iota
	helloNotSeen
	contentNotSeen
	userNotKnown
	assumptions
)

// Options say how to replay.
type Options struct {
	Policy *policy.Policy
	Format Format    // "" is Auto
	At     time.Time // decide as of then; zero: as of the time of each record
	// PrivateZone is that of the settings, see policy.Request; nil: no zone has private destinations.
	PrivateZone func(policy.Name, netip.Addr) bool
}

// A Replay decides lines. It is not safe for concurrent use.
type Replay struct {
	o       Options
	scanner scanner
	rec     record
	sources map[string]netip.Addr
	targets map[string]target
	rep     Report
	rows    map[rowKey]*Row
	folded  uint64
}

// maxKnown bounds the addresses and the names that are remembered as they were read.
// With more they are read anew.
const maxKnown = 1 << 16

// maxText bounds a name or an address, in bytes; what is longer is neither.
const maxText = 1 << 10

// A target is a name or address as the policy wants it.
type target struct {
	name policy.Name
	addr netip.Addr
	ok   bool
}

// New returns a Replay.
func New(o Options) *Replay {
	return &Replay{
		o: o, sources: map[string]netip.Addr{}, targets: map[string]target{}, rows: map[rowKey]*Row{},
		rep: Report{Revision: o.Policy.Revision(), Groups: map[string]*Group{}, Assumed: map[string]uint64{}},
	}
}

// Line decides one line, which may end in a newline. Malformed lines are an error, and
// counted. The line is not kept.
func (r *Replay) Line(line []byte) error {
	line = bytes.TrimRight(line, "\r\n")
	if len(bytes.TrimSpace(line)) == 0 {
		return nil
	}
	r.rep.Lines++
	asJSON := r.o.Format == JSON
	if r.o.Format == Auto || r.o.Format == "" {
		asJSON = bytes.TrimLeft(line, " \t")[0] == '{'
	}
	var err error
	if asJSON {
		err = r.scanner.scan(line, &r.rec)
	} else {
		err = squidLine(line, &r.rec)
	}
	if err == nil {
		err = r.decide()
	}
	if err != nil {
		r.rep.Malformed++
	}
	return err
}

// outcome is what the record says happened.
type outcome int

const (
	passed  outcome = iota
	denied          // by the policy
	neither         // refused for what is not the policy's to say
)

// outcomeOf reads verdict and reason. A name that did not resolve or could not be
// reached had been let through.
func outcomeOf(rec *record) (policy.Verdict, policy.Reason, outcome, bool) {
	reason, ok := reasons[string(rec.reason)]
	if !ok && len(rec.reason) > 0 {
		return 0, 0, neither, true // of another version
	}
	switch string(rec.verdict) {
	case "allow":
		return policy.Allow, reason, passed, true
	case "observe":
		return policy.Observe, reason, passed, true
	case "deny":
	default:
		return 0, 0, 0, false
	}
	switch reason {
	case policy.ReasonResolveFailed, policy.ReasonConnectFailed:
		return policy.Deny, reason, passed, true
	case policy.ReasonNotListed, policy.ReasonExplicitDeny, policy.ReasonUnmatchedSource, policy.ReasonPortNotAllowed,
		policy.ReasonProtocolNotAllowed, policy.ReasonRuleExpired, policy.ReasonIPLiteral, policy.ReasonPrivateDestination,
		policy.ReasonSNIMismatch, policy.ReasonSNIMissing, policy.ReasonNotTLS, policy.ReasonTLSVersion,
		policy.ReasonECHNotAllowed, policy.ReasonQTypeNotAllowed:
		return policy.Deny, reason, denied, true
	}
	return policy.Deny, reason, neither, true
}

var reasons = func() map[string]policy.Reason {
	m := map[string]policy.Reason{}
	for _, r := range policy.Reasons() {
		m[r.String()] = r
	}
	return m
}()

// decide decides the record.
func (r *Replay) decide() error {
	rec := &r.rec
	switch string(rec.event) {
	case "connect", "http", "dns", "tls", "tcp":
	case "config", "": // a reload, or a message
		r.rep.Other++
		return nil
	default:
		r.rep.Undecidable++
		return nil
	}
	verdict, reason, was, ok := outcomeOf(rec)
	if !ok {
		return errType
	}
	at, ok := readTime(rec)
	if !ok {
		return errTime
	}
	r.period(at)
	req, ok := r.request(at)
	if !ok {
		r.rep.Undecidable++
		return nil
	}
	a := answer{r: r, rec: rec, req: req, reason: reason, was: was}
	a.decide()
	r.count(&a, verdict, reason, was, at)
	return nil
}

// request is what the gate asked first.
func (r *Replay) request(at time.Time) (req policy.Request, ok bool) {
	rec := &r.rec
	if req.Source, ok = r.source(rec.src); !ok {
		return req, false
	}
	t := r.target(rec.name)
	if !t.ok {
		return req, false
	}
	req.Name, req.Address, req.Port, req.Time = t.name, t.addr, rec.port, at
	if !r.o.At.IsZero() {
		req.Time = r.o.At
	}
	if len(rec.user) > 0 {
		req.User = string(rec.user)
	}
	switch string(rec.event) {
	case "http":
		req.Protocol = policy.ProtocolHTTP
	case "tcp":
		req.Protocol = policy.ProtocolTCP
	case "dns":
		req.Protocol = policy.ProtocolDNS
		if req.QType, ok = policy.ParseQType(string(rec.qtype)); !ok {
			return req, false
		}
		return req, !req.Name.IsZero()
	}
	return req, rec.port != 0
}

func (r *Replay) source(b []byte) (netip.Addr, bool) {
	if a, ok := parseIPv4(b); ok {
		return a, true
	}
	if a, ok := r.sources[string(b)]; ok {
		return a, a.IsValid()
	}
	if len(b) > maxText {
		return netip.Addr{}, false
	}
	if len(r.sources) >= maxKnown {
		clear(r.sources)
	}
	a, err := netip.ParseAddr(string(b))
	r.sources[string(b)] = a
	return a, err == nil
}

// parseIPv4 reads the usual form of an address in less time than it takes to look it up.
func parseIPv4(b []byte) (netip.Addr, bool) {
	var a [4]byte
	part, digits, n := 0, 0, 0
	for _, c := range b {
		switch {
		case c >= '0' && c <= '9' && (digits == 0 || n > 0) && n < 100:
			n = n*10 + int(c-'0')
			digits++
		case c == '.' && digits > 0 && n < 256 && part < 3:
			a[part] = byte(n)
			part++
			digits, n = 0, 0
		default:
			return netip.Addr{}, false
		}
	}
	if part != 3 || digits == 0 || n > 255 {
		return netip.Addr{}, false
	}
	a[3] = byte(n)
	return netip.AddrFrom4(a), true
}

func (r *Replay) target(b []byte) target {
	if t, ok := r.targets[string(b)]; ok {
		return t
	}
	if len(b) > maxText {
		return target{}
	}
	if len(r.targets) >= maxKnown {
		clear(r.targets)
	}
	s := string(b)
	var t target
	if a, err := netip.ParseAddr(s); err == nil {
		t = target{addr: a.Unmap(), ok: true}
	} else if n, err := policy.ParseName(s); err == nil {
		t = target{name: n, ok: true}
	}
	r.targets[s] = t
	return t
}

// An answer is how the policy decides one record, stage after stage as the gate does.
type answer struct {
	r      *Replay
	rec    *record
	req    policy.Request
	reason policy.Reason // that of the record
	was    outcome

	policy.Decision
	assumed [assumptions]bool
	open    bool // what the record does not say could make it come out as it did
}

func (a *answer) ask() bool {
	a.Decision = a.r.o.Policy.Decide(a.req)
	return a.Passes()
}

func (a *answer) decide() {
	passes := a.ask()
	if a.recorded() {
		a.Verdict, a.Reason, a.Rule = policy.Allow, policy.ReasonMatched, string(a.rec.rule)
		return
	}
	if !passes {
		return
	}
	switch {
	case a.req.Protocol == policy.ProtocolDNS:
		a.answers()
		return
	case !a.address():
		return
	case a.req.Protocol != policy.ProtocolUnknown:
		return
	}
	a.content()
}

// recorded reports whether the resolver answers by its settings, which the record says,
// whatever the policy lists: all but those it does not know and names that it denies,
// and whoever asks for the health name.
func (a *answer) recorded() bool {
	switch string(a.rec.rule) {
	case "dns.health_name":
		return a.req.Protocol == policy.ProtocolDNS
	case "dns.records":
		return a.req.Protocol == policy.ProtocolDNS && a.Reason != policy.ReasonUnmatchedSource && a.Reason != policy.ReasonExplicitDeny
	}
	return false
}

// to decides with a as the destination.
func (a *answer) to(addr netip.Addr) bool {
	a.req.Destination = addr
	a.req.PrivateZone = a.r.o.PrivateZone != nil && a.r.o.PrivateZone(a.req.Name, addr)
	return a.ask()
}

// address decides about the address behind the name. With a parent, dst is that of
// the parent.
func (a *answer) address() bool {
	if a.req.Address.IsValid() {
		return a.to(a.req.Address)
	}
	if len(a.rec.dst) > 0 && len(a.rec.parent) == 0 {
		if addr, ok := a.r.source(a.rec.dst); ok {
			return a.to(addr)
		}
	}
	a.assumed[addressNotKnown] = true
	// An event of a refusal has no address, so that it may have been for one.
	a.open = a.reason == policy.ReasonPrivateDestination ||
		a.reason == policy.ReasonExplicitDeny && string(a.rec.policy) == a.Revision
	return true
}

// answers decides about the addresses in an answer: one that passes is enough.
func (a *answer) answers() {
	question := a.Decision
	found := false
	for _, b := range a.rec.answers {
		addr, ok := a.r.source(b)
		if !ok {
			continue // a name
		}
		if found = true; a.to(addr) {
			a.Decision = question
			return
		}
	}
	if !found {
		a.Decision = question
		a.open = a.was == denied && (a.reason == policy.ReasonPrivateDestination ||
			a.reason == policy.ReasonExplicitDeny && string(a.rec.policy) == a.Revision)
		a.assumed[addressNotKnown] = a.was == denied
	}
}

// content decides about what came after the 200.
func (a *answer) content() {
	seen := len(a.rec.tlsVersion) > 0 || len(a.rec.sni) > 0 || a.rec.ech
	if a.Verdict == policy.Allow && a.Inspect&policy.InspectNone != 0 && !a.notTLS() {
		return // relayed without looking
	}
	switch {
	case string(a.rec.event) == "tls" || seen:
		a.req.Protocol = policy.ProtocolTLS
		a.req.TLS = policy.TLS{Seen: true, MaxVersion: tlsVersion(a.rec.tlsVersion), ECH: a.rec.ech}
		if bytes.Equal(a.rec.sni, a.rec.name) {
			a.req.TLS.SNI = a.req.Name
		} else if len(a.rec.sni) > 0 {
			a.req.TLS.SNI = a.r.target(a.rec.sni).name
		}
		a.ask()
	case a.notTLS():
		a.unlikeTLS()
	case a.was == passed && a.rec.status == 200:
		a.assumed[contentNotSeen] = true
	default:
		a.assumed[helloNotSeen] = true
	}
}

// notTLS reports whether the record shows that the client spoke something else than
// TLS: its reason can only come up after a look at the content, of which it says nothing.
func (a *answer) notTLS() bool {
	return len(a.rec.tlsVersion) == 0 && len(a.rec.sni) == 0 && a.rec.status == 200 &&
		(a.reason == policy.ReasonNotTLS || a.reason == policy.ReasonProtocolNotAllowed || a.was == denied)
}

// unlikeTLS decides about HTTP, or what is neither HTTP nor TLS, whichever makes of it
// what the record says; if neither does, the latter counts.
func (a *answer) unlikeTLS() {
	protocols := []policy.Protocol{policy.ProtocolHTTP, policy.ProtocolTCP}
	if a.reason == policy.ReasonNotTLS {
		protocols = protocols[1:]
	}
	verdicts := 0
	for _, p := range protocols {
		a.req.Protocol = p
		a.ask()
		verdicts |= 1 << a.Verdict
		if a.Reason == a.reason {
			return
		}
	}
	a.open = verdicts&(verdicts-1) != 0 // it depends
}

func tlsVersion(b []byte) uint16 {
	switch string(b) {
	case "1.0":
		return 0x0301
	case "1.1":
		return 0x0302
	case "1.2":
		return 0x0303
	case "1.3":
		return 0x0304
	}
	if hex, ok := bytes.CutPrefix(b, []byte("0x")); ok {
		n, err := strconv.ParseUint(string(hex), 16, 16)
		if err == nil {
			return uint16(n)
		}
	}
	return 0
}
