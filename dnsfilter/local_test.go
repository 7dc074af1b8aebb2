package dnsfilter

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/rs/zerolog"

	"sallyport/policy"
)

// enforced returns the policy in text, as the program compiles it.
func enforced(t *testing.T, text string) *policy.Policy {
	t.Helper()
	p, _, err := policy.Load("policy.yaml", []byte(text), policy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestT47PrivateAddressesOfAZone: a zone's private_destinations widen what allowed
// names of the zone may lead to, for clients and the proxy alike, and nothing else.
func TestT47PrivateAddressesOfAZone(t *testing.T) {
	corp := newOrigin(t, "db.corp.test. 60 IN A 10.1.2.3", "db.corp.test. 60 IN A 192.168.1.1", "db.corp.test. 60 IN AAAA fd00::1",
		"meta.corp.test. 60 IN A 169.254.169.254", "alias.corp.test. 60 IN CNAME db.cloud.test.", "db.cloud.test. 60 IN A 10.1.2.4",
		"denied.corp.test. 60 IN A 10.9.9.9", "unlisted.corp.test. 60 IN A 10.1.2.3", "x.deep.corp.test. 60 IN A 10.1.2.3", "loop.corp.test. 60 IN A 127.0.0.1",
		"svc.corp.test. 60 IN HTTPS 1 . ipv4hint=10.1.2.3,172.16.0.1")
	general := newOrigin(t, "www.else.test. 60 IN A 10.1.2.3")
	p := enforced(t, `
version: 1
deny: [{addresses: [10.9.0.0/16]}]
groups:
  - {name: g, sources: [127.0.0.1/32], allow: [db.corp.test, meta.corp.test, alias.corp.test, denied.corp.test, x.deep.corp.test, www.else.test, loop.corp.test, svc.corp.test]}
  - {name: o, sources: [127.0.0.4/32], mode: observe, observe_until: 2099-01-01}
`)
	b := start(t, Config{Decider: p, Zones: []Zone{
		{Zone: "corp.test", Upstreams: []string{corp.addr}, PrivateDestinations: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fd00::/8")}},
		{Zone: "deep.corp.test", Upstreams: []string{corp.addr}},
	}}, general, patient)
	for _, tt := range []struct {
		source, name string
		qtype        uint16
		rcode        int
		want         []string
	}{
		{alice, "db.corp.test", dns.TypeA, 0, []string{"A 10.1.2.3"}},
		{alice, "DB.corp.test", dns.TypeAAAA, 0, []string{"AAAA fd00::1"}},
		{alice, "meta.corp.test", dns.TypeA, 0, nil},   // what clouds serve credentials at, a rule must name
		{alice, "loop.corp.test", dns.TypeA, 0, nil},   // not in the zone's prefixes
		{alice, "denied.corp.test", dns.TypeA, 0, nil}, // a guardrail
		{alice, "x.deep.corp.test", dns.TypeA, 0, nil}, // the longest zone counts alone
		{alice, "www.else.test", dns.TypeA, 0, nil},    // in no zone
		{alice, "svc.corp.test", dns.TypeHTTPS, 0, []string{`HTTPS 1 . ipv4hint="10.1.2.3"`}},
		{alice, "alias.corp.test", dns.TypeA, 0, []string{"CNAME db.cloud.test.", "A 10.1.2.4"}},
		{alice, "unlisted.corp.test", dns.TypeA, dns.RcodeRefused, nil}, // a zone lists nothing
		{watcher, "unlisted.corp.test", dns.TypeA, 0, []string{"A 10.1.2.3"}},
		{watcher, "www.else.test", dns.TypeA, 0, nil},
	} {
		m := b.ask(t, tt.source, "udp", question(tt.name+".", tt.qtype))
		if m.Rcode == dns.RcodeRefused && tt.name == "denied.corp.test" {
			m.Rcode = 0 // an explicit denial of the address is a refusal
		}
		if got := data(m); !slices.Equal(got, tt.want) || m.Rcode != tt.rcode {
			t.Errorf("%s asked for %s %d: %s %q, want %q", tt.source, tt.name, tt.qtype, dns.RcodeToString[m.Rcode], got, tt.want)
		}
	}
	for addr, want := range map[string]bool{"10.1.2.3": true, "::ffff:10.1.2.3": true, "fd00::2": true, "192.168.1.1": false, "192.0.2.1": false} {
		if got := b.resolver.PrivateZone(policy.MustName("db.corp.test"), netip.MustParseAddr(addr)); got != want {
			t.Errorf("PrivateZone(%s) = %v", addr, got)
		}
	}
	if b.resolver.PrivateZone(policy.Name{}, netip.MustParseAddr("10.1.2.3")) {
		t.Error("a literal address is in a zone")
	}
}

// TestAZoneDoesNotLeak: when a zone's upstreams fail, the general ones are not asked,
// and what they vouch for with AD is not passed on.
func TestAZoneDoesNotLeak(t *testing.T) {
	general, corp := newOrigin(t, "db.corp.test. 60 IN A 192.0.2.66"), newOrigin(t, "db.corp.test. 60 IN A 192.0.2.1")
	corp.set(func(w dns.ResponseWriter, q, m *dns.Msg) { m.AuthenticatedData = true; w.WriteMsg(m) })
	r := newResolver(t, Config{Zones: []Zone{{Zone: "corp.test", Upstreams: []string{corp.addr}}}}, general)
	if rep := get(t, r, "db.corp.test", dns.TypeA); rep.ad || len(rep.answer) != 1 {
		t.Errorf("reply = %+v", rep)
	}
	corp.down()
	for _, name := range []string{"db.corp.test", "corp.test", "x.y.corp.test"} {
		if rep := get(t, r, name, dns.TypeA); rep.rcode != dns.RcodeServerFailure {
			t.Errorf("%s: reply = %+v", name, rep)
		}
	}
	if n := general.packets(); n != 0 {
		t.Errorf("%d questions leaked", n)
	}
}

// TestT57SearchSuffixes: names with a search domain appended are NXDOMAIN, without a
// packet, so that clients go on to the name they mean; a zone forwards those listed.
func TestT57SearchSuffixes(t *testing.T) {
	cluster := newOrigin(t, "db.shop.svc.cluster.local. 60 IN A 192.0.2.1")
	people := fakePolicy{alice: {names: []string{"api.ok.test", "db.shop.svc.cluster.local"}, denied: []string{"bad.cluster.local"}}}
	b := start(t, Config{Decider: people, SearchDomains: []string{"cluster.local", "corp.test."},
		Zones: []Zone{{Zone: "cluster.local", Upstreams: []string{cluster.addr}}}}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.2"), patient)
	for _, name := range []string{"api.ok.test.shop.svc.cluster.local.", "api.ok.test.SVC.cluster.local.", "cluster.local.", "api.ok.test.corp.test."} {
		m := b.ask(t, alice, "udp", withEDNS(question(name, dns.TypeA)))
		wantRcode(t, m, dns.RcodeNameError, dns.ExtendedErrorCodeBlocked)
	}
	if ev := b.events.of(t, alice, "api.ok.test.corp.test A"); ev.Decision.Reason != policy.ReasonNotListed || ev.RCode != "NXDOMAIN" {
		t.Errorf("event = %+v", ev)
	}
	for _, name := range []string{"evil.test.", "notcluster.local.", "bad.cluster.local."} {
		wantRcode(t, b.ask(t, alice, "udp", question(name, dns.TypeA)), dns.RcodeRefused, 0)
	}
	wantRcode(t, b.ask(t, stranger, "udp", question("x.cluster.local.", dns.TypeA)), dns.RcodeRefused, 0)
	if n := b.packets() + cluster.packets(); n != 0 {
		t.Errorf("%d packets went upstream", n)
	}
	wantData(t, b.ask(t, alice, "udp", question("db.shop.svc.cluster.local.", dns.TypeA)), "A 192.0.2.1")
	wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 192.0.2.2")
}

// TestT53Canaries: names that ask whether encrypted DNS is wanted have an answer of
// their own, whatever refusals look like, unless a rule names them.
func TestT53Canaries(t *testing.T) {
	p := enforced(t, `
version: 1
groups:
  - {name: g, sources: [127.0.0.1/32], allow: [.icloud.com, api.ok.test]}
  - {name: b, sources: [127.0.0.2/32], allow: [mask.icloud.com]}
  - {name: o, sources: [127.0.0.4/32], mode: observe, observe_until: 2099-01-01}
`)
	for _, deny := range []Denial{DenyRefused, DenyNXDomain, DenyNodata, DenySinkhole} {
		b := start(t, Config{Decider: p, Deny: deny}, newOrigin(t, "mask.icloud.com. 60 IN A 5.5.5.5"), patient)
		for name, rcode := range map[string]int{
			"use-application-dns.net.": dns.RcodeNameError, "_dns.resolver.arpa.": dns.RcodeSuccess,
			"mask.icloud.com.": dns.RcodeNameError, "Mask-H2.iCloud.com.": dns.RcodeNameError,
		} {
			for _, source := range []string{alice, watcher} {
				for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB} {
					m := b.ask(t, source, "udp", question(name, qtype))
					wantData(t, m)
					wantRcode(t, m, rcode, 0)
				}
			}
		}
		if n := b.packets(); n != 0 {
			t.Errorf("%d packets went upstream", n)
		}
		wantData(t, b.ask(t, bob, "udp", question("mask.icloud.com.", dns.TypeA)), "A 5.5.5.5")
		wantRcode(t, b.ask(t, bob, "udp", question("mask.icloud.com.", dns.TypeTXT)), map[Denial]int{
			DenyRefused: dns.RcodeRefused, DenyNXDomain: dns.RcodeNameError}[deny], 0)
		wantRcode(t, b.ask(t, stranger, "udp", question("use-application-dns.net.", dns.TypeA)), map[Denial]int{
			DenyRefused: dns.RcodeRefused, DenyNXDomain: dns.RcodeNameError}[deny], 0)
	}
}

// TestHealthName: everybody is answered, whatever the policy and the upstreams say.
func TestHealthName(t *testing.T) {
	o := newOrigin(t)
	b := start(t, Config{Decider: fakePolicy{bob: {denied: []string{"health.sallyport.internal"}}}, HealthName: "Health.sallyport.internal."}, o)
	o.down()
	for _, source := range []string{alice, bob, stranger} {
		for qtype, want := range map[uint16][]string{dns.TypeA: {"A 127.0.0.1"}, dns.TypeAAAA: {"AAAA ::1"}, dns.TypeTXT: {`TXT "ok"`}, dns.TypeMX: nil} {
			m := b.ask(t, source, "udp", question("health.sallyport.internal.", qtype))
			wantData(t, m, want...)
			wantRcode(t, m, dns.RcodeSuccess, 0)
		}
		wantRcode(t, b.ask(t, source, "udp", question("x.health.sallyport.internal.", dns.TypeA)), dns.RcodeRefused, 0)
	}
	if ev := b.events.of(t, stranger, "health.sallyport.internal A"); ev.Decision.Rule != "dns.health_name" || ev.Decision.Verdict != policy.Allow {
		t.Errorf("event = %+v", ev)
	}
}

func TestPrefetch(t *testing.T) {
	for _, on := range []bool{true, false} {
		now := newClock()
		o := newOrigin(t, "hot.test. 100 IN A 192.0.2.1", "cold.test. 100 IN A 192.0.2.2")
		r := newResolver(t, Config{Now: now.now, Cache: Cache{Size: mib, Prefetch: on}}, o)
		patient(r)
		for range prefetchHits + 1 {
			get(t, r, "hot.test", dns.TypeA)
		}
		get(t, r, "cold.test", dns.TypeA)
		now.advance(89 * time.Second)
		get(t, r, "hot.test", dns.TypeA) // not yet
		if n := o.packets(); n != 2 {
			t.Errorf("%d packets before the last tenth of the TTL", n)
		}
		now.advance(2 * time.Second)
		get(t, r, "cold.test", dns.TypeA) // not in use
		for range 10 {
			if rep := get(t, r, "hot.test", dns.TypeA); len(rep.answer) != 1 {
				t.Errorf("reply = %+v", rep)
			}
		}
		if !on {
			if n := o.packets(); n != 2 || r.Stats().Prefetched != 0 {
				t.Errorf("%d packets, %+v", n, r.Stats())
			}
			continue
		}
		eventually(t, "the new answer", func() bool { return get(t, r, "hot.test", dns.TypeA).answer[0].Header().Ttl == 100 })
		if s := r.Stats(); s.Prefetched != 1 || o.packets() != 3 || s.CacheMisses != 2 {
			t.Errorf("%+v in %d packets: one prefetch expected", s, o.packets())
		}
		// A failed one leaves the answer as it is.
		for range prefetchHits {
			get(t, r, "hot.test", dns.TypeA)
		}
		o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeServerFailure)) })
		now.advance(95 * time.Second)
		for range 3 {
			if rep := get(t, r, "hot.test", dns.TypeA); len(rep.answer) != 1 {
				t.Errorf("reply = %+v", rep)
			}
		}
		eventually(t, "the failure", func() bool { return o.packets() == 4 && r.Stats().InFlight == 0 })
		if rep := get(t, r, "hot.test", dns.TypeA); len(rep.answer) != 1 || rep.err != nil {
			t.Errorf("after a failed prefetch: %+v", rep)
		}
	}
}

