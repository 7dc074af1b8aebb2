package policy

import (
	"errors"
	"strings"
	"testing"
)

func TestParseName(t *testing.T) {
	good := func(in, want string) {
		t.Helper()
		n, err := ParseName(in)
		if err != nil || n.String() != want {
			t.Errorf("ParseName(%q) = %q, %v, want %q", in, n, err, want)
		}
	}
	good("api.ok.test", "api.ok.test")
	good("API.Ok.TEST.", "api.ok.test")
	good("_dmarc.x_y.test", "_dmarc.x_y.test")
	good("bücher.example", "xn--bcher-kva.example")
	good("BÜCHER.example", "xn--bcher-kva.example")
	good("faß.de", "xn--fa-hia.de")
	good("api。ok．test", "api.ok.test")
	good("ａｐｉ.ok.test", "api.ok.test")
	good("4.3.2.1.in-addr.arpa", "4.3.2.1.in-addr.arpa")
	good("localhost", "localhost")
	good("1.2.3.4a", "1.2.3.4a")
	good(strings.Repeat(strings.Repeat("a", 49)+".", 5)+"abc", strings.Repeat(strings.Repeat("a", 49)+".", 5)+"abc")

	bad := func(in string) {
		t.Helper()
		if n, err := ParseName(in); err == nil {
			t.Errorf("ParseName(%q) = %q, want an error", in, n)
		} else if !errors.Is(err, ErrName) {
			t.Errorf("ParseName(%q): %v does not wrap ErrName", in, err)
		}
	}
	for _, in := range []string{
		"", ".", "..", "a..b", "a.test..", ".a.test", "-a.test", "a-.test", "a b.test", "a\tb.test",
		"a\x00.test", "a%00.test", "a/b.test", "a@b.test", "a#b.test", "a:443", "a\\046b.test", "a,b.test",
		"evil.test/api.ok.test", "api.ok.test\r\n", "*.ok.test", "[::1]", "::1",
		"127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "a.0x", "1.2.3.0xFF",
		"\xff.test", strings.Repeat("a", 64) + ".test", strings.Repeat("a.", 127) + "aa", "١٢٧.٠.٠.١",
		strings.Repeat("ü", 600),
	} {
		bad(in)
	}
}

func FuzzParseName(f *testing.F) {
	for _, s := range []string{"api.ok.test", "BÜCHER.example.", "127.1", "a..b", "xn--a.test", "ß.de", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseName(s)
		if err != nil {
			return
		}
		again, err := ParseName(n.String())
		if err != nil || again != n {
			t.Errorf("ParseName(%q) = %q, which parses as %q, %v", s, n, again, err)
		}
		if len(n.String()) > maxName || n.IsZero() {
			t.Errorf("ParseName(%q) = %q of length %d", s, n, len(n.String()))
		}
	})
}
