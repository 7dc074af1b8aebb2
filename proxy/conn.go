package proxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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

// clientIdle returns the idle time of clients' connections.
func (s *Server) clientIdle() time.Duration {
	return s.cfg.Timeouts.Idle + min(idleGrace, 5*s.cfg.Timeouts.Idle)
}

// An idleConn is a connection under net/http, for which idle time counts both
// directions: a byte either way gives both reads and writes another idle period.
// net/http's own time-outs bound whole requests, which would cut long transfers.
//
// net/http moves deadlines many times for each request. They are handed on when
// somebody waits, and only if that makes a difference.
type idleConn struct {
	net.Conn
	idle time.Duration

	mu            sync.Mutex // guards what follows, and the order of deadlines
	reads, writes int        // under way
	touched       time.Time
	readBy        time.Time // the read deadline of Conn, once one was set
	writeBy       time.Time // the write deadline
	until         time.Time // the one that net/http or limitHead has set, if fixed
	fixed         bool      // until stands
	head          bool      // limitHead has set it
	cut           bool      // the one of net/http is in the past: it interrupts reads
}

// SetReadDeadline is how net/http bounds heads, waits for the next request and
// interrupts reads. Without a deadline of its own the idle time counts.
func (c *idleConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.until, c.fixed, c.head, c.cut = t, !t.IsZero(), false, !t.IsZero() && !t.After(longAgo)
	if c.reads > 0 {
		return c.setReadDeadline(time.Now())
	}
	return nil
}

// limitHead bounds the wait for the rest of a head, once for each, unless reads are
// interrupted.
func (c *idleConn) limitHead(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.head && !c.cut {
		c.until, c.fixed, c.head = time.Now().Add(d), true, true
	}
}

// setReadDeadline sets the read deadline of Conn unless it is right, or at most an
// eighth of the time that is left too early. The caller holds mu.
func (c *idleConn) setReadDeadline(now time.Time) error {
	t := c.until
	if !c.fixed {
		t = now.Add(c.idle)
	}
	if early := t.Sub(c.readBy); early >= 0 && early <= slack(t.Sub(now)) {
		return nil
	}
	c.readBy = t
	return c.Conn.SetReadDeadline(t)
}

// slack is how much earlier than wanted a deadline may be that is d away.
func slack(d time.Duration) time.Duration { return min(touchEvery, max(d, 0)/8) }

// idled reports whether err, of a read, means that the idle time has passed.
func (c *idleConn) idled(err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.fixed && isTimeout(err)
}

// interrupted reports whether reads fail because net/http wants them to.
func (c *idleConn) interrupted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cut
}

// SetWriteDeadline is how net/http lifts deadlines between requests; the idle
// time stays.
func (c *idleConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if t.IsZero() {
		t = now.Add(c.idle)
	}
	return c.setWriteDeadline(t, now)
}

// setWriteDeadline is as setReadDeadline. The caller holds mu.
func (c *idleConn) setWriteDeadline(t, now time.Time) error {
	if early := t.Sub(c.writeBy); early >= 0 && early <= slack(t.Sub(now)) {
		return nil
	}
	c.writeBy = t
	return c.Conn.SetWriteDeadline(t)
}

// touch records activity. The caller holds mu.
func (c *idleConn) touch(now time.Time) {
	if now.Sub(c.touched) < slack(c.idle) {
		return
	}
	c.touched = now
	c.setWriteDeadline(now.Add(c.idle), now)
	if c.reads > 0 {
		c.setReadDeadline(now)
	}
}

func (c *idleConn) Read(p []byte) (int, error) {
	now := time.Now()
	c.mu.Lock()
	c.reads++
	c.touch(now)
	c.setReadDeadline(now) // an error shows in Read
	c.mu.Unlock()
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	c.reads--
	if n > 0 && c.writes > 0 {
		c.touch(time.Now())
	}
	c.mu.Unlock()
	return n, err
}

func (c *idleConn) Write(p []byte) (int, error) {
	now := time.Now()
	c.mu.Lock()
	c.writes++
	c.touch(now)
	c.mu.Unlock()
	n, err := c.Conn.Write(p)
	c.mu.Lock()
	c.writes--
	c.mu.Unlock()
	return n, err
}

