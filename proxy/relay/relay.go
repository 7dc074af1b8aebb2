// Package relay moves the bytes of a tunnel: both ways between a client's
// connection and an upstream's, until both have ended.
//
// It is built for many tunnels that are mostly silent. Between two
// *net.TCPConn on Linux a waiting tunnel holds its two descriptors, two small
// goroutine stacks and nothing else: a buffer is taken from a pool once bytes
// are there to be read, and given back before waiting again. A direction that
// fills its buffer several times in a row borrows a pipe from a bounded pool
// and moves its bytes inside the kernel (splice(2)); the pipe goes back, empty,
// whenever the stream pauses. io.Copy, in contrast, keeps two pipes per tunnel
// for the tunnel's whole life.
//
// Every other pair of connections (TLS, in-memory pipes, wrappers, other
// systems) is copied through two pooled buffers of 32 KiB, which it holds while
// it waits. So take wrappers off before calling Relay.
package relay

import (
	"errors"
	"io"
	"math"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	bufSize = 32 << 10 // bytes a direction reads at a time; fits a TLS record

	// lastBytes is how long a direction may go on delivering what a dead
	// connection had sent before it died.
	lastBytes = 5 * time.Second
)

// buffers holds *[bufSize]byte.
var buffers = sync.Pool{New: func() any { return new([bufSize]byte) }}

// Options of one tunnel. The zero value is ready to use: no idle time, no
// counters.
type Options struct {
	// Idle ends the tunnel when no byte has moved in either direction for
	// this long, also while a peer does not read. It covers what is left of a
	// half-closed tunnel too. 0 means never.
	Idle time.Duration

	// Up and Down, if not nil, grow with each write by the bytes that the
	// upstream and the client took. Relay only adds to them: what the caller
	// has forwarded before may already be in.
	Up, Down *atomic.Int64

	// UpFirst and DownFirst were taken from the client and the upstream before. They
	// go to the other side before anything else does. Relay keeps them meanwhile.
	UpFirst, DownFirst []byte
}

// Result says how a tunnel ended.
type Result struct {
	Up   int64 // bytes that Relay wrote to the upstream
	Down int64 // bytes that Relay wrote to the client
	End  End   // why the tunnel ended

	// Err is the error of a connection, if one caused the end: always set for
	// ClientFailed and UpstreamFailed. With ClientClosed or UpstreamClosed it
	// means that the side that had closed refused what came for it later,
	// which is common and rarely of interest. Otherwise nil.
	Err error
}

// End says why a tunnel ended.
type End uint8

// The reasons for an end. If there were several, the first one counts.
const (
	ClientClosed   End = iota + 1 // both sides ended in good order, the client first
	UpstreamClosed                // both sides ended in good order, the upstream first
	ClientFailed                  // the client's connection broke, usually by a reset
	UpstreamFailed                // the upstream's connection broke, usually by a reset
	IdleTimeout                   // no byte moved for Options.Idle
	Cancelled                     // the owner closed the connections, or a deadline he set has passed
)

// String returns the reason as a log value, such as "client_closed".
func (e End) String() string {
	switch e {
	case ClientClosed:
		return "client_closed"
	case UpstreamClosed:
		return "upstream_closed"
	case ClientFailed:
		return "client_failed"
	case UpstreamFailed:
		return "upstream_failed"
	case IdleTimeout:
		return "idle_timeout"
	case Cancelled:
		return "cancelled"
	default:
		return "unknown"
	}
}

