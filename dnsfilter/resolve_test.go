package dnsfilter

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
)

const mib = 1 << 20

// get resolves a question and returns the answer as a message.
func get(t testing.TB, r *Resolver, name string, qtype uint16) *reply {
	t.Helper()
	rep, err := r.resolve(context.Background(), key{name: policy.MustName(name), qtype: qtype}, nil)
	if err != nil {
		t.Fatalf("resolve %s: %v", name, err)
	}
	return rep
}

func (rep *reply) data() []string { return data(&dns.Msg{Answer: rep.answer}) }

func ttls(rrs []dns.RR) (all []uint32) {
	for _, rr := range rrs {
		all = append(all, rr.Header().Ttl)
	}
	return all
}

func TestTTLCountsDown(t *testing.T) {
	now := newClock()
	o := newOrigin(t, "a.test. 300 IN CNAME b.test.", "b.test. 100 IN A 192.0.2.1")
	r := newResolver(t, Config{Now: now.now, Cache: Cache{Size: mib}}, o)
	for _, tt := range []struct {
		pass    time.Duration
		ttls    string
		packets int64
	}{
		{0, "[300 100]", 1}, {0, "[300 100]", 1}, {40500 * time.Millisecond, "[260 60]", 1},
		{59 * time.Second, "[201 1]", 1}, {time.Second, "[300 100]", 2},
	} {
		now.advance(tt.pass)
		rep := get(t, r, "a.test", dns.TypeA)
		if got := fmt.Sprint(ttls(rep.answer)); got != tt.ttls || o.packets() != tt.packets {
			t.Errorf("after %v: TTLs %s in %d packets, want %s in %d", tt.pass, got, o.packets(), tt.ttls, tt.packets)
		}
	}
	if s := r.Stats(); s.CacheHits != 3 || s.CacheMisses != 2 || s.CacheEntries != 1 || s.CacheBytes <= 0 || s.UpstreamQueries != 2 {
		t.Errorf("Stats() = %+v", s)
	}
}

func TestTTLBounds(t *testing.T) {
	o := newOrigin(t, "short.test. 1 IN A 192.0.2.1", "long.test. 999999 IN A 192.0.2.1", "zero.test. 0 IN A 192.0.2.1", "absurd.test. 4294967295 IN A 192.0.2.1")
	for _, tt := range []struct {
		cache Cache
		name  string
		ttl   uint32
		kept  int
	}{
		{Cache{Size: mib, MinTTL: time.Minute, MaxTTL: time.Hour}, "short.test", 60, 1},
		{Cache{Size: mib, MinTTL: time.Minute, MaxTTL: time.Hour}, "long.test", 3600, 1},
		{Cache{Size: mib}, "long.test", 86400, 1},
		{Cache{Size: mib}, "zero.test", 0, 0},
		{Cache{Size: mib}, "absurd.test", 0, 0},
		{Cache{}, "short.test", 1, 0},
	} {
		r := newResolver(t, Config{Cache: tt.cache}, o)
		rep := get(t, r, tt.name, dns.TypeA)
		if got := ttls(rep.answer); len(got) != 1 || got[0] != tt.ttl || r.Stats().CacheEntries != tt.kept {
			t.Errorf("%s with %+v: TTLs %v, %d kept", tt.name, tt.cache, got, r.Stats().CacheEntries)
		}
	}
}

