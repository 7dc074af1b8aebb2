package dnsfilter

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"crypto/x509"

	"github.com/miekg/dns"

	"sallyport/policy"
)

// patient gives slow machines the time that an upstream which does answer may need.
func patient(r *Resolver) { r.timing.try, r.timing.total = 20*time.Second, 40*time.Second }

// twoTries gives each upstream a moment, and the question as much as it takes.
func twoTries(r *Resolver) {
	r.timing.try, r.timing.total = 2*time.Second, 40*time.Second
}

// TestT56MisbehavingUpstreams puts an upstream that misbehaves before one that does
// not: clients get the right answer, and none but the right one.
func TestT56MisbehavingUpstreams(t *testing.T) {
	lie, _ := dns.NewRR("a.test. 60 IN A 192.0.2.66")
	lying := func(change func(*dns.Msg)) func(w dns.ResponseWriter, q, m *dns.Msg) {
		return func(w dns.ResponseWriter, _, m *dns.Msg) {
			m.Answer = []dns.RR{lie}
			raw(w, m, change)
		}
	}
	part := func(w dns.ResponseWriter, _, m *dns.Msg) {
		if m.Truncated = true; isUDP(w) {
			w.WriteMsg(m)
			return
		}
		p, _ := m.Pack()
		w.(interface{ Write([]byte) (int, error) }).Write(p[:len(p)-1]) // miekg/dns writes the length of what it is given
		w.Close()
	}
	for _, tt := range []struct {
		name, scheme string
		behave       func(w dns.ResponseWriter, q, m *dns.Msg) // nil: it is dead
		exact        bool                                      // with CaseRandomisation
		ignored      bool                                      // answers of it are counted as ignored
	}{
		{"dead", "", nil, false, false},
		{"dead", "tcp://", nil, false, false},
		{"silent", "", func(dns.ResponseWriter, *dns.Msg, *dns.Msg) {}, false, false},
		{"silent", "tcp://", func(dns.ResponseWriter, *dns.Msg, *dns.Msg) {}, false, false},
		{"another ID", "", lying(func(m *dns.Msg) { m.Id++ }), false, true},
		{"another ID", "tcp://", lying(func(m *dns.Msg) { m.Id++ }), false, true},
		{"another question", "", lying(func(m *dns.Msg) { m.Question[0].Name = "b.test." }), false, true},
		{"another question", "tcp://", lying(func(m *dns.Msg) { m.Question[0].Name = "b.test." }), false, true},
		{"another type", "", lying(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA }), false, true},
		{"another case", "", lying(func(m *dns.Msg) { m.Question[0].Name = flipped(m.Question[0].Name) }), true, true},
		{"truncated, then cut", "", part, false, false},
		{"cut", "tcp://", part, false, false},
		{"hangs up", "tcp://", func(w dns.ResponseWriter, _, _ *dns.Msg) { w.Close() }, false, false},
		{"SERVFAIL", "", func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeServerFailure)) }, false, false},
		{"NOTIMP", "", func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeNotImplemented)) }, false, false},
	} {
		t.Run(tt.scheme+tt.name, func(t *testing.T) {
			t.Parallel() // they wait most of the time
			bad, good := newOrigin(t, "a.test. 0 IN A 192.0.2.1"), newOrigin(t, "a.test. 0 IN A 192.0.2.1")
			if tt.behave == nil {
				bad.down()
			}
			bad.set(tt.behave)
			r := newResolver(t, Config{Upstreams: []string{tt.scheme + bad.addr, good.addr}, CaseRandomisation: tt.exact}, nil)
			twoTries(r)
			for range 3 {
				if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) {
					t.Errorf("answer = %q", got)
				}
			}
			if s := r.Stats(); (s.UpstreamIgnored > 0) != tt.ignored {
				t.Errorf("Stats() = %+v", s)
			}
			if tt.behave != nil && bad.packets() == 0 {
				t.Error("the first upstream was not asked")
			}
		})
	}
}

// flipped returns name with the case of its first letter changed.
func flipped(name string) string { return string(name[0]^0x20) + name[1:] }

