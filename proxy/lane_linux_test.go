package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/policy"
	"sallyport/policy/event"
)

// lanes returns g's lanes, once they serve.
func (g *gate) lanes() (all []*lane) {
	g.t.Helper()
	g.until(func() bool {
		g.srv.mu.Lock()
		defer g.srv.mu.Unlock()
		all = g.srv.lanes
		return len(all) > 0 || g.srv.maxLanes == 0
	})
	return all
}

// inLane has f done in the goroutine of each of g's lanes, and waits for that.
func (g *gate) inLane(f func(*lane)) {
	g.t.Helper()
	for _, l := range g.lanes() {
		done := make(chan struct{})
		l.post(func() { defer close(done); f(l) })
		<-done
	}
}

// hold keeps g's lanes from doing anything until release is called.
func (g *gate) hold() (release func()) {
	free := make(chan struct{})
	var held sync.WaitGroup
	for _, l := range g.lanes() {
		held.Add(1)
		l.post(func() { held.Done(); <-free })
	}
	held.Wait()
	return sync.OnceFunc(func() { close(free) })
}

// bothWays runs f with lanes and without.
func bothWays(t *testing.T, f func(t *testing.T, lanes bool)) {
	t.Run("lanes", func(t *testing.T) { f(t, true) })
	t.Run("goroutines", func(t *testing.T) { f(t, false) })
}

// tcpTunnel opens a tunnel in which anything may be spoken.
func tcpTunnel(t *testing.T, lanes bool, edit ...func(*Config)) (*gate, *client, *net.TCPConn) {
	t.Helper()
	o := listen(t, "127.0.0.1:0")
	g := startGate(t, tcpPolicy(o.port()), lanes, edit...)
	g.resolver.set("www.ok.test", "127.0.0.1")
	c := g.connect(fmt.Sprintf("www.ok.test:%d", o.port()))
	return g, c, o.accept(t).(*net.TCPConn)
}

// A connection that ended its stream and then breaks ends the tunnel, although
// nobody has anything to say to it.
func TestResetAfterTheEnd(t *testing.T) {
	bothWays(t, func(t *testing.T, lanes bool) {
		for _, who := range []string{"client", "origin"} {
			t.Run(who, func(t *testing.T) {
				g, c, o := tcpTunnel(t, lanes)
				first, second := c.TCPConn, o
				if who == "origin" {
					first, second = o, c.TCPConn
				}
				first.CloseWrite()
				if n, err := second.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Fatal(n, err)
				}
				first.SetLinger(0)
				first.Close()
				if ev := g.next(); ev.Error != "" {
					t.Errorf("%+v", ev)
				}
			})
		}
	})
}

// A read stops at urgent data, whatever comes after it.
func TestUrgentData(t *testing.T) {
	bothWays(t, func(t *testing.T, lanes bool) {
		g, c, o := tcpTunnel(t, lanes)
		for _, way := range [][2]*net.TCPConn{{c.TCPConn, o}, {o, c.TCPConn}} {
			release := g.hold()
			t.Cleanup(release)
			urgent(t, way[0], "abc", "!", "def")
			release()
			got := make([]byte, 6)
			if n, err := io.ReadFull(way[1], got); err != nil || string(got) != "abcdef" {
				t.Errorf("%q, %v", got[:n], err)
			}
		}
	})
}

// urgent sends three pieces, the second of them urgent.
func urgent(t *testing.T, c *net.TCPConn, pieces ...string) {
	t.Helper()
	for i, piece := range pieces {
		var err error
		control(c, func(fd uintptr) { err = unix.Send(int(fd), []byte(piece), unix.MSG_OOB*(i%2)) })
		if err != nil {
			t.Fatal(err)
		}
	}
}

// inLanes returns how many connections g's lanes have.
func (g *gate) inLanes() (n int) {
	g.inLane(func(l *lane) { n += l.open })
	return n
}