func TestNegativeAnswersAreKeptAsLongAsTheSOASays(t *testing.T) {
	for _, tt := range []struct {
		name, soa string
		keep      time.Duration
	}{
		{"minimum", soa, time.Minute},
		{"TTL of the SOA", "test. 30 IN SOA ns.test. admin.test. 1 3600 600 86400 60", 30 * time.Second},
		{"cap", "test. 86400 IN SOA ns.test. admin.test. 1 3600 600 86400 86400", 3 * time.Hour},
		{"no SOA", "other. 1 IN A 192.0.2.1", 0},
	} {
		for _, name := range []string{"absent.test", "here.test"} { // NXDOMAIN and NODATA
			t.Run(tt.name+" "+name, func(t *testing.T) {
				now := newClock()
				o := newOrigin(t, tt.soa, "here.test. 60 IN A 192.0.2.1")
				r := newResolver(t, Config{Now: now.now, Cache: Cache{Size: mib}}, o)
				get(t, r, name, dns.TypeAAAA)
				now.advance(max(tt.keep-time.Second, 0))
				rep := get(t, r, name, dns.TypeAAAA)
				want := int64(1)
				if tt.keep == 0 {
					want = 2
				} else if got := ttls(rep.authority); len(got) != 1 || got[0] != 1 {
					t.Errorf("TTLs %v a second before the end", got)
				}
				now.advance(time.Second)
				get(t, r, name, dns.TypeAAAA)
				if got := o.packets(); got != want+1 {
					t.Errorf("%d packets, want %d", got, want+1)
				}
			})
		}
	}
}

func TestFailuresAreKeptForAMoment(t *testing.T) {
	now := newClock()
	o := newOrigin(t, "a.test. 60 IN A 192.0.2.1")
	r := newResolver(t, Config{Now: now.now, Cache: Cache{Size: mib}}, o)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeServerFailure)) })
	for range 3 {
		if rep := get(t, r, "a.test", dns.TypeA); rep.rcode != dns.RcodeServerFailure || rep.err == nil {
			t.Errorf("reply = %+v", rep)
		}
	}
	if n := o.packets(); n != 1 {
		t.Errorf("%d packets, want 1", n)
	}
	o.set(nil)
	now.advance(failureTTL)
	if rep := get(t, r, "a.test", dns.TypeA); len(rep.answer) != 1 {
		t.Errorf("reply = %+v", rep)
	}
}

func TestServeStale(t *testing.T) {
	now := newClock()
	o := newOrigin(t, soa, "a.test. 60 IN A 192.0.2.1")
	r := newResolver(t, Config{Now: now.now, Cache: Cache{Size: mib, ServeStale: time.Hour}}, o)
	r.timing.staleWait = 20 * time.Millisecond
	get(t, r, "a.test", dns.TypeA)
	get(t, r, "absent.test", dns.TypeA)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeServerFailure)) })
	now.advance(61 * time.Second)
	for range 3 {
		rep := get(t, r, "a.test", dns.TypeA)
		if len(rep.answer) != 1 || rep.answer[0].Header().Ttl != 30 || rep.ede != dns.ExtendedErrorCodeStaleAnswer {
			t.Errorf("stale reply = %+v", rep)
		}
	}
	if n := o.packets(); n != 3 {
		t.Errorf("%d packets, want 3: a failed refresh is not tried again at once", n)
	}
	if rep := get(t, r, "absent.test", dns.TypeA); rep.rcode != dns.RcodeNameError || rep.ede != dns.ExtendedErrorCodeStaleNXDOMAINAnswer {
		t.Errorf("stale reply = %+v", rep)
	}
	if s := r.Stats(); s.CacheStale != 4 || s.CacheMisses != 2 || s.CacheHits != 0 {
		t.Errorf("Stats() = %+v, want 4 stale, 2 misses", s)
	}

	release := make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if s := r.Stats(); s.CacheMisses != 2 {
			t.Errorf("CacheMisses = %d before it is known what is answered", s.CacheMisses)
		}
		<-release
		w.WriteMsg(m)
	})
	now.advance(staleRetry)
	if rep := get(t, r, "a.test", dns.TypeA); rep.ede != dns.ExtendedErrorCodeStaleAnswer {
		t.Errorf("reply of a slow upstream = %+v", rep)
	}
	close(release) // the refresh goes on
	eventually(t, "the refresh", func() bool { return get(t, r, "a.test", dns.TypeA).ede == 0 })

	o.down()
	now.advance(time.Hour + 61*time.Second)
	if rep := get(t, r, "a.test", dns.TypeA); rep.rcode != dns.RcodeServerFailure {
		t.Errorf("reply after serve_stale = %+v", rep)
	}
}