func TestLateAnswersAreIgnored(t *testing.T) {
	o := newOrigin(t, "a.test. 0 IN A 192.0.2.1", "b.test. 0 IN A 192.0.2.2")
	release, asked := make(chan struct{}), make(chan struct{}, 1024)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if q.Question[0].Name == "a.test." {
			asked <- struct{}{}
			<-release
		}
		w.WriteMsg(m)
	})
	r := newResolver(t, Config{Upstreams: []string{"tcp://" + o.addr}}, nil)
	hasty(r)
	eventually(t, "the upstream to be asked", func() bool {
		if rep := get(t, r, "a.test", dns.TypeA); rep.rcode != dns.RcodeServerFailure {
			t.Errorf("reply = %+v", rep)
		}
		return len(asked) > 0
	})
	close(release)
	patient(r)
	if got := get(t, r, "b.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 192.0.2.2"}) {
		t.Errorf("answer = %q", got)
	}
}

func TestAnUpstreamThatComesBackIsNoticedWithoutClients(t *testing.T) {
	o := newOrigin(t, "a.test. 0 IN A 192.0.2.1")
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { w.Close() })
	r := newResolver(t, Config{Upstreams: []string{"tcp://" + o.addr}}, nil)
	r.timing.probe = time.Millisecond
	for r.Stats().Upstreams[0].Up {
		get(t, r, "a.test", dns.TypeA)
	}
	if r.UpstreamOK() {
		t.Error("well though it is down")
	}
	before := o.packets()
	eventually(t, "probes", func() bool { return o.packets() > before+2 })
	o.set(nil)
	eventually(t, "the upstream to be up", func() bool { return r.Stats().Upstreams[0].Up && r.UpstreamOK() })
	after := o.packets()
	if got := get(t, r, "a.test", dns.TypeA).data(); len(got) != 1 || o.packets() != after+1 {
		t.Errorf("answer %q in %d packets: it is still probed", got, o.packets()-after)
	}
}

func TestDownUpstreamsAreAskedLast(t *testing.T) {
	now := newClock()
	r := newResolver(t, Config{Now: now.now, Upstreams: []string{"192.0.2.1", "192.0.2.2", "192.0.2.3"}}, nil)
	ups := *r.pool.ups.Load()
	want := func(order ...int) {
		t.Helper()
		var got []int
		for _, u := range r.pool.order() {
			got = append(got, slices.Index(ups, u))
		}
		if !slices.Equal(got, order) {
			t.Errorf("order = %v, want %v", got, order)
		}
	}
	want(0, 1, 2)
	ups[0].missed(now.now())
	want(1, 2, 0)
	for range downAfter {
		ups[1].missed(now.now())
	}
	want(2, 0, 1)
	now.advance(time.Hour)
	want(0, 2, 1) // the penalty is over, but only an answer brings back what is down
	ups[1].succeeded(now.now(), time.Millisecond)
	want(0, 1, 2)
}

func TestTheFastestUpstreamIsAskedFirst(t *testing.T) {
	r := newResolver(t, Config{UpstreamMode: UpstreamsFastest, Upstreams: []string{"192.0.2.1", "192.0.2.2", "192.0.2.3"}}, nil)
	ups := *r.pool.ups.Load()
	for i, rtt := range []time.Duration{30, 10, 20} {
		ups[i].succeeded(time.Now(), rtt*time.Millisecond)
	}
	first := map[*upstream]int{}
	const n = 3200
	for range n {
		first[r.pool.order()[0]]++
	}
	if best := first[ups[1]]; best < n*9/10 || best == n || first[ups[0]] == 0 || first[ups[2]] == 0 {
		t.Errorf("first were %d, %d, %d of %d", first[ups[0]], best, first[ups[2]], n)
	}
	for range 1000 { // smoothed: the fastest now
		ups[0].succeeded(time.Now(), time.Millisecond)
	}
	if s := r.Stats().Upstreams[0]; s.RTT > 2*time.Millisecond || s.RTT < time.Millisecond {
		t.Errorf("RTT = %v", s.RTT)
	}
	ups[0].missed(time.Now())
	for range 100 {
		if r.pool.order()[0] == ups[0] {
			t.Fatal("one that failed is asked first")
		}
	}
}

// TestT51WithoutEDNS: a server that does not know EDNS is asked without.
func TestT51WithoutEDNS(t *testing.T) {
	for _, bare := range []bool{false, true} {
		now := newClock()
		o := newOrigin(t, "a.test. 0 IN A 192.0.2.1")
		o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
			if q.IsEdns0() != nil {
				m = new(dns.Msg).SetRcode(q, dns.RcodeFormatError)
				if bare {
					m.Question = nil
				}
			}
			w.WriteMsg(m)
		})
		r := newResolver(t, Config{Now: now.now}, o)
		patient(r)
		for i, want := range []int64{2, 1, 2} {
			before := o.packets()
			if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) || o.packets()-before != want {
				t.Errorf("answer %d = %q in %d packets, want %d", i, got, o.packets()-before, want)
			}
			if i == 1 {
				now.advance(plainFor)
			}
		}
	}
}

