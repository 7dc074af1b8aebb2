package proxy

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"sallyport/policy"
)

var pacDirect = []string{"intranet.example", ".corp.example", "*.lab.example", "10.0.0.0/8", "192.0.2.1/32", "0.0.0.0/32"}

// pacText is what people and their browsers get. It is ECMAScript 3: no trailing
// comma, no reserved word as a key, nothing newer.
const pacText = `// Proxy auto-configuration by sallyport.
function FindProxyForURL(url, host) {
  host = host.toLowerCase().replace(/\.$/, "");
  if (host.indexOf(".") < 0 && host.indexOf(":") < 0) return "DIRECT";
  if (host === "::1" || host === "[::1]" || /\.localhost$/.test(host)) return "DIRECT";
  var m = /^(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})$/.exec(host);
  if (m) {
    var n = ((m[1] * 256 + m[2] * 1) * 256 + m[3] * 1) * 256 + m[4] * 1;
    if (n >= 2130706432 && n <= 2147483647) return "DIRECT"; // 127.0.0.0/8
    if (n >= 167772160 && n <= 184549375) return "DIRECT"; // 10.0.0.0/8
    if (n >= 3221225985 && n <= 3221225985) return "DIRECT"; // 192.0.2.1/32
    if (n >= 0 && n <= 0) return "DIRECT"; // 0.0.0.0/32
  }
  if (host === "intranet.example") return "DIRECT";
  if (("." + host).slice(-13) === ".corp.example") return "DIRECT";
  if (("." + host).slice(-12) === ".lab.example" && host.length > 12) return "DIRECT";
  return "PROXY [2001:db8::1]:3128";
}
`

func TestPAC(t *testing.T) {
	if got := string(PAC("PROXY [2001:db8::1]:3128", pacDirect)); got != pacText {
		t.Errorf("%s\nwant\n%s", got, pacText)
	}
}

// TestPACRuns asks the file as a browser does.
func TestPACRuns(t *testing.T) {
	node, err := exec.LookPath("node")
	if err != nil {
		t.Skip("no node to run the file; TestPAC holds its text")
	}
	proxied := map[string]bool{
		"localhost": false, "wiki": false, "wiki.": false, "LOCALHOST": false, "a.localhost": false, "127.0.0.1": false, "127.255.255.255": false,
		"::1": false, "[::1]": false, "intranet.example": false, "INTRANET.example.": false, "corp.example": false, "a.b.corp.example": false,
		"a.lab.example": false, "10.0.0.0": false, "10.255.255.255": false, "192.0.2.1": false, "0.0.0.0": false,
		"128.0.0.0": true, "126.255.255.255": true, "11.0.0.0": true, "9.255.255.255": true, "192.0.2.2": true, "192.0.2.0": true, "0.0.0.1": true,
		"2001:db8::1": true, "[fe80::1]": true, "a.intranet.example": true, "xcorp.example": true, "corp.example.evil.test": true, "lab.example": true,
		"xlab.example": true, "www.example.com": true, "localhost.evil.test": true, "notlocalhost.test": true, "10.0.0.1.evil.test": true, "1.10.0.0.1": true,
	}
	hosts := make([]string, 0, len(proxied))
	for h := range proxied {
		hosts = append(hosts, h)
	}
	asked, err := json.Marshal(hosts)
	if err != nil {
		t.Fatal(err)
	}
	script := "'use strict';\n" + pacText + fmt.Sprintf("\nvar r = {}; %s.forEach(function (h) { r[h] = FindProxyForURL('http://' + h + '/', h); }); console.log(JSON.stringify(r));", asked)
	out, err := exec.CommandContext(t.Context(), node, "-e", script).Output()
	if err != nil {
		t.Fatalf("node: %v", err)
	}
	var got map[string]string
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	for h, through := range proxied {
		want := "DIRECT"
		if through {
			want = "PROXY [2001:db8::1]:3128"
		}
		if got[h] != want {
			t.Errorf("%s: %q, want %q", h, got[h], want)
		}
	}
}

