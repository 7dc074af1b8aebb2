package proxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
)

// tcpPolicy allows names of .ok.test on port, whatever is spoken.
func tcpPolicy(port int) string { return policyFor(", protocol: tcp", port) }

// echo answers each connection of o with what it receives.
func (o *origin) echo(t testing.TB) {
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	go func() {
		for {
			select {
			case c := <-o.conns:
				c.SetDeadline(time.Time{})
				go func() { io.Copy(c, c); c.Close() }()
			case <-done:
				return
			}
		}
	}()
}

func (c *client) ping() {
	c.t.Helper()
	c.send("ping\n")
	if line, err := c.ReadString('\n'); line != "ping\n" {
		c.t.Fatalf("%q, %v", line, err)
	}
}

func TestT65Revocation(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	both := tcpPolicy(o.port())
	g := start(t, both)
	g.resolver.set("keep.ok.test", "127.0.0.1")
	g.resolver.set("drop.ok.test", "127.0.0.1")
	keep := g.connect(fmt.Sprintf("keep.ok.test:%d", o.port()))
	drop := g.connect(fmt.Sprintf("drop.ok.test:%d", o.port()))
	keep.ping()
	drop.ping()

	g.store.Swap(compile(t, both+"    deny: [drop.ok.test]\n"))
	if _, err := drop.ReadByte(); err == nil {
		t.Error("the revoked tunnel goes on")
	}
	if ev := g.next(); ev.Name != "drop.ok.test" || ev.Decision.Reason != policy.ReasonPolicyRevoked || ev.Decision.Verdict != policy.Deny || ev.BytesUp != 5 || ev.BytesDown != 5 {
		t.Errorf("%+v", ev)
	}
	keep.ping()
	g.quiet()
	keep.Close()
	if ev := g.next(); ev.Decision.Reason != policy.ReasonMatched {
		t.Errorf("%+v", ev)
	}
}

// TestT65RevocationOnTheWay changes the policy while tunnels are set up: between the
// decision and the registration.
func TestT65RevocationOnTheWay(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	both := tcpPolicy(o.port())
	g := start(t, both)
	g.resolver.set("drop.ok.test", "127.0.0.1")
	tn := &tunnel{s: g.srv, request: policy.Request{Name: policy.MustName("drop.ok.test"), Port: uint16(o.port())}}
	tn.request.Source = g.srv.Addrs()[0].Addr()
	var far net.Conn
	tn.client, far = net.Pipe()
	defer far.Close()
	before := g.srv.generation.Load()
	g.store.Swap(compile(t, both+"    deny: [drop.ok.test]\n"))
	g.srv.register(tn, before)
	if tn.revoked.Load() == nil {
		t.Error("a tunnel decided under the old policy lives on")
	}
	if _, err := tn.client.Write([]byte("x")); err == nil {
		t.Error("it is not closed")
	}
	tn.end("")
	if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked {
		t.Errorf("%+v", ev)
	}
}

func TestT65RevokedSession(t *testing.T) {
	port := site(t, dump)
	text := policyFor("", port)
	g := start(t, text)
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.connect(fmt.Sprintf("api.ok.test:%d", port))
	c.send("GET / HTTP/1.1\r\nHost: api.ok.test:%d\r\n\r\n", port)
	if resp, _ := c.response("GET"); resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	g.next()
	g.store.Swap(compile(t, text+"    deny: [api.ok.test]\n"))
	if _, err := c.ReadByte(); err == nil {
		t.Error("the session goes on")
	}
	if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked {
		t.Errorf("%+v", ev)
	}
}

func TestTunnelLimits(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	for _, tt := range []struct {
		limits Limits
		status int
	}{{Limits{Tunnels: 2}, 503}, {Limits{TunnelsPerSource: 2}, 429}, {Limits{TunnelsPerGroup: 2}, 503}, {Limits{Tunnels: 2, TunnelsPerSource: 2, TunnelsPerGroup: 2}, 429}} {
		g := start(t, tcpPolicy(o.port()), func(c *Config) { c.Limits = tt.limits })
		g.resolver.set("a.ok.test", "127.0.0.1")
		target := fmt.Sprintf("a.ok.test:%d", o.port())
		first, second := g.connect(target), g.connect(target)
		first.ping()
		for range 3 {
			c := g.dial()
			c.send("CONNECT %s HTTP/1.1\r\n\r\n", target)
			resp, _ := c.response(http.MethodConnect)
			if resp.StatusCode != tt.status || resp.Header.Get("Retry-After") == "" || resp.Header.Get("X-Sallyport-Reason") != "limit_exceeded" {
				t.Errorf("%+v: %s %v", tt.limits, resp.Status, resp.Header)
			}
			if ev := g.next(); ev.Decision.Reason != policy.ReasonLimitExceeded || ev.Error == "" {
				t.Errorf("%+v", ev)
			}
		}
		second.Close()
		g.next() // the place is free before the event is out
		g.connect(target).ping()
		// What is refused or fails takes no place for long.
		for range 3 {
			g.refused(fmt.Sprintf("gone.ok.test:%d", o.port()))
			g.refused("evil.test:443")
		}
	}
}

func TestIdle(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	g := start(t, tcpPolicy(o.port()), func(c *Config) { c.Timeouts.Idle = 500 * time.Millisecond })
	g.resolver.set("a.ok.test", "127.0.0.1")
	c := g.connect(fmt.Sprintf("a.ok.test:%d", o.port()))
	c.ping()
	if got := c.rest(); got != "" {
		t.Errorf("%q", got)
	}
	if ev := g.next(); ev.Error != "idle_timeout" {
		t.Errorf("%+v", ev)
	}
}

// TestHalfClose goes on in the other direction after the end of one.
func TestHalfClose(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, tcpPolicy(o.port()))
	g.resolver.set("a.ok.test", "127.0.0.1")
	c := g.connect(fmt.Sprintf("a.ok.test:%d", o.port()))
	u := o.accept(t).(*net.TCPConn)
	io.WriteString(u, "down")
	u.CloseWrite()
	if got := c.rest(); got != "down" {
		t.Errorf("%q", got)
	}
	c.send("%s", strings.Repeat("up", 1<<16))
	c.Close()
	if b, err := io.ReadAll(u); len(b) != 2<<16 || err != nil {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if ev := g.next(); ev.BytesUp != 2<<16 || ev.BytesDown != 4 || ev.Error != "" {
		t.Errorf("%+v", ev)
	}
}

// TestIdleTunnelMemory measures what an idle tunnel holds in this process, its
// client and origin included: each is one more socket.
func TestIdleTunnelMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("opens many tunnels")
	}
	const n = 300
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	measure := func() uint64 {
		var m runtime.MemStats
		for range 3 { // pools are emptied in two steps, stacks shrink
			runtime.GC()
		}
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	h := hello("api.ok.test")
	conns := make([]net.Conn, 0, 2*n)
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	buf := make([]byte, len(established))
	open := func() {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(c, "CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
		if _, err := io.ReadFull(c, buf); err != nil {
			t.Fatal(err)
		}
		c.Write(h)
		u := <-o.conns
		if _, err := io.ReadFull(u, make([]byte, len(h))); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c, u)
	}
	open()
	before := measure()
	for range n {
		open()
	}
	per := (float64(measure()) - float64(before)) / n / 1024
	t.Logf("%.1f KiB a tunnel, both peers' sockets included", per)
	if per > 12 && !raceEnabled {
		t.Errorf("an idle tunnel holds %.1f KiB", per)
	}
}
