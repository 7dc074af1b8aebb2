package dnsfilter

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/rs/zerolog"
)

// patience bounds waits of these tests on slow machines.
const patience = 30 * time.Second

// startSecure is start with TLS and HTTPS on free ports. It also returns how a client trusts
// the server.
func startSecure(t *testing.T, c Config, o *origin) (*bed, *tls.Config) {
	t.Helper()
	config, roots := certified(t)
	c.TLSListen, c.HTTPSListen, c.Certificate = []string{"127.0.0.1:0"}, []string{"127.0.0.1:0"}, config.Certificates[0]
	if c.Decider == nil {
		c.Decider = people
	}
	return start(t, c, o), &tls.Config{RootCAs: roots, ServerName: "example.com", NextProtos: []string{"dot"}}
}

// dialTLS connects to a DoT listener from an address.
func (b *bed) dialTLS(t *testing.T, from string, config *tls.Config) *dns.Conn {
	t.Helper()
	d := tls.Dialer{NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}, Config: config}
	c, err := d.Dial("tcp", b.server.TLSAddrs()[0].String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return &dns.Conn{Conn: c}
}

// The policy over TLS is that over UDP, a slow answer holds up no other, and events say
// which way a query came.
func TestTLSAnswersAsUDPDoes(t *testing.T) {
	o := newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1", "slow.cdn.test. 60 IN A 192.0.2.2")
	release := make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if q.Question[0].Name == "slow.cdn.test." {
			<-release
		}
		w.WriteMsg(m)
	})
	b, client := startSecure(t, Config{Cache: Cache{Size: mib}}, o)
	c := b.dialTLS(t, alice, client)
	if p := c.Conn.(*tls.Conn).ConnectionState().NegotiatedProtocol; p != "dot" {
		t.Errorf("ALPN %q", p)
	}
	slow, other, refused := question("slow.cdn.test.", dns.TypeA), question("api.ok.test.", dns.TypeA), question("evil.test.", dns.TypeA)
	slow.Id, other.Id, refused.Id = 1, 2, 3
	if _, err := c.Conn.Write(frame(t, slow, other, refused)); err != nil {
		t.Fatal(err)
	}
	for want := map[uint16]int{2: dns.RcodeSuccess, 3: dns.RcodeRefused}; len(want) > 0; {
		m, err := c.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		if rcode, ok := want[m.Id]; !ok || m.Rcode != rcode {
			t.Fatalf("answer %v; want one of %v", m, want)
		}
		delete(want, m.Id)
	}
	if err := c.Conn.(*tls.Conn).CloseWrite(); err != nil { // the client has said all
		t.Fatal(err)
	}
	close(release)
	if m, err := c.ReadMsg(); err != nil || m.Id != 1 || len(m.Answer) != 1 {
		t.Errorf("answer %v, %v", m, err)
	}
	if _, err := c.Conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after the last answer: %v", err)
	}
	for _, q := range []string{"api.ok.test A", "slow.cdn.test A", "evil.test A"} {
		if ev := b.events.of(t, alice, q); ev.Listener != "dns_tls" {
			t.Errorf("%s: listener %q", q, ev.Listener)
		}
	}
	wantRcode(t, exchange(t, b.dialTLS(t, bob, client), question("api.ok.test.", dns.TypeA)), dns.RcodeRefused, 0)
}

