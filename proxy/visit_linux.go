package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/sys/unix"

	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/proxy/relay"
)

// A visit is a client's connection of plain HTTP in a lane. Its passage reads the heads,
// and waits for the next one without a coroutine.
type visit struct {
	passage   *passage
	conn      laneConn // the client's
	client    clientConn
	ctx       context.Context // of its requests
	request   *http.Request   // the one that is served
	out       plainWriter
	coroutine *coroutine // which serves it; nil: none
	keep      bool       // the client may send another one
	declined  bool       // it is not for lanes
	raw       []byte     // its head, in the lane's buffer until the coroutine waits
	look      time.Time  // when to see whether the client is there, if something happened to it
}

// plainRequest returns the request of which raw is the whole head, nil if it is not one
// that the lane may be able to serve: it has no body and wants nothing but a response.
func (l *lane) plainRequest(raw []byte) *http.Request {
	s := l.s
	h, err := parseHead(raw)
	switch {
	case err != nil, h.minor != '1', h.chunked, h.contentLength != nil, len(h.target) > s.cfg.Limits.URLBytes,
		!bytes.HasPrefix(h.target, []byte("http://")),
		string(h.method) != http.MethodGet && string(h.method) != http.MethodHead && string(h.method) != http.MethodOptions,
		s.users.enabled() || s.cfg.Auth.Required, !httpguts.ValidHostHeader(string(h.host)):
		return nil
	}
	l.head.Reset(raw)
	l.heads.Reset(&l.head)
	r, err := http.ReadRequest(l.heads)
	if err != nil || r.Header["Expect"] != nil || r.Header["Upgrade"] != nil {
		return nil
	}
	return r
}

// beginVisit makes p one of plain HTTP.
func (p *passage) beginVisit() {
	l := p.lane
	s, u := l.s, p.setup
	v := &visit{passage: p}
	v.conn = laneConn{lane: l, fd: p.fd[clientSide], slot: p.slot[clientSide], visit: v, remote: u.source.AddrPort}
	v.client.idleConn = idleConn{Conn: &v.conn, idle: s.clientIdle()}
	v.client.s, v.client.source, v.client.counted, v.client.visit = s, u.source, u.counted, v
	v.client.serving.Store(true)
	v.ctx = context.WithValue(s.life, clientKey{}, &v.client)
	u.counted = netip.Addr{} // it is the visit's from now on
	p.visit = v
	s.clients.add(&v.client)
	s.httpConns.Add(1)
	p.settle()
}

// forward has r, of which raw is the head, served.
func (p *passage) forward(r *http.Request, raw []byte) {
	if p.visit == nil {
		p.beginVisit()
	}
	v := p.visit
	p.phase = forwarding
	v.request, v.raw = r.WithContext(v.ctx), raw
	v.keep, v.declined = false, false
	v.look = p.lane.now.Add(leftEvery)
	if len(raw) == laneBuffer { // there may be more, of which no event will tell
		p.pending[clientSide] = true
	}
	v.conn.arm()
	p.lane.serveVisit(v)
}

// serve is what the coroutine does.
func (v *visit) serve() {
	s := v.passage.lane.s
	defer func() {
		v.out.release()
		crash := recover()
		if err, _ := crash.(error); crash != nil && !errors.Is(err, http.ErrAbortHandler) {
			s.crashed(crash)
		}
	}()
	v.out.reset(&v.client.idleConn, v.request)
	s.serveExchange(&v.client, &v.out, v.request)
	v.keep = v.declined || v.out.end()
}

// relayRest has the rest of ex's response, of known length, relayed by a goroutine: its
// pipes are better at that, and the lane has time for others. The error is io.EOF when all
// is done. If it cannot, a piece is copied.
func (v *visit) relayRest(ex *exchange, src io.Reader, buf []byte) (n int64, err error) {
	b, far := ex.carriedInLane()
	rest := ex.length - ex.written
	if far == nil || !b.conn.left(rest) {
		return ex.copyPiece(src, buf)
	}
	if v.out.Flush(); v.out.err != nil || far.closing.Load() || v.conn.closing.Load() {
		return ex.copyPiece(src, buf) // which says so
	}
	var toClient bool
	if !v.outside(far, func(to, from *net.TCPConn) {
		n, toClient, err = relay.CopyN(to, from, rest, relay.Options{Idle: b.conn.idle, Down: ex.totalDown()})
	}) {
		toClient, err = true, errDescriptors
	}
	ex.down.Add(n)
	ex.written += n
	v.out.written += n
	switch {
	case err == nil:
		b.conn.in.left, b.conn.in.state = 0, atHead
		ex.answer.ended.Store(true)
		return n, b.end(io.EOF)
	case toClient:
		ex.refused(err)
	default:
		err = b.end(err)
		ex.broken = err
	}
	return n, err
}

// left reports whether the rest of a message is n bytes, none of which was read.
func (c *upstreamConn) left(n int64) bool {
	return c.reader.Buffered() == 0 && len(c.in.held) == 0 && c.in.state == inBody && c.in.left == uint64(n)
}

// copyRest has the rest of ex's response, of unknown length, copied by a goroutine. The
// connection to the far side is not used again. The error is io.EOF when all is done.
func (v *visit) copyRest(ex *exchange, src io.Reader, buf []byte) (n int64, err error) {
	b, far := ex.carriedInLane()
	if far == nil {
		return ex.copyPiece(src, buf)
	}
	b.keep = false
	if !v.outside(far, func(to, from *net.TCPConn) {
		v.conn.moveDeadlines(to)
		far.moveDeadlines(from)
		for err == nil {
			var m int64
			m, err = ex.copyPiece(src, buf)
			n += m
		}
	}) {
		err = errDescriptors
		ex.refused(err)
	}
	return n, err
}

