package dnsfilter

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/miekg/dns"

	"sallyport/dnsfilter/wire"
	"sallyport/policy"
)

// canned answers whatever is asked, without sockets.
type canned struct{}

func (canned) exchange(_ context.Context, q *dns.Msg) (*dns.Msg, error) { return oneAddress(q), nil }
func (canned) close()                                                   {}

// FuzzServer has arbitrary packets answered. The server may not crash, answers each
// once at most, echoes the question, never asks upstream what is not allowed, and says
// the same at once and after thought.
func FuzzServer(f *testing.F) {
	seed := func(q *dns.Msg) {
		p, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p)
		f.Add(p[:len(p)-3])
	}
	for _, name := range []string{"api.ok.test.", "aPi.OK.test.", "evil.test.", `a\000\.b.test.`, "1.2.3.4.", "."} {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeANY, dns.TypeHTTPS, dns.TypeAXFR, 65400} {
			seed(question(name, qtype))
			seed(question(name, qtype).SetEdns0(1232, true))
		}
	}
	q := withEDNS(withEDNS(question("api.ok.test.", dns.TypeA)))
	q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(198, 51, 100, 0)}}
	seed(q)
	for _, o := range []dns.EDNS0{
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"},
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "010203040506070801000000695734a51f8130c3eee29480"},
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102"},
		&dns.EDNS0_PADDING{Padding: make([]byte, 50)},
		&dns.EDNS0_TCP_KEEPALIVE{Code: dns.EDNS0TCPKEEPALIVE},
		&dns.EDNS0_LOCAL{Code: 65001, Data: []byte("x")},
	} {
		for _, name := range []string{"api.ok.test.", "evil.test."} {
			q := withEDNS(question(name, dns.TypeA))
			q.IsEdns0().Option = []dns.EDNS0{o, &dns.EDNS0_PADDING{}}
			seed(q)
		}
	}
	f.Add([]byte{0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xC0, 12, 0, 1, 0, 1})

	r := newResolver(f, Config{Decider: people, Cache: Cache{Size: mib}, Upstreams: []string{"192.0.2.53"}, Now: newClock().now}, nil)
	r.pool.ups.Store(&[]*upstream{{exchanger: onlyListed{f}, text: "canned"}})
	s := NewServer(r)
	quick := newFast(s)
	f.Fuzz(func(t *testing.T, packet []byte) {
		if len(packet) > readSize {
			return // no more is read
		}
		c := client{addr: netip.MustParseAddrPort(alice + ":1234"), udp: true}
		if len(packet) > 0 && packet[0]&1 != 0 { // of the ID
			c = client{addr: c.addr, door: doorTLS}
		}
		now := s.cfg.Now()
		for range 2 { // the second time from the cache
			got := new(answersTo)
			c.back = got
			s.serve(context.Background(), c, packet)
			if len(*got) > 1 {
				t.Fatalf("%x is answered %d times", packet, len(*got))
			}
			for _, p := range *got {
				checkAnswer(t, packet, p)
				checkOptions(t, packet, p, c.door)
			}
			var o outcome
			if p, ok := quick.answer(nil, packet, c, now, &o); ok && (len(*got) != 1 || !bytes.Equal(p, (*got)[0])) {
				t.Fatalf("%x is answered\n%x at once, and\n%x otherwise", packet, p, *got)
			}
		}
	})
}

// answersTo keeps the answers to one packet.
type answersTo [][]byte

func (a *answersTo) send(p []byte) error {
	*a = append(*a, bytes.Clone(p))
	return nil
}

// onlyListed fails the test if it is asked for what alice may not have.
type onlyListed struct{ testing.TB }

func (o onlyListed) exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
	name, err := policy.ParseName(q.Question[0].Name)
	if err != nil || !covers(people[alice].names, name) || q.Question[0].Qclass != dns.ClassINET {
		o.Errorf("upstream was asked %v", q)
	}
	return canned{}.exchange(ctx, q)
}
func (onlyListed) close() {}

// checkOptions holds the options of an answer against those of the packet that it answers.
func checkOptions(t *testing.T, packet, answer []byte, d door) {
	t.Helper()
	q, m := new(dns.Msg), new(dns.Msg)
	if q.Unpack(packet) != nil || q.IsEdns0() == nil || m.Unpack(answer) != nil || m.IsEdns0() == nil {
		return // checkAnswer has seen to it
	}
	padded, cookie := false, []byte(nil)
	for _, o := range q.IsEdns0().Option {
		switch o := o.(type) {
		case *dns.EDNS0_PADDING:
			padded = true
		case *dns.EDNS0_COOKIE:
			if cookie == nil {
				cookie = unhex(t, o.Cookie)
			}
		}
	}
	var options []uint16
	for _, o := range m.IsEdns0().Option {
		options = append(options, o.Option())
		if c, ok := o.(*dns.EDNS0_COOKIE); ok && (len(cookie) < 8 || len(c.Cookie) != 2*cookieSize || !bytes.HasPrefix(unhex(t, c.Cookie), cookie[:8])) {
			t.Fatalf("%x is answered with the cookie %s", packet, c.Cookie)
		}
	}
	if has := slices.Contains(options, dns.EDNS0PADDING); has != (padded && d.secret()) || has && len(answer)%wire.PadBlock != 0 {
		t.Fatalf("%x is answered with %d bytes and options %v over %s", packet, len(answer), options, d)
	}
	good := len(cookie) > 0 && validCookie(cookie)
	if slices.Contains(options, dns.EDNS0COOKIE) != good {
		t.Fatalf("%x is answered with options %v", packet, options)
	}
	for i, o := range options {
		if slices.Contains(options[:i], o) || o != dns.EDNS0EDE && o != dns.EDNS0COOKIE && o != dns.EDNS0PADDING {
			t.Fatalf("%x is answered with options %v", packet, options)
		}
	}
}

// checkAnswer holds an answer against the packet that it answers.
func checkAnswer(t *testing.T, packet, answer []byte) {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(answer); err != nil {
		t.Fatalf("answer %x cannot be read: %v", answer, err)
	}
	if packet[2]&0x80 != 0 {
		t.Fatalf("%x, a response, is answered", packet)
	}
	if !m.Response || !bytes.HasPrefix(answer, packet[:2]) {
		t.Fatalf("%x is answered with %x", packet, answer)
	}
	q := new(dns.Msg)
	malformed := q.Unpack(packet)
	if m.Rcode == dns.RcodeFormatError || m.Rcode == dns.RcodeNotImplemented {
		if len(m.Answer) > 0 {
			t.Fatalf("%v has an answer section", m)
		}
		return
	}
	if malformed != nil || len(q.Question) != 1 || len(m.Question) != 1 || m.Question[0] != q.Question[0] {
		t.Fatalf("%v (%v) is answered with %v", q, malformed, m)
	}
	if (m.IsEdns0() != nil) != (q.IsEdns0() != nil) {
		t.Fatalf("EDNS in one of query and answer only: %v\n%v", q, m)
	}
}
