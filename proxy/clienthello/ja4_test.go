package clienthello

import (
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestJA4 uses the examples of FoxIO's specification and of public databases of
// fingerprints, which also say which lists they hash.
func TestJA4(t *testing.T) {
	const (
		chromeSuites = "1301,1302,1303,c02b,c02f,c02c,c030,cca9,cca8,c013,c014,009c,009d,002f,0035"
		chromeSigs   = "0403,0804,0401,0503,0805,0501,0806,0601"
	)
	tests := []struct {
		name                         string
		suites, exts, sigs, protocol string
		want                         string
	}{
		{"specification", chromeSuites, "001b,0000,0033,0010,4469,0017,002d,000d,0005,0023,0012,002b,ff01,000b,000a,0015",
			chromeSigs, "h2", "t13d1516h2_8daaf6152771_e5627efa2ab1"},
		{"GREASE everywhere", "9a9a," + chromeSuites, "3a3a,001b,0000,0033,0010,4469,0017,002d,000d,0005,0023,0012,002b,ff01,000b,000a,0015,1a1a",
			"5a5a," + chromeSigs, "h2", "t13d1516h2_8daaf6152771_e5627efa2ab1"},
		{"Chrome with new ALPS", chromeSuites, "002d,0033,0010,fe0d,0017,44cd,0000,000b,000a,002b,ff01,0023,0012,0005,000d,001b",
			chromeSigs, "h2", "t13d1516h2_8daaf6152771_d8a2da3f94cd"},
		{"Chrome with ML-DSA", chromeSuites, "0000,0010,0005,000a,000b,000d,0012,0017,001b,0023,002b,002d,0033,44cd,ca34,fe0d,ff01",
			"0904,0905,0906," + chromeSigs, "h2", "t13d1517h2_8daaf6152771_cb7bf5808d99"},
		{"OpenSSL", "1302,1303,1301,1304,c02c,c030,cca9,cca8,c0ad,c02b,c02f,c0ac,c023,c027,c00a,c014,c009,c013,009d,c09d,009c,c09c,003d,003c,0035,002f,00a3,009f,ccaa,c09f,00a2,009e,c09e,006b,006a,0067,0040,0039,0038,0033,0032,00ff",
			"0000,0010,000a,000b,000d,0015,0016,0017,001b,002b,002d,0031,0033",
			"0403,0503,0603,0807,0808,0809,080a,080b,0804,0805,0806,0401,0501,0601,0303,0301,0402,0502,0602,0302,0203,0201,0202",
			"http/1.1", "t13d4213h1_171bc101b036_5f0018e59d20"},
		{"nothing to hash", "", "", "", "", "t12i000000_000000000000_000000000000"},
		{"only SNI and ALPN", "", "0000,0010", "", "x", "t12d0002xx_000000000000_000000000000"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := ja4Hello(t, tt.suites, tt.exts, tt.sigs, tt.protocol)
			if got := h.JA4(); got != tt.want {
				t.Errorf("JA4() = %s, want %s", got, tt.want)
			}
		})
	}
}

// TestJA4NoSignatureAlgorithms takes the one hash of extensions alone that the
// specification gives; there it lists 000d but no algorithms, which TLS forbids,
// so the bytes do not come from Parse.
func TestJA4NoSignatureAlgorithms(t *testing.T) {
	var exts []byte
	for _, id := range hexList(t, "0005,000a,000b,000d,0012,0015,0017,001b,0023,002b,002d,0033,4469,ff01") {
		exts = append(exts, ext(id)...)
	}
	h := Hello{extensions: exts}
	if got, want := h.JA4(), "_000000000000_6d807ffa2a79"; !strings.HasSuffix(got, want) {
		t.Errorf("JA4() = %s, want …%s", got, want)
	}
}

func TestJA4Protocol(t *testing.T) {
	for protocol, want := range map[string]string{
		"h2": "h2", "http/1.1": "h1", "x": "xx", "": "00", "H-3": "H3",
		"\xab": "ab", "\xab\xcd": "ad", "0\xab": "3b", "01\xab\xcd": "3d", "0\xab\xcd1": "01",
	} {
		exts := ""
		if protocol != "" {
			exts = "0010"
		}
		h := ja4Hello(t, "", exts, "", protocol)
		if got := h.JA4(); got[8:10] != want {
			t.Errorf("JA4() with protocol %q = %s, want %s there", protocol, got, want)
		}
	}
}

