package dnsfilter

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/dnsfilter/wire"
	"sallyport/policy"
)

const (
	maxInFlight    = 4096             // UDP queries under way; more are dropped
	maxConns       = 1024             // TCP connections, and as many over TLS; half of them for known sources only
	maxSourceConns = 128              // of these, of one address
	firstQuery     = 5 * time.Second  // for a TCP connection to send its first query
	idleTimeout    = 10 * time.Second // between queries on a TCP connection (RFC 7766, section 6.2.3)
	idleSecure     = 30 * time.Second // the same over TLS, where another connection costs more (RFC 7858, section 3.4)
	writeTimeout   = 5 * time.Second  // for a TCP client to take an answer
	lastAnswers    = time.Second      // over UDP, to those that Shutdown cuts off
	bindAttempts   = 10               // to find a port that is free for both UDP and TCP
	readSize       = 4096             // bytes of a query over UDP
)

// past is a deadline that ends what waits.
var past = time.Unix(1, 0)

var errServing = errors.New("the server is serving already or shut down")

// A Server answers DNS clients over UDP and TCP, TLS and HTTPS, as policy allows each of
// them: Listen, then Serve, and Shutdown in the end.
type Server struct {
	resolver *Resolver
	cfg      *Config
	counts   *counts
	serial   atomic.Uint64       // of events
	inFlight atomic.Int64        // queries under way that are not answered at once
	conns    conns               // in clear
	recorded map[string]struct{} // names on the wire that have records
	idle     *sync.Pool          // of *slowFast
	outboxes sync.Pool           // of *outbox
	sample   *sampler            // nil unless Config.Events asks for it
	cookies  cookies
	limit    *limiter
	tunnels  *tunnelGuard   // nil: off
	slow     sync.WaitGroup // UDP queries under way

	secureConns conns // over TLS
	certificate atomic.Pointer[tls.Certificate]
	dot, doh    *tls.Config // of the doors
	web         *web
	said        atomic.Bool // what misled says

	mu        sync.Mutex // guards what follows
	udp       []*udpSocket
	streams   []*listener
	addrs     []netip.AddrPort
	life      context.Context // of the queries under way
	end       context.CancelFunc
	serving   bool
	inherited Sockets       // for Listen
	down      chan struct{} // closed when Shutdown begins
	finished  chan struct{} // closed when Serve returns
}

// NewServer returns a Server that answers from r, with r's Config. The caller
// keeps ownership of r, and closes it after the Server.
func NewServer(r *Resolver) *Server {
	s := &Server{resolver: r, cfg: &r.cfg, counts: &r.counts,
		down: make(chan struct{}), finished: make(chan struct{})}
	s.idle = s.newIdle()
	s.outboxes.New = s.newOutbox
	s.recorded = make(map[string]struct{})
	for name := range r.records {
		s.recorded[string(wire.AppendName(nil, name.String()))] = struct{}{}
	}
	if s.cfg.Events == EventsSample {
		s.sample = newSampler(s.cfg.Now())
	}
	s.limit, s.tunnels = s.newLimiter(), newTunnelGuard(s)
	s.newConns(&s.conns, "TCP")
	s.newConns(&s.secureConns, "TLS")
	s.life, s.end = context.WithCancel(context.Background())
	s.dot, s.doh = s.newTLS("dot"), s.newTLS("h2", "http/1.1")
	if len(s.cfg.Certificate.Certificate) > 0 {
		s.SetCertificate(s.cfg.Certificate)
	}
	s.web = newWeb(s)
	return s
}

// newConns prepares cs, which holds connections of a kind.
func (s *Server) newConns(cs *conns, kind string) {
	cs.trusted = unmapped(s.cfg.ProxyProtocol.Trusted)
	cs.open = make(map[*conn]struct{})
	cs.perSource = make(map[netip.Addr]int)
	cs.refused = &s.counts.dropped
	cs.known = func(source netip.Addr) bool {
		d := s.cfg.Decider.Decide(policy.Request{Source: source, Protocol: policy.ProtocolDNS, Time: s.cfg.Now()})
		return d.Reason != policy.ReasonUnmatchedSource
	}
	cs.full = sync.OnceFunc(func() {
		s.cfg.Logger.Warn().Int("limit", maxConns).
			Msg(kind + " connections to the resolver are refused: too many are open; from half the limit on, only sources of a group get more. Said once")
	})
}

