package proxy

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/elazarl/goproxy"
	"github.com/rs/zerolog"

	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/proxy/clienthello"
	"sallyport/proxy/upstream"
)

// A Decider answers whether a request may pass. *policy.Store is one. Decide must
// be safe for concurrent use and fast: it is asked several times a connection.
type Decider interface {
	Decide(policy.Request) policy.Decision
}

// Config says how a Server works. It is copied by New.
type Config struct {
	Listen   []string          // addresses for Listen, host:port; no host is every address of this machine
	Decider  Decider           // required
	Resolver upstream.Resolver // required; asked once a request, and only for names that may pass

	// PrivateZone reports whether the settings expect an address behind a name though
	// it is private; nil: none is. It fills policy.Request.PrivateZone.
	PrivateZone func(policy.Name, netip.Addr) bool

	// Known returns the addresses of a name that are known without asking anybody, or
	// nil; it never blocks. Then Resolver is not asked. nil: none are known.
	Known func(policy.Name) []netip.Addr

	Observer event.Observer // told of every event; nil: nobody
	Logger   zerolog.Logger // for what someone should act on; the zero value is silent
	HelpURL  string         // shown to refused clients: where to ask for access; "": nothing
	Auth     Auth           // Basic credentials
	TLS      TLS            // listeners where clients speak TLS to the proxy
	Timeouts Timeouts
	Limits   Limits
	Routes   Routes // see SetRoutes

	// PACDirect says what the file /proxy.pac sends past the proxy, besides loopback
	// and names without a dot: "host.corp.example", ".corp.example" (that name and all
	// below it), "*.corp.example" (all below it), "10.0.0.0/8". All canonical.
	PACDirect []string

	ProxyProtocol ProxyProtocol
}

// ProxyProtocol says who speaks for others. The zero value: nobody.
type ProxyProtocol struct {
	// Trusted are the peers, load balancers, that must begin every connection with a
	// PROXY protocol header, version 1 or 2. Its source is then who asks, in every
	// respect. Peers outside of them that send one are cut off.
	Trusted []netip.Prefix
}

// Timeouts bound every phase that a peer could draw out. Zero fields, but for
// Drain, take the default.
type Timeouts struct {
	Connect       time.Duration // to resolve a name and connect; default 10 s
	ClientHello   time.Duration // from the 200 of a CONNECT to the whole ClientHello; default 10 s
	RequestHeader time.Duration // from the start of a connection or request to the whole head; default 10 s
	Idle          time.Duration // without a byte either way; default 10 min
	Drain         time.Duration // for live tunnels after Shutdown; 0: they are cut at once
}

// Limits bound what clients can make the proxy hold.
type Limits struct {
	Tunnels          int // tunnels at a time, established or on the way; 0: no limit
	TunnelsPerSource int // the same, from one source: a client address, of IPv6 a /64; 0: no limit
	TunnelsPerGroup  int // the same, from all sources of a group; 0: no limit
	ClientHelloBytes int // of a ClientHello with its record headers; 0: 16 KiB
	HeaderBytes      int // of a request or response head; 0: 64 KiB
	URLBytes         int // of a request target; 0: 8 KiB

	ConnectionsPerSource int // at a time that are no tunnels: without a request yet, or with plain HTTP; 0: no limit
	ConnectionsPerSecond int // new connections a second from one source, in the long run; 0: no limit
	ConnectionsBurst     int // at once after a pause; 0: as many as a second
}

const (
	defaultConnect       = 10 * time.Second
	defaultClientHello   = 10 * time.Second
	defaultRequestHeader = 10 * time.Second
	defaultIdle          = 10 * time.Minute
	defaultHeaderBytes   = 64 << 10
	defaultURLBytes      = 8 << 10

	listener = "proxy" // Event.Listener

	minBuffer = 4 << 10 // bytes to read a head or a ClientHello into; most fit

	// After a failed accept, and while there is a lack of descriptors.
	minPause = 5 * time.Millisecond
	maxPause = time.Second
)

