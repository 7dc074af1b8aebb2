package admin

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Credentials are what the Server shows, and wants to see. The zero value shows and
// wants nothing: it is for loopback alone.
type Credentials struct {
	Token       string           // that requests carry; "": none does
	Certificate *tls.Certificate // nil: no TLS. Whether there is one never changes
	ClientCAs   *x509.CertPool   // sign operators' certificates; nil: nobody does
}

// credentials are Credentials in force.
type credentials struct {
	token     [sha256.Size]byte // hashed, so that all have one length
	hasToken  bool
	cert      *tls.Certificate
	clientCAs *x509.CertPool
}

// exposed returns an error if others than this machine could use s without a
// credential, which the settings should have seen to.
func (s *Server) exposed() error {
	c := s.credentials.Load()
	at, ok := s.listener.Addr().(*net.TCPAddr)
	if !ok || at.IP.IsLoopback() || c.hasToken || c.clientCAs != nil {
		return nil
	}
	return fmt.Errorf("listen on %s: beyond loopback the admin server wants a token or client certificates", at)
}

// SetCredentials puts c in force, for requests that come from then on and for streams
// from their next beat on.
func (s *Server) SetCredentials(c Credentials) {
	s.credentials.Store(&credentials{sha256.Sum256([]byte(c.Token)), c.Token != "", c.Certificate, c.ClientCAs})
}

// CertificateExpiry returns when the certificate in force expires; zero if there is
// none, or its Leaf was not set (tls.X509KeyPair does that).
func (s *Server) CertificateExpiry() time.Time {
	if c := s.credentials.Load().cert; c != nil && c.Leaf != nil {
		return c.Leaf.NotAfter
	}
	return time.Time{}
}

// tlsConfig returns what each connection is to use.
func (s *Server) tlsConfig() *tls.Config {
	protocols := []string{"h2", "http/1.1"}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: protocols,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			c := s.credentials.Load()
			t := &tls.Config{
				MinVersion: tls.VersionTLS12, NextProtos: protocols, Certificates: []tls.Certificate{*c.cert},
				SessionTicketsDisabled: true, // a client certificate is shown each time
			}
			if c.clientCAs != nil {
				t.ClientCAs, t.ClientAuth = c.clientCAs, tls.VerifyClientCertIfGiven // probes have none
			}
			return t, nil
		},
	}
}

// allows reports whether r comes from an operator.
func (c *credentials) allows(r *http.Request) bool {
	if !c.hasToken && c.clientCAs == nil {
		return true // over loopback, as the settings see to
	}
	return c.hasToken && c.knows(r) || c.clientCAs != nil && c.certified(r)
}

// knows reports whether r carries the token: as a bearer token (RFC 6750) or as the
// password of Basic (RFC 7617), which browsers ask people for.
func (c *credentials) knows(r *http.Request) bool {
	_, token, ok := r.BasicAuth()
	if scheme, rest, found := strings.Cut(r.Header.Get("Authorization"), " "); found && strings.EqualFold(scheme, "bearer") {
		token, ok = strings.TrimSpace(rest), true
	}
	sum := sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(sum[:], c.token[:]) == 1 && ok
}

// certified reports whether the connection has shown a certificate that is good now:
// the handshake may be long ago.
func (c *credentials) certified(r *http.Request) bool {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return false
	}
	chain := x509.NewCertPool()
	for _, cert := range r.TLS.PeerCertificates[1:] {
		chain.AddCert(cert)
	}
	_, err := r.TLS.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: c.clientCAs, Intermediates: chain, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return err == nil
}

// who names the operator for logs. It may hold anything.
func who(r *http.Request) string {
	by := r.RemoteAddr
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		by += " " + r.TLS.PeerCertificates[0].Subject.String()
	}
	if user, _, ok := r.BasicAuth(); ok && user != "" {
		by += " " + user[:min(len(user), maxWho)]
	}
	return by
}

// maxWho bounds what a client says of itself, in bytes.
const maxWho = 64

// open are the paths that need no credential: they are for load balancers and
// browsers, and tell little.
var open = []string{"/healthz", "/readyz", "/proxy.pac"}

// ClientHeader is what a request that changes something must carry, unless its body
// is JSON. No page of another origin can add it without asking this server first,
// which never agrees.
const ClientHeader = "X-Sallyport-Client"

