package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/policy/event"
	"sallyport/proxy/htpasswd"
	"sallyport/proxyproto"
)

// UserFrom says which part of a client's certificate names its user.
type UserFrom string

// The parts. Where a certificate has several names of a kind the first counts.
const (
	UserFromSAN UserFrom = "san" // the first mail address, or else the first DNS name, of subjectAltName
	UserFromCN  UserFrom = "cn"  // the subject's common name
	UserFromURI UserFrom = "uri" // the first URI of subjectAltName, such as a SPIFFE ID
)

// TLS says how clients reach the proxy over TLS, with HTTP/1.1 or HTTP/2. Without
// addresses there is no such listener.
type TLS struct {
	Listen []string // addresses, as Config.Listen
	TLSIdentity
}

// TLSIdentity is what can change while a Server runs.
type TLSIdentity struct {
	Certificate tls.Certificate // required, with its key
	MinVersion  uint16          // such as tls.VersionTLS13; 0: TLS 1.2

	// ClientCAs, if not nil, asks clients for a certificate, whose chain must end in
	// one of them. Revocation is not looked at.
	ClientCAs     *x509.CertPool
	RequireClient bool     // no handshake without a certificate
	UserFrom      UserFrom // "": UserFromSAN
}

// maxUserURI bounds a URI that names a user, in bytes, as policies do.
const maxUserURI = 255

// listenerTLS is Event.Listener of what came over TLS.
const listenerTLS = "proxy_tls"

var errIsPlain = badHead("plain HTTP to the proxy's TLS port; the client's proxy setting needs https://, not http://")

// secure holds the TLS listeners and what serves HTTP/2 on them.
type secure struct {
	listeners []net.Listener
	addrs     []netip.AddrPort // of listeners
	identity  atomic.Pointer[identity]
	http2     http2Server
	failed    handshakes
}

// identity is TLSIdentity in force.
type identity struct {
	config   *tls.Config
	userFrom UserFrom
}

// newSecure prepares the TLS listeners, if there are any.
func (s *Server) newSecure() {
	if len(s.cfg.TLS.Listen) == 0 {
		return
	}
	s.secure.http2 = newHTTP2(s)
	s.SetTLS(s.cfg.TLS.TLSIdentity)
}

// SetTLS puts another certificate, or other demands on clients, in force for new
// connections.
func (s *Server) SetTLS(id TLSIdentity) {
	c := &tls.Config{
		Certificates: []tls.Certificate{id.Certificate},
		MinVersion:   max(id.MinVersion, tls.VersionTLS12),
		NextProtos:   []string{"http/1.1"},
	}
	if s.secure.http2.serve != nil { // GODEBUG can take it away
		c.NextProtos = []string{"h2", "http/1.1"}
	}
	if id.ClientCAs != nil {
		c.ClientCAs = id.ClientCAs
		c.ClientAuth = tls.VerifyClientCertIfGiven
		if id.RequireClient {
			c.ClientAuth = tls.RequireAndVerifyClientCert
		}
		// A ticket would carry what an earlier set of authorities said.
		c.SessionTicketsDisabled = true
	}
	s.secure.identity.Store(&identity{c, id.UserFrom})
}

// TLSAddrs returns the addresses bound by Listen for TLS, in the order of
// Config.TLS.Listen.
func (s *Server) TLSAddrs() []netip.AddrPort { return s.secure.addrs }

// serveSecure starts to accept. Serve has counted the goroutines.
func (s *Server) serveSecure() {
	for _, l := range s.secure.listeners {
		go s.accept(l, s.serveTLSConn)
	}
}

// shutdownSecure tells clients of HTTP/2 that there will be no more streams (GOAWAY).
// Their connections end with the last one.
func (s *Server) shutdownSecure(ctx context.Context) {
	if s.secure.http2.serve != nil {
		s.secure.http2.Shutdown(ctx) // waits for nothing: the connections are ours
	}
}

// A peer is what lies below a client's TLS: its connection, and who it has proved to
// be.
type peer struct {
	net.Conn
	source  asker
	early   []byte // read before the handshake, and not used yet
	user    string // by its certificate; "": nobody
	problem error  // why a certificate gives no user

	handlers sync.WaitGroup // of HTTP/2
	mu       sync.Mutex     // guards closed
	closed   bool           // net/http has done with the connection; no handler begins any more
}

