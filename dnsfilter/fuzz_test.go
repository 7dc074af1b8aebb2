package dnsfilter

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
)

// pipes is a listener without sockets.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error {
	if !isClosed(p.done) {
		close(p.done)
	}
	return nil
}
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// from gives a pipe a client's address.
type from struct {
	net.Conn
	addr string
}

func (c from) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.ParseIP(c.addr), Port: 1234} }

// canned answers whatever is asked, without sockets.
type canned struct{}

func (canned) exchange(_ context.Context, q *dns.Msg) (*dns.Msg, error) { return oneAddress(q), nil }
func (canned) close()                                                   {}

// FuzzServer sends arbitrary packets through the whole server. It may not crash,
// answers each once at most, echoes the question, and never asks upstream what is
// not allowed.
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
	f.Add([]byte{0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xC0, 12, 0, 1, 0, 1})

	r := newResolver(f, Config{Decider: people, Cache: Cache{Size: mib}, Upstreams: []string{"192.0.2.53"}}, nil)
	r.pool.ups.Store(&[]*upstream{{exchanger: onlyListed{f}, text: "canned"}})
	s := NewServer(r)
	l := &pipes{make(chan net.Conn), make(chan struct{})}
	s.bound = []*dns.Server{s.tcpServer(l)}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background()) }()
	client, server := net.Pipe()
	l.conns <- from{server, alice}
	f.Cleanup(func() {
		client.Close()
		s.Shutdown(context.Background())
		<-served
	})
	sentinel, _ := question("sentinel.test.", dns.TypeA).Pack()
	f.Fuzz(func(t *testing.T, packet []byte) {
		if len(packet) > 4096 || bytes.HasPrefix(packet, sentinel[:2]) || len(packet) < 12 {
			return // over TCP a packet without a header ends the connection
		}
		client.SetDeadline(time.Now().Add(10 * time.Second))
		go func() {
			client.Write(frame(packet))
			client.Write(frame(sentinel))
		}()
		answers := 0
		for {
			p := readFrame(t, client)
			if bytes.HasPrefix(p, sentinel[:2]) {
				return
			}
			if answers++; answers > 1 {
				t.Fatal("a second answer")
			}
			checkAnswer(t, packet, p)
		}
	})
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

func frame(p []byte) []byte { return append(binary.BigEndian.AppendUint16(nil, uint16(len(p))), p...) }

func readFrame(t *testing.T, r io.Reader) []byte {
	t.Helper()
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(r, p); err != nil {
		t.Fatal(err)
	}
	return p
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
