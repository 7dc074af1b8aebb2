package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// A Finding is the Err of every warning: something that is legal and seldom meant.
type Finding struct {
	Kind string // what it is about, such as shadowed: a closed set, see docs/policy-tools.md
	text string
}

// Error returns what was found, and what to do about it.
func (f *Finding) Error() string { return f.text }

// Kinds of findings.
const (
	findDuplicate   = "duplicate"
	findCovered     = "covered"
	findShadowed    = "shadowed"
	findNever       = "never-matches"
	findNoEffect    = "no-effect"
	findUnreachable = "unreachable-group"
	findAllowAll    = "allow-all"
	findRented      = "rented-suffix"
	findExpired     = "expired-rule"
	findObserved    = "observe-ended"
	findUnused      = "unused-list"
)

// FindingKinds returns every [Finding.Kind] with a sentence that explains it.
func FindingKinds() map[string]string {
	return map[string]string{
		findDuplicate:   "A pattern is written twice in one place.",
		findCovered:     "Another pattern of the same section covers the pattern, with the same restrictions or fewer.",
		findShadowed:    "A deny rule takes back everything that an allow rule gives for a pattern.",
		findNever:       "The rule can never match, because its restrictions contradict each other.",
		findNoEffect:    "The key changes nothing in this rule.",
		findUnreachable: "No source belongs to the group, and to none of those that extend it.",
		findAllowAll:    "The rule allows every name, or a large part of all addresses.",
		findRented:      "The pattern covers names that anybody can rent (public suffix list, private section).",
		findExpired:     "The rule has expired.",
		findObserved:    "The group's observe_until has passed: it enforces.",
		findUnused:      "No rule uses the list, or it is empty.",
	}
}

// maxReviewed bounds how many patterns review holds against the others. What
// people write by hand is less; what is more is a feed.
const maxReviewed = 50_000

// A reviewer is what compiling notes for review.
type reviewer struct {
	sections []section
	listed   []listedPattern // of list files that allow
	budget   int             // patterns that may still be looked at
}

// A section is a deny or allow section as it was compiled.
type section struct {
	path  string
	rules []Rule
	owner uint32
	first int // index of its first compiled rule
}

// A listedPattern is one pattern of a list file.
type listedPattern struct {
	pos  Pos
	list int
	pat  pattern
}

// noteListed keeps a copy of a pattern of list i for review.
func (c *compiler) noteListed(i int, pos Pos, pat pattern) {
	if len(c.review.listed) < maxReviewed && slices.ContainsFunc(c.uses[i].refs, func(r ref) bool { return !c.p.rules[r.rule].deny }) {
		pat.base = strings.Clone(pat.base)
		c.review.listed = append(c.review.listed, listedPattern{pos, i, pat})
	}
}

// lint looks for what is legal and seldom meant, in a policy without mistakes.
func (c *compiler) lint() {
	c.review.budget = maxReviewed
	c.lintGroups()
	for _, s := range c.review.sections {
		c.lintSection(s)
	}
	for i := range c.doc.Lists {
		c.lintList(i)
	}
	for _, l := range c.review.listed {
		at := func() (Pos, string) { return l.pos, fmt.Sprintf("lists[%d].file", l.list) }
		c.lintPattern(l.pat, c.uses[l.list].refs, at)
	}
	c.lintRoot()
}

// lintGroups looks for groups that no source reaches; those without any source
// have been reported.
func (c *compiler) lintGroups() {
	reached := c.p.reachedGroups()
	alive := slices.Clone(reached)
	extended := make([]bool, len(reached))
	for i := range c.p.groups {
		for _, o := range c.p.groups[i].owners {
			if o > 0 && int(o-1) != i {
				extended[o-1] = true
				alive[o-1] = alive[o-1] || reached[i]
			}
		}
	}
	for i, g := range c.doc.Groups {
		path := fmt.Sprintf("groups[%d].name", i)
		switch {
		case alive[i]:
		case len(g.Sources) > 0:
			c.report(findUnreachable, path, "group %q is never chosen: longer prefixes of other groups cover all of its sources", g.Name)
		case extended[i]:
			c.report(findUnreachable, path, "group %q is extended only by groups that no source reaches: its rules never apply", g.Name)
		}
	}
}

