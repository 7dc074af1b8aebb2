package dnsfilter

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"

	"reflect"
	"strconv"

	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/dnsfilter/wire"
	"sallyport/policy"
)

var cached = Cache{Size: mib}

// serving has l's Server answer on loopback, with o as every upstream.
func (l *lab) serving(t *testing.T, o *origin) string {
	t.Helper()
	o.zone = (*l.s.resolver.pool.ups.Load())[0].exchanger.(zoned).o.zone
	o.set(func(w dns.ResponseWriter, q, _ *dns.Msg) {
		m, _ := zoned{o}.exchange(context.Background(), q)
		m.Compress = true
		if isUDP(w) {
			m.Truncate(defaultEDNSSize)
		}
		w.WriteMsg(m)
	})
	for _, p := range l.s.resolver.pools() {
		u, err := l.s.cfg.parseUpstream(o.addr)
		if err != nil {
			t.Fatal(err)
		}
		p.ups.Store(&[]*upstream{u})
	}
	l.s.resolver.timing.try, l.s.resolver.timing.total = 20*time.Second, 40*time.Second
	if err := l.s.Listen(); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- l.s.Serve(context.Background()) }()
	t.Cleanup(func() {
		if err := errors.Join(l.s.Shutdown(context.Background()), <-served); err != nil {
			t.Error(err)
		}
	})
	return l.s.Addrs()[0].String()
}

// TestForwardSaysTheSame holds what clients hear over sockets, of what is in no cache
// too, against the slow path with the same upstream.
func TestForwardSaysTheSame(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	misses := uint64(0)
	for i, c := range labConfigs() {
		if i%5 != 0 && testing.Short() {
			continue
		}
		c.Listen, c.CaseRandomisation = []string{"127.0.0.1:0"}, i%2 == 0
		a, b := newLab(t, c), newLab(t, c)
		addr := a.serving(t, newOrigin(t))
		clients := make(map[string]*net.UDPConn)
		for range 60 {
			p, from := labQuery(t, r), labFroms[r.IntN(len(labFroms)-1)]
			conn := clients[from]
			if conn == nil {
				d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
				got, err := d.Dial("udp", addr)
				if err != nil {
					t.Fatal(err)
				}
				conn = got.(*net.UDPConn)
				t.Cleanup(func() { conn.Close() })
				clients[from] = conn
			}
			a.told.mu.Lock()
			a.told.all = nil
			a.told.mu.Unlock()
			b.told.all = nil
			got := make([]byte, dns.MaxMsgSize)
			conn.SetDeadline(time.Now().Add(30 * time.Second))
			if _, err := conn.Write(p); err != nil {
				t.Fatal(err)
			}
			n, err := conn.Read(got)
			if err != nil {
				t.Fatalf("%v from %s: %v", unpacked(p), from, err)
			}
			want := new(answersTo)
			b.s.serve(context.Background(), client{addr: conn.LocalAddr().(*net.UDPAddr).AddrPort(), udp: true, back: want}, p)
			if len(*want) != 1 || !bytes.Equal(got[:n], (*want)[0]) {
				t.Fatalf("%s: %x\ngot  %x\nwant %x\n%v", from, p, got[:n], *want, unpacked(got[:n]))
			}
			eventually(t, "the event", func() bool {
				a.told.mu.Lock()
				defer a.told.mu.Unlock()
				return len(a.told.all) == len(b.told.all)
			})
			if len(b.told.all) == 0 { // of what is no question
				continue
			}
			ev, slow := a.told.all[0], b.told.all[0]
			ev.Name = strings.ToLower(strings.TrimSuffix(ev.Name, "."))
			slow.Name = strings.ToLower(strings.TrimSuffix(slow.Name, "."))
			if slow.ID = ev.ID; len(ev.Answers)+len(slow.Answers) == 0 {
				slow.Answers = ev.Answers
			}
			if !reflect.DeepEqual(ev, slow) {
				t.Fatalf("event\n%+v, otherwise\n%+v", ev, slow)
			}
		}
		if s := a.s.resolver.Stats(); s.UpstreamFailures != 0 || s.UpstreamIgnored != 0 || s.InFlight != 0 {
			t.Fatalf("Stats() = %+v", s)
		}
		misses += a.s.resolver.Stats().UpstreamQueries
	}
	if misses < 100 {
		t.Errorf("only %d queries went upstream", misses)
	}
}

