package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
)

// Sources of the two groups, and one of no group.
const (
	ciSource  = "127.0.1.1"
	webSource = "127.0.2.1"
	noSource  = "127.0.3.1"
)

// policyText is the policy of these tests; more is added to the allow rules of ci.
func policyText(w *world, more string) string {
	return fmt.Sprintf(`
version: 1
unmatched_source: deny
lists:
  - {name: threats, names: [.evil.test]}
deny:
  - {names: ["@threats"], reason: threat feed}
groups:
  - name: ci
    sources: [127.0.1.0/24]
    allow:
      - {id: api, names: [api.ok.test, alias.ok.test, gone.ok.test], ports: [%[1]d, %[2]d], private_destinations: [127.0.0.0/8]}
      - {id: cdn, names: ["*.cdn.test"], ports: [%[1]d], private_destinations: [127.0.0.0/8]}
      - {id: rebind, names: [rebind.ok.test], ports: [%[1]d], private_destinations: [127.0.0.0/8]}
      - {id: echo, names: [echo.ok.test], ports: [%[3]d], protocol: tcp, private_destinations: [127.0.0.0/8]}
      - {id: dead, names: [dead.ok.test], ports: [1], private_destinations: [127.0.0.0/8]}
%[4]s
  - name: web
    sources: [127.0.2.0/24]
    mode: observe
    observe_until: 2999-12-31
    allow: [{id: web, names: [web.ok.test], ports: [%[1]d], private_destinations: [127.0.0.0/8]}]
`, w.tlsPort, w.httpPort, w.echoPort, more)
}

func (g *gate) curl(src string, args ...string) (string, int) {
	g.t.Helper()
	return tool(g.t, "curl", append([]string{"-sS", "--max-time", "15", "--interface", src, "-x", "http://" + g.proxy}, args...)...)
}

func (g *gate) dig(src string, args ...string) string {
	g.t.Helper()
	host, port, err := net.SplitHostPort(g.dns)
	if err != nil {
		g.t.Fatal(err)
	}
	out, _ := tool(g.t, "dig", append([]string{"-b", src, "@" + host, "-p", port, "+tries=1", "+time=10"}, args...)...)
	return out
}

func wants(t *testing.T, what, got string, want ...string) {
	t.Helper()
	for _, s := range want {
		if !strings.Contains(got, s) {
			t.Errorf("%s lacks %q:\n%s", what, s, got)
		}
	}
}

