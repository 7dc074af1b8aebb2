package proxy

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
)

// refused sends a CONNECT that must be refused, and returns status, reason and Proxy-Status.
func (g *gate) refused(target string) (status int, reason, proxyStatus string) {
	g.t.Helper()
	c := g.dial()
	c.send("CONNECT %s HTTP/1.1\r\n\r\n", target)
	resp, _ := c.response(http.MethodConnect)
	return resp.StatusCode, resp.Header.Get("X-Sallyport-Reason"), resp.Header.Get("Proxy-Status")
}

// TestPrivateZone: what the settings expect of a zone may be dialled, but for
// addresses that a guardrail, the platform or this process itself has.
func TestPrivateZone(t *testing.T) {
	far := listen(t, "127.0.0.2:0")
	text := fmt.Sprintf("version: 1\ndeny: [{addresses: [127.9.0.0/16]}]\ngroups:\n  - name: g\n    sources: [127.0.0.0/8]\n    allow: [{names: [.corp.test, www.else.test], ports: [%d], protocol: tcp}]\n", far.port())
	g := start(t, text, func(c *Config) {
		c.PrivateZone = func(n policy.Name, _ netip.Addr) bool { return strings.HasSuffix(n.String(), ".corp.test") }
	})
	g.resolver.set("db.corp.test", "127.0.0.2")
	c := g.connect(fmt.Sprintf("db.corp.test:%d", far.port()))
	far.accept(t).Close()
	c.Close()
	if ev := g.next(); ev.Destination != far.addr || ev.Decision.Verdict != policy.Allow {
		t.Errorf("%+v", ev)
	}
	g.resolver.set("www.else.test", "127.0.0.2")
	g.resolver.set("meta.corp.test", "169.254.169.254")
	g.resolver.set("denied.corp.test", "127.9.0.1")
	for name, want := range map[string]string{"www.else.test": "private_destination", "meta.corp.test": "private_destination", "denied.corp.test": "explicit_deny"} {
		if status, reason, _ := g.refused(fmt.Sprintf("%s:%d", name, far.port())); status != 403 || reason != want {
			t.Errorf("%s: %d %s, want %s", name, status, reason, want)
		}
		g.next()
	}
}

// only allows one address besides what the policy allows without a destination.
type only struct {
	Decider
	addr netip.Addr
}

func (o only) Decide(r policy.Request) policy.Decision {
	d := o.Decider.Decide(r)
	if d.Passes() && r.Destination.IsValid() && r.Destination != o.addr {
		return d.Refuse(policy.ReasonPrivateDestination)
	}
	return d
}

// TestT37MixedAnswer: the addresses that do not pass are not tried.
func TestT37MixedAnswer(t *testing.T) {
	good := listen(t, "127.0.0.2:0")
	bad := listen(t, fmt.Sprintf("127.0.0.1:%d", good.port()))
	g := start(t, policyFor(", protocol: tcp", good.port()), func(c *Config) { c.Decider = only{c.Decider, good.addr.Addr()} })
	g.resolver.set("api.ok.test", "127.0.0.1", "::1", "127.0.0.2", "127.0.0.3")
	c := g.connect(fmt.Sprintf("api.ok.test:%d", good.port()))
	good.accept(t).Close()
	c.Close()
	if ev := g.next(); ev.Destination != good.addr {
		t.Errorf("%+v", ev)
	}
	if n := len(bad.conns); n != 0 {
		t.Errorf("%d connections to an address that did not pass", n)
	}
	if n := g.resolver.asked.Load(); n != 1 {
		t.Errorf("%d look-ups", n)
	}
}

// TestT38Rebinding: the answer changes after the check, and nobody sees it.
func TestT38Rebinding(t *testing.T) {
	good := listen(t, "127.0.0.2:0")
	bad := listen(t, fmt.Sprintf("127.0.0.1:%d", good.port()))
	for _, target := range []string{"CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n", "GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n"} {
		keys := ", protocol: tcp"
		if target[0] == 'G' {
			keys = ""
		}
		g := start(t, policyFor(keys, good.port()), func(c *Config) { c.Decider = only{c.Decider, good.addr.Addr()} })
		g.resolver.intercept(func(context.Context, string) ([]netip.Addr, error) {
			if g.resolver.asked.Load() == 1 {
				return []netip.Addr{good.addr.Addr()}, nil
			}
			return []netip.Addr{bad.addr.Addr()}, nil
		})
		c := g.dial()
		c.send(target, good.port())
		good.accept(t).Close()
		c.response(http.MethodConnect)
		c.Close()
		if ev := g.next(); ev.Destination != good.addr {
			t.Errorf("%+v", ev)
		}
		if n := g.resolver.asked.Load(); n != 1 || len(bad.conns) != 0 {
			t.Errorf("%d look-ups, %d connections to the second answer", n, len(bad.conns))
		}
	}
}

