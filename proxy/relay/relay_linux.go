package relay

import (
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// turn is how many chunks in a row must speak against the present way of
	// moving bytes (full ones against copying, small ones against splicing)
	// before a direction changes it.
	turn = 4

	// How linger tries.
	lingerTries = 16
	maxVain     = 4
	lingerAgain = 64

	spliceFlags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK
)

// splice is a variable for the tests, which make it fail.
var splice = quietSplice

// quiet is how many splices are under way that the scheduler has not been told of.
var quiet atomic.Int32

// bulky is how many streams are to be spliced, at the moment.
var bulky atomic.Int32

// quietSplice is splice(2) for descriptors that never wait. It does without telling
// the scheduler, as long as others have half of the processors for themselves: of a
// call that it knows of, the scheduler's monitor takes the processor away after
// 20 µs, for nobody, and for that looks all the time, which costs a lone stream a
// tenth of its CPU time or more. A pipe full takes about half a millisecond.
func quietSplice(from int, _ *int64, to int, _ *int64, limit, flags int) (int64, error) {
	defer quiet.Add(-1)
	if int(quiet.Add(1)) > runtime.GOMAXPROCS(0)/2 {
		return unix.Splice(from, nil, to, nil, limit, flags)
	}
	n, _, errno := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(limit), uintptr(flags))
	if errno != 0 {
		return 0, errno
	}
	return int64(n), nil
}

// move copies between two TCP connections without holding anything while it
// waits, and leaves other pairs to copy.
func (h *half) move() (at side, err error) {
	src, ok := h.src.(*net.TCPConn)
	dst, ok2 := h.dst.(*net.TCPConn)
	if !ok || !ok2 {
		return h.copy()
	}
	s := &stream{half: h}
	if s.src, err = src.SyscallConn(); err != nil {
		return h.from, err
	}
	if s.dst, err = dst.SyscallConn(); err != nil {
		return h.to, err
	}
	at, err = s.run()
	s.setBulk(false)
	s.release()
	return at, err
}

// CopyN moves the next n bytes of src to dst, more than none, in the way of Relay, and
// returns how many dst took. If it was fewer the error says why, toDst that it is about
// dst, and the connections are only good for Close. Of o, Idle bounds each wait for
// either, and Down counts. Who closes src or dst meanwhile ends it, or has to close both
// to be sure.
func CopyN(dst, src *net.TCPConn, n int64, o Options) (moved int64, toDst bool, err error) {
	t := newTunnel(dst, src, o)
	h := &t.down
	h.left = n
	at, err := h.move()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.running = 0
	if t.timer != nil {
		t.timer.Stop()
	}
	switch {
	case t.end == IdleTimeout:
		err = os.ErrDeadlineExceeded
	case err == nil && h.n < n:
		err = io.ErrUnexpectedEOF
	}
	return h.n, at == h.to, err
}

// stream is one direction between two TCP connections. It alternates between
// fill, which waits for src to become readable and takes what is there into
// either the buffer or the pipe, and drain, which waits until dst has taken all
// of it. Both are callbacks of syscall.RawConn: they run while the descriptor
// cannot be closed, and returning false waits for the next chance.
//
// The waiting goroutine's stack must stay within the 2 KiB that it starts with;
// that is why nothing here has large frames or calls deep.
type stream struct {
	*half
	src, dst syscall.RawConn

	buf    *[bufSize]byte // nil while waiting for src
	data   []byte         // the part of buf that dst has not taken yet
	pipe   *pipe          // nil while waiting for src, and while copying
	inPipe int            // bytes in pipe

	bulk     bool // full chunks are the rule: splice, if there is a pipe
	contrary int  // chunks in a row that spoke against bulk
	noSplice bool // the kernel does not splice these sockets
	unpaced  bool // unpace was called
	inVain   uint // times in a row that linger found nothing, or was not tried

	eof bool
	err error // what fill or drain met
}