// keepAlive finds clients that vanished without a word within two minutes.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

var buffers = sync.Pool{New: func() any { return new([minBuffer]byte) }}

// Stats is a snapshot of numbers.
type Stats struct {
	Connections  int    // client connections open, tunnels included
	Tunnels      int    // tunnels established
	BytesUp      int64  // towards destinations since the start, live connections included
	BytesDown    int64  // towards clients
	AcceptErrors uint64 // failed accepts since the start
	AcceptPauses uint64 // how often accepting paused since then, after a failure or for lack of descriptors
	Panics       uint64 // connections closed because of a mistake in this program

	// Handshakes are the TLS handshakes of clients that failed since the start, by
	// cause, a closed set; nil without TLS listeners.
	Handshakes        map[string]uint64
	CertificateExpiry time.Time // of the TLS listeners' certificate; zero without
}

// A Server is the proxy. Listen, then Serve; Shutdown or the end of Serve's
// context ends it for good.
type Server struct {
	cfg     Config
	ways    atomic.Pointer[ways]
	goproxy *goproxy.ProxyHttpServer
	http    *http.Server
	handOff *handOff
	pools   pools
	tunnels tunnels
	clients clients
	users   credentials
	secure  secure // the TLS listeners

	rates       *rates       // of new connections; nil: no limit
	crowd       crowd        // connections that are no tunnels
	hurried     atomic.Int64 // connections that these two refuse, at the moment
	descriptors *descriptors

	inherited struct{ plain, secure []net.Listener } // for Listen
	lanes     []*lane
	maxLanes  int            // 0: every connection has goroutines of its own
	laneWG    sync.WaitGroup // goroutines of lanes
	listeners []net.Listener
	addrs     []netip.AddrPort // of listeners
	own       []netip.AddrPort // of this process: no request may reach them

	life       context.Context // of connections; ends when they are cut
	cut        context.CancelFunc
	wg         sync.WaitGroup // every goroutine that serves a connection or listener
	stopping   sync.Once
	quit       chan struct{} // closed when Shutdown begins
	stopped    chan struct{} // closed when it is done
	draining   atomic.Bool   // the same as quit
	generation atomic.Uint64 // of the policy: grows with each Recheck

	mu      sync.Mutex // guards pending, and the beginning of Serve against Shutdown
	pending map[*pending]struct{}

	idPrefix         string
	ids              atomic.Uint64
	httpConns        atomic.Int64 // connections that net/http serves, but for sessions
	httpUp, httpDown atomic.Int64 // bytes of bodies outside sessions
	waiting          atomic.Int64 // goroutines in work without a connection
	acceptErrors     atomic.Uint64
	panics           atomic.Uint64
}

// New returns a Server that does nothing yet.
func New(cfg Config) *Server {
	cfg.setDefaults()
	s := &Server{
		cfg:      cfg,
		handOff:  newHandOff(),
		quit:     make(chan struct{}),
		stopped:  make(chan struct{}),
		pending:  make(map[*pending]struct{}),
		tunnels:  tunnels{limits: cfg.Limits, bySource: make(map[netip.Addr]int), byGroup: make(map[string]int), live: make(map[*tunnel]struct{})},
		clients:  clients{live: make(map[*clientConn]struct{})},
		idPrefix: newPrefix(),

		rates:       newRates(cfg.Limits.ConnectionsPerSecond, cfg.Limits.ConnectionsBurst),
		crowd:       crowd{limit: cfg.Limits.ConnectionsPerSource, open: make(map[netip.Addr]int)},
		descriptors: newDescriptors(),
		maxLanes:    max(1, runtime.GOMAXPROCS(0)/2), // leaves room for everything else
	}
	s.ways.Store(newWays(&cfg.Routes, cfg.Resolver))
	s.life, s.cut = context.WithCancel(context.Background())
	s.pools = pools{s: s, m: make(map[poolKey]*carrier)}
	s.goproxy = newGoproxy(s)
	s.http = &http.Server{
		Handler:                      forwarder{s},
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            cfg.Timeouts.RequestHeader,
		IdleTimeout:                  cfg.Timeouts.Idle,
		MaxHeaderBytes:               max(cfg.Limits.HeaderBytes-4<<10, 1), // net/http allows 4 KiB more
		ErrorLog:                     log.New(debugLog{s}, "", 0),
		BaseContext:                  func(net.Listener) context.Context { return s.life },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, clientKey{}, c)
		},
		ConnState: s.connState,
	}
	s.users.init(cfg.Auth)
	s.newSecure()
	return s
}

