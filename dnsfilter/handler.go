package dnsfilter

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
	"sallyport/policy/event"
)

const (
	maxAnswers = 8    // put into an Event
	anyTTL     = 3600 // seconds; what ANY is answered never changes
	badVersion = dns.RcodeBadVers
)

// A query is one question of one client.
type query struct {
	msg    *dns.Msg
	q      dns.Question
	opt    *dns.OPT // nil without EDNS
	client netip.AddrPort
	udp    bool
}

// accept judges a packet by its header: whether it is a query that is worth unpacking.
func accept(h dns.Header) dns.MsgAcceptAction {
	if action := dns.DefaultMsgAcceptFunc(h); action != dns.MsgAccept {
		return action
	}
	if opcode := h.Bits >> 11 & 0xF; opcode != dns.OpcodeQuery {
		return dns.MsgRejectNotImplemented
	}
	return dns.MsgAccept
}

// handle answers one query, and observes it.
func (s *Server) handle(ctx context.Context, w dns.ResponseWriter, m *dns.Msg) {
	qu := newQuery(w, m)
	if rcode := qu.malformed(); rcode != dns.RcodeSuccess {
		s.counts.malformed.Add(1)
		s.write(w, qu, &reply{rcode: rcode}) // there is nobody to tell
		return
	}
	start := s.cfg.Now()
	rep, d, asked := s.answer(ctx, qu, start)
	err := s.write(w, qu, rep)
	if rep.err != nil {
		err = rep.err
	}
	s.observe(qu, rep, d, start, asked, err)
}

func newQuery(w dns.ResponseWriter, m *dns.Msg) *query {
	qu := &query{msg: m, opt: m.IsEdns0()}
	if len(m.Question) == 1 {
		qu.q = m.Question[0]
	}
	switch a := w.RemoteAddr().(type) {
	case *net.UDPAddr:
		qu.client, qu.udp = a.AddrPort(), true
	case *net.TCPAddr:
		qu.client = a.AddrPort()
	}
	qu.client = netip.AddrPortFrom(qu.client.Addr().Unmap().WithZone(""), qu.client.Port())
	return qu
}

// malformed returns why there is no question to answer, or RcodeSuccess.
func (qu *query) malformed() int {
	opts := 0
	for _, rr := range qu.msg.Extra {
		if rr.Header().Rrtype == dns.TypeOPT {
			opts++
		}
	}
	switch {
	case len(qu.msg.Question) != 1, qu.q.Qtype == dns.TypeNone, qu.q.Qclass == 0: // 0: the packet ended before it
		return dns.RcodeFormatError
	case opts > 1 || opts == 1 && qu.opt.Hdr.Name != ".": // RFC 6891, section 6.1.1
		return dns.RcodeFormatError
	case opts == 1 && qu.opt.Version() != 0:
		return badVersion
	}
	return dns.RcodeSuccess
}

// answer decides a query and finds its answer. It also returns the last decision
// taken, and how long others were asked.
func (s *Server) answer(ctx context.Context, qu *query, now time.Time) (*reply, policy.Decision, time.Duration) {
	req := policy.Request{Source: qu.client.Addr(), Protocol: policy.ProtocolDNS, QType: qu.q.Qtype, Time: now}
	d := s.decide(&req, qu.q.Name)
	if qu.q.Qclass != dns.ClassINET {
		if d.Reason != policy.ReasonUnmatchedSource {
			d = d.Refuse(policy.ReasonBadRequest)
		}
		return refusal(DenyRefused, d, qu.q), d, 0
	}
	if isMeta(qu.q.Qtype) && d.Passes() { // which no upstream should be asked, in a group that observes either
		d = d.Refuse(policy.ReasonQTypeNotAllowed)
	}
	k := key{name: req.Name, qtype: qu.q.Qtype, cd: qu.msg.CheckingDisabled, do: qu.opt != nil && qu.opt.Do()}
	if rep, own := s.ownRecords(k, &d); own {
		return rep, d, 0
	}
	switch {
	case !d.Passes():
		return refusal(s.resolver.denial(req.Name, d), d, qu.q), d, 0
	case qu.q.Qtype == dns.TypeANY:
		return minimalANY(qu.q.Name), d, 0
	case s.cfg.HTTPSRecords == HTTPSNodata && (k.qtype == dns.TypeHTTPS || k.qtype == dns.TypeSVCB):
		return &reply{local: true}, d, 0
	}
	rep, err := s.resolver.resolve(ctx, k, s.inspector(req))
	asked := s.cfg.Now().Sub(now)
	if err != nil {
		rep = &reply{rcode: dns.RcodeServerFailure, ede: dns.ExtendedErrorCodeNotReady, err: err}
	}
	if !rep.local || !rep.next.IsZero() {
		final := s.filter(rep, req, d)
		if !final.Passes() && final.Reason != policy.ReasonPrivateDestination {
			why := rep.err
			rep = refusal(s.cfg.Deny, final, qu.q)
			rep.err = why
		}
		d = final
	}
	return rep, d, asked
}

// decide decides req with the name set to what stands in a packet. A name that is
// no policy.Name is not listed, in whatever mode, unless its source is refused anyway.
func (s *Server) decide(req *policy.Request, name string) policy.Decision {
	var err error
	req.Name, err = policy.ParseName(name)
	d := s.cfg.Decider.Decide(*req)
	if err != nil && d.Reason != policy.ReasonUnmatchedSource {
		d = d.Refuse(policy.ReasonNotListed)
	}
	return d
}

