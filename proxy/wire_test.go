package proxy

import (
	"encoding/binary"
	"slices"
)

// The functions below write TLS presentation language (RFC 8446, section 3), in
// whatever order and number a test wants, right or wrong.

func vec8(parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	return append([]byte{byte(len(body))}, body...)
}

func vec16(parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(body))), body...)
}

func extension(id uint16, data ...[]byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, id), vec16(data...)...)
}

// hostName is an entry of a server_name list (RFC 6066, section 3).
func hostName(kind byte, name string) []byte { return append([]byte{kind}, vec16([]byte(name))...) }

func sniExtension(name string) []byte { return extension(0, vec16(hostName(0, name))) }

var tls13 = extension(43, vec8([]byte{3, 4, 3, 3}))

// echExtension is an outer encrypted_client_hello (RFC 9849, section 5), GREASE or not.
var echExtension = extension(0xfe0d, []byte{0, 0, 1, 0, 1, 7}, vec16(make([]byte, 32)), vec16(make([]byte, 144)))

// tlsHello is the handshake message of a ClientHello with these extensions.
func tlsHello(extensions ...[]byte) []byte { return versionHello(0x0303, extensions...) }

// versionHello is tlsHello with that legacy_version.
func versionHello(version uint16, extensions ...[]byte) []byte {
	body := slices.Concat(binary.BigEndian.AppendUint16(nil, version), make([]byte, 32), vec8(make([]byte, 32)),
		vec16([]byte{0x13, 0x01, 0xc0, 0x2f}), vec8([]byte{0}), vec16(extensions...))
	return append([]byte{1, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

// records cuts a message into TLS records with payloads of at most n bytes.
func records(msg []byte, n int) []byte {
	var out []byte
	for part := range slices.Chunk(msg, n) {
		out = append(append(out, 22, 3, 1), vec16(part)...)
	}
	return out
}

func record(msg []byte) []byte { return records(msg, 1<<14) }
