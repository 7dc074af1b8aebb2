package proxy

import (
	"bytes"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/proxy/clienthello"
	"sallyport/proxy/relay"
	"sallyport/proxy/upstream"
)

// What a passage waits for.
const (
	readingHead  = iota // the client's request
	connecting          // the far side
	readingHello        // the client's first bytes
	relaying            // whatever either side has to say
	lingering           // the client's end, after an answer
	forwarding          // what the coroutine of its visit waits for
	closed              // nothing: it is no longer the lane's
)

// bulky is how many full buffers in a row make a stream bulky, which the relay with
// its pipes is better at.
const bulky = 4

// maxReads bounds the reads of one connection before others get their turn.
const maxReads = 16

// lingerTime and lingerBytes bound what a refused client may still send, as in closeGently.
const (
	lingerTime  = time.Second
	lingerBytes = 256 << 10
)

// A passage is one client's connection in a lane, and its way to the far side. Only
// the lane's goroutine touches it.
type passage struct {
	lane    *lane
	setup   *setup  // until it is a tunnel
	t       *tunnel // from then on
	visit   *visit  // of plain HTTP; nil: it is none
	end     relay.End
	phase   uint8
	pending [2]bool // by side: something happened that was not looked at
	ended   [2]bool // by side: its stream has ended
	probed  bool    // the far side is asked for a sign of life now and then
	full    uint8   // reads in a row that filled the buffer
	fd      [2]int  // by side; -1: none
	slot    [2]uint32
	last    time.Time // when a byte last moved
	discard int       // bytes that a lingering client sent
}

// A setup is what a passage needs until it is a tunnel. It is used again for others.
type setup struct {
	c       connect
	t       trip
	source  asker
	counted netip.Addr
	start   time.Time
	head    []byte // the request, for those it is given away to
	dialled time.Time
	left    []netip.AddrPort // addresses not tried yet
	to      netip.AddrPort   // the one that is tried
	until   time.Time        // how long it is
	lost    []error          // what became of others
}

// enter serves the connection fd, which source opened.
func (l *lane) enter(fd int, source netip.AddrPort) {
	p := &passage{lane: l, fd: [2]int{fd, -1}}
	l.open++
	l.opening.Add(1)
	l.s.wg.Add(1)
	defer l.survive(p)
	p.setup = l.newSetup()
	p.setup.source = asker{AddrPort: source}
	p.setup.start = l.now
	p.slot[clientSide] = l.take(slot{p: p})
	if err := l.watch(fd, p.slot[clientSide], laneInterest); err != nil {
		l.s.cfg.Logger.Error().Err(err).Msg("a connection was closed")
		p.leave()
		return
	}
	if l.s.speaksForOthers(source.Addr()) {
		p.giveToFront()
		return
	}
	counted, tooMany := l.s.count(source.Addr(), l.now)
	p.setup.counted = counted
	if tooMany != nil {
		p.giveToHeads(nil, tooMany)
		return
	}
	p.lookAt(l.now.Add(l.s.cfg.Timeouts.RequestHeader))
}

// lookAt has the next sweep from t on call overdue. The client's connection must be p's.
func (p *passage) lookAt(t time.Time) {
	p.lane.due[p.slot[clientSide]] = int64(t.Sub(p.lane.began))
}

func (l *lane) newSetup() *setup {
	if n := len(l.spare) - 1; n >= 0 {
		u := l.spare[n]
		l.spare = l.spare[:n]
		return u
	}
	return new(setup)
}

// maxSetups bounds those that are kept.
const maxSetups = 64

// settle gives the setup back. The connection counts no longer as one without a tunnel.
func (p *passage) settle() {
	u := p.setup
	if u == nil {
		return
	}
	p.setup = nil
	l := p.lane
	l.opening.Add(-1)
	l.s.crowd.leave(u.counted)
	if len(l.spare) < maxSetups {
		*u = setup{head: u.head[:0], left: u.left[:0]}
		l.spare = append(l.spare, u)
	}
}

