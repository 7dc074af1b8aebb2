package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
)

// TestEncryptedResolver asks over TLS and HTTPS as people's programs do.
func TestEncryptedResolver(t *testing.T) {
	w, files := newWorld(t), newIdentities(t)
	g := start(t, w, policyText(w, "")+fmt.Sprintf(`
  - name: here
    sources: [127.0.0.1]
    allow: [{id: here, names: [api.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}]
`, w.httpPort),
		"--set", "dns.tls_listen=127.0.0.1:0", "--set", "dns.https_listen=127.0.0.1:0",
		"--set", "dns.tls.certificate="+files.path("proxy.pem"), "--set", "dns.tls.key="+files.path("proxy.key"))
	addr := map[string]string{"dns_tls": g.listener("dns_tls"), "dns_https": g.listener("dns_https")}
	// ask runs dig or kdig against a listener, which shows a certificate for proxy.corp.test.
	ask := func(t *testing.T, program, listener, src string, args ...string) string {
		t.Helper()
		host, port, err := net.SplitHostPort(addr[listener])
		if err != nil {
			t.Fatal(err)
		}
		out, _ := tool(t, program, append([]string{"-b", src, "@" + host, "-p", port, "+tls-ca=" + files.path("server-ca.pem"), "+tls-hostname=proxy.corp.test"}, args...)...)
		return out
	}
	for _, tt := range []struct {
		program, listener string
		args              []string
	}{
		{"dig", "dns_tls", []string{"+tls"}},
		{"dig", "dns_https", []string{"+https"}},
		{"dig", "dns_https", []string{"+https-get"}},
		{"kdig", "dns_tls", []string{"+tls", "+padding"}},
		{"kdig", "dns_https", []string{"+https", "+padding"}},
	} {
		t.Run(tt.program+" "+tt.args[0], func(t *testing.T) {
			m := g.mark()
			ask := func(src, name string, more ...string) string {
				t.Helper()
				return ask(t, tt.program, tt.listener, src, append(append([]string{name}, tt.args...), more...)...)
			}
			wants(t, "allowed", ask(ciSource, "api.ok.test"), "status: NOERROR", originAddr)
			wants(t, "refused", ask(ciSource, "other.test"), "status: REFUSED")
			wants(t, "another source", ask(noSource, "api.ok.test"), "status: REFUSED")
			g.line(m, map[string]any{"event": "dns", "listener": tt.listener, "verdict": "allow", "rule": "api", "src": ciSource})
			g.line(m, map[string]any{"event": "dns", "listener": tt.listener, "verdict": "deny", "reason": "unmatched_source", "src": noSource})
			if tt.program == "kdig" {
				wants(t, "padded", ask(ciSource, "api.ok.test"), "Received 468 B")
			}
		})
	}
	t.Run("curl --doh-url", func(t *testing.T) {
		m := g.mark()
		url := "https://" + addr["dns_https"] + "/dns-query"
		out, code := tool(t, "curl", "-sS", "--max-time", "15", "--doh-url", url, "--cacert", files.path("server-ca.pem"),
			fmt.Sprintf("http://api.ok.test:%d/x", w.httpPort))
		if code != 0 || !strings.HasPrefix(out, "hello from api.ok.test") {
			t.Fatalf("curl: %d %s", code, out)
		}
		g.line(m, map[string]any{"event": "dns", "listener": "dns_https", "verdict": "allow", "rule": "here", "qtype": "A"})
		if out, code := tool(t, "curl", "-sS", "--max-time", "15", "--doh-url", url, "--cacert", files.path("server-ca.pem"), "http://other.test/"); code == 0 {
			t.Errorf("curl reaches what is not listed: %s", out)
		}
		out, _ = tool(t, "curl", "-sS", "-i", "--max-time", "15", "--cacert", files.path("server-ca.pem"), url)
		wants(t, "without a query", out, "HTTP/2 400", "cache-control: no-store")
	})
	t.Run("openssl", func(t *testing.T) {
		out, _ := tool(t, "sh", "-c", "openssl s_client -brief -alpn dot -verify_return_error -CAfile "+files.path("server-ca.pem")+" -connect "+addr["dns_tls"]+" </dev/null 2>&1")
		wants(t, "openssl", out, "TLSv1.3", "Verification: OK")
	})
	t.Run("another certificate", func(t *testing.T) {
		m := g.mark()
		files.write(t, "proxy.pem", "not PEM")
		g.line(m, map[string]any{"event": "config", "what": "certificates", "ok": false})
		wants(t, "with a bad file", ask(t, "dig", "dns_tls", ciSource, "+tls", "api.ok.test"), "status: NOERROR")
		m = g.mark()
		cert, key := newCA(t, "fresh").sign(t, "proxy")
		files.write(t, "proxy.key", key)
		files.write(t, "proxy.pem", cert)
		g.line(m, map[string]any{"message": "certificate of the resolver reloaded"})
		if out := ask(t, "dig", "dns_tls", ciSource, "+tls", "api.ok.test"); strings.Contains(out, "NOERROR") {
			t.Errorf("dig takes the new certificate for the old one:\n%s", out)
		}
	})
	wants(t, "metrics", g.metrics(), `sallyport_tls_certificate_expiry_timestamp_seconds{section="dns.tls"} `,
		`sallyport_decisions_total{group="ci",listener="dns_tls",reason="matched",verdict="allow"}`,
		`sallyport_decisions_total{group="",listener="dns_https",reason="unmatched_source",verdict="deny"}`)
	// Whoever is told of queries is told of these too, with their door.
	_, live := g.api("GET", "decisions?listener=dns_tls&verdict=allow&limit=1", nil)
	wants(t, "decisions", live, `"listener":"dns_tls"`, `"name":"api.ok.test"`)
	_, seen := g.api("GET", "discovery?group=ci&verdict=allow", nil)
	wants(t, "discovery", seen, `"dns_https","dns_tls"`, `"name":"api.ok.test"`)
	if st := g.ready(); !st.Ready {
		t.Errorf("readyz: %+v", st)
	}
}
