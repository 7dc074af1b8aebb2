package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// secret is the password of every user, and may be in no output.
const secret = "Tr0ub4dor&3"

// users are lines of an htpasswd file.
func users(t *testing.T, names ...string) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(secret), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, n := range names {
		fmt.Fprintf(&b, "%s:%s\n", n, hash)
	}
	return b.String()
}

// identities are files: users, the proxy's certificate, and clients' certificates.
type identities struct{ dir string }

func (i identities) path(name string) string { return i.dir + "/" + name }

// write puts a file in place by renaming.
func (i identities) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(i.path("."+name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(i.path("."+name), i.path(name)); err != nil {
		t.Fatal(err)
	}
}

// newIdentities writes users, two authorities, and the certificates of the proxy, of a
// client, and of a client of a third authority.
func newIdentities(t *testing.T) identities {
	t.Helper()
	i := identities{t.TempDir()}
	i.write(t, "users", users(t, "anna", "carl"))
	server, clients, strangers := newCA(t, "server"), newCA(t, "clients"), newCA(t, "strangers")
	i.write(t, "server-ca.pem", server.pem())
	i.write(t, "client-ca.pem", clients.pem())
	for name, ca := range map[string]*ca{"proxy": server, "bot": clients, "stranger": strangers} {
		cert, key := ca.sign(t, name)
		i.write(t, name+".pem", cert)
		i.write(t, name+".key", key)
	}
	return i
}

type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t *testing.T, name string) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{cert, key}
}

func (c *ca) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}))
}

// sign returns a certificate for the proxy on 127.0.0.1, or for the user
// name.corp.test, and its key, in PEM.
func (c *ca) sign(t *testing.T, name string) (certificate, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name + ".corp.test"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, c.cert, &k.PublicKey, c.key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}))
}

// withPeople is policyText with a group of users.
func withPeople(w *world) string {
	return policyText(w, "") + fmt.Sprintf(`
  - name: people
    users: [anna, bot.corp.test]
    allow: [{id: people, names: [people.ok.test], ports: [%d, %d], private_destinations: [127.0.0.0/8]}]
`, w.tlsPort, w.httpPort)
}

// noSecrets fails if a password is in anything that the gate has written.
func (g *gate) noSecrets() {
	g.t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	all, err := json.Marshal(g.lines)
	if err != nil {
		g.t.Fatal(err)
	}
	text := strings.ReplaceAll(string(all), `\u0026`, "&") + g.stderr.String()
	for _, s := range []string{secret, base64.StdEncoding.EncodeToString([]byte("anna:" + secret))[:12], "PRIVATE KEY", "$2a$"} {
		if strings.Contains(text, s) {
			g.t.Errorf("%q is in the log", s)
		}
	}
}