// An origin that does not read before it is rid of what it has to say must not hang,
// nor what follows a write that was cut short be lost.
func TestOneWayWaitsForTheOther(t *testing.T) {
	const up, down = 256 << 10, 16 << 20
	bothWays(t, func(t *testing.T, lanes bool) {
		port, accept := tight(t)
		g := startGate(t, tcpPolicy(port), lanes)
		g.resolver.set("www.ok.test", "127.0.0.1")
		c := g.connect(fmt.Sprintf("www.ok.test:%d", port))
		o := accept()
		g.inLane(func(l *lane) {
			l.each(func(p *passage) { setsockopt(p.fd[farSide], unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<10) })
		})
		c.Write(make([]byte, 32<<10))                    // is read at once
		g.until(func() bool { return g.inLanes() == 0 }) // as the write was cut short
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.Write(make([]byte, up-32<<10)); err != nil {
				t.Error(err)
			}
			c.CloseWrite()
		})
		wg.Go(func() {
			if _, err := o.Write(make([]byte, down)); err != nil {
				t.Error(err)
			}
			o.SetReadBuffer(1 << 20)
			if n, err := io.Copy(io.Discard, o); n != up || err != nil {
				t.Errorf("the origin got %d bytes, want %d; %v", n, up, err)
			}
			o.Close()
		})
		if n, err := io.Copy(io.Discard, c); n != down || err != nil {
			t.Errorf("the client got %d bytes, want %d; %v", n, down, err)
		}
		c.Close()
		wg.Wait()
		if ev := g.next(); ev.BytesUp != up || ev.BytesDown != down || ev.Error != "" {
			t.Errorf("%+v", ev)
		}
	})
}

// tight starts an origin that can be sent very little before it reads.
func tight(t *testing.T) (port int, accept func() *net.TCPConn) {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<10) })
		return err
	}}
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return int(addrPort(l.Addr()).Port()), func() *net.TCPConn {
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(patience))
		return conn.(*net.TCPConn)
	}
}

// A ClientHello that the far side takes in parts arrives as a whole, even if the far
// side speaks first, and more than the client takes in.
func TestHelloInParts(t *testing.T) {
	port, accept := tight(t)
	g := startGate(t, policyFor("", port), true)
	g.resolver.set("www.ok.test", "127.0.0.1")
	c := g.connect(fmt.Sprintf("www.ok.test:%d", port))
	far := accept()
	g.inLane(func(l *lane) {
		l.each(func(p *passage) {
			setsockopt(p.fd[clientSide], unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<10)
			setsockopt(p.fd[farSide], unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<10)
		})
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	const much = 8 << 20
	release := g.hold()
	defer release()
	wg.Go(func() { far.Write(make([]byte, much)) })
	said := append(hello("www.ok.test"), make([]byte, 50<<10)...)
	if _, err := c.Write(said); err != nil {
		t.Fatal(err)
	}
	release()
	far.SetReadBuffer(1 << 20)
	got := make([]byte, len(said))
	if n, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, said) {
		t.Errorf("%d bytes of %d, %v", n, len(said), err)
	}
	if n, err := io.CopyN(io.Discard, c, much); err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// A socket that somebody else has, too, stays open when the doors close; what arrives
// there keeps no lane busy.
func TestDoorOfAnother(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	o := listen(t, "127.0.0.1:0")
	cfg := Config{Listen: []string{""}, Decider: new(policy.Store), Resolver: &names{}}
	s := New(cfg)
	s.Inherit([]net.Listener{l}, nil)
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	g := &gate{t: t, srv: s, addr: o.addr.String()}
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(t.Context()) })
	for _, x := range g.lanes() {
		done := make(chan struct{})
		x.post(func() {
			defer close(done)
			x.closeDoorsNow()
			conn, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			var events [4]unix.EpollEvent
			if n, err := unix.EpollWait(x.epoll, events[:], 0); n != 0 {
				t.Errorf("%d events, %v", n, err)
			}
		})
		<-done
	}
	s.Shutdown(t.Context())
	wg.Wait()
}

// What was asked for has its event, even if the connection cannot be given away.
func TestNoDescriptorToGiveAway(t *testing.T) {
	g := startGate(t, tcpPolicy(443), true)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	c := g.dial()
	g.until(func() bool { return g.inLanes() == 1 })
	g.inLane(func(l *lane) {
		l.each(func(p *passage) {
			if err := unix.Dup3(int(null.Fd()), p.fd[clientSide], unix.O_CLOEXEC); err != nil {
				t.Error(err)
			}
			p.giveToHeads([]byte("GET"), nil)
		})
	})
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Error(n, err)
	}
	if ev := g.next(); ev.Decision.Reason != policy.ReasonLimitExceeded || ev.Error != errDescriptors.Error() {
		t.Errorf("%+v", ev)
	}
}

