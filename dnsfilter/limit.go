package dnsfilter

import (
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
)

// Limits bound what one source can ask for, and what somebody who forges its address
// can have sent to it. The zero value bounds nothing but the share of one source in the
// queries under way.
type Limits struct {
	// ResponsesPerSecond bounds the answers over UDP to one prefix, of each of three
	// kinds: those with records, those without, errors. 0: no bound. Beyond it every
	// Slip-th answer is empty and truncated, so that a client which receives it asks
	// again over TCP, and the others are not sent. 0: none is.
	ResponsesPerSecond int
	Slip               int

	IPv4Prefix int // bits of what counts as one prefix, 8 to 32; 0 is 24
	IPv6Prefix int // the same, 16 to 128; 0 is 56

	// QueriesPerSecond bounds the queries of one address, of IPv6 one /64, over
	// whatever transport, and QueriesBurst those that come at once; 0 is no bound, and
	// a burst of as many as a second. OverLimit says what becomes of the others. Those over UDP
	// without a valid cookie, which anybody may have sent, are counted apart from the rest.
	QueriesPerSecond int
	QueriesBurst     int
	OverLimit        OverLimit // "" is OverLimitRefuse

	Exempt []netip.Prefix // sources that ResponsesPerSecond and QueriesPerSecond do not bound
}

// OverLimit is what becomes of a query beyond Limits.QueriesPerSecond.
type OverLimit string

// What becomes of a query too many.
const (
	OverLimitRefuse OverLimit = "refuse" // REFUSED; what is no plain question is not answered
	OverLimitDrop   OverLimit = "drop"   // not answered over UDP; refused over streams
)

const (
	maxRate        = 100_000             // a second, of either limit
	maxSlip        = 10                  // as BIND has it
	defaultPrefix4 = 24                  // bits
	defaultPrefix6 = 56                  // bits
	sourceBits6    = 64                  // bits of an IPv6 address that make a source
	tellEvery      = time.Minute         // between events of one source that is over its limit
	sayEvery       = time.Minute         // between lines in the log about a limit
	maxShare       = maxInFlight / 16    // of the queries under way, for one source once half of the room is taken
	maxForgeable   = maxInFlight / 4 * 3 // of the queries under way, when no more are taken from clients that are not proven
	shareSlots     = 1 << 14             // 4 bytes each; sources in one slot share maxShare
)

// errHeld is the error of an answer that went out empty, or not at all.
var errHeld = errors.New("answer held back: too many answers to this prefix")

// withDefaults returns l with its zero values replaced.
func (l Limits) withDefaults() Limits {
	if l.IPv4Prefix == 0 {
		l.IPv4Prefix = defaultPrefix4
	}
	if l.IPv6Prefix == 0 {
		l.IPv6Prefix = defaultPrefix6
	}
	if l.OverLimit == "" {
		l.OverLimit = OverLimitRefuse
	}
	return l
}

// check returns every mistake in l, after withDefaults.
func (l Limits) check() error {
	var errs []error
	for _, n := range []struct {
		key              string
		value, low, high int
	}{
		{"responses_per_second", l.ResponsesPerSecond, 0, maxRate}, {"slip", l.Slip, 0, maxSlip},
		{"ipv4_prefix", l.IPv4Prefix, 8, 32}, {"ipv6_prefix", l.IPv6Prefix, 16, 128},
		{"queries_per_second", l.QueriesPerSecond, 0, maxRate}, {"queries_burst", l.QueriesBurst, 0, maxRate},
	} {
		if n.value < n.low || n.value > n.high {
			errs = append(errs, fmt.Errorf("dns.limits.%s: %d is not between %d and %d", n.key, n.value, n.low, n.high))
		}
	}
	if l.QueriesBurst > 0 && l.QueriesPerSecond == 0 {
		errs = append(errs, errors.New("dns.limits.queries_burst: goes with queries_per_second; set that too, or remove it"))
	}
	switch l.OverLimit {
	case OverLimitRefuse, OverLimitDrop:
	default:
		errs = append(errs, fmt.Errorf("dns.limits.over_limit: %q is none of refuse, drop", l.OverLimit))
	}
	return errors.Join(errs...)
}

