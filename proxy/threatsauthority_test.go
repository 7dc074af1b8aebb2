package proxy

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"sallyport/policy"
)

// both tries a host as the target of a CONNECT and of a plain request.
func (tr *trial) both(host string, status int, reason policy.Reason) {
	tr.t.Helper()
	tr.denied(connectHead(host+":443"), status, reason)
	tr.denied(getHead(host+":443"), status, reason)
}

func TestT01NameIsDecidedBeforeAnyQuery(t *testing.T) {
	tr := tryPolicy(t, func(int) string { return policyFor("", 443) + "    deny: [bad.ok.test]\n" })
	tr.both("evil.test", 403, policy.ReasonNotListed)
	tr.both("data-in-the-name.evil.test", 403, policy.ReasonNotListed)
	tr.both("BAD.ok.test.", 403, policy.ReasonExplicitDeny)
	tr.denied(connectHead("api.ok.test:22"), 403, policy.ReasonPortNotAllowed)
	tr.denied("GET http://evil.test/ HTTP/1.0\r\n\r\n", 403, policy.ReasonNotListed)
	tr.denied("GET http://evil.test/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 403, policy.ReasonNotListed)
}

func TestT02LiteralAddress(t *testing.T) {
	tr := tryPolicy(t, func(port int) string {
		return policyFor("", 443) + fmt.Sprintf("      - {id: lit, addresses: [127.0.0.1/32], ports: [%d], protocol: tcp}\n", port)
	})
	for _, a := range []string{"93.184.216.34", "127.0.0.2", "10.0.0.1", "169.254.169.254", "0.0.0.0", "255.255.255.255"} {
		tr.both(a, 403, policy.ReasonIPLiteral)
	}
	tr.denied(connectHead("127.0.0.1:443"), 403, policy.ReasonPortNotAllowed)
	if ev := tr.passes("listed literal", tr.at("127.0.0.1"), []byte("x"), nil); ev.Decision.Rule != "lit" || ev.DNSTime != 0 {
		t.Errorf("%+v", ev)
	}
	if n := tr.resolver.asked.Load(); n != 0 {
		t.Errorf("%d look-ups for addresses", n)
	}
}

func TestT03LiteralIPv6(t *testing.T) {
	tr := try(t, "")
	for _, a := range []string{
		"[2606:4700::1]", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
		"[fe80::1]", "[fd00:ec2::254]", "[0:0:0:0:0:0:0:1]", "[2606:4700::5efe:10.0.0.1]",
	} {
		tr.both(a, 403, policy.ReasonIPLiteral)
	}
	for _, a := range []string{
		"[fe80::1%25eth0]", "[fe80::1%eth0]", "[::1%25lo]", "[::1%250]", "[::1%25]", "::1", "fe80::1", "[127.0.0.1]", "[api.ok.test]", "[::1", "::1]", "[]", "[[::1]]",
		"[::1]x", "[::g]", "[1::2::3]", "[::ffff:127.0.0.256]", "[::ffff:0x7f.0.0.1]", "[v1.api.ok.test]",
	} {
		tr.both(a, 400, policy.ReasonBadRequest)
	}
}

// TestT04NumbersAreNoNames uses every spelling that inet_aton reads as an IPv4
// address, and some that look like one.
func TestT04NumbersAreNoNames(t *testing.T) {
	tr := tryPolicy(t, func(int) string {
		return "version: 1\ngroups:\n  - {name: g, sources: [127.0.0.0/8], allow: [{names: [\"*\"], allow_public_suffix: true, ports: [443]}]}\n"
	})
	for _, a := range []string{
		"2130706433", "017700000001", "0x7f000001", "0X7F000001", "0x7F.1", "0177.0.0.1", "0177.0.0.01", "127.1", "127.0.1", "127.0.0.0x1", "0", "0x0", "1", "00", "0x",
		"127.0.0.1.", "127.0.0.01", "127.0.0.1.1", "256.256.256.256", "4294967295", "4294967296", "99999999999999999999", "1.2.3", "a.1", "api.ok.test.7", "api.ok.test.0x7",
		"api.0xbeef", "１２７.0.0.1", "①②⑦.1", "127。0。0。1", "127.0.0.１", "0ｘ7f000001",
	} {
		tr.both(a, 400, policy.ReasonBadRequest)
	}
}

func TestT05TrailingDot(t *testing.T) {
	tr := try(t, ", protocol: tcp")
	if ev := tr.passes("one dot", tr.at("api.ok.test."), []byte("x"), nil); ev.Name != "api.ok.test" {
		t.Errorf("%+v", ev)
	}
	tr.denied(connectHead(tr.at("evil.test.")), 403, policy.ReasonNotListed)
	for _, name := range []string{"api.ok.test..", "api.ok.test...", ".", "..", ".api.ok.test", "api..ok.test", "api.ok.test。。", "."} {
		tr.denied(connectHead(tr.at(name)), 400, policy.ReasonBadRequest)
		tr.denied(getHead(tr.at(name)), 400, policy.ReasonBadRequest)
	}
}

func TestT06Case(t *testing.T) {
	tr := try(t, ", protocol: tcp")
	for _, name := range []string{"API.OK.TEST", "aPi.Ok.tEsT", "API.ok.TEST."} {
		if ev := tr.passes(name, tr.at(name), []byte("x"), nil); ev.Name != "api.ok.test" {
			t.Errorf("%+v", ev)
		}
	}
	if n := tr.resolver.asked.Load(); n != 3 { // and all of them found: the question was in lower case
		t.Errorf("%d look-ups", n)
	}
	if ev := tr.denied(connectHead("EVIL.Test:443"), 403, policy.ReasonNotListed); ev.Name != "evil.test" {
		t.Errorf("%+v", ev)
	}
}

// lookalikes are names that are not below ok.test, whatever they look like.
var lookalikes = []string{
	"api.ok.test.evil.test", "notapi.ok.testx", "xok.test", "notok.test", "ok.test.evil", "api-ok.test", "apiok.test", "ok.tes", "k.test", "test", "ok", "api.ok.test.test",
}

func TestT07LookalikesAndJunk(t *testing.T) {
	tr := try(t, "")
	for _, name := range lookalikes {
		tr.both(name, 403, policy.ReasonNotListed)
	}
	for _, host := range []string{
		"evil.test/api.ok.test", "api.ok.test/evil.test", "api.ok.test@evil.test", "evil.test@api.ok.test", "api.ok.test:443@evil.test", "api.ok.test#.evil.test", "evil.test#.api.ok.test",
		"api.ok.test?.evil.test", "evil.test?.api.ok.test", "api.ok.test\\evil.test", "evil.test\\.api.ok.test", "api.ok.test%00.evil.test", "evil.test%00.api.ok.test", "evil.test%2eok.test",
		"evil.test%2fapi.ok.test", "api.ok.test%40evil.test", "api.ok.test;evil.test", "api.ok.test,evil.test", "evil.test&api.ok.test", "*.ok.test", "api.*.test", "\"api.ok.test\"",
		"'api.ok.test'", "<api.ok.test>", "(api.ok.test)", "{api.ok.test}", "|api.ok.test", "$api.ok.test", "!api.ok.test", "~api.ok.test", "+api.ok.test", "=api.ok.test", "^api.ok.test", "`api.ok.test`",
		"api.ok.test\x00.cdn.test", "evil.test\x00.api.ok.test", "\x00api.ok.test", "api.ok.test\x00", "api.ok.test\x01", "api.ok.test\x7f", "api.ok.test\x1b[31m", "api.ok.test\t", "\tapi.ok.test",
		"api.ok.test\v", "api.ok.test\f", "api\xff.ok.test", "api\xc0\xae.ok.test", "\xed\xa0\x80.ok.test", "api.ok.test\xc2\xa0", "api.ok.test\u2028", "api\u202e.ok.test",
		"http://api.ok.test", "//api.ok.test", "api.ok.test:443", "api.ok.test:443:443", ":api.ok.test", "",
	} {
		tr.denied(connectHead(host+":443"), 400, policy.ReasonBadRequest)
	}
	// Line ends end the request line, spaces its parts.
	for _, head := range []string{
		"CONNECT evil.test\r.api.ok.test:443 HTTP/1.1\r\n\r\n", "CONNECT evil.test\n.api.ok.test:443 HTTP/1.1\r\n\r\n", "CONNECT evil.test\r\napi.ok.test:443 HTTP/1.1\r\n\r\n",
		"CONNECT evil.test api.ok.test:443 HTTP/1.1\r\n\r\n", "CONNECT  api.ok.test:443 HTTP/1.1\r\n\r\n", "CONNECT api.ok.test:443  HTTP/1.1\r\n\r\n", "CONNECT api.ok.test :443 HTTP/1.1\r\n\r\n",
		"CONNECT\tapi.ok.test:443 HTTP/1.1\r\n\r\n", "CONNECT api.ok.test:443\tHTTP/1.1\r\n\r\n", " CONNECT api.ok.test:443 HTTP/1.1\r\n\r\n",
		"CONNECT api.ok.test:443 HTTP/1.1 \r\n\r\n", "CONNECT api.ok.test:443\r\n\r\n", "CONNECT HTTP/1.1\r\n\r\n",
		"CONNECT api.ok.test:443 HTTP/1.1\r\nX: a\x00b\r\n\r\n", "CONNECT api.ok.test:443 HTTP/1.1\r\nX: a\rb\r\n\r\n",
		// "connect" is another method (RFC 9110, section 9.1), and its target no URI.
		"connect api.ok.test:443 HTTP/1.1\r\nHost: x\r\n\r\n", "Connect api.ok.test:443 HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		tr.denied(head, 400, policy.ReasonBadRequest)
	}
	for _, host := range []string{
		"api.ok.test@evil.test", "evil.test@api.ok.test", "u:p@api.ok.test", "api.ok.test\\.evil.test", "api.ok.test%00.evil.test", "api.ok.test%0d%0a.evil.test", "evil.test%2f.ok.test",
		"api.ok.test%20", "*.ok.test", "api.ok.test:443:443", "api\xff.ok.test", "evil.test%252f.ok.test", "api.ok.test,evil.test", "\"api.ok.test\"", "api.ok.test;x",
	} {
		tr.denied(getHead(host), 400, policy.ReasonBadRequest)
	}
}

func TestT08Internationalised(t *testing.T) {
	tr := tryPolicy(t, func(port int) string {
		return fmt.Sprintf(`
version: 1
groups:
  - name: g
    sources: [127.0.0.0/8]
    allow:
      - {names: [bücher.test, api.ok.test, straße.test, _srv.ok.test, xn--e1awd7f.test], ports: [%d], protocol: tcp, private_destinations: [127.0.0.0/8]}
`, port)
	})
	for host, name := range map[string]string{
		"bücher.test": "xn--bcher-kva.test", "BÜCHER.test": "xn--bcher-kva.test", "xn--bcher-kva.test": "xn--bcher-kva.test", "XN--BCHER-KVA.TEST": "xn--bcher-kva.test",
		"bu\u0308cher.test": "xn--bcher-kva.test", "straße.test": "xn--strae-oqa.test", "ａｐｉ.ok.test": "api.ok.test", "api。ok。test": "api.ok.test", "api．ok｡test": "api.ok.test",
		"ⓐpi.ok.test": "api.ok.test", "_srv.ok.test": "_srv.ok.test", "\u00adapi.ok.test": "api.ok.test", // a soft hyphen is ignored (UTS 46)
	} {
		tr.resolver.set(name, "127.0.0.1")
		if ev := tr.passes(host, tr.at(host), []byte("x"), nil); ev.Name != name {
			t.Errorf("%s: %s, want %s", host, ev.Name, name)
		}
	}
	for _, host := range []string{
		"аpi.ok.test",                        // Cyrillic а
		"api.оk.test",                        // Cyrillic о
		"strasse.test",                       // transitional processing would make it straße
		"bucher.test",                        // no diaeresis
		"xn--pi-7ba.test",                    // decodes to something else
		"ɑpi.ok.test",                        // Latin alpha
		"bücher.test.evil",                   // below another name
		"api⁄.ok.test", "evil.test⁄.ok.test", // a fraction slash ends nothing: it is part of a label
	} {
		tr.denied(connectHead(tr.at(host)), 403, policy.ReasonNotListed)
	}
	for _, host := range []string{
		"api\u200b.\u200bok..test", "xn--\u00fc.test", "a\u0338.\ufffd.test", "api.ok.test／evil.test", "api℀.ok.test",
		"api.ok.test？.evil.test", "api.ok.test＠evil.test", "api.ok.test：443", "\u202eapi.ok.test", "א1a.test", "api\u2024\u2024ok.test",
		strings.Repeat("ü", 64) + ".test", strings.Repeat("ü.", 200) + "test",
	} {
		tr.denied(connectHead(tr.at(host)), 400, policy.ReasonBadRequest)
	}
}

func TestT09LabelsAndLengths(t *testing.T) {
	tr := try(t, ", protocol: tcp")
	label := strings.Repeat("a", 63)
	longest := strings.Join([]string{label, label, label, strings.Repeat("a", 53), "ok.test"}, ".") // 253 bytes
	for _, name := range []string{label + ".ok.test", longest, longest + ".", "a-b.ok.test", "a--b.ok.test", "1.ok.test", "_.ok.test", "__a.ok.test", "0x7f.ok.test"} {
		tr.resolver.set(strings.TrimSuffix(name, "."), "127.0.0.1")
		tr.passes(name, tr.at(name), []byte("x"), nil)
	}
	for _, name := range []string{
		"a" + label + ".ok.test", "a" + longest, longest + "a", strings.Repeat("a.", 126) + "ok.test", strings.Repeat("a", 4000) + ".ok.test",
		"-a.ok.test", "a-.ok.test", "-.ok.test", "--.ok.test", "a.-b.ok.test", "api.ok.test-", "api.ok.-test", "a..ok.test", ".ok.test",
	} {
		tr.denied(connectHead(tr.at(name)), 400, policy.ReasonBadRequest)
		tr.denied(getHead(tr.at(name)), 400, policy.ReasonBadRequest)
	}
}

func TestT10Ports(t *testing.T) {
	tr := tryPolicy(t, func(int) string {
		return "version: 1\ngroups:\n  - {name: g, sources: [127.0.0.0/8], allow: [api.ok.test]}\n"
	})
	for _, port := range []string{
		"", ":", ":0", ":00", ":65536", ":99999", ":4294967739", ":18446744073709552059", ":443 ", ": 443", ":+443", ":-443", ":0443", ":00443", ":443x", ":0x1bb", ":4e2", ":443.0",
		":https", ":４４３", ":443/", ":443?", ":443#", ":443,80", ":443:80", ":\x00443", ":443\x00", ":4_43",
	} {
		tr.denied(connectHead("api.ok.test"+port), 400, policy.ReasonBadRequest)
	}
	for _, port := range []int{1, 22, 25, 53, 79, 81, 442, 444, 853, 3306, 5432, 8080, 8443, 65535} {
		tr.denied(connectHead(fmt.Sprintf("api.ok.test:%d", port)), 403, policy.ReasonPortNotAllowed)
		tr.denied(getHead(fmt.Sprintf("api.ok.test:%d", port)), 403, policy.ReasonPortNotAllowed)
	}
	for _, host := range []string{"api.ok.test:", "api.ok.test:0", "api.ok.test:080", "api.ok.test:65536", "api.ok.test:+80", "api.ok.test:4294967376"} {
		tr.denied(getHead(host), 400, policy.ReasonBadRequest)
	}
}

// TestT18Redirect passes a redirect on and does not follow it; the client's next
// request is a request like any other.
func TestT18Redirect(t *testing.T) {
	tr := try(t, "")
	c := tr.dial()
	tr.one("redirect", policy.Allow, policy.ReasonMatched, func() {
		c.send("GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", tr.at("api.ok.test"))
		u := tr.far.accept(t)
		go func() {
			io.ReadFull(u, make([]byte, 20))
			io.WriteString(u, "HTTP/1.1 302 Found\r\nLocation: http://evil.test/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			io.Copy(io.Discard, u)
			u.Close()
		}()
		if resp, _ := c.response(http.MethodGet); resp.StatusCode != 302 || resp.Header.Get("Location") != "http://evil.test/" {
			t.Errorf("%s %v", resp.Status, resp.Header)
		}
	})
	asked := tr.resolver.asked.Load()
	tr.one("what the client makes of it", policy.Deny, policy.ReasonNotListed, func() {
		c.send("%s", getHead("evil.test"))
		if resp, _ := c.response(http.MethodGet); resp.StatusCode != 403 {
			t.Error(resp.Status)
		}
	})
	if n := tr.resolver.asked.Load() - asked; n != 0 {
		t.Errorf("%d look-ups", n)
	}
}

// TestT20FieldsAreNoIdentity has a client of no group claim to be another one.
func TestT20FieldsAreNoIdentity(t *testing.T) {
	tr := tryPolicy(t, func(port int) string {
		return fmt.Sprintf("version: 1\ngroups:\n  - {name: g, sources: [127.0.0.9/32], allow: [{names: [.ok.test], ports: [%d]}]}\n", port)
	})
	const claims = "X-Forwarded-For: 127.0.0.9\r\nForwarded: for=127.0.0.9\r\nX-Real-IP: 127.0.0.9\r\nTrue-Client-IP: 127.0.0.9\r\nX-Client-IP: 127.0.0.9\r\n" +
		"CF-Connecting-IP: 127.0.0.9\r\nX-Originating-IP: 127.0.0.9\r\nVia: 1.1 127.0.0.9\r\nClient-IP: 127.0.0.9\r\n\r\n"
	for _, head := range []string{"CONNECT " + tr.at("api.ok.test") + " HTTP/1.1\r\n", "GET http://" + tr.at("api.ok.test") + "/ HTTP/1.1\r\nHost: x\r\n"} {
		if ev := tr.denied(head+claims, 403, policy.ReasonUnmatchedSource); ev.Source.Addr().String() != "127.0.0.1" {
			t.Errorf("%+v", ev)
		}
	}
}

// TestT60ForwardedFor neither believes what clients say of themselves nor passes it on.
func TestT60ForwardedFor(t *testing.T) {
	tr := try(t, "")
	tr.one("request", policy.Allow, policy.ReasonMatched, func() {
		c := tr.dial()
		c.send("GET http://%s/ HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 10.0.0.1\r\nx-forwarded-FOR: 10.0.0.2\r\nForwarded: for=10.0.0.3\r\nConnection: close\r\n\r\n", tr.at("api.ok.test"))
		u := tr.far.accept(t)
		r := make([]byte, 4096)
		n, _ := u.Read(r)
		if got := string(r[:n]); strings.Contains(got, "10.0.0.") || strings.Contains(got, "127.0.0.1") || !strings.HasPrefix(got, "GET / HTTP/1.1\r\n") {
			t.Errorf("the far side got %q", got)
		}
		io.WriteString(u, "HTTP/1.1 204 No Content\r\n\r\n")
		c.response(http.MethodGet)
	})
}

// TestT61Groups takes the most specific prefix, whatever stands first, and a mapped
// address for the IPv4 address it is.
func TestT61Groups(t *testing.T) {
	group := func(name, sources, host string, port int) string {
		return fmt.Sprintf("  - {name: %s, sources: [%s], allow: [{names: [%s], ports: [%d], protocol: tcp, private_destinations: [127.0.0.0/8]}]}\n", name, sources, host, port)
	}
	for _, narrowFirst := range []bool{true, false} {
		for _, on := range []string{"127.0.0.1:0", "[::]:0"} { // the second sees IPv4 clients as ::ffff:127.0.0.1
			tr := tryPolicy(t, func(port int) string {
				g, h := group("g", "127.0.0.0/8", "wide.ok.test", port), group("h", "127.0.0.0/24", "narrow.ok.test", port)
				if narrowFirst {
					g, h = h, g
				}
				return "version: 1\ngroups:\n" + g + h
			}, func(c *Config) { c.Listen = []string{on} })
			tr.addr = fmt.Sprintf("127.0.0.1:%d", tr.srv.Addrs()[0].Port())
			tr.resolver.set("narrow.ok.test", "127.0.0.1")
			tr.resolver.set("wide.ok.test", "127.0.0.1")
			if ev := tr.passes("narrow", tr.at("narrow.ok.test"), []byte("x"), nil); ev.Decision.Group != "h" || !ev.Source.Addr().Is4() {
				t.Errorf("listening on %s: %+v", on, ev)
			}
			tr.denied(connectHead(tr.at("wide.ok.test")), 403, policy.ReasonNotListed)
		}
	}
	tr := tryPolicy(t, func(port int) string { return "version: 1\ngroups:\n" + group("g", "10.0.0.0/8", "api.ok.test", port) })
	tr.denied(connectHead(tr.at("api.ok.test")), 403, policy.ReasonUnmatchedSource)
	tr = tryPolicy(t, func(port int) string {
		return "version: 1\nunmatched_source: h\ngroups:\n" + group("h", "10.0.0.0/8", "api.ok.test", port)
	})
	if ev := tr.passes("unmatched source's group", tr.at("api.ok.test"), []byte("x"), nil); ev.Decision.Group != "h" {
		t.Errorf("%+v", ev)
	}
}
