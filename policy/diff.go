package policy

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Changes is how the decisions of two policies differ. What only looks different
// (rules moved, split, renamed or covered by others) is not in it.
type Changes struct {
	Old     string         `json:"old"` // revisions
	New     string         `json:"new"`
	Added   []string       `json:"groups_added,omitempty"`   // groups that only the new policy has sources for
	Removed []string       `json:"groups_removed,omitempty"` // and only the old one
	Groups  []GroupChange  `json:"groups,omitempty"`
	Users   []UserChange   `json:"users,omitempty"`
	Expiry  []ExpiryChange `json:"expiry,omitempty"`
	// Partial says that patterns with a "*" inside overlap so often that not all
	// overlaps were looked at.
	Partial bool `json:"partial,omitempty"`
}

// Empty reports whether it is certain that no decision differs, now or when a rule
// expires.
func (c *Changes) Empty() bool {
	return len(c.Groups) == 0 && len(c.Users) == 0 && len(c.Expiry) == 0 && !c.Partial
}

// A GroupChange is what changes for sources that belong to one group in the old
// policy and to one in the new: usually to the same.
type GroupChange struct {
	Old     string         `json:"old"` // group of these sources; "": none, so that everything is denied
	New     string         `json:"new"`
	Sources []netip.Prefix `json:"sources,omitempty"` // the sources, if they changed groups
	Rest    bool           `json:"rest,omitempty"`    // all sources that neither policy names changed groups
	OldMode string         `json:"old_mode,omitempty"`
	NewMode string         `json:"new_mode,omitempty"` // modes, if they differ
	// Whole stands for everything that the group allows, which is not listed: the
	// sources come from no group or go to none, and the group is in both policies.
	Whole   bool     `json:"whole,omitempty"`
	Changes []Change `json:"changes,omitempty"`
}

// A UserChange is a user who is listed in another group, or in none. What both
// groups allow is not compared: without a group of his own a user has that of the source.
type UserChange struct {
	User string `json:"user"`
	Old  string `json:"old"` // group that lists the user; "": none
	New  string `json:"new"`
}

// Kinds of Change.Target.
const (
	TargetName        = "name"        // a pattern, or two joined by " & ": names that match both
	TargetAddress     = "address"     // a prefix of literal addresses
	TargetDestination = "destination" // a prefix that names lead to
)

// A Change is one thing opened or closed.
type Change struct {
	Opened bool   `json:"opened"`
	Kind   string `json:"kind"` // one of the Target constants
	Target string `json:"target"`
	// Facets are what is opened or closed there: "443/tls", "8000-8010/http", "22/tcp",
	// "dns", "dns:TXT". docs/policy-tools.md lists them.
	Facets []string `json:"facets"`
	// To holds the special (private) addresses to which names may or may no longer
	// lead; nil: the change is about globally reachable ones.
	To       []netip.Prefix `json:"to,omitempty"`
	Observed bool           `json:"observed,omitempty"` // it passes, or passed, only because the group observes
	Reason   string         `json:"reason,omitempty"`   // why it is closed
	Rule     string         `json:"rule,omitempty"`     // which rule of the new policy decides
	Until    string         `json:"until,omitempty"`    // date on which the last rule that opens it expires
	// Except has up to three patterns within Target to which the change does not
	// apply, of Excepted in all.
	Except   []string `json:"except,omitempty"`
	Excepted int      `json:"excepted,omitempty"`
}

// maxExcept bounds Change.Except.
const maxExcept = 3

// An ExpiryChange is a rule that is in both policies and expires on another date.
type ExpiryChange struct {
	Group string `json:"group,omitempty"` // "": the document's deny rules
	Deny  bool   `json:"deny,omitempty"`
	Rule  string `json:"rule"`
	Old   string `json:"old"` // dates; "": never
	New   string `json:"new"`
}

