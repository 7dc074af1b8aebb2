package dnsfilter

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
	"sallyport/policy/event"
)

// labPolicy has a group for each of the tests' sources but stranger.
const labPolicy = `
version: 1
unmatched_source: deny
deny: [{addresses: [203.0.113.66], reason: nobody goes there}]
groups:
  - name: alice
    sources: [127.0.0.1]
    allow: [api.ok.test, "*.cdn.test", {id: txt, names: [txt.ok.test], qtypes: [TXT, RRSIG]}]
    deny: [bad.cdn.test]
  - name: bob
    sources: [127.0.0.2]
    allow: [{id: inside, names: [.cdn.test], private_destinations: [10.0.0.0/8, "fd00::/8"]}, other.test]
  - name: watcher
    sources: [127.0.0.4]
    mode: observe
    observe_until: 2030-01-01
    allow: [api.ok.test]
`

// labZone is what the upstream of the lab says. Names in capitals are spelt so
// upstream.
var labZone = []string{
	"api.ok.test. 300 IN A 198.41.0.4", "api.ok.test. 60 IN A 198.41.0.5", "api.ok.test. 60 IN AAAA 2600::1",
	"api.ok.test. 300 IN RRSIG A 13 3 300 20300101000000 20200101000000 1 test. AAAA",
	"api.ok.test. 120 IN HTTPS 1 . alpn=h2,h3 ipv4hint=198.41.0.4 ipv6hint=2600::1",
	"txt.ok.test. 60 IN TXT \"hello\" \"world\"",
	"www.cdn.test. 60 IN CNAME edge.else.test.", "edge.else.test. 30 IN A 198.41.0.6", "edge.else.test. 30 IN A 198.41.0.7",
	"in.cdn.test. 60 IN CNAME api.ok.test.",
	"WIDE.CDN.TEST. 60 IN A 198.41.0.9",
	"mixed.cdn.test. 60 IN A 10.0.0.1", "mixed.cdn.test. 60 IN A 198.41.0.8",
	"private.cdn.test. 60 IN A 10.0.0.2", "private.cdn.test. 60 IN AAAA fd00::2",
	"blocked.cdn.test. 60 IN A 203.0.113.66",
	"x.cdn.test. 60 IN HTTPS 1 . mandatory=ech,alpn alpn=h2 ech=AEX+DQ== port=8443",
	"x.cdn.test. 60 IN RRSIG HTTPS 13 3 60 20300101000000 20200101000000 1 test. AAAA",
	"y.cdn.test. 60 IN SVCB 1 else.test. ipv4hint=10.1.1.1,198.41.0.8",
	"zero.cdn.test. 0 IN A 198.41.0.9",
	"db.zone.cdn.test. 60 IN A 10.7.0.1", "db.zone.cdn.test. 60 IN A 192.168.0.1", "db.zone.cdn.test. 60 IN AAAA fd00::7",
	soa,
}

var (
	labNames = []string{"api.ok.test", "txt.ok.test", "www.cdn.test", "in.cdn.test", "wide.cdn.test", "mixed.cdn.test", "private.cdn.test", "blocked.cdn.test",
		"x.cdn.test", "y.cdn.test", "zero.cdn.test", "big.cdn.test", "mid.cdn.test", "none.cdn.test", "bad.cdn.test", "evil.test", "rec.cdn.test", "other.test",
		"use-application-dns.net", "_dns.resolver.arpa", "x.mask.icloud.com", "mask.icloud.com", "api.ok.test.search.test", "health.test", "db.zone.cdn.test"}
	labTypes = []uint16{dns.TypeA, dns.TypeA, dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeCNAME, dns.TypeTXT, dns.TypeMX, dns.TypeANY, dns.TypeRRSIG, 65400}
	labFroms = []string{alice, alice, bob, watcher, stranger, "2001:db8::1"}
)

// zoned answers from labZone, without sockets.
type zoned struct{ o *origin }