func (s *stream) run() (at side, err error) {
	fill, drain := s.fill, s.drain
	s.data, s.first = s.first, nil
	for {
		if len(s.data) == 0 { // as it is, but at first
			if err := s.src.Read(fill); err != nil {
				return s.from, err
			}
			if s.err != nil {
				return s.from, opError("read", s.half.src, s.err)
			}
			if s.eof {
				return s.from, nil
			}
			s.t.touch()
		}
		if err := s.dst.Write(drain); err != nil {
			return s.to, err
		}
		if s.err != nil {
			return s.to, opError("write", s.half.dst, s.err)
		}
		if s.left == 0 {
			return s.from, nil
		}
	}
}

// fill takes what src has, up to a buffer or a pipe full.
func (s *stream) fill(fd uintptr) (done bool) {
	if s.bulk && s.borrowPipe() {
		n, err := spliced(int(fd), s.pipe.w, int(min(pipeSize, s.left)))
		switch {
		case n > 0:
			s.inPipe = n
			s.weigh(n)
			return true
		case err == unix.EAGAIN && s.linger(int(fd)):
			return true
		case err == unix.EAGAIN:
			s.release()
			return false
		case unsupported(err):
			s.noSplice = true
		case err != nil:
			s.err = err
			return true
		}
		// Unsupported, the end of the stream, or urgent data. The last two
		// look alike to splice, but not to read.
		s.setBulk(false)
	}
	s.returnPipe()
	n, err := s.read(int(fd), int(min(bufSize, s.left)))
	if err == unix.EAGAIN {
		s.release()
		return false
	}
	s.eof = n == 0
	s.err = err
	s.weigh(n)
	return true
}

// linger tries again for some microseconds to fill the pipe, before the goroutine parks: of
// two processes that pass a stream on, the other one is about to say more, and it is
// parking and waking that takes most of the time then. Other threads go first. With many
// streams there is always one that is ready. A stream for which it was of no use lately,
// because it comes from afar, is tried now and then.
func (s *stream) linger(fd int) bool {
	if s.contrary > 0 || int(bulky.Load()) > max(1, runtime.GOMAXPROCS(0)/2) {
		return false
	}
	if s.inVain >= maxVain && s.inVain%lingerAgain != 0 {
		s.inVain++
		return false
	}
	for range lingerTries {
		syscall.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		if n, _ := spliced(fd, s.pipe.w, int(min(pipeSize, s.left))); n > 0 {
			s.inPipe, s.inVain = n, 0
			s.weigh(n)
			return true
		}
	}
	s.inVain++
	return false
}

// drain gives dst all that fill took.
func (s *stream) drain(fd uintptr) (done bool) {
	for len(s.data) > 0 || s.inPipe > 0 {
		n, err := s.put(int(fd))
		if err == unix.EAGAIN {
			return false
		}
		if err != nil && err != unix.EINTR {
			s.err = err
			return true
		}
		s.count(n)
	}
	return true
}

// put makes one system call's worth of progress towards dst.
func (s *stream) put(fd int) (n int, err error) {
	if len(s.data) > 0 {
		n, err = unix.Write(fd, s.data)
		n = max(n, 0)
		s.data = s.data[n:]
		return n, err
	}
	if !s.noSplice {
		n, err = spliced(s.pipe.r, fd, s.inPipe)
		if !unsupported(err) {
			s.inPipe -= n
			return n, err
		}
		s.noSplice = true
		s.setBulk(false)
	}
	n, err = s.read(s.pipe.r, bufSize) // dst cannot splice: take the bytes out again
	s.inPipe -= n
	return 0, err
}

// read reads limit bytes at most into the buffer.
func (s *stream) read(fd, limit int) (n int, err error) {
	if s.buf == nil {
		s.buf = buffers.Get().(*[bufSize]byte)
	}
	for {
		n, err = unix.Read(fd, s.buf[:limit])
		if err != unix.EINTR {
			break
		}
	}
	n = max(n, 0)
	s.data = s.buf[:n]
	return n, err
}

