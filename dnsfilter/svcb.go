package dnsfilter

import (
	"net"
	"net/netip"
	"slices"

	"github.com/miekg/dns"
)

// serviceBinding returns the SVCB part of an HTTPS or SVCB record, or nil.
func serviceBinding(rr dns.RR) *dns.SVCB {
	switch rr := rr.(type) {
	case *dns.SVCB:
		return rr
	case *dns.HTTPS:
		return &rr.SVCB
	}
	return nil
}

// stripECH removes the ech parameter (RFC 9848) and reports whether there was one.
func stripECH(rr *dns.SVCB) bool { return removeParam(rr, dns.SVCB_ECHCONFIG) }

// removeParam removes a parameter, and its key from the list of those that clients
// must understand: they would discard the record for lack of it (RFC 9460, section 8).
func removeParam(rr *dns.SVCB, key dns.SVCBKey) bool {
	n := len(rr.Value)
	rr.Value = slices.DeleteFunc(rr.Value, func(kv dns.SVCBKeyValue) bool { return kv.Key() == key })
	if len(rr.Value) == n {
		return false
	}
	rr.Value = slices.DeleteFunc(rr.Value, func(kv dns.SVCBKeyValue) bool {
		m, ok := kv.(*dns.SVCBMandatory)
		if !ok {
			return false
		}
		m.Code = slices.DeleteFunc(m.Code, func(k dns.SVCBKey) bool { return k == key })
		return len(m.Code) == 0
	})
	return true
}

// filterHints removes the address hints that do not pass and reports whether
// there were any.
func filterHints(rr *dns.SVCB, passes func(netip.Addr) bool) bool {
	changed := false
	filter := func(hints []net.IP) []net.IP {
		return slices.DeleteFunc(hints, func(ip net.IP) bool {
			a, _ := netip.AddrFromSlice(ip)
			drop := !passes(a.Unmap())
			changed = changed || drop
			return drop
		})
	}
	for _, kv := range slices.Clone(rr.Value) { // removeParam works on rr.Value
		switch hint := kv.(type) {
		case *dns.SVCBIPv4Hint:
			if hint.Hint = filter(hint.Hint); len(hint.Hint) == 0 {
				changed = removeParam(rr, dns.SVCB_IPV4HINT) || changed
			}
		case *dns.SVCBIPv6Hint:
			if hint.Hint = filter(hint.Hint); len(hint.Hint) == 0 {
				changed = removeParam(rr, dns.SVCB_IPV6HINT) || changed
			}
		}
	}
	return changed
}
