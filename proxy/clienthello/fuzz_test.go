package clienthello

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// fuzzLimit is beyond what crypto/tls takes for a handshake message (64 KiB),
// so that only what is announced can be too large.
const fuzzLimit = 1 << 20

// stricter says how this package is stricter than crypto/tls, in the words of
// its errors, each with a stream that crypto/tls accepts. The package
// documentation says the same for people.
var stricter = map[string][]byte{
	"record of another content type in between": slices.Concat(
		inRecord(hello()[:9]), []byte{21, 3, 1, 0, 2, 1, 90}, inRecord(hello()[9:])),
	"record version": slices.Concat(
		inRecord(hello()[:9]), []byte{22, 2, 0}, vec16(hello()[9:])),
	"record goes on after the message": inRecord(append(hello(), 0)),
	"server_name of another type than host_name": inRecord(hello(
		ext(0, vec16([]byte{1}, vec16([]byte("a.test")))))),
	"server_name list of more than one name": inRecord(hello(
		ext(0, vec16([]byte{0}, vec16([]byte("a.test")), []byte{1}, vec16([]byte("b.test")))))),
	"host_name too long":              inRecord(hello(sni(strings.Repeat("a.", 200) + "a"))),
	"host_name with an empty label":   inRecord(hello(sni("a..test"))),
	"host_name with a label too long": inRecord(hello(sni(strings.Repeat("a", 64) + ".test"))),
	"host_name is an IP address":      inRecord(hello(sni("192.0.2.1"))),
	"host_name with a byte that is no letter, digit, hyphen, underscore or dot": inRecord(hello(sni("a.test\x00"))),
	"encrypted_client_hello is not an outer one":                                inRecord(hello(ext(0xfe0d, []byte{1}))),
	"encrypted_client_hello structure":                                          inRecord(hello(ech(0, ""))),
}

func TestStricter(t *testing.T) {
	for detail, raw := range stricter {
		want := ErrMalformed.Error() + ": " + detail
		if _, _, err := Parse(raw, 0); err == nil || err.Error() != want {
			t.Errorf("Parse(%x) = %v, want %s", raw, err, want)
		}
		if serverSees(raw) == nil {
			t.Errorf("crypto/tls is as strict: %s", detail)
		}
	}
}

// FuzzRead compares Read with the server of crypto/tls: whenever both accept,
// they see the same; when only Read does, crypto/tls takes offence at an
// extension that Read leaves alone; when only crypto/tls does, the reason is
// one of those listed. testdata holds hellos of browsers and of crypto/tls.
func FuzzRead(f *testing.F) {
	f.Add(inRecord(legacyHello(0x0301)))
	f.Add(append([]byte{21, 3, 1, 0, 2, 1, 90}, inRecord(hello(sni("api.ok.test")))...))
	for _, raw := range stricter {
		f.Add(raw)
	}
	f.Fuzz(checkAgainstServer)
}

// TestAgainstServer does the same with fresh hellos, good ones and bad ones.
func TestAgainstServer(t *testing.T) {
	for name, msg := range browserHellos(t) {
		t.Run(name, func(t *testing.T) {
			checkAgainstServer(t, inRecord(msg))
			checkAgainstServer(t, inRecords(msg, 100))
			for i := range msg { // each length, type and name byte spoilt in turn
				spoilt := slices.Clone(msg)
				spoilt[i]++
				checkAgainstServer(t, inRecord(spoilt))
			}
		})
	}
}