func TestCaseRandomisation(t *testing.T) {
	const name = "a-rather-long-name.with-many-letters.test"
	o := newOrigin(t, name+". 60 IN A 192.0.2.1")
	var mu sync.Mutex
	spelt := map[string]bool{}
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		mu.Lock()
		spelt[q.Question[0].Name] = true
		mu.Unlock()
		for _, rr := range m.Answer {
			rr.Header().Name = q.Question[0].Name
		}
		w.WriteMsg(m)
	})
	r := newResolver(t, Config{CaseRandomisation: true}, o)
	patient(r)
	for range 10 {
		rep := get(t, r, name, dns.TypeA)
		if len(rep.answer) != 1 || rep.answer[0].Header().Name != name+"." {
			t.Errorf("reply = %+v: spelt as it was sent", rep)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(spelt) < 9 || spelt[name+"."] {
		t.Errorf("asked as %v", spelt)
	}
}

func TestPortsAreSharedByQueriesUnderWayAlone(t *testing.T) {
	const n = udpSockets * socketUses * 5 / 4 // more than a socket of each slot takes
	o := newOrigin(t)
	var mu sync.Mutex
	ports := map[string]int{}
	ready, release := make(chan struct{}, n), make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		mu.Lock()
		ports[w.RemoteAddr().String()]++
		mu.Unlock()
		ready <- struct{}{}
		<-release
		w.WriteMsg(oneAddress(q))
	})
	r := newResolver(t, Config{}, o)
	patient(r)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if rep := get(t, r, fmt.Sprintf("n%d.test", i), dns.TypeA); len(rep.answer) != 1 {
				t.Errorf("reply = %+v", rep)
			}
		})
		<-ready // one after the other, as the origin's socket has a small buffer
	}
	close(release)
	wg.Wait()
	mu.Lock()
	defer mu.Unlock()
	for port, uses := range ports {
		if uses > socketUses {
			t.Errorf("%d queries from %s", uses, port)
		}
	}
	if len(ports) <= udpSockets || len(ports) > n/8 {
		t.Errorf("%d ports for %d queries", len(ports), n)
	}
	// Nothing is under way: no socket is left.
	d := (*r.pool.ups.Load())[0].exchanger.(*datagram)
	within(t, "every socket", d.reading.Wait)
}

// streamServer accepts connections and hands each to serve, until the test ends.
func streamServer(t *testing.T, l net.Listener, serve func(n int, c net.Conn)) {
	t.Helper()
	var serving sync.WaitGroup
	serving.Go(func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				serve(n, c)
			})
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
}

func listenTCP(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestPipelining: many queries share a connection, and are answered the last first.
func TestPipelining(t *testing.T) {
	config, roots := certified(t)
	for _, scheme := range []string{"tcp://", "tls://"} {
		t.Run(scheme, func(t *testing.T) {
			const n = 50
			l := listenTCP(t)
			if scheme == "tls://" {
				l = tls.NewListener(l, config)
			}
			var conns atomic.Int64
			streamServer(t, l, func(_ int, c net.Conn) {
				conns.Add(1)
				conn := &dns.Conn{Conn: c}
				var qs []*dns.Msg
				for {
					q, err := conn.ReadMsg()
					if err != nil {
						return
					}
					if qs = append(qs, q); len(qs) < n {
						continue
					}
					for _, q := range slices.Backward(qs) {
						conn.WriteMsg(oneAddress(q))
					}
				}
			})
			r := newResolver(t, Config{Upstreams: []string{scheme + l.Addr().String()}, RootCAs: roots}, nil)
			patient(r)
			var wg sync.WaitGroup
			for i := range n {
				wg.Go(func() {
					if rep := get(t, r, fmt.Sprintf("n%d.test", i), dns.TypeA); len(rep.answer) != 1 {
						t.Errorf("reply = %+v", rep)
					}
				})
			}
			wg.Wait()
			if conns.Load() != 1 {
				t.Errorf("%d connections", conns.Load())
			}
			r.Close()
		})
	}
}

// TestConnectionsToOneUpstreamAreBounded: more queries than a connection should carry
// open another, but not without end.
func TestConnectionsToOneUpstreamAreBounded(t *testing.T) {
	const n = pipelined * (maxPipes + 2)
	l := listenTCP(t)
	var conns atomic.Int64
	got, release := make(chan struct{}, n), make(chan struct{})
	streamServer(t, l, func(_ int, c net.Conn) {
		conns.Add(1)
		conn := &dns.Conn{Conn: c}
		for {
			q, err := conn.ReadMsg()
			if err != nil {
				return
			}
			got <- struct{}{}
			go func() {
				<-release
				conn.WriteMsg(oneAddress(q))
			}()
		}
	})
	r := newResolver(t, Config{Upstreams: []string{"tcp://" + l.Addr().String()}}, nil)
	patient(r)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { get(t, r, fmt.Sprintf("n%d.test", i), dns.TypeA) })
		<-got
	}
	if c := conns.Load(); c != maxPipes {
		t.Errorf("%d connections for %d queries under way, want %d", c, n, maxPipes)
	}
	close(release)
	wg.Wait()
	r.Close()
}

