package dnsfilter

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"sallyport/dnsfilter/wire"
)

const (
	dohPath       = "/dns-query"
	maxDoHQuery   = readSize         // bytes of a query over HTTPS
	maxDoHRequest = 4 << 10          // bytes of a request's header, on top of the 4 KiB that net/http adds
	maxStreams    = maxPipelined     // requests of one HTTP/2 connection under way
	dohRead       = 10 * time.Second // for a request
	dohWrite      = 20 * time.Second // from the end of its header to the end of its answer
)

// A web answers queries over HTTPS (RFC 8484), on connections that serveConn has
// prepared.
type web struct {
	s    *Server
	http *http.Server
	next chan net.Conn // connections after their handshake

	mu      sync.Mutex // guards what follows: nobody enters while somebody waits
	closed  bool
	running sync.WaitGroup // requests
}

func newWeb(s *Server) *web {
	w := &web{s: s, next: make(chan net.Conn)}
	w.http = &http.Server{
		Handler:                      w,
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            firstQuery,
		ReadTimeout:                  dohRead,
		WriteTimeout:                 dohWrite,
		IdleTimeout:                  idleSecure,
		MaxHeaderBytes:               maxDoHRequest,
		HTTP2:                        &http.HTTP2Config{MaxConcurrentStreams: maxStreams, SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
		BaseContext:                  func(net.Listener) context.Context { return s.life },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if below, ok := c.(interface{ NetConn() net.Conn }); ok {
				c = below.NetConn()
			}
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	return w
}

// connKey is what a request's context has its *conn under.
type connKey struct{}

// Accept, Close and Addr implement net.Listener, for net/http.
func (w *web) Accept() (net.Conn, error) {
	select {
	case c := <-w.next:
		return c, nil
	case <-w.s.down:
		return nil, net.ErrClosed
	}
}

// Close does nothing: the listeners are the Server's.
func (w *web) Close() error { return nil }

// Addr returns nothing of use.
func (w *web) Addr() net.Addr { return new(net.TCPAddr) }

// take hands c over to net/http, or closes it.
func (w *web) take(below *conn, c net.Conn) {
	below.handed.Store(true)
	select {
	case w.next <- c:
	case <-w.s.down:
		c.Close()
	}
}

// serve serves until the Server shuts down, and then waits for the requests as long as
// the Server does.
func (w *web) serve() {
	w.http.Serve(w)           // ends when Accept does
	w.http.Shutdown(w.s.life) // which may end first
	w.http.Close()
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.running.Wait()
}

// enter counts a request, unless the Server has ended.
func (w *web) enter() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.running.Add(1)
	return true
}

// A held is an answer that waits for its way back.
type held struct{ answer []byte }

func (h *held) send(p []byte) error {
	h.answer = append([]byte(nil), p...)
	return nil
}

// ServeHTTP implements http.Handler.
func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	if !w.enter() { // and the connection is closed
		refuseDoH(rw, http.StatusServiceUnavailable)
		return
	}
	defer w.running.Done()
	s := w.s
	packet, status := readDoH(rw, r)
	if status != http.StatusOK {
		s.counts.malformed.Add(1)
		refuseDoH(rw, status)
		return
	}
	c, ok := r.Context().Value(connKey{}).(*conn)
	if !ok {
		refuseDoH(rw, http.StatusInternalServerError)
		return
	}
	var back held
	// Not for as long as the request lives: a question goes on until upstreams answer, and takes its room so long.
	if !s.serveOne(s.life, client{addr: c.client, door: doorHTTPS, back: &back}, packet) {
		s.counts.dropped.Add(1)
		refuseDoH(rw, http.StatusServiceUnavailable)
		return
	}
	if back.answer == nil { // it is no query
		refuseDoH(rw, http.StatusBadRequest)
		return
	}
	h := rw.Header()
	h.Set("Content-Type", dnsMessage)
	h.Set("Content-Length", strconv.Itoa(len(back.answer)))
	h.Set("Cache-Control", freshness(back.answer))
	rw.Write(back.answer) // net/http ends a connection that does not take it
}

