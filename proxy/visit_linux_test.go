package proxy

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// replies are what an origin may say to a request, by the number in its X-Reply.
var replies = []string{
	"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 Fine\r\nContent-Length: 0\r\nX-A: 1\r\nX-A: 2\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/plain\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n3\r\nabc\r\n0\r\nX-T: end\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Late: end\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 204 No Content\r\nContent-Type: text/plain\r\n\r\n",
	"HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\nContent-Type: text/plain\r\nETag: \"1\"\r\n\r\n",
	"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 1\r\n\r\nx",
	"HTTP/1.1 299 \r\nContent-Length: 1\r\nConnection: x-b\r\nX-B: 1\r\nKeep-Alive: 3\r\n\r\nx",
	"HTTP/1.1 500 Oh\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbad",
	"HTTP/1.1 200 OK\r\n\r\nuntil the end|",
	"HTTP/1.0 200 OK\r\n\r\nuntil the end|",
	"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
	"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\ncut short|",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ncut|",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc|",
	"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok|",
	"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n|",
	"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n|",
	"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
	"nonsense\r\n\r\n|",
	"HTTP/1.1 200 OK\r\nX: \x01\r\nContent-Length: 2\r\n\r\nok|",
	"|",
	"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + strings.Repeat("0123456789", 30000),
	"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + strings.Repeat("0123456789", 300000),
	"HTTP/1.1 200 OK\r\nContent-Length: 3000001\r\n\r\n" + strings.Repeat("0123456789", 300000) + "|",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("3e8\r\n"+strings.Repeat("0123456789", 100)+"\r\n", 3000) + "0\r\nX-T: 1\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("3e8\r\n"+strings.Repeat("0123456789", 100)+"\r\n", 3000) + "3|",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("3e8\r\n"+strings.Repeat("0123456789", 100)+"\r\n", 600) + "0\r\n\r\n",
}

// A parrot is an origin that answers with replies, and remembers what it was asked.
type parrot struct {
	mu  sync.Mutex
	log []string
}

// repeat serves the connections of o until the end of the test.
func (p *parrot) repeat(t *testing.T, o *origin) {
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
}

func (p *parrot) serve(c net.Conn) {
	defer c.Close()
	br := bufio.NewReader(c)
	for {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		body, _ := io.ReadAll(r.Body)
		p.mu.Lock()
		p.log = append(p.log, fmt.Sprintf("%s %s %s %s %q", r.Method, r.RequestURI, r.Host, fields(r.Header), body))
		p.mu.Unlock()
		var n int
		fmt.Sscan(r.Header.Get("X-Reply"), &n)
		reply, end := strings.CutSuffix(replies[n], "|")
		if r.Method == http.MethodHead {
			if i := strings.Index(reply, "\r\n\r\n"); i >= 0 && n != 8 {
				reply = reply[:i+4]
			}
		}
		if n < 4 {
			i := min(len(reply), 20*n+1)
			io.WriteString(c, reply[:i])
			time.Sleep(time.Millisecond) // pace: the rest comes apart
			reply = reply[i:]
		}
		io.WriteString(c, reply)
		if end {
			return
		}
	}
}

func (p *parrot) asked() (log []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	log, p.log = p.log, nil
	return log
}

func fields(h http.Header) string {
	h = h.Clone()
	if d := h.Get("Date"); d != "" && !strings.Contains(d, "1994") {
		h.Set("Date", "now")
	}
	if h.Get("X-Sallyport-Id") != "" {
		h.Set("X-Sallyport-Id", "some")
	}
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(h)) {
		fmt.Fprintf(&b, "%s=%q ", k, h[k])
	}
	return b.String()
}