func TestCoalescing(t *testing.T) {
	const n = 1000
	o := newOrigin(t, "a.test. 60 IN A 192.0.2.1")
	r := newResolver(t, Config{}, o) // no cache: only coalescing can help
	release := make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { <-release; w.WriteMsg(m) })
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if rep := get(t, r, "a.test", dns.TypeA); len(rep.answer) != 1 {
				t.Errorf("reply = %+v", rep)
			}
		})
	}
	eventually(t, "everybody to wait", func() bool { return r.Stats().Coalesced == n-1 })
	if r.Stats().InFlight != 1 {
		t.Errorf("InFlight = %d", r.Stats().InFlight)
	}
	close(release)
	wg.Wait()
	if o.packets() != 1 {
		t.Errorf("%d packets, want 1", o.packets())
	}
}

func TestWhoGivesUpDoesNotStopTheOthers(t *testing.T) {
	o := newOrigin(t, "a.test. 60 IN A 192.0.2.1")
	r := newResolver(t, Config{}, o)
	asked, release := make(chan struct{}, 1), make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { asked <- struct{}{}; <-release; w.WriteMsg(m) })
	ctx, cancel := context.WithCancel(context.Background())
	gone := make(chan error, 1)
	go func() {
		_, err := r.resolve(ctx, key{name: policy.MustName("a.test"), qtype: dns.TypeA}, nil)
		gone <- err
	}()
	<-asked
	cancel()
	if err := <-gone; err != context.Canceled {
		t.Errorf("resolve() = %v", err)
	}
	second := make(chan *reply, 1)
	go func() { second <- get(t, r, "a.test", dns.TypeA) }()
	eventually(t, "the second to wait as well", func() bool { return r.Stats().Coalesced == 1 })
	close(release)
	if rep := <-second; len(rep.answer) != 1 || o.packets() != 1 {
		t.Errorf("reply = %+v in %d packets", rep, o.packets())
	}
}

func TestQuestionsUnderWayAreBounded(t *testing.T) {
	o := newOrigin(t)
	r := newResolver(t, Config{}, o)
	r.mu.Lock()
	for i := range maxFlights {
		r.flights[key{name: policy.MustName(fmt.Sprintf("n%d.test", i))}] = &flight{}
	}
	r.mu.Unlock()
	if _, err := r.resolve(context.Background(), key{name: policy.MustName("a.test"), qtype: dns.TypeA}, nil); err != errBusy {
		t.Errorf("resolve() = %v, want %v", err, errBusy)
	}
	clear(r.flights)
}

func TestAnswersAreScrubbed(t *testing.T) {
	o := newOrigin(t)
	r := newResolver(t, Config{}, o)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		for _, line := range []string{"b.test. 60 IN A 192.0.2.1", "A.test. 60 IN CNAME b.test.", "poison.test. 60 IN A 192.0.2.66",
			"a.test. 60 IN TXT unasked", "b.test. 60 CH A 192.0.2.67", "a.test. 60 IN RRSIG A 13 2 60 20300101000000 20200101000000 1 test. AAAA"} {
			rr, err := dns.NewRR(line)
			if err != nil {
				t.Error(err)
				continue
			}
			m.Answer = append(m.Answer, rr)
		}
		ns, _ := dns.NewRR("test. 60 IN NS evil.test.")
		glue, _ := dns.NewRR("evil.test. 60 IN A 10.0.0.1")
		m.Rcode, m.Ns, m.Extra = 0, append(m.Ns, ns), append(m.Extra, glue)
		w.WriteMsg(m)
	})
	rep := get(t, r, "a.test", dns.TypeA)
	if got := strings.Join(rep.data(), ","); got != "A 192.0.2.1,CNAME b.test." || len(rep.authority) != 0 {
		t.Errorf("answer = %s, authority %v", got, rep.authority)
	}
}

