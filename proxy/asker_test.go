package proxy

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// behind makes loopback a load balancer.
func behind(c *Config) {
	c.ProxyProtocol.Trusted = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
}

// twoGroups is policyFor for clients that a load balancer tells of.
func twoGroups(keys string, port int) string {
	return fmt.Sprintf(`version: 1
groups:
  - name: ten
    sources: [10.0.0.0/8, "2001:db8::/32"]
    allow:
      - {names: [.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]%s}
  - name: others
    sources: [192.168.0.0/16, 127.0.0.0/8]
    allow: [other.test]
`, port, keys)
}

// v2 is a header of version 2 with the command PROXY.
func v2(source, destination string, records ...byte) string {
	src, dst := netip.MustParseAddrPort(source), netip.MustParseAddrPort(destination)
	family, addrs := byte(0x11), append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)
	if src.Addr().Is6() {
		a, b := src.Addr().As16(), dst.Addr().As16()
		family, addrs = 0x21, append(a[:], b[:]...)
	}
	addrs = binary.BigEndian.AppendUint16(addrs, src.Port())
	addrs = append(binary.BigEndian.AppendUint16(addrs, dst.Port()), records...)
	b := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), 0x21, family)
	return string(append(binary.BigEndian.AppendUint16(b, uint16(len(addrs))), addrs...))
}

const local = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"

