package proxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

func TestRates(t *testing.T) {
	if r := newRates(0, 5); r.exceeded(netip.MustParseAddr("10.0.0.1"), time.Now()) {
		t.Error("no limit is exceeded")
	}
	r := newRates(10, 3)
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	now := r.start.Add(time.Hour)
	try := func(what string, source netip.Addr, want ...bool) {
		t.Helper()
		for i, w := range want {
			if got := r.exceeded(source, now); got != w {
				t.Errorf("%s: try %d: exceeded %v, want %v", what, i, got, w)
			}
		}
	}
	try("burst", a, false, false, false, true, true)
	try("another source", b, false, false, false, true)
	now = now.Add(99 * time.Millisecond)
	try("too early", a, true)
	now = now.Add(time.Millisecond)
	try("one more after a tenth of a second", a, false, true)
	now = now.Add(250 * time.Millisecond)
	try("two after a quarter", a, false, false, true)
	now = now.Add(time.Hour)
	try("never more than the burst", a, false, false, false, true)
	now = now.Add(-2 * time.Hour)
	try("a clock that goes back grants nothing", a, true)
	now = now.Add(2 * time.Hour)
	try("IPv6 counts by /64", netip.MustParseAddr("2001:db8::1"), false, false)
	try("IPv6 counts by /64", netip.MustParseAddr("2001:db8::ffff:0:0:2"), false, true)
	try("another /64", netip.MustParseAddr("2001:db8:0:1::1"), false)
	if r := newRates(2, 0); r.burst != r.every {
		t.Errorf("the default burst is %v ahead, want that of as many as a second", r.burst)
	}
}