// A refused client that lingers when all is cut has had its event.
func TestCutAfterRefusal(t *testing.T) {
	bothWays(t, func(t *testing.T, lanes bool) {
		g := startGate(t, tcpPolicy(443), lanes)
		c := g.dial()
		c.send("CONNECT www.bad.test:443 HTTP/1.1\r\n\r\n")
		if resp, _ := c.response(http.MethodConnect); resp.StatusCode != http.StatusForbidden {
			t.Error(resp.Status)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		g.srv.Shutdown(ctx)
		g.next()
		g.quiet()
	})
}

// Nothing is written to a descriptor that was the lane's.
func TestPostAfterTheEnd(t *testing.T) {
	g := startGate(t, tcpPolicy(443), true)
	c := g.dial()
	c.Close()
	g.srv.Shutdown(t.Context())
	for _, l := range g.lanes() {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if fd != l.wake { // somebody else has the number
			l.wake = fd
		}
		l.post(func() {})
		var b [8]byte
		if n, err := unix.Read(fd, b[:]); err != unix.EAGAIN {
			t.Errorf("%d bytes were written, %v", n, err)
		}
	}
}

// panicky observes until a name asks it to panic.
type panicky struct{ event.Observer }

func (p panicky) Observe(ev *event.Event) {
	if strings.HasPrefix(ev.Name, "panic") {
		panic("as it was asked to")
	}
	p.Observer.Observe(ev)
}

// A panic while a tunnel is cut ends that tunnel alone.
func TestPanicInACut(t *testing.T) {
	bothWays(t, func(t *testing.T, lanes bool) {
		o := listen(t, "127.0.0.1:0")
		o.echo(t)
		g := startGate(t, tcpPolicy(o.port()), lanes, func(c *Config) { c.Observer = panicky{c.Observer} })
		g.resolver.set("panic.ok.test", "127.0.0.1")
		g.resolver.set("www.ok.test", "127.0.0.1")
		c := g.connect(fmt.Sprintf("panic.ok.test:%d", o.port()))
		other := g.connect(fmt.Sprintf("www.ok.test:%d", o.port()))
		g.store.Swap(compile(t, tcpPolicy(o.port())+"    deny: [panic.ok.test]\n"))
		if _, err := c.ReadByte(); err == nil {
			t.Error("the revoked tunnel goes on")
		}
		g.until(func() bool { return g.srv.Stats().Panics == 1 && g.srv.Stats().Tunnels == 1 })
		other.ping()
	})
}

// What is said of a far side that cannot be reached is the same in a lane.
func TestUnreachable(t *testing.T) {
	full := fullListener(t)
	for _, tt := range []struct {
		name         string
		port         uint16
		addrs        []string
		status, want string
	}{
		{"refused", 1, []string{"127.0.0.1"}, "502 Bad Gateway", "connection_refused"},
		{"all refused", 1, []string{"127.0.0.1", "127.0.0.2", "::1"}, "502 Bad Gateway", "connection_refused"},
		{"silent", full, []string{"127.0.0.1"}, "504 Gateway Timeout", "connection_timeout"},
		{"refused and silent", full, []string{"127.0.0.2", "127.0.0.1"}, "502 Bad Gateway", "connection_refused"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var seen []string
			for _, lanes := range []bool{true, false} {
				g := startGate(t, tcpPolicy(int(tt.port)), lanes, func(c *Config) { c.Timeouts.Connect = 200 * time.Millisecond })
				g.resolver.set("www.ok.test", tt.addrs...)
				c := g.dial()
				c.send("CONNECT www.ok.test:%d HTTP/1.1\r\n\r\n", tt.port)
				resp, _ := c.response(http.MethodConnect)
				if got := resp.Header.Get("Proxy-Status"); resp.Status[:3] != tt.status[:3] || !strings.Contains(got, tt.want) {
					t.Errorf("lanes %v: %s, %s", lanes, resp.Status, got)
				}
				ev := g.next()
				seen = append(seen, fmt.Sprintf("%v %s %d %v", ev.Decision, ev.Error, ev.Status, ev.Destination))
			}
			if tt.port == full { // the time that is over is called by several names
				return
			}
			if seen[0] != seen[1] {
				t.Errorf("in a lane\n%q\nwithout\n%q", seen[0], seen[1])
			}
		})
	}
}