// reachedGroups tells for each group whether there is a source that belongs to it.
func (p *Policy) reachedGroups() []bool {
	reached := make([]bool, len(p.groups))
	if p.unmatched >= 0 {
		reached[p.unmatched] = true
	}
	for _, i := range p.users {
		reached[i] = true
	}
	open := false // there are groups whose prefixes all begin and end with longer ones
	for pfx, i := range p.sources.All() {
		r := rangeOf(pfx)
		reached[i] = reached[i] || p.chooses(r.first, i) || p.chooses(r.last, i)
	}
	for _, i := range p.sources.All() {
		open = open || !reached[i]
	}
	if open {
		var part partition
		addPrefixes(&part, &p.sources)
		for _, seg := range part.segments() {
			if i, ok := p.sources.Lookup(seg.first); ok {
				reached[i] = true
			}
		}
	}
	return reached
}

func (p *Policy) chooses(a netip.Addr, group uint32) bool {
	i, ok := p.sources.Lookup(a)
	return ok && i == group
}

// lintSection looks at the rules of one section, with what they were compiled to.
func (c *compiler) lintSection(s section) {
	next, bare := s.first, -1
	seen := map[string]bool{}
	for i := range s.rules {
		r := &s.rules[i]
		isBare := r.isBare()
		if isBare && bare < 0 {
			bare = next
			next++
		}
		if isBare && c.review.budget <= 0 {
			continue
		}
		path := s.path + "[" + strconv.Itoa(i) + "]"
		if isBare {
			c.lintName(r.Names[0], ref{owner: s.owner, rule: uint32(bare)}, true, seen, path+".names[0]")
			continue
		}
		to := ref{owner: s.owner, rule: uint32(next)}
		next++
		if c.lintRule(path, r, &c.p.rules[to.rule]); c.expired(&c.p.rules[to.rule]) {
			continue // which has been reported
		}
		own := map[string]bool{}
		for j, n := range r.Names {
			c.lintName(n, to, false, own, path+".names["+strconv.Itoa(j)+"]")
		}
		for j, a := range r.Addresses {
			c.lintAddress(a, to, fmt.Sprintf("%s.addresses[%d]", path, j))
		}
	}
}

// expired reports whether the rule has expired, if Compile was told the time.
func (c *compiler) expired(r *rule) bool {
	return !r.expires.IsZero() && !c.o.Now.IsZero() && !c.o.Now.Before(r.expires)
}

// lintRule looks at what a rule says beside its destinations.
func (c *compiler) lintRule(path string, r *Rule, out *rule) {
	if r.TLS != nil && out.protocols&forTLS == 0 {
		c.report(findNoEffect, path+".tls", "tls has no effect with protocol: %s; remove one of the two", r.Protocol)
	}
	switch {
	case !out.deny && out.protocols == forDNS && len(r.Names) == 0:
		c.report(findNever, path+".protocol", "the rule can never match: nobody asks the resolver for an address; add names, or remove protocol: dns")
	case out.deny && len(out.qtypes) > 0 && len(out.ports) > 0:
		c.report(findNever, path+".qtypes", "the rule can never match: qtypes are for questions to the resolver and ports for connections; write two rules")
	case out.deny && len(out.qtypes) > 0 && out.protocols&forDNS == 0:
		c.report(findNever, path+".qtypes", "the rule can never match: qtypes are for questions to the resolver; write protocol: dns, or remove qtypes")
	}
}

// lintRoot looks for rules that allow every name.
func (c *compiler) lintRoot() {
	_, below := c.p.names.lookup("")
	for _, r := range c.p.postings.sets[below] {
		if !c.p.rules[r.rule].deny {
			c.report(findAllowAll, c.rulePath(r.rule), "rule %q allows every name; list the names that are needed", c.p.rules[r.rule].id)
		}
	}
}

