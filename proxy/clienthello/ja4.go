package clienthello

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
)

const (
	ja4Len     = 36 // t13d1516h2_8daaf6152771_e5627efa2ab1
	ja4HashLen = 12 // hexadecimal digits kept of each SHA-256
)

// JA4 returns the JA4 TLS client fingerprint after FoxIO's specification, such
// as "t13d1516h2_8daaf6152771_e5627efa2ab1": transport, version, whether there
// is an SNI, number of cipher suites and of extensions, first protocol; then the
// hash of the suites, and that of extensions and signature algorithms. It names
// the client's TLS library, which an attacker may imitate: a hint for people,
// not an identity. It is computed anew at each call.
func (h *Hello) JA4() string {
	suites := withoutGREASE(h.cipherSuites)
	extensions := h.extensionIDs()

	out := make([]byte, 0, ja4Len)
	out = append(out, 't') // TLS over TCP
	out = append(out, h.ja4Version()...)
	if slices.Contains(extensions, extServerName) {
		out = append(out, 'd')
	} else {
		out = append(out, 'i')
	}
	out = appendCount(out, len(suites))
	out = appendCount(out, len(extensions))
	out = h.appendJA4Protocol(out)

	slices.Sort(suites)
	out = append(out, '_')
	out = appendHash(out, appendList(nil, suites))

	// SNI and ALPN are in the first part, so that the last stays the same
	// wherever the client goes.
	extensions = slices.DeleteFunc(extensions, func(id uint16) bool {
		return id == extServerName || id == extALPN
	})
	slices.Sort(extensions)
	text := appendList(nil, extensions)
	data, _ := h.extension(extSignatureAlgorithms)
	algorithms, _ := data.vector16()
	if list := withoutGREASE(algorithms); len(list) > 0 {
		text = appendList(append(text, '_'), list) // in the client's order
	}
	out = append(out, '_')
	return string(appendHash(out, text))
}

// ja4Version returns the version part: of supported_versions the highest number,
// whatever it means, else the legacy_version.
func (h *Hello) ja4Version() string {
	version := h.legacyVersion
	if data, ok := h.extension(extSupportedVersions); ok {
		list, _ := data.vector8()
		version = 0
		for _, offered := range withoutGREASE(list) {
			version = max(version, offered)
		}
	}
	switch version {
	case 0x0304:
		return "13"
	case 0x0303:
		return "12"
	case 0x0302:
		return "11"
	case 0x0301:
		return "10"
	case 0x0300:
		return "s3"
	case 0x0002:
		return "s2"
	case 0xfeff:
		return "d1"
	case 0xfefd:
		return "d2"
	case 0xfefc:
		return "d3"
	}
	return "00"
}

// appendJA4Protocol appends the first and last character of the first ALPN
// protocol, or of its hexadecimal form if one of them is no letter or digit.
func (h *Hello) appendJA4Protocol(out []byte) []byte {
	data, _ := h.extension(extALPN)
	list, _ := data.vector16()
	name, _ := list.vector8()
	if len(name) == 0 {
		return append(out, "00"...)
	}
	first, last := name[0], name[len(name)-1]
	if !isAlphanumeric(first) || !isAlphanumeric(last) {
		const digits = "0123456789abcdef"
		first, last = digits[first>>4], digits[last&0x0f]
	}
	return append(out, first, last)
}

func isAlphanumeric(c byte) bool {
	return '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z'
}

// extensionIDs returns the numbers of the extensions in order, without GREASE.
func (h *Hello) extensionIDs() []uint16 {
	ids := make([]uint16, 0, 32) // more than browsers send
	for rest := h.extensions; len(rest) > 0; {
		id, _, ok := rest.extension()
		if !ok {
			break
		}
		if !isGREASE(id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// withoutGREASE returns the numbers in a list of uint16, without GREASE.
func withoutGREASE(list vector) []uint16 {
	numbers := make([]uint16, 0, len(list)/2)
	for len(list) >= 2 {
		if n, _ := list.uint16(); !isGREASE(n) {
			numbers = append(numbers, n)
		}
	}
	return numbers
}

// isGREASE reports a number reserved by RFC 8701, section 2: 0x0a0a to 0xfafa.
func isGREASE(n uint16) bool {
	return n&0x0f0f == 0x0a0a && n>>8 == n&0xff
}

// appendCount appends n as two digits, at most 99.
func appendCount(out []byte, n int) []byte {
	n = min(n, 99)
	return append(out, '0'+byte(n/10), '0'+byte(n%10))
}

// appendList appends numbers as four hexadecimal digits each, between commas.
func appendList(text []byte, numbers []uint16) []byte {
	text = slices.Grow(text, 5*len(numbers))
	for i, n := range numbers {
		if i > 0 {
			text = append(text, ',')
		}
		text = hex.AppendEncode(text, []byte{byte(n >> 8), byte(n)})
	}
	return text
}

// appendHash appends the shortened hash of text, or zeros for an empty one.
func appendHash(out, text []byte) []byte {
	if len(text) == 0 {
		return append(out, "000000000000"...)
	}
	sum := sha256.Sum256(text)
	return hex.AppendEncode(out, sum[:ja4HashLen/2])
}