// TestPlainSameWithoutLanes: whatever requests a client sends and an origin answers, both
// and the log see the same with lanes and without.
func TestPlainSameWithoutLanes(t *testing.T) {
	seeds := uint64(400)
	if testing.Short() {
		seeds = 60
	}
	o := listen(t, "127.0.0.1:0")
	var p parrot
	p.repeat(t, o)
	with, without := startGate(t, policyFor("", o.port()), true), startGate(t, policyFor("", o.port()), false)
	for seed := range seeds {
		var logs [2]string
		for i, g := range []*gate{with, without} {
			v := &visitor{r: rand.New(rand.NewPCG(seed, 2)), g: g, o: o, p: &p}
			v.run()
			logs[i] = v.log.String()
		}
		if logs[0] != logs[1] {
			t.Fatalf("seed %d, in a lane:\n%s\nwithout:\n%s", seed, logs[0], logs[1])
		}
	}
	for _, g := range []*gate{with, without} {
		g.quiet()
		if st := g.srv.Stats(); st.Panics != 0 {
			t.Errorf("%+v", st)
		}
	}
}

// A visitor is a client's connection with requests made from a seed.
type visitor struct {
	r   *rand.Rand
	g   *gate
	o   *origin
	p   *parrot
	c   *client
	log bytes.Buffer
}

func (v *visitor) run() {
	v.g.resolver.set("www.ok.test", "127.0.0.1")
	v.g.resolver.set("api.ok.test", "127.0.0.1")
	v.c = v.g.dial()
	defer v.c.Close()
	for n := 1 + v.r.IntN(5); n > 0 && v.ask(); n-- {
	}
	for _, line := range slices.Compact(v.p.asked()) { // the same request again: a connection from the pool was of no use
		fmt.Fprintf(&v.log, "origin: %s\n", line)
	}
}

// ask sends a request or two and reads what comes of it. It reports whether there may be
// another one.
func (v *visitor) ask() (again bool) {
	var all string
	var methods []string
	for n := 1 + v.r.IntN(8)/7; n > 0; n-- {
		method, text := v.request()
		all += text
		methods = append(methods, method)
		if strings.Contains(text, "HTTP/1.0") || strings.Contains(text, "Connection: close") {
			break // a close before the next one was read is a reset, which may overtake the response
		}
	}
	if v.r.IntN(6) == 0 {
		i := v.r.IntN(len(all))
		io.WriteString(v.c.TCPConn, all[:i])
		time.Sleep(time.Millisecond) // pace: the rest comes apart
		all = all[i:]
	}
	io.WriteString(v.c.TCPConn, all)
	for _, method := range methods {
		if !v.answer(method) {
			return false
		}
	}
	return true
}

func (v *visitor) request() (method, text string) {
	one := func(of ...string) string { return of[v.r.IntN(len(of))] }
	method = one("GET", "GET", "GET", "GET", "HEAD", "OPTIONS", "POST", "TRACE", "BREW")
	host := one("www.ok.test", "www.ok.test", "www.ok.test", "api.ok.test", "www.no.test", "gone.ok.test")
	target := fmt.Sprintf("http://%s:%d%s", host, v.o.port(), one("/", "/a?b=c", "", "/%2e%2e/x", "//x"))
	if v.r.IntN(20) == 0 {
		target = one("/", "*", "https://www.ok.test/", "http://u:p@www.ok.test/", "HTTP://www.ok.test:1/", "http://", "http://[::1", "http://www.ok.test:99999/", "x:y", "/x")
	}
	version := "HTTP/1.1"
	if v.r.IntN(12) == 0 {
		version = "HTTP/1.0"
	}
	text = fmt.Sprintf("%s %s %s\r\nHost: %s\r\nX-Reply: %d\r\n", method, target, version, one("x", "x", "www.ok.test", "a b", ""), v.r.IntN(len(replies)))
	for range v.r.IntN(3) {
		text += one("Accept: application/json", "User-Agent: v/1", "Via: 1.1 other", "Via: 1.1 "+pseudonym, "Proxy-Connection: keep-alive", "Connection: close",
			"Connection: x-c", "X-C: 1", "TE: trailers", "Max-Forwards: 0", "Max-Forwards: 1", "Max-Forwards: x", "Pragma: no-cache", "Cookie: a=b", "X-Forwarded-For: 10.0.0.1",
			"Expect: 100-continue", "Content-Length: 0", "Upgrade: websocket", "Connection: upgrade", "Trailer: X-Q", "Proxy-Authorization: Basic eDp5", "X-D : 1", "X\xff: 1",
			"Accept-Encoding: gzip", "Range: bytes=0-1", "Content-Length: 1", "X-E: \xff", "X-F:") + "\r\n"
	}
	if method == "POST" {
		return method, text + "Content-Length: 4\r\n\r\nbody"
	}
	if strings.Contains(text, "Content-Length: 1") {
		return method, text + "\r\nb"
	}
	return method, text + "\r\n"
}

