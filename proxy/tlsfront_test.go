package proxy

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// signer signs client certificates.
type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newSigner(t testing.TB) *signer {
	t.Helper()
	a := &signer{pool: x509.NewCertPool()}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "clients"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.pool.AddCert(a.cert)
	return a
}

// sign returns a client's certificate.
func (a *signer) sign(t testing.TB, edit func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	edit(template)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func forUser(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.DNSNames = []string{name} }
}

func withURI(text string) func(*x509.Certificate) {
	u, err := url.Parse(text)
	if err != nil {
		panic(err)
	}
	return func(c *x509.Certificate) { c.URIs = []*url.URL{u} }
}

// withTLS gives the Server a TLS listener with the tests' certificate.
func withTLS(edit ...func(*TLS)) func(*Config) {
	return func(c *Config) {
		c.TLS.Listen = []string{"127.0.0.1:0"}
		c.TLS.Certificate = ca().cert
		for _, e := range edit {
			e(&c.TLS)
		}
	}
}

func withClients(a *signer) func(*TLS) {
	return func(c *TLS) { c.ClientCAs = a.pool }
}

// tlsClient is a client of the TLS listener.
type tlsClient struct {
	*tls.Conn
	r *bufio.Reader
	t testing.TB
}

func (g *gate) tlsAddr() string { return g.srv.TLSAddrs()[0].String() }

// dialTLS connects to the TLS listener with the protocols and certificates.
func (g *gate) dialTLS(protocols []string, certs ...tls.Certificate) (*tlsClient, error) {
	g.t.Helper()
	raw, err := net.Dial("tcp", g.tlsAddr())
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { raw.Close() })
	raw.SetDeadline(time.Now().Add(patience))
	c := tls.Client(raw, &tls.Config{ServerName: "proxy.ok.test", RootCAs: ca().pool, NextProtos: protocols, Certificates: certs})
	if err := c.Handshake(); err != nil {
		return nil, err
	}
	return &tlsClient{c, bufio.NewReader(c), g.t}, nil
}

