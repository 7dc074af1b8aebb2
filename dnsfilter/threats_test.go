package dnsfilter

import (
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"weak"

	"github.com/miekg/dns"

	"sallyport/policy"
)

// tally counts queries as metrics do.
type tally struct {
	mu     sync.Mutex
	counts map[string]int
	all    int
}

func (c *tally) CountQuery(_ string, d *policy.Decision, qtype uint16, rcode int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = make(map[string]int)
	}
	c.counts[fmt.Sprint(d.Verdict, " ", d.Reason, " ", dns.Type(qtype), " ", dns.RcodeToString[rcode])]++
	c.all++
}

func (c *tally) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all
}

func (o *events) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.all)
}

// TestT42EachRefusalCountsOnce: whatever is asked, and in whatever form, a query that is
// refused gets the RCODE of the settings, and there is one event and one more in the
// metric, both with the right reason, and no packet upstream.
func TestT42EachRefusalCountsOnce(t *testing.T) {
	qtypes := []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT, dns.TypeMX, dns.TypeNULL, dns.TypeSRV, dns.TypeCNAME, dns.TypeANY,
		dns.TypePTR, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeAXFR, 65400}
	forms := []func(*dns.Msg) *dns.Msg{
		func(q *dns.Msg) *dns.Msg { return q },
		withEDNS,
		func(q *dns.Msg) *dns.Msg { // not for the fast path
			withEDNS(q).IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"}}
			return q
		},
	}
	for _, tt := range []struct {
		deny  Denial
		told  Events
		rcode int
	}{
		{DenyRefused, EventsAll, dns.RcodeRefused}, {DenyRefused, EventsDenied, dns.RcodeRefused}, {DenyRefused, EventsSample, dns.RcodeRefused},
		{DenyNXDomain, EventsAll, dns.RcodeNameError}, {DenyNodata, EventsAll, dns.RcodeSuccess}, {DenySinkhole, EventsAll, dns.RcodeSuccess},
	} {
		t.Run(fmt.Sprint(tt.deny, " ", tt.told), func(t *testing.T) {
			counted := new(tally)
			b := start(t, Config{Decider: people, Deny: tt.deny, Events: tt.told, Counter: counted, Cache: Cache{Size: mib}}, newOrigin(t))
			n, want := 0, make(map[string]int)
			for _, who := range []struct {
				source string
				reason policy.Reason
				ede    uint16
			}{{alice, policy.ReasonNotListed, dns.ExtendedErrorCodeBlocked}, {stranger, policy.ReasonUnmatchedSource, dns.ExtendedErrorCodeProhibited}} {
				for _, qtype := range qtypes {
					for _, form := range forms {
						n++
						q := form(question("evil.test.", qtype))
						code := who.ede
						if q.IsEdns0() == nil {
							code = 0
						}
						wantRcode(t, b.ask(t, who.source, []string{"udp", "tcp"}[n%2], q), tt.rcode, code)
						want[fmt.Sprint("deny ", who.reason, " ", dns.Type(qtype), " ", dns.RcodeToString[tt.rcode])]++
					}
				}
			}
			eventually(t, "the events, and the metric to move", func() bool { return b.events.count() >= n && counted.total() >= n })
			if b.events.count() != n || counted.total() != n {
				t.Errorf("%d events and %d in the metric of %d queries", b.events.count(), counted.total(), n)
			}
			b.events.mu.Lock()
			for _, ev := range b.events.all {
				want[fmt.Sprint(ev.Decision.Verdict, " ", ev.Decision.Reason, " ", ev.QType, " ", ev.RCode)]--
			}
			b.events.mu.Unlock()
			counted.mu.Lock()
			for what, left := range want {
				if times := counted.counts[what]; left != 0 || times != len(forms) {
					t.Errorf("%s: %d events are missing, %d in the metric, want %d", what, left, times, len(forms))
				}
			}
			counted.mu.Unlock()
			if sent := b.packets(); sent != 0 {
				t.Errorf("%d packets went upstream", sent)
			}
		})
	}
}

// TestT55OverloadIsBounded: queries that wait for upstreams have a bound; more are dropped
// and counted. What needs nobody else is answered all the same, and everything once
// there is room again.
func TestT55OverloadIsBounded(t *testing.T) {
	const room, sent = 8, 64
	o := newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1")
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}}, o, patient)
	wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 192.0.2.1")
	eventually(t, "no query to be under way", func() bool { return b.server.inFlight.Load() == 0 })
	asked, release := make(chan struct{}, sent), make(chan struct{})
	free := sync.OnceFunc(func() { close(release) })
	t.Cleanup(free)
	o.set(func(w dns.ResponseWriter, _, m *dns.Msg) {
		asked <- struct{}{}
		<-release
		w.WriteMsg(m)
	})
	b.server.inFlight.Add(maxForgeable - room)
	c, err := net.Dial("udp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range sent {
		p, err := question(fmt.Sprintf("n%d.cdn.test.", i), dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		c.Write(p)
	}
	for range room {
		<-asked
	}
	eventually(t, "the others to be dropped", func() bool { return b.resolver.Stats().Dropped == sent-room })
	wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 192.0.2.1")
	wantRcode(t, b.ask(t, alice, "udp", question("evil.test.", dns.TypeA)), dns.RcodeRefused, 0)
	if n := o.packets(); n != 1+room {
		t.Errorf("%d packets upstream, want %d", n, 1+room)
	}
	free()
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	for range room {
		if _, err := c.Read(make([]byte, minUDPSize)); err != nil {
			t.Fatal(err)
		}
	}
	b.server.inFlight.Add(room - maxForgeable)
	eventually(t, "no query to be under way", func() bool { return b.server.inFlight.Load() == 0 })
	m := b.ask(t, alice, "udp", question("late.cdn.test.", dns.TypeA))
	if m.Rcode != dns.RcodeNameError || !slices.Equal(data(m), nil) {
		t.Errorf("afterwards: %v", m)
	}
}

