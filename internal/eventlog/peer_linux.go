package eventlog

import (
	"errors"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// acknowledged returns how many bytes written to a TCP connection its other side has
// acknowledged, whether or not it still stands.
func acknowledged(c net.Conn) (n uint64, ok bool) {
	tcp, is := c.(*net.TCPConn)
	if !is {
		return 0, false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return 0, false
	}
	var info *unix.TCPInfo
	if cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); cerr != nil || err != nil {
		return 0, false
	}
	return max(info.Bytes_acked, 1) - 1, true // the kernel counts the SYN
}

// ended reports whether the other side of a stream has closed it. What it has said,
// which a syslog receiver has no reason to, is thrown away.
func ended(c net.Conn) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	var b [512]byte
	var n int
	if cerr := raw.Control(func(fd uintptr) { n, _, err = unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT) }); cerr != nil {
		return true
	}
	if err != nil {
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	}
	return n == 0
}
