package dashboard

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxShown bounds how much of one string a page shows, in bytes: more than any
// name has (253), less than what a client may send.
const maxShown = 512

// visible returns s with everything that has no shape of its own written out:
// control and format characters (bidirectional overrides among them), white space
// other than a plain blank, combining marks, unassigned and private code points as
// \u202e, bytes that are no UTF-8 as \xff. What exceeds maxShown bytes ends in an
// ellipsis. It escapes for eyes; html/template escapes for HTML.
//
// app.js has the same function for what arrives later.
func visible(s string) string {
	if plain(s) {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		if i >= maxShown {
			b.WriteString("…")
			break
		}
		writeVisible(&b, s[i], r)
	}
	return b.String()
}

// visibleText is visible for a text of ours with strangers' names in it: lines stay
// lines, and nothing is cut.
func visibleText(s string) string {
	var b strings.Builder
	for i, r := range s {
		if r == '\n' {
			b.WriteByte('\n')
			continue
		}
		writeVisible(&b, s[i], r)
	}
	return b.String()
}

// writeVisible writes r, which begins with the byte first, with a shape.
func writeVisible(b *strings.Builder, first byte, r rune) {
	switch {
	case r == utf8.RuneError && first != "\uFFFD"[0]:
		fmt.Fprintf(b, `\x%02x`, first)
	case unicode.IsPrint(r) && !unicode.Is(unicode.Mn, r):
		b.WriteRune(r)
	case r > 0xffff:
		fmt.Fprintf(b, `\u{%x}`, r)
	default:
		fmt.Fprintf(b, `\u%04x`, r)
	}
}

// plain reports whether s is short and printable ASCII, which nearly everything
// is.
func plain(s string) bool {
	if len(s) > maxShown {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' {
			return false
		}
	}
	return true
}