// A client that closes its side while its destination is dialled, and has said nothing
// further, is not dialled for any longer than a moment.
func TestHalfClosedWhileDialling(t *testing.T) {
	full := fullListener(t)
	for _, at := range []string{"together", "later"} {
		t.Run(at, func(t *testing.T) {
			var seen []string
			bothWays(t, func(t *testing.T, lanes bool) {
				g := startGate(t, tcpPolicy(int(full)), lanes, func(c *Config) { c.Timeouts.Connect = time.Hour })
				g.resolver.set("www.ok.test", "127.0.0.1")
				c := g.dial()
				release := func() {}
				if at == "together" {
					release = g.hold()
				}
				c.send("CONNECT www.ok.test:%d HTTP/1.1\r\n\r\n", full)
				if at == "later" {
					g.until(func() bool { return g.resolver.asked.Load() > 0 })
				}
				c.CloseWrite()
				release()
				resp, _ := c.response(http.MethodConnect)
				ev := g.next()
				if ev.ConnTime == 0 || !strings.Contains(ev.Error, errLeftDialling.Error()) {
					t.Errorf("%+v", ev)
				}
				seen = append(seen, fmt.Sprintf("%s %s %v %s %d %v", resp.Status, resp.Header.Get("Proxy-Status"), ev.Decision, ev.Error, ev.Status, ev.Destination))
			})
			if len(seen) != 2 || seen[0] != seen[1] {
				t.Errorf("%q", seen)
			}
		})
	}
}

// One that said something before it closed its side is dialled for.
func TestSpokeAndHalfClosedWhileDialling(t *testing.T) {
	full := fullListener(t)
	bothWays(t, func(t *testing.T, lanes bool) {
		g := startGate(t, tcpPolicy(int(full)), lanes, func(c *Config) { c.Timeouts.Connect = 3 * leftEvery / 2 })
		g.resolver.set("www.ok.test", "127.0.0.1")
		c := g.dial()
		c.send("CONNECT www.ok.test:%d HTTP/1.1\r\n\r\n", full)
		g.until(func() bool { return g.resolver.asked.Load() > 0 })
		c.send("hello")
		c.CloseWrite()
		if resp, _ := c.response(http.MethodConnect); resp.StatusCode != http.StatusGatewayTimeout {
			t.Error(resp.Status)
		}
		if ev := g.next(); strings.Contains(ev.Error, errLeftDialling.Error()) {
			t.Errorf("%+v", ev)
		}
	})
}

// fullListener returns a port of 127.0.0.1 that takes in no connection.
func fullListener(t *testing.T) uint16 {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	port := sa.(*unix.SockaddrInet4).Port
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return uint16(port)
}

// A door that cannot be opened is none, and one that cannot be opened again now is
// tried later.
func TestDoors(t *testing.T) {
	g := startGate(t, tcpPolicy(443), true)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g.inLane(func(x *lane) {
		doors, epoll := len(x.doors), x.epoll
		x.epoll = -1
		if err := x.admit(l.(*net.TCPListener)); err == nil || len(x.doors) != doors {
			t.Errorf("%d doors, %v", len(x.doors), err)
		}
		for _, d := range x.doors {
			x.epoll = epoll
			x.unwatch(d.fd)
			x.epoll = -1
			x.reopen(d)
		}
		x.epoll = epoll
	})
	c := g.dial()
	c.send("CONNECT www.bad.test:443 HTTP/1.1\r\n\r\n")
	if resp, _ := c.response(http.MethodConnect); resp.StatusCode != http.StatusForbidden {
		t.Error(resp.Status)
	}
}

// What is tested through lanes holds without them.
func TestWithoutLanes(t *testing.T) {
	if testing.Short() || *withoutLanes {
		t.Skip("it runs other tests again")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), exe, "-without-lanes", "-test.short", "-test.timeout=5m",
		"-test.run", "^Test(T[0-9]|Connect|Tunnel|Shutdown|Observe)").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("PASS")) || bytes.Contains(out, []byte("no tests to run")) {
		t.Errorf("%v\n%s", err, out)
	}
}