// TestServePAC fetches the file from the proxy's own listener: for everybody, with
// the address at which the proxy was reached, whatever else the Host field holds.
func TestServePAC(t *testing.T) {
	g := start(t, "version: 1\ngroups: []\n", func(c *Config) { c.PACDirect = pacDirect })
	for host, want := range map[string]string{
		"proxy.corp.test:3128": "proxy.corp.test:3128", "Proxy.Corp.Test.:3128": "proxy.corp.test:3128", "proxy.corp.test": "proxy.corp.test:80",
		"127.0.0.1:3128": "127.0.0.1:3128", "[2001:DB8::1]:8080": "[2001:db8::1]:8080",
		`x";alert(1);":1`: g.addr, "x\\:1": g.addr, "a'b:1": g.addr, "x:1\t": "x:1", "</script>": g.addr, "user@x:1": g.addr, "x:0": g.addr, "x:99999": g.addr,
		"x/y:1": g.addr, "x:1;y": g.addr, "[::1%25eth0]:1": g.addr, "2001:db8::1": g.addr, ":3128": g.addr, "x\u2028:1": g.addr,
	} {
		c := g.dial()
		c.send("GET /proxy.pac HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		resp, body := c.response("GET")
		text := string(PAC("PROXY "+want, pacDirect))
		if resp.StatusCode == http.StatusBadRequest && want == g.addr { // net/http did not like the Host field either
			g.next()
			continue
		}
		if resp.StatusCode != 200 || body != text || resp.Header.Get("Content-Type") != "application/x-ns-proxy-autoconfig" || resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%q: %s %v\n%s\nwant\n%s", host, resp.Status, resp.Header, body, text)
		}
		c.send("GET /proxy.pac HTTP/1.1\r\nHost: again.test:1\r\n\r\n") // the connection goes on
		if _, body := c.response("GET"); body != string(PAC("PROXY again.test:1", pacDirect)) {
			t.Errorf("%s", body)
		}
	}
	c := g.dial()
	c.send("HEAD /proxy.pac HTTP/1.0\r\n\r\n")
	if resp, body := c.response("HEAD"); resp.StatusCode != 200 || body != "" {
		t.Errorf("HEAD: %s %q", resp.Status, body)
	}
	g.quiet()
	// T14: everything else in origin form stays 400.
	for _, line := range []string{"GET /", "GET /proxy.pac/", "GET /proxy.pac?", "GET //proxy.pac", "GET /PROXY.PAC", "POST /proxy.pac", "OPTIONS /proxy.pac"} {
		c := g.dial()
		c.send("%s HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", line)
		if resp, _ := c.response("GET"); resp.StatusCode != 400 {
			t.Errorf("%s: %s", line, resp.Status)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonBadRequest {
			t.Errorf("%s: %+v", line, ev)
		}
	}
}

// TestPACHandler asks another listener for the file.
func TestPACHandler(t *testing.T) {
	ask := func(s *Server, host string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "/proxy.pac", nil)
		r.Host = host
		r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 9), Port: 9128}))
		s.PACHandler().ServeHTTP(w, r)
		return w
	}
	bound := start(t, "version: 1\ngroups: []\n")
	if got := ask(bound.srv, "admin.test:9128").Body.String(); got != string(PAC("PROXY "+bound.addr, nil)) {
		t.Errorf("%s", got)
	}
	everywhere := start(t, "version: 1\ngroups: []\n", func(c *Config) { c.Listen = []string{"0.0.0.0:0"} })
	port := everywhere.srv.Addrs()[0].Port()
	for host, want := range map[string]string{"admin.test:9128": "admin.test", "admin.test": "admin.test", "[::1]:9128": "[::1]", `"x`: "192.0.2.9"} {
		if got := ask(everywhere.srv, host).Body.String(); !strings.Contains(got, fmt.Sprintf(`"PROXY %s:%d"`, want, port)) {
			t.Errorf("%s: %s", host, got)
		}
	}
	if w := ask(New(Config{}), "x"); w.Code != http.StatusNotFound {
		t.Errorf("%d", w.Code)
	}
}

func FuzzPACAddress(f *testing.F) {
	for _, s := range []string{"proxy.test:3128", "[::1]:80", `";//:1`, "a:b:c", "\x00"} {
		f.Add(s)
	}
	local := netip.MustParseAddrPort("127.0.0.1:3128")
	f.Fuzz(func(t *testing.T, host string) {
		got := pacAddress(host, local)
		if strings.ContainsFunc(got, func(r rune) bool {
			return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || strings.ContainsRune(".-_:[]", r))
		}) || got == "" {
			t.Errorf("%q gives %q", host, got)
		}
	})
}
