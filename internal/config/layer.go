package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"sallyport/internal/eventlog"
	"sallyport/policy"
)

const (
	maxFile     = 1 << 20 // longest settings file, in bytes
	maxMistakes = 100     // mistakes reported in one go
	envPrefix   = "SALLYPORT_"
)

// A layer is what one source of settings says, checked. Its values have the types
// of Settings' fields.
type layer struct {
	values    map[string]any        // nested as the file is
	positions map[string]policy.Pos // where each path stood, list items as path[0]
	mistakes  policy.Errors
	dir       string // what relative paths are relative to; "" leaves them alone
}

func newLayer(dir string) *layer {
	return &layer{values: map[string]any{}, positions: map[string]policy.Pos{}, dir: dir}
}

// mistake records what is wrong at pos.
func (l *layer) mistake(pos policy.Pos, path, format string, args ...any) {
	if len(l.mistakes) <= maxMistakes {
		l.mistakes = append(l.mistakes, &policy.Error{Pos: pos, Path: path, Err: fmt.Errorf(format, args...)})
	}
}

// set puts the value of f into the nested maps.
func (l *layer) set(f *field, v any) {
	m := l.values
	keys := strings.Split(f.path, ".")
	for _, k := range keys[:len(keys)-1] {
		next, ok := m[k].(map[string]any)
		if !ok {
			next = map[string]any{}
			m[k] = next
		}
		m = next
	}
	m[keys[len(keys)-1]] = v
}

// text reads s as one value of f.
func (l *layer) text(f *field, pos policy.Pos, path, s string) (any, bool) {
	l.positions[path] = pos
	v, err := f.kind.parse(f, s)
	if err != nil {
		l.mistake(pos, path, "%w", err)
		return nil, false
	}
	return l.anchored(f, v), true
}

// anchored makes a relative path relative to the settings file.
func (l *layer) anchored(f *field, v any) any {
	s, ok := v.(string)
	switch {
	case !ok || s == "" || l.dir == "" || filepath.IsAbs(s):
		return v
	case f.kindName == "path", f.kindName == "source" && s != Embedded,
		f.kindName == "output" && s != "stdout" && s != "stderr" && !eventlog.IsSyslog(s):
		return filepath.Join(l.dir, s)
	}
	return v
}

// yamlLayer reads a settings file. name is what positions call it; relative paths
// in it are relative to dir.
func yamlLayer(name, dir string, data []byte) *layer {
	l := newLayer(dir)
	if len(data) > maxFile {
		l.mistake(policy.Pos{File: name}, "", "the file is larger than %d bytes", maxFile)
		return l
	}
	doc := l.parse(policy.Pos{File: name}, data)
	if doc == nil {
		return l
	}
	l.section(root, name, "", doc)
	return l
}

// parse returns the root node of the one YAML document in data, nil if it is
// empty or has mistakes.
func (l *layer) parse(at policy.Pos, data []byte) *yaml.Node {
	var doc, second yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		l.syntax(at, data, err)
		return nil
	}
	switch err := dec.Decode(&second); {
	case err == nil:
		at.Line, at.Column = second.Line, second.Column
		l.mistake(at, "", "a second document begins; write all settings in one")
		return nil
	case !errors.Is(err, io.EOF):
		l.syntax(at, data, err)
		return nil
	}
	if len(doc.Content) == 0 || isNull(doc.Content[0]) {
		return nil
	}
	return doc.Content[0]
}