func (z zoned) exchange(_ context.Context, q *dns.Msg) (*dns.Msg, error) {
	m := z.o.answer(q)
	if opt := q.IsEdns0(); opt != nil && opt.Do() { // as who signs
		for _, rr := range z.o.zone[strings.ToLower(q.Question[0].Name)+" RRSIG"] {
			if rr.(*dns.RRSIG).TypeCovered == q.Question[0].Qtype {
				m.Answer = append(m.Answer, dns.Copy(rr))
			}
		}
		m.AuthenticatedData = true
	}
	return m, nil
}
func (zoned) close() {}

// A lab is a Server without sockets before zoned.
type lab struct {
	s     *Server
	quick *fast
	clock *clock
	told  *events
}

func newLab(t testing.TB, c Config) *lab {
	t.Helper()
	p, _, err := policy.Load("policy.yaml", []byte(labPolicy), policy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	store := new(policy.Store)
	store.Swap(p)
	o := &origin{zone: make(map[string][]dns.RR)}
	zone := slices.Clone(labZone)
	for i := range 100 {
		zone = append(zone, fmt.Sprintf("big.cdn.test. 60 IN TXT %q", strings.Repeat("x", 200)), fmt.Sprintf("big.cdn.test. 60 IN A 198.41.1.%d", i))
		if i < maxPackedAddrs-5 {
			zone = append(zone, fmt.Sprintf("mid.cdn.test. 60 IN A 198.41.2.%d", i))
		}
	}
	for _, rr := range parseRRs(t, zone) {
		k := strings.ToLower(rr.Header().Name) + " " + dns.Type(rr.Header().Rrtype).String()
		o.zone[k] = append(o.zone[k], rr)
	}
	l := &lab{clock: newClock(), told: new(events)}
	c.Decider, c.Observer, c.Now, c.Upstreams = store, l.told, l.clock.now, []string{"192.0.2.53"}
	c.Cache = Cache{Size: mib, ServeStale: time.Hour}
	c.Records = []Record{{Name: "rec.cdn.test", Type: "A", Value: "10.9.9.9"}}
	c.SearchDomains, c.HealthName = []string{"search.test"}, "health.test"
	c.Zones = []Zone{{Zone: "zone.cdn.test", Upstreams: c.Upstreams, PrivateDestinations: []netip.Prefix{netip.MustParsePrefix("10.7.0.0/16"), netip.MustParsePrefix("fd00::/8")}}}
	c.Cache.Prefetch = true
	r := newResolver(t, c, nil)
	for _, p := range r.pools() {
		p.ups.Store(&[]*upstream{{exchanger: zoned{o}}})
	}
	l.s = NewServer(r)
	l.s.cookies.secrets.Store(&secrets{born: l.clock.now()}) // so that two labs make the same
	l.quick = newFast(l.s)
	return l
}

// both answers packet twice: the slow way, and at once if that can be. The answers
// and the events must be the same. It returns the event if it was answered at once.
func (l *lab) both(t *testing.T, packet []byte, from string, udp bool) *event.Event {
	t.Helper()
	c := client{addr: netip.AddrPortFrom(netip.MustParseAddr(from), 4711), udp: udp}
	if !udp {
		c.door = door(packet[len(packet)/2] % 3)
	}
	l.settle(t)
	var o outcome
	now := l.clock.now()
	fetched := l.s.counts.prefetched.Load()
	got, ok := l.quick.answer([]byte("before"), packet, c, now, &o)
	if l.s.counts.prefetched.Load() != fetched { // which the slow way might hear of, or not
		l.settle(t)
		got, ok = l.quick.answer([]byte("before"), packet, c, now, &o)
	}
	hits := l.s.counts.hits.Load()
	slow := new(answersTo)
	c.back = slow
	l.told.all = nil
	l.s.serve(context.Background(), c, packet)
	if !ok {
		if !bytes.Equal(got, []byte("before")) {
			t.Fatalf("%x is not answered, but %x is left", packet, got)
		}
		return nil
	}
	if len(*slow) != 1 || !bytes.Equal(got, append([]byte("before"), (*slow)[0]...)) {
		t.Fatalf("%s: %x\nat once   %x\notherwise %x\n%v", from, packet, got[6:], *slow, unpacked(got[6:]))
	}
	if o.packed != nil && o.packed.message != nil && l.s.counts.hits.Load() != hits+1 {
		t.Fatalf("%x is answered at once but was not in the cache", packet)
	}
	l.quick.observe(&o, packet, now, now, nil)
	if len(l.told.all) != 2 {
		t.Fatalf("%d events", len(l.told.all))
	}
	want, ev := l.told.all[0], l.told.all[1]
	want.ID, want.DNSTime = ev.ID, ev.DNSTime
	if len(want.Answers)+len(ev.Answers) == 0 {
		want.Answers = ev.Answers
	}
	if !reflect.DeepEqual(ev, want) {
		t.Fatalf("event\n%+v, otherwise\n%+v", ev, want)
	}
	return &ev
}

// settle waits until nothing is asked of the upstream.
func (l *lab) settle(t *testing.T) {
	t.Helper()
	eventually(t, "what is prefetched", func() bool {
		r := l.s.resolver
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.flights) == 0
	})
}