// A limiter holds Limits to those who ask.
type limiter struct {
	l         Limits
	responses *meter        // nil: no bound
	queries   *meter        // nil: no bound
	told      *meter        // whom an event was written of
	held      atomic.Uint64 // answers over the limit
	said      [2]atomic.Int64
	shares    [shareSlots]atomic.Int32
	seed      maphash.Seed // of the sources' places in shares
}

// newLimiter returns the limiter of s.
func (s *Server) newLimiter() *limiter {
	now, l := s.cfg.Now(), s.cfg.Limits
	l.Exempt = unmapped(l.Exempt)
	m := &limiter{l: l, seed: maphash.MakeSeed(), queries: perSecond(l.QueriesPerSecond, l.QueriesBurst, now)}
	m.responses = perSecond(l.ResponsesPerSecond, 0, now)
	if m.queries != nil {
		m.told = newMeter(tellEvery, 1, now)
	}
	return m
}

// exempt reports whether l does not bound the rates of source.
func (l *Limits) exempt(source netip.Addr) bool {
	for _, p := range l.Exempt {
		if p.Contains(source) {
			return true
		}
	}
	return false
}

// tooMany counts a query from c and reports whether it is one too many.
func (f *fast) tooMany(c client, now time.Time) bool {
	s, m := f.s, f.s.limit
	if m.queries == nil {
		return false
	}
	source := c.addr.Addr()
	if m.l.exempt(source) || !m.queries.over(prefixOf(source, 32, sourceBits6), kindOfClient(f.proven(c, now)), now) {
		return false
	}
	s.say(0, now, source, "a source asks more than dns.limits.queries_per_second; said once a minute")
	return true
}

// proven reports whether c, who sent the last query, receives what is sent to its address:
// it has a connection, or a cookie that shows it. Whoever forges the address of another client
// must not spend what that one has, so each source has its limits twice: proven, and not.
func (f *fast) proven(c client, now time.Time) bool {
	return !c.udp || f.plain && f.s.proven(c, f.q.Cookie, now)
}

// proven is the same for a query with a cookie, nil if it has none.
func (s *Server) proven(c client, cookie []byte, now time.Time) bool {
	return !c.udp || cookie != nil && s.cookies.proven(cookie, c.addr.Addr(), now)
}

// kindOfClient returns what a meter tells clients apart by.
func kindOfClient(proven bool) byte {
	if proven {
		return 1
	}
	return 0
}

// shed answers a query too many, which q holds if it is plain, or not at all.
func (f *fast) shed(dst []byte, plain bool, req policy.Request, packet []byte, c client, now time.Time, o *outcome) []byte {
	s := f.s
	if !plain || c.udp && s.limit.l.OverLimit == OverLimitDrop {
		s.counts.queriesDropped.Add(1)
		return dst
	}
	s.counts.queriesRefused.Add(1)
	o.addr, o.door, o.qtype, o.packed, o.asked, o.name, o.held = c.addr, c.door, f.q.Type, nil, 0, len(f.q.Name.Bytes()), nil
	o.d = f.decide(req).Refuse(policy.ReasonLimitExceeded)
	o.tell = s.cfg.Observer != nil && !s.limit.told.over(prefixOf(c.addr.Addr(), 32, sourceBits6), 0, now)
	start := len(dst)
	return f.hold(f.refuse(dst, c, now, o), start, packet, c, now, o)
}

// A sending says what becomes of an answer.
type sending uint8

const (
	sendWhole sending = iota
	sendTruncated
	sendNothing
)

// Kinds of answers that are counted apart.
const (
	kindRecords byte = iota
	kindEmpty
	kindError
)

// kindOf returns the kind of an answer.
func kindOf(rcode int, empty bool) byte {
	switch {
	case rcode == dns.RcodeNameError || rcode == dns.RcodeSuccess && empty:
		return kindEmpty
	case rcode == dns.RcodeSuccess:
		return kindRecords
	}
	return kindError
}

