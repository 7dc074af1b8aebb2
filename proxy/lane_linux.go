package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// laneBuffer is what a lane reads at a time. A read that fills it is a sign of bulk.
	laneBuffer = 64 << 10

	laneEvents  = 256 // taken from the kernel at a time
	laneAccepts = 64  // connections accepted at a time, before others get their turn

	// A lane looks for time that is over this often, while it has any connection.
	minSweep = 5 * time.Millisecond
	maxSweep = 250 * time.Millisecond
)

// A lane serves plain tunnels, nearly all of what a proxy does, in one goroutine for
// very many: from accepting the client to the end, without a goroutine, a stack, a
// buffer or a timer for each of them (docs/decisions/0012). Whatever it meets that is
// not plain it gives away, with all that it knows, to the goroutines that serve any
// connection; they are also what it is held against in tests.
//
// It waits in epoll_wait(2) of its own, edge-triggered. Its other system calls are made
// without telling Go's scheduler: none of them blocks.
type lane struct {
	s       *Server
	epoll   int
	wake    int // eventfd
	doors   []*door
	slots   []slot  // one for each descriptor, by the number that epoll knows it by
	due     []int64 // by slot: when to look at its passage, in ns since began; dense, as a sweep reads it all
	unused  []uint32
	open    int // passages
	began   time.Time
	events  [laneEvents]unix.EpollEvent
	buf     [laneBuffer]byte
	spare   []*setup
	current *coroutine // runs; nil: the lane itself does
	again   []func()   // to be done after the events that are at hand

	coroutines []*coroutine // that wait for a request
	unneeded   int          // how many of them have all the time since the last sweep
	head       bytes.Reader // what heads reads
	heads      *bufio.Reader

	now     time.Time // when this turn began
	swept   time.Time
	every   time.Duration // between sweeps
	stopped bool

	opening atomic.Int64 // passages that are not tunnels yet

	mu       sync.Mutex // guards what follows
	asked    []func()   // by other goroutines, to be done in the lane's
	signaled bool       // wake says so already
	released bool       // wake is somebody else's
}

// A slot holds what a descriptor in epoll belongs to.
type slot struct {
	p    *passage
	door *door
	conn *laneConn // to a far side, of a coroutine
	side side
	use  uint32 // grows with each use, so that an event for the last one is told from this one's
}

// A door is a listener of a lane.
type door struct {
	fd    int
	slot  uint32
	look  *lookout
	pause time.Duration
}

// side is one of the two connections of a passage.
type side uint8

const (
	clientSide side = iota
	farSide
)

func (s side) other() side { return 1 - s }

const laneInterest = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLPRI | unix.EPOLLRDHUP | unix.EPOLLET&0xffffffff

// newLane returns a lane without doors.
func newLane(s *Server) (*lane, error) {
	l := &lane{s: s, now: time.Now(), heads: bufio.NewReaderSize(nil, minBuffer)}
	l.began = l.now
	l.every = s.shortest() / 8
	l.every = min(max(l.every, minSweep), maxSweep)
	var err error
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if l.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		unix.Close(l.epoll)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	l.take(slot{}) // the first is wake's
	if err := l.watch(l.wake, 0, unix.EPOLLIN|unix.EPOLLET&0xffffffff); err != nil {
		l.release()
		return nil, err
	}
	return l, nil
}

// shortest returns the shortest time that a lane has to keep.
func (s *Server) shortest() time.Duration {
	t := s.cfg.Timeouts
	return min(t.Connect, t.ClientHello, t.RequestHeader, t.Idle)
}

