package proxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/proxy/clienthello"
)

const (
	established = "HTTP/1.1 200 Connection established\r\n\r\n"

	// maxSilence is how long a client that would be let through anyway is waited
	// for: its server may be the one to speak first.
	maxSilence = time.Second

	// maxMethod bounds the method by which HTTP inside a CONNECT is recognised.
	maxMethod = 20

	maxALPN = 8 // protocols that an event keeps
)

// A connect is one CONNECT until its tunnel runs or it is refused. Nothing keeps
// it afterwards.
type connect struct {
	s      *Server
	client net.Conn
	early  []byte // what the client sent after the head; its spare capacity is for reading
	json   bool   // the client prefers JSON
	keep   bool   // the connection may go on after a 407
	again  bool   // and does
	who    who

	ev         event.Event
	request    policy.Request
	decision   policy.Decision
	generation uint64    // of the policy that decision is from, or an older one
	place      *place    // among the tunnels, or nil
	answered   bool      // the 200 was sent
	since      time.Time // when, if the client's first bytes were waited for before; zero: that begins now
	said       int64     // bytes that the client got from the far side before the relay
}

// serveConnect serves the CONNECT with head h, which arrived at start. It returns
// once the connection is closed or belongs to a tunnel; or again is true, and the
// client, which was asked for credentials, may send another request. early is what
// the client sent after the head; its spare capacity is used for reading.
func (s *Server) serveConnect(client net.Conn, source asker, start time.Time, h *head, early []byte) (again bool) {
	c := &connect{early: early}
	s.begin(c, client, source, start, h)
	// What came after the head may belong to the tunnel that there will not be.
	c.keep = h.minor == '1' && len(early) == 0
	defer c.release()
	upstream, r := c.open(h)
	if r != nil {
		c.refuse(r)
		return c.again
	}
	c.establish(upstream)
	return false
}

// begin makes c the CONNECT with head h. client may come later, if source speaks for
// itself.
func (s *Server) begin(c *connect, client net.Conn, source asker, start time.Time, h *head) {
	c.s, c.client, c.json = s, client, h.json
	c.ev = s.newEvent(event.Connect, source, start)
	c.ev.Listener = listenerOf(client)
	c.ev.Method = http.MethodConnect
	c.ev.UserAgent = clip(string(h.userAgent))
	c.request = policy.Request{Source: source.Addr(), Time: start}
}

// establish sends the 200 and does everything after it. It takes over upstream.
func (c *connect) establish(upstream net.Conn) {
	if err := c.accept(); err != nil {
		upstream.Close()
		c.gone(err)
		return
	}
	c.answered = true
	c.ev.Status = http.StatusOK
	c.serve(upstream)
}

// accept sends the 200.
func (c *connect) accept() error {
	if st, ok := c.client.(*http2Stream); ok {
		return st.accept()
	}
	_, err := io.WriteString(c.client, established)
	return err
}

// open does everything up to the 200: it finds out who asks, decides, and connects
// to the far side.
func (c *connect) open(h *head) (net.Conn, *refusal) {
	if r := c.ask(h); r != nil {
		return nil, r
	}
	client := c.client
	if len(c.early) > 0 {
		client = nil // it has said what it wanted to say, and may close that side
	}
	conn, t, r := c.s.reachFor(client, c.request, c.decision, string(h.via))
	c.ev.DNSTime, c.ev.ConnTime, c.ev.Parent = t.dnsTime, t.connTime, t.parent
	if r != nil {
		return nil, r
	}
	c.request, c.decision = t.request, t.decision
	c.ev.Destination = remoteAddr(conn)
	return conn, nil
}

