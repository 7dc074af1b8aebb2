package proxy

import (
	"context"
	"fmt"
	"net"
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
			if got := hasLeft(raw, tt.secure); got != tt.want {
				t.Errorf("hasLeft = %v, want %v", got, tt.want)
			}
			there.Close()
			if hasLeft(raw, tt.secure) {
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
