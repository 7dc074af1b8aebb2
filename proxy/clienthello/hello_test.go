package clienthello

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
)

// The functions below write TLS presentation language (RFC 8446, section 3), in
// whatever order and number a test wants, right or wrong.

func vec8(parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	return append([]byte{byte(len(body))}, body...)
}

func vec16(parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	return append(uint16s(uint16(len(body))), body...)
}

func uint16s(numbers ...uint16) []byte {
	var out []byte
	for _, n := range numbers {
		out = binary.BigEndian.AppendUint16(out, n)
	}
	return out
}

func ext(id uint16, data ...[]byte) []byte {
	return append(uint16s(id), vec16(data...)...)
}

func sni(name string) []byte { return ext(0, vec16([]byte{0}, vec16([]byte(name)))) }

func alpn(names ...string) []byte {
	var list []byte
	for _, name := range names {
		list = append(list, vec8([]byte(name))...)
	}
	return ext(16, vec16(list))
}

func versions(offered ...uint16) []byte { return ext(43, vec8(uint16s(offered...))) }

func keyShare(groups ...uint16) []byte {
	var list []byte
	for _, group := range groups {
		list = append(list, append(uint16s(group), vec16(make([]byte, 8))...)...)
	}
	return ext(51, vec16(list))
}

func ech(form byte, payload string) []byte {
	return ext(0xfe0d, []byte{form, 0, 1, 0, 1, 7}, vec16(make([]byte, 32)), vec16([]byte(payload)))
}

