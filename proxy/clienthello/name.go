package clienthello

import "bytes"

const (
	maxNameLen  = 253 // RFC 1035, section 2.3.4, as text without the final dot
	maxLabelLen = 63
	nameTypeDNS = 0 // host_name, the only NameType there ever was
)

// readServerName reads a ServerNameList (RFC 6066, section 3). The list could
// hold several names; servers differ in which one they take, so one it is.
func readServerName(data vector) (string, error) {
	list, ok := data.vector16()
	if !ok || len(data) != 0 || len(list) == 0 {
		return "", malformed("server_name list")
	}
	kind, _ := list.take(1)
	if kind[0] != nameTypeDNS {
		return "", malformed("server_name of another type than host_name")
	}
	name, ok := list.vector16()
	if !ok || len(name) == 0 {
		return "", malformed("server_name list")
	}
	if len(list) != 0 {
		return "", malformed("server_name list of more than one name")
	}
	return readHostName(name)
}

// readHostName returns name in lower case, if it has the form of a DNS name.
func readHostName(name []byte) (string, error) {
	if len(name) > maxNameLen {
		return "", malformed("host_name too long")
	}
	var lower [maxNameLen]byte
	label := 0 // length of the current label so far
	for i, c := range name {
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
		case c == '.':
			if label == 0 {
				return "", malformed("host_name with an empty label")
			}
			label = -1
		default:
			return "", malformed("host_name with a byte that is no letter, digit, hyphen, underscore or dot")
		}
		lower[i] = c
		if label++; label > maxLabelLen {
			return "", malformed("host_name with a label too long")
		}
	}
	if label == 0 {
		return "", malformed("host_name with a final dot")
	}
	folded := lower[:len(name)]
	if isNumber(folded[bytes.LastIndexByte(folded, '.')+1:]) {
		return "", malformed("host_name is an IP address")
	}
	return string(folded), nil
}

// isNumber reports whether inet_aton, and with it some resolvers, would take a
// name that ends in this label for an IPv4 address: 192.0.2.1, 0xc0000201, 127.1.
// No top-level domain looks like that (RFC 3696, section 2).
func isNumber(label []byte) bool {
	digits, hex := bytes.CutPrefix(label, []byte("0x"))
	for _, c := range digits {
		if (c < '0' || '9' < c) && (!hex || c < 'a' || 'f' < c) {
			return false
		}
	}
	return true
}
