package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/elazarl/goproxy"

	"sallyport/policy"
	"sallyport/policy/event"
)

const (
	defaultPort = ":80" // of the http scheme

	copySize = 32 << 10 // bytes of a body moved at a time

	// bodyPatience is how long the rest of a request's body is taken in after the
	// response, so that the client receives that.
	bodyPatience = time.Second

	// expectPatience is how long a far side is waited for that should say 100 to a
	// request with Expect. One that is silent may not know it.
	expectPatience = time.Second
)

// minBulk is how many bytes of a body are worth a goroutine in place of the lane.
const minBulk = 1 << 20

var copyBuffers = sync.Pool{New: func() any { return new([copySize]byte) }}

// exchangeKey finds the exchange in a request's context.
type exchangeKey struct{}

// exchangeOf returns the exchange that r, on its way to the far side, belongs to.
// It is called in the goroutine of the exchange, on whose connection of HTTP/1 there is
// no other one.
func exchangeOf(r *http.Request) *exchange {
	if ex, ok := r.Context().Value(exchangeKey{}).(*exchange); ok {
		return ex
	}
	return r.Context().Value(clientKey{}).(*clientConn).live.ex
}

// An exchange is one plain HTTP request and its response. It is also the
// http.ResponseWriter that goproxy writes to.
type exchange struct {
	http.ResponseWriter
	s      *Server
	client *clientConn
	method string
	json   bool          // the client prefers JSON
	http2  bool          // on a stream of HTTP/2
	body   *countingBody // of the request; nil: none

	ev       event.Event
	who      who
	request  policy.Request  // what was asked before the dial; not changed then, for the dial reads it
	admitted policy.Decision // the answer; the same
	decision policy.Decision // the last one

	generation uint64 // of the policy that admitted is from, or an older one

	up, down atomic.Int64 // bytes of the bodies
	written  int64        // of the response's body, to the client
	length   int64        // of the response's body as announced; -1: unknown
	broken   error        // why the response ends before its end
	taken    bool         // a tunnel has the event
	place    *place       // among the tunnels, for an upgrade; nil: none

	via     string // of the request, as it came
	modern  bool   // the client speaks HTTP/1.1
	interim interim
	carried bool // by a carrier itself
	trace   httptrace.ClientTrace
	answer  countingBody                    // of the response
	revoked atomic.Pointer[policy.Decision] // what a later policy said
	left    atomic.Bool                     // the client has gone
}

// newGoproxy returns the part of goproxy that is used: it drives a decided
// request, copies header fields, body and trailers. Everything else it could do
// is shut off: no dial of its own, no environment, no CONNECT.
func newGoproxy(s *Server) *goproxy.ProxyHttpServer {
	never := errors.New("goproxy dials by itself")
	p := goproxy.NewProxyHttpServer()
	p.Tr = &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return nil, never }}
	p.ConnectDial = func(string, string) (net.Conn, error) { return nil, never }
	p.Logger = debugLog{s}
	p.KeepHeader = true // removing the hop-by-hop fields is our work, see stripHopByHop
	p.KeepAcceptEncoding = true
	p.OnRequest().HandleConnect(goproxy.AlwaysReject)
	p.OnRequest().DoFunc(func(r *http.Request, ctx *goproxy.ProxyCtx) (*http.Request, *http.Response) {
		ctx.RoundTripper = goproxy.RoundTripperFunc(roundTrip)
		return r, nil
	})
	return p
}

// debugLog takes what goproxy and net/http have to say about connections.
type debugLog struct{ s *Server }

func (l debugLog) Printf(format string, v ...any) {
	l.s.cfg.Logger.Debug().Msg(strings.TrimSpace(fmt.Sprintf(format, v...)))
}

func (l debugLog) Write(p []byte) (int, error) {
	l.s.cfg.Logger.Debug().Msg(strings.TrimSpace(string(p)))
	return len(p), nil
}

// A forwarder is the handler of the http.Server.
type forwarder struct{ s *Server }

// ServeHTTP serves one request of a connection that the front gave to net/http.
func (f forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c, ok := r.Context().Value(clientKey{}).(*clientConn)
	if !ok {
		panic("a connection that did not come through the front")
	}
	c.serving.Store(true)
	if r.Method == http.MethodConnect && c.session == nil {
		f.s.takeBack(c, w, r)
		return
	}
	if c.session == nil && isPAC(r) {
		f.s.servePACTo(c.Conn, w, r)
		return
	}
	f.s.serveExchange(c, w, r)
}

