package discovery

import (
	"slices"
	"strings"

	"golang.org/x/net/publicsuffix"
)

// When several names below one parent become "*." and the parent. A handful of names
// with words for labels (www, api, login) is the set that is needed, and stays as it is:
// who reads the proposal can widen it, but does not see what a pattern hides. Labels
// with digits in them are numbered or made by machines, and three of them say that there
// will be others. So do eight of whatever kind.
const (
	foldNumbered = 3
	foldAny      = 8
)

// A folded is a pattern and the names that it stands for.
type folded struct {
	pattern string
	names   []string // sorted
}

// fold returns patterns for names, which are sorted and in canonical form, in the order
// of what stands below what. No pattern is over a public suffix, of registries or of
// those who rent out names, nor over a name of one label.
func fold(names []string) []folded {
	items := make(map[string]folded, len(names)) // by name; of a pattern by its parent with "*."
	for _, n := range names {
		items[n] = folded{n, []string{n}}
	}
	for depth := maxDepth(names); depth > 1; depth-- {
		foldDepth(items, depth)
	}
	out := make([]folded, 0, len(items))
	for _, f := range items {
		slices.Sort(f.names)
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b folded) int { return compareNames(a.pattern, b.pattern) })
	return out
}

func maxDepth(names []string) (depth int) {
	for _, n := range names {
		depth = max(depth, strings.Count(n, ".")+1)
	}
	return depth
}

// foldDepth folds what stands below parents of depth-1 labels. What is further down has
// been folded before.
func foldDepth(items map[string]folded, depth int) {
	below := map[string][]string{} // of a parent: the keys of all below it
	for key := range items {
		name := strings.TrimPrefix(key, "*.")
		if parent, ok := lastLabels(name, depth-1); ok {
			below[parent] = append(below[parent], key)
		}
	}
	for parent, keys := range below {
		if !foldable(parent) || !evident(keys, depth) {
			continue
		}
		all := folded{pattern: "*." + parent}
		for _, key := range keys {
			all.names = append(all.names, items[key].names...)
			delete(items, key)
		}
		items[all.pattern] = all
	}
}

// lastLabels returns the last n labels of name; false if it has no more than that.
func lastLabels(name string, n int) (string, bool) {
	end := len(name)
	for ; n > 0; n-- {
		if end = strings.LastIndexByte(name[:end], '.'); end < 0 {
			return "", false
		}
	}
	return name[end+1:], true
}

// foldable reports whether there may be a pattern over parent.
func foldable(parent string) bool {
	suffix, _ := publicsuffix.PublicSuffix(parent)
	return suffix != parent
}

// evident reports whether keys, which all stand below one parent, say that there will be
// more. What counts is the labels directly below it, the depth-th from the right.
func evident(keys []string, depth int) bool {
	labels, numbered := map[string]bool{}, map[string]bool{}
	for _, key := range keys {
		name, _ := lastLabels("."+strings.TrimPrefix(key, "*."), depth)
		label, _, _ := strings.Cut(name, ".")
		labels[label] = true
		if strings.ContainsAny(label, "0123456789") && !strings.HasPrefix(label, "xn--") {
			numbered[label] = true
		}
	}
	return len(labels) >= foldAny || len(numbered) >= foldNumbered
}

// compareNames orders names by their labels from the right, so that what belongs to one
// organisation stands together, and patterns before what they stand over.
func compareNames(a, b string) int {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	slices.Reverse(x)
	slices.Reverse(y)
	return slices.Compare(x, y)
}
