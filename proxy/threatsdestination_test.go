package proxy

import (
	"fmt"
	"net/http"
	"net/netip"
	"testing"

	"sallyport/policy"
)

// leads points api.ok.test at addrs and asks for it, as a CONNECT and as a plain
// request: after one look-up each it must be refused for that reason, and nothing
// be dialled.
func (tr *trial) leads(reason policy.Reason, addrs ...string) {
	tr.t.Helper()
	tr.resolver.set("api.ok.test", addrs...)
	for _, head := range []string{connectHead(tr.at("api.ok.test")), getHead(tr.at("api.ok.test"))} {
		asked := tr.resolver.asked.Load()
		ev := tr.one(fmt.Sprint(addrs), policy.Deny, reason, func() {
			c := tr.dial()
			defer c.Close()
			c.send("%s", head)
			if resp, _ := c.response(http.MethodGet); resp.StatusCode != 403 || resp.Header.Get("X-Sallyport-Reason") != reason.String() {
				tr.t.Errorf("%v: %s %v", addrs, resp.Status, resp.Header)
			}
		})
		if n := tr.resolver.asked.Load() - asked; n != 1 {
			tr.t.Errorf("%v: %d look-ups", addrs, n)
		}
		if ev.Destination.IsValid() || ev.ConnTime != 0 || len(tr.far.conns) != 0 {
			tr.t.Errorf("%v: a connection was made: %+v", addrs, ev)
		}
	}
}

// anywhere allows names of .ok.test on port, and no private destinations.
func anywhere(port int) string {
	return fmt.Sprintf("version: 1\ngroups:\n  - {name: g, sources: [127.0.0.0/8], allow: [{names: [.ok.test], ports: [%d]}]}\n", port)
}

// TestT35SpecialDestinations tries the ends of every block that is not global.
func TestT35SpecialDestinations(t *testing.T) {
	tr := tryPolicy(t, anywhere)
	for _, block := range []string{
		// https://www.iana.org/assignments/iana-ipv4-special-registry, multicast, reserved
		"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
		"192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32",
		// https://www.iana.org/assignments/iana-ipv6-special-registry, multicast, not allocated
		"::/128", "::1/128", "100::/64", "100:0:0:1::/64", "2001::/32", "2001:2::/48", "2001:10::/28", "2001:20::/28", "2001:db8::/32", "2002::/16", "3fff::/20", "4000::/3", "5f00::/16",
		"6000::/3", "8000::/3", "c000::/3", "e000::/4", "f000::/5", "f800::/6", "fc00::/7", "fe00::/9", "fe80::/10", "fec0::/10", "ff00::/8", "200::/7", "400::/6", "800::/5", "1000::/4",
	} {
		p := netip.MustParsePrefix(block)
		tr.leads(policy.ReasonPrivateDestination, p.Masked().Addr().String())
		tr.leads(policy.ReasonPrivateDestination, last(p).String())
	}
	for _, a := range []string{"169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200", "fd00:ec2::254", "192.0.0.192", "168.63.129.16", "127.0.0.53", "10.96.0.1"} {
		tr.leads(policy.ReasonPrivateDestination, a)
	}
}

// last returns the last address of p.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// TestT36EmbeddedIPv4 hides private IPv4 addresses in IPv6, in every way there is.
func TestT36EmbeddedIPv4(t *testing.T) {
	tr := tryPolicy(t, anywhere)
	for _, inner := range []string{"127.0.0.1", "10.0.0.1", "169.254.169.254", "192.168.1.1", "0.0.0.0", "224.0.0.1", "168.63.129.16"} {
		four := netip.MustParseAddr(inner).As4()
		six := func(prefix string, at int) string { // the address with four's bytes there
			b := netip.MustParseAddr(prefix).As16()
			copy(b[at:], four[:])
			return netip.AddrFrom16(b).String()
		}
		inverted := netip.MustParseAddr("2001::").As16() // Teredo hides the client's address inverted (RFC 4380)
		for i, b := range four {
			inverted[12+i] = ^b
		}
		for _, a := range []string{
			"::ffff:" + inner, six("::ffff:0:0", 12), "::" + inner, six("::ffff:0:0:0", 12), six("64:ff9b::", 12), six("64:ff9b:1::", 12), six("64:ff9b:1:7f00::", 6),
			six("2002::", 2), six("2001::", 4), netip.AddrFrom16(inverted).String(),
			six("2606:4700::5efe:0:0", 12), six("2606:4700::200:5efe:0:0", 12), six("fe80::5efe:0:0", 12), six("2a00:1450:4001:800:0:5efe:0:0", 12),
		} {
			tr.leads(policy.ReasonPrivateDestination, a)
		}
	}
	// An embedded address is one of its IPv4 network for deny rules too.
	tr = tryPolicy(t, func(port int) string {
		return anywhere(port) + "deny: [{addresses: [93.184.216.0/24]}]\n"
	})
	for _, a := range []string{"93.184.216.34", "::ffff:93.184.216.34", "64:ff9b::5db8:d822", "2606:4700::5efe:5db8:d822"} {
		tr.leads(policy.ReasonExplicitDeny, a)
	}
}