// ask finds out who asks and decides, as far as that can be done without the far side.
// It takes a place among the tunnels.
func (c *connect) ask(h *head) (r *refusal) {
	target := string(h.target)
	name, addr, port, err := policy.ParseAuthority(target)
	if err != nil {
		c.ev.Name = shown(target)
		return badRequest(c.decision, err)
	}
	c.request.Name, c.request.Address, c.request.Port = name, addr.Unmap(), port
	c.ev.Name, c.ev.Port = destination(name, c.request.Address), port
	if err := hostMismatch(string(h.host), target); err != nil {
		c.ev.Error = err.Error()
	}
	if r := c.identify(h); r != nil {
		return r
	}
	if c.decide(); !c.decision.Passes() {
		return c.s.deniedTo(&c.who, c.decision)
	}
	if h.looped {
		return loopedBack(c.decision)
	}
	if c.s.draining.Load() {
		return limited(c.decision, http.StatusServiceUnavailable, errDraining)
	}
	c.place, r = c.s.tunnels.reserve(c.request.Source, c.decision)
	return r
}

// identify finds out who asks.
func (c *connect) identify(h *head) (r *refusal) {
	p := peerOf(c.client)
	if p == nil && !c.s.users.enabled() && !c.s.cfg.Auth.Required {
		return nil
	}
	if p != nil {
		note(&c.ev, p.problem)
	}
	c.who, r = c.s.identify(p, c.request.Source, h.authorized, string(h.credentials))
	c.request.User, c.ev.User = c.who.user, c.who.user
	return r
}

// decide asks the policy about the request as far as it is known.
func (c *connect) decide() {
	c.generation = c.s.generation.Load()
	c.decision = c.s.cfg.Decider.Decide(c.request)
}

// serve does everything after the 200. It takes over upstream.
func (c *connect) serve(upstream net.Conn) {
	if c.decision.Verdict == policy.Allow && c.decision.Inspect&policy.InspectNone != 0 {
		c.request.Protocol = policy.ProtocolTCP
		c.tunnel(upstream, c.early)
		return
	}
	first, r := c.inspect()
	switch {
	case r != nil:
		upstream.Close()
		c.refuse(r)
	case first.silent:
		c.keepVigil(upstream, first.asked)
	case first.left:
		upstream.Close()
		c.gone(errLeft)
	case c.request.Protocol == policy.ProtocolHTTP:
		c.startSession(upstream, first.bytes)
	default:
		c.tunnel(upstream, first.bytes)
	}
}

// tunnel sends upstream what the client has sent so far, and starts the relay.
func (c *connect) tunnel(upstream net.Conn, first []byte) {
	if len(first) > 0 {
		upstream.SetWriteDeadline(time.Now().Add(c.s.cfg.Timeouts.Connect))
		if _, err := upstream.Write(first); err != nil {
			upstream.Close()
			c.refuse(&refusal{decision: c.decision.Refuse(policy.ReasonConnectFailed), err: err})
			return
		}
		upstream.SetWriteDeadline(time.Time{})
	}
	c.client.SetDeadline(time.Time{})
	t := c.newTunnel()
	t.upstream = upstream
	t.up.Store(int64(len(first)))
	t.start(c.generation)
}

// newTunnel makes the tunnel, which takes over event and place.
func (c *connect) newTunnel() *tunnel {
	c.ev.Decision = c.decision
	t := &tunnel{s: c.s, client: c.client, request: c.request, hash: c.who.hash, ev: c.ev, place: c.place}
	c.place = nil
	t.down.Store(c.said)
	return t
}

// firstBytes is what a client said first.
type firstBytes struct {
	bytes []byte
	left  bool // it closed without having said anything

	silent bool            // it is let through although it has said nothing so far
	asked  policy.Decision // if silent: the one before the silence
}

var errOtherRecord = errors.New("a TLS record that is no handshake comes first")

var errLeft = errors.New("the client closed before it said anything")

