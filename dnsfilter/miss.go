package dnsfilter

import (
	"context"
	"sync"

	"github.com/miekg/dns"

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

// fetch answers a plain query that nothing was known of and that passed, from what
// the upstreams say, without a message in between as long as nothing in it changes. It
// returns false if it is for serve after all.
func (s *Server) fetch(ctx context.Context, c client, packet []byte) bool {
	f := s.idle.Get().(*slowFast)
	defer s.idle.Put(f)
	start, q := s.cfg.Now(), &f.q
	if !q.Parse(packet) {
		return false
	}
	req := policy.Request{Source: c.addr.Addr(), Protocol: policy.ProtocolDNS, QType: q.Type, Time: start}
	d := f.decide(req)
	if !d.Passes() { // by a policy that has come since
		return false
	}
	k := key{name: q.Name.Name(), qtype: q.Type, do: q.DO, cd: q.CD}
	e, err := s.resolver.fetch(ctx, k, nil)
	if err != nil || !e.next.IsZero() {
		return false
	}
	s.counts.misses.Add(1)
	now := s.cfg.Now()
	o := &f.outcome
	*o = outcome{addr: c.addr, door: c.door, d: d, qtype: q.Type, name: len(q.Name.Bytes()), asked: now.Sub(start)}
	if p, ok := f.known(f.buf[:0], e, s.packedOf(q.Key(), q.Type, e), req, c, now, o); ok {
		err = c.back.send(p)
		o.tell = f.tells(o, start)
		f.observe(o, packet, start, now, err)
		return true
	}
	m := new(dns.Msg)
	if m.Unpack(packet) != nil {
		return false
	}
	qu := newQuery(c, m)
	req.Name = k.name
	rep, d := s.fit(e.reply(now, false), req, d, qu.q)
	err = s.write(qu, rep)
	if rep.err != nil {
		err = rep.err
	}
	s.observe(qu, rep, d, start, o.asked, err)
	return true
}

// newIdle returns a pool of what fetch takes.
func (s *Server) newIdle() *sync.Pool {
	return &sync.Pool{New: func() any { return &slowFast{fast: newFast(s)} }}
}