// serveExchange serves a request that is no CONNECT.
func (s *Server) serveExchange(c *clientConn, w http.ResponseWriter, r *http.Request) {
	ex := s.newExchange(c, w, r)
	defer ex.finish(r)
	if refused := ex.admit(r); refused != nil {
		ex.refuse(refused)
		return
	}
	last, err := forwardsLeft(r)
	switch {
	case err != nil:
		ex.refuse(ex.malformed(err))
		return
	case last:
		ex.options()
		return
	}
	if ex.carried = ex.carries(r); !ex.carried && c.visit != nil {
		ex.taken = true
		c.visit.decline()
		return
	}
	c.live.begin(ex)
	if protocol := upgradeOf(r.Header); protocol != "" {
		ex.upgrade(r, protocol)
		return
	}
	ex.forward(r)
}

// clientKey finds the clientConn in the contexts of its requests.
type clientKey struct{}

func (s *Server) newExchange(c *clientConn, w http.ResponseWriter, r *http.Request) *exchange {
	ex := &exchange{ResponseWriter: w, s: s, client: c, http2: r.ProtoMajor == 2, length: -1, modern: r.ProtoAtLeast(1, 1)}
	ex.ev = s.newEvent(event.HTTP, c.source, time.Now())
	ex.ev.Listener = listenerOf(c.Conn)
	ex.method = r.Method
	ex.ev.Method = clip(r.Method)
	ex.ev.UserAgent = clip(r.UserAgent())
	ex.ev.Path = pathOf(r.RequestURI)
	ex.json = wantsJSON(r.Header.Get("Accept"))
	if r.ContentLength != 0 {
		ex.body = &countingBody{ReadCloser: r.Body, n: &ex.up, more: ex.totalUp()}
		if r.Trailer == nil && len(r.TransferEncoding) > 0 {
			r.Trailer = http.Header{} // net/http puts those in that were not announced
		}
		if ex.modern && r.Header.Get("Expect") != "" {
			ex.body.begin = ex.proceed
		}
		// Otherwise net/http takes in the rest of the body before it sends a byte of
		// the response. An error means an HTTP version that never did.
		http.NewResponseController(w).EnableFullDuplex()
	}
	return ex
}

// pathOf returns the path of a request target, in absolute form or not, with the ? of
// a query but not the query, which may hold secrets. It shares target's memory.
func pathOf(target string) string {
	if _, rest, ok := strings.Cut(target, "://"); ok && target[0] != '/' {
		i := strings.IndexAny(rest, "/?")
		if i < 0 {
			return ""
		}
		target = rest[i:]
	}
	if i := strings.IndexByte(target, '?'); i >= 0 {
		target = target[:i+1]
	}
	return target
}

// finish emits the event. A response that broke off must not look whole: the
// connection is closed in the middle of it.
func (ex *exchange) finish(r *http.Request) {
	crash := recover()
	ex.interim.end()
	if crash != nil && ex.carried { // nobody else closes the connection to the far side
		ex.client.live.leave()
	}
	ex.client.live.end()
	if err, _ := crash.(error); crash != nil && !errors.Is(err, http.ErrAbortHandler) {
		ex.s.crashed(crash)
	}
	if !ex.taken {
		if ex.unread() { // what is left of the body is not waited for
			if crash == nil && ex.broken == nil {
				ex.Flush() // the answer does not wait for it either
			}
			http.NewResponseController(ex.ResponseWriter).SetReadDeadline(time.Now().Add(bodyPatience))
		}
		r.Body.Close() // a round trip that outlives the handler must not read on
		if ex.broken != nil && ex.s.life.Err() != nil {
			ex.broken = errDraining // whatever it looked like
		}
		ex.judgeEnd(crash != nil)
		ex.ev.Decision = ex.decision
		ex.ev.BytesUp, ex.ev.BytesDown = ex.up.Load(), ex.down.Load()
		ex.ev.Aborted = crash != nil || ex.broken != nil
		note(&ex.ev, ex.broken)
		ex.s.observe(&ex.ev)
	}
	if crash != nil || ex.broken != nil {
		ex.breakOff()
		panic(http.ErrAbortHandler)
	}
}

