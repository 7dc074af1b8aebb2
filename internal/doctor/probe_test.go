package doctor

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// statuses returns what was found as "check status", in order.
func statuses(results []Result) string {
	var all []string
	for _, r := range results {
		all = append(all, r.Check+" "+string(r.Status))
	}
	return strings.Join(all, ", ")
}

// tlsServer speaks TLS to whoever likes its certificate.
func tlsServer() *httptest.Server {
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	return s
}

// silent is a proxy that takes connections and says nothing.
func silent(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return "http://" + l.Addr().String()
}

// answering is a proxy that answers every CONNECT so.
func answering(t *testing.T, status int, header ...string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.RequestURI != "denied.test:443" {
			t.Errorf("%s %s", r.Method, r.RequestURI)
		}
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func TestGate(t *testing.T) {
	secure := tlsServer()
	t.Cleanup(secure.Close)
	const reason = "X-Sallyport-Reason"
	for _, tt := range []struct {
		name, proxy string
		want        string // statuses, without the environment's
		what        string // a part of the text of a problem
	}{
		{"refused", answering(t, 403, reason, "not_listed"), "proxy ok, denied ok, clock ok, allowed skipped", ""},
		{"another group", answering(t, 403, reason, "unmatched_source"), "proxy ok, denied problem, clock ok, allowed skipped", "no group"},
		{"credentials", answering(t, 407, reason, "auth_required"), "proxy ok, denied problem, clock ok, allowed skipped", "credentials"},
		{"busy", answering(t, 429, reason, "limit_exceeded"), "proxy ok, denied problem, clock ok, allowed skipped", "too many"},
		{"observes", answering(t, 502, reason, "resolve_failed"), "proxy ok, denied problem, clock ok, allowed skipped", "observes"},
		{"passes", answering(t, 200), "denied problem, clock ok, allowed skipped", "should be refused passes"},
		{"something else", answering(t, 403), "proxy problem, clock ok, allowed skipped", "something else answers"},
		{"TLS port", answering(t, 400, reason, "bad_request"), "proxy problem, allowed skipped", "TLS port"},
		{"no TLS", strings.Replace(answering(t, 403), "http://", "https://", 1), "proxy problem, allowed skipped", "speaks no TLS"},
		{"authority", secure.URL, "proxy problem, allowed skipped", "not trusted here"},
		{"another year", answering(t, 403, reason, "not_listed", "Date", "Mon, 02 Jan 2006 15:04:05 GMT"), "proxy ok, denied ok, clock problem, allowed skipped", "differs by"},
		{"no date", answering(t, 403, reason, "not_listed", "Date", ""), "proxy ok, denied ok, clock skipped, allowed skipped", ""},
		{"silent", silent(t), "proxy problem, allowed skipped", "cannot be reached"},
		{"nobody", "http://127.0.0.1:1", "proxy problem, allowed skipped", "cannot be reached"},
		{"a hostile answer", answering(t, 403, reason, "\x1b]0;x"), "proxy problem, allowed skipped", "cannot be reached"},
		{"a reason of its own", answering(t, 403, reason, "because"), "proxy problem, clock ok, allowed skipped", "something else answers"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := Config{Proxy: tt.proxy, Denied: "denied.test", Timeout: 500 * time.Millisecond}
			if tt.name != "silent" {
				c.Timeout = patience
			}
			results := slices.DeleteFunc(Run(t.Context(), c), func(r Result) bool {
				return r.Check == "environment" || r.Check == "resolver" || r.Check == "direct"
			})
			if got := statuses(results); got != tt.want {
				t.Fatalf("%s\nwant %s\n%q", got, tt.want, results)
			}
			for _, r := range results {
				if r.Status == Problem && !strings.Contains(r.What, tt.what) || strings.Contains(r.What, "\x1b") {
					t.Errorf("%q, want %q", r.What, tt.what)
				}
			}
		})
	}
}

// TestAllowed goes through a proxy that lets everything pass to one destination.
func TestAllowed(t *testing.T) {
	far := tlsServer()
	t.Cleanup(far.Close)
	var broken atomic.Bool
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		near, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer near.Close()
		io.WriteString(near, "HTTP/1.1 200 OK\r\n\r\n")
		if broken.Load() {
			near.Write([]byte{21, 3, 3, 0, 2, 2, 49})
			io.Copy(io.Discard, near)
			return
		}
		up, err := net.Dial("tcp", far.Listener.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		defer up.Close()
		done := make(chan struct{})
		go func() { io.Copy(up, near); up.Close(); close(done) }()
		io.Copy(near, up)
		near.Close()
		<-done
	}))
	t.Cleanup(s.Close)
	pool := far.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	run := func(c Config) string {
		c.Proxy, c.Allowed, c.Timeout = s.URL, "example.com:443", patience // a name in the certificate
		return statuses(slices.DeleteFunc(Run(t.Context(), c), func(r Result) bool { return r.Check != "allowed" && r.Check != "tls" }))
	}
	if got := run(Config{Roots: pool}); got != "allowed ok, tls ok" {
		t.Error(got)
	}
	if got := run(Config{}); got != "allowed ok, tls problem" {
		t.Errorf("with an authority that nobody knows: %s", got)
	}
	if got := run(Config{Roots: pool, Now: func() time.Time { return time.Now().AddDate(1000, 0, 0) }}); got != "allowed ok, tls problem" {
		t.Errorf("in the year 3000: %s", got)
	}
	broken.Store(true)
	if got := run(Config{Roots: pool}); got != "allowed ok, tls problem" {
		t.Errorf("broken off: %s", got)
	}
}