func TestJA4Version(t *testing.T) {
	tests := []struct {
		msg  []byte
		want string
	}{
		{legacyHello(0x0303), "12"}, {legacyHello(0x0302), "11"}, {legacyHello(0x0301), "10"},
		{legacyHello(0x0300), "s3"}, {legacyHello(0x0002), "s2"}, {legacyHello(0x0304), "13"}, {legacyHello(0x0999), "00"},
		{legacyHello(0xfeff), "d1"}, {legacyHello(0xfefd), "d2"}, {legacyHello(0xfefc), "d3"},
		{hello(versions(0x0302, 0x0304)), "13"}, {hello(versions(0xfafa, 0x0301)), "10"}, {hello(versions(0x7f1c, 0x0303)), "00"},
	}
	for _, tt := range tests {
		h, _, err := Parse(inRecord(tt.msg), 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := h.JA4(); got[1:3] != tt.want {
			t.Errorf("JA4() of %x = %s, want version %s", tt.msg, got, tt.want)
		}
	}
}

func TestJA4Counts(t *testing.T) {
	h, _, err := Parse(inRecord(hello(manyEmptyExtensions(150))), 0)
	if err != nil {
		t.Fatal(err)
	}
	if got := h.JA4(); got[4:8] != "0299" {
		t.Errorf("JA4() with 2 suites and 150 extensions = %s, want 0299 there", got)
	}
}

// TestJA4Browsers checks presets against the fingerprints published for the
// browsers, and for the presets, by others.
func TestJA4Browsers(t *testing.T) {
	hellos := browserHellos(t)
	for client, want := range map[string]string{
		"Chrome-102":  "t13d1516h2_8daaf6152771_e5627efa2ab1",
		"Chrome-120":  "t13d1516h2_8daaf6152771_02713d6af862",
		"Chrome-131":  "t13d1516h2_8daaf6152771_02713d6af862",
		"Chrome-133":  "t13d1516h2_8daaf6152771_d8a2da3f94cd",
		"Safari-16.0": "t13d2014h2_a09f3c656075_14788d8d241b",
		"iOS-14":      "t13d2613h2_2802a3db6c62_845d286b0d67",
		"Firefox-120": "t13d1715h2_5b57614c22b0_5c2c66f702b0",
	} {
		h, _, err := Parse(inRecord(hellos[client]), 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := h.JA4(); got != want {
			t.Errorf("JA4() of %s = %s, want %s", client, got, want)
		}
	}
}

// ja4Hello returns the Hello of a client that sends these lists.
func ja4Hello(t *testing.T, suites, exts, sigs, protocol string) Hello {
	t.Helper()
	var list []byte
	for _, id := range hexList(t, exts) {
		switch id {
		case 0x0000:
			list = append(list, sni("api.ok.test")...)
		case 0x000d:
			list = append(list, ext(id, vec16(uint16s(hexList(t, sigs)...)))...)
		case 0x0010:
			list = append(list, alpn(protocol, "http/1.1")...)
		case 0x002b:
			list = append(list, versions(0x2a2a, 0x0304, 0x0303)...)
		case 0x0033:
			list = append(list, keyShare(29)...)
		case 0xfe0d:
			list = append(list, ech(0, "payload")...)
		default:
			list = append(list, ext(id)...)
		}
	}
	fields := slices.Concat(uint16s(0x0303), make([]byte, 32), vec8(), vec16(uint16s(hexList(t, suites)...)), vec8([]byte{0}))
	h, _, err := Parse(inRecord(message(1, fields, vec16(list))), 0)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func hexList(t *testing.T, text string) []uint16 {
	t.Helper()
	var numbers []uint16
	for field := range strings.SplitSeq(text, ",") {
		if field == "" {
			continue
		}
		n, err := strconv.ParseUint(field, 16, 16)
		if err != nil {
			t.Fatal(err)
		}
		numbers = append(numbers, uint16(n))
	}
	return numbers
}
