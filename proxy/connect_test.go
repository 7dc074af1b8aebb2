package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// policyFor allows names of .ok.test on ports, as the rule's other keys say.
func policyFor(keys string, ports ...int) string {
	return fmt.Sprintf(`
version: 1
groups:
  - name: g
    sources: [127.0.0.0/8]
    allow:
      - {id: r, names: [.ok.test], ports: [%s], private_destinations: [127.0.0.0/8, "::1/128"]%s}
`, strings.Trim(strings.ReplaceAll(fmt.Sprint(ports), " ", ", "), "[]"), keys)
}

func TestConnectTLS(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.serveTLS(t)
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	target := fmt.Sprintf("API.ok.test.:%d", o.port())

	for _, tt := range []struct {
		name string
		wrap func(*client) net.Conn
	}{
		{"plain", func(c *client) net.Conn { return c }},
		{"byte by byte", func(c *client) net.Conn { return slowWriter{c} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := tls.Client(tt.wrap(g.connect(target)), &tls.Config{ServerName: "api.ok.test", RootCAs: ca().pool, NextProtos: []string{"h2", "http/1.1"}})
			if _, err := io.WriteString(c, "ping"); err != nil {
				t.Fatal(err)
			}
			c.CloseWrite()
			if b, err := io.ReadAll(c); err != nil || string(b) != "ping" {
				t.Errorf("%q, %v", b, err)
			}
			c.Close()
			ev := g.next()
			if d := ev.Decision; d.Verdict != policy.Allow || d.Reason != policy.ReasonMatched || d.Rule != "r" || d.Group != "g" {
				t.Errorf("decision %+v", d)
			}
			if ev.Kind != event.Connect || ev.Protocol != policy.ProtocolTLS || ev.Method != "CONNECT" || ev.Name != "api.ok.test" || int(ev.Port) != o.port() || ev.Status != 200 ||
				ev.SNI != "api.ok.test" || fmt.Sprint(ev.ALPN) != "[h2 http/1.1]" || ev.TLSVersion != tls.VersionTLS13 || ev.JA4 == "" || !ev.PostQuantum ||
				ev.Destination != o.addr || ev.BytesUp < 300 || ev.BytesDown < 500 || ev.Error != "" || ev.ID == "" || ev.Duration <= 0 {
				t.Errorf("event %+v", ev)
			}
		})
	}
	if n := g.resolver.asked.Load(); n != 2 {
		t.Errorf("%d look-ups for 2 requests", n)
	}
}

// slowWriter sends each byte of the first record on its own.
type slowWriter struct{ *client }

func (w slowWriter) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := w.TCPConn.Write(p[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

// TestT12HostField: the target counts, and the Host field is noted.
func TestT12HostField(t *testing.T) {
	g := start(t, policyFor("", 443))
	c := g.dial()
	c.send("CONNECT evil.test:443 HTTP/1.1\r\nHost: api.ok.test:443\r\n\r\n")
	if resp, _ := c.response(http.MethodConnect); resp.StatusCode != 403 {
		t.Errorf("%s", resp.Status)
	}
	if ev := g.next(); ev.Name != "evil.test" || !strings.Contains(ev.Error, `"api.ok.test:443"`) {
		t.Errorf("event %+v", ev)
	}
}

// TestT21AlertReceived lets crypto/tls read the alerts.
func TestT21AlertReceived(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for sni, want := range map[string]tls.AlertError{"evil.ok.test": 112, "": 112, "api.ok.test": 49} {
		cfg := &tls.Config{ServerName: sni, InsecureSkipVerify: true}
		if want == 49 {
			cfg.MinVersion, cfg.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
		}
		err := tls.Client(g.connect(fmt.Sprintf("api.ok.test:%d", o.port())), cfg).Handshake()
		var op *net.OpError
		if !errors.As(err, &op) || op.Op != "remote error" || op.Err.Error() != want.Error() {
			t.Errorf("SNI %q: %v, want alert %v", sni, err, want)
		}
	}
}

// TestT32EarlyData: what comes with the CONNECT arrives once.
func TestT32EarlyData(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	for _, tt := range []struct{ name, keys, sent string }{
		{"TLS", "", string(hello("api.ok.test"))},
		{"tcp", ", protocol: tcp", "hello"},
		{"tcp, much", ", protocol: tcp", strings.Repeat("0123456789", 6000)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, policyFor(tt.keys, o.port()))
			g.resolver.set("api.ok.test", "127.0.0.1")
			c := g.dial()
			c.send("CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n%s", o.port(), tt.sent)
			if resp, _ := c.response(http.MethodConnect); resp.StatusCode != 200 {
				t.Fatal(resp.Status)
			}
			c.CloseWrite() // the far side may still answer
			u := o.accept(t)
			b, err := io.ReadAll(u)
			if err != nil || string(b) != tt.sent {
				t.Errorf("the origin got %d bytes, %v; %d were sent", len(b), err, len(tt.sent))
			}
			io.WriteString(u, "bye")
			u.Close()
			if got := c.rest(); got != "bye" {
				t.Errorf("the client got %q", got)
			}
			if ev := g.next(); ev.BytesUp != int64(len(tt.sent)) || ev.BytesDown != 3 || ev.Error != "" {
				t.Errorf("event %+v", ev)
			}
		})
	}
}