// breakOff sees to it that a client of HTTP/1.0, for whom the end of the connection may
// be all that ends the response, does not take it for that.
func (ex *exchange) breakOff() {
	if ex.modern {
		return
	}
	conn := ex.client.Conn
	if c, ok := conn.(*tls.Conn); ok { // many read the end without the goodbye of TLS as a good one
		conn = peerOf(c).Conn
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0) // a reset
	}
	abort(ex.client.Conn)
}

// judgeEnd finds out whether the exchange, which was let pass, ended otherwise.
func (ex *exchange) judgeEnd(crashed bool) {
	if d := ex.revoked.Load(); d != nil && (crashed || ex.broken != nil) {
		ex.decision = d.Refuse(policy.ReasonPolicyRevoked)
	}
	if bad := ex.client.badBody.Load(); bad != nil && ex.decision.Passes() {
		ex.decision = ex.decision.Refuse(policy.ReasonBadRequest)
		note(&ex.ev, bad)
	}
}

// admit finds out what is asked for and decides on it; it makes r's target the
// canonical one.
func (ex *exchange) admit(r *http.Request) *refusal {
	session := ex.client.session
	if session != nil {
		ex.decision = session.tunnel.ev.Decision
	}
	if ex.http2 {
		if err := unfit(r); err != nil {
			return ex.malformed(err)
		}
	}
	switch {
	case len(r.RequestURI) > ex.s.cfg.Limits.URLBytes:
		return ex.malformed(errURLTooLong)
	case r.Method == http.MethodConnect:
		return ex.malformed(errors.New("a CONNECT inside a CONNECT"))
	case r.Method == http.MethodTrace:
		return ex.malformed(errTrace)
	case r.URL.Host != "":
	case session == nil:
		return ex.malformed(errors.New("the request target is not an absolute URI"))
	case r.URL.Scheme != "" || r.URL.Opaque != "" || !strings.HasPrefix(r.RequestURI, "/") && r.RequestURI != "*":
		return ex.malformed(errors.New("the request target is neither a path nor an http:// URI"))
	}
	if r.URL.Host != "" && (r.URL.Scheme != "http" || r.URL.User != nil) {
		return ex.malformed(errors.New("only http:// URIs without user information are forwarded"))
	}
	host := r.URL.Host
	if host == "" {
		host = r.Host
	}
	if !hasPort(host) {
		host += defaultPort
	}
	name, addr, port, err := policy.ParseAuthority(host)
	if err != nil {
		ex.ev.Name = shown(host)
		return ex.malformed(err)
	}
	addr = addr.Unmap()
	ex.ev.Name, ex.ev.Port = destination(name, addr), port
	ex.request = policy.Request{
		Source: ex.ev.Source.Addr(), Name: name, Address: addr, Port: port,
		Protocol: policy.ProtocolHTTP, Time: ex.ev.Time,
	}
	if session != nil {
		if !session.isFor(&ex.request) {
			return ex.mismatch()
		}
		ex.s.towards(&ex.request, session.tunnel.request.Destination)
	}
	if refused := ex.identify(r); refused != nil {
		return refused
	}
	ex.generation = ex.s.generation.Load()
	ex.admitted = ex.s.cfg.Decider.Decide(ex.request)
	if ex.decision = ex.admitted; !ex.decision.Passes() {
		if session != nil {
			return denied(ex.decision)
		}
		return ex.s.deniedTo(&ex.who, ex.decision)
	}
	ex.via = strings.Join(r.Header["Via"], ", ")
	if hasLooped(r.Header) {
		return loopedBack(ex.decision)
	}
	r.URL.Scheme, r.URL.Host = "http", authority(name, addr, port)
	r.Host = strings.TrimSuffix(r.URL.Host, defaultPort)
	return nil
}

