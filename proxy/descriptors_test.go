package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"sallyport/policy"
	"sallyport/policy/event"
)

func TestReserve(t *testing.T) {
	for limit, want := range map[int]int{20: 10, 64: 16, 256: 32, 1024: 128, 20000: 256, 1 << 20: 256, math.MaxInt32: 256} {
		if got := (&descriptors{limit: limit}).reserve(); got != want {
			t.Errorf("of %d descriptors %d are kept, want %d", limit, got, want)
		}
	}
	if d := newDescriptors(); d.limit < 20 || !d.enough() {
		t.Errorf("%+v", d)
	}
	none := &descriptors{}
	if none.left(1<<20) < 1<<20 || !none.enough() {
		t.Error("without a known limit there are always enough")
	}
}

// numbered is a connection with a descriptor of a given number.
type numbered struct {
	net.Conn
	fd uintptr
}

func (n numbered) SyscallConn() (syscall.RawConn, error) { return number{fd: n.fd}, nil }

type number struct {
	syscall.RawConn
	fd uintptr
}

func (n number) Control(f func(uintptr)) error { f(n.fd); return nil }

func TestLookout(t *testing.T) {
	d := &descriptors{limit: 1024} // 128 in reserve
	l := newLookout(d)
	look := func(fd uintptr, wantEnough, wantRecovered bool) {
		t.Helper()
		l.skip = 0
		if enough, recovered := l.enough(numbered{fd: fd}); enough != wantEnough || recovered != wantRecovered {
			t.Errorf("descriptor %d: enough %v, recovered %v", fd, enough, recovered)
		}
	}
	look(10, true, false)
	if l.skip == 0 || d.scarce.Load() {
		t.Error("with plenty of descriptors every connection is looked at")
	}
	look(800, true, false)
	if l.skip != 0 || !d.scarce.Load() {
		t.Error("with few descriptors connections are not looked at")
	}
	look(894, true, false)
	look(895, false, false)
	d.episode.Store(1)
	for range calmLooks - 1 {
		look(10, true, false)
	}
	if !d.scarce.Load() {
		t.Error("a gap counts as plenty")
	}
	look(10, true, true)
	if d.scarce.Load() || d.episode.Load() != 0 {
		t.Error("the shortage is not over")
	}
	d.calm, d.start = time.Hour, time.Now()
	d.episode.Store(1)
	for range 2 * calmLooks {
		look(10, true, false) // too early
	}
	if enough, _ := l.enough(&deaf{}); !enough {
		t.Error("a connection without a descriptor")
	}

	if d.spent(numbered{fd: 1023}) {
		t.Error("with plenty of descriptors connections to destinations are looked at")
	}
	d.scarce.Store(true)
	for fd, want := range map[uintptr]bool{10: false, 959: false, 960: true, 1023: true} {
		if got := d.spent(numbered{fd: fd}); got != want {
			t.Errorf("descriptor %d to a destination: spent %v", fd, got)
		}
	}
}

// lines keeps what is logged.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

