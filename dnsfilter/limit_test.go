package dnsfilter

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/rs/zerolog"

	"sallyport/policy"
)

// burst sends queries from source, one after the other, and a last one that is answered,
// and returns what came of the first ones by ID.
func (b *bed) burst(t *testing.T, source string, queries []*dns.Msg, last func()) map[uint16]*dns.Msg {
	t.Helper()
	c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(source)}, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(b.addr)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i, q := range queries {
		q.Id = uint16(i + 1)
		p, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	last()
	p, err := question("evil.test.", dns.TypeNS).Pack()
	if err != nil {
		t.Fatal(err)
	}
	binary.BigEndian.PutUint16(p, 0xFFFF)
	if _, err := c.Write(p); err != nil {
		t.Fatal(err)
	}
	got := make(map[uint16]*dns.Msg)
	buf := make([]byte, maxEDNSSize)
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	for got[0xFFFF] == nil {
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		m := new(dns.Msg)
		if err := m.Unpack(buf[:n]); err != nil {
			t.Fatal(err)
		}
		got[m.Id] = m
	}
	delete(got, 0xFFFF)
	return got
}

// many returns n queries that ask makes.
func many(n int, ask func(i int) *dns.Msg) []*dns.Msg {
	out := make([]*dns.Msg, n)
	for i := range out {
		out[i] = ask(i)
	}
	return out
}

// TestT50AnswersToAPrefixAreBounded: whoever forges the addresses of a network gets it
// a bounded number of answers, and as many small ones again as slip says; whoever
// really asks there has TCP, and cookies.
func TestT50AnswersToAPrefixAreBounded(t *testing.T) {
	const rate, sent = 4, 24
	clock, said, counted := newClock(), new(logs), new(tally)
	b := start(t, Config{
		Decider: people, Cache: Cache{Size: mib}, Now: clock.now, Logger: zerolog.New(said), Counter: counted,
		Limits: Limits{ResponsesPerSecond: rate, Slip: 4, Exempt: []netip.Prefix{netip.MustParsePrefix(stranger + "/32")}},
	}, newOrigin(t, "api.ok.test. 3600 IN A 192.0.2.1", "other.test. 3600 IN TXT x", soa))
	subnet := func(q *dns.Msg) *dns.Msg { // not for the fast path
		withEDNS(q).IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(198, 51, 100, 0)}}
		return q
	}
	wantData(t, b.ask(t, alice, "tcp", question("api.ok.test.", dns.TypeA)), "A 192.0.2.1")
	packets := b.packets()
	cookie := b.ask(t, alice, "tcp", func() *dns.Msg {
		q := withEDNS(question("api.ok.test.", dns.TypeA))
		q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"}}
		return q
	}()).IsEdns0().Option[0].(*dns.EDNS0_COOKIE).Cookie
	later := func() { clock.advance(2 * time.Second) }
	var dropped, cut uint64
	for _, tt := range []struct {
		name, source string
		all          bool // are answered
		ask          func(i int) *dns.Msg
	}{
		{"from the cache", alice, false, func(int) *dns.Msg { return question("api.ok.test.", dns.TypeA) }},
		{"from the cache, another client of the prefix", bob, false, func(int) *dns.Msg { return question("other.test.", dns.TypeHTTPS) }},
		{"with EDNS", alice, false, func(int) *dns.Msg { return withEDNS(question("api.ok.test.", dns.TypeA)) }},
		{"refused", alice, false, func(i int) *dns.Msg { return question(fmt.Sprintf("n%d.evil.test.", i), dns.TypeA) }},
		{"slow", alice, false, func(int) *dns.Msg { return subnet(question("api.ok.test.", dns.TypeA)) }},
		{"refused, slow", alice, false, func(int) *dns.Msg { return subnet(question("evil.test.", dns.TypeA)) }},
		{"malformed", alice, false, func(int) *dns.Msg {
			q := question("api.ok.test.", dns.TypeA)
			q.Question = append(q.Question, q.Question[0])
			return q
		}},
		{"exempt", stranger, true, func(int) *dns.Msg { return question("api.ok.test.", dns.TypeA) }},
		{"with a cookie", alice, true, func(i int) *dns.Msg {
			q := withEDNS(question("api.ok.test.", dns.TypeA))
			q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: cookie}}
			return q
		}},
	} {
		before := b.resolver.Stats()
		if tt.name == "from the cache, another client of the prefix" { // so that it is one of those without records
			b.ask(t, bob, "tcp", tt.ask(0))
		}
		over := func() uint64 {
			s := b.resolver.Stats()
			return s.AnswersDropped + s.AnswersTruncated - before.AnswersDropped - before.AnswersTruncated
		}
		got := b.burst(t, tt.source, many(sent, tt.ask), func() {
			if !tt.all {
				eventually(t, tt.name+": answers to be held back", func() bool { return over() == sent-rate })
				eventually(t, tt.name+": the others to be sent", func() bool { return b.server.inFlight.Load() == 0 })
			}
			later()
		})
		whole, empty := 0, 0
		for _, m := range got {
			if m.Truncated {
				empty++
				if len(m.Answer)+len(m.Ns) > 0 || m.Rcode != dns.RcodeSuccess {
					t.Errorf("%s: truncated to %v", tt.name, m)
				}
				continue
			}
			whole++
		}
		wantWhole, wantEmpty := rate, (sent-rate)/4
		if tt.all {
			wantWhole, wantEmpty = sent, 0
		}
		if tt.name == "malformed" { // there is no question to repeat
			wantWhole, wantEmpty = wantWhole+wantEmpty, 0
		}
		if whole != wantWhole || empty != wantEmpty {
			t.Errorf("%s: %d answers and %d truncated ones to %d queries, want %d and %d", tt.name, whole, empty, sent, wantWhole, wantEmpty)
		}
		if !tt.all {
			dropped, cut = dropped+(sent-rate)*3/4, cut+(sent-rate)/4
		}
		later()
	}
	if s := b.resolver.Stats(); s.AnswersDropped != dropped || s.AnswersTruncated != cut {
		t.Errorf("%d dropped and %d truncated, want %d and %d", s.AnswersDropped, s.AnswersTruncated, dropped, cut)
	}
	for range 3 * rate {
		wantRcode(t, b.ask(t, alice, "tcp", question("evil.test.", dns.TypeA)), dns.RcodeRefused, 0)
	}
	if n := len(said.with("responses_per_second")); n != 1 {
		t.Errorf("%d lines in the log, want one a minute", n)
	}
	held := 0
	b.events.mu.Lock()
	for _, ev := range b.events.all {
		if ev.Error == errHeld.Error() {
			held++
		}
	}
	b.events.mu.Unlock()
	if want := int(dropped+cut) - (sent - rate); held != want { // the malformed ones have no events
		t.Errorf("%d events say that the answer was held back, want %d", held, want)
	}
	if n := b.packets(); n != packets+1 { // bob's
		t.Errorf("%d packets upstream, want %d", n, packets+1)
	}
}

