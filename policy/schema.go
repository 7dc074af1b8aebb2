package policy

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
)

// A keyDoc explains one key of a policy, to editors and in messages.
type keyDoc struct {
	text    string   // what the key does
	example string   // a value, as it stands after the colon
	enum    []string // the values there are; nil for any
}

// keyDocs has every key, by the type that holds it.
var keyDocs = map[string]keyDoc{
	"Document.version":          {text: "Version of the policy language; always 1.", example: "1"},
	"Document.unmatched_source": {text: "What holds for a source that no group has: deny (the default), or the name of a group.", example: "deny"},
	"Document.lists":            {text: "Named lists of name patterns, which rules and other lists refer to as \"@name\".", example: "[{name: github, names: [.github.com]}]"},
	"Document.deny":             {text: "Guardrails: denied for every source, in every mode; nothing overrides them.", example: "[.bad.example]"},
	"Document.groups":           {text: "Groups of sources and what they may reach. The longest source prefix that contains the client names its group.", example: "[{name: ci-runners, sources: [10.20.0.0/16], allow: [.github.com]}]"},

	"List.name":  {text: "Name of the list; rules write \"@\" and this name.", example: "github"},
	"List.names": {text: "Name patterns: x.com is that name, *.x.com every name below it, .x.com both. \"@other\" stands for the patterns of another list.", example: "[.github.com, raw.githubusercontent.com]"},
	"List.file":  {text: "A text file with one pattern a line and # comments, or a hosts file. The path is relative to the policy's folder; the file is watched like the policy.", example: "lists/threats.txt"},

	"Group.name":          {text: "Name of the group, in logs, in metrics and for extends.", example: "ci-runners"},
	"Group.sources":       {text: "Addresses and prefixes of the clients, IPv4 and IPv6. Each prefix can be in one group only; the longest match counts.", example: "[10.20.0.0/16, \"2001:db8:20::/48\"]"},
	"Group.users":         {text: "Names of users, as the proxy has authenticated them, wherever they come from: a user's group is chosen before the source's. Each user can be in one group only.", example: "[deploy-bot]"},
	"Group.extends":       {text: "Groups whose allow and deny rules hold here too.", example: "[baseline]"},
	"Group.mode":          {text: "enforce (the default) applies denials; observe lets pass and logs what would have been denied, guardrails and address checks excepted.", example: "enforce", enum: []string{"enforce", "observe"}},
	"Group.observe_until": {text: "The day from whose beginning (UTC) an observing group enforces, or a time (RFC 3339). Required with mode: observe.", example: "2026-12-31"},
	"Group.tls":           {text: "What the TLS ClientHello may say, for all rules of the group that say nothing else.", example: "{min_version: \"1.3\"}"},
	"Group.allow":         {text: "What the group may reach: rules, or bare strings that stand for {names: [that string]}.", example: "[\"@github\", \"*.pkg.example\"]"},
	"Group.deny":          {text: "What the group may not reach, whatever its allow rules say.", example: "[gist.github.com]"},

	"Rule.id":                   {text: "ID of the rule in logs and answers, unique in its section. Default: made from what the rule says.", example: "sftp-partner"},
	"Rule.names":                {text: "Name patterns, and \"@list\" for those of a list: x.com is that name, *.x.com every name below it, .x.com both; elsewhere * stands for a part of one label.", example: "[api.example.com, \"*.pkg.example\", \"@github\"]"},
	"Rule.addresses":            {text: "Addresses and prefixes that clients may ask for without a name.", example: "[203.0.113.0/24]"},
	"Rule.ports":                {text: "Destination ports and ranges of ports, instead of 443 (TLS) and 80 (HTTP).", example: "[443, 8000-8010]"},
	"Rule.protocol":             {text: "web (the default for allow): TLS and plain HTTP; tls or http: one of them; tcp: relayed without looking, needs ports; dns: resolution alone. A deny rule without it denies every protocol.", example: "web", enum: []string{"web", "tls", "http", "tcp", "dns"}},
	"Rule.qtypes":               {text: "DNS types that may be asked for besides A, AAAA, HTTPS, SVCB and CNAME.", example: "[TXT, SRV]"},
	"Rule.private_destinations": {text: "Prefixes that are not globally reachable and that these names may nevertheless resolve to.", example: "[10.0.0.0/8]"},
	"Rule.allow_public_suffix":  {text: "Permits patterns over a registry's public suffix, such as .co.uk or *.", example: "true"},
	"Rule.tls":                  {text: "What the TLS ClientHello may say; what is left out comes from the group.", example: "{sni: optional}"},
	"Rule.expires":              {text: "The day from whose beginning (UTC) the rule no longer allows or denies, or a time (RFC 3339).", example: "2027-03-31"},
	"Rule.owner":                {text: "Who answers for the rule; for people.", example: "pay-team"},
	"Rule.reason":               {text: "Why the rule exists; for people.", example: "PAY-1423"},

	"TLSRule.sni":         {text: "match (the default): server_name is present and equals the CONNECT name; listed: present and allowed for this source; optional: checked when present.", example: "match", enum: []string{"match", "listed", "optional"}},
	"TLSRule.ech":         {text: "Whether the ClientHello may be encrypted (ECH), which hides the name that is meant; deny is the default.", example: "deny", enum: []string{"deny", "allow"}},
	"TLSRule.min_version": {text: "The least TLS version that the client must offer; 1.2 is the default.", example: "\"1.2\"", enum: []string{"1.0", "1.1", "1.2", "1.3"}},
}

