package proxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// What goes wrong where two features meet.

// deadlined keeps the deadline under which each write was made.
type deadlined struct {
	net.Conn
	mu     sync.Mutex
	by     time.Time
	writes []time.Time
}

func (d *deadlined) SetWriteDeadline(t time.Time) error {
	d.mu.Lock()
	d.by = t
	d.mu.Unlock()
	return d.Conn.SetWriteDeadline(t)
}

func (d *deadlined) SetDeadline(t time.Time) error {
	d.SetWriteDeadline(t)
	return d.SetReadDeadline(t)
}

func (d *deadlined) Write(p []byte) (int, error) {
	d.mu.Lock()
	d.writes = append(d.writes, d.by)
	d.mu.Unlock()
	return d.Conn.Write(p)
}

// TestPatienceAfter407: a person who types a password, and a far side that is slow to
// connect to, take longer than a client may take for a refusal.
func TestPatienceAfter407(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, userPolicy(o, nowhere), withUsers(usersFile(t, "anna")))
	g.resolver.set("user.test", "127.0.0.1")
	front := listen(t, "127.0.0.1:0")
	g.addr = front.addr.String()
	c := g.dial()
	d := &deadlined{Conn: front.accept(t)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.srv.serveConn(d)
	}()
	target := fmt.Sprintf("user.test:%d", o.port())
	if resp, _ := c.asks(target, ""); resp.StatusCode != 407 {
		t.Fatal(resp.Status)
	}
	if resp, body := c.asks(target, basic("anna", theSecret+"anna")); resp.StatusCode != 200 {
		t.Fatal(resp.Status, body)
	}
	c.Close()
	<-done
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.writes) != 2 || !d.writes[1].IsZero() {
		t.Errorf("deadlines of the answers: %v", d.writes)
	}
}

// TestCountedAfter407: a CONNECT that net/http gave back, and was asked for
// credentials, goes on as one of its source's connections.
func TestCountedAfter407(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, userPolicy(o, nowhere), withUsers(usersFile(t, "anna")), func(c *Config) { c.Limits.ConnectionsPerSource = 1 })
	file := func(c *client) int {
		c.send("GET /proxy.pac HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, _ := c.response("GET")
		return resp.StatusCode
	}
	first := g.dial()
	if got := file(first); got != 200 {
		t.Fatal(got)
	}
	if resp, _ := first.asks("user.test:443", ""); resp.StatusCode != 407 {
		t.Fatal(resp.Status)
	}
	if got := file(g.dial()); got != 429 {
		t.Errorf("beside a connection that waits after a 407: %d", got)
	}
	if got := file(first); got != 200 {
		t.Fatal(got)
	}
	if got := file(g.dial()); got != 429 {
		t.Errorf("beside a connection that net/http has again: %d", got)
	}
	first.Close()
	g.until(func() bool { return g.srv.Stats().Connections == 0 })
	if got := file(g.dial()); got != 200 {
		t.Errorf("after its end: %d", got)
	}
}

// TestUsersChangeDuringVerification: what was right under the old file opens no
// tunnel that outlives the new one.
func TestUsersChangeDuringVerification(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, userPolicy(o, nowhere), withUsers(usersFile(t, "anna")))
	g.resolver.set("user.test", "127.0.0.1")
	for range maxVerifying {
		g.srv.users.verifying <- struct{}{}
	}
	c := g.dial()
	c.send("CONNECT user.test:%d HTTP/1.1\r\n%s\r\n", o.port(), basic("anna", theSecret+"anna"))
	g.until(func() bool { return g.srv.users.waiting.Load() == 1 })
	g.srv.SetUsers(usersFile(t, "bert"))
	for range maxVerifying {
		<-g.srv.users.verifying
	}
	io.ReadAll(c) // until the end
	if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked {
		t.Errorf("%+v", ev)
	}
}