// Sockets are bound by somebody else, such as systemd. The Server closes them.
type Sockets struct {
	UDP   []*net.UDPConn // used as they are: one thread reads each
	TCP   []net.Listener
	TLS   []net.Listener
	HTTPS []net.Listener
}

// Inherit has Listen use sockets instead of binding: those for UDP and TCP instead of
// Config.Listen, if there are any, the others instead of TLSListen and HTTPSListen. Call it
// before Listen.
func (s *Server) Inherit(sockets Sockets) { s.inherited = sockets }

// Listen binds every address of Config.Listen for UDP and TCP, those of TLSListen and
// of HTTPSListen, or none. The error names each address that could not be bound, such
// as "listen udp 127.0.0.1:53: bind: address already in use". Clients are answered when
// Serve runs.
func (s *Server) Listen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if in := &s.inherited; len(in.UDP)+len(in.TCP) > 0 {
		errs = append(errs, s.inherit())
	} else {
		for _, text := range s.cfg.Listen {
			addr, err := parseListen(text)
			if err == nil {
				err = s.bind(addr)
			}
			if err != nil {
				errs = append(errs, err)
			}
		}
	}
	errs = append(errs, s.listenStream(doorTLS, s.cfg.TLSListen, s.inherited.TLS),
		s.listenStream(doorHTTPS, s.cfg.HTTPSListen, s.inherited.HTTPS))
	if err := errors.Join(errs...); err != nil {
		s.unbind()
		return err
	}
	return nil
}

// inherit takes the sockets for UDP and TCP that Inherit was given. The caller holds mu.
func (s *Server) inherit() error {
	var errs []error
	for _, c := range s.inherited.UDP {
		u, err := newUDPSocket(c)
		if err != nil {
			c.Close()
			errs = append(errs, err)
			continue
		}
		s.udp = append(s.udp, u)
		if a := c.LocalAddr().(*net.UDPAddr).AddrPort(); !slices.Contains(s.addrs, a) {
			s.addrs = append(s.addrs, a)
		}
	}
	for _, l := range s.inherited.TCP {
		s.addStream(doorDNS, l)
		if a := l.Addr().(*net.TCPAddr).AddrPort(); !slices.Contains(s.addrs, a) {
			s.addrs = append(s.addrs, a)
		}
	}
	return errors.Join(errs...)
}

// bind binds addr for UDP and TCP.
func (s *Server) bind(addr netip.AddrPort) error {
	udp, tcp, err := listenBoth(addr)
	for range bindAttempts - 1 {
		if err == nil || addr.Port() != 0 {
			break
		}
		udp, tcp, err = listenBoth(addr) // the free TCP port was none for UDP
	}
	if err != nil {
		return err
	}
	sockets, err := shareUDP(udp.(*net.UDPConn))
	if err != nil {
		tcp.Close()
		return err
	}
	s.addrs = append(s.addrs, udp.LocalAddr().(*net.UDPAddr).AddrPort())
	s.udp = append(s.udp, sockets...)
	s.addStream(doorDNS, tcp)
	return nil
}

// hostOf returns addr's host as net wants it, and "4" if it is to mean IPv4 alone.
func hostOf(addr netip.AddrPort) (host, family string) {
	if addr.Addr().IsValid() {
		host = addr.Addr().String()
	}
	if addr.Addr() == netip.IPv4Unspecified() {
		family = "4" // or it would mean IPv6 as well
	}
	return host, family
}

func listenBoth(addr netip.AddrPort) (net.PacketConn, net.Listener, error) {
	host, family := hostOf(addr)
	if addr.Port() == 0 { // TCP chooses, for far more of its ports are taken: by connections, and those that have been closed
		tcp, err := net.Listen("tcp"+family, net.JoinHostPort(host, "0"))
		if err != nil {
			return nil, nil, err
		}
		udp, err := net.ListenPacket("udp"+family, net.JoinHostPort(host, port(tcp.Addr().(*net.TCPAddr).AddrPort())))
		if err != nil {
			tcp.Close()
			return nil, nil, err
		}
		return udp, tcp, nil
	}
	udp, err := net.ListenPacket("udp"+family, net.JoinHostPort(host, port(addr)))
	if err != nil {
		return nil, nil, err
	}
	tcp, err := net.Listen("tcp"+family, net.JoinHostPort(host, port(addr)))
	if err != nil {
		udp.Close()
		return nil, nil, err
	}
	return udp, tcp, nil
}

