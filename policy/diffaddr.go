package policy

import (
	"fmt"
	"net/netip"
	"slices"
)

// ranged collects which addresses the same deltas hold for.
type ranged struct {
	deltas []delta
	sides  []side    // of the new policy, by delta
	base   []Request // by delta
	ranges map[string][]addrRange
	known  map[string][]delta // what was compared before
}

// add files deltas for the addresses of seg.
func (x *ranged) add(deltas []delta, seg addrRange, base Request, s side) {
	if x.ranges == nil {
		x.ranges = map[string][]addrRange{}
	}
	for _, dl := range deltas {
		key := dl.key()
		if x.ranges[key] == nil {
			x.deltas, x.sides, x.base = append(x.deltas, dl), append(x.sides, s), append(x.base, base)
		}
		x.ranges[key] = append(x.ranges[key], seg)
	}
}

// once returns the deltas for key, which make finds out the first time.
func (x *ranged) once(key string, make func() []delta) []delta {
	if x.known == nil {
		x.known = map[string][]delta{}
	}
	deltas, ok := x.known[key]
	if !ok {
		deltas = make()
		x.known[key] = deltas
	}
	return deltas
}

// changes returns what was collected, one Change a prefix.
func (x *ranged) changes(d *differ, kind string) (out []Change) {
	for i, dl := range x.deltas {
		c := d.change(x.base[i], dl, &x.sides[i])
		c.Kind = kind
		for _, pfx := range toPrefixes(x.ranges[dl.key()]) {
			c.Target = pfx.String()
			out = append(out, c)
		}
	}
	slices.SortStableFunc(out, func(a, b Change) int {
		x, y := netip.MustParsePrefix(a.Target), netip.MustParsePrefix(b.Target)
		return x.Compare(y)
	})
	return out
}

// addresses compares what rules with addresses say.
func (d *differ) addresses() {
	var part partition
	for _, p := range d.sides {
		addPrefixes(&part, &p.addresses)
	}
	if len(part.starts) == 0 {
		return
	}
	part.addSpecial()
	for _, p := range d.sides {
		for i := range p.rules {
			for _, pfx := range p.rules[i].private {
				part.add(pfx)
			}
		}
	}
	for _, seg := range part.segments() {
		var hits [2][]hit
		for k, p := range d.sides {
			if refs, ok := p.addresses.Lookup(seg.first); ok {
				hits[k] = []hit{{refs: refs}}
			}
		}
		for i := range d.pairs {
			if p := &d.pairs[i]; !p.whole && len(hits[0])+len(hits[1]) > 0 {
				d.literal(p, seg, hits)
				d.leadingTo(p, seg, hits)
			}
		}
	}
}

// literal compares requests for the addresses of seg themselves.
func (d *differ) literal(p *pair, seg addrRange, hits [2][]hit) {
	var sides [2]side
	var keys [2]string
	for k := range sides {
		sides[k] = d.sides[k].side(p.group[k], hits[k])
		keys[k] = d.saying(k, &sides[k])
	}
	if keys[0] == keys[1] {
		return
	}
	base := d.base
	base.Name, base.Address, base.Destination = Name{}, seg.first, seg.first
	key := fmt.Sprint(keys, IsGlobal(seg.first))
	for k := range sides {
		for i := range sides[k].rules {
			key += fmt.Sprint(namesAddr(sides[k].rule(i).private, seg.first))
		}
	}
	deltas := p.literal.once(key, func() []delta { return compare(base, sides[0], sides[1], p.observe) })
	p.literal.add(deltas, seg, base, sides[1])
}

// leadingTo compares requests for names that lead to the addresses of seg, where
// deny rules hold too.
func (d *differ) leadingTo(p *pair, seg addrRange, hits [2][]hit) {
	var denies [2]side
	var keys [2]string
	for k := range denies {
		denies[k] = d.sides[k].side(p.group[k], hits[k])
		denies[k].rules = slices.DeleteFunc(denies[k].rules, func(s standing) bool { return !d.sides[k].rules[s.ref.rule].deny })
		keys[k] = d.saying(k, &denies[k])
	}
	if keys[0] == keys[1] {
		return
	}
	base := d.base
	base.Destination = seg.first
	key := fmt.Sprint(keys)
	if !IsGlobal(seg.first) {
		key += seg.first.String() // which rules name it differs from one to the next
	}
	deltas := p.leadingTo.once(key, func() (out []delta) {
		out = append(out, d.denied(p, base, denies, ModeEnforce)...)
		if p.observe {
			out = append(out, d.denied(p, base, denies, ModeObserve)...)
		}
		return out
	})
	p.leadingTo.add(deltas, seg, base, denies[1])
}

// denied returns what denies open or close of what the rules for names let through
// on both sides.
func (d *differ) denied(p *pair, base Request, denies [2]side, mode Mode) (out []delta) {
	var opened, closed []cellDiff
	each := func(named [2]side) {
		both := named
		for k := range both {
			both[k].rules = slices.Concat(named[k].rules, denies[k].rules)
		}
		g := grid{base: base, old: both[0], new: both[1], spans: portSpans(&both[0], &both[1]), types: questionTypes(&both[0], &both[1])}
		o, c := g.diff(netip.Addr{}, mode)
		g.old, g.new = named[0], named[1]
		without, gained := g.diff(netip.Addr{}, mode)
		o.without(&without)
		c.without(&gained)
		opened, closed = append(opened, o), append(closed, c)
	}
	for _, o := range p.outcomes {
		each(o.sides)
	}
	if mode == ModeObserve { // any other name
		each([2]side{{p: denies[0].p, g: denies[0].g}, {p: denies[1].p, g: denies[1].g}})
	}
	o, c := union(opened), union(closed)
	out = append(out, o.delta(netip.Addr{}, true, mode == ModeObserve)...)
	return append(out, c.delta(netip.Addr{}, false, mode == ModeObserve)...)
}

// union returns the cells of all of xs.
func union(xs []cellDiff) cellDiff {
	starts, types := []uint16{1}, []uint16{}
	for _, x := range xs {
		for i, bits := range x.conn {
			if bits != 0 {
				starts = append(starts, x.spans[i].first)
				if last := x.spans[i].last; last < 65535 {
					starts = append(starts, last+1)
				}
			}
		}
		types = append(types, x.types...)
	}
	slices.Sort(starts)
	slices.Sort(types)
	out := cellDiff{types: slices.Compact(types)}
	starts = slices.Compact(starts)
	for i, first := range starts {
		out.spans = append(out.spans, portRange{first, 65535})
		if i > 0 {
			out.spans[i-1].last = first - 1
		}
	}
	out.conn, out.dns = make([]uint32, len(out.spans)), make([]bool, len(out.types))
	for _, x := range xs {
		for i, bits := range x.conn {
			if bits == 0 {
				continue
			}
			j, _ := slices.BinarySearch(starts, x.spans[i].first)
			for ; j < len(starts) && starts[j] <= x.spans[i].last; j++ {
				out.conn[j] |= bits
			}
		}
		for i, t := range x.types {
			j, _ := slices.BinarySearch(out.types, t)
			out.dns[j] = out.dns[j] || x.dns[i]
		}
	}
	return out
}
