package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/policy"
	"sallyport/policy/event"
)

// stuck returns whether a visit of g waits for its client to take more.
func (g *gate) stuck() (yes bool) {
	g.inLane(func(l *lane) {
		l.each(func(p *passage) { yes = yes || p.phase == forwarding && p.visit.conn.waiter != nil })
	})
	return yes
}

// onVisit has f done with each visit's passage.
func (g *gate) onVisit(f func(p *passage)) {
	g.inLane(func(l *lane) {
		l.each(func(p *passage) {
			if p.visit != nil {
				f(p)
			}
		})
	})
}

// room sets how much the kernel keeps for clients that take nothing.
func (g *gate) room(n int) {
	g.onVisit(func(p *passage) {
		if err := setsockopt(p.fd[clientSide], unix.SOL_SOCKET, unix.SO_SNDBUF, n); err != nil {
			g.t.Error(err)
		}
	})
}

// fill has the origin at u, which was asked, send pieces until the client, which reads
// nothing, takes no more. It returns how many bytes are on their way, at least.
func (k *carrying) fill(u io.Writer) (sent int) {
	k.t.Helper()
	const piece = 16 << 10
	before := k.srv.httpDown.Load()
	k.c.SetReadBuffer(64 << 10)
	k.room(64 << 10) // together less than what is copied outside of the lane
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

// A far side that is closed while the client takes nothing is not lent to a relay: its
// slot in the lane may be another's by then.
func TestVisitDoesNotLendWhatIsClosed(t *testing.T) {
	if *withoutLanes {
		t.Skip("it is about lanes")
	}
	k := startCarrying(t)
	k.c.SetReadBuffer(16 << 10)
	k.ask("GET")
	u := k.o.accept(t)
	asked(t, u)
	io.WriteString(u, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
	before, sent := k.srv.httpDown.Load(), int64(0)
	queued := 0
	for i := 0; queued < 16<<10; i++ { // what the client has not taken is with the proxy
		if i == 4096 {
			t.Fatal("the client takes everything")
		}
		fmt.Fprintf(u, "800\r\n%s\r\n", strings.Repeat("x", 2048))
		sent += 2048
		k.until(func() bool { return k.srv.httpDown.Load()-before == sent })
		k.onVisit(func(p *passage) { queued, _ = unix.IoctlGetInt(p.fd[clientSide], unix.SIOCOUTQNSD) })
	}
	io.WriteString(u, "0\r\n\r\n")
	k.next()
	k.room(1)
	k.ask("GET")
	asked(t, u)
	k.c.CloseWrite()
	large := strings.Repeat("x", 60<<10) // the kernel adds to the last segment without a look at SO_SNDBUF
	fmt.Fprintf(u, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX: %s\r\n\r\nsome", 4*minBulk, large)
	k.until(k.stuck)
	k.onVisit(func(p *passage) {
		p.pending[clientSide] = true // the event may not be here yet
		p.visit.overdue()
	})
	k.ended(u)
	other := k.dial() // has what was given back
	k.until(func() bool { return k.inLanes() == 2 })
	io.Copy(io.Discard, k.c)
	if ev := k.next(); !ev.Aborted {
		t.Errorf("%+v", ev)
	}
	k.until(func() bool { return k.inLanes() == 1 })
	k.c = other
	k.again()
	other.Close()
	k.until(func() bool { return k.srv.Stats().Connections == 0 })
	k.srv.pools.retire()
	k.empty()
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

// A connection to the far side that finds no descriptor in the lane is a lack of
// descriptors, as it would be anywhere.
func TestVisitWithoutDescriptor(t *testing.T) {
	if *withoutLanes {
		t.Skip("it is about lanes")
	}
	k := startCarrying(t)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	restore := sync.OnceFunc(func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was) })
	t.Cleanup(restore)
	k.until(func() bool { return k.inLanes() == 1 })
	k.resolver.intercept(func(context.Context, string) ([]netip.Addr, error) {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		unix.Close(fd)
		now := was
		now.Cur = uint64(fd) + 1 // for the socket alone
		return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, unix.Setrlimit(unix.RLIMIT_NOFILE, &now)
	})
	k.ask("GET")
	resp, body := k.c.response("GET")
	restore()
	if ev := k.next(); resp.StatusCode != 503 || ev.Decision.Reason != policy.ReasonLimitExceeded {
		t.Errorf("%s %s, %+v", resp.Status, body, ev)
	}
}

// The sweeper of a carrier keeps away from the descriptor of a connection that the lane
// closes meanwhile, as after a change of policy at the end of a response: the number may
// be another's by then. Close has the lane close it, soon.
func TestSweeperLeavesClosedAlone(t *testing.T) {
	if *withoutLanes {
		t.Skip("it is about lanes")
	}
	k := startCarrying(t)
	k.first()
	c := k.carrier()
	for _, conn := range k.kept() {
		conn.Close()
	}
	c.sweep()
	if n := len(k.kept()); n != 0 {
		t.Errorf("%d connections that are closed are kept", n)
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

// hostileAnswers are what an origin says to one request before it closes its side.
var hostileAnswers = []string{
	okAnswer,
	"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nokk",
	"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nokx0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nTrailer: T\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nT: 1\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTrailer: T, T\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nT: 1\r\nT: 2\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nT: 1\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTrailer: T\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nT: 1\r\nU: 2\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTrailer: Content-Length\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 2\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTrailer: T\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\n\r\nuntil the end",
	"HTTP/1.0 200 OK\r\n\r\nuntil the end",
	"HTTP/1.1 200 OK\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close, X-Mine\r\nX-Mine: 1\r\nX-Other: 2\r\n\r\n",
	"HTTP/1.1 204 No Content\r\n\r\n",
	"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n",
	"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\nContent-Type: text/plain\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 205 Reset\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 205 Reset\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
	"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nContent-Type: text/plain\r\nEtag: x\r\n\r\n",
	"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
	"HTTP/1.1 100 Continue\r\n\r\n" + okAnswer,
	"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + okAnswer,
	"HTTP/1.1 103 Early Hints\r\nLink: a\r\nContent-Length: 5\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: b\r\n\r\n" + okAnswer,
	"HTTP/1.1 199 What\r\nConnection: X\r\nX: 1\r\n\r\n" + okAnswer,
	strings.Repeat("HTTP/1.1 102 Wait\r\n\r\n", 101) + okAnswer,
	"HTTP/1.1 102 Wait\r\n\r\n",
	"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nraw",
	"HTTP/1.1 099 What\r\n\r\n", "HTTP/1.1 1000 What\r\n\r\n", "HTTP/1.1 20 What\r\n\r\n",
	"HTTP/1.1 299 What else\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 999 What else\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 600 \r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
	"HTTP/1.1 407 Proxy\r\nProxy-Authenticate: Basic\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/2.0 200 OK\r\n\r\n", "SSH-2.0-x\r\n", "",
	"HTTP/1.1 200 OK\r\nDate: yesterday\r\nDate: today\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nServer: x\r\nVia: 1.1 a\r\nKeep-Alive: x\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nX : c\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\nX: a\rb\nContent-Length: 2\n\nok",
	"HTTP/1.1 200 OK\r\nContent-Type:\r\nContent-Length: 15\r\n\r\n<html>something",
	"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n",
	"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\ndata: 1\n\n",
	"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 5000) + "\r\nContent-Length: 9000\r\n\r\n" + strings.Repeat("y", 9000),
	"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 70000) + "\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + strings.Repeat("y", 300000),
	"HTTP/1.1 200 OK\r\nContent-Length: 300001\r\n\r\n" + strings.Repeat("y", 300000),
	"HTTP/1.1 200 OK\r\n\r\n" + strings.Repeat("y", 300000),
}

// TestSameAnswers: whatever an origin says, clients and the log see the same with lanes
// and without.
func TestSameAnswers(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	text := policyFor("", o.port())
	gates := []*gate{startGate(t, text, true), startGate(t, text, false)}
	for _, g := range gates {
		g.resolver.set("api.ok.test", "127.0.0.1")
	}
	for i, answer := range hostileAnswers {
		for _, method := range []string{"GET", "HEAD", "OPTIONS"} {
			for _, fields := range []string{"", "Connection: close\r\n", "TE: trailers\r\n"} {
				var seen [2]string
				for j, g := range gates {
					seen[j] = g.exchange(o, method, fields, answer)
				}
				if seen[0] != seen[1] {
					t.Errorf("%d: %s, %q, %.200q\nin a lane: %.3000q\nwithout:   %.3000q", i, method, fields, answer, seen[0], seen[1])
				}
			}
		}
	}
	for _, g := range gates {
		g.quiet()
		if st := g.srv.Stats(); st.Panics != 0 {
			t.Errorf("%+v", st)
		}
	}
}

// exchange has a new client ask for method, and a new connection of o answer. It returns
// what the client received and the event, without what differs each time.
func (g *gate) exchange(o *origin, method, fields, answer string) string {
	g.t.Helper()
	g.srv.pools.retire()
	c := g.dial()
	defer c.Close()
	c.send("%s http://api.ok.test:%d/p?q HTTP/1.1\r\nHost: x\r\n%s\r\n", method, o.port(), fields)
	u := o.accept(g.t)
	defer u.Close()
	var log strings.Builder
	log.WriteString(headOf(g.t, u))
	io.WriteString(u, answer)
	u.(*net.TCPConn).CloseWrite()
	for {
		resp, err := http.ReadResponse(c.Reader, &http.Request{Method: method})
		if err != nil {
			fmt.Fprintf(&log, "response: %v\n", err)
			break
		}
		if len(resp.Header["Date"]) == 1 && resp.Header.Get("Date") != "yesterday" {
			resp.Header.Set("Date", "now")
		}
		resp.Header.Del("Content-Length") // as in resp.ContentLength
		body, err := io.ReadAll(resp.Body)
		if resp.Header.Get(idField) != "" { // ours
			resp.Header.Del(idField)
			body = nil
		}
		if len(body) == 0 && err == nil { // in no chunk, or none announced
			resp.TransferEncoding, resp.ContentLength = nil, 0
		}
		fmt.Fprintf(&log, "%s %v %v %d %v %d:%.20q %v %v\n", resp.Status, resp.TransferEncoding, resp.Close, resp.ContentLength, resp.Header, len(body), body, resp.Trailer, err)
		if resp.StatusCode >= 200 {
			break
		}
	}
	ev := g.next()
	fmt.Fprintf(&log, "event: %s %s %d %s %s %s %d %q %v %d %d %q\n", ev.Kind, ev.Method, ev.Status, ev.Name, ev.Path, ev.Decision.Reason, ev.Port, ev.ContentType, ev.Aborted, ev.BytesUp, ev.BytesDown, ports.ReplaceAllString(ev.Error, ":N"))
	return log.String()
}

const idField = "X-Sallyport-Id"

var ports = regexp.MustCompile(`:[0-9]{4,5}\b`)

// headOf reads the head of a request.
func headOf(t testing.TB, c net.Conn) string {
	t.Helper()
	var b []byte
	for one := make([]byte, 1); !bytes.HasSuffix(b, []byte("\r\n\r\n")); b = append(b, one...) {
		if _, err := c.Read(one); err != nil {
			t.Fatalf("after %q: %v", b, err)
		}
	}
	return string(b)
}

// hostileRequests are what a client sends before it closes its side; %s is an authority.
var hostileRequests = []string{
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\nGET http://%[1]s/2 HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n\r\nGET http://%[1]s/2 HTTP/1.1\r\nHost: x\r\n\r\n",
	"\r\nGET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "\r\n", "\r\n\r\n", "\n", " ", "G", "GET http://%s/ HTTP/1.1\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\nGET http://%[1]s/2 HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Close\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nProxy-Connection: close\r\nTrailer: X\r\nKeep-Alive: 1\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nTransfer_Encoding: chunked\r\nContent-Length : 3\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nTransfer\\Encoding: chunked\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\nX: a\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nX: \xff\xfe\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nx-y: 1\r\nX-Y: 2\r\nX-y:\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: \r\n\r\n", "GET http://%s/ HTTP/1.1\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: a b\r\n\r\n", "GET http://%s/ HTTP/1.1\r\nHost: a/b\r\n\r\n", "GET http://%s/ HTTP/1.1\r\nHost: \xff\r\n\r\n",
	"GET http://%s/ HTTP/1.0\r\nHost: x\r\n\r\n", "GET http://%s/ HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "GET http://%s/ HTTP/1.2\r\nHost: x\r\n\r\n",
	"GET http://%s/ HTTP/2.0\r\nHost: x\r\n\r\n", "GET  http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s/ \r\nHost: x\r\n\r\n", "GET http://%s/\r\n\r\n",
	"get http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "GET HTTP://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "GET https://%s/ HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://u:p@%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://@%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "GET http:///x HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://%s HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s?q HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s/#f HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://%s/%%zz HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s/%%2f%%00?%%zz;\"<> HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s/\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://%s/\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s//a/../b/./c HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s\\@no.test/ HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://no.test/ HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n\r\nGET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://missing.ok.test:%[2]d/ HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s:99999/ HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://[::1/ HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: %s\r\n\r\n", "GET * HTTP/1.1\r\nHost: x\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "GET /proxy.pac HTTP/1.1\r\nHost: x\r\n\r\n",
	"OPTIONS http://%s HTTP/1.1\r\nHost: x\r\n\r\n", "OPTIONS http://%s HTTP/1.1\r\nHost: x\r\nMax-Forwards: 0\r\n\r\n", "OPTIONS http://%s/ HTTP/1.1\r\nHost: x\r\nMax-Forwards: 2\r\n\r\n",
	"OPTIONS http://%s/ HTTP/1.1\r\nHost: x\r\nMax-Forwards: x\r\n\r\n", "GET http://%s/ HTTP/1.1\r\nHost: x\r\nMax-Forwards: 0\r\n\r\n",
	"TRACE http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "DELETE http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "POST http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", "HEAD http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n", "GET http://%s/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n", "GET http://%s/ HTTP/1.1\r\nHost: x\r\nExpect: x\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nConnection: Host, Via, X, Content-Length\r\nX: 1\r\nVia: 1.0 a\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic eDp5\r\nAuthorization: Basic eDp5\r\nForwarded: a\r\nX-Forwarded-For: b\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nPragma: no-cache\r\nCookie: a=b\r\nCookie: c=d\r\nTe: gzip\r\nUser-Agent: \r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\nVia: 1.1 " + pseudonym + "\r\n\r\n",
	"CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT no.test:1 HTTP/1.1\r\nHost: x\r\n\r\n",
	"GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\nCONNECT %[1]s HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n\x16\x03\x01",
	"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}

// TestSameRequests: whatever a client asks, at once or after another request, it, the
// origin and the log see the same with lanes and without.
func TestSameRequests(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	text := policyFor("", o.port())
	gates := []*gate{startGate(t, text, true), startGate(t, text, false)}
	for _, g := range gates {
		g.resolver.set("api.ok.test", "127.0.0.1")
	}
	authority := fmt.Sprintf("api.ok.test:%d", o.port())
	for i, request := range hostileRequests {
		request = strings.NewReplacer("%[2]d", strconv.Itoa(o.port()), "%[1]s", authority, "%s", authority, "%%", "%").Replace(request)
		for _, long := range []int{0, 9000, 70000} {
			raw := strings.Replace(request, "Host: x\r\n", "Host: x\r\n"+strings.Repeat("L: "+strings.Repeat("l", 996)+"\r\n", long/1000), 1)
			for _, second := range []bool{false, true} {
				var seen [2]string
				for j, g := range gates {
					seen[j] = g.requests(o, authority, raw, second)
				}
				if seen[0] != seen[1] {
					t.Errorf("%d: second %v, long %d, %.500q\nin a lane: %.3000q\nwithout:   %.3000q", i, second, long, request, seen[0], seen[1])
				}
			}
		}
	}
	for _, g := range gates {
		g.quiet()
		if st := g.srv.Stats(); st.Panics != 0 {
			t.Errorf("%+v", st)
		}
	}
}

// requests has a new client send raw, after another request if second is set, and close
// its side. It returns what it receives, what came to o, and the events.
func (g *gate) requests(o *origin, authority, raw string, second bool) string {
	g.t.Helper()
	g.srv.pools.retire()
	heads := make(chan string, 16)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case u := <-o.conns:
				wg.Go(func() {
					defer u.Close()
					for r := bufio.NewReader(u); ; {
						req, err := http.ReadRequest(r)
						if err != nil {
							return
						}
						body, _ := io.ReadAll(req.Body)
						heads <- fmt.Sprintf("%s %s %s %.300q %d %v %.20q\n", req.Method, req.RequestURI, req.Host, fmt.Sprint(req.Header), req.ContentLength, req.TransferEncoding, body)
						answer := okAnswer
						if req.Method == http.MethodHead {
							answer = strings.TrimSuffix(answer, "ok")
						}
						io.WriteString(u, answer)
					}
				})
			case <-stop:
				return
			}
		}
	})
	defer wg.Wait()
	defer close(stop)
	defer g.srv.pools.retire()
	c := g.dial()
	defer c.Close()
	var log strings.Builder
	if second {
		c.send("GET http://%s/first HTTP/1.1\r\nHost: x\r\n\r\n", authority)
		resp, body := c.response("GET")
		fmt.Fprintf(&log, "%s %s\n", resp.Status, body)
	}
	io.WriteString(c.TCPConn, raw)
	c.CloseWrite()
	b, err := io.ReadAll(c)
	if err != nil {
		err = errors.New("error")
	}
	g.until(func() bool { return g.srv.Stats().Connections == 0 })
	all := varying.ReplaceAllString(string(b), "X")
	if i := strings.Index(all, "is closed"); i > 0 {
		all = all[:i]
	}
	lines := strings.Split(all, "\r\n")
	slices.Sort(lines) // fields come in any order
	fmt.Fprintf(&log, "%q %v\n", lines, err)
	for len(heads) > 0 {
		log.WriteString(<-heads)
	}
	for len(g.events.c) > 0 {
		ev := <-g.events.c
		fmt.Fprintf(&log, "event: %s %s %d %s %s %s %d %q %v %d %d %q\n", ev.Kind, ev.Method, ev.Status, ev.Name, ev.Path, ev.Decision.Reason, ev.Port, ev.ContentType, ev.Aborted, ev.BytesUp, ev.BytesDown, varying.ReplaceAllString(ev.Error, "X"))
	}
	return log.String()
}

var varying = regexp.MustCompile(`:[0-9]{4,5}\b|[0-9a-z]{8}-[0-9a-z]+|Date: [^\r]*`)

// A moodyOrigin answers as the path of a request asks it to, in ways an origin should not.
type moodyOrigin struct {
	l    net.Listener
	wg   sync.WaitGroup
	mu   sync.Mutex
	open map[net.Conn]struct{}
	over bool
}

func startMoody(t *testing.T) *moodyOrigin {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := &moodyOrigin{l: l, open: make(map[net.Conn]struct{})}
	o.wg.Go(o.accept)
	t.Cleanup(o.end)
	return o
}

func (o *moodyOrigin) accept() {
	for {
		c, err := o.l.Accept()
		if err != nil {
			return
		}
		o.mu.Lock()
		o.open[c] = struct{}{}
		if o.over {
			c.Close()
		}
		o.mu.Unlock()
		o.wg.Go(func() { o.serve(c.(*net.TCPConn)) })
	}
}

func (o *moodyOrigin) end() {
	o.l.Close()
	o.mu.Lock()
	o.over = true
	for c := range o.open {
		c.Close()
	}
	o.mu.Unlock()
	o.wg.Wait()
}

func (o *moodyOrigin) serve(c *net.TCPConn) {
	defer func() {
		o.mu.Lock()
		delete(o.open, c)
		o.mu.Unlock()
		c.Close()
	}()
	for r := bufio.NewReader(c); ; {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		io.Copy(io.Discard, req.Body)
		mood, token, _ := strings.Cut(strings.TrimPrefix(req.URL.Path, "/"), "/")
		head := "HTTP/1.1 200 OK\r\nX-Token: " + token + "\r\n"
		n := 1
		switch mood {
		case "big":
			n = 100000
		case "huge":
			n = 3000000
		case "cut": // in the middle
			fmt.Fprintf(c, "%sContent-Length: 100000\r\n\r\n%s", head, strings.Repeat("x", 50000))
			return
		case "reset":
			fmt.Fprintf(c, "%sTransfer-Encoding: chunked\r\n\r\n5\r\nhe", head)
			c.SetLinger(0)
			return
		case "gone":
			return
		case "hang": // until somebody goes
			fmt.Fprintf(c, "%sContent-Length: 10\r\n\r\n12345", head)
			r.Peek(1)
			return
		case "mute":
			r.Peek(1)
			return
		case "hints":
			io.WriteString(c, "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
		case "end":
			fmt.Fprintf(c, "%s\r\n%s", head, strings.Repeat(token+".", 3000))
			return
		case "more": // than was asked for
			head = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Token: " + token + "\r\n\r\n" + head
		case "flood": // of unknown length
			if _, err := fmt.Fprintf(c, "%s\r\n", head); err == nil && req.Method != http.MethodHead {
				for range 3000 {
					if _, err := io.WriteString(c, strings.Repeat(token+".", 100)); err != nil {
						return
					}
				}
			}
			return
		case "chunked":
			fmt.Fprintf(c, "%sTransfer-Encoding: chunked\r\n\r\n", head)
			if req.Method != http.MethodHead {
				for range 50 {
					fmt.Fprintf(c, "%x\r\n%s\r\n", len(token), token)
				}
				io.WriteString(c, "0\r\n\r\n")
			}
			continue
		}
		body := strings.Repeat(token+".", n/(len(token)+1)+1)
		fmt.Fprintf(c, "%sContent-Length: %d\r\n\r\n", head, len(body))
		if req.Method != http.MethodHead {
			io.WriteString(c, body)
		}
	}
}

// tally counts events.
type tally struct{ all, whole atomic.Int64 }

func (c *tally) Observe(ev *event.Event) {
	c.all.Add(1)
	if ev.Status == http.StatusOK && !ev.Aborted {
		c.whole.Add(1)
	}
}

// TestVisitsInTurmoil has many clients and an origin do what they should not, while the
// policy changes. Nobody gets what another one asked for, nothing looks whole that is not,
// and nothing is left.
func TestVisitsInTurmoil(t *testing.T) {
	for _, ends := range []string{"by itself", "cut"} {
		t.Run(ends, func(t *testing.T) { testVisitsInTurmoil(t, ends == "cut") })
	}
}

func testVisitsInTurmoil(t *testing.T, cut bool) {
	o := startMoody(t)
	port := int(addrPort(o.l.Addr()).Port())
	allowed := policyFor("", port)
	var seen tally
	g := startLanes(t, 2, allowed, func(c *Config) {
		c.Observer = &seen
		c.Limits.ConnectionsPerSource = 10000
		c.Timeouts.Drain = time.Minute
	})
	g.resolver.set("api.ok.test", "127.0.0.1")
	g.resolver.set("other.ok.test", "127.0.0.1")
	g.lanes()
	before := socketsOpen(t)
	var wg sync.WaitGroup
	var whole atomic.Int64
	clients, rounds := 24, 60
	if testing.Short() {
		rounds = 15
	}
	for i := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 7))
			for round := range rounds {
				whole.Add(g.misbehave(r, fmt.Sprintf("c%d-%d", i, round), port))
			}
		})
	}
	stop, policies := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(policies)
		denied := compile(t, allowed+"    deny: [other.ok.test]\n")
		passed := compile(t, allowed)
		for range 100000 {
			g.store.Swap(denied)
			g.store.Swap(passed)
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond): // pace: requests come between changes
			}
		}
	}()
	if cut {
		g.until(func() bool { return seen.all.Load() > int64(clients*rounds/3) })
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		g.srv.Shutdown(ctx)
	}
	wg.Wait()
	close(stop)
	<-policies
	st := g.srv.Stats()
	if st.Panics != 0 {
		t.Errorf("%+v", st)
	}
	if n := seen.whole.Load(); n < whole.Load() {
		t.Errorf("%d responses came whole, in the log are %d", whole.Load(), n)
	}
	t.Logf("%d events, %d of whole responses; clients got %d", seen.all.Load(), seen.whole.Load(), whole.Load())
	if !cut {
		g.until(func() bool { return g.srv.Stats().Connections == 0 })
		g.srv.pools.retire()
		g.empty()
	}
	o.end()
	g.until(func() bool { return socketsOpen(t) <= before })
}

