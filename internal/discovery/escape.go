package discovery

import (
	"html"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxShown bounds a text of unknown origin in what people read, in bytes before escaping.
const maxShown = 512

// visible returns s so that it stands on one line and does nothing to a terminal: what is
// not printable, or turns the direction of writing, is escaped, and what is too long cut.
func visible(s string) string {
	cut := len(s) > maxShown
	if cut {
		s = s[:maxShown]
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			b.WriteString(`\x` + strconv.FormatUint(uint64(s[i])|0x100, 16)[1:])
		case !unicode.IsPrint(r):
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		default:
			b.WriteRune(r)
		}
		i += size
	}
	if cut {
		b.WriteString("...")
	}
	return b.String()
}

// cell returns s for a cell of CSV.
func cell(s string) string { return Harmless(visible(s)) }

// formula is what a spreadsheet would take for one: at the beginning of a cell, and behind
// a semicolon, which separates cells where the comma is part of numbers.
var formula = regexp.MustCompile("(^|;[ \"']*)([=+@|%\\t\\r\uff1d\uff0b\uff0d\uff20-])")

// Harmless returns s, a cell of CSV, with an apostrophe in front of what a spreadsheet
// would take for a formula.
func Harmless(s string) string { return formula.ReplaceAllString(s, "$1'$2") }

// markdown returns s for a cell of a table in Markdown, without any meaning of its own.
// References to characters work in every dialect; a backslash does not in a table.
func markdown(s string) string {
	var b strings.Builder
	before := ' '
	text := []rune(visible(s))
	for i, r := range text {
		inWord := r == '_' && isAlphanumeric(before) && i+1 < len(text) && isAlphanumeric(text[i+1])
		if isAlphanumeric(r) || inWord || strings.ContainsRune(` .,:;-/%()=+"'?`, r) {
			b.WriteRune(r)
		} else {
			b.WriteString("&#" + strconv.Itoa(int(r)) + ";")
		}
		before = r
	}
	// Some dialects make links of what looks like an address of the web.
	return strings.NewReplacer("www.", "www&#46;", "WWW.", "WWW&#46;", "://", ":&#47;/").Replace(b.String())
}

func isAlphanumeric(r rune) bool {
	return r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r > 0x7f
}

func htmlText(s string) string { return html.EscapeString(visible(s)) }
