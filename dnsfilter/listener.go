package dnsfilter

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// acceptPause follows an error of Accept, such as having run out of descriptors.
const acceptPause = 50 * time.Millisecond

// A listener bounds the connections that it accepts.
type listener struct {
	net.Listener
	conns *conns
	down  <-chan struct{}
	door  door
}

// Accept returns the next connection that is within the bounds, and closes the others.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil, err
		case err != nil:
			if !wait(acceptPause, l.down) {
				return nil, net.ErrClosed
			}
		default:
			if kept := l.conns.add(c); kept != nil {
				return kept, nil
			}
			c.Close()
		}
	}
}

// wait waits for a while and reports whether to go on.
func wait(d time.Duration, down <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-down:
		return false
	}
}

// conns are the open connections: those in clear, or those over TLS.
type conns struct {
	trusted []netip.Prefix // those who speak for others
	refused *atomic.Uint64
	known   func(source netip.Addr) bool // whether a group has it
	full    func()                       // is told when others are turned away for those that are open

	mu        sync.Mutex // guards what follows
	open      map[*conn]struct{}
	perSource map[netip.Addr]int
}

// add registers c, or returns nil if there are too many: of all, or of its source.
// The second half of all is kept for sources that a group has, so that others can
// not take every connection by leaving theirs idle.
func (cs *conns) add(c net.Conn) *conn {
	kept := &conn{Conn: c, conns: cs}
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		kept.source = a.AddrPort().Addr().Unmap()
		kept.peer = kept.source.WithZone("")
		kept.client = netip.AddrPortFrom(kept.peer, a.AddrPort().Port())
	}
	limit := maxConns
	switch kept.trusted = contains(cs.trusted, kept.peer); {
	case kept.trusted:
		kept.source = netip.Addr{} // of whoever it speaks for: adopt
	case cs.count() >= maxConns/2 && !cs.known(kept.peer):
		limit = maxConns / 2
	}
	if room, ok := cs.take(kept, limit); !ok {
		cs.refuse(room)
		return nil
	}
	return kept
}

// adopt counts c, of a peer that speaks for others, as that of c.client. It reports
// whether add would have taken one from there.
func (cs *conns) adopt(c *conn) bool {
	cs.remove(c)
	c.source = c.client.Addr()
	limit := maxConns
	if cs.count() >= maxConns/2 && !cs.known(c.source) {
		limit = maxConns / 2
	}
	room, ok := cs.take(c, limit)
	if !ok {
		cs.refuse(room)
	}
	return ok
}

func (cs *conns) refuse(room bool) {
	cs.refused.Add(1)
	if !room {
		cs.full()
	}
}

// take registers c if fewer than limit are open, and its source has not too many.
// It returns whether there was room for another source's, and for c.
func (cs *conns) take(c *conn, limit int) (room, ok bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if room = len(cs.open) < limit; !room || cs.perSource[c.source] >= maxSourceConns {
		return room, false
	}
	cs.open[c] = struct{}{}
	if c.source.IsValid() {
		cs.perSource[c.source]++
	}
	return room, true
}

func (cs *conns) count() int {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return len(cs.open)
}

func (cs *conns) remove(c *conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if _, ok := cs.open[c]; !ok {
		return
	}
	delete(cs.open, c)
	if !c.source.IsValid() {
		return
	}
	if cs.perSource[c.source]--; cs.perSource[c.source] == 0 {
		delete(cs.perSource, c.source)
	}
}

// each calls f with every connection that is open.
func (cs *conns) each(f func(*conn)) {
	cs.mu.Lock()
	open := make([]*conn, 0, len(cs.open))
	for c := range cs.open {
		open = append(open, c)
	}
	cs.mu.Unlock()
	for _, c := range open {
		f(c)
	}
}

// A conn is a client's connection. A client that does not read loses it.
type conn struct {
	net.Conn
	conns   *conns
	source  netip.Addr     // that it counts for; zero: for none
	peer    netip.Addr     // the other end
	trusted bool           // peer speaks for others
	client  netip.AddrPort // who asks, neither mapped nor with a zone
	early   []byte         // read already, and to be read again first
	handed  atomic.Bool    // to net/http, which ends it
}

func (c *conn) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

func (c *conn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(p)
	if err != nil {
		c.Close() // or the answers after it would be read as part of this one
	}
	return n, err
}

func (c *conn) Close() error {
	c.conns.remove(c)
	return c.Conn.Close()
}

func port(a netip.AddrPort) string { return strconv.Itoa(int(a.Port())) }
