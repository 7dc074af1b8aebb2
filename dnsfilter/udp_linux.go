package dnsfilter

import (
	"context"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sallyport/policy"
)

const (
	batch      = 64      // packets read, and answered, with one system call
	recvBuffer = 4 << 20 // bytes of queries that wait in the kernel, as far as it allows
	oobSize    = 64      // bytes of control messages: the address asked
	usualSize  = 512     // bytes of a query that is not unusually long
)

// A udpSocket is one of the sockets of an address. The kernel divides the clients
// among them.
type udpSocket struct {
	conn *net.UDPConn
	raw  syscall.RawConn
	any  bool // bound to all addresses: answers must leave from the one asked
}

// shareUDP returns the sockets that share the address of first, first among them: one
// for each thread that runs Go code. It takes ownership of first.
func shareUDP(first *net.UDPConn) ([]*udpSocket, error) {
	sockets, err := shareSockets(first)
	if err != nil {
		for _, u := range sockets {
			u.conn.Close()
		}
		return nil, err
	}
	return sockets, nil
}

func shareSockets(first *net.UDPConn) ([]*udpSocket, error) {
	u, err := newUDPSocket(first)
	if err != nil {
		first.Close()
		return nil, err
	}
	sockets := []*udpSocket{u}
	addr := first.LocalAddr().(*net.UDPAddr)
	// The first was bound without SO_REUSEPORT, so that it found the address free.
	// Only with it can others be bound beside it.
	reuse := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { return setOption(c, unix.SOL_SOCKET, unix.SO_REUSEPORT) }}
	if n := runtime.GOMAXPROCS(0); n > 1 {
		if err := setOption(u.raw, unix.SOL_SOCKET, unix.SO_REUSEPORT); err != nil {
			return sockets, err
		}
		network := "udp"
		if addr.IP.To4() != nil {
			network = "udp4"
		}
		for range n - 1 {
			c, err := reuse.ListenPacket(context.Background(), network, addr.String())
			if err != nil {
				return sockets, err
			}
			u, err := newUDPSocket(c.(*net.UDPConn))
			if err != nil {
				c.Close()
				return sockets, err
			}
			sockets = append(sockets, u)
		}
	}
	return sockets, nil
}

func setOption(c syscall.RawConn, level, option int) error {
	var failed error
	if err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), level, option, 1) }); err != nil {
		return err
	}
	return os.NewSyscallError("setsockopt", failed)
}

func newUDPSocket(c *net.UDPConn) (*udpSocket, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	_ = c.SetReadBuffer(recvBuffer) // what the kernel allows of it
	u := &udpSocket{conn: c, raw: raw, any: c.LocalAddr().(*net.UDPAddr).IP.IsUnspecified()}
	if !u.any {
		return u, nil
	}
	// On a socket for both families the first covers IPv4 too.
	if setOption(raw, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO) != nil {
		err = setOption(raw, unix.IPPROTO_IP, unix.IP_PKTINFO)
	}
	return u, err
}

// mmsghdr is struct mmsghdr (recvmmsg(2)).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// A message is a packet with where it comes from, or goes to.
type message struct {
	name    unix.RawSockaddrInet6 // or RawSockaddrInet4 at its beginning
	namelen uint32
	oob     [oobSize]byte
	ooblen  int
}

// addr returns the address in m.
func (m *message) addr() netip.AddrPort {
	raw := (*[unix.SizeofSockaddrInet6]byte)(unsafe.Pointer(&m.name))
	port := uint16(raw[2])<<8 | uint16(raw[3])
	if m.name.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw[4:8])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(m.name.Addr).Unmap(), port)
}

// reflect makes the control messages of a query those of its answer: it leaves from
// the address that was asked, by whatever way is the way back.
func (m *message) reflect() {
	if m.ooblen < unix.SizeofCmsghdr {
		m.ooblen = 0
		return
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&m.oob))
	data := m.oob[unix.CmsgLen(0):]
	switch {
	case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO:
		clear(data[16:20]) // ipi6_ifindex
	case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO:
		clear(data[0:4]) // ipi_ifindex
	default:
		m.ooblen = 0
	}
}

// A udpReader reads queries from a socket in batches and answers at once what can be.
type udpReader struct {
	s      *Server
	u      *udpSocket
	fast   *fast
	failed error // of the socket
	short  bool  // the kernel had no memory: it may have some in a moment

	in, out     [batch]mmsghdr
	inv         [batch][2]unix.Iovec
	outv        [batch]unix.Iovec
	msgs        [batch]message
	outcomes    [batch]outcome
	from        [batch]int                        // which query the answer is to
	read        [batch][usualSize + 64]byte       // close together, but not so that they push each other out of the processor's cache
	rest        [batch][readSize - usualSize]byte // of long queries
	long        [readSize]byte                    // a long query as a whole
	written     [batch * maxEDNSSize]byte         // answers, one after the other
	sent, ready int
	up          forwarder
}

