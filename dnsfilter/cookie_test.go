package dnsfilter

import (
	"encoding/hex"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The first vectors of SipHash-2-4's reference implementation.
func TestSipHash(t *testing.T) {
	var key [16]byte
	var p []byte
	for i := range key {
		key[i] = byte(i)
	}
	for i, want := range []uint64{0x726fdb47dd0e0e31, 0x74f839c593dc67fd, 0x0d6c8009d9a94f5a, 0x85676696d7fb7e2d,
		0xcf2794e0277187b7, 0x18765564cd99a68d, 0xcbc9466e58fee3ce, 0xab0200f58b01d137, 0x93f5f5799a932462} {
		if got := sipHash(&key, p); got != want {
			t.Errorf("of %d bytes: %x, want %x", i, got, want)
		}
		p = append(p, byte(i))
	}
}

// The examples of RFC 9018, appendix A: other servers make the same cookies.
func TestCookiesInteroperate(t *testing.T) {
	for _, tt := range []struct {
		name, secret, previous, from, got, want string
		at                                      int64
		proven                                  bool
	}{
		{"A.1 a new one", "e5e973e5a6b2a43f48e7dc849e37bfcf", "", "198.51.100.100",
			"2464c4abcf10c957", "2464c4abcf10c957010000005cf79f111f8130c3eee29480", 0x5cf79f11, false},
		{"A.1 again", "e5e973e5a6b2a43f48e7dc849e37bfcf", "", "198.51.100.100",
			"2464c4abcf10c957010000005cf79f111f8130c3eee29480", "2464c4abcf10c957010000005cf79f111f8130c3eee29480", 0x5cf79f11 + 60, true},
		{"A.2 after half an hour", "e5e973e5a6b2a43f48e7dc849e37bfcf", "", "198.51.100.100",
			"2464c4abcf10c957010000005cf79f111f8130c3eee29480", "2464c4abcf10c957010000005cf7a871d4a564a1442aca77", 0x5cf7a871, true},
		{"A.4 with the last secret", "445536bcd2513298075a5d379663c962", "dd3bdf9344b678b185a6f5cb60fca715", "2001:db8:220:1:59de:d0f4:8769:82b8",
			"22681ab97d52c298010000005cf7c57926556bd0934c72f8", "22681ab97d52c298010000005cf7c609a6bb79d16625507a", 0x5cf7c609, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &secrets{born: time.Unix(tt.at, 0)}
			copy(s.current[:], unhex(t, tt.secret))
			copy(s.previous[:], unhex(t, tt.previous))
			var c cookies
			c.secrets.Store(s)
			var made [cookieSize]byte
			proven := c.proven(unhex(t, tt.got), netip.MustParseAddr(tt.from), time.Unix(tt.at, 0))
			c.answer(&made, unhex(t, tt.got), netip.MustParseAddr(tt.from), time.Unix(tt.at, 0))
			if proven != tt.proven || hex.EncodeToString(made[:]) != tt.want {
				t.Errorf("answer() = %x, %v; want %s, %v", made, proven, tt.want, tt.proven)
			}
		})
	}
}

func TestCookiesProveAnAddressForAWhile(t *testing.T) {
	clock := newClock()
	var c cookies
	var first, made [cookieSize]byte
	home, other := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	c.answer(&first, []byte("client08"), home, clock.now())
	forged := first
	forged[23] ^= 1
	version := first
	version[8] = 2
	for _, tt := range []struct {
		name   string
		got    []byte
		from   netip.Addr
		after  time.Duration
		proven bool
	}{
		{"at once", first[:], home, 0, true},
		{"somebody else's", first[:], other, 0, false},
		{"forged", forged[:], home, 0, false},
		{"another version", version[:], home, 0, false},
		{"the client's alone", first[:8], home, 0, false},
		{"longer", append(first[:], 0), home, 0, false},
		{"within the hour", first[:], home, time.Hour, true},
		{"after it", first[:], home, time.Hour + time.Second, false},
		{"a little before it was made", first[:], home, -5 * time.Minute, true},
		{"long before", first[:], home, -5*time.Minute - time.Second, false},
	} {
		if got := c.proven(tt.got, tt.from, clock.now().Add(tt.after)); got != tt.proven {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.proven)
		}
	}
	// A secret goes, what was made with it is good for as long as it would have been.
	clock.advance(secretLife - time.Minute)
	c.answer(&first, []byte("client08"), home, clock.now())
	clock.advance(2 * time.Minute)
	if before := c.secrets.Load(); !c.proven(first[:], home, clock.now()) || c.secrets.Load() == before {
		t.Error("a cookie of the last secret is no good, or the secret stays")
	}
	if c.answer(&made, first[:], home, clock.now()); made == first || !c.proven(made[:], home, clock.now()) {
		t.Error("no cookie of the new secret is made")
	}
	clock.advance(secretLife)
	if c.proven(first[:], home, clock.now()) {
		t.Error("a cookie of a day ago is good")
	}
}

// RFC 7873, section 5.2: over UDP and TCP, for answers and refusals.
func TestCookiesAreAnswered(t *testing.T) {
	b := start(t, Config{Decider: people, Cache: Cache{Size: mib}}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	cookie := func(m *dns.Msg) (all []string) {
		for _, o := range m.IsEdns0().Option {
			if c, ok := o.(*dns.EDNS0_COOKIE); ok {
				all = append(all, c.Cookie)
			}
		}
		return all
	}
	ask := func(network, name string, sent ...string) *dns.Msg {
		q := withEDNS(question(name, dns.TypeA))
		for _, s := range sent {
			q.IsEdns0().Option = append(q.IsEdns0().Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: s})
		}
		return b.ask(t, alice, network, q)
	}
	const mine = "0102030405060708"
	for _, network := range []string{"udp", "tcp"} {
		for _, name := range []string{"api.ok.test.", "evil.test."} {
			for range 2 { // from the upstream, and from the cache
				got := cookie(ask(network, name, mine))
				if len(got) != 1 || len(got[0]) != 2*cookieSize || got[0][:16] != mine {
					t.Fatalf("%s over %s: cookies %q", name, network, got)
				}
				if again := cookie(ask(network, name, got[0])); len(again) != 1 || again[0] != got[0] {
					t.Errorf("%s over %s: cookies %q, want %q again", name, network, again, got)
				}
				if first := cookie(ask(network, name, mine, "0000")); len(first) != 1 || first[0][:16] != mine {
					t.Errorf("%s over %s: of two cookies %q", name, network, first)
				}
			}
			for _, bad := range []string{"", "01020304050607", mine + "01", mine + "01020304050607", mine + mine + mine + mine + mine + "01"} {
				if m := ask(network, name, bad); m.Rcode != dns.RcodeFormatError || len(cookie(m)) > 0 || len(m.Answer) > 0 {
					t.Errorf("a cookie of %d bytes over %s: %v", len(bad)/2, network, m)
				}
			}
		}
	}
	if o := b.last().IsEdns0(); len(o.Option) > 0 {
		t.Errorf("the upstream was sent options: %v", o)
	}
}
