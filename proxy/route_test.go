package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/proxy/upstream"
)

// parent is a proxy that takes CONNECTs alone and resolves every name to loopback.
type parent struct {
	*upstream.Parent
	addr netip.AddrPort

	mu     sync.Mutex
	asked  []string
	via    string                     // of the last one
	answer func(target string) string // "" : a tunnel
}

// serveParent runs a parent until the end of the test. What a tunnel's far side
// says at once may come together with the 200.
func serveParent(t testing.TB) *parent {
	t.Helper()
	o := listen(t, "127.0.0.1:0")
	p := &parent{addr: o.addr, Parent: &upstream.Parent{Host: o.addr.Addr().String(), Port: o.addr.Port()}}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case c := <-o.conns:
				wg.Go(func() { p.serve(c) })
			case <-stop:
				return
			}
		}
	})
	t.Cleanup(func() { close(stop); wg.Wait() })
	return p
}

func (p *parent) serve(c net.Conn) {
	defer c.Close()
	br := bufio.NewReader(c)
	r, err := http.ReadRequest(br)
	if err != nil {
		return
	}
	p.mu.Lock()
	p.asked = append(p.asked, r.Method+" "+r.Host)
	p.via = strings.Join(r.Header["Via"], ", ")
	answer := ""
	if p.answer != nil {
		answer = p.answer(r.Host)
	}
	p.mu.Unlock()
	if answer != "" {
		io.WriteString(c, answer)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, br)
		return
	}
	_, port, _ := net.SplitHostPort(r.Host)
	u, err := net.Dial("tcp", "127.0.0.1:"+port)
	if err != nil {
		io.WriteString(c, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
		return
	}
	defer u.Close()
	u.SetDeadline(time.Now().Add(patience))
	io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(u, br); u.(*net.TCPConn).CloseWrite() })
	io.Copy(c, u)
	c.(*net.TCPConn).CloseWrite()
	wg.Wait()
}

// took returns what the parent was asked for since the last call.
func (p *parent) took() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	asked := p.asked
	p.asked = nil
	return asked
}

func through(p *parent, edit ...func(*Routes)) func(*Config) {
	return func(c *Config) {
		c.Routes.Default.Parent = p.Parent
		for _, e := range edit {
			e(&c.Routes)
		}
	}
}

func byAddress(r *Routes) { r.ParentByAddress = true }

// TestParent sends everything that leaves through a parent, by CONNECT.
func TestParent(t *testing.T) {
	p := serveParent(t)
	port := site(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/b" {
			w.Header().Set("Connection", "close")
		}
		dump(w, r)
	})
	// The group's own way, to a public address: the parent's private one is no matter
	// of the policy.
	text := strings.Replace(policyFor("", port), `, private_destinations: [127.0.0.0/8, "::1/128"]`, "", 1)
	g := start(t, text, through(p, func(r *Routes) { *r = Routes{Groups: map[string]Route{"g": r.Default}} }))
	g.resolver.set("api.ok.test", "203.0.114.1")
	authority := fmt.Sprintf("api.ok.test:%d", port)
	from := func(kind event.Kind) {
		t.Helper()
		if ev := g.event(func(ev *event.Event) bool { return ev.Kind == kind }); ev.Parent != p.String() || ev.Destination != p.addr || ev.Decision.Verdict != policy.Allow || ev.Status != 200 {
			t.Errorf("%+v", ev)
		}
	}
	want := []string{"CONNECT " + authority}

	// Plain HTTP, twice over one connection.
	c := g.dial()
	for range 2 {
		c.send("GET http://%s/a HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic x\r\n\r\n", authority)
		if resp, body := c.response("GET"); resp.StatusCode != 200 || body != fmt.Sprintf("GET /a\nHost: %s\nVia: 1.1 %s\r\n", authority, pseudonym) {
			t.Errorf("%s\n%s", resp.Status, body)
		}
		from(event.HTTP)
	}
	if asked := p.took(); !slices.Equal(asked, want) {
		t.Errorf("the parent was asked for %q", asked)
	}

	// HTTP inside a CONNECT: the far side closes after each response, so that the
	// second request needs a connection of its own.
	c = g.connect(authority)
	for range 2 {
		c.send("GET /b HTTP/1.1\r\nHost: %s\r\n\r\n", authority)
		if resp, _ := c.response("GET"); resp.StatusCode != 200 {
			t.Error(resp.Status)
		}
		from(event.HTTP)
	}
	c.Close()
	from(event.Connect)
	if asked := p.took(); !slices.Equal(asked, append(want, want...)) {
		t.Errorf("the parent was asked for %q", asked)
	}
}

