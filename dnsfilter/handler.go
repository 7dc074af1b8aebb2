package dnsfilter

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"sallyport/dnsfilter/wire"
	"sallyport/policy"
	"sallyport/policy/event"
)

const (
	maxAnswers = 8    // put into an Event
	anyTTL     = 3600 // seconds; what ANY is answered never changes
	badVersion = dns.RcodeBadVers
	headerSize = 12 // bytes of every message (RFC 1035, section 4.1.1)
)

// A query is one question of one client.
type query struct {
	msg *dns.Msg
	q   dns.Question
	opt *dns.OPT // nil without EDNS
	client

	cookie []byte // the query's; nil: it has none, or an impossible one
	padded bool   // it has the padding option
	bad    bool   // its cookie has an impossible length
}

// A client is who asked, and the way back.
type client struct {
	addr netip.AddrPort // neither mapped nor with a zone
	udp  bool
	door door

	counted bool // by Limits.ResponsesPerSecond
	back    interface {
		// send sends an answer, which it does not keep.
		send(answer []byte) error
	}
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

var errCut = errors.New("the message ends before the last record that it counts")

// unpack unpacks packet, of at least a header, into m. Other than m.Unpack it takes no
// message that ends between two of the records that its header counts.
func unpack(m *dns.Msg, packet []byte) error {
	if err := m.Unpack(packet); err != nil {
		return err
	}
	for i, n := range [...]int{len(m.Question), len(m.Answer), len(m.Ns), len(m.Extra)} {
		if int(binary.BigEndian.Uint16(packet[4+2*i:])) != n {
			return errCut
		}
	}
	return nil
}

// serve answers one packet of any kind, which it does not keep.
func (s *Server) serve(ctx context.Context, c client, packet []byte) {
	m := new(dns.Msg)
	if len(packet) < headerSize || m.Unpack(packet[:headerSize]) != nil {
		s.counts.malformed.Add(1)
		return // whatever it is, an answer would only be of use to somebody who forges sources
	}
	word := func(at int) uint16 { return binary.BigEndian.Uint16(packet[at:]) }
	rcode := dns.RcodeFormatError
	switch accept(dns.Header{Id: word(0), Bits: word(2), Qdcount: word(4), Ancount: word(6), Nscount: word(8), Arcount: word(10)}) {
	case dns.MsgAccept:
		if unpack(m, packet) == nil {
			s.handle(ctx, c, m)
			return
		}
		s.counts.malformed.Add(1)
	case dns.MsgReject:
		s.counts.malformed.Add(1)
	case dns.MsgRejectNotImplemented:
		s.counts.malformed.Add(1)
		rcode = dns.RcodeNotImplemented
	case dns.MsgIgnore:
		s.counts.malformed.Add(1)
		return
	}
	opcode := m.Opcode
	m.SetRcodeFormatError(m)
	if m.Zero = false; rcode == dns.RcodeNotImplemented {
		m.Opcode, m.Rcode = opcode, rcode
	}
	m.Answer, m.Ns, m.Extra = nil, nil, nil
	if p, err := m.Pack(); err == nil && s.sending(c, nil, kindError, s.cfg.Now()) != sendNothing {
		_ = c.back.send(p) // there is nobody to tell
	}
}

// handle answers one query, and observes it.
func (s *Server) handle(ctx context.Context, c client, m *dns.Msg) {
	qu := newQuery(c, m)
	if rcode := qu.malformed(); rcode != dns.RcodeSuccess {
		s.counts.malformed.Add(1)
		_ = s.write(qu, &reply{rcode: rcode}) // there is nobody to tell
		return
	}
	start := s.cfg.Now()
	rep, d, asked := s.answer(ctx, qu, start)
	err := s.write(qu, rep)
	if rep.err != nil {
		err = rep.err
	}
	s.observe(qu, rep, d, start, asked, err)
}

func newQuery(c client, m *dns.Msg) *query {
	qu := &query{msg: m, opt: m.IsEdns0(), client: c}
	if len(m.Question) == 1 {
		qu.q = m.Question[0]
	}
	if qu.opt != nil {
		qu.readOptions()
	}
	return qu
}

// readOptions reads the options of qu that matter here. All others are ignored, and
// none is passed on.
func (qu *query) readOptions() {
	seen := false
	for _, o := range qu.opt.Option {
		switch o := o.(type) {
		case *dns.EDNS0_PADDING:
			qu.padded = true
		case *dns.EDNS0_COOKIE:
			if seen { // of several the first counts
				continue
			}
			seen = true
			got, err := hex.DecodeString(o.Cookie)
			if qu.bad = err != nil || !validCookie(got); !qu.bad {
				qu.cookie = got
			}
		}
	}
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
	case qu.bad: // RFC 7873, section 5.2.2
		return dns.RcodeFormatError
	}
	return dns.RcodeSuccess
}