// TestStaleConnections: a server that closes a connection between queries, in an
// answer, or answers once on each, is asked again on a new one.
func TestStaleConnections(t *testing.T) {
	answer := func(q *dns.Msg) []byte { return frame(t, oneAddress(q)) }
	for name, serve := range map[string]func(n int, c net.Conn){
		"one answer a connection": func(_ int, c net.Conn) {
			if q, err := (&dns.Conn{Conn: c}).ReadMsg(); err == nil {
				c.Write(answer(q))
			}
		},
		"the second answer is cut": func(_ int, c net.Conn) {
			conn := &dns.Conn{Conn: c}
			for i := 0; ; i++ {
				q, err := conn.ReadMsg()
				if err != nil {
					return
				}
				if p := answer(q); i == 1 {
					c.Write(p[:len(p)-3])
					return
				} else if _, err := c.Write(p); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := listenTCP(t)
			streamServer(t, l, serve)
			r := newResolver(t, Config{Upstreams: []string{"tcp://" + l.Addr().String()}}, nil)
			patient(r)
			for i := range 6 {
				if rep := get(t, r, fmt.Sprintf("n%d.test", i), dns.TypeA); len(rep.answer) != 1 {
					t.Errorf("reply %d = %+v", i, rep)
				}
			}
			if s := r.Stats(); s.UpstreamFailures != 0 {
				t.Errorf("Stats() = %+v", s)
			}
			r.Close()
		})
	}
}

// TestASilentConnectionIsReplaced: when the other end is gone without a word, the next
// query is not sent after the last one.
func TestASilentConnectionIsReplaced(t *testing.T) {
	t.Parallel()
	l := listenTCP(t)
	streamServer(t, l, func(n int, c net.Conn) {
		conn := &dns.Conn{Conn: c}
		for {
			q, err := conn.ReadMsg()
			if err != nil {
				return
			}
			if n > 0 {
				conn.WriteMsg(oneAddress(q))
			}
		}
	})
	r := newResolver(t, Config{Upstreams: []string{"tcp://" + l.Addr().String()}}, nil)
	twoTries(r)
	if rep := get(t, r, "a.test", dns.TypeA); len(rep.answer) != 1 {
		t.Errorf("reply = %+v", rep)
	}
	r.Close()
}