// identify finds out who asks; inside a CONNECT that is known.
func (ex *exchange) identify(r *http.Request) (refused *refusal) {
	if session := ex.client.session; session != nil {
		ex.who = who{session.tunnel.request.User, session.tunnel.hash}
	} else {
		fields := r.Header["Proxy-Authorization"]
		value := ""
		if len(fields) > 0 {
			value = fields[0]
		}
		p := peerOf(ex.client.Conn)
		if p != nil {
			note(&ex.ev, p.problem)
		}
		ex.who, refused = ex.s.identify(p, ex.request.Source, len(fields), value)
	}
	ex.request.User, ex.ev.User = ex.who.user, ex.who.user
	return refused
}

// malformed refuses a request before anything could be decided. What follows it
// on the connection cannot be trusted.
func (ex *exchange) malformed(err error) *refusal {
	ex.endConnection()
	return badRequest(ex.decision, err)
}

// endConnection lets the client's connection end after the answer. On HTTP/2 only the
// stream does: it has its own beginning and end.
func (ex *exchange) endConnection() {
	if !ex.http2 {
		ex.Header().Set("Connection", "close")
	}
}

// mismatch refuses a request inside a CONNECT that is for another authority.
func (ex *exchange) mismatch() *refusal {
	ex.endConnection()
	return &refusal{
		decision: ex.decision.Refuse(policy.ReasonHostMismatch),
		status:   http.StatusForbidden, token: statusRequestDenied,
	}
}

// hasPort reports whether host, as it stands in a Host field, has a port.
func hasPort(host string) bool {
	return strings.LastIndexByte(host, ':') > strings.LastIndexByte(host, ']')
}

// authority writes host and port as a URI does.
func authority(name policy.Name, addr netip.Addr, port uint16) string {
	if name.IsZero() {
		return netip.AddrPortFrom(addr, port).String()
	}
	return name.String() + ":" + strconv.Itoa(int(port))
}

// refuse writes the answer for r.
func (ex *exchange) refuse(r *refusal) {
	ex.decision = r.decision
	note(&ex.ev, r.err)
	a := ex.s.answer(r, &ex.ev, ex.json)
	body := a.body()
	a.fields(ex.Header().Set)
	ex.Header().Set("Content-Length", strconv.Itoa(len(body)))
	ex.WriteHeader(r.status)
	ex.ResponseWriter.Write(body)
}

// forward lets goproxy drive the exchange.
func (ex *exchange) forward(r *http.Request) {
	out := r
	if !ex.carried || ex.http2 {
		ex.trace = httptrace.ClientTrace{GotConn: ex.gotConn, Got1xxResponse: ex.got1xx}
		ctx := context.WithValue(r.Context(), exchangeKey{}, ex)
		out = r.WithContext(httptrace.WithClientTrace(ctx, &ex.trace))
	}
	prepare(out)
	if ex.body == nil {
		out.Body = http.NoBody
	} else {
		out.Body = ex.body
	}
	if r.Method == http.MethodOptions && r.URL.Path == "" && r.URL.RawQuery == "" {
		out.URL.Path = "*" // RFC 9112, section 3.2.4
	}
	ex.s.goproxy.ServeHTTP(ex, out)
}

// totalUp and totalDown are what bytes are counted in beside the exchange itself.
func (ex *exchange) totalUp() *atomic.Int64 {
	if t := ex.client.session; t != nil {
		return &t.tunnel.up
	}
	return &ex.s.httpUp
}

func (ex *exchange) totalDown() *atomic.Int64 {
	if t := ex.client.session; t != nil {
		return &t.tunnel.down
	}
	return &ex.s.httpDown
}

// prepare turns a client's request into the one for the far side.
func prepare(r *http.Request) {
	trailers := acceptsTrailers(r.Header)
	stripHopByHop(r.Header)
	for _, k := range []string{"X-Forwarded-For", "X-Real-Ip", "X-Client-Ip", "Forwarded"} {
		delete(r.Header, k) // what clients say of themselves is no use to anybody, and we do not tell on them
	}
	if trailers { // they are passed on
		r.Header["Te"], r.Header["Connection"] = []string{"trailers"}, []string{"TE"}
	}
	if !r.ProtoAtLeast(1, 1) {
		delete(r.Header, "Expect") // RFC 9110, section 10.1.1
	}
	if _, ok := r.Header["User-Agent"]; !ok {
		r.Header["User-Agent"] = []string{""} // keeps net/http from adding its own
	}
	addVia(r.Header, r.ProtoMajor, r.ProtoMinor)
	r.Close = false // the client's connection ends, not ours to the far side
}

