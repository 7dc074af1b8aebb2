package dnsfilter

import (
	"context"
	"encoding/binary"
	"net"
	"sync"
	"time"
)

const (
	maxPipelined = 32       // queries of one connection under way; beyond them nothing more is read from it
	streamRead   = 4 << 10  // bytes read at a time, and the longest query that does not wait for those before it
	streamWrite  = 16 << 10 // bytes of answers after which they are sent, whatever else there is to read
)

// serveStream answers the clients that l accepts until l is closed, and waits for them,
// but for those that net/http has taken.
func (s *Server) serveStream(l *listener) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		c, err := l.Accept()
		if isClosed(s.down) {
			if c != nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			return err
		}
		serving.Go(func() { s.serveConn(c.(*conn), l.door) })
	}
}

// serveConn serves c, which came in by a door, until it is over or net/http has it.
func (s *Server) serveConn(c *conn, d door) {
	if !s.introduce(c) {
		c.Close()
		return
	}
	switch d {
	case doorDNS:
		s.serveQueries(c, c, d)
	case doorTLS:
		if t := s.handshake(c, s.dot); t != nil {
			s.serveQueries(c, t, d)
			return
		}
		c.Close()
	case doorHTTPS:
		if t := s.handshake(c, s.doh); t != nil {
			s.web.take(c, t)
			return
		}
		c.Close()
	}
}

// serveQueries answers the queries that come over c, which lies on below and is closed
// in the end, in whatever order their answers come (RFC 7766, section 6.2.1.1; RFC 7858, section
// 3.3). It waits for those under way.
func (s *Server) serveQueries(below *conn, c net.Conn, d door) {
	defer c.Close()
	t := &session{s: s, conn: c, fast: newFast(s), in: make([]byte, streamRead), slots: make(chan struct{}, maxPipelined)}
	t.client = client{addr: below.client, door: d, back: t}
	if t.idle = idleTimeout; d.secret() {
		t.idle = idleSecure
	}
	t.run()
	t.slow.Wait()
}

// A session is a connection that queries come in by. Its methods are for one
// goroutine, but for send.
type session struct {
	s       *Server
	conn    net.Conn
	client  client
	fast    *fast
	outcome outcome

	in        []byte // read, and to be answered from next on
	next, end int
	asked     bool // a query has come
	idle      time.Duration
	waiting   bool   // the deadline for the next query is set
	out       []byte // answers that have not been sent
	now       time.Time
	slots     chan struct{} // one for each query under way
	slow      sync.WaitGroup

	writing sync.Mutex // one write at a time
}

// run answers queries until the client ends, is silent for too long, or the server shuts down.
func (t *session) run() {
	for {
		packet, ok := t.packet()
		if !ok {
			if !t.flush() || !t.fill() {
				return
			}
			continue
		}
		if len(packet) < headerSize {
			t.flush() // the answers before it, at least
			return
		}
		t.serve(packet)
		if len(t.out) >= streamWrite && !t.flush() {
			return
		}
	}
}

// packet returns the next query, if all of it has been read. It is valid until fill.
func (t *session) packet() ([]byte, bool) {
	unread := t.in[t.next:t.end]
	if len(unread) < 2 {
		return nil, false
	}
	size := 2 + int(binary.BigEndian.Uint16(unread))
	if len(unread) < size {
		return nil, false
	}
	t.next += size
	t.asked, t.waiting = true, false
	return unread[2:size:size], true
}

// fill reads more of the next query, and perhaps of those behind it. It reports
// whether there was something in time.
func (t *session) fill() bool {
	unread := t.in[t.next:t.end]
	size := streamRead
	if len(unread) >= 2 {
		size = max(size, 2+int(binary.BigEndian.Uint16(unread)))
	}
	if size != len(t.in) { // a long query, or the one after it
		t.in = append(make([]byte, 0, size), unread...)[:size]
	} else {
		copy(t.in, unread)
	}
	t.next, t.end = 0, len(unread)
	if !t.waiting { // the time is for a whole query, however slowly it comes
		wait := firstQuery
		if t.asked {
			wait = t.idle
		}
		t.waiting = true
		if t.conn.SetReadDeadline(time.Now().Add(wait)) != nil || isClosed(t.s.down) {
			return false
		}
	}
	n, err := t.conn.Read(t.in[t.end:])
	t.end += n
	t.now = t.s.cfg.Now()
	if !t.asked && isIntroduction(t.in[:t.end]) {
		t.s.uninvited(t.client.addr.Addr())
		return false
	}
	return n > 0 || err == nil
}

// serve answers packet: at once if it can, otherwise meanwhile, unless too much is
// under way.
func (t *session) serve(packet []byte) {
	start := len(t.out)
	t.out = append(t.out, 0, 0)
	t.s.resolver.refreshHosts()
	if answered, ok := t.fast.answer(t.out, packet, t.client, t.now, &t.outcome); ok {
		if len(answered) == start+2 {
			t.out = t.out[:start]
			return
		}
		t.out = answered
		binary.BigEndian.PutUint16(t.out[start:], uint16(len(t.out)-start-2))
		t.fast.observe(&t.outcome, packet, t.now, t.now, nil)
		return
	}
	t.out = t.out[:start]
	if len(packet) > streamRead || !t.s.enter(t.client.addr.Addr(), true) {
		t.flush() // an error shows again at the next one
		t.s.serve(t.s.life, t.client, packet)
		return
	}
	select {
	case t.slots <- struct{}{}:
	default:
		t.flush()             // as above
		t.slots <- struct{}{} // every query under way ends
	}
	query := append([]byte(nil), packet...)
	missed := t.fast.missed
	t.slow.Go(func() { t.serveSlow(t.s.life, query, missed) })
}

// serveSlow answers one query while others are read.
func (t *session) serveSlow(ctx context.Context, packet []byte, missed bool) {
	defer func() {
		t.s.leave(t.client.addr.Addr(), true)
		<-t.slots
	}()
	t.s.serveLater(ctx, t.client, packet, missed)
}

// flush sends the answers that are ready, in one write, and reports whether it could.
func (t *session) flush() bool {
	if len(t.out) == 0 {
		return true
	}
	err := t.write(t.out)
	if t.out = t.out[:0]; cap(t.out) > 4*streamWrite {
		t.out = nil
	}
	return err == nil
}

// send implements the way back of a client.
func (t *session) send(answer []byte) error {
	framed := make([]byte, 2, 2+len(answer))
	binary.BigEndian.PutUint16(framed, uint16(len(answer)))
	return t.write(append(framed, answer...))
}

func (t *session) write(p []byte) error {
	t.writing.Lock()
	defer t.writing.Unlock()
	_, err := t.conn.Write(p)
	return err
}