// Relay copies bytes both ways between client and upstream, and returns when
// both directions have ended. One runs in the caller's goroutine, the other in
// a second one that is gone when Relay returns. For the lightest idle tunnels
// call it from a goroutine started for it: one that has served a handshake
// keeps the stack that the handshake needed.
//
// The end of one side's stream becomes CloseWrite on the other, and the
// opposite direction stays open; the end of the second is left to the caller's Close. If the other has no CloseWrite method, the
// tunnel ends, because there is no other way to tell it. A connection that
// breaks ends both directions, once the bytes it had sent are delivered.
//
// The caller owns both connections before, during and after the call, but leaves
// reading and writing to Relay, which closes neither. To cancel, close both or let the deadlines of both pass, from
// any goroutine and at any time: Relay returns at once with Cancelled. (Doing it
// to one of them goes unnoticed while Relay waits for the other.) Relay never
// moves a deadline into the future, so a deadline for the end of a drain stays
// in force, and one left over from a handshake must be cleared before. When
// Relay returns, all deadlines have passed: the connections are only good for
// Close.
func Relay(client, upstream net.Conn, o Options) Result {
	t := newTunnel(client, upstream, o)
	t.second.Go(t.runUp)
	t.down.run()
	t.second.Wait()
	if t.panicked != nil {
		panic(t.panicked) // where the caller can recover
	}
	return t.result()
}

// runUp runs the second direction. What panics there ends the tunnel, not the process.
func (t *tunnel) runUp() {
	defer func() {
		if t.panicked = recover(); t.panicked != nil {
			t.cut()
		}
	}()
	t.up.run()
}

// side is one of the two connections of a tunnel.
type side uint8

const (
	clientSide side = iota
	upstreamSide
)

func closedBy(s side) End { return ClientClosed + End(s) }
func failedAt(s side) End { return ClientFailed + End(s) }

// tunnel is what the two directions share. It lives as long as the tunnel, so
// it is kept small.
type tunnel struct {
	client, upstream net.Conn
	idle             time.Duration
	up, down         half
	second           sync.WaitGroup // the goroutine of up
	panicked         any            // what up panicked with; read once second is done

	start time.Time    // of the tunnel, with the monotonic clock
	last  atomic.Int64 // when a byte last moved, ns after start

	mu      sync.Mutex  // guards what follows
	timer   *time.Timer // calls expire; nil if nothing limits the tunnel
	running int         // directions that still move bytes
	giveUp  time.Time   // set once a connection is dead: when to end at the latest
	ended   [2]bool     // by side: its stream has ended
	first   End         // ClientClosed or UpstreamClosed, for the first of them
	end     End         // why the tunnel ends, if not in good order
	err     error
}

// newTunnel returns a tunnel whose idle time runs. Not being a part of Relay, it
// takes no stack while Relay waits.
func newTunnel(client, upstream net.Conn, o Options) *tunnel {
	t := &tunnel{client: client, upstream: upstream, idle: o.Idle, start: time.Now(), running: 2}
	t.up = half{t: t, src: client, dst: upstream, from: clientSide, to: upstreamSide, left: math.MaxInt64, live: o.Up, first: o.UpFirst}
	t.down = half{t: t, src: upstream, dst: client, from: upstreamSide, to: clientSide, left: math.MaxInt64, live: o.Down, first: o.DownFirst}
	if t.idle > 0 {
		t.mu.Lock()
		t.timer = time.AfterFunc(t.idle, t.expire)
		t.mu.Unlock()
	}
	return t
}

// half is one direction of a tunnel.
type half struct {
	t        *tunnel
	src, dst net.Conn
	from, to side
	left     int64         // bytes of src to be moved yet
	n        int64         // bytes written to dst
	live     *atomic.Int64 // the same for onlookers, or nil
	first    []byte        // goes to dst before what src has; nil once it did
}

// run moves the bytes of one direction, then does what its end means for the
// other.
func (h *half) run() {
	at, err := h.move()
	if err == nil {
		h.endOfStream()
		return
	}
	h.t.fail(at, err)
	if at == h.from || !h.t.die() {
		h.t.cut()
	}
	h.t.leave()
}

// endOfStream passes the end of src's stream on to dst. It returns when the
// other direction has ended too.
func (h *half) endOfStream() {
	dst, ok := h.dst.(interface{ CloseWrite() error })
	h.t.closed(h.from, !ok)
	if !ok {
		h.t.cut()
		h.t.leave()
		return
	}
	if h.t.leave() {
		return // the caller's Close says it
	}
	dst.CloseWrite() // an error means that dst is dead: the other direction reads from it and will see
	h.awaitReset()
}

