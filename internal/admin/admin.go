// Package admin serves health, readiness and metrics to operators and their
// machines, on a listener of its own that clients of the gate do not reach.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Config says what a Server serves. It is copied by New.
type Config struct {
	Listen  string                       // address, host:port; "": the Server has no listener
	Status  func(context.Context) Status // answers /readyz; required; honours its context
	Metrics http.Handler                 // answers /metrics; required
	PAC     http.Handler                 // answers /proxy.pac; nil: nobody does
}

// Status is the state of the process as /readyz tells it.
type Status struct {
	Draining  bool            `json:"draining"`
	Policy    Policy          `json:"policy"`
	Listeners map[string]bool `json:"listeners"` // by listener: it takes connections or queries
	Upstream  Upstream        `json:"upstream"`
}

// Policy is the policy in force.
type Policy struct {
	Revision   string    `json:"revision"`
	LoadedAt   time.Time `json:"loaded_at"` // when this revision came into force
	LastReload Reload    `json:"last_reload"`
	// LastGood says that the source could not be used at the start, and this is the
	// copy of the last policy that was good.
	LastGood bool `json:"last_good"`
}

// Reload is the last attempt to load a policy.
type Reload struct {
	OK    bool      `json:"ok"`
	At    time.Time `json:"at"`    // when it was in force or refused
	Error string    `json:"error"` // why it was refused, one mistake a line
}

// Upstream is what is known of the resolver's upstreams.
type Upstream struct {
	OK    bool   `json:"ok"` // one of them answers
	Error string `json:"error"`
}

// Ready reports whether traffic may be sent here.
func (s *Status) Ready() bool {
	for _, up := range s.Listeners {
		if !up {
			return false
		}
	}
	return s.Policy.Revision != "" && !s.Draining && s.Upstream.OK
}

// Bounds of one request; what is served is small.
const (
	readTimeout  = 5 * time.Second
	writeTimeout = 30 * time.Second
	idleTimeout  = 2 * time.Minute
	maxHeader    = 8 << 10 // bytes
)

// A Server is the admin server. Listen, then Serve.
type Server struct {
	listen   string
	http     *http.Server
	listener net.Listener
}

// Inherit has Listen use l, which somebody else has bound. The Server closes it.
func (s *Server) Inherit(l net.Listener) { s.listener = l }

// New returns a Server that does nothing yet.
func New(c Config) *Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { writeStatus(w, c.Status(r.Context())) })
	mux.Handle("GET /metrics", c.Metrics)
	if c.PAC != nil {
		mux.Handle("GET /proxy.pac", c.PAC)
	}
	mux.HandleFunc("GET /{$}", writeIndex)
	return &Server{listen: c.Listen, http: &http.Server{
		Handler:        protect(mux),
		ReadTimeout:    readTimeout,
		WriteTimeout:   writeTimeout,
		IdleTimeout:    idleTimeout,
		MaxHeaderBytes: maxHeader,
	}}
}

// protect sets what holds for every answer: nothing is cached, framed or sniffed.
func protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		next.ServeHTTP(w, r)
	})
}

func writeStatus(w http.ResponseWriter, s Status) {
	status := http.StatusOK
	ready := s.Ready()
	if !ready {
		status = http.StatusServiceUnavailable
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(struct { // whoever asked has gone away
		Ready bool `json:"ready"`
		Status
	}{ready, s})
}

const index = `<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sallyport</title>
<h1>sallyport</h1>
<ul><li><a href="/healthz">healthz</a><li><a href="/readyz">readyz</a><li><a href="/metrics">metrics</a><li><a href="/proxy.pac">proxy.pac</a></ul>
</html>
`

func writeIndex(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	fmt.Fprint(w, index)
}

// Listen binds Config.Listen. The error names the address.
func (s *Server) Listen() error {
	if s.listen == "" || s.listener != nil {
		return nil
	}
	l, err := net.Listen("tcp", s.listen)
	if err != nil {
		return err // which names the address
	}
	s.listener = l
	return nil
}

// Addrs returns the address bound by Listen, or nothing without a listener.
func (s *Server) Addrs() []netip.AddrPort {
	if s.listener == nil {
		return nil
	}
	return []netip.AddrPort{s.listener.Addr().(*net.TCPAddr).AddrPort()}
}

// Close gives the listener back. It is for a Server that does not come to Serve.
func (s *Server) Close() {
	if s.listener != nil {
		s.listener.Close()
	}
}

// Serve answers requests until ctx ends, and then closes every connection.
func (s *Server) Serve(ctx context.Context) error {
	if s.listener == nil {
		<-ctx.Done()
		return nil
	}
	defer context.AfterFunc(ctx, func() { s.http.Close() })()
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
