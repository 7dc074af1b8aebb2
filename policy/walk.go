package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/gaissmai/bart"
)

// What diff and lint need to look at a whole policy rather than at one request.

// hits calls yield for every pattern that matches name, as match does for a
// decision.
func (x *nameIndex) hits(name string, yield func(hit)) {
	if x.root != 0 {
		x.recordHits(name, len(name), x.root, yield)
	}
	h := x.seed
	for end := len(name); end > 0; {
		i := strings.LastIndexByte(name[:end], '.') + 1
		h = extend(h, name[i:end])
		if off := x.find(name[i:], h); off != 0 {
			x.recordHits(name, i, off, yield)
		}
		end = i - 1
	}
}

// recordHits is visit for hits.
func (x *nameIndex) recordHits(name string, i int, off uint32, yield func(hit)) {
	if i == 0 {
		if refs := x.exact(off); refs != 0 {
			yield(hit{refs: refs, text: x.text(off)})
		}
	} else if refs := x.below(off); refs != 0 {
		yield(hit{refs: refs, text: x.text(off), below: true})
	}
	left := strings.TrimSuffix(name[:i], ".")
	for _, g := range x.globs[off] {
		if globMatch(g.labels, left, g.apex, g.below) {
			yield(hit{refs: g.refs, text: g.text, glob: true})
		}
	}
}

// records calls yield for every fixed part, in the order in which they were added,
// with what holds for it and below it. "" is the root.
func (x *nameIndex) records(yield func(name string, exact, below posting)) {
	at := 1
	for i, chunk := range x.arena {
		for at < len(chunk) {
			off := uint32(i<<chunkBits + at)
			text := x.text(off)
			yield(text[2:], x.exact(off), x.below(off))
			at += recordHeader + len(text)
		}
		at = 0
	}
}

// lookup returns what holds for the fixed part name and below it.
func (x *nameIndex) lookup(name string) (exact, below posting) {
	if off := x.find(name, x.hash(name)); off != 0 {
		return x.exact(off), x.below(off)
	}
	return 0, 0
}

// wildcards calls yield for every pattern with a wildcard inside.
func (x *nameIndex) wildcards(yield func(base string, g *glob)) {
	for off, globs := range x.globs {
		for i := range globs {
			yield(x.text(off)[2:], &globs[i])
		}
	}
}

// parents calls yield for name and each name above it, longest first, the root
// ("") last, until yield returns false.
func parents(name string, yield func(string) bool) {
	for yield(name) && name != "" {
		_, name, _ = strings.Cut(name, ".")
	}
}

// An addrRange is a run of addresses of one family, both ends included.
type addrRange struct{ first, last netip.Addr }

// rangeOf returns the addresses of pfx.
func rangeOf(pfx netip.Prefix) addrRange {
	b := pfx.Addr().AsSlice()
	for i := pfx.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return addrRange{pfx.Masked().Addr(), last}
}

// prefixes returns the fewest prefixes that make up r.
func (r addrRange) prefixes() []netip.Prefix {
	var out []netip.Prefix
	for first := r.first; first.IsValid() && !r.last.Less(first); {
		bits := first.BitLen()
		for bits > 0 {
			wider := netip.PrefixFrom(first, bits-1)
			if wider != wider.Masked() || r.last.Less(rangeOf(wider).last) {
				break
			}
			bits--
		}
		pfx := netip.PrefixFrom(first, bits)
		out = append(out, pfx)
		first = rangeOf(pfx).last.Next()
	}
	return out
}

// A partition cuts address space into segments within which no prefix begins or ends.
type partition struct{ starts []netip.Addr }

func (p *partition) add(pfx netip.Prefix) {
	r := rangeOf(pfx)
	p.starts = append(p.starts, r.first)
	if next := r.last.Next(); next.IsValid() {
		p.starts = append(p.starts, next)
	}
}

// segments returns the segments in order. Together they are all of IPv4 and IPv6.
func (p *partition) segments() []addrRange {
	starts := append(slices.Clone(p.starts), netip.IPv4Unspecified(), netip.IPv6Unspecified())
	slices.SortFunc(starts, netip.Addr.Compare)
	starts = slices.Compact(starts)
	out := make([]addrRange, len(starts))
	for i, a := range starts {
		last := rangeOf(netip.PrefixFrom(a, 0)).last
		if i+1 < len(starts) && starts[i+1].BitLen() == a.BitLen() {
			last = starts[i+1].Prev()
		}
		out[i] = addrRange{a, last}
	}
	return out
}

// addPrefixes adds every prefix of t to p.
func addPrefixes[V any](p *partition, t *bart.Table[V]) {
	for pfx := range t.All() {
		p.add(pfx)
	}
}

// addSpecial adds what decides whether an address is globally reachable, and the
// addresses that must be named one by one.
func (p *partition) addSpecial() {
	for pfx := range special.All() {
		p.add(pfx)
	}
	p.add(nat64)
	for _, a := range platformAddresses {
		p.add(netip.PrefixFrom(a, a.BitLen()))
	}
}

// merge joins neighbouring ranges. It sorts rs.
func merge(rs []addrRange) []addrRange {
	slices.SortFunc(rs, func(a, b addrRange) int { return a.first.Compare(b.first) })
	var out []addrRange
	for _, r := range rs {
		if n := len(out); n > 0 && out[n-1].last.Next() == r.first {
			out[n-1].last = r.last
		} else {
			out = append(out, r)
		}
	}
	return out
}

// toPrefixes returns the fewest prefixes that make up rs. It sorts rs.
func toPrefixes(rs []addrRange) []netip.Prefix {
	var out []netip.Prefix
	for _, r := range merge(rs) {
		out = append(out, r.prefixes()...)
	}
	return out
}

// compareText orders names and patterns by what they stand for, then by spelling.
func compareText(a, b string) int {
	return cmp.Or(strings.Compare(strings.TrimLeft(a, "*."), strings.TrimLeft(b, "*.")), strings.Compare(a, b))
}