// ownRecords answers from Config.Records, if they have the whole answer to k and
// *d does not say that the source is unknown or the name denied. It corrects *d.
func (s *Server) ownRecords(k key, d *policy.Decision) (*reply, bool) {
	rep := s.resolver.recorded(k)
	rule, health := "dns.records", !k.name.IsZero() && k.name == s.resolver.health
	if health {
		rule = "dns.health_name" // whoever asks, and whatever is denied
	}
	if rep == nil || !rep.next.IsZero() || isMeta(k.qtype) ||
		!health && (d.Reason == policy.ReasonUnmatchedSource || d.Reason == policy.ReasonExplicitDeny) {
		return nil, false
	}
	if d.Verdict != policy.Allow {
		d.Verdict, d.Reason, d.Rule = policy.Allow, policy.ReasonMatched, rule
	}
	return rep, true
}

// isMeta reports whether t is no type of data but asks for something else: a
// transfer, a signature of the transaction (RFC 6895, section 3.1). ANY is left to the policy.
func isMeta(t uint16) bool {
	return t == dns.TypeOPT || t >= 128 && t < dns.TypeANY
}

// minimalANY returns the answer to ANY (RFC 8482, section 4.2).
func minimalANY(name string) *reply {
	h := dns.RR_Header{Name: name, Rrtype: dns.TypeHINFO, Class: dns.ClassINET, Ttl: anyTTL}
	return &reply{answer: []dns.RR{&dns.HINFO{Hdr: h, Cpu: "RFC8482"}}}
}

// buffers hold answers while they are written.
var buffers = sync.Pool{New: func() any { return new([maxEDNSSize]byte) }}

// write fits rep to the query and sends it.
func (s *Server) write(w dns.ResponseWriter, qu *query, rep *reply) error {
	m := s.message(qu, rep)
	buf := buffers.Get().(*[maxEDNSSize]byte)
	defer buffers.Put(buf)
	p, err := m.PackBuffer(buf[:])
	if limit := s.sizeLimit(qu); err == nil && len(p) > limit {
		// Whole or not at all: what does not fit is asked for again over TCP, and
		// the answer to a forged source stays small.
		m.Answer, m.Ns, m.Truncated = nil, nil, qu.udp
		if !qu.udp {
			m.Rcode = dns.RcodeServerFailure
		}
		p, err = m.PackBuffer(buf[:])
	}
	if err != nil {
		return err
	}
	_, err = w.Write(p)
	return err
}

// sizeLimit returns how large an answer may be, in bytes.
func (s *Server) sizeLimit(qu *query) int {
	switch {
	case !qu.udp:
		return dns.MaxMsgSize
	case qu.opt == nil:
		return minUDPSize
	}
	return min(max(int(qu.opt.UDPSize()), minUDPSize), s.cfg.MaxUDPSize)
}

// message returns the response to a query that rep makes.
func (s *Server) message(qu *query, rep *reply) *dns.Msg {
	m := &dns.Msg{Compress: true, Answer: rep.answer, Ns: rep.authority}
	m.Id, m.Response, m.RecursionAvailable = qu.msg.Id, true, true
	m.Opcode, m.RecursionDesired, m.CheckingDisabled = qu.msg.Opcode, qu.msg.RecursionDesired, qu.msg.CheckingDisabled
	m.Rcode = rep.rcode
	m.Authoritative = rep.local && len(rep.answer) > 0 && rep.ede == 0
	m.AuthenticatedData = rep.ad && (qu.msg.AuthenticatedData || qu.opt != nil && qu.opt.Do())
	if len(qu.msg.Question) == 1 && rep.rcode != dns.RcodeFormatError {
		m.Question = qu.msg.Question
	}
	for _, rr := range m.Answer { // spelt as asked (0x20), which also compresses better
		if h := rr.Header(); strings.EqualFold(h.Name, qu.q.Name) {
			h.Name = qu.q.Name
		}
	}
	if qu.opt == nil { // RFC 6891, section 7
		return m
	}
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	opt.SetUDPSize(uint16(s.cfg.MaxUDPSize))
	opt.SetDo(qu.opt.Do())
	if rep.ede != 0 {
		opt.Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: rep.ede, ExtraText: rep.why}}
	}
	m.Extra = []dns.RR{opt}
	return m
}

// observe tells the Observer of a query that is over.
func (s *Server) observe(qu *query, rep *reply, d policy.Decision, start time.Time, asked time.Duration, err error) {
	if s.cfg.Observer == nil {
		return
	}
	ev := event.Event{
		Time: start, Kind: event.DNS, Listener: "dns",
		ID:     "d" + strconv.FormatUint(s.serial.Add(1), 36),
		Source: qu.client, Name: qu.q.Name, Decision: d,
		QType: dns.Type(qu.q.Qtype).String(), RCode: dns.RcodeToString[rep.rcode],
		Answers: summary(rep.answer), DNSTime: asked, Duration: s.cfg.Now().Sub(start),
	}
	if len(ev.Name) > 1 {
		ev.Name = strings.TrimSuffix(ev.Name, ".")
	}
	if err != nil {
		ev.Error = err.Error()
	}
	s.cfg.Observer.Observe(&ev)
}

// summary returns the addresses and names answered, not all of them if they are many.
func summary(answer []dns.RR) []string {
	var out []string
	for _, rr := range answer {
		if len(out) == maxAnswers {
			break
		}
		if a, ok := addressOf(rr); ok {
			out = append(out, a.String())
			continue
		}
		switch rr := rr.(type) {
		case *dns.CNAME:
			out = append(out, strings.TrimSuffix(rr.Target, "."))
		case *dns.PTR:
			out = append(out, strings.TrimSuffix(rr.Ptr, "."))
		}
	}
	return out
}
