package policy

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// TestIndifferent: an address that is indifferent changes no decision, and others do.
func TestIndifferent(t *testing.T) {
	p, _, err := Load("policy.yaml", []byte(`
version: 1
unmatched_source: open
deny:
  - {addresses: [203.0.114.0/24, "2600:bad::/32"]}
groups:
  - name: strict
    sources: [10.0.0.0/8]
    allow:
      - .ok.test
      - {names: [inside.test], private_destinations: [10.0.0.0/8, 198.41.0.0/24]}
      - {addresses: [198.41.0.4]}
    deny: [{addresses: [8.8.8.0/24]}]
  - name: open
    mode: observe
    observe_until: 2027-01-01
    allow: [.ok.test]
`), Options{})
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(3, 4))
	some := []string{"10.1.2.3", "198.41.0.4", "198.41.0.5", "8.8.8.8", "203.0.114.7", "127.0.0.1", "169.254.169.254", "100.64.0.1",
		"2600::1", "2600:bad::1", "64:ff9b::808:808", "64:ff9b::5db8:d822", "2600::5efe:808:808", "::ffff:8.8.8.8", "::ffff:93.184.216.34", "fe80::1%eth0", "::1"}
	indifferent, changed := 0, 0
	for range 20_000 {
		a := netip.MustParseAddr(some[random.IntN(len(some))])
		switch random.IntN(4) {
		case 0:
			a = netip.AddrFrom4([4]byte{byte(random.Uint32()), byte(random.Uint32()), 0, 1})
		case 1:
			a = netip.AddrFrom16([16]byte{0x20 | byte(random.Uint32()&15), byte(random.Uint32()), 15: 1})
		}
		r := Request{
			Source:   netip.MustParseAddr([]string{"10.0.0.1", "192.0.2.1"}[random.IntN(2)]),
			Name:     MustName([]string{"a.ok.test", "inside.test", "other.test"}[random.IntN(3)]),
			Protocol: ProtocolDNS, QType: 1, PrivateZone: random.IntN(2) == 0,
			Time: time.Date(2026, 12, 31, 23, 0, 0, 0, time.UTC).Add(time.Duration(random.IntN(2)) * 24 * time.Hour),
		}
		without := p.Decide(r)
		r.Destination = a
		with := p.Decide(r)
		if p.Indifferent(a) {
			indifferent++
			if with != without {
				t.Fatalf("%+v: %+v, without the address %+v", r, with, without)
			}
		} else if with != without {
			changed++
		}
	}
	if indifferent < 1000 || changed < 1000 {
		t.Errorf("%d indifferent, %d change a decision", indifferent, changed)
	}
}