func TestFlightWaiterAsksTheSame(t *testing.T) {
	random := rand.NewChaCha8([32]byte{1})
	r := newResolver(t, Config{Upstreams: []string{"192.0.2.1"}}, nil)
	for i, name := range []string{"a", "api.ok.test", "_dmarc." + strings.Repeat("x", 63) + ".test", strings.Repeat("ab.", 80) + "test"} {
		for bits := range 8 {
			k := key{name: policy.MustName(name), qtype: uint16(i + 1), do: bits&1 != 0, cd: bits&2 != 0}
			want, err := newWaiter(k.query(), dress{})
			if err != nil {
				t.Fatal(err)
			}
			got := newFlightWaiter(&flight{r: r, k: k}, r.pool, nil, bits&4 != 0, random)
			p := bytes.Clone(got.packet)
			lowered(p[headerSize:got.name])
			if !bytes.Equal(p[2:], want.packet[2:]) || got.name != want.name {
				t.Errorf("%v: %x\nwant %x", k, p, want.packet)
			}
			if exact := !bytes.Equal(p, got.packet); exact && bits&4 == 0 || !exact && bits&4 != 0 && len(name) > 30 {
				t.Errorf("%s is asked for as %q", name, got.packet)
			}
			got.free()
			want.free()
		}
	}
}

// sameEntry holds plainEntry against newEntry for the answer p to k.
func sameEntry(t *testing.T, k key, p []byte, vouched bool, bounds Cache) (plain bool) {
	t.Helper()
	now := newClock().now()
	q, err := newWaiter(k.query(), dress{})
	if err != nil {
		t.Fatal(err)
	}
	defer q.free()
	if len(p) < headerSize || p[2]&truncated != 0 || !q.answeredBy(p) {
		return false
	}
	got, ok := plainEntry(k, bytes.Clone(p), q.name+4, vouched, now, bounds)
	if !ok {
		return false
	}
	m, err := q.unpack(p)
	if err != nil {
		t.Fatalf("%x is plain, and cannot be read: %v", p, err)
	}
	if !conclusive(m.Rcode) {
		t.Fatalf("%x is plain, with %s", p, dns.RcodeToString[m.Rcode])
	}
	m.AuthenticatedData = m.AuthenticatedData && vouched
	want := newEntry(k, m, now, bounds)
	if !bytes.Equal(got.wire[2:], want.wire[2:]) || !got.stored.Equal(want.stored) || !got.expires.Equal(want.expires) ||
		got.next != want.next || want.err != nil || want.ede != 0 || len(got.wire) != cap(got.wire) {
		t.Fatalf("%x\ngot  %+v\nwant %+v", p, got, want)
	}
	return true
}