// rulePath returns where compiled rule i, which is no bare string, was written.
func (c *compiler) rulePath(i uint32) string {
	for _, s := range c.review.sections {
		next, bare := s.first, false
		for j := range s.rules {
			if s.rules[j].isBare() {
				if bare {
					continue
				}
				bare = true
			}
			if next == int(i) {
				return fmt.Sprintf("%s[%d]", s.path, j)
			}
			next++
		}
	}
	return ""
}

// lintName looks at one entry of a rule's names. seen holds those before it.
func (c *compiler) lintName(s string, to ref, bare bool, seen map[string]bool, path string) {
	if c.review.budget <= 0 || strings.HasPrefix(s, "@") {
		return // for lists see lintList
	}
	pat, err := parsePattern(s)
	if err != nil {
		return // there are no mistakes when this runs
	}
	if bare {
		to.form = pat.form()
	}
	if c.repeated(pat, seen, path) {
		return
	}
	c.lintPattern(pat, []ref{to}, func() (Pos, string) { return c.doc.locate(path) })
}

// repeated reports whether seen has pat, adds it and warns.
func (c *compiler) repeated(pat pattern, seen map[string]bool, path string) bool {
	text := pat.text()
	if seen[text] {
		c.report(findDuplicate, path, "%q is written twice here; remove one", text)
		return true
	}
	seen[text] = true
	return false
}

// lintList looks at the names of list i.
func (c *compiler) lintList(i int) {
	seen := map[string]bool{}
	for j, s := range c.doc.Lists[i].Names {
		if c.review.budget <= 0 {
			return
		}
		path := "lists[" + strconv.Itoa(i) + "].names[" + strconv.Itoa(j) + "]"
		pat, err := parsePattern(s)
		if err != nil || c.repeated(pat, seen, path) {
			continue // "@list" is no pattern
		}
		c.lintPattern(pat, c.uses[i].refs, func() (Pos, string) { return c.doc.locate(path) })
	}
}

// A cover is a pattern that covers another, with the rules it stands for.
type cover struct {
	hit  hit
	refs []ref
	own  bool // it is the other's equal
}

// covers returns the patterns that match every name that pat matches.
func (c *compiler) covers(pat pattern) (out []cover) {
	x := &c.p.names
	own := "*." + pat.base
	name := pat.base
	if pat.below || len(pat.glob) > 0 {
		name = "a." + pat.base
		if pat.base == "" {
			name = "a"
		}
	}
	x.hits(name, func(h hit) {
		refs := c.p.postings.sets[h.refs]
		switch {
		case name == pat.base: // one name: whatever matches it
			out = append(out, cover{h, refs, !h.below && !h.glob})
		case h.below && (len(pat.glob) > 0 || h.text != own):
			out = append(out, cover{h, refs, false})
		case h.below && pat.apex:
			exact, _ := x.lookup(pat.base)
			out = append(out, cover{h, common(refs, c.p.postings.sets[exact]), true})
		case h.below:
			out = append(out, cover{h, refs, true})
		}
	})
	if len(pat.glob) > 0 {
		text := pat.text()
		for _, g := range x.globs[x.find(pat.base, x.hash(pat.base))] {
			if g.text == text {
				out = append(out, cover{hit{text: g.text, glob: true}, c.p.postings.sets[g.refs], true})
			}
		}
	}
	return out
}

// common returns what is in a and in b.
func common(a, b []ref) []ref {
	if slices.Equal(a, b) {
		return a
	}
	return slices.DeleteFunc(slices.Clone(a), func(r ref) bool { return !slices.Contains(b, r) })
}

