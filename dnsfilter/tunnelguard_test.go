package dnsfilter

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/rs/zerolog"

	"sallyport/policy"
)

// secret returns a label that carries n bytes of data.
func secret(i, n int) string {
	sum := sha256.Sum256([]byte{byte(i), byte(i >> 8)})
	return strings.ToLower(base32.HexEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:n]))
}

// apart returns n labels as secret makes them that g, which may be nil, takes neither for
// one another nor for www: now and then its sketch does.
func apart(g *tunnelGuard, n int) (labels []string) {
	taken := make(map[uint64]bool)
	isNew := func(label string) bool {
		if g == nil {
			return true
		}
		slot := g.hash(label) / 64 % trailBits // the bit that add sets
		was := taken[slot]
		taken[slot] = true
		return !was
	}
	isNew("www")
	for i := 0; len(labels) < n; i++ {
		if l := secret(i, 18); isNew(l) {
			labels = append(labels, l)
		}
	}
	return labels
}

// TestT43TunnelsThroughWildcards: somebody who carries data out in the names below an
// allowed wildcard is noticed, and refused if so wanted, for as long as it goes on. Others, other
// domains and what is in the cache are unharmed.
func TestT43TunnelsThroughWildcards(t *testing.T) {
	const limit, sent = 8, 30
	both := fakePolicy{
		alice: {names: []string{"*.cdn.test", "*.other.test", "*.fine.test", "deep.fine.test"}},
		bob:   {names: []string{"*.cdn.test"}},
	}
	for _, mode := range []TunnelMode{TunnelOff, TunnelObserve, TunnelRefuse} {
		for _, form := range []string{"plain", "slow"} {
			t.Run(string(mode)+" "+form, func(t *testing.T) {
				clock, said := newClock(), new(logs)
				b := start(t, Config{
					Decider: both, Cache: Cache{Size: mib}, Now: clock.now, Logger: zerolog.New(said),
					TunnelGuard: TunnelGuard{Mode: mode, UniqueNamesPerMinute: limit, Exempt: []string{"fine.test"}},
				}, newOrigin(t, "www.cdn.test. 3600 IN A 192.0.2.1", "www.other.test. 3600 IN A 192.0.2.1", soa))
				ask := func(source, name string) *dns.Msg {
					q := withEDNS(question(name, dns.TypeA))
					if form == "slow" {
						q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(198, 51, 100, 0)}}
					}
					return b.ask(t, source, "udp", q)
				}
				labels := apart(b.server.tunnels, 400)
				refused := func(source, suffix string, from, n int) (count int) {
					for i := range n {
						m := ask(source, labels[from+i]+suffix)
						if m.Rcode == dns.RcodeRefused {
							count++
							wantRcode(t, m, dns.RcodeRefused, dns.ExtendedErrorCodeProhibited)
						}
					}
					return count
				}
				wantData(t, ask(alice, "www.cdn.test."), "A 192.0.2.1")
				want := 0
				if mode == TunnelRefuse {
					want = sent - limit + 2 // of www and seven more; the next one makes it a tunnel
				}
				if got := refused(alice, ".cdn.test.", 0, sent); got != want {
					t.Errorf("%d names are refused, want %d", got, want)
				}
				packets := b.packets()
				wantData(t, ask(alice, "www.cdn.test."), "A 192.0.2.1")
				wantData(t, ask(alice, "www.other.test."), "A 192.0.2.1")
				if n := refused(alice, ".fine.test.", 0, sent) + refused(bob, ".cdn.test.", 100, limit-1); n != 0 {
					t.Errorf("%d names of others are refused", n)
				}
				if n := b.packets(); n != packets+1+sent+limit-1 {
					t.Errorf("%d packets upstream, want %d", n-packets, 1+sent+limit-1)
				}
				clock.advance(time.Minute)
				if got := refused(alice, ".cdn.test.", 200, sent); mode == TunnelRefuse && got != sent {
					t.Errorf("%d names are refused while it goes on, want %d", got, sent)
				}
				clock.advance(2 * time.Minute)
				if got := refused(alice, ".cdn.test.", 300, limit-1); got != 0 {
					t.Errorf("%d names are refused after it was over", got)
				}
				s, lines := b.resolver.Stats(), said.with("tunnel")
				switch {
				case mode == TunnelOff && (s.TunnelSuspected != 0 || len(lines) != 0):
					t.Errorf("%d names suspected, log %q", s.TunnelSuspected, lines)
				case mode != TunnelOff && (s.TunnelSuspected == 0 || len(lines) != 2):
					t.Errorf("%d names suspected, log %q; want a line for each of two minutes", s.TunnelSuspected, lines)
				case mode != TunnelOff:
					for _, part := range []string{`"src":"127.0.0.1"`, `"group":"127.0.0.1"`, `"domain":"cdn.test"`, `"names":`, `"mode":"` + string(mode) + `"`} {
						if !strings.Contains(lines[0], part) {
							t.Errorf("%s lacks %s", lines[0], part)
						}
					}
				}
				if mode == TunnelRefuse {
					if s.TunnelRefused != uint64(want+sent) {
						t.Errorf("%d refused in all, want %d", s.TunnelRefused, want+sent)
					}
					if ev := b.events.of(t, alice, labels[sent-1]+".cdn.test A"); ev.Decision.Reason != policy.ReasonLimitExceeded {
						t.Errorf("event = %+v", ev)
					}
				} else if s.TunnelRefused != 0 {
					t.Errorf("%d refused", s.TunnelRefused)
				}
			})
		}
	}
}

