package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
	"unsafe"
)

// Options tell Compile what a Document alone cannot.
type Options struct {
	// Open opens the list file that a document names, which is read to its end and
	// closed. nil: list files are an error.
	Open func(name string) (io.ReadCloser, error)
	// Now is when warnings about dates are judged; zero: no such warnings.
	Now time.Time
}

const (
	// maxErrors bounds how many mistakes Compile reports, and so what a broken feed costs.
	maxErrors = 200
	// maxAncestors bounds the groups that one group extends, directly or not: each
	// is looked at in every decision.
	maxAncestors = 62
)

// errNoSuch is wrapped by errors about references that lead nowhere.
var errNoSuch = errors.New("there is no")

// Compile turns d into a Policy. It reports every mistake it finds, up to 200, as
// Errors in the order of their positions, and then returns no policy. Warnings
// are for a person to look at; the policy is good all the same. d is not kept.
func Compile(d *Document, o Options) (p *Policy, warnings []*Error, err error) {
	c := &compiler{
		doc: d, o: o, sum: sha256.New(),
		p:       &Policy{names: newNameIndex(), postings: newPostings(), unmatched: -1},
		groups:  map[string]int{},
		lists:   map[string]int{},
		ruleIDs: map[ruleKey]string{},
	}
	c.compile()
	sortErrors(c.errs)
	sortErrors(c.warnings)
	if len(c.errs) > 0 {
		return nil, c.warnings, c.errs
	}
	return c.p, c.warnings, nil
}

func sortErrors(es Errors) {
	slices.SortStableFunc(es, func(a, b *Error) int {
		if c := strings.Compare(a.Pos.File, b.Pos.File); c != 0 {
			return c
		}
		if a.Pos.Line != b.Pos.Line {
			return a.Pos.Line - b.Pos.Line
		}
		return a.Pos.Column - b.Pos.Column
	})
}

type compiler struct {
	doc      *Document
	o        Options
	p        *Policy
	errs     Errors
	warnings Errors
	groups   map[string]int
	lists    map[string]int
	uses     []listUse // per list: what refers to it
	ruleIDs  map[ruleKey]string
	prefixes []addressRef
	review   reviewer
	sum      hash.Hash
}

// ruleKey is where a rule ID must be unique.
type ruleKey struct {
	owner uint32
	deny  bool
	id    string
}

// addressRef is one prefix of a rule's addresses.
type addressRef struct {
	prefix netip.Prefix
	ref    ref
}

// listUse collects what a list is used for.
type listUse struct {
	refs   []ref
	strict bool // by an allow rule without allow_public_suffix
}

func (c *compiler) fail(path, format string, args ...any) {
	pos, path := c.doc.locate(path)
	c.failAt(pos, path, fmt.Errorf(format, args...))
}

func (c *compiler) failAt(pos Pos, path string, err error) {
	if len(c.errs) < maxErrors {
		c.errs = append(c.errs, &Error{pos, path, err})
	}
}

// report adds a warning.
func (c *compiler) report(kind, path, format string, args ...any) {
	pos, path := c.doc.locate(path)
	c.reportAt(pos, kind, path, format, args...)
}

func (c *compiler) reportAt(pos Pos, kind, path, format string, args ...any) {
	if len(c.warnings) < maxErrors {
		c.warnings = append(c.warnings, &Error{pos, path, &Finding{kind, fmt.Sprintf(format, args...)}})
	}
}

func (c *compiler) compile() {
	d := c.doc
	if d.Version != Version {
		c.fail("version", "version %d is not known; write version: %d", d.Version, Version)
	}
	c.hashDocument()
	c.declare()
	for i := range d.Groups {
		c.groupHead(i)
	}
	c.ancestors()
	c.unmatchedSource()
	c.builtins()
	c.rules("deny", d.Deny, 0, true, nil)
	for i := range d.Groups {
		g := &d.Groups[i]
		path := fmt.Sprintf("groups[%d]", i)
		c.tls(path+".tls", g.TLS, nil)
		c.rules(path+".deny", g.Deny, uint32(i+1), true, g.TLS)
		c.rules(path+".allow", g.Allow, uint32(i+1), false, g.TLS)
	}
	c.listReferences()
	for i := range d.Lists {
		c.list(i)
	}
	c.indexAddresses()
	if len(c.errs) == 0 {
		c.lint()
	}
	c.p.names.seal()
	c.p.postings.seal()
	c.p.revision = hex.EncodeToString(c.sum.Sum(nil))[:12]
}