func TestT59TrustedHeader(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	port := site(t, dump)
	text := twoGroups("", o.port()) + fmt.Sprintf("  - {name: web, sources: [172.16.0.0/12], allow: [{names: [.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}]}\n", port)
	g := start(t, text, behind)
	g.resolver.set("api.ok.test", "127.0.0.1")
	h := hello("api.ok.test")
	head := fmt.Sprintf("CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
	for _, tt := range []struct{ name, header, source, endpoint string }{
		{"v1", "PROXY TCP4 10.1.2.3 127.0.0.1 50123 3128\r\n", "10.1.2.3:50123", ""},
		{"v1 IPv6", "PROXY TCP6 2001:db8::7 ::1 50123 3128\r\n", "[2001:db8::7]:50123", ""},
		{"v2", v2("10.1.2.3:50123", "127.0.0.1:3128"), "10.1.2.3:50123", ""},
		{"v2 mapped", v2("[::ffff:10.1.2.3]:50123", "[::1]:3128"), "10.1.2.3:50123", ""},
		{"v2 endpoint", v2("10.1.2.3:50123", "127.0.0.1:3128", []byte("\xea\x00\x0e\x01vpce-08d2bf15")...), "10.1.2.3:50123", "vpce-08d2bf15"},
	} {
		for _, pieces := range []int{1, 7, 1 << 16} { // bytes a write
			c := g.dial()
			c.SetNoDelay(true)
			all := []byte(tt.header + head + string(h)) // at once: nothing may be lost
			for len(all) > 0 {
				n := min(pieces, len(all))
				if _, err := c.TCPConn.Write(all[:n]); err != nil {
					t.Fatal(err)
				}
				all = all[n:]
			}
			if resp, body := c.response(http.MethodConnect); resp.StatusCode != 200 {
				t.Fatalf("%s: %s %s", tt.name, resp.Status, body)
			}
			u := o.accept(t)
			got := make([]byte, len(h))
			if _, err := io.ReadFull(u, got); err != nil || string(got) != string(h) {
				t.Errorf("%s in pieces of %d: the origin has %d bytes, %v", tt.name, pieces, len(got), err)
			}
			g.srv.tunnels.each(func(tn *tunnel) {
				if _, ok := tn.client.(*net.TCPConn); !ok {
					t.Errorf("the tunnel relays a %T, which cannot be spliced", tn.client)
				}
			})
			u.Close()
			c.Close()
			ev := g.next()
			if ev.Source.String() != tt.source || ev.VPCEndpoint != tt.endpoint || ev.Decision.Group != "ten" || ev.SNI != "api.ok.test" {
				t.Errorf("%s: event %+v", tt.name, ev)
			}
		}
	}

	// Plain HTTP, every request of the connection, and a CONNECT on it.
	c := g.dial()
	c.send("PROXY TCP4 172.16.9.9 127.0.0.1 1234 3128\r\n")
	for range 2 {
		c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
		if resp, body := c.response("GET"); resp.StatusCode != 200 || strings.Contains(body, "172.16.9.9") {
			t.Errorf("%s\n%s", resp.Status, body)
		}
		if ev := g.next(); ev.Source.String() != "172.16.9.9:1234" || ev.Decision.Group != "web" {
			t.Errorf("%+v", ev)
		}
	}
	c.send("CONNECT other.test:443 HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, body := c.response("CONNECT"); resp.StatusCode != 403 || !strings.Contains(body, "172.16.9.9") {
		t.Errorf("%s\n%s", resp.Status, body)
	}
	if ev := g.next(); ev.Source.String() != "172.16.9.9:1234" {
		t.Errorf("%+v", ev)
	}
}

// What does not tell a client leaves the peer as who asks.
func TestT59HeaderWithoutSource(t *testing.T) {
	g := start(t, twoGroups("", 443), behind)
	unix := "\r\n\r\n\x00\r\nQUIT\n\x21\x31\x00\xd8" + strings.Repeat("\x00", 216)
	for _, header := range []string{local, "PROXY UNKNOWN\r\n", "PROXY UNKNOWN ::1 ::1 1 2\r\n", unix} {
		c := g.dial()
		c.send("%sCONNECT evil.test:443 HTTP/1.1\r\n\r\n", header)
		if resp, _ := c.response("CONNECT"); resp.StatusCode != 403 {
			t.Errorf("%q: %s", header, resp.Status)
		}
		if ev := g.next(); ev.Source != addrPort(c.LocalAddr()) || ev.Decision.Group != "others" {
			t.Errorf("%q: %+v", header, ev)
		}
	}
	// Health checks: connect and close, with and without a header.
	for _, probe := range []string{"", local} {
		c := g.dial()
		c.send("%s", probe)
		c.CloseWrite()
		if got := c.rest(); got != "" {
			t.Errorf("a probe is answered: %q", got)
		}
	}
	reset := g.dial()
	g.until(func() bool { return g.srv.Stats().Connections > 0 })
	reset.SetLinger(0)
	reset.Close()
	g.until(func() bool { return g.srv.Stats().Connections == 0 })
	g.quiet()
}

// A load balancer that says nothing is not waited for.
func TestT59SilentLoadBalancer(t *testing.T) {
	g := start(t, twoGroups("", 443), behind, func(c *Config) { c.Timeouts.RequestHeader = 100 * time.Millisecond })
	g.dial().closedUnheard("silence")
	if ev := g.next(); ev.Decision.Reason != policy.ReasonBadRequest || !strings.Contains(ev.Error, "header in time") {
		t.Errorf("%+v", ev)
	}
}

// closedUnheard checks that the gate closes c without a word.
func (c *client) closedUnheard(what string) {
	c.t.Helper()
	if b, err := io.ReadAll(c.TCPConn); len(b) > 0 || err != nil && isTimeout(err) {
		c.t.Errorf("%s: answered %q, %v", what, b, err)
	}
}

func TestT59HeaderRefused(t *testing.T) {
	const connect = "CONNECT api.ok.test:443 HTTP/1.1\r\n\r\n"
	v1 := "PROXY TCP4 10.1.2.3 127.0.0.1 50123 3128\r\n"
	wrong := v2("10.1.2.3:1", "127.0.0.1:2", 0x03, 0, 4, 0, 0, 0, 0) // checksum
	for _, tt := range []struct {
		name, send, want string
		trusted          bool
	}{
		{"v1 from anyone", v1 + connect, "is to send none", false},
		{"v2 from anyone", v2("10.1.2.3:1", "127.0.0.1:2") + connect, "is to send none", false},
		{"local from anyone", local + connect, "is to send none", false},
		{"a method PROXY", "PROXY http://api.ok.test/ HTTP/1.1\r\nHost: x\r\n\r\n", "is to send none", false},
		{"none from a load balancer", connect, "no PROXY protocol header", true},
		{"a broken one", "PROXY TCP4 nobody 127.0.0.1 1 2\r\n" + connect, "not an address", true},
		{"wrong checksum", wrong + connect, "checksum", true},
		{"two", v1 + v1 + connect, "no second one", true},
		{"two, v2", v1 + local + connect, "no second one", true},
		{"cut off", v1[:20], "unexpected EOF", true},
	} {
		g := start(t, twoGroups("", 443), func(c *Config) {
			if tt.trusted {
				behind(c)
			} else {
				c.ProxyProtocol.Trusted = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
			}
		})
		c := g.dial()
		c.send("%s", tt.send)
		if strings.HasSuffix(tt.want, "EOF") {
			c.CloseWrite()
		}
		c.closedUnheard(tt.name)
		ev := g.next()
		if ev.Kind != event.HTTP || ev.Decision.Reason != policy.ReasonBadRequest || ev.Decision.Verdict != policy.Deny || !strings.Contains(ev.Error, tt.want) ||
			ev.Source.Addr() != addrPort(c.LocalAddr()).Addr() && tt.want != "no second one" {
			t.Errorf("%s: %+v", tt.name, ev)
		}
		g.quiet()
	}
}

// Header and head together have one deadline, which bytes do not extend.
func TestT59SlowHeader(t *testing.T) {
	for _, stream := range []string{v2("10.1.2.3:1", "127.0.0.1:2"), "PROXY TCP4 10.1.2.3 127.0.0.1 1 2\r\nCONNECT api.ok.test:443 HTTP/1.1\r\n\r\n"} {
		g := start(t, twoGroups("", 443), behind, func(c *Config) { c.Timeouts.RequestHeader = 300 * time.Millisecond })
		c := g.dial()
		c.trickle(stream, 20*time.Millisecond)
		ev := g.next()
		if ev.Decision.Reason != policy.ReasonBadRequest || ev.Error == "" {
			t.Errorf("%+v", ev)
		}
	}
}

// trickle sends s a byte at a time, and then more and more, until the connection
// ends, which it must.
func (c *client) trickle(s string, pause time.Duration) {
	c.t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		io.Copy(io.Discard, c.TCPConn)
	}()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for end := time.Now().Add(patience / 2); time.Now().Before(end); {
		select {
		case <-ended:
			return
		case <-tick.C:
		}
		next := "x"
		if s != "" {
			next, s = s[:1], s[1:]
		}
		if _, err := io.WriteString(c.TCPConn, next); err != nil {
			<-ended
			return
		}
	}
	c.t.Error("the connection does not end")
}