func TestAliases(t *testing.T) {
	zone := []string{
		"loop.test. 60 IN CNAME pool.test.", "pool.test. 60 IN CNAME loop.test.",
		"half.test. 60 IN CNAME rest.test.", "rest.test. 30 IN A 192.0.2.5",
		"odd.test. 60 IN CNAME " + `a\000b.test.`,
		"d.old.test. 60 IN CNAME d.new.test.", "d.new.test. 60 IN A 192.0.2.6",
	}
	for i := range 30 {
		zone = append(zone, fmt.Sprintf("c%d.test. 60 IN CNAME c%d.test.", i, i+1))
	}
	o := newOrigin(t, zone...)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		name := q.Question[0].Name
		if strings.HasPrefix(name, "c") || name == "half.test." || name == "odd.test." {
			m.Answer = m.Answer[:1] // an upstream that does not follow aliases
		}
		if name == "d.old.test." {
			d, _ := dns.NewRR("old.test. 60 IN DNAME new.test.")
			m.Answer = append([]dns.RR{d}, m.Answer...)
		}
		w.WriteMsg(m)
	})
	r := newResolver(t, Config{Cache: Cache{Size: mib}}, o)
	for _, tt := range []struct{ name, want string }{
		{"half.test", "CNAME rest.test.,A 192.0.2.5"},
		{"d.old.test", "DNAME new.test.,CNAME d.new.test.,A 192.0.2.6"},
		{"loop.test", "SERVFAIL"}, {"c0.test", "SERVFAIL"}, {"odd.test", "SERVFAIL"},
	} {
		for range 2 {
			rep := get(t, r, tt.name, dns.TypeA)
			got := strings.Join(rep.data(), ",")
			if rep.rcode != 0 {
				got = dns.RcodeToString[rep.rcode]
			}
			if got != tt.want {
				t.Errorf("%s = %s, want %s", tt.name, got, tt.want)
			}
			if rep.rcode != 0 && rep.ede == 0 {
				t.Errorf("%s fails without an Extended DNS Error", tt.name)
			}
		}
	}
}

func TestZones(t *testing.T) {
	general, corp, deep := newOrigin(t, "a.test. 60 IN A 192.0.2.1"), newOrigin(t, "a.corp.test. 60 IN A 192.0.2.2", "corp.test. 60 IN A 192.0.2.3"), newOrigin(t, "a.deep.corp.test. 60 IN A 192.0.2.4")
	r := newResolver(t, Config{Zones: []Zone{
		{Zone: "corp.test.", Upstreams: []string{corp.addr}},
		{Zone: "Deep.corp.test", Upstreams: []string{"tcp://" + deep.addr}},
	}}, general)
	for _, tt := range []struct {
		name, want string
		o          *origin
	}{
		{"a.test", "A 192.0.2.1", general}, {"a.corp.test", "A 192.0.2.2", corp}, {"corp.test", "A 192.0.2.3", corp},
		{"a.deep.corp.test", "A 192.0.2.4", deep}, {"notcorp.test", "", general},
	} {
		before := tt.o.packets()
		rep := get(t, r, tt.name, dns.TypeA)
		if got := strings.Join(rep.data(), ","); got != tt.want || tt.o.packets() != before+1 {
			t.Errorf("%s = %q in %d packets", tt.name, got, tt.o.packets()-before)
		}
	}
	if deep.tcp.Load() != 1 {
		t.Error("the zone was not asked over TCP")
	}
}