// socketsOpen returns how many there are.
func socketsOpen(t *testing.T) (n int) {
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range all {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

var moods = []string{"ok", "ok", "ok", "big", "huge", "cut", "reset", "gone", "hang", "mute", "hints", "end", "more", "chunked", "flood"}

// misbehave has one client ask a few times. It returns how many whole responses it got.
func (g *gate) misbehave(r *rand.Rand, name string, port int) (whole int64) {
	conn, err := net.Dial("tcp", g.addr)
	if err != nil {
		return 0 // it is shut down
	}
	c := conn.(*net.TCPConn)
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if r.IntN(3) == 0 {
		c.SetReadBuffer(64 << 10)
	}
	in := bufio.NewReader(c)
	for i := range 1 + r.IntN(6) {
		mood := moods[r.IntN(len(moods))]
		host := []string{"api", "other"}[r.IntN(2)]
		token := fmt.Sprintf("%s-%d", name, i)
		method := []string{"GET", "GET", "GET", "HEAD", "OPTIONS"}[r.IntN(5)]
		request := fmt.Sprintf("%s http://%s.ok.test:%d/%s/%s HTTP/1.1\r\nHost: x\r\n\r\n", method, host, port, mood, token)
		if r.IntN(25) == 0 {
			request = strings.Replace(request, "Host: x\r\n", "Host: x\r\nContent-Length: 1\r\n\r\nx", 1)
			request = strings.TrimSuffix(request, "\r\n")
		}
		if r.IntN(10) == 0 {
			k := 1 + r.IntN(len(request)-1)
			io.WriteString(c, request[:k])
			runtime.Gosched()
			io.WriteString(c, request[k:])
		} else {
			io.WriteString(c, request)
		}
		switch k := r.IntN(20); {
		case k == 0:
			c.SetLinger(0)
			return whole
		case k == 1:
			c.CloseWrite()
		case k == 2 || mood == "mute" || mood == "hang":
			if host == "api" || r.IntN(2) == 0 { // nobody would end it
				in.Peek(1 * r.IntN(2) * boolInt(mood != "mute"))
				c.SetLinger(r.IntN(2) - 1)
				return whole
			}
		}
		for {
			resp, err := http.ReadResponse(in, &http.Request{Method: method})
			if err != nil {
				return whole
			}
			if resp.StatusCode < 200 {
				continue
			}
			got := resp.Header.Get("X-Token")
			body, err := io.ReadAll(resp.Body)
			if resp.StatusCode != http.StatusOK {
				if got != "" {
					g.t.Errorf("%s: %s with a token", token, resp.Status)
				}
				break
			}
			if got != token || err == nil && method != "HEAD" && mood != "more" && (!strings.HasPrefix(string(body), token) || mood == "cut" || mood == "reset" || mood == "hang" || mood == "huge" && len(body) < 3000000 || mood == "flood" && len(body) != 300000*(len(token)+1)) {
				g.t.Errorf("%s %s was answered for %q, %d bytes, %v", method, token, got, len(body), err)
			}
			if err != nil {
				if isTimeout(err) {
					g.t.Errorf("%s %s %s: %v after %d bytes", method, mood, token, err, len(body))
				}
				return whole
			}
			whole++
			if resp.Close {
				return whole
			}
			break
		}
	}
	return whole
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestSameEnds: however an exchange is ended, in whatever it waits for, the log says the
// same with lanes and without, no client takes a part for the whole, and nothing is left.
func TestSameEnds(t *testing.T) {
	for _, state := range []string{"head", "body", "relayed", "stuck"} {
		for _, way := range []string{"client", "policy", "shutdown", "origin"} {
			t.Run(state+" "+way, func(t *testing.T) {
				with, without := endOf(t, true, state, way), endOf(t, false, state, way)
				if with != without {
					t.Errorf("in a lane: %s\nwithout:   %s", with, without)
				}
			})
		}
	}
}

func endOf(t *testing.T, lanes bool, state, way string) string {
	t.Helper()
	o := listen(t, "127.0.0.1:0")
	g := startGate(t, policyFor("", o.port()), lanes, func(c *Config) { c.Limits.ConnectionsPerSource = 100 })
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
	u := o.accept(t).(*net.TCPConn)
	asked(t, u)
	const size = 64 << 20
	half := map[string]int{"head": 0, "body": 5, "relayed": 2 * minBulk}[state]
	if state != "head" {
		fmt.Fprintf(u, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
	}
	var resp *http.Response
	if half > 0 {
		go u.Write(make([]byte, half))
		var err error
		if resp, err = http.ReadResponse(c.Reader, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, make([]byte, half)); err != nil {
			t.Fatal(err)
		}
	}
	if state == "stuck" {
		u.SetWriteDeadline(time.Now().Add(300 * time.Millisecond)) // it takes less until nobody takes more
		if _, err := u.Write(make([]byte, size)); !isTimeout(err) {
			t.Fatal(err)
		}
	}
	switch way {
	case "client":
		c.SetLinger(0)
		c.Close()
	case "policy":
		g.store.Swap(compile(t, policyFor("", o.port())+"    deny: [api.ok.test]\n"))
	case "shutdown":
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		g.srv.Shutdown(ctx)
	case "origin":
		u.SetLinger(0)
		u.Close()
	}
	status := 0
	if way != "client" {
		var err error
		if resp == nil {
			resp, err = http.ReadResponse(c.Reader, nil)
		}
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			if status = resp.StatusCode; status == http.StatusOK && err == nil {
				t.Error("the response looks whole")
			}
		}
	}
	ev := g.next()
	c.Close()
	g.until(func() bool { return g.srv.Stats().Connections == 0 })
	g.quiet()
	if way != "shutdown" {
		g.srv.pools.retire()
		g.empty()
	}
	if lanes && g.srv.Stats().Panics != 0 {
		t.Errorf("%+v", g.srv.Stats())
	}
	return fmt.Sprintf("%d; %d %s %v", status, ev.Status, ev.Decision.Reason, ev.Aborted) + " " + callNames.ReplaceAllString(ev.Error, "")
}

// callNames are what differs in errors: who waits elsewhere calls it otherwise.
var callNames = regexp.MustCompile(`(raw-)?(read|write) tcp[^ ]*( 127[^ ]*)?: |(read|write|raw-read|raw-write): `)