func exchange(t *testing.T, c *dns.Conn, q *dns.Msg) *dns.Msg {
	t.Helper()
	if err := c.WriteMsg(q); err != nil {
		t.Fatal(err)
	}
	m, err := c.ReadMsg()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// RFC 7830, section 3 and RFC 8467, section 4.1: padded where it was asked for, and never in clear.
func TestAnswersArePaddedUnderTLSOnly(t *testing.T) {
	b, client := startSecure(t, Config{Cache: Cache{Size: mib}}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	size := func(m *dns.Msg) int {
		m.Compress = true
		return m.Len()
	}
	padded := func(m *dns.Msg) bool {
		for _, o := range m.IsEdns0().Option {
			if _, ok := o.(*dns.EDNS0_PADDING); ok {
				return true
			}
		}
		return false
	}
	c := b.dialTLS(t, alice, client)
	for _, name := range []string{"api.ok.test.", "api.ok.test.", "evil.test."} { // from the upstream, from the cache, not at all
		plain, q := withEDNS(question(name, dns.TypeA)), withEDNS(question(name, dns.TypeA))
		q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_PADDING{Padding: make([]byte, 3)}}
		if m := exchange(t, c, q); !padded(m) || size(m)%468 != 0 {
			t.Errorf("%s over TLS with padding: %d bytes", name, size(m))
		}
		if m := exchange(t, c, plain); padded(m) {
			t.Errorf("%s over TLS without padding: %v", name, m)
		}
		for _, network := range []string{"udp", "tcp"} {
			if m := b.ask(t, alice, network, q); padded(m) {
				t.Errorf("%s over %s: %v", name, network, m)
			}
		}
	}
}

func TestTLSRefusesOtherProtocols(t *testing.T) {
	b, client := startSecure(t, Config{}, newOrigin(t))
	for _, tt := range []struct {
		name string
		tune func(*tls.Config)
	}{
		{"old TLS", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }},
		{"HTTP/2", func(c *tls.Config) { c.NextProtos = []string{"h2"} }},
	} {
		config := client.Clone()
		tt.tune(config)
		if c, err := tls.Dial("tcp", b.server.TLSAddrs()[0].String(), config); err == nil {
			c.Close()
			t.Errorf("%s is taken", tt.name)
		}
	}
	config := client.Clone()
	config.NextProtos = nil // many clients name no protocol
	wantRcode(t, exchange(t, b.dialTLS(t, alice, config), question("evil.test.", dns.TypeA)), dns.RcodeRefused, 0)
}

func TestTLSCertificateChangesForNewConnections(t *testing.T) {
	b, client := startSecure(t, Config{}, newOrigin(t))
	before := b.dialTLS(t, alice, client)
	ca := newAuthority(t)
	b.server.SetCertificate(ca.certificate)
	if got := b.server.CertificateExpiry(); !got.After(time.Now()) || !got.Equal(ca.certificate.Leaf.NotAfter) {
		t.Errorf("it expires at %v", got)
	}
	fresh := client.Clone()
	fresh.RootCAs = ca.roots
	for _, c := range []*dns.Conn{before, b.dialTLS(t, alice, fresh)} {
		wantRcode(t, exchange(t, c, question("evil.test.", dns.TypeA)), dns.RcodeRefused, 0)
	}
	if c, err := tls.Dial("tcp", b.server.TLSAddrs()[0].String(), client); err == nil {
		c.Close()
		t.Error("the old certificate is still in force")
	}
}

// Whoever neither shakes hands nor asks is cut off, also while the server shuts down.
func TestTLSHandshakeEndsWithTheServer(t *testing.T) {
	config, _ := certified(t)
	r := newResolver(t, Config{Decider: people, TLSListen: []string{"127.0.0.1:0"}, HTTPSListen: []string{"127.0.0.1:0"},
		Certificate: config.Certificates[0], Upstreams: []string{"127.0.0.1:9"}}, nil)
	s := NewServer(r)
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background()) }()
	for _, a := range append(s.TLSAddrs(), s.HTTPSAddrs()...) {
		c, err := net.Dial("tcp", a.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte{22, 3, 1})
	}
	eventually(t, "both connections", func() bool { return s.secureConns.count() == 2 })
	begun := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		t.Errorf("Shutdown() = %v after %v", err, time.Since(begun))
	}
	if err := <-served; err != nil {
		t.Errorf("Serve() = %v", err)
	}
	if n := s.secureConns.count(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}

func TestHandshakeHasADeadline(t *testing.T) {
	s := NewServer(newResolver(t, Config{Decider: people, Upstreams: []string{"127.0.0.1:9"}}, nil))
	c := &stalled{reads: [][]byte{{22, 3, 1}}}
	s.serveConn(s.secureConns.add(c), doorTLS)
	if len(c.deadlines) != 1 || c.deadlines[0] != firstQuery || s.secureConns.count() != 0 {
		t.Errorf("deadlines %v", c.deadlines)
	}
}