// serve looks at what happened to one of p's connections.
func (p *passage) serve(s side, events uint32) {
	const (
		// There may be no further event, or what is there is read in parts.
		final = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR | unix.EPOLLPRI
		said  = unix.EPOLLIN | final
	)
	switch p.phase {
	case forwarding:
		p.visit.happened(events)
	case readingHead:
		p.pending[s] = events&final != 0
		if events&said != 0 {
			p.readHead()
		}
	case connecting:
		switch {
		case s == farSide && events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0:
			p.connected(events)
		case s == clientSide && events&(unix.EPOLLHUP|unix.EPOLLERR) != 0:
			p.leftDialling()
		case s == clientSide && events&said != 0:
			p.pending[clientSide] = true
			p.awaitFar()
		}
	case readingHello:
		switch {
		case s == clientSide && events&said != 0:
			p.pending[clientSide] = events&final != 0
			p.readHello()
		case s == farSide && events&said != 0:
			p.pending[farSide] = true // it speaks first, or left
		}
	case relaying:
		if events&said != 0 {
			p.relay(s, events&final != 0)
		}
	case lingering:
		if s == clientSide && events&said != 0 {
			p.linger()
		}
	}
}

// readHead reads the request, of which nothing was read before.
func (p *passage) readHead() {
	l := p.lane
	n, err := readFD(p.fd[clientSide], l.buf[:])
	if errors.Is(err, unix.EAGAIN) {
		p.pending[clientSide] = false
		return
	}
	if n == 0 { // a probe, or a connection opened in advance
		p.leave()
		return
	}
	raw := l.buf[:n]
	var lines headLines
	end, err := lines.end(raw, false)
	switch {
	case err != nil || end != n || n > l.s.cfg.Limits.HeaderBytes:
		p.giveRequest(raw)
		return
	case p.visit != nil || !bytes.HasPrefix(raw, []byte("CONNECT ")):
		if r := l.plainRequest(raw); r != nil {
			p.forward(r, raw)
		} else {
			p.giveRequest(raw)
		}
		return
	}
	h, err := parseHead(raw)
	if err != nil || len(h.target) > l.s.cfg.Limits.URLBytes {
		p.giveToHeads(raw, nil)
		return
	}
	p.setup.head = append(p.setup.head, raw...)
	p.open(&h)
}

// giveRequest gives a client's connection away, with what was read of a request.
func (p *passage) giveRequest(raw []byte) {
	if p.visit != nil {
		p.giveToHTTP(raw)
	} else {
		p.giveToHeads(raw, nil)
	}
}

// open decides about a CONNECT and begins to connect to the far side, where both are
// possible at once.
func (p *passage) open(h *head) {
	s, u := p.lane.s, p.setup
	c := &u.c
	if s.users.enabled() || s.cfg.Auth.Required {
		p.giveToHeads(u.head, nil)
		return
	}
	s.begin(c, nil, u.source, u.start, h)
	if r := c.ask(h); r != nil {
		p.refuse(r)
		return
	}
	start := time.Now()
	addrs := s.atHand(c)
	if addrs == nil {
		c.release()
		p.giveToHeads(u.head, nil)
		return
	}
	u.t = trip{decision: c.decision, request: c.request}
	if r := s.check(&u.t, addrs, false); r != nil {
		p.refuse(r)
		return
	}
	u.left = append(u.left, upstream.Interleave(u.t.addresses)...)
	u.dialled = time.Now()
	if !c.request.Name.IsZero() {
		c.ev.DNSTime = u.dialled.Sub(start)
	}
	p.phase = connecting
	p.dial()
}

// dial tries the next address.
func (p *passage) dial() {
	l, u := p.lane, p.setup
	a := u.left[0]
	u.left = u.left[1:]
	fd, err := dialFD(a)
	if err != nil {
		p.unreachable(a, err)
		return
	}
	if l.s.descriptors.spentAt(fd) {
		closeFD(fd)
		p.refuse(limited(u.t.decision, http.StatusServiceUnavailable, errDescriptors))
		return
	}
	p.fd[farSide], p.slot[farSide] = fd, l.take(slot{p: p, side: farSide})
	l.s.towards(&u.t.request, a.Addr())
	u.to = a
	u.until = u.dialled.Add(l.s.cfg.Timeouts.Connect)
	if len(u.left) > 0 {
		u.until = l.now.Add(upstream.Stagger)
	}
	p.awaitFar()
	if err := l.watch(fd, p.slot[farSide], laneInterest); err != nil {
		p.refuse(connectFailed(u.t.decision, err))
	}
}