// hashDocument begins the revision with the document; list files follow as they are read.
func (c *compiler) hashDocument() {
	text, err := json.Marshal(c.doc)
	if err != nil { // a Document holds only strings, numbers and slices
		panic(err)
	}
	c.sum.Write(text)
}

// declare files the names of groups and lists, so that they can refer to each other.
func (c *compiler) declare() {
	for i, g := range c.doc.Groups {
		path := fmt.Sprintf("groups[%d].name", i)
		switch _, taken := c.groups[g.Name]; {
		case g.Name == "deny":
			c.fail(path, "no group can be called deny, which unmatched_source gives a meaning; choose another name")
		case !validIdentifier(g.Name):
			c.fail(path, "group name %q: use 1 to 64 letters, digits, '-', '_' or '.'", clip(g.Name))
		case taken:
			c.fail(path, "a second group is called %q; give each its own name", g.Name)
		default:
			c.groups[g.Name] = i
		}
	}
	c.uses = make([]listUse, len(c.doc.Lists))
	for i, l := range c.doc.Lists {
		path := fmt.Sprintf("lists[%d].name", i)
		switch _, taken := c.lists[l.Name]; {
		case !validIdentifier(l.Name):
			c.fail(path, "list name %q: use 1 to 64 letters, digits, '-', '_' or '.', without the @", clip(l.Name))
		case taken:
			c.fail(path, "a second list is called %q; give each its own name", l.Name)
		default:
			c.lists[l.Name] = i
		}
	}
}

func validIdentifier(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, b := range []byte(s) {
		if !nameByte[b] && b != '.' {
			return false
		}
	}
	return true
}

// groupHead compiles everything of group i but its rules.
func (c *compiler) groupHead(i int) {
	g := &c.doc.Groups[i]
	path := fmt.Sprintf("groups[%d]", i)
	out := group{name: g.Name}
	switch g.Mode {
	case "", "enforce":
		if g.ObserveUntil != "" {
			c.fail(path+".observe_until", "observe_until goes with mode: observe; write that, or remove the date")
		}
	case "observe":
		out.mode = ModeObserve
		if g.ObserveUntil == "" {
			c.fail(path+".mode", "mode: observe needs an end; add observe_until: 2026-12-31 (from then on the group enforces)")
		} else if t, ok := c.date(path+".observe_until", g.ObserveUntil); ok {
			out.observeUntil = t
			if !c.o.Now.IsZero() && !c.o.Now.Before(t) {
				c.report(findObserved, path+".observe_until", "group %q has enforced since %s; write mode: enforce", g.Name, g.ObserveUntil)
			}
		}
	default:
		c.fail(path+".mode", "mode %q is not known; write enforce or observe", clip(g.Mode))
	}
	c.p.groups = append(c.p.groups, out)
	for j, s := range g.Sources {
		at := fmt.Sprintf("%s.sources[%d]", path, j)
		pfx, ok := c.prefix(at, s)
		if !ok {
			continue
		}
		if old, dup := c.p.sources.Get(pfx); dup {
			c.fail(at, "prefix %s belongs to group %q already; a prefix can be in one group only", pfx, c.doc.Groups[old].Name)
			continue
		}
		c.p.sources.Insert(pfx, uint32(i))
	}
	for j, u := range g.Users {
		at := fmt.Sprintf("%s.users[%d]", path, j)
		if !validUser(u) {
			c.fail(at, "%q is no name of a user; use 1 to %d characters without spaces, colons (but in a URI) and control characters", clip(u), maxUser)
			continue
		}
		if old, dup := c.p.users[u]; dup {
			c.fail(at, "user %s belongs to group %q already; a user can be in one group only", u, c.doc.Groups[old].Name)
			continue
		}
		if c.p.users == nil {
			c.p.users = map[string]uint32{}
		}
		c.p.users[strings.Clone(u)] = uint32(i)
	}
}

