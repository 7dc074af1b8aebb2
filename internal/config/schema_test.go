package config

import (
	"encoding/json"
	"testing"
)

// Editors show the description of each key: none may be missing.
func TestSchemaDescribesEveryKey(t *testing.T) {
	var schema map[string]any
	if err := json.Unmarshal(Schema(), &schema); err != nil {
		t.Fatal(err)
	}
	described := 0
	var walk func(path string, m map[string]any)
	walk = func(path string, m map[string]any) {
		if items, ok := m["items"].(map[string]any); ok {
			m = items
		}
		properties, _ := m["properties"].(map[string]any)
		for key, p := range properties {
			p := p.(map[string]any)
			if d, _ := p["description"].(string); d == "" {
				t.Errorf("%s has no description", join(path, key))
			}
			described++
			walk(join(path, key), p)
		}
		if properties != nil && m["additionalProperties"] != false {
			t.Errorf("%q takes unknown keys", path)
		}
	}
	walk("", schema)
	if described < len(leaves) {
		t.Errorf("%d keys described, but there are at least %d", described, len(leaves))
	}
}

// The tags are read at run time; a slip in one must show here.
func TestTags(t *testing.T) {
	var walk func(f *field)
	walk = func(f *field) {
		for _, c := range f.children {
			if c.children == nil && c.kind.parse == nil {
				t.Errorf("%s: kind %q does not exist", c.path, c.kindName)
			}
			if c.kindName == "duration" {
				bounds(c, durationOf)
			}
			if c.children == nil && example(c) == "write one such as " {
				t.Errorf("%s has no example", c.path)
			}
			walk(c)
		}
	}
	walk(root)
}