// TestPadding: what is encrypted is padded to blocks (RFC 8467), other queries are not.
func TestPadding(t *testing.T) {
	config, roots := certified(t)
	var mu sync.Mutex
	var lengths []int
	note := func(p []byte) *dns.Msg {
		q := new(dns.Msg)
		if err := q.Unpack(p); err != nil {
			t.Errorf("query %x: %v", p, err)
		}
		mu.Lock()
		lengths = append(lengths, len(p))
		mu.Unlock()
		return q
	}
	stream := func(l net.Listener) string {
		streamServer(t, l, func(_ int, c net.Conn) {
			conn := &dns.Conn{Conn: c}
			for {
				p, err := conn.ReadMsgHeader(nil)
				if err != nil {
					return
				}
				conn.WriteMsg(oneAddress(note(p)))
			}
		})
		return l.Addr().String()
	}
	doh := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		p, _ := io.ReadAll(req.Body)
		p, _ = oneAddress(note(p)).Pack()
		w.Header().Set("Content-Type", dnsMessage)
		w.Write(p)
	}))
	doh.EnableHTTP2 = true
	doh.StartTLS()
	defer doh.Close()
	for _, tt := range []struct {
		upstream string
		padded   bool
	}{
		{"tls://" + stream(tls.NewListener(listenTCP(t), config)), true},
		{doh.URL, true},
		{"tcp://" + stream(listenTCP(t)), false},
	} {
		mu.Lock()
		lengths = nil
		mu.Unlock()
		all := roots
		if tt.upstream == doh.URL {
			all = x509.NewCertPool()
			all.AddCert(doh.Certificate())
		}
		r := newResolver(t, Config{Upstreams: []string{tt.upstream}, RootCAs: all}, nil)
		patient(r)
		for _, name := range []string{"a.test", strings.Repeat("long-label.", 9) + "test", strings.Repeat("x", 60) + strings.Repeat(".even-longer-label", 8)} {
			if rep := get(t, r, name, dns.TypeA); len(rep.answer) != 1 {
				t.Errorf("%s: reply = %+v", tt.upstream, rep)
			}
		}
		r.Close()
		mu.Lock()
		if len(lengths) != 3 || slices.ContainsFunc(lengths, func(n int) bool { return (n%padBlock == 0) != tt.padded }) {
			t.Errorf("%s: queries of %v bytes", tt.upstream, lengths)
		}
		mu.Unlock()
	}
}

// TestTLSSessionsAreResumed: the second connection needs no full handshake.
func TestTLSSessionsAreResumed(t *testing.T) {
	config, roots := certified(t)
	l := tls.NewListener(listenTCP(t), config)
	resumed := make(chan bool, 8)
	streamServer(t, l, func(_ int, c net.Conn) {
		if q, err := (&dns.Conn{Conn: c}).ReadMsg(); err == nil {
			resumed <- c.(*tls.Conn).ConnectionState().DidResume
			(&dns.Conn{Conn: c}).WriteMsg(oneAddress(q))
		}
	})
	r := newResolver(t, Config{Upstreams: []string{"tls://" + l.Addr().String()}, RootCAs: roots}, nil)
	patient(r)
	for i, want := range []bool{false, true, true} {
		if rep := get(t, r, fmt.Sprintf("n%d.test", i), dns.TypeA); len(rep.answer) != 1 {
			t.Errorf("reply = %+v", rep)
		}
		if got := <-resumed; got != want {
			t.Errorf("connection %d: resumed %v", i, got)
		}
	}
	r.Close()
}

// TestCoalescingOfEverybody: clients over UDP and TCP and the proxy ask one question.
func TestCoalescingOfEverybody(t *testing.T) {
	const udp, tcp, all = 100, 100, 1000 // few enough for the buffer of a socket, and for one source
	o := newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1")
	b := start(t, Config{Decider: people}, o, patient) // no cache: only coalescing can help
	release := make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	t.Cleanup(let)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { <-release; w.WriteMsg(m) })
	var wg sync.WaitGroup
	for i := range all {
		network := "udp"
		switch {
		case i >= udp+tcp:
			wg.Go(func() {
				if addrs, err := b.resolver.LookupNetIP(context.Background(), "ip4", "api.ok.test"); err != nil || len(addrs) != 1 {
					t.Errorf("LookupNetIP() = %v, %v", addrs, err)
				}
			})
			continue
		case i >= udp:
			network = "tcp"
		}
		wg.Go(func() {
			c := dns.Client{Net: network, Timeout: 40 * time.Second}
			if m, _, err := c.Exchange(question("api.ok.test.", dns.TypeA), b.addr); err != nil || len(m.Answer) != 1 {
				t.Errorf("over %s: %v, %v", network, m, err)
			}
		})
	}
	eventually(t, "everybody to wait", func() bool { return b.resolver.Stats().Coalesced == all-1 })
	let()
	wg.Wait()
	if o.packets() != 1 {
		t.Errorf("%d packets, want 1", o.packets())
	}
}