// maxUser bounds the name of a user, in bytes.
const maxUser = 255

// validUser reports whether s can be the name of a user: what Basic credentials
// (RFC 7617) and certificates can carry, and a log line can show unambiguously. A
// colon stands in the URI of a certificate alone, such as spiffe://corp.example/ci.
func validUser(s string) bool {
	if scheme, rest, ok := strings.Cut(s, "://"); ok && scheme != "" && rest != "" && len(s) <= maxUser {
		s = scheme + strings.ReplaceAll(rest, ":", "")
	}
	if s == "" || len(s) > maxUser || !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if r == ':' || unicode.IsSpace(r) || !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

// prefix parses an address or a prefix without host bits; IPv4-mapped ones become IPv4.
func (c *compiler) prefix(path, s string) (netip.Prefix, bool) {
	pfx, err := netip.ParsePrefix(s)
	if err != nil {
		a, aerr := netip.ParseAddr(s)
		if aerr != nil || a.Zone() != "" {
			c.fail(path, "%q is not a prefix; write one such as 10.20.0.0/16 or 2001:db8::/48", clip(s))
			return netip.Prefix{}, false
		}
		pfx = netip.PrefixFrom(a, a.BitLen())
	}
	if pfx.Addr().Is4In6() {
		if pfx.Bits() < 96 {
			c.fail(path, "%q reaches beyond IPv4-mapped space; write an IPv4 prefix such as 10.20.0.0/16", clip(s))
			return netip.Prefix{}, false
		}
		pfx = netip.PrefixFrom(pfx.Addr().Unmap(), pfx.Bits()-96)
	}
	if pfx != pfx.Masked() {
		c.fail(path, "%s has bits set beyond its length; write %s, or %s/%d for the one address",
			pfx, pfx.Masked(), pfx.Addr(), pfx.Addr().BitLen())
		return netip.Prefix{}, false
	}
	return pfx, true
}

// date parses a date (the start of that day, UTC) or a time with zone.
func (c *compiler) date(path, s string) (time.Time, bool) {
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, true
		}
	}
	c.fail(path, "%q is not a date; write one such as 2027-03-31 (from 00:00 UTC on) or 2027-03-31T18:00:00Z", clip(s))
	return time.Time{}, false
}

// ancestors resolves extends into each group's owners.
func (c *compiler) ancestors() {
	state := make([]visit, len(c.doc.Groups))
	var walk func(i int) []uint32
	walk = func(i int) []uint32 {
		g := &c.p.groups[i]
		if state[i] == visitDone {
			return g.owners
		}
		state[i] = visitOpen
		owners := []uint32{0, uint32(i + 1)}
		for j, parent := range c.doc.Groups[i].Extends {
			path := fmt.Sprintf("groups[%d].extends[%d]", i, j)
			k, known := c.groups[parent]
			switch {
			case !known:
				c.fail(path, "%w group %q%s", errNoSuch, clip(parent), c.known(c.groups))
			case state[k] == visitOpen:
				c.fail(path, "groups extend each other in a circle, which %q closes; remove one of the links", parent)
			default:
				owners = append(owners, walk(k)...)
			}
		}
		slices.Sort(owners)
		g.owners = slices.Compact(owners)
		if len(g.owners) > maxAncestors+2 {
			c.fail(fmt.Sprintf("groups[%d].extends", i), "group %q has more than %d ancestors; merge some of them", clip(g.name), maxAncestors)
			g.owners = g.owners[:2]
		}
		state[i] = visitDone
		return g.owners
	}
	extended := map[string]bool{}
	for i, g := range c.doc.Groups {
		walk(i)
		for _, parent := range g.Extends {
			extended[parent] = true
		}
	}
	for i, g := range c.doc.Groups {
		if len(g.Sources) == 0 && len(g.Users) == 0 && !extended[g.Name] && c.doc.UnmatchedSource != g.Name {
			c.report(findUnreachable, fmt.Sprintf("groups[%d].name", i), "group %q has no sources or users and no group extends it: its rules never apply", clip(g.Name))
		}
	}
}

