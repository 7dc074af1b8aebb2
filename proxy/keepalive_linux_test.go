package proxy

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKeepAlive checks that connections have what finds vanished peers: accepted
// ones from their listener, dialled ones by themselves.
func TestKeepAlive(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := listenConfig().Listen(t.Context(), "tcp", address)
		if err != nil {
			t.Logf("no listener on %s: %v", address, err)
			continue
		}
		defer l.Close()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		wantKeepAlive(t, "accepted at "+address, accepted)
	}
	o := listen(t, "127.0.0.1:0")
	dialled, err := (&way{}).dialer.Dial(t.Context(), []netip.AddrPort{o.addr})
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	wantKeepAlive(t, "dialled", dialled)
}

func wantKeepAlive(t *testing.T, what string, c net.Conn) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []struct {
		name                string
		level, option, want int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
		{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4},
	} {
		var got int
		var gerr error
		if err := raw.Control(func(fd uintptr) { got, gerr = unix.GetsockoptInt(int(fd), o.level, o.option) }); err != nil || gerr != nil || got != o.want {
			t.Errorf("%s: %s = %d, %v, %v; want %d", what, o.name, got, err, gerr, o.want)
		}
	}
}