func (c *Config) setDefaults() {
	orDefault := func(d *time.Duration, value time.Duration) {
		if *d <= 0 {
			*d = value
		}
	}
	orDefault(&c.Timeouts.Connect, defaultConnect)
	orDefault(&c.Timeouts.ClientHello, defaultClientHello)
	orDefault(&c.Timeouts.RequestHeader, defaultRequestHeader)
	orDefault(&c.Timeouts.Idle, defaultIdle)
	if c.Limits.ClientHelloBytes <= 0 {
		c.Limits.ClientHelloBytes = clienthello.DefaultLimit
	}
	if c.Limits.HeaderBytes <= 0 {
		c.Limits.HeaderBytes = defaultHeaderBytes
	}
	if c.Limits.URLBytes <= 0 {
		c.Limits.URLBytes = defaultURLBytes
	}
	c.ProxyProtocol.Trusted = unmapPrefixes(c.ProxyProtocol.Trusted)
	if c.Observer == nil {
		c.Observer = event.Observers(nil)
	}
}

// Listen binds every address of Config.Listen and Config.TLS.Listen, or none: the
// error names the one that could not be had.
func (s *Server) Listen() error {
	// MPTCP, which Go would use where it can, cannot be spliced.
	lc := listenConfig()
	lc.SetMultipathTCP(false)
	for i, a := range s.cfg.Listen {
		l, err := s.listen(lc, a, s.inherited.plain, i)
		if err != nil {
			s.closeListeners()
			return err // which names the address
		}
		s.listeners = append(s.listeners, l)
		s.addrs = append(s.addrs, addrPort(l.Addr()))
	}
	for i, a := range s.cfg.TLS.Listen {
		l, err := s.listen(lc, a, s.inherited.secure, i)
		if err != nil {
			s.closeListeners()
			return err
		}
		s.secure.listeners = append(s.secure.listeners, l)
		s.secure.addrs = append(s.secure.addrs, addrPort(l.Addr()))
	}
	s.Guard(s.addrs...)
	s.Guard(s.secure.addrs...)
	return nil
}

// Inherit has Listen use sockets that somebody else has bound: plain ones instead of binding
// the addresses of Config.Listen, secure ones instead of those of Config.TLS.Listen, of the
// same number. The Server closes them. Call it before Listen.
func (s *Server) Inherit(plain, secure []net.Listener) {
	s.inherited.plain, s.inherited.secure = plain, secure
}

// listen returns what is inherited as number i, or else binds addr.
func (s *Server) listen(lc *net.ListenConfig, addr string, inherited []net.Listener, i int) (net.Listener, error) {
	if i < len(inherited) {
		return inherited[i], nil
	}
	return lc.Listen(context.Background(), "tcp", addr)
}

// Guard keeps requests away from addrs, further listeners of this process, whatever
// the policy says. Call it before Serve.
func (s *Server) Guard(addrs ...netip.AddrPort) { s.own = append(s.own, addrs...) }

func (s *Server) closeListeners() {
	for _, l := range s.listeners {
		l.Close()
	}
	for _, l := range s.secure.listeners {
		l.Close()
	}
}

// Addrs returns the addresses bound by Listen, in the order of Config.Listen.
func (s *Server) Addrs() []netip.AddrPort { return s.addrs }