func plainAnswer(t testing.TB, qtype uint16, change func(*dns.Msg)) []byte {
	t.Helper()
	m := new(dns.Msg).SetReply(question("API.ok.test.", qtype))
	m.Compress, m.AuthenticatedData = true, true
	m.Answer = parseRRs(t, []string{"API.ok.test. 300 IN A 198.41.0.4", "API.ok.test. 60 IN A 10.0.0.5"})
	if qtype == dns.TypeAAAA {
		m.Answer = parseRRs(t, []string{"API.ok.test. 300 IN AAAA 2600::1", "API.ok.test. 30 IN AAAA ::ffff:10.0.0.1"})
	}
	if change != nil {
		change(m)
	}
	p, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPlainEntryIsNewEntry(t *testing.T) {
	add := func(section string, lines ...string) func(*dns.Msg) {
		return func(m *dns.Msg) {
			rrs := parseRRs(t, lines)
			switch section {
			case "answer":
				m.Answer = append(m.Answer, rrs...)
			case "authority":
				m.Ns = append(m.Ns, rrs...)
			default:
				m.Extra = append(m.Extra, rrs...)
			}
		}
	}
	for _, tt := range []struct {
		name   string
		qtype  uint16
		change func(*dns.Msg)
		plain  bool
	}{
		{"addresses", dns.TypeA, nil, true},
		{"addresses of IPv6", dns.TypeAAAA, nil, true},
		{"OPT", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, true) }, true},
		{"name servers with addresses", dns.TypeA, func(m *dns.Msg) {
			add("authority", "ok.test. 60 IN NS ns.ok.test.", "ok.test. 60 IN NS ns.other.test.")(m)
			add("additional", "ns.ok.test. 60 IN A 192.0.2.1", "ns.ok.test. 60 IN AAAA 2001:db8::1")(m)
		}, true},
		{"TTLs", dns.TypeA, func(m *dns.Msg) { m.Answer[0].Header().Ttl, m.Answer[1].Header().Ttl = 1<<31, 86401 }, true},
		{"no records", dns.TypeA, func(m *dns.Msg) { m.Answer = nil }, false},
		{"NXDOMAIN", dns.TypeA, func(m *dns.Msg) { m.Rcode = dns.RcodeNameError }, false},
		{"SERVFAIL", dns.TypeA, func(m *dns.Msg) { m.Rcode = dns.RcodeServerFailure }, false},
		{"extended RCODE", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false); m.Rcode = dns.RcodeBadVers }, false},
		{"two OPT", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false); m.SetEdns0(1232, false) }, false},
		{"options", dns.TypeA, func(m *dns.Msg) {
			m.SetEdns0(1232, false).IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_NSID{Code: dns.EDNS0NSID, Nsid: "aa"}}
		}, false},
		{"alias", dns.TypeA, add("answer", "api.ok.test. 60 IN CNAME b.test.", "b.test. 60 IN A 192.0.2.1"), false},
		{"another's address", dns.TypeA, add("answer", "b.test. 60 IN A 192.0.2.1"), false},
		{"another class", dns.TypeA, add("answer", "API.ok.test. 60 CH A 192.0.2.1"), false},
		{"another type", dns.TypeA, add("answer", "API.ok.test. 60 IN AAAA 2001:db8::1"), false},
		{"a signature", dns.TypeA, add("answer", "API.ok.test. 300 IN RRSIG A 13 3 300 20300101000000 20200101000000 1 test. AAAA"), false},
		{"SOA", dns.TypeA, add("authority", soa), false},
		{"TXT beside", dns.TypeA, add("additional", "x.test. 60 IN TXT x"), false},
		{"TXT", dns.TypeTXT, func(m *dns.Msg) { m.Answer = parseRRs(t, []string{"API.ok.test. 60 IN TXT x"}) }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := plainAnswer(t, tt.qtype, tt.change)
			for i, bounds := range []Cache{{MaxTTL: 24 * time.Hour}, {MinTTL: 100 * time.Second, MaxTTL: 200 * time.Second}} {
				k := key{name: policy.MustName("api.ok.test"), qtype: tt.qtype, do: i == 0}
				if got := sameEntry(t, k, p, i == 0, bounds); got != tt.plain {
					t.Errorf("plain: %v", got)
				}
			}
			for n := range p {
				if sameEntry(t, key{name: policy.MustName("api.ok.test"), qtype: tt.qtype}, p[:n], true, Cache{MaxTTL: time.Hour}) {
					t.Errorf("the first %d bytes of %d are plain", n, len(p))
				}
			}
		})
	}
}

// FuzzPlainEntry has any packet answer a question: what plainEntry takes is what
// newEntry makes of it.
func FuzzPlainEntry(f *testing.F) {
	r := rand.New(rand.NewPCG(9, 10))
	for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
		for i := range 40 {
			p := plainAnswer(f, qtype, func(m *dns.Msg) {
				if i%2 == 0 {
					m.SetEdns0(1232, i%4 == 0)
				}
				if i%3 == 0 {
					m.Ns = parseRRs(f, []string{"ok.test. 60 IN NS ns.ok.test."})
					m.Extra = append(m.Extra, parseRRs(f, []string{"ns.ok.test. 60 IN A 192.0.2.1"})...)
				}
			})
			if i > 4 {
				p[r.IntN(len(p))] ^= 1 << r.IntN(8)
			}
			f.Add(p, qtype == dns.TypeA, byte(i))
		}
	}
	f.Fuzz(func(t *testing.T, p []byte, v4 bool, bits byte) {
		k := key{name: policy.MustName("api.ok.test"), qtype: dns.TypeAAAA, do: bits&1 != 0, cd: bits&2 != 0}
		if v4 {
			k.qtype = dns.TypeA
		}
		if len(p) > maxEDNSSize {
			return
		}
		sameEntry(t, k, p, bits&4 != 0, Cache{MinTTL: time.Duration(bits) * time.Second, MaxTTL: time.Hour})
	})
}