// Read reads what came before first.
func (p *peer) Read(b []byte) (int, error) {
	if len(p.early) > 0 {
		n := copy(b, p.early)
		p.early = p.early[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// peerOf returns what is known of the client behind conn, nil if it does not speak
// TLS to us.
func peerOf(conn net.Conn) *peer {
	switch c := conn.(type) {
	case *tls.Conn:
		p, _ := c.NetConn().(*peer)
		return p
	case *http2Stream:
		return c.peer
	}
	return nil
}

// listenerOf returns the door that conn came through.
func listenerOf(conn net.Conn) string {
	if peerOf(conn) != nil {
		return listenerTLS
	}
	return listener
}

// abort makes the end of a client's connection look like one where that can be
// told: without the goodbye of TLS, or with a reset of the stream. It does not wait
// for the client. The caller still closes conn.
func abort(conn net.Conn) {
	switch c := conn.(type) {
	case *tls.Conn:
		c.NetConn().Close()
	case *http2Stream:
		c.abort()
	}
}

// serveTLSConn serves a connection of a TLS listener until it is somebody else's.
func (s *Server) serveTLSConn(conn net.Conn) {
	defer s.recovered(conn)
	defer s.descriptors.release()
	first := s.enter(conn, false) // whoever has not finished the handshake has asked for nothing
	defer s.leave(first)          // the second time does nothing
	first.secure = true
	c := s.handshake(first)
	if c == nil {
		return
	}
	h2 := c.ConnectionState().NegotiatedProtocol == "h2"
	p := s.enter(c, h2) // Shutdown lets HTTP/2 end by itself
	p.counted, first.counted = first.counted, p.counted
	s.leave(first)
	defer s.leave(p)
	if h2 {
		if s.draining.Load() { // whose GOAWAY may have gone out already
			c.Close()
			return
		}
		s.serveByHTTP2(c)
		return
	}
	start := time.Now()
	c.SetReadDeadline(start.Add(s.cfg.Timeouts.RequestHeader))
	buf := buffers.Get().(*[minBuffer]byte)
	defer buffers.Put(buf)
	s.heads(p, peerOf(c).source, start, nil, buf[:0])
}

// handshake does the TLS handshake, for as long as a request head may take, and
// finds out who the client is. It returns nil if the connection is done with.
func (s *Server) handshake(p *pending) *tls.Conn {
	conn := p.conn
	start := time.Now()
	conn.SetDeadline(start.Add(s.cfg.Timeouts.RequestHeader))
	source, early, ok := s.introduce(p, nil, start)
	if !ok {
		return nil
	}
	var tooMany error
	if p.counted, tooMany = s.count(source.Addr(), start); tooMany != nil {
		s.dropTooMany(p, source, start, tooMany)
		return nil
	}
	below := &peer{Conn: conn, source: source, early: early}
	id := s.secure.identity.Load()
	c := tls.Server(below, id.config)
	if err := c.HandshakeContext(s.life); err != nil {
		s.handshakeFailed(source, start, err)
		header, notTLS := errors.AsType[tls.RecordHeaderError](err)
		switch {
		case notTLS && proxyproto.Starts(header.RecordHeader[:]):
			s.reject(p, source, start, errUnexpected(conn))
			return nil
		case notTLS && tokenByte[header.RecordHeader[0]]:
			r := &connect{s: s, client: conn}
			r.ev = s.newEvent(event.HTTP, source, start)
			r.ev.Listener = listenerTLS
			r.refuse(badRequest(r.decision, errIsPlain))
			return nil
		}
		s.cfg.Logger.Debug().Err(err).Stringer("src", source.AddrPort).Str("listener", listenerTLS).Msg("TLS handshake failed")
		closeGently(conn, make([]byte, 512)) // for the alert
		return nil
	}
	conn.SetDeadline(time.Time{})
	if chains := c.ConnectionState().VerifiedChains; len(chains) > 0 {
		below.user, below.problem = userOf(chains[0][0], id.userFrom)
	}
	return c
}

// userOf returns the user that cert, which was verified, is for.
func userOf(cert *x509.Certificate, from UserFrom) (string, error) {
	name := ""
	switch {
	case from == UserFromCN:
		name = cert.Subject.CommonName
	case from == UserFromURI:
		if len(cert.URIs) == 0 {
			break
		}
		// With its colons, which no name of a password's user has: nobody else can be it.
		name = cert.URIs[0].String()
		if scheme, rest, ok := strings.Cut(name, "://"); !ok || !htpasswd.ValidUser(scheme+strings.ReplaceAll(rest, ":", "")) || rest == "" || len(name) > maxUserURI {
			return "", errors.New("the URI in the client's certificate is not the name of a user")
		}
		return name, nil
	case len(cert.EmailAddresses) > 0:
		name = cert.EmailAddresses[0]
	case len(cert.DNSNames) > 0:
		name = cert.DNSNames[0]
	}
	switch {
	case name == "":
		return "", errors.New("the client's certificate names no user where proxy.tls.user_from says")
	case !htpasswd.ValidUser(name):
		return "", errors.New("what the client's certificate holds is not the name of a user")
	}
	return name, nil
}
