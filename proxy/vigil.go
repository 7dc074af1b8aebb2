package proxy

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"time"

	"sallyport/policy"
	"sallyport/proxy/relay"
)

// firstRoom is the room for a silent client's first bytes; more is made as a
// ClientHello needs it.
const firstRoom = 512

// A vigil stands in for the relay of a tunnel that passes because its group
// observes, as long as the client has said nothing. What the far side says goes to
// the client meanwhile. What the client says first, however late, is looked at like
// any other beginning, for guardrails hold there too.
type vigil struct {
	c     connect // as it was after the silence
	asked policy.Decision
	t     *tunnel      // stands for the connection in the registry meanwhile
	last  atomic.Int64 // when the far side last said something, ns after start
	start time.Time
	done  chan struct{} // closed when speak has ended
}

// keepVigil starts a vigil in a goroutine of its own. asked is the decision before
// the silence. It takes over upstream.
func (c *connect) keepVigil(upstream net.Conn, asked policy.Decision) {
	t := c.newTunnel()
	t.upstream = upstream
	l := &vigil{c: *c, asked: asked, t: t, start: time.Now(), done: make(chan struct{})}
	l.c.early = nil // its spare capacity is somebody else's
	c.s.wg.Add(1)
	c.s.register(t, c.generation)
	go l.run()
}

func (l *vigil) run() {
	c, t := &l.c, l.t
	defer c.s.wg.Done()
	defer c.s.recovered(c.client)
	go l.speak()
	settled := false
	defer func() {
		if !settled { // a panic
			t.abandon()
			<-l.done
		}
	}()
	first, err := l.await()
	var r *refusal
	if err == nil {
		first, r = l.look(first)
	}
	t.upstream.SetReadDeadline(longAgo)
	<-l.done
	t.upstream.SetReadDeadline(time.Time{})
	settled = true
	if err != nil && !errors.Is(err, io.EOF) || t.revoked.Load() != nil {
		t.cut()
		t.end(problemOf(err))
		return
	}
	// From here on it is like any other CONNECT whose first bytes are known.
	c.s.tunnels.detach(t)
	c.place, c.said = t.place, t.down.Load()
	defer c.release()
	switch {
	case r != nil:
		t.upstream.Close()
		c.ev.BytesDown = c.said
		c.refuse(r)
	case c.request.Protocol == policy.ProtocolHTTP:
		c.startSession(t.upstream, first)
	default:
		c.tunnel(t.upstream, first)
	}
}

// problemOf says for operators why a vigil ended.
func problemOf(err error) string {
	switch {
	case err == nil, errors.Is(err, net.ErrClosed):
		return relay.Cancelled.String()
	case isTimeout(err):
		return relay.IdleTimeout.String()
	}
	return relay.ClientFailed.String() + ": " + err.Error()
}

// await waits for the first bytes of the client. timeouts.idle passes only while the
// far side is silent too.
func (l *vigil) await() ([]byte, error) {
	buf := make([]byte, firstRoom)
	for {
		l.c.client.SetReadDeadline(l.start.Add(time.Duration(l.last.Load()) + l.c.s.cfg.Timeouts.Idle))
		heard := l.last.Load()
		n, err := l.c.client.Read(buf)
		if n > 0 {
			return buf[:n], nil
		}
		if !isTimeout(err) || l.last.Load() == heard {
			return nil, err
		}
	}
}

// look decides on the client's first bytes.
func (l *vigil) look(b []byte) ([]byte, *refusal) {
	c := &l.c
	c.early, c.decision, c.request.Protocol = b, l.asked, policy.ProtocolUnknown
	first, r := c.inspect()
	if r == nil && c.request.Protocol == policy.ProtocolHTTP && l.last.Load() > 0 {
		r = c.saw(policy.ProtocolTCP) // in HTTP the client speaks first
	}
	c.client.SetReadDeadline(time.Time{})
	return first.bytes, r
}

// speak passes on what the far side says, until the relay takes over.
func (l *vigil) speak() {
	defer close(l.done)
	c, t := &l.c, l.t
	defer c.s.recovered(c.client)
	buf := buffers.Get().(*[minBuffer]byte)
	defer buffers.Put(buf)
	for {
		n, err := t.upstream.Read(buf[:])
		if n > 0 {
			l.last.Store(max(int64(time.Since(l.start)), 1))
			c.client.SetWriteDeadline(time.Now().Add(c.s.cfg.Timeouts.Idle)) // for a client that does not read
			w, werr := c.client.Write(buf[:n])
			t.down.Add(int64(w))
			if werr != nil {
				t.cut()
				return
			}
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, io.EOF): // the client may still speak, and is heard
			if w, ok := c.client.(interface{ CloseWrite() error }); ok {
				w.CloseWrite()
			}
		case !isTimeout(err):
			t.cut()
		}
		return
	}
}