// TestUsersChangeUnderRequests ends a response of a user who is gone.
func TestUsersChangeUnderRequests(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, userPolicy(o, nowhere), withUsers(usersFile(t, "anna")))
	g.resolver.set("web.test", "127.0.0.1")
	c := g.dial()
	c.send("GET http://web.test:%d/ HTTP/1.1\r\nHost: x\r\n%s\r\n", o.port(), basic("anna", theSecret+"anna"))
	far := o.accept(t)
	if _, err := http.ReadRequest(bufio.NewReader(far)); err != nil {
		t.Fatal(err)
	}
	io.WriteString(far, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nha")
	if _, err := c.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	g.srv.SetUsers(usersFile(t, "anna")) // another salt: another hash
	if b, err := io.ReadAll(far); len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
	if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked || ev.User != "anna" {
		t.Errorf("%+v", ev)
	}
}

// TestVigilUnread: a client that says nothing and reads nothing, while the far side
// talks, holds its tunnel no longer than timeouts.idle.
func TestVigilUnread(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, observe(o.port()), func(c *Config) {
		c.Timeouts.ClientHello, c.Timeouts.Idle = 50*time.Millisecond, 300*time.Millisecond
		c.Limits.Tunnels = 1
	})
	g.resolver.set("api.ok.test", "127.0.0.1")
	g.connect(fmt.Sprintf("api.ok.test:%d", o.port()))
	io.Copy(o.accept(t), zeros{}) // until the proxy gives up
	if ev := g.next(); ev.Decision.Verdict != policy.Observe || ev.BytesDown == 0 {
		t.Errorf("%+v", ev)
	}
	g.until(func() bool { return g.srv.Stats().Tunnels == 0 })
	g.srv.tunnels.mu.Lock()
	defer g.srv.tunnels.mu.Unlock()
	if g.srv.tunnels.reserved != 0 {
		t.Error("its place is taken for ever")
	}
}

