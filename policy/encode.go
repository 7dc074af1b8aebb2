package policy

import (
	"fmt"
	"io"
	"reflect"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxInline is the number of items up to which a list of a rule is written in one line.
const maxInline = 4

// EncodeDocument writes doc to w as YAML that [ParseDocument] reads back. Rules
// with nothing but one name are written as bare strings. Strings must be valid UTF-8.
func EncodeDocument(w io.Writer, doc *Document) error {
	var n yaml.Node
	if err := n.Encode(doc); err != nil {
		return fmt.Errorf("write policy: %w", err)
	}
	quoteLines(&n)
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(&n); err != nil {
		return fmt.Errorf("write policy: %w", err)
	}
	if err := enc.Close(); err != nil {
		return fmt.Errorf("write policy: %w", err)
	}
	return nil
}

// quoteLines puts strings of several lines in quotes: in a block, a tab at the
// beginning of a line would stand in the indentation.
func quoteLines(n *yaml.Node) {
	if n.Kind == yaml.ScalarNode && strings.Contains(n.Value, "\n") {
		n.Style = yaml.DoubleQuotedStyle
	}
	for _, c := range n.Content {
		quoteLines(c)
	}
}

// MarshalYAML writes r the way people do.
func (r Rule) MarshalYAML() (any, error) {
	if len(r.Names) == 1 && reflect.DeepEqual(r, Rule{Names: r.Names}) {
		return r.Names[0], nil
	}
	type plain Rule // without this method
	var n yaml.Node
	if err := n.Encode(plain(r)); err != nil {
		return nil, err
	}
	for i := 1; i < len(n.Content); i += 2 {
		value := n.Content[i]
		if value.Kind == yaml.SequenceNode && len(value.Content) <= maxInline {
			value.Style = yaml.FlowStyle
		}
		if n.Content[i-1].Value == "ports" {
			for _, port := range value.Content {
				if _, ok := ParsePort(port.Value); ok {
					port.Tag, port.Style = "!!int", 0
				}
			}
		}
	}
	return &n, nil
}