// awaitFar sets the time for which the far side is waited for, and before that one at
// which to look whether a client that something happened to is still there. One that
// is there then has said something, and stays; when it breaks there is an event.
func (p *passage) awaitFar() {
	u := p.setup
	at := u.until
	if look := u.dialled.Add(leftEvery); p.pending[clientSide] && look.Before(at) {
		at = look
	}
	p.lookAt(at)
}

// leftDialling ends the attempt to connect for a client that has gone.
func (p *passage) leftDialling() {
	u := p.setup
	u.c.ev.ConnTime = time.Since(u.dialled)
	p.refuse(connectFailed(u.t.decision, errLeftDialling))
}

// unreachable goes on with the next address, or refuses.
func (p *passage) unreachable(a netip.AddrPort, err error) {
	u := p.setup
	p.closeSide(farSide)
	u.lost = append(u.lost, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(a), Err: err})
	if len(u.left) > 0 {
		p.dial()
		return
	}
	u.c.ev.ConnTime = time.Since(u.dialled)
	p.refuse(connectFailed(u.t.decision, errors.Join(u.lost...)))
}

// connected answers the client once the far side has.
func (p *passage) connected(events uint32) {
	l, u := p.lane, p.setup
	c := &u.c
	if err := pendingError(p.fd[farSide]); err != nil {
		p.unreachable(u.to, os.NewSyscallError("connect", err))
		return
	}
	p.pending[farSide] = events&(unix.EPOLLIN|unix.EPOLLRDHUP) != 0
	c.ev.ConnTime = time.Since(u.dialled)
	// Which rule let the connection pass depends on the address, and the policy
	// may have changed on the way.
	c.request = u.t.request
	if c.decision = l.s.cfg.Decider.Decide(c.request); !c.decision.Passes() {
		p.refuse(denied(c.decision))
		return
	}
	c.ev.Destination = u.to
	if c.decision.Verdict != policy.Allow {
		p.giveToConnect((*connect).establish, nil)
		return
	}
	if n, err := writeFD(p.fd[clientSide], []byte(established)); n < len(established) {
		p.gone(err)
		return
	}
	c.answered, c.ev.Status = true, http.StatusOK
	if c.decision.Inspect&policy.InspectNone != 0 {
		c.request.Protocol = policy.ProtocolTCP
		p.start(0)
		return
	}
	c.since = time.Now()
	p.phase = readingHello
	p.lookAt(c.since.Add(l.s.cfg.Timeouts.ClientHello))
	if p.pending[clientSide] {
		p.readHello()
	}
}

// readHello reads what the client says first. What is not a ClientHello in one piece
// is for others to look at.
func (p *passage) readHello() {
	l, c := p.lane, &p.setup.c
	limit := l.s.cfg.Limits.ClientHelloBytes
	n, err := readFD(p.fd[clientSide], l.buf[:])
	if errors.Is(err, unix.EAGAIN) {
		return
	}
	hello, _, err := clienthello.Parse(l.buf[:n], limit)
	if err != nil {
		p.giveToConnect((*connect).serve, l.buf[:n])
		return
	}
	if r := c.sawTLS(&hello); r != nil {
		p.refuse(r)
		return
	}
	m, err := writeFD(p.fd[farSide], l.buf[:n])
	switch {
	case err == nil && m < n || errors.Is(err, unix.EAGAIN): // a far side with very little room
		rest := bytes.Clone(l.buf[m:n])
		p.pending = [2]bool{} // nothing may overtake the rest
		p.start(m)
		p.giveToRelay(clientSide, rest)
	case err != nil:
		p.refuse(&refusal{decision: c.decision.Refuse(policy.ReasonConnectFailed), err: err})
	default:
		p.pending[clientSide] = p.pending[clientSide] || n == len(l.buf)
		p.start(m)
	}
}

// start makes p a tunnel, of which n bytes went up.
func (p *passage) start(n int) {
	l, c := p.lane, &p.setup.c
	t := c.newTunnel()
	t.up.Store(int64(n))
	t.passage.Store(p)
	t.prepare()
	generation := c.generation
	p.t, p.phase, p.last = t, relaying, l.now
	p.awaitSilence()
	p.settle()
	l.s.register(t, generation)
	for s, pending := range p.pending {
		if pending && p.phase == relaying {
			p.relay(side(s), true)
		}
	}
}

