package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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
	began     time.Time  // when it began to
	keep      bool       // the client may send another one
	declined  bool       // it is not for lanes
	raw       []byte     // its head, in the lane's buffer until the coroutine waits
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
	v.request, v.raw, v.began = r.WithContext(v.ctx), raw, p.lane.now
	v.keep, v.declined = false, false
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
		if e := recover(); e != nil && e != http.ErrAbortHandler {
			s.crashed(e)
		}
	}()
	v.out.reset(&v.client.idleConn, v.request)
	s.serveExchange(&v.client, &v.out, v.request)
	v.keep = v.declined || v.out.end()
}

// relayRest has the rest of ex's response relayed by a goroutine, whose pipes are better at
// it, and which keeps nobody in the lane waiting. It returns 0 and no error if it cannot.
func (v *visit) relayRest(ex *exchange) (n int64, err error) {
	b, ok := ex.answer.ReadCloser.(*carried)
	if !ok || b.conn == nil {
		return 0, nil
	}
	in, rest := &b.conn.in, ex.length-ex.written
	far, ok := b.conn.Conn.(*laneConn)
	if !ok || b.conn.reader.Buffered() > 0 || len(in.held) > 0 || in.state != inBody || in.left != uint64(rest) {
		return 0, nil
	}
	if v.out.Flush(); v.out.err != nil {
		return 0, nil // a Write says it
	}
	var toClient bool
	n, toClient, err = v.lendBoth(far, rest, relay.Options{Idle: b.conn.idle, Down: ex.totalDown()})
	ex.down.Add(n)
	ex.written += n
	v.out.written += n
	in.left -= uint64(n)
	switch {
	case err == nil:
		in.state = atHead
		ex.answer.ended.Store(true)
		b.end(io.EOF)
	case toClient:
		ex.broken = fmt.Errorf("response to the client: %w", err)
	default:
		ex.broken = b.end(err)
		err = ex.broken
	}
	return n, err
}

// lendBoth has the next n bytes of far relayed to the client outside of the lane.
func (v *visit) lendBoth(far *laneConn, n int64, o relay.Options) (moved int64, toClient bool, err error) {
	p := v.passage
	from, to := far.lend(), v.conn.lend()
	p.fd[clientSide] = -1
	if from == nil || to == nil {
		far.unlend()
		v.conn.unlend()
		return 0, true, errDescriptors
	}
	there := newPresence(to, &v.client.live)
	v.client.live.mu.Lock()
	there.begin()
	v.client.live.mu.Unlock()
	v.coroutine.elsewhere(func() { moved, toClient, err = relay.CopyN(to, from, n, o) })
	there.end()
	ferr, cerr := far.takeBack(), v.conn.takeBack()
	p.fd[clientSide], p.slot[clientSide] = v.conn.fd, v.conn.slot
	if err == nil {
		err = errors.Join(ferr, cerr)
	}
	return moved, toClient, err
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
	case !v.keep && !v.out.ended, v.conn.closing.Load(), l.s.draining.Load() && v.keep:
		p.leave()
	case !v.keep:
		p.awaitEnd()
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

// happened is told of events on the client's connection.
func (v *visit) happened(events uint32) {
	v.conn.happened(events)
	p := v.passage
	switch {
	case p.phase != forwarding:
	case events&(unix.EPOLLHUP|unix.EPOLLERR) != 0:
		v.client.live.leave()
	case events&readableEvents != 0:
		p.pending[clientSide] = true
		v.conn.arm()
	}
}

// nextLook returns when to look at the client's connection, at the latest at t.
func (v *visit) nextLook(t time.Time) time.Time {
	if p := v.passage; p.phase == forwarding && p.pending[clientSide] {
		look := p.lane.now.Add(leftEvery)
		if t.IsZero() || look.Before(t) {
			return look
		}
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
	v.conn.closing.Store(true) // its descriptor's number may soon be another's
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
