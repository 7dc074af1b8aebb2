package dnsfilter

import (
	"errors"
	"net"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// roomy is a socket in which there is room again just before Write begins: nobody says so
// later.
type roomy struct {
	syscall.RawConn
	fd    int
	drain func()
}

func (r roomy) Write(f func(fd uintptr) bool) error {
	r.drain()
	if !f(uintptr(r.fd)) {
		return errors.New("waits for what has happened already")
	}
	return nil
}

func TestSendDoesNotMissThatThereIsRoom(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	packet := make([]byte, 100)
	full := false
	for range 1 << 16 {
		if err = unix.Send(pair[0], packet, unix.MSG_DONTWAIT); err != nil {
			full = errors.Is(err, unix.EAGAIN)
			break
		}
	}
	if !full {
		t.Fatalf("the socket does not fill up: %v", err)
	}
	drain := func() {
		for range 1 << 16 {
			if _, _, err := unix.Recvfrom(pair[1], packet, unix.MSG_DONTWAIT); err != nil {
				return
			}
		}
	}
	r := &udpReader{u: &udpSocket{raw: roomy{fd: pair[0], drain: drain}}, ready: 2}
	for k := range r.ready {
		r.outv[k].Base = &r.written[0]
		r.outv[k].SetLen(12)
		r.out[k].hdr.Iov = &r.outv[k]
		r.out[k].hdr.SetIovlen(1)
	}
	if err := r.send(uintptr(pair[0])); err != nil || r.sent != 2 {
		t.Errorf("send() = %v after %d answers", err, r.sent)
	}
}

// failing is a socket on which reading fails with one error after the other.
type failing struct {
	syscall.RawConn
	r     *udpReader
	errs  []syscall.Errno
	reads int
}

func (f *failing) Read(func(uintptr) bool) error {
	f.r.fail(f.errs[f.reads])
	f.reads++
	return nil
}

// The kernel's lack of memory is over in a moment: it does not end the resolver.
func TestUDPSurvivesALackOfMemory(t *testing.T) {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := NewServer(newResolver(t, Config{Upstreams: []string{"127.0.0.1:9"}}, nil))
	raw := &failing{errs: []syscall.Errno{unix.ENOMEM, unix.ENOBUFS, unix.ENOMEM, unix.EBADF}}
	raw.r = &udpReader{s: s, u: &udpSocket{conn: c, raw: raw}}
	if err := raw.r.run(); !errors.Is(err, unix.EBADF) || raw.reads != 4 {
		t.Errorf("run() = %v after %d reads", err, raw.reads)
	}
}