// serveUDP answers what comes in by u until the server shuts down.
func (s *Server) serveUDP(u *udpSocket) error {
	r := &udpReader{s: s, u: u, fast: newFast(s)}
	r.up.init()
	for i := range batch {
		r.inv[i][0].Base, r.inv[i][1].Base = &r.read[i][0], &r.rest[i][0]
		r.inv[i][0].SetLen(usualSize)
		r.inv[i][1].SetLen(readSize - usualSize)
		r.in[i].hdr.Iov, r.out[i].hdr.Iov = &r.inv[i][0], &r.outv[i]
		r.in[i].hdr.SetIovlen(2)
		r.out[i].hdr.SetIovlen(1)
	}
	return r.run()
}

// run answers until the server shuts down or the socket fails.
func (r *udpReader) run() error {
	s, u := r.s, r.u
	for {
		err := u.raw.Read(r.receive)
		if isClosed(s.down) {
			return nil
		}
		if err == nil {
			err = r.failed
		}
		if err == nil && r.short {
			if r.short = false; !wait(acceptPause, s.down) {
				return nil
			}
			continue
		}
		if err != nil {
			return &net.OpError{Op: "read", Net: "udp", Addr: u.conn.LocalAddr(), Err: err}
		}
	}
}

// receive answers what has arrived at the socket. It returns true if that has to end,
// false if there is nothing left: the runtime calls it again when more arrives.
func (r *udpReader) receive(fd uintptr) bool {
	for !isClosed(r.s.down) {
		for i := range batch {
			h := &r.in[i].hdr
			h.Name, h.Namelen = (*byte)(unsafe.Pointer(&r.msgs[i].name)), unix.SizeofSockaddrInet6
			if r.u.any {
				h.Control = &r.msgs[i].oob[0]
				h.SetControllen(oobSize)
			}
		}
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.in)), batch, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
		case unix.EAGAIN:
			return false
		case unix.EINTR, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH: // an earlier answer did not arrive
			continue
		default:
			r.fail(errno)
			return true
		}
		r.answer(fd, int(n))
		if n < batch { // the queue was empty: what comes from now on wakes this up
			return false
		}
		runtime.Gosched() // queries that take longer, and who writes the log, have their turn under load too
	}
	return true
}

// fail notes that reading failed: for the moment, or for good.
func (r *udpReader) fail(errno syscall.Errno) {
	if errno == unix.ENOMEM || errno == unix.ENOBUFS {
		r.short = true
		return
	}
	r.failed = os.NewSyscallError("recvmmsg", errno)
}

// answer answers the first n packets.
func (r *udpReader) answer(fd uintptr, n int) {
	now := r.s.cfg.Now()
	r.s.resolver.refreshHosts()
	r.ready = 0
	used := 0 // of written; no answer is longer than maxEDNSSize
	for i := range n {
		m := &r.msgs[i]
		m.namelen, m.ooblen = r.in[i].hdr.Namelen, int(r.in[i].hdr.Controllen)
		m.reflect()
		packet := r.packet(i)
		k := r.ready
		p, ok := r.fast.answer(r.written[used:used:used+maxEDNSSize], packet, client{addr: m.addr(), udp: true}, now, &r.outcomes[k])
		if !ok {
			r.miss(m, packet, now, &r.outcomes[k].d)
			continue
		}
		if len(p) == 0 {
			continue
		}
		r.outv[k].Base = &p[0]
		r.outv[k].SetLen(len(p))
		h := &r.out[k].hdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&m.name)), m.namelen
		h.Control = &m.oob[0]
		h.SetControllen(m.ooblen)
		r.from[k] = i
		r.ready++
		used += len(p)
	}
	r.up.flush()
	for r.sent = 0; r.sent < r.ready; {
		first := r.sent
		err := r.send(fd)
		end := r.s.cfg.Now()
		for k := first; k < r.sent; k++ {
			r.fast.observe(&r.outcomes[k], r.read[r.from[k]][:], now, end, nil)
		}
		if err != nil {
			r.fast.observe(&r.outcomes[r.sent], r.read[r.from[r.sent]][:], now, end, err)
			r.sent++
		}
	}
}

// packet returns packet i, until the next.
func (r *udpReader) packet(i int) []byte {
	n := int(r.in[i].n)
	if n <= usualSize {
		return r.read[i][:n]
	}
	copy(r.long[:], r.read[i][:usualSize])
	copy(r.long[usualSize:n], r.rest[i][:])
	return r.long[:n]
}

