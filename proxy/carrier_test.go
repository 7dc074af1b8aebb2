package proxy

import (
	"context"
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

const okAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

// carrying is a gate before an origin, and a client that asks it.
type carrying struct {
	*gate
	o         *origin
	c         *client
	authority string
}

func startCarrying(t *testing.T, edit ...func(*Config)) *carrying {
	if !canProbe {
		t.Skip("http.Transport carries all on this system")
	}
	o := listen(t, "127.0.0.1:0")
	g := startLanes(t, 1, policyFor("", o.port()), edit...)
	g.resolver.set("api.ok.test", "127.0.0.1")
	return &carrying{g, o, g.dial(), fmt.Sprintf("api.ok.test:%d", o.port())}
}

func (k *carrying) ask(method string) {
	k.t.Helper()
	k.c.send("%s http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", method, k.authority)
}

// answered checks the response and its event.
func (k *carrying) answered(method string, status int, body string) {
	k.t.Helper()
	resp, got := k.c.response(method)
	if resp.StatusCode != status || body != "" && got != body {
		k.t.Errorf("%s: %s %q, want %d %q", method, resp.Status, got, status, body)
	}
	if ev := k.next(); ev.Status != status {
		k.t.Errorf("%s: event %+v", method, ev)
	}
	k.quiet()
}

// first has an exchange done and returns the origin's side of its connection.
func (k *carrying) first() net.Conn {
	k.t.Helper()
	k.ask("GET")
	u := k.o.accept(k.t)
	asked(k.t, u)
	io.WriteString(u, okAnswer)
	k.answered("GET", 200, "ok")
	return u
}

// again has an exchange done on a new connection.
func (k *carrying) again() {
	k.t.Helper()
	k.ask("GET")
	u := k.o.accept(k.t)
	asked(k.t, u)
	io.WriteString(u, strings.Replace(okAnswer, "ok", "on", 1))
	k.answered("GET", 200, "on")
}

// ended checks that the origin's connection was closed and nothing more sent on it.
func (k *carrying) ended(u net.Conn) {
	k.t.Helper()
	if b, err := io.ReadAll(u); len(b) > 0 {
		k.t.Errorf("origin: %q, %v", b, err)
	}
}

// carrier returns the only one, or that of the lane.
func (k *carrying) carrier() *carrier {
	k.t.Helper()
	p := &k.srv.pools
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, c := range p.m {
		if len(p.m) == 1 || key.lane != nil {
			return c
		}
	}
	k.t.Fatalf("%d carriers", len(p.m))
	return nil
}

// kept returns the idle connections.
func (k *carrying) kept() []*upstreamConn {
	c := k.carrier()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.idle[k.authority]) != c.n {
		k.t.Errorf("%d of %d connections are for %s", len(c.idle[k.authority]), c.n, k.authority)
	}
	return append([]*upstreamConn(nil), c.idle[k.authority]...)
}

