package dnsfilter

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/rs/zerolog"
)

// raw packs m with changes and sends it.
func raw(w dns.ResponseWriter, m *dns.Msg, change func(*dns.Msg)) {
	m = m.Copy()
	change(m)
	w.WriteMsg(m)
}

func TestAnswersThatDoNotMatchAreIgnored(t *testing.T) {
	lie, _ := dns.NewRR("a.test. 60 IN A 192.0.2.66")
	for name, lies := range map[string]func(w dns.ResponseWriter, m *dns.Msg){
		"wrong ID":   func(w dns.ResponseWriter, m *dns.Msg) { raw(w, m, func(m *dns.Msg) { m.Id++ }) },
		"wrong name": func(w dns.ResponseWriter, m *dns.Msg) { raw(w, m, func(m *dns.Msg) { m.Question[0].Name = "b.test." }) },
		"wrong type": func(w dns.ResponseWriter, m *dns.Msg) {
			raw(w, m, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeMX })
		},
		"wrong class": func(w dns.ResponseWriter, m *dns.Msg) {
			raw(w, m, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS })
		},
		"no question": func(w dns.ResponseWriter, m *dns.Msg) { raw(w, m, func(m *dns.Msg) { m.Question = nil }) },
		"a query":     func(w dns.ResponseWriter, m *dns.Msg) { raw(w, m, func(m *dns.Msg) { m.Response = false }) },
		"opcode":      func(w dns.ResponseWriter, m *dns.Msg) { raw(w, m, func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }) },
		"short":       func(w dns.ResponseWriter, m *dns.Msg) { w.Write([]byte{1, 2, 3}) },
		"from elsewhere": func(w dns.ResponseWriter, m *dns.Msg) {
			c, err := net.Dial("udp", w.RemoteAddr().String())
			if err == nil {
				p, _ := m.Pack()
				c.Write(p)
				c.Close()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t, "a.test. 60 IN A 192.0.2.1")
			o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
				false := m.Copy()
				false.Answer = []dns.RR{lie}
				for range 5 {
					lies(w, false)
				}
				raw(w, m, func(m *dns.Msg) { m.Question[0].Name = "A.tesT." }) // case does not matter
			})
			r := newResolver(t, Config{}, o)
			if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) || o.packets() != 1 {
				t.Errorf("answer = %q in %d packets", got, o.packets())
			}
		})
	}
}

func TestEachQueryHasItsOwnPortAndID(t *testing.T) {
	o := newOrigin(t, "a.test. 0 IN A 192.0.2.1")
	var mu sync.Mutex
	ports, ids := make(map[string]bool), make(map[uint16]bool)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		mu.Lock()
		ports[w.RemoteAddr().String()], ids[q.Id] = true, true
		mu.Unlock()
		w.WriteMsg(m)
	})
	r := newResolver(t, Config{}, o)
	const n = 40
	for range n {
		get(t, r, "a.test", dns.TypeA)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(ports) < n-2 || len(ids) < n-2 { // chance may repeat one
		t.Errorf("%d ports and %d IDs in %d queries", len(ports), len(ids), n)
	}
}

func TestTruncatedAnswersAreAskedForOverTCP(t *testing.T) {
	o := newOrigin(t, "a.test. 0 IN A 192.0.2.1")
	var mu sync.Mutex
	conns := make(map[string]bool)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if isUDP(w) {
			m.Answer, m.Truncated = nil, true
			p, _ := m.Pack()
			w.Write(append(p[:6], append([]byte{0, 9}, p[8:]...)...)) // nine answers, and none there
			return
		}
		mu.Lock()
		conns[w.RemoteAddr().String()] = true
		mu.Unlock()
		w.WriteMsg(m)
	})
	r := newResolver(t, Config{}, o)
	for range 3 {
		if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) {
			t.Errorf("answer = %q", got)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if o.udp.Load() != 3 || o.tcp.Load() != 3 || len(conns) != 1 {
		t.Errorf("%d queries over UDP, %d over TCP on %d connections; want 3, 3, 1", o.udp.Load(), o.tcp.Load(), len(conns))
	}
}