// acceptsTrailers reports whether TE says so (RFC 9110, section 10.1.4).
func acceptsTrailers(h http.Header) bool {
	for _, v := range h["Te"] {
		for k := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(k), "trailers") {
				return true
			}
		}
	}
	return false
}

// stripHopByHop removes the fields that are for one connection only, and those
// that Connection names (RFC 9110, section 7.6.1).
func stripHopByHop(h http.Header) {
	for _, v := range h["Connection"] {
		for k := range strings.SplitSeq(v, ",") {
			h.Del(strings.TrimSpace(k))
		}
	}
	for _, k := range []string{
		"Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authorization", "Proxy-Authenticate",
		"Proxy-Authentication-Info", "Te", "Transfer-Encoding", "Upgrade", "Http2-Settings",
	} {
		delete(h, k)
	}
}

// roundTrip is the RoundTripper that goproxy calls. What fails becomes an answer
// here, so that goproxy never writes an error text of its own.
func roundTrip(r *http.Request, _ *goproxy.ProxyCtx) (*http.Response, error) {
	ex := exchangeOf(r)
	resp, err := ex.carrier().RoundTrip(r)
	ex.interim.end()
	if err == nil && resp.StatusCode == http.StatusSwitchingProtocols {
		resp.Body.Close()
		err = errUnaskedUpgrade
	}
	if err != nil {
		return ex.failed(r, err), nil
	}
	ex.receive(resp)
	return resp, nil
}

// abandoned reports whether nobody waits for the response to r any more.
func (ex *exchange) abandoned(r *http.Request) bool {
	return ex.left.Load() || r.Context().Err() != nil
}

var errClientLeft = errors.New("the client closed before the response")

var errUnaskedUpgrade = errors.New("malformed response: 101 without a request for an upgrade")

// receive makes the far side's response the one for the client.
func (ex *exchange) receive(resp *http.Response) {
	stripHopByHop(resp.Header)
	addVia(resp.Header, resp.ProtoMajor, resp.ProtoMinor)
	ex.length = resp.ContentLength
	ex.ev.ContentType = resp.Header.Get("Content-Type")
	if _, ok := resp.Header["Content-Type"]; !ok {
		resp.Header["Content-Type"] = nil // keeps net/http from guessing
	}
	ex.answer.ReadCloser, ex.answer.n, ex.answer.more, ex.answer.failed = resp.Body, &ex.down, ex.totalDown(), &ex.broken
	resp.Body = &ex.answer
}

// failed returns the answer for an error of the far side.
func (ex *exchange) failed(r *http.Request, err error) *http.Response {
	bad := ex.client.badBody.Load()
	if bad == nil && ex.abandoned(r) { // nobody reads an answer, and the far side has not failed
		ex.broken = errClientLeft
		panic(http.ErrAbortHandler)
	}
	refused := exchangeFailed(ex.decision, err)
	if d := ex.revoked.Load(); d != nil {
		refused = revokedBy(d, err)
	}
	if bad != nil {
		refused = badRequest(ex.decision, bad)
	} else if ex.body != nil {
		if err := ex.body.problem(); err != nil { // not the far side's fault
			refused = badRequest(ex.decision, fmt.Errorf("body of the request: %w", err))
		}
	}
	ex.decision = refused.decision
	note(&ex.ev, refused.err)
	a := ex.s.answer(refused, &ex.ev, ex.json)
	body := a.body()
	header := http.Header{}
	a.fields(header.Set)
	header.Set("Content-Length", strconv.Itoa(len(body)))
	return &http.Response{
		StatusCode: refused.status, Header: header, ContentLength: int64(len(body)),
		Body: io.NopCloser(strings.NewReader(string(body))), Request: r,
	}
}

// carrier returns what carries the exchange: inside a CONNECT the session's own, else
// that of the source's group under the policy that decided.
func (ex *exchange) carrier() *carrier {
	if t := ex.client.session; t != nil {
		return t.carrier
	}
	return ex.s.pools.get(poolKey{ex.admitted.Group, ex.admitted.Revision, ex.who.user, ex.client.lane()})
}