// spliced moves up to limit bytes from one descriptor to another.
func spliced(from, to, limit int) (n int, err error) {
	for {
		m, err := splice(from, nil, to, nil, limit, spliceFlags)
		if err != unix.EINTR {
			return int(max(m, 0)), err
		}
	}
}

// weigh decides from the size of a chunk how the next one is to be moved.
func (s *stream) weigh(n int) {
	s.left -= int64(n)
	if full := n >= bufSize; full == s.bulk || s.noSplice {
		s.contrary = 0
		return
	}
	if s.contrary++; s.contrary == turn {
		s.setBulk(!s.bulk)
		s.contrary = 0
		if s.bulk && !s.unpaced {
			s.unpaced = true
			s.unpace()
		}
	}
}

// unpace has dst not be paced if its peer is on this host, as beside a sidecar. BBR,
// where it is the host's choice, sends by timers, at a rate that it measures; for
// memory that is half the speed at twice the CPU time. Reno, which every kernel has
// and every user may ask for, sends what fits the receiver's window.
func (s *stream) unpace() {
	peer, ok := s.half.dst.RemoteAddr().(*net.TCPAddr)
	if !ok || !peer.IP.IsLoopback() {
		return
	}
	_ = s.dst.Control(func(fd uintptr) { // without it all is as before
		if algorithm, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION); err == nil && strings.HasPrefix(algorithm, "bbr") {
			_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
		}
	})
}

// setBulk says whether to splice.
func (s *stream) setBulk(bulk bool) {
	if bulk == s.bulk {
		return
	}
	s.bulk = bulk
	if bulk {
		bulky.Add(1)
	} else {
		bulky.Add(-1)
	}
}

// borrowPipe exchanges the buffer for a pipe. It reports false if there is no
// pipe; then copying goes on, until turn more full chunks ask again.
func (s *stream) borrowPipe() bool {
	if s.pipe != nil {
		return true
	}
	if s.pipe = pipes.get(); s.pipe == nil {
		s.setBulk(false)
		return false
	}
	s.returnBuffer()
	return true
}

func (s *stream) returnPipe() {
	if s.pipe != nil {
		pipes.put(s.pipe, s.inPipe == 0)
		s.pipe, s.inPipe = nil, 0
	}
}

func (s *stream) returnBuffer() {
	if s.buf != nil {
		buffers.Put(s.buf)
		s.buf, s.data = nil, nil
	}
}

// release gives back all that s borrowed.
func (s *stream) release() {
	s.returnPipe()
	s.returnBuffer()
}

// unsupported reports whether splice(2) refused the sockets themselves. It has
// then moved nothing.
func unsupported(err error) bool {
	return err == unix.EINVAL || err == unix.ENOSYS || err == unix.EPERM
}

// opError dresses err like the errors of package net.
func opError(op string, c net.Conn, err error) error {
	return &net.OpError{
		Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(),
		Err: os.NewSyscallError(op, err),
	}
}

// awaitReset watches src, whose stream has ended, for a reset, and ends the
// tunnel if one comes: nobody reads src any more, and the other direction would
// notice only when it had something to write. It returns when the tunnel ends.
func (h *half) awaitReset() {
	src, ok := h.src.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := src.SyscallConn()
	if err != nil {
		return
	}
	var broken error
	raw.Read(func(fd uintptr) bool {
		broken = ResetError(int(fd))
		return broken != nil
	})
	if broken != nil {
		h.t.fail(h.from, opError("read", src, broken))
		h.t.cut()
	}
}

// ResetError returns why the connection of the socket fd is broken, or nil. It asks poll(2)
// first, because SO_ERROR also returns (and clears) passing ICMP errors.
func ResetError(fd int) error {
	p := [1]unix.PollFd{{Fd: int32(fd)}}
	if _, err := unix.Poll(p[:], 0); err != nil || p[0].Revents&unix.POLLERR == 0 {
		return nil
	}
	if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno != 0 {
		return unix.Errno(errno)
	}
	return unix.ECONNRESET
}
