package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// TestVigil has a client in a group that observes be silent at first. What it
// says then is looked at all the same.
func TestVigil(t *testing.T) {
	const banner = "SSH-2.0-origin\r\n"
	quick := func(c *Config) { c.Timeouts.ClientHello = 300 * time.Millisecond }
	for _, tt := range []struct {
		name, says  string
		speaksFirst bool // the origin
		verdict     policy.Verdict
		reason      policy.Reason
		passes      bool
	}{
		{"SSH", "SSH-2.0-client\r\n", true, policy.Observe, policy.ReasonNotTLS, true},
		{"TLS", string(hello("api.ok.test")), false, policy.Allow, policy.ReasonMatched, true},
		{"TLS for a forbidden name", string(hello("bad.ok.test")), false, policy.Deny, policy.ReasonExplicitDeny, false},
		{"TLS for a forbidden name, after the origin has spoken", string(hello("bad.ok.test")), true, policy.Deny, policy.ReasonExplicitDeny, false},
		{"TLS for another name", string(hello("other.test")), true, policy.Observe, policy.ReasonSNIMismatch, true},
		{"malformed TLS", "\x16\x03\x01\x00\x05hello", false, policy.Deny, policy.ReasonHelloMalformed, false},
		{"SMTP", "EHLO client.test\r\n", true, policy.Observe, policy.ReasonNotTLS, true},
		{"nothing", "", true, policy.Observe, policy.ReasonNotTLS, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := listen(t, "127.0.0.1:0")
			text := strings.Replace(observe(o.port()), "groups:", "deny: [bad.ok.test]\ngroups:", 1)
			g := start(t, text, quick)
			g.resolver.set("api.ok.test", "127.0.0.1")
			c := g.connect(fmt.Sprintf("api.ok.test:%d", o.port()))
			u := o.accept(t)
			g.until(func() bool { return g.srv.Stats().Tunnels == 1 }) // the silence is over
			said := ""
			if tt.speaksFirst {
				said = banner
				io.WriteString(u, banner)
				if line, err := c.ReadString('\n'); line != banner || err != nil {
					t.Fatalf("%q, %v", line, err)
				}
			}
			c.send("%s", tt.says)
			if !tt.passes {
				if got := c.rest(); len(got) != 7 {
					t.Errorf("instead of an alert: %q", got)
				}
				if b, _ := io.ReadAll(u); len(b) > 0 {
					t.Errorf("the origin got %q", b)
				}
			} else {
				c.CloseWrite()
				if b, err := io.ReadAll(u); string(b) != tt.says || err != nil {
					t.Errorf("the origin got %q, %v", b, err)
				}
				io.WriteString(u, "bye")
				u.Close()
				if got := c.rest(); got != "bye" {
					t.Errorf("the client got %q", got)
				}
				said += "bye"
			}
			ev := g.next()
			if ev.Decision.Verdict != tt.verdict || ev.Decision.Reason != tt.reason || ev.BytesDown != int64(len(said)) || tt.passes && ev.BytesUp != int64(len(tt.says)) {
				t.Errorf("%+v", ev)
			}
			g.quiet()
			g.until(func() bool { return g.srv.Stats().Tunnels == 0 })
			g.until(func() bool {
				g.srv.tunnels.mu.Lock()
				defer g.srv.tunnels.mu.Unlock()
				return g.srv.tunnels.reserved == 0
			})
		})
	}
}

// TestVigilHTTP has the silent client speak HTTP in the end.
func TestVigilHTTP(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, observe(o.port()), func(c *Config) { c.Timeouts.ClientHello = 300 * time.Millisecond })
	g.resolver.set("api.ok.test", "127.0.0.1")
	authority := fmt.Sprintf("api.ok.test:%d", o.port())
	c := g.connect(authority)
	u := o.accept(t)
	g.until(func() bool { return g.srv.Stats().Tunnels == 1 })
	c.send("GET / HTTP/1.1\r\nHost: %s\r\n\r\n", authority)
	if r, err := http.ReadRequest(bufio.NewReader(u)); err != nil || r.Header.Get("Via") == "" {
		t.Fatal(r, err)
	}
	io.WriteString(u, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "ok" {
		t.Error(resp.Status, body)
	}
	c.send("GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n")
	if resp, _ := c.response("GET"); resp.StatusCode != 403 {
		t.Error(resp.Status)
	}
}

// TestVigilEnds ends vigils in the ways in which tunnels end.
func TestVigilEnds(t *testing.T) {
	for _, how := range []string{"idle", "revoked", "client gone"} {
		t.Run(how, func(t *testing.T) {
			o := listen(t, "127.0.0.1:0")
			g := start(t, observe(o.port()), func(c *Config) {
				c.Timeouts.ClientHello = 50 * time.Millisecond
				if how == "idle" {
					c.Timeouts.Idle = 300 * time.Millisecond
				}
			})
			g.resolver.set("api.ok.test", "127.0.0.1")
			c := g.connect(fmt.Sprintf("api.ok.test:%d", o.port()))
			u := o.accept(t)
			if how != "idle" {
				g.until(func() bool { return g.srv.Stats().Tunnels == 1 })
			}
			want := policy.ReasonNotTLS
			switch how {
			case "revoked":
				want = policy.ReasonPolicyRevoked
				g.store.Swap(compile(t, "version: 1\ndeny: [.ok.test]\ngroups: [{name: g, sources: [127.0.0.0/8]}]\n"))
			case "client gone":
				c.SetLinger(0)
				c.Close()
			}
			if b, _ := io.ReadAll(u); len(b) > 0 {
				t.Errorf("origin: %q", b)
			}
			if ev := g.next(); ev.Kind != event.Connect || ev.Decision.Reason != want {
				t.Errorf("%+v", ev)
			}
			g.until(func() bool { return g.srv.Stats().Tunnels == 0 })
			g.quiet()
		})
	}
}