// TestT37NothingPublicLeft has answers of which no part may be dialled, and an
// upstream that would say something else if it were asked again.
func TestT37NothingPublicLeft(t *testing.T) {
	tr := tryPolicy(t, anywhere)
	tr.leads(policy.ReasonPrivateDestination, "127.0.0.1", "10.0.0.1", "::1", "fe80::1", "::ffff:192.168.0.1")
	tr.leads(policy.ReasonPrivateDestination, "127.0.0.1", "127.0.0.1", "127.0.0.1")
}

// TestT39PlatformEndpoints are out of reach even where a wildcard and a wide prefix
// would cover them; only a rule that names them exactly opens them.
func TestT39PlatformEndpoints(t *testing.T) {
	tr := tryPolicy(t, func(port int) string {
		return fmt.Sprintf(`
version: 1
groups:
  - name: g
    sources: [127.0.0.0/8]
    allow:
      - {names: ["*"], allow_public_suffix: true, ports: [%[1]d], private_destinations: [0.0.0.0/0, "::/0"]}
      - {names: ["*.internal", "*.com", "*.net", "*.arpa"], allow_public_suffix: true, ports: [%[1]d], private_destinations: [10.0.0.0/8]}
`, port)
	})
	for _, name := range []string{
		"metadata.google.internal", "METADATA.google.internal.", "metadata.goog", "metadata", "instance-data", "instance-data.ec2.internal", "metadata.azure.internal",
		"metadata.tencentyun.com", "metadata.platformequinix.com", "use-application-dns.net", "_dns.resolver.arpa", "resolver.arpa", "mask.icloud.com", "mask-h2.icloud.com",
	} {
		tr.denied(connectHead(tr.at(name)), 403, policy.ReasonExplicitDeny)
		tr.denied(getHead(tr.at(name)), 403, policy.ReasonExplicitDeny)
	}
	for _, a := range []string{
		"169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16",
		"::ffff:169.254.169.254", "::ffff:168.63.129.16",
	} {
		tr.leads(policy.ReasonPrivateDestination, a)
	}
	// A cluster's service addresses and the host's gateway are private like any other.
	tr = tryPolicy(t, anywhere)
	for _, a := range []string{"10.96.0.1", "172.17.0.1", "192.168.65.2", "10.0.2.2"} {
		tr.leads(policy.ReasonPrivateDestination, a)
	}
}

// TestT41NoSearchDomains asks for a name of one label as it is, once.
func TestT41NoSearchDomains(t *testing.T) {
	tr := tryPolicy(t, func(port int) string {
		return fmt.Sprintf("version: 1\ngroups:\n  - {name: g, sources: [127.0.0.0/8], allow: [{names: [intranet, localhost], ports: [%d]}]}\n", port)
	})
	tr.resolver.set("intranet.ok.test", "127.0.0.1")
	asked := tr.resolver.asked.Load()
	tr.one("single label", policy.Deny, policy.ReasonResolveFailed, func() {
		if status, _, _ := tr.refused(tr.at("intranet")); status != 502 {
			t.Error(status)
		}
	})
	if n := tr.resolver.asked.Load() - asked; n != 1 {
		t.Errorf("%d look-ups", n)
	}
	// What the hosts file calls localhost is a private destination like any other.
	tr.resolver.set("localhost", "127.0.0.1", "::1")
	tr.one("localhost", policy.Deny, policy.ReasonPrivateDestination, func() {
		if status, _, _ := tr.refused(tr.at("localhost")); status != 403 {
			t.Error(status)
		}
	})
	// Nor does a listed name open the names a search domain would make of it.
	tr.denied(connectHead(tr.at("intranet.evil.test")), 403, policy.ReasonNotListed)
	tr.denied(connectHead(tr.at("api")), 403, policy.ReasonNotListed)
}