// TestSessionRedialsThroughParent: a session that began without a parent goes on
// through one that was set since. The parent is asked for the name, so every address
// of the name must pass, not the one alone that was dialled before.
func TestSessionRedialsThroughParent(t *testing.T) {
	p := serveParent(t)
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1", "10.255.255.1") // the second one may not be reached
	authority := fmt.Sprintf("api.ok.test:%d", o.port())
	c := g.connect(authority)
	get := func() *http.Response {
		c.send("GET / HTTP/1.1\r\nHost: %s\r\n\r\n", authority)
		resp, _ := c.response("GET")
		return resp
	}
	go func() {
		far := <-o.conns
		http.ReadRequest(bufio.NewReader(far))
		io.WriteString(far, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
		far.Close()
	}()
	if resp := get(); resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	var r Routes
	r.Default.Parent = p.Parent
	g.srv.SetRoutes(r)
	if resp := get(); resp.StatusCode != 403 || resp.Header.Get("X-Sallyport-Reason") != "private_destination" {
		t.Errorf("%s %v", resp.Status, resp.Header)
	}
	if asked := p.took(); len(asked) > 0 {
		t.Errorf("the parent was asked for %q", asked)
	}
}

// TestHTTP2WhatHTTP1Refuses: a stream cannot carry what would have been refused over
// HTTP/1, in which it goes on.
func TestHTTP2WhatHTTP1Refuses(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS())
	g.resolver.set("web.ok.test", "127.0.0.1")
	f := g.framed()
	web := fmt.Sprintf("web.ok.test:%d", o.port())
	id := uint32(1)
	for _, tt := range []struct {
		what   string
		fields []string
	}{
		{"space in the query", []string{":method", "GET", ":scheme", "http", ":authority", web, ":path", "/?x HTTP/1.0"}},
		{"space in the path", []string{":method", "GET", ":scheme", "http", ":authority", web, ":path", "/a b"}},
		{"space in the method", []string{":method", "GET /x HTTP/1.0", ":scheme", "http", ":authority", web, ":path", "/"}},
		{"credentials as a trailer", []string{":method", "POST", ":scheme", "http", ":authority", web, ":path", "/", "trailer", "proxy-authorization"}},
		{"Host as a trailer", []string{":method", "POST", ":scheme", "http", ":authority", web, ":path", "/", "trailer", "x, Host"}},
	} {
		f.request(id, tt.fields[1] != "POST", tt.fields...)
		if h, body, _ := f.answer(id); h[":status"] != "400" || h["x-sallyport-reason"] != "bad_request" {
			t.Errorf("%s: %v %q", tt.what, h, body)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonBadRequest || ev.Status != 400 {
			t.Errorf("%s: %+v", tt.what, ev)
		}
		id += 2
	}
	if len(o.conns) > 0 {
		t.Error("the origin was reached")
	}
	f.request(id, true, ":method", "GET", ":scheme", "http", ":authority", web, ":path", "/", "via", "1.1 a")
	far := o.accept(t)
	r, err := http.ReadRequest(bufio.NewReader(far))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(r.Header["Via"]); got != "[1.1 a 2.0 "+pseudonym+"]" && got != "[1.1 a, 2.0 "+pseudonym+"]" {
		t.Errorf("Via: %s", got)
	}
}

// TestPACOverHTTP2: browsers speak HTTP/2 to a TLS listener where they can.
func TestPACOverHTTP2(t *testing.T) {
	g := start(t, doorPolicy(1), withTLS())
	f := g.framed()
	f.request(1, true, ":method", "GET", ":scheme", "https", ":authority", "proxy.ok.test:3129", ":path", "/proxy.pac")
	if h, body, _ := f.answer(1); h[":status"] != "200" || h["content-type"] != pacType || body != string(PAC("HTTPS proxy.ok.test:3129", nil)) {
		t.Errorf("%v %s", h, body)
	}
	f.request(3, true, ":method", "GET", ":scheme", "http", ":authority", "other.test", ":path", "/proxy.pac")
	if h, _, _ := f.answer(3); h[":status"] != "403" {
		t.Errorf("somebody else's file: %v", h)
	}
}

// TestTLSListenerNamesItself in every event, those without a handshake too, and treats
// a PROXY protocol header as the plain listener does.
func TestTLSListenerNamesItself(t *testing.T) {
	g := start(t, doorPolicy(1), withTLS(), func(c *Config) { c.Limits.ConnectionsPerSource = 1 })
	g.addr = g.tlsAddr()
	for _, tt := range []struct {
		what, sent, want, problem string
	}{
		{"plain HTTP", "GET http://a.test/ HTTP/1.1\r\n\r\n", "HTTP/1.1 400 ", errIsPlain.Error()},
		{"PROXY, version 1", "PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", "", "a PROXY protocol header from 127.0.0.1"},
		{"PROXY, version 2", v2("10.0.0.1:1", "10.0.0.2:2"), "", "a PROXY protocol header from 127.0.0.1"},
	} {
		c := g.dial()
		c.send("%s", tt.sent)
		got, _ := io.ReadAll(c) // a reset will do
		if !strings.HasPrefix(string(got), tt.want) || tt.want == "" && len(got) > 0 {
			t.Errorf("%s: %q", tt.what, got)
		}
		ev := g.next()
		if ev.Listener != listenerTLS || ev.Kind != event.HTTP || ev.Decision.Reason != policy.ReasonBadRequest || !strings.HasPrefix(ev.Error, tt.problem) {
			t.Errorf("%s: %+v", tt.what, ev)
		}
		g.until(func() bool { return g.srv.Stats().Connections == 0 })
	}
	if _, err := g.dialTLS(nil); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", g.tlsAddr()); err == nil { // or it was reset before Dial saw it
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		if b, err := io.ReadAll(c); len(b) > 0 || isTimeout(err) {
			t.Errorf("a second connection: %q, %v", b, err)
		}
	}
	if ev := g.next(); ev.Listener != listenerTLS || ev.Decision.Reason != policy.ReasonLimitExceeded {
		t.Errorf("%+v", ev)
	}
}

