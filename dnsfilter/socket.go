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
	born    time.Time
	waiting waiters
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
	if s := sl.socket; s != nil && sl.uses < socketUses && time.Since(s.born) < socketAge && s.waiting.add(w) == nil {
		sl.uses++
		return s, nil
	}
	c, err := net.DialUDP("udp", nil, d.remote)
	if err != nil {
		return nil, err
	}
	s := &socket{UDPConn: c, born: time.Now(), waiting: waiters{ignored: d.ignored, byID: make(map[uint16]*waiter)}}
	if err := s.waiting.add(w); err != nil {
		c.Close()
		return nil, err // not with an empty table
	}
	sl.socket, sl.uses = s, 1
	d.reading.Go(s.read)
	return s, nil
}

// read hands out what comes until no query is under way.
func (s *socket) read() {
	defer s.Close()
	var buf [maxEDNSSize]byte
	for {
		n, err := s.Read(buf[:])
		if err != nil {
			s.waiting.fail(err)
			return
		}
		if s.waiting.deliver(buf[:n]) && s.waiting.end(errRetired) {
			return
		}
	}
}

func (d *datagram) close() {
	for i := range d.slots {
		sl := &d.slots[i]
		sl.mu.Lock()
		sl.closed = true
		if sl.socket != nil {
			sl.socket.Close()
		}
		sl.mu.Unlock()
	}
	d.reading.Wait() // for queries under way as well, if any are left
	d.stream.close()
}