func unpacked(p []byte) *dns.Msg {
	m := new(dns.Msg)
	_ = m.Unpack(p) // for people
	return m
}

// labQuery returns a query that r chooses.
func labQuery(t testing.TB, r *rand.Rand) []byte {
	t.Helper()
	name := []byte(labNames[r.IntN(len(labNames))] + ".")
	for i := range name {
		if r.IntN(3) == 0 {
			name[i] = bytes.ToUpper(name[i : i+1])[0]
		}
	}
	q := question(string(name), labTypes[r.IntN(len(labTypes))])
	q.Id = uint16(r.Uint32())
	if r.IntN(3) > 0 {
		q.SetEdns0([]uint16{0, 511, 512, 700, 1232, 4096, 65535}[r.IntN(7)], r.IntN(2) == 0)
		for range r.IntN(3) {
			q.IsEdns0().Option = append(q.IsEdns0().Option, labOption(r))
		}
	}
	q.RecursionDesired, q.CheckingDisabled, q.AuthenticatedData = r.IntN(4) > 0, r.IntN(4) == 0, r.IntN(3) == 0
	p, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// labOption returns an EDNS option that r chooses, none that makes a query malformed:
// such a query has no event.
func labOption(r *rand.Rand) dns.EDNS0 {
	switch code := []uint16{10, 10, 10, 12, 12, 3, 8, 11, 15, 20, 65001}[r.IntN(11)]; code {
	case dns.EDNS0COOKIE:
		p := make([]byte, []int{8, 8, 16, 24, 24, 40}[r.IntN(6)])
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		return &dns.EDNS0_LOCAL{Code: code, Data: p}
	case dns.EDNS0SUBNET:
		return &dns.EDNS0_SUBNET{Code: code, Family: 1, SourceNetmask: 24, Address: net.IPv4(198, 51, 100, 0)}
	case dns.EDNS0TCPKEEPALIVE, dns.EDNS0EDE:
		return &dns.EDNS0_LOCAL{Code: code, Data: make([]byte, 2)}
	default:
		return &dns.EDNS0_LOCAL{Code: code, Data: make([]byte, []int{0, 2, 7, 500}[r.IntN(4)])}
	}
}

// labConfigs are all settings that change answers.
func labConfigs() (all []Config) {
	for _, deny := range []Denial{DenyRefused, DenyNXDomain, DenyNodata, DenySinkhole} {
		for _, https := range []HTTPSRecords{HTTPSPass, HTTPSStripECH, HTTPSNodata} {
			for _, cnames := range []CNAMEs{CNAMEsTrust, CNAMEsInspect} {
				for _, size := range []int{0, 512, 4096} {
					all = append(all, Config{Deny: deny, HTTPSRecords: https, CNAMEs: cnames, MaxUDPSize: size})
				}
			}
		}
	}
	return all
}

// TestFastPathSaysTheSame holds the fast path against the slow one, for every setting
// that changes answers.
func TestFastPathSaysTheSame(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	quick := make(map[string]int)
	for _, c := range labConfigs() {
		l := newLab(t, c)
		for i := range 400 {
			from, udp := labFroms[r.IntN(len(labFroms))], r.IntN(4) > 0
			if ev := l.both(t, labQuery(t, r), from, udp); ev != nil {
				quick[ev.Decision.Verdict.String()]++
				quick[strings.ToLower(ev.Name)]++
				quick[ev.RCode]++
			}
			if i%40 == 39 {
				l.clock.advance(time.Duration(r.IntN(20)) * time.Second / 3)
			}
		}
	}
	t.Log(quick)
	for _, k := range []string{"allow", "deny", "observe", "NOERROR", "NXDOMAIN", "REFUSED", "api.ok.test", "txt.ok.test", "www.cdn.test", "in.cdn.test",
		"wide.cdn.test", "mixed.cdn.test", "private.cdn.test", "x.cdn.test", "y.cdn.test", "mid.cdn.test", "none.cdn.test", "bad.cdn.test", "evil.test"} {
		if quick[k] == 0 {
			t.Errorf("%s is never answered at once", k)
		}
	}
}

// T52: one source's answer is decided anew for the next.
func TestT52FastPathDecidesForEachSource(t *testing.T) {
	l := newLab(t, Config{})
	p, err := question("private.cdn.test.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		for _, from := range []string{bob, alice, stranger, watcher} {
			if ev := l.both(t, p, from, true); ev != nil && ev.Decision.Passes() != (from == bob) {
				t.Errorf("%s: %+v", from, ev)
			}
		}
	}
	if l.both(t, p, bob, true) == nil {
		t.Error("bob is not answered at once")
	}
	if l.both(t, p, alice, true) != nil {
		t.Error("alice is answered at once, from what bob may have")
	}
}