// TestT34FarSideFails: the truth on the CONNECT itself.
func TestT34FarSideFails(t *testing.T) {
	dead := listen(t, "127.0.0.1:0") // takes a port; another address of it is closed
	g := start(t, policyFor("", dead.port()), func(c *Config) { c.Timeouts.Connect = 500 * time.Millisecond })
	g.resolver.set("refuses.ok.test", "127.0.0.3", "127.0.0.4")
	g.resolver.set("empty.ok.test")
	g.resolver.intercept(func(ctx context.Context, host string) ([]netip.Addr, error) {
		if host == "slow.ok.test" {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return nil, nil
	})
	for _, tt := range []struct {
		host   string
		status int
		reason policy.Reason
		token  string
	}{
		{"gone.ok.test", 502, policy.ReasonResolveFailed, "dns_error"},
		{"empty.ok.test", 502, policy.ReasonResolveFailed, "dns_error"},
		{"slow.ok.test", 504, policy.ReasonResolveFailed, "dns_timeout"},
		{"refuses.ok.test", 502, policy.ReasonConnectFailed, "connection_refused"},
	} {
		for _, format := range []string{"CONNECT %s:%d HTTP/1.1\r\n\r\n", "GET http://%s:%d/ HTTP/1.1\r\nHost: x\r\n\r\n"} {
			c := g.dial()
			c.send(format, tt.host, dead.port())
			resp, body := c.response(http.MethodConnect)
			want := fmt.Sprintf("sallyport; error=%s; details=%q", tt.token, tt.reason.String())
			if resp.StatusCode != tt.status || resp.Header.Get("Proxy-Status") != want || resp.Header.Get("X-Sallyport-Reason") != tt.reason.String() {
				t.Errorf("%s: %s, %v\n%s", tt.host, resp.Status, resp.Header, body)
			}
			if ev := g.next(); ev.Decision.Reason != tt.reason || ev.Decision.Rule != "r" || ev.Status != tt.status || ev.Error == "" {
				t.Errorf("%s: %+v", tt.host, ev)
			}
		}
	}
}

// TestT19Loop tries it with a literal address and for a name that leads back.
func TestT19Loop(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "0.0.0.0:0"} {
		g := start(t, "version: 1\ngroups: []\n", func(c *Config) { c.Listen = []string{listen} })
		port := int(g.srv.Addrs()[0].Port())
		g.addr = fmt.Sprintf("127.0.0.1:%d", port)
		text := policyFor("", port) + fmt.Sprintf("      - {addresses: [127.0.0.0/8], ports: [%d]}\n", port)
		g.store.Swap(compile(t, text))
		g.resolver.set("api.ok.test", "127.0.0.1")
		for _, host := range []string{"127.0.0.1", "api.ok.test"} {
			if status, reason, ps := g.refused(fmt.Sprintf("%s:%d", host, port)); status != 403 || reason != "loop" || ps != `sallyport; error=proxy_loop_detected; details="loop"` {
				t.Errorf("listening on %s, to %s: %d %s %s", listen, host, status, reason, ps)
			}
			g.next()
		}
	}
}

// TestLiteral connects to an address that a rule lists.
func TestLiteral(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, fmt.Sprintf("version: 1\ngroups:\n  - {name: g, sources: [127.0.0.0/8], allow: [{addresses: [127.0.0.0/8], ports: [%d], protocol: tcp}]}\n", o.port()))
	c := g.connect(o.addr.String())
	o.accept(t).Close()
	c.Close()
	if ev := g.next(); ev.Name != "127.0.0.1" || ev.Destination != o.addr || ev.DNSTime != 0 {
		t.Errorf("%+v", ev)
	}
}