func TestAConnectionThatTheServerClosedIsReplaced(t *testing.T) {
	o := newOrigin(t, "a.test. 0 IN A 192.0.2.1")
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		w.WriteMsg(m)
		w.Close()
	})
	r := newResolver(t, Config{Upstreams: []string{"tcp://" + o.addr}}, nil)
	for range 3 {
		if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) {
			t.Errorf("answer = %q", got)
		}
	}
	if s := r.Stats(); s.UpstreamFailures != 0 {
		t.Errorf("Stats() = %+v", s)
	}
}

func TestTheNextUpstreamIsAsked(t *testing.T) {
	for name, behave := range map[string]func(w dns.ResponseWriter, q, m *dns.Msg){
		"silence":  func(dns.ResponseWriter, *dns.Msg, *dns.Msg) {},
		"SERVFAIL": func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeServerFailure)) },
		"REFUSED":  func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeRefused)) },
	} {
		t.Run(name, func(t *testing.T) {
			now := newClock()
			bad, good := newOrigin(t), newOrigin(t, "a.test. 0 IN A 192.0.2.1")
			bad.set(behave)
			r := newResolver(t, Config{Now: now.now, Upstreams: []string{bad.addr, good.addr}}, nil)
			r.timing.try = 50 * time.Millisecond
			for range 3 {
				if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) {
					t.Errorf("answer = %q", got)
				}
			}
			want := int64(3)
			if name == "silence" {
				want = 1 // then it stays behind
			}
			if bad.packets() != want || good.packets() != 3 {
				t.Errorf("%d and %d packets", bad.packets(), good.packets())
			}
			bad.set(nil)
			now.advance(maxPenalty)
			get(t, r, "a.test", dns.TypeA)
			if bad.packets() != want+1 {
				t.Error("the first upstream is not asked again")
			}
		})
	}
}

func TestALostPacketIsSentAgain(t *testing.T) {
	o := newOrigin(t, "a.test. 60 IN A 192.0.2.1")
	var n atomic.Int64
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if n.Add(1) > 1 {
			w.WriteMsg(m)
		}
	})
	r := newResolver(t, Config{}, o)
	r.timing.try = 50 * time.Millisecond
	if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) {
		t.Errorf("answer = %q", got)
	}
}

func TestUpstreamHealth(t *testing.T) {
	now := newClock()
	o := newOrigin(t)
	r := newResolver(t, Config{Now: now.now}, o)
	ctx := context.Background()
	if !r.UpstreamOK() {
		t.Error("not well before anything was tried")
	}
	for range 3 {
		if err := r.CheckUpstreams(ctx); err != nil {
			t.Errorf("CheckUpstreams() = %v", err)
		}
	}
	if n := o.packets(); n != 1 {
		t.Errorf("%d probes, want 1: an answer is good for a while", n)
	}
	o.down()
	now.advance(fresh + time.Second)
	if err := r.CheckUpstreams(ctx); err == nil || !strings.Contains(err.Error(), o.addr) || r.UpstreamOK() {
		t.Errorf("CheckUpstreams() = %v, UpstreamOK() = %v with the upstream down", err, r.UpstreamOK())
	}
}

// certified returns a TLS configuration of a server for 127.0.0.1 and example.com, and who vouches for it.
func certified(t *testing.T) (*tls.Config, *x509.CertPool) {
	t.Helper()
	s := httptest.NewTLSServer(nil)
	s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return &tls.Config{Certificates: s.TLS.Certificates}, roots
}

func TestTLSUpstream(t *testing.T) {
	config, roots := certified(t)
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	var conns atomic.Int64
	var serving sync.WaitGroup
	serving.Go(func() { serveTLS(l, &serving, &conns) })
	defer serving.Wait()
	defer l.Close()
	addr := l.Addr().String()
	for _, tt := range []struct {
		name, upstream string
		roots          *x509.CertPool
		ok             bool
	}{
		{"address in the certificate", "tls://" + addr, roots, true},
		{"name in the certificate", "tls://" + addr + "#example.com", roots, true},
		{"another name", "tls://" + addr + "#dns.test", roots, false},
		{"unknown authority", "tls://" + addr, x509.NewCertPool(), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := conns.Load()
			r := newResolver(t, Config{Upstreams: []string{tt.upstream}, RootCAs: tt.roots}, nil)
			for range 3 {
				rep := get(t, r, "a.test", dns.TypeA)
				if ok := len(rep.answer) == 1; ok != tt.ok {
					t.Errorf("reply = %+v", rep)
				}
			}
			if n := conns.Load() - before; tt.ok && n != 1 {
				t.Errorf("%d connections for 3 queries", n)
			}
			r.Close()
		})
	}
}

