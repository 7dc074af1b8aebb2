package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"time"
)

// leftEvery is how often it is looked whether a client is still there while its
// destination is resolved and dialled. Nearly all are reached before the first time.
const leftEvery = time.Second

var errLeftDialling = errors.New("the client went away while its destination was resolved or dialled")

// A farewell ends the way to the far side if the client goes away meanwhile.
type farewell struct {
	end    context.CancelFunc
	client syscall.RawConn
	secure bool // the client speaks TLS
	timer  atomic.Pointer[time.Timer]
	over   atomic.Bool
	left   atomic.Bool
}

// watch has end called if client goes away before stop. It costs a timer, and
// nothing further before leftEvery. It returns nil for a client that cannot be
// watched.
func watch(client net.Conn, end context.CancelFunc) *farewell {
	raw, secure := rawClient(client)
	if raw == nil {
		return nil
	}
	f := &farewell{end: end, client: raw, secure: secure}
	f.timer.Store(time.AfterFunc(leftEvery, f.look))
	return f
}

// rawClient returns what hasLeft needs; nil if it can say nothing of client.
func rawClient(client net.Conn) (raw syscall.RawConn, secure bool) {
	if c, ok := client.(*tls.Conn); ok {
		secure = true
		if p, ok := c.NetConn().(*peer); ok {
			client = p.Conn
		}
	}
	c, ok := client.(*net.TCPConn)
	if !ok {
		return nil, secure
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, secure
	}
	return raw, secure
}

// look is called by the timer.
func (f *farewell) look() {
	if f.over.Load() {
		return
	}
	if hasLeft(f.client, f.secure, false) {
		f.left.Store(true)
		f.end()
		return
	}
	if t := f.timer.Load(); t != nil {
		t.Reset(leftEvery)
	}
}

// stop ends the watch, and reports whether the client has left. A look that is under
// way at this moment does no harm: it asks about a descriptor that is open or gone.
func (f *farewell) stop() (left bool) {
	if f == nil {
		return false
	}
	f.over.Store(true)
	f.timer.Load().Stop()
	return f.left.Load()
}

// A presence sees whether the client of an HTTP/1 connection is there while an exchange
// is under way. A read that waits beside the handler would see it sooner; it costs a
// goroutine that starts, waits and is interrupted for each request, a tenth of all.
type presence struct {
	live   *liveExchange
	client syscall.RawConn
	secure bool
	more   atomic.Bool // the client has sent another request already, and may well have closed its side then
	timer  *time.Timer // nil: there was no exchange yet
	awake  bool        // timer runs, or look does; guarded by live.mu
}

// newPresence returns nil for a client that hasLeft can say nothing of.
func newPresence(client net.Conn, live *liveExchange) *presence {
	raw, secure := rawClient(client)
	if raw == nil || !canProbe {
		return nil
	}
	return &presence{live: live, client: raw, secure: secure}
}

// begin has the timer run. It is not stopped at the end of each exchange, but looks
// whether there is one. The caller holds live.mu.
func (p *presence) begin() {
	switch {
	case p.awake:
		return
	case p.timer == nil:
		p.timer = time.AfterFunc(leftEvery, p.look)
	default:
		p.timer.Reset(leftEvery)
	}
	p.awake = true
}

// look is called by the timer.
func (p *presence) look() {
	if p.live.under() && hasLeft(p.client, p.secure, p.more.Load()) {
		p.live.leave()
	}
	p.live.mu.Lock()
	defer p.live.mu.Unlock()
	if p.awake = p.live.ex != nil; p.awake {
		p.timer.Reset(leftEvery)
	}
}

// end stops the timer.
func (p *presence) end() {
	p.live.mu.Lock()
	defer p.live.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
	}
}