// Schema returns a JSON Schema (draft 2020-12) of policy files, for editors. A file
// that it refuses, ParseDocument or Compile refuses too; not the other way round.
// The text never changes within a build.
func Schema() []byte {
	schema := mappingSchema(shapeTypes[0])
	schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	schema["title"] = "sallyport policy"
	schema["$defs"] = map[string]any{"tls": mappingSchema(shapeTypes[4]), "rule": map[string]any{"oneOf": []any{
		map[string]any{"type": "string", "description": "Short for {names: [this string]}."},
		mappingSchema(ruleType),
	}}}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(schema); err != nil { // maps of strings cannot fail
		panic(err)
	}
	return b.Bytes()
}

func mappingSchema(t reflect.Type) map[string]any {
	properties, required := map[string]any{}, []string{}
	for _, f := range shapes[t].fields {
		s := valueSchema(t.Field(f.index).Type, f.doc)
		s["description"] = keyDocs[f.doc].text
		properties[f.key] = s
		if f.required {
			required = append(required, f.key)
		}
	}
	schema := map[string]any{"type": "object", "additionalProperties": false, "properties": properties}
	if len(required) > 0 {
		schema["required"] = required
	}
	if _, ok := properties["observe_until"]; ok {
		schema["if"] = map[string]any{"required": []string{"mode"}, "properties": map[string]any{"mode": map[string]any{"const": "observe"}}}
		schema["then"] = map[string]any{"required": []string{"observe_until"}}
	}
	return schema
}

// valueSchema describes the values of a key, or the items of its list.
func valueSchema(t reflect.Type, doc string) map[string]any {
	switch t.Kind() {
	case reflect.Pointer:
		return map[string]any{"$ref": "#/$defs/tls"}
	case reflect.Slice:
		return map[string]any{"type": "array", "items": valueSchema(t.Elem(), doc)}
	case reflect.Struct:
		if t == ruleType {
			return map[string]any{"$ref": "#/$defs/rule"}
		}
		return mappingSchema(t)
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Int:
		return map[string]any{"const": Version}
	}
	switch enum := keyDocs[doc].enum; {
	case doc == "TLSRule.min_version": // 1.2 without quotes is a number to every reader but ours
		values := []any{}
		for _, s := range enum {
			values = append(values, s, json.Number(s))
		}
		return map[string]any{"enum": values}
	case enum != nil:
		return map[string]any{"enum": enum}
	case doc == "Rule.ports":
		return map[string]any{"oneOf": []any{
			map[string]any{"type": "integer", "minimum": 1, "maximum": 65535},
			map[string]any{"type": "string", "pattern": "^[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?$"},
		}}
	case strings.HasSuffix(doc, ".expires"), strings.HasSuffix(doc, ".observe_until"):
		return map[string]any{"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}"}
	case strings.HasSuffix(doc, ".name"):
		return map[string]any{"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}
	}
	return map[string]any{"type": "string"}
}