// admit makes the lane accept what comes to l. The descriptor is the lane's own.
func (l *lane) admit(listener *net.TCPListener) error {
	raw, err := listener.SyscallConn()
	if err != nil {
		return err
	}
	fd := -1
	cerr := raw.Control(func(n uintptr) { fd, err = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, cerr); err != nil {
		return err
	}
	// Linux hands it on to every connection.
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	_ = setKeepAlive(fd)
	d := &door{fd: fd, look: newLookout(l.s.descriptors), pause: minPause}
	d.slot = l.take(slot{door: d})
	if err := l.watchDoor(d); err != nil {
		unix.Close(fd)
		l.giveBack(d.slot)
		return err
	}
	l.doors = append(l.doors, d)
	return nil
}

// watchDoor has epoll tell of connections to accept, one lane of many at a time.
func (l *lane) watchDoor(d *door) error {
	return l.watch(d.fd, d.slot, unix.EPOLLIN|unix.EPOLLEXCLUSIVE)
}

// take gives s a number.
func (l *lane) take(s slot) uint32 {
	n := len(l.unused) - 1
	if n < 0 {
		l.slots, l.due = append(l.slots, s), append(l.due, never)
		return uint32(len(l.slots) - 1)
	}
	i := l.unused[n]
	l.unused = l.unused[:n]
	s.use = l.slots[i].use
	l.slots[i] = s
	return i
}

// giveBack frees the number i.
func (l *lane) giveBack(i uint32) {
	l.slots[i], l.due[i] = slot{use: l.slots[i].use + 1}, never
	l.unused = append(l.unused, i)
}

func (l *lane) watch(fd int, i uint32, events uint32) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(i), Pad: int32(l.slots[i].use)}
	if _, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(l.epoll), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0); errno != 0 {
		return os.NewSyscallError("epoll_ctl", errno)
	}
	return nil
}

func (l *lane) unwatch(fd int) {
	var ev unix.EpollEvent
	syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(l.epoll), unix.EPOLL_CTL_DEL, uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
}

// post has f done in the lane's goroutine, soon. It may come from any goroutine. Once
// the lane has ended, nothing is done.
func (l *lane) post(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.released {
		return
	}
	l.asked = append(l.asked, f)
	if !l.signaled {
		l.signaled = true
		one := [8]byte{7: 1}
		_, _ = unix.Write(l.wake, one[:]) // full: it says so already
	}
}

// answer does what was asked for.
func (l *lane) answer() {
	var b [8]byte
	_, _ = unix.Read(l.wake, b[:])
	l.mu.Lock()
	all := l.asked
	l.asked, l.signaled = nil, false
	l.mu.Unlock()
	for _, f := range all {
		f()
	}
}

// run serves until stop is asked for.
func (l *lane) run() {
	defer l.release()
	for !l.stopped {
		n := l.await()
		l.now = time.Now()
		for i := range l.events[:n] {
			l.dispatch(&l.events[i])
		}
		l.doAgain()
		if l.sweeps() && l.now.Sub(l.swept) >= l.every {
			l.swept = l.now
			l.sweep()
			l.dismiss()
		}
	}
}

// doAgain gives their turn to those who had to let others go first. Who asks for it
// meanwhile comes after the next events.
func (l *lane) doAgain() {
	all := l.again
	l.again = nil
	for _, f := range all {
		f()
	}
}

// await returns how many events there are. While there is something to do, the
// scheduler is not told.
func (l *lane) await() int {
	n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(unsafe.Pointer(&l.events[0])), laneEvents, 0, 0, 0)
	if errno == 0 && n > 0 {
		return int(n)
	}
	if len(l.again) > 0 {
		return 0
	}
	timeout := -1
	if l.sweeps() {
		timeout = int(l.every / time.Millisecond)
	}
	m, err := unix.EpollWait(l.epoll, l.events[:], timeout)
	if err != nil { // EINTR
		return 0
	}
	return m
}

// dispatch serves one event. A panic ends the passage that it is about, alone.
func (l *lane) dispatch(ev *unix.EpollEvent) {
	if ev.Fd == 0 {
		l.answer()
		return
	}
	s := &l.slots[ev.Fd]
	if s.use != uint32(ev.Pad) {
		return // its descriptor was closed a moment ago
	}
	if s.door != nil {
		l.accept(s.door)
		return
	}
	if s.conn != nil {
		s.conn.happened(ev.Events)
		return
	}
	p := s.p
	defer l.survive(p)
	p.serve(s.side, ev.Events)
}

// survive, deferred, ends p after a panic.
func (l *lane) survive(p *passage) {
	if v := recover(); v != nil {
		l.s.crashed(v)
		p.crashed()
	}
}

