package dnsfilter

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"sallyport/policy"
	"sallyport/policy/event"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// group is what one source may do in a fakePolicy.
type group struct {
	names   []string // exact, or "*.suffix"
	denied  []string
	qtypes  []uint16
	private bool
	observe bool
}

// fakePolicy decides as the contract says, by source address.
type fakePolicy map[string]group

func (p fakePolicy) Decide(r policy.Request) policy.Decision {
	g, ok := p[r.Source.String()]
	if !ok {
		return policy.Decision{Reason: policy.ReasonUnmatchedSource}
	}
	d := policy.Decision{Group: r.Source.String()}
	usual := []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeCNAME}
	switch {
	case covers(g.denied, r.Name):
		d.Reason = policy.ReasonExplicitDeny
	case !covers(g.names, r.Name):
		d.Reason = policy.ReasonNotListed
	case !slices.Contains(usual, r.QType) && !slices.Contains(g.qtypes, r.QType):
		d.Reason = policy.ReasonQTypeNotAllowed
	default:
		d.Verdict, d.Reason = policy.Allow, policy.ReasonMatched
	}
	if a := r.Destination; a.IsValid() && !g.private && (a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast()) {
		d.Verdict, d.Reason = policy.Deny, policy.ReasonPrivateDestination
	} else if d.Verdict == policy.Deny && g.observe {
		d.Verdict = policy.Observe
	}
	return d
}

func covers(patterns []string, n policy.Name) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		suffix, wild := strings.CutPrefix(p, "*")
		return !n.IsZero() && (n.String() == p || wild && strings.HasSuffix(n.String(), suffix))
	})
}

// events keeps every Event.
type events struct {
	mu  sync.Mutex
	all []event.Event
}

func (o *events) Observe(ev *event.Event) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.all = append(o.all, *ev)
}

// of waits for the event of a question such as "api.ok.test A" from source: it comes after the answer.
func (o *events) of(t *testing.T, source, question string) event.Event {
	t.Helper()
	var found event.Event
	eventually(t, "the event of "+question+" from "+source, func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		i := slices.IndexFunc(o.all, func(ev event.Event) bool {
			return ev.Source.Addr().String() == source && ev.Name+" "+ev.QType == question
		})
		if i >= 0 {
			found = o.all[i]
		}
		return i >= 0
	})
	return found
}

// eventually polls cond until it holds, at most five seconds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s in vain", what)
		}
	}
}

// clock is a clock that stands still between calls of advance.
type clock struct{ ns atomic.Int64 }

func newClock() *clock {
	c := new(clock)
	c.ns.Store(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).UnixNano())
	return c
}
func (c *clock) now() time.Time          { return time.Unix(0, c.ns.Load()) }
func (c *clock) advance(d time.Duration) { c.ns.Add(int64(d)) }

// origin is an upstream on loopback that answers from zone lines, or as its behave
// function wants.
type origin struct {
	addr   string
	udp    atomic.Int64 // queries
	tcp    atomic.Int64
	mu     sync.Mutex
	zone   map[string][]dns.RR // by "name TYPE"
	asked  []*dns.Msg
	behave func(w dns.ResponseWriter, q *dns.Msg, answer *dns.Msg) // nil: send answer
	down   func()
}

func newOrigin(t testing.TB, zone ...string) *origin {
	t.Helper()
	o := &origin{zone: make(map[string][]dns.RR)}
	for _, line := range zone {
		rr, err := dns.NewRR(line)
		if err != nil {
			t.Fatal(err)
		}
		k := strings.ToLower(rr.Header().Name) + " " + dns.Type(rr.Header().Rrtype).String()
		o.zone[k] = append(o.zone[k], rr)
	}
	udp, tcp, err := listenBoth(netip.MustParseAddrPort("127.0.0.1:0"))
	for range bindAttempts {
		if err == nil {
			break
		}
		udp, tcp, err = listenBoth(netip.MustParseAddrPort("127.0.0.1:0"))
	}
	if err != nil {
		t.Fatal(err)
	}
	o.addr = udp.LocalAddr().String()
	var running sync.WaitGroup
	servers := []*dns.Server{{PacketConn: udp, UDPSize: 4096, Handler: o}, {Listener: tcp, Handler: o}}
	for _, s := range servers {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		running.Go(func() { s.ActivateAndServe() })
		<-up
	}
	o.down = sync.OnceFunc(func() {
		for _, s := range servers {
			s.Shutdown()
		}
		running.Wait()
	})
	t.Cleanup(o.down)
	return o
}

func (o *origin) packets() int64 { return o.udp.Load() + o.tcp.Load() }

func (o *origin) set(behave func(w dns.ResponseWriter, q, answer *dns.Msg)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.behave = behave
}

// last returns the query that came last.
func (o *origin) last() *dns.Msg {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.asked[len(o.asked)-1]
}

func (o *origin) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	if isUDP(w) {
		o.udp.Add(1)
	} else {
		o.tcp.Add(1)
	}
	o.mu.Lock()
	o.asked = append(o.asked, q.Copy())
	m, behave := o.answer(q), o.behave
	o.mu.Unlock()
	if behave != nil {
		behave(w, q, m)
		return
	}
	w.WriteMsg(m)
}