// answer decides a query and finds its answer. It also returns the last decision
// taken, and how long others were asked.
func (s *Server) answer(ctx context.Context, qu *query, now time.Time) (*reply, policy.Decision, time.Duration) {
	req := policy.Request{Source: qu.addr.Addr(), Protocol: policy.ProtocolDNS, QType: qu.q.Qtype, Time: now}
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
	if s.tunnels != nil && !s.resolver.cached(k, now) && s.tunnels.refuses(req.Name, &d, req.Source, s.proven(qu.client, qu.cookie, now), now) {
		d = d.Refuse(policy.ReasonLimitExceeded)
		return refusal(DenyRefused, d, qu.q), d, 0
	}
	rep, err := s.resolver.resolve(ctx, k, s.inspector(req))
	asked := s.cfg.Now().Sub(now)
	if err != nil {
		rep = &reply{rcode: dns.RcodeServerFailure, ede: dns.ExtendedErrorCodeNotReady, err: err}
	}
	if !rep.local || !rep.next.IsZero() {
		rep, d = s.fit(rep, req, d, qu.q)
	}
	return rep, d, asked
}

// fit returns what req's source may have of rep, and the last decision taken.
func (s *Server) fit(rep *reply, req policy.Request, d policy.Decision, q dns.Question) (*reply, policy.Decision) {
	final := s.filter(rep, req, d)
	if !final.Passes() && final.Reason != policy.ReasonPrivateDestination {
		why := rep.err
		rep = refusal(s.cfg.Deny, final, q)
		rep.err = why
	}
	return rep, final
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
func (s *Server) write(qu *query, rep *reply) error {
	held := s.sending(qu.client, qu.cookie, kindOf(rep.rcode, len(rep.answer) == 0), s.cfg.Now())
	if held == sendNothing {
		return errHeld
	}
	if held == sendTruncated {
		rep = &reply{}
	}
	m := s.message(qu, rep)
	m.Truncated = held == sendTruncated
	buf := buffers.Get().(*[maxEDNSSize]byte)
	defer buffers.Put(buf)
	p, err := m.PackBuffer(buf[:])
	if limit := qu.limit(s); err == nil && len(p) > limit {
		// Whole or not at all: what does not fit is asked for again over TCP, and
		// the answer to a forged source stays small.
		m.Answer, m.Ns, m.Truncated = nil, nil, qu.udp
		if !qu.udp {
			m.Rcode = dns.RcodeServerFailure
		}
		p, err = m.PackBuffer(buf[:])
	}
	if fill := wire.Padding(len(p), dns.MaxMsgSize); err == nil && qu.padded && qu.door.secret() && fill >= 0 {
		opt := m.IsEdns0()
		opt.Option = append(opt.Option, &dns.EDNS0_PADDING{Padding: make([]byte, fill)})
		p, err = m.PackBuffer(buf[:])
	}
	if err == nil && len(m.Question) == 1 { // spelt as asked (0x20), and so are the names that point here
		_, err = dns.PackDomainName(qu.q.Name, p, headerSize, nil, false)
	}
	if err != nil {
		return err
	}
	if err = qu.back.send(p); err == nil && held != sendWhole {
		err = errHeld
	}
	return err
}

// limit returns how large the answer to qu may be, in bytes.
func (qu *query) limit(s *Server) int {
	if qu.opt == nil {
		return s.sizeLimit(qu.udp, false, 0)
	}
	return s.sizeLimit(qu.udp, true, qu.opt.UDPSize())
}

// sizeLimit returns how large an answer may be, in bytes.
func (s *Server) sizeLimit(udp, edns bool, size uint16) int {
	switch {
	case !udp:
		return dns.MaxMsgSize
	case !edns:
		return minUDPSize
	}
	return min(max(int(size), minUDPSize), s.cfg.MaxUDPSize)
}

// message returns the response to a query that rep makes, with the name asked for
// in lower case wherever it stands, so that it compresses alike for everybody.
func (s *Server) message(qu *query, rep *reply) *dns.Msg {
	m := &dns.Msg{Compress: true, Answer: rep.answer, Ns: rep.authority}
	m.Id, m.Response, m.RecursionAvailable = qu.msg.Id, true, true
	m.Opcode, m.RecursionDesired, m.CheckingDisabled = qu.msg.Opcode, qu.msg.RecursionDesired, qu.msg.CheckingDisabled
	m.Rcode = rep.rcode
	m.Authoritative = rep.local && len(rep.answer) > 0 && rep.ede == 0
	m.AuthenticatedData = rep.ad && (qu.msg.AuthenticatedData || qu.opt != nil && qu.opt.Do())
	if len(qu.msg.Question) == 1 && rep.rcode != dns.RcodeFormatError {
		m.Question = []dns.Question{{Name: strings.ToLower(qu.q.Name), Qtype: qu.q.Qtype, Qclass: qu.q.Qclass}}
		for _, rr := range m.Answer {
			if h := rr.Header(); strings.EqualFold(h.Name, qu.q.Name) {
				h.Name = m.Question[0].Name
			}
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
	if qu.cookie != nil {
		var made [cookieSize]byte
		s.cookies.answer(&made, qu.cookie, qu.addr.Addr(), s.cfg.Now())
		opt.Option = append(opt.Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: hex.EncodeToString(made[:])})
	}
	m.Extra = []dns.RR{opt}
	return m
}

// observe counts a query that is over, and tells the Observer of it.
func (s *Server) observe(qu *query, rep *reply, d policy.Decision, start time.Time, asked time.Duration, err error) {
	if s.cfg.Counter != nil {
		s.cfg.Counter.CountQuery(qu.door.String(), &d, qu.q.Qtype, rep.rcode)
	}
	if s.cfg.Observer == nil || !s.tells(qu, rep.rcode, &d, start) {
		return
	}
	ev := event.Event{
		Time: start, Kind: event.DNS, Listener: qu.door.String(), ID: string(s.appendID(nil)),
		Source: qu.addr, Name: qu.q.Name, Decision: d,
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

// tells reports whether the Observer is to be told of a query.
func (s *Server) tells(qu *query, rcode int, d *policy.Decision, now time.Time) bool {
	if s.cfg.Events != EventsSample || d.Verdict != policy.Allow {
		return s.cfg.Events.tell(d)
	}
	name, err := policy.ParseName(qu.q.Name)
	if err != nil {
		return true
	}
	var buf [keySize]byte
	k := key{name: name, qtype: qu.q.Qtype} // DO and CD make no other question of it
	return s.sample.first(k.appendWire(buf[:0]), qu.addr.Addr(), rcode, now)
}

// appendID appends the ID of an Event.
func (s *Server) appendID(dst []byte) []byte {
	return strconv.AppendUint(append(dst, 'd'), s.serial.Add(1), 36)
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
