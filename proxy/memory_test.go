package proxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing/synctest"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// windowSize is how many bytes a memConn's peer may be ahead of its reader.
const windowSize = 64 << 10

// A stream is one direction between two memConns.
type stream struct {
	buf             []byte
	total           int // bytes that were ever taken out
	eof, reset      bool
	nobody          bool      // the reader has closed
	readBy, wroteBy time.Time // deadlines; zero: none
}

// A memConn is one end of a connection in memory, with a window, half-close,
// reset and deadlines, as TCP has them. Both ends share the lock.
type memConn struct {
	mu            *sync.Mutex
	changed       *sync.Cond
	rx, tx        *stream
	local, remote netip.AddrPort
	closed        bool

	// hasty ends reads of nothing whose deadline is near. net/http closes a body
	// with a mutex held against a read under way, which the deadline ends; but a
	// bubble's clock stands still as long as anybody waits for a mutex.
	hasty bool
}

func memPipe(a, b netip.AddrPort) (*memConn, *memConn) {
	mu := new(sync.Mutex)
	x := &memConn{mu: mu, changed: sync.NewCond(mu), rx: new(stream), tx: new(stream), local: a, remote: b}
	y := &memConn{mu: mu, changed: x.changed, rx: x.tx, tx: x.rx, local: b, remote: a}
	return x, y
}

func opError(op string, err error) error { return &net.OpError{Op: op, Net: "tcp", Err: err} }

func passed(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (c *memConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, opError("read", net.ErrClosed)
		case passed(c.rx.readBy):
			return 0, opError("read", os.ErrDeadlineExceeded)
		case c.rx.reset:
			return 0, opError("read", syscall.ECONNRESET)
		case len(p) == 0:
			return 0, nil
		case len(c.rx.buf) > 0:
			n := copy(p, c.rx.buf)
			c.rx.buf = c.rx.buf[n:]
			c.rx.total += n
			c.changed.Broadcast()
			return n, nil
		case c.rx.eof:
			return 0, io.EOF
		}
		if c.hasty && !c.rx.readBy.IsZero() && time.Until(c.rx.readBy) <= bodyPatience {
			return 0, opError("read", os.ErrDeadlineExceeded)
		}
		c.changed.Wait()
	}
}

func (c *memConn) Write(p []byte) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		room := windowSize - len(c.tx.buf)
		switch {
		case c.closed:
			return n, opError("write", net.ErrClosed)
		case passed(c.tx.wroteBy):
			return n, opError("write", os.ErrDeadlineExceeded)
		case c.tx.eof, c.tx.nobody, c.rx.reset:
			return n, opError("write", syscall.EPIPE)
		case len(p) == 0:
			return n, nil
		case room > 0:
			m := min(room, len(p))
			c.tx.buf = append(c.tx.buf, p[:m]...)
			p = p[m:]
			n += m
			c.changed.Broadcast()
			continue
		}
		c.changed.Wait()
	}
}

// Close is the peer's end of file, or a reset if something was left unread.
func (c *memConn) Close() error { return c.end(false) }

// reset closes c, and the peer loses what it has not read.
func (c *memConn) reset() { c.end(true) }

func (c *memConn) end(reset bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed = true
	c.tx.reset = reset || len(c.rx.buf) > 0
	c.tx.eof, c.rx.nobody = true, true
	if reset {
		c.tx.buf = nil
	}
	c.changed.Broadcast()
	return nil
}

func (c *memConn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.tx.eof = true
	c.changed.Broadcast()
	return nil
}

func (c *memConn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.local) }
func (c *memConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

func (c *memConn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *memConn) SetReadDeadline(t time.Time) error  { return c.setDeadline(&c.rx.readBy, t) }
func (c *memConn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.tx.wroteBy, t) }

func (c *memConn) setDeadline(deadline *time.Time, t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	*deadline = t
	if !t.IsZero() {
		time.AfterFunc(time.Until(t), c.wake)
	}
	c.changed.Broadcast()
	return nil
}

func (c *memConn) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed.Broadcast()
}

// taken returns how many of the bytes that c wrote its peer has read.
func (c *memConn) taken() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tx.total
}

// memListener accepts what is put in.
type memListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *memListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 254), Port: 3128} }