// answer reads a response.
func (v *visitor) answer(method string) (again bool) {
	see := func(format string, a ...any) { fmt.Fprintf(&v.log, format+"\n", a...) }
	resp, err := http.ReadResponse(v.c.Reader, &http.Request{Method: method})
	for err == nil && resp.StatusCode < 200 {
		see("client: %s %s", resp.Status, fields(resp.Header))
		resp, err = http.ReadResponse(v.c.Reader, &http.Request{Method: method})
	}
	if err != nil {
		see("client: %v", kind(err))
	} else {
		body, berr := io.ReadAll(resp.Body)
		if resp.Header.Get("X-Sallyport-Id") != "" || kind(berr) == "broken" {
			body = nil // it has the time and the number of the event, or a reset has overtaken some
		}
		if len(body) > 50 {
			body = fmt.Appendf(nil, "%d bytes, %d of them 9", len(body), bytes.Count(body, []byte("9")))
		}
		see("client: %s %s %s %q %s %v, length %d %v, %v", resp.Proto, resp.Status, fields(resp.Header), body, fields(resp.Trailer), resp.Close, resp.ContentLength, resp.TransferEncoding, kind(berr))
		again = berr == nil && !resp.Close
	}
	if err != nil {
		v.c.Close() // for the event, if nothing has come to it
	}
	ev := v.g.event(func(*event.Event) bool { return true })
	ev.Time, ev.Duration, ev.DNSTime, ev.ConnTime, ev.ID, ev.Source = time.Time{}, 0, 0, 0, "", v.o.addr
	ev.Decision.Revision = ""
	see("event: %+v", ev)
	if !again && err == nil { // the connection ends
		_, err := v.c.ReadByte()
		see("client: then %v", kind(err))
	}
	return again
}