// send sends answers from sent on, which it moves on by those that are sent. The
// error is that of the next one.
func (r *udpReader) send(fd uintptr) error {
	n, errno := r.trySend(fd)
	if errno == unix.EAGAIN { // the kernel's buffer is full
		var err error
		if n, errno, err = r.sendLater(); err != nil {
			return err
		}
	}
	if errno != 0 {
		return os.NewSyscallError("sendmmsg", errno)
	}
	r.sent += n
	return nil
}

// trySend is send as far as it takes no waiting. It returns how many were sent.
func (r *udpReader) trySend(fd uintptr) (int, syscall.Errno) {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&r.out[r.sent])), uintptr(r.ready-r.sent), unix.MSG_DONTWAIT, 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// sendLater is trySend once there is room. It tries inside Write, before that waits: what
// Write was told of room before it began, it has forgotten.
func (r *udpReader) sendLater() (n int, errno syscall.Errno, err error) {
	err = r.u.raw.Write(func(fd uintptr) bool {
		n, errno = r.trySend(fd)
		return errno != unix.EAGAIN
	})
	return n, errno, err
}

// A udpQuery is a query that takes longer, with the way back.
type udpQuery struct {
	s      *Server
	next   *udpQuery // of those that wait for the same answer
	entry  *entry    // that answer, once it is known
	start  time.Time
	u      *udpSocket
	m      message
	size   int
	d      policy.Decision // if it missed
	missed bool            // as in fast
	proven bool            // the client is
	packet [readSize]byte
}

var udpQueries = sync.Pool{New: func() any { return new(udpQuery) }}

// miss has a copy of packet, which the fast path has left, answered later, or drops it
// if too many are under way. Every query over UDP that upstreams may be asked for comes
// through here. If the fast path knows nothing of it, it has been decided as d says.
func (r *udpReader) miss(m *message, packet []byte, now time.Time, d *policy.Decision) {
	s := r.s
	source := m.addr().Addr()
	proven := r.fast.proven(client{addr: m.addr(), udp: true}, now)
	if !s.enter(source, proven) {
		s.counts.dropped.Add(1)
		return
	}
	q := udpQueries.Get().(*udpQuery)
	q.s, q.next, q.entry, q.start = s, nil, nil, now
	q.u, q.m, q.size, q.missed = r.u, *m, copy(q.packet[:], packet), r.fast.missed
	if q.proven = proven; q.missed {
		q.d = *d
	}
	s.slow.Add(1)
	if q.missed && s.cfg.Cache.Size > 0 && r.up.forward(q, key{r.fast.name, r.fast.q.Type, r.fast.q.DO, r.fast.q.CD}) {
		return
	}
	go s.answerUDP(q)
}

// answerUDP answers q, and is the end of it.
func (s *Server) answerUDP(q *udpQuery) {
	c, packet := client{addr: q.m.addr(), udp: true, back: q, counted: q.missed}, q.packet[:q.size]
	if e := q.entry; e == nil {
		s.serveLater(s.life, c, packet, q.missed)
	} else if !s.settleLater(c, packet, q.start, e) {
		s.serve(s.life, c, packet)
	}
	q.done()
}

// done frees q, which has been answered.
func (q *udpQuery) done() {
	s, source, proven := q.s, q.m.addr().Addr(), q.proven
	q.s, q.entry, q.u, q.d = nil, nil, nil, policy.Decision{}
	udpQueries.Put(q)
	s.leave(source, proven)
	s.slow.Done()
}

// send implements the way back of a client.
func (q *udpQuery) send(answer []byte) error {
	h := unix.Msghdr{Name: (*byte)(unsafe.Pointer(&q.m.name)), Namelen: q.m.namelen}
	iov := unix.Iovec{Base: &answer[0]}
	iov.SetLen(len(answer))
	h.Iov = &iov
	h.SetIovlen(1)
	if q.m.ooblen > 0 {
		h.Control = &q.m.oob[0]
		h.SetControllen(q.m.ooblen)
	}
	var errno syscall.Errno
	err := q.u.raw.Write(func(fd uintptr) bool {
		for {
			_, _, errno = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&h)), unix.MSG_DONTWAIT)
			if errno != unix.EINTR {
				return errno != unix.EAGAIN
			}
		}
	})
	if err == nil && errno != 0 {
		err = os.NewSyscallError("sendmsg", errno)
	}
	if err != nil {
		return &net.OpError{Op: "write", Net: "udp", Source: q.u.conn.LocalAddr(), Addr: net.UDPAddrFromAddrPort(q.m.addr()), Err: err}
	}
	return nil
}
