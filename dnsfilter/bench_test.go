package dnsfilter

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
	"sallyport/policy/event"
)

// sink takes answers and forgets them.
type sink struct{ n int }

func (s *sink) send(p []byte) error { s.n += len(p); return nil }

func benchServer(b *testing.B) *Server {
	b.Helper()
	r := newResolver(b, Config{Decider: people, Cache: Cache{Size: mib}, Upstreams: []string{"192.0.2.53"}}, nil)
	r.pool.ups.Store(&[]*upstream{{exchanger: cannedHour{}}})
	return NewServer(r)
}

// cannedHour answers with addresses that stay in the cache.
type cannedHour struct{ canned }

func (cannedHour) exchange(_ context.Context, q *dns.Msg) (*dns.Msg, error) {
	m := new(dns.Msg).SetReply(q)
	name := q.Question[0].Name
	for _, line := range []string{name + " 3600 IN CNAME edge.test.", "edge.test. 3600 IN A 192.0.2.1", "edge.test. 3600 IN A 192.0.2.2"} {
		rr, _ := dns.NewRR(line)
		m.Answer = append(m.Answer, rr)
	}
	return m, nil
}

var benchClient = netip.MustParseAddrPort("127.0.0.1:4711")

func benchmarkSlow(b *testing.B, name string) {
	s, w := benchServer(b), new(sink)
	p, err := withEDNS(question(name, dns.TypeA)).Pack()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		s.serve(context.Background(), client{addr: benchClient, udp: true, back: w}, p)
	}
	if w.n == 0 {
		b.Error("nothing was answered")
	}
}

// benchmarkFast answers as a reader of packets does, by a real policy, with an
// Observer that is told a sample.
func benchmarkFast(b *testing.B, name string, want policy.Verdict, options ...dns.EDNS0) {
	l := newLab(b, Config{Events: EventsSample})
	l.s.cfg.Counter = countNothing{}
	q := withEDNS(question(name, dns.TypeA))
	q.IsEdns0().Option = options
	p, err := q.Pack()
	if err != nil {
		b.Fatal(err)
	}
	c := client{addr: benchClient, udp: true, back: new(sink)}
	l.s.serve(context.Background(), c, p)
	l.s.cfg.Observer = sinkhole{}
	var o outcome
	var buf [maxEDNSSize]byte
	now := l.clock.now()
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := l.quick.answer(buf[:0], p, c, now, &o); !ok || o.d.Verdict != want {
			b.Fatal("not answered at once")
		}
		l.quick.observe(&o, p, now, now, nil)
	}
}

// sinkhole is an Observer that is told in vain.
type sinkhole struct{}

func (sinkhole) Observe(*event.Event) {}

func BenchmarkCacheHit(b *testing.B) { benchmarkFast(b, "www.cdn.test.", policy.Allow) }
func BenchmarkCacheHitCookie(b *testing.B) {
	benchmarkFast(b, "www.cdn.test.", policy.Allow, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"})
}
func BenchmarkRefused(b *testing.B)      { benchmarkFast(b, "evil.test.", policy.Deny) }
func BenchmarkCacheHitSlow(b *testing.B) { benchmarkSlow(b, "api.ok.test.") }
func BenchmarkRefusedSlow(b *testing.B)  { benchmarkSlow(b, "evil.test.") }

func BenchmarkLookupNetIPHit(b *testing.B) {
	s := benchServer(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.resolver.LookupNetIP(context.Background(), "ip4", "api.ok.test"); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCacheHitLimited is BenchmarkCacheHit with every rate limited, and none reached.
func BenchmarkCacheHitLimited(b *testing.B) {
	l := newLab(b, Config{Limits: Limits{ResponsesPerSecond: maxRate, QueriesPerSecond: maxRate}})
	l.s.cfg.Counter, l.s.cfg.Events = countNothing{}, EventsDenied
	p, err := withEDNS(question("www.cdn.test.", dns.TypeA)).Pack()
	if err != nil {
		b.Fatal(err)
	}
	c := client{addr: benchClient, udp: true, back: new(sink)}
	l.s.serve(context.Background(), c, p)
	var o outcome
	var buf [maxEDNSSize]byte
	b.ReportAllocs()
	for b.Loop() {
		l.clock.advance(time.Millisecond)
		now := l.clock.now()
		if got, ok := l.quick.answer(buf[:0], p, c, now, &o); !ok || len(got) == 0 {
			b.Fatal("not answered at once")
		}
		if o.held != nil {
			b.Fatal(o.held)
		}
	}
}

// BenchmarkTunnelGuard looks at names that are asked for the first time.
func BenchmarkTunnelGuard(b *testing.B) {
	r := newResolver(b, Config{Decider: people, Upstreams: []string{"192.0.2.53"}, TunnelGuard: TunnelGuard{Mode: TunnelObserve}}, nil)
	g, now := NewServer(r).tunnels, time.Now()
	var names [1 << 12]policy.Name
	for i := range names {
		names[i] = policy.MustName(secret(i, 10) + ".cdn.test")
	}
	d := policy.Decision{Verdict: policy.Allow}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		g.refuses(names[i%len(names)], &d, benchClient.Addr(), false, now)
	}
}
