package policy

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/net/publicsuffix"
)

// ErrPattern is wrapped by every error about a name pattern.
var ErrPattern = errors.New("bad name pattern")

// A pattern is one name pattern, taken apart. It matches a name that ends in base
// (at a label boundary) and whose further labels, from the right, match glob; then
//   - apex: nothing may be left of them,
//   - below: at least one further label must be.
type pattern struct {
	base        string   // canonical fixed part; "" is the root
	glob        []string // labels holding "*", and those between them, left to right; most patterns have none
	apex, below bool
}

// text returns the canonical spelling.
func (p pattern) text() string {
	labels := append([]string(nil), p.glob...)
	if p.base != "" {
		labels = append(labels, p.base)
	}
	s := strings.Join(labels, ".")
	switch {
	case !p.below:
		return s
	case s == "":
		return "*"
	case p.apex:
		return "." + s
	}
	return "*." + s
}

// parsePattern reads one pattern as CONTRACT-level documentation describes it:
// x.com, *.x.com, .x.com, and * as part of one label elsewhere.
func parsePattern(s string) (pattern, error) {
	var p pattern
	rest := s
	switch {
	case s == "*":
		return pattern{below: true}, nil
	case strings.HasPrefix(s, "*."):
		p.below, rest = true, s[2:]
	case strings.HasPrefix(s, "."):
		p.below, p.apex, rest = true, true, s[1:]
	default:
		p.apex = true
	}
	if i := strings.LastIndexByte(rest, '*'); i >= 0 {
		end := strings.IndexByte(rest[i:], '.')
		if end < 0 {
			return p, fmt.Errorf("%w %q: its last label holds a \"*\"; \"*\" is part of a label only below a fixed name: write \"*.example.com\" or \"api-*.example.com\"", ErrPattern, clip(s))
		}
		glob, base := rest[:i+end], rest[i+end+1:]
		for label := range strings.SplitSeq(glob, ".") {
			canonical, err := globLabel(label)
			if err != nil {
				return p, fmt.Errorf("%w %q: %w", ErrPattern, clip(s), err)
			}
			p.glob = append(p.glob, canonical)
		}
		rest = base
	}
	n, err := ParseName(rest)
	if err != nil {
		return p, fmt.Errorf("%w %q: %w%s", ErrPattern, clip(s), err, patternHint(s))
	}
	p.base = n.String()
	if len(p.text()) > maxName {
		return p, fmt.Errorf("%w %q: longer than %d bytes", ErrPattern, clip(s), maxName)
	}
	return p, nil
}

// globLabel checks one label of the part of a pattern that holds wildcards.
func globLabel(label string) (string, error) {
	if label == "" || len(label) > maxLabel {
		return "", errors.New("a label is empty or too long")
	}
	for i := 0; i < len(label); i++ {
		if label[i] != '*' && !nameByte[label[i]] {
			return "", fmt.Errorf("illegal character %q (an internationalised label cannot hold a wildcard)", label[i])
		}
	}
	return lowerASCII(label), nil
}

// patternHint says what to write for the mistakes that people make most.
func patternHint(s string) string {
	switch {
	case strings.Contains(s, "://"):
		return "; write the host name alone, without scheme and path"
	case strings.HasPrefix(s, "@"):
		return "; a list is referred to as \"@name\" in names"
	case strings.Contains(s, ":"):
		return "; write the port in ports: [443], not in the name"
	case strings.Contains(s, "/"):
		return "; write the host name alone, or a prefix such as 203.0.113.0/24 in addresses"
	case isNumber(s[strings.LastIndexByte(s, '.')+1:]):
		return "; write an address in addresses: [203.0.113.7]"
	}
	return ""
}

// suffixKind tells what a pattern is spread over.
type suffixKind uint8

const (
	suffixNone     suffixKind = iota // an ordinary registered name, or an exact pattern
	suffixRegistry                   // a registry's public suffix: everybody's names
	suffixRental                     // a suffix of the list's private section: anybody can rent a name there
)

// suffix returns what p is spread over, by the public suffix list.
func (p pattern) suffix() suffixKind {
	if !p.below && len(p.glob) == 0 {
		return suffixNone
	}
	if p.base == "" {
		return suffixRegistry
	}
	ps, icann := publicsuffix.PublicSuffix(p.base)
	switch {
	case ps != p.base:
		return suffixNone
	case icann:
		return suffixRegistry
	case strings.Contains(ps, "."):
		return suffixRental
	}
	return suffixNone // a private top-level name such as corp: nobody else's
}

// globMatch reports whether the labels of name, which end where base began, match
// the wildcard labels of a pattern. left is name without base and its dot.
func globMatch(glob []string, left string, apex, below bool) bool {
	for i := len(glob) - 1; i >= 0; i-- {
		if left == "" {
			return false
		}
		label := left
		if dot := strings.LastIndexByte(left, '.'); dot >= 0 {
			label, left = left[dot+1:], left[:dot]
		} else {
			left = ""
		}
		if !labelMatch(glob[i], label) {
			return false
		}
	}
	if left == "" {
		return apex
	}
	return below
}

// labelMatch matches one label against a label that may hold wildcards, each
// standing for any run of bytes of this label. It backtracks only to the last
// wildcard, so it needs at most len(pat)*len(label) ≤ 63² steps.
func labelMatch(pat, label string) bool {
	p, l, star, mark := 0, 0, -1, 0
	for l < len(label) {
		switch {
		case p < len(pat) && pat[p] == '*':
			star, mark = p, l
			p++
		case p < len(pat) && pat[p] == label[l]:
			p++
			l++
		case star >= 0:
			mark++
			p, l = star+1, mark
		default:
			return false
		}
	}
	for p < len(pat) && pat[p] == '*' {
		p++
	}
	return p == len(pat)
}