func TestCONNECT(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	origin := fmt.Sprintf("api.ok.test:%d", w.tlsPort)

	t.Run("allowed", func(t *testing.T) {
		m := g.mark()
		out, code := g.curl(ciSource, "--cacert", w.caFile, "https://"+origin+"/x")
		if code != 0 || out != "hello from "+origin+"/x" {
			t.Fatalf("curl: %d %s", code, out)
		}
		l := g.line(m, map[string]any{"event": "connect", "verdict": "allow", "name": "api.ok.test"})
		for k, v := range map[string]any{
			"reason": "matched", "rule": "api", "group": "ci", "mode": "enforce", "src": ciSource, "sni": "api.ok.test",
			"dst": originAddr, "status": 200, "listener": "proxy", "method": "CONNECT", "tls_version": "1.3",
		} {
			if fmt.Sprint(l[k]) != fmt.Sprint(v) {
				t.Errorf("event: %s = %v, want %v", k, l[k], v)
			}
		}
		if l["bytes_down"].(float64) < 500 || l["policy"] != g.ready().Policy.Revision {
			t.Errorf("event: bytes_down %v, policy %v", l["bytes_down"], l["policy"])
		}
	})
	t.Run("bulk", func(t *testing.T) {
		out, code := g.curl(ciSource, "--cacert", w.caFile, "-o", "/dev/null", "-w", "%{size_download}", "https://"+origin+"/big")
		if code != 0 || out != "8388608" {
			t.Errorf("curl: %d %s", code, out)
		}
	})
	t.Run("not listed", func(t *testing.T) {
		m, asked := g.mark(), w.questions.Load()
		out, code := g.curl(ciSource, "-i", "https://other.test/")
		if code != 56 && code != 22 && code != 7 {
			t.Errorf("curl exits with %d", code)
		}
		wants(t, "curl -i", out, "HTTP/1.1 403 Forbidden by egress policy", `Proxy-Status: sallyport; error=http_request_denied; details="not_listed"`,
			"X-Sallyport-Reason: not_listed", "X-Sallyport-Id: ", "Cache-Control: no-store")
		g.line(m, map[string]any{"event": "connect", "verdict": "deny", "reason": "not_listed", "name": "other.test", "status": 403})
		if n := w.questions.Load() - asked; n != 0 {
			t.Errorf("%d DNS queries for a denied name", n)
		}
	})
	t.Run("refusal body", func(t *testing.T) {
		c := dialFrom(t, ciSource, g.proxy)
		io.WriteString(c, "CONNECT other.test:443 HTTP/1.1\r\nHost: other.test:443\r\nAccept: application/json\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: "GET"})
		if err != nil {
			t.Fatal(err)
		}
		var body map[string]any
		if err := json.NewDecoder(resp.Body).Decode(&body); err != nil {
			t.Fatal(err)
		}
		if body["reason"] != "not_listed" || body["help_url"] != "https://wiki.example/egress" || body["name"] != "other.test" {
			t.Errorf("body %v", body)
		}
	})
	for _, c := range []struct{ name, src, host, reason string }{
		{"guardrail", ciSource, "www.evil.test:443", "explicit_deny"},
		{"port", ciSource, "api.ok.test:22", "port_not_allowed"},
		{"literal", ciSource, "93.184.216.34:443", "ip_literal"},
		{"IPv6 literal", ciSource, "[::1]:443", "ip_literal"},
		{"unknown source", noSource, "api.ok.test:443", "unmatched_source"},
		{"rebinding", ciSource, fmt.Sprintf("rebind.ok.test:%d", w.tlsPort), "private_destination"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := g.mark()
			out, _ := g.curl(c.src, "-i", "https://"+c.host+"/")
			wants(t, "curl -i", out, "403 Forbidden by egress policy", "X-Sallyport-Reason: "+c.reason)
			g.line(m, map[string]any{"event": "connect", "verdict": "deny", "reason": c.reason})
		})
	}
	for _, c := range []struct{ name, host, status, reason string }{
		{"name that does not exist", fmt.Sprintf("gone.ok.test:%d", w.tlsPort), "502", "resolve_failed"},
		{"nobody listens", "dead.ok.test:1", "502", "connect_failed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := g.mark()
			out, _ := g.curl(ciSource, "-i", "https://"+c.host+"/")
			wants(t, "curl -i", out, "HTTP/1.1 "+c.status, "Proxy-Status: sallyport; error=")
			g.line(m, map[string]any{"event": "connect", "reason": c.reason})
		})
	}
	t.Run("bad targets", func(t *testing.T) {
		for _, target := range []string{"api.ok.test", "api.ok.test:0", "api.ok.test:0443", "api.ok.test:65536", "a..b:443", "2130706433:443",
			"api.ok.test@evil.test:443", "api.ok.test%00.evil.test:443", "[fe80::1%25eth0]:443", "evil.test/api.ok.test:443"} {
			c := dialFrom(t, ciSource, g.proxy)
			fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: api.ok.test\r\n\r\n", target)
			line, err := bufio.NewReader(c).ReadString('\n')
			if err != nil || !strings.HasPrefix(line, "HTTP/1.1 400 ") {
				t.Errorf("CONNECT %q: %q, %v", target, line, err)
			}
			c.Close()
		}
	})
	t.Run("SNI mismatch", func(t *testing.T) {
		m, hits := g.mark(), w.hits.Load()
		out, code := g.curl(ciSource, "--cacert", w.caFile, "--connect-to", fmt.Sprintf("hidden.cdn.test:%d:%s", w.tlsPort, origin),
			fmt.Sprintf("https://hidden.cdn.test:%d/", w.tlsPort))
		if code != 35 {
			t.Errorf("curl exits with %d: %s", code, out)
		}
		wants(t, "curl", out, "unrecognized name")
		g.line(m, map[string]any{"event": "connect", "verdict": "deny", "reason": "sni_mismatch", "sni": "hidden.cdn.test", "name": "api.ok.test"})
		if w.hits.Load() != hits {
			t.Error("the origin was reached")
		}
	})
	t.Run("no SNI", func(t *testing.T) {
		m := g.mark()
		out, _ := tool(t, "openssl", "s_client", "-bind", ciSource+":0", "-proxy", g.proxy, "-connect", origin, "-noservername")
		wants(t, "openssl", out, "alert")
		g.line(m, map[string]any{"event": "connect", "verdict": "deny", "reason": "sni_missing"})
	})
	t.Run("not TLS", func(t *testing.T) {
		m := g.mark()
		c := dialFrom(t, ciSource, g.proxy)
		fmt.Fprintf(c, "CONNECT x.cdn.test:%d HTTP/1.1\r\n\r\n", w.tlsPort)
		r := bufio.NewReader(c)
		if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 200 ") {
			t.Fatalf("%q, %v", line, err)
		}
		io.WriteString(c, "SSH-2.0-OpenSSH_9.9\r\n")
		g.line(m, map[string]any{"event": "connect", "verdict": "deny", "reason": "not_tls"})
	})
	t.Run("silence", func(t *testing.T) {
		m := g.mark()
		c := dialFrom(t, ciSource, g.proxy)
		fmt.Fprintf(c, "CONNECT x.cdn.test:%d HTTP/1.1\r\n\r\n", w.tlsPort)
		g.line(m, map[string]any{"event": "connect", "verdict": "deny", "reason": "hello_timeout"})
	})
	t.Run("gone in the middle of the hello", func(t *testing.T) {
		m := g.mark()
		c := dialFrom(t, ciSource, g.proxy)
		fmt.Fprintf(c, "CONNECT x.cdn.test:%d HTTP/1.1\r\n\r\n\x16\x03\x01\x02\x00\x01\x00", w.tlsPort)
		c.Close()
		g.line(m, map[string]any{"event": "connect", "name": "x.cdn.test", "verdict": "deny"})
	})
	t.Run("tcp, the server speaks first", func(t *testing.T) {
		c := dialFrom(t, ciSource, g.proxy)
		fmt.Fprintf(c, "CONNECT echo.ok.test:%d HTTP/1.1\r\n\r\nearly\n", w.echoPort)
		r := bufio.NewReader(c)
		if _, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"}); err != nil {
			t.Fatal(err)
		}
		c.(*net.TCPConn).CloseWrite()
		got, err := io.ReadAll(r)
		if err != nil || string(got) != "220 welcome\r\nearly\n" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("observe", func(t *testing.T) {
		m := g.mark()
		// The address check holds even there: these names live on loopback.
		out, _ := g.curl(webSource, "-i", "https://"+origin+"/")
		wants(t, "curl -i", out, "X-Sallyport-Reason: private_destination")
		g.line(m, map[string]any{"event": "connect", "verdict": "deny", "reason": "private_destination", "mode": "observe"})
		// SNI of another name: recorded, not refused.
		m = g.mark()
		out, code := g.curl(webSource, "--cacert", w.caFile, "--connect-to", fmt.Sprintf("api.ok.test:%d:web.ok.test:%[1]d", w.tlsPort), "https://"+origin+"/")
		if code != 0 {
			t.Errorf("curl: %d %s", code, out)
		}
		g.line(m, map[string]any{"event": "connect", "verdict": "observe", "reason": "sni_mismatch", "rule": "web"})
	})
	wants(t, "/metrics", g.metrics(), `sallyport_decisions_total{group="ci",listener="proxy",reason="sni_mismatch",verdict="deny"} 1`,
		"sallyport_tunnels 0", `sallyport_policy_info{revision="`+g.ready().Policy.Revision+`"} 1`)
}