// relay moves what s has to say to the other side. final says that nothing more may
// come after what is there, of which there may be no further event.
//
// A peer that goes on and on is given away: others wait for their turn.
func (p *passage) relay(s side, final bool) {
	l := p.lane
	live := &p.t.up
	if s == farSide {
		live = &p.t.down
	}
	for range maxReads {
		n, err := readFD(p.fd[s], l.buf[:])
		switch {
		case errors.Is(err, unix.EAGAIN):
			p.full = 0
			return
		case err != nil:
			p.broken(s, err)
			return
		case n == 0:
			p.endOf(s)
			return
		}
		p.last = l.now
		m, err := writeFD(p.fd[s.other()], l.buf[:n])
		live.Add(int64(m))
		if m < n || err != nil { // it takes no more now, or is broken: what it said before is still to be delivered
			if err != nil && !errors.Is(err, unix.EAGAIN) && !p.ended[s.other()] {
				note(&p.t.ev, errors.New(describe(failed("write", s.other(), err)))) // this is the only time that the kernel says so
			}
			p.giveToRelay(s, l.buf[m:n])
			return
		}
		if n < len(l.buf) && !final {
			p.full = 0
			return
		}
		if n == len(l.buf) {
			if p.full++; p.full == bulky {
				p.giveToRelay(s, nil)
				return
			}
		}
	}
	p.giveToRelay(s, nil)
}

// endOf passes the end of s's stream on. Both together are the end of the tunnel.
func (p *passage) endOf(s side) {
	if p.ended[s] {
		p.awaitReset(s)
		return
	}
	p.ended[s] = true
	if p.end == 0 {
		p.end = relay.ClientClosed + relay.End(s)
	}
	if p.ended[s.other()] {
		p.over(relay.Result{End: p.end})
		return
	}
	shutdownFD(p.fd[s.other()])
	p.awaitReset(s)
}

// awaitReset ends a tunnel if the connection of s, whose stream has ended, is broken.
// Reads say nothing of that, and the other side may be silent for long.
func (p *passage) awaitReset(s side) {
	if err := relay.ResetError(p.fd[s]); err != nil {
		p.broken(s, err)
	}
}

// broken ends a tunnel of which the connection of s is.
func (p *passage) broken(s side, err error) {
	r := failed("read", s, err)
	if p.ended[s] {
		r.End = relay.ClientClosed + relay.End(s)
	}
	p.over(r)
}

// failed says that op failed at the connection of s.
func failed(op string, s side, err error) relay.Result {
	return relay.Result{End: relay.ClientFailed + relay.End(s), Err: &net.OpError{Op: op, Net: "tcp", Err: os.NewSyscallError(op, err)}}
}

// over ends a tunnel and emits its event.
func (p *passage) over(r relay.Result) {
	t := p.t
	p.closeSide(clientSide)
	p.closeSide(farSide)
	t.end(describe(r))
	p.leave()
}

// cut ends t, which p relays, from any goroutine.
func (p *passage) cut(t *tunnel) {
	p.lane.post(func() {
		switch {
		case p.t == t:
			p.lane.do(p, (*passage).cutTunnel)
		case t.passage.Load() == nil: // it has been given away, or has ended
			t.cut()
		}
	})
}

func (p *passage) cutTunnel() { p.over(relay.Result{End: relay.Cancelled}) }

// overdue looks at p, whose time may be over.
func (p *passage) overdue() {
	l := p.lane
	switch p.phase {
	case readingHead: // nobody has asked for anything
		p.leave()
	case forwarding:
		p.visit.overdue()
	case connecting:
		u := p.setup
		if p.pending[clientSide] && hasLeftFD(p.fd[clientSide], false, false) {
			p.leftDialling()
			return
		}
		if l.now.Before(u.until) {
			p.lookAt(u.until)
			return
		}
		if len(u.left) > 0 { // others are better at racing addresses
			u.c.release()
			p.giveToHeads(u.head, nil)
			return
		}
		p.unreachable(u.to, os.ErrDeadlineExceeded)
	case readingHello:
		p.giveToConnect((*connect).serve, nil)
	case relaying:
		quiet := l.now.Sub(p.last)
		if quiet >= l.s.cfg.Timeouts.Idle {
			p.over(relay.Result{End: relay.IdleTimeout})
			return
		}
		if quiet >= probeAfter && !p.probed {
			p.probed = true
			_ = setKeepAlive(p.fd[farSide])
		}
		p.awaitSilence()
	case lingering:
		p.leave()
	}
}

