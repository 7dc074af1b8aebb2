package proxy

import (
	"errors"
	"math"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Descriptors that connections of clients leave to others: an eighth of
	// RLIMIT_NOFILE within these bounds. The first half is for connections to
	// destinations, the second for the admin listener, the resolver and files.
	minReserve = 16
	maxReserve = 256

	// calmLooks is how many looks in a row must find plenty of descriptors until
	// there are: one that found few in use may have met a gap.
	calmLooks = 16

	// calmTime is how long accepting must have gone on without a pause until a
	// shortage counts as over: it is logged once, however often accepting pauses.
	calmTime = time.Minute
)

var errDescriptors = errors.New("the process is running out of descriptors (RLIMIT_NOFILE)")

// descriptors watches how many file descriptors are left. A new descriptor gets
// the lowest number that is free, so its number says, without any counting, that
// at least as many are in use.
type descriptors struct {
	limit   int           // RLIMIT_NOFILE at the start; 0: unknown
	freed   chan struct{} // a connection was closed while somebody waits
	waiting atomic.Int32  // listeners that wait for descriptors
	scarce  atomic.Bool   // there were few lately: every connection is looked at
	pauses  atomic.Uint64 // of accepting

	calm    time.Duration // calmTime, but in tests
	start   time.Time     // of the server, with the monotonic clock
	episode atomic.Int64  // when accepting paused last, in ns after start, if that is not over; 0: it is
}

// newDescriptors returns descriptors for the process's limit. Nothing is sized by it.
func newDescriptors() *descriptors {
	d := &descriptors{freed: make(chan struct{}, 1), calm: calmTime, start: time.Now()}
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err == nil {
		d.limit = int(min(uint64(r.Cur), math.MaxInt32)) // numbers of descriptors end there
	}
	return d
}

// reserve returns how many descriptors clients leave to others.
func (d *descriptors) reserve() int {
	return min(max(d.limit/8, minReserve), maxReserve, d.limit/2)
}

// left returns how many descriptors clients may still use if fd is the number of a
// new one.
func (d *descriptors) left(fd int) int {
	if d.limit == 0 {
		return math.MaxInt
	}
	return d.limit - d.reserve() - 1 - fd
}

// enough reports whether a descriptor is free for a client's connection.
func (d *descriptors) enough() bool {
	fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return !isExhausted(err)
	}
	unix.Close(fd)
	return d.left(fd) > 0
}

// spent reports whether c, a connection to a destination, has one of the
// descriptors that are kept for others.
func (d *descriptors) spent(c net.Conn) bool {
	if !d.scarce.Load() {
		return false
	}
	fd := -1
	control(c, func(n uintptr) { fd = int(n) })
	return d.spentAt(fd)
}

// spentAt is spent for the descriptor fd; -1: it is not known.
func (d *descriptors) spentAt(fd int) bool {
	return d.scarce.Load() && fd >= 0 && d.left(fd) < -d.reserve()/2
}

// release says that a connection was closed.
func (d *descriptors) release() {
	if d.waiting.Load() > 0 {
		select {
		case d.freed <- struct{}{}:
		default:
		}
	}
}

// control calls f with c's descriptor, if it has one.
func control(c net.Conn, f func(fd uintptr)) {
	if s, ok := c.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			raw.Control(f)
		}
	}
}

// isExhausted reports whether err says that the process or the system has no
// descriptors left.
func isExhausted(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// A lookout looks at the descriptors of the connections that one listener accepts:
// at few of them while there are plenty.
type lookout struct {
	d    *descriptors
	skip int // connections until the next look
	calm int // looks in a row that found plenty
	fd   int
	read func(uintptr) // sets fd
}

func newLookout(d *descriptors) *lookout {
	l := &lookout{d: d}
	l.read = func(fd uintptr) { l.fd = int(fd) }
	return l
}

// enough reports whether another connection may be accepted after c, and whether
// that ends a shortage.
func (l *lookout) enough(c net.Conn) (enough, recovered bool) {
	if l.skip--; l.skip >= 0 {
		return true, false
	}
	l.fd = -1
	control(c, l.read)
	if l.fd < 0 {
		return true, false
	}
	return l.look(l.fd)
}

// enoughAt is enough for the descriptor fd.
func (l *lookout) enoughAt(fd int) (enough, recovered bool) {
	if l.skip--; l.skip >= 0 {
		return true, false
	}
	return l.look(fd)
}

func (l *lookout) look(fd int) (enough, recovered bool) {
	left, reserve := l.d.left(fd), l.d.reserve()
	if left <= reserve {
		l.calm, l.skip = 0, 0
		l.d.scarce.Store(true)
		return left > 0, false
	}
	if l.calm++; l.calm >= calmLooks {
		l.d.scarce.Store(false)
		last := l.d.episode.Load()
		recovered = last > 0 && time.Since(l.d.start)-time.Duration(last) >= l.d.calm && l.d.episode.CompareAndSwap(last, 0)
	}
	if !l.d.scarce.Load() {
		l.skip = reserve / 8 // with as many to destinations they leave most of the reserve
	}
	return true, recovered
}

// awaitRoom waits after cause has kept a connection from being accepted, or will
// keep the next one: for pause, which it doubles, and until there are descriptors.
func (s *Server) awaitRoom(cause error, pause *time.Duration) {
	d := s.descriptors
	d.waiting.Add(1)
	defer d.waiting.Add(-1)
	d.pauses.Add(1)
	if d.episode.Swap(int64(max(time.Since(d.start), 1))) == 0 {
		s.cfg.Logger.Warn().Err(cause).Str("listener", listener).Msg("cannot accept connections; trying again")
		s.pools.retire() // idle connections are the first to do without
	}
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		t.Reset(*pause)
		*pause = min(2**pause, maxPause)
		select {
		case <-t.C:
		case <-d.freed:
		case <-s.quit:
			return
		}
		if d.enough() {
			return
		}
	}
}
