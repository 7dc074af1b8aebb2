package proxy

import (
	"net"

	"golang.org/x/sys/unix"
)

// canProbe says that silent can tell.
const canProbe = true

// silent reports whether nothing has come from the far side, not even its end. It
// does not wait. If something has, the connection is of no use any more.
func (c *upstreamConn) silent() bool {
	if l, ok := c.Conn.(*laneConn); ok {
		return l.silent()
	}
	if c.raw == nil {
		tcp, ok := c.Conn.(*net.TCPConn)
		if !ok {
			return false
		}
		raw, err := tcp.SyscallConn()
		if err != nil {
			return false
		}
		c.raw = raw
		c.probe = func(fd uintptr) bool {
			_, err := unix.Read(int(fd), c.one[:])
			c.quiet = err == unix.EAGAIN
			return true
		}
	}
	c.quiet = false
	return c.raw.Read(c.probe) == nil && c.quiet
}
