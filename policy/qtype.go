package policy

import (
	"strconv"
	"strings"
)

// qtypes are the DNS types that rules may name, by mnemonic (IANA DNS parameters).
// ANY, AXFR, IXFR and the other meta-types are not among them: nothing allows those.
var qtypes = map[string]uint16{
	"A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "PTR": 12, "HINFO": 13, "MX": 15, "TXT": 16,
	"AAAA": 28, "LOC": 29, "SRV": 33, "NAPTR": 35, "CERT": 37, "DNAME": 39, "DS": 43,
	"SSHFP": 44, "RRSIG": 46, "NSEC": 47, "DNSKEY": 48, "TLSA": 52, "SMIMEA": 53,
	"OPENPGPKEY": 61, "SVCB": 64, "HTTPS": 65, "SPF": 99, "URI": 256, "CAA": 257,
}

// ParseQType returns the DNS type called s: a mnemonic in any case, or TYPEn
// (RFC 3597, section 5). Meta-types (OPT, 128 to 255) are not types of data and
// are refused.
func ParseQType(s string) (uint16, bool) {
	s = strings.ToUpper(s)
	if t, ok := qtypes[s]; ok {
		return t, true
	}
	n, ok := strings.CutPrefix(s, "TYPE")
	t, err := strconv.ParseUint(n, 10, 16)
	if !ok || err != nil || t == 0 || t == 41 || t >= 128 && t <= 255 {
		return 0, false
	}
	return uint16(t), true
}
