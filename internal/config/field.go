package config

import (
	"reflect"
	"strings"
)

// A field is one key of the settings, as the tags of its struct field describe it.
type field struct {
	key      string // last part of path, such as idle
	path     string // such as proxy.timeouts.idle; within a list's items without an index
	doc      string
	kind     kind
	kindName string
	enum     []string
	min, max string // bounds as written in the tags; "" for none
	def      string // value of a key left out of a list's item
	required bool   // the key may not be left out of a list's item
	live     bool   // a reload applies it
	list     bool
	children []*field // keys of a section, or of each of a list's items
	index    []int    // where the value stands in Settings, for reflect
	typ      reflect.Type
}

// section reports whether f is a mapping of its own, not a value.
func (f *field) section() bool { return f.children != nil && !f.list }

// child returns the key of f named name.
func (f *field) child(name string) *field {
	for _, c := range f.children {
		if c.key == name {
			return c
		}
	}
	return nil
}

// env returns the environment variable that sets f.
func (f *field) env() string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(f.path, ".", "_"))
}

// root describes Settings as a whole, and leaves are the values in it, in order.
var (
	root   = &field{children: describe(reflect.TypeFor[Settings](), "", nil)}
	leaves = collect(root)
)

func describe(t reflect.Type, prefix string, index []int) []*field {
	var fs []*field
	for i := range t.NumField() {
		sf := t.Field(i)
		tag := sf.Tag.Get
		if tag("yaml") == "-" {
			continue
		}
		f := &field{
			key: tag("yaml"), path: prefix + tag("yaml"), doc: tag("doc"), kindName: tag("kind"),
			enum: strings.Fields(tag("enum")), min: tag("min"), max: tag("max"), def: tag("default"),
			required: tag("required") != "", live: tag("live") != "",
			index: append(append([]int(nil), index...), i), typ: sf.Type,
		}
		f.kind = kinds[f.kindName]
		elem := sf.Type
		if elem.Kind() == reflect.Slice {
			f.list, elem = true, elem.Elem()
		}
		if f.kindName == "" {
			f.children = describe(elem, f.path+".", f.index)
		}
		fs = append(fs, f)
	}
	return fs
}

func collect(f *field) []*field {
	var fs []*field
	for _, c := range f.children {
		if c.section() {
			fs = append(fs, collect(c)...)
		} else {
			fs = append(fs, c)
		}
	}
	return fs
}

// RestartOnly returns the paths of the settings in which next differs from s and
// that only a restart applies. A reload applies those whose tag says live: log.level
// and the ways out of the proxy. Everything else, such as proxy.listen, belongs to something that was
// built at the start.
func (s Settings) RestartOnly(next Settings) []string {
	var paths []string
	a, b := reflect.ValueOf(s), reflect.ValueOf(next)
	for _, f := range leaves {
		if !f.live && !reflect.DeepEqual(a.FieldByIndex(f.index).Interface(), b.FieldByIndex(f.index).Interface()) {
			paths = append(paths, f.path)
		}
	}
	return paths
}

// nearest returns which of names was probably meant by s, or "".
func nearest(s string, names []string) string {
	best, at := "", 1+min(3, max(1, len(s)/3))
	for _, n := range names {
		if d := distance(s, n); d < at {
			best, at = n, d
		}
	}
	return best
}

// distance is the number of single-byte edits between a and b (Levenshtein). Long
// input is far from everything, which bounds the work.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
