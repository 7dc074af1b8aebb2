package dnsfilter

import (
	"context"
	"net"
	"testing"

	"github.com/miekg/dns"
)

// sink is a client that takes answers and forgets them.
type sink struct {
	dns.ResponseWriter
	addr net.UDPAddr
	n    int
}

func (s *sink) RemoteAddr() net.Addr        { return &s.addr }
func (s *sink) Write(p []byte) (int, error) { s.n += len(p); return len(p), nil }

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

func benchmarkQuery(b *testing.B, name string) {
	s := benchServer(b)
	w := &sink{addr: net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 4711}}
	p, err := withEDNS(question(name, dns.TypeA)).Pack()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		m := new(dns.Msg)
		if err := m.Unpack(p); err != nil {
			b.Fatal(err)
		}
		s.handle(context.Background(), w, m)
	}
	if w.n == 0 {
		b.Error("nothing was answered")
	}
}

func BenchmarkCacheHit(b *testing.B) { benchmarkQuery(b, "api.ok.test.") }
func BenchmarkRefused(b *testing.B)  { benchmarkQuery(b, "evil.test.") }

func BenchmarkLookupNetIPHit(b *testing.B) {
	s := benchServer(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.resolver.LookupNetIP(context.Background(), "ip4", "api.ok.test"); err != nil {
			b.Fatal(err)
		}
	}
}