// inspect reads what the client says first, as far as it must be known, and
// decides about it. Deadline and size are bounded in all; see timeouts.client_hello.
func (c *connect) inspect() (firstBytes, *refusal) {
	start := c.since
	if c.since = (time.Time{}); start.IsZero() {
		start = time.Now()
	}
	whole := start.Add(c.s.cfg.Timeouts.ClientHello)
	begin := whole
	if c.decision.Verdict == policy.Observe {
		begin = start.Add(min(maxSilence, c.s.cfg.Timeouts.ClientHello))
	}
	c.client.SetReadDeadline(begin)
	limit := c.s.cfg.Limits.ClientHelloBytes
	hello, raw, err := clienthello.Read(c.client, c.early, limit)
	if begin != whole {
		c.client.SetReadDeadline(whole)
		if len(raw) > 0 && isTimeout(err) {
			hello, raw, err = clienthello.Read(c.client, raw, limit)
		}
	}
	first := firstBytes{bytes: raw}
	switch {
	case err == nil:
		return first, c.sawTLS(&hello)
	case errors.Is(err, clienthello.ErrNotTLS):
		return c.sawPlain(raw)
	case errors.Is(err, clienthello.ErrTooLarge):
		return first, c.helloRefused(policy.ReasonHelloTooLarge, err)
	case errors.Is(err, clienthello.ErrMalformed):
		return first, c.helloRefused(policy.ReasonHelloMalformed, err)
	case len(raw) == 0:
		return c.sawNothing(err)
	case isTimeout(err):
		return first, c.helloRefused(policy.ReasonHelloTimeout, err)
	}
	return first, c.helloRefused(policy.ReasonHelloMalformed, err) // gone in the middle of it
}

// helloRefused is the refusal of a ClientHello that could not be read. It holds
// in every mode.
func (c *connect) helloRefused(reason policy.Reason, err error) *refusal {
	c.request.Protocol = policy.ProtocolTLS
	return &refusal{decision: c.decision.Refuse(reason), err: err}
}

// sawTLS decides on a ClientHello and takes its facts into the event.
func (c *connect) sawTLS(hello *clienthello.Hello) *refusal {
	alpn := hello.ALPN()
	c.ev.SNI, c.ev.ALPN, c.ev.ECH = hello.ServerName, alpn[:min(len(alpn), maxALPN)], hello.ECH
	c.ev.TLSVersion, c.ev.JA4 = hello.MaxVersion, hello.JA4()
	c.ev.PostQuantum = hello.PostQuantum
	c.request.TLS = policy.TLS{Seen: true, MaxVersion: hello.MaxVersion, ECH: hello.ECH}
	if hello.ServerName != "" {
		sni, err := policy.ParseName(hello.ServerName)
		if err != nil {
			return c.helloRefused(policy.ReasonHelloMalformed, err)
		}
		c.request.TLS.SNI = sni
	}
	return c.saw(policy.ProtocolTLS)
}

// saw decides on the protocol that the client turned out to speak.
func (c *connect) saw(p policy.Protocol) *refusal {
	c.request.Protocol = p
	if c.decide(); !c.decision.Passes() {
		return denied(c.decision)
	}
	return nil
}

// sawPlain decides on a beginning that is not TLS: HTTP, where it may be, or
// something that nothing is known about.
func (c *connect) sawPlain(raw []byte) (firstBytes, *refusal) {
	if len(raw) > 1 && raw[0] >= 20 && raw[0] <= 24 && raw[1] == 3 { // TLS record types (RFC 8446, section 5.1)
		return firstBytes{bytes: raw}, c.helloRefused(policy.ReasonHelloMalformed, errOtherRecord)
	}
	if c.decision.Inspect&policy.InspectHTTP != 0 {
		var is bool
		if raw, is = c.awaitMethod(raw); is {
			return firstBytes{bytes: raw}, c.saw(policy.ProtocolHTTP)
		}
	}
	return firstBytes{bytes: raw}, c.saw(policy.ProtocolTCP)
}

