package dnsfilter

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/miekg/dns"

	"sallyport/policy"
)

// healthTTL of Config.HealthName, in seconds: who asks wants to know now.
const healthTTL = 1

// addLocal adds the health name to the records, and takes over the search domains.
func (r *Resolver) addLocal() error {
	var errs []error
	for i, s := range r.cfg.SearchDomains {
		name, err := policy.ParseName(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("dns.search_domains[%d]: %w", i, err))
		}
		r.search = append(r.search, name)
	}
	if r.cfg.HealthName == "" {
		return errors.Join(errs...)
	}
	name, err := policy.ParseName(r.cfg.HealthName)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("dns.health_name: %w", err))...)
	}
	if r.records[name] != nil {
		return errors.Join(append(errs, fmt.Errorf("dns.health_name: %s has records; write another name", name))...)
	}
	r.health = name
	r.records[name] = map[uint16][]dns.RR{
		dns.TypeA:    {addressRR(fqdn(name), netip.AddrFrom4([4]byte{127, 0, 0, 1}), healthTTL)},
		dns.TypeAAAA: {addressRR(fqdn(name), netip.IPv6Loopback(), healthTTL)},
		dns.TypeTXT:  {&dns.TXT{Hdr: dns.RR_Header{Name: fqdn(name), Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: healthTTL}, Txt: []string{"ok"}}},
	}
	return errors.Join(errs...)
}

// canaries are what networks answer in a certain way to say that encrypted DNS and
// relays around their resolver are not wanted. A refusal in another form is not
// understood: Mozilla's canary domain, Discovery of Designated Resolvers (RFC 9462,
// section 6.4), Apple's iCloud Private Relay.
var canaries = map[string]Denial{
	"use-application-dns.net": DenyNXDomain,
	"_dns.resolver.arpa":      DenyNodata,
	"mask.icloud.com":         DenyNXDomain,
	"mask-h2.icloud.com":      DenyNXDomain,
}

// denial returns how a query for name, which d denies, is refused: as Config.Deny
// says, but for names that have a form of their own.
func (r *Resolver) denial(name policy.Name, d policy.Decision) Denial {
	return r.denialOf([]byte(name.String()), d.Reason)
}

// denialOf is denial for the text of a name, empty for none, and the reason.
func (r *Resolver) denialOf(name []byte, reason policy.Reason) Denial {
	if reason == policy.ReasonLimitExceeded {
		return DenyRefused // nothing is said about the name
	}
	unlisted := reason == policy.ReasonNotListed
	if len(name) == 0 || !unlisted && reason != policy.ReasonExplicitDeny {
		return r.cfg.Deny
	}
	if c, ok := canaries[string(name)]; ok {
		return c
	}
	if unlisted && slices.ContainsFunc(r.search, func(s policy.Name) bool { return below(name, s.String()) }) {
		return DenyNXDomain
	}
	return r.cfg.Deny
}

// below reports whether name is suffix or a name below it.
func below(name []byte, suffix string) bool {
	n := len(name) - len(suffix)
	return n >= 0 && string(name[n:]) == suffix && (n == 0 || name[n-1] == '.')
}