// However many sources come, the table keeps its bound, forgets those whose time is
// over, and goes on counting.
func TestRatesAreBounded(t *testing.T) {
	r := newRates(1, 1)
	now := r.start
	source := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}) }
	for i := range maxRated + 1000 {
		if r.exceeded(source(i), now) {
			t.Fatalf("source %d is refused", i)
		}
	}
	if len(r.next) > maxRated {
		t.Errorf("%d sources are remembered", len(r.next))
	}
	if last := source(maxRated + 999); !r.exceeded(last, now) {
		t.Error("with a full table nothing is counted")
	}
	now = now.Add(time.Minute)
	for i := range maxRated {
		r.exceeded(source(1<<20+i/2), now)
	}
	if n := len(r.next); n > maxRated*3/4 {
		t.Errorf("%d sources are remembered, though the time of most is over", n)
	}
	if n := testing.AllocsPerRun(100, func() { r.exceeded(source(1), now) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// rated lets a source have burst connections, and then no more as long as the test
// may take.
func rated(g *gate, burst int) {
	r := g.srv.rates
	r.mu.Lock()
	defer r.mu.Unlock()
	r.every = time.Hour
	r.burst = time.Duration(burst-1) * time.Hour
}

func TestConnectionRate(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	g := start(t, twoGroups(", protocol: tcp", o.port()), behind, func(c *Config) { c.Limits.ConnectionsPerSecond = 1 })
	rated(g, 2)
	g.resolver.set("a.ok.test", "127.0.0.1")
	from := func(source string) *client {
		c := g.dial()
		c.send("%s", v2(source, "127.0.0.1:1"))
		return c
	}
	first := from("10.0.0.1:1")
	first.send("CONNECT a.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
	first.response(http.MethodConnect)
	first.ping()
	from("10.0.0.1:2").CloseWrite() // a connection without a request counts, too
	g.until(func() bool {
		r := g.srv.rates
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.next[netip.MustParseAddr("10.0.0.1")] > time.Hour+time.Hour/2 // both are counted
	})
	for _, tt := range []struct{ request, method, name string }{
		{fmt.Sprintf("CONNECT a.ok.test:%d HTTP/1.1\r\nUser-Agent: x\r\n\r\n", o.port()), "CONNECT", "a.ok.test"},
		{"GET http://a.ok.test/ HTTP/1.1\r\nHost: a.ok.test\r\n\r\n", "GET", "a.ok.test"},
		{"GET http://a.ok.test/ HTTP/1.0\r\n\r\n", "GET", ""},
	} {
		c := from("10.0.0.1:3")
		c.send("%s", tt.request)
		resp, body := c.response(tt.method)
		if resp.StatusCode != 429 || resp.Header.Get("Retry-After") == "" || resp.Header.Get("X-Sallyport-Reason") != "limit_exceeded" ||
			!strings.Contains(resp.Header.Get("Proxy-Status"), "connection_limit_reached") || !resp.Close {
			t.Errorf("%s: %s %v\n%s", tt.request, resp.Status, resp.Header, body)
		}
		ev := g.event(func(ev *event.Event) bool { return ev.Source.Port() == 3 })
		if ev.Decision.Reason != policy.ReasonLimitExceeded || ev.Status != 429 || ev.Name != tt.name || ev.Method != tt.method || ev.Error != errTooFast.Error() ||
			tt.name != "" && ev.Decision.Group != "ten" {
			t.Errorf("%+v", ev)
		}
	}
	// Who says nothing is not waited for.
	from("10.0.0.1:4").closedUnheard("a silent connection")
	if ev := g.next(); ev.Source.Port() != 4 || ev.Decision.Reason != policy.ReasonLimitExceeded || ev.Status != 0 {
		t.Errorf("%+v", ev)
	}
	// With enough of them under way, the next is closed at once.
	g.srv.hurried.Add(maxHurried)
	c := from("10.0.0.1:5")
	if _, err := c.TCPConn.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("beyond %d: %v", maxHurried, err)
	}
	if ev := g.next(); ev.Source.Port() != 5 || ev.Decision.Reason != policy.ReasonLimitExceeded {
		t.Errorf("%+v", ev)
	}
	g.until(func() bool { return g.srv.hurried.Load() == maxHurried })
	// Others, and what this source has open, are unharmed.
	first.ping()
	other := from("10.0.0.2:1")
	other.send("CONNECT a.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
	if resp, _ := other.response(http.MethodConnect); resp.StatusCode != 200 {
		t.Errorf("another source: %s", resp.Status)
	}
	other.ping()
}

// Connections without a request, and those kept for the next one, are counted until
// they end or become tunnels.
func TestConnectionsPerSource(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	port := site(t, dump)
	text := twoGroups(", protocol: tcp", o.port()) + fmt.Sprintf("  - {name: web, sources: [172.16.0.0/12], allow: [{names: [.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}]}\n", port)
	g := start(t, text, behind, func(c *Config) { c.Limits.ConnectionsPerSource = 2 })
	g.resolver.set("a.ok.test", "127.0.0.1")
	count := func() (n int) {
		g.srv.crowd.mu.Lock()
		defer g.srv.crowd.mu.Unlock()
		for _, m := range g.srv.crowd.open {
			n += m
		}
		return n
	}
	open := func(source string) *client {
		c := g.dial()
		c.send("%s", v2(source, "127.0.0.1:1"))
		return c
	}
	get := func(c *client) int {
		c.send("GET http://a.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
		resp, _ := c.response("GET")
		return resp.StatusCode
	}
	silent := open("172.16.0.1:1")
	g.until(func() bool { return count() == 1 })
	kept := open("172.16.0.1:2")
	if got := get(kept); got != 200 {
		t.Fatalf("a second connection: %d", got)
	}
	if got := get(open("172.16.0.1:3")); got != 429 {
		t.Errorf("a third connection: %d", got)
	}
	if ev := g.event(func(ev *event.Event) bool { return ev.Source.Port() == 3 }); ev.Error != errTooManyConnections.Error() || ev.Decision.Reason != policy.ReasonLimitExceeded {
		t.Errorf("%+v", ev)
	}
	if got := get(open("172.16.0.2:1")); got != 200 {
		t.Errorf("another source: %d", got)
	}
	if got := get(kept); got != 200 {
		t.Errorf("the next request: %d", got)
	}
	g.until(func() bool { return count() == 3 })
	silent.Close()
	g.until(func() bool { return count() == 2 })
	// A CONNECT on it ends the count, too.
	kept.send("CONNECT evil.test:443 HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, _ := kept.response("CONNECT"); resp.StatusCode != 403 {
		t.Error(resp.Status)
	}
	g.until(func() bool { return count() == 1 })
	for range 5 { // tunnels do not count
		c := open("10.0.0.1:1")
		c.send("CONNECT a.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
		if resp, body := c.response("CONNECT"); resp.StatusCode != 200 {
			t.Fatalf("%s %s", resp.Status, body)
		}
		c.ping()
		g.until(func() bool { return count() == 1 })
	}
}

func TestURLTooLong(t *testing.T) {
	port := site(t, dump)
	g := start(t, policyFor("", port), func(c *Config) { c.Limits.URLBytes = 1000 })
	g.resolver.set("api.ok.test", "127.0.0.1")
	url := func(n int) string {
		u := fmt.Sprintf("http://api.ok.test:%d/", port)
		return u + strings.Repeat("a", n-len(u))
	}
	for _, first := range []bool{true, false} { // the front reads the first head, net/http the second
		c := g.dial()
		if !first {
			c.send("GET %s HTTP/1.1\r\nHost: x\r\n\r\n", url(1000))
			if resp, _ := c.response("GET"); resp.StatusCode != 200 {
				t.Errorf("1000 bytes: %s", resp.Status)
			}
			g.next()
		}
		c.send("GET %s HTTP/1.1\r\nHost: x\r\n\r\n", url(1001))
		if resp, _ := c.response("GET"); resp.StatusCode != 414 || resp.Header.Get("X-Sallyport-Reason") != "bad_request" {
			t.Errorf("1001 bytes: %s %v", resp.Status, resp.Header)
		}
		if ev := g.next(); ev.Status != 414 || ev.Decision.Reason != policy.ReasonBadRequest || len(ev.Name) > maxShown {
			t.Errorf("%+v", ev)
		}
	}
}

// TestT33Trickle has a client that sends a byte now and then in every phase that it
// controls: none lasts longer for it.
func TestT33Trickle(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	port := site(t, dump)
	const short = 300 * time.Millisecond
	for _, tt := range []struct {
		name string
		to   func(c *client) string // brings c into the phase, and returns what to send there
		want policy.Reason          // 0: any, or none
	}{
		{"request head", func(*client) string {
			return "CONNECT api.ok.test:443 HTTP/1.1\r\nX-Filler: " + strings.Repeat("x", 1000)
		}, policy.ReasonBadRequest},
		{"ClientHello", func(c *client) string {
			c.send("CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
			c.response("CONNECT")
			return string(hello("api.ok.test"))
		}, policy.ReasonHelloTimeout},
		{"HTTP inside a CONNECT", func(c *client) string {
			c.send("CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
			c.response("CONNECT")
			return "GET / HTTP/1.1\r\nX-Filler: "
		}, policy.ReasonBadRequest},
		{"a method inside a CONNECT", func(c *client) string {
			c.send("CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
			c.response("CONNECT")
			return "AAAAA"
		}, policy.ReasonNotTLS},
		{"the next head", func(c *client) string {
			c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
			c.response("GET")
			return "GET http://api.ok.test/ HTTP/1.1\r\nX-Filler: "
		}, 0},
		{"after a refusal", func(c *client) string {
			c.send("CONNECT evil.test:443 HTTP/1.1\r\n\r\n")
			c.response("CONNECT")
			return ""
		}, policy.ReasonNotListed},
		{"the body of a refused request", func(c *client) string {
			c.send("POST http://evil.test/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
			c.response("POST")
			return ""
		}, policy.ReasonNotListed},
		{"after a TLS alert", func(c *client) string {
			c.send("CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
			c.response("CONNECT")
			c.send("%s", hello("evil.test"))
			io.ReadFull(c, make([]byte, 7))
			return ""
		}, policy.ReasonSNIMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, policyFor("", o.port(), port), func(c *Config) {
				c.Timeouts.RequestHeader, c.Timeouts.ClientHello, c.Timeouts.Idle = short, short, patience
			})
			g.resolver.set("api.ok.test", "127.0.0.1")
			c := g.dial()
			c.trickle(tt.to(c), 10*time.Millisecond)
			if tt.want != 0 {
				if ev := g.event(func(ev *event.Event) bool { return ev.Decision.Reason != policy.ReasonMatched }); ev.Decision.Reason != tt.want {
					t.Errorf("%+v", ev)
				}
			}
			g.until(func() bool { return g.srv.Stats().Connections == 0 })
		})
	}
}

// A client that takes nothing in cannot hold up a refusal, or a 200.
func TestUnreadAnswerIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{Decider: new(policy.Store)})
		client, conn := net.Pipe()
		defer client.Close()
		began := time.Now()
		s.wg.Add(1)
		s.serveTakenBack(conn, netip.Addr{}, asker{}, began, &head{method: []byte("CONNECT"), target: []byte("evil.test:443")}, nil, false)
		if took := time.Since(began); took != answerTime {
			t.Errorf("the refusal took %v, want %v", took, answerTime)
		}
	})
}

// TestRevocationOfMany closes exactly the tunnels of the rules that are gone, out of
// a thousand.
func TestRevocationOfMany(t *testing.T) {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil || r.Cur < 8192 || testing.Short() {
		t.Skipf("opens 4,000 sockets; the limit is %d, %v", r.Cur, err)
	}
	const n, rules = 1000, 4
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	text := func(names ...string) string {
		s := "version: 1\ngroups:\n  - name: all\n    sources: [127.0.0.0/8]\n    allow:\n"
		for _, name := range names {
			s += fmt.Sprintf("      - {names: [%s], ports: [%d], protocol: tcp, private_destinations: [127.0.0.0/8]}\n", name, o.port())
		}
		return s
	}
	g := start(t, text("r0.test", "r1.test", "r2.test", "r3.test"))
	clients := make([]*client, n)
	for i := range rules {
		g.resolver.set(fmt.Sprintf("r%d.test", i), "127.0.0.1")
	}
	for i := range clients {
		clients[i] = g.connect(fmt.Sprintf("r%d.test:%d", i%rules, o.port()))
		clients[i].ping()
	}
	if st := g.srv.Stats(); st.Tunnels != n {
		t.Fatalf("%+v", st)
	}
	g.store.Swap(compile(t, text("r0.test", "r2.test")))
	for range n / 2 {
		if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked || ev.Name != "r1.test" && ev.Name != "r3.test" {
			t.Fatalf("%+v", ev)
		}
	}
	for i, c := range clients {
		c.SetDeadline(time.Now().Add(patience))
		if i%rules%2 == 0 {
			c.ping()
		} else if _, err := c.ReadByte(); err == nil || isTimeout(err) {
			t.Fatalf("tunnel %d: %v", i, err)
		}
	}
	g.quiet()
	if st := g.srv.Stats(); st.Tunnels != n/2 {
		t.Errorf("%+v", st)
	}
	g.until(func() bool { return g.srv.Stats().BytesUp == 5*(n+n/2) }) // they count once they are written
}

// BenchmarkTooMany is BenchmarkConnect from a source that has opened too many.
func BenchmarkTooMany(b *testing.B) {
	g := start(b, policyFor("", 443), func(c *Config) { c.Observer, c.Limits.ConnectionsPerSecond = nil, 1 })
	rated(g, 1)
	head := []byte("CONNECT api.ok.test:443 HTTP/1.1\r\nHost: api.ok.test:443\r\nUser-Agent: bench\r\n\r\n")
	b.ReportAllocs()
	for b.Loop() {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			b.Fatal(err)
		}
		c.Write(head)
		if _, err := io.Copy(io.Discard, c); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}