// TestStaleAnswersDoNotKeepEverybodyWaiting: who comes when the upstream has been slow
// for a while gets the stale answer at once.
func TestStaleAnswersDoNotKeepEverybodyWaiting(t *testing.T) {
	now := newClock()
	o := newOrigin(t, "a.test. 60 IN A 192.0.2.1")
	r := newResolver(t, Config{Now: now.now, Cache: Cache{Size: mib, ServeStale: time.Hour}}, o)
	patient(r)
	get(t, r, "a.test", dns.TypeA)
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { <-release; w.WriteMsg(m) })
	now.advance(61 * time.Second)
	f, err := r.join(key{name: policy.MustName("a.test"), qtype: dns.TypeA})
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	f.begun = f.begun.Add(-time.Minute)
	r.mu.Unlock()
	r.timing.staleWait = 30 * time.Second
	within(t, "a query with a stale answer", func() {
		if rep := get(t, r, "a.test", dns.TypeA); rep.ede != dns.ExtendedErrorCodeStaleAnswer {
			t.Errorf("reply = %+v", rep)
		}
	})
}

func TestNamesOfAddressesInTheHostsFile(t *testing.T) {
	log := new(logs)
	path := filepath.Join(t.TempDir(), "hosts")
	writeHosts(t, path, "10.0.0.1 db.test db\n10.0.0.1 second.test\n2001:db8::1 six.test\nnonsense\n10.0.0.2 bad..name good.test\n10.0.0.3\n")
	o := newOrigin(t)
	r := newResolver(t, Config{HostsFile: path, Logger: zerolog.New(log)}, o)
	for name, want := range map[string]string{
		"1.0.0.10.in-addr.arpa": "PTR db.test.,PTR second.test.",
		"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa": "PTR six.test.",
	} {
		if got := strings.Join(get(t, r, name, dns.TypePTR).data(), ","); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	if got := get(t, r, "good.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 10.0.0.2"}) {
		t.Errorf("answer = %q", got)
	}
	if o.packets() != 0 {
		t.Errorf("%d packets went upstream", o.packets())
	}
	for _, name := range []string{"9.0.0.10.in-addr.arpa", "0.0.10.in-addr.arpa", "x.0.0.10.in-addr.arpa", "1.0.ip6.arpa"} {
		if before := o.packets(); len(get(t, r, name, dns.TypePTR).data()) != 0 || o.packets() != before+1 {
			t.Errorf("%s is answered from the file", name)
		}
	}
	if lines := log.with("bad lines"); len(lines) != 1 || !strings.Contains(lines[0], `"skipped":3`) || !strings.Contains(lines[0], `"line":4`) {
		t.Errorf("logged %q", lines)
	}
}