// TestWaitersMatch holds answeredBy against what miekg/dns makes of a packet.
func FuzzWaiterMatch(f *testing.F) {
	for _, change := range []func(*dns.Msg){
		func(*dns.Msg) {}, func(m *dns.Msg) { m.Question[0].Name = "A.TEST." }, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeHTTPS },
		func(m *dns.Msg) { m.Question = nil }, func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }, func(m *dns.Msg) { m.Response = false },
	} {
		m := oneAddress(question("a.test.", dns.TypeA))
		change(m)
		p, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p)
		f.Add(p[:len(p)/2])
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		q := question("a.test.", dns.TypeA)
		w, err := newWaiter(q, dress{})
		if err != nil {
			t.Fatal(err)
		}
		defer w.free()
		got := w.answeredBy(p)
		m := new(dns.Msg)
		if err := m.Unpack(p); err != nil {
			if got && len(p) < headerSize+12 {
				t.Errorf("%x matches", p)
			}
			return
		}
		want := m.Response && m.Opcode == dns.OpcodeQuery && len(m.Question) == 1 &&
			strings.EqualFold(m.Question[0].Name, "a.test.") && m.Question[0].Qtype == dns.TypeA && m.Question[0].Qclass == dns.ClassINET
		if len(m.Question) == 0 && len(p) == headerSize && m.Response && m.Opcode == dns.OpcodeQuery && m.Rcode == dns.RcodeFormatError {
			want = true
		}
		if got && !want || !got && want && bytes.Equal(p[headerSize:min(len(p), headerSize+8)], w.packet[headerSize:headerSize+8]) {
			t.Errorf("answeredBy(%x) = %v, miekg/dns reads %v", p, got, m)
		}
	})
}

// TestRandomCaseKeepsTheName: letters alone change, and lowered brings them back.
func TestRandomCaseKeepsTheName(t *testing.T) {
	name := []byte("\x03a-1\x02Z_\x3fabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijk\x00")
	bits := bytes.Repeat([]byte{0xff}, 32)
	got := bytes.Clone(name)
	randomCase(got, bits)
	if want := "\x03A-1\x02z_\x3f" + strings.ToUpper(string(name[8:71])) + "\x00"; string(got) != want {
		t.Errorf("%q, want %q", got, want)
	}
	if !bytes.Equal(lowered(got), bytes.ToLower(name)) {
		t.Errorf("%q", got)
	}
}

// TestPackIsWhatMiekgPacks compares the queries that are sent with the library's.
func TestPackIsWhatMiekgPacks(t *testing.T) {
	queries := []*dns.Msg{probeQuery(), question(`a\.b.test.`, dns.TypeA), question(`a\000.test.`, dns.TypeA)}
	for _, name := range []string{"a", "api.ok.test", "_dmarc." + strings.Repeat("x", 63) + ".test", strings.Repeat("ab.", 80) + "test"} {
		for i := range 8 {
			q := (key{name: policy.MustName(name), qtype: dns.TypeHTTPS, do: i&1 != 0, cd: i&2 != 0}).query()
			if i&4 != 0 {
				q.Extra = nil
			}
			queries = append(queries, q)
		}
	}
	for _, q := range queries {
		want, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		got, err := pack(make([]byte, 0, maxQuerySize), q)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%v: %x, %v\nwant %x", q.Question, got, err, want)
		}
	}
}

func TestPadKeepsAMessageWhole(t *testing.T) {
	for n := 1; n < 200; n++ {
		name := policy.MustName(strings.Repeat("a.", n/2) + strings.Repeat("b", n%2+1))
		p, err := (key{name: name, qtype: dns.TypeA}).query().Pack()
		if err != nil {
			t.Fatal(err)
		}
		p = pad(p)
		m := new(dns.Msg)
		if err := m.Unpack(p); err != nil || len(p)%padBlock != 0 || len(m.IsEdns0().Option) != 1 || m.IsEdns0().Option[0].Option() != dns.EDNS0PADDING {
			t.Fatalf("%d bytes, %v: %v", len(p), m, err)
		}
		if binary.BigEndian.Uint16(p[10:]) != 1 {
			t.Fatal("another record")
		}
	}
}

// A server that does not like one question is not taken for one without EDNS.
func TestFORMERRToOneQuestion(t *testing.T) {
	o := newOrigin(t, "a.test. 0 IN A 192.0.2.1")
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if q.Question[0].Name == "odd.test." {
			m = new(dns.Msg).SetRcode(q, dns.RcodeFormatError)
		}
		w.WriteMsg(m)
	})
	r := newResolver(t, Config{}, o)
	patient(r)
	if rep := get(t, r, "odd.test", dns.TypeA); rep.rcode != dns.RcodeServerFailure {
		t.Errorf("reply = %+v", rep)
	}
	get(t, r, "a.test", dns.TypeA)
	if o.last().IsEdns0() == nil {
		t.Error("asked without EDNS")
	}
}
