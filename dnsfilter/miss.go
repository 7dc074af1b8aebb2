package dnsfilter

import (
	"context"
	"sync"
	"time"

	"github.com/miekg/dns"

	"sallyport/dnsfilter/wire"
	"sallyport/policy"
)

// A slowFast is a fast for queries that wait for upstreams.
type slowFast struct {
	*fast
	outcome outcome
	buf     [maxEDNSSize]byte
}

// serveLater answers a packet that the fast path has left, which it does not keep.
// missed says why, as fast has it.
func (s *Server) serveLater(ctx context.Context, c client, packet []byte, missed bool) {
	c.counted = missed
	if missed && s.cfg.Cache.Size > 0 && s.fetch(ctx, c, packet) {
		return
	}
	s.serve(ctx, c, packet)
}

// asking is a query that the fast path has left, parsed and decided once more.
type asking struct {
	client
	packet []byte
	start  time.Time
	req    policy.Request
	d      policy.Decision
}

// again parses and decides a plain query from c that came at start. It returns false
// if it is for serve after all. What was decided before and let it pass, nil if that is not
// known, stands as long as that policy is in force.
func (f *fast) again(c client, packet []byte, start time.Time, before *policy.Decision) (asking, bool) {
	q := &f.q
	if !q.Parse(packet) {
		return asking{}, false
	}
	req := policy.Request{Source: c.addr.Addr(), Protocol: policy.ProtocolDNS, QType: q.Type, Time: start}
	if before != nil && before.Passes() && f.author(before) != nil {
		return asking{c, packet, start, req, *before}, true
	}
	d := f.decide(req)
	return asking{c, packet, start, req, d}, d.Passes() // or not, by a policy that has come since
}

// keyOf returns what q asks the upstreams.
func keyOf(q *wire.Query) key { return key{name: q.Name.Name(), qtype: q.Type, do: q.DO, cd: q.CD} }

// fresh appends the answer to a that e is, which upstreams have just given, and fills
// o. It returns false if something in e has to change for a's source.
func (f *fast) fresh(dst []byte, a *asking, e *entry, now time.Time, o *outcome) ([]byte, bool) {
	q := &f.q
	*o = outcome{addr: a.addr, door: a.door, d: a.d, qtype: q.Type, name: len(q.Name.Bytes()), asked: now.Sub(a.start)}
	p, ok := f.known(dst, e, f.s.packedOf(q.Key(), q.Type, e), a.req, a.client, now, o)
	if ok {
		o.tell = f.tells(o, a.start)
	}
	return p, ok
}

// fetch answers a plain query that nothing was known of and that passed, from what
// the upstreams say, without a message in between as long as nothing in it changes. It
// returns false if it is for serve after all.
func (s *Server) fetch(ctx context.Context, c client, packet []byte) bool {
	f := s.idle.Get().(*slowFast)
	defer s.idle.Put(f)
	a, ok := f.again(c, packet, s.cfg.Now(), nil)
	if !ok {
		return false
	}
	e, err := s.resolver.fetch(ctx, keyOf(&f.q), nil)
	return err == nil && s.settle(f, a, e)
}

// settleLater is fetch for a query that came at start, when e has been fetched.
func (s *Server) settleLater(c client, packet []byte, start time.Time, e *entry) bool {
	f := s.idle.Get().(*slowFast)
	defer s.idle.Put(f)
	a, ok := f.again(c, packet, start, nil)
	return ok && s.settle(f, a, e)
}

// settle answers a from e. It returns false if that is for serve after all.
func (s *Server) settle(f *slowFast, a asking, e *entry) bool {
	if !e.next.IsZero() {
		return false
	}
	s.counts.misses.Add(1)
	now := s.cfg.Now()
	o := &f.outcome
	if p, ok := f.fresh(f.buf[:0], &a, e, now, o); ok {
		err := a.back.send(p)
		f.observe(o, a.packet, a.start, now, err)
		return true
	}
	m := new(dns.Msg)
	if m.Unpack(a.packet) != nil {
		return false
	}
	qu := newQuery(a.client, m)
	a.req.Name = f.q.Name.Name()
	rep, d := s.fit(e.reply(now, false), a.req, a.d, qu.q)
	err := s.write(qu, rep)
	if rep.err != nil {
		err = rep.err
	}
	s.observe(qu, rep, d, a.start, o.asked, err)
	return true
}

// newIdle returns a pool of what fetch takes.
func (s *Server) newIdle() *sync.Pool {
	return &sync.Pool{New: func() any { return &slowFast{fast: newFast(s)} }}
}
