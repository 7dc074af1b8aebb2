package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

func TestListenNamesTheAddress(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := New(Config{Listen: []string{"127.0.0.1:0", l.Addr().String()}})
	if err := s.Listen(); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("%v", err)
	}
	if err := s.Serve(t.Context()); err == nil {
		t.Error("Serve without Listen")
	}
	s.Shutdown(t.Context())
}

// TestDrain lets requests finish and tunnels go on, for a while.
func TestDrain(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	release := make(chan struct{})
	began := make(chan struct{}, 1)
	port := site(t, func(w http.ResponseWriter, r *http.Request) {
		began <- struct{}{}
		<-release
		io.WriteString(w, "finished")
	})
	g := start(t, tcpPolicy(o.port())+fmt.Sprintf("      - {names: [web.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}\n", port), func(c *Config) { c.Timeouts.Drain = patience })
	g.resolver.set("a.ok.test", "127.0.0.1")
	g.resolver.set("web.ok.test", "127.0.0.1")
	tun := g.connect(fmt.Sprintf("a.ok.test:%d", o.port()))
	u := o.accept(t)
	unused, late := g.dial(), g.dial()
	late.send("CONNECT a.ok.test:%d HTT", o.port())
	web := g.dial()
	web.send("GET http://web.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
	<-began
	g.until(func() bool { return g.srv.Stats().Connections == 4 && begun(g.srv) == 1 }) // all are accepted, late has begun

	done := make(chan error)
	go func() { done <- g.srv.Shutdown(context.Background()) }()
	<-g.srv.quit
	if _, err := unused.ReadByte(); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection without a request: %v", err)
	}
	late.send("P/1.1\r\n\r\n")
	if resp, _ := late.response("CONNECT"); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("a CONNECT while draining: %s", resp.Status)
	}
	if c, err := net.Dial("tcp", g.addr); err == nil {
		c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("it is still accepting")
		}
		c.Close()
	}
	io.WriteString(u, "going on")
	if b := make([]byte, 8); true {
		if _, err := io.ReadFull(tun, b); err != nil {
			t.Error(err)
		}
	}
	close(release)
	if resp, body := web.response("GET"); resp.StatusCode != 200 || body != "finished" || !resp.Close {
		t.Errorf("%s %q, close %v", resp.Status, body, resp.Close)
	}
	select {
	case err := <-done:
		t.Fatalf("Shutdown returned with a tunnel open: %v", err)
	default:
	}
	u.Close()
	tun.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	got := map[string]bool{}
	for len(g.events.c) > 0 {
		ev := g.next()
		got[fmt.Sprintf("%s %d %s", ev.Kind, ev.Status, ev.Decision.Reason)] = true
	}
	for _, want := range []string{"connect 200 matched", "connect 503 limit_exceeded", "http 200 matched"} {
		if !got[want] {
			t.Errorf("no event %q among %v", want, got)
		}
	}
}

// begun returns how many pending connections have sent something.
func begun(s *Server) (n int) {
	s.eachPending(func(p *pending) {
		if p.begun.Load() {
			n++
		}
	})
	return n
}