// known lists up to five of the names that would have been right.
func (c *compiler) known(m map[string]int) string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	if len(names) == 0 {
		return ""
	}
	if len(names) > 5 {
		names = append(names[:5], "…")
	}
	return "; there are " + strings.Join(names, ", ")
}

func (c *compiler) unmatchedSource() {
	switch s := c.doc.UnmatchedSource; s {
	case "", "deny":
	default:
		i, ok := c.groups[s]
		if !ok {
			c.fail("unmatched_source", "%w group %q; write deny or the name of a group%s", errNoSuch, clip(s), c.known(c.groups))
			return
		}
		c.p.unmatched = i
	}
}

// rules compiles the deny or allow section at path.
func (c *compiler) rules(path string, rules []Rule, owner uint32, deny bool, inherited *TLSRule) {
	c.review.sections = append(c.review.sections, section{path, rules, owner, len(c.p.rules)})
	ids := sectionIDs(rules)
	bare := -1 // the one rule that stands for all bare strings of the section
	for i := range rules {
		r := &rules[i]
		at := path + "[" + strconv.Itoa(i) + "]"
		if !r.isBare() {
			c.rule(at, r, ids[i], owner, deny, inherited)
			continue
		}
		if bare < 0 {
			bare = len(c.p.rules)
			c.p.rules = append(c.p.rules, rule{deny: deny, protocols: defaultProtocols(deny), tls: c.tlsDefaults(inherited)})
		}
		c.bareName(at+".names[0]", r.Names[0], ref{owner: owner, rule: uint32(bare)}, deny)
	}
}

// builtins adds the guardrails that every policy has.
func (c *compiler) builtins() {
	for _, b := range builtinNames {
		to := ref{owner: 0, rule: uint32(len(c.p.rules))}
		c.p.rules = append(c.p.rules, rule{id: b.id, deny: true, builtin: true, protocols: forAny})
		for _, s := range b.patterns {
			pat, err := parsePattern(s)
			if err == nil {
				err = c.p.names.add(&c.p.postings, pat, c.p.postings.intern([]ref{to}))
			}
			if err != nil { // the table is ours
				panic(err)
			}
		}
	}
}

// isBare reports whether r says no more than a bare string can, and is no list.
func (r *Rule) isBare() bool {
	return len(r.Names) == 1 && !strings.HasPrefix(r.Names[0], "@") && r.ID == "" &&
		len(r.Addresses) == 0 && len(r.Ports) == 0 && r.Protocol == "" && len(r.QTypes) == 0 &&
		len(r.PrivateDestinations) == 0 && !r.AllowPublicSuffix && r.TLS == nil && r.Expires == "" &&
		r.Owner == "" && r.Reason == ""
}

func defaultProtocols(deny bool) protocols {
	if deny {
		return forAny
	}
	return forTLS | forHTTP
}