// TestAgainstServerAtRandom puts hellos together from good and bad extensions.
func TestAgainstServerAtRandom(t *testing.T) {
	name := func(kind byte, s string) []byte { return append([]byte{kind}, vec16([]byte(s))...) }
	choices := [][]byte{
		sni("api.ok.test"), sni("B.test"), sni(""), sni("a.test."), sni("127.1"), sni("a\x00b"), ext(0), ext(0, vec16()),
		ext(0, vec16(name(0, "a.test"), name(0, "b.test"))), ext(0, vec16(name(1, "a.test"), name(0, "b.test"))),
		ext(0, vec16(name(0, "a.test")), []byte{0}), ext(0, []byte{0, 20}, name(0, "a.test")),
		alpn("h2", "http/1.1"), alpn(), alpn(""), versions(0x0304, 0x0301), versions(0x2a2a, 0x0302), versions(), ext(43, []byte{3, 3, 4, 3}),
		keyShare(0x11ec, 29), keyShare(), ext(51, []byte{0, 1}), ech(0, "payload"), ech(0, ""), ech(1, "x"), ext(0xfe0d), ext(0xffce),
		ext(41, vec16(vec16([]byte("ticket")), make([]byte, 4)), vec16(vec8(make([]byte, 32)))), ext(41),
		ext(13, vec16(uint16s(0x0403, 0x5a5a))), ext(13, vec16([]byte{4})), ext(13), ext(10, vec16(uint16s(29))), ext(10), ext(11, vec8([]byte{0})),
		ext(5), ext(35, []byte("ticket")), ext(23), ext(23, []byte{0}), ext(44), ext(0x0a0a), ext(0xfafa, []byte{0}), ext(57), {0}, {0, 1, 0, 9},
	}
	rng := rand.New(rand.NewPCG(3, 4))
	accepted := 0
	for range 20000 {
		var list []byte
		for range rng.IntN(6) {
			list = append(list, choices[rng.IntN(len(choices))]...)
		}
		data := inRecords(hello(list), 1+rng.IntN(300))
		checkAgainstServer(t, data)
		if _, _, err := Parse(data, 0); err == nil {
			accepted++
		}
		if t.Failed() {
			t.Fatalf("with %x", data)
		}
	}
	if accepted < 1000 {
		t.Errorf("only %d hellos were good", accepted)
	}
}

func checkAgainstServer(t *testing.T, data []byte) {
	t.Helper()
	h, raw, err := Read(bytes.NewReader(data), nil, fuzzLimit)
	if !bytes.HasPrefix(data, raw) {
		t.Fatal("Read changed the bytes")
	}
	seen := serverSees(data)
	switch {
	case err == nil && seen == nil:
		reduced := inRecords(onlyReadExtensions(raw), maxPlaintext)
		if seen = serverSees(reduced); seen == nil {
			t.Fatalf("Read accepts %q, crypto/tls does not", h.ServerName)
		}
		compare(t, h, seen)
	case err == nil:
		compare(t, h, seen)
	case seen != nil:
		checkStricter(t, err, seen)
	}
}

// compare checks that h says what crypto/tls saw.
func compare(t *testing.T, h Hello, seen *tls.ClientHelloInfo) {
	t.Helper()
	if h.ServerName != strings.ToLower(seen.ServerName) {
		t.Errorf("server name %q, crypto/tls sees %q", h.ServerName, seen.ServerName)
	}
	if !slices.Equal(h.ALPN(), seen.SupportedProtos) {
		t.Errorf("ALPN %q, crypto/tls sees %q", h.ALPN(), seen.SupportedProtos)
	}
	if want := slices.Contains(seen.Extensions, extECH) || slices.Contains(seen.Extensions, extESNI); h.ECH != want {
		t.Errorf("ECH %v, crypto/tls sees extensions %x", h.ECH, seen.Extensions)
	}
	highest := uint16(0)
	for _, version := range seen.SupportedVersions {
		if version >= versionSSL30 && version <= versionTLS13 {
			highest = max(highest, version)
		}
	}
	if !slices.Contains(seen.Extensions, extSupportedVersions) {
		highest = min(highest, versionTLS12)
		if h.MaxVersion == versionSSL30 { // crypto/tls does not count it
			highest = versionSSL30
		}
	}
	if h.MaxVersion != highest {
		t.Errorf("highest version %#x, crypto/tls sees %x", h.MaxVersion, seen.SupportedVersions)
	}
	if ja4 := h.JA4(); len(ja4) != ja4Len || (ja4[3] == 'd') != (h.ServerName != "") {
		t.Errorf("JA4() = %q with server name %q", ja4, h.ServerName)
	}
}