// Diff returns how the decisions of two policies differ at a time. It looks at
// every pattern and prefix of either policy, alone and, for patterns with a "*"
// inside, in pairs, and there at every kind of traffic that a rule can tell apart.
// It takes seconds for a million names, and memory for what differs.
func Diff(old, new *Policy, at time.Time) *Changes {
	d := &differ{
		sides: [2]*Policy{old, new}, base: Request{Name: Name{"x"}, Time: at},
		fills: freshLabels(), sets: map[string]int{}, known: map[[2]posting]bool{},
	}
	d.meanings()
	d.pairUp()
	d.collectWildcards()
	d.classes(func(c class) {
		if c.set = d.set(c.name); d.changes(c.set) {
			d.found = append(d.found, c)
		}
	})
	out := &Changes{Old: old.revision, New: new.revision, Users: d.users(), Expiry: d.expiries(), Partial: d.partial}
	for i := range d.pairs {
		d.pairs[i].fold(d)
	}
	d.exceptions()
	d.addresses()
	reached := [2]map[string]bool{{}, {}}
	for k, p := range d.sides {
		for _, i := range p.users {
			reached[k][p.groups[i].name] = true
		}
	}
	for i := range d.pairs {
		p := &d.pairs[i]
		g := d.groupChange(p)
		reached[0][g.Old], reached[1][g.New] = true, true
		g.Changes = slices.Concat(d.nameChanges(p), p.literal.changes(d, TargetAddress), p.leadingTo.changes(d, TargetDestination))
		if g.Old != g.New || g.OldMode != g.NewMode || len(g.Changes) > 0 {
			out.Groups = append(out.Groups, g)
		}
	}
	out.Added, out.Removed = missing(new, reached[1], reached[0]), missing(old, reached[0], reached[1])
	return out
}

// missing returns the groups of p that are in a and not in b.
func missing(p *Policy, a, b map[string]bool) (names []string) {
	for _, n := range p.GroupNames() {
		if a[n] && !b[n] {
			names = append(names, n)
		}
	}
	return names
}

// A differ is one run of Diff.
type differ struct {
	sides   [2]*Policy
	base    Request // to which the cells of a name are added
	meaning [2][]uint32
	pairs   []pair
	globs   []globAt
	wild    map[string][]int // indices into globs, by base
	fills   []string         // labels to stand for "*"

	sets     map[string]int      // by the postings that make them up
	outcomes [][]*outcome        // by set and pair
	found    []class             // those with a change
	paired   int                 // pairs of patterns looked at by classes
	work     int                 // see maxWork
	partial  bool                // and there were more
	known    map[[2]posting]bool // see changed
}

// freshLabels returns labels that whoever wrote the policies could not foresee,
// and every short one for where those match a pattern by accident.
func freshLabels() []string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	var labels []string
	for range 3 {
		b := make([]byte, 16)
		for i := range b {
			b[i] = letters[rand.IntN(len(letters))]
		}
		labels = append(labels, string(b))
	}
	short := strings.Split(letters, "")
	rand.Shuffle(len(short), func(i, j int) { short[i], short[j] = short[j], short[i] })
	return append(labels, short...)
}

// meanings gives rules that say the same one number, in both policies. Rules that
// have expired say nothing, 0, unless what they say about private destinations
// still lets a group observe.
func (d *differ) meanings() {
	known := map[string]uint32{}
	for k, p := range d.sides {
		d.meaning[k] = make([]uint32, len(p.rules))
		for i := range p.rules {
			r := &p.rules[i]
			expired := r.expired(d.base.Time)
			if expired && len(r.private) == 0 {
				continue
			}
			text := fmt.Sprint(expired, r.deny, r.builtin, r.protocols, sorted(r.ports), sorted(r.qtypes), sorted(r.private), r.tls)
			if known[text] == 0 {
				known[text] = uint32(len(known) + 1)
			}
			d.meaning[k][i] = known[text]
		}
	}
}

