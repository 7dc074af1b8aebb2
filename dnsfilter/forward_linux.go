package dnsfilter

import (
	crand "crypto/rand"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A forwarder sends questions to upstreams, those of one batch of clients together as
// far as one socket takes them. It is for one goroutine.
type forwarder struct {
	random *rand.ChaCha8
	now    time.Time // of what will leave together; zero if nothing has come yet
	slot   byte      // the random choice of a socket, for as many questions as one takes
	uses   int       // of it
	s      *socket   // by which the first n leave
	n      int
	errno  syscall.Errno
	write  func(fd uintptr)

	out  [batch]mmsghdr
	outv [batch]unix.Iovec
	buf  [batch][maxQuerySize]byte
}

func (f *forwarder) init() {
	var seed [32]byte
	crand.Read(seed[:]) // never fails
	f.random = rand.NewChaCha8(seed)
	f.write = f.send
	for i := range batch {
		f.outv[i].Base = &f.buf[i][0]
		f.out[i].hdr.Iov = &f.outv[i]
		f.out[i].hdr.SetIovlen(1)
	}
}

// forward has q answered without a goroutine that waits. It returns false if that
// cannot be; otherwise q is not the caller's any more. The question leaves at the latest
// with flush.
func (f *forwarder) forward(q *udpQuery, k key) bool {
	if f.now.IsZero() {
		f.now = time.Now()
	}
	fl, first, ok := q.s.resolver.enlist(q, k, f.now)
	if first {
		f.launch(fl)
	}
	return ok
}

// enlist has q answered when k is, and reports whether that will be; first if k has
// to be asked for yet, by the flight returned, which begins now. The caller does not use q
// afterwards.
func (r *Resolver) enlist(q *udpQuery, k key, now time.Time) (f *flight, first, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || q.s.life.Err() != nil {
		return nil, false, false
	}
	f = r.flights[k]
	switch {
	case f != nil:
		r.counts.coalesced.Add(1)
	case len(r.flights) >= maxFlights:
		return nil, false, false
	default:
		f, first = r.newFlight(k, now), true
	}
	q.next, f.clients = f.clients, q
	return f, first, true
}

// launch asks the first upstream for fl's key.
func (f *forwarder) launch(fl *flight) {
	p := fl.r.poolFor(fl.k.name)
	ups := p.order()
	if len(ups) == 0 {
		fl.r.ground(fl, nil)
		return
	}
	u := ups[0]
	d, ok := u.exchanger.(*datagram)
	if !ok || p.plainKnown(u) {
		fl.r.ground(fl, nil)
		return
	}
	if f.n == batch {
		f.flush()
	}
	w := newFlightWaiter(fl, p, u, d.randomCase, f.random)
	if f.uses%socketUses == 0 {
		f.slot = w.random[2]
	}
	f.uses++
	w.random[2] = f.slot
	p.counts.sent.Add(1)
	u.sent.Add(1)
	// Once it is placed, w may end at any time. So the copy, which add gives its ID, is what leaves.
	size := copy(f.buf[f.n][:], w.packet)
	w.copied = f.buf[f.n][:size]
	s, err := d.place(w)
	if err != nil {
		w.failed(err)
		return
	}
	if f.s != s && f.n > 0 {
		packet := f.buf[f.n]
		f.flush()
		f.buf[0] = packet
	}
	f.s = s
	f.outv[f.n].SetLen(size)
	f.n++
}

// flush sends what has not left yet.
func (f *forwarder) flush() {
	f.now = time.Time{}
	if f.n == 0 {
		return
	}
	s := f.s
	err := s.raw.Control(f.write)
	if err == nil && f.errno != 0 {
		err = os.NewSyscallError("sendmmsg", f.errno)
	}
	f.s, f.n = nil, 0
	if err != nil { // among others ICMP's word about an earlier packet
		s.waiting.fail(err)
		s.Close()
	}
}

func (f *forwarder) send(fd uintptr) {
	for sent := 0; sent < f.n; {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&f.out[sent])), uintptr(f.n-sent), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			sent += int(n)
		case unix.EINTR:
		default:
			f.errno = errno
			return
		}
	}
	f.errno = 0
}

// An inbox is room for answers of upstreams.
type inbox struct {
	in   [batch]mmsghdr
	inv  [batch][2]unix.Iovec
	read [batch][usualSize + 64]byte // as in udpReader
	rest [batch][maxEDNSSize - usualSize]byte
	long [maxEDNSSize]byte
}

var inboxes = sync.Pool{New: func() any {
	b := new(inbox)
	for i := range batch {
		b.inv[i][0].Base, b.inv[i][1].Base = &b.read[i][0], &b.rest[i][0]
		b.inv[i][0].SetLen(usualSize)
		b.inv[i][1].SetLen(maxEDNSSize - usualSize)
		b.in[i].hdr.Iov = &b.inv[i][0]
		b.in[i].hdr.SetIovlen(2)
	}
	return b
}}

// packet returns packet i, until the next.
func (b *inbox) packet(i int) []byte {
	n := int(b.in[i].n)
	if n <= usualSize {
		return b.read[i][:n]
	}
	copy(b.long[:], b.read[i][:usualSize])
	copy(b.long[usualSize:n], b.rest[i][:])
	return b.long[:n]
}

// read hands out what comes until no query is under way.
func (s *socket) read() {
	defer s.Close()
	receive := s.receive
	for {
		err := s.raw.Read(receive)
		switch {
		case errors.Is(s.broken, errRetired):
			return
		case errors.Is(err, os.ErrDeadlineExceeded):
			if s.expire(time.Now()) {
				return
			}
			continue
		case err == nil:
			err = s.broken
		}
		s.waiting.fail(err)
		return
	}
}