// TestHostsFileBehindASwappedLink: the new target looks like the old one in everything but what it says.
func TestHostsFileBehindASwappedLink(t *testing.T) {
	dir, now := t.TempDir(), newClock()
	at := time.Now().Add(-time.Hour)
	for name, text := range map[string]string{"one": "10.0.0.1 a.test\n", "two": "10.0.0.2 a.test\n"} {
		path := filepath.Join(dir, name)
		writeHosts(t, path, text)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(dir, "hosts")
	if err := os.Symlink("one", link); err != nil {
		t.Fatal(err)
	}
	r := newResolver(t, Config{Now: now.now, HostsFile: link}, newOrigin(t))
	want := func(addr string) {
		t.Helper()
		if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A " + addr}) {
			t.Errorf("answer = %q, want %s", got, addr)
		}
	}
	want("10.0.0.1")
	if err := os.Symlink("two", link+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		t.Fatal(err)
	}
	want("10.0.0.1")
	r.Reload() // at once, as SIGHUP does
	want("10.0.0.2")
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("one", link); err != nil {
		t.Fatal(err)
	}
	now.advance(fileCheck)
	want("10.0.0.1")
}

// TestT46AliasesInOneAnswerDoNotReachTheCacheOfOthers: what an answer says besides
// the chain of its question is not known afterwards.
func TestT46AliasesInOneAnswerDoNotReachTheCacheOfOthers(t *testing.T) {
	o := newOrigin(t, "www.cdn.test. 60 IN CNAME api.ok.test.", "api.ok.test. 60 IN A 192.0.2.66")
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if q.Question[0].Name == "api.ok.test." {
			m.Answer[0].(*dns.A).A = []byte{192, 0, 2, 1}
		}
		w.WriteMsg(m)
	})
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}}, o, patient)
	wantData(t, b.ask(t, alice, "udp", question("www.cdn.test.", dns.TypeA)), "CNAME api.ok.test.", "A 192.0.2.66")
	wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 192.0.2.1")
	if addrs, err := b.resolver.LookupNetIP(context.Background(), "ip4", "api.ok.test"); err != nil || !slices.Equal(addrs, []netip.Addr{netip.MustParseAddr("192.0.2.1")}) {
		t.Errorf("LookupNetIP() = %v, %v", addrs, err)
	}
}
