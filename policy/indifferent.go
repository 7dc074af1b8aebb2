package policy

import "net/netip"

// Indifferent reports whether a request for a name that passes without a Destination passes
// with a just the same, whatever the request: a is globally reachable, no other
// address is in it, and no rule names it. Who has decided on the name need not decide again then.
func (p *Policy) Indifferent(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if _, leads := embedded(a); leads || !IsGlobal(a) {
		return false
	}
	_, ruled := p.addresses.Lookup(a)
	return !ruled
}
