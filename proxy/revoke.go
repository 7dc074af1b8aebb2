package proxy

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"

	"sallyport/policy"
)

// clients are the connections that net/http serves.
type clients struct {
	mu   sync.Mutex // guards live
	live map[*clientConn]struct{}
}

func (cs *clients) add(c *clientConn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.live[c] = struct{}{}
}

func (cs *clients) remove(c *clientConn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	delete(cs.live, c)
}

// closeVisits closes the connections that lanes serve, which http.Server does not know.
func (cs *clients) closeVisits() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for c := range cs.live {
		if c.visit != nil {
			c.Conn.Close()
		}
	}
}

// each calls f with every exchange under way, without the lock.
func (cs *clients) each(f func(*liveExchange)) {
	cs.mu.Lock()
	all := make([]*clientConn, 0, len(cs.live))
	for c := range cs.live {
		all = append(all, c)
	}
	cs.mu.Unlock()
	for _, c := range all {
		f(&c.live)
	}
}

// A liveExchange is the exchange under way on a client's connection, as a change of
// policy finds it.
type liveExchange struct {
	mu       sync.Mutex // guards what follows
	ex       *exchange  // nil: none
	request  policy.Request
	upstream net.Conn           // what the response comes from; nil: not yet known
	answered bool               // the response has begun
	giveUp   context.CancelFunc // ends the dial under way; nil: none
}

// begin says that ex is under way. A policy that changed since the decision about
// it has not seen it.
func (l *liveExchange) begin(ex *exchange) {
	l.mu.Lock()
	l.ex, l.request = ex, ex.request
	if p := ex.client.there; p != nil {
		p.begin()
	}
	l.mu.Unlock()
	if ex.s.generation.Load() != ex.generation || !ex.s.users.isStill(ex.who.user, ex.who.hash) {
		l.recheck()
		l.cutRevoked()
	}
}

// under reports whether an exchange is under way.
func (l *liveExchange) under() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ex != nil
}

// dialling has giveUp called if the client goes, or a later policy ends the exchange,
// before the far side is reached.
func (l *liveExchange) dialling(giveUp context.CancelFunc) {
	l.mu.Lock()
	l.giveUp = giveUp
	over := l.ex != nil && (l.ex.left.Load() || l.ex.revoked.Load() != nil)
	l.mu.Unlock()
	if over {
		giveUp()
	}
}

// reached says which connection serves the exchange, and what was decided for it.
func (l *liveExchange) reached(conn net.Conn, request policy.Request) {
	l.mu.Lock()
	l.upstream, l.request, l.giveUp = conn, request, nil
	over := l.ex != nil && (l.ex.revoked.Load() != nil || l.ex.left.Load() || l.ex.s.life.Err() != nil)
	l.mu.Unlock()
	if over {
		conn.Close()
	}
}

// revokedBy is the refusal of an exchange that a later policy ended with d; err is how
// it ended.
func revokedBy(d *policy.Decision, err error) *refusal {
	return &refusal{decision: d.Refuse(policy.ReasonPolicyRevoked), status: http.StatusForbidden, token: statusRequestDenied, err: err}
}

// done says that the exchange needs its connection no more, which may serve others.
func (l *liveExchange) done() {
	l.mu.Lock()
	l.upstream = nil
	l.mu.Unlock()
}

// leave says that the client has gone, and takes the far side away.
func (l *liveExchange) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ex == nil {
		return
	}
	l.ex.left.Store(true)
	if l.giveUp != nil {
		l.giveUp()
	}
	if l.upstream != nil {
		l.upstream.Close()
	}
}

// answer says that the response begins.
func (l *liveExchange) answer() {
	l.mu.Lock()
	l.answered = true
	l.mu.Unlock()
}

// end says that the exchange is over.
func (l *liveExchange) end() {
	l.mu.Lock()
	l.ex, l.upstream, l.answered, l.giveUp = nil, nil, false, nil
	l.mu.Unlock()
}

// recheck decides the exchange again and notes if it no longer passes.
func (l *liveExchange) recheck() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ex == nil {
		return
	}
	req := l.request
	req.Time = time.Now()
	if d := l.ex.s.cfg.Decider.Decide(req); !d.Passes() || !l.ex.s.users.isStill(l.ex.who.user, l.ex.who.hash) {
		l.ex.revoked.CompareAndSwap(nil, &d)
	}
}

// cutRevoked ends the exchange if a recheck said so: it takes the far side away,
// and once there is something of a response also the client.
func (l *liveExchange) cutRevoked() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ex == nil || l.ex.revoked.Load() == nil {
		return
	}
	if l.giveUp != nil {
		l.giveUp()
	}
	if l.upstream != nil {
		l.upstream.Close()
	}
	if l.answered && !l.ex.http2 { // a stream of HTTP/2 ends by itself, as the response breaks off
		l.ex.breakOff()
		abort(l.ex.client.Conn)
		l.ex.client.Conn.Close()
	}
}
