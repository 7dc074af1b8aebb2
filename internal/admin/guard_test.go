package admin

import (
	"context"
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
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const token = "0123456789abcdef0123456789abcdef"

// changes counts what was changed.
func changes(api *API) *atomic.Int32 {
	var n atomic.Int32
	api.Drain = func(string) { n.Add(1) }
	api.CloseTunnel = func(string, string) bool { n.Add(1); return true }
	api.Reload = func(context.Context, string) (Outcome, error) { n.Add(1); return Outcome{}, nil }
	return &n
}

// TestT70AdminRebinding has a page reach loopback by a name of its own.
func TestT70AdminRebinding(t *testing.T) {
	api := fullAPI()
	n := changes(&api)
	url := serveConfig(t, Config{API: api, Hosts: []string{"gate.corp.example", "Other.Example."}})
	for _, host := range []string{
		"127.0.0.1", "127.0.0.1:9128", "127.0.0.1:1", "[::1]", "[::1]:9128", "10.1.2.3", "localhost", "LOCALHOST:9128", "localhost.", "gate.corp.example:9128",
		"GATE.corp.example", "other.example",
	} {
		if _, resp, body := request(t, "GET", url+"/api/v1/status", "Host", host); resp.StatusCode != 200 {
			t.Errorf("%s: %d %s", host, resp.StatusCode, body)
		}
	}
	for _, host := range []string{
		"evil.test", "evil.test:9128", "127.0.0.1.evil.test", "localhost.evil.test", "xlocalhost", "corp.example", "a.gate.corp.example", "2130706433", "0x7f.1", "127.1", "sallyport",
	} {
		for _, path := range []string{"/", "/healthz", "/readyz", "/metrics", "/proxy.pac", "/api/v1/policy", "/api/v1/decisions"} {
			if _, resp, body := request(t, "GET", url+path, "Host", host); resp.StatusCode != 421 || strings.Contains(body, "revision") {
				t.Errorf("%s%s: %d %s", host, path, resp.StatusCode, body)
			}
		}
		request(t, "POST", url+"/api/v1/drain", "Host", host, "Origin", "http://"+host, "Sec-Fetch-Site", "same-origin")
	}
	if n.Load() != 0 {
		t.Errorf("%d changes", n.Load())
	}
}

// TestT70AdminOtherOrigins has a hostile page in the browser of somebody who may do everything.
func TestT70AdminOtherOrigins(t *testing.T) {
	api := fullAPI()
	n := changes(&api)
	url := serveConfig(t, Config{API: api})
	host := strings.TrimPrefix(url, "http://")
	refused := func(name, method, path string, header ...string) {
		t.Helper()
		_, resp, body := request(t, method, url+path, header...)
		if resp.StatusCode != http.StatusForbidden || resp.Header.Get("Access-Control-Allow-Origin") != "" || resp.Header.Get("Access-Control-Allow-Headers") != "" {
			t.Errorf("%s: %d %v %s", name, resp.StatusCode, resp.Header, body)
		}
	}
	refused("fetch", "GET", "/api/v1/policy", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "empty")
	refused("fetch with CORS", "GET", "/api/v1/policy", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "cors", "Origin", "https://evil.test")
	refused("another port", "GET", "/api/v1/policy", "Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "cors", "Origin", "http://127.0.0.1:8000")
	refused("script", "GET", "/api/v1/policy", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "script")
	refused("event source", "GET", "/api/v1/decisions", "Accept", "text/event-stream", "Sec-Fetch-Site", "cross-site", "Origin", "https://evil.test")
	refused("frame", "GET", "/", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe")
	refused("an old browser, CORS", "GET", "/api/v1/policy", "Origin", "https://evil.test")
	refused("a sandbox", "GET", "/api/v1/policy", "Origin", "null")
	refused("preflight", "OPTIONS", "/api/v1/drain", "Origin", "https://evil.test", "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", ClientHeader)
	for _, path := range []string{"/api/v1/drain", "/api/v1/reload"} {
		refused("post", "POST", path, "Sec-Fetch-Site", "cross-site", "Origin", "https://evil.test")
		refused("post, old browser", "POST", path, "Origin", "https://evil.test")
		refused("post, another port", "POST", path, "Origin", "http://127.0.0.1:8000")
		refused("post, null", "POST", path, "Origin", "null")
		refused("form without origin", "POST", path, ClientHeader, "", "Content-Type", "application/x-www-form-urlencoded")
		refused("form as text", "POST", path, ClientHeader, "", "Content-Type", "text/plain")
		refused("form as JSON text", "POST", path, ClientHeader, "", "Content-Type", "text/plain; application/json")
		refused("nothing", "POST", path, ClientHeader, "")
		refused("form that was followed", "POST", path, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document")
	}
	refused("delete", "DELETE", "/api/v1/tunnels/i", "Sec-Fetch-Site", "cross-site")
	if n.Load() != 0 {
		t.Errorf("%d changes", n.Load())
	}
	for _, path := range []string{"/api/v1/drain", "/api/v1/reload", "/api/v1/tunnels/i"} {
		if _, resp, _ := request(t, "GET", url+path); resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("GET %s: %d", path, resp.StatusCode)
		}
	}
	if n.Load() != 0 {
		t.Errorf("%d changes by GET", n.Load())
	}

	allowed := func(name, method, path string, header ...string) {
		t.Helper()
		if _, resp, body := request(t, method, url+path, header...); resp.StatusCode >= 300 {
			t.Errorf("%s: %d %s", name, resp.StatusCode, body)
		}
	}
	allowed("a link from the wiki", "GET", "/", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document")
	allowed("typed", "GET", "/api/v1/status", "Sec-Fetch-Site", "none")
	allowed("the dashboard", "GET", "/api/v1/policy", "Sec-Fetch-Site", "same-origin", "Sec-Fetch-Mode", "cors")
	allowed("its buttons", "POST", "/api/v1/reload", "Sec-Fetch-Site", "same-origin", "Origin", "http://"+host)
	allowed("a script", "POST", "/api/v1/reload", ClientHeader, "", "Content-Type", "application/json; charset=utf-8")
	allowed("delete", "DELETE", "/api/v1/tunnels/i", "Sec-Fetch-Site", "same-origin")
	if n.Load() != 3 {
		t.Errorf("%d changes, want 3", n.Load())
	}
}

func TestSecurityHeaders(t *testing.T) {
	pages := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "page") })
	url := serveConfig(t, Config{API: fullAPI(), Pages: pages})
	for path, policy := range map[string]string{
		"/api/v1/status": "default-src 'none'; frame-ancestors 'none'", "/metrics": "default-src 'none'; frame-ancestors 'none'", "/": "script-src 'self'",
		"/any/page": "script-src 'self'", "/api/v1/report?output=html": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
		"/api/v1/nothing": "default-src 'none'; frame-ancestors 'none'",
	} {
		_, resp, _ := request(t, "GET", url+path)
		h := resp.Header
		if csp := h.Get("Content-Security-Policy"); !strings.Contains(csp, policy) || strings.Contains(csp, "unsafe-eval") || strings.Contains(csp, "script-src 'unsafe") || !strings.Contains(csp, "frame-ancestors 'none'") {
			t.Errorf("%s: %s", path, csp)
		}
		for k, v := range map[string]string{
			"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store",
			"Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
		} {
			if h.Get(k) != v {
				t.Errorf("%s: %s: %q", path, k, h.Get(k))
			}
		}
	}
}

func TestToken(t *testing.T) {
	api := fullAPI()
	n := changes(&api)
	url, s := serveServer(t, Config{API: api, Credentials: Credentials{Token: token}})
	for _, path := range []string{"/", "/metrics", "/api/v1/status", "/api/v1/openapi.yaml", "/api/v1/nothing", "/nothing", "//healthz", "/healthz/", "/readyz/../api/v1/policy"} {
		for name, auth := range map[string]string{
			"missing": "", "wrong": "Bearer " + strings.Repeat("0", 32), "empty": "Bearer ", "prefix": "Bearer " + token[:31], "longer": "Bearer " + token + "0",
			"scheme alone": "Bearer", "other scheme": "Digest " + token, "bare": token, "as user": "Basic " + basic(token, ""), "wrong password": "Basic " + basic("admin", "x"),
			"no base64": "Basic " + token,
		} {
			_, resp, body := request(t, "GET", url+path, "Authorization", auth)
			if resp.StatusCode != http.StatusUnauthorized || len(resp.Header.Values("WWW-Authenticate")) != 2 || strings.Contains(body, token) {
				t.Errorf("%s, %s: %d %v %s", path, name, resp.StatusCode, resp.Header, body)
			}
		}
	}
	request(t, "POST", url+"/api/v1/drain")
	request(t, "DELETE", url+"/api/v1/tunnels/i")
	if n.Load() != 0 {
		t.Fatal("changed without a token")
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if _, resp, _ := request(t, "GET", url+path); resp.StatusCode == http.StatusUnauthorized {
			t.Errorf("%s: %d", path, resp.StatusCode)
		}
	}
	for _, auth := range []string{"Bearer " + token, "bearer  " + token + " ", "Basic " + basic("anybody", token), "Basic " + basic("", token)} {
		for _, path := range []string{"/", "/metrics", "/api/v1/policy"} {
			if _, resp, _ := request(t, "GET", url+path, "Authorization", auth); resp.StatusCode != 200 {
				t.Errorf("%s, %s: %d", path, auth, resp.StatusCode)
			}
		}
	}
	// A browser that knows the password sends it for pages of other origins too.
	if _, resp, _ := request(t, "POST", url+"/api/v1/drain", "Authorization", "Basic "+basic("a", token), "Origin", "https://evil.test"); resp.StatusCode != http.StatusForbidden || n.Load() != 0 {
		t.Errorf("%d", resp.StatusCode)
	}

	s.SetCredentials(Credentials{Token: token + "new"})
	if _, resp, _ := request(t, "GET", url+"/api/v1/policy", "Authorization", "Bearer "+token); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("the old token: %d", resp.StatusCode)
	}
	if _, resp, _ := request(t, "GET", url+"/api/v1/policy", "Authorization", "Bearer "+token+"new"); resp.StatusCode != 200 {
		t.Errorf("the new token: %d", resp.StatusCode)
	}
}

