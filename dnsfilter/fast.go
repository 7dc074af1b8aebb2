package dnsfilter

import (
	"net/netip"
	"time"
	"unsafe"

	"github.com/miekg/dns"

	"sallyport/dnsfilter/wire"
	"sallyport/policy"
	"sallyport/policy/event"
)

// A fast answers plain queries from the packet, without unpacking it: those that are
// refused, and those whose answer is in the cache. Whatever needs more thought is left
// to Server.serve, whose answers have the same bytes. It is for one goroutine.
type fast struct {
	s    *Server
	wire WireDecider // Config.Decider, or nil
	laws interface { // the same, or nil
		Policy() *policy.Policy
	}
	q     wire.Query
	text  [256 + 16]byte // a name as events have it, and an ID
	key   [keySize + 17]byte
	ev    event.Event
	page  []byte   // room for the text of the next events, nothing of it used
	texts []string // what answers returned

	plain  bool        // the last query is, and stands in q
	missed bool        // of the last query: it was left because nothing is known of it
	name   policy.Name // asked for then
}

// textPage is how many bytes of text, of events that come one after the other, are allocated
// together. Whoever keeps one of them keeps all.
const textPage = 1 << 10

func newFast(s *Server) *fast {
	f := &fast{s: s}
	f.wire, _ = s.cfg.Decider.(WireDecider)
	f.laws, _ = s.cfg.Decider.(interface{ Policy() *policy.Policy })
	f.ev.Kind = event.DNS
	return f
}

// An outcome is what is to be told of a query that a fast has answered.
type outcome struct {
	addr   netip.AddrPort
	door   door
	d      policy.Decision
	qtype  uint16
	rcode  int
	packed *packed       // nil if there was no answer in it
	tell   bool          // the Observer
	asked  time.Duration // how long others were asked
	name   int           // bytes of the name asked for in the packet
	held   error         // why the answer did not go out as it was
}

// answer appends to dst the answer to packet and fills o, or returns false to leave
// packet to Server.serve. It keeps neither. If it appends nothing, there is no answer, and
// nothing left to observe. The client's way back is not used. Who reads
// packets has the hosts file refreshed first, once for all of a batch.
func (f *fast) answer(dst, packet []byte, c client, now time.Time, o *outcome) ([]byte, bool) {
	s, q := f.s, &f.q
	f.missed = false
	plain := q.Parse(packet)
	f.plain = plain
	req := policy.Request{Source: c.addr.Addr(), Protocol: policy.ProtocolDNS, QType: q.Type, Time: now}
	if f.tooMany(c, now) {
		return f.shed(dst, plain, req, packet, c, now, o), true
	}
	if !plain || isMeta(q.Type) || q.Type == dns.TypeANY {
		return dst, false
	}
	if _, own := s.recorded[string(q.Name.Bytes())]; own {
		return dst, false
	}
	o.addr, o.door, o.qtype, o.packed, o.asked, o.name, o.held = c.addr, c.door, q.Type, nil, 0, len(q.Name.Bytes()), nil
	o.d = f.decide(req)
	start := len(dst)
	var ok bool
	if !o.d.Passes() {
		dst = f.refuse(dst, c, now, o)
	} else if dst, ok = f.cached(dst, req, c, now, o); !ok {
		dst = dst[:start]
		if !f.missed {
			return dst, false
		}
		f.name = q.Name.Name()
		if s.tunnels == nil || !s.tunnels.refuses(f.name, &o.d, c.addr.Addr(), f.proven(c, now), now) {
			return f.holdMissed(dst, packet, c, now, o)
		}
		o.d = o.d.Refuse(policy.ReasonLimitExceeded)
		dst = f.refuse(dst, c, now, o)
	}
	o.tell = f.tells(o, now)
	return f.hold(dst, start, packet, c, now, o), true
}

// tells reports whether the Observer is to be told of a query that has been answered.
func (f *fast) tells(o *outcome, now time.Time) bool {
	c := f.s.cfg
	return c.Observer != nil && c.Events.tell(&o.d) &&
		(c.Events != EventsSample || o.d.Verdict != policy.Allow || f.s.sample.first(f.sampleKey(), o.addr.Addr(), o.rcode, now))
}

// decide decides req, whose name is the one asked for.
func (f *fast) decide(req policy.Request) policy.Decision {
	if f.wire != nil {
		return f.wire.DecideWire(&f.q.Name, req)
	}
	req.Name = f.q.Name.Name()
	return f.s.cfg.Decider.Decide(req)
}