func TestPlainHTTP(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	origin := fmt.Sprintf("api.ok.test:%d", w.httpPort)

	t.Run("allowed", func(t *testing.T) {
		m := g.mark()
		out, code := g.curl(ciSource, "http://"+origin+"/x")
		if code != 0 || out != "hello from "+origin+"/x" {
			t.Errorf("curl: %d %s", code, out)
		}
		g.line(m, map[string]any{"event": "http", "verdict": "allow", "rule": "api", "status": 200, "method": "GET"})
	})
	t.Run("headers", func(t *testing.T) {
		out, _ := g.curl(ciSource, "-H", "Proxy-Authorization: Basic c2VjcmV0", "-H", "Connection: X-Hop", "-H", "X-Hop: 1", "-H", "X-End: 2",
			"-H", "Host: evil.test", "http://"+origin+"/headers")
		wants(t, "headers at the origin", out, "X-End: 2", "Host: "+origin, "Via: ")
		for _, s := range []string{"X-Hop", "Proxy-", "evil.test"} {
			if strings.Contains(out, s) {
				t.Errorf("%q reached the origin:\n%s", s, out)
			}
		}
	})
	t.Run("upload", func(t *testing.T) {
		file := t.TempDir() + "/body"
		if err := os.WriteFile(file, make([]byte, 3<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, code := g.curl(ciSource, "--data-binary", "@"+file, "http://"+origin+"/upload"); code != 0 || out != "3145728 bytes" {
			t.Errorf("curl: %d %s", code, out)
		}
	})
	t.Run("not listed", func(t *testing.T) {
		m := g.mark()
		out, _ := g.curl(ciSource, "-i", "http://other.test/")
		wants(t, "curl -i", out, "HTTP/1.1 403 ", "X-Sallyport-Reason: not_listed", "not_listed", "https://wiki.example/egress")
		g.line(m, map[string]any{"event": "http", "verdict": "deny", "reason": "not_listed", "status": 403})
	})
	t.Run("each request on its own", func(t *testing.T) {
		out, _ := g.curl(ciSource, "-o", "/dev/null", "-o", "/dev/null", "-o", "/dev/null", "-w", "%{http_code}/%{num_connects} ",
			"http://"+origin+"/1", "http://other.test/2", "http://"+origin+"/3")
		if out != "200/1 403/0 200/0 " {
			t.Errorf("statuses and new connections: %s", out)
		}
	})
	t.Run("inside CONNECT", func(t *testing.T) {
		m := g.mark()
		out, code := g.curl(ciSource, "-p", "http://"+origin+"/in")
		if code != 0 || out != "hello from "+origin+"/in" {
			t.Errorf("curl -p: %d %s", code, out)
		}
		g.line(m, map[string]any{"event": "http", "verdict": "allow", "name": "api.ok.test"})
		m = g.mark()
		out, _ = g.curl(ciSource, "-p", "-H", "Host: evil.test", "-i", "http://"+origin+"/in")
		wants(t, "curl -p with another Host", out, "403", "host_mismatch")
		g.line(m, map[string]any{"event": "http", "verdict": "deny", "reason": "host_mismatch"})
	})
	t.Run("origin form", func(t *testing.T) {
		out, _ := tool(t, "curl", "-sS", "--interface", ciSource, "-i", "http://"+g.proxy+"/")
		wants(t, "curl to the proxy itself", out, "HTTP/1.1 400 ")
	})
	t.Run("hostile strings stay one line of JSON", func(t *testing.T) {
		m := g.mark()
		g.curl(ciSource, "-A", "x\t[31m\xff\"\\{}", "http://other.test/")
		g.line(m, map[string]any{"event": "http", "reason": "not_listed"})
		m = g.mark()
		g.curl(ciSource, "-A", "x\x1b[31m", "http://other.test/")
		g.line(m, map[string]any{"event": "http", "reason": "bad_request"})
		m = g.mark()
		c := dialFrom(t, ciSource, g.proxy)
		io.WriteString(c, "CONNECT \xff\x1b\"};{\" HTTP/1.1\r\n\r\n")
		g.line(m, map[string]any{"event": "connect", "reason": "bad_request"})
	})
}

func TestResolver(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))

	t.Run("allowed", func(t *testing.T) {
		m := g.mark()
		out := g.dig(ciSource, "api.ok.test")
		wants(t, "dig", out, "status: NOERROR", originAddr)
		g.line(m, map[string]any{"event": "dns", "verdict": "allow", "rule": "api", "name": "api.ok.test", "qtype": "A", "rcode": "NOERROR", "group": "ci"})
		asked := w.questions.Load()
		wants(t, "dig +tcp", g.dig(ciSource, "+tcp", "api.ok.test"), "status: NOERROR", originAddr)
		if n := w.questions.Load() - asked; n != 0 {
			t.Errorf("%d queries upstream for a cached answer", n)
		}
	})
	t.Run("refused, nothing upstream", func(t *testing.T) {
		m, asked := g.mark(), w.questions.Load()
		for _, qtype := range []string{"A", "AAAA", "TXT", "MX", "NULL", "SRV", "CNAME", "ANY", "PTR", "HTTPS", "SVCB", "TYPE65400"} {
			wants(t, "dig "+qtype, g.dig(ciSource, "other.test", qtype), "status: REFUSED", "EDE: 15 (Blocked)")
		}
		wants(t, "dig below a listed name", g.dig(ciSource, "secret.api.ok.test"), "status: REFUSED")
		wants(t, "dig TXT of a listed name", g.dig(ciSource, "api.ok.test", "TXT"), "status: REFUSED")
		wants(t, "dig from an unknown source", g.dig(noSource, "api.ok.test"), "status: REFUSED", "EDE: 18 (Prohibited)")
		if out := g.dig(ciSource, "+noedns", "other.test"); strings.Contains(out, "EDE") || strings.Contains(out, "OPT PSEUDOSECTION") {
			t.Errorf("EDNS in an answer to a query without it:\n%s", out)
		}
		if n := w.questions.Load() - asked; n != 0 {
			t.Errorf("%d queries upstream", n)
		}
		g.line(m, map[string]any{"event": "dns", "verdict": "deny", "reason": "not_listed", "rcode": "REFUSED", "name": "other.test", "qtype": "MX"})
		g.line(m, map[string]any{"event": "dns", "verdict": "deny", "reason": "qtype_not_allowed", "qtype": "TXT"})
		g.line(m, map[string]any{"event": "dns", "verdict": "deny", "reason": "unmatched_source"})
	})
	t.Run("CNAME chain whole", func(t *testing.T) {
		wants(t, "dig", g.dig(ciSource, "alias.ok.test"), "target.elsewhere.test.", originAddr)
	})
	t.Run("private answer removed", func(t *testing.T) {
		m := g.mark()
		out := g.dig(ciSource, "rebind.ok.test")
		if strings.Contains(out, "192.168.7.7") {
			t.Errorf("the private address is answered:\n%s", out)
		}
		g.line(m, map[string]any{"event": "dns", "reason": "private_destination", "name": "rebind.ok.test"})
	})
	t.Run("ech stripped", func(t *testing.T) {
		out := g.dig(ciSource, "api.ok.test", "HTTPS")
		wants(t, "dig HTTPS", out, "status: NOERROR", "alpn")
		if strings.Contains(out, "ech=") || strings.Contains(out, "key5") {
			t.Errorf("ech is answered:\n%s", out)
		}
	})
	t.Run("one cache", func(t *testing.T) {
		wants(t, "dig", g.dig(ciSource, "one.cdn.test"), originAddr)
		asked := w.questions.Load()
		g.curl(ciSource, "--cacert", w.caFile, fmt.Sprintf("https://one.cdn.test:%d/", w.tlsPort))
		// The proxy asks for AAAA as well, which dig did not.
		if n := w.questions.Load() - asked; n > 1 {
			t.Errorf("the proxy asked %d questions upstream", n)
		}
	})
	wants(t, "/metrics", g.metrics(), `sallyport_dns_queries_total{qtype="A",rcode="NOERROR",verdict="allow"}`, `sallyport_dns_cache_total{result="hit"}`)
}

