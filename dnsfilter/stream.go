package dnsfilter

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	maxPipes    = 4               // connections to one upstream
	pipelined   = 128             // queries under way on one before another is opened
	dialTimeout = 3 * time.Second // to connect, the TLS handshake included
	maxIdle     = 5 * time.Second // without an answer; servers close soon after (RFC 7766, section 6.2.3)
)

var (
	errIdle   = errors.New("the connection was idle")
	errSilent = errors.New("the connection carries no answers")
)

// A stream asks over TCP, or TLS if tls is set. Many queries share a connection,
// and are answered in any order (RFC 7766, section 6.2.1.1).
type stream struct {
	addr    string
	tls     *tls.Config
	ignored *atomic.Uint64 // as in waiters

	mu      sync.Mutex // guards what follows
	pipes   []*pipe
	closed  bool
	running sync.WaitGroup
	life    context.Context // of the connections; made with the first
	end     context.CancelFunc
}

// A pipe is one connection, from before it is dialled until it is closed.
type pipe struct {
	dialled  chan struct{} // closed when conn or the failure of waiting is set
	conn     net.Conn
	waiting  waiters
	answered atomic.Int64 // when the last answer came, in Unix nanoseconds
	writing  sync.Mutex   // one message at a time
}

func (s *stream) exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	w, err := newWaiter(query, dress{padded: s.tls != nil})
	if err != nil {
		return nil, err
	}
	defer w.free()
	p, fresh, err := s.pipe(false)
	if err != nil {
		return nil, err
	}
	a, err := p.ask(ctx, w)
	if err != nil && !fresh && ctx.Err() == nil {
		// The server may have closed it meanwhile, as it may: that is no failure yet.
		if p, _, err = s.pipe(true); err != nil {
			return nil, err
		}
		a, err = p.ask(ctx, w)
	}
	if err != nil {
		return nil, err
	}
	return w.unpack(a)
}

// pipe returns the connection with the fewest queries, or a fresh one if they have
// many or the caller wants none that was used.
func (s *stream) pipe(unused bool) (p *pipe, fresh bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false, net.ErrClosed
	}
	least := 0
	for _, other := range s.pipes {
		if n := other.waiting.count(); p == nil || n < least {
			p, least = other, n
		}
	}
	if p != nil && (least < pipelined && !unused || len(s.pipes) == maxPipes) {
		return p, false, nil
	}
	if s.life == nil {
		s.life, s.end = context.WithCancel(context.Background())
	}
	p = &pipe{dialled: make(chan struct{}), waiting: waiters{ignored: s.ignored}}
	s.pipes = append(s.pipes, p)
	s.running.Go(func() { s.run(p) })
	return p, true, nil
}

// run dials p and reads from it until it fails or has been idle for long.
func (s *stream) run(p *pipe) {
	conn, err := s.dial()
	p.conn = conn
	if err != nil {
		s.forget(p)
		p.waiting.fail(err)
		close(p.dialled)
		return
	}
	defer conn.Close()
	defer context.AfterFunc(s.life, func() { conn.Close() })()
	close(p.dialled)
	err = p.read()
	s.forget(p) // before anybody hears of the failure, and asks for another
	p.waiting.fail(err)
}

func (s *stream) dial() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.life, dialTimeout)
	defer cancel()
	if s.tls == nil {
		return new(net.Dialer).DialContext(ctx, "tcp", s.addr)
	}
	return (&tls.Dialer{Config: s.tls}).DialContext(ctx, "tcp", s.addr)
}

// forget takes p out of use.
func (s *stream) forget(p *pipe) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pipes = slices.DeleteFunc(s.pipes, func(other *pipe) bool { return other == p })
}

// ask sends w and waits for its answer. A connection on which nothing has come
// since, in all the time that there was, is closed.
func (p *pipe) ask(ctx context.Context, w *waiter) ([]byte, error) {
	select {
	case <-p.dialled:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := p.waiting.add(w); err != nil {
		return nil, err
	}
	begun := time.Now().UnixNano()
	if err := p.write(ctx, w.packet); err != nil {
		p.conn.Close() // or the next query would be read as part of this one
		if p.waiting.remove(w) {
			return nil, err
		}
	}
	a, err := p.waiting.wait(ctx, w)
	if errors.Is(err, context.DeadlineExceeded) && p.answered.Load() < begun {
		p.waiting.fail(errSilent)
		p.conn.Close()
	}
	return a, err
}

// write sends a message behind its length (RFC 1035, section 4.2.2), in one go (RFC 7766, section 8).
func (p *pipe) write(ctx context.Context, m []byte) error {
	var buf [2 + maxQuerySize]byte
	framed := append(binary.BigEndian.AppendUint16(buf[:0], uint16(len(m))), m...)
	deadline, _ := ctx.Deadline()
	p.writing.Lock()
	defer p.writing.Unlock()
	if err := p.conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err := p.conn.Write(framed)
	return err
}

// read hands out what comes. It ends with an error, errIdle if nothing is amiss.
func (p *pipe) read() error {
	r := bufio.NewReader(p.conn)
	var length [2]byte
	for {
		if err := p.conn.SetReadDeadline(time.Now().Add(maxIdle)); err != nil {
			return err
		}
		if _, err := io.ReadFull(r, length[:]); err != nil {
			if p.waiting.end(errIdle) {
				return errIdle
			}
			return err
		}
		m := make([]byte, binary.BigEndian.Uint16(length[:]))
		if _, err := io.ReadFull(r, m); err != nil {
			return err
		}
		p.answered.Store(time.Now().UnixNano())
		p.waiting.deliver(m)
	}
}

// close ends the connections and waits for that.
func (s *stream) close() {
	s.mu.Lock()
	s.closed = true
	if s.end != nil {
		s.end()
	}
	s.mu.Unlock()
	s.running.Wait()
}