// lintPattern holds one pattern of the rules refs against all others.
func (c *compiler) lintPattern(pat pattern, refs []ref, at func() (Pos, string)) {
	if c.review.budget--; c.review.budget < 0 || len(refs) == 0 {
		return
	}
	covers := c.covers(pat)
	if len(covers) == 1 && covers[0].own && len(covers[0].refs) == len(refs) {
		return // nothing but the pattern itself, the usual case
	}
	if text := c.first(refs, func(r ref) string { return c.shadow(r, pat, covers) }); text != "" {
		pos, path := at()
		c.reportAt(pos, findShadowed, path, "%q can never match: %s; remove one of the two", pat.text(), text)
		return
	}
	if text := c.first(refs, func(r ref) string { return c.wider(r, pat, covers) }); text != "" {
		pos, path := at()
		c.reportAt(pos, findCovered, path, "%q is covered by %s already; remove one of the two", pat.text(), text)
	}
}

// first returns what f says of the first of refs, if it says something of each.
func (c *compiler) first(refs []ref, f func(ref) string) (text string) {
	for i, r := range refs {
		s := f(r)
		if s == "" {
			return ""
		}
		if i == 0 {
			text = s
		}
	}
	return text
}

// shadow tells which deny rule takes back all that the allow rule of r allows.
func (c *compiler) shadow(r ref, pat pattern, covers []cover) string {
	allow := &c.p.rules[r.rule]
	if allow.deny {
		return ""
	}
	lifts := !pat.below && len(pat.glob) == 0 // built-in guardrails
	owners := c.p.groups[r.owner-1].owners
	for _, cov := range covers {
		for _, d := range cov.refs {
			deny := &c.p.rules[d.rule]
			if deny.deny && !(deny.builtin && lifts) && slices.Contains(owners, d.owner) && deny.blocks(allow) {
				return fmt.Sprintf("rule %q %s denies it", c.id(d, cov.hit), c.home(d.owner))
			}
		}
	}
	return ""
}

// wider tells which pattern of the same section says what pat says for r.
func (c *compiler) wider(r ref, pat pattern, covers []cover) string {
	rule := &c.p.rules[r.rule]
	if !rule.deny && c.guarded(covers) {
		return "" // naming it exactly is what lifts the guardrail
	}
	for _, cov := range covers {
		for _, o := range cov.refs {
			other := &c.p.rules[o.rule]
			if o.owner != r.owner || other.deny != rule.deny || cov.own && o == r || c.expired(other) || !other.includes(rule) {
				continue
			}
			if cov.own && o.form == r.form && o.rule > r.rule && rule.includes(other) {
				continue // equals: the later one is reported
			}
			text := c.spelling(o, cov)
			if o.rule == r.rule || text == c.id(o, cov.hit) {
				return fmt.Sprintf("%q", text)
			}
			return fmt.Sprintf("%q of rule %q", text, c.id(o, cov.hit))
		}
	}
	return ""
}

// guarded reports whether a built-in guardrail is among covers.
func (c *compiler) guarded(covers []cover) bool {
	return slices.ContainsFunc(covers, func(cov cover) bool {
		return slices.ContainsFunc(cov.refs, func(r ref) bool { return c.p.rules[r.rule].builtin })
	})
}

// spelling returns the pattern by which r covers.
func (c *compiler) spelling(r ref, cov cover) string {
	switch h := cov.hit; {
	case h.glob:
		return h.text
	case r.form != formNone:
		return h.id(r.form)
	case !h.below:
		return h.id(formExact)
	default:
		exact, _ := c.p.names.lookup(h.id(formExact))
		if slices.Contains(c.p.postings.sets[exact], r) {
			return h.id(formBoth)
		}
		return h.id(formBelow)
	}
}

// id returns the ID of the rule at r.
func (c *compiler) id(r ref, h hit) string {
	if id := c.p.rules[r.rule].id; id != "" {
		return id
	}
	return h.id(r.form)
}

// home says where the deny rules of an owner stand.
func (c *compiler) home(owner uint32) string {
	if owner == 0 {
		return "(for all groups)"
	}
	return fmt.Sprintf("(deny of group %q)", c.p.groups[owner-1].name)
}

