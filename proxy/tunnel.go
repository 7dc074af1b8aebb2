package proxy

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/proxy/relay"
)

// A tunnel is a client's connection that outlives the decision about it: an
// established CONNECT, or an upgraded HTTP connection. It is decided again when
// the policy changes. It holds nothing of the request's parsing.
type tunnel struct {
	s        *Server
	client   net.Conn
	upstream net.Conn       // nil while net/http has the client's connection (HTTP inside a CONNECT)
	request  policy.Request // the last one decided
	hash     string         // of its user's password, which a change of users must have kept; "": not known by one
	ev       event.Event
	up, down atomic.Int64 // bytes to the upstream, to the client
	place    *place       // among the tunnels, of its own; nil: none
	then     func()       // called after the end, unless nil

	revoked atomic.Pointer[policy.Decision] // what a later policy said, or byOperator
	passage atomic.Pointer[passage]         // that relays its bytes, without client and upstream; nil: a goroutine does
}

// start registers t and relays its bytes in a goroutine of its own, so that the
// caller's stack, grown while the tunnel was set up, is not kept. generation is
// the policy generation that t was decided under. t owns its connections.
func (t *tunnel) start(generation uint64) {
	t.prepare()
	t.s.wg.Add(1)
	t.s.register(t, generation)
	go t.run()
}

// prepare lets go of what is not t's. The rule's ID may be cut from the memory of a
// whole policy, which would then live as long as t.
func (t *tunnel) prepare() { t.ev.Decision.Rule = strings.Clone(t.ev.Decision.Rule) }

// run keeps its frame small: it is on the stack as long as the tunnel lives.
func (t *tunnel) run() {
	defer t.over()
	t.relayed(relay.Relay(t.client, t.upstream, relay.Options{Idle: t.s.cfg.Timeouts.Idle, Up: &t.up, Down: &t.down}))
}

// relayed ends t in good order.
func (t *tunnel) relayed(r relay.Result) {
	if r.End != relay.ClientClosed && r.End != relay.UpstreamClosed {
		abort(t.client)
	}
	t.client.Close()
	t.upstream.Close()
	t.s.descriptors.release()
	t.end(describe(r))
}

// over, deferred, lets the server go on without t. After a panic there is no event.
func (t *tunnel) over() {
	defer t.s.wg.Done()
	if v := recover(); v != nil {
		t.s.crashed(v)
		abort(t.client)
		t.abandon()
	}
}

// abandon takes t out of the registry after a panic.
func (t *tunnel) abandon() {
	t.cut()
	t.s.tunnels.remove(t)
}

// describe says for operators how a tunnel ended, unless it was in good order.
func describe(r relay.Result) string {
	switch {
	case r.End == relay.ClientClosed, r.End == relay.UpstreamClosed:
		return ""
	case r.Err != nil:
		return fmt.Sprintf("%s: %v", r.End, r.Err)
	}
	return r.End.String()
}

// end takes t out of the registry and emits its event.
func (t *tunnel) end(problem string) {
	t.s.tunnels.remove(t)
	if d := t.revoked.Load(); d == byOperator {
		t.ev.Error = closedByOperator
	} else if d != nil {
		t.ev.Decision = d.Refuse(policy.ReasonPolicyRevoked)
	}
	t.ev.Protocol = t.request.Protocol
	t.ev.BytesUp, t.ev.BytesDown = t.up.Load(), t.down.Load()
	if t.ev.Error == "" {
		t.ev.Error = problem
	}
	t.s.observe(&t.ev)
	if t.then != nil {
		t.then()
	}
}

// cut ends t from any goroutine: its owner notices, closes and reports.
func (t *tunnel) cut() {
	if p := t.passage.Load(); p != nil {
		p.cut(t)
		return
	}
	if t.client == nil {
		return // it has ended in a passage
	}
	abort(t.client)
	t.client.Close()
	if t.upstream != nil {
		t.upstream.Close()
	}
}

// recheck decides t again and notes if it no longer passes.
func (t *tunnel) recheck() {
	req := t.request
	req.Time = time.Now()
	d := t.s.cfg.Decider.Decide(req)
	if !d.Passes() || !t.s.users.isStill(req.User, t.hash) {
		t.revoked.CompareAndSwap(nil, &d)
	}
}

