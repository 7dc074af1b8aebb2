package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A laneConn is a connection in a lane as the net.Conn of a coroutine, which alone
// reads, writes and sets deadlines. Any goroutine may close it.
type laneConn struct {
	lane     *lane
	fd       int // -1: closed
	slot     uint32
	visit    *visit // whose client's connection it is; nil: one to a far side
	remote   netip.AddrPort
	readable bool       // there may be something to read
	final    bool       // there may be no further event about that
	waiter   *coroutine // waits for something to happen; nil: nobody does
	awaited  uint32     // events
	until    time.Time  // how long; zero: for ever
	overdue  bool       // that is over

	readBy, writeBy time.Time // deadlines; zero: none
	closing         atomic.Bool
	lent            atomic.Pointer[net.TCPConn] // it is not in the lane, for a while; nil: it is
}

const (
	finalEvents    = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR | unix.EPOLLPRI
	readableEvents = unix.EPOLLIN | finalEvents
	writableEvents = unix.EPOLLOUT | unix.EPOLLHUP | unix.EPOLLERR
)

// happened is told of events.
func (c *laneConn) happened(events uint32) {
	if events&readableEvents != 0 {
		c.readable = true
		c.final = c.final || events&finalEvents != 0
	}
	if c.waiter != nil && c.awaited&events != 0 {
		c.wake()
	}
}

// wake resumes who waits.
func (c *laneConn) wake() {
	w := c.waiter
	c.waiter, c.until = nil, time.Time{}
	c.arm()
	c.lane.resume(w)
}

// timeOut is called when the deadline of who waits has passed.
func (c *laneConn) timeOut() {
	if c.waiter != nil {
		c.overdue = true
		c.wake()
	}
}

// await has the coroutine that runs wait for events, or deadline.
func (c *laneConn) await(events uint32, deadline time.Time) error {
	l := c.lane
	c.waiter, c.awaited, c.until = l.current, events, deadline
	c.arm()
	c.waiter.wait()
	switch {
	case c.closing.Load():
		return net.ErrClosed
	case c.overdue:
		c.overdue = false
		return os.ErrDeadlineExceeded
	}
	return nil
}

// arm sets when to look at c next.
func (c *laneConn) arm() {
	if c.fd < 0 {
		return
	}
	at := c.until
	if v := c.visit; v != nil {
		at = v.nextLook(at)
	}
	due := int64(never)
	if !at.IsZero() {
		due = int64(at.Sub(c.lane.began))
	}
	c.lane.due[c.slot] = due
}

func (c *laneConn) Read(b []byte) (int, error) {
	if lent := c.lent.Load(); lent != nil {
		return lent.Read(b)
	}
	for {
		if c.closing.Load() {
			return 0, net.ErrClosed
		}
		if c.readable {
			n, err := readFD(c.fd, b)
			switch {
			case err == nil && n == 0 && len(b) > 0:
				return 0, io.EOF
			case err == nil:
				c.readable = c.final || n == len(b)
				c.lane.current.pass(n)
				return n, nil
			case !errors.Is(err, unix.EAGAIN):
				return 0, c.failed("read", os.NewSyscallError("read", err))
			}
			c.readable, c.final = false, false
		}
		if err := c.await(readableEvents, c.readBy); err != nil {
			return 0, c.failed("read", err)
		}
	}
}

func (c *laneConn) Write(b []byte) (n int, err error) {
	if lent := c.lent.Load(); lent != nil {
		return lent.Write(b)
	}
	for {
		if c.closing.Load() {
			return n, net.ErrClosed
		}
		m, err := writeFD(c.fd, b[n:])
		if n += m; n == len(b) {
			return n, nil
		}
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return n, c.failed("write", os.NewSyscallError("write", err))
		}
		if err := c.await(writableEvents, c.writeBy); err != nil {
			return n, c.failed("write", err)
		}
	}
}

// failed says, as package net does, whose connection it was that op failed at.
func (c *laneConn) failed(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Addr: c.RemoteAddr(), Err: err}
}

// Close has the lane close c, soon.
func (c *laneConn) Close() error {
	if c.closing.Swap(true) {
		return net.ErrClosed
	}
	if lent := c.lent.Load(); lent != nil {
		lent.Close()
	}
	c.lane.post(c.close)
	return nil
}

