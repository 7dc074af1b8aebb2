package proxy

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// hasLeft reports whether the peer of c has closed its side, and has said nothing
// that was not read yet: such a client neither says nor, as a rule, hears anything
// any more. One that speaks TLS says goodbye first, which does not count. With more,
// it has said something that waits to be answered, and only a reset counts.
func hasLeft(c syscall.RawConn, secure, more bool) (left bool) {
	_ = c.Control(func(fd uintptr) { left = hasLeftFD(int(fd), secure, more) }) // an error: it was closed here
	return left
}

// hasLeftFD is hasLeft for a descriptor.
func hasLeftFD(fd int, secure, more bool) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if n, err := unix.Poll(p, 0); err != nil || n == 0 {
		return false
	}
	if p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0 || secure && !more {
		return true
	}
	if more {
		return false
	}
	n, _, err := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
	return err == nil && n == 0
}