func TestHostsFile(t *testing.T) {
	now := newClock()
	path := filepath.Join(t.TempDir(), "hosts")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("127.0.0.1 localhost # comment\n\n10.0.0.1\tDB.test db\n2001:db8::1 db.test\nfe80::1%eth0 zoned.test\nbad line\n::ffff:10.0.0.2 mapped.test\n10.0.0.1 db.test\n")
	o := newOrigin(t, "db.test. 60 IN A 192.0.2.1", `db.test. 60 IN TXT "from upstream"`, "db.test. 60 IN HTTPS 1 . ipv4hint=192.0.2.1")
	r := newResolver(t, Config{Now: now.now, HostsFile: path, Records: []Record{{Name: "db.test", Type: "A", Value: "10.9.9.9"}}}, o)
	for _, tt := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"db.test", dns.TypeA, "A 10.0.0.1"}, {"db.test", dns.TypeAAAA, "AAAA 2001:db8::1"}, {"db", dns.TypeA, "A 10.0.0.1"},
		{"db.test", dns.TypeHTTPS, ""}, {"localhost", dns.TypeA, "A 127.0.0.1"}, {"mapped.test", dns.TypeA, "A 10.0.0.2"},
	} {
		if rep := get(t, r, tt.name, tt.qtype); strings.Join(rep.data(), ",") != tt.want || !rep.local || rep.rcode != 0 {
			t.Errorf("%s %d = %+v, want %s", tt.name, tt.qtype, rep, tt.want)
		}
	}
	if o.packets() != 0 {
		t.Errorf("%d packets went upstream", o.packets())
	}
	write("10.0.0.77 db.test\n")
	if got := get(t, r, "db.test", dns.TypeA).data(); got[0] != "A 10.0.0.1" {
		t.Errorf("looked at within a second: %v", got)
	}
	now.advance(fileCheck)
	if got := get(t, r, "db.test", dns.TypeA).data(); got[0] != "A 10.0.0.77" {
		t.Errorf("after a change: %v", got)
	}
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	now.advance(fileCheck)
	if got := get(t, r, "db.test", dns.TypeA).data(); got[0] != "A 10.0.0.77" {
		t.Errorf("after a change for the worse: %v", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	now.advance(fileCheck)
	if got := get(t, r, "db.test", dns.TypeA).data(); got[0] != "A 10.9.9.9" {
		t.Errorf("without the file: %v", got)
	}
}

func TestHostsNamesAreDecidedLikeAnyOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(path, []byte("10.0.0.1 api.ok.test evil.test\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b := start(t, Config{Decider: people, HostsFile: path}, newOrigin(t))
	m := b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA))
	wantData(t, m, "A 10.0.0.1") // private, but the operator's own word
	if !m.Authoritative {
		t.Error("AA not set")
	}
	wantRcode(t, b.ask(t, alice, "udp", question("evil.test.", dns.TypeA)), dns.RcodeRefused, 0)
}