// header1 is a PROXY protocol header for a client.
func header1(from string) string { return "PROXY TCP4 " + from + " 192.0.2.1 4711 53\r\n" }

// header2 is the same in version 2, or LOCAL without a client.
func header2(from string) string {
	h := "\r\n\r\n\x00\r\nQUIT\n"
	if from == "" {
		return h + "\x20\x00\x00\x00"
	}
	return h + "\x21\x11\x00\x0c" + string(net.ParseIP(from).To4()) + "\xc0\x00\x02\x01\x12\x67\x00\x35"
}

// Whom a trusted load balancer speaks for is who asks, on every door.
func TestT59ResolverProxyProtocol(t *testing.T) {
	log := new(logs)
	o := newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1")
	b, client := startSecure(t, Config{ProxyProtocol: ProxyProtocol{Trusted: trusting(t, "127.0.0.7/32")}, Logger: zerolog.New(log)}, o)
	// ask sends a header and a query, and returns the answer's RCODE, -1 without one.
	ask := func(door, from, header string) int {
		t.Helper()
		addr := map[string]string{"tcp": b.addr, "tls": b.server.TLSAddrs()[0].String(), "https": b.server.HTTPSAddrs()[0].String()}[door]
		raw, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}).Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(patience))
		for _, part := range []string{header[:len(header)/2], header[len(header)/2:]} {
			if _, err := io.WriteString(raw, part); err != nil {
				return -1
			}
		}
		q := question("api.ok.test.", dns.TypeA)
		var m *dns.Msg
		switch door {
		case "tcp":
			c := &dns.Conn{Conn: raw}
			c.WriteMsg(q) // that it is not taken shows in the answer
			m, err = c.ReadMsg()
		case "tls":
			c := &dns.Conn{Conn: tls.Client(raw, client)}
			if err = c.WriteMsg(q); err == nil {
				m, err = c.ReadMsg()
			}
		case "https":
			m, err = postOver(raw, client, q)
		}
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s with %q: the connection is not closed", door, header)
			}
			return -1
		}
		return m.Rcode
	}
	const trusted = "127.0.0.7"
	for _, door := range []string{"tcp", "tls", "https"} {
		for _, tt := range []struct {
			name, from, header string
			want               int
		}{
			{"version 1", trusted, header1(alice), dns.RcodeSuccess},
			{"version 2", trusted, header2(alice), dns.RcodeSuccess},
			{"for somebody who may not", trusted, header2(bob), dns.RcodeRefused},
			{"for a stranger", trusted, header1("203.0.113.1"), dns.RcodeRefused},
			{"on its own behalf", trusted, header2(""), dns.RcodeRefused},
			{"without", trusted, "", -1},
			{"twice", trusted, header1(alice) + header1(alice), -1},
			{"malformed", trusted, "PROXY TCP4 127.0.0.1 x 1 2\r\n", -1},
			{"of one who may not", alice, header1(alice), -1},
			{"of one who may not, version 2", alice, header2(alice), -1},
			{"of one who needs none", alice, "", dns.RcodeSuccess},
		} {
			if got := ask(door, tt.from, tt.header); got != tt.want {
				t.Errorf("%s, %s: %d, want %d", door, tt.name, got, tt.want)
			}
		}
		b.events.of(t, alice, "api.ok.test A")
		b.events.of(t, trusted, "api.ok.test A")
	}
	if lines := log.with("PROXY protocol"); len(lines) != 1 || !strings.Contains(lines[0], "dns.proxy_protocol.trusted") {
		t.Errorf("logged %q, want one line", lines)
	}
	eventually(t, "the connections to end", func() bool { return b.server.conns.count()+b.server.secureConns.count() == 0 })
}

