package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"sallyport/policy"
	"sallyport/policy/event"
)

// TestT11Session has HTTP inside a CONNECT.
func TestT11Session(t *testing.T) {
	port := site(t, dump)
	g := start(t, policyFor("", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	authority := fmt.Sprintf("api.ok.test:%d", port)
	for _, early := range []bool{false, true} {
		c := g.dial()
		first := fmt.Sprintf("GET /a HTTP/1.1\r\nHost: %s\r\nProxy-Authorization: x\r\n\r\n", authority)
		if early {
			c.send("CONNECT %s HTTP/1.1\r\n\r\n%s", authority, first)
		} else {
			c.send("CONNECT %s HTTP/1.1\r\n\r\n", authority)
		}
		if resp, _ := c.response("CONNECT"); resp.StatusCode != 200 {
			t.Fatal(resp.Status)
		}
		if !early {
			for i := range first { // in the smallest pieces
				c.send("%s", first[i:i+1])
			}
		}
		want := fmt.Sprintf("GET /a\nHost: %s\nVia: 1.1 %s\r\n", authority, pseudonym)
		if resp, body := c.response("GET"); resp.StatusCode != 200 || body != want {
			t.Errorf("%s\n%s", resp.Status, body)
		}
		c.send("POST http://%s/b HTTP/1.1\r\nHost: whatever\r\nContent-Length: 2\r\n\r\nab", authority)
		if resp, body := c.response("POST"); resp.StatusCode != 200 || !strings.HasPrefix(body, "POST /b\nHost: "+authority) {
			t.Errorf("%s\n%s", resp.Status, body)
		}
		for _, path := range []string{"GET", "POST"} {
			if ev := g.next(); ev.Kind != event.HTTP || ev.Method != path || ev.Name != "api.ok.test" || ev.Status != 200 || ev.Decision.Rule != "r" || !ev.Destination.IsValid() {
				t.Errorf("%+v", ev)
			}
		}
		if s := g.srv.Stats(); s.Tunnels != 1 {
			t.Errorf("%+v", s)
		}
		c.Close()
		if ev := g.next(); ev.Kind != event.Connect || ev.Protocol != policy.ProtocolHTTP || ev.Decision.Verdict != policy.Allow || ev.Status != 200 || ev.BytesUp != 2 || ev.BytesDown == 0 {
			t.Errorf("%+v", ev)
		}
	}
	if n := g.resolver.asked.Load(); n != 2 {
		t.Errorf("%d look-ups for two tunnels", n)
	}
	if s := g.srv.Stats(); s.Tunnels != 0 {
		t.Errorf("%+v", s)
	}
}

func TestT11HostMismatch(t *testing.T) {
	port := site(t, dump)
	g := start(t, policyFor("", port)+fmt.Sprintf("      - {names: [other.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}\n", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: evil.test:%d\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: other.ok.test:%d\r\n\r\n",
		"GET http://other.ok.test:%d/ HTTP/1.1\r\nHost: api.ok.test\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: api.ok.test\r\n\r\n%.0d", // port 80
		"CONNECT other.ok.test:%d HTTP/1.1\r\nHost: api.ok.test\r\n\r\n",
	} {
		c := g.connect(fmt.Sprintf("api.ok.test:%d", port))
		c.send(request, port)
		resp, _ := c.response("GET")
		want := policy.ReasonHostMismatch
		if request[0] == 'C' {
			want = policy.ReasonBadRequest
		}
		if resp.Header.Get("X-Sallyport-Reason") != want.String() || !resp.Close || c.rest() != "" {
			t.Errorf("%q: %s %v", request, resp.Status, resp.Header)
		}
		if ev := g.next(); ev.Kind != event.HTTP || ev.Decision.Reason != want || ev.Decision.Verdict != policy.Deny || ev.Decision.Group != "g" {
			t.Errorf("%q: %+v", request, ev)
		}
		if ev := g.next(); ev.Kind != event.Connect {
			t.Errorf("%q: %+v", request, ev)
		}
	}
}

// TestSessionKeepsAddress opens another upstream connection: to the address that
// was checked, without asking again.
func TestSessionKeepsAddress(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	authority := fmt.Sprintf("api.ok.test:%d", o.port())
	c := g.connect(authority)
	for range 2 {
		c.send("GET / HTTP/1.1\r\nHost: %s\r\n\r\n", authority)
		u := o.accept(t)
		if _, err := http.ReadRequest(bufio.NewReader(u)); err != nil {
			t.Fatal(err)
		}
		io.WriteString(u, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
		u.Close()
		if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "ok" || resp.Close {
			t.Errorf("%s %s", resp.Status, body)
		}
	}
	if n := g.resolver.asked.Load(); n != 1 {
		t.Errorf("%d look-ups", n)
	}
}

func TestSessionRefusals(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	text := func(keys string) string {
		return fmt.Sprintf("version: 1\ngroups:\n  - name: g\n    sources: [127.0.0.0/8]\n    allow:\n"+
			"      - {names: [api.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]%s}\n", o.port(), keys)
	}
	authority := fmt.Sprintf("api.ok.test:%d", o.port())
	t.Run("only TLS", func(t *testing.T) {
		g := start(t, text(", protocol: tls"))
		g.resolver.set("api.ok.test", "127.0.0.1")
		c := g.connect(authority)
		c.send("GET / HTTP/1.1\r\nHost: %s\r\n\r\n", authority)
		if got := c.rest(); got != "" {
			t.Errorf("%q", got)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonNotTLS {
			t.Errorf("%+v", ev)
		}
		if got := o.got(t); got != "" {
			t.Errorf("the origin got %q", got)
		}
	})
	t.Run("only HTTP", func(t *testing.T) {
		g := start(t, text(", protocol: http"))
		g.resolver.set("api.ok.test", "127.0.0.1")
		c := g.connect(authority)
		c.send("%s", hello("api.ok.test"))
		if got := c.rest(); got != "\x15\x03\x03\x00\x02\x02\x31" {
			t.Errorf("%q", got)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonProtocolNotAllowed {
			t.Errorf("%+v", ev)
		}
		o.got(t)
	})
	t.Run("malformed", func(t *testing.T) {
		g := start(t, text(""))
		g.resolver.set("api.ok.test", "127.0.0.1")
		c := g.connect(authority)
		c.send("POST / HTTP/1.1\r\nHost: %s\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", authority)
		if resp, _ := c.response("POST"); resp.StatusCode != 400 {
			t.Error(resp.Status)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonBadRequest || ev.Decision.Group != "g" {
			t.Errorf("%+v", ev)
		}
		if got := o.got(t); got != "" {
			t.Errorf("the origin got %q", got)
		}
	})
}