// copy is the portable way to move bytes. At the end of src's stream it returns
// a nil error, otherwise the error and the side that it is about.
func (h *half) copy() (at side, err error) {
	if first := h.first; len(first) > 0 {
		h.first = nil
		n, err := h.dst.Write(first)
		h.count(n)
		if err != nil {
			return h.to, err
		}
	}
	buf := buffers.Get().(*[bufSize]byte)
	defer buffers.Put(buf)
	for {
		n, rerr := h.src.Read(buf[:])
		if n > 0 {
			h.t.touch()
			w, werr := h.dst.Write(buf[:n])
			h.count(w)
			if werr == nil && w < n {
				werr = io.ErrShortWrite
			}
			if werr != nil {
				return h.to, werr
			}
		}
		if rerr == io.EOF {
			return h.from, nil
		}
		if rerr != nil {
			return h.from, rerr
		}
	}
}

// count records n bytes written to dst.
func (h *half) count(n int) {
	h.n += int64(n)
	if h.live != nil {
		h.live.Add(int64(n))
	}
	h.t.touch()
}

// touch records that a byte has moved. Reading the clock is all it costs: the
// timer looks at the time only when it fires.
func (t *tunnel) touch() {
	if t.idle > 0 {
		t.last.Store(int64(time.Since(t.start)))
	}
}

// expire is called when the tunnel may have been idle for long enough, or when a
// dead connection's time is over.
func (t *tunnel) expire() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.running == 0 {
		return
	}
	left := t.idle - time.Since(t.start) + time.Duration(t.last.Load())
	if !t.giveUp.IsZero() {
		left = time.Until(t.giveUp)
	}
	if left > 0 {
		t.timer.Reset(left)
		return
	}
	t.finish(IdleTimeout, nil)
	t.cut()
}

// closed records that the stream of s has ended, and whether that ends the
// tunnel.
func (t *tunnel) closed(s side, final bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended[s] = true
	if t.first == 0 {
		t.first = closedBy(s)
	}
	if final {
		t.finish(closedBy(s), nil)
	}
}

// fail records the error of a connection.
func (t *tunnel) fail(s side, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
		t.finish(Cancelled, nil)
	case t.ended[s]:
		t.finish(closedBy(s), err)
	default:
		t.finish(failedAt(s), err)
	}
}

// die gives the direction that reads from a dead connection lastBytes to deliver
// what is there. It reports false if the tunnel is to end at once.
func (t *tunnel) die() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.end == Cancelled || t.end == IdleTimeout {
		return false
	}
	t.giveUp = time.Now().Add(lastBytes)
	if t.timer == nil {
		t.timer = time.AfterFunc(lastBytes, t.expire)
	} else {
		t.timer.Reset(lastBytes)
	}
	return true
}

// finish records why the tunnel ends, unless that is known already. The caller
// holds mu.
func (t *tunnel) finish(e End, err error) {
	if t.end == 0 {
		t.end, t.err = e, err
	}
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// cut ends all reads and writes of both connections, now and later. A deadline
// does that without taking the connections away from their owner, and as it is
// never lifted, no race can undo it.
func (t *tunnel) cut() {
	t.client.SetDeadline(longAgo)
	t.upstream.SetDeadline(longAgo)
}

// leave is called by each direction when it has moved its last byte. It reports
// whether that was the second one.
func (t *tunnel) leave() (last bool) {
	t.mu.Lock()
	t.running--
	last = t.running == 0
	if last && t.timer != nil {
		t.timer.Stop()
	}
	t.mu.Unlock()
	if last {
		t.cut() // ends the other direction's awaitReset
	}
	return last
}

func (t *tunnel) result() Result {
	end := t.end
	if end == 0 {
		end = t.first
	}
	return Result{Up: t.up.n, Down: t.down.n, End: end, Err: t.err}
}
