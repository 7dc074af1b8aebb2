package dnsfilter

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
)

const (
	defaultRecordTTL = time.Minute
	maxTTL           = 1<<31*time.Second - time.Second // RFC 2181, section 8
	maxChain         = 12                              // aliases followed for one question
)

// records are the operator's own, by owner and type.
type records map[policy.Name]map[uint16][]dns.RR

// parseRecords returns rs, or every mistake in them.
func parseRecords(rs []Record) (records, error) {
	all := make(records)
	var errs []error
	for i, r := range rs {
		name, rr, err := r.parse()
		if err != nil {
			errs = append(errs, fmt.Errorf("dns.records[%d]: %w", i, err))
			continue
		}
		if all[name] == nil {
			all[name] = make(map[uint16][]dns.RR)
		}
		t := rr.Header().Rrtype
		all[name][t] = append(all[name][t], rr)
		if n := len(all[name][dns.TypeCNAME]); n > 1 || n == 1 && len(all[name]) > 1 {
			errs = append(errs, fmt.Errorf("dns.records[%d]: %s has a CNAME and other records; a CNAME stands alone (RFC 1034, section 3.6.2)", i, name))
		}
	}
	for i, r := range rs {
		if name, err := policy.ParseName(r.Name); err == nil && strings.EqualFold(r.Type, "CNAME") && all.endless(name) {
			errs = append(errs, fmt.Errorf("dns.records[%d]: value: the aliases of %s lead in a circle, or are more than %d; let one lead to an address, or to a name without records", i, name, maxChain))
		}
	}
	return all, errors.Join(errs...)
}

// endless reports whether reply would give up on the aliases of name.
func (rs records) endless(name policy.Name) bool {
	for range maxChain {
		alias := rs[name][dns.TypeCNAME]
		if len(alias) == 0 {
			return false
		}
		name = policy.MustName(alias[0].(*dns.CNAME).Target) // as in reply
	}
	return rs[name] != nil
}

func (r Record) parse() (policy.Name, dns.RR, error) {
	name, err := policy.ParseName(r.Name)
	if err != nil {
		return name, nil, fmt.Errorf("name: %w", err)
	}
	ttl := r.TTL
	if ttl == 0 {
		ttl = defaultRecordTTL
	}
	if ttl < time.Second || ttl > maxTTL {
		return name, nil, fmt.Errorf("ttl: %v is not between 1s and %v", r.TTL, maxTTL)
	}
	if ttl%time.Second != 0 {
		return name, nil, fmt.Errorf("ttl: %v is not in whole seconds", r.TTL)
	}
	rr, err := parseValue(strings.ToUpper(r.Type), r.Value)
	if err != nil {
		return name, nil, err
	}
	h := rr.Header()
	h.Name, h.Class, h.Ttl = fqdn(name), dns.ClassINET, uint32(ttl/time.Second)
	h.Rrtype = dns.StringToType[strings.ToUpper(r.Type)]
	return name, rr, nil
}

// parseValue returns the record of a type with a value, without its owner.
func parseValue(typ, value string) (dns.RR, error) {
	switch typ {
	case "A", "AAAA":
		a, err := netip.ParseAddr(value)
		if err != nil || a.Zone() != "" || a.Is4() != (typ == "A") {
			return nil, fmt.Errorf("value: %q is no address for type %s", value, typ)
		}
		return addressRR("", a, 0), nil
	case "CNAME":
		target, err := parseTarget(value)
		return &dns.CNAME{Target: target}, err
	case "PTR":
		target, err := parseTarget(value)
		return &dns.PTR{Ptr: target}, err
	case "TXT":
		return &dns.TXT{Txt: splitText(value)}, nil
	case "SRV":
		return parseSRV(value)
	}
	return nil, fmt.Errorf("type: %q is none of A, AAAA, CNAME, TXT, PTR, SRV", typ)
}

func parseTarget(s string) (string, error) {
	name, err := policy.ParseName(s)
	if err != nil {
		return "", fmt.Errorf("value: %w", err)
	}
	return fqdn(name), nil
}

func parseSRV(value string) (dns.RR, error) {
	fields := strings.Fields(value)
	if len(fields) != 4 {
		return nil, fmt.Errorf(`value: %q is not "priority weight port target"`, value)
	}
	var n [3]uint16
	for i := range n {
		v, err := strconv.ParseUint(fields[i], 10, 16)
		if err != nil {
			return nil, fmt.Errorf("value: %q is not between 0 and 65535", fields[i])
		}
		n[i] = uint16(v)
	}
	target, err := parseTarget(fields[3])
	return &dns.SRV{Priority: n[0], Weight: n[1], Port: n[2], Target: target}, err
}

// splitText returns s as the strings of a TXT record, 255 bytes each at most
// (RFC 1035, section 3.3), escaped as miekg/dns holds them.
func splitText(s string) []string {
	var parts []string
	for {
		n := min(len(s), 255)
		parts = append(parts, strings.ReplaceAll(s[:n], `\`, `\\`))
		if s = s[n:]; s == "" {
			return parts
		}
	}
}

// reply answers for a name that has records, following aliases as long as they
// lead to other records; nil for other names. What h says about one of the names
// counts instead of its records.
func (rs records) reply(k key, h *hosts) *reply {
	sets, ok := rs[k.name]
	if !ok {
		return nil
	}
	rep := &reply{local: true}
	for range maxChain {
		if known := h.reply(k); known != nil {
			rep.answer = append(rep.answer, known.answer...)
			return rep
		}
		for _, rr := range sets[k.qtype] {
			rep.answer = append(rep.answer, dns.Copy(rr))
		}
		alias := sets[dns.TypeCNAME]
		if len(alias) == 0 || k.qtype == dns.TypeCNAME {
			return rep
		}
		rep.answer = append(rep.answer, dns.Copy(alias[0]))
		target := alias[0].(*dns.CNAME).Target
		k.name = policy.MustName(target) // parseTarget made it from a Name
		if sets, ok = rs[k.name]; !ok {
			rep.next = k.name
			return rep
		}
	}
	return &reply{local: true, rcode: dns.RcodeServerFailure, ede: dns.ExtendedErrorCodeNoReachableAuthority, err: fmt.Errorf("records: aliases of %s form a loop", k.name)}
}

// fqdn returns n as miekg/dns spells names.
func fqdn(n policy.Name) string { return n.String() + "." }
