package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyport/policy"
	"sallyport/policy/event"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait of the tests; nothing waits for it to pass.
const patience = 20 * time.Second

// names is a resolver with fixed answers. A name that it does not have does not exist.
type names struct {
	mu    sync.Mutex
	addrs map[string][]netip.Addr
	hook  func(ctx context.Context, host string) ([]netip.Addr, error) // answers first, unless it returns nil, nil
	asked atomic.Int64
}

func (n *names) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	n.asked.Add(1)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.hook != nil {
		if a, err := n.hook(ctx, host); a != nil || err != nil {
			return a, err
		}
	}
	if a, ok := n.addrs[host]; ok && network == "ip" {
		return a, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// intercept has hook answer first.
func (n *names) intercept(hook func(ctx context.Context, host string) ([]netip.Addr, error)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hook = hook
}

// known is a Resolver's cache: everything that needs no hook is in it.
func (n *names) known(name policy.Name) []netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	a := n.addrs[name.String()]
	if n.hook != nil || len(a) == 0 {
		return nil
	}
	n.asked.Add(1)
	return slices.Clone(a)
}

func (n *names) set(host string, addrs ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addrs[host] = nil
	for _, a := range addrs {
		n.addrs[host] = append(n.addrs[host], netip.MustParseAddr(a))
	}
}

// events keeps what a Server observed.
type events struct{ c chan event.Event }

func (e events) Observe(ev *event.Event) { e.c <- *ev }

// With it every connection has goroutines of its own.
var withoutLanes = flag.Bool("without-lanes", false, "serve nothing in lanes")

// gate is a Server under test, on loopback, with a real policy.
type gate struct {
	t        testing.TB
	srv      *Server
	store    *policy.Store
	resolver *names
	events   events
	addr     string
	served   chan error
}

func compile(t testing.TB, text string) *policy.Policy {
	t.Helper()
	p, _, err := policy.Load("policy.yaml", []byte(text), policy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// start runs a Server with the policy text until the end of the test.
func start(t testing.TB, text string, edit ...func(*Config)) *gate {
	t.Helper()
	return startGate(t, text, true, edit...)
}

// startGate is start, with or without lanes.
func startGate(t testing.TB, text string, lanes bool, edit ...func(*Config)) *gate {
	if !lanes {
		return startLanes(t, 0, text, edit...)
	}
	return startLanes(t, -1, text, edit...)
}

// startLanes is start with a number of lanes; -1: as many as there should be.
func startLanes(t testing.TB, lanes int, text string, edit ...func(*Config)) *gate {
	t.Helper()
	g := &gate{
		t: t, store: new(policy.Store), resolver: &names{addrs: map[string][]netip.Addr{}},
		events: events{make(chan event.Event, 1024)}, served: make(chan error, 1),
	}
	g.store.Swap(compile(t, text))
	cfg := Config{
		Listen: []string{"127.0.0.1:0"}, Decider: g.store, Resolver: g.resolver, Observer: g.events,
		HelpURL: "https://help.test/", Timeouts: Timeouts{Connect: patience, Drain: time.Second},
	}
	cfg.Known = g.resolver.known
	for _, e := range edit {
		e(&cfg)
	}
	g.srv = New(cfg)
	if *withoutLanes {
		lanes = 0
	}
	if lanes >= 0 {
		g.srv.maxLanes = lanes
	}
	if err := g.srv.Listen(); err != nil {
		t.Fatal(err)
	}
	g.store.OnChange(func(*policy.Policy) { g.srv.Recheck() })
	g.addr = g.srv.Addrs()[0].String()
	go func() { g.served <- g.srv.Serve(t.Context()) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // no patience with what a test left open
		g.srv.Shutdown(ctx)
		if err := <-g.served; err != nil {
			t.Error(err)
		}
	})
	return g
}

// event returns the next event for which is holds.
func (g *gate) event(is func(*event.Event) bool) event.Event {
	g.t.Helper()
	timeout := time.After(patience)
	var seen []string
	for {
		select {
		case ev := <-g.events.c:
			if is(&ev) {
				return ev
			}
			seen = append(seen, fmt.Sprintf("%+v", ev))
		case <-timeout:
			g.t.Fatalf("no such event; there were %q", seen)
		}
	}
}

func (g *gate) next() event.Event {
	g.t.Helper()
	return g.event(func(*event.Event) bool { return true })
}

// quiet checks that no event is left.
func (g *gate) quiet() {
	g.t.Helper()
	select {
	case ev := <-g.events.c:
		g.t.Errorf("another event: %+v", ev)
	default:
	}
}

// until waits for what becomes true soon after something else was seen.
func (g *gate) until(cond func() bool) {
	g.t.Helper()
	for end := time.Now().Add(patience); !cond(); runtime.Gosched() {
		if time.Now().After(end) {
			g.t.Fatalf("it never came to that; %+v", g.srv.Stats())
		}
	}
}

// client is a connection to the gate.
type client struct {
	*net.TCPConn
	*bufio.Reader
	t testing.TB
}

func (c *client) Read(p []byte) (int, error)               { return c.Reader.Read(p) }
func (c *client) WriteTo(w io.Writer) (n int64, err error) { return c.Reader.WriteTo(w) }

func (g *gate) dial() *client {
	g.t.Helper()
	conn, err := net.Dial("tcp", g.addr)
	if err != nil {
		g.t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	g.t.Cleanup(func() { conn.Close() })
	return &client{conn.(*net.TCPConn), bufio.NewReader(conn), g.t}
}

func (c *client) send(format string, a ...any) {
	c.t.Helper()
	if _, err := fmt.Fprintf(c.TCPConn, format, a...); err != nil {
		c.t.Fatal(err)
	}
}

// response reads a response to method, with its body.
func (c *client) response(method string) (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.Reader, &http.Request{Method: method})
	if err != nil {
		c.t.Fatal(err)
	}
	if method == http.MethodConnect && resp.StatusCode == http.StatusOK {
		return resp, ""
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp, string(body)
}

// connect opens a tunnel.
func (g *gate) connect(target string) *client {
	g.t.Helper()
	c := g.dial()
	c.send("CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", target)
	if resp, body := c.response(http.MethodConnect); resp.StatusCode != http.StatusOK {
		g.t.Fatalf("CONNECT %s: %s %s", target, resp.Status, body)
	}
	return c
}

// rest reads until the end.
func (c *client) rest() string {
	c.t.Helper()
	b, err := io.ReadAll(c.Reader)
	if err != nil {
		c.t.Errorf("after %q: %v", b, err)
	}
	return string(b)
}

// origin is a TCP server that hands over its connections.
type origin struct {
	addr  netip.AddrPort
	conns chan net.Conn
}

// listen starts an origin on an address of loopback.
func listen(t testing.TB, addr string) *origin {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("this machine has no %s: %v", addr, err)
	}
	o := &origin{addr: addrPort(l.Addr()), conns: make(chan net.Conn, 64)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(patience))
			o.conns <- c
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		for len(o.conns) > 0 {
			(<-o.conns).Close()
		}
	})
	return o
}