func basic(user, password string) string {
	r := httptest.NewRequest("GET", "/", nil)
	r.SetBasicAuth(user, password)
	return strings.TrimPrefix(r.Header.Get("Authorization"), "Basic ")
}

// TestExposed has an address beyond loopback come past the settings.
func TestExposed(t *testing.T) {
	for _, listen := range []string{"0.0.0.0:0", ":0"} {
		s := New(Config{Listen: listen, Metrics: http.NotFoundHandler()})
		if err := s.Listen(); err != nil {
			t.Fatal(err)
		}
		if err := s.Serve(t.Context()); err == nil || !strings.Contains(err.Error(), "beyond loopback the admin server wants a token or client certificates") {
			t.Errorf("%s: %v", listen, err)
		}
	}
	url, _ := serveServer(t, Config{Listen: "0.0.0.0:0", Credentials: Credentials{Token: token}})
	_, port, err := net.SplitHostPort(strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	if _, resp, _ := request(t, "GET", "http://127.0.0.1:"+port+"/api/v1/status", "Authorization", "Bearer "+token); resp.StatusCode != 200 {
		t.Errorf("%d", resp.StatusCode)
	}
	if _, resp, _ := request(t, "GET", "http://127.0.0.1:"+port+"/api/v1/status", "Authorization", "Bearer "+token, "Host", "evil.test"); resp.StatusCode != 421 {
		t.Errorf("over loopback, for another host: %d", resp.StatusCode)
	}
}

func TestOpenMetrics(t *testing.T) {
	url := serveConfig(t, Config{Credentials: Credentials{Token: token}, OpenMetrics: true})
	if _, resp, _ := request(t, "GET", url+"/metrics"); resp.StatusCode != 200 {
		t.Errorf("%d", resp.StatusCode)
	}
	if _, resp, _ := request(t, "GET", url+"/api/v1/status"); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("%d", resp.StatusCode)
	}
}

