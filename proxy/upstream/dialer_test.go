package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fixed []netip.Addr

func (f fixed) LookupNetIP(_ context.Context, network, host string) ([]netip.Addr, error) {
	if network != "ip" {
		return nil, fmt.Errorf("asked for %q", network)
	}
	return f, nil
}

func addrs(ss ...string) (out []netip.Addr) {
	for _, s := range ss {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func TestResolve(t *testing.T) {
	d := Dialer{Resolver: fixed(addrs("192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "fe80::1%eth0", "192.0.2.1"))}
	got, err := d.Resolve(context.Background(), "a.test")
	if err != nil || !slices.Equal(got, addrs("192.0.2.1", "2001:db8::1", "fe80::1")) {
		t.Errorf("%v, %v", got, err)
	}
	d.Resolver = fixed(nil)
	if _, err := d.Resolve(context.Background(), "a.test"); !errors.Is(err, ErrNoAddress) {
		t.Errorf("no address: %v", err)
	}
	many := fixed(nil)
	for i := range 100 {
		many = append(many, netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}))
	}
	d.Resolver = many
	if got, err := d.Resolve(context.Background(), "a.test"); err != nil || len(got) != maxAddresses {
		t.Errorf("%d addresses, %v", len(got), err)
	}
}

func ports(ss ...string) (out []netip.AddrPort) {
	for _, s := range ss {
		out = append(out, netip.AddrPortFrom(netip.MustParseAddr(s), 443))
	}
	return out
}

func TestInterleave(t *testing.T) {
	got := Interleave(ports("192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "2001:db8::2"))
	if want := ports("2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", "192.0.2.3"); !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
}

// far is a far side in fake time: what each address does, and how long it takes.
type far struct {
	delay map[string]time.Duration // until connected or failed; absent: never
	fails map[string]bool

	mu     sync.Mutex
	began  map[string]time.Duration // since start
	start  time.Time
	open   int
	active int
}

type fakeConn struct {
	net.Conn
	f    *far
	addr string
}

func (c *fakeConn) Close() error {
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	c.f.open--
	return nil
}

func (f *far) connect(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
	addr := a.Addr().String()
	f.mu.Lock()
	f.began[addr] = time.Since(f.start)
	f.active++
	f.mu.Unlock()
	defer func() { f.mu.Lock(); f.active--; f.mu.Unlock() }()
	var done <-chan time.Time
	if d, ok := f.delay[addr]; ok {
		done = time.After(d)
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-done:
	}
	if f.fails[addr] {
		return nil, syscall.ECONNREFUSED
	}
	f.mu.Lock()
	f.open++
	f.mu.Unlock()
	return &fakeConn{f: f, addr: addr}, nil
}

func TestRace(t *testing.T) {
	const a, b, c = "2001:db8::1", "192.0.2.1", "2001:db8::2"
	ms := time.Millisecond
	tests := []struct {
		name   string
		delay  map[string]time.Duration
		fails  map[string]bool
		winner string
		took   time.Duration
		began  map[string]time.Duration
	}{
		{"the first is quick", map[string]time.Duration{a: 10 * ms, b: 0, c: 0}, nil, a, 10 * ms, map[string]time.Duration{a: 0}},
		{"the first is a black hole", map[string]time.Duration{b: 10 * ms, c: 0}, nil, b, 260 * ms, map[string]time.Duration{a: 0, b: 250 * ms}},
		{"a failure starts the next at once", map[string]time.Duration{a: 10 * ms, b: 10 * ms, c: 0}, map[string]bool{a: true}, b, 20 * ms, map[string]time.Duration{a: 0, b: 10 * ms}},
		{"the first wins late", map[string]time.Duration{a: 300 * ms, b: 400 * ms, c: 400 * ms}, nil, a, 300 * ms, map[string]time.Duration{a: 0, b: 250 * ms}},
		{"two black holes", map[string]time.Duration{c: 5 * ms}, nil, c, 505 * ms, map[string]time.Duration{a: 0, b: 250 * ms, c: 500 * ms}},
		{"all refuse", map[string]time.Duration{a: ms, b: ms, c: ms}, map[string]bool{a: true, b: true, c: true}, "", 3 * ms, map[string]time.Duration{a: 0, b: ms, c: 2 * ms}},
		{"nobody answers", nil, nil, "", 5 * time.Second, map[string]time.Duration{a: 0, b: 250 * ms, c: 500 * ms}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &far{delay: tt.delay, fails: tt.fails, began: map[string]time.Duration{}, start: time.Now()}
				d := Dialer{connect: f.connect}
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				conn, err := d.Dial(ctx, ports(b, a, c))
				winner := ""
				if err == nil {
					winner = conn.(*fakeConn).addr
					conn.Close()
				}
				if took := time.Since(f.start); winner != tt.winner || took != tt.took {
					t.Errorf("%q won after %v, %v; want %q after %v", winner, took, err, tt.winner, tt.took)
				}
				if fmt.Sprint(f.began) != fmt.Sprint(tt.began) {
					t.Errorf("attempts %v, want %v", f.began, tt.began)
				}
				if f.open != 0 || f.active != 0 {
					t.Errorf("%d connections open, %d attempts under way", f.open, f.active)
				}
			})
		})
	}
}

func TestDialErrors(t *testing.T) {
	var d Dialer
	if _, err := d.Dial(context.Background(), nil); !errors.Is(err, ErrNoAddress) {
		t.Errorf("no address: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := l.Addr().(*net.TCPAddr).AddrPort()
	conn, err := d.Dial(context.Background(), []netip.AddrPort{a})
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	l.Close()
	if _, err := d.Dial(context.Background(), []netip.AddrPort{a, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), a.Port())}); !errors.Is(err, syscall.ECONNREFUSED) || strings.Count(err.Error(), "refused") != 2 {
		t.Errorf("nobody listens: %v", err)
	}
}

// blackHole returns an address of loopback that takes no connection: its backlog
// is full, and the kernel drops what comes on top.
func blackHole(t *testing.T) netip.AddrPort {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	a := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(sa.(*syscall.SockaddrInet4).Port))
	for range 16 { // fill the backlog
		c, err := net.DialTimeout("tcp", a.String(), 50*time.Millisecond)
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			return a
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Skip("this kernel takes connections beyond the backlog")
	return a
}

// TestBlackHole races real sockets: the first address swallows everything.
func TestBlackHole(t *testing.T) {
	hole := blackHole(t)
	l, err := net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), hole.Port()).String())
	if err != nil {
		t.Skipf("this machine has no second loopback address to listen on: %v", err)
	}
	defer l.Close()
	var d Dialer
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := d.Dial(ctx, []netip.AddrPort{hole, l.Addr().(*net.TCPAddr).AddrPort()})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if conn.RemoteAddr().String() != l.Addr().String() {
		t.Errorf("connected to %v", conn.RemoteAddr())
	}
}

// TestOnlyBlackHoles waits for nobody longer than the context says.
func TestOnlyBlackHoles(t *testing.T) {
	hole, other := blackHole(t), blackHole(t)
	var d Dialer
	ctx, cancel := context.WithTimeout(context.Background(), 400*time.Millisecond)
	defer cancel()
	for _, to := range [][]netip.AddrPort{{hole}, {hole, other}} {
		conn, err := d.Dial(ctx, to)
		var timeout net.Error
		if err == nil {
			conn.Close()
		}
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%v: %v", to, err)
		}
	}
}