// Serve accepts connections until ctx ends, when it shuts down, or until
// Shutdown is called. It returns when all is over, and nil unless Listen was not
// called.
func (s *Server) Serve(ctx context.Context) error {
	if len(s.listeners) != len(s.cfg.Listen) || len(s.secure.listeners) != len(s.cfg.TLS.Listen) {
		return errors.New("serve: Listen was not called")
	}
	s.mu.Lock() // Shutdown may come at the same time
	if s.draining.Load() {
		s.mu.Unlock()
		<-s.stopped
		return nil
	}
	s.wg.Add(len(s.listeners) + len(s.secure.listeners) + 1)
	for _, l := range s.listeners {
		if s.useLanes(l) {
			s.wg.Done()
		} else {
			go s.accept(l, s.serveConn)
		}
	}
	s.mu.Unlock()
	s.startLanes()
	s.serveSecure()
	go s.serveHTTP()
	select {
	case <-ctx.Done():
		return s.Shutdown(context.WithoutCancel(ctx))
	case <-s.stopped:
		return nil
	}
}

func (s *Server) serveHTTP() {
	defer s.wg.Done()
	s.http.Serve(s.handOff) // ends with ErrServerClosed, at Shutdown
}

// maxSpare bounds the goroutines that wait for another connection to serve.
const maxSpare = 16

// work serves conn, and then others that come in by next. A new goroutine for each
// connection would have to grow its stack, several times, to what serving one takes.
func (s *Server) work(conn net.Conn, serve func(net.Conn), next <-chan net.Conn) {
	defer s.wg.Done()
	for {
		serve(conn)
		if s.waiting.Add(1) > maxSpare {
			s.waiting.Add(-1)
			return
		}
		select {
		case conn = <-next:
			s.waiting.Add(-1)
		case <-s.quit:
			return
		}
	}
}

// accept accepts until l is closed, and has each connection served in a goroutine
// that has nothing else to do. Other failures pass, and are waited for, and so is a lack of
// descriptors.
func (s *Server) accept(l net.Listener, serve func(net.Conn)) {
	defer s.wg.Done()
	look := newLookout(s.descriptors)
	next := make(chan net.Conn)
	pause := minPause
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			pause = minPause
			enough, recovered := look.enough(conn)
			if recovered {
				s.cfg.Logger.Info().Str("listener", listener).Msg("connections are accepted without a pause again")
			}
			select {
			case next <- conn: // somebody is waiting
			default:
				s.wg.Add(1)
				go s.work(conn, serve, next)
			}
			if enough {
				continue
			}
			err = errDescriptors
		case errors.Is(err, net.ErrClosed):
			return
		default:
			s.acceptErrors.Add(1)
		}
		s.awaitRoom(err, &pause)
	}
}

// register makes t known. A policy that changed since generation has not seen t.
func (s *Server) register(t *tunnel, generation uint64) {
	s.tunnels.add(t)
	if s.life.Err() != nil {
		t.cut()
	}
	// Nor have users that changed after t's was verified.
	if s.generation.Load() != generation || !s.users.isStill(t.request.User, t.hash) {
		t.recheck()
		t.cutRevoked()
	}
}

// Recheck decides every live tunnel and every request under way again, and closes
// those that no longer pass and upstream connections that are idle. Call it after
// every change of policy.
func (s *Server) Recheck() {
	s.generation.Add(1)
	s.tunnels.each((*tunnel).recheck) // all before the first is cut: one may carry another
	s.clients.each((*liveExchange).recheck)
	s.tunnels.each((*tunnel).cutRevoked)
	s.clients.each((*liveExchange).cutRevoked)
	s.pools.retire()
}

// Shutdown stops accepting and closes connections without a request; requests are
// finished, and tunnels may go on for timeouts.drain or until ctx ends. What is
// left then is cut. When it returns all is over and every event was emitted. The
// error is ctx's, if that cut the drain short.
func (s *Server) Shutdown(ctx context.Context) error {
	var err error
	s.stopping.Do(func() {
		defer close(s.stopped)
		err = s.shutdown(ctx)
	})
	<-s.stopped
	return err
}