// lintAddress looks at one entry of a rule's addresses.
func (c *compiler) lintAddress(s string, to ref, path string) {
	pfx, ok := c.prefix(path, s)
	rule := &c.p.rules[to.rule]
	if !ok {
		return // there are no mistakes when this runs
	}
	if !rule.deny && pfx.Bits() < 8 {
		c.report(findAllowAll, path, "%s is a large part of all addresses; list the prefixes that are needed", pfx)
	}
	refs, _ := c.p.addresses.Get(pfx)
	for _, o := range c.p.postings.sets[refs] {
		other := &c.p.rules[o.rule]
		switch {
		case !rule.deny && other.deny && slices.Contains(c.p.groups[to.owner-1].owners, o.owner) && other.blocks(rule):
			c.report(findShadowed, path, "%s can never match: rule %q %s denies it; remove one of the two", pfx, other.id, c.home(o.owner))
			return
		case o.owner == to.owner && o.rule != to.rule && other.deny == rule.deny && !c.expired(other) && other.includes(rule) &&
			!(o.rule > to.rule && rule.includes(other)):
			c.report(findCovered, path, "%s is covered by rule %q already; remove one of the two", pfx, other.id)
			return
		}
	}
}

// spans returns the ports on which r speaks protocol p, which is one of TLS, HTTP and TCP.
func (r *rule) spans(p protocols) []portRange {
	switch {
	case r.protocols&p == 0 || r.deny && len(r.qtypes) > 0:
		return nil
	case r.ports != nil:
		return r.ports
	case r.deny:
		return []portRange{{1, 65535}}
	case p == forTLS:
		return []portRange{{portTLS, portTLS}}
	case p == forHTTP:
		return []portRange{{portHTTP, portHTTP}}
	}
	return nil
}

// reaches reports whether r has every port that o has, whatever is spoken there.
func (r *rule) reaches(o *rule) bool {
	for _, p := range []protocols{forTLS, forHTTP, forTCP} {
		mine := r.spans(p)
		for _, want := range o.spans(p) {
			if !slices.ContainsFunc(mine, func(s portRange) bool { return s.first <= want.first && want.last <= s.last }) {
				return false
			}
		}
	}
	return true
}

// outlives reports whether r holds at least as long as o.
func (r *rule) outlives(o *rule) bool {
	return r.expires.IsZero() || !o.expires.IsZero() && !r.expires.Before(o.expires)
}

// blocks reports whether the deny rule r refuses all that the allow rule o allows.
func (r *rule) blocks(o *rule) bool {
	if o.protocols == forDNS {
		return r.deniesQuestions() && r.outlives(o)
	}
	return r.reaches(o) && r.outlives(o)
}

// deniesQuestions reports whether a deny rule refuses every question for a name.
func (r *rule) deniesQuestions() bool {
	return r.protocols&forDNS != 0 && r.ports == nil && len(r.qtypes) == 0
}

// includes reports whether r, of the same effect, matches all that o matches of the
// same destinations.
func (r *rule) includes(o *rule) bool {
	if !r.reaches(o) || !r.outlives(o) {
		return false
	}
	if o.deny {
		return r.deniesQuestions() || !o.deniesQuestions() && slices.Equal(r.qtypes, o.qtypes)
	}
	return subset(o.qtypes, r.qtypes) && r.includesPrivate(o) && (o.protocols&forTLS == 0 || r.tls.includes(o.tls))
}

func subset[T comparable](a, b []T) bool {
	return !slices.ContainsFunc(a, func(v T) bool { return !slices.Contains(b, v) })
}

// includesPrivate reports whether r names every special address that o names.
func (r *rule) includesPrivate(o *rule) bool {
	return !slices.ContainsFunc(o.private, func(p netip.Prefix) bool {
		return !slices.ContainsFunc(r.private, func(q netip.Prefix) bool {
			return q == p || q.Bits() <= p.Bits() && q.Contains(p.Addr()) && !slices.Contains(platformAddresses, p.Addr())
		})
	})
}

// includes reports whether t takes every ClientHello that u takes.
func (t tlsRule) includes(u tlsRule) bool {
	return (t.sni == u.sni || u.sni == sniMatch) && (t.allowECH || !u.allowECH) && t.minVersion <= u.minVersion
}