// awaitSilence sets the time to look whether anything was said since then. What is said
// meanwhile need not move it.
func (p *passage) awaitSilence() {
	quiet := p.lane.s.cfg.Timeouts.Idle
	if !p.probed {
		quiet = min(quiet, probeAfter)
	}
	p.lookAt(p.last.Add(quiet))
}

// probeAfter is how long a tunnel is quiet before it is worth four system calls to
// have the kernel look whether the far side is still there.
const probeAfter = 5 * time.Second

// refuse tells the client of r, emits the event, and closes.
func (p *passage) refuse(r *refusal) {
	c := &p.setup.c
	p.closeSide(farSide)
	said := c.words(r)
	n, err := lastWordsFD(p.fd[clientSide], said)
	c.finish(r.decision, r.err)
	if err != nil || n < len(said) {
		p.leave()
		return
	}
	p.awaitEnd()
}

// awaitEnd ends what is said to the client, and waits for its end.
func (p *passage) awaitEnd() {
	l := p.lane
	shutdownFD(p.fd[clientSide])
	p.phase = lingering
	p.lookAt(l.now.Add(lingerTime))
	if p.pending[clientSide] { // else there will be an event
		p.linger()
	}
}

// linger discards what a refused client still sends: a close with bytes unread would
// reset the connection, and a reset may overtake the answer.
func (p *passage) linger() {
	for p.discard < lingerBytes {
		n, err := readFD(p.fd[clientSide], p.lane.buf[:])
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if n == 0 {
			break
		}
		p.discard += n
	}
	p.leave()
}

// gone ends a CONNECT whose client went away. Nothing was refused.
func (p *passage) gone(err error) {
	c := &p.setup.c
	c.finish(c.decision, err)
	p.leave()
}

// cutShort ends what is not a tunnel yet because the time of the whole server is over.
func (p *passage) cutShort() {
	switch u := p.setup; p.phase {
	case forwarding: // closeVisits does that
		return
	case connecting:
		p.refuse(connectFailed(u.t.decision, errDraining))
	case readingHello:
		u.c.finish(u.c.decision, errDraining)
	}
	p.leave()
}

// short ends p, for which there are no descriptors any more. What was asked for has
// its event.
func (p *passage) short() {
	s, u := p.lane.s, p.setup
	if u.c.s == nil {
		u.c.s, u.c.ev = s, s.newEvent(event.HTTP, u.source, u.start)
	}
	u.c.finish(u.c.decision.Refuse(policy.ReasonLimitExceeded), errDescriptors)
}

// crashed ends p after a panic, without an event.
func (p *passage) crashed() {
	if p.t != nil {
		p.lane.s.tunnels.remove(p.t)
	}
	if p.setup != nil {
		p.setup.c.release()
	}
	p.leave()
}

// leave closes what p still has and takes it out of the lane.
func (p *passage) leave() {
	if p.phase == closed {
		return
	}
	p.phase = closed
	l := p.lane
	p.closeSide(clientSide)
	p.closeSide(farSide)
	p.settle()
	if p.t != nil {
		p.t.passage.Store(nil)
		p.t = nil
	}
	if p.visit != nil {
		p.visit.end()
		p.visit = nil
	}
	l.open--
	l.s.descriptors.release()
	l.s.wg.Done()
}

// closeSide closes a connection. Closing takes it out of epoll.
func (p *passage) closeSide(s side) {
	if p.fd[s] < 0 {
		return
	}
	closeFD(p.fd[s])
	p.fd[s] = -1
	p.lane.giveBack(p.slot[s])
}

// giveToFront gives the connection away as it is.
func (p *passage) giveToFront() {
	s := p.lane.s
	if conn := p.give(clientSide); conn != nil {
		s.wg.Add(1)
		go s.servePassed(conn)
	}
	p.leave()
}

func (s *Server) servePassed(conn net.Conn) {
	defer s.wg.Done()
	s.serveConn(conn)
}