// checkStricter checks that Read refused what crypto/tls accepts for a reason
// that is on the list.
func checkStricter(t *testing.T, err error, seen *tls.ClientHelloInfo) {
	t.Helper()
	if errors.Is(err, ErrNotTLS) {
		return // a leading alert, or a record version of 0.x to 15.x
	}
	detail, ok := strings.CutPrefix(err.Error(), ErrMalformed.Error()+": ")
	if _, listed := stricter[detail]; !ok || !listed {
		t.Errorf("crypto/tls accepts %q: %v", seen.ServerName, err)
	}
}

// serverSees returns the ClientHello as a server of crypto/tls reads it, or nil.
func serverSees(data []byte) (seen *tls.ClientHelloInfo) {
	conn := &memoryConn{}
	conn.unread.Reset(data)
	config := &tls.Config{GetConfigForClient: func(info *tls.ClientHelloInfo) (*tls.Config, error) {
		seen = info
		return nil, io.EOF // enough
	}}
	_ = tls.Server(conn, config).Handshake() // fails always; seen tells how far it came
	return seen
}

// onlyReadExtensions returns the message of an accepted hello without the
// extensions whose contents Read leaves alone.
func onlyReadExtensions(raw []byte) []byte {
	s := newScanner(fuzzLimit)
	body, _ := s.scan(raw)
	rest := vector(body)
	rest.take(2 + 32)
	rest.vector8()
	rest.vector16()
	rest.vector8()
	fields := body[:len(body)-len(rest)]
	if len(rest) == 0 {
		return message(1, fields)
	}
	extensions, _ := rest.vector16()
	var kept []byte
	for len(extensions) > 0 {
		id, data, _ := extensions.extension()
		switch id {
		case extServerName, extSignatureAlgorithms, extALPN, extSupportedVersions, extKeyShare, extECH, extESNI:
			kept = append(kept, ext(id, data)...)
		}
	}
	return message(1, fields, vec16(kept))
}

// FuzzCuts checks that the verdict depends on the bytes alone: not on how many
// come with each read, nor, for a good hello, on the records it is cut into.
func FuzzCuts(f *testing.F) {
	f.Add(inRecord(hello(sni("api.ok.test"), alpn("h2"), ech(0, "x"), versions(0x0304))), []byte{1, 5, 4, 200}, uint16(30))
	f.Add(inRecords(hello(keyShare(0x11ec), sni("last.ok.test")), 1), []byte{1, 0}, uint16(2))
	f.Add(append(inRecord(hello()[:9]), 21, 3, 1, 0, 2, 1, 90), []byte{13, 1}, uint16(1))
	f.Add([]byte{22, 3, 1, 0x40, 0, 1, 0, 0x40, 0}, []byte{9}, uint16(1))
	f.Fuzz(func(t *testing.T, data, cuts []byte, size uint16) {
		want, raw, wantErr := Read(bytes.NewReader(data), nil, 0)
		got, gotRaw, err := Read(&cutByReader{rest: data, cuts: cuts}, nil, 0)
		if errText(err) != errText(wantErr) || viewOf(got) != viewOf(want) {
			t.Fatalf("in cuts %v: %+v, %v; whole: %+v, %v", cuts, viewOf(got), err, viewOf(want), wantErr)
		}
		if !bytes.HasPrefix(data, gotRaw) {
			t.Fatal("Read changed the bytes")
		}
		if wantErr != nil {
			return
		}
		s := newScanner(0)
		body, _ := s.scan(raw)
		records := inRecords(message(1, body), 1+int(size)%maxPlaintext)
		got, _, err = Read(bytes.NewReader(records), nil, fuzzLimit)
		if err != nil || viewOf(got) != viewOf(want) || got.JA4() != want.JA4() {
			t.Fatalf("in records of %d: %+v, %v; want %+v", size, viewOf(got), err, viewOf(want))
		}
	})
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// A cutByReader returns as many bytes at a time as cuts says, over and over.
type cutByReader struct {
	rest, cuts []byte
	calls      int
}

func (r *cutByReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		return 0, io.EOF
	}
	size := 1
	if len(r.cuts) > 0 {
		size += int(r.cuts[r.calls%len(r.cuts)])
	}
	r.calls++
	n := copy(p, r.rest[:min(size, len(r.rest))])
	r.rest = r.rest[n:]
	return n, nil
}
