package proxy

import (
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

// streamChunk is how many bytes are taken from a stream at a time, and held while
// nobody reads them.
const streamChunk = 16 << 10

// An http2Stream is a CONNECT on HTTP/2 as a connection, once it was accepted: what the
// client sends is read, what is written goes to the client. Deadlines and Close
// hold as for TCP.
//
// HTTP/2 of net/http cannot end one direction towards the client alone. CloseWrite
// therefore ends reading too: the end of the far side is the end of the tunnel. A
// client that ends its direction still receives.
type http2Stream struct {
	*peer
	w    http.ResponseWriter
	rc   *http.ResponseController
	body io.ReadCloser

	chunks chan []byte   // from pump; closed at the end of the body
	taken  chan struct{} // the last chunk was used up; holds one
	failed error         // why chunks was closed; read after that
	pumped chan struct{} // pump is gone
	rest   []byte        // of the last chunk; the reader's

	reading deadline

	writing sync.Mutex // held while w is used; for good once the handler returns

	mu       sync.Mutex // guards what follows
	inWrite  bool
	late     bool        // the deadline for writing has passed
	timer    *time.Timer // for writing; nil: no deadline
	timers   int         // set so far
	isEnded  bool
	isClosed bool
	aborted  bool          // the client is to see a reset
	ended    chan struct{} // no more is read
	closed   chan struct{} // nothing is, and nothing written
}

// newStream returns the stream of the request with body, answered by w. Its owner
// calls finish in the end.
func newStream(p *peer, w http.ResponseWriter, body io.ReadCloser) *http2Stream {
	s := &http2Stream{
		peer: p, w: w, rc: http.NewResponseController(w), body: body,
		chunks: make(chan []byte), taken: make(chan struct{}, 1), pumped: make(chan struct{}),
		ended: make(chan struct{}), closed: make(chan struct{}), reading: makeDeadline(),
	}
	go s.pump()
	return s
}

// pump reads the body, so that Read can give up waiting for it and come back. The
// client is held back by flow control while nobody reads.
func (s *http2Stream) pump() {
	defer close(s.pumped)
	buf := make([]byte, streamChunk)
	for {
		n, err := s.body.Read(buf)
		if n > 0 {
			select {
			case s.chunks <- buf[:n]:
			case <-s.ended:
				return
			}
			select {
			case <-s.taken:
			case <-s.ended:
				return
			}
		}
		if err != nil {
			s.failed = err
			close(s.chunks)
			return
		}
	}
}

// finish ends the stream, at the end of the handler: in good order, or with a
// reset, which it panics for.
func (s *http2Stream) finish() {
	s.Close()
	s.body.Close()
	<-s.pumped
	s.writing.Lock() // whoever still wrote was interrupted by Close
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.aborted {
		panic(http.ErrAbortHandler)
	}
}

// accept sends the 200.
func (s *http2Stream) accept() error {
	s.w.WriteHeader(http.StatusOK)
	return s.rc.Flush()
}

// refuse sends a instead of a 200.
func (s *http2Stream) refuse(a *answer) {
	body := a.body()
	a.fields(s.w.Header().Set)
	s.w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	s.w.WriteHeader(a.status)
	s.Write(body)
}

// Read implements net.Conn. One goroutine reads at a time.
func (s *http2Stream) Read(p []byte) (int, error) {
	if s.over() {
		return 0, net.ErrClosed
	}
	if len(s.rest) == 0 {
		passed := s.reading.wait()
		select {
		case <-passed:
			return 0, os.ErrDeadlineExceeded
		default:
		}
		select {
		case b, ok := <-s.chunks:
			if !ok {
				return 0, s.failed
			}
			s.rest = b
		case <-passed:
			return 0, os.ErrDeadlineExceeded
		case <-s.ended:
			if s.over() {
				return 0, net.ErrClosed
			}
			return 0, io.EOF
		}
	}
	n := copy(p, s.rest)
	if s.rest = s.rest[n:]; len(s.rest) == 0 {
		s.taken <- struct{}{}
	}
	return n, nil
}

func (s *http2Stream) over() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// Write implements net.Conn. What it returns for was given to the connection.
func (s *http2Stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.beginWrite(); err != nil {
		return 0, err
	}
	n, err := s.w.Write(p)
	if err == nil {
		err = s.rc.Flush()
	}
	return n, s.endWrite(err)
}

func (s *http2Stream) beginWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.isClosed:
		return net.ErrClosed
	case s.late:
		return os.ErrDeadlineExceeded
	}
	s.inWrite = true
	return nil
}

// endWrite returns err as it would be for TCP.
func (s *http2Stream) endWrite(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inWrite = false
	switch {
	case err == nil:
		return nil
	case s.isClosed:
		return net.ErrClosed
	case s.late:
		return os.ErrDeadlineExceeded
	}
	return err
}

// interrupt ends a Write under way, which costs the stream. The caller holds mu, so
// that the handler cannot have returned.
func (s *http2Stream) interrupt() {
	if s.inWrite {
		s.aborted = true
		s.rc.SetWriteDeadline(longAgo)
	}
}

// CloseWrite says that nothing more will be written. See http2Stream for what that means.
func (s *http2Stream) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isEnded {
		s.isEnded = true
		close(s.ended)
	}
	return nil
}

// Close ends the stream for whoever reads or writes; the handler, which waits for
// it, then ends it for the client.
func (s *http2Stream) Close() error {
	s.CloseWrite()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isClosed {
		s.isClosed = true
		close(s.closed)
		s.interrupt()
		s.stopTimer()
		s.reading.set(time.Time{})
	}
	return nil
}

// abort has the client see a reset where it would see the end.
func (s *http2Stream) abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.aborted = s.aborted || !s.isClosed
}

// SetDeadline implements net.Conn.
func (s *http2Stream) SetDeadline(t time.Time) error {
	s.SetReadDeadline(t)
	return s.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (s *http2Stream) SetReadDeadline(t time.Time) error {
	if s.over() {
		return net.ErrClosed
	}
	s.reading.set(t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (s *http2Stream) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosed {
		return net.ErrClosed
	}
	s.stopTimer()
	switch left := time.Until(t); {
	case t.IsZero():
		s.late = false
	case left <= 0:
		s.late = true
		s.interrupt()
	default:
		s.late = false
		s.timers++
		n := s.timers
		s.timer = time.AfterFunc(left, func() { s.expire(n) })
	}
	return nil
}

// expire is called by the nth timer, which may have been stopped too late.
func (s *http2Stream) expire(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil && s.timers == n {
		s.late = true
		s.interrupt()
	}
}

func (s *http2Stream) stopTimer() {
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
}

// A deadline ends waits; as that of net.Pipe does.
type deadline struct {
	mu     sync.Mutex // guards timer and passed
	timer  *time.Timer
	passed chan struct{} // closed once it has
}

func makeDeadline() deadline { return deadline{passed: make(chan struct{})} }

// set moves the deadline; the zero Time lifts it.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.passed // the timer's function is about to close it
	}
	d.timer = nil
	closed := false
	select {
	case <-d.passed:
		closed = true
	default:
	}
	left := time.Until(t)
	if !t.IsZero() && left <= 0 {
		if !closed {
			close(d.passed)
		}
		return
	}
	if closed {
		d.passed = make(chan struct{})
	}
	if !t.IsZero() {
		passed := d.passed
		d.timer = time.AfterFunc(left, func() { close(passed) })
	}
}

// wait returns what is closed when the deadline passes.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.passed
}