// TestParentTunnel relays TLS, and what a far side says first.
func TestParentTunnel(t *testing.T) {
	p := serveParent(t)
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor(", protocol: tcp", o.port()), through(p))
	g.resolver.set("db.ok.test", "127.0.0.1")
	early := fmt.Sprintf("HTTP/1.1 200 OK\r\n\r\n%s", "220 early\r\n")
	p.answer = func(string) string { return early }
	c := g.connect(fmt.Sprintf("db.ok.test:%d", o.port()))
	if got := c.rest(); got != "220 early\r\n" {
		t.Errorf("%q", got)
	}
	c.Close()
	if ev := g.next(); ev.BytesDown != int64(len("220 early\r\n")) || ev.Error != "" {
		t.Errorf("%+v", ev)
	}
	p.mu.Lock()
	p.answer = nil
	p.mu.Unlock()
	c = g.connect(fmt.Sprintf("db.ok.test:%d", o.port()))
	u := o.accept(t)
	io.WriteString(u, "hello")
	u.(*net.TCPConn).CloseWrite()
	c.send("world")
	c.CloseWrite()
	if got := c.rest(); got != "hello" {
		t.Errorf("%q", got)
	}
	if b, err := io.ReadAll(u); err != nil || string(b) != "world" {
		t.Errorf("%q, %v", b, err)
	}
	g.next()
}

// TestT19ParentLoop shows that a parent can see where a request has been: of gates
// that are each other's parents, the first one refuses it when it comes back.
func TestT19ParentLoop(t *testing.T) {
	p := serveParent(t)
	g := start(t, policyFor("", 8080), through(p))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, tt := range []struct{ send, want string }{
		{"CONNECT api.ok.test:8080 HTTP/1.1\r\nHost: api.ok.test:8080\r\n\r\n", "1.1 " + pseudonym},
		{"CONNECT api.ok.test:8080 HTTP/1.1\r\nHost: api.ok.test:8080\r\nVia: 1.1 a\r\nVIA: 1.0 b, 1.1 c\r\n\r\n", "1.1 a, 1.0 b, 1.1 c, 1.1 " + pseudonym},
		{"GET http://api.ok.test:8080/ HTTP/1.1\r\nHost: api.ok.test:8080\r\nVia: 1.1 a\r\nConnection: close\r\n\r\n", "1.1 a, 1.1 " + pseudonym},
	} {
		c := g.dial()
		c.send("%s", tt.send)
		c.response(http.MethodConnect) // whatever it is
		c.Close()
		p.mu.Lock()
		if p.via != tt.want {
			t.Errorf("Via of the parent's CONNECT: %q, want %q", p.via, tt.want)
		}
		p.mu.Unlock()
	}
}

