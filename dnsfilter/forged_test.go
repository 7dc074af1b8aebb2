package dnsfilter

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// cookied returns a query with the cookie that the server gives alice.
func (b *bed) cookied(t *testing.T, q *dns.Msg, cookie string) *dns.Msg {
	t.Helper()
	option := func(q *dns.Msg, text string) *dns.Msg {
		withEDNS(q).IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: text}}
		return q
	}
	if cookie == "" {
		m := b.ask(t, alice, "tcp", option(question("evil.test.", dns.TypeNS), "0011223344556677"))
		cookie = m.IsEdns0().Option[len(m.IsEdns0().Option)-1].(*dns.EDNS0_COOKIE).Cookie
	}
	return option(q, cookie)
}

// wantUnharmed asks for a name as alice by each of the ways that nobody can take who
// forges her address, and wants it answered.
func (b *bed) wantUnharmed(t *testing.T, trust *tls.Config, name string, rcode int) {
	t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		q := b.cookied(t, question(network+name, dns.TypeA), "")
		if network == "tcp" {
			q = question(network+name, dns.TypeA)
		}
		if m := b.ask(t, alice, network, q); m.Rcode != rcode {
			t.Errorf("%s over %s: %s, want %s", q.Question[0].Name, network, dns.RcodeToString[m.Rcode], dns.RcodeToString[rcode])
		}
	}
	p, err := question("https"+name, dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	resp, err := browser(t, alice, trust, true).Post("https://"+b.server.HTTPSAddrs()[0].String()+dohPath, dnsMessage, bytes.NewReader(p))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	m := new(dns.Msg)
	if err := m.Unpack(body); resp.StatusCode != http.StatusOK || err != nil || m.Rcode != rcode {
		t.Errorf("%s over https: %s, %v", name, resp.Status, m)
	}
}

// TestT50ForgedQueriesDoNotCount: whoever forges a client's address over UDP spends what a source
// may ask, but not what the client has that shows who it is, by a connection or a cookie.
func TestT50ForgedQueriesDoNotCount(t *testing.T) {
	const rate = 4
	clock := newClock()
	b, trust := startSecure(t, Config{Cache: Cache{Size: mib}, Now: clock.now, Limits: Limits{QueriesPerSecond: rate, QueriesBurst: 8}},
		newOrigin(t, soa))
	refused := 0
	for _, m := range b.burst(t, alice, many(24, func(i int) *dns.Msg { return question(fmt.Sprintf("n%d.cdn.test.", i), dns.TypeA) }), func() {}) {
		if m.Rcode == dns.RcodeRefused {
			refused++
		}
	}
	if refused != 16 {
		t.Fatalf("%d forged queries are refused, want 16", refused)
	}
	b.wantUnharmed(t, trust, ".cdn.test.", dns.RcodeNameError)
}

// TestT55ForgedQueriesLeaveRoom: neither the share of a source that is forged nor all the room that
// forged queries take keeps a client out that shows who it is.
func TestT55ForgedQueriesLeaveRoom(t *testing.T) {
	o := newOrigin(t, soa)
	b, trust := startSecure(t, Config{Cache: Cache{Size: mib}}, o)
	release := make(chan struct{})
	free := sync.OnceFunc(func() { close(release) })
	t.Cleanup(free)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		if strings.HasSuffix(q.Question[0].Name, ".forged.cdn.test.") {
			<-release
		}
		w.WriteMsg(m)
	})
	c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(alice)}, net.UDPAddrFromAddrPort(b.server.Addrs()[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	forge := func(name string, dropped uint64) {
		t.Helper()
		before := b.server.inFlight.Load()
		p, err := question(name, dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		c.Write(p)
		eventually(t, "the query to be dropped", func() bool {
			return b.server.inFlight.Load() == before && b.resolver.Stats().Dropped == dropped
		})
	}
	b.server.inFlight.Add(maxInFlight / 2) // of others
	b.server.share(netip.MustParseAddr(alice), false).Add(maxShare)
	forge("n.forged.cdn.test.", 1)
	b.wantUnharmed(t, trust, "1.cdn.test.", dns.RcodeNameError)
	b.server.share(netip.MustParseAddr(alice), false).Add(-maxShare)
	b.server.inFlight.Add(maxForgeable - maxInFlight/2)
	forge("m.forged.cdn.test.", 2)
	b.wantUnharmed(t, trust, "2.cdn.test.", dns.RcodeNameError)
	b.server.inFlight.Add(-maxForgeable)
	eventually(t, "no query to be under way", func() bool { return b.server.inFlight.Load() == 0 })
	for i := range b.server.limit.shares {
		if n := b.server.limit.shares[i].Load(); n != 0 {
			t.Fatalf("%d of %d are left", n, i)
		}
	}
}

// TestT43ForgedTunnelsHarmNobody: the guard does not refuse a client that shows who it is what
// somebody else made look like a tunnel.
func TestT43ForgedTunnelsHarmNobody(t *testing.T) {
	const limit = 8
	for _, form := range []string{"plain", "slow"} {
		b, trust := startSecure(t, Config{Cache: Cache{Size: mib}, Now: newClock().now,
			TunnelGuard: TunnelGuard{Mode: TunnelRefuse, UniqueNamesPerMinute: limit}}, newOrigin(t, soa))
		var last *dns.Msg
		for i := range 2 * limit {
			q := withEDNS(question(secret(i, 18)+".cdn.test.", dns.TypeA))
			if form == "slow" {
				q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(198, 51, 100, 0)}}
			}
			last = b.ask(t, alice, "udp", q)
		}
		wantRcode(t, last, dns.RcodeRefused, dns.ExtendedErrorCodeProhibited)
		b.wantUnharmed(t, trust, ".cdn.test.", dns.RcodeNameError)
	}
}

// TestHTTPSQueryThatIsLeftKeepsItsRoom: a client that resets its requests asks no more of the
// upstreams at a time than one that waits for the answers.
func TestHTTPSQueryThatIsLeftKeepsItsRoom(t *testing.T) {
	o := newOrigin(t, soa)
	asked, release := make(chan struct{}, 1), make(chan struct{})
	o.set(func(w dns.ResponseWriter, _, m *dns.Msg) {
		asked <- struct{}{}
		<-release
		w.WriteMsg(m)
	})
	b, trust := startSecure(t, Config{Cache: Cache{Size: mib}}, o)
	free := sync.OnceFunc(func() { close(release) })
	t.Cleanup(free)
	client := browser(t, alice, trust, true)
	url := "https://" + b.server.HTTPSAddrs()[0].String() + dohPath
	post := func(ctx context.Context, name string) error {
		p, err := question(name, dns.TypeA).Pack()
		if err != nil {
			return err
		}
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(p))
		if err != nil {
			return err
		}
		r.Header.Set("Content-Type", dnsMessage)
		resp, err := client.Do(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	left := make(chan error, 1)
	go func() { left <- post(ctx, "left.cdn.test.") }()
	<-asked
	cancel()
	if err := <-left; err == nil {
		t.Fatal("a request that was left is answered")
	}
	for range 50 { // the server reads these after the reset
		if err := post(context.Background(), "evil.test."); err != nil {
			t.Fatal(err)
		}
	}
	if n, flights := b.server.inFlight.Load(), b.resolver.Stats().InFlight; n != 1 || flights != 1 {
		t.Errorf("%d queries under way for %d questions, want 1", n, flights)
	}
	free()
	if ev := b.events.of(t, alice, "left.cdn.test A"); ev.RCode != "NXDOMAIN" || ev.Error != "" {
		t.Errorf("event %+v", ev)
	}
}