// gotConn is called in the goroutine of the round trip by http.Transport.
func (ex *exchange) gotConn(info httptrace.GotConnInfo) {
	c, ok := info.Conn.(*upstreamConn)
	if !ok {
		return
	}
	if d := ex.reached(c, info.Reused); !d.Passes() {
		// The rule that opened this connection has expired since. net/http dials
		// another one, which is decided from the start.
		info.Conn.Close()
	}
}

// reached says that c is what serves the exchange, and returns what is decided on it:
// with the address known another rule may be the one that counts.
func (ex *exchange) reached(c *upstreamConn, used bool) policy.Decision {
	ex.ev.Destination = c.remote
	if !used {
		ex.ev.DNSTime, ex.ev.ConnTime = c.dnsTime, c.connTime
	}
	ex.ev.Parent = c.parent
	c.ask(ex.method)
	req := ex.request
	ex.s.towards(&req, c.checked)
	ex.client.live.reached(c, req)
	d := ex.s.cfg.Decider.Decide(req)
	if d.Passes() {
		ex.decision = d
	}
	return d
}

// unread reports whether something of the request's body has not been read, or
// cannot be. What follows on the connection is then no request to be trusted.
func (ex *exchange) unread() bool { return ex.body != nil && !ex.body.ended.Load() }

// WriteHeader notes the status for the event.
func (ex *exchange) WriteHeader(status int) {
	ex.ev.Status = status
	ex.client.live.answer()
	if ex.unread() || ex.s.draining.Load() {
		ex.endConnection()
	}
	ex.ResponseWriter.WriteHeader(status)
	if ex.length < 0 && ex.waits() {
		ex.Flush()
	}
}

var _ io.ReaderFrom = (*exchange)(nil) // io.Copy looks for it

// ReadFrom copies a response's body to the client. Each piece is sent on as it
// comes; the last one of a known length is left to net/http, which sends it at
// once, together with the header if nothing was sent before.
func (ex *exchange) ReadFrom(src io.Reader) (n int64, err error) {
	buf := copyBuffers.Get().(*[copySize]byte)
	defer copyBuffers.Put(buf)
	v := ex.client.visit
	for err == nil {
		var m int64
		switch {
		case v != nil && ex.length-ex.written >= minBulk:
			m, err = v.relayRest(ex, src, buf[:])
		case v != nil && ex.length < 0 && ex.written >= minBulk:
			m, err = v.copyRest(ex, src, buf[:])
		default:
			m, err = ex.copyPiece(src, buf[:])
		}
		n += m
	}
	if errors.Is(err, io.EOF) {
		return n, nil
	}
	return n, err
}

// copyPiece copies what a Read returns. After the last one the error is io.EOF.
func (ex *exchange) copyPiece(src io.Reader, buf []byte) (n int64, err error) {
	m, err := src.Read(buf)
	if m == 0 {
		return 0, err
	}
	w, werr := ex.ResponseWriter.Write(buf[:m])
	ex.written += int64(w)
	if werr != nil {
		ex.refused(werr)
		return int64(w), werr
	}
	if ex.written != ex.length {
		ex.Flush()
	}
	return int64(w), err
}

// refused notes that the client's connection does not take the response.
func (ex *exchange) refused(err error) {
	if ex.broken == nil {
		ex.broken = fmt.Errorf("response to the client: %w", err)
	}
}

// waits reports whether nothing of a response has come but its head, or may have, as
// with events.
func (ex *exchange) waits() bool {
	if b, ok := ex.answer.ReadCloser.(*carried); ok && b.conn != nil {
		return b.conn.reader.Buffered() == 0 && len(b.conn.in.held) == 0
	}
	return strings.HasPrefix(ex.ev.ContentType, "text/event-stream")
}

// Flush sends what is buffered.
func (ex *exchange) Flush() {
	if f, ok := ex.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// countingBody counts the bytes of a body as they pass, and keeps its error.
type countingBody struct {
	io.ReadCloser
	n, more *atomic.Int64
	failed  *error // set if reading fails; nil: not wanted
	begin   func() // called before each Read, unless nil

	ended  atomic.Bool // it was read to its end
	broken atomic.Pointer[error]
}

// problem returns what reading failed with, or nil.
func (b *countingBody) problem() error {
	if err := b.broken.Load(); err != nil {
		return *err
	}
	return nil
}

func (b *countingBody) Read(p []byte) (int, error) {
	if b.begin != nil {
		b.begin()
	}
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	b.more.Add(int64(n))
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		b.ended.Store(true)
	default:
		kept := err // else every err would be on the heap
		b.broken.CompareAndSwap(nil, &kept)
		if b.failed != nil {
			*b.failed = err
		}
	}
	return n, err
}

