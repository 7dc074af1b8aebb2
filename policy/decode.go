package policy

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// hidesNames reports whether e may have cost a group or a list, so that references
// to it would look like mistakes too.
func hidesNames(e *Error) bool {
	return e.Path != "version" && !strings.Contains(e.Path, "].") || strings.HasSuffix(e.Path, ".name")
}

// within reports whether path is outer or a part of it.
func within(outer, path string) bool {
	rest, ok := strings.CutPrefix(path, outer)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
}

// ParseDocument decodes a policy written in YAML, at most [MaxDocument] bytes of
// it. Decoding is strict: unknown and repeated keys, values of another type, empty
// values, anchors, aliases, tags and a second document are mistakes. The error is
// an Errors with the first 200 of them, in the order of their positions; file is
// the name it gives them.
//
// Whether patterns, prefixes, dates and references mean anything is for [Compile]
// to say. If the text is YAML, the Document comes back even with an error, holding
// what could be read: good for finding further mistakes, never to be put in force.
func ParseDocument(file string, data []byte) (*Document, error) {
	d := decoder{file: file}
	var doc *Document
	if root := d.parse(data); root != nil {
		doc = &Document{parts: []part{{positions: positions{file, root}}}}
		d.value(root, reflect.ValueOf(doc).Elem(), nil, "")
	}
	if len(d.errs) > 0 {
		sortErrors(d.errs)
		return doc, d.errs
	}
	return doc, nil
}

// A decoder fills a Document and collects what is wrong with the text.
type decoder struct {
	file string
	errs Errors
}

func (d *decoder) fail(n *yaml.Node, at *place, format string, args ...any) {
	d.failAt(n.Line, n.Column, at, format, args...)
}

func (d *decoder) failAt(line, column int, at *place, format string, args ...any) {
	if len(d.errs) < maxErrors {
		d.errs = append(d.errs, &Error{Pos{d.file, line, column}, at.String(), fmt.Errorf(format, args...)})
	}
}

// A place is one step of a path, and the steps before it. Only mistakes spell it out.
type place struct {
	up    *place
	key   string // "" for an index
	index int
}

// String returns the path, such as groups[2].allow[0].
func (p *place) String() string {
	switch {
	case p == nil:
		return ""
	case p.key == "":
		return p.up.String() + "[" + strconv.Itoa(p.index) + "]"
	case p.up == nil:
		return p.key
	}
	return p.up.String() + "." + p.key
}

// A field is one key of a mapping.
type field struct {
	key      string
	doc      string // its entry in keyDocs
	index    int    // of the struct field
	required bool
}

// A shape is what a mapping may hold.
type shape struct {
	where  string
	fields []field
}

var (
	ruleType = reflect.TypeFor[Rule]()
	// shapes has every mapping of a document. Their order is that in which they are
	// searched for the home of a misplaced key.
	shapeTypes = []reflect.Type{reflect.TypeFor[Document](), reflect.TypeFor[List](), reflect.TypeFor[Group](), ruleType, reflect.TypeFor[TLSRule]()}
	shapes     = map[reflect.Type]shape{
		shapeTypes[0]: {"at the top level", fieldsOf(shapeTypes[0])},
		shapeTypes[1]: {"in a list", fieldsOf(shapeTypes[1])},
		shapeTypes[2]: {"in a group", fieldsOf(shapeTypes[2])},
		shapeTypes[3]: {"in a rule", fieldsOf(shapeTypes[3])},
		shapeTypes[4]: {"in tls", fieldsOf(shapeTypes[4])},
	}
)

// fieldsOf reads the yaml tags of t. A key that is never left out on writing is required.
func fieldsOf(t reflect.Type) []field {
	var fields []field
	for f := range t.Fields() {
		if key, options, ok := strings.Cut(f.Tag.Get("yaml"), ","); f.IsExported() {
			fields = append(fields, field{key, t.Name() + "." + key, f.Index[0], !ok || options != "omitempty"})
		}
	}
	return fields
}

// alsoWritten tells which scalars besides strings a key takes; their text is kept as written.
var alsoWritten = map[string]struct {
	noun string
	tags []string
}{
	"Rule.ports":          {"a port or a range of ports", []string{"!!int"}},
	"Rule.expires":        {"a date", []string{"!!timestamp"}},
	"Group.observe_until": {"a date", []string{"!!timestamp"}},
	"TLSRule.min_version": {"a version", []string{"!!float", "!!int"}},
	"Assertions.at":       {"a date", []string{"!!timestamp"}},
	"Assertion.at":        {"a date", []string{"!!timestamp"}},
}

