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
	f := &farewell{end: end}
	if c, ok := client.(*tls.Conn); ok {
		f.secure = true
		if p, ok := c.NetConn().(*peer); ok {
			client = p.Conn
		}
	}
	c, ok := client.(*net.TCPConn)
	if !ok {
		return nil
	}
	var err error
	if f.client, err = c.SyscallConn(); err != nil {
		return nil
	}
	f.timer.Store(time.AfterFunc(leftEvery, f.look))
	return f
}

// look is called by the timer.
func (f *farewell) look() {
	if f.over.Load() {
		return
	}
	if hasLeft(f.client, f.secure) {
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