func (s *Server) shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.draining.Store(true)
	s.mu.Unlock()
	close(s.quit)
	s.closeListeners()
	s.eachLane((*lane).closeDoors)
	s.eachPending((*pending).closeUnused)
	drain, cancel := context.WithTimeout(ctx, s.cfg.Timeouts.Drain)
	defer cancel()
	cut := make(chan struct{})
	stop := context.AfterFunc(drain, func() {
		defer close(cut)
		s.cutAll()
	})
	s.shutdownSecure(drain)
	s.http.Shutdown(drain) // an error is drain's end
	s.wg.Wait()
	if !stop() {
		<-cut
	}
	s.pools.retire() // lanes close what is theirs
	s.eachLane((*lane).stop)
	s.laneWG.Wait()
	s.cut()
	s.pools.retire()
	return ctx.Err()
}

// cutAll ends everything that is left.
func (s *Server) cutAll() {
	s.cut()
	s.eachPending(func(p *pending) {
		abort(p.conn)
		p.conn.Close()
	})
	s.eachLane((*lane).cutAll)
	s.tunnels.each((*tunnel).cut)
	s.http.Close()
	s.clients.each((*liveExchange).leave) // those too whose connections nobody watches
	s.clients.closeVisits()
}

// Stats returns a snapshot.
func (s *Server) Stats() Stats {
	n, up, down := s.tunnels.sum()
	s.mu.Lock()
	pending := len(s.pending) + s.inLanes()
	s.mu.Unlock()
	st := Stats{
		Connections: n + pending + int(s.httpConns.Load()), Tunnels: n,
		BytesUp: up + s.httpUp.Load(), BytesDown: down + s.httpDown.Load(),
		AcceptErrors: s.acceptErrors.Load(), AcceptPauses: s.descriptors.pauses.Load(), Panics: s.panics.Load(),
	}
	s.secure.stats(&st)
	return st
}

// newEvent starts the record of a request.
func (s *Server) newEvent(kind event.Kind, who asker, start time.Time) event.Event {
	return event.Event{Time: start, Kind: kind, ID: s.newID(), Source: who.AddrPort, VPCEndpoint: who.vpcEndpoint, Listener: listener}
}

// observe ends the record.
func (s *Server) observe(ev *event.Event) {
	ev.Duration = time.Since(ev.Time)
	s.cfg.Observer.Observe(ev)
}

// note adds err to what the event says for operators.
func note(ev *event.Event, err error) {
	switch {
	case err == nil:
	case ev.Error == "":
		ev.Error = err.Error()
	default:
		ev.Error += "; " + err.Error()
	}
}

// answer returns what the client of ev is told of r.
func (s *Server) answer(r *refusal, ev *event.Event, asJSON bool) *answer {
	ev.ContentType = answerType(asJSON)
	return &answer{
		refusal: r, id: ev.ID, help: s.cfg.HelpURL,
		source: ev.Source.Addr(), name: ev.Name, port: ev.Port, asJSON: asJSON,
		challenge: s.users.challenge,
	}
}

// newPrefix returns what tells this process's IDs from those of others.
func newPrefix() string {
	var b [5]byte
	rand.Read(b[:])
	return strings.ToLower(base32.HexEncoding.EncodeToString(b[:])) + "-"
}

// newID returns an ID that no other event of this process has.
func (s *Server) newID() string {
	b := make([]byte, 0, 24)
	return string(strconv.AppendUint(append(b, s.idPrefix...), s.ids.Add(1), 32))
}

// recovered, deferred, ends a connection whose goroutine panicked; the others live on.
func (s *Server) recovered(conn net.Conn) {
	if v := recover(); v != nil {
		s.crashed(v)
		abort(conn) // else the end of a stream without an answer would be a 200
		conn.Close()
	}
}

// crashed records a panic.
func (s *Server) crashed(v any) {
	s.panics.Add(1)
	s.cfg.Logger.Error().Str("panic", fmt.Sprint(v)).Bytes("stack", debug.Stack()).Msg("a connection was closed because of a mistake in this program; please report it")
}