// TestCut ends what is left in every phase when the drain is over, with its event.
func TestCut(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	asked := make(chan struct{}, 1)
	g := start(t, policyFor("", o.port())+fmt.Sprintf("      - {names: [tcp.test], ports: [%d], protocol: tcp, private_destinations: [127.0.0.0/8]}\n", o.port()),
		func(c *Config) { c.Timeouts.Drain = 0 })
	g.resolver.set("a.ok.test", "127.0.0.1")
	g.resolver.set("tcp.test", "127.0.0.1")
	g.resolver.intercept(func(ctx context.Context, host string) ([]netip.Addr, error) {
		if host == "slow.ok.test" {
			asked <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return nil, nil
	})
	g.connect(fmt.Sprintf("tcp.test:%d", o.port())) // a tunnel
	o.accept(t)
	g.connect(fmt.Sprintf("a.ok.test:%d", o.port())) // waits for a hello
	o.accept(t)
	get := g.dial() // waits for a response
	get.send("GET http://a.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
	o.accept(t)
	slow := g.dial() // waits for an address
	slow.send("CONNECT slow.ok.test:%d HTTP/1.1\r\n\r\n", o.port())
	<-asked
	if err := g.srv.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	if n := len(g.events.c); n != 4 {
		t.Errorf("%d events", n)
	}
	if s := g.srv.Stats(); s.Connections != 0 || s.Tunnels != 0 {
		t.Errorf("%+v", s)
	}
}

// stubborn fails to accept for a while.
type stubborn struct {
	net.Listener
	mu    sync.Mutex
	fails int
}

func (s *stubborn) Accept() (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fails > 0 {
		s.fails--
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return s.Listener.Accept()
}

func TestAcceptGoesOn(t *testing.T) {
	g := &gate{t: t, store: new(policy.Store), events: events{make(chan event.Event, 16)}}
	g.srv = New(Config{Listen: []string{"127.0.0.1:0"}, Decider: g.store, Observer: g.events})
	if err := g.srv.Listen(); err != nil {
		t.Fatal(err)
	}
	g.addr = g.srv.Addrs()[0].String()
	g.srv.listeners[0] = &stubborn{Listener: g.srv.listeners[0], fails: 3}
	served := make(chan error)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { served <- g.srv.Serve(ctx) }()
	if status, reason, _ := g.refused("a.test:443"); status != 403 || reason != "unmatched_source" {
		t.Errorf("%d %s", status, reason)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if s := g.srv.Stats(); s.AcceptErrors != 3 {
		t.Errorf("%+v", s)
	}
}

// explosive panics for one name.
type explosive struct{ Decider }

func (e explosive) Decide(r policy.Request) policy.Decision {
	if r.Name.String() == "boom.ok.test" {
		panic("boom")
	}
	return e.Decider.Decide(r)
}

func TestPanicClosesOneConnection(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	g := start(t, tcpPolicy(o.port()), func(c *Config) { c.Decider = explosive{c.Decider} })
	g.resolver.set("a.ok.test", "127.0.0.1")
	other := g.connect(fmt.Sprintf("a.ok.test:%d", o.port()))
	for _, request := range []string{"CONNECT boom.ok.test:443 HTTP/1.1\r\n\r\n", "GET http://boom.ok.test/ HTTP/1.1\r\nHost: x\r\n\r\n"} {
		c := g.dial()
		c.send("%s", request)
		if b, _ := io.ReadAll(c.TCPConn); len(b) != 0 {
			t.Errorf("%q", b)
		}
	}
	other.ping()
	if s := g.srv.Stats(); s.Panics != 2 {
		t.Errorf("%+v", s)
	}
}

func TestIDs(t *testing.T) {
	a, b := New(Config{}), New(Config{})
	seen := map[string]bool{}
	for range 1000 {
		for _, id := range []string{a.newID(), b.newID()} {
			if seen[id] || len(id) > 22 {
				t.Fatalf("%q", id)
			}
			seen[id] = true
		}
	}
}

func BenchmarkConnect(b *testing.B) {
	o := listen(b, "127.0.0.1:0")
	g := start(b, policyFor("", o.port()), func(c *Config) { c.Observer = nil })
	g.resolver.set("api.ok.test", "127.0.0.1")
	h := hello("api.ok.test")
	head := fmt.Appendf(nil, "CONNECT api.ok.test:%d HTTP/1.1\r\nHost: api.ok.test:%[1]d\r\nUser-Agent: bench\r\n\r\n", o.port())
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			b.Fatal(err)
		}
		c.Write(head)
		if _, err := io.ReadFull(c, buf[:len(established)]); err != nil {
			b.Fatal(err)
		}
		c.Write(h)
		u := <-o.conns
		if _, err := io.ReadFull(u, buf[:len(h)]); err != nil {
			b.Fatal(err)
		}
		u.Write(buf[:1])
		if _, err := io.ReadFull(c, buf[:1]); err != nil {
			b.Fatal(err)
		}
		c.Close()
		u.Close()
	}
}

func BenchmarkDeny(b *testing.B) {
	g := start(b, policyFor("", 443), func(c *Config) { c.Observer = nil })
	head := []byte("CONNECT other.test:443 HTTP/1.1\r\nHost: other.test:443\r\nUser-Agent: bench\r\n\r\n")
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