// carriedInLane returns what ex's response comes from, and the connection if that is in
// its client's lane, else nil. What is closed may not be there any more.
func (ex *exchange) carriedInLane() (*carried, *laneConn) {
	b, ok := ex.answer.ReadCloser.(*carried)
	if !ok || b.conn == nil {
		return nil, nil
	}
	far, ok := b.conn.Conn.(*laneConn)
	if !ok || far.closing.Load() || ex.client.visit.conn.closing.Load() {
		return nil, nil
	}
	return b, far
}

// outside has f done in a goroutine, with the connections of the client and the far side
// out of the lane meanwhile. It reports false if there are no descriptors for that: they
// are closed then.
func (v *visit) outside(far *laneConn, f func(to, from *net.TCPConn)) bool {
	p := v.passage
	from, to := far.lend(), v.conn.lend()
	p.fd[clientSide] = -1
	if from == nil || to == nil {
		far.unlend()
		v.conn.unlend()
		return false
	}
	if there := newPresence(to, &v.client.live); there != nil {
		v.client.live.mu.Lock()
		there.begin()
		v.client.live.mu.Unlock()
		defer there.end()
	}
	v.coroutine.elsewhere(func() { f(to, from) })
	far.takeBack()
	v.conn.takeBack()
	p.fd[clientSide], p.slot[clientSide] = v.conn.fd, v.conn.slot
	return true
}

// decline says that the request is to be served by others, who begin anew.
func (v *visit) decline() { v.declined = true }

// served goes on after a request.
func (v *visit) served() {
	p := v.passage
	l := p.lane
	raw := v.raw
	v.request, v.raw = nil, nil
	switch {
	case p.phase == closed:
	case v.declined:
		p.giveToHTTP(raw)
	case !v.keep && !v.out.ended, v.conn.closing.Load():
		p.leave()
	case !v.keep, l.s.draining.Load():
		p.awaitEnd() // the client may have asked for more, and may not have read all of this
	default:
		p.phase = readingHead
		p.lookAt(l.now.Add(l.s.cfg.Timeouts.Idle))
		if p.pending[clientSide] {
			l.again = append(l.again, func() { l.do(p, (*passage).readNext) })
		}
	}
}

// readNext reads a request that came while another one was served.
func (p *passage) readNext() {
	if p.phase == readingHead {
		p.readHead()
	}
}

// happened is told of events on the client's connection. The request may be over once
// its coroutine goes on, and no further event will tell of what came with this one.
func (v *visit) happened(events uint32) {
	p := v.passage
	if events&readableEvents != 0 && !p.pending[clientSide] {
		p.pending[clientSide] = true
		v.look = p.lane.now.Add(leftEvery)
	}
	v.conn.happened(events)
	switch {
	case p.phase != forwarding:
	case events&(unix.EPOLLHUP|unix.EPOLLERR) != 0:
		v.client.live.leave()
	case events&readableEvents != 0:
		v.conn.arm()
	}
}

// nextLook returns when to look at the client's connection, at the latest at t. Neither
// what is written meanwhile nor what the client says puts that off.
func (v *visit) nextLook(t time.Time) time.Time {
	if p := v.passage; p.phase == forwarding && p.pending[clientSide] && (t.IsZero() || v.look.Before(t)) {
		return v.look
	}
	return t
}

// overdue looks whether the client is still there, or takes what is written too slowly.
func (v *visit) overdue() {
	p, c := v.passage, &v.conn
	if c.waiter != nil && !c.until.IsZero() && !p.lane.now.Before(c.until) {
		c.timeOut()
		return
	}
	if p.pending[clientSide] && hasLeftFD(c.fd, false, false) {
		v.client.live.leave()
		return
	}
	v.look = p.lane.now.Add(leftEvery)
	c.arm()
}

// cut ends the visit, whose connection somebody wants to be closed.
func (v *visit) cut() {
	p := v.passage
	switch {
	case p.phase == closed:
	case v.coroutine == nil:
		p.leave()
	case v.conn.waiter != nil:
		v.conn.wake()
	}
}

// end is called when the connection is closed or given away.
func (v *visit) end() {
	s := v.passage.lane.s
	v.conn.unlend() // its descriptor's number may soon be another's
	s.clients.remove(&v.client)
	s.httpConns.Add(-1)
	s.crowd.leave(v.client.counted)
}

// lane returns the lane that serves c; nil: none does.
func (c *clientConn) lane() *lane {
	if c.visit == nil {
		return nil
	}
	return c.visit.passage.lane
}

// giveToHTTP gives a client's connection to net/http, with what was read of a request.
func (p *passage) giveToHTTP(raw []byte) {
	s, v := p.lane.s, p.visit
	conn := p.give(clientSide)
	if conn == nil {
		if len(raw) > 0 {
			c := &connect{s: s, ev: s.newEvent(event.HTTP, v.client.source, p.lane.now)}
			c.finish(c.decision.Refuse(policy.ReasonLimitExceeded), errDescriptors)
		}
		p.leave()
		return
	}
	c := &clientConn{
		idleConn: idleConn{Conn: conn, idle: s.clientIdle()},
		s:        s, source: v.client.source, counted: v.client.counted, in: requests(s, raw),
	}
	v.client.counted = netip.Addr{}
	s.wg.Go(func() { s.serveByHTTP(c) })
	p.leave()
}