// rule compiles one rule that is more than a bare string.
func (c *compiler) rule(path string, r *Rule, id string, owner uint32, deny bool, inherited *TLSRule) {
	c.checkID(path+".id", r.ID, owner, deny)
	if len(r.Names) == 0 && len(r.Addresses) == 0 {
		c.fail(path, "the rule names no destination; add names: [api.example.com] or addresses: [203.0.113.0/24]")
	}
	out := rule{deny: deny, id: id}
	out.protocols = c.protocols(path+".protocol", r.Protocol, deny)
	for i, s := range r.Ports {
		if pr, ok := c.ports(fmt.Sprintf("%s.ports[%d]", path, i), s); ok {
			out.ports = append(out.ports, pr)
		}
	}
	switch {
	case r.Protocol == "tcp" && len(r.Ports) == 0 && !deny:
		c.fail(path+".protocol", "protocol: tcp relays without looking and so needs ports; add ports: [22]")
	case r.Protocol == "dns" && len(r.Ports) > 0:
		c.fail(path+".ports", "protocol: dns makes a rule for resolution alone; remove ports")
	}
	for i, s := range r.QTypes {
		if t, ok := ParseQType(s); ok {
			out.qtypes = append(out.qtypes, t)
		} else {
			c.fail(fmt.Sprintf("%s.qtypes[%d]", path, i), "%q is not a DNS type that can be allowed; write one such as TXT, SRV, MX or TYPE257", clip(s))
		}
	}
	for i, s := range r.PrivateDestinations {
		at := fmt.Sprintf("%s.private_destinations[%d]", path, i)
		if deny {
			c.fail(at, "a deny rule has no private_destinations; use addresses to deny a prefix")
		} else if pfx, ok := c.prefix(at, s); ok {
			out.private = append(out.private, pfx)
		}
	}
	if r.TLS != nil && deny {
		c.fail(path+".tls", "a deny rule denies whatever the ClientHello says; remove tls")
	}
	out.tls = c.tls(path+".tls", r.TLS, inherited)
	if r.Expires != "" {
		if t, ok := c.date(path+".expires", r.Expires); ok {
			out.expires = t
			if !c.o.Now.IsZero() && !c.o.Now.Before(t) {
				c.report(findExpired, path+".expires", "rule %q expired on %s; remove it or move the date", out.id, r.Expires)
			}
		}
	}
	to := ref{owner: owner, rule: uint32(len(c.p.rules))}
	for i, s := range r.Names {
		c.name(fmt.Sprintf("%s.names[%d]", path, i), s, to, deny, r.AllowPublicSuffix)
	}
	for i, s := range r.Addresses {
		pfx, ok := c.prefix(fmt.Sprintf("%s.addresses[%d]", path, i), s)
		if !ok {
			continue
		}
		c.prefixes = append(c.prefixes, addressRef{pfx, to})
		// A prefix wholly outside global space can only be meant; 0.0.0.0/0 does
		// not name 127.0.0.1.
		if !deny && whollySpecial(pfx) {
			out.literal = append(out.literal, pfx)
		}
	}
	c.p.rules = append(c.p.rules, out)
}

// checkID checks an ID that somebody wrote.
func (c *compiler) checkID(path, id string, owner uint32, deny bool) {
	if id == "" {
		return
	}
	if len(id) > 128 || strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r > '~' }) {
		c.fail(path, "rule ID %q: use up to 128 printable ASCII characters without spaces", clip(id))
	}
	key := ruleKey{owner, deny, id}
	if old, taken := c.ruleIDs[key]; taken {
		c.fail(path, "a second rule of this section has the ID %q (the other: %s); give each its own", clip(id), old)
	}
	c.ruleIDs[key] = path
}

// sectionIDs returns the ID of each rule of a section: the one written, or else a
// generated one. Those that would be alike get a digest of what the rule says, so
// that no ID depends on where its rule stands. Bare strings need none.
func sectionIDs(rules []Rule) []string {
	ids := make([]string, len(rules))
	count := map[string]int{}
	for i := range rules {
		if r := &rules[i]; r.ID != "" {
			ids[i] = r.ID
		} else if !r.isBare() {
			ids[i] = generatedID(r)
		}
		count[ids[i]]++
	}
	for i := range rules {
		if r := &rules[i]; count[ids[i]] > 1 && r.ID == "" && !r.isBare() {
			text, err := json.Marshal(r)
			if err != nil { // as in hashDocument
				panic(err)
			}
			sum := sha256.Sum256(text)
			ids[i] += "~" + hex.EncodeToString(sum[:3])
		}
	}
	return ids
}