// serveTLS answers every query with one address, until l is closed.
func serveTLS(l net.Listener, serving *sync.WaitGroup, conns *atomic.Int64) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		serving.Go(func() {
			defer c.Close()
			conn := dns.Conn{Conn: c}
			for n := 0; ; n++ {
				q, err := conn.ReadMsg()
				if err != nil {
					return
				}
				if n == 0 {
					conns.Add(1)
				}
				if conn.WriteMsg(oneAddress(q)) != nil {
					return
				}
			}
		})
	}
}

// oneAddress returns an answer with TTL 0 to whatever is asked.
func oneAddress(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	rr, _ := dns.NewRR(q.Question[0].Name + " 0 IN A 192.0.2.1")
	m.Answer = []dns.RR{rr}
	return m
}

func TestHTTPSUpstream(t *testing.T) {
	var how atomic.Value
	how.Store("")
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		q := new(dns.Msg)
		if err := q.Unpack(body); err != nil || q.Id != 0 || req.Method != http.MethodPost || req.Header.Get("Content-Type") != dnsMessage {
			t.Errorf("request %s %v: %v, %v", req.Method, req.Header, q, err)
		}
		if req.URL.Path != "/dns-query" {
			http.NotFound(w, req)
			return
		}
		m := oneAddress(q)
		switch how.Load() {
		case "wrong question":
			m.Question[0].Name = "b.test."
		case "error":
			http.Error(w, "no", http.StatusBadGateway)
			return
		case "redirect":
			http.Redirect(w, req, "http://127.0.0.1:9/", http.StatusTemporaryRedirect)
			return
		case "endless":
			w.Header().Set("Content-Type", dnsMessage)
			for range 1000 { // 4 MiB
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					return
				}
			}
		}
		p, _ := m.Pack()
		w.Header().Set("Content-Type", dnsMessage)
		w.Write(p)
	}))
	var mu sync.Mutex
	conns := 0
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			mu.Lock()
			conns++
			mu.Unlock()
		}
	}
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that clients end on purpose
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	for _, tt := range []struct {
		name, upstream string
		ok             bool
	}{
		{"", s.URL, true},
		{"", s.URL + "/dns-query#example.com", true},
		{"", s.URL + "/elsewhere", false},
		{"", s.URL + "/dns-query#dns.test", false},
		{"wrong question", s.URL, false},
		{"error", s.URL, false},
		{"redirect", s.URL, false},
		{"endless", s.URL, false},
	} {
		t.Run(tt.name+" "+tt.upstream, func(t *testing.T) {
			how.Store(tt.name)
			mu.Lock()
			conns = 0
			mu.Unlock()
			r := newResolver(t, Config{Upstreams: []string{tt.upstream}, RootCAs: roots}, nil)
			defer r.Close()
			for range 3 {
				rep := get(t, r, "a.test", dns.TypeA)
				if ok := len(rep.answer) == 1; ok != tt.ok {
					t.Errorf("reply = %+v", rep)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if tt.ok && conns != 1 {
				t.Errorf("%d connections for 3 queries", conns)
			}
		})
	}
}

func TestParseUpstream(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"192.0.2.1", "udp 192.0.2.1:53"}, {"192.0.2.1:5353", "udp 192.0.2.1:5353"}, {"2001:db8::1", "udp [2001:db8::1]:53"},
		{"[2001:db8::1]", "udp [2001:db8::1]:53"}, {"[2001:db8::1]:5353", "udp [2001:db8::1]:5353"}, {"fe80::1%eth0", "udp [fe80::1%eth0]:53"},
		{"udp://192.0.2.1", "udp 192.0.2.1:53"}, {"tcp://192.0.2.1", "tcp 192.0.2.1:53"},
		{"tls://192.0.2.1", "tls 192.0.2.1:853 192.0.2.1"}, {"tls://192.0.2.1:8853#dns.test", "tls 192.0.2.1:8853 dns.test"},
		{"tls://[2001:db8::1]#dns.test", "tls [2001:db8::1]:853 dns.test"}, {"tls://dns.test", "tls dns.test:853 dns.test"},
		{"https://dns.test", "https https://dns.test/dns-query"}, {"https://dns.test/q", "https https://dns.test/q"},
		{"https://192.0.2.1/q#dns.test", "https https://dns.test:443/q"},
		{"", ""}, {"dns.test", ""}, {"udp://dns.test", ""}, {"192.0.2.1:0", ""}, {"0.0.0.0", ""}, {"192.0.2.1:99999", ""}, {"quic://192.0.2.1", ""},
		{"tls://", ""}, {"tls://192.0.2.1#", ""}, {"tls://192.0.2.1:0", ""}, {"tls://192.0.2.1:x", ""}, {"https://", ""}, {"https://u:p@dns.test/", ""},
		{"https://dns.test:0/", ""}, {"https://dns.test/#192.0.2.1", ""},
	} {
		u, err := parseUpstream(tt.text, nil)
		if err != nil {
			if tt.want != "" || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("parseUpstream(%q) = %v", tt.text, err)
			}
			continue
		}
		got := ""
		switch e := u.exchanger.(type) {
		case *datagram:
			got = "udp " + e.addr
		case *stream:
			if got = "tcp " + e.addr; e.tls != nil {
				got = "tls " + e.addr + " " + e.tls.ServerName
			}
		case *doh:
			got = "https " + e.url
		}
		if got != tt.want {
			t.Errorf("parseUpstream(%q) = %q, want %q", tt.text, got, tt.want)
		}
	}
}