func TestFastPathDoesNotAllocate(t *testing.T) {
	for _, c := range []Config{{}, {Events: EventsSample}, {Deny: DenySinkhole}} {
		l := newLab(t, c)
		l.s.cfg.Counter = countNothing{}
		var buf [maxEDNSSize]byte
		for _, name := range []string{"aPi.ok.test.", "www.cdn.test.", "x.cdn.test.", "none.cdn.test.", "evil.test."} {
			q := question(name, dns.TypeA).SetEdns0(1232, true)
			if name == "x.cdn.test." {
				q.Question[0].Qtype = dns.TypeHTTPS
			}
			if name == "www.cdn.test." || name == "evil.test." {
				q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"}}
			}
			p, err := q.Pack()
			if err != nil {
				t.Fatal(err)
			}
			c := client{addr: netip.MustParseAddrPort("127.0.0.1:4711"), udp: true, back: new(answersTo)}
			l.s.serve(context.Background(), c, p)
			if l.s.cfg.Events != EventsSample || name == "evil.test." {
				l.s.cfg.Observer = nil // an event has strings of its own
			}
			var o outcome
			n := testing.AllocsPerRun(100, func() {
				if _, ok := l.quick.answer(buf[:0], p, c, l.clock.now(), &o); !ok {
					t.Fatalf("%s is not answered at once", name)
				}
				l.quick.observe(&o, p, l.clock.now(), l.clock.now(), nil)
			})
			if n != 0 {
				t.Errorf("%s: %v allocations", name, n)
			}
			l.s.cfg.Observer = l.told
		}
	}
}

type countNothing struct{}

func (countNothing) CountQuery(string, *policy.Decision, uint16, int) {}

// FuzzFastPath has any packet answered both ways, with any settings, from any source.
func FuzzFastPath(f *testing.F) {
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 60 {
		p := labQuery(f, r)
		f.Add(p, byte(i), byte(i), i%3 > 0)
		p[r.IntN(len(p))] ^= 1 << r.IntN(8)
		f.Add(p, byte(i), byte(i), i%3 > 0)
	}
	var labs []*lab
	for _, c := range labConfigs() {
		labs = append(labs, newLab(f, c))
	}
	f.Fuzz(func(t *testing.T, packet []byte, config, from byte, udp bool) {
		if len(packet) > readSize || len(packet) == 0 {
			return
		}
		l := labs[int(config)%len(labs)]
		for range 3 {
			l.both(t, packet, labFroms[int(from)%len(labFroms)], udp)
		}
		l.clock.advance(time.Duration(from) * time.Millisecond)
	})
}