// message puts a handshake header before the parts.
func message(kind byte, parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	return append([]byte{kind, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

// legacyHello is a ClientHello message without an extensions field.
func legacyHello(version uint16, parts ...[]byte) []byte {
	fields := slices.Concat(uint16s(version), make([]byte, 32), vec8(make([]byte, 32)),
		vec16(uint16s(0x0a0a, 0x1301, 0xc02f)), vec8([]byte{0}))
	return message(1, append([][]byte{fields}, parts...)...)
}

// hello is a ClientHello message with these extensions.
func hello(extensions ...[]byte) []byte {
	return legacyHello(0x0303, vec16(extensions...))
}

// inRecords cuts a message into records with payloads of n bytes.
func inRecords(msg []byte, n int) []byte {
	var out []byte
	for part := range slices.Chunk(msg, n) {
		out = append(out, 22, 3, 1)
		out = append(out, vec16(part)...)
	}
	return out
}

func inRecord(msg []byte) []byte { return inRecords(msg, max(len(msg), 1)) }

// A view is a Hello as a comparable value.
type view struct {
	name             string
	max              uint16
	ech, postQuantum bool
	alpn             string
}

func viewOf(h Hello) view {
	return view{h.ServerName, h.MaxVersion, h.ECH, h.PostQuantum, strings.Join(h.ALPN(), " ")}
}

func TestHello(t *testing.T) {
	manyExtensions := sni("many.ok.test")
	for id := range uint16(300) {
		manyExtensions = append(manyExtensions, ext(0x4000+id)...)
	}
	label63 := strings.Repeat("a", 63)
	longest := strings.Join([]string{label63, label63, label63, strings.Repeat("a", 61)}, ".")
	tests := []struct {
		name string
		msg  []byte
		want view
	}{
		{"TLS 1.3", hello(sni("api.ok.test"), alpn("h2", "http/1.1"), versions(0x0304, 0x0303)),
			view{"api.ok.test", 0x0304, false, false, "h2 http/1.1"}},
		{"no extensions", hello(), view{max: 0x0303}},
		{"TLS 1.2 without extensions field", legacyHello(0x0303), view{max: 0x0303}},
		{"TLS 1.0", legacyHello(0x0301), view{max: 0x0301}},
		{"SSL 3.0", legacyHello(0x0300), view{max: 0x0300}},
		{"legacy_version below SSL 3.0", legacyHello(0x0200), view{}},
		{"legacy_version cannot offer TLS 1.3", legacyHello(0x0304), view{max: 0x0303}},
		{"legacy_version of nothing", legacyHello(0xffff), view{max: 0x0303}},
		{"supported_versions overrides upwards", legacyHello(0x0301, vec16(versions(0x0304))), view{max: 0x0304}},
		{"supported_versions overrides downwards", hello(versions(0x0302, 0x0301)), view{max: 0x0302}},
		{"GREASE version is not high", hello(versions(0xfafa, 0x0301)), view{max: 0x0301}},
		{"made-up version is not high", hello(versions(0x03ff, 0x7f1c, 0x0302)), view{max: 0x0302}},
		{"no known version", hello(versions(0x7f1c)), view{}},
		{"server_name last", hello(alpn("h2"), versions(0x0304), sni("last.ok.test")),
			view{"last.ok.test", 0x0304, false, false, "h2"}},
		{"upper case folded", hello(sni("API.Ok.TEST")), view{name: "api.ok.test", max: 0x0303}},
		{"underscore and hyphens", hello(sni("_srv.a--b-.-c.test")), view{name: "_srv.a--b-.-c.test", max: 0x0303}},
		{"single label", hello(sni("localhost")), view{name: "localhost", max: 0x0303}},
		{"A-label", hello(sni("xn--bcher-kva.test")), view{name: "xn--bcher-kva.test", max: 0x0303}},
		{"numbers before the last label", hello(sni("1.2.3.4a")), view{name: "1.2.3.4a", max: 0x0303}},
		{"hexadecimal word", hello(sni("beef.cafe")), view{name: "beef.cafe", max: 0x0303}},
		{"longest name", hello(sni(longest)), view{name: longest, max: 0x0303}},
		{"outer ECH", hello(sni("public.test"), ech(0, "payload")), view{name: "public.test", max: 0x0303, ech: true}},
		{"encrypted_server_name of the drafts", hello(ext(0xffce, []byte("x"))), view{max: 0x0303, ech: true}},
		{"X25519MLKEM768", hello(keyShare(0x2a2a, 0x11ec, 29)), view{max: 0x0303, postQuantum: true}},
		{"SecP256r1MLKEM768", hello(keyShare(0x11eb)), view{max: 0x0303, postQuantum: true}},
		{"SecP384r1MLKEM1024", hello(keyShare(0x11ed)), view{max: 0x0303, postQuantum: true}},
		{"X25519Kyber768Draft00", hello(keyShare(0x6399)), view{max: 0x0303, postQuantum: true}},
		{"X25519 is not post-quantum", hello(keyShare(29)), view{max: 0x0303}},
		{"no key share yet", hello(ext(51, vec16())), view{max: 0x0303}},
		{"GREASE extensions", hello(ext(0x0a0a), sni("grease.test"), ext(0xfafa, []byte{0})),
			view{name: "grease.test", max: 0x0303}},
		{"GREASE protocol", hello(alpn("\x0a\x0a", "h2")), view{max: 0x0303, alpn: "\x0a\x0a h2"}},
		{"binary protocol", hello(alpn("\x00\xff")), view{max: 0x0303, alpn: "\x00\xff"}},
		{"pre_shared_key last", hello(sni("psk.test"), ext(41, []byte("x"))), view{name: "psk.test", max: 0x0303}},
		{"hundreds of extensions", hello(manyExtensions), view{name: "many.ok.test", max: 0x0303}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			raw := inRecord(tt.msg)
			h, n, err := Parse(append(raw, "more"...), 0)
			if err != nil || n != len(raw) {
				t.Fatalf("Parse(%x) = %d, %v; want %d", raw, n, err, len(raw))
			}
			if got := viewOf(h); got != tt.want {
				t.Errorf("Parse(%x) = %+v, want %+v", raw, got, tt.want)
			}
		})
	}
}

func TestMalformed(t *testing.T) {
	name := func(s string) []byte { return append([]byte{0}, vec16([]byte(s))...) }
	label64 := strings.Repeat("a", 64)
	tooLong := strings.Repeat("a.", 126) + "aa" // 254 bytes
	duplicates := func(n int) []byte {
		var list []byte
		for id := range uint16(n) {
			list = append(list, ext(0x5000+id)...)
		}
		return append(list, ext(0x5000)...)
	}
	tests := []struct {
		name, want string // want is what the error says after "malformed ClientHello: "
		raw        []byte
	}{
		{"empty host_name", "server_name list", inRecord(hello(sni("")))},
		{"empty server_name", "server_name list", inRecord(hello(ext(0)))},
		{"empty name list", "server_name list", inRecord(hello(ext(0, vec16())))},
		{"type without a name", "server_name list", inRecord(hello(ext(0, vec16([]byte{0}))))},
		{"name list too short", "server_name list", inRecord(hello(ext(0, []byte{0, 9, 0, 0, 1, 'a'})))},
		{"bytes after the name list", "server_name list", inRecord(hello(ext(0, vec16(name("a.test")), []byte{0})))},
		{"two names", "server_name list of more than one name", inRecord(hello(ext(0, vec16(name("a.test"), name("b.test")))))},
		{"a name and a byte", "server_name list of more than one name", inRecord(hello(ext(0, vec16(name("a.test"), []byte{0}))))},
		{"name of another type", "server_name of another type", inRecord(hello(ext(0, vec16([]byte{1}, vec16([]byte("a.test"))))))},
		{"name of another type first", "server_name of another type", inRecord(hello(ext(0, vec16([]byte{9}, vec16([]byte("a.test")), name("b.test")))))},
		{"duplicate server_name", "duplicate extension", inRecord(hello(sni("a.test"), sni("a.test")))},
		{"duplicate unknown extension", "duplicate extension", inRecord(hello(ext(0x5000), ext(1), ext(0x5000)))},
		{"duplicate GREASE extension", "duplicate extension", inRecord(hello(ext(0x0a0a), ext(0x0a0a)))},
		{"duplicate after 47 others", "duplicate extension", inRecord(hello(duplicates(47)))},
		{"duplicate after 48 others", "duplicate extension", inRecord(hello(duplicates(48)))},
		{"duplicate after 49 others", "duplicate extension", inRecord(hello(duplicates(49)))},
		{"NUL in name", "host_name with a byte", inRecord(hello(sni("api.ok.test\x00.evil.test")))},
		{"space in name", "host_name with a byte", inRecord(hello(sni("api ok.test")))},
		{"slash in name", "host_name with a byte", inRecord(hello(sni("evil.test/ok.test")))},
		{"wildcard", "host_name with a byte", inRecord(hello(sni("*.ok.test")))},
		{"port", "host_name with a byte", inRecord(hello(sni("ok.test:443")))},
		{"U-label", "host_name with a byte", inRecord(hello(sni("bücher.test")))},
		{"fullwidth dot", "host_name with a byte", inRecord(hello(sni("ok。test")))},
		{"IPv6 address", "host_name with a byte", inRecord(hello(sni("2001:db8::1")))},
		{"IPv6 address in brackets", "host_name with a byte", inRecord(hello(sni("[::1]")))},
		{"IPv4 address", "host_name is an IP address", inRecord(hello(sni("192.0.2.1")))},
		{"short IPv4 address", "host_name is an IP address", inRecord(hello(sni("127.1")))},
		{"decimal IPv4 address", "host_name is an IP address", inRecord(hello(sni("2130706433")))},
		{"hexadecimal IPv4 address", "host_name is an IP address", inRecord(hello(sni("0X7F000001")))},
		{"octal IPv4 address", "host_name is an IP address", inRecord(hello(sni("0177.0.0.01")))},
		{"final dot", "host_name with a final dot", inRecord(hello(sni("api.ok.test.")))},
		{"dot alone", "host_name with an empty label", inRecord(hello(sni(".")))},
		{"first dot", "host_name with an empty label", inRecord(hello(sni(".ok.test")))},
		{"two dots", "host_name with an empty label", inRecord(hello(sni("api..test")))},
		{"label of 64 bytes", "host_name with a label too long", inRecord(hello(sni("a." + label64)))},
		{"name of 254 bytes", "host_name too long", inRecord(hello(sni(tooLong)))},

		{"inner ECH", "encrypted_client_hello is not an outer one", inRecord(hello(ext(0xfe0d, []byte{1})))},
		{"ECH of another type", "encrypted_client_hello is not an outer one", inRecord(hello(ech(2, "x")))},
		{"empty ECH", "encrypted_client_hello is not an outer one", inRecord(hello(ext(0xfe0d)))},
		{"short ECH", "encrypted_client_hello structure", inRecord(hello(ext(0xfe0d, []byte{0, 0, 1})))},
		{"ECH without payload", "encrypted_client_hello structure", inRecord(hello(ech(0, "")))},
		{"bytes after ECH", "encrypted_client_hello structure", inRecord(hello(ext(0xfe0d, ech(0, "x")[4:], []byte{0})))},
		{"pre_shared_key not last", "pre_shared_key", inRecord(hello(ext(41, []byte("x")), sni("a.test")))},
		{"empty ALPN", "application_layer", inRecord(hello(ext(16, vec16())))},
		{"empty protocol", "application_layer", inRecord(hello(alpn("h2", "")))},
		{"bytes after ALPN", "application_layer", inRecord(hello(ext(16, vec16(vec8([]byte("h2"))), []byte{0})))},
		{"empty supported_versions", "supported_versions", inRecord(hello(versions()))},
		{"odd supported_versions", "supported_versions", inRecord(hello(ext(43, vec8([]byte{3, 4, 3}))))},
		{"bytes after supported_versions", "supported_versions", inRecord(hello(ext(43, vec8([]byte{3, 4}), []byte{0})))},
		{"empty key", "key_share", inRecord(hello(ext(51, vec16(uint16s(29, 0)))))},
		{"bytes after key_share", "key_share", inRecord(hello(ext(51, vec16(), []byte{0})))},
		{"empty signature_algorithms", "signature_algorithms", inRecord(hello(ext(13, vec16())))},
		{"odd signature_algorithms", "signature_algorithms", inRecord(hello(ext(13, vec16([]byte{4}))))},

		{"empty message", "fields before", inRecord(message(1))},
		{"short random", "fields before", inRecord(message(1, uint16s(0x0303), make([]byte, 31)))},
		{"no compression methods", "fields before", inRecord(message(1, uint16s(0x0303), make([]byte, 32), vec8(), vec16()))},
		{"half a cipher suite", "fields before", inRecord(message(1, uint16s(0x0303), make([]byte, 32), vec8(), vec16([]byte{1}), vec8([]byte{0})))},
		{"bytes after the extensions", "extensions vector", inRecord(legacyHello(0x0303, vec16(sni("a.test")), []byte{0}))},
		{"extensions cut short", "extensions vector", inRecord(legacyHello(0x0303, []byte{0, 9, 0}))},
		{"one byte for extensions", "extensions vector", inRecord(legacyHello(0x0303, []byte{0}))},
		{"extension cut short", "extension length", inRecord(hello([]byte{0, 1, 0, 5, 0}))},
		{"half an extension number", "extension length", inRecord(hello(ext(1), []byte{0}))},

		{"another handshake message", "first handshake message", inRecord(message(2, make([]byte, 40)))},
		{"two hellos in a record", "record goes on", inRecord(append(hello(sni("a.test")), hello(sni("b.test"))...))},
		{"a byte after the hello in its last record", "record goes on", append(inRecords(hello()[:9], 5), inRecord(append(hello()[9:], 0))...)},
		{"empty record", "record length", []byte{22, 3, 1, 0, 0}},
		{"empty record in between", "record length", append(inRecord(hello()[:9]), 22, 3, 1, 0, 0)},
		{"record over 2^14", "record length", []byte{22, 3, 1, 0x40, 1}},
		{"alert in between", "record of another content type", append(inRecord(hello()[:9]), 21, 3, 1, 0, 2, 1, 90)},
		{"change_cipher_spec in between", "record of another content type", append(inRecord(hello()[:9]), 20, 3, 1, 0, 1, 1)},
		{"application data in between", "record of another content type", append(inRecord(hello()[:9]), 23)},
		{"another version in between", "record version", append(inRecord(hello()[:9]), 22, 2)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := Parse(tt.raw, 0)
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), ": "+tt.want) {
				t.Errorf("Parse(%x) = %v, want ErrMalformed: %s", tt.raw, err, tt.want)
			}
		})
	}
}

// A Hello outlives its bytes badly, but never dangerously.
func TestHelloAfterOverwrite(t *testing.T) {
	raw := inRecord(hello(sni("api.ok.test"), alpn("h2"), versions(0x0304)))
	h, _, err := Parse(raw, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []byte{0, 1, 0x0a, 0x10, 0xff} {
		copy(raw, bytes.Repeat([]byte{b}, len(raw)))
		h.ALPN()
		h.JA4()
		if h.ServerName != "api.ok.test" || h.MaxVersion != 0x0304 {
			t.Fatalf("fields changed with the bytes: %+v", viewOf(h))
		}
	}
}

// failingReader stands for a peer that sends no more: reading it is an error.
type failingReader struct{}

var errReadTooFar = errors.New("read too far")

func (failingReader) Read([]byte) (int, error) { return 0, errReadTooFar }

func after(raw []byte) io.Reader { return io.MultiReader(bytes.NewReader(raw), failingReader{}) }