// A header alone is no request: it does not hold up the end of the program.
func TestHeaderAloneDoesNotHoldUpTheDrain(t *testing.T) {
	g := start(t, twoGroups("", 443), behind, func(c *Config) { c.Timeouts.RequestHeader = patience; c.Timeouts.Drain = patience })
	c := g.dial()
	c.send("PROXY TCP4 10.1.2.3 127.0.0.1 1 2\r\n")
	g.until(func() bool { return g.srv.Stats().Connections == 1 })
	began := time.Now()
	if err := g.srv.Shutdown(t.Context()); err != nil || time.Since(began) > patience/2 {
		t.Errorf("Shutdown: %v after %v", err, time.Since(began))
	}
}

func TestUnmapPrefixes(t *testing.T) {
	got := unmapPrefixes([]netip.Prefix{netip.MustParsePrefix("::ffff:10.0.0.0/104"), netip.MustParsePrefix("::/0"), netip.MustParsePrefix("10.1.2.3/8")})
	if s := fmt.Sprint(got); s != "[10.0.0.0/8 ::/0 10.0.0.0/8]" {
		t.Error(s)
	}
}

// The limits of a source are those of the client that a load balancer tells of.
func TestT59LimitsByHeader(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	g := start(t, twoGroups(", protocol: tcp", o.port()), behind, func(c *Config) { c.Limits.TunnelsPerSource = 1 })
	g.resolver.set("a.ok.test", "127.0.0.1")
	open := func(source string) int {
		c := g.dial()
		c.send("%sCONNECT a.ok.test:%d HTTP/1.1\r\n\r\n", v2(source, "127.0.0.1:1"), o.port())
		resp, _ := c.response(http.MethodConnect)
		return resp.StatusCode
	}
	for _, tt := range []struct {
		source string
		want   int
	}{{"10.0.0.1:1", 200}, {"10.0.0.1:2", 429}, {"10.0.0.2:1", 200}, {"[2001:db8::1]:1", 200}, {"[2001:db8::ffff:1]:1", 429}, {"[2001:db8:0:1::1]:1", 200}} {
		if got := open(tt.source); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.source, got, tt.want)
		}
	}
}