// TestVisitTimeouts: a far side that falls silent, a client that does not read, and one
// that asks for nothing more end when timeouts.idle is over, and keep nobody waiting.
func TestVisitTimeouts(t *testing.T) {
	bothWays(t, func(t *testing.T, lanes bool) {
		o := listen(t, "127.0.0.1:0")
		g := startGate(t, policyFor("", o.port()), lanes, func(c *Config) { c.Timeouts.Idle = 300 * time.Millisecond })
		g.resolver.set("api.ok.test", "127.0.0.1")
		request := fmt.Sprintf("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())

		c := g.dial() // before the answer
		c.send("%s", request)
		o.accept(t)
		if resp, _ := c.response(http.MethodGet); resp.StatusCode != http.StatusGatewayTimeout {
			t.Errorf("a silent far side: %s", resp.Status)
		}
		if ev := g.next(); ev.Status != http.StatusGatewayTimeout || ev.Decision.Reason != policy.ReasonConnectFailed {
			t.Errorf("%+v", ev)
		}

		c = g.dial() // within the body
		c.send("%s", request)
		io.WriteString(o.accept(t), "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody")
		resp, err := http.ReadResponse(c.Reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); string(body) != "body" || err != io.ErrUnexpectedEOF {
			t.Errorf("%q %v", body, err)
		}
		if ev := g.next(); !ev.Aborted || ev.BytesDown != 4 {
			t.Errorf("%+v", ev)
		}

		c = g.dial() // the client takes nothing
		c.send("%s", request)
		far := o.accept(t)
		full := make(chan error, 1)
		go func() {
			_, err := io.WriteString(far, "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
			for b := make([]byte, 1<<20); err == nil; {
				_, err = far.Write(b)
			}
			full <- err
		}()
		if ev := g.next(); !ev.Aborted || ev.BytesDown < 1000 || !strings.HasPrefix(ev.Error, "response to the client") {
			t.Errorf("%+v", ev)
		}
		<-full
		c.Close()

		c = g.dial() // nothing more is asked for
		c.send("%s", request)
		io.WriteString(o.accept(t), okAnswer)
		c.response(http.MethodGet)
		g.next()
		if rest := c.rest(); rest != "" {
			t.Errorf("%q", rest)
		}
		g.until(func() bool { return g.srv.Stats().Connections == 0 })
	})
}

// TestVisitsDoNotWait: an exchange that waits, for a resolver, a far side or its client,
// keeps no other one waiting.
func TestVisitsDoNotWait(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	var p parrot
	g := startLanes(t, 1, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	g.resolver.set("www.ok.test", "127.0.0.1")

	deaf := g.dial() // does not read
	deaf.send("GET http://www.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
	far := o.accept(t)
	io.WriteString(far, "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
	far.SetWriteDeadline(time.Now().Add(time.Second))
	for b := make([]byte, 1<<20); ; {
		if _, err := far.Write(b); err != nil {
			break
		}
	}
	mute := g.dial() // of an origin that does not answer
	mute.send("GET http://www.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
	o.accept(t)

	p.repeat(t, o)
	c := g.dial()
	for range 10 {
		c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nX-Reply: 24\r\n\r\n", o.port())
		if resp, body := c.response(http.MethodGet); resp.StatusCode != 200 || len(body) != 300000 {
			t.Fatal(resp.Status, len(body))
		}
		g.next()
	}
}

// TestLongBodies ends long responses in the middle, to a client that does not read.
func TestLongBodies(t *testing.T) {
	for kind, head := range map[string]string{
		"known":   "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n",
		"chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3b9aca00\r\n",
	} {
		for name, do := range map[string]func(g *gate, c *client, far net.Conn){
			"revoked":  func(g *gate, _ *client, _ net.Conn) { g.store.Swap(compile(g.t, policyFor("", 1))) },
			"shutdown": func(g *gate, _ *client, _ net.Conn) { go g.srv.Shutdown(expired()) },
			"left":     func(_ *gate, c *client, _ net.Conn) { c.SetLinger(0); c.Close() },
			"far left": func(_ *gate, c *client, far net.Conn) { far.Close(); go io.Copy(io.Discard, c.TCPConn) },
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				bothWays(t, func(t *testing.T, lanes bool) {
					o := listen(t, "127.0.0.1:0")
					g := startGate(t, policyFor("", o.port()), lanes)
					g.resolver.set("api.ok.test", "127.0.0.1")
					c := g.dial()
					c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
					far := o.accept(t)
					io.WriteString(far, head)
					far.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
					for b, err := make([]byte, 1<<20), error(nil); err == nil; { // until nobody takes any more
						_, err = far.Write(b)
					}
					do(g, c, far)
					if ev := g.next(); !ev.Aborted || ev.Error == "" || ev.BytesDown < minBulk {
						t.Errorf("%+v", ev)
					} else if revoked := ev.Decision.Reason == policy.ReasonPolicyRevoked; revoked != (name == "revoked") {
						t.Errorf("%+v", ev)
					}
					g.until(func() bool { return g.srv.Stats().Connections == 0 })
				})
			})
		}
	}
}

// expired returns a context that has ended.
func expired() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// TestLookIsNotPutOff: whether a visitor that has closed its side is still there is looked
// at in time, also if it reads so slowly that every write to it has to wait.
func TestLookIsNotPutOff(t *testing.T) {
	if *withoutLanes {
		t.Skip("this is about a lane's sweep")
	}
	o := listen(t, "127.0.0.1:0")
	g := startLanes(t, 1, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
	far := o.accept(t)
	asked(t, far)
	c.CloseWrite()
	seen := false
	g.until(func() bool {
		g.inLane(func(l *lane) {
			l.each(func(p *passage) {
				if seen = p.phase == forwarding && p.pending[clientSide]; !seen {
					return
				}
				due := l.due[p.slot[clientSide]]
				l.now = l.now.Add(leftEvery / 2)
				p.visit.conn.arm() // as each write does that has to wait
				if l.due[p.slot[clientSide]] > due || due == never {
					t.Errorf("the look was put off from %v to %v", due, l.due[p.slot[clientSide]])
				}
			})
		})
		return seen
	})
	if ev := g.next(); !ev.Aborted || ev.Error != errClientLeft.Error() {
		t.Errorf("%+v", ev)
	}
}

// TestVisitErrorsSayWhere: the event of a response that broke off names the far side.
func TestVisitErrorsSayWhere(t *testing.T) {
	bothWays(t, func(t *testing.T, lanes bool) {
		o := listen(t, "127.0.0.1:0")
		g := startGate(t, policyFor("", o.port()), lanes)
		g.resolver.set("api.ok.test", "127.0.0.1")
		c := g.dial()
		c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
		far := o.accept(t)
		asked(t, far)
		far.(*net.TCPConn).SetLinger(0)
		far.Close()
		c.response(http.MethodGet)
		if ev := g.next(); !strings.Contains(ev.Error, o.addr.String()) || !strings.Contains(ev.Error, "reset") {
			t.Errorf("%+v", ev)
		}
	})
}

// TestVisitEndsInADrain: a client that has asked for more than it is given in a drain
// still receives the whole of what was under way.
func TestVisitEndsInADrain(t *testing.T) {
	if *withoutLanes {
		t.Skip("net/http resets the connection there")
	}
	o := listen(t, "127.0.0.1:0")
	g := startLanes(t, 1, policyFor("", o.port()), func(c *Config) { c.Timeouts.Drain = patience })
	g.resolver.set("api.ok.test", "127.0.0.1")
	request := fmt.Sprintf("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
	c := g.dial()
	c.SetReadBuffer(32 << 10)
	c.send("%s", request)
	far := o.accept(t)
	asked(t, far)
	body := strings.Repeat("x", 200<<10)
	fmt.Fprintf(far, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:1])
	resp, err := http.ReadResponse(c.Reader, nil) // its head says that more may be asked for
	if err != nil {
		t.Fatal(err)
	}
	c.send("%s", request)
	down := make(chan error, 1)
	go func() { down <- g.srv.Shutdown(t.Context()) }()
	g.until(g.srv.draining.Load)
	io.WriteString(far, body[1:])
	if ev := g.next(); ev.BytesDown != int64(len(body)) || ev.Aborted { // the kernel has all of it
		t.Errorf("%+v", ev)
	}
	g.inLane(func(*lane) {})
	if got, err := io.ReadAll(resp.Body); string(got) != body || err != nil {
		t.Errorf("%d bytes of %d, %v", len(got), len(body), err)
	}
	c.Close()
	if err := <-down; err != nil {
		t.Error(err)
	}
}

// TestCoroutinesGo: a lane keeps no coroutines that it has not needed for some time.
func TestCoroutinesGo(t *testing.T) {
	if *withoutLanes {
		t.Skip("this is about a lane's coroutines")
	}
	o := listen(t, "127.0.0.1:0")
	g := startLanes(t, 1, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	var clients []*client
	var far []net.Conn
	for range 10 { // under way at a time
		c := g.dial()
		c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
		clients, far = append(clients, c), append(far, o.accept(t))
	}
	kept := func() (n int) {
		g.inLane(func(l *lane) { n = len(l.coroutines) })
		return n
	}
	if n := kept(); n != 0 {
		t.Errorf("%d coroutines wait while 10 requests are under way", n)
	}
	for i, c := range clients {
		io.WriteString(far[i], okAnswer)
		c.response(http.MethodGet)
		g.next()
		c.Close()
	}
	g.until(func() bool { return kept() == 0 })
}