// An answer that would not go out is not fetched.
func TestT50WhatIsHeldBackAsksNobody(t *testing.T) {
	clock := newClock()
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}, Now: clock.now, Limits: Limits{ResponsesPerSecond: 3}}, newOrigin(t, soa))
	b.burst(t, alice, many(40, func(i int) *dns.Msg { return question(fmt.Sprintf("n%d.cdn.test.", i), dns.TypeA) }), func() {
		eventually(t, "answers to be held back", func() bool { return b.resolver.Stats().AnswersDropped == 37 })
		eventually(t, "the others to be answered", func() bool { return b.server.inFlight.Load() == 0 })
		clock.advance(time.Minute)
	})
	if n := b.packets(); n != 3 {
		t.Errorf("%d packets upstream, want 3", n)
	}
}

// ANY gets no more than any other question, whatever there is.
func TestT50MinimalANY(t *testing.T) {
	watched := fakePolicy{alice: {names: []string{"api.ok.test"}, qtypes: []uint16{dns.TypeANY}}}
	b := start(t, Config{Decider: watched, Cache: Cache{Size: mib}}, newOrigin(t))
	q := withEDNS(question("api.ok.test.", dns.TypeANY))
	m := b.ask(t, alice, "udp", q)
	wantData(t, m, `HINFO "RFC8482" ""`)
	if b.packets() != 0 || m.Len() > q.Len()+40 {
		t.Errorf("%d bytes, %d packets upstream", m.Len(), b.packets())
	}
}

// TestQueriesOfASourceAreBounded: over UDP without a cookie, and over all else together; others are
// unharmed, each query counts, and there is one event a minute.
func TestQueriesOfASourceAreBounded(t *testing.T) {
	const rate = 5
	for _, tt := range []struct {
		over OverLimit
		deny Denial
	}{{OverLimitRefuse, DenyNXDomain}, {OverLimitDrop, DenyRefused}} {
		t.Run(string(tt.over), func(t *testing.T) {
			clock, said, counted := newClock(), new(logs), new(tally)
			b := start(t, Config{
				Decider: people, Cache: Cache{Size: mib}, Now: clock.now, Logger: zerolog.New(said), Counter: counted, Deny: tt.deny,
				Limits: Limits{QueriesPerSecond: rate, OverLimit: tt.over},
			}, newOrigin(t, "api.ok.test. 3600 IN A 192.0.2.1"))
			ask := func() *dns.Msg { return withEDNS(question("api.ok.test.", dns.TypeA)) }
			for range rate {
				wantData(t, b.ask(t, alice, "tcp", ask()), "A 192.0.2.1")
			}
			for range 3 {
				wantRcode(t, b.ask(t, alice, "tcp", ask()), dns.RcodeRefused, dns.ExtendedErrorCodeProhibited)
			}
			wantData(t, b.ask(t, bob, "udp", question("other.test.", dns.TypeA)))
			got := b.burst(t, alice, many(rate+10, func(int) *dns.Msg { return ask() }), func() {
				eventually(t, "the queries to be counted", func() bool { s := b.resolver.Stats(); return s.QueriesRefused+s.QueriesDropped == 13 })
				clock.advance(time.Second)
			})
			want, refused := rate, 3
			if tt.over == OverLimitRefuse {
				want, refused = rate+10, 13
			}
			if len(got) != want {
				t.Errorf("%d answers over UDP, want %d", len(got), want)
			}
			answered := 0
			for _, m := range got {
				if m.Rcode == dns.RcodeSuccess {
					answered++
					continue
				}
				wantRcode(t, m, dns.RcodeRefused, dns.ExtendedErrorCodeProhibited)
			}
			if answered != rate {
				t.Errorf("%d answered over UDP, want %d", answered, rate)
			}
			if s := b.resolver.Stats(); s.QueriesRefused != uint64(refused) {
				t.Errorf("%d refused, want %d", s.QueriesRefused, refused)
			}
			ev := 0
			b.events.mu.Lock()
			for _, e := range b.events.all {
				if e.Decision.Reason == policy.ReasonLimitExceeded {
					ev++
				}
			}
			b.events.mu.Unlock()
			counted.mu.Lock()
			n := counted.counts["deny limit_exceeded A REFUSED"]
			counted.mu.Unlock()
			if ev != 1 || n != refused || len(said.with("queries_per_second")) != 1 {
				t.Errorf("%d events, %d in the metric, %d lines in the log; want 1, %d, 1", ev, n, len(said.with("queries_per_second")), refused)
			}
		})
	}
}