// A lab is a Server in memory: clients, origins and resolver are the test's. It
// lives inside a synctest bubble, where time passes only while everybody waits.
type lab struct {
	srv   *Server
	store *policy.Store
	l     *memListener
	addrs map[string]string // of the names there are; not changed once clients come

	mu     sync.Mutex                  // guards what follows
	asked  []string                    // names looked up
	hasty  bool                        // see memConn
	lookup func(context.Context) error // fails a look-up; nil: none
	events []event.Event
	near   []*memConn // the Server's ends of clients' connections
	far    []*farConn
	down   bool                        // origins refuse connections
	dial   func(context.Context) error // fails a connection attempt; nil: none
}

// farConn is the origin's end of a connection that the Server made. Its got is
// what has arrived.
type farConn struct {
	*memConn
	ours *memConn // the Server's end
	to   netip.AddrPort
	got  []byte
	done chan struct{} // the reader has ended
}

func (l *lab) Observe(ev *event.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, *ev)
}

// LookupNetIP knows the one address of each name.
func (l *lab) LookupNetIP(ctx context.Context, _, host string) ([]netip.Addr, error) {
	l.mu.Lock()
	l.asked = append(l.asked, host)
	fail := l.lookup
	l.mu.Unlock()
	if fail != nil {
		if err := fail(ctx); err != nil {
			return nil, err
		}
	}
	if a, ok := l.addrs[host]; ok {
		return []netip.Addr{netip.MustParseAddr(a)}, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// labClient is the address of every client of a lab.
var labClient = netip.MustParseAddrPort("10.0.0.1:40000")

// newLab starts a Server in the calling bubble. close ends it.
func newLab(p *policy.Policy, edit ...func(*Config)) *lab {
	l := &lab{store: new(policy.Store), l: &memListener{conns: make(chan net.Conn), done: make(chan struct{})}}
	l.store.Swap(p)
	cfg := Config{Listen: []string{"memory"}, Decider: l.store, Resolver: l, Observer: l}
	for _, e := range edit {
		e(&cfg)
	}
	l.srv = New(cfg)
	l.srv.listeners = []net.Listener{l.l}
	l.srv.dialer = l.srv.dialer.Through(l.connect)
	l.store.OnChange(func(*policy.Policy) { l.srv.Recheck() })
	go l.srv.Serve(context.Background())
	return l
}

// connect is the network of the Server.
func (l *lab) connect(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	l.mu.Lock()
	fail := l.dial
	l.mu.Unlock()
	if fail != nil {
		if err := fail(ctx); err != nil {
			return nil, opError("dial", err)
		}
	}
	ours, theirs := memPipe(netip.AddrPortFrom(l.addr(), 50000), to)
	f := &farConn{memConn: theirs, ours: ours, to: to, done: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		return nil, opError("dial", syscall.ECONNREFUSED)
	}
	l.far = append(l.far, f)
	go f.receive(&l.mu)
	return ours, nil
}

func (l *lab) addr() netip.Addr { return netip.MustParseAddr("10.0.0.254") }

// receive keeps what arrives.
func (f *farConn) receive(mu *sync.Mutex) {
	defer close(f.done)
	buf := make([]byte, 4<<10)
	for {
		n, err := f.Read(buf)
		mu.Lock()
		f.got = append(f.got, buf[:n]...)
		mu.Unlock()
		if err != nil {
			return
		}
	}
}

// client opens a connection to the Server.
func (l *lab) client() *memConn {
	ours, theirs := memPipe(labClient, netip.AddrPortFrom(l.addr(), 3128))
	theirs.hasty = l.hasty
	l.near = append(l.near, theirs)
	l.l.conns <- theirs
	return ours
}

// last returns the origin's end of the newest connection, or nil.
func (l *lab) last() *farConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.far) == 0 {
		return nil
	}
	return l.far[len(l.far)-1]
}

// seen returns the events so far.
func (l *lab) seen() []event.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.events
}

// open returns how many of its ends of connections the Server has not closed.
func (l *lab) open() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ours := l.near
	for _, f := range l.far {
		ours = append(ours, f.ours)
	}
	for _, c := range ours {
		c.mu.Lock()
		if !c.closed {
			n++
		}
		c.mu.Unlock()
	}
	return n
}

// close ends the origins and the Server, and waits for everything they started.
func (l *lab) close() {
	l.mu.Lock()
	far := l.far
	l.mu.Unlock()
	for _, f := range far {
		f.Close()
		<-f.done
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	l.srv.Shutdown(ctx)
	synctest.Wait()
}
