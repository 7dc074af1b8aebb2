package dnsfilter

import (
	"fmt"
	"net/netip"
	"slices"

	"sallyport/policy"
)

// PrivateZone reports whether name is in a zone whose PrivateDestinations hold a: the
// operator expects such addresses there, whatever an alias of the name leads through.
// It goes into policy.Request.PrivateZone; the policy decides. The longest zone counts
// alone, and without PrivateDestinations the answer is no.
func (r *Resolver) PrivateZone(name policy.Name, a netip.Addr) bool {
	if !r.privateZones || name.IsZero() {
		return false
	}
	a = a.Unmap().WithZone("")
	return slices.ContainsFunc(r.poolFor(name).private, func(p netip.Prefix) bool { return p.Contains(a) })
}

// PrivateZone is the method of that name of a Resolver with c; no if c has mistakes.
// It reads no files and sends nothing.
func (c Config) PrivateZone(name policy.Name, a netip.Addr) bool {
	r, err := parse(c)
	return err == nil && r.PrivateZone(name, a)
}

// checkPrivate says what is wrong with p as one of Zone.PrivateDestinations.
func checkPrivate(p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return fmt.Errorf("no prefix; write one such as 10.0.0.0/8")
	case p.Bits() == 0:
		return fmt.Errorf("%v is every address; write the prefixes of the zone's hosts", p)
	case p.Addr().Is4In6():
		return fmt.Errorf("%v is IPv4 in IPv6; write it as IPv4", p)
	}
	return nil
}