// Addrs returns the bound addresses in the order of Config.Listen, each for UDP and TCP.
func (s *Server) Addrs() []netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]netip.AddrPort(nil), s.addrs...)
}

// TLSAddrs returns the addresses bound for TLS, in the order of Config.TLSListen.
func (s *Server) TLSAddrs() []netip.AddrPort { return s.addrsOf(doorTLS) }

// HTTPSAddrs returns the addresses bound for HTTPS, in the order of Config.HTTPSListen.
func (s *Server) HTTPSAddrs() []netip.AddrPort { return s.addrsOf(doorHTTPS) }

func (s *Server) addrsOf(d door) (addrs []netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.streams {
		if l.door == d {
			addrs = append(addrs, l.Addr().(*net.TCPAddr).AddrPort())
		}
	}
	return addrs
}

// Serve answers queries until Shutdown is called or ctx is done, which ends
// everything under way at once; it returns nil then. If a listener fails, Serve
// ends with its error. It can be called once.
func (s *Server) Serve(ctx context.Context) error {
	s.mu.Lock()
	if s.serving || isClosed(s.down) {
		s.mu.Unlock()
		return errServing
	}
	s.serving = true
	udp, streams := s.udp, s.streams
	s.mu.Unlock()
	defer close(s.finished)
	defer s.end()

	defer context.AfterFunc(ctx, s.abort)()
	sockets := len(udp) + len(streams)
	ended := make(chan error, sockets)
	for _, u := range udp {
		go func() { ended <- s.serveUDP(u) }()
	}
	for _, l := range streams {
		go func() { ended <- s.serveStream(l) }()
	}
	var serving sync.WaitGroup
	defer serving.Wait()
	if slices.ContainsFunc(streams, func(l *listener) bool { return l.door == doorHTTPS }) {
		serving.Go(s.web.serve)
	}
	var failed error
	for range sockets {
		if err := <-ended; err != nil && failed == nil {
			failed = err
			go s.abort()
		}
	}
	s.slow.Wait() // their answers leave by the sockets
	for _, u := range udp {
		u.conn.Close()
	}
	select {
	case <-ctx.Done(): // without listeners there is nothing else to wait for
	case <-s.down:
	}
	return failed
}

// abort shuts down without waiting for anybody.
func (s *Server) abort() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.Shutdown(ctx) // that it did not wait is no news
}

// Shutdown stops taking queries and waits for those under way until ctx is done;
// then it cuts them off and returns ctx's error. Serve returns afterwards.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	first := !isClosed(s.down)
	if first {
		close(s.down)
	}
	serving := s.serving
	if !serving {
		s.unbind()
	}
	s.mu.Unlock()
	if !serving {
		s.end()
		return nil
	}
	if first {
		for _, u := range s.udp {
			u.conn.SetReadDeadline(past) // fails on closed sockets only, whose reader has ended
		}
		for _, l := range s.streams {
			l.Close() // its Accept returns
		}
		hurry := func(c *conn) {
			if !c.handed.Load() {
				c.SetReadDeadline(past) // as above
			}
		}
		s.conns.each(hurry)
		s.secureConns.each(hurry)
	}
	select {
	case <-s.finished:
		return nil
	case <-ctx.Done():
	}
	s.end()
	s.cutOff()
	for _, u := range s.udp {
		u.conn.SetWriteDeadline(time.Now().Add(lastAnswers)) // for those who wait for room in the socket; fails as above
	}
	s.conns.each(func(c *conn) { c.Close() })
	s.secureConns.each(func(c *conn) { c.Close() })
	return ctx.Err()
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// unbind closes every socket. The caller holds mu.
func (s *Server) unbind() {
	for _, u := range s.udp {
		u.conn.Close()
	}
	for _, l := range s.streams {
		l.Close()
	}
	s.udp, s.streams, s.addrs = nil, nil, nil
}