// value decodes n into v. doc is the key's entry in keyDocs, "" for the document itself.
func (d *decoder) value(n *yaml.Node, v reflect.Value, at *place, doc string) {
	if !d.isPlain(n, at) {
		return
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		d.fail(n, at, "nothing is written here; write %s, or remove the line", such(doc))
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.value(n, v.Elem(), at, doc)
	case reflect.Slice:
		d.sequence(n, v, at, doc)
	case reflect.Struct:
		if v.Type() == ruleType && n.Kind == yaml.ScalarNode {
			if s, ok := d.text(n, at, "Rule.names"); ok {
				v.Addr().Interface().(*Rule).Names = []string{s}
			}
			return
		}
		d.mapping(n, v, at, doc)
	case reflect.Bool:
		if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
			d.fail(n, at, "want true or false, not %s; write %s", describe(n), such(doc))
		}
		v.SetBool(strings.EqualFold(n.Value, "true"))
	case reflect.Int:
		d.version(n, v, at, doc)
	default:
		if s, ok := d.text(n, at, doc); ok {
			v.SetString(s)
		}
	}
}

// isPlain refuses what a reader would have to look up elsewhere in the file.
func (d *decoder) isPlain(n *yaml.Node, at *place) bool {
	switch {
	case n.Kind == yaml.AliasNode:
		d.fail(n, at, "an alias (*%s) is not supported; share names through lists and rules through extends, and put a pattern that begins with * in quotes", clip(n.Value))
	case n.Anchor != "":
		d.fail(n, at, "an anchor (&%s) is not supported; share names through lists and rules through extends", clip(n.Anchor))
	case n.Style&yaml.TaggedStyle != 0:
		d.fail(n, at, "a tag (%s) is not supported; remove it, or put a string that begins with ! in quotes", clip(n.Tag))
	default:
		return true
	}
	return false
}

func (d *decoder) sequence(n *yaml.Node, v reflect.Value, at *place, doc string) {
	if n.Kind != yaml.SequenceNode {
		hint := "write " + such(doc)
		if v.Type().Elem().Kind() == reflect.Struct {
			hint = "begin each item with \"- \", as in " + such(doc)
		}
		d.fail(n, at, "want a list, not %s; %s", describe(n), hint)
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, item := range n.Content {
		d.value(item, v.Index(i), &place{up: at, index: i}, doc)
	}
}

func (d *decoder) mapping(n *yaml.Node, v reflect.Value, at *place, doc string) {
	s := shapeOf(v.Type())
	if n.Kind != yaml.MappingNode {
		d.fail(n, at, "want keys and values, not %s; write %s", describe(n), such(doc))
		return
	}
	lines := make([]int, len(s.fields))
	for i := 0; i < len(n.Content); i += 2 {
		key := n.Content[i]
		if !d.isPlain(key, at) {
			continue
		}
		k := slices.IndexFunc(s.fields, func(f field) bool { return f.key == key.Value })
		switch {
		case key.Kind != yaml.ScalarNode:
			d.fail(key, at, "want a key, not %s; put a string that begins with { or [ in quotes", describe(key))
		case key.Tag == "!!merge":
			d.fail(key, at, "a merge key (<<) is not supported; share names through lists and rules through extends")
		case k < 0:
			d.unknownKey(key, at, s)
		case lines[k] > 0:
			d.fail(key, &place{up: at, key: key.Value}, "the key was given before, in line %d; keep one of the two", lines[k])
		default:
			f := s.fields[k]
			lines[k] = key.Line
			d.value(n.Content[i+1], v.Field(f.index), &place{up: at, key: f.key}, f.doc)
		}
	}
	for k, f := range s.fields {
		if f.required && lines[k] == 0 {
			d.fail(n, &place{up: at, key: f.key}, "missing; add %s", such(f.doc))
		}
	}
}

// version decodes the one number there is.
func (d *decoder) version(n *yaml.Node, v reflect.Value, at *place, doc string) {
	i, err := strconv.Atoi(n.Value)
	switch {
	case n.Kind != yaml.ScalarNode || n.Tag != "!!int" || err != nil:
		d.fail(n, at, "want a number, not %s; write %s", describe(n), such(doc))
	case i != Version:
		d.fail(n, at, "version %d is not known; write version: %d", i, Version)
	}
	v.SetInt(int64(i))
}

// text returns the string in n, exactly as written.
func (d *decoder) text(n *yaml.Node, at *place, doc string) (string, bool) {
	other := alsoWritten[doc]
	noun := other.noun
	if noun == "" {
		noun = "a string"
	}
	switch {
	case n.Kind != yaml.ScalarNode:
		hint := ""
		if n.Kind == yaml.MappingNode && n.Style&yaml.FlowStyle == 0 && len(n.Content) == 2 {
			hint = "; put a string with \": \" in it, or \":\" at its end, in quotes"
		}
		d.fail(n, at, "want %s, not %s; write %s%s", noun, describe(n), such(doc), hint)
	case n.Tag == "!!str" && n.Style == 0 && isOldBool(n.Value):
		d.fail(n, at, "%s without quotes means true or false to many YAML readers; put it in quotes: %q", n.Value, n.Value)
	case strings.ContainsFunc(n.Value, func(r rune) bool { return r != '\n' && r != '\t' && isInvisible(r) }):
		d.fail(n, at, "the string holds an invisible character; remove the escape sequence")
	case n.Tag == "!!str" || slices.Contains(other.tags, n.Tag):
		return n.Value, true
	case other.noun != "":
		d.fail(n, at, "want %s, not %s; write %s", noun, describe(n), such(doc))
	default:
		d.fail(n, at, "want a string, not %s; put it in quotes: %q", describe(n), clip(n.Value))
	}
	return "", false
}

// isOldBool reports whether YAML 1.1 reads s as a boolean and YAML 1.2 as a string.
func isOldBool(s string) bool {
	switch strings.ToLower(s) {
	case "yes", "no", "on", "off":
		return true
	}
	return false
}

// describe says what stands at n, for messages.
func describe(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "keys and values"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Tag == "!!int" || n.Tag == "!!float":
		return "the number " + clip(n.Value)
	case n.Tag == "!!timestamp":
		return "the date " + clip(n.Value)
	case n.Tag == "!!str":
		return fmt.Sprintf("the string %q", clip(n.Value))
	}
	return clip(n.Value)
}

