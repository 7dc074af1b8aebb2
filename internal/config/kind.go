package config

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"sallyport/internal/eventlog"
	"sallyport/policy"
)

// A kind is a sort of value that a key may take: how its text is read, and what
// the JSON Schema says of it. parse returns what Settings holds; its error says
// what is wrong and what to write instead.
type kind struct {
	parse  func(f *field, s string) (any, error)
	schema func(f *field) map[string]any
}

// Patterns for editors; parse is stricter.
const (
	durationPattern = `^([0-9]+d)?([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))*$`
	sizePattern     = `^[0-9]+(B|KiB|MiB|GiB)?$`
	listenPattern   = `^([0-9A-Za-z.]*|\[[0-9A-Za-z:.%]+\]):[0-9]{1,5}$`
	nodePattern     = `^[0-9A-Za-z._-]*$`
	realmPattern    = `^[ !#-\[\]-~]{1,64}$` // what a quoted-string holds without escapes
)

// maxText bounds a free text, in bytes.
const maxText = 1024

// kinds are the values of the tag kind.
var kinds = map[string]kind{
	"text":     {parseText, matching("")},
	"path":     {parseText, matching("")},
	"output":   {parseOutput, matching("")},
	"source":   {parseSource, matching("")},
	"url":      {parseURL, matching("")},
	"name":     {parseName, matching("")},
	"opt_name": {parseOptionalName, matching("")},
	"bool":     {parseBool, func(*field) map[string]any { return map[string]any{"type": "boolean"} }},
	"upstream": {parseUpstream, matching("")},
	"prefix":   {parsePrefix, matching("")},
	"address":  {parseAddress, matching("")},
	"suffix":   {parseSuffix, matching("")},
	"direct":   {parseDirect, matching("")},
	"parent":   {parseParent, matching("^$|^https?://")},
	"realm":    {parseRealm, matching(realmPattern)},
	"node":     {parseNode, matching(nodePattern)},
	"listen":   {parseListen, matching(listenPattern)},
	"admin":    {parseAdmin, matching("^$|" + listenPattern)},
	"duration": {parseDuration, matching(durationPattern)},
	"enum": {parseEnum, func(f *field) map[string]any {
		return map[string]any{"type": "string", "enum": f.enum}
	}},
	"group_parent": {parseGroupParent, matching("^$|^direct$|^https?://")},
	"count":        {parseCount, integer},
	"size": {parseSize, func(f *field) map[string]any {
		return map[string]any{"anyOf": []any{integer(f), matching(sizePattern)(f)}}
	}},
}

func matching(pattern string) func(*field) map[string]any {
	return func(*field) map[string]any {
		m := map[string]any{"type": "string"}
		if pattern != "" {
			m["pattern"] = pattern
		}
		return m
	}
}

func integer(f *field) map[string]any {
	low, high := bounds(f, bytesOf)
	return map[string]any{"type": "integer", "minimum": low, "maximum": high}
}

// bounds returns the bounds that the tags of f set, 0 and the largest value if none.
func bounds(f *field, of func(string) (int64, error)) (low, high int64) {
	high = math.MaxInt64
	for _, b := range []struct {
		tag string
		to  *int64
	}{{f.min, &low}, {f.max, &high}} {
		if b.tag == "" {
			continue
		}
		n, err := of(b.tag)
		if err != nil {
			panic(fmt.Sprintf("config: bound of %s: %v", f.path, err)) // a mistake in our own tags
		}
		*b.to = n
	}
	return low, high
}

// inBounds checks n, which was written as s.
func inBounds(f *field, s string, n int64, of func(string) (int64, error)) error {
	low, high := bounds(f, of)
	switch {
	case n < low:
		return fmt.Errorf("%s is too small; write at least %s", quote(s), f.min)
	case n > high:
		return fmt.Errorf("%s is too large; write at most %s", quote(s), f.max)
	}
	return nil
}

func parseDuration(f *field, s string) (any, error) {
	n, err := durationOf(s)
	if err != nil {
		return nil, err
	}
	return time.Duration(n), inBounds(f, s, n, durationOf)
}

// durationOf reads 10s, 1h30m, 7d or 1d12h: time.ParseDuration without signs, and with days.
func durationOf(s string) (int64, error) {
	if s != "" && strings.Trim(s, "0123456789.") == "" {
		return 0, fmt.Errorf("%s has no unit; write %q", quote(s), clip(s)+"s")
	}
	bad := fmt.Errorf(`%s is not a duration; write a number and a unit (ms, s, m, h, d) such as "10s" or "1h30m"`, quote(s))
	days, rest, ok := strings.Cut(s, "d")
	if !ok {
		days, rest = "0", s
	}
	n, err := strconv.ParseUint(days, 10, 16)
	if err != nil || s == "" || strings.ContainsAny(rest, "+-") {
		return 0, bad
	}
	var d time.Duration
	if rest != "" {
		if d, err = time.ParseDuration(rest); err != nil {
			return 0, bad
		}
	}
	const day = 24 * time.Hour // 65535 days are 180 years: with one more ParseDuration's 292 may not fit
	if total := time.Duration(n)*day + d; total >= d {
		return int64(total), nil
	}
	return 0, bad
}

