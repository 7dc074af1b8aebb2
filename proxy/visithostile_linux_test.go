package proxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
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
