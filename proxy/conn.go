package proxy

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

const (
	// touchEvery is how often, at most, activity moves an idleConn's deadlines.
	touchEvery = time.Second

	// idleGrace is how much longer a client's connection may be idle than the far
	// side's, so that a client hears of a far side that fell silent.
	idleGrace = 5 * time.Second
)

// An idleConn is a connection under net/http, for which idle time counts both
// directions: a byte either way gives both reads and writes another idle period.
// net/http's own time-outs bound whole requests, which would cut long transfers.
type idleConn struct {
	net.Conn
	idle time.Duration

	mu      sync.Mutex // guards what follows, and the order of SetDeadline calls
	touched time.Time
	fixed   bool // net/http has set a read deadline of its own, which stands
}

// SetReadDeadline is how net/http bounds heads, waits for the next request and
// interrupts reads. Without a deadline of its own the idle time counts.
func (c *idleConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fixed = !t.IsZero(); !c.fixed {
		t = time.Now().Add(c.idle)
	}
	return c.Conn.SetReadDeadline(t)
}

// SetWriteDeadline is how net/http lifts deadlines between requests; the idle
// time stays.
func (c *idleConn) SetWriteDeadline(t time.Time) error {
	if t.IsZero() {
		t = time.Now().Add(c.idle)
	}
	return c.Conn.SetWriteDeadline(t)
}

// touch records activity.
func (c *idleConn) touch() {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Sub(c.touched) < min(touchEvery, c.idle/8) {
		return
	}
	c.touched = now
	c.Conn.SetWriteDeadline(now.Add(c.idle))
	if !c.fixed {
		c.Conn.SetReadDeadline(now.Add(c.idle))
	}
}

func (c *idleConn) Read(p []byte) (int, error) {
	c.touch()
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.touch()
	}
	return n, err
}

func (c *idleConn) Write(p []byte) (int, error) {
	c.touch()
	return c.Conn.Write(p)
}

// CloseWrite lets net/http end a connection without a reset.
func (c *idleConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// A clientConn is a client's connection while net/http serves it: what was read
// of it before comes first. Once that is used up only the idle time is added.
type clientConn struct {
	idleConn
	s       *Server
	source  asker
	counted netip.Addr // see crowd
	replay  []byte     // read before, not yet given to net/http
	session *session   // set inside a CONNECT
	serving bool       // a handler was called for the current request
}

func (c *clientConn) Read(p []byte) (int, error) {
	if len(c.replay) > 0 {
		n := copy(p, c.replay)
		if c.replay = c.replay[n:]; len(c.replay) == 0 {
			c.replay = nil
		}
		return n, nil
	}
	return c.idleConn.Read(p)
}

// Write sends what net/http has to say. What it says before a handler was called
// is its own answer to a request it cannot parse; the client gets ours instead,
// and the request its event. net/http closes the connection afterwards.
func (c *clientConn) Write(p []byte) (int, error) {
	if !c.serving {
		if _, err := c.idleConn.Write(c.s.unreadable(c, p)); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	return c.idleConn.Write(p)
}

// handOff is the listener of the http.Server: it accepts what the front passes
// on, from this process alone.
type handOff struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newHandOff() *handOff {
	return &handOff{conns: make(chan net.Conn), done: make(chan struct{})}
}

// give passes c on. It reports false, and the caller keeps c, once the listener is closed.
func (h *handOff) give(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.done:
		return false
	}
}

func (h *handOff) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *handOff) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

func (h *handOff) Addr() net.Addr { return &net.TCPAddr{} }

// closeGently closes c so that the client receives what was written last: a close
// with bytes unread would reset the connection, and a reset may overtake the
// answer. It waits for the client's end for a second at most, and takes in no
// more than a client may have had under way. buf is space to read into.
func closeGently(c net.Conn, buf []byte) {
	const (
		patience = time.Second
		atMost   = 256 << 10 // bytes
	)
	defer c.Close()
	w, ok := c.(interface{ CloseWrite() error })
	if !ok || w.CloseWrite() != nil {
		return
	}
	c.SetReadDeadline(time.Now().Add(patience))
	for n := 0; n < atMost; {
		m, err := c.Read(buf)
		if err != nil {
			return
		}
		n += m
	}
}