// TestForwardBeforeAHostileUpstream: a client over UDP hears the right answer or a
// failure, whatever comes from the upstream's address or another.
func TestForwardBeforeAHostileUpstream(t *testing.T) {
	lie, _ := dns.NewRR("api.ok.test. 60 IN A 198.41.0.66")
	lying := func(n int, change func(*dns.Msg)) func(w dns.ResponseWriter, q, m *dns.Msg) {
		return func(w dns.ResponseWriter, _, m *dns.Msg) {
			false := m.Copy()
			false.Answer = []dns.RR{lie}
			for range n {
				raw(w, false, change)
			}
			w.WriteMsg(m)
		}
	}
	udpOnly := func(f func(w dns.ResponseWriter, q, m *dns.Msg)) func(w dns.ResponseWriter, q, m *dns.Msg) {
		return func(w dns.ResponseWriter, q, m *dns.Msg) {
			if !isUDP(w) {
				w.WriteMsg(m)
				return
			}
			f(w, q, m)
		}
	}
	write := func(w dns.ResponseWriter, m *dns.Msg, change func([]byte) []byte) {
		p, _ := m.Pack()
		w.(interface{ Write([]byte) (int, error) }).Write(change(p))
	}
	for _, tt := range []struct {
		name    string
		behave  func(w dns.ResponseWriter, q, m *dns.Msg)
		ignored int  // packets, at least
		other   bool // the other upstream is asked
	}{
		{"honest", nil, 0, false},
		{"another ID", lying(1, func(m *dns.Msg) { m.Id++ }), 1, false},
		{"another name", lying(1, func(m *dns.Msg) { m.Question[0].Name = "other.ok.test." }), 1, false},
		{"another type", lying(1, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA }), 1, false},
		{"another class", lying(1, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), 1, false},
		{"another case", lying(1, func(m *dns.Msg) { m.Question[0].Name = flipped(m.Question[0].Name) }), 1, false},
		{"no response", lying(1, func(m *dns.Msg) { m.Response = false }), 1, false},
		{"a flood of forged answers", lying(100, func(m *dns.Msg) { m.Id += 1 + uint16(rand.Uint32()%1000) }), 1, false},
		{"twice", func(w dns.ResponseWriter, _, m *dns.Msg) { w.WriteMsg(m); w.WriteMsg(m) }, 0, false},
		{"truncated", udpOnly(func(w dns.ResponseWriter, _, m *dns.Msg) {
			m.Answer, m.Truncated = nil, true
			w.WriteMsg(m)
		}), 0, false},
		{"truncated with a lie", udpOnly(func(w dns.ResponseWriter, _, m *dns.Msg) {
			m.Answer, m.Truncated = []dns.RR{lie}, true
			w.WriteMsg(m)
		}), 0, false},
		{"FORMERR to EDNS", func(w dns.ResponseWriter, q, m *dns.Msg) {
			if q.IsEdns0() != nil {
				m = new(dns.Msg).SetRcodeFormatError(q)
			}
			w.WriteMsg(m)
		}, 0, false},
		{"SERVFAIL", func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeServerFailure)) }, 0, true},
		{"silent", func(dns.ResponseWriter, *dns.Msg, *dns.Msg) {}, 0, true},
		{"cut in a record", func(w dns.ResponseWriter, _, m *dns.Msg) {
			m.Extra = nil
			write(w, m, func(p []byte) []byte { return p[:len(p)-2] })
		}, 0, true},
		{"records that are not there", func(w dns.ResponseWriter, _, m *dns.Msg) {
			m.Extra = nil
			write(w, m, func(p []byte) []byte { p[7]++; return p })
		}, 0, true},
		{"bytes at the end", func(w dns.ResponseWriter, _, m *dns.Msg) {
			write(w, m, func(p []byte) []byte { return append(p, 0, 0, 0) })
		}, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // some wait
			bad, good := newOrigin(t, "api.ok.test. 60 IN A 198.41.0.4"), newOrigin(t, "api.ok.test. 60 IN A 198.41.0.4")
			bad.set(tt.behave)
			b := start(t, Config{Decider: people, Cache: cached, CaseRandomisation: true, Upstreams: []string{bad.addr, good.addr}}, bad, twoTries)
			for range 2 { // the second from the cache
				wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 198.41.0.4")
			}
			if n := int(b.resolver.Stats().UpstreamIgnored); n < tt.ignored {
				t.Errorf("%d answers ignored, want %d", n, tt.ignored)
			}
			if other := good.packets() > 0; other != tt.other {
				t.Errorf("the other upstream is asked: %v", other)
			}
			if s := b.resolver.Stats(); s.InFlight != 0 || s.CacheHits != 1 || s.CacheMisses != 1 {
				t.Errorf("Stats() = %+v", s)
			}
		})
	}
}

