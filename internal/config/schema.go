package config

import (
	"bytes"
	"encoding/json"
)

// Schema returns the JSON Schema (draft 7, which editors know best) of the settings file.
func Schema() []byte {
	s := object(root)
	s["$schema"] = "http://json-schema.org/draft-07/schema#"
	s["title"] = "sallyport settings (sallyport.yaml)"
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(s); err != nil {
		panic(err) // maps of strings and numbers always encode
	}
	return b.Bytes()
}

// object describes the mapping that f is, or that each item of f is.
func object(f *field) map[string]any {
	properties, required := map[string]any{}, []string{}
	for _, c := range f.children {
		properties[c.key] = property(c)
		if c.required {
			required = append(required, c.key)
		}
	}
	m := map[string]any{"type": "object", "additionalProperties": false, "properties": properties}
	if len(required) > 0 {
		m["required"] = required
	}
	return m
}

func property(f *field) map[string]any {
	var m map[string]any
	if f.children != nil {
		m = object(f)
	} else {
		m = f.kind.schema(f)
	}
	if f.section() { // every line of a section may be commented out
		m["type"] = []string{"object", "null"}
	}
	if f.list {
		m = map[string]any{"type": "array", "items": m}
	}
	m["description"] = f.doc
	if f.def != "" {
		m["default"] = f.def
	}
	return m
}