func TestCredentials(t *testing.T) {
	w, files := newWorld(t), newIdentities(t)
	g := start(t, w, withPeople(w), "--set", "proxy.auth.htpasswd="+files.path("users"), "--log-level", "debug")
	https := fmt.Sprintf("https://people.ok.test:%d/x", w.tlsPort)
	plain := fmt.Sprintf("http://people.ok.test:%d/headers", w.httpPort)

	for _, scheme := range []string{"--proxy-basic", "--proxy-anyauth"} {
		for _, url := range []string{https, plain} {
			t.Run(scheme+" "+url[:5], func(t *testing.T) {
				m := g.mark()
				out, code := g.curl(noSource, scheme, "-U", "anna:"+secret, "--cacert", w.caFile, "-v", url)
				if code != 0 {
					t.Fatalf("curl: %d %s", code, out)
				}
				if body := out[strings.LastIndex(out, "\n<"):]; strings.Contains(strings.ToLower(body), "authorization") {
					t.Errorf("forwarded:\n%s", body)
				}
				g.line(m, map[string]any{"user": "anna", "group": "people", "verdict": "allow", "status": 200, "rule": "people"})
				if again := strings.Contains(out, "Re-using existing connection"); scheme == "--proxy-anyauth" && !again && !strings.Contains(out, "Connection #0") {
					t.Errorf("the connection did not survive the 407:\n%s", out)
				}
				if scheme == "--proxy-anyauth" {
					g.line(m, map[string]any{"reason": "auth_required", "status": 407})
				}
			})
		}
	}
	for _, c := range []struct{ name, src, user, url, reason, status string }{
		{"none", noSource, "", https, "auth_required", "407"},
		{"none, plain", noSource, "", plain, "auth_required", "407"},
		{"wrong", noSource, "anna:" + secret + "x", https, "auth_failed", "407"},
		{"wrong, known source", ciSource, "anna:" + secret + "x", plain, "auth_failed", "407"},
		{"unlisted user", noSource, "carl:" + secret, https, "unmatched_source", "403"},
		{"known source, not listed", ciSource, "", https, "not_listed", "403"},
		{"known user, not listed", ciSource, "anna:" + secret, fmt.Sprintf("https://api.ok.test:%d/", w.tlsPort), "not_listed", "403"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := g.mark()
			args := []string{"-i", c.url}
			if c.user != "" {
				args = append(args, "-U", c.user)
			}
			out, _ := g.curl(c.src, args...)
			wants(t, "curl -i", out, "HTTP/1.1 "+c.status, "X-Sallyport-Reason: "+c.reason)
			if has := strings.Contains(out, `Proxy-Authenticate: Basic realm="sallyport", charset="UTF-8"`); has != (c.status == "407") {
				t.Errorf("Proxy-Authenticate:\n%s", out)
			}
			g.line(m, map[string]any{"reason": c.reason, "verdict": "deny", "status": c.status})
		})
	}
	t.Run("explain", func(t *testing.T) {
		out, code := g.sallyport("explain", "--source", noSource, "--user", "anna", fmt.Sprintf("people.ok.test:%d", w.tlsPort))
		if code != 0 {
			t.Errorf("explain: %d %s", code, out)
		}
		wants(t, "explain", out, "people (user anna)")
	})
	t.Run("users change", func(t *testing.T) {
		m := g.mark()
		files.write(t, "users", "anna:{SHA}"+secret+"\n")
		g.line(m, map[string]any{"event": "config", "what": "users", "ok": false})
		g.until("readyz says so too", func() bool { // once the policy has had its turn too
			r := g.ready().Policy.LastReload
			return !r.OK && strings.Contains(r.Error, "users:1:6: user anna: the password is hashed with SHA-1")
		})
		if out, code := g.curl(noSource, "-U", "anna:"+secret, plain); code != 0 || !strings.Contains(out, "Host: people") {
			t.Errorf("with a bad file: %d %s", code, out)
		}
		m = g.mark()
		files.write(t, "users", users(t, "bert"))
		g.signal(syscall.SIGHUP) // sooner than the file is looked at
		g.line(m, map[string]any{"message": "users reloaded", "users": 1})
		if out, _ := g.curl(noSource, "-U", "anna:"+secret, plain); !strings.Contains(out, "auth_failed") {
			t.Errorf("a user who is gone: %s", out)
		}
	})
	g.noSecrets()
}

