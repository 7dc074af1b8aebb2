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
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/net/netutil"
)

// Config says what a Server serves. It is copied by New.
type Config struct {
	Listen  string                       // address, host:port; "": the Server has no listener
	Status  func(context.Context) Status // answers /readyz; required; honours its context
	Metrics http.Handler                 // answers /metrics; required
	PAC     http.Handler                 // answers /proxy.pac; nil: nobody does
	API     API                          // answers /api/v1
	// Hosts are names, besides localhost, that requests over loopback may be for.
	Hosts []string
	// Credentials are those in force at first. Beyond loopback there must be some.
	Credentials Credentials
	OpenMetrics bool           // /metrics needs no credential
	Logger      zerolog.Logger // for requests that are refused
	Pages       http.Handler   // answers what nothing else does, GET and HEAD alone; nil: a short index at /
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

// A Server is the admin server. Listen, then Serve.
type Server struct {
	listen      string
	hosts       []string
	openMetrics bool
	status      func(context.Context) Status
	api         API
	credentials atomic.Pointer[credentials]
	answers     chan struct{} // holds one for each answer of the API under way
	streams     streams
	refused     [refusals]refusal
	logger      zerolog.Logger
	beat        time.Duration // see streamBeat
	patience    time.Duration // see streamPatience
	http        *http.Server
	listener    net.Listener
}

// Inherit has Listen use l, which somebody else has bound. The Server closes it.
func (s *Server) Inherit(l net.Listener) { s.listener = l }

// New returns a Server that does nothing yet.
func New(c Config) *Server {
	s := &Server{
		listen: c.Listen, openMetrics: c.OpenMetrics, status: c.Status, api: c.API,
		answers: make(chan struct{}, maxAnswers), logger: c.Logger,
		streams: streams{share: streamShare, byClient: map[netip.Addr]int{}},
		beat:    streamBeat, patience: streamPatience,
	}
	for _, h := range c.Hosts {
		s.hosts = append(s.hosts, hostname(h))
	}
	s.SetCredentials(c.Credentials)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { writeStatus(w, c.Status(r.Context())) })
	mux.Handle("GET /metrics", c.Metrics)
	if c.PAC != nil {
		mux.Handle("GET /proxy.pac", c.PAC)
	}
	for _, e := range endpoints {
		mux.HandleFunc(e.method+" "+e.path, s.answer(e))
	}
	mux.HandleFunc("/api/", noEndpoint)
	if c.Pages != nil {
		mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet && r.Method != http.MethodHead {
				w.Header().Set("Allow", "GET, HEAD")
				fail(w, http.StatusMethodNotAllowed, errors.New("pages are read with GET"))
				return
			}
			w.Header().Set("Content-Security-Policy", pagePolicy)
			c.Pages.ServeHTTP(w, r)
		})
	} else {
		mux.HandleFunc("GET /{$}", writeIndex)
	}
	s.http = &http.Server{
		Handler:        s.guard(mux),
		ReadTimeout:    readTimeout,
		WriteTimeout:   writeTimeout,
		IdleTimeout:    idleTimeout,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       newErrorLog(s),
	}
	if c.Credentials.Certificate != nil {
		s.http.TLSConfig = s.tlsConfig()
	}
	return s
}

func writeStatus(w http.ResponseWriter, s Status) {
	status := http.StatusOK
	ready := s.Ready()
	if !ready {
		status = http.StatusServiceUnavailable
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(readiness{ready, s}) // whoever asked has gone away
}

// readiness is what /readyz answers.
type readiness struct {
	Ready bool `json:"ready"`
	Status
}

const index = `<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sallyport</title>
<h1>sallyport</h1>
<ul><li><a href="/healthz">healthz</a><li><a href="/readyz">readyz</a><li><a href="/metrics">metrics</a><li><a href="/proxy.pac">proxy.pac</a><li><a href="/api/v1/openapi.yaml">openapi.yaml</a></ul>
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
	if err := s.exposed(); err != nil {
		s.listener.Close()
		return err
	}
	defer context.AfterFunc(ctx, func() { s.http.Close() })()
	serve := s.http.Serve
	if s.http.TLSConfig != nil {
		serve = func(l net.Listener) error { return s.http.ServeTLS(l, "", "") }
	}
	l := &shares{Listener: s.listener, held: map[netip.Addr]int{}, refuse: func(from string) { s.refuse(refusedMany, from, "too many connections from there") }}
	if err := serve(netutil.LimitListener(l, maxConnections)); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
