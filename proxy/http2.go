package proxy

import (
	"context"
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// HTTP/2 towards clients (RFC 9113). net/http bounds what a client can make it do
// without a handler: streams reset as soon as they were opened wait for a place
// among the handlers, and too many of them, as too many control frames, end the
// connection.
const (
	maxStreams       = 250       // at a time on a connection
	streamBuffer     = 256 << 10 // bytes that a client may send ahead on a stream
	connectionBuffer = 2 << 20   // the same, on all streams of a connection
)

// http2Server is the part of net/http that serves a connection with HTTP/2. It comes
// back when the connection is done with; handlers may run on for a while.
type http2Server struct {
	*http.Server
	serve func(*http.Server, *tls.Conn, http.Handler)
}

// newHTTP2 takes what serves HTTP/2 out of an http.Server, which puts it into
// TLSNextProto when it begins to serve. We do with connections what we like, and
// keep the graceful shutdown.
func newHTTP2(s *Server) http2Server {
	var only http.Protocols
	only.SetHTTP2(true)
	h := http2Server{Server: &http.Server{
		Protocols:      &only,
		IdleTimeout:    s.cfg.Timeouts.Idle,
		MaxHeaderBytes: s.cfg.Limits.HeaderBytes,
		ErrorLog:       log.New(debugLog{s}, "", 0),
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          maxStreams,
			MaxReceiveBufferPerStream:     streamBuffer,
			MaxReceiveBufferPerConnection: connectionBuffer,
			WriteByteTimeout:              s.cfg.Timeouts.Idle + idleGrace,
		},
	}}
	none := newHandOff()
	none.Close()
	h.Serve(none)                                 // fails, for want of connections
	h.serve = h.TLSNextProto["unencrypted_http2"] // which takes any connection, whose preface was read
	return h
}

// serveByHTTP2 serves c, whose handshake agreed on it, until it and all its handlers
// have ended.
func (s *Server) serveByHTTP2(c *tls.Conn) {
	p := peerOf(c)
	below := &http2Conn{Conn: c, s: s, peer: p}
	s.secure.http2.serve(s.secure.http2.Server, below.handed(), streams{s, c, p})
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.handlers.Wait()
}

// streams is the handler of the streams of one connection.
type streams struct {
	s    *Server
	conn *tls.Conn
	peer *peer
}

// BaseContext is looked for by net/http: what requests' contexts descend from.
func (h streams) BaseContext() context.Context { return h.s.life }

// begin registers a handler. It reports false if the connection is gone, and nobody
// waits for handlers any more.
func (p *peer) begin() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.handlers.Add(1)
	}
	return !p.closed
}

// ServeHTTP serves one stream: a tunnel, or a plain HTTP request.
func (h streams) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !h.peer.begin() {
		panic(http.ErrAbortHandler)
	}
	defer h.peer.handlers.Done()
	if r.Method == http.MethodConnect {
		h.s.serveStream(h.peer, w, r)
		return
	}
	if r.TLS != nil && isPAC(r) { // of :scheme https, which is never forwarded
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTime))
		h.s.servePACTo(h.conn, w, r)
		return
	}
	// The target is in pieces (RFC 9113, section 8.3.1); the rest wants one URI.
	r.URL.Scheme, r.URL.Host = "", ""
	if strings.HasPrefix(r.RequestURI, "/") || r.RequestURI == "*" {
		r.URL.Host = r.Host
		if r.URL.Scheme = "http"; r.TLS != nil { // which says that :scheme is https
			r.URL.Scheme = "https"
		}
	}
	iw := &idleWriter{ResponseWriter: w, rc: http.NewResponseController(w), idle: h.s.cfg.Timeouts.Idle}
	r.Body = idleBody{r.Body, iw}
	c := &clientConn{idleConn: idleConn{Conn: h.conn}, s: h.s, source: h.peer.source}
	h.s.clients.add(c)
	defer h.s.clients.remove(c)
	h.s.serveExchange(c, iw, r)
}

// unfit says what is wrong with r if HTTP/2 lets it pass and HTTP/1, in which r goes
// on, does not (RFC 9113, section 10.3). Of the rest net/http sees to it.
func unfit(r *http.Request) error {
	switch {
	case !isToken([]byte(r.Method)):
		return badHead("method")
	case strings.IndexByte(r.RequestURI, ' ') >= 0:
		return badHead("space in the request target")
	}
	for k := range r.Trailer {
		if slices.ContainsFunc(notTrailers, func(n string) bool { return strings.EqualFold(n, k) }) {
			return errTrailer
		}
	}
	return nil
}

// serveStream serves a CONNECT (RFC 9113, section 8.5). It returns when the tunnel
// has ended.
func (s *Server) serveStream(p *peer, w http.ResponseWriter, r *http.Request) {
	st := newStream(p, w, r.Body)
	defer st.finish()
	s.connectStream(st, r)
	<-st.closed
}

func (s *Server) connectStream(st *http2Stream, r *http.Request) {
	defer s.recovered(st)
	pending := s.enter(st, true)
	defer s.leave(pending)
	buf := buffers.Get().(*[minBuffer]byte)
	defer buffers.Put(buf)
	h := &head{
		method: []byte(r.Method), target: []byte(r.Host), userAgent: []byte(r.UserAgent()),
		json:        wantsJSON(r.Header.Get("Accept")),
		credentials: []byte(r.Header.Get("Proxy-Authorization")), authorized: len(r.Header["Proxy-Authorization"]),
		looped: hasLooped(r.Header), via: []byte(strings.Join(r.Header["Via"], ", ")),
	}
	s.serveConnect(st, st.source, time.Now(), h, buf[:0])
}

// An idleWriter is the response of a plain HTTP request on a stream, and bounds how
// long neither it nor the request's body moves. On HTTP/1 idleConn does that.
type idleWriter struct {
	http.ResponseWriter
	rc   *http.ResponseController
	idle time.Duration

	mu      sync.Mutex // guards touched
	touched time.Time
}

// touch records activity.
func (w *idleWriter) touch() {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if now.Sub(w.touched) < min(touchEvery, w.idle/8) {
		return
	}
	w.touched = now
	w.rc.SetWriteDeadline(now.Add(w.idle + idleGrace))
	w.rc.SetReadDeadline(now.Add(w.idle + idleGrace))
}

func (w *idleWriter) Write(p []byte) (int, error) {
	w.touch()
	return w.ResponseWriter.Write(p)
}

// Flush sends what is buffered.
func (w *idleWriter) Flush() {
	w.touch()
	w.rc.Flush() // an error shows at the next Write
}

// Unwrap lets http.ResponseController find what is below.
func (w *idleWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// idleBody is the body of the request.
type idleBody struct {
	io.ReadCloser
	w *idleWriter
}

func (b idleBody) Read(p []byte) (int, error) {
	b.w.touch()
	return b.ReadCloser.Read(p)
}