func TestClientCertificates(t *testing.T) {
	w, files := newWorld(t), newIdentities(t)
	g := start(t, w, withPeople(w),
		"--set", "proxy.tls_listen=127.0.0.1:0", "--set", "proxy.tls.certificate="+files.path("proxy.pem"), "--set", "proxy.tls.key="+files.path("proxy.key"),
		"--set", "proxy.tls.client_ca="+files.path("client-ca.pem"), "--set", "proxy.auth.htpasswd="+files.path("users"), "--log-level", "debug")
	secure := g.listener("proxy_tls")
	https := fmt.Sprintf("https://people.ok.test:%d/x", w.tlsPort)
	curl := func(args ...string) (string, int) {
		t.Helper()
		return tool(t, "curl", append([]string{
			"-sS", "--max-time", "15", "--interface", noSource, "-x", "https://" + secure,
			"--proxy-cacert", files.path("server-ca.pem"), "--cacert", w.caFile,
		}, args...)...)
	}
	bot := []string{"--proxy-cert", files.path("bot.pem"), "--proxy-key", files.path("bot.key")}

	t.Run("certificate", func(t *testing.T) {
		for _, url := range []string{https, fmt.Sprintf("http://people.ok.test:%d/x", w.httpPort)} {
			m := g.mark()
			if out, code := curl(append(bot, url)...); code != 0 || !strings.HasPrefix(out, "hello from people.ok.test") {
				t.Fatalf("curl: %d %s", code, out)
			}
			g.line(m, map[string]any{"user": "bot.corp.test", "group": "people", "listener": "proxy_tls", "status": 200})
		}
	})
	t.Run("password", func(t *testing.T) {
		m := g.mark()
		if out, code := curl("--proxy-anyauth", "-U", "anna:"+secret, https); code != 0 {
			t.Fatalf("curl: %d %s", code, out)
		}
		g.line(m, map[string]any{"user": "anna", "listener": "proxy_tls", "status": 200})
	})
	t.Run("both, of two users", func(t *testing.T) {
		out, _ := curl(append(bot, "-i", "-U", "anna:"+secret, https)...)
		wants(t, "curl -i", out, "HTTP/1.1 407", "auth_failed")
	})
	t.Run("wrong authority", func(t *testing.T) {
		out, code := curl("--proxy-cert", files.path("stranger.pem"), "--proxy-key", files.path("stranger.key"), https)
		if code == 0 || !strings.Contains(out, "alert") {
			t.Errorf("curl: %d %s", code, out)
		}
		out, _ = tool(t, "openssl", "s_client", "-connect", secure, "-CAfile", files.path("server-ca.pem"), "-tls1_2",
			"-cert", files.path("stranger.pem"), "-key", files.path("stranger.key"), "-brief")
		wants(t, "openssl", out, "alert")
		g.line(0, map[string]any{"message": "TLS handshake failed", "level": "debug"})
	})
	t.Run("HTTP/2", func(t *testing.T) { g.overHTTP2(t, w, files, secure, curl, bot) })
	t.Run("another certificate", func(t *testing.T) {
		m := g.mark()
		files.write(t, "proxy.pem", "not PEM")
		g.signal(syscall.SIGHUP)
		g.line(m, map[string]any{"event": "config", "what": "certificates", "ok": false})
		if out, code := curl(append(bot, https)...); code != 0 {
			t.Errorf("with a bad file: %d %s", code, out)
		}
		m = g.mark()
		fresh := newCA(t, "fresh")
		cert, key := fresh.sign(t, "proxy")
		files.write(t, "proxy.key", key)
		files.write(t, "proxy.pem", cert)
		g.line(m, map[string]any{"message": "certificate reloaded"})
		if _, code := curl(append(bot, https)...); code != 60 {
			t.Errorf("curl takes the new certificate for the old one: %d", code)
		}
		files.write(t, "server-ca.pem", fresh.pem())
		if out, code := curl(append(bot, https)...); code != 0 {
			t.Errorf("curl: %d %s", code, out)
		}
	})
	g.noSecrets()
}

// overHTTP2 opens tunnels as streams of one connection: with curl where it can, and
// with net/http.
func (g *gate) overHTTP2(t *testing.T, w *world, files identities, secure string, curl func(...string) (string, int), bot []string) {
	if help, _ := tool(t, "curl", "--help", "all"); strings.Contains(help, "--proxy-http2") { // since 8.1.0
		out, code := curl(append(bot, "--proxy-http2", "-v", fmt.Sprintf("https://people.ok.test:%d/x", w.tlsPort))...)
		if code != 0 {
			t.Errorf("curl: %d %s", code, out)
		}
		wants(t, "curl -v", out, "CONNECT tunnel: HTTP/2 negotiated")
	} else {
		t.Log("this curl has no --proxy-http2; net/http alone is the client")
	}
	roots := x509.NewCertPool()
	pem, err := os.ReadFile(files.path("server-ca.pem"))
	if err != nil || !roots.AppendCertsFromPEM(pem) {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(files.path("bot.pem"), files.path("bot.key"))
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}, ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	m := g.mark()
	for range 3 {
		r, up := io.Pipe()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodConnect, "https://"+secure, r)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = fmt.Sprintf("people.ok.test:%d", w.tlsPort)
		resp, err := tr.RoundTrip(req)
		if err != nil || resp.StatusCode != 200 || resp.ProtoMajor != 2 {
			t.Fatalf("%+v, %v", resp, err)
		}
		near, far := net.Pipe()
		go func() { io.Copy(up, far); up.Close() }()
		go func() { io.Copy(far, resp.Body); far.Close() }()
		caPEM, err := os.ReadFile(w.caFile)
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(caPEM)
		inner := tls.Client(near, &tls.Config{ServerName: "people.ok.test", RootCAs: pool})
		fmt.Fprintf(inner, "GET /big HTTP/1.1\r\nHost: people.ok.test\r\nConnection: close\r\n\r\n")
		if got, err := io.ReadAll(inner); err != nil || len(got) < 8<<20 {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		inner.Close()
		resp.Body.Close()
	}
	l := g.line(m, map[string]any{"event": "connect", "listener": "proxy_tls", "user": "bot.corp.test", "sni": "people.ok.test", "tls_version": "1.3", "status": 200})
	if n, ok := l["bytes_down"].(float64); !ok || n < 8<<20 {
		t.Errorf("bytes_down %v", l["bytes_down"])
	}
}