// serveOne answers a query at once if that can be, and otherwise after thought. It
// returns false if too much is under way for that.
func (s *Server) serveOne(ctx context.Context, c client, packet []byte) bool {
	missed, done := s.serveNow(c, packet)
	if done {
		return true
	}
	if !s.enter(c.addr.Addr(), true) {
		return false
	}
	defer s.leave(c.addr.Addr(), true)
	s.serveLater(ctx, c, packet, missed)
	return true
}

func (s *Server) serveNow(c client, packet []byte) (missed, done bool) {
	f := s.idle.Get().(*slowFast)
	defer s.idle.Put(f)
	s.resolver.refreshHosts()
	now := s.cfg.Now()
	p, ok := f.answer(f.buf[:0], packet, c, now, &f.outcome)
	if !ok {
		return f.missed, false
	}
	if len(p) == 0 {
		return false, true
	}
	err := c.back.send(p)
	f.observe(&f.outcome, packet, now, s.cfg.Now(), err)
	return false, true
}

// refuseDoH answers a request that holds no query, or whose query is not taken. What
// DNS has to say of a query, refusals among it, is a 200 (RFC 8484, section 4.2.1).
func refuseDoH(rw http.ResponseWriter, status int) {
	h := rw.Header()
	h.Set("Cache-Control", "no-store")
	switch status {
	case http.StatusMethodNotAllowed:
		h.Set("Allow", "GET, POST")
	case http.StatusServiceUnavailable:
		h.Set("Retry-After", "1")
	}
	http.Error(rw, http.StatusText(status), status)
}

// readDoH returns the query in a request and StatusOK, or what is wrong with it.
func readDoH(rw http.ResponseWriter, r *http.Request) (packet []byte, status int) {
	switch {
	case r.URL.Path != dohPath:
		return nil, http.StatusNotFound
	case r.Method == http.MethodGet:
		packet, status = readDoHQuery(r.URL.RawQuery)
	case r.Method == http.MethodPost:
		packet, status = readDoHBody(rw, r)
	default:
		return nil, http.StatusMethodNotAllowed
	}
	if status == http.StatusOK && len(packet) < headerSize {
		status = http.StatusBadRequest
	}
	return packet, status
}

// readDoHQuery reads the one variable dns (RFC 8484, section 4.1.1).
func readDoHQuery(raw string) ([]byte, int) {
	values, err := url.ParseQuery(raw)
	if text := values["dns"]; err == nil && len(text) == 1 && !strings.ContainsAny(text[0], "\r\n") {
		if len(text[0]) > base64.RawURLEncoding.EncodedLen(maxDoHQuery) {
			return nil, http.StatusRequestURITooLong
		}
		if p, err := base64.RawURLEncoding.DecodeString(text[0]); err == nil {
			return p, http.StatusOK
		}
	}
	return nil, http.StatusBadRequest
}

func readDoHBody(rw http.ResponseWriter, r *http.Request) ([]byte, int) {
	coding := r.Header.Get("Content-Encoding")
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != dnsMessage || coding != "" && coding != "identity" {
		return nil, http.StatusUnsupportedMediaType
	}
	p, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, maxDoHQuery))
	if _, long := errors.AsType[*http.MaxBytesError](err); long {
		return nil, http.StatusRequestEntityTooLarge
	}
	if err != nil {
		return nil, http.StatusBadRequest
	}
	return p, http.StatusOK
}

// freshness returns the Cache-Control of an answer: the shortest TTL in it (RFC 8484,
// section 5.1). No cache that others share may keep it, for it is for one source.
func freshness(answer []byte) string {
	shortest, records := uint32(1<<32-1), 0
	rcode := answer[3] & 0xF
	ok := wire.Records(answer, func(r wire.Record) {
		if r.Type != dns.TypeOPT {
			records++
			shortest = min(shortest, binary.BigEndian.Uint32(answer[r.TTL:]))
		}
	})
	if !ok || records == 0 || rcode != dns.RcodeSuccess && rcode != dns.RcodeNameError {
		return "no-store"
	}
	return "private, max-age=" + strconv.FormatUint(uint64(shortest), 10)
}