// lend takes c out of the lane, until takeBack. It returns nil, and c is closed, if there
// are no descriptors for that.
func (c *laneConn) lend() *net.TCPConn {
	fd := c.fd
	c.fd = -1
	c.lane.unwatch(fd)
	c.lane.giveBack(c.slot)
	conn, err := connOf(fd)
	if err != nil {
		c.closing.Store(true)
		return nil
	}
	c.lent.Store(conn)
	if c.closing.Load() { // it was not seen yet
		conn.Close()
	}
	return conn
}

// unlend closes c, which is lent if there were descriptors for that.
func (c *laneConn) unlend() {
	c.closing.Store(true)
	if lent := c.lent.Swap(nil); lent != nil {
		lent.Close()
	}
}

// moveDeadlines has those of c hold for to, which it is lent as.
func (c *laneConn) moveDeadlines(to *net.TCPConn) {
	to.SetReadDeadline(c.readBy)
	to.SetWriteDeadline(c.writeBy)
}

// takeBack has c in the lane again, unless it is to be closed, or cannot be.
func (c *laneConn) takeBack() {
	lent := c.lent.Swap(nil)
	defer lent.Close()
	if c.closing.Load() {
		return
	}
	s := slot{conn: c}
	if c.visit != nil {
		s = slot{p: c.visit.passage}
	}
	fd, i, err := c.lane.adoptFD(lent, s)
	if err != nil {
		c.closing.Store(true)
		return
	}
	c.fd, c.slot, c.readable, c.final = fd, i, false, false
}

// close closes c now, in the lane. A client's connection is closed with its passage.
func (c *laneConn) close() {
	switch {
	case c.visit != nil:
		c.visit.cut()
		return
	case c.fd < 0:
		return
	}
	closeFD(c.fd)
	c.fd = -1
	c.lane.giveBack(c.slot)
	if c.waiter != nil {
		c.wake()
	}
}

// silent reports whether nothing has come, not even the end. What has come is taken.
func (c *laneConn) silent() bool {
	if c.closing.Load() { // then its descriptor is the lane's alone
		return false
	}
	var b [1]byte
	_, err := readFD(c.fd, b[:])
	return errors.Is(err, unix.EAGAIN)
}

func (c *laneConn) SetReadDeadline(t time.Time) error {
	c.readBy = t
	if lent := c.lent.Load(); lent != nil {
		return lent.SetReadDeadline(t)
	}
	return nil
}

func (c *laneConn) SetWriteDeadline(t time.Time) error {
	c.writeBy = t
	if lent := c.lent.Load(); lent != nil {
		return lent.SetWriteDeadline(t)
	}
	return nil
}

func (c *laneConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *laneConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// LocalAddr is the address that nobody asks for.
func (c *laneConn) LocalAddr() net.Addr { return &net.TCPAddr{} }

// adopt makes a laneConn of c, which it takes over.
func (l *lane) adopt(c *net.TCPConn) (*laneConn, error) {
	defer c.Close()
	a := &laneConn{lane: l, remote: remoteAddr(c)}
	var err error
	if a.fd, a.slot, err = l.adoptFD(c, slot{conn: a}); err != nil {
		return nil, err
	}
	return a, nil
}

// adoptFD has the lane watch a descriptor of its own for c, as s.
func (l *lane) adoptFD(c *net.TCPConn, s slot) (fd int, i uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, 0, err
	}
	cerr := raw.Control(func(n uintptr) { fd, err = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, cerr); err != nil {
		return -1, 0, err
	}
	i = l.take(s)
	if err := l.watch(fd, i, laneInterest); err != nil {
		closeFD(fd)
		l.giveBack(i)
		return -1, 0, err
	}
	return fd, i, nil
}

// dialExchange is Server.dialExchange for an exchange in l.
func (l *lane) dialExchange(ctx context.Context, network, addr string) (net.Conn, error) {
	var conn net.Conn
	var err error
	l.current.elsewhere(func() { conn, err = l.s.dialExchange(ctx, network, addr) })
	if err != nil {
		return nil, err
	}
	c := conn.(*upstreamConn)
	tcp, ok := c.Conn.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, errors.New("the connection is no socket of its own")
	}
	if c.Conn, err = l.adopt(tcp); err != nil {
		return nil, connectFailed(ctx.Value(exchangeKey{}).(*exchange).admitted, err)
	}
	return c, nil
}