// awaitMethod reads on until raw shows whether it is HTTP.
func (c *connect) awaitMethod(raw []byte) (all []byte, is bool) {
	for {
		is, known := looksHTTP(raw)
		if known {
			return raw, is
		}
		raw = slices.Grow(raw, maxMethod)
		n, err := c.client.Read(raw[len(raw):cap(raw)])
		if raw = raw[:len(raw)+n]; err != nil && n == 0 {
			return raw, false
		}
	}
}

// looksHTTP reports whether b starts like an HTTP request: a method in capital
// letters, a space, and the start of a target. known is false as long as more
// bytes could change the answer.
func looksHTTP(b []byte) (is, known bool) {
	i := slices.IndexFunc(b, func(c byte) bool { return (c < 'A' || c > 'Z') && c != '-' })
	switch {
	case i < 0:
		return false, len(b) > maxMethod
	case i == 0 || i > maxMethod || b[i] != ' ':
		return false, true
	case len(b) == i+1:
		return false, false
	}
	c := b[i+1] | 0x20
	return b[i+1] == '/' || b[i+1] == '*' || c >= 'a' && c <= 'z', true
}

// sawNothing decides on a client that is silent, or closed without a word: its
// server may speak first, where anything may be spoken.
func (c *connect) sawNothing(err error) (firstBytes, *refusal) {
	asked := c.decision
	r := c.saw(policy.ProtocolTCP)
	switch {
	case r == nil:
		return firstBytes{silent: isTimeout(err) && c.decision.Verdict == policy.Observe, asked: asked}, nil
	case isTimeout(err):
		return firstBytes{}, &refusal{decision: c.decision.Refuse(policy.ReasonHelloTimeout), err: err}
	}
	c.decision = asked
	return firstBytes{left: true}, nil
}

// gone ends a CONNECT whose client went away. Nothing was refused.
func (c *connect) gone(err error) {
	c.client.Close()
	c.finish(c.decision, err)
}

// refuse tells the client of r in the way it understands at this stage, and ends
// the CONNECT. Nothing went to the far side.
func (c *connect) refuse(r *refusal) {
	c.client.SetWriteDeadline(time.Now().Add(answerTime))
	if !c.answered {
		c.again = c.keep && r.status == http.StatusProxyAuthRequired && !c.s.draining.Load()
	}
	if st, ok := c.client.(*http2Stream); ok && !c.answered {
		c.ev.Status = r.status
		st.refuse(c.answer(r))
	} else if said := c.words(r); len(said) > 0 {
		c.client.Write(said)
	}
	c.finish(r.decision, r.err)
	if !c.again {
		closeGently(c.client, make([]byte, 512))
	}
}

// words returns what the client is told of r: an HTTP answer, before or inside the
// tunnel, or an alert, or nothing.
func (c *connect) words(r *refusal) []byte {
	switch {
	case !c.answered:
		c.ev.Status = r.status
	case c.request.Protocol == policy.ProtocolTLS:
		return alertRecord(r.alert())
	case c.request.Protocol != policy.ProtocolHTTP:
		return nil // there is no way to say why
	}
	return c.answer(r).append(make([]byte, 0, 1024), r.phrase(!c.answered))
}

// answer returns what an HTTP client is told of r.
func (c *connect) answer(r *refusal) *answer {
	a := c.s.answer(r, &c.ev, c.json)
	a.keep = c.again
	return a
}

// finish emits the event of a CONNECT that became no tunnel.
func (c *connect) finish(d policy.Decision, err error) {
	c.release()
	c.ev.Decision, c.ev.Protocol = d, c.request.Protocol
	note(&c.ev, err)
	c.s.observe(&c.ev)
}

// release gives the place among the tunnels back, unless a tunnel has it.
func (c *connect) release() {
	c.s.tunnels.release(c.place)
	c.place = nil
}

// destination returns what a client asked for, as events and answers show it.
func destination(name policy.Name, addr netip.Addr) string {
	if !name.IsZero() {
		return name.String()
	}
	return addr.String()
}