// sorted returns the items of s as text, in an order that does not depend on theirs.
func sorted[T any](s []T) []string {
	out := make([]string, len(s))
	for i, v := range s {
		out[i] = fmt.Sprint(v)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// A pair is the sources that belong to one group in the old policy and to one in
// the new.
type pair struct {
	group    [2]int // indices; -1: no group
	sources  []addrRange
	rest     bool // sources that no prefix names are among them
	whole    bool
	observe  bool                // both groups observe
	outcomes map[string]*outcome // by what the rules of both sides say

	index int               // in differ.pairs
	shown []*shown          // what is left after folding
	below map[string]*shown // by base, for names below it

	literal, leadingTo ranged // literal addresses, and addresses that names lead to
}

// An outcome is what differs for one combination of rules.
type outcome struct {
	sides  [2]side
	deltas []delta
	key    string // equal for equal deltas
}

// A shown is one class whose change is reported.
type shown struct {
	class
	*outcome
	except   [][]string // by delta
	excepted []int
}

// users finds which users changed groups.
func (d *differ) users() []UserChange {
	names := map[string]UserChange{}
	for k, p := range d.sides {
		for u, i := range p.users {
			c := names[u]
			c.User = u
			if k == 0 {
				c.Old = p.groups[i].name
			} else {
				c.New = p.groups[i].name
			}
			names[u] = c
		}
	}
	var out []UserChange
	for _, c := range names {
		if c.Old != c.New {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b UserChange) int { return strings.Compare(a.User, b.User) })
	return out
}

// userGroups returns the groups of both policies that list users in either: their
// rules are compared though perhaps no source belongs to them.
func (d *differ) userGroups() []string {
	var names [2][]string
	for k, p := range d.sides {
		names[k] = p.GroupNames()
	}
	var out []string
	for _, p := range d.sides {
		for _, i := range p.users {
			if n := p.groups[i].name; slices.Contains(names[0], n) && slices.Contains(names[1], n) {
				out = append(out, n)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// pairUp finds which sources changed groups.
func (d *differ) pairUp() {
	var part partition
	old, new := d.sides[0], d.sides[1]
	for _, p := range d.sides {
		addPrefixes(&part, &p.sources)
	}
	index := map[[2]int]int{}
	for _, seg := range part.segments() {
		var g [2]int
		named := false
		for k, p := range d.sides {
			i, ok := p.sources.Lookup(seg.first)
			named = named || ok
			if g[k] = int(i); !ok {
				g[k] = p.unmatched
			}
		}
		if g == [2]int{-1, -1} {
			continue
		}
		i, ok := index[g]
		if !ok {
			i = len(d.pairs)
			index[g] = i
			d.pairs = append(d.pairs, d.newPair(g))
		}
		if named {
			d.pairs[i].sources = append(d.pairs[i].sources, seg)
		} else {
			d.pairs[i].rest = true
		}
	}
	for _, name := range d.userGroups() {
		g := [2]int{slices.Index(old.GroupNames(), name), slices.Index(new.GroupNames(), name)}
		if _, ok := index[g]; !ok {
			index[g] = len(d.pairs)
			d.pairs = append(d.pairs, d.newPair(g))
		}
	}
	slices.SortFunc(d.pairs, func(a, b pair) int {
		return slices.Compare([]int{a.group[1], a.group[0]}, []int{b.group[1], b.group[0]})
	})
	compared := map[string]bool{} // groups that are compared with themselves
	for i := range d.pairs {
		d.pairs[i].index = i
		if names := d.groupNames(&d.pairs[i]); names[0] == names[1] {
			compared[names[0]] = true
		}
	}
	for i := range d.pairs {
		names := d.groupNames(&d.pairs[i])
		d.pairs[i].whole = names[0] == "" && compared[names[1]] || names[1] == "" && compared[names[0]]
	}
}

// groupNames returns the names of p's groups; "" for none.
func (d *differ) groupNames(p *pair) (names [2]string) {
	for k, i := range p.group {
		if i >= 0 {
			names[k] = d.sides[k].groups[i].name
		}
	}
	return names
}

func (d *differ) newPair(g [2]int) pair {
	p := pair{group: g, outcomes: map[string]*outcome{}, below: map[string]*shown{}, observe: true}
	for k, i := range g {
		p.observe = p.observe && i >= 0 && d.sides[k].groups[i].modeAt(d.base.Time) == ModeObserve
	}
	return p
}

// groupChange describes p without what it opens and closes.
func (d *differ) groupChange(p *pair) GroupChange {
	names := d.groupNames(p)
	var modes [2]string
	for k, i := range p.group {
		if i < 0 {
			continue
		}
		g := &d.sides[k].groups[i]
		modes[k] = g.modeAt(d.base.Time).String()
		if modes[k] == "observe" {
			modes[k] += " until " + formatDate(g.observeUntil)
		}
	}
	out := GroupChange{Old: names[0], New: names[1]}
	if names[0] != names[1] {
		out.Sources, out.Rest, out.Whole = toPrefixes(p.sources), p.rest, p.whole
	}
	if modes[0] != modes[1] && names[0] != "" && names[1] != "" {
		out.OldMode, out.NewMode = modes[0], modes[1]
	}
	return out
}

// formatDate returns t as people write it in a policy; "" for the zero time.
func formatDate(t time.Time) string {
	switch {
	case t.IsZero():
		return ""
	case t.Equal(t.Truncate(24 * time.Hour)):
		return t.UTC().Format(time.DateOnly)
	}
	return t.Format(time.RFC3339)
}

// A class is a set of names that every pattern of both policies treats alike.
type class struct {
	kind  classKind
	text  string    // the pattern
	whole string    // the pattern as written, where two classes make it up
	base  string    // its fixed part
	of    [2]string // of classOverlap: the patterns that overlap
	name  string    // one name of the class
	set   int       // the rules that cover it
}

type classKind uint8

const (
	classExact   classKind = iota // one name
	classBelow                    // the names below it
	classWild                     // the names that match a pattern with a wildcard inside
	classOverlap                  // those that match two patterns
)

// classes calls emit for every class, without its set.
func (d *differ) classes(emit func(class)) {
	d.paired, d.work = 0, 0
	for k, p := range d.sides {
		p.names.records(func(name string, exact, below posting) {
			otherExact, otherBelow := d.sides[1-k].names.lookup(name)
			if k == 1 && (otherExact != 0 || otherBelow != 0) {
				return // the old policy had it
			}
			if exact != 0 || otherExact != 0 {
				emit(class{kind: classExact, text: name, base: name, name: name})
			}
			if below != 0 || otherBelow != 0 {
				emit(class{kind: classBelow, text: belowText(name), base: name, name: d.childOf(name)})
				refs := [2]posting{below, otherBelow}
				if k == 1 {
					refs = [2]posting{otherBelow, below}
				}
				d.overlaps(emit, belowPattern(name), refs, len(d.globs))
			}
		})
	}
	for i := range d.globs {
		g := &d.globs[i]
		for _, w := range d.witnesses(g.pattern, g.pattern, 1) {
			emit(class{kind: classWild, text: w.of(g.pattern).text(), whole: g.text, base: g.base, name: w.name})
		}
		d.overlaps(emit, g.pattern, g.refs, i)
	}
}

// belowPattern returns the pattern "*." and name.
func belowPattern(name string) pattern { return pattern{base: name, below: true} }

func belowText(name string) string {
	if name == "" {
		return "*"
	}
	return "*." + name
}

// childOf returns a name below name that, if possible, no longer pattern matches.
func (d *differ) childOf(name string) string {
	if len(d.globs) == 0 {
		return join(d.fills[0], name)
	}
	return d.plainest(name, 0, d.fills, func(fill string) string { return join(fill, name) })
}

// plainest returns the name that make makes of one of the fills and that matches
// the fewest patterns besides those for all names below base or below something
// above it. There are at least least of them.
func (d *differ) plainest(base string, least int, fills []string, make func(fill string) string) (best string) {
	globs := 0
	parents(base, func(n string) bool {
		globs += len(d.wild[n])
		return true
	})
	fewest := -1
	for _, fill := range fills {
		name := make(fill)
		if name == "" {
			return ""
		}
		d.work += len(d.sides) * globs
		n := d.special(name, base)
		if fewest < 0 || n < fewest {
			best, fewest = name, n
		}
		if n <= least || d.work >= maxWork {
			break
		}
	}
	return best
}

// special counts the patterns that match name, without those for all names below
// base or below something above it.
func (d *differ) special(name, base string) int {
	seen := map[string]bool{}
	for _, p := range d.sides {
		p.names.hits(name, func(h hit) {
			if !h.below || len(h.text) > len("*.")+len(base) {
				seen[h.text] = true
			}
		})
	}
	return len(seen)
}

func join(label, name string) string {
	if name == "" {
		return label
	}
	return label + "." + name
}

// A globAt is a pattern with a wildcard inside.
type globAt struct {
	pattern
	text string
	refs [2]posting // by policy
}

func (d *differ) collectWildcards() {
	d.wild = map[string][]int{}
	index := map[string]int{}
	for k, p := range d.sides {
		p.names.wildcards(func(base string, g *glob) {
			i, ok := index[g.text]
			if !ok {
				i = len(d.globs)
				index[g.text] = i
				d.globs = append(d.globs, globAt{pattern: pattern{base: base, glob: g.labels, apex: g.apex, below: g.below}, text: g.text})
			}
			d.globs[i].refs[k] = g.refs
		})
	}
	slices.SortFunc(d.globs, func(a, b globAt) int { return strings.Compare(a.text, b.text) })
	for i := range d.globs {
		d.wild[d.globs[i].base] = append(d.wild[d.globs[i].base], i)
	}
}

// changed reports whether the rules of a pattern say something else to some pair.
func (d *differ) changed(refs [2]posting) bool {
	is, ok := d.known[refs]
	if !ok {
		for i := range d.pairs {
			var keys [2]string
			for k := range keys {
				s := d.sides[k].side(d.pairs[i].group[k], []hit{{refs: refs[k], below: true}})
				keys[k] = d.saying(k, &s)
			}
			is = is || keys[0] != keys[1]
		}
		d.known[refs] = is
	}
	return is
}

const (
	// maxOverlaps bounds with how many others a pattern is paired, and maxPairs how
	// many such pairs are looked at.
	maxOverlaps = 1000
	maxPairs    = 100_000
	// maxWork bounds how many names are matched with how many patterns to find good
	// examples; it is worth a few seconds.
	maxWork = 50_000_000
	// How many labels are tried in place of "*" for one pattern and for two.
	fillsAlone, fillsPaired = 10, 3
)

// overlaps emits the classes of names that match p and one of the globs filed at or
// above its base; of those at its own base only the ones before index. Where rules
// of neither have changed, what they share has not.
func (d *differ) overlaps(emit func(class), p pattern, refs [2]posting, index int) {
	if len(d.globs) == 0 {
		return
	}
	changed, n := d.changed(refs), 0
	parents(p.base, func(base string) bool {
		for _, i := range d.wild[base] {
			if base == p.base && i >= index {
				break
			}
			g := &d.globs[i]
			if !changed && !d.changed(g.refs) {
				continue
			}
			if n > maxOverlaps || d.paired >= maxPairs || d.work >= maxWork {
				d.partial = true
				return false
			}
			d.work++
			if d.overlap(emit, p, g) {
				n++
				d.paired++
			}
		}
		return true
	})
}

// overlap emits the classes of names that match p and g, and reports whether there
// are any.
func (d *differ) overlap(emit func(class), p pattern, g *globAt) bool {
	both := d.witnesses(p, g.pattern, 1+min(1, len(p.glob)))
	if len(both) == 0 {
		return false
	}
	of := [2]string{p.text(), g.text}
	for _, w := range both {
		emit(class{
			kind: classOverlap, text: w.of(p).text() + " & " + g.text, whole: of[0] + " & " + of[1],
			base: p.base, of: of, name: w.name,
		})
	}
	return true
}

// A witnessed is one name that matches a pattern.
type witnessed struct {
	name    string
	further bool // it has more labels than the pattern
}

// of returns the half of p that w stands for.
func (w witnessed) of(p pattern) pattern {
	if p.apex && p.below {
		p.apex, p.below = !w.further, w.further
	}
	return p
}

// witnesses returns names that match both patterns, and few others: one of the
// least length if there is one, and one that is longer. least is how many patterns
// with a wildcard inside a and b are.
func (d *differ) witnesses(a, b pattern, least int) (out []witnessed) {
	if len(a.labels()) < len(b.labels()) {
		a, b = b, a
	}
	la, lb := a.labels(), b.labels()
	if len(la) > len(lb) && !b.below {
		return nil
	}
	add := func(further bool) {
		base := a.base
		if len(b.base) > len(base) {
			base = b.base
		}
		fills := d.fills[:fillsAlone]
		if least > 1 {
			fills = d.fills[:fillsPaired]
		}
		if name := d.plainest(base, least, fills, func(fill string) string { return witness(la, lb, fill, further) }); name != "" {
			out = append(out, witnessed{name, further})
		}
	}
	if a.apex && (b.apex || len(la) > len(lb)) {
		add(false)
	}
	if a.below && b.below {
		add(true)
	}
	return out
}

// witness returns a name with the labels a that ends in the labels b, which are no
// more; "" if there is none. fill stands where any label does, and before the name
// if it shall have a further label.
func witness(a, b []string, fill string, further bool) string {
	var name []string
	if further {
		name = append(name, fill)
	}
	for i, l := range a {
		other := "*"
		if j := i - (len(a) - len(b)); j >= 0 {
			other = b[j]
		}
		label, ok := labelWitness(l, other, fill)
		if !ok {
			return ""
		}
		name = append(name, label)
	}
	return strings.Join(name, ".")
}

// labels returns the labels of p, those with wildcards as written.
func (p pattern) labels() []string {
	labels := slices.Clone(p.glob)
	if p.base != "" {
		labels = append(labels, strings.Split(p.base, ".")...)
	}
	return labels
}

// labelWitness returns a label that matches a and b.
func labelWitness(a, b, fill string) (string, bool) {
	switch {
	case !strings.Contains(a, "*"):
		return a, labelMatch(b, a)
	case !strings.Contains(b, "*"):
		return b, labelMatch(a, b)
	}
	pa, pb := strings.Split(a, "*"), strings.Split(b, "*")
	first, last := pa[0], pa[len(pa)-1]
	if len(pb[0]) > len(first) {
		first = pb[0]
	}
	if l := pb[len(pb)-1]; len(l) > len(last) {
		last = l
	}
	middle := fill
	if a != b {
		middle += strings.Join(pb[1:len(pb)-1], "")
	}
	label := first + strings.Join(pa[1:len(pa)-1], "") + middle + last
	return label, labelMatch(a, label) && labelMatch(b, label)
}

// set returns the number of the set of rules that cover name.
func (d *differ) set(name string) int {
	key := make([]byte, 0, 64)
	var hits [2][]hit
	for _, p := range d.sides {
		p.names.hits(name, func(h hit) {
			kind := byte(0)
			if h.below || h.glob {
				kind = 1
			}
			key = binary.LittleEndian.AppendUint32(key, uint32(h.refs))
			key = append(key, kind)
		})
		key = append(key, 0xff, 0xff, 0xff, 0xff, 0xff)
	}
	if i, ok := d.sets[string(key)]; ok {
		return i
	}
	for k, p := range d.sides {
		p.names.hits(name, func(h hit) { hits[k] = append(hits[k], h) })
	}
	i := len(d.outcomes)
	d.sets[string(key)] = i
	row := make([]*outcome, len(d.pairs))
	for j := range d.pairs {
		if !d.pairs[j].whole {
			row[j] = d.outcome(&d.pairs[j], hits)
		}
	}
	d.outcomes = append(d.outcomes, row)
	return i
}

// changes reports whether a set of rules makes a difference to any pair.
func (d *differ) changes(set int) bool {
	return slices.ContainsFunc(d.outcomes[set], func(o *outcome) bool { return o != nil && len(o.deltas) > 0 })
}

// outcome returns what differs between the rules that hits bring for p.
func (d *differ) outcome(p *pair, hits [2][]hit) *outcome {
	var sides [2]side
	var keys [2]string
	for k := range sides {
		sides[k] = d.sides[k].side(p.group[k], hits[k])
		keys[k] = d.saying(k, &sides[k])
	}
	both := keys[0] + "|" + keys[1]
	if o := p.outcomes[both]; o != nil {
		return o
	}
	o := &outcome{sides: sides}
	// Without rules nothing is open: the two keys are "" then, and equal.
	if keys[0] != keys[1] {
		o.deltas = compare(d.base, sides[0], sides[1], p.observe)
		for i := range o.deltas {
			o.key += o.deltas[i].key()
		}
	}
	p.outcomes[both] = o
	return o
}

// saying returns a key that is equal for rules that say the same.
func (d *differ) saying(k int, s *side) string {
	words := make([]uint32, 0, len(s.rules)+1)
	exact := false
	for i := range s.rules {
		st := &s.rules[i]
		exact = exact || !s.rule(i).deny && st.hit.text != "" && !st.hit.glob && !st.hit.below
		if m := d.meaning[k][st.ref.rule]; m != 0 {
			guard := uint32(0)
			if st.ref.owner == 0 {
				guard = 1
			}
			words = append(words, m<<1|guard)
		}
	}
	slices.Sort(words)
	words = slices.Compact(words)
	key := make([]byte, 0, 4*len(words)+1)
	for _, w := range words {
		key = binary.LittleEndian.AppendUint32(key, w)
	}
	if exact && len(words) > 0 { // it lifts built-in guardrails
		key = append(key, 1)
	}
	return string(key)
}

// nearest returns the longest name at or above name below which a pattern holds.
func (d *differ) nearest(name string) (base string, ok bool) {
	parents(name, func(n string) bool {
		for _, p := range d.sides {
			_, below := p.names.lookup(n)
			ok = ok || below != 0
		}
		base = n
		return !ok
	})
	return base, ok
}

// above returns what nearest does for the class around c.
func (d *differ) above(c *class) (base string, ok bool) {
	switch {
	case c.kind == classWild || c.kind == classOverlap:
		return d.nearest(c.base)
	case c.base == "":
		return "", false
	}
	_, up, _ := strings.Cut(c.base, ".")
	return d.nearest(up)
}

// fold leaves out what a change of a wider pattern says already, and joins x.com
// and *.x.com.
func (p *pair) fold(d *differ) {
	keys, exact := map[string]string{}, map[string]int{}
	changed := make([]int, 0, len(d.found))
	for i := range d.found {
		c := &d.found[i]
		o := d.outcomes[c.set][p.index]
		if o == nil || len(o.deltas) == 0 {
			continue
		}
		changed = append(changed, i)
		switch c.kind {
		case classExact:
			exact[c.text] = i
		case classBelow:
			keys[c.text] = o.key
		default:
			keys[c.whole] = o.key
		}
	}
	var last *shown
	for _, i := range changed {
		c := &d.found[i]
		o := d.outcomes[c.set][p.index]
		up, ok := d.above(c)
		switch {
		case ok && keys[belowText(up)] == o.key:
			continue
		case c.kind == classExact && keys[belowText(c.base)] == o.key:
			continue
		case c.kind == classOverlap && (keys[c.of[0]] == o.key || keys[c.of[1]] == o.key):
			continue
		case last != nil && c.whole != "" && last.whole == c.whole && last.key == o.key:
			last.text = c.whole
			continue
		}
		s := &shown{class: *c, outcome: o, except: make([][]string, len(o.deltas)), excepted: make([]int, len(o.deltas))}
		if j, ok := exact[c.base]; ok && c.kind == classBelow && d.outcomes[d.found[j].set][p.index].key == o.key {
			s.text = "." + c.base
		}
		p.shown, last = append(p.shown, s), s
		if c.kind == classBelow {
			p.below[c.base] = s
		}
	}
	// What was folded into a wider pattern has the exceptions of that one.
	for _, i := range changed {
		if c := &d.found[i]; c.kind == classBelow && p.below[c.base] == nil {
			p.below[c.base] = p.widest(d, c)
		}
	}
}

// widest returns what c was folded into.
func (p *pair) widest(d *differ, c *class) *shown {
	for {
		up, ok := d.above(c)
		if !ok {
			return nil
		}
		if s := p.below[up]; s != nil {
			return s
		}
		c = &class{kind: classBelow, base: up}
	}
}

// exceptions finds what lies within the patterns that are shown and does not go with them.
func (d *differ) exceptions() {
	bases := map[string]bool{}
	for i := range d.pairs {
		for base := range d.pairs[i].below {
			bases[base] = true
		}
	}
	if len(bases) == 0 {
		return
	}
	d.classes(func(c class) {
		within := false // most names are not, which is found out faster than what above does
		parents(c.base, func(base string) bool {
			within = bases[base]
			return !within
		})
		up, ok := "", false
		if within {
			up, ok = d.above(&c)
		}
		if !ok {
			return
		}
		c.set = d.set(c.name)
		for i := range d.pairs {
			p := &d.pairs[i]
			s, o := p.below[up], d.outcomes[c.set][i]
			if s == nil || o == nil || len(o.deltas) > 0 {
				continue
			}
			for j, x := range s.deltas {
				mode := ModeEnforce
				if x.observed {
					mode = ModeObserve
				}
				if passes, _ := o.sides[1].passes(d.base, x.sample, mode); passes != x.opened {
					s.except[j] = append(s.except[j], c.text)
					s.excepted[j]++
					if len(s.except[j]) > 4*maxExcept {
						s.except[j] = firstFew(s.except[j])
					}
				}
			}
		}
	})
}

// firstFew sorts names and cuts what is too much.
func firstFew(names []string) []string {
	slices.SortFunc(names, compareText)
	return names[:min(len(names), maxExcept)]
}

// nameChanges returns what is shown of p.
func (d *differ) nameChanges(p *pair) (out []Change) {
	for _, s := range p.shown {
		var hits []hit // rules may have their pattern as ID, so another name of the set will not do
		d.sides[1].names.hits(s.name, func(h hit) { hits = append(hits, h) })
		after := d.sides[1].side(p.group[1], hits)
		for j, x := range s.deltas {
			c := d.change(d.base, x, &after)
			c.Kind, c.Target, c.Except, c.Excepted = TargetName, s.text, firstFew(s.except[j]), s.excepted[j]
			out = append(out, c)
		}
	}
	slices.SortStableFunc(out, func(a, b Change) int { return compareText(a.Target, b.Target) })
	return out
}

// change turns a delta into a Change, with the rule of the new side that decides.
func (d *differ) change(base Request, x delta, s *side) Change {
	mode := ModeEnforce
	if x.observed {
		mode = ModeObserve
	}
	_, dec := s.passes(base, x.sample, mode)
	c := Change{Opened: x.opened, Facets: x.facets, To: x.to, Observed: x.observed, Rule: dec.Rule}
	if !x.opened {
		c.Reason = dec.Reason.String()
	} else if !x.observed {
		c.Until = s.until(base, x.sample)
	}
	return c
}

// until returns when the last rule that allows c expires; "": never.
func (s *side) until(base Request, c cell) string {
	var last time.Time
	for i := range s.rules {
		r := s.rule(i)
		if r.deny {
			continue
		}
		one := side{p: s.p, g: s.g, rules: s.rules[i : i+1]}
		if ok, _ := one.passes(base, c, ModeEnforce); !ok {
			continue
		}
		if r.expires.IsZero() {
			return ""
		}
		if r.expires.After(last) {
			last = r.expires
		}
	}
	return formatDate(last)
}

// expiries compares the dates of rules that are in both policies.
func (d *differ) expiries() (out []ExpiryChange) {
	type key struct {
		group, id string
		deny      bool
	}
	var dates [2]map[key]string
	var order []key
	for k, p := range d.sides {
		dates[k] = map[key]string{}
		owners := make([]uint32, len(p.rules))
		for _, refs := range p.postings.sets {
			for _, r := range refs {
				owners[r.rule] = r.owner
			}
		}
		for i := range p.rules {
			if r := &p.rules[i]; r.id != "" && !r.builtin {
				id := key{id: r.id, deny: r.deny}
				if owners[i] > 0 {
					id.group = p.groups[owners[i]-1].name
				}
				if _, ok := dates[k][id]; !ok && k == 1 {
					order = append(order, id)
				}
				dates[k][id] = formatDate(r.expires)
			}
		}
	}
	for _, id := range order {
		if was, ok := dates[0][id]; ok && was != dates[1][id] {
			out = append(out, ExpiryChange{id.group, id.deny, id.id, was, dates[1][id]})
		}
	}
	return out
}