// TestT40ParentChaining: names and addresses are decided before a parent hears of them.
func TestT40ParentChaining(t *testing.T) {
	p := serveParent(t)
	p.answer = func(string) string { return "HTTP/1.1 200 OK\r\n\r\nfar side" }
	text := `
version: 1
groups:
  - name: g
    sources: [127.0.0.0/8]
    allow:
      - {id: r, names: [.ok.test, .corp.test], ports: [443], protocol: tcp}
`
	resolve := func(r *Routes) { r.ParentResolves = []string{".corp.test", "*.lab.ok.test", "one.ok.test"} }
	for _, tt := range []struct {
		name   string
		target string
		addrs  []string // of the name; nil: it does not exist
		edit   []func(*Routes)
		reason policy.Reason // ReasonMatched: it passes
		asked  []string
	}{
		{"not listed", "evil.test:443", []string{"192.0.2.1"}, nil, policy.ReasonNotListed, nil},
		{"literal", "192.0.2.1:443", nil, nil, policy.ReasonIPLiteral, nil},
		{"by name", "api.ok.test:443", []string{"203.0.114.1", "203.0.114.2"}, nil, policy.ReasonMatched, []string{"CONNECT api.ok.test:443"}},
		{"private", "api.ok.test:443", []string{"10.0.0.1"}, nil, policy.ReasonPrivateDestination, nil},
		{"metadata", "api.ok.test:443", []string{"169.254.169.254"}, nil, policy.ReasonPrivateDestination, nil},
		// By name the parent might take the private one.
		{"mixed", "api.ok.test:443", []string{"203.0.114.1", "10.0.0.1"}, nil, policy.ReasonPrivateDestination, nil},
		{"mixed by address", "api.ok.test:443", []string{"10.0.0.1", "203.0.114.1"}, []func(*Routes){byAddress}, policy.ReasonMatched, []string{"CONNECT 203.0.114.1:443"}},
		{"IPv6 by address", "api.ok.test:443", []string{"2600::1"}, []func(*Routes){byAddress}, policy.ReasonMatched, []string{"CONNECT [2600::1]:443"}},
		{"unresolved", "api.ok.test:443", nil, nil, policy.ReasonResolveFailed, nil},
		{"unresolved, others delegated", "api.ok.test:443", nil, []func(*Routes){resolve}, policy.ReasonResolveFailed, nil},
		{"look-alike of a delegated suffix", "xcorp.ok.test:443", nil, []func(*Routes){resolve}, policy.ReasonResolveFailed, nil},
		{"below a delegated name", "a.one.ok.test:443", nil, []func(*Routes){resolve}, policy.ReasonResolveFailed, nil},
		{"a star is not the name", "lab.ok.test:443", nil, []func(*Routes){resolve}, policy.ReasonResolveFailed, nil},
		{"delegated", "git.corp.test:443", nil, []func(*Routes){resolve}, policy.ReasonMatched, []string{"CONNECT git.corp.test:443"}},
		{"delegated apex", "corp.test:443", nil, []func(*Routes){resolve}, policy.ReasonMatched, []string{"CONNECT corp.test:443"}},
		{"delegated star", "a.lab.ok.test:443", nil, []func(*Routes){resolve}, policy.ReasonMatched, []string{"CONNECT a.lab.ok.test:443"}},
		{"delegated name", "one.ok.test:443", nil, []func(*Routes){resolve, byAddress}, policy.ReasonMatched, []string{"CONNECT one.ok.test:443"}},
		{"delegated and private here", "git.corp.test:443", []string{"10.0.0.1"}, []func(*Routes){resolve}, policy.ReasonPrivateDestination, nil},
		{"delegated and not listed", "evil.test:443", nil, []func(*Routes){func(r *Routes) { r.ParentResolves = []string{".test"} }}, policy.ReasonNotListed, nil},
		{"delegated without a parent", "git.corp.test:443", nil, []func(*Routes){resolve, func(r *Routes) { r.Default.Parent = nil }}, policy.ReasonResolveFailed, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, text, through(p, tt.edit...))
			if tt.addrs != nil {
				g.resolver.set(strings.TrimSuffix(tt.target, ":443"), tt.addrs...)
			}
			c := g.dial()
			c.send("CONNECT %s HTTP/1.1\r\n\r\n", tt.target)
			resp, _ := c.response(http.MethodConnect)
			if passes := tt.reason == policy.ReasonMatched; passes != (resp.StatusCode == 200) {
				t.Error(resp.Status)
			} else if passes {
				c.CloseWrite()
				if got := c.rest(); got != "far side" {
					t.Errorf("%q", got)
				}
			}
			c.Close()
			if ev := g.next(); ev.Decision.Reason != tt.reason || (ev.Parent != "") != (tt.asked != nil) {
				t.Errorf("%+v", ev)
			}
			if asked := p.took(); !slices.Equal(asked, tt.asked) {
				t.Errorf("the parent was asked for %q, want %q", asked, tt.asked)
			}
		})
	}
}