// poolKey says who may share upstream connections: nobody in another group, no other
// user, and nobody under another policy, which might have checked the address
// otherwise.
type poolKey struct {
	group, revision, user string

	lane *lane // whose connections they are; nil: no lane's
}

// maxPools bounds the pools, as there may be many users. With more all are retired.
const maxPools = 1024

// pools holds the carriers. Within one of them a connection to a name and
// port is used again for the same name and port alone. As group, name, port and
// policy are the same, so is the answer for its address.
type pools struct {
	s  *Server
	mu sync.Mutex // guards m
	m  map[poolKey]*carrier
}

func (p *pools) get(k poolKey) *carrier {
	p.mu.Lock()
	if len(p.m) >= maxPools && p.m[k] == nil {
		p.mu.Unlock()
		p.retire()
		p.mu.Lock()
	}
	defer p.mu.Unlock()
	t := p.m[k]
	if t == nil {
		if t = p.s.newCarrier(p.s.dialExchange); k.lane != nil {
			t.dial = k.lane.dialExchange
		}
		p.m[k] = t
	}
	return t
}

// retire closes the idle connections of all pools and forgets the pools. What is
// in use is closed when it becomes idle.
func (p *pools) retire() {
	p.mu.Lock()
	old := p.m
	p.m = make(map[poolKey]*carrier)
	p.mu.Unlock()
	for _, t := range old {
		t.CloseIdleConnections()
	}
}

type dialContext = func(ctx context.Context, network, addr string) (net.Conn, error)

// An upstreamConn is a connection in a pool, and how it came about. Responses that
// are not framed in one clear way end it.
type upstreamConn struct {
	idleConn
	in                framed
	remote            netip.AddrPort
	dnsTime, connTime time.Duration
	checked           netip.Addr // the destination's, as decided; zero if only a parent can resolve it
	parent            string     // as in a trip

	// Of a carrier.
	reader *bufio.Reader // of a response under way; nil: there is none
	heard  bool          // something has come since the last request
	since  time.Time     // it has been idle
	raw    syscall.RawConn
	probe  func(fd uintptr) bool // reads into one
	one    [1]byte
	quiet  bool // probe found nothing
}

func (s *Server) newUpstreamConn(c net.Conn, t trip) *upstreamConn {
	return &upstreamConn{
		idleConn: idleConn{Conn: c, idle: s.cfg.Timeouts.Idle},
		in:       framed{framing: framing{limit: s.cfg.Limits.HeaderBytes, response: true}},
		remote:   remoteAddr(c), dnsTime: t.dnsTime, connTime: t.connTime,
		checked: t.request.Destination, parent: t.parent,
	}
}

// ask says that a request is about to be sent.
func (c *upstreamConn) ask(method string) {
	if method == http.MethodHead {
		c.in.asked.Store(askedHEAD)
	} else {
		c.in.asked.Store(askedFor)
	}
}

func (c *upstreamConn) Read(p []byte) (int, error) { return c.in.read((*upstreamReader)(c), p) }

// An upstreamReader reads the connection under an upstreamConn.
type upstreamReader upstreamConn

func (c *upstreamReader) Read(p []byte) (int, error) {
	n, err := c.idleConn.Read(p)
	if n > 0 {
		c.heard = true
	}
	return n, err
}

// dialExchange connects to the destination of the exchange in ctx; addr, which
// says the same, is not looked at.
func (s *Server) dialExchange(ctx context.Context, _, _ string) (net.Conn, error) {
	ex := ctx.Value(exchangeKey{}).(*exchange)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)() // net/http detaches dials from the request
	ex.client.live.dialling(cancel)
	conn, t, r := s.reach(ctx, ex.request, ex.admitted, ex.via)
	if r != nil {
		return nil, r
	}
	return s.newUpstreamConn(conn, t), nil
}