// CloseWrite lets net/http end a connection without a reset.
func (c *idleConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// A clientConn is a client's connection while net/http serves it. net/http gets to
// see one request after another, and of each the head as a whole: what is not in
// order is answered here, before any of it could be acted on.
type clientConn struct {
	idleConn
	s       *Server
	source  asker
	counted netip.Addr // see crowd
	in      framed
	one     [1]byte                   // read by watch
	session *session                  // set inside a CONNECT
	serving atomic.Bool               // a handler was called for the current request
	there   *presence                 // sees whether the client is there; nil: watch has to
	badBody atomic.Pointer[headError] // what is wrong with the body of the current request
	live    liveExchange              // the request under way
	visit   *visit                    // serves it in a lane; nil: net/http does
}

// Read reads for net/http. Between messages that asks for a single byte only while a
// handler runs, to learn whether the client is still there.
func (c *clientConn) Read(p []byte) (int, error) {
	if len(p) == 1 && c.in.between() {
		return c.watch()
	}
	n, err := c.in.read((*headReader)(c), p)
	if err == nil {
		return n, nil
	}
	if c.serving.Load() {
		if c.idled(err) {
			err = errBodySlow
			c.in.bad = err // nobody waits for it once more
		}
		if bad := (*headError)(nil); errors.As(err, &bad) {
			c.badBody.Store(bad) // before net/http, which cancels the request
		}
		return n, err
	}
	return 0, c.refuseNext(err)
}

// watch waits for a byte of the next request, or the end, unless somebody else sees
// to that. The byte is kept until the next request is read, as what follows a request
// that asked for an upgrade may be no request.
func (c *clientConn) watch() (int, error) {
	more := len(c.in.held) > 0
	if c.there != nil {
		c.there.more.Store(more)
	}
	if c.there != nil || more {
		return 0, nil
	}
	n, err := c.idleConn.Read(c.one[:])
	if n > 0 {
		c.in.held, c.in.short = c.one[:1:1], true
		return 0, nil
	}
	if err != nil && !c.interrupted() {
		c.live.leave()
	}
	return 0, err
}

// refuseNext ends the connection after err, which came while the next request was
// read. It returns the error for net/http, at which that is silent.
func (c *clientConn) refuseNext(err error) error {
	begun := c.in.begun()
	switch {
	case isHeadError(err):
	case errors.Is(err, io.EOF) && begun:
		err = errHeadCut
	case isTimeout(err) && begun && !c.interrupted():
		err = errHeadSlow
	default:
		return err
	}
	c.in.bad = io.EOF
	c.idleConn.Write(c.s.unreadable(c, err))
	closeGently(c.Conn, make([]byte, 512))
	return io.EOF
}

// Write sends what net/http has to say. What it says before a handler was called
// is its own answer to a request that passed our checks but not its own; the client
// gets ours instead, and the request its event. net/http closes the connection
// afterwards.
func (c *clientConn) Write(p []byte) (int, error) {
	if !c.serving.Load() {
		if _, err := c.idleConn.Write(c.s.unreadable(c, theirError(p))); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	return c.idleConn.Write(p)
}

// Close closes the connection; gently after a body that was not in order, of which
// the client may still send the rest.
func (c *clientConn) Close() error {
	if c.badBody.Load() != nil && c.s.life.Err() == nil {
		closeGently(c.Conn, make([]byte, 512))
		return nil
	}
	return c.Conn.Close()
}

// theirError makes an error of net/http's answer.
func theirError(answer []byte) error {
	line, _, _ := strings.Cut(string(answer), "\r\n")
	e := &headError{http.StatusBadRequest, line}
	if f := strings.Fields(line); len(f) > 1 {
		if status, err := strconv.Atoi(f[1]); err == nil && status >= 400 {
			e.status = status
		}
	}
	return e
}

// A headReader reads the connection under a clientConn. Once a head has begun to
// arrive, it is bounded by timeouts.request_header.
type headReader clientConn

func (c *headReader) Read(p []byte) (int, error) {
	if c.in.begun() {
		c.limitHead(c.s.cfg.Timeouts.RequestHeader)
	}
	return c.idleConn.Read(p)
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