// such returns what to write for a key, such as "ports: [443]".
func such(doc string) string {
	_, key, _ := strings.Cut(doc, ".")
	if key == "" {
		return "version: 1 and what follows it"
	}
	return key + ": " + exampleOf(doc)
}

// unknownKey reports key with the best guess at what was meant.
func (d *decoder) unknownKey(key *yaml.Node, at *place, s shape) {
	if isIdentifier(key.Value) {
		at = &place{up: at, key: key.Value}
	}
	name := clip(key.Value)
	for _, t := range shapeTypes {
		if home := shapes[t]; slices.ContainsFunc(home.fields, func(f field) bool { return f.key == key.Value }) {
			d.fail(key, at, "unknown key %q %s; it belongs %s", name, s.where, home.where)
			return
		}
	}
	best, most := "", 2
	known := make([]string, len(s.fields))
	for i, f := range s.fields {
		known[i] = f.key
		if n := distance(strings.ToLower(strings.ReplaceAll(name, "-", "_")), f.key); n <= most && 3*n <= len(f.key) {
			best, most = f.key, n-1
		}
	}
	if best != "" {
		d.fail(key, at, "unknown key %q %s; did you mean %q?", name, s.where, best)
		return
	}
	slices.Sort(known)
	hint := ""
	if strings.ContainsAny(name, ".:") {
		hint = "; put a string with \": \" in it, or \":\" at its end, in quotes"
	}
	d.fail(key, at, "unknown key %q %s; there are %s%s", name, s.where, strings.Join(known, ", "), hint)
}

// isIdentifier reports whether s can stand in a path.
func isIdentifier(s string) bool {
	return s != "" && len(s) <= 40 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz_-") == ""
}

// distance counts the letters to add, drop, change or swap with their neighbour to
// turn a into b (optimal string alignment).
func distance(a, b string) int {
	var before, last, row []int
	for j := range len(b) + 1 {
		last = append(last, j)
	}
	for i := 1; i <= len(a); i++ {
		row = append(make([]int, 0, len(b)+1), i)
		for j := 1; j <= len(b); j++ {
			change := last[j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			n := min(change, last[j]+1, row[j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				n = min(n, before[j-2]+1)
			}
			row = append(row, n)
		}
		before, last = last, row
	}
	return last[len(b)]
}

// positions finds where a path stood. It keeps the YAML as it was read and looks
// when asked.
type positions struct {
	file string
	root *yaml.Node
}

// find returns the place of path: that of its nearest ancestor if nothing is written
// there, and Pos{} for a document that was not parsed. The names[0] of a rule
// written as a bare string is that string.
func (p positions) find(path string) Pos {
	n := p.root
	if n == nil {
		return Pos{}
	}
	for path != "" {
		var step string
		path = strings.TrimPrefix(path, ".")
		if end := strings.IndexAny(path[1:], ".["); end >= 0 {
			step, path = path[:end+1], path[end+1:]
		} else {
			step, path = path, ""
		}
		next := child(n, step)
		if next == nil {
			break
		}
		n = next
	}
	return Pos{p.file, n.Line, n.Column}
}

// child returns what stands in n at a key or, in brackets, an index; nil if nothing does.
func child(n *yaml.Node, step string) *yaml.Node {
	switch n.Kind {
	case yaml.SequenceNode:
		i, err := strconv.Atoi(strings.Trim(step, "[]"))
		if err == nil && i >= 0 && i < len(n.Content) {
			return n.Content[i]
		}
	case yaml.MappingNode:
		for i := 0; i < len(n.Content); i += 2 {
			if n.Content[i].Value == step {
				return n.Content[i+1]
			}
		}
	}
	return nil
}