// TestParentFails tells the client the truth on the CONNECT, and operators more.
func TestParentFails(t *testing.T) {
	p := serveParent(t)
	for _, tt := range []struct {
		name, answer string
		status       int
		token, text  string
	}{
		{"its policy", "HTTP/1.1 403 Forbidden\r\n\r\n", 502, "destination_unavailable", "answers 403 \"Forbidden\": its own policy"},
		{"credentials", "HTTP/1.1 407 Auth\r\nProxy-Authenticate: Basic\r\n\r\n", 502, "destination_unavailable", "answers 407 \"Auth\": it wants credentials"},
		{"far side", "HTTP/1.1 502 Bad\r\n\r\n", 502, "destination_unavailable", "answers 502"},
		{"far side is slow", "HTTP/1.1 504 Slow\r\n\r\n", 504, "connection_timeout", "answers 504"},
		{"garbage", "220 mail.test ESMTP\r\n", 502, "destination_unavailable", "not HTTP/1"},
		{"endless", "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", 4<<10), 502, "destination_unavailable", "more than 16384 bytes"},
	} {
		for _, format := range []string{"CONNECT %s HTTP/1.1\r\n\r\n", "GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n"} {
			t.Run(tt.name+" "+format[:3], func(t *testing.T) {
				p.mu.Lock()
				p.answer = func(string) string { return tt.answer }
				p.mu.Unlock()
				g := start(t, policyFor("", 8080), through(p))
				g.resolver.set("api.ok.test", "127.0.0.1")
				c := g.dial()
				c.send(format, "api.ok.test:8080")
				resp, body := c.response(http.MethodConnect)
				if want := fmt.Sprintf("sallyport; error=%s; details=\"connect_failed\"", tt.token); resp.StatusCode != tt.status || resp.Header.Get("Proxy-Status") != want {
					t.Errorf("%s %v", resp.Status, resp.Header)
				}
				if resp.Header.Get("Proxy-Authenticate") != "" || strings.Contains(body, "parent") || strings.Contains(body, p.String()) {
					t.Errorf("the client is told of the parent: %v\n%s", resp.Header, body)
				}
				if ev := g.next(); ev.Decision.Reason != policy.ReasonConnectFailed || !strings.Contains(ev.Error, "parent "+p.String()) || !strings.Contains(ev.Error, tt.text) {
					t.Errorf("%+v", ev)
				}
			})
		}
	}
}

// TestParentGone is about a parent that cannot be reached at all.
func TestParentGone(t *testing.T) {
	o := listen(t, "127.0.0.1:0") // takes connections and never answers
	for _, tt := range []struct {
		name   string
		parent upstream.Parent
		status int
		token  string
		reason policy.Reason
	}{
		{"nobody listens", upstream.Parent{Host: "127.0.0.3", Port: o.addr.Port()}, 502, "connection_refused", policy.ReasonConnectFailed},
		{"its name does not exist", upstream.Parent{Host: "proxy.corp.test", Port: 1}, 502, "dns_error", policy.ReasonConnectFailed},
		{"silent", upstream.Parent{Host: "silent.corp.test", Port: o.addr.Port()}, 504, "connection_timeout", policy.ReasonConnectFailed},
		{"this proxy itself", upstream.Parent{Host: "127.0.0.1"}, 403, "proxy_loop_detected", policy.ReasonLoop},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, policyFor("", 8080), func(c *Config) { c.Timeouts.Connect = 500 * time.Millisecond })
			g.resolver.set("api.ok.test", "127.0.0.1")
			g.resolver.set("silent.corp.test", "127.0.0.1")
			if tt.parent.Port == 0 {
				tt.parent.Port = g.srv.Addrs()[0].Port()
			}
			g.srv.SetRoutes(Routes{Default: Route{Parent: &tt.parent}})
			status, reason, ps := g.refused("api.ok.test:8080")
			if want := fmt.Sprintf("sallyport; error=%s; details=%q", tt.token, tt.reason.String()); status != tt.status || reason != tt.reason.String() || ps != want {
				t.Errorf("%d %s %s", status, reason, ps)
			}
			if ev := g.next(); ev.Decision.Reason != tt.reason || !strings.Contains(ev.Error, "parent") || ev.Parent != tt.parent.String() {
				t.Errorf("%+v", ev)
			}
		})
	}
}