// generatedID makes a readable ID: the first destination, how many more there
// are, and what restricts the rule.
func generatedID(r *Rule) string {
	all := slices.Concat(r.Names, r.Addresses)
	if len(all) == 0 {
		return "" // a mistake, reported elsewhere
	}
	id := clip(all[0])
	if len(all) > 1 {
		id += "+" + strconv.Itoa(len(all)-1)
	}
	if len(r.Ports) > 0 {
		id += ":" + strings.Join(r.Ports[:min(len(r.Ports), 4)], ",")
	}
	if r.Protocol != "" && r.Protocol != "web" {
		id += "/" + r.Protocol
	}
	return id
}

func (c *compiler) protocols(path, s string, deny bool) protocols {
	switch s {
	case "":
		return defaultProtocols(deny)
	case "web":
		return forTLS | forHTTP
	case "tls":
		return forTLS
	case "http":
		return forHTTP
	case "tcp":
		return forTCP
	case "dns":
		return forDNS
	}
	c.fail(path, "protocol %q is not known; write web, tls, http, tcp or dns", clip(s))
	return 0
}

func (c *compiler) ports(path, s string) (portRange, bool) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, aok := ParsePort(first)
	b, bok := ParsePort(last)
	if !aok || !bok || a > b {
		c.fail(path, "%q is not a port; write a number from 1 to 65535 or a range such as 8000-8010", clip(s))
		return portRange{}, false
	}
	return portRange{a, b}, true
}