// TestCarrierKeeps says after which responses a connection is used again.
func TestCarrierKeeps(t *testing.T) {
	for _, tt := range []struct {
		name, method, answer string
		body                 string // as the client gets it
		keep, closed         bool   // closed: the origin ends the response that way
	}{
		{name: "length", method: "GET", answer: okAnswer, body: "ok", keep: true},
		{name: "empty", method: "GET", answer: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", keep: true},
		{name: "chunked", method: "GET", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", body: "ok", keep: true},
		{name: "trailers", method: "GET", answer: "HTTP/1.1 200 OK\r\nTrailer: T\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nT: 1\r\n\r\n", body: "ok", keep: true},
		{name: "interim", method: "GET", answer: "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + okAnswer, keep: true},
		{name: "OPTIONS", method: "OPTIONS", answer: okAnswer, body: "ok", keep: true},
		{name: "HEAD", method: "HEAD", answer: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", keep: true},
		{name: "HEAD of chunks", method: "HEAD", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", keep: true},
		{name: "204", method: "GET", answer: "HTTP/1.1 204 No Content\r\n\r\n", keep: true},
		{name: "304", method: "GET", answer: "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", keep: true},
		{name: "close", method: "GET", answer: "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", body: "ok"},
		{name: "204 and close", method: "GET", answer: "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"},
		{name: "HTTP/1.0", method: "GET", answer: "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", body: "ok"},
		{name: "until the end", method: "GET", answer: "HTTP/1.1 200 OK\r\n\r\nok", body: "ok", closed: true},
		{name: "too much", method: "GET", answer: okAnswer + "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", body: "ok"},
		{name: "content after 204", method: "GET", answer: "HTTP/1.1 204 No Content\r\n\r\nevil"},
		{name: "content after HEAD", method: "HEAD", answer: okAnswer},
		{name: "content after 304", method: "GET", answer: "HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\nevil"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := startCarrying(t)
			k.ask(tt.method)
			u := k.o.accept(t)
			asked(t, u)
			io.WriteString(u, tt.answer)
			if tt.closed {
				u.(*net.TCPConn).CloseWrite()
			}
			resp, err := http.ReadResponse(k.c.Reader, &http.Request{Method: tt.method})
			for err == nil && resp.StatusCode == http.StatusEarlyHints {
				resp, err = http.ReadResponse(k.c.Reader, &http.Request{Method: tt.method})
			}
			if err != nil {
				t.Fatal(err)
			}
			if body, err := io.ReadAll(resp.Body); err != nil || tt.body != "" && string(body) != tt.body {
				t.Errorf("%q, %v", body, err)
			}
			if tt.name == "trailers" && resp.Trailer.Get("T") != "1" {
				t.Errorf("trailers %v", resp.Trailer)
			}
			k.next()
			if !tt.keep {
				k.again()
				k.ended(u)
				return
			}
			k.ask("GET")
			asked(t, u)
			io.WriteString(u, okAnswer)
			k.answered("GET", 200, "ok")
		})
	}
}

// TestCarrierFindsWhatCame uses no connection on which something has come since the
// last response: not a request's answer that nobody asked for, nor the end.
func TestCarrierFindsWhatCame(t *testing.T) {
	for name, come := range map[string]func(*net.TCPConn){
		"a response": func(u *net.TCPConn) { io.WriteString(u, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil") },
		"the end":    func(u *net.TCPConn) { u.CloseWrite() },
		"a reset":    func(u *net.TCPConn) { u.SetLinger(0); u.Close() },
	} {
		for _, sweep := range []bool{false, true} {
			t.Run(fmt.Sprint(name, sweep), func(t *testing.T) {
				k := startCarrying(t)
				u := k.first().(*net.TCPConn)
				kept := k.kept()
				if len(kept) != 1 {
					t.Fatalf("%d idle connections", len(kept))
				}
				come(u)
				c := k.carrier()
				k.until(func() bool { // it takes some of the bytes
					c.mu.Lock()
					defer c.mu.Unlock()
					return !kept[0].silent()
				})
				if sweep {
					k.carrier().sweep()
					if n := len(k.kept()); n > 0 {
						t.Errorf("%d idle connections", n)
					}
				}
				k.again()
				if name != "a reset" {
					k.ended(u)
				}
			})
		}
	}
}

// TestCarrierTriesAgain has the origin close the connection as it is used again.
func TestCarrierTriesAgain(t *testing.T) {
	for _, tt := range []struct {
		name, method, part string
		again              bool
	}{
		{"GET", "GET", "", true},
		{"HEAD", "HEAD", "", true},
		{"after a part of the head", "GET", "HTTP/1.1 2", false},
		{"after a 1xx", "GET", "HTTP/1.1 103 Early Hints\r\n\r\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := startCarrying(t)
			u := k.first()
			k.ask(tt.method)
			asked(t, u)
			io.WriteString(u, tt.part)
			u.Close()
			if tt.again {
				u = k.o.accept(t)
				asked(t, u)
				if tt.method == "GET" { // a new connection that fails is no reason for a third
					u.Close()
					k.answered("GET", 502, "")
				} else {
					io.WriteString(u, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
					k.answered("HEAD", 200, "")
				}
			} else {
				resp, err := http.ReadResponse(k.c.Reader, nil)
				for err == nil && resp.StatusCode == http.StatusEarlyHints {
					resp, err = http.ReadResponse(k.c.Reader, nil)
				}
				if err != nil || resp.StatusCode != 502 {
					t.Fatal(resp, err)
				}
				if ev := k.next(); ev.Status != 502 || ev.Decision.Reason != policy.ReasonConnectFailed {
					t.Errorf("event %+v", ev)
				}
			}
			select {
			case <-k.o.conns:
				t.Error("another connection")
			default:
			}
		})
	}
}

// TestCarrierLeavesBodies sends what has a body, or may not be sent twice, on other
// connections.
func TestCarrierLeavesBodies(t *testing.T) {
	k := startCarrying(t)
	k.first()
	k.c.send("POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi", k.authority)
	u := k.o.accept(t)
	br, _ := asked(t, u)
	io.ReadFull(br, make([]byte, 2))
	io.WriteString(u, okAnswer)
	k.answered("POST", 200, "ok")
	if n := len(k.kept()); n != 1 {
		t.Errorf("%d idle connections", n)
	}
}

// TestCarrierRetires closes idle connections with a new policy, and the others when
// they become idle.
func TestCarrierRetires(t *testing.T) {
	k := startCarrying(t)
	idle := k.first()
	old := k.carrier()
	busy := k.dial()
	busy.send("GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", k.authority)
	asked(t, idle) // it was used again
	other := k.dial()
	other.send("GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", k.authority)
	u := k.o.accept(t)
	asked(t, u)
	io.WriteString(u, okAnswer)
	other.response("GET")
	k.next()
	k.store.Swap(compile(t, policyFor("", k.o.port(), 1)))
	k.ended(u)
	io.WriteString(idle, okAnswer)
	if resp, body := busy.response("GET"); resp.StatusCode != 200 || body != "ok" {
		t.Errorf("%s %q", resp.Status, body)
	}
	k.next()
	k.ended(idle)
	if old.n != 0 || len(old.idle) != 0 {
		t.Errorf("%d idle connections", old.n)
	}
	k.again()
}

// TestCarrierDropsTheUnfinished closes a connection whose response was not read to its
// end, for the client has gone or the origin broke off.
func TestCarrierDropsTheUnfinished(t *testing.T) {
	const part = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart"
	t.Run("client", func(t *testing.T) {
		k := startCarrying(t)
		k.ask("GET")
		u := k.o.accept(t)
		asked(t, u)
		io.WriteString(u, part)
		if _, err := http.ReadResponse(k.c.Reader, nil); err != nil {
			t.Fatal(err)
		}
		k.c.Close()
		k.ended(u)
		k.event(func(ev *event.Event) bool { return ev.Kind == event.HTTP && ev.Error != "" })
		k.c = k.dial()
		k.again()
	})
	t.Run("client before the response", func(t *testing.T) {
		k := startCarrying(t)
		u := k.first()
		k.ask("GET")
		asked(t, u)
		k.c.Close()
		k.ended(u)
		k.event(func(ev *event.Event) bool { return strings.Contains(ev.Error, errClientLeft.Error()) })
		k.c = k.dial()
		k.again()
	})
	t.Run("origin", func(t *testing.T) {
		k := startCarrying(t)
		k.ask("GET")
		u := k.o.accept(t)
		asked(t, u)
		io.WriteString(u, part)
		u.Close()
		resp, err := http.ReadResponse(k.c.Reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("the response looks whole: %q", body)
		}
		k.event(func(ev *event.Event) bool { return ev.Error != "" && ev.BytesDown == 4 })
		k.c = k.dial()
		k.again()
	})
}

// TestCarrierBounds keeps a bounded number of connections, for a bounded time.
func TestCarrierBounds(t *testing.T) {
	s := New(Config{Decider: new(policy.Store), Resolver: &names{}})
	c := s.newCarrier(s.dialExchange)
	o := listen(t, "127.0.0.1:0")
	put := func(authority string) *upstreamConn {
		t.Helper()
		conn, err := net.Dial("tcp", o.addr.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		o.accept(t)
		u := s.newUpstreamConn(conn, trip{})
		c.put(authority, u)
		return u
	}
	for range idlePerHost + 3 {
		put("a.test:80")
	}
	if n := len(c.idle["a.test:80"]); n != idlePerHost || c.n != n {
		t.Errorf("%d idle connections of one destination, %d in all", n, c.n)
	}
	for i := range idlePerPool {
		put(fmt.Sprintf("b%d.test:80", i))
	}
	if c.n != idlePerPool || len(c.idle["a.test:80"]) != 0 || len(c.idle) > idlePerPool+1 {
		t.Errorf("%d idle connections, %d of them the oldest, %d destinations", c.n, len(c.idle["a.test:80"]), len(c.idle))
	}
	last := put("z.test:80")
	if got := c.take("z.test:80"); got != last {
		t.Errorf("took %p, not %p", got, last)
	}
	if c.take("z.test:80") != nil {
		t.Error("took it twice")
	}
	for _, conns := range c.idle {
		for _, conn := range conns {
			conn.since = time.Now().Add(-idleTime)
		}
	}
	if c.take("b200.test:80") != nil {
		t.Error("took one that is too old")
	}
	c.sweep()
	if c.n != 0 || len(c.idle) != 0 {
		t.Errorf("after its time: %d idle connections, %d destinations", c.n, len(c.idle))
	}
	c.CloseIdleConnections()
	put("a.test:80")
	if c.n != 0 {
		t.Error("a retired carrier keeps a connection")
	}
}

// TestCarrierAtTheEnd cuts an exchange at shutdown whose client has sent more, so that
// nobody reads from it.
func TestCarrierAtTheEnd(t *testing.T) {
	k := startCarrying(t)
	k.ask("GET")
	k.ask("GET")
	u := k.o.accept(t)
	asked(t, u)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	k.srv.Shutdown(ctx)
	k.ended(u)
	if ev := k.next(); ev.Status != 0 {
		t.Errorf("event %+v", ev)
	}
	k.quiet()
}
