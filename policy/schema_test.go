package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func TestSchemaExplainsEveryKey(t *testing.T) {
	keys := map[string]bool{}
	for _, s := range shapes {
		for _, f := range s.fields {
			keys[f.doc] = true
			if doc := keyDocs[f.doc]; !strings.HasSuffix(doc.text, ".") || doc.example == "" {
				t.Errorf("keyDocs[%q] lacks its sentence or its example", f.doc)
			}
		}
	}
	for key := range keyDocs {
		if !keys[key] {
			t.Errorf("keyDocs[%q] explains a key that there is not", key)
		}
	}
	var parsed, again any
	if err := json.Unmarshal(Schema(), &parsed); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(Schema(), &again); err != nil || !bytes.Equal(Schema(), Schema()) || !reflect.DeepEqual(parsed, again) {
		t.Error("the schema changes from call to call")
	}
}

// inContext returns a policy with value at the key called doc in keyDocs, beside
// the keys that its mapping cannot do without.
func inContext(doc, value string) string {
	holder, key, _ := strings.Cut(doc, ".")
	mapping := func(needed ...string) string {
		needed = slices.DeleteFunc(needed, func(s string) bool { return strings.HasPrefix(s, key+":") })
		return "{" + strings.Join(append(needed, key+": "+value), ", ") + "}"
	}
	switch holder {
	case "Document":
		return mapping("version: 1")
	case "List":
		return "{version: 1, lists: [" + mapping("name: a") + "]}"
	case "Group":
		return "{version: 1, groups: [" + mapping("name: g", "observe_until: 2027-01-01") + "]}"
	case "Rule":
		return "{version: 1, deny: [" + mapping() + "]}"
	}
	return "{version: 1, groups: [{name: g, tls: " + mapping() + "}]}"
}

func TestSchemaExamplesAndEnums(t *testing.T) {
	for doc, k := range keyDocs {
		for _, value := range append(slices.Clone(k.enum), k.example) {
			if k.enum != nil && !strings.HasPrefix(value, `"`) {
				value = `"` + value + `"`
			}
			text := inContext(doc, value)
			d, err := ParseDocument("p", []byte(text))
			if err != nil {
				t.Errorf("%s: %s is no policy: %v", doc, text, err)
				continue
			}
			if problem := valid(t, text); problem != "" {
				t.Errorf("schema refuses %s: %s", text, problem)
			}
			if k.enum != nil {
				if _, _, err := Compile(d, Options{}); err != nil && strings.Contains(err.Error(), "is not known") {
					t.Errorf("Compile(%s): %v", text, err)
				}
			}
		}
		if k.enum != nil {
			if valid(t, inContext(doc, "other")) == "" {
				t.Errorf("schema takes %s: other", doc)
			}
		}
	}
}

func TestSchemaAgreesWithDecoder(t *testing.T) {
	contract, err := os.ReadFile("testdata/decode/contract.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, text string
		good       bool
	}{
		{"contract", string(contract), true},
		{"least", "version: 1", true},
		{"empty sections", "{version: 1, lists: [], deny: [], groups: []}", true},
		{"version without quotes", "{version: 1, groups: [{name: a, tls: {min_version: 1.0}}]}", true},
		{"list of rules", "{version: 1, deny: [a.example, {names: [b.example], ports: [1, 65535, 8000-8010]}]}", true},
		{"no version", "{groups: []}", false},
		{"other version", "version: 2", false},
		{"version in quotes", "version: '1'", false},
		{"unknown key", "{version: 1, rules: []}", false},
		{"unknown key in rule", "{version: 1, deny: [{name: a}]}", false},
		{"number as rule", "{version: 1, deny: [443]}", false},
		{"string as list", "{version: 1, deny: a.example}", false},
		{"group without name", "{version: 1, groups: [{allow: []}]}", false},
		{"list without name", "{version: 1, lists: [{names: [a.example]}]}", false},
		{"null", "{version: 1, groups: null}", false},
		{"boolean in quotes", "{version: 1, deny: [{names: [a.example], allow_public_suffix: 'true'}]}", false},
		{"number as name", "{version: 1, deny: [{names: [1]}]}", false},
	} {
		_, err := ParseDocument("p", []byte(tt.text))
		if (err == nil) != tt.good {
			t.Errorf("%s: ParseDocument: %v", tt.name, err)
		}
		if problem := valid(t, tt.text); (problem == "") != tt.good {
			t.Errorf("%s: schema: %q", tt.name, problem)
		}
	}
}

// valid returns "" if text conforms to the schema, or where it does not.
func valid(t *testing.T, text string) string {
	t.Helper()
	var v any
	if err := yaml.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	var plain map[string]any
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(Schema(), &plain); err != nil {
		t.Fatal(err)
	}
	return validator{plain}.check(plain, v, "")
}

// A validator knows as much of JSON Schema as Schema uses.
type validator struct{ root map[string]any }

func (vd validator) check(schema map[string]any, v any, path string) string {
	for keyword, arg := range schema {
		if problem := vd.keyword(schema, keyword, arg, v, path); problem != "" {
			return problem
		}
	}
	return ""
}

func (vd validator) keyword(schema map[string]any, keyword string, arg, v any, path string) string {
	object, isObject := v.(map[string]any)
	ok := true
	switch keyword {
	case "type":
		n, isNumber := v.(float64)
		s, isString := v.(string)
		_, isArray := v.([]any)
		_, isBool := v.(bool)
		ok = arg == "object" && isObject || arg == "array" && isArray || arg == "boolean" && isBool ||
			arg == "string" && isString && s == v || arg == "integer" && isNumber && n == float64(int(n))
	case "const":
		ok = arg == v
	case "enum":
		ok = slices.Contains(arg.([]any), v)
	case "minimum":
		n, isNumber := v.(float64)
		ok = !isNumber || n >= arg.(float64)
	case "maximum":
		n, isNumber := v.(float64)
		ok = !isNumber || n <= arg.(float64)
	case "pattern":
		s, isString := v.(string)
		ok = !isString || regexp.MustCompile(arg.(string)).MatchString(s)
	case "required":
		for _, key := range arg.([]any) {
			if _, has := object[key.(string)]; isObject && !has {
				return path + ": no " + key.(string)
			}
		}
	case "properties":
		for key, inner := range object {
			if s, known := arg.(map[string]any)[key]; known {
				if problem := vd.check(s.(map[string]any), inner, path+"."+key); problem != "" {
					return problem
				}
			} else if schema["additionalProperties"] == false {
				return path + ": unknown " + key
			}
		}
	case "items":
		items, _ := v.([]any)
		for i, item := range items {
			if problem := vd.check(arg.(map[string]any), item, fmt.Sprintf("%s[%d]", path, i)); problem != "" {
				return problem
			}
		}
	case "oneOf":
		matches := 0
		for _, s := range arg.([]any) {
			if vd.check(s.(map[string]any), v, path) == "" {
				matches++
			}
		}
		ok = matches == 1
	case "$ref":
		name := strings.TrimPrefix(arg.(string), "#/$defs/")
		return vd.check(vd.root["$defs"].(map[string]any)[name].(map[string]any), v, path)
	case "if":
		if vd.check(arg.(map[string]any), v, path) == "" {
			return vd.check(schema["then"].(map[string]any), v, path)
		}
	case "then", "additionalProperties", "description", "title", "$schema", "$defs":
	default:
		return "unknown keyword " + keyword
	}
	if !ok {
		return fmt.Sprintf("%s: %v does not satisfy %s: %v", path, v, keyword, arg)
	}
	return ""
}
