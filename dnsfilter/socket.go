package dnsfilter

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
)

// A query shares its port only with others that are under way at the same time: a
// socket is closed when its last query has ended. A forger who does not see the queries
// has to hit the port, which the kernel draws at random, and the ID of one of them (RFC
// 5452, section 9.2), and before the port could be found out by trying it is given up:
// after socketUses queries or socketAge.
const (
	udpSockets = 8           // of one upstream that take new queries at a time; a query chooses at random
	socketUses = 256         // queries over one
	socketAge  = time.Second // after which one takes no new queries
)

var errRetired = errors.New("the socket is closed: no query was under way")

// A datagram asks over UDP, and over TCP again if the answer was truncated.
type datagram struct {
	addr       string
	remote     *net.UDPAddr
	stream     *stream
	randomCase bool           // 0x20: the case of letters must come back as it was sent
	ignored    *atomic.Uint64 // as in waiters

	slots   [udpSockets]slot
	reading sync.WaitGroup

	mu   sync.Mutex
	open map[*socket]struct{} // those being read, of slots or not any more; guarded by mu
}

// slot holds the socket that takes the queries whose random choice it is.
type slot struct {
	mu     sync.Mutex // guards what follows
	socket *socket
	uses   int // of socket
	closed bool
}

// A socket is connected, so it hears only the address that is asked.
type socket struct {
	*net.UDPConn
	raw     syscall.RawConn
	born    time.Time
	waiting waiters
	timed   bool  // a deadline is set, for the queries that nobody waits for; guarded by waiting.mu
	broken  error // why read ends
}

func (d *datagram) exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	w, err := newWaiter(query, dress{exact: d.randomCase})
	if err != nil {
		return nil, err
	}
	defer w.free()
	p, err := d.ask(ctx, w)
	if err != nil {
		return nil, err
	}
	if p[2]&truncated != 0 {
		return d.stream.exchange(ctx, query)
	}
	return w.unpack(p)
}

// ask sends w over one of the sockets and waits for its answer.
func (d *datagram) ask(ctx context.Context, w *waiter) ([]byte, error) {
	s, err := d.place(w)
	if err != nil {
		return nil, err
	}
	_, err = s.Write(w.packet)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED): // ICMP's word about an earlier packet: nobody is there
		s.waiting.fail(err)
		s.Close()
	case err != nil && s.waiting.remove(w):
		if s.waiting.end(errRetired) {
			s.Close()
		}
		return nil, err
	}
	p, err := s.waiting.wait(ctx, w)
	if err != nil && s.waiting.end(errRetired) {
		s.Close()
	}
	return p, err
}

// place adds w to the socket of its slot, a new one if that has had its time.
func (d *datagram) place(w *waiter) (*socket, error) {
	sl := &d.slots[w.random[2]%udpSockets]
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if sl.closed {
		return nil, net.ErrClosed
	}
	if s := sl.socket; s != nil && sl.uses < socketUses && w.asked.Sub(s.born) < socketAge && s.add(w) == nil {
		sl.uses++
		return s, nil
	}
	c, err := net.DialUDP("udp", nil, d.remote)
	if err != nil {
		return nil, err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		c.Close()
		return nil, err
	}
	s := &socket{UDPConn: c, raw: raw, born: w.asked, waiting: waiters{ignored: d.ignored}}
	if err := s.add(w); err != nil {
		c.Close()
		return nil, err // not with an empty table
	}
	sl.socket, sl.uses = s, 1
	d.mu.Lock()
	if d.open == nil {
		d.open = make(map[*socket]struct{})
	}
	d.open[s] = struct{}{}
	d.mu.Unlock()
	d.reading.Go(func() { d.run(s) })
	return s, nil
}

// run reads s until that ends.
func (d *datagram) run(s *socket) {
	s.read()
	d.mu.Lock()
	delete(d.open, s)
	d.mu.Unlock()
}

// add adds w to those that wait.
func (s *socket) add(w *waiter) error {
	flight, due := w.flight, w.due // for w may have ended by the time it has been added
	if err := s.waiting.add(w); err != nil || flight == nil {
		return err
	}
	s.waiting.mu.Lock()
	defer s.waiting.mu.Unlock()
	if !s.timed {
		s.timed = true
		s.SetReadDeadline(due) // fails on a closed socket only, where nobody waits
	}
	return nil
}

// expire ends the queries that nobody waits for and that have waited long enough, and
// reports whether none is left of any kind: then no other comes.
func (s *socket) expire(now time.Time) bool {
	var over []*waiter
	var next time.Time
	ws := &s.waiting
	ws.mu.Lock()
	ws.each(func(w *waiter) {
		switch {
		case w.flight == nil:
		case !now.Before(w.due):
			ws.drop(w)
			over = append(over, w)
		case next.IsZero() || w.due.Before(next):
			next = w.due
		}
	})
	s.timed = !next.IsZero()
	s.SetReadDeadline(next) // as in add
	ws.mu.Unlock()
	for _, w := range over {
		w.failed(context.DeadlineExceeded)
	}
	return ws.end(errRetired)
}

func (d *datagram) close() {
	for i := range d.slots {
		sl := &d.slots[i]
		sl.mu.Lock()
		sl.closed = true
		sl.mu.Unlock()
	}
	d.mu.Lock()
	for s := range d.open {
		s.Close() // which ends the queries under way
	}
	d.mu.Unlock()
	d.reading.Wait()
	d.stream.close()
}