// TestForwardTimeouts: who is not answered in time asks again, another upstream if there is one,
// and hears of the failure in the end; what comes too late is ignored.
func TestForwardTimeouts(t *testing.T) {
	o := newOrigin(t, "api.ok.test. 60 IN A 198.41.0.4")
	var first atomic.Bool
	first.Store(true)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if !first.Swap(false) {
			w.WriteMsg(m)
		}
	})
	b := start(t, Config{Decider: people, Cache: cached}, o, func(r *Resolver) { r.timing.try, r.timing.total = 50*time.Millisecond, 20*time.Second })
	wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 198.41.0.4")
	if s := b.resolver.Stats(); s.UpstreamQueries != 2 || s.UpstreamFailures != 1 || s.Upstreams[0].Failures != 1 {
		t.Errorf("Stats() = %+v", s)
	}
	o.set(func(dns.ResponseWriter, *dns.Msg, *dns.Msg) {})
	before := o.packets()
	wantRcode(t, b.ask(t, alice, "udp", withEDNS(question("x.cdn.test.", dns.TypeA))), dns.RcodeServerFailure, dns.ExtendedErrorCodeNoReachableAuthority)
	if n := o.packets() - before; n != maxRounds {
		t.Errorf("asked %d times", n)
	}
	o.down()
	wantRcode(t, b.ask(t, alice, "udp", withEDNS(question("y.cdn.test.", dns.TypeA))), dns.RcodeServerFailure, dns.ExtendedErrorCodeNetworkError)
	if b.resolver.UpstreamOK() {
		t.Error("the upstream is said to be well")
	}
	d := (*b.resolver.pool.ups.Load())[0].exchanger.(*datagram)
	within(t, "every socket", d.reading.Wait)
}

// T52: clients of several sources wait for one answer, and each hears what it may have of it.
func TestT52ForwardCoalescesQuestionsNotVerdicts(t *testing.T) {
	o := newOrigin(t, "private.cdn.test. 60 IN A 10.0.0.2", "private.cdn.test. 60 IN A 198.41.0.4")
	release := make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { <-release; w.WriteMsg(m) })
	p := fakePolicy{alice: people[alice], bob: {names: []string{"*.cdn.test"}, private: true}, watcher: people[watcher]}
	b := start(t, Config{Decider: p, Cache: cached}, o, patient)
	var wg sync.WaitGroup
	const each = 40
	for i := range each {
		for from, want := range map[string][]string{alice: {"A 198.41.0.4"}, bob: {"A 10.0.0.2", "A 198.41.0.4"}} {
			wg.Go(func() {
				q := question([]string{"private.cdn.test.", "PRIVATE.cdn.test."}[i%2], dns.TypeA)
				m := b.ask(t, from, "udp", q)
				if wantData(t, m, want...); m.Question[0].Name != q.Question[0].Name || m.Id != q.Id {
					t.Errorf("%v is answered with %v", q, m)
				}
			})
		}
	}
	eventually(t, "all to wait", func() bool { return b.resolver.Stats().Coalesced == 2*each-1 })
	if m := b.ask(t, stranger, "udp", question("private.cdn.test.", dns.TypeA)); m.Rcode != dns.RcodeRefused {
		t.Errorf("a stranger hears %v", m)
	}
	close(release)
	wg.Wait()
	if o.packets() != 1 {
		t.Errorf("%d packets for one question", o.packets())
	}
	eventually(t, "no query to be under way", func() bool { return b.server.inFlight.Load() == 0 })
	if s := b.resolver.Stats(); s.CacheMisses != 2*each || s.InFlight != 0 {
		t.Errorf("Stats() = %+v", s)
	}
}