// ParsePort reads a port number in canonical decimal: 1 to 65535, no sign, space
// or leading zero.
func ParsePort(s string) (uint16, bool) {
	if s == "" || s[0] < '1' || s[0] > '9' {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil
}

// tls compiles the rule's restrictions, with the group's behind them.
func (c *compiler) tls(path string, t, inherited *TLSRule) tlsRule {
	out := c.tlsDefaults(inherited)
	if t == nil {
		return out
	}
	for _, field := range []struct {
		name, value, want string
		set               func(*tlsRule, string) bool
	}{
		{"sni", t.SNI, "match, listed or optional", (*tlsRule).setSNI},
		{"ech", t.ECH, "deny or allow", (*tlsRule).setECH},
		{"min_version", t.MinVersion, `"1.0", "1.1", "1.2" or "1.3"`, (*tlsRule).setMinVersion},
	} {
		if !field.set(&out, field.value) {
			c.fail(path+"."+field.name, "%s: %q is not known; write %s", field.name, clip(field.value), field.want)
		}
	}
	return out
}

// tlsDefaults returns what holds where a rule says nothing. Mistakes in inherited
// are reported where the group is compiled.
func (c *compiler) tlsDefaults(inherited *TLSRule) tlsRule {
	out := tlsRule{minVersion: 0x0303}
	if inherited != nil {
		out.setSNI(inherited.SNI)
		out.setECH(inherited.ECH)
		out.setMinVersion(inherited.MinVersion)
	}
	return out
}

func (t *tlsRule) setSNI(s string) bool {
	switch s {
	case "":
	case "match":
		t.sni = sniMatch
	case "listed":
		t.sni = sniListed
	case "optional":
		t.sni = sniOptional
	default:
		return false
	}
	return true
}

func (t *tlsRule) setECH(s string) bool {
	switch s {
	case "":
	case "deny":
		t.allowECH = false
	case "allow":
		t.allowECH = true
	default:
		return false
	}
	return true
}

func (t *tlsRule) setMinVersion(s string) bool {
	switch s {
	case "":
	case "1.0":
		t.minVersion = 0x0301
	case "1.1":
		t.minVersion = 0x0302
	case "1.2":
		t.minVersion = 0x0303
	case "1.3":
		t.minVersion = 0x0304
	default:
		return false
	}
	return true
}

// name compiles one entry of a rule's names: a pattern or @list.
func (c *compiler) name(path, s string, to ref, deny, anySuffix bool) {
	if list, ok := strings.CutPrefix(s, "@"); ok {
		c.use(path, list, to, deny, anySuffix)
	} else if pat, ok := c.pattern(path, s, deny || anySuffix); ok {
		c.add(path, pat, c.p.postings.intern([]ref{to}))
	}
}

// bareName compiles a bare string of an allow or deny section, whose ID it is.
func (c *compiler) bareName(path, s string, to ref, deny bool) {
	if pat, ok := c.pattern(path, s, deny); ok {
		to.form = pat.form()
		c.add(path, pat, c.p.postings.intern([]ref{to}))
	}
}

// pattern parses s; unless anySuffix, it may not be spread over a public suffix.
func (c *compiler) pattern(path, s string, anySuffix bool) (pattern, bool) {
	pat, err := parsePattern(s)
	if err != nil {
		c.fail(path, "%w", err)
		return pat, false
	}
	if !anySuffix {
		c.checkSuffix(path, pat)
	}
	return pat, true
}

func (p pattern) form() form {
	switch {
	case !p.below:
		return formExact
	case p.apex:
		return formBoth
	}
	return formBelow
}

func (c *compiler) add(path string, pat pattern, refs posting) {
	if err := c.p.names.add(&c.p.postings, pat, refs); err != nil {
		c.fail(path, "%w", err)
	}
	c.p.nameCount++
}

// checkSuffix judges an allow pattern that is spread over a whole public suffix.
func (c *compiler) checkSuffix(path string, pat pattern) {
	pos, path := c.doc.locate(path)
	c.judgeSuffix(pos, path, pat)
}

func (c *compiler) judgeSuffix(pos Pos, path string, pat pattern) {
	switch pat.suffix() {
	case suffixRegistry:
		c.failAt(pos, path, registryError(pat))
	case suffixRental:
		c.reportAt(pos, findRented, path, "anybody can rent a name below %q (public suffix list, private section); list the names you need instead of %q",
			pat.base, pat.text())
	}
}

func registryError(pat pattern) error {
	return fmt.Errorf("%w %q: it covers names of everybody who registers below %q; name the domains, or set allow_public_suffix: true on the rule",
		ErrPattern, pat.text(), "."+pat.base)
}

// use notes that a rule refers to a list, and to the lists inside it.
func (c *compiler) use(path, list string, to ref, deny, anySuffix bool) {
	visited := map[int]bool{}
	var visit func(list string)
	visit = func(list string) {
		i, ok := c.lists[list]
		if !ok || visited[i] {
			return
		}
		visited[i] = true
		u := &c.uses[i]
		u.refs = append(u.refs, to)
		u.strict = u.strict || !deny && !anySuffix
		for _, s := range c.doc.Lists[i].Names {
			if inner, ok := strings.CutPrefix(s, "@"); ok {
				visit(inner)
			}
		}
	}
	if _, ok := c.lists[list]; !ok {
		c.fail(path, "%w list %q%s", errNoSuch, clip(list), c.known(c.lists))
	}
	visit(list)
}

// listReferences reports references among lists that lead nowhere or in a circle.
func (c *compiler) listReferences() {
	state := make([]visit, len(c.doc.Lists))
	var walk func(i int)
	walk = func(i int) {
		state[i] = visitOpen
		for j, s := range c.doc.Lists[i].Names {
			inner, ok := strings.CutPrefix(s, "@")
			if !ok {
				continue
			}
			path := fmt.Sprintf("lists[%d].names[%d]", i, j)
			switch k, known := c.lists[inner]; {
			case !known:
				c.fail(path, "%w list %q%s", errNoSuch, clip(inner), c.known(c.lists))
			case state[k] == visitOpen:
				c.fail(path, "lists hold each other in a circle, which @%s closes; remove one of the references", inner)
			case state[k] == visitNot:
				walk(k)
			}
		}
		state[i] = visitDone
	}
	for i := range c.doc.Lists {
		if state[i] == visitNot {
			walk(i)
		}
	}
}

// visit is how far a walk along references has come with one node.
type visit uint8

const (
	visitNot visit = iota
	visitOpen
	visitDone
)

// list adds every pattern of list i for the rules that use it.
func (c *compiler) list(i int) {
	l, path := &c.doc.Lists[i], fmt.Sprintf("lists[%d]", i)
	u := &c.uses[i]
	refs := c.p.postings.intern(slices.Clone(u.refs))
	switch {
	case len(l.Names) > 0 && l.File != "":
		c.fail(path+".file", "list %q has names and a file; write two lists and let one hold \"@other\"", clip(l.Name))
	case len(l.Names) == 0 && l.File == "":
		c.fail(path, "list %q is empty; add names: [.example.com] or file: list.txt", clip(l.Name))
	case len(u.refs) == 0:
		c.report(findUnused, path+".name", "no rule uses the list %q", clip(l.Name))
	}
	for j, s := range l.Names {
		at := path + ".names[" + strconv.Itoa(j) + "]"
		if strings.HasPrefix(s, "@") {
			continue // see use
		}
		if pat, ok := c.pattern(at, s, !u.strict); ok {
			c.add(at, pat, refs)
		}
	}
	if l.File != "" {
		c.listFile(i, path+".file", l.File, u, refs)
	}
}

// listFile reads the patterns of one list file.
func (c *compiler) listFile(i int, path, name string, u *listUse, refs posting) {
	if c.o.Open == nil {
		c.fail(path, "list files cannot be read here; write the names into the policy")
		return
	}
	f, err := c.o.Open(name)
	if err != nil {
		c.fail(path, "list file: %w", err)
		return
	}
	defer f.Close()
	found := 0
	err = readList(io.TeeReader(f, c.sum), func(line, column int, word []byte) {
		pos := Pos{name, line, column}
		pat, ok := exactPattern(word)
		if !ok {
			var err error
			if pat, err = parsePattern(string(word)); err != nil {
				c.failAt(pos, path, err)
				return
			}
		}
		if u.strict {
			c.judgeSuffix(pos, path, pat)
		}
		found++
		c.add(path, pat, refs)
		c.noteListed(i, pos, pat)
	})
	var at *listError
	switch {
	case errors.As(err, &at):
		c.failAt(Pos{name, at.line, 1}, path, at.err)
	case err != nil:
		c.fail(path, "read list file %q: %w", name, err)
	case found == 0 && len(c.errs) == 0:
		c.report(findUnused, path, "list file %q holds no pattern", name)
	}
}

// exactPattern is parsePattern for the words that make up nearly all of every
// feed, plain lower-case names. It allocates nothing: the name is word itself.
func exactPattern(word []byte) (pattern, bool) {
	if len(word) == 0 || word[0] == '.' || bytes.IndexByte(word, '*') >= 0 {
		return pattern{}, false
	}
	for _, b := range word {
		if b >= 'A' && b <= 'Z' || b >= 0x80 {
			return pattern{}, false
		}
	}
	s := strings.TrimSuffix(unsafe.String(&word[0], len(word)), ".")
	if checkName(s) != nil {
		return pattern{}, false
	}
	return pattern{base: s, apex: true}, true
}

// indexAddresses builds the prefix table. Each prefix also carries the refs of
// the wider prefixes around it, so that one longest match finds all rules.
func (c *compiler) indexAddresses() {
	own := map[netip.Prefix][]ref{}
	for _, a := range c.prefixes {
		own[a.prefix] = append(own[a.prefix], a.ref)
	}
	for pfx, refs := range own {
		all := slices.Clone(refs)
		for bits := range pfx.Bits() {
			wider, err := pfx.Addr().Prefix(bits)
			if err != nil {
				panic(err) // bits is below the address's length
			}
			all = append(all, own[wider]...)
		}
		c.p.addresses.Insert(pfx, c.p.postings.intern(all))
	}
}