// guard lets requests through that an operator has meant.
func (s *Server) guard(next http.Handler) http.Handler {
	crossOrigin := http.NewCrossOriginProtection()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		secure(w.Header())
		change := r.Method != http.MethodGet && r.Method != http.MethodHead
		switch {
		case !s.hostIsOurs(r):
			s.refuse(refusedHost, r.RemoteAddr, r.Host)
			fail(w, http.StatusMisdirectedRequest, fmt.Errorf("the host %q is not this server's; over loopback write an address, localhost or one of admin.hosts", clip(r.Host)))
		case foreign(r), change && crossOrigin.Check(r) != nil:
			s.refuse(refusedOrigin, r.RemoteAddr, r.Header.Get("Origin"))
			fail(w, http.StatusForbidden, errors.New("a page of another origin asks; open this server itself"))
		case change && !deliberate(r):
			s.refuse(refusedOrigin, r.RemoteAddr, r.Method+" without "+ClientHeader)
			fail(w, http.StatusForbidden, fmt.Errorf("what changes something needs the header %s, with any value, or Content-Type: application/json", ClientHeader))
		case !s.isOpen(r.URL.Path) && !s.credentials.Load().allows(r):
			s.refuse(s.credentials.Load().unproved(r), who(r), r.Method+" "+r.URL.Path)
			s.challenge(w)
		default:
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			next.ServeHTTP(w, r)
		}
	})
}

// secure sets what holds for every answer, unless a page says otherwise: nothing is
// cached, framed, sniffed, loaded or read by other origins.
func secure(h http.Header) {
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
}

// pagePolicy lets Config.Pages load scripts, styles, images and data from here.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
	"font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

func (s *Server) isOpen(path string) bool {
	return slices.Contains(open, path) || s.openMetrics && path == "/metrics"
}

// challenge answers who has shown no credential. A 401 would have to ask for one, which
// it cannot for certificates.
func (s *Server) challenge(w http.ResponseWriter) {
	if !s.credentials.Load().hasToken {
		fail(w, http.StatusForbidden, errors.New("show a client certificate of an authority in admin.tls.client_ca"))
		return
	}
	w.Header().Add("WWW-Authenticate", `Bearer realm="sallyport"`)
	w.Header().Add("WWW-Authenticate", `Basic realm="sallyport: the token is the password", charset="UTF-8"`)
	fail(w, http.StatusUnauthorized, errors.New("write the token of admin.token_file as Authorization: Bearer, or as the password of Basic"))
}

// hostIsOurs keeps pages of other names away that resolve to loopback (DNS
// rebinding): to the browser such a page and this server are of one origin.
func (s *Server) hostIsOurs(r *http.Request) bool {
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		if at, err := netip.ParseAddrPort(local.String()); err == nil && !at.Addr().Unmap().IsLoopback() {
			return true
		}
	}
	host := hostname(r.Host)
	if _, err := netip.ParseAddr(host); err == nil || host == "localhost" {
		return true
	}
	return slices.Contains(s.hosts, host)
}

// hostname returns the host of host or host:port, in lower case, without brackets and
// a trailing dot.
func hostname(hostport string) string {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		host = strings.TrimSuffix(inner, "]")
	}
	return strings.TrimSuffix(strings.ToLower(host), ".")
}

// foreign reports whether a page of another origin has asked, as far as the browser
// tells (Fetch Metadata, RFC 6454): unless somebody followed a link to here.
func foreign(r *http.Request) bool {
	switch r.Header.Get("Sec-Fetch-Site") {
	case "cross-site", "same-site":
		return r.Method != http.MethodGet || r.Header.Get("Sec-Fetch-Mode") != "navigate" || r.Header.Get("Sec-Fetch-Dest") != "document"
	}
	for _, origin := range r.Header["Origin"] {
		if u, err := url.Parse(origin); err != nil || u.Host != r.Host {
			return true
		}
	}
	return false
}

// deliberate reports whether r is one that no form and no simple request of the Fetch
// standard can be.
func deliberate(r *http.Request) bool {
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return r.Header.Get(ClientHeader) != "" || err == nil && kind == "application/json"
}

// clip bounds a text for a message.
func clip(s string) string { return s[:min(len(s), maxWho)] }

// Bounds of one request and of all; what is asked is small.
const (
	readTimeout    = 5 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = time.Minute
	maxHeader      = 8 << 10 // bytes
	maxBody        = 4 << 10 // bytes
	maxConnections = 256     // more wait in the kernel's queue
	maxAnswers     = 8       // of the API at once, but for streams; more wait
	maxStreams     = 32      // at once; more are refused
	streamShare    = 16      // of them, what one client address may have
)