// author returns the policy that decided d if it is in force, and known; otherwise nil.
// Nobody keeps it, however long a query takes: a policy that is replaced must become garbage.
func (f *fast) author(d *policy.Decision) *policy.Policy {
	if f.laws == nil {
		return nil
	}
	if p := f.laws.Policy(); p != nil && p.Revision() == d.Revision {
		return p
	}
	return nil
}

// sampleKey returns what the sampler knows the query by, with room behind it.
func (f *fast) sampleKey() []byte {
	return wire.AppendKey(f.q.AppendName(f.key[:0]), f.q.Type, false, false)
}

// appendOPT ends the answer that begins at start of dst with an OPT record, as message does.
func (f *fast) appendOPT(dst []byte, start int, c client, now time.Time, ede uint16, text string) []byte {
	opt := len(dst)
	dst = f.q.AppendOPT(dst, start, uint16(f.s.cfg.MaxUDPSize), ede, text)
	if f.q.Cookie != nil {
		var made [cookieSize]byte
		f.s.cookies.answer(&made, f.q.Cookie, c.addr.Addr(), now)
		dst = wire.AppendOption(dst, opt, wire.OptionCookie, made[:])
	}
	if f.q.Padded && c.door.secret() {
		dst = wire.AppendPadding(dst, start, opt, dns.MaxMsgSize)
	}
	return dst
}

// refuse appends the refusal that refusal would make.
func (f *fast) refuse(dst []byte, c client, now time.Time, o *outcome) []byte {
	start := len(dst)
	var sunk []byte
	switch f.s.resolver.denialOf(wire.AppendText(f.text[:0], f.q.Name.Bytes()), o.d.Reason) {
	case DenyNXDomain:
		o.rcode = dns.RcodeNameError
	case DenyNodata:
		o.rcode = dns.RcodeSuccess
	case DenySinkhole:
		o.rcode = dns.RcodeSuccess
		switch o.qtype {
		case dns.TypeA:
			sunk = unspecified[:4]
			o.packed = sunkA
		case dns.TypeAAAA:
			sunk = unspecified[:]
			o.packed = sunkAAAA
		}
	default:
		o.rcode = dns.RcodeRefused
	}
	dst = f.q.AppendHeader(dst, o.rcode)
	if sunk != nil {
		dst = f.q.AppendAddress(dst, start, sunk, refusedTTL)
	}
	if !f.q.EDNS {
		return dst
	}
	ede := dns.ExtendedErrorCodeBlocked
	if prohibits(o.d.Reason) {
		ede = dns.ExtendedErrorCodeProhibited
	}
	return f.appendOPT(dst, start, c, now, ede, o.d.Reason.String())
}

// What a sinkhole answers.
var (
	unspecified [16]byte
	sunkA       = &packed{answers: []string{netip.IPv4Unspecified().String()}}
	sunkAAAA    = &packed{answers: []string{netip.IPv6Unspecified().String()}}
)

// cached appends the answer that the cache has, if it has one that req's source may
// have whole.
func (f *fast) cached(dst []byte, req policy.Request, c client, now time.Time, o *outcome) ([]byte, bool) {
	s, q := f.s, &f.q
	if q.Type == dns.TypeHTTPS || q.Type == dns.TypeSVCB {
		if s.cfg.HTTPSRecords == HTTPSNodata {
			return f.nodata(dst, c, now, o), true
		}
	}
	if s.resolver.hosts.mayHave(q.Name.Bytes(), q.Type) {
		return dst, false
	}
	k := q.Key()
	e, stale, _ := s.resolver.cache.find(k, now)
	if e == nil {
		f.missed = stale == nil
		return dst, false
	}
	if dst, ok := f.known(dst, e, s.packedOf(k, q.Type, e), req, c, now, o); ok {
		s.counts.hits.Add(1)
		if s.resolver.due(e, now) {
			s.resolver.prefetch(key{name: q.Name.Name(), qtype: q.Type, do: q.DO, cd: q.CD}, e)
		}
		return dst, true
	}
	return dst, false
}

