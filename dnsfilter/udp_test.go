package dnsfilter

import (
	"fmt"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Clients that ask much at a time get each answer to the question that it belongs to,
// from whichever socket and batch: hits, refusals, questions nobody has asked before,
// and long queries.
func TestUDPManyAtATime(t *testing.T) {
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}, Listen: []string{"127.0.0.1:0"}}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	var asking sync.WaitGroup
	for client := range 4 {
		asking.Go(func() {
			c, err := net.Dial("udp", b.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			buf := make([]byte, maxEDNSSize)
			for round := range 10 {
				want := make(map[uint16]string)
				for i := range 16 { // few enough for any socket buffer
					name := []string{"api.ok.test.", "aPI.ok.test.", "evil.test.", fmt.Sprintf("n%d-%d-%d.cdn.test.", client, round, i)}[i%4]
					q := question(name, dns.TypeA)
					q.Id = uint16(round<<8 | i)
					if i%5 == 0 {
						q.SetEdns0(1232, false).IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_PADDING{Padding: make([]byte, 200*i)}}
					}
					p, err := q.Pack()
					if err != nil {
						t.Error(err)
						return
					}
					want[q.Id] = name
					c.Write(p)
				}
				for len(want) > 0 {
					c.SetReadDeadline(time.Now().Add(20 * time.Second))
					n, err := c.Read(buf)
					if err != nil {
						t.Errorf("%v; without answer: %v", err, want)
						return
					}
					m := new(dns.Msg)
					if err := m.Unpack(buf[:n]); err != nil || len(m.Question) != 1 || want[m.Id] != m.Question[0].Name {
						t.Errorf("%v, %v; want one of %v", m, err, want)
						return
					}
					delete(want, m.Id)
				}
			}
		})
	}
	asking.Wait()
}

// An address that is taken is not shared, not even with somebody who would share it.
func TestUDPAddressIsOurs(t *testing.T) {
	if runtime.GOMAXPROCS(0) < 2 {
		t.Skip("needs two threads: with one there is one socket, which is never shared")
	}
	b := start(t, Config{Decider: people}, newOrigin(t))
	wantRcode(t, b.ask(t, alice, "udp", question("evil.test.", dns.TypeA)), dns.RcodeRefused, 0) // it serves
	s := NewServer(newResolver(t, Config{Listen: []string{b.addr}, Upstreams: []string{"127.0.0.1:9"}}, nil))
	if err := s.Listen(); err == nil {
		t.Errorf("a second server listens on %v", s.Addrs())
	}
}

func TestWildcardBindAnswersOverIPv6(t *testing.T) {
	probe, err := net.ListenPacket("udp6", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6 on loopback: %v", err)
	}
	probe.Close()
	v6 := fakePolicy{"::1": people[alice]}
	b := start(t, Config{Decider: v6, Listen: []string{":0"}, Cache: Cache{Size: mib}}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	_, port, _ := net.SplitHostPort(b.addr)
	b.addr = net.JoinHostPort("::1", port)
	for range 2 {
		wantData(t, b.ask(t, "::1", "udp", question("api.ok.test.", dns.TypeA)), "A 192.0.2.1")
	}
	wantRcode(t, b.ask(t, "::1", "udp", question("evil.test.", dns.TypeA)), dns.RcodeRefused, 0)
}

// Packets that are empty, too short, larger than what is read, or followed by something
// else do no harm to those after them.
func TestT49OddPackets(t *testing.T) {
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}}, newOrigin(t))
	c, err := net.Dial("udp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	pack := func(q *dns.Msg) []byte {
		p, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	plain := pack(question("evil.test.", dns.TypeA))
	long := withEDNS(question("evil.test.", dns.TypeA))
	long.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_PADDING{Padding: make([]byte, 2*readSize)}}
	buf := make([]byte, maxEDNSSize)
	const rounds = 128 // two batches where there are any
	for range rounds {
		for _, silent := range [][]byte{nil, {0}, plain[:headerSize-1]} {
			c.Write(silent)
		}
		for _, tt := range []struct {
			packet []byte
			rcode  int
		}{{plain, dns.RcodeRefused}, {append(plain[:len(plain):len(plain)], "trailing"...), dns.RcodeRefused}, {pack(long), dns.RcodeFormatError}} {
			c.Write(tt.packet)
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			n, err := c.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			if n < headerSize || buf[0] != tt.packet[0] || buf[1] != tt.packet[1] || int(buf[3]&0xF) != tt.rcode {
				t.Errorf("%d bytes are answered with %x", len(tt.packet), buf[:n])
			}
		}
	}
	eventually(t, "the odd ones to be counted", func() bool { return b.resolver.Stats().Malformed == 4*rounds })
}