// TestForwardIDsAndPorts: of many questions at once each has an ID of its own, of which nothing
// is to be seen in those before, over several ports.
func TestForwardIDsAndPorts(t *testing.T) {
	o := newOrigin(t)
	const n = 600
	type way struct {
		port string
		id   uint16
	}
	var mu sync.Mutex
	ways := make(map[way]int)
	ports := make(map[string]int)
	release := make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		mu.Lock()
		ways[way{w.RemoteAddr().String(), q.Id}]++
		ports[w.RemoteAddr().String()]++
		mu.Unlock()
		<-release
		w.WriteMsg(m)
	})
	b := start(t, Config{Decider: people, Cache: cached}, o, patient)
	c, err := net.Dial("udp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ids := func() (n, port int) {
		mu.Lock()
		defer mu.Unlock()
		return len(ways), len(ports)
	}
	for i := range n {
		p, _ := question(fmt.Sprintf("n%d.cdn.test.", i), dns.TypeA).Pack()
		c.Write(p)
		if i%20 == 19 {
			eventually(t, "the questions", func() bool { got, _ := ids(); return got == i+1 })
		}
	}
	if _, p := ids(); p < n/socketUses || p > n/10 {
		t.Errorf("%d ports for %d questions", p, n)
	}
	mu.Lock()
	near, last := 0, -1
	for w := range ways {
		if d := int(w.id) - last; last >= 0 && d > -8 && d < 8 {
			near++
		}
		last = int(w.id)
	}
	for port, uses := range ports {
		if uses > socketUses {
			t.Errorf("%d questions from %s", uses, port)
		}
	}
	mu.Unlock()
	if near > n/20 {
		t.Errorf("%d of %d IDs are near another", near, n)
	}
	close(release)
	eventually(t, "no query to be under way", func() bool { return b.server.inFlight.Load() == 0 })
	d := (*b.resolver.pool.ups.Load())[0].exchanger.(*datagram)
	within(t, "every socket", d.reading.Wait)
}

// TestForwardEnds: whoever waits is answered when the Server or the Resolver ends.
func TestForwardEnds(t *testing.T) {
	o := newOrigin(t)
	asked, release := make(chan struct{}, 80), make(chan struct{})
	defer close(release)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { asked <- struct{}{}; <-release })
	for _, first := range []string{"server", "resolver"} {
		r := newResolver(t, Config{Decider: people, Cache: cached, Listen: []string{"127.0.0.1:0"}}, o)
		patient(r)
		s, served := serve(t, context.Background(), r)
		c, _ := dns.Dial("udp", s.Addrs()[0].String())
		for i := range 40 { // over several sockets, most of them not the last of their slot
			c.WriteMsg(question(fmt.Sprintf("n%d.cdn.test.", i), dns.TypeA))
			<-asked
			d := (*r.pool.ups.Load())[0].exchanger.(*datagram)
			for j := range d.slots {
				d.slots[j].mu.Lock()
				d.slots[j].uses = socketUses
				d.slots[j].mu.Unlock()
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		if first == "resolver" {
			within(t, "Close", r.Close)
		}
		if err := s.Shutdown(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown() = %v", err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		for range 40 {
			if m, err := c.ReadMsg(); err != nil || m.Rcode != dns.RcodeServerFailure {
				t.Fatalf("%s first: the answer to who is cut off is %v, %v", first, m, err)
			}
		}
		if err := <-served; err != nil {
			t.Errorf("Serve() = %v", err)
		}
		within(t, "Close", r.Close)
		cancel()
		c.Close()
	}
}

func TestForwardWithoutRoom(t *testing.T) {
	o := newOrigin(t, "api.ok.test. 60 IN A 198.41.0.4")
	b := start(t, Config{Decider: people, Cache: cached}, o)
	r := b.resolver
	r.mu.Lock()
	for i := range maxFlights {
		k := key{name: policy.MustName(fmt.Sprintf("n%d.test", i))}
		r.flights[k] = &flight{r: r, k: k}
	}
	r.mu.Unlock()
	wantRcode(t, b.ask(t, alice, "udp", withEDNS(question("api.ok.test.", dns.TypeA))), dns.RcodeServerFailure, dns.ExtendedErrorCodeNotReady)
	if s := r.Stats(); s.Dropped != 1 || o.packets() != 0 {
		t.Errorf("Stats() = %+v, %d packets", s, o.packets())
	}
	r.mu.Lock()
	clear(r.flights)
	r.mu.Unlock()
	wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 198.41.0.4")
	// No room for what is to be sent is not the upstream's fault.
	u := (*r.pool.ups.Load())[0]
	r.pool.judge(context.Background(), u, &net.OpError{Op: "write", Err: syscall.EAGAIN}, 0)
	if s := r.Stats(); s.Upstreams[0].Failures != 0 || s.UpstreamFailures != 1 {
		t.Errorf("Stats() = %+v", s)
	}
}

// TestForwardZones: each zone has upstreams of its own, here as well, and what they vouch for
// is not passed on.
func TestForwardZones(t *testing.T) {
	o, z := newOrigin(t, "api.ok.test. 60 IN A 198.41.0.4"), newOrigin(t, "db.cdn.test. 60 IN A 198.41.0.5", "txt.cdn.test. 60 IN A 198.41.0.6", "txt.cdn.test. 60 IN A 198.41.0.7")
	for _, o := range []*origin{o, z} {
		o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { m.AuthenticatedData = true; w.WriteMsg(m) })
	}
	b := start(t, Config{Decider: people, Cache: cached, Zones: []Zone{{Zone: "cdn.test", Upstreams: []string{z.addr}}}}, o)
	for range 2 {
		for name, vouched := range map[string]bool{"api.ok.test.": true, "db.cdn.test.": false} {
			q := question(name, dns.TypeA)
			q.AuthenticatedData = true
			if m := b.ask(t, alice, "udp", q); len(m.Answer) != 1 || m.AuthenticatedData != vouched {
				t.Errorf("answer = %v", m)
			}
		}
	}
	if o.packets() != 1 || z.packets() != 1 {
		t.Errorf("%d and %d packets", o.packets(), z.packets())
	}
}