// syntaxError is what the YAML library says of text that is not YAML.
var syntaxError = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)`)

// syntaxHints say what to look for when the library's words are not enough.
var syntaxHints = []struct{ text, hint string }{
	{"did not find expected", `look for a bracket or quote that is not closed, a "[" that needs quotes, or indentation that does not fit`},
	{"cannot start any token", "indent with spaces, not tabs, and put text that begins with a special character in quotes"},
	{"mapping values are not allowed", `put text with ": " in it in quotes`},
}

func (l *layer) syntax(at policy.Pos, data []byte, err error) {
	text := err.Error()
	at.Line, at.Column = 1, 1
	if m := syntaxError.FindStringSubmatch(text); m != nil {
		text = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			if strings.HasPrefix(text, "did not find expected") {
				n++ // its parser counts lines from 0, its scanner from 1
			}
			at.Line = min(n, 1+bytes.Count(bytes.TrimSuffix(data, []byte("\n")), []byte("\n")))
		}
	}
	text = clip(text)
	for _, h := range syntaxHints {
		if strings.Contains(text, h.text) {
			text += "; " + h.hint
		}
	}
	l.mistake(at, "", "not YAML: %s", text)
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// section reads a mapping of known keys into the layer.
func (l *layer) section(f *field, file, path string, n *yaml.Node) {
	l.mapping(f, file, path, n, func(c *field, at string, v *yaml.Node) {
		if !c.section() {
			if value, ok := l.value(c, file, at, v); ok {
				l.set(c, value)
			}
		} else if !isNull(v) { // a section with every line commented out
			l.section(c, file, at, v)
		}
	})
}

// mapping calls each for every key of n that f knows, and reports the rest.
func (l *layer) mapping(f *field, file, path string, n *yaml.Node, each func(c *field, at string, v *yaml.Node)) {
	pos := nodePos(file, n)
	l.positions[path] = pos
	if n.Kind != yaml.MappingNode {
		l.mistake(pos, path, "%s is not a mapping; write keys below it: %s", describeNode(n), strings.Join(keys(f), ", "))
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		at := join(path, clip(k.Value))
		c := f.child(k.Value)
		switch {
		case k.Kind != yaml.ScalarNode:
			l.mistake(nodePos(file, k), path, "a key must be a word; write one of %s", strings.Join(keys(f), ", "))
		case c == nil:
			l.unknown(nodePos(file, k), path, k.Value, keys(f))
		case seen[k.Value]:
			l.mistake(nodePos(file, k), at, "given twice; keep one")
		default:
			seen[k.Value] = true
			each(c, at, v)
		}
	}
}

// unknown reports a key that does not exist.
func (l *layer) unknown(pos policy.Pos, path, key string, known []string) {
	if n := nearest(strings.ToLower(key), known); n != "" {
		l.mistake(pos, path, "unknown key %s; did you mean %q?", quote(key), n)
		return
	}
	l.mistake(pos, path, "unknown key %s; write one of %s", quote(key), strings.Join(known, ", "))
}

// value reads the value of f, which is no section.
func (l *layer) value(f *field, file, path string, n *yaml.Node) (any, bool) {
	pos := nodePos(file, n)
	l.positions[path] = pos
	switch {
	case n.Kind == yaml.AliasNode:
		l.mistake(pos, path, "aliases are not supported; write the value out")
	case isNull(n):
		l.mistake(pos, path, "no value; %s", example(f))
	case f.list && n.Kind != yaml.SequenceNode:
		l.mistake(pos, path, "%s is not a list; %s", describeNode(n), example(f))
	case f.list:
		return l.list(f, file, path, n)
	case n.Kind != yaml.ScalarNode:
		l.mistake(pos, path, "%s where one value belongs; %s", describeNode(n), example(f))
	default:
		return l.text(f, pos, path, n.Value)
	}
	return nil, false
}

// list reads a list of values or of mappings. One bad item spoils it.
func (l *layer) list(f *field, file, path string, n *yaml.Node) (any, bool) {
	items, before := make([]any, 0, len(n.Content)), len(l.mistakes)
	for i, item := range n.Content {
		at := fmt.Sprintf("%s[%d]", path, i)
		switch {
		case f.children != nil:
			items = append(items, l.item(f, file, at, item))
		case item.Kind != yaml.ScalarNode || isNull(item):
			l.mistake(nodePos(file, item), at, `%s where one value belongs; if it begins with "[" or "{", put it in quotes`, describeNode(item))
		default:
			if v, ok := l.text(f, nodePos(file, item), at, item.Value); ok {
				items = append(items, v)
			}
		}
	}
	return items, len(l.mistakes) == before
}

// item reads one mapping of a list.
func (l *layer) item(f *field, file, path string, n *yaml.Node) map[string]any {
	m, given := map[string]any{}, map[string]bool{}
	l.mapping(f, file, path, n, func(c *field, at string, v *yaml.Node) {
		given[c.key] = true
		if value, ok := l.value(c, file, at, v); ok {
			m[c.key] = value
		}
	})
	for _, c := range f.children {
		switch {
		case given[c.key] || n.Kind != yaml.MappingNode:
		case c.required:
			l.mistake(nodePos(file, n), path, "%s is missing; add it: %s", c.key, c.doc)
		case c.def != "":
			m[c.key], _ = c.kind.parse(c, c.def)
		}
	}
	return m
}

// override sets the value of f from one string, as flags and environment have it.
// A list is comma separated, a list of mappings is YAML.
func (l *layer) override(f *field, from, s string) {
	pos := policy.Pos{File: from}
	l.positions[f.path] = pos
	switch {
	case f.section():
		l.mistake(pos, f.path, "a section, not a value; set one of its keys: %s", strings.Join(keys(f), ", "))
	case !f.list:
		if v, ok := l.text(f, pos, f.path, s); ok {
			l.set(f, v)
		}
	case f.children != nil:
		if n := l.parse(pos, []byte(s)); n != nil {
			if v, ok := l.value(f, from, f.path, n); ok {
				l.set(f, v)
			}
		}
	default:
		l.commaList(f, pos, s)
	}
}

func (l *layer) commaList(f *field, pos policy.Pos, s string) {
	items, before := []any{}, len(l.mistakes)
	if s = strings.TrimSpace(s); s != "" && s != "[]" {
		for i, item := range strings.Split(s, ",") {
			if v, ok := l.text(f, pos, fmt.Sprintf("%s[%d]", f.path, i), strings.TrimSpace(item)); ok {
				items = append(items, v)
			}
		}
	}
	if len(l.mistakes) == before {
		l.set(f, items)
	}
}

// An Override is one setting given on the command line.
type Override struct {
	Flag  string // as typed, such as --log-level or --set
	Path  string // such as log.level
	Value string
}

// flagLayer reads command-line overrides; a later one wins over an earlier one.
func flagLayer(overrides []Override) *layer {
	l := newLayer("")
	for _, o := range overrides {
		f := find(o.Path)
		from := o.Flag
		if from == "--set" {
			from += " " + clip(o.Path)
		}
		if f == nil {
			text := "no such setting; sallyport schema settings lists them"
			if n := nearest(o.Path, paths()); n != "" {
				text = fmt.Sprintf("no such setting; did you mean %s?", n)
			}
			l.mistake(policy.Pos{File: from}, "", "%s", text)
			continue
		}
		l.override(f, from, o.Value)
	}
	return l
}

// envLayer reads the environment, as os.Environ gives it. An empty variable
// counts as not set. It returns a warning for each variable of ours that sets nothing.
func envLayer(environ []string) (l *layer, warnings []string) {
	l = newLayer("")
	byName := map[string]*field{}
	var known []string
	for _, f := range leaves {
		byName[f.env()] = f
		known = append(known, strings.TrimPrefix(f.env(), envPrefix))
	}
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		switch f := byName[name]; {
		case !strings.HasPrefix(name, envPrefix) || name == FileVariable || byContainer(name, value):
		case f != nil && value != "":
			l.override(f, name, value)
		case f == nil:
			w := fmt.Sprintf("environment variable %s sets nothing", clip(name))
			if n := nearest(strings.TrimPrefix(name, envPrefix), known); n != "" {
				w += fmt.Sprintf("; did you mean %s%s?", envPrefix, n)
			}
			warnings = append(warnings, w)
		}
	}
	slices.Sort(warnings)
	return l, warnings
}

// Kubernetes describes a service called sallyport to every container beside it in
// variables such as SALLYPORT_SERVICE_HOST and SALLYPORT_PORT=tcp://10.0.0.1:3128.
var serviceVariable = regexp.MustCompile(`_SERVICE_(HOST|PORT)(_[A-Z0-9_]+)?$|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)

