package policy

import (
	"net/netip"

	"github.com/gaissmai/bart"
)

// special holds the blocks that are not globally reachable unicast space: those
// without "globally reachable: true" in the IANA special-purpose address
// registries (RFC 6890, read 2026-11), multicast, and what is reserved.
var special = prefixTable(
	// https://www.iana.org/assignments/iana-ipv4-special-registry
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
	"172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
	"198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
	"168.63.129.16/32", // public space, but Azure's platform address on every virtual machine
	// https://www.iana.org/assignments/iana-ipv6-special-registry; outside 2000::/3
	// only NAT64's well-known prefix is globally reachable, see embedded.
	"::/3", "4000::/2", "8000::/1",
	"2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
)

func prefixTable(prefixes ...string) *bart.Lite {
	t := new(bart.Lite)
	for _, s := range prefixes {
		t.Insert(netip.MustParsePrefix(s))
	}
	return t
}

// nat64 is the well-known prefix of RFC 6052: globally reachable if the embedded
// IPv4 address is.
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// IsGlobal reports whether a is a globally reachable unicast address: outside the
// special-purpose blocks of IANA's registries, with IPv4 addresses embedded in
// IPv6 (mapped, NAT64, ISATAP) held to the same. Other embeddings (6to4, Teredo,
// IPv4-compatible, IPv4-translated, local-use NAT64) are never global.
func IsGlobal(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if !a.IsValid() {
		return false
	}
	if inner, ok := embedded(a); ok {
		return IsGlobal(inner) && (nat64.Contains(a) || !special.Contains(a))
	}
	return !special.Contains(a)
}

// embedded returns the IPv4 address that a stands for or leads to, for the
// embeddings that can be global: NAT64's well-known prefix, and ISATAP interface
// identifiers (RFC 5214, section 6.1), universal bit set or not.
func embedded(a netip.Addr) (netip.Addr, bool) {
	if !a.Is6() {
		return netip.Addr{}, false
	}
	b := a.As16()
	if nat64.Contains(a) || b[8]&^2 == 0 && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe {
		return netip.AddrFrom4([4]byte(b[12:])), true
	}
	return netip.Addr{}, false
}

// whollySpecial reports whether every address of pfx is outside global space.
func whollySpecial(pfx netip.Prefix) bool { return special.LookupPrefix(pfx) }