// TestServerFirst relays without looking where a rule says tcp.
func TestServerFirst(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor(", protocol: tcp", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.connect(fmt.Sprintf("api.ok.test:%d", o.port()))
	u := o.accept(t)
	io.WriteString(u, "220 welcome\r\n")
	if line, err := c.ReadString('\n'); line != "220 welcome\r\n" {
		t.Errorf("%q, %v", line, err)
	}
	g.until(func() bool { s := g.srv.Stats(); return s.Tunnels == 1 && s.Connections == 1 && s.BytesDown == 13 })
	u.Close()
	c.Close()
	g.next()
}

func TestT24Silence(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	quick := func(c *Config) { c.Timeouts.ClientHello = 30 * time.Millisecond }
	target := fmt.Sprintf("api.ok.test:%d", o.port())

	t.Run("enforced", func(t *testing.T) {
		g := start(t, policyFor("", o.port()), quick)
		g.resolver.set("api.ok.test", "127.0.0.1")
		if got := g.connect(target).rest(); got != "" {
			t.Errorf("%q", got)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonHelloTimeout || ev.Decision.Verdict != policy.Deny {
			t.Errorf("event %+v", ev)
		}
		o.got(t)
	})
	t.Run("half a hello", func(t *testing.T) {
		g := start(t, policyFor("", o.port()), quick)
		g.resolver.set("api.ok.test", "127.0.0.1")
		c := g.dial()
		c.send("CONNECT %s HTTP/1.1\r\n\r\n%s", target, hello("api.ok.test")[:100]) // at once: later it might come too late
		if resp, body := c.response(http.MethodConnect); resp.StatusCode != http.StatusOK {
			t.Fatal(resp.Status, body)
		}
		if got := c.rest(); got != "\x15\x03\x03\x00\x02\x02\x31" {
			t.Errorf("%q", got)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonHelloTimeout {
			t.Errorf("event %+v", ev)
		}
		if got := o.got(t); got != "" {
			t.Errorf("the origin got %q", got)
		}
	})
	t.Run("observed", func(t *testing.T) {
		g := start(t, observe(o.port()), quick)
		g.resolver.set("api.ok.test", "127.0.0.1")
		c := g.connect(target)
		u := o.accept(t)
		io.WriteString(u, "220 welcome\r\n") // passes once silence is established
		if line, err := c.ReadString('\n'); line != "220 welcome\r\n" {
			t.Errorf("%q, %v", line, err)
		}
		c.Close()
		u.Close()
		if ev := g.next(); ev.Decision.Verdict != policy.Observe || ev.Decision.Reason != policy.ReasonNotTLS {
			t.Errorf("event %+v", ev)
		}
	})
}

// observe is a policy whose only group observes.
func observe(port int) string {
	return strings.Replace(policyFor("", port), "    allow:", "    mode: observe\n    observe_until: 2999-12-31\n    allow:", 1)
}

func TestObserve(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, observe(o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	target := fmt.Sprintf("api.ok.test:%d", o.port())
	for _, tt := range []struct {
		name, sent string
		verdict    policy.Verdict
		reason     policy.Reason
	}{
		{"SNI mismatch", string(hello("other.test")), policy.Observe, policy.ReasonSNIMismatch},
		{"not TLS", "SSH-2.0-x\r\n", policy.Observe, policy.ReasonNotTLS},
		{"malformed", "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", policy.Deny, policy.ReasonHelloMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := g.connect(target)
			c.send("%s", tt.sent)
			c.CloseWrite()
			want := tt.sent
			if tt.verdict == policy.Deny {
				want = ""
			}
			if got := o.got(t); got != want {
				t.Errorf("the origin got %q", got)
			}
			c.Close()
			if ev := g.next(); ev.Decision.Verdict != tt.verdict || ev.Decision.Reason != tt.reason || ev.Decision.Mode != policy.ModeObserve {
				t.Errorf("event %+v", ev)
			}
		})
	}
}

// TestT33Vanishing has clients that go away in every phase.
func TestT33Vanishing(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	target := fmt.Sprintf("api.ok.test:%d", o.port())
	t.Run("in the head", func(t *testing.T) {
		for _, hard := range []bool{false, true} {
			c := g.dial()
			c.send("CONNECT api.ok")
			if hard {
				c.SetLinger(0)
			}
			c.Close()
			if ev := g.next(); ev.Decision.Reason != policy.ReasonBadRequest || ev.Status != 0 {
				t.Errorf("event %+v", ev)
			}
		}
	})
	t.Run("before the hello", func(t *testing.T) {
		g.connect(target).Close()
		if got := o.got(t); got != "" {
			t.Errorf("the origin got %q", got)
		}
		if ev := g.next(); ev.Decision.Verdict != policy.Allow || ev.Error == "" {
			t.Errorf("event %+v", ev)
		}
	})
	t.Run("in the hello", func(t *testing.T) {
		for _, hard := range []bool{false, true} {
			c := g.connect(target)
			c.send("%s", hello("api.ok.test")[:200])
			if hard {
				c.SetLinger(0)
			}
			c.Close()
			if got := o.got(t); got != "" {
				t.Errorf("the origin got %q", got)
			}
			// A reset may take the first bytes with it.
			if ev := g.next(); ev.Decision.Reason != policy.ReasonHelloMalformed && !hard {
				t.Errorf("event %+v", ev)
			}
		}
	})
	t.Run("without a word", func(t *testing.T) {
		g.dial().Close()
		g.connect(target).Close() // when it is gone, so is the one before
		g.next()
		o.got(t)
		g.quiet()
	})
}

func TestSlowHead(t *testing.T) {
	g := start(t, policyFor("", 443), func(c *Config) { c.Timeouts.RequestHeader = 500 * time.Millisecond })
	c := g.dial()
	c.send("CONNECT api.ok.test:443 HTTP/1.1\r\n")
	if resp, _ := c.response(http.MethodConnect); resp.StatusCode != 408 {
		t.Error(resp.Status)
	}
	if ev := g.next(); ev.Decision.Reason != policy.ReasonBadRequest || ev.Status != 408 {
		t.Errorf("event %+v", ev)
	}
}

func TestLongHead(t *testing.T) {
	g := start(t, policyFor("", 443), func(c *Config) { c.Limits.HeaderBytes = 5000 })
	c := g.dial()
	c.send("CONNECT api.ok.test:443 HTTP/1.1\r\nX: %s\r\n\r\n", strings.Repeat("x", 60000))
	if resp, _ := c.response(http.MethodConnect); resp.StatusCode != 431 {
		t.Error(resp.Status)
	}
	g.next()
}
