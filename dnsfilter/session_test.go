package dnsfilter

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func frame(t testing.TB, qs ...*dns.Msg) (p []byte) {
	t.Helper()
	for _, q := range qs {
		m, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		p = append(binary.BigEndian.AppendUint16(p, uint16(len(m))), m...)
	}
	return p
}

func dialTCP(t *testing.T, addr string) *dns.Conn {
	t.Helper()
	c, err := dns.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

func TestTCPSlowAnswersDoNotHoldUpOthers(t *testing.T) {
	o := newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1", "slow.cdn.test. 60 IN A 192.0.2.2")
	release := make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if q.Question[0].Name == "slow.cdn.test." {
			<-release
		}
		w.WriteMsg(m)
	})
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}}, o)
	c := dialTCP(t, b.addr)
	slow, other, refused := question("slow.cdn.test.", dns.TypeA), question("api.ok.test.", dns.TypeA), question("evil.test.", dns.TypeA)
	slow.Id, other.Id, refused.Id = 1, 2, 3
	if _, err := c.Conn.Write(frame(t, slow, other, refused)); err != nil {
		t.Fatal(err)
	}
	for want := map[uint16]bool{2: true, 3: true}; len(want) > 0; {
		m, err := c.ReadMsg()
		if err != nil || !want[m.Id] {
			t.Fatalf("answer %v, %v; want one of %v", m, err, want)
		}
		delete(want, m.Id)
	}
	// The client has said all, and still gets its answer (RFC 7766, section 6.2.3).
	if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	close(release)
	if m, err := c.ReadMsg(); err != nil || m.Id != 1 || len(m.Answer) != 1 {
		t.Errorf("answer %v, %v", m, err)
	}
	if _, err := c.Conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the last answer: %v", err)
	}
}

// More queries than may be under way at a time wait; none is lost.
func TestTCPQueriesUnderWayAreBounded(t *testing.T) {
	o := newOrigin(t)
	asked, release := make(chan struct{}, 4*maxPipelined), make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		asked <- struct{}{}
		<-release
		w.WriteMsg(m)
	})
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}}, o)
	c := dialTCP(t, b.addr)
	const n = 2 * maxPipelined
	var all []byte
	for i := range n {
		q := question(string(rune('a'+i%26))+string(rune('a'+i/26))+".cdn.test.", dns.TypeA)
		q.Id = uint16(i)
		all = append(all, frame(t, q)...)
	}
	if _, err := c.Conn.Write(all); err != nil {
		t.Fatal(err)
	}
	for range maxPipelined {
		<-asked
	}
	if under := b.server.inFlight.Load(); under > maxPipelined+1 {
		t.Errorf("%d queries under way, want %d at most", under, maxPipelined+1)
	}
	close(release)
	seen := make(map[uint16]bool)
	for range n {
		m, err := c.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		seen[m.Id] = true
	}
	if len(seen) != n {
		t.Errorf("%d of %d queries answered", len(seen), n)
	}
}

func TestTCPInPiecesAndLong(t *testing.T) {
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	c := dialTCP(t, b.addr)
	long := question("api.ok.test.", dns.TypeA)
	long.Id = 2
	long.SetEdns0(1232, false).IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_PADDING{Padding: make([]byte, 30000)}}
	first, last := question("api.ok.test.", dns.TypeA), question("evil.test.", dns.TypeA)
	first.Id, last.Id = 1, 3
	p := frame(t, first, long, last)
	from := 0
	for _, to := range []int{1, 2, 3, 20, len(p) - 20000, len(p) - 1, len(p)} {
		if _, err := c.Conn.Write(p[from:to]); err != nil {
			t.Fatal(err)
		}
		from = to
	}
	got := make(map[uint16]int)
	for range 3 {
		m, err := c.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		got[m.Id] = m.Rcode
	}
	if len(got) != 3 || got[1] != dns.RcodeSuccess || got[2] != dns.RcodeSuccess || got[3] != dns.RcodeRefused {
		t.Errorf("answers %v", got)
	}
	// What is too short for a header ends the connection.
	if _, err := c.Conn.Write([]byte{0, 3, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("Read() = %v", err)
	}
}

// stalled is a connection that says when it is given a deadline, and lets time run out at once.
type stalled struct {
	net.Conn
	deadlines []time.Duration
	reads     [][]byte
}

func (c *stalled) SetReadDeadline(t time.Time) error {
	c.deadlines = append(c.deadlines, time.Until(t).Round(time.Second))
	return nil
}
func (c *stalled) Read(p []byte) (int, error) {
	if len(c.reads) == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	n := copy(p, c.reads[0])
	c.reads = c.reads[1:]
	return n, nil
}
func (c *stalled) SetWriteDeadline(time.Time) error { return nil }
func (c *stalled) Write(p []byte) (int, error)      { return len(p), nil }
func (c *stalled) Close() error                     { return nil }
func (c *stalled) RemoteAddr() net.Addr             { return &net.TCPAddr{IP: net.ParseIP(alice), Port: 1} }

// A query that comes byte by byte gets no more time than one that comes at once.
func TestTCPDeadlinesAreForWholeQueries(t *testing.T) {
	s := NewServer(newResolver(t, Config{Decider: people, Upstreams: []string{"127.0.0.1:9"}}, nil))
	c := new(stalled)
	for _, b := range frame(t, question("evil.test.", dns.TypeA)) {
		c.reads = append(c.reads, []byte{b})
	}
	c.reads = append(c.reads, []byte{0}, []byte{40})
	s.serveConn(s.conns.add(c), doorDNS)
	if len(c.deadlines) != 2 || c.deadlines[0] != firstQuery || c.deadlines[1] != idleTimeout {
		t.Errorf("deadlines %v", c.deadlines)
	}
	within := &stalled{reads: [][]byte{frame(t, question("evil.test.", dns.TypeA))}} // a TLS connection
	s.serveQueries(s.secureConns.add(within), within, doorTLS)
	if len(within.deadlines) != 2 || within.deadlines[0] != firstQuery || within.deadlines[1] != idleSecure {
		t.Errorf("deadlines over TLS %v", within.deadlines)
	}
	if len(c.reads) != 0 {
		t.Errorf("%d bytes are not read", len(c.reads))
	}
}