// known appends the answer that e, packed as p, is, unless req's source may not have
// all of it.
func (f *fast) known(dst []byte, e *entry, p *packed, req policy.Request, c client, now time.Time, o *outcome) ([]byte, bool) {
	s, q := f.s, &f.q
	if p == unpackable || p.leads && s.cfg.CNAMEs == CNAMEsInspect || !f.allPass(req, &o.d, p) {
		return dst, false
	}
	start := len(dst)
	limit := s.sizeLimit(c.udp, q.EDNS, q.UDPSize)
	size := len(p.message)
	if q.EDNS {
		size += wire.OPTSize
	}
	if q.Cookie != nil {
		size += cookieOptionSize
	}
	if size > limit && !c.udp {
		return dst, false
	}
	o.packed, o.rcode = p, int(p.message[3]&0xF)
	if authentic := p.ad && (q.AD || q.DO); size > limit {
		dst = q.AppendTruncated(dst, p.message, authentic)
	} else {
		dst = q.AppendAnswer(dst, p.message, authentic)
		wire.Age(dst[start:], p.ttls, e.age(now))
	}
	if q.EDNS {
		dst = f.appendOPT(dst, start, c, now, 0, "")
	}
	return dst, true
}

// allPass reports whether every address in p passes for req's source, for which the name
// does, as d says.
func (f *fast) allPass(req policy.Request, d *policy.Decision, p *packed) bool {
	by := f.author(d)
	for _, a := range p.addrs {
		if by != nil && by.Indifferent(a) {
			continue
		}
		req.Destination = a
		if r := f.s.resolver; r.privateZones {
			req.PrivateZone = r.PrivateZone(f.q.Name.Name(), a)
		}
		if d := f.decide(req); !d.Passes() {
			return false
		}
	}
	return true
}

// nodata appends an answer without records.
func (f *fast) nodata(dst []byte, c client, now time.Time, o *outcome) []byte {
	start := len(dst)
	o.rcode = dns.RcodeSuccess
	if dst = f.q.AppendHeader(dst, o.rcode); f.q.EDNS {
		dst = f.appendOPT(dst, start, c, now, 0, "")
	}
	return dst
}

// observe counts a query that has been answered by the time end, and tells the
// Observer of it.
func (f *fast) observe(o *outcome, packet []byte, start, end time.Time, err error) {
	s := f.s
	if err == nil {
		err = o.held
	}
	if s.cfg.Counter != nil {
		s.cfg.Counter.CountQuery(o.door.String(), &o.d, o.qtype, o.rcode)
	}
	if !o.tell {
		return
	}
	// The two strings of the event, which an Observer may keep: what is written here stays as it is.
	text := wire.AppendText(f.room(), packet[headerSize:headerSize+o.name])
	name := len(text)
	both := f.keep(s.appendID(text))
	ev := &f.ev // whose other fields never change
	ev.Listener = o.door.String()
	ev.Time, ev.ID, ev.Source, ev.Name, ev.Decision = start, both[name:], o.addr, both[:name], o.d
	ev.QType, ev.RCode, ev.Answers, ev.Error = typeName(o.qtype), rcodeNames[o.rcode&0xF], nil, ""
	ev.DNSTime, ev.Duration = o.asked, end.Sub(start)
	if o.packed != nil {
		ev.Answers = f.answers(o.packed)
	}
	if err != nil {
		ev.Error = err.Error()
	}
	s.cfg.Observer.Observe(ev)
}

// room returns room for some text of an event, for keep.
func (f *fast) room() []byte {
	if cap(f.page) < len(f.text) {
		f.page = make([]byte, 0, textPage)
	}
	return f.page
}

// keep returns the text that has been appended to what room returned.
func (f *fast) keep(text []byte) string {
	f.page = text[len(text):]
	return unsafe.String(unsafe.SliceData(text), len(text))
}

// answers returns what an Event says of p, until the next call.
func (f *fast) answers(p *packed) []string {
	if !p.alone {
		return p.answers
	}
	f.texts = f.texts[:0]
	for _, a := range p.addrs[:min(len(p.addrs), maxAnswers)] {
		f.texts = append(f.texts, f.keep(a.AppendTo(f.room())))
	}
	return f.texts
}

// rcodeNames are the response codes of the header.
var rcodeNames = func() (names [16]string) {
	for i := range names {
		names[i] = dns.RcodeToString[i]
	}
	return names
}()

// typeName returns the name of a type as events have it.
func typeName(t uint16) string {
	switch t { // nearly all
	case dns.TypeA:
		return "A"
	case dns.TypeAAAA:
		return "AAAA"
	case dns.TypeHTTPS:
		return "HTTPS"
	}
	if name, ok := dns.TypeToString[t]; ok {
		return name
	}
	return dns.Type(t).String()
}