// TestExplainAgrees asks explain, proxy and resolver the same questions.
func TestExplainAgrees(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	for _, src := range []string{ciSource, noSource} {
		for _, target := range []string{
			fmt.Sprintf("api.ok.test:%d", w.tlsPort), "api.ok.test:22", "other.test:443", "www.evil.test:443", "93.184.216.34:443",
			"[2606:4700::1]:443", fmt.Sprintf("API.OK.TEST.:%d", w.tlsPort), fmt.Sprintf("x.y.cdn.test:%d", w.tlsPort), "cdn.test:443",
		} {
			m := g.mark()
			g.curl(src, "--cacert", w.caFile, "https://"+target+"/")
			event := g.line(m, map[string]any{"event": "connect", "src": src})
			out, code := g.sallyport("explain", "--json", "--source", src, target)
			sameDecision(t, "CONNECT "+target+" from "+src, event, out, code)
		}
		for _, q := range [][2]string{{"api.ok.test", "A"}, {"api.ok.test", "TXT"}, {"other.test", "A"}, {"x.cdn.test", "HTTPS"}} {
			m := g.mark()
			g.dig(src, q[0], q[1])
			event := g.line(m, map[string]any{"event": "dns", "src": src})
			out, code := g.sallyport("explain", "--json", "--source", src, "--dns", q[1], q[0])
			sameDecision(t, q[1]+" "+q[0]+" from "+src, event, out, code)
		}
	}
	m := g.mark()
	g.curl(ciSource, "--connect-to", fmt.Sprintf("a.cdn.test:%d:b.cdn.test:%[1]d", w.tlsPort), fmt.Sprintf("https://a.cdn.test:%d/", w.tlsPort))
	event := g.line(m, map[string]any{"event": "connect"})
	out, code := g.sallyport("explain", "--json", "--source", ciSource, "--sni", "a.cdn.test", fmt.Sprintf("b.cdn.test:%d", w.tlsPort))
	sameDecision(t, "SNI", event, out, code)
}