// accept takes in the connections that wait at d.
func (l *lane) accept(d *door) {
	for range laneAccepts {
		var sa unix.RawSockaddrAny
		size := uint32(unix.SizeofSockaddrAny)
		fd, _, errno := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(d.fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)),
			unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		switch errno {
		case 0:
		case unix.EAGAIN:
			return
		case unix.EINTR, unix.ECONNABORTED:
			continue
		default:
			l.s.acceptErrors.Add(1)
			l.rest(d, os.NewSyscallError("accept", errno))
			return
		}
		d.pause = minPause
		enough, recovered := d.look.enoughAt(int(fd))
		if recovered {
			l.s.cfg.Logger.Info().Str("listener", listener).Msg("connections are accepted without a pause again")
		}
		l.enter(int(fd), sockaddr(&sa))
		if !enough {
			l.rest(d, errDescriptors)
			return
		}
	}
}

// rest keeps d from accepting until there is room.
func (l *lane) rest(d *door, cause error) {
	l.unwatch(d.fd)
	l.s.wg.Go(func() {
		l.s.awaitRoom(cause, &d.pause)
		l.post(func() { l.reopen(d) })
	})
}

// reopen has d accept again; later, if the kernel has no memory for that now.
func (l *lane) reopen(d *door) {
	if d.fd < 0 {
		return
	}
	if err := l.watchDoor(d); err != nil {
		l.rest(d, err)
	}
}

// sockaddr returns an address that the kernel gave, IPv4 never mapped.
func sockaddr(sa *unix.RawSockaddrAny) netip.AddrPort {
	switch sa.Addr.Family {
	case unix.AF_INET:
		a := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), hostOrder(a.Port))
	case unix.AF_INET6:
		a := (*unix.RawSockaddrInet6)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), hostOrder(a.Port))
	}
	return netip.AddrPort{}
}

// hostOrder turns a port between the order of the network and the machine's, either way.
func hostOrder(p uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&p))
	return uint16(b[0])<<8 | uint16(b[1])
}

// never is a time that does not come.
const never = math.MaxInt64

// sweeps reports whether there is anything to sweep.
func (l *lane) sweeps() bool { return l.open > 0 || len(l.coroutines) > 0 }

// sweep looks at the passages whose time has come, and touches no other: there may be
// very many, and each is somewhere else in memory.
func (l *lane) sweep() {
	now := int64(l.now.Sub(l.began))
	for i := 0; i < len(l.due); i++ {
		if l.due[i] <= now {
			if c := l.slots[i].conn; c != nil {
				c.timeOut()
			} else {
				l.do(l.slots[i].p, (*passage).overdue)
			}
		}
	}
}

// closeDoors ends accepting, soon.
func (l *lane) closeDoors() { l.post(l.closeDoorsNow) }

func (l *lane) closeDoorsNow() {
	for _, d := range l.doors {
		if d.fd >= 0 {
			l.unwatch(d.fd) // others may have the socket, too: it may stay open
			unix.Close(d.fd)
			d.fd = -1
			l.giveBack(d.slot)
			l.s.wg.Done()
		}
	}
	l.each(func(p *passage) {
		if p.phase == readingHead { // nobody has asked for anything
			p.leave()
		}
	})
}

// cutAll ends what is not a tunnel yet, soon. Tunnels are cut by themselves.
func (l *lane) cutAll() {
	l.post(func() {
		l.each(func(p *passage) {
			if p.phase != relaying {
				p.cutShort()
			}
		})
	})
}

// stop ends the lane, in which there is nothing any more.
func (l *lane) stop() { l.post(func() { l.stopped = true }) }

func (l *lane) each(f func(*passage)) {
	for i := range l.slots {
		if s := l.slots[i]; s.p != nil && s.side == clientSide {
			l.do(s.p, f)
		}
	}
}

// do calls f with p. A panic ends p alone.
func (l *lane) do(p *passage, f func(*passage)) {
	defer l.survive(p)
	f(p)
}

func (l *lane) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.released, l.asked = true, nil
	for _, c := range l.coroutines {
		c.stop()
	}
	unix.Close(l.epoll)
	unix.Close(l.wake)
}

