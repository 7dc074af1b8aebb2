package proxy

import (
	"bytes"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// pending is a connection that is neither a tunnel nor net/http's, yet.
type pending struct {
	conn  net.Conn
	begun atomic.Bool // the client has sent something

	counted netip.Addr // see crowd
	secure  bool       // it came to a TLS listener, and conn is what lies below
}

// listener returns the door that p came through.
func (p *pending) listener() string {
	if p.secure {
		return listenerTLS
	}
	return listenerOf(p.conn)
}

// closeUnused closes a connection on which nobody has asked for anything.
func (p *pending) closeUnused() {
	if !p.begun.Load() {
		p.conn.Close()
	}
}

// serveConn serves a connection until it is somebody else's: a tunnel's or net/http's.
func (s *Server) serveConn(conn net.Conn) {
	defer s.recovered(conn)
	p := s.enter(conn, false)
	defer s.descriptors.release()
	defer s.leave(p)
	buf := buffers.Get().(*[minBuffer]byte)
	defer buffers.Put(buf)
	s.front(p, buf[:0])
}

// maxChallenges bounds the requests on a connection that are answered 407 before it
// is closed. A client needs one.
const maxChallenges = 8

// front finds out who speaks on a connection, and reads its first head.
func (s *Server) front(p *pending, buf []byte) {
	start := time.Now()
	p.conn.SetReadDeadline(start.Add(s.cfg.Timeouts.RequestHeader))
	source, buf, ok := s.introduce(p, buf, start)
	if !ok {
		return
	}
	var tooMany error
	p.counted, tooMany = s.count(source.Addr(), start)
	s.proceed(p, source, start, tooMany, buf)
}

// proceed reads the first head of a connection from source, of which buf may hold the
// start. tooMany says that there are too many of that source.
func (s *Server) proceed(p *pending, source asker, start time.Time, tooMany error, buf []byte) {
	if tooMany != nil {
		defer s.hurried.Add(-1)
		if s.hurried.Add(1) > maxHurried {
			s.dropTooMany(p, source, start, tooMany)
			return
		}
		p.conn.SetReadDeadline(start.Add(min(hurry, s.cfg.Timeouts.RequestHeader)))
	}
	s.heads(p, source, start, tooMany, buf)
}

// heads reads the first head of a connection and passes the connection on. A client
// that was asked for credentials may send another one. The read deadline is set. buf
// may hold the start of the first head.
func (s *Server) heads(p *pending, source asker, start time.Time, tooMany error, buf []byte) {
	for range maxChallenges {
		if !s.head(p, source, start, tooMany, buf) {
			return
		}
		p.begun.Store(false)
		if s.draining.Load() { // which may not have seen that
			break
		}
		buf, start = buf[:0], time.Now()
		p.conn.SetWriteDeadline(time.Time{}) // the one of the 407 would hold for the next answer
		p.conn.SetReadDeadline(start.Add(s.cfg.Timeouts.RequestHeader))
	}
	closeGently(p.conn, buf[:cap(buf)])
}

// head reads a head and passes the connection on, or reports that the client may
// send another one.
func (s *Server) head(p *pending, source asker, start time.Time, tooMany error, buf []byte) (again bool) {
	raw, n, err := readHead(firstRead{p}, buf, s.cfg.Limits.HeaderBytes)
	if len(raw) == 0 { // a probe, or a connection opened in advance
		if tooMany != nil {
			s.dropTooMany(p, source, start, tooMany)
		}
		p.conn.Close()
		return false
	}
	if err := s.unexpected(p, raw); err != nil {
		s.reject(p, source, start, err)
		return false
	}
	var h head
	if err == nil {
		h, err = parseHead(raw[:n])
	}
	if err == nil && len(h.target) > s.cfg.Limits.URLBytes {
		err = errURLTooLong
	}
	switch {
	case tooMany != nil:
		s.refuseTooMany(p, source, start, &h, tooMany)
	case err != nil:
		s.refuseHead(p.conn, source, start, &h, err)
	case h.isConnect():
		return s.serveConnect(p.conn, source, start, &h, raw[n:])
	default:
		counted := p.counted
		p.counted = netip.Addr{} // it is c's from now on
		s.serveByHTTP(&clientConn{
			idleConn: idleConn{Conn: p.conn, idle: s.clientIdle()},
			s:        s, source: source, counted: counted, in: requests(s, raw),
		})
	}
	return false
}

// firstRead notes that the client has sent something: from then on Shutdown waits.
type firstRead struct{ p *pending }

func (r firstRead) Read(b []byte) (int, error) {
	n, err := r.p.conn.Read(b)
	if n > 0 {
		r.p.begun.Store(true)
	}
	return n, err
}

// refuseHead answers a head that is not HTTP as it should be.
func (s *Server) refuseHead(conn net.Conn, source asker, start time.Time, h *head, err error) {
	c := &connect{s: s, client: conn, json: h.json}
	kind := event.HTTP
	if h.isConnect() {
		kind = event.Connect
		c.ev.Name = shown(string(h.target))
	}
	name := c.ev.Name
	c.ev = s.newEvent(kind, source, start)
	c.ev.Listener = listenerOf(conn)
	c.ev.Name, c.ev.Method, c.ev.UserAgent = name, clip(string(h.method)), clip(string(h.userAgent))
	if !isHeadError(err) { // the client went away in the middle of it
		c.decision = c.decision.Refuse(policy.ReasonBadRequest)
		c.gone(err)
		return
	}
	c.refuse(badRequest(c.decision, err))
}

// serveByHTTP gives c to net/http.
func (s *Server) serveByHTTP(c *clientConn) {
	c.Conn.SetReadDeadline(time.Time{})
	c.there = newPresence(c.Conn, &c.live)
	s.wg.Add(1)
	s.clients.add(c)
	if c.session == nil {
		s.httpConns.Add(1)
	}
	if !s.handOff.give(c) {
		s.refuseDraining(c)
		s.connState(c, http.StateClosed)
	}
}

// refuseDraining answers a first request that comes after Shutdown has begun.
func (s *Server) refuseDraining(c *clientConn) {
	x := &connect{s: s, client: c.Conn}
	x.ev = s.newEvent(event.HTTP, c.source, time.Now())
	x.ev.Listener = listenerOf(c.Conn)
	x.refuse(limited(policy.Decision{}, http.StatusServiceUnavailable, errDraining))
}

// connState follows the connections that net/http serves.
func (s *Server) connState(conn net.Conn, state http.ConnState) {
	c := conn.(*clientConn)
	switch state {
	case http.StateIdle: // until a handler is called for the next request
		c.serving.Store(false)
	case http.StateClosed, http.StateHijacked:
		s.clients.remove(c)
		if c.there != nil {
			c.there.end()
		}
		if c.session == nil {
			s.httpConns.Add(-1)
		} else if state == http.StateClosed {
			c.session.end()
		}
		s.crowd.leave(c.counted)
		s.descriptors.release()
		s.wg.Done()
	}
}

// requests returns the reading side of a connection of which raw was read before.
func requests(s *Server, raw []byte) framed {
	return framed{framing: framing{limit: s.cfg.Limits.HeaderBytes}, held: bytes.Clone(raw)}
}

// unreadable returns the answer to a request that cannot be read because of err,
// and emits the event.
func (s *Server) unreadable(c *clientConn, err error) []byte {
	ev := s.newEvent(event.HTTP, c.source, time.Now())
	ev.Listener = listenerOf(c.Conn)
	r := badRequest(policy.Decision{}, err)
	if c.session != nil {
		r.decision = c.session.tunnel.ev.Decision.Refuse(policy.ReasonBadRequest)
		ev.Name, ev.Port = c.session.tunnel.ev.Name, c.session.tunnel.ev.Port
	}
	ev.Status, ev.Decision = r.status, r.decision
	note(&ev, r.err)
	s.observe(&ev)
	return s.answer(r, &ev, false).append(nil, r.phrase(false))
}

// takeBack serves a CONNECT that arrived on a connection of net/http.
func (s *Server) takeBack(c *clientConn, w http.ResponseWriter, r *http.Request) {
	h := &head{
		method: []byte(r.Method), target: []byte(r.RequestURI), userAgent: []byte(r.UserAgent()),
		json: wantsJSON(r.Header.Get("Accept")), looped: hasLooped(r.Header),
		via: []byte(strings.Join(r.Header["Via"], ", ")), minor: '0' + byte(r.ProtoMinor),
		credentials: []byte(r.Header.Get("Proxy-Authorization")), authorized: len(r.Header["Proxy-Authorization"]),
	}
	start := time.Now()
	s.wg.Add(1)
	counted := c.counted
	c.counted = netip.Addr{} // it still counts when net/http is done with it
	conn, early, err := c.hijack(w)
	if err != nil {
		c.counted = counted
		s.wg.Done()
		panic(http.ErrAbortHandler)
	}
	go s.serveTakenBack(conn, counted, c.source, start, h, early, r.ContentLength != 0)
}

func (s *Server) serveTakenBack(conn net.Conn, counted netip.Addr, source asker, start time.Time, h *head, early []byte, content bool) {
	defer s.wg.Done()
	defer s.recovered(conn)
	p := s.enter(conn, true)
	p.counted = counted
	defer s.leave(p)
	// The client may not have taken in what came before, and so not take in the 200.
	conn.SetWriteDeadline(start.Add(s.cfg.Timeouts.Connect + answerTime))
	if content {
		s.refuseHead(conn, source, start, h, badHead("CONNECT with content"))
		return
	}
	if s.serveConnect(conn, source, start, h, early) {
		conn.SetDeadline(time.Time{})
		conn.SetReadDeadline(time.Now().Add(s.cfg.Timeouts.RequestHeader))
		s.heads(p, source, time.Now(), nil, early[:0])
	}
}

// enter registers a connection. One that Shutdown came too early to see is closed.
func (s *Server) enter(conn net.Conn, begun bool) *pending {
	p := &pending{conn: conn}
	p.begun.Store(begun)
	s.mu.Lock()
	s.pending[p] = struct{}{}
	s.mu.Unlock()
	if s.draining.Load() {
		p.closeUnused()
	}
	if s.life.Err() != nil {
		conn.Close()
	}
	return p
}

func (s *Server) leave(p *pending) {
	s.crowd.leave(p.counted)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pending, p)
}

// eachPending calls f with every pending connection, without the lock.
func (s *Server) eachPending(f func(*pending)) {
	s.mu.Lock()
	all := make([]*pending, 0, len(s.pending))
	for p := range s.pending {
		all = append(all, p)
	}
	s.mu.Unlock()
	for _, p := range all {
		f(p)
	}
}