func TestSampler(t *testing.T) {
	l := newLab(t, Config{Events: EventsSample})
	count := func(name, from string, n int) int {
		l.told.all = nil
		p, err := question(name, dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		for range n {
			c := client{addr: netip.AddrPortFrom(netip.MustParseAddr(from), 4711), udp: true, back: new(answersTo)}
			var o outcome
			if _, ok := l.quick.answer(nil, p, c, l.clock.now(), &o); ok {
				l.quick.observe(&o, p, l.clock.now(), l.clock.now(), nil)
			} else {
				l.s.serve(context.Background(), c, p)
			}
		}
		return len(l.told.all)
	}
	for _, tt := range []struct {
		name, from string
		want       int
	}{
		{"api.ok.test.", alice, 1}, {"API.ok.test.", alice, 0}, {"api.ok.test.", watcher, 1},
		{"evil.test.", alice, 5}, {"evil.test.", watcher, 5}, {"api.ok.test.", stranger, 5},
	} {
		if n := count(tt.name, tt.from, 5); n != tt.want {
			t.Errorf("%d events of 5 queries for %s from %s, want %d", n, tt.name, tt.from, tt.want)
		}
	}
	l.clock.advance(sampleWindow - time.Second)
	if n := count("api.ok.test.", alice, 5); n != 0 {
		t.Errorf("%d events within the window", n)
	}
	l.clock.advance(time.Second)
	if n := count("api.ok.test.", alice, 5); n != 1 {
		t.Errorf("%d events after the window", n)
	}
	l.s.cfg.Events = EventsDenied
	if n := count("api.ok.test.", alice, 5) + count("evil.test.", alice, 3); n != 3 {
		t.Errorf("%d events, want the denied ones", n)
	}
}

// TestMissSaysTheSame holds what is answered to a question that nothing is known of
// against the slow path.
func TestMissSaysTheSame(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	quick := 0
	for _, c := range labConfigs() {
		a, b := newLab(t, c), newLab(t, c)
		for range 60 {
			p, from := labQuery(t, r), labFroms[r.IntN(len(labFroms))]
			c := client{addr: netip.AddrPortFrom(netip.MustParseAddr(from), 4711), udp: r.IntN(4) > 0}
			var o outcome
			if _, ok := a.quick.answer(nil, p, c, a.clock.now(), &o); ok || !a.quick.missed {
				continue
			}
			got, want, before := new(answersTo), new(answersTo), a.looked()
			a.told.all, b.told.all = nil, nil
			c.back = got
			a.s.serveLater(context.Background(), c, p, true)
			c.back = want
			b.s.serve(context.Background(), c, p)
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: %x\ngot  %x\nwant %x", from, p, *got, *want)
			}
			ev, slow := a.told.all[0], b.told.all[0]
			if slow.ID = ev.ID; len(ev.Answers)+len(slow.Answers) == 0 {
				slow.Answers = ev.Answers
			}
			if !reflect.DeepEqual(ev, slow) || len(a.told.all) != 1 {
				t.Fatalf("event\n%+v, otherwise\n%+v", ev, slow)
			}
			// The first alias of a chain that the upstream leaves open counts as a hit here.
			if n := a.looked() - before; n != b.looked() {
				t.Fatalf("%d look-ups in the cache, otherwise %d", n, b.looked())
			}
			b.s.counts.hits.Store(0)
			b.s.counts.misses.Store(0)
			quick++
		}
	}
	if quick < 100 {
		t.Errorf("only %d queries were for something unknown", quick)
	}
}

// looked returns how often the cache has been looked into.
func (l *lab) looked() uint64 { return l.s.counts.hits.Load() + l.s.counts.misses.Load() }
