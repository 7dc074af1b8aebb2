package dnsfilter

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Sockets that somebody else has bound are used instead of the addresses in Config, and one
// for all addresses answers from the one that was asked.
func TestInheritedSockets(t *testing.T) {
	config, roots := certified(t)
	r := newResolver(t, Config{Decider: people, Upstreams: []string{"127.0.0.1:9"}, Certificate: config.Certificates[0],
		Listen: []string{"192.0.2.1:53"}, TLSListen: []string{"192.0.2.1:853"}, HTTPSListen: []string{"192.0.2.1:443"}}, nil) // which this machine does not have
	s := NewServer(r)
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	udp, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	tcp, secure, web := listen(), listen(), listen()
	s.Inherit(Sockets{UDP: []*net.UDPConn{udp}, TCP: []net.Listener{tcp}, TLS: []net.Listener{secure}, HTTPS: []net.Listener{web}})
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	addr := func(a net.Addr) netip.AddrPort { return netip.MustParseAddrPort(a.String()) }
	if got, want := s.Addrs(), []netip.AddrPort{addr(udp.LocalAddr()), addr(tcp.Addr())}; !slices.Equal(got, want) {
		t.Errorf("Addrs() = %v, want %v", got, want)
	}
	if a, b := s.TLSAddrs(), s.HTTPSAddrs(); len(a) != 1 || a[0] != addr(secure.Addr()) || len(b) != 1 || b[0] != addr(web.Addr()) {
		t.Errorf("TLSAddrs() = %v, HTTPSAddrs() = %v", a, b)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background()) }()
	for network, to := range map[string]string{
		"udp": net.JoinHostPort("127.0.0.5", port(addr(udp.LocalAddr()))), "tcp": tcp.Addr().String(), "tcp-tls": secure.Addr().String(),
	} {
		c := dns.Client{Net: network, Timeout: patience, TLSConfig: &tls.Config{RootCAs: roots, ServerName: "example.com"}}
		if m, _, err := c.Exchange(question("evil.test.", dns.TypeA), to); err != nil || m.Rcode != dns.RcodeRefused {
			t.Errorf("%s: %v, %v", network, m, err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	if err := udp.SetDeadline(time.Time{}); err == nil {
		t.Error("the socket is not closed")
	}
}
