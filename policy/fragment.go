package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A Fragment is the text of a policy file, or of one of several that make up a
// policy together.
type Fragment struct {
	File string // its name in messages
	Data []byte // YAML, at most MaxDocument bytes
}

// Load parses and compiles the policy text data. file names it in messages. The
// error is an Errors with the mistakes of both steps, so that one look is enough
// to mend a file; with an error there is no Policy.
func Load(file string, data []byte, o Options) (*Policy, []*Error, error) {
	return LoadFragments([]Fragment{{file, data}}, o)
}

// LoadFragments is Load for a policy in several files. Their lists, deny rules and
// groups follow each other in the order given. Names must be unique over all of
// them, and unmatched_source may stand in one only.
func LoadFragments(fragments []Fragment, o Options) (*Policy, []*Error, error) {
	var all Errors
	var docs []*Document
	for _, f := range fragments {
		doc, err := ParseDocument(f.File, f.Data)
		var mistakes Errors
		if errors.As(err, &mistakes) {
			all = append(all, mistakes...)
		}
		if doc == nil {
			return nil, nil, all // what it defines is missing everywhere else
		}
		docs = append(docs, doc)
	}
	merged, conflicts := mergeDocuments(docs)
	all = append(all, conflicts...)
	p, warnings, err := Compile(merged, o)
	if len(all) == 0 {
		if err == nil {
			p.text = keepText(fragments)
		}
		return p, warnings, err
	}
	var more Errors
	errors.As(err, &more)
	parsed := slices.Clone(all)
	hidden := slices.ContainsFunc(parsed, hidesNames)
	for _, e := range more {
		follows := func(m *Error) bool {
			return m.Pos.File == e.Pos.File && (within(m.Path, e.Path) || within(e.Path, m.Path))
		}
		if !(hidden && errors.Is(e, errNoSuch)) && !slices.ContainsFunc(parsed, follows) {
			all = append(all, e)
		}
	}
	sortErrors(all)
	return nil, nil, all
}

// mergeDocuments puts documents one after the other. The mistakes are what only one of
// them may say.
func mergeDocuments(docs []*Document) (*Document, Errors) {
	if len(docs) == 1 {
		return docs[0], nil
	}
	m := &Document{Version: Version}
	var conflicts Errors
	var speaker string // of unmatched_source
	for _, d := range docs {
		for _, p := range d.parts {
			p.lists, p.deny, p.groups = p.lists+len(m.Lists), p.deny+len(m.Deny), p.groups+len(m.Groups)
			m.parts = append(m.parts, p)
		}
		m.Lists = append(m.Lists, d.Lists...)
		m.Deny = append(m.Deny, d.Deny...)
		m.Groups = append(m.Groups, d.Groups...)
		if d.UnmatchedSource == "" {
			continue
		}
		pos, path := d.locate("unmatched_source")
		if speaker != "" {
			conflicts = append(conflicts, &Error{pos, path, fmt.Errorf("%s says unmatched_source already; write it in one file only", speaker)})
			continue
		}
		speaker, m.UnmatchedSource = pos.File, d.UnmatchedSource
	}
	return m, conflicts
}

// A part is one file of a Document: where it was read, and how many lists, deny
// rules and groups of other files come before its own.
type part struct {
	positions
	lists, deny, groups int
}

// locate returns the place of a path, and the path as it is in the file it stands in.
func (d *Document) locate(path string) (Pos, string) {
	if len(d.parts) == 0 {
		return Pos{}, path
	}
	p, local := d.part(path)
	return p.find(local), local
}

// pos returns the place of a path.
func (d *Document) pos(path string) Pos {
	pos, _ := d.locate(path)
	return pos
}

// part returns the file that path stands in, and path in that file.
func (d *Document) part(path string) (part, string) {
	section, rest, indexed := strings.Cut(path, "[")
	number, rest, _ := strings.Cut(rest, "]")
	i, err := strconv.Atoi(number)
	if !indexed || err != nil {
		for _, p := range d.parts { // the one file that says it
			if p.root != nil && child(p.root, path) != nil {
				return p, path
			}
		}
		return d.parts[0], path
	}
	for _, p := range slices.Backward(d.parts) {
		before, known := map[string]int{"lists": p.lists, "deny": p.deny, "groups": p.groups}[section]
		if known && i >= before {
			return p, section + "[" + strconv.Itoa(i-before) + "]" + rest
		}
	}
	return d.parts[0], path
}