func (c *tlsClient) asks(target, fields string) (*http.Response, string) {
	c.t.Helper()
	fmt.Fprintf(c.Conn, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n%s\r\n", target, fields)
	resp, err := http.ReadResponse(c.r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		c.t.Fatal(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, ""
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp, string(body)
}

func (c *tlsClient) Read(p []byte) (int, error) { return c.r.Read(p) }

// doorPolicy lets everybody on loopback reach ok.test over TLS, and web.ok.test by
// HTTP.
func doorPolicy(ports ...int) string {
	return fmt.Sprintf(`
version: 1
groups:
  - name: net
    sources: [127.0.0.0/8]
    users: [deploy.bot]
    allow:
      - {id: tls, names: [a.ok.test, b.ok.test], ports: [%[1]d], protocol: tls, private_destinations: [127.0.0.0/8]}
      - {id: web, names: [web.ok.test], ports: [%[1]d], protocol: http, private_destinations: [127.0.0.0/8]}
      - {id: tcp, names: [tcp.ok.test], ports: [%[1]d], protocol: tcp, private_destinations: [127.0.0.0/8]}
`, ports[0])
}

func TestTLSListener(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS())
	for _, n := range []string{"a.ok.test", "web.ok.test"} {
		g.resolver.set(n, "127.0.0.1")
	}
	dial := func() *tlsClient {
		t.Helper()
		c, err := g.dialTLS(nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	t.Run("tunnel", func(t *testing.T) {
		c := dial()
		if resp, body := c.asks(fmt.Sprintf("a.ok.test:%d", o.port()), ""); resp.StatusCode != 200 {
			t.Fatalf("%s %s", resp.Status, body)
		}
		served := make(chan error, 1)
		go func() {
			far := tls.Server(o.accept(t), &tls.Config{Certificates: []tls.Certificate{ca().cert}})
			_, err := io.Copy(far, far)
			far.Close()
			served <- err
		}()
		inner := tls.Client(bufferedConn{c.Conn, c.r}, &tls.Config{ServerName: "a.ok.test", RootCAs: ca().pool})
		text := strings.Repeat("through two layers of TLS ", 10000)
		go func() {
			io.WriteString(inner, text)
			inner.CloseWrite()
		}()
		if got, err := io.ReadAll(inner); err != nil || string(got) != text {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		c.Conn.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
		ev := g.next()
		if ev.Listener != "proxy_tls" || ev.SNI != "a.ok.test" || ev.Decision.Rule != "tls" || ev.TLSVersion != tls.VersionTLS13 || ev.BytesDown < int64(len(text)) {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("another name in the hello", func(t *testing.T) {
		c := dial()
		c.asks(fmt.Sprintf("a.ok.test:%d", o.port()), "")
		c.Conn.Write(hello("b.ok.test"))
		if got, err := io.ReadAll(c.r); err != nil || string(got) != string(alertRecord(alertUnrecognizedName)) {
			t.Errorf("%q, %v", got, err)
		}
		if got := o.got(t); got != "" {
			t.Errorf("the origin got %q", got)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonSNIMismatch || ev.Listener != "proxy_tls" {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("plain HTTP", func(t *testing.T) {
		c := dial()
		for _, status := range []int{200, 403} {
			name := map[int]string{200: "web.ok.test", 403: "other.test"}[status]
			fmt.Fprintf(c.Conn, "GET http://%s:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", name, o.port())
			if status == 200 {
				far := o.accept(t)
				far.Read(make([]byte, 4096))
				io.WriteString(far, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
			}
			resp, err := http.ReadResponse(c.r, &http.Request{Method: "GET"})
			if err != nil || resp.StatusCode != status {
				t.Fatalf("%v, %v", resp, err)
			}
			io.Copy(io.Discard, resp.Body)
			if ev := g.next(); ev.Kind != event.HTTP || ev.Listener != "proxy_tls" || ev.Status != status {
				t.Errorf("%+v", ev)
			}
		}
	})
	t.Run("without TLS", func(t *testing.T) {
		raw, err := net.Dial("tcp", g.tlsAddr())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(patience))
		io.WriteString(raw, "CONNECT a.ok.test:443 HTTP/1.1\r\nHost: a.ok.test:443\r\n\r\n")
		if got, _ := io.ReadAll(raw); !strings.HasPrefix(string(got), "HTTP/1.1 400 Bad Request\r\n") {
			t.Errorf("%q", got)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonBadRequest || ev.Error != errIsPlain.Error() {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("old TLS", func(t *testing.T) {
		raw, err := net.Dial("tcp", g.tlsAddr())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(patience))
		err = tls.Client(raw, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}).Handshake()
		if err == nil || !strings.Contains(err.Error(), "protocol version") {
			t.Error(err)
		}
	})
	t.Run("another certificate", func(t *testing.T) {
		a := newSigner(t)
		cert := a.sign(t, func(c *x509.Certificate) {
			c.DNSNames, c.ExtKeyUsage = []string{"proxy.ok.test"}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		})
		g.srv.SetTLS(TLSIdentity{Certificate: cert})
		if _, err := g.dialTLS(nil); err == nil {
			t.Error("the old certificate is in force")
		}
		g.srv.SetTLS(TLSIdentity{Certificate: ca().cert, MinVersion: tls.VersionTLS13})
		c := dial()
		if v := c.ConnectionState().Version; v != tls.VersionTLS13 {
			t.Errorf("version %x", v)
		}
	})
	g.quiet()
}

// bufferedConn is a connection of which r has read ahead.
type bufferedConn struct {
	net.Conn
	r io.Reader
}

func (c bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// A handshake gets as long as a request head, and Shutdown does not wait for one.
func TestSlowHandshake(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS(), func(c *Config) { c.Timeouts.RequestHeader = 50 * time.Millisecond })
	for _, first := range []string{"", string(hello("proxy.ok.test")[:50])} {
		raw, err := net.Dial("tcp", g.tlsAddr())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(patience))
		io.WriteString(raw, first)
		if _, err := io.ReadAll(raw); isTimeout(err) {
			t.Errorf("after %d bytes nothing happens", len(first))
		}
	}
	g.until(func() bool { return g.srv.Stats().Connections == 0 })

	g = start(t, doorPolicy(o.port()), withTLS(), func(c *Config) { c.Timeouts.Drain = patience })
	raw, err := net.Dial("tcp", g.tlsAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	idle, err := g.dialTLS(nil)
	if err != nil {
		t.Fatal(err)
	}
	g.until(func() bool { return g.srv.Stats().Connections == 2 })
	if err := g.srv.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	idle.SetReadDeadline(time.Now().Add(patience))
	if _, err := idle.r.ReadByte(); err == nil || isTimeout(err) {
		t.Errorf("an unused connection: %v", err)
	}
}

func TestClientCertificates(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	a, strangers := newSigner(t), newSigner(t)
	text := strings.Replace(userPolicy(o, nowhere), "users: [anna,", `users: [anna, deploy.bot, "anna@corp.test", "spiffe://corp.test/ns/ci",`, 1)
	named := func(edit func(*x509.Certificate)) []tls.Certificate { return []tls.Certificate{a.sign(t, edit)} }
	for _, tt := range []struct {
		name    string
		certs   []tls.Certificate
		edit    func(*Config)
		fields  string
		status  int // 0: no handshake
		user    string
		problem string
	}{
		{"DNS name", named(forUser("deploy.bot")), nil, "", 200, "deploy.bot", ""},
		{"mail before DNS", named(func(c *x509.Certificate) {
			c.DNSNames, c.EmailAddresses, c.Subject.CommonName = []string{"x"}, []string{"anna@corp.test", "b@corp.test"}, "cn"
		}), nil, "", 200, "anna@corp.test", ""},
		{"common name alone", named(func(c *x509.Certificate) { c.Subject.CommonName = "anna" }), nil, "", 407, "", "names no user"},
		{"common name", named(func(c *x509.Certificate) { c.Subject.CommonName, c.DNSNames = "anna", []string{"x"} }),
			func(c *Config) { c.TLS.UserFrom = UserFromCN }, "", 200, "anna", ""},
		{"not a name", named(func(c *x509.Certificate) { c.Subject.CommonName = "a b\x00" }),
			func(c *Config) { c.TLS.UserFrom = UserFromCN }, "", 407, "", "not the name of a user"},
		{"URI", named(withURI("spiffe://corp.test/ns/ci")), func(c *Config) { c.TLS.UserFrom = UserFromURI }, "", 200, "spiffe://corp.test/ns/ci", ""},
		{"URI that is not asked for", named(withURI("spiffe://corp.test/ns/ci")), nil, "", 407, "", "names no user"},
		{"no URI", named(forUser("anna")), func(c *Config) { c.TLS.UserFrom = UserFromURI }, "", 407, "", "names no user"},
		{"not a SPIFFE ID", named(withURI("urn:anna")), func(c *Config) { c.TLS.UserFrom = UserFromURI }, "", 407, "", "not the name of a user"},
		{"a URI that is too long", named(withURI("spiffe://corp.test/" + strings.Repeat("x", 255))), func(c *Config) { c.TLS.UserFrom = UserFromURI }, "", 407, "", "not the name of a user"},
		{"unlisted", named(forUser("x")), nil, "", 403, "x", ""},
		{"none", nil, nil, "", 407, "", ""},
		{"none, required", nil, func(c *Config) { c.TLS.RequireClient = true }, "", 0, "", ""},
		{"required", named(forUser("deploy.bot")), func(c *Config) { c.TLS.RequireClient, c.Auth.Required = true, true }, "", 200, "deploy.bot", ""},
		{"another authority", []tls.Certificate{strangers.sign(t, forUser("deploy.bot"))}, nil, "", 0, "", ""},
		{"expired", named(func(c *x509.Certificate) {
			c.DNSNames, c.NotAfter = []string{"deploy.bot"}, time.Now().Add(-time.Minute)
		}), nil, "", 0, "", ""},
		{"not for clients", named(func(c *x509.Certificate) {
			c.DNSNames, c.ExtKeyUsage = []string{"deploy.bot"}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), nil, "", 0, "", ""},
		{"and the same password", named(forUser("anna")), nil, basic("anna", theSecret+"anna"), 200, "anna", ""},
		{"and a wrong password", named(forUser("anna")), nil, basic("anna", theSecret), 407, "", "wrong password for user anna"},
		{"and another user", named(forUser("deploy.bot")), nil, basic("anna", theSecret+"anna"), 407, "", "the certificate is of user deploy.bot, the password of user anna"},
		{"without users password is ignored", named(forUser("deploy.bot")), func(c *Config) { c.Auth.Users = nil }, basic("anna", theSecret), 200, "deploy.bot", ""},
		{"required without users", named(forUser("deploy.bot")), func(c *Config) { c.Auth.Users, c.Auth.Required = nil, true }, "", 200, "deploy.bot", ""},
		{"none, required without users", nil, func(c *Config) { c.Auth.Users, c.Auth.Required = nil, true }, basic("anna", theSecret+"anna"), 407, "", ""},
		{"without users nobody is asked", nil, func(c *Config) { c.Auth.Users = nil }, "", 403, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, text, withUsers(usersFile(t, "anna")), withTLS(withClients(a)), func(c *Config) {
				if tt.edit != nil {
					tt.edit(c)
				}
			})
			g.resolver.set("user.test", "127.0.0.1")
			c, err := g.dialTLS(nil, tt.certs...)
			if err == nil && tt.status == 0 {
				_, err = c.r.ReadByte() // with TLS 1.3 the server's answer comes later
			}
			if err != nil || tt.status == 0 {
				if tt.status != 0 || err == nil || isTimeout(err) {
					t.Errorf("handshake: %v", err)
				}
				return
			}
			resp, body := c.asks(fmt.Sprintf("user.test:%d", o.port()), tt.fields)
			if resp.StatusCode != tt.status {
				t.Fatalf("%s %s", resp.Status, body)
			}
			c.Conn.Close()
			if tt.status == 200 {
				o.accept(t).Close()
			}
			ev := g.next()
			noSecrets(t, ev)
			if ev.User != tt.user || !strings.Contains(ev.Error, tt.problem) || ev.Listener != "proxy_tls" {
				t.Errorf("user %q, error %q; want %q, %q", ev.User, ev.Error, tt.user, tt.problem)
			}
		})
	}
}

// No ticket brings back what a client was before.
func TestNoResumptionWithClientCertificates(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	a := newSigner(t)
	g := start(t, userPolicy(o, nowhere), withTLS(withClients(a)))
	cfg := &tls.Config{
		ServerName: "proxy.ok.test", RootCAs: ca().pool, Certificates: []tls.Certificate{a.sign(t, forUser("anna"))},
		ClientSessionCache: tls.NewLRUClientSessionCache(4),
	}
	for range 2 {
		c, err := tls.Dial("tcp", g.tlsAddr(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, "CONNECT other.test:443 HTTP/1.1\r\n\r\n")
		c.Read(make([]byte, 1))
		if c.ConnectionState().DidResume {
			t.Error("resumed")
		}
		c.Close()
		g.next()
	}
	g.srv.SetTLS(TLSIdentity{Certificate: ca().cert, ClientCAs: newSigner(t).pool})
	c, err := tls.Dial("tcp", g.tlsAddr(), cfg)
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		if _, err = c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Errorf("a client of the old authority: %v", err)
		}
	}
}

// A load balancer's header comes before TLS, and its source counts within.
func TestProxyProtocolBeforeTLS(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS(), func(c *Config) {
		c.ProxyProtocol.Trusted = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	})
	for _, proto := range []string{"http/1.1", "h2"} {
		raw, err := net.Dial("tcp", g.tlsAddr())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(patience))
		io.WriteString(raw, "PROXY TCP4 192.0.2.7 192.0.2.8 1234 3129\r\n")
		c := tls.Client(raw, &tls.Config{ServerName: "proxy.ok.test", RootCAs: ca().pool, NextProtos: []string{proto}})
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		if proto == "h2" {
			f := newFramed(t, &tlsClient{c, bufio.NewReader(c), t})
			f.request(1, true, ":method", "CONNECT", ":authority", "a.ok.test:443")
			f.answer(1)
		} else {
			(&tlsClient{c, bufio.NewReader(c), t}).asks("a.ok.test:443", "")
		}
		if ev := g.next(); ev.Source.String() != "192.0.2.7:1234" || ev.Decision.Reason != policy.ReasonUnmatchedSource {
			t.Errorf("%s: %+v", proto, ev)
		}
	}
}
