package dnsfilter

import (
	"crypto/tls"
	"errors"
	"net"
	"time"

	"sallyport/proxyproto"
)

// newTLS returns the TLS of a listener whose protocols are those named.
func (s *Server) newTLS(protocols ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: protocols,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c := s.certificate.Load(); c != nil {
				return c, nil
			}
			return nil, errNoCertificate
		},
	}
}

// SetCertificate puts another certificate in force for new connections over TLS and
// HTTPS. The Server keeps c.
func (s *Server) SetCertificate(c tls.Certificate) { s.certificate.Store(&c) }

// CertificateExpiry returns when the certificate in force expires; zero if there is
// none, or its Leaf was not set (tls.X509KeyPair does that).
func (s *Server) CertificateExpiry() time.Time {
	if c := s.certificate.Load(); c != nil && c.Leaf != nil {
		return c.Leaf.NotAfter
	}
	return time.Time{}
}

var errNoCertificate = errors.New("no certificate is set")

// handshake does the server's part of TLS on c, for as long as a first query may take.
// It returns nil if that fails.
func (s *Server) handshake(c *conn, config *tls.Config) *tls.Conn {
	if !c.within(firstQuery, s.down) {
		return nil
	}
	t := tls.Server(c, config)
	err := t.HandshakeContext(s.life)
	if err == nil {
		return t
	}
	if header, notTLS := errors.AsType[tls.RecordHeaderError](err); notTLS && proxyproto.Starts(header.RecordHeader[:]) {
		s.uninvited(c.peer)
		return nil
	}
	s.cfg.Logger.Debug().Err(err).Stringer("src", c.client).Msg("TLS handshake with the resolver failed")
	return nil
}

// listenStream binds the addresses of a list for one of the doors, or returns an error
// that names one. inherited are used instead if there are any.
func (s *Server) listenStream(d door, texts []string, inherited []net.Listener) error {
	for _, l := range inherited {
		s.addStream(d, l)
	}
	if len(inherited) > 0 {
		return nil
	}
	var errs []error
	for _, text := range texts {
		addr, err := parseListen(text)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		host, family := hostOf(addr)
		l, err := net.Listen("tcp"+family, net.JoinHostPort(host, port(addr)))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s.addStream(d, l)
	}
	return errors.Join(errs...)
}

// addStream has Serve accept what comes by l. The caller holds mu.
func (s *Server) addStream(d door, l net.Listener) {
	conns := &s.conns
	if d.secret() {
		conns = &s.secureConns
	}
	s.streams = append(s.streams, &listener{Listener: l, conns: conns, down: s.down, door: d})
}