// TestForwardHearsTheUpstreamAlone: what knows port, ID and name but comes from elsewhere is not heard.
func TestForwardHearsTheUpstreamAlone(t *testing.T) {
	o := newOrigin(t, "api.ok.test. 60 IN A 198.41.0.4")
	lie, _ := dns.NewRR("api.ok.test. 60 IN A 198.41.0.66")
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		false := m.Copy()
		false.Answer = []dns.RR{lie}
		p, _ := false.Pack()
		for range 20 { // the right ID, name and port, from another socket
			if c, err := net.Dial("udp", w.RemoteAddr().String()); err == nil {
				c.Write(p)
				c.Close()
			}
		}
		w.WriteMsg(m)
	})
	b := start(t, Config{Decider: people, Cache: cached}, o)
	wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 198.41.0.4")
}

// TestForwardAllocations bounds what one miss allocates, upstream and all.
func TestForwardAllocations(t *testing.T) {
	r := newResolver(t, Config{Upstreams: []string{"192.0.2.1"}, Cache: cached}, nil)
	random := rand.NewChaCha8([32]byte{2})
	k := key{name: policy.MustName("api.ok.test"), qtype: dns.TypeA}
	u := (*r.pool.ups.Load())[0]
	var p []byte
	n := testing.AllocsPerRun(100, func() {
		r.mu.Lock()
		f := r.newFlight(k, time.Now())
		r.mu.Unlock()
		w := newFlightWaiter(f, r.pool, u, false, random)
		p = append(append(p[:0], w.packet[:w.name+4]...), 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 5, 5, 5, 5)
		p[2] |= 0x80
		binary.BigEndian.PutUint16(p[6:], 1)
		binary.BigEndian.PutUint16(p[10:], 0)
		if _, e := w.answered(p, time.Now(), time.Now()); e == nil || len(e.wire) != len(p) {
			t.Fatalf("entry = %+v", e)
		}
	})
	if n > 5 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkForward is a question in a packet that only an upstream on loopback can
// answer, 64 under way: client, server and upstream in one process.
func BenchmarkForward(b *testing.B) {
	rules, _, err := policy.Load("policy.yaml", []byte(labPolicy), policy.Options{})
	if err != nil {
		b.Fatal(err)
	}
	store := new(policy.Store)
	store.Swap(rules)
	o := start(b, Config{Decider: store, Cache: cached, Events: EventsDenied, Upstreams: []string{mirror(b)}}, nil)
	c, err := net.Dial("udp", o.addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	var p [512]byte
	ask := func(i int) {
		q := append(p[:0], 0, byte(i), 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
		q = wire.AppendName(q, "n"+strconv.Itoa(i)+".cdn.test")
		c.Write(append(q, 0, byte(dns.TypeA), 0, dns.ClassINET))
	}
	b.ReportAllocs()
	for i := range min(b.N, 64) {
		ask(i)
	}
	for i := range b.N {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(p[:]); err != nil {
			b.Fatal(err)
		}
		if i+64 < b.N {
			ask(i + 64)
		}
	}
}