// certificate returns one for name, signed by ca or by itself.
func certificate(t *testing.T, name string, ca *tls.Certificate, until time.Time) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: until,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		IsCA: ca == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	parent, signer := template, any(key)
	if ca != nil {
		parent, signer = ca.Leaf, ca.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func TestClientCertificates(t *testing.T) {
	later := time.Now().Add(time.Hour)
	ca, other := certificate(t, "operators", nil, later), certificate(t, "others", nil, later)
	server := certificate(t, "gate", nil, later)
	pool, roots := x509.NewCertPool(), x509.NewCertPool()
	pool.AddCert(ca.Leaf)
	roots.AddCert(server.Leaf)
	api := fullAPI()
	url, s := serveServer(t, Config{API: api, Credentials: Credentials{Token: token, Certificate: &server, ClientCAs: pool}})
	if got := s.CertificateExpiry(); !got.Equal(server.Leaf.NotAfter) {
		t.Errorf("the certificate expires at %v, want %v", got, server.Leaf.NotAfter)
	}
	var idle []*http.Transport
	defer func() {
		for _, tr := range idle {
			tr.CloseIdleConnections()
		}
	}()
	client := func(certs ...tls.Certificate) *http.Client {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: certs}, ForceAttemptHTTP2: true}
		idle = append(idle, tr)
		return &http.Client{Transport: tr}
	}
	ask := func(c *http.Client, path, auth string) (int, error) {
		r, err := http.NewRequest("GET", url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if auth != "" {
			r.Header.Set("Authorization", auth)
		}
		resp, err := c.Do(r)
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		return resp.StatusCode, nil
	}
	good := client(certificate(t, "anna", &ca, later))
	check := func(name string, c *http.Client, path, auth string, want int) {
		t.Helper()
		if got, err := ask(c, path, auth); got != want {
			t.Errorf("%s: %d, %v, want %d", name, got, err, want)
		}
	}
	check("an operator", good, "/api/v1/policy", "", 200)
	check("nobody", client(), "/api/v1/policy", "", 401)
	check("a probe", client(), "/readyz", "", 503) // which is not ready in this test
	check("the token", client(), "/api/v1/policy", "Bearer "+token, 200)
	for name, cert := range map[string]tls.Certificate{
		"a stranger": certificate(t, "eve", &other, later), "expired": certificate(t, "old", &ca, time.Now().Add(-time.Minute)),
	} {
		if got, err := ask(client(cert), "/api/v1/policy", ""); err == nil && got == 200 {
			t.Errorf("%s: %d", name, got)
		}
	}
	// The connection of an operator stays, and another authority is in force.
	strangers := x509.NewCertPool()
	strangers.AddCert(other.Leaf)
	s.SetCredentials(Credentials{Certificate: &server, ClientCAs: strangers})
	check("no longer an operator", good, "/api/v1/policy", "", 403)
	check("the token that is no more", client(), "/api/v1/policy", "Bearer "+token, 403)
	check("the other authority", client(certificate(t, "eve", &other, later)), "/api/v1/policy", "", 200)

	// It speaks no plain HTTP.
	resp, err := http.Get("http" + strings.TrimPrefix(url, "https") + "/healthz")
	if err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("plain HTTP: %d", resp.StatusCode)
		}
	}
}

func TestBoundsOfRequests(t *testing.T) {
	url := serveConfig(t, Config{API: fullAPI()})
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n", strings.Repeat("x", 64<<10))
	b := make([]byte, 12)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "HTTP/1.1 431" {
		t.Errorf("%q, %v", b, err)
	}
}