// resolver is a DNS server that answers as answer says; nil: not at all.
func resolver(t *testing.T, answer func(q, m *dns.Msg)) netip.AddrPort {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", pc.LocalAddr().String())
	if err != nil {
		t.Skip("the port is taken over TCP: ", err)
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		if answer == nil {
			return
		}
		m := new(dns.Msg)
		m.SetReply(q)
		answer(q, m)
		w.WriteMsg(m)
	})
	ended := make(chan struct{}, 2)
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: handler}, {Listener: l, Handler: handler}} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		go func() { s.ActivateAndServe(); ended <- struct{}{} }()
		<-up
		t.Cleanup(func() { s.Shutdown(); <-ended })
	}
	return netip.MustParseAddrPort(pc.LocalAddr().String())
}

// refuses answers as policy makes it.
func refuses(rcode int, ede uint16) func(q, m *dns.Msg) {
	return func(q, m *dns.Msg) {
		m.Rcode = rcode
		if q.IsEdns0() != nil {
			m.SetEdns0(1232, false)
			m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_EDE{InfoCode: ede})
		}
	}
}

func TestResolver(t *testing.T) {
	healthy := func(next func(q, m *dns.Msg)) func(q, m *dns.Msg) {
		return func(q, m *dns.Msg) {
			if q.Question[0].Name == "health.test." {
				m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: "health.test.", Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{"ok"}}}
				return
			}
			next(q, m)
		}
	}
	plain := func(rcode int) func(q, m *dns.Msg) { return func(_, m *dns.Msg) { m.Rcode = rcode } }
	for _, tt := range []struct {
		name   string
		answer func(q, m *dns.Msg)
		health string
		want   string
	}{
		{"refused", refuses(dns.RcodeRefused, 15), "", "resolver ok"},
		{"nxdomain by policy", refuses(dns.RcodeNameError, 15), "", "resolver ok"},
		{"unknown source", refuses(dns.RcodeRefused, 18), "", "resolver problem"},
		{"another resolver", plain(dns.RcodeNameError), "", "resolver problem"},
		{"refused by somebody", plain(dns.RcodeRefused), "", "resolver problem"},
		{"refused, healthy, through a stub", healthy(plain(dns.RcodeRefused)), "health.test", "resolver ok, resolver ok"},
		{"healthy", healthy(refuses(dns.RcodeRefused, 15)), "health.test", "resolver ok, resolver ok"},
		{"no health name", refuses(dns.RcodeRefused, 15), "health.test", "resolver problem, resolver ok"},
		{"silent", nil, "", "resolver problem"},
		{"silent, health", nil, "health.test", "resolver problem"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := Config{Resolvers: []netip.AddrPort{resolver(t, tt.answer)}, Denied: "denied.test", Health: tt.health, Timeout: patience}
			if tt.answer == nil {
				c.Timeout = 100 * time.Millisecond
			}
			results := slices.DeleteFunc(Run(t.Context(), c), func(r Result) bool { return r.Check != "resolver" })
			if got := statuses(results); got != tt.want {
				t.Errorf("%s, want %s: %q", got, tt.want, results)
			}
		})
	}
}

func TestNameservers(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte("# x\nsearch corp.example\nnameserver 10.0.0.10\nnameserver nonsense\n nameserver fe80::1%eth0 # y\nnameserver\nnameserver ::1\nnameserver 10.0.0.12\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Nameservers(file)
	if fmt.Sprint(got) != "[10.0.0.10:53 [fe80::1%eth0]:53 [::1]:53]" || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := Nameservers(file + "x"); err == nil {
		t.Error("a file that is not there")
	}
}

// quic answers packets of unknown versions as RFC 9000 wants, or as edit makes it.
func quic(t *testing.T, edit func([]byte) []byte) netip.AddrPort {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { pc.Close(); <-done })
	go func() {
		defer close(done)
		b := make([]byte, 2000)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			p := b[:n]
			if n < 1200 || p[0]&0xc0 != 0xc0 || binary.BigEndian.Uint32(p[1:])&0x0f0f0f0f != 0x0a0a0a0a || p[5] != 8 || p[14] != 8 {
				t.Errorf("a server would not answer % x…", p[:min(n, 24)])
			}
			answer := append([]byte{0x80, 0, 0, 0, 0, 8}, p[15:23]...)
			answer = append(append(answer, 8), p[6:14]...)
			answer = append(answer, 0, 0, 0, 1)
			pc.WriteTo(edit(answer), from)
		}
	}()
	return netip.MustParseAddrPort(pc.LocalAddr().String())
}

