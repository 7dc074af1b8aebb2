package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// cause says why a client's TLS handshake failed: a closed set, for metrics.
type cause uint8

const (
	causeClosed         cause = iota // the client went away, or the process is about to
	causeTimeout                     // it took longer than timeouts.request_header
	causeNotTLS                      // the client does not speak TLS
	causeNoCertificate               // the client shows no certificate and needs one
	causeBadCertificate              // its certificate is no good
	causeAlert                       // the client broke it off, such as for want of trust in our certificate
	causeProtocol                    // no version, suite or meaning in common
	causes
)

var causeNames = [causes]string{"closed", "timeout", "not_tls", "no_client_certificate", "bad_client_certificate", "client_alert", "protocol"}

// handshakes counts handshakes that failed.
type handshakes [causes]atomic.Uint64

// stats fills in what there is to say about the TLS listeners.
func (s *secure) stats(st *Stats) {
	id := s.identity.Load()
	if id == nil {
		return
	}
	st.Handshakes = s.failed.byCause()
	cert := id.config.Certificates[0]
	leaf, err := cert.Leaf, error(nil)
	if leaf == nil && len(cert.Certificate) > 0 { // not from tls.X509KeyPair
		leaf, err = x509.ParseCertificate(cert.Certificate[0])
	}
	if leaf != nil && err == nil {
		st.CertificateExpiry = leaf.NotAfter
	}
}

// byCause returns the counts under the names of their causes.
func (h *handshakes) byCause() map[string]uint64 {
	m := make(map[string]uint64, causes)
	for c := range h {
		m[causeNames[c]] = h[c].Load()
	}
	return m
}

// causeOf returns why err ended a handshake.
func causeOf(err error) cause {
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return causeNotTLS
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return causeBadCertificate
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
		return causeAlert
	}
	switch {
	case isTimeout(err):
		return causeTimeout
	case err.Error() == "tls: client didn't provide a certificate": // which has no type
		return causeNoCertificate
	}
	if strings.HasPrefix(err.Error(), "tls: ") {
		return causeProtocol
	}
	return causeClosed
}

// handshakeFailed counts a handshake that err ended. Where a certificate was the
// reason there is an event too: somebody wanted to pass, and may not.
func (s *Server) handshakeFailed(source asker, start time.Time, err error) {
	c := causeOf(err)
	s.secure.failed[c].Add(1)
	reason := policy.ReasonAuthRequired
	switch c {
	case causeBadCertificate:
		reason = policy.ReasonAuthFailed
	case causeNoCertificate:
	default:
		return
	}
	ev := s.newEvent(event.HTTP, source, start)
	ev.Listener = listenerTLS
	ev.Decision = ev.Decision.Refuse(reason)
	note(&ev, err)
	s.observe(&ev)
}