// receive takes what has arrived. It returns false if there is nothing left, and more is
// waited for; otherwise broken says why not.
func (s *socket) receive(fd uintptr) bool {
	b := inboxes.Get().(*inbox)
	defer inboxes.Put(b)
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.in)), batch, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
		case unix.EAGAIN:
			return false
		case unix.EINTR:
			continue
		default:
			s.broken = os.NewSyscallError("recvmmsg", errno)
			return true
		}
		if s.take(b, int(n)) && s.waiting.end(errRetired) {
			s.broken = errRetired
			return true
		}
		if n < batch {
			return false
		}
	}
}

// take hands out the first n packets of b, and reports whether one answered a query.
func (s *socket) take(b *inbox, n int) (any bool) {
	var box *outbox
	var came, now time.Time
	for i := range n {
		p := b.packet(i)
		w := s.waiting.take(p)
		if w == nil {
			continue
		}
		any = true
		if w.flight == nil {
			w.answer <- answer{packet: append([]byte(nil), p...)}
			continue
		}
		if came.IsZero() {
			came, now = time.Now(), w.flight.r.cfg.Now()
		}
		q, e := w.answered(p, came, now)
		box = box.answer(q, e, now)
	}
	box.close()
	return any
}

// An outbox holds answers to clients until they are sent together.
type outbox struct {
	s     *Server
	fast  *fast
	u     *udpSocket // by which the first n leave
	n     int
	used  int // of written
	sent  int
	errno syscall.Errno
	write func(fd uintptr) bool

	queries  [batch]*udpQuery
	outcomes [batch]outcome
	out      [batch]mmsghdr
	outv     [batch]unix.Iovec
	written  [batch * maxEDNSSize]byte // answers, one after the other
}

func (s *Server) newOutbox() any {
	b := &outbox{s: s, fast: newFast(s)}
	b.write = b.send
	for i := range batch {
		b.out[i].hdr.Iov = &b.outv[i]
		b.out[i].hdr.SetIovlen(1)
	}
	return b
}

// deliver answers the queries from q on with e.
func deliver(q *udpQuery, e *entry) {
	if q != nil {
		var b *outbox
		b.answer(q, e, q.s.cfg.Now()).close()
	}
}

// answer answers the queries from q on with e, and returns the outbox that holds the
// last of them. An outbox is taken, nil being none, when there is something to answer.
func (b *outbox) answer(q *udpQuery, e *entry, now time.Time) *outbox {
	for q != nil {
		next := q.next
		if b != nil && b.s != q.s {
			b.close()
			b = nil
		}
		if b == nil {
			b = q.s.outboxes.Get().(*outbox)
		}
		b.add(q, e, now)
		q = next
	}
	return b
}

// add answers q with e, or has a goroutine do it if that takes more thought.
func (b *outbox) add(q *udpQuery, e *entry, now time.Time) {
	if b.n == batch || b.u != q.u {
		b.flush()
		b.u = q.u
	}
	s, k := b.s, b.n
	a, ok := b.fast.again(client{addr: q.m.addr(), udp: true}, q.packet[:q.size], q.start, &q.d)
	var p []byte
	if ok = ok && e.next.IsZero(); ok {
		// No answer is longer than maxEDNSSize.
		p, ok = b.fast.fresh(b.written[b.used:b.used:b.used+maxEDNSSize], &a, e, now, &b.outcomes[k])
	}
	if !ok {
		q.entry = e
		go s.answerUDP(q)
		return
	}
	s.counts.misses.Add(1)
	b.queries[k] = q
	b.outv[k].Base = &p[0]
	b.outv[k].SetLen(len(p))
	h, m := &b.out[k].hdr, &q.m
	h.Name, h.Namelen = (*byte)(unsafe.Pointer(&m.name)), m.namelen
	h.Control = &m.oob[0]
	h.SetControllen(m.ooblen)
	b.n++
	b.used += len(p)
}

// flush sends the answers, and tells of them.
func (b *outbox) flush() {
	for done := 0; done < b.n; {
		b.sent, b.errno = done, 0
		err := b.u.raw.Write(b.write)
		if err == nil && b.errno != 0 {
			err = os.NewSyscallError("sendmmsg", b.errno)
		}
		end := b.s.cfg.Now()
		for ; done < b.sent; done++ {
			b.over(done, end, nil)
		}
		if err != nil { // of the next one
			b.over(done, end, err)
			done++
		}
	}
	b.n, b.used = 0, 0
}

// over tells of the answer k, and frees its query.
func (b *outbox) over(k int, end time.Time, err error) {
	q := b.queries[k]
	b.fast.observe(&b.outcomes[k], q.packet[:], q.start, end, err)
	b.queries[k] = nil
	q.done()
}

// send sends what is left. It returns false if there is no room for it.
func (b *outbox) send(fd uintptr) bool {
	for b.sent < b.n {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&b.out[b.sent])), uintptr(b.n-b.sent), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			b.sent += int(n)
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			b.errno = errno
			return true
		}
	}
	return true
}

// close sends what b holds and gives b back. b may be nil.
func (b *outbox) close() {
	if b == nil {
		return
	}
	b.flush()
	b.u = nil
	b.s.outboxes.Put(b)
}

// cutOff has the clients answered now that wait for upstreams, after s.end.
func (s *Server) cutOff() {
	var cut []*udpQuery
	r := s.resolver
	r.mu.Lock()
	for _, f := range r.flights {
		var kept *udpQuery
		for q := f.clients; q != nil; {
			next := q.next
			if q.s == s {
				cut = append(cut, q)
			} else {
				q.next, kept = kept, q
			}
			q = next
		}
		f.clients = kept
	}
	r.mu.Unlock()
	for _, q := range cut {
		go s.answerUDP(q)
	}
}