func TestStreamAnswersInPieces(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		conn := dns.Conn{Conn: c}
		q, err := conn.ReadMsg()
		if err != nil {
			return
		}
		p, _ := oneAddress(q).Pack()
		p = append(binary.BigEndian.AppendUint16(nil, uint16(len(p))), p...)
		for i := range p {
			c.Write(p[i : i+1])
		}
	}()
	r := newResolver(t, Config{Upstreams: []string{"tcp://" + l.Addr().String()}}, nil)
	if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 192.0.2.1"}) {
		t.Errorf("answer = %q", got)
	}
	<-done
}

func TestMalformedAnswersEndTheExchange(t *testing.T) {
	cut := func(w dns.ResponseWriter, q, m *dns.Msg) {
		p, _ := m.Pack()
		w.Write(p[:len(p)-5])
	}
	for _, scheme := range []string{"udp://", "tcp://"} {
		t.Run(scheme, func(t *testing.T) {
			o := newOrigin(t, "a.test. 0 IN A 192.0.2.1")
			r := newResolver(t, Config{Upstreams: []string{scheme + o.addr}}, nil)
			get(t, r, "a.test", dns.TypeA)
			o.set(func(w dns.ResponseWriter, q, m *dns.Msg) { m.Extra = nil; cut(w, q, m) })
			begin := time.Now()
			rep := get(t, r, "a.test", dns.TypeA)
			if took := time.Since(begin); rep.err == nil || !strings.Contains(rep.err.Error(), "malformed answer") || took > tryTimeout/2 {
				t.Errorf("reply = %+v after %v", rep, took)
			}
			if !r.UpstreamOK() || !r.pool.order()[0].standing(time.Now()).penalty.IsZero() {
				t.Error("an upstream that answers counts as one that does not")
			}
		})
	}
}

func TestTheFailureOfAllUpstreamsIsLoggedOnce(t *testing.T) {
	log := new(logs)
	one, two := newOrigin(t, "a.test. 0 IN A 192.0.2.1"), newOrigin(t, "a.test. 0 IN A 192.0.2.1")
	r := newResolver(t, Config{Upstreams: []string{"tcp://" + one.addr, "tcp://" + two.addr}, Logger: zerolog.New(log)}, nil)
	hangUp := func(w dns.ResponseWriter, _, _ *dns.Msg) { w.Close() }
	want := func(warnings, infos int) {
		t.Helper()
		if w, i := log.with(`"warn"`), log.with(`"info"`); len(w) != warnings || len(i) != infos {
			t.Errorf("logged %q and %q, want %d and %d", w, i, warnings, infos)
		}
	}
	one.set(hangUp)
	get(t, r, "a.test", dns.TypeA)
	want(0, 0)
	for n := 1; n < 3; n++ {
		two.set(hangUp)
		for range 3 {
			get(t, r, "a.test", dns.TypeA)
		}
		want(n, n-1)
		two.set(nil)
		for range 3 {
			get(t, r, "a.test", dns.TypeA)
		}
		want(n, n)
	}
}
