package policy

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

// Bounds of a domain name in text form without the trailing dot (RFC 1035, section 2.3.4).
const (
	maxName  = 253
	maxLabel = 63
)

// ErrName is wrapped by every error of ParseName.
var ErrName = errors.New("not a domain name")

// A Name is a domain name in canonical form: lower-case A-labels (RFC 5890)
// joined by dots, no trailing dot, at most 253 bytes. Two Names are the same
// name exactly if they are ==. The zero value is no name.
type Name struct{ s string }

// String returns the canonical text, "" for the zero Name.
func (n Name) String() string { return n.s }

// IsZero reports whether n is no name.
func (n Name) IsZero() bool { return n.s == "" }

// profile maps U-labels as UTS 46 asks for look-ups, non-transitionally.
var profile = idna.New(idna.MapForLookup(), idna.Transitional(false), idna.BidiRule(),
	idna.StrictDomainName(false), idna.VerifyDNSLength(false))

// ParseName returns s as a Name. It folds case, drops one trailing dot and maps
// U-labels to A-labels (UTS 46). Letters, digits, hyphens inside a label and
// underscores are legal. A name whose last label is a number, decimal or 0x
// hexadecimal, is refused: C libraries read such a "name" as an IPv4 address.
// The error wraps ErrName and says what is wrong.
func ParseName(s string) (Name, error) {
	for i := 0; i < len(s); i++ {
		if s[i] >= utf8.RuneSelf {
			// Longer input can only become longer: refuse it before the mapping works on it.
			if !utf8.ValidString(s) || len(s) > 4*maxName {
				return Name{}, fmt.Errorf("%w: invalid UTF-8 or too long", ErrName)
			}
			a, err := profile.ToASCII(s)
			if err != nil {
				return Name{}, fmt.Errorf("%w: %q is not a valid internationalised name (UTS 46)", ErrName, clip(s))
			}
			s = a
			break
		}
	}
	s = strings.TrimSuffix(s, ".")
	if err := checkName(s); err != nil {
		return Name{}, err
	}
	return Name{lowerASCII(s)}, nil
}

// MustName is ParseName for names known to be good; it panics otherwise.
func MustName(s string) Name {
	n, err := ParseName(s)
	if err != nil {
		panic(err)
	}
	return n
}

func checkName(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%w: it is empty", ErrName)
	case len(s) > maxName:
		return fmt.Errorf("%w: longer than %d bytes", ErrName, maxName)
	}
	start := 0
	for i := 0; i <= len(s); i++ {
		if i < len(s) && s[i] != '.' {
			if !nameByte[s[i]] {
				return fmt.Errorf("%w: %q has an illegal character %q", ErrName, clip(s), s[i])
			}
			continue
		}
		label := s[start:i]
		switch {
		case label == "":
			return fmt.Errorf("%w: %q has an empty label", ErrName, clip(s))
		case len(label) > maxLabel:
			return fmt.Errorf("%w: a label is longer than %d bytes", ErrName, maxLabel)
		case label[0] == '-' || label[len(label)-1] == '-':
			return fmt.Errorf("%w: label %q begins or ends with a hyphen", ErrName, label)
		}
		start = i + 1
	}
	if last := s[strings.LastIndexByte(s, '.')+1:]; isNumber(last) {
		return fmt.Errorf("%w: %q ends in a number, as an IPv4 address would", ErrName, clip(s))
	}
	return nil
}

// nameByte tells which bytes a label may hold.
var nameByte = func() (t [256]bool) {
	for c := range t {
		t[c] = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_'
	}
	return t
}()

// isNumber reports whether a resolver in C might take label for part of an IPv4 address.
func isNumber(label string) bool {
	if len(label) >= 2 && label[0] == '0' && label[1]|0x20 == 'x' {
		for _, c := range []byte(label[2:]) {
			if !(c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'f') {
				return false
			}
		}
		return true
	}
	for _, c := range []byte(label) {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

// lowerASCII is strings.ToLower for names, without the copy if there is nothing to fold.
func lowerASCII(s string) string {
	for i := 0; i < len(s); i++ {
		if c := s[i]; c >= 'A' && c <= 'Z' {
			return strings.ToLower(s)
		}
	}
	return s
}

// clip bounds what an error message repeats of its input.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
