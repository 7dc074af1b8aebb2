package policy

import (
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"io"
	"time"
)

// plainText is the length in bytes up to which a policy file is kept as it is;
// longer ones are kept compressed.
const plainText = 64 << 10

// keptText is a policy file as it was compiled, without its list files.
type keptText struct {
	file string
	data []byte
	size int // 0: data is not compressed
}

func keepText(fragments []Fragment) []keptText {
	kept := make([]keptText, len(fragments))
	for i, f := range fragments {
		if kept[i] = (keptText{file: f.File, data: f.Data}); len(f.Data) <= plainText {
			kept[i].data = bytes.Clone(f.Data)
			continue
		}
		var b bytes.Buffer
		w, err := flate.NewWriter(&b, flate.BestSpeed)
		if err == nil {
			_, err = w.Write(f.Data)
			err = errors.Join(err, w.Close())
		}
		if err != nil { // a Buffer takes everything
			panic(err)
		}
		kept[i].data, kept[i].size = bytes.Clone(b.Bytes()), len(f.Data)
	}
	return kept
}

// Document returns the document that p was compiled from, as it was then, whatever
// has become of its files. It is for people to look at and parses the text anew, which
// takes as long as loading it did; what list files held is not in it. nil: p was not
// made by [Load] or [LoadFragments].
func (p *Policy) Document() (*Document, error) {
	if len(p.text) == 0 {
		return nil, nil //nolint:nilnil // it is no error to be made by Compile
	}
	var docs []*Document
	for _, t := range p.text {
		data := t.data
		if t.size > 0 {
			data = make([]byte, t.size)
			if _, err := io.ReadFull(flate.NewReader(bytes.NewReader(t.data)), data); err != nil {
				return nil, fmt.Errorf("text of policy %s: %w", p.revision, err)
			}
		}
		d, err := ParseDocument(t.file, data)
		if err != nil {
			return nil, fmt.Errorf("text of policy %s: %w", p.revision, err)
		}
		docs = append(docs, d)
	}
	d, _ := mergeDocuments(docs) // there were no conflicts
	return d, nil
}

// Where returns the place of the value at path, such as groups[2].allow[0], in the
// file that d was parsed from.
func (d *Document) Where(path string) Pos { return d.pos(path) }

// RuleIDs returns the IDs of the rules of one section, allow or deny, as decisions
// have them.
func RuleIDs(rules []Rule) []string {
	ids := sectionIDs(rules)
	for i := range rules {
		if r := &rules[i]; r.isBare() {
			ids[i] = r.Names[0]
			if p, err := parsePattern(r.Names[0]); err == nil { // as in every policy in force
				ids[i] = p.text()
			}
		}
	}
	return ids
}

// ModeAt returns the mode of the group called name at a time.
func (p *Policy) ModeAt(name string, now time.Time) Mode {
	for i := range p.groups {
		if g := &p.groups[i]; g.name == name {
			return g.modeAt(now)
		}
	}
	return ModeEnforce
}