func (o *origin) port() int { return int(o.addr.Port()) }

func (o *origin) accept(t testing.TB) net.Conn {
	t.Helper()
	select {
	case c := <-o.conns:
		t.Cleanup(func() { c.Close() })
		return c
	case <-time.After(patience):
		t.Fatal("the origin was not reached")
		return nil
	}
}

// got returns everything that the next connection receives, and closes it.
func (o *origin) got(t testing.TB) string {
	t.Helper()
	c := o.accept(t)
	defer c.Close()
	b, err := io.ReadAll(c)
	if err != nil {
		t.Errorf("origin: after %q: %v", b, err)
	}
	return string(b)
}

// testCA is a certificate for every name of .ok.test, and the pool that trusts it.
type testCA struct {
	pool *x509.CertPool
	cert tls.Certificate
}

var ca = sync.OnceValue(func() testCA {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"*.ok.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	a := testCA{pool: x509.NewCertPool(), cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}}
	a.pool.AddCert(cert)
	return a
})

// serveTLS answers each TLS connection of o with what it receives.
func (o *origin) serveTLS(t testing.TB) {
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case c := <-o.conns:
				wg.Go(func() {
					s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{ca().cert}})
					io.Copy(s, s)
					s.Close()
				})
			case <-stop:
				return
			}
		}
	})
	t.Cleanup(func() { close(stop); wg.Wait() })
}

// deaf is a connection that keeps what is written and hears nothing.
type deaf struct {
	net.Conn
	bytes.Buffer
}

func (d *deaf) Read([]byte) (int, error)    { return 0, io.EOF }
func (d *deaf) Write(p []byte) (int, error) { return d.Buffer.Write(p) }
func (d *deaf) Close() error                { return nil }

// hello returns the ClientHello record of crypto/tls for name.
func hello(name string, edit ...func(*tls.Config)) []byte {
	cfg := &tls.Config{ServerName: name, InsecureSkipVerify: true}
	for _, e := range edit {
		e(cfg)
	}
	var d deaf
	tls.Client(&d, cfg).Handshake() // fails for lack of an answer
	return d.Buffer.Bytes()
}