// cutRevoked ends t if a recheck said so.
func (t *tunnel) cutRevoked() {
	if t.revoked.Load() != nil {
		t.cut()
	}
}

var (
	errTooMany           = errors.New("proxy.limits.tunnels reached")
	errTooManyFromSource = errors.New("proxy.limits.tunnels_per_source reached")
	errTooManyFromGroup  = errors.New("proxy.limits.tunnels_per_group reached")
	errDraining          = errors.New("the proxy is stopping")
)

// tunnels counts what is being set up and keeps what is established.
type tunnels struct {
	limits Limits

	mu       sync.Mutex // guards what follows
	reserved int        // places taken, by tunnels and what may become one
	bySource map[netip.Addr]int
	byGroup  map[string]int
	live     map[*tunnel]struct{}
	up, down int64 // bytes of tunnels that have ended
}

// A place is one among the tunnels, if their number is limited. It is given back once.
type place struct {
	source netip.Addr // by limitKey
	group  string     // that it counts for, whatever a later policy says
}

// reserve takes a place for a tunnel from source, which d lets pass. Without a
// limit there is none.
func (ts *tunnels) reserve(source netip.Addr, d policy.Decision) (*place, *refusal) {
	l := &ts.limits
	if l.Tunnels <= 0 && l.TunnelsPerSource <= 0 && l.TunnelsPerGroup <= 0 {
		return nil, nil
	}
	p := &place{limitKey(source), d.Group}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	switch {
	case l.TunnelsPerSource > 0 && ts.bySource[p.source] >= l.TunnelsPerSource:
		return nil, limited(d, http.StatusTooManyRequests, errTooManyFromSource)
	case l.TunnelsPerGroup > 0 && ts.byGroup[p.group] >= l.TunnelsPerGroup:
		return nil, limited(d, http.StatusServiceUnavailable, errTooManyFromGroup)
	case l.Tunnels > 0 && ts.reserved >= l.Tunnels:
		return nil, limited(d, http.StatusServiceUnavailable, errTooMany)
	}
	ts.count(p, 1)
	return p, nil
}

// count adds n to what p counts for. The caller holds mu.
func (ts *tunnels) count(p *place, n int) {
	ts.reserved += n
	if ts.limits.TunnelsPerSource > 0 {
		if ts.bySource[p.source] += n; ts.bySource[p.source] == 0 {
			delete(ts.bySource, p.source)
		}
	}
	if ts.limits.TunnelsPerGroup > 0 {
		if ts.byGroup[p.group] += n; ts.byGroup[p.group] == 0 {
			delete(ts.byGroup, p.group)
		}
	}
}

func limited(d policy.Decision, status int, err error) *refusal {
	return &refusal{decision: d.Refuse(policy.ReasonLimitExceeded), status: status, token: statusLimit, err: err}
}

// release gives a place back. There may be none.
func (ts *tunnels) release(p *place) {
	if p == nil {
		return
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	ts.count(p, -1)
}

func (ts *tunnels) add(t *tunnel) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	ts.live[t] = struct{}{}
}

// detach forgets t, which another tunnel will replace. Place and bytes are its.
func (ts *tunnels) detach(t *tunnel) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	delete(ts.live, t)
}

// remove forgets t, gives its place back and keeps the sum of its bytes.
func (ts *tunnels) remove(t *tunnel) {
	ts.mu.Lock()
	_, there := ts.live[t]
	if there {
		delete(ts.live, t)
		ts.up += t.up.Load()
		ts.down += t.down.Load()
	}
	ts.mu.Unlock()
	if there {
		ts.release(t.place)
	}
}

// each calls f with every live tunnel, without the lock.
func (ts *tunnels) each(f func(*tunnel)) {
	ts.mu.Lock()
	all := make([]*tunnel, 0, len(ts.live))
	for t := range ts.live {
		all = append(all, t)
	}
	ts.mu.Unlock()
	for _, t := range all {
		f(t)
	}
}

// sum returns the number of live tunnels and the bytes of all there ever were.
func (ts *tunnels) sum() (n int, up, down int64) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	up, down = ts.up, ts.down
	for t := range ts.live {
		up += t.up.Load()
		down += t.down.Load()
	}
	return len(ts.live), up, down
}