// giveToHeads gives a client's connection away to those who read heads, with what was
// read so far.
func (p *passage) giveToHeads(raw []byte, tooMany error) {
	s, u := p.lane.s, p.setup
	if conn := p.give(clientSide); conn != nil {
		s.wg.Add(1)
		go s.readPassed(conn, u.counted, u.source, u.start, bytes.Clone(raw), tooMany)
		u.counted = netip.Addr{} // it is counted on
	} else if len(raw) > 0 || tooMany != nil {
		p.short()
	}
	p.leave()
}

func (s *Server) readPassed(conn net.Conn, counted netip.Addr, source asker, start time.Time, raw []byte, tooMany error) {
	defer s.wg.Done()
	defer s.recovered(conn)
	p := s.enter(conn, len(raw) > 0)
	p.counted = counted
	defer s.descriptors.release()
	defer s.leave(p)
	buf := buffers.Get().(*[minBuffer]byte)
	defer buffers.Put(buf)
	conn.SetReadDeadline(start.Add(s.cfg.Timeouts.RequestHeader))
	s.proceed(p, source, start, tooMany, append(buf[:0], raw...))
}

// giveToConnect gives both connections away to those who serve any CONNECT, which go
// on with do. early is what the client has said after the head.
func (p *passage) giveToConnect(do func(c *connect, far net.Conn), early []byte) {
	s, u := p.lane.s, p.setup
	client, far := p.give(clientSide), p.give(farSide)
	if client == nil || far == nil {
		closeAll(client, far)
		p.short()
		p.leave()
		return
	}
	c := new(connect)
	*c = u.c
	u.c.place = nil // it is c's
	c.client = client
	c.early = append(make([]byte, 0, max(minBuffer, len(early))), early...)
	s.wg.Add(1)
	go s.servePassedConnect(c, far, u.counted, do)
	u.counted = netip.Addr{}
	p.leave()
}

func (s *Server) servePassedConnect(c *connect, far net.Conn, counted netip.Addr, do func(*connect, net.Conn)) {
	defer s.wg.Done()
	defer s.recovered(c.client)
	p := s.enter(c.client, true)
	p.counted = counted
	defer s.descriptors.release()
	defer s.leave(p)
	defer c.release()
	do(c, far)
}

// giveToRelay gives a tunnel away to a goroutine of its own: rest, from s, is first to
// go to the other side.
func (p *passage) giveToRelay(s side, rest []byte) {
	t := p.t
	client, far := p.give(clientSide), p.give(farSide)
	if client == nil || far == nil {
		closeAll(client, far)
		t.end(errDescriptors.Error())
		p.leave()
		return
	}
	t.client, t.upstream = client, far
	o := relay.Options{Idle: t.s.cfg.Timeouts.Idle, Up: &t.up, Down: &t.down}
	if rest = bytes.Clone(rest); s == clientSide {
		o.UpFirst = rest
	} else {
		o.DownFirst = rest
	}
	t.s.wg.Add(1)
	go t.runOn(o)
	p.leave() // from here on cut closes the connections
}

// runOn is run for a tunnel that has begun in a lane.
func (t *tunnel) runOn(o relay.Options) {
	defer t.over()
	t.relayed(relay.Relay(t.client, t.upstream, o))
}

// give makes a connection of package net of one of p's, which is p's no longer. It
// returns nil if there are no descriptors for that.
func (p *passage) give(s side) net.Conn {
	if p.fd[s] < 0 {
		return nil
	}
	fd := p.fd[s]
	p.fd[s] = -1
	p.lane.unwatch(fd)
	p.lane.giveBack(p.slot[s])
	conn, err := connOf(fd)
	if err != nil {
		p.lane.s.cfg.Logger.Debug().Err(err).Msg("a connection was closed")
		return nil
	}
	return conn
}

func closeAll(conns ...net.Conn) {
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
}

// atHand returns the addresses of c's destination if they are known at once and are to
// be dialled from here, else nil.
func (s *Server) atHand(c *connect) []netip.Addr {
	w := s.wayOf(c.decision.Group)
	switch {
	case c.decision.Verdict != policy.Allow, w.Parent != nil, w.Source != (upstream.Source{}):
		return nil
	case c.request.Name.IsZero():
		return []netip.Addr{c.request.Address.Unmap()}
	case s.cfg.Known == nil:
		return nil
	}
	return upstream.Distinct(s.cfg.Known(c.request.Name))
}