// What looks like a tunnel, and what does not.
func TestTunnelSigns(t *testing.T) {
	const limit = 100
	for _, tt := range []struct {
		what   string
		first  int // name that makes it suspicious; 0: none of 500
		label  func(i int) string
		within int // how far off the sketch may be
	}{
		{"short encoded labels", limit, func(i int) string { return secret(i, 11) }, 3},
		{"hexadecimal", limit, func(i int) string {
			sum := sha256.Sum256([]byte{byte(i), byte(i >> 8)})
			return hex.EncodeToString(sum[:10])
		}, 3},
		{"long encoded labels", limit / 4, func(i int) string { return secret(i, 30) }, 1},
		{"hosts with numbers", 4 * limit, func(i int) string { return fmt.Sprintf("host-%d", i) }, 12},
		{"long names that hold nothing", 4 * limit, func(i int) string { return strings.Repeat("a", 60) + fmt.Sprint(i) }, 12},
		{"one name over and over", 0, func(int) string { return secret(1, 30) }, 0},
		{"fifty names over and over", 0, func(i int) string { return secret(i%50, 15) }, 0},
	} {
		g := newTunnelGuard(&Server{cfg: &Config{TunnelGuard: TunnelGuard{Mode: TunnelObserve}}})
		first := 0
		tr := new(trail)
		for i := 1; i <= 5*limit && first == 0; i++ {
			data := tt.label(i)
			if isNew := tr.add(data, g.hash(data)); isNew && tr.suspicious(limit) {
				first = i
			}
		}
		if first < tt.first-tt.within || first > tt.first+tt.within+tt.first/10 {
			t.Errorf("%s: suspicious at name %d, want %d", tt.what, first, tt.first)
		}
	}
}

// However many pairs of source and domain come, their number is bounded, and a tunnel
// is not forgotten for them.
func TestTunnelGuardIsBounded(t *testing.T) {
	clock := newClock()
	r := newResolver(t, Config{Decider: people, Now: clock.now, Upstreams: []string{"192.0.2.53"}, TunnelGuard: TunnelGuard{Mode: TunnelRefuse, UniqueNamesPerMinute: 8}}, nil)
	s := NewServer(r)
	g, d := s.tunnels, policy.Decision{Group: "g", Verdict: policy.Allow}
	busy := netip.MustParseAddr("192.0.2.1")
	refused := func(from int) (n int) {
		for i := range 20 {
			if g.refuses(policy.MustName(secret(from+i, 18)+".cdn.test"), &d, busy, false, clock.now()) {
				n++
			}
		}
		return n
	}
	refused(0)
	for i := range 4 * trailSets * trailWays {
		g.refuses(policy.MustName("www.cdn.test"), &d, netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), false, clock.now())
	}
	if n := refused(100); n != 20 {
		t.Errorf("a tunnel is forgotten: %d of 20 names are refused", n)
	}
	for _, name := range []string{"cdn.test", "test", "co.uk", "uk"} {
		if g.refuses(policy.MustName(name), &d, busy, false, clock.now()) {
			t.Errorf("%s is refused, which carries nothing", name)
		}
	}
}
