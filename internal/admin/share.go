package admin

import (
	"net"
	"net/netip"
	"sync"
)

// connectionShare is how many connections one address, of IPv6 a /64, may have, so
// that a client which leaks them takes the listener from nobody else. Loopback has no
// such bound, for all of this machine is one address; as many are kept free for it.
const connectionShare = max(maxConnections/8, 8)

// shares is a listener that closes connections which go beyond a share.
type shares struct {
	net.Listener
	refuse func(from string)

	mu     sync.Mutex // guards what follows
	held   map[netip.Addr]int
	beyond int // of held, of others than loopback
}

// Accept implements net.Listener.
func (l *shares) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := source(c)
		if l.enter(from) {
			return &shared{Conn: c, leave: sync.OnceFunc(func() { l.leave(from) })}, nil
		}
		l.refuse(c.RemoteAddr().String())
		c.Close()
	}
}

// source returns what connections of one client have in common.
func source(c net.Conn) netip.Addr {
	t, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	a := t.AddrPort().Addr().Unmap().WithZone("")
	if a.Is6() && !a.IsLoopback() {
		p, _ := a.Prefix(64)
		return p.Addr()
	}
	return a
}

func (l *shares) enter(from netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !from.IsLoopback() {
		if l.held[from] >= connectionShare || l.beyond >= maxConnections-connectionShare {
			return false
		}
		l.beyond++
	}
	l.held[from]++
	return true
}

func (l *shares) leave(from netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !from.IsLoopback() {
		l.beyond--
	}
	if l.held[from]--; l.held[from] == 0 {
		delete(l.held, from)
	}
}

// shared is a connection that counts until it is closed.
type shared struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *shared) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