// startWith is start for a Server that thinks that clients may use more descriptors
// than there are now, and no others.
func startWith(t *testing.T, more int, text string, log io.Writer) *gate {
	t.Helper()
	g := &gate{
		t: t, store: new(policy.Store), resolver: &names{addrs: map[string][]netip.Addr{}},
		events: events{make(chan event.Event, 1024)}, served: make(chan error, 1),
	}
	g.store.Swap(compile(t, text))
	g.srv = New(Config{
		Listen: []string{"127.0.0.1:0"}, Decider: g.store, Resolver: g.resolver, Observer: g.events,
		Logger: zerolog.New(log), Timeouts: Timeouts{Connect: patience},
	})
	if err := g.srv.Listen(); err != nil {
		t.Fatal(err)
	}
	fd, err := syscall.Open(os.DevNull, syscall.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	syscall.Close(fd)
	d := g.srv.descriptors
	d.calm = 100 * time.Millisecond
	for d.limit = fd; d.left(fd) < more; d.limit++ {
	}
	g.addr = g.srv.Addrs()[0].String()
	go func() { g.served <- g.srv.Serve(t.Context()) }()
	t.Cleanup(func() {
		g.srv.Shutdown(context.Background())
		<-g.served
	})
	return g
}

// TestT66Shortage uses up the descriptors: accepting pauses, what is open goes on,
// and when some are free again so does accepting.
func TestT66Shortage(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	var log lines
	g := startWith(t, 40, tcpPolicy(o.port()), &log) // four for each tunnel, as its ends are here, too
	g.resolver.set("a.ok.test", "127.0.0.1")
	target := fmt.Sprintf("a.ok.test:%d", o.port())
	var open []*client
	for g.srv.Stats().AcceptPauses == 0 {
		if len(open) > 400 {
			t.Fatal("accepting does not pause")
		}
		c := g.dial()
		c.send("CONNECT %s HTTP/1.1\r\n\r\n", target)
		g.until(func() bool { return g.srv.Stats().Connections > len(open) })
		open = append(open, c)
		c.response(http.MethodConnect) // a 200; at the brim, a 503
	}
	open[0].ping()
	if n := g.srv.Stats().Tunnels; n < 5 {
		t.Errorf("%d tunnels", n)
	}
	waiting := g.dial()
	waiting.send("CONNECT %s HTTP/1.1\r\n\r\n", target)
	for _, c := range open[1:] {
		c.Close()
	}
	if resp, body := waiting.response(http.MethodConnect); resp.StatusCode != 200 {
		t.Fatalf("when there are descriptors again: %s %s", resp.Status, body)
	}
	waiting.ping()
	open[0].ping()
	if n := log.count("cannot accept connections"); n < 1 {
		t.Errorf("%d warnings", n)
	}
	g.until(func() bool {
		c := g.dial()
		defer c.Close()
		c.send("CONNECT evil.test:443 HTTP/1.1\r\n\r\n")
		c.response(http.MethodConnect)
		return log.count("without a pause again") == 1
	})
}

// TestT66NoDescriptorForTheDestination answers 503 when the far side's connection
// would take one of the last descriptors.
func TestT66NoDescriptorForTheDestination(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := startWith(t, -1000, tcpPolicy(o.port()), io.Discard) // all that are left are in the reserve
	g.resolver.set("a.ok.test", "127.0.0.1")
	g.srv.descriptors.scarce.Store(true)
	status, reason, proxyStatus := g.refused(fmt.Sprintf("a.ok.test:%d", o.port()))
	if status != 503 || reason != "limit_exceeded" || !strings.Contains(proxyStatus, statusLimit) {
		t.Errorf("%d %s %s", status, reason, proxyStatus)
	}
	if ev := g.next(); ev.Decision.Reason != policy.ReasonLimitExceeded || ev.Error != errDescriptors.Error() || ev.Decision.Group == "" {
		t.Errorf("%+v", ev)
	}
}

// A resolver or a dial that gets no descriptor is a 503, not the far side's fault.
func TestT66ExhaustedIsNoGatewayError(t *testing.T) {
	g := start(t, tcpPolicy(443))
	g.resolver.intercept(func(context.Context, string) ([]netip.Addr, error) {
		return nil, &net.DNSError{UnwrapErr: &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", syscall.EMFILE)}, Name: "a.ok.test"}
	})
	status, reason, _ := g.refused("a.ok.test:443")
	if status != 503 || reason != "limit_exceeded" {
		t.Errorf("%d %s", status, reason)
	}
	for _, err := range []error{syscall.EMFILE, fmt.Errorf("dial: %w", os.NewSyscallError("socket", syscall.ENFILE))} {
		if r := connectFailed(policy.Decision{}, err); r.status != 503 || r.decision.Reason != policy.ReasonLimitExceeded {
			t.Errorf("%v: %+v", err, r)
		}
	}
}

// hopeless accepts nothing.
type hopeless struct {
	net.Listener
	asked  atomic.Int64
	closed atomic.Bool
}

func (h *hopeless) Accept() (net.Conn, error) {
	if h.closed.Load() {
		return nil, net.ErrClosed
	}
	h.asked.Add(1)
	return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
}

// TestT66AcceptDoesNotSpin fails to accept for ten seconds.
func TestT66AcceptDoesNotSpin(t *testing.T) {
	var log lines
	synctest.Test(t, func(t *testing.T) {
		h := new(hopeless)
		s := New(Config{Logger: zerolog.New(&log)})
		s.wg.Add(1)
		go s.accept(h, s.serveConn)
		time.Sleep(10 * time.Second)
		if n := h.asked.Load(); n < 10 || n > 30 {
			t.Errorf("asked %d times in ten seconds", n)
		}
		before := h.asked.Load()
		s.descriptors.release()
		synctest.Wait()
		if n := h.asked.Load(); n != before+1 {
			t.Errorf("a descriptor that is freed is not tried at once: asked %d times", n-before)
		}
		h.closed.Store(true)
		close(s.quit)
		s.wg.Wait()
	})
	if n := log.count("\n"); n != 1 {
		t.Errorf("%d lines of log", n)
	}
}