func parseCount(f *field, s string) (any, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return nil, fmt.Errorf("%s is not a whole number; write digits only, 0 for no limit", quote(s))
	}
	return int(n), inBounds(f, s, int64(n), bytesOf)
}

func parseSize(f *field, s string) (any, error) {
	n, err := bytesOf(s)
	if err != nil {
		return nil, err
	}
	if err := inBounds(f, s, n, bytesOf); err != nil {
		return nil, err
	}
	return n, nil
}

// bytesOf reads 16384, 512B, 64KiB, 64MiB or 2GiB.
func bytesOf(s string) (int64, error) {
	digits := strings.TrimRight(s, "BKMGTibkmgt")
	shift, ok := map[string]int{"": 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30}[s[len(digits):]]
	n, err := strconv.ParseUint(digits, 10, 62)
	switch {
	case err == nil && ok && n <= math.MaxInt64>>shift:
		return int64(n) << shift, nil
	case err == nil && !ok:
		return 0, fmt.Errorf("%s has an unknown unit; write B, KiB, MiB or GiB, such as %q", quote(s), digits+"MiB")
	}
	return 0, fmt.Errorf(`%s is not a size; write bytes such as "16384" or "64MiB"`, quote(s))
}

func parseEnum(f *field, s string) (any, error) {
	if slices.Contains(f.enum, s) {
		return s, nil
	}
	if n := nearest(strings.ToLower(s), f.enum); n != "" {
		return nil, fmt.Errorf("%s is unknown; did you mean %q? Write one of %s", quote(s), n, strings.Join(f.enum, ", "))
	}
	return nil, fmt.Errorf("%s is unknown; write one of %s", quote(s), strings.Join(f.enum, ", "))
}

// port reads a port number strictly: net.Dial would take 4294967739 for 443.
func port(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && strconv.FormatUint(n, 10) == s
}

func parseAdmin(f *field, s string) (any, error) {
	if s == "" {
		return s, nil
	}
	return parseListen(f, s)
}

// parseListen reads an address to listen on. A host name is refused: what it
// resolves to would decide how far the listener can be reached.
func parseListen(_ *field, s string) (any, error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		if p, ok := port(s); ok {
			return nil, fmt.Errorf(`%s is a port alone; write ":%d" for every address of this machine or "127.0.0.1:%d" for loopback`, quote(s), p, p)
		}
		return nil, fmt.Errorf(`%s has no port; write host:port such as "127.0.0.1:3128"`, quote(s))
	}
	host, digits := s[:i], s[i+1:]
	if _, ok := port(digits); !ok {
		return nil, fmt.Errorf("%s: port %s is not a number from 0 to 65535", quote(s), quote(digits))
	}
	inner, bracketed := strings.CutPrefix(host, "[")
	inner, closed := strings.CutSuffix(inner, "]")
	ip, err := netip.ParseAddr(inner)
	switch {
	case host == "" || err == nil && bracketed == closed && bracketed == ip.Is6():
		return s, nil
	case err == nil && ip.Is6():
		return nil, fmt.Errorf("%s: an IPv6 address needs brackets; write %q", quote(s), "["+ip.String()+"]:"+digits)
	}
	return nil, fmt.Errorf(`%s: %s is not an IP address; write one, such as "127.0.0.1:%s", or ":%s" for every address of this machine`, quote(s), quote(host), digits, digits)
}

// upstreamPorts are the schemes that a resolver can be reached by, and their ports.
var upstreamPorts = map[string]uint16{"udp": 53, "tcp": 53, "tls": 853, "https": 443}

// parseUpstream checks an upstream. Those reached by UDP and TCP are addresses: a
// name would need a resolver first. Behind tls and https, #name is the name in the
// certificate of a host given as an address.
func parseUpstream(_ *field, s string) (any, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		scheme, rest = "udp", s
	}
	def, known := upstreamPorts[scheme]
	encrypted := scheme == "tls" || scheme == "https"
	host, certificate, named := strings.Cut(rest, "#")
	if scheme == "https" {
		host, _, _ = strings.Cut(host, "/")
	}
	if !known {
		return nil, fmt.Errorf("%s: unknown scheme; write udp://, tcp://, tls:// or https://", quote(s))
	}
	if !reachable(host, def, encrypted) || named && !encrypted || !printable(rest, 0x7e) || len(s) > maxText {
		return nil, fmt.Errorf("%s is not a resolver; write one such as %s", quote(s), map[bool]string{
			false: `"192.0.2.53", "192.0.2.53:5353" or "tcp://[2001:db8::53]:53"`,
			true:  `"tls://192.0.2.53#dns.example" or "https://dns.example/dns-query"`,
		}[encrypted])
	}
	if named {
		if _, err := policy.ParseName(certificate); err != nil {
			return nil, fmt.Errorf(`%s: behind "#" write the name in the resolver's certificate: %w`, quote(s), err)
		}
	}
	return s, nil
}