func byContainer(name, value string) bool {
	return serviceVariable.MatchString(name) || strings.HasSuffix(name, "_PORT") && strings.Contains(value, "://")
}

// find returns the key at path, nil if there is none.
func find(path string) *field {
	f := root
	for key := range strings.SplitSeq(path, ".") {
		if f = f.child(key); f == nil || f.list && f.path != path {
			return nil
		}
	}
	return f
}

// paths returns the path of every value.
func paths() []string {
	ps := make([]string, len(leaves))
	for i, f := range leaves {
		ps[i] = f.path
	}
	return ps
}

func keys(f *field) []string {
	ks := make([]string, len(f.children))
	for i, c := range f.children {
		ks[i] = c.key
	}
	return ks
}

func nodePos(file string, n *yaml.Node) policy.Pos {
	return policy.Pos{File: file, Line: n.Line, Column: n.Column}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// describeNode names what stands at n.
func describeNode(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	if isNull(n) {
		return "no value"
	}
	return quote(n.Value)
}

// example says how a value of f is written.
func example(f *field) string {
	text := map[string]string{
		"listen": `":3128"`, "admin": `"127.0.0.1:9128"`, "upstream": `"192.0.2.53"`, "prefix": `"10.0.0.0/8"`,
		"duration": "10s", "size": "64KiB", "count": "0", "url": `"https://wiki.corp.example/egress"`,
		"name": "corp.example", "path": "/etc/hosts", "source": "policy.yaml", "output": "stdout",
		"node": `""`, "text": `"text"`, "address": `"192.0.2.7"`, "suffix": `".corp.example"`, "direct": `".corp.example"`,
		"parent": `"http://proxy.corp.example:3128"`, "group_parent": "direct", "realm": "sallyport", "bool": "true", "opt_name": "health.corp.example",
	}[f.kindName]
	switch {
	case f.children != nil:
		var b strings.Builder
		for _, c := range f.children {
			if c.required {
				b.WriteString(c.key + ": …, ")
			}
		}
		return fmt.Sprintf("write a list of mappings such as [{%s}], or []", strings.TrimSuffix(b.String(), ", "))
	case f.kindName == "enum":
		return "write one of " + strings.Join(f.enum, ", ")
	case f.list:
		return fmt.Sprintf("write a list such as [%s], or []", text)
	}
	return "write one such as " + text
}
