package dnsfilter

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/dnsfilter/wire"
	"sallyport/policy"
)

const (
	maxInFlight    = 4096             // UDP queries under way; more are dropped
	maxConns       = 1024             // TCP connections; half of them for known sources only
	maxSourceConns = 128              // TCP connections of one address
	firstQuery     = 5 * time.Second  // for a TCP connection to send its first query
	idleTimeout    = 10 * time.Second // between queries on a TCP connection (RFC 7766, section 6.2.3)
	writeTimeout   = 5 * time.Second  // for a TCP client to take an answer
	lastAnswers    = time.Second      // over UDP, to those that Shutdown cuts off
	bindAttempts   = 10               // to find a port that is free for both UDP and TCP
	readSize       = 4096             // bytes of a query over UDP
)

// past is a deadline that ends what waits.
var past = time.Unix(1, 0)

var errServing = errors.New("the server is serving already or shut down")

// A Server answers DNS clients over UDP and TCP, as policy allows each of them:
// Listen, then Serve, and Shutdown in the end.
type Server struct {
	resolver *Resolver
	cfg      *Config
	counts   *counts
	serial   atomic.Uint64 // of events
	inFlight atomic.Int64  // UDP queries under way
	conns    conns
	recorded map[string]struct{} // names on the wire that have records
	idle     *sync.Pool          // of *slowFast
	outboxes sync.Pool           // of *outbox
	sample   *sampler            // nil unless Config.Events asks for it
	slow     sync.WaitGroup      // UDP queries under way

	mu       sync.Mutex // guards what follows
	udp      []*udpSocket
	tcp      []*listener
	addrs    []netip.AddrPort
	life     context.Context // of the queries under way
	end      context.CancelFunc
	serving  bool
	down     chan struct{} // closed when Shutdown begins
	finished chan struct{} // closed when Serve returns
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
	s.conns.open = make(map[*conn]struct{})
	s.conns.perSource = make(map[netip.Addr]int)
	s.conns.refused = &r.counts.dropped
	s.conns.known = func(source netip.Addr) bool {
		d := s.cfg.Decider.Decide(policy.Request{Source: source, Protocol: policy.ProtocolDNS, Time: s.cfg.Now()})
		return d.Reason != policy.ReasonUnmatchedSource
	}
	s.conns.full = sync.OnceFunc(func() {
		s.cfg.Logger.Warn().Int("limit", maxConns).
			Msg("TCP connections to the resolver are refused: too many are open; from half the limit on, only sources of a group get more. Said once")
	})
	s.life, s.end = context.WithCancel(context.Background())
	return s
}

// Listen binds every address of Config.Listen for UDP and TCP, or none. The error
// names each address that could not be bound, such as "listen udp 127.0.0.1:53:
// bind: address already in use". Clients are answered when Serve runs.
func (s *Server) Listen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, text := range s.cfg.Listen {
		addr, err := parseListen(text)
		if err == nil {
			err = s.bind(addr)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		s.unbind()
		return err
	}
	return nil
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
	s.tcp = append(s.tcp, &listener{Listener: tcp, conns: &s.conns, down: s.down})
	return nil
}

func listenBoth(addr netip.AddrPort) (net.PacketConn, net.Listener, error) {
	host, family := "", ""
	if addr.Addr().IsValid() {
		host = addr.Addr().String()
	}
	if addr.Addr() == netip.IPv4Unspecified() {
		family = "4" // or it would mean IPv6 as well
	}
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
	udp, tcp := s.udp, s.tcp
	s.mu.Unlock()
	defer close(s.finished)
	defer s.end()

	defer context.AfterFunc(ctx, s.abort)()
	sockets := len(udp) + len(tcp)
	ended := make(chan error, sockets)
	for _, u := range udp {
		go func() { ended <- s.serveUDP(u) }()
	}
	for _, l := range tcp {
		go func() { ended <- s.serveTCP(l) }()
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
		for _, l := range s.tcp {
			l.Close() // its Accept returns
		}
		s.conns.each(func(c *conn) { c.SetReadDeadline(past) }) // as above
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
	for _, l := range s.tcp {
		l.Close()
	}
	s.udp, s.tcp, s.addrs = nil, nil, nil
}