func sameDecision(t *testing.T, what string, event map[string]any, explained string, code int) {
	t.Helper()
	var x map[string]any
	if err := json.Unmarshal([]byte(explained), &x); err != nil {
		t.Errorf("%s: explain --json: %v: %s", what, err, explained)
		return
	}
	for _, k := range []string{"verdict", "reason", "rule", "group", "policy"} {
		if fmt.Sprint(orEmpty(event[k])) != fmt.Sprint(orEmpty(x[k])) {
			t.Errorf("%s: %s: the event says %v, explain says %v", what, k, event[k], x[k])
		}
	}
	if allowed := x["verdict"] == "allow"; allowed != (code == 0) || !allowed && code != 1 {
		t.Errorf("%s: verdict %v, exit status %d", what, x["verdict"], code)
	}
}

func orEmpty(v any) any {
	if v == nil {
		return ""
	}
	return v
}

func TestReload(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	get := func(host string) int {
		_, code := g.curl(ciSource, "--cacert", w.caFile, fmt.Sprintf("https://%s:%d/", host, w.tlsPort))
		return code
	}
	if get("new.ok.test") == 0 {
		t.Fatal("new.ok.test is allowed before it is listed")
	}
	first := g.ready().Policy.Revision

	// A tunnel that the next policy keeps, and one that it does not.
	keep := echoTunnel(t, g, w, "echo.ok.test")

	added := fmt.Sprintf(`      - {id: new, names: [new.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}
      - {id: brief, names: [brief.ok.test], ports: [%d], protocol: tcp, private_destinations: [127.0.0.0/8]}`, w.tlsPort, w.echoPort)
	r := g.reload(policyText(w, added))
	if !r.Policy.LastReload.OK || r.Policy.Revision == first {
		t.Fatalf("after the reload: %+v", r)
	}
	if code := get("new.ok.test"); code != 0 {
		t.Errorf("new.ok.test: curl exits with %d", code)
	}
	g.line(0, map[string]any{"event": "config", "policy": r.Policy.Revision})

	// A broken policy changes nothing and is reported with its place.
	broken := g.reload(strings.Replace(policyText(w, added), "unmatched_source", "unmatched_sources", 1))
	if broken.Policy.LastReload.OK || broken.Policy.Revision != r.Policy.Revision || !broken.Ready {
		t.Errorf("after a broken policy: %+v", broken)
	}
	wants(t, "last_reload.error", broken.Policy.LastReload.Error, "policy.yaml:3:1", "unmatched_source")
	wants(t, "/metrics", g.metrics(), "sallyport_policy_last_reload_success 0")
	if code := get("new.ok.test"); code != 0 {
		t.Errorf("new.ok.test after a broken policy: curl exits with %d", code)
	}

	// Revocation: what is no longer allowed is closed, the rest never notices.
	brief := echoTunnel(t, g, w, "brief.ok.test")
	m := g.mark()
	g.write("policy.yaml", policyText(w, ""))
	g.signal(syscall.SIGHUP)
	g.line(m, map[string]any{"event": "connect", "reason": "policy_revoked", "name": "brief.ok.test"})
	if _, err := brief.ReadByte(); err == nil {
		t.Error("the revoked tunnel still carries bytes")
	}
	keep.echo(t, "still here\n")

	// Bad settings are no good reload either.
	settings, err := os.ReadFile(g.path("sallyport.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	g.write("sallyport.yaml", string(settings)+"nonsense: 1\n")
	before := g.ready().Policy.LastReload.At
	g.signal(syscall.SIGHUP)
	g.until("the reload of bad settings", func() bool { return g.ready().Policy.LastReload.At != before })
	if r := g.ready().Policy.LastReload; r.OK || !strings.Contains(r.Error, `unknown key "nonsense"`) {
		t.Errorf("after bad settings: %+v", r)
	}
	g.line(0, map[string]any{"event": "config", "what": "settings", "ok": false})
	g.write("sallyport.yaml", string(settings))
	g.signal(syscall.SIGHUP)
	g.until("the reload of good settings", func() bool { return g.ready().Policy.LastReload.OK })
	wants(t, "/metrics", g.metrics(), "sallyport_policy_last_reload_success 1")
	if get("new.ok.test") == 0 {
		t.Error("new.ok.test is still allowed")
	}
}

// tunnel is a CONNECT tunnel to the echo service.
type tunnel struct {
	net.Conn
	*bufio.Reader
}

func (e tunnel) Read(p []byte) (int, error) { return e.Reader.Read(p) }

func echoTunnel(t *testing.T, g *gate, w *world, host string) tunnel {
	t.Helper()
	c := dialFrom(t, ciSource, g.proxy)
	fmt.Fprintf(c, "CONNECT %s:%d HTTP/1.1\r\n\r\n", host, w.echoPort)
	e := tunnel{c, bufio.NewReader(c)}
	resp, err := http.ReadResponse(e.Reader, &http.Request{Method: "CONNECT"})
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("CONNECT %s: %v %v", host, resp, err)
	}
	if line, err := e.ReadString('\n'); err != nil || line != "220 welcome\r\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return e
}

func (e tunnel) echo(t *testing.T, text string) {
	t.Helper()
	io.WriteString(e.Conn, text)
	if got, err := e.ReadString('\n'); err != nil || got != text {
		t.Errorf("echo: %q, %v", got, err)
	}
}

func TestDrain(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	e := echoTunnel(t, g, w, "echo.ok.test")
	g.signal(syscall.SIGTERM)
	g.until("draining", func() bool { r := g.ready(); return r.Draining && r.status == 503 })
	g.until("the listener is closed", func() bool {
		c, err := net.Dial("tcp", g.proxy)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	g.signal(syscall.SIGHUP) // is no reason to stop at once
	g.signal(syscall.SIGUSR1)
	e.echo(t, "drained tunnels go on\n")
	e.Close()
	if code := g.wait(); code != 0 {
		t.Errorf("exit status %d", code)
	}
	g.line(0, map[string]any{"event": "connect", "name": "echo.ok.test", "verdict": "allow"})
}

func TestSecondSignalStopsAtOnce(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	echoTunnel(t, g, w, "echo.ok.test")
	g.signal(syscall.SIGTERM)
	g.line(0, map[string]any{"message": "draining"})
	g.signal(syscall.SIGTERM)
	if code := g.wait(); code != 1 {
		t.Errorf("exit status %d", code)
	}
}

func TestStartFailures(t *testing.T) {
	w := newWorld(t)
	l := listen(t, "127.0.0.1:0")
	dir := t.TempDir()
	write := func(name, text string) string {
		if err := os.WriteFile(dir+"/"+name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return dir + "/" + name
	}
	policy := write("policy.yaml", policyText(w, ""))
	free := []string{"--set", "dns.listen=127.0.0.1:0", "--set", "admin.listen=127.0.0.1:0"}

	out, code := tool(t, binary, append([]string{"run", "--policy", policy, "--set", "proxy.listen=" + l.Addr().String()}, free...)...)
	if code != 1 {
		t.Errorf("taken port: exit status %d", code)
	}
	wants(t, "taken port", out, l.Addr().String(), "address already in use")

	bad := write("bad.yaml", "version: 1\ngroups:\n  - name: g\n    sources: [10.0.0.0/8, 10.0.0.1/8]\n    alow: [x.test]\n    allow: [\"*.com\", x.test]\n")
	for _, command := range []string{"run", "check"} {
		out, code = tool(t, binary, append([]string{command, "--policy", bad}, free...)...)
		if code != 2 {
			t.Errorf("%s with a bad policy: exit status %d", command, code)
		}
		wants(t, command+" with a bad policy", out, "bad.yaml:5:5: groups[0].alow")
	}
	out, code = tool(t, binary, append([]string{"run", "--policy", dir + "/missing.yaml"}, free...)...)
	if code != 2 {
		t.Errorf("missing policy: exit status %d", code)
	}
	wants(t, "missing policy", out, "missing.yaml")
}