// reachable reports whether s is an address, or with names also a name, with or without a port.
func reachable(s string, def uint16, names bool) bool {
	if ip, err := netip.ParseAddr(s); err == nil {
		s = netip.AddrPortFrom(ip, def).String()
	} else if ip, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); err == nil && ip.Is6() {
		s = netip.AddrPortFrom(ip, def).String()
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Port() != 0 && !ap.Addr().IsUnspecified() && !ap.Addr().IsMulticast()
	}
	host, digits, ok := strings.Cut(s, ":")
	p, good := port(digits)
	_, err := policy.ParseName(host)
	return names && err == nil && (!ok || good && p != 0)
}

func parsePrefix(_ *field, s string) (any, error) {
	p, err := netip.ParsePrefix(s)
	if err == nil {
		if p != p.Masked() {
			return nil, fmt.Errorf("%s has bits set after the prefix; write %q", quote(s), p.Masked())
		}
		return p, nil
	}
	if ip, err := netip.ParseAddr(s); err == nil {
		return nil, fmt.Errorf("%s has no prefix length; write %q", quote(s), netip.PrefixFrom(ip.WithZone(""), ip.BitLen()))
	}
	return nil, fmt.Errorf(`%s is not a prefix; write one such as "10.0.0.0/8"`, quote(s))
}

func parseName(_ *field, s string) (any, error) {
	n, err := policy.ParseName(s)
	if err != nil {
		return nil, fmt.Errorf("%w; write a name such as %q", err, "corp.example")
	}
	return n.String(), nil
}

func parseOptionalName(f *field, s string) (any, error) {
	if s == "" {
		return s, nil
	}
	return parseName(f, s)
}

func parseBool(_ *field, s string) (any, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return nil, fmt.Errorf("%s is neither true nor false; write one of them", quote(s))
}

func parseURL(_ *field, s string) (any, error) {
	if s == "" {
		return s, nil
	}
	u, err := url.Parse(s)
	ok := err == nil && len(s) <= maxText && printable(s, 0x7e) &&
		(u.Scheme == "mailto" && u.Opaque != "" || (u.Scheme == "https" || u.Scheme == "http") && u.Host != "")
	if !ok {
		return nil, fmt.Errorf(`%s is not an https:, http: or mailto: address; write one such as "https://wiki.corp.example/egress"`, quote(s))
	}
	return s, nil
}

func parseNode(_ *field, s string) (any, error) {
	if !regexp.MustCompile(nodePattern).MatchString(s) || len(s) > 253 {
		return nil, fmt.Errorf("%s is not a node name; write up to 253 letters, digits, dots, hyphens and underscores", quote(s))
	}
	return s, nil
}

func parseRealm(_ *field, s string) (any, error) {
	if !regexp.MustCompile(realmPattern).MatchString(s) {
		return nil, fmt.Errorf(`%s is not a realm; write 1 to 64 ASCII characters without quotes and backslashes`, quote(s))
	}
	return s, nil
}

func parseText(_ *field, s string) (any, error) {
	if len(s) > maxText || !printable(s, unicode.MaxRune) {
		return nil, fmt.Errorf("%s is too long or has a control character; write at most %d bytes of plain text", quote(s), maxText)
	}
	return s, nil
}

func parseOutput(f *field, s string) (any, error) {
	if s == "" {
		return nil, errors.New("empty; write stdout, stderr, a path or syslog+udp://host:514")
	}
	if eventlog.IsSyslog(s) {
		if _, _, err := eventlog.SyslogAddress(s); err != nil {
			return nil, fmt.Errorf("%s: %w", quote(s), err)
		}
	}
	return parseText(f, s)
}

func parseSource(f *field, s string) (any, error) {
	scheme, _, isURL := strings.Cut(s, "://")
	switch {
	case s == "":
		return nil, fmt.Errorf("empty; write the path of a policy file, or %q for the starter policy", Embedded)
	case isURL:
		return nil, fmt.Errorf("%s: %s:// sources are not in this version; write the path of a file", quote(s), clip(scheme))
	}
	return parseText(f, s)
}

// printable reports whether s is valid UTF-8 of printable runes up to last.
func printable(s string, last rune) bool {
	for _, r := range s {
		if r == unicode.ReplacementChar || r > last || !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

// quote repeats input in an error message: on one line, with a bounded length.
func quote(s string) string { return strconv.Quote(clip(s)) }

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