func TestSystemUpstreams(t *testing.T) {
	now := newClock()
	first, second := newOrigin(t, "a.test. 0 IN A 192.0.2.1"), newOrigin(t, "a.test. 0 IN A 192.0.2.2")
	path := filepath.Join(t.TempDir(), "resolv.conf")
	r, err := New(Config{Now: now.now, ResolvConf: path, Listen: []string{"127.0.0.53:53"}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if rep := get(t, r, "a.test", dns.TypeA); rep.rcode != dns.RcodeServerFailure {
		t.Errorf("without resolv.conf: %+v", rep)
	}
	if r.CheckUpstreams(context.Background()) == nil || r.UpstreamOK() {
		t.Error("upstreams are well though there are none")
	}
	if err := os.WriteFile(path, []byte("search example.com\nnameserver 127.0.0.53\nnameserver 192.0.2.53\noptions ndots:5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	now.advance(fileCheck)
	if ups := r.pool.order(); len(ups) != 1 || ups[0].addr != netip.MustParseAddrPort("192.0.2.53:53") {
		t.Errorf("upstreams = %v", ups)
	}
	for i, o := range []*origin{first, second} { // resolv.conf has no ports: put the origins in by hand
		u, err := parseUpstream(o.addr, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.pool.ups.Store(&[]*upstream{u})
		if got := get(t, r, "a.test", dns.TypeA).data(); len(got) != 1 || got[0] != fmt.Sprintf("A 192.0.2.%d", i+1) {
			t.Errorf("answer = %v", got)
		}
	}
}

func TestClosedResolver(t *testing.T) {
	o := newOrigin(t)
	r, err := New(Config{Upstreams: []string{o.addr}})
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan struct{}, 1)
	o.set(func(dns.ResponseWriter, *dns.Msg, *dns.Msg) { asked <- struct{}{} })
	done := make(chan *reply, 1)
	go func() { done <- get(t, r, "a.test", dns.TypeA) }()
	<-asked
	r.Close()
	if rep := <-done; rep.rcode != dns.RcodeServerFailure {
		t.Errorf("reply = %+v", rep)
	}
	if _, err := r.LookupNetIP(context.Background(), "ip", "b.test"); err == nil {
		t.Error("LookupNetIP() after Close went well")
	}
}

func TestALyingUpstreamsSOAAndDNAMEAreNotPassedOn(t *testing.T) {
	o := newOrigin(t)
	r := newResolver(t, Config{}, o)
	for _, tt := range []struct {
		name              string
		rcode             int
		answer, ns        []string
		wantData, wantSOA string
	}{
		{"negative", dns.RcodeNameError, nil, []string{soa}, "", "test."},
		{"own zone", dns.RcodeSuccess, nil, []string{"a.test. 60 IN SOA ns.test. admin.test. 1 1 1 1 1"}, "", "a.test."},
		{"behind an alias", dns.RcodeNameError, []string{"a.test. 60 IN CNAME b.other."}, []string{"other. 60 IN SOA ns.test. admin.test. 1 1 1 1 1"}, "CNAME b.other.", "other."},
		{"positive", dns.RcodeSuccess, []string{"a.test. 60 IN A 192.0.2.1"}, []string{soa}, "A 192.0.2.1", ""},
		{"elsewhere", dns.RcodeNameError, nil, []string{"secret.evil. 60 IN SOA data.evil. more.evil. 1 1 1 1 1"}, "", ""},
		{"below", dns.RcodeNameError, nil, []string{"x.a.test. 60 IN SOA ns.test. admin.test. 1 1 1 1 1"}, "", ""},
		{"DNAME alone", dns.RcodeSuccess, []string{"test. 60 IN DNAME evil.", "a.test. 60 IN A 192.0.2.1"}, nil, "A 192.0.2.1", ""},
		{"DNAME of another CNAME", dns.RcodeSuccess, []string{"test. 60 IN DNAME evil.", "a.test. 60 IN CNAME a.new.", "a.new. 60 IN A 192.0.2.1"}, nil, "CNAME a.new.,A 192.0.2.1", ""},
		{"DNAME", dns.RcodeSuccess, []string{"Test. 60 IN DNAME new.", "a.test. 60 IN CNAME A.new.", "a.new. 60 IN A 192.0.2.1"}, nil, "DNAME new.,CNAME A.new.,A 192.0.2.1", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
				m.Rcode, m.Answer, m.Ns = tt.rcode, parseRRs(t, tt.answer), parseRRs(t, tt.ns)
				w.WriteMsg(m)
			})
			rep := get(t, r, "a.test", dns.TypeA)
			got := ""
			for _, rr := range rep.authority {
				got += rr.Header().Name
			}
			if d := strings.Join(rep.data(), ","); d != tt.wantData || got != tt.wantSOA {
				t.Errorf("answer = %s with SOA %q, want %s with %q", d, got, tt.wantData, tt.wantSOA)
			}
		})
	}
}

func parseRRs(t testing.TB, lines []string) (rrs []dns.RR) {
	t.Helper()
	for _, l := range lines {
		rr, err := dns.NewRR(l)
		if err != nil {
			t.Error(err)
			continue
		}
		rrs = append(rrs, rr)
	}
	return rrs
}

// endless leads each name to another, which it says nothing about.
type endless struct {
	canned
	asked int
}

func (e *endless) exchange(_ context.Context, q *dns.Msg) (*dns.Msg, error) {
	e.asked++
	m := new(dns.Msg).SetReply(q)
	rr, err := dns.NewRR(fmt.Sprintf("%s 60 IN CNAME n%d.test.", q.Question[0].Name, e.asked))
	m.Answer = []dns.RR{rr}
	return m, err
}

// All aliases of one question together have the time of one.
func TestAliasesTakeNoLongerThanAQuestion(t *testing.T) {
	r := newResolver(t, Config{Upstreams: []string{"192.0.2.53"}}, nil)
	e := new(endless)
	r.pool.ups.Store(&[]*upstream{{exchanger: e}})
	r.timing.total = 0
	rep := get(t, r, "a.test", dns.TypeA)
	if rep.rcode != dns.RcodeServerFailure || rep.ede != dns.ExtendedErrorCodeNoReachableAuthority || e.asked != 1 {
		t.Errorf("reply = %+v after %d questions", rep, e.asked)
	}
}

// A query that is turned away for lack of room is counted once, however it comes.
func TestABusyResolverCountsAQueryOnce(t *testing.T) {
	l := newLab(t, Config{})
	r := l.s.resolver
	busy(t, r)
	p, err := question("api.ok.test.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	got := new(answersTo)
	l.s.serveLater(context.Background(), client{addr: netip.MustParseAddrPort(alice + ":4711"), udp: true, back: got}, p, true)
	if n := r.Stats().Dropped; n != 1 || len(*got) != 1 || unpacked((*got)[0]).Rcode != dns.RcodeServerFailure {
		t.Errorf("Dropped = %d, answers %x", n, *got)
	}
}

// Too much to ask of the upstreams is a reason for a stale answer, as their failure is.
func TestABusyResolverAnswersWhatIsStale(t *testing.T) {
	now := newClock()
	r := newResolver(t, Config{Now: now.now, Cache: Cache{Size: mib, ServeStale: time.Hour}}, newOrigin(t, "a.test. 60 IN A 192.0.2.1"))
	patient(r)
	get(t, r, "a.test", dns.TypeA)
	now.advance(61 * time.Second)
	busy(t, r)
	if rep := get(t, r, "a.test", dns.TypeA); rep.ede != dns.ExtendedErrorCodeStaleAnswer || len(rep.answer) != 1 || r.Stats().Dropped != 0 {
		t.Errorf("reply = %+v, %+v", rep, r.Stats())
	}
}

// busy has r ask as many questions as it may.
func busy(t *testing.T, r *Resolver) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range maxFlights {
		r.flights[key{name: policy.MustName(fmt.Sprintf("n%d.test", i))}] = &flight{}
	}
}

// system returns a Resolver that has its upstreams from resolv.conf, and o as the only
// one that is named there.
func system(t *testing.T, o *origin) (*Resolver, *upstream) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	writeHosts(t, path, "nameserver 192.0.2.53\n")
	r, err := New(Config{ResolvConf: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	patient(r)
	u, err := parseUpstream(o.addr, nil) // resolv.conf has no ports
	if err != nil {
		t.Fatal(err)
	}
	u.text = "192.0.2.53"
	closeAll(*r.pool.ups.Swap(&[]*upstream{u}))
	return r, u
}

// Name servers that stay in resolv.conf are kept when it is read again, as on each
// SIGHUP, and questions under way are answered.
func TestReloadKeepsQuestionsUnderWay(t *testing.T) {
	o := newOrigin(t, "a.test. 60 IN A 192.0.2.1")
	asked, release := make(chan struct{}, 8), make(chan struct{})
	o.set(func(w dns.ResponseWriter, _, m *dns.Msg) {
		asked <- struct{}{}
		<-release
		w.WriteMsg(m)
	})
	r, u := system(t, o)
	done := make(chan *reply, 1)
	go func() { done <- get(t, r, "a.test", dns.TypeA) }()
	<-asked
	for range 3 {
		r.Reload()
		if ups := r.pool.order(); len(ups) != 1 || ups[0] != u {
			t.Errorf("upstreams = %v", ups)
		}
	}
	close(release)
	if got := (<-done).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) {
		t.Errorf("answer = %q", got)
	}
}

// Questions under way with name servers that are replaced go to the new ones.
func TestReplacedUpstreamsHandOver(t *testing.T) {
	o, next := newOrigin(t), newOrigin(t, "a.test. 60 IN A 192.0.2.1")
	asked := make(chan struct{}, 8)
	o.set(func(dns.ResponseWriter, *dns.Msg, *dns.Msg) { asked <- struct{}{} })
	r, u := system(t, o)
	done := make(chan *reply, 1)
	go func() { done <- get(t, r, "a.test", dns.TypeA) }()
	<-asked
	other, err := parseUpstream(next.addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.pool.ups.Store(&[]*upstream{other})
	closeAll([]*upstream{u})
	if got := (<-done).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) {
		t.Errorf("answer = %q", got)
	}
}
