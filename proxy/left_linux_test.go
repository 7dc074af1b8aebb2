package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
)

// TestHasLeft is about what the kernel says of a client.
func TestHasLeft(t *testing.T) {
	for _, tt := range []struct {
		name   string
		client func(*net.TCPConn)
		secure bool
		want   bool
	}{
		{"there", func(*net.TCPConn) {}, false, false},
		{"spoke", func(c *net.TCPConn) { c.Write([]byte("hello")) }, false, false},
		{"half closed", func(c *net.TCPConn) { c.CloseWrite() }, false, true},
		{"spoke and half closed", func(c *net.TCPConn) { c.Write([]byte("hello")); c.CloseWrite() }, false, false},
		{"spoke TLS and half closed", func(c *net.TCPConn) { c.Write([]byte("hello")); c.CloseWrite() }, true, true},
		{"spoke TLS", func(c *net.TCPConn) { c.Write([]byte("hello")) }, true, false},
		{"closed", func(c *net.TCPConn) { c.Close() }, false, true},
		{"reset", func(c *net.TCPConn) { c.SetLinger(0); c.Close() }, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := listen(t, "127.0.0.1:0")
			c, err := net.Dial("tcp", l.addr.String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			there := l.accept(t)
			tt.client(c.(*net.TCPConn)) // loopback: it has arrived when this returns
			raw, err := there.(*net.TCPConn).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if got := hasLeft(raw, tt.secure, false); got != tt.want {
				t.Errorf("hasLeft = %v, want %v", got, tt.want)
			}
			there.Close()
			if hasLeft(raw, tt.secure, false) {
				t.Error("a connection that is closed here")
			}
		})
	}
}

// TestClientLeavesWhileDialling: nothing is resolved or dialled any longer for a
// client that has gone, over either listener.
func TestClientLeavesWhileDialling(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %v", secure), func(t *testing.T) {
			g := start(t, doorPolicy(443), withTLS())
			asked, ended := make(chan struct{}), make(chan error, 1)
			g.resolver.intercept(func(ctx context.Context, _ string) ([]netip.Addr, error) {
				close(asked)
				<-ctx.Done() // timeouts.connect is patience
				ended <- ctx.Err()
				return nil, ctx.Err()
			})
			var c net.Conn
			var err error
			if secure {
				c, err = g.dialTLS(nil)
			} else {
				c, err = net.Dial("tcp", g.addr)
			}
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(c, "CONNECT a.ok.test:443 HTTP/1.1\r\n\r\n")
			select {
			case <-asked:
			case <-time.After(patience):
				t.Fatal("nothing was asked of the resolver")
			}
			c.Close()
			if err := <-ended; err != context.Canceled { //nolint:errorlint // as it is
				t.Errorf("the look-up ended by %v", err)
			}
			if ev := g.next(); ev.Decision.Reason != policy.ReasonResolveFailed || !strings.Contains(ev.Error, "the client went away") {
				t.Errorf("%+v", ev)
			}
		})
	}
}

// presences returns those of the clients that net/http serves.
func (g *gate) presences() (all []*presence) {
	g.srv.clients.mu.Lock()
	defer g.srv.clients.mu.Unlock()
	for c := range g.srv.clients.live {
		if c.there != nil {
			all = append(all, c.there)
		}
	}
	return all
}

// TestPresence: a client that has closed its side while its request is under way has
// left, unless it has asked for more before and does not reset the connection.
func TestPresence(t *testing.T) { bothWays(t, testPresence) }

func testPresence(t *testing.T, lanes bool) {
	o := listen(t, "127.0.0.1:0")
	g := startGate(t, policyFor("", o.port()), lanes)
	g.resolver.set("api.ok.test", "127.0.0.1")
	request := fmt.Sprintf("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	look := func() {
		for _, p := range g.presences() {
			p.look()
		}
		g.inLane(func(l *lane) {
			l.each(func(p *passage) {
				if p.phase == forwarding {
					p.visit.overdue()
				}
			})
		})
	}
	asked := func(u *bufio.Reader) {
		t.Helper()
		if _, err := http.ReadRequest(u); err != nil {
			t.Fatal(err)
		}
	}

	c := g.dial()
	c.send("%s", request)
	far := o.accept(t)
	u := bufio.NewReader(far)
	asked(u)
	look()
	io.WriteString(far, answer)
	if _, body := c.response(http.MethodGet); body != "ok" {
		t.Errorf("a client that is there was answered %q", body)
	}
	g.next()
	c.send("%s", request)
	asked(u)
	c.CloseWrite()
	look()
	if b, err := io.ReadAll(u); len(b) != 0 || err != nil {
		t.Errorf("the far side, after the client has left: %q, %v", b, err)
	}
	if ev := g.next(); ev.Error == "" || !ev.Aborted {
		t.Errorf("the event of a client that has left: %+v", ev)
	}
	g.until(func() bool { return len(g.presences()) == 0 })

	c = g.dial()
	c.send("%s", request+request)
	c.CloseWrite()
	far = o.accept(t)
	u = bufio.NewReader(far)
	asked(u)
	g.until(func() bool { p := g.presences(); return len(p) == 1 && p[0].more.Load() })
	look()
	io.WriteString(far, answer)
	asked(u)
	io.WriteString(far, answer)
	for range 2 {
		if _, body := c.response(http.MethodGet); body != "ok" {
			t.Errorf("a client that asked twice and closed its side was answered %q", body)
		}
		g.next()
	}

	c = g.dial()
	c.send("%s", request+"GET")
	asked(u)
	g.until(func() bool { p := g.presences(); return len(p) == 1 && p[0].more.Load() })
	c.SetLinger(0) // a reset: nobody waits for anything any more
	c.Close()
	look()
	if b, err := io.ReadAll(u); len(b) != 0 || err != nil {
		t.Errorf("the far side, after the client has reset its connection: %q, %v", b, err)
	}
	if ev := g.next(); ev.Error != errClientLeft.Error() {
		t.Errorf("the event of a client that has reset its connection: %+v", ev)
	}
}