// TestT55OneSourceLeavesRoom: while half of the room is free it is anybody's; then a source
// that has its share gets no more, and others do.
func TestT55OneSourceLeavesRoom(t *testing.T) {
	const more = 40
	o := newOrigin(t, "other.test. 60 IN A 192.0.2.1")
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}}, o, patient)
	release := make(chan struct{})
	free := sync.OnceFunc(func() { close(release) })
	t.Cleanup(free)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if strings.HasSuffix(q.Question[0].Name, ".cdn.test.") {
			<-release
		}
		w.WriteMsg(m)
	})
	b.server.inFlight.Add(maxInFlight / 2) // of others
	c, err := net.Dial("udp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range maxShare + more {
		p, err := question(fmt.Sprintf("n%d.cdn.test.", i), dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		c.Write(p)
		eventually(t, "the query to be taken on or not", func() bool {
			return b.server.inFlight.Load()-maxInFlight/2+int64(b.resolver.Stats().Dropped) == int64(i+1)
		})
	}
	if s := b.resolver.Stats(); s.Dropped != more || s.Crowding != more {
		t.Errorf("%d dropped, %d for their source's share; want %d", s.Dropped, s.Crowding, more)
	}
	wantData(t, b.ask(t, bob, "udp", question("other.test.", dns.TypeA)), "A 192.0.2.1")
	wantData(t, b.ask(t, bob, "tcp", question("other.test.", dns.TypeAAAA)))
	free()
	eventually(t, "the room to be free again", func() bool { return b.server.inFlight.Load() == maxInFlight/2 })
	b.server.inFlight.Add(-maxInFlight / 2)
	for i := range b.server.limit.shares {
		if n := b.server.limit.shares[i].Load(); n != 0 {
			t.Fatalf("%d of %d are left", n, i)
		}
	}
}

func TestLimitsAreChecked(t *testing.T) {
	err := Check(Config{Limits: Limits{ResponsesPerSecond: -1, Slip: 11, IPv4Prefix: 7, IPv6Prefix: 129, QueriesPerSecond: maxRate + 1, OverLimit: "x"},
		TunnelGuard: TunnelGuard{Mode: "x", UniqueNamesPerMinute: 1, Exempt: []string{"a..b"}}})
	err2 := Check(Config{Limits: Limits{QueriesBurst: 5}})
	for _, want := range []string{"responses_per_second: -1", "slip: 11", "ipv4_prefix: 7", "ipv6_prefix: 129", "queries_per_second: 100001", "over_limit: \"x\"",
		"tunnel_guard.mode", "unique_names_per_minute: 1", "tunnel_guard.exempt[0]", "queries_burst: goes with"} {
		if err == nil || err2 == nil || !strings.Contains(err.Error()+err2.Error(), want) {
			t.Errorf("the mistakes lack %q:\n%v\n%v", want, err, err2)
		}
	}
}

// Sources are never IPv4-mapped, whatever way the prefixes are written.
func TestExemptPrefixesMayBeMapped(t *testing.T) {
	l := NewServer(newResolver(t, Config{Decider: people, Upstreams: []string{"127.0.0.1:9"}, Limits: Limits{QueriesPerSecond: 1,
		Exempt: []netip.Prefix{netip.MustParsePrefix("::ffff:10.0.0.0/104"), netip.MustParsePrefix("2001:db8::/32")}}}, nil)).limit.l
	for source, want := range map[string]bool{"10.1.2.3": true, "11.1.2.3": false, "2001:db8::1": true, "2001:db9::1": false} {
		if got := l.exempt(netip.MustParseAddr(source)); got != want {
			t.Errorf("%s exempt: %v, want %v", source, got, want)
		}
	}
}
