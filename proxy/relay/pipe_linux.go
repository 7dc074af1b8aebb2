package relay

import (
	"sync"

	"golang.org/x/sys/unix"
)

// A pipe costs two descriptors, and its capacity counts against the quota of
// an unprivileged user (16,384 pages by default, see pipe(7)), used or not. All
// together take three quarters of that. Of a stream that comes in small pieces,
// each takes one of a pipe's slots, of which there is one for 4 KiB of capacity.
const (
	pipeSize    = 1 << 20   // bytes; with 512 KiB, a lone fast stream costs a tenth more CPU time
	spareSize   = 512 << 10 // of those above largePipes, or where the kernel allows no more
	minPipeSize = 64 << 10  // a smaller one, as the kernel gives over quota, is slower than copying
	largePipes  = 32        // as many are of pipeSize
	maxPipes    = 64        // open at a time
	keepPipes   = 8         // kept while no direction is bulky
)

// pipe is a kernel pipe, empty whenever it is in the pool.
type pipe struct{ r, w int }

// pipePool lends pipes, at most maxPipes of them.
type pipePool struct {
	open func(size int) *pipe // nil if there is none to be had; replaced by tests

	mu   sync.Mutex // guards what follows
	idle []*pipe
	lent int
}

var pipes = pipePool{open: openPipe}

// get lends an empty pipe, or nil if there is none to be had.
func (p *pipePool) get() *pipe {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.idle) - 1; n >= 0 {
		q := p.idle[n]
		p.idle = p.idle[:n]
		p.lent++
		return q
	}
	if p.lent == maxPipes {
		return nil
	}
	size := pipeSize
	if p.lent >= largePipes { // and none is idle
		size = spareSize
	}
	q := p.open(size)
	if q != nil {
		p.lent++
	}
	return q
}

// put takes a pipe back. One that is not empty is closed: nobody must ever find
// another tunnel's bytes in a pipe.
func (p *pipePool) put(q *pipe, empty bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lent--
	if empty {
		p.idle = append(p.idle, q)
	} else {
		q.close()
	}
	if p.lent == 0 {
		for len(p.idle) > keepPipes {
			n := len(p.idle) - 1
			p.idle[n].close()
			p.idle = p.idle[:n]
		}
	}
}

// openPipe opens a pipe of size bytes, or of what the kernel allows.
func openPipe(size int) *pipe {
	var fd [2]int
	if err := unix.Pipe2(fd[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	q := &pipe{r: fd[0], w: fd[1]}
	for ; size >= spareSize; size /= 2 {
		if _, err := unix.FcntlInt(uintptr(q.w), unix.F_SETPIPE_SZ, size); err == nil {
			return q
		}
	}
	if n, err := unix.FcntlInt(uintptr(q.w), unix.F_GETPIPE_SZ, 0); err != nil || n < minPipeSize {
		q.close()
		return nil
	}
	return q
}

func (q *pipe) close() {
	unix.Close(q.r)
	unix.Close(q.w)
}
