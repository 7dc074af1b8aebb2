package policy

import (
	"errors"
	"fmt"
	"reflect"

	"go.yaml.in/yaml/v3"
)

// Assertions is a file of tests of a policy (policy_test.yaml). Strings are as
// written; only Expect and Reason have been checked.
type Assertions struct {
	At    string      `yaml:"at,omitempty"` // when the requests are made, unless a test says otherwise
	Tests []Assertion `yaml:"tests"`

	positions positions
}

// An Assertion is one request and what a policy shall make of it. Either Target or
// DNS is set.
type Assertion struct {
	Name        string `yaml:"name,omitempty"`        // label, for people
	Source      string `yaml:"source"`                // address of the client
	User        string `yaml:"user,omitempty"`        // user that the client is known as; "": none
	Target      string `yaml:"target,omitempty"`      // host:port, or http://host/ for plain HTTP
	DNS         string `yaml:"dns,omitempty"`         // name that the resolver is asked for
	QType       string `yaml:"qtype,omitempty"`       // type of that question; "": A
	SNI         string `yaml:"sni,omitempty"`         // server_name of the ClientHello
	Destination string `yaml:"destination,omitempty"` // address that the name resolves to
	At          string `yaml:"at,omitempty"`          // when
	Expect      string `yaml:"expect"`                // allow, deny or observe
	Reason      string `yaml:"reason,omitempty"`      // the reason; "": any
	Rule        string `yaml:"rule,omitempty"`        // the rule that decides; "": any
}

// assertionDocs is keyDocs for assertions.
var assertionDocs = map[string]string{
	"Assertions.at":    "2027-01-31",
	"Assertions.tests": "[{source: 10.20.1.5, target: \"api.example.com:443\", expect: allow}]",

	"Assertion.name":        "CI reaches the API",
	"Assertion.source":      "10.20.1.5",
	"Assertion.user":        "deploy-bot",
	"Assertion.target":      "\"api.example.com:443\"",
	"Assertion.dns":         "api.example.com",
	"Assertion.qtype":       "AAAA",
	"Assertion.sni":         "api.example.com",
	"Assertion.destination": "203.0.113.7",
	"Assertion.at":          "2027-01-31",
	"Assertion.expect":      "allow",
	"Assertion.reason":      "matched",
	"Assertion.rule":        "sftp-partner",
}

var assertionShapes = map[reflect.Type]shape{
	reflect.TypeFor[Assertions](): {"at the top level", fieldsOf(reflect.TypeFor[Assertions]())},
	reflect.TypeFor[Assertion]():  {"in a test", fieldsOf(reflect.TypeFor[Assertion]())},
}

// shapeOf returns what a mapping of type t may hold.
func shapeOf(t reflect.Type) shape {
	if s, ok := assertionShapes[t]; ok {
		return s
	}
	return shapes[t]
}

// exampleOf returns an example of a key's value.
func exampleOf(doc string) string {
	if s, ok := assertionDocs[doc]; ok {
		return s
	}
	return keyDocs[doc].example
}

// ParseAssertions decodes a file of assertions as strictly as [ParseDocument]
// decodes a policy, within the same bounds. The error is an Errors.
func ParseAssertions(file string, data []byte) (*Assertions, error) {
	d := decoder{file: file}
	a := &Assertions{}
	root := d.parse(data)
	switch {
	case root == nil:
		if n, err := parseYAML(data); err == nil && (n == nil || n.Tag == "!!null") && len(d.errs) == 1 {
			d.errs[0].Err = errors.New("the file is empty; begin it with the key tests")
		}
	case root.Kind != yaml.MappingNode:
		d.fail(root, nil, "want keys and values, not %s; begin the file with tests: and indent what follows", describe(root))
	default:
		a.positions = positions{file, root}
		d.value(root, reflect.ValueOf(a).Elem(), nil, "")
		d.checkAssertions(a)
	}
	if len(d.errs) > 0 {
		sortErrors(d.errs)
		return nil, d.errs
	}
	return a, nil
}

// checkAssertions reports what decoding alone does not find.
func (d *decoder) checkAssertions(a *Assertions) {
	wrong := func(path, format string, args ...any) {
		if len(d.errs) < maxErrors {
			d.errs = append(d.errs, &Error{a.Pos(path), path, fmt.Errorf(format, args...)})
		}
	}
	if len(d.errs) > 0 {
		return
	}
	if len(a.Tests) == 0 {
		wrong("tests", "there is no test here; write tests: %s", assertionDocs["Assertions.tests"])
	}
	for i := range a.Tests {
		t := &a.Tests[i]
		path := fmt.Sprintf("tests[%d]", i)
		switch {
		case t.Target == "" && t.DNS == "":
			wrong(path, "the test asks for nothing; add target: \"api.example.com:443\" or dns: api.example.com")
		case t.Target != "" && t.DNS != "":
			wrong(path+".dns", "target and dns are two tests; write each with its own source and expect")
		case t.QType != "" && t.DNS == "":
			wrong(path+".qtype", "qtype goes with dns; remove it, or ask the resolver: dns: api.example.com")
		case t.SNI != "" && t.DNS != "":
			wrong(path+".sni", "sni goes with target, not with dns; remove it")
		}
		switch t.Expect {
		case Allow.String(), Deny.String(), Observe.String():
		default:
			wrong(path+".expect", "%q is no verdict; write allow, deny or observe", clip(t.Expect))
		}
		if _, ok := ParseReason(t.Reason); !ok && t.Reason != "" {
			wrong(path+".reason", "%q is no reason; write one such as matched, not_listed, explicit_deny or port_not_allowed", clip(t.Reason))
		}
	}
}

// Pos returns the place of path, such as tests[2].source, or of its nearest
// ancestor if nothing is written there.
func (a *Assertions) Pos(path string) Pos {
	return a.positions.find(path)
}

// Holds reports whether d is what a expects.
func (a *Assertion) Holds(d Decision) bool {
	return d.Verdict.String() == a.Expect &&
		(a.Reason == "" || d.Reason.String() == a.Reason) &&
		(a.Rule == "" || d.Rule == a.Rule)
}
