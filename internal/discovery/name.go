package discovery

import (
	"net/netip"
	"strconv"
	"strings"

	"sallyport/policy"
)

// maxName bounds a name that is remembered, in bytes.
const maxName = 255

// canonical returns s as it is remembered, in buf or as it is: in small letters and
// without a final dot. What cannot be a part of a name or an address is escaped, and
// what is too long is cut. It allocates only for those.
func canonical(s string, buf *[maxName]byte) []byte {
	if len(s) > 1 && s[len(s)-1] == '.' {
		s = s[:len(s)-1]
	}
	if len(s) > maxName {
		return escaped(s, buf)
	}
	for i := 0; i < len(s); i++ {
		c := plainByte[s[i]]
		if c == 0 {
			return escaped(s, buf)
		}
		buf[i] = c
	}
	return buf[:len(s)]
}

// plainByte has what becomes of a byte of a name or an address; 0: it is part of neither.
var plainByte = func() (t [256]byte) {
	for _, c := range []byte("abcdefghijklmnopqrstuvwxyz0123456789-_.:") {
		t[c] = c
	}
	for c := byte('A'); c <= 'Z'; c++ {
		t[c] = c | 0x20
	}
	return t
}()

// escaped is canonical for what is neither a plain name nor an address.
func escaped(s string, buf *[maxName]byte) []byte {
	if len(s) <= 4*maxName {
		if n, err := policy.ParseName(s); err == nil { // U-labels
			return buf[:copy(buf[:], n.String())]
		}
	}
	const ellipsis = "..."
	out := buf[:0]
	for i := 0; i < len(s); i++ {
		var e string
		switch c := s[i]; {
		case c == '\\':
			e = `\\`
		case c >= ' ' && c <= '~':
			e = s[i : i+1]
		default:
			const digits = "0123456789abcdef"
			e = string([]byte{'\\', 'x', digits[c>>4], digits[c&15]})
		}
		if len(out)+len(e) > maxName-len(ellipsis) {
			return append(out, ellipsis...)
		}
		out = append(out, e...)
	}
	return out
}

// isStrange reports whether s, which is canonical, is neither a name nor an address.
func isStrange(s string) bool {
	if _, err := netip.ParseAddr(s); err == nil {
		return strings.Contains(s, "%")
	}
	n, err := policy.ParseName(s)
	return err != nil || n.String() != s
}

// qtypeOf returns the number of the type named s; 0 for those that every rule covers.
func qtypeOf(s string) uint16 {
	switch s {
	case "A", "AAAA", "HTTPS", "SVCB", "CNAME", "":
		return 0
	}
	if t, ok := policy.ParseQType(s); ok {
		return t
	}
	// Those that no rule can allow, such as ANY, have no number there.
	return qtypeOther
}

// qtypeOther stands for every type that no rule can allow. It is the number of ANY, one of them.
const qtypeOther = 255

// qtypeName is the reverse of qtypeOf.
func qtypeName(t uint16) string {
	switch t {
	case 0:
		return ""
	case qtypeOther:
		return "other"
	}
	if name, ok := qtypeNames[t]; ok {
		return name
	}
	return "TYPE" + strconv.Itoa(int(t))
}

// qtypeNames has the names of the types that policy knows by name.
var qtypeNames = func() map[uint16]string {
	names := map[uint16]string{}
	for _, s := range []string{"NS", "SOA", "PTR", "HINFO", "MX", "TXT", "LOC", "SRV", "NAPTR", "CERT", "DNAME", "DS", "SSHFP",
		"RRSIG", "NSEC", "DNSKEY", "TLSA", "SMIMEA", "OPENPGPKEY", "SPF", "URI", "CAA"} {
		if t, ok := policy.ParseQType(s); ok {
			names[t] = s
		}
	}
	return names
}()
