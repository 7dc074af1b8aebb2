package proxy

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// listenConfig returns how the proxy listens. What finds clients that vanished is
// set on the listener, once, from which Linux hands it on to every connection;
// net would set it on each of them, with four system calls.
//
// TCP_USER_TIMEOUT is left alone: it would cut clients that do not read for a
// while, too, although they are there and say so.
func listenConfig() *net.ListenConfig {
	return &net.ListenConfig{
		KeepAlive: -1, // not by net
		Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			cerr := c.Control(func(fd uintptr) { err = setKeepAlive(int(fd)) })
			if cerr != nil {
				return cerr
			}
			return err
		},
	}
}

func setKeepAlive(fd int) error {
	for _, o := range []struct{ level, option, value int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle.Seconds())},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepAlive.Interval.Seconds())},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			return err
		}
	}
	return nil
}