// TestHTTP2AfterShutdown: a handshake that ends after the GOAWAYs went out makes nobody
// wait for a connection without streams.
func TestHTTP2AfterShutdown(t *testing.T) {
	g := start(t, doorPolicy(1), withTLS())
	g.srv.secure.identity.Load().config.VerifyConnection = func(tls.ConnectionState) error {
		g.srv.draining.Store(true) // Shutdown does it first, and comes to the GOAWAYs before this connection is served
		return nil
	}
	c, err := g.dialTLS([]string{"h2"})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); len(b) > 0 || isTimeout(err) {
		t.Errorf("%q, %v", b, err)
	}
}

// TestConnectEndsAtOnce is for the race detector: net/http looks for the end of a
// client while the CONNECT is taken back from it.
func TestConnectEndsAtOnce(t *testing.T) {
	g := start(t, policyFor("", 1))
	for range 100 {
		c := g.dial()
		c.send("GET /proxy.pac HTTP/1.1\r\nHost: x\r\n\r\n")
		c.response("GET")
		c.send("CONNECT other.test:443 HTTP/1.1\r\n\r\n")
		c.CloseWrite()
		if resp, _ := c.response("CONNECT"); resp.StatusCode != 403 {
			t.Fatal(resp.Status)
		}
		c.Close()
		g.next()
	}
}

// TestRequiredWithoutUsers: who demands credentials and forgets the users lets nobody
// pass, instead of everybody.
func TestRequiredWithoutUsers(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, userPolicy(o, loopback), func(c *Config) { c.Auth.Required = true })
	g.resolver.set("net.test", "127.0.0.1")
	for _, fields := range []string{"", basic("anna", theSecret)} {
		if resp, _ := g.dial().asks(fmt.Sprintf("net.test:%d", o.port()), fields); resp.StatusCode != 407 {
			t.Error(resp.Status)
		}
		g.next()
	}
	c := g.dial()
	c.send("GET http://net.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
	if resp, _ := c.response("GET"); resp.StatusCode != 407 {
		t.Error(resp.Status)
	}
}