func isUDP(w dns.ResponseWriter) bool {
	_, ok := w.RemoteAddr().(*net.UDPAddr)
	return ok
}

// answer answers from the zone, with whole chains. The caller holds mu.
func (o *origin) answer(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable, m.Compress = true, true
	name, qtype := strings.ToLower(q.Question[0].Name), q.Question[0].Qtype
	for range 8 {
		found := o.zone[name+" "+dns.Type(qtype).String()]
		alias := o.zone[name+" CNAME"]
		for _, rr := range found {
			m.Answer = append(m.Answer, dns.Copy(rr))
		}
		if len(found) > 0 || len(alias) == 0 {
			break
		}
		m.Answer = append(m.Answer, dns.Copy(alias[0]))
		name = strings.ToLower(alias[0].(*dns.CNAME).Target)
	}
	if len(m.Answer) == 0 {
		exists := false
		for k := range o.zone {
			exists = exists || strings.HasPrefix(k, name+" ")
		}
		if !exists {
			m.Rcode = dns.RcodeNameError
		}
		for _, rr := range o.zone["test. SOA"] {
			m.Ns = append(m.Ns, dns.Copy(rr))
		}
	}
	if q.IsEdns0() != nil {
		m.SetEdns0(1232, q.IsEdns0().Do())
	}
	return m
}

const soa = "test. 900 IN SOA ns.test. admin.test. 1 3600 600 86400 60"

// bed is a running Server before an origin.
type bed struct {
	*origin
	resolver *Resolver
	server   *Server
	events   *events
	addr     string
}

// start runs a Server with c on a free port of loopback. Config.Upstreams is o unless set.
func start(t testing.TB, c Config, o *origin, tune ...func(*Resolver)) *bed {
	t.Helper()
	b := &bed{origin: o, events: new(events)}
	if c.Listen == nil {
		c.Listen = []string{"127.0.0.1:0"}
	}
	if c.Observer == nil {
		c.Observer = b.events
	}
	b.resolver = newResolver(t, c, o)
	for _, f := range tune {
		f(b.resolver)
	}
	b.server = NewServer(b.resolver)
	if err := b.server.Listen(); err != nil {
		t.Fatal(err)
	}
	b.addr = b.server.Addrs()[0].String()
	served := make(chan error, 1)
	go func() { served <- b.server.Serve(context.Background()) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := b.server.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown() = %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve() = %v", err)
		}
	})
	return b
}

// newResolver returns a Resolver with o as upstream, unless c has others.
func newResolver(t testing.TB, c Config, o *origin) *Resolver {
	t.Helper()
	if c.Upstreams == nil {
		c.Upstreams = []string{o.addr}
	}
	r, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// ask sends a query from source and returns the answer.
func (b *bed) ask(t testing.TB, source, network string, q *dns.Msg) *dns.Msg {
	t.Helper()
	var local net.Addr = &net.UDPAddr{IP: net.ParseIP(source)}
	if network == "tcp" {
		local = &net.TCPAddr{IP: net.ParseIP(source)}
	}
	c := dns.Client{Net: network, Timeout: 5 * time.Second, UDPSize: dns.MaxMsgSize, Dialer: &net.Dialer{LocalAddr: local, Timeout: 5 * time.Second}}
	m, _, err := c.Exchange(q, b.addr)
	if err != nil {
		t.Fatalf("query %v from %s: %v", q.Question, source, err)
	}
	return m
}

// hasty shortens the time upstreams have.
func hasty(r *Resolver) { r.timing.try, r.timing.total = 50*time.Millisecond, 200*time.Millisecond }

func question(name string, qtype uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, qtype) }

func withEDNS(q *dns.Msg) *dns.Msg { return q.SetEdns0(1232, false) }

// ede returns the code of the Extended DNS Error in m, 0 without one.
func ede(m *dns.Msg) uint16 {
	opt := m.IsEdns0()
	if opt == nil {
		return 0
	}
	for _, o := range opt.Option {
		if e, ok := o.(*dns.EDNS0_EDE); ok {
			return e.InfoCode
		}
	}
	return 0
}

// data returns the answer section as "TYPE data".
func data(m *dns.Msg) []string {
	var out []string
	for _, rr := range m.Answer {
		out = append(out, dns.Type(rr.Header().Rrtype).String()+" "+strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	return out
}

func wantData(t testing.TB, m *dns.Msg, want ...string) {
	t.Helper()
	if got := data(m); !slices.Equal(got, want) {
		t.Errorf("answer to %v = %q, want %q", m.Question, got, want)
	}
}

func wantRcode(t testing.TB, m *dns.Msg, rcode int, code uint16) {
	t.Helper()
	if m.Rcode != rcode || ede(m) != code {
		t.Errorf("answer to %v = %s with EDE %d, want %s with EDE %d", m.Question,
			dns.RcodeToString[m.Rcode], ede(m), dns.RcodeToString[rcode], code)
	}
}

// logs keeps what is logged.
type logs struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// with returns the lines that hold part.
func (l *logs) with(part string) (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, part) {
			lines = append(lines, line)
		}
	}
	return lines
}

// within fails the test if f does not return within five seconds.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatalf("%s does not return", what)
	}
}