func TestProbes(t *testing.T) {
	c := &Config{Denied: "denied.test", Timeout: patience}
	short := &Config{Denied: "denied.test", Timeout: 100 * time.Millisecond}
	far := tlsServer()
	t.Cleanup(far.Close)
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	at := func(s *httptest.Server) netip.AddrPort { return netip.MustParseAddrPort(s.Listener.Addr().String()) }
	gate, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return nil, io.EOF }})
	if err != nil {
		t.Fatal(err)
	}
	// A transparent gate: whatever comes, it refuses.
	transparent := make(chan struct{})
	go func() {
		defer close(transparent)
		for {
			conn, err := gate.Accept()
			if err != nil {
				return
			}
			raw := conn.(*tls.Conn).NetConn()
			raw.Read(make([]byte, 4096))
			raw.Write([]byte{21, 3, 3, 0, 2, 2, 49})
			raw.Close()
		}
	}()
	t.Cleanup(func() { gate.Close(); <-transparent })
	nobody := netip.MustParseAddrPort("127.0.0.1:1")
	mute := netip.MustParseAddrPort(silent(t)[len("http://"):])
	same := func(b []byte) []byte { return b }
	type probe = func(context.Context, *Config, netip.AddrPort) error
	for _, tt := range []struct {
		name  string
		probe probe
		c     *Config
		to    netip.AddrPort
		leak  bool
	}{
		{"TLS", probeTLS, c, at(far), true},
		{"not TLS", probeTLS, c, at(plain), true},
		{"accepts and is silent", probeTLS, short, mute, true},
		{"transparent gate", probeTLS, c, netip.MustParseAddrPort(gate.Addr().String()), false},
		{"TLS to nobody", probeTLS, c, nobody, false},
		{"QUIC", probeQUIC, c, quic(t, same), true},
		{"for somebody else", probeQUIC, short, quic(t, func(b []byte) []byte { b[8]++; return b }), false},
		{"short", probeQUIC, short, quic(t, func(b []byte) []byte { return b[:6] }), false},
		{"QUIC to nobody", probeQUIC, short, nobody, false},
		{"DNS over UDP", probeDNS("udp"), c, resolver(t, refuses(dns.RcodeRefused, 3)), true},
		{"DNS over TCP", probeDNS("tcp"), c, resolver(t, refuses(dns.RcodeRefused, 3)), true},
		{"the gate's resolver in between", probeDNS("udp"), c, resolver(t, refuses(dns.RcodeRefused, 15)), false},
		{"silent DNS", probeDNS("udp"), short, resolver(t, nil), false},
		{"nobody's DNS", probeDNS("tcp"), c, nobody, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.probe(t.Context(), tt.c, tt.to); (err == nil) != tt.leak {
				t.Errorf("%v; want a way around: %v", err, tt.leak)
			}
		})
	}
}

// One lost packet is no finding.
func TestLostPacket(t *testing.T) {
	var asked atomic.Int64
	refused := refuses(dns.RcodeRefused, 15)
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	up, ended := make(chan struct{}), make(chan struct{})
	s := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(up) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		if asked.Add(1) == 1 {
			return // lost
		}
		m := new(dns.Msg).SetReply(q)
		refused(q, m)
		w.WriteMsg(m)
	})}
	go func() { s.ActivateAndServe(); close(ended) }()
	<-up
	t.Cleanup(func() { s.Shutdown(); <-ended })
	c := &Config{Timeout: 3 * time.Second}
	a, err := c.exchange(t.Context(), "udp", netip.MustParseAddrPort(pc.LocalAddr().String()), "denied.test", 1)
	if err != nil || a.ede != 15 {
		t.Errorf("%v, %v", a, err)
	}
}

// FuzzParse: nothing a resolver or a server sends does harm.
func FuzzParse(f *testing.F) {
	m := new(dns.Msg)
	m.SetQuestion("x.test.", dns.TypeA)
	refuses(dns.RcodeRefused, 15)(m, m)
	seed, err := m.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		var id uint16
		if len(b) >= 2 {
			id = binary.BigEndian.Uint16(b)
		}
		a, err := parse(b, id)
		if err == nil && a.ede > 0xffff {
			t.Errorf("%+v", a)
		}
		isNegotiation(b, make([]byte, idLength))
	})
}