// TestParentNextAddress tries the other addresses when the parent says that the
// far side failed, and not when it refuses.
func TestParentNextAddress(t *testing.T) {
	p := serveParent(t)
	g := start(t, policyFor(", protocol: tcp", 8080), through(p, byAddress))
	g.resolver.set("api.ok.test", "127.0.0.1", "127.0.0.2", "127.0.0.3")
	all := []string{"CONNECT 127.0.0.1:8080", "CONNECT 127.0.0.2:8080", "CONNECT 127.0.0.3:8080"}
	for _, tt := range []struct {
		answers map[string]string
		passes  bool
		asked   []string
	}{
		{map[string]string{"127.0.0.1:8080": "HTTP/1.1 503 x\r\n\r\n", "127.0.0.2:8080": "HTTP/1.1 504 x\r\n\r\n", "127.0.0.3:8080": "HTTP/1.1 200 x\r\n\r\n"}, true, all},
		{map[string]string{"127.0.0.1:8080": "HTTP/1.1 502 x\r\n\r\n", "127.0.0.2:8080": "HTTP/1.1 502 x\r\n\r\n", "127.0.0.3:8080": "HTTP/1.1 502 x\r\n\r\n"}, false, all},
		{map[string]string{"127.0.0.1:8080": "HTTP/1.1 403 x\r\n\r\n"}, false, all[:1]},
	} {
		p.mu.Lock()
		p.answer = func(target string) string { return tt.answers[target] }
		p.mu.Unlock()
		c := g.dial()
		c.send("CONNECT api.ok.test:8080 HTTP/1.1\r\n\r\n")
		if resp, _ := c.response(http.MethodConnect); (resp.StatusCode == 200) != tt.passes {
			t.Error(resp.Status)
		}
		c.Close()
		g.next()
		if asked := p.took(); !slices.Equal(asked, tt.asked) {
			t.Errorf("the parent was asked for %q, want %q", asked, tt.asked)
		}
	}
}

// TestRoutesOfGroups gives each group its way out, and changes it while serving.
func TestRoutesOfGroups(t *testing.T) {
	p := serveParent(t)
	peers := make(chan string, 16)
	port := site(t, func(_ http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		peers <- host
	})
	rule := fmt.Sprintf("[{names: [.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}]", port)
	g := start(t, "version: 1\ngroups:\n  - {name: a, sources: [127.0.0.1/32], allow: "+rule+"}\n  - {name: b, sources: [127.0.0.2/32], allow: "+rule+"}\n")
	g.resolver.set("api.ok.test", "127.0.0.1")
	leaves := func(from, want string, proxied bool) {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		conn, err := d.Dial("tcp", g.addr)
		if err != nil {
			t.Skipf("cannot dial from %s: %v", from, err)
		}
		defer conn.Close()
		c := &client{conn.(*net.TCPConn), bufio.NewReader(conn), t}
		c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
		if resp, body := c.response("GET"); resp.StatusCode != 200 {
			t.Fatal(resp.Status, body)
		}
		ev := g.next()
		if peer := <-peers; peer != want || (ev.Parent != "") != proxied || (len(p.took()) > 0) != proxied {
			t.Errorf("from %s: the origin saw %s, want %s; %+v", from, peer, want, ev)
		}
	}
	source := func(a string) upstream.Source { return upstream.Source{V4: netip.MustParseAddr(a)} }
	leaves("127.0.0.1", "127.0.0.1", false)
	g.srv.SetRoutes(Routes{Default: Route{Source: source("127.0.0.7")}, Groups: map[string]Route{"b": {Source: source("127.0.0.8")}}})
	leaves("127.0.0.1", "127.0.0.7", false) // not over the idle connection from before
	leaves("127.0.0.2", "127.0.0.8", false)
	g.srv.SetRoutes(Routes{Default: Route{Parent: p.Parent}, Groups: map[string]Route{"b": {Source: source("127.0.0.9")}}})
	leaves("127.0.0.1", "127.0.0.1", true)
	leaves("127.0.0.2", "127.0.0.9", false)
}

// TestParentRevoked cuts a tunnel through a parent like any other.
func TestParentRevoked(t *testing.T) {
	p := serveParent(t)
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor(", protocol: tcp", o.port()), through(p))
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.connect(fmt.Sprintf("api.ok.test:%d", o.port()))
	o.accept(t)
	g.until(func() bool { return g.srv.Stats().Tunnels == 1 })
	g.store.Swap(compile(t, policyFor(", protocol: tcp", 1)))
	io.ReadAll(c)
	if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked {
		t.Errorf("%+v", ev)
	}
}

// TestParentAfterShutdown leaves no one waiting for a silent parent.
func TestParentAfterShutdown(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", 8080), func(c *Config) {
		c.Routes.Default.Parent = &upstream.Parent{Host: "127.0.0.1", Port: o.addr.Port()}
		c.Timeouts.Drain = 0
	})
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	c.send("CONNECT api.ok.test:8080 HTTP/1.1\r\n\r\n")
	o.accept(t)
	g.srv.Shutdown(context.Background())
	io.ReadAll(c)
	if ev := g.next(); ev.Decision.Reason != policy.ReasonConnectFailed {
		t.Errorf("%+v", ev)
	}
}