// TestT52EachPolicyCounts: what is in the cache is answered by the policy in force, at
// the time of the query: a rule that has expired, a source that has lost its group, no
// policy at all.
func TestT52EachPolicyCounts(t *testing.T) {
	l := newLab(t, Config{})
	store := l.s.cfg.Decider.(*policy.Store)
	p, err := question("api.ok.test.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	l.both(t, p, alice, true) // into the cache
	want := func(verdict policy.Verdict, reason policy.Reason) {
		t.Helper()
		if ev := l.both(t, p, alice, true); ev == nil || ev.Decision.Verdict != verdict || ev.Decision.Reason != reason {
			t.Errorf("event = %+v, want %v %v", ev, verdict, reason)
		}
	}
	want(policy.Allow, policy.ReasonMatched)
	store.Swap(enforced(t, "version: 1\ngroups: [{name: g, sources: [127.0.0.1/32], allow: [{names: [api.ok.test], expires: 2026-01-03, owner: o, reason: r}]}]\n"))
	want(policy.Allow, policy.ReasonMatched)
	l.clock.advance(48 * time.Hour)
	want(policy.Deny, policy.ReasonRuleExpired)
	store.Swap(enforced(t, "version: 1\ngroups: [{name: g, sources: [127.0.0.2/32], allow: [api.ok.test]}]\n"))
	want(policy.Deny, policy.ReasonUnmatchedSource)
	store.Swap(nil)
	want(policy.Deny, policy.ReasonUnmatchedSource)
}

// TestAReplacedPolicyIsGarbage: the first collection after a policy was replaced frees it,
// whatever was answered with it, and whatever still waits for an upstream.
func TestAReplacedPolicyIsGarbage(t *testing.T) {
	const text = "version: 1\ngroups: [{name: g, sources: [127.0.0.1/32], allow: [%s]}]\n"
	store := new(policy.Store)
	o := newOrigin(t, "api.ok.test. 60 IN A 198.41.0.4", "late.ok.test. 60 IN A 198.41.0.4")
	asked, release := make(chan struct{}), make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if strings.EqualFold(q.Question[0].Name, "late.ok.test.") {
			close(asked)
			<-release
		}
		w.WriteMsg(m)
	})
	b := start(t, Config{Decider: store, Cache: Cache{Size: mib}}, o, patient)
	store.Swap(enforced(t, fmt.Sprintf(text, ".ok.test")))
	replaced := weak.Make(store.Policy())
	for _, network := range []string{"udp", "tcp"} {
		for _, name := range []string{"api.ok.test.", "api.ok.test.", network + ".ok.test.", "evil.test."} {
			b.ask(t, alice, network, question(name, dns.TypeA))
		}
	}
	late := make(chan *dns.Msg)
	go func() {
		defer close(late)
		late <- b.ask(t, alice, "udp", question("late.ok.test.", dns.TypeA))
	}()
	<-asked
	store.Swap(enforced(t, fmt.Sprintf(text, "late.ok.test")))
	runtime.GC()
	if replaced.Value() != nil {
		t.Error("something keeps a policy that was replaced")
	}
	close(release)
	wantData(t, <-late, "A 198.41.0.4")
	if ev := b.events.of(t, alice, "late.ok.test A"); ev.Decision.Rule != "late.ok.test" || ev.Decision.Revision != store.Revision() {
		t.Errorf("event = %+v", ev)
	}
}

// TestT52APolicyThatComesMeanwhile: addresses that arrive after the name was taken from
// the list are not answered.
func TestT52APolicyThatComesMeanwhile(t *testing.T) {
	const text = "version: 1\ngroups: [{name: g, sources: [127.0.0.1/32], allow: [%s]}]\n"
	for _, size := range []int64{0, mib} { // whether the query takes the short way of a miss
		store := new(policy.Store)
		store.Swap(enforced(t, fmt.Sprintf(text, "api.ok.test")))
		o := newOrigin(t, "api.ok.test. 60 IN A 198.41.0.4")
		o.set(func(w dns.ResponseWriter, _, m *dns.Msg) {
			store.Swap(enforced(t, fmt.Sprintf(text, "other.test")))
			w.WriteMsg(m)
		})
		b := start(t, Config{Decider: store, Cache: Cache{Size: size}}, o, patient)
		m := b.ask(t, alice, "udp", withEDNS(question("api.ok.test.", dns.TypeA)))
		wantRcode(t, m, dns.RcodeRefused, dns.ExtendedErrorCodeBlocked)
		wantData(t, m)
		if ev := b.events.of(t, alice, "api.ok.test A"); ev.Decision.Reason != policy.ReasonNotListed || b.events.count() != 1 {
			t.Errorf("event = %+v", ev)
		}
	}
}
