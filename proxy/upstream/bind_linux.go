package upstream

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// bindLate lets the kernel choose the port of a bound socket when it connects.
// Otherwise every connection from one source address needs a port of its own,
// about 28,000 in all; this way only those to one destination do. The option does
// the same for IPv6. A kernel without it binds as ever.
func bindLate(c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	})
}