// sending counts an answer of a kind to c over UDP, and says what becomes of it. A client whose
// cookie shows that it receives what is sent to its address is not bounded.
func (s *Server) sending(c client, cookie []byte, kind byte, now time.Time) sending {
	m := s.limit
	source := c.addr.Addr()
	if m.responses == nil || !c.udp || c.counted || m.l.exempt(source) || s.proven(c, cookie, now) ||
		!m.responses.over(prefixOf(source, m.l.IPv4Prefix, m.l.IPv6Prefix), kind, now) {
		return sendWhole
	}
	s.say(1, now, source, "answers over UDP to a prefix are held back: more than dns.limits.responses_per_second; said once a minute")
	if n := m.held.Add(1); m.l.Slip > 0 && n%uint64(m.l.Slip) == 0 {
		s.counts.answersTruncated.Add(1)
		return sendTruncated
	}
	s.counts.answersDropped.Add(1)
	return sendNothing
}

// hold returns dst with the answer that begins at start as it may go out, perhaps
// nothing of it. What does not go out is observed here.
func (f *fast) hold(dst []byte, start int, packet []byte, c client, now time.Time, o *outcome) []byte {
	if f.s.limit.responses == nil || !c.udp {
		return dst
	}
	if dst = f.send(dst, start, kindOf(o.rcode, o.packed.empty()), c, now, o); len(dst) == start {
		f.observe(o, packet, now, now, nil)
	}
	return dst
}

// holdMissed is hold before upstreams are asked: if the answer would not go out, they are not.
func (f *fast) holdMissed(dst, packet []byte, c client, now time.Time, o *outcome) ([]byte, bool) {
	if f.s.limit.responses == nil || !c.udp {
		return dst, false
	}
	start := len(dst)
	o.rcode = dns.RcodeSuccess
	if dst = f.send(dst, start, kindRecords, c, now, o); o.held == nil {
		return dst, false
	}
	if o.tell = f.tells(o, now); len(dst) == start {
		f.observe(o, packet, now, now, nil)
	}
	return dst, true
}

// empty reports whether there is no record in the answer that p is, which may be nil.
func (p *packed) empty() bool {
	return p == nil || len(p.answers) == 0 && (len(p.message) < headerSize || p.message[6]|p.message[7] == 0)
}

// send makes of the answer of a kind that begins at start of dst what may go out.
func (f *fast) send(dst []byte, start int, kind byte, c client, now time.Time, o *outcome) []byte {
	switch f.s.sending(c, f.q.Cookie, kind, now) {
	case sendNothing:
		o.held = errHeld
		return dst[:start]
	case sendTruncated:
		o.held = errHeld
		dst = f.q.AppendHeader(dst[:start], dns.RcodeSuccess)
		dst[start+2] |= truncated
		if f.q.EDNS {
			dst = f.appendOPT(dst, start, c, now, 0, "")
		}
	}
	return dst
}

// say warns of a limit, once in a while.
func (s *Server) say(limit int, now time.Time, source netip.Addr, what string) {
	last := &s.limit.said[limit]
	was := last.Load()
	if at := now.UnixNano(); (was == 0 || at-was >= int64(sayEvery)) && last.CompareAndSwap(was, at) {
		s.cfg.Logger.Warn().Stringer("src", source).Msg(what)
	}
}

// enter takes room for a query from source that cannot be answered at once, or reports
// false. While half of the room is free, anybody may have it; then nobody gets more than
// a sixteenth of the whole, so that one source cannot keep all others out. The last quarter is
// for clients that are proven.
func (s *Server) enter(source netip.Addr, proven bool) bool {
	room := int64(maxForgeable)
	if proven {
		room = maxInFlight
	}
	share := s.share(source, proven)
	mine, all := share.Add(1), s.inFlight.Add(1)
	if all <= maxInFlight/2 || all <= room && mine <= maxShare {
		return true
	}
	s.leave(source, proven)
	if all <= room {
		s.counts.crowding.Add(1)
	}
	return false
}

// leave gives the room back that enter took.
func (s *Server) leave(source netip.Addr, proven bool) {
	s.share(source, proven).Add(-1)
	s.inFlight.Add(-1)
}

// share returns how many queries of source are under way.
func (s *Server) share(source netip.Addr, proven bool) *atomic.Int32 {
	var k [17]byte
	from := prefixOf(source, 32, sourceBits6).As16()
	copy(k[:], from[:])
	k[16] = kindOfClient(proven)
	return &s.limit.shares[maphash.Bytes(s.limit.seed, k[:])%shareSlots]
}