// TestUpgradeLateBytes: a far side that says a lot in one breath with a long 101 loses
// nothing of it.
func TestUpgradeLateBytes(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n", o.port())
	far := o.accept(t)
	if _, err := http.ReadRequest(bufio.NewReader(far)); err != nil {
		t.Fatal(err)
	}
	late := strings.Repeat("late ", 1000)
	io.WriteString(far, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\nX: "+strings.Repeat("x", 5000)+"\r\n\r\n"+late)
	far.Close()
	if resp, err := http.ReadResponse(c.Reader, nil); err != nil || resp.StatusCode != 101 {
		t.Fatal(resp, err)
	}
	if got := c.rest(); got != late {
		t.Errorf("%d bytes of %d", len(got), len(late))
	}
}

// TestUpgradeRevoked is about a policy that changes while the far side thinks about an
// upgrade.
func TestUpgradeRevoked(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n", o.port())
	if _, err := http.ReadRequest(bufio.NewReader(o.accept(t))); err != nil {
		t.Fatal(err)
	}
	g.store.Swap(compile(t, policyFor("", 1)))
	if resp, _ := c.response("GET"); resp.StatusCode != 403 {
		t.Error(resp.Status)
	}
	if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked {
		t.Errorf("%+v", ev)
	}
}

// TestBrokenHTTP10: what breaks off does not look whole to a client of HTTP/1.0, over
// TLS and after a change of policy either.
func TestBrokenHTTP10(t *testing.T) {
	for _, secure := range []bool{false, true} {
		for _, revoked := range []bool{false, true} {
			t.Run(fmt.Sprintf("TLS %v, revoked %v", secure, revoked), func(t *testing.T) {
				o := listen(t, "127.0.0.1:0")
				g := start(t, doorPolicy(o.port()), withTLS())
				g.resolver.set("web.ok.test", "127.0.0.1")
				var c net.Conn = g.dial()
				if secure {
					var err error
					if c, err = g.dialTLS(nil); err != nil {
						t.Fatal(err)
					}
				}
				fmt.Fprintf(c, "GET http://web.ok.test:%d/ HTTP/1.0\r\n\r\n", o.port())
				far := o.accept(t)
				if _, err := http.ReadRequest(bufio.NewReader(far)); err != nil {
					t.Fatal(err)
				}
				io.WriteString(far, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n")
				var got []byte
				one := make([]byte, 1)
				for !strings.HasSuffix(string(got), "some") {
					if _, err := c.Read(one); err != nil {
						t.Fatalf("after %q: %v", got, err)
					}
					got = append(got, one...)
				}
				if revoked {
					g.store.Swap(compile(t, doorPolicy(1)))
				} else {
					far.Close()
				}
				if _, err := io.ReadAll(c); err == nil {
					t.Error("a good end")
				}
			})
		}
	}
}

// TestPACHandlerOfTLS: a proxy with a TLS listener alone is known to its own PAC file.
func TestPACHandlerOfTLS(t *testing.T) {
	s := New(Config{Decider: new(policy.Store), TLS: TLS{Listen: []string{"127.0.0.1:0"}, TLSIdentity: TLSIdentity{Certificate: ca().cert}}})
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	defer s.closeListeners()
	w := httptest.NewRecorder()
	s.PACHandler().ServeHTTP(w, httptest.NewRequest("GET", "/proxy.pac", nil))
	if want := string(PAC("HTTPS "+s.TLSAddrs()[0].String(), nil)); w.Body.String() != want {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// brittle panics at one server name.
type brittle struct{ Decider }

func (b brittle) Decide(r policy.Request) policy.Decision {
	if r.TLS.SNI.String() == "boom.ok.test" {
		panic("boom")
	}
	return b.Decider.Decide(r)
}

// TestPanicKeepsNothing: what a mistake in this program ends gives its places back.
func TestPanicKeepsNothing(t *testing.T) {
	idle := func(g *gate) {
		t.Helper()
		g.until(func() bool {
			g.srv.tunnels.mu.Lock()
			reserved := g.srv.tunnels.reserved
			g.srv.tunnels.mu.Unlock()
			g.srv.crowd.mu.Lock()
			defer g.srv.crowd.mu.Unlock()
			s := g.srv.Stats()
			return s.Panics == 1 && s.Connections == 0 && s.Tunnels == 0 && reserved == 0 && len(g.srv.crowd.open) == 0
		})
	}
	limits := func(c *Config) { c.Limits.Tunnels, c.Limits.ConnectionsPerSource = 1, 1 }

	t.Run("vigil", func(t *testing.T) {
		o := listen(t, "127.0.0.1:0")
		g := start(t, observe(o.port()), limits, func(c *Config) {
			c.Decider = brittle{c.Decider}
			c.Timeouts.ClientHello = 300 * time.Millisecond
		})
		g.resolver.set("api.ok.test", "127.0.0.1")
		c := g.connect(fmt.Sprintf("api.ok.test:%d", o.port()))
		g.until(func() bool { return g.srv.Stats().Tunnels == 1 })
		c.Write(hello("boom.ok.test"))
		io.ReadAll(c)
		idle(g)
	})
	t.Run("handshake", func(t *testing.T) {
		g := start(t, doorPolicy(1), withTLS(), limits)
		g.srv.secure.identity.Load().config.VerifyConnection = func(tls.ConnectionState) error { panic("boom") }
		if c, err := g.dialTLS(nil); err == nil { // TLS 1.3: the client is done first
			io.ReadAll(c)
		}
		idle(g)
	})
	t.Run("stream", func(t *testing.T) {
		g := start(t, doorPolicy(1), withTLS(), limits, func(c *Config) { c.Decider = explosive{c.Decider} })
		f := g.framed()
		f.request(1, false, ":method", "CONNECT", ":authority", "boom.ok.test:443")
		if h, _, reset := f.answer(1); !reset || len(h) > 0 {
			t.Errorf("%v, reset %v", h, reset)
		}
		f.conn.Close()
		idle(g)
	})
}
