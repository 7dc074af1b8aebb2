package dashboard

import (
	"strings"
	"testing"
	"time"
	"unicode"
)

func TestVisible(t *testing.T) {
	for in, want := range map[string]string{
		"":                      "",
		"api.example":           "api.example",
		"<script>alert(1)":      "<script>alert(1)", // html/template's part
		"a\nb\tc\x00\x7f":       `a\u000ab\u0009c\u0000\u007f`,
		"evil\u202emoc.elpmaxe": `evil\u202emoc.elpmaxe`,
		"zero\u200bwidth\ufeff": `zero\u200bwidth\ufeff`,
		"\u2066x\u2069":         `\u2066x\u2069`,
		"\xff\xfe":              `\xff\xfe`,
		"\ufffd":                "\ufffd",
		`new\010line`:           `new\010line`, // as the resolver writes it
		"a\u00a0b\u2028":        `a\u00a0b\u2028`,
		"z\u0335\u0322":         `z\u0335\u0322`,
		"\U000e0041":            `\u{e0041}`,
		"bücher.example":        "bücher.example",
	} {
		if got := visible(in); got != want {
			t.Errorf("visible(%q) = %q, want %q", in, got, want)
		}
	}
	if got := visible(strings.Repeat("é", 4000)); len(got) > maxShown+len("…")+1 || !strings.HasSuffix(got, "…") {
		t.Errorf("a long string: %d bytes", len(got))
	}
}

func FuzzVisible(f *testing.F) {
	f.Add("a\u202eb\xff\\")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range visible(s) {
			if !unicode.IsPrint(r) || unicode.Is(unicode.Mn, r) {
				t.Fatalf("visible(%q) has %U", s, r)
			}
		}
	})
}

func TestNumbers(t *testing.T) {
	check := func(got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	check(number(0), "0")
	check(number(-1234), "-1,234")
	check(number(uint64(1234567)), "1,234,567")
	check(byteSize(0), "0 B")
	check(byteSize(999), "999 B")
	check(byteSize(1000), "0.98 KiB")
	check(byteSize(1<<20), "1 MiB")
	check(byteSize(123456789), "118 MiB")
	check(byteSize(1<<62), "4 EiB")
	check(rate(0), "0")
	check(rate(0.1), "0.1")
	check(rate(50000.4), "50,000")
	check(span(59*time.Second), "59 s")
	check(span(49*time.Hour), "2 days")
	now := time.Unix(1e9, 0)
	check(ago(now, now.Add(time.Second)), "just now")
	check(ago(now, now.Add(-time.Minute)), "1 min ago")
	check(ago(now, time.Time{}), "never")
}