func (s *Server) openLanes() {
	for range s.maxLanes {
		l, err := newLane(s)
		if err != nil {
			s.cfg.Logger.Warn().Err(err).Msg("connections are served by goroutines of their own")
			return
		}
		s.lanes = append(s.lanes, l)
	}
}

// useLanes has the lanes accept what comes to listener, if they can.
func (s *Server) useLanes(listener net.Listener) bool {
	t, ok := listener.(*net.TCPListener)
	if !ok || s.maxLanes == 0 {
		return false
	}
	if len(s.lanes) == 0 {
		s.openLanes()
	}
	if len(s.lanes) == 0 {
		return false
	}
	for i, l := range s.lanes {
		if err := l.admit(t); err != nil {
			s.cfg.Logger.Warn().Err(err).Msg("connections are accepted by fewer goroutines")
			if i == 0 {
				return false
			}
			break
		}
		s.wg.Add(1) // for the door
	}
	listener.Close() // the lanes have it
	return true
}

func (s *Server) startLanes() {
	for _, l := range s.lanes {
		s.laneWG.Go(l.run)
	}
}

// eachLane calls f with every lane.
func (s *Server) eachLane(f func(*lane)) {
	for _, l := range s.lanes {
		f(l)
	}
}

// inLanes returns how many connections there are in lanes that are not tunnels.
func (s *Server) inLanes() (n int) {
	for _, l := range s.lanes {
		n += int(l.opening.Load())
	}
	return n
}

// What follows are system calls on descriptors that do not block.

// readFD and writeFD return 0 and the error, or what was moved. EAGAIN is an error.
func readFD(fd int, b []byte) (int, error)  { return moveFD(unix.SYS_READ, fd, b) }
func writeFD(fd int, b []byte) (int, error) { return moveFD(unix.SYS_WRITE, fd, b) }

// lastWordsFD is writeFD before shutdownFD, with which the kernel sends b: the end goes in
// the same segment.
func lastWordsFD(fd int, b []byte) (int, error) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_MORE|unix.MSG_NOSIGNAL, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func moveFD(call uintptr, fd int, b []byte) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

func closeFD(fd int)    { syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }
func shutdownFD(fd int) { syscall.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0) }

func setsockopt(fd, level, option, value int) error {
	v := int32(value)
	if _, _, errno := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), uintptr(unsafe.Pointer(&v)), 4, 0); errno != 0 {
		return errno
	}
	return nil
}

// pendingError returns what became of a connection attempt, or of a connection.
func pendingError(fd int) error {
	var v, size int32 = 0, 4
	if _, _, errno := syscall.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_ERROR, uintptr(unsafe.Pointer(&v)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return errno
	}
	if v != 0 {
		return syscall.Errno(v)
	}
	return nil
}

// dialFD begins to connect a new socket to a.
func dialFD(a netip.AddrPort) (fd int, err error) {
	family, size := uintptr(unix.AF_INET6), uintptr(unix.SizeofSockaddrInet6)
	var v4 unix.RawSockaddrInet4
	var v6 unix.RawSockaddrInet6
	to := unsafe.Pointer(&v6)
	if a.Addr().Is4() {
		family, size, to = unix.AF_INET, unix.SizeofSockaddrInet4, unsafe.Pointer(&v4)
		v4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: hostOrder(a.Port()), Addr: a.Addr().As4()}
	} else {
		v6 = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: hostOrder(a.Port()), Addr: a.Addr().As16()}
	}
	n, _, errno := syscall.RawSyscall(unix.SYS_SOCKET, family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if errno != 0 {
		return -1, os.NewSyscallError("socket", errno)
	}
	fd = int(n)
	_ = setsockopt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	_, _, errno = syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(to), size)
	runtime.KeepAlive(&v4)
	runtime.KeepAlive(&v6)
	if errno != 0 && errno != unix.EINPROGRESS && errno != unix.EINTR {
		closeFD(fd)
		return -1, os.NewSyscallError("connect", errno)
	}
	return fd, nil
}

// connOf makes a connection of package net of fd, which it takes over.
func connOf(fd int) (*net.TCPConn, error) {
	f := os.NewFile(uintptr(fd), "")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, errors.New("no TCP socket")
	}
	t.SetKeepAliveConfig(keepAlive)
	return t, nil
}
