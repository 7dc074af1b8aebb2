package proxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"sallyport/policy"
)

// stuck returns whether a visit of g waits for its client to take more.
func (g *gate) stuck() (yes bool) {
	g.inLane(func(l *lane) {
		l.each(func(p *passage) { yes = yes || p.phase == forwarding && p.visit.conn.waiter != nil })
	})
	return yes
}

// fill has the origin at u, which was asked, send pieces until the client, which reads
// nothing, takes no more. It returns how many bytes are on their way, at least.
func (k *carrying) fill(u io.Writer) (sent int) {
	k.t.Helper()
	const piece = 16 << 10
	before := k.srv.httpDown.Load()
	io.WriteString(u, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
	for range 4096 {
		fmt.Fprintf(u, "%x\r\n%s\r\n", piece, strings.Repeat("x", piece))
		sent += piece
		k.until(func() bool { return k.srv.httpDown.Load()-before == int64(sent) || k.stuck() })
		if k.stuck() {
			return sent - 4*piece
		}
	}
	k.t.Fatal("the client took everything")
	return 0
}

// What a client says, or that it goes, at the moment at which it takes the rest of a
// response, is one event with that.
func TestVisitHearsWhileItWrites(t *testing.T) {
	if *withoutLanes {
		t.Skip("it is about lanes")
	}
	for _, leaves := range []bool{false, true} {
		t.Run(fmt.Sprintf("leaves %v", leaves), func(t *testing.T) {
			k := startCarrying(t)
			k.ask("GET")
			u := k.o.accept(t)
			asked(t, u)
			n := k.fill(u)
			io.WriteString(u, "0\r\n\r\n")
			release := k.hold()
			t.Cleanup(release)
			got := make([]byte, n)
			if _, err := io.ReadFull(k.c.TCPConn, got); err != nil {
				t.Fatal(err)
			}
			if leaves {
				k.c.CloseWrite()
			} else {
				k.ask("GET")
			}
			release()
			r := bufio.NewReader(io.MultiReader(bytes.NewReader(got), k.c.TCPConn))
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Fatal(err)
			}
			if ev := k.next(); ev.Error != "" {
				t.Errorf("%+v", ev)
			}
			if !leaves {
				asked(t, u)
				io.WriteString(u, okAnswer)
				k.c.Reader = r
				k.answered("GET", 200, "ok")
				return
			}
			k.until(func() bool { return k.srv.Stats().Connections == 0 })
		})
	}
}

// A brittle Decider panics when it is asked about an address, once it is told to.
type brittleDecider struct {
	Decider
	breaks *atomic.Bool
}

func (d brittleDecider) Decide(r policy.Request) policy.Decision {
	if r.Destination.IsValid() && d.breaks.Load() {
		panic("as it was told to")
	}
	return d.Decider.Decide(r)
}

// After a panic nothing of an exchange is left, neither on a connection that was used
// before nor on a new one.
func TestVisitPanics(t *testing.T) {
	if *withoutLanes {
		t.Skip("it is about lanes")
	}
	for _, used := range []bool{false, true} {
		t.Run(fmt.Sprintf("used %v", used), func(t *testing.T) {
			var breaks atomic.Bool
			k := startCarrying(t, func(c *Config) { c.Decider = brittleDecider{c.Decider, &breaks} })
			var u net.Conn
			if used {
				u = k.first()
			}
			breaks.Store(true)
			k.ask("GET")
			if b, err := io.ReadAll(k.c); len(b) > 0 || err != nil {
				t.Errorf("the client: %q, %v", b, err)
			}
			if used {
				k.ended(u)
			}
			if ev := k.next(); !ev.Aborted {
				t.Errorf("%+v", ev)
			}
			k.quiet()
			k.until(func() bool { return k.srv.Stats().Connections == 0 })
			k.empty()
			breaks.Store(false)
			k.c = k.dial()
			k.again()
		})
	}
}

// empty checks that g's lanes hold nothing but their doors and wake-ups, and nobody
// counts as a client.
func (g *gate) empty() {
	g.t.Helper()
	g.inLane(func(l *lane) {
		for i, s := range l.slots {
			if s.p != nil || s.conn != nil {
				g.t.Errorf("slot %d holds %+v", i, s)
			}
		}
		if n := len(l.slots) - len(l.unused) - 1 - len(l.doors); n != 0 || l.open != 0 || l.opening.Load() != 0 {
			g.t.Errorf("%d slots, %d passages, %d of them without a tunnel", n, l.open, l.opening.Load())
		}
		for i, due := range l.due {
			if due != never {
				g.t.Errorf("slot %d is to be looked at", i)
			}
		}
	})
	g.srv.clients.mu.Lock()
	defer g.srv.clients.mu.Unlock()
	g.srv.crowd.mu.Lock()
	defer g.srv.crowd.mu.Unlock()
	if n, m := len(g.srv.clients.live), len(g.srv.crowd.open); n != 0 || m != 0 {
		g.t.Errorf("%d clients, %d sources", n, m)
	}
}