// The connections of a load balancer count for its clients.
func TestT59ProxiedConnectionsCountForTheirClients(t *testing.T) {
	s := NewServer(newResolver(t, Config{Decider: people, Upstreams: []string{"127.0.0.1:9"},
		ProxyProtocol: ProxyProtocol{Trusted: trusting(t, "::ffff:127.0.0.0/104")}}, nil))
	taken := func(n int, header string) (kept int) {
		for range n {
			c := s.conns.add(&stalled{reads: [][]byte{[]byte(header)}})
			if c != nil && s.introduce(c) {
				kept++
			}
		}
		return kept
	}
	if n := taken(maxSourceConns+1, header1(alice)); n != maxSourceConns {
		t.Errorf("one client has %d connections, want %d", n, maxSourceConns)
	}
	if n := taken(1, header2(bob)); n != 1 {
		t.Error("another client is refused")
	}
	s.conns.each(func(c *conn) { c.Close() })
	if len(s.conns.perSource)+len(s.conns.open) != 0 {
		t.Errorf("left: %v", s.conns.perSource)
	}
}

func TestIsIntroduction(t *testing.T) {
	for text, want := range map[string]bool{
		"": false, "P": false, "PROX": false, "PROXY ": true, "PROXY TCP4 ": true, "PROXYING": false,
		"\r\n\r\n": false, "\r\n\r\n\x00\r\nQUIT\n": true, "\r\n\r\n\x00\r\nQUIT": false, "\r\n\r\n\x00\r\nQUITE": false,
		string(bytes.Repeat([]byte{0}, 20)): false,
	} {
		if got := isIntroduction([]byte(text)); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

// What is under way when the Server shuts down is answered, over TLS and HTTPS as over UDP.
func TestShutdownWaitsForEncryptedQueries(t *testing.T) {
	o := newOrigin(t, "slow.cdn.test. 60 IN A 192.0.2.2")
	asked, release := make(chan struct{}, 8), make(chan struct{})
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		asked <- struct{}{}
		<-release
		w.WriteMsg(m)
	})
	b, client := startSecure(t, Config{Cache: Cache{Size: mib}}, o)
	c := b.dialTLS(t, alice, client)
	if err := c.WriteMsg(question("slow.cdn.test.", dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	<-asked
	p, err := question("slow.cdn.test.", dns.TypeA).Pack() // shares the flight
	if err != nil {
		t.Fatal(err)
	}
	url := "https://" + b.server.HTTPSAddrs()[0].String() + dohPath
	type got struct {
		status int
		err    error
	}
	answers := make(chan got, 2)
	for _, two := range []bool{false, true} {
		browser := browser(t, alice, client, two)
		go func() {
			resp, err := browser.Post(url, dnsMessage, bytes.NewReader(p))
			if err != nil {
				answers <- got{err: err}
				return
			}
			resp.Body.Close()
			answers <- got{status: resp.StatusCode}
		}()
	}
	eventually(t, "three queries under way", func() bool { return b.server.inFlight.Load() == 3 })
	down := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		down <- b.server.Shutdown(ctx)
	}()
	<-b.server.down
	close(release)
	if m, err := c.ReadMsg(); err != nil || len(m.Answer) != 1 {
		t.Errorf("over TLS: %v, %v", m, err)
	}
	for range 2 {
		if a := <-answers; a.err != nil || a.status != 200 {
			t.Errorf("over HTTPS: %+v", a)
		}
	}
	if err := <-down; err != nil {
		t.Errorf("Shutdown() = %v", err)
	}
	if n := b.server.secureConns.count(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}

// A Shutdown that may not wait cuts requests off.
func TestShutdownCutsEncryptedQueries(t *testing.T) {
	o := newOrigin(t)
	asked, release := make(chan struct{}, 8), make(chan struct{})
	defer close(release)
	o.set(func(dns.ResponseWriter, *dns.Msg, *dns.Msg) {
		asked <- struct{}{}
		<-release
	})
	b, client := startSecure(t, Config{}, o)
	p, err := question("slow.cdn.test.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	browser := browser(t, alice, client, true)
	go func() {
		resp, err := browser.Post("https://"+b.server.HTTPSAddrs()[0].String()+dohPath, dnsMessage, bytes.NewReader(p))
		if err == nil {
			resp.Body.Close()
		}
		failed <- err
	}()
	<-asked
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	b.server.Shutdown(ctx) // that it did not wait is no news
	<-b.server.finished
	<-failed // an error, or SERVFAIL at the last moment
	eventually(t, "the connection to end", func() bool { return b.server.secureConns.count() == 0 })
}
