package policy

import (
	"reflect"
	"strings"
	"testing"
)

func TestParseAssertions(t *testing.T) {
	a, err := ParseAssertions("t.yaml", []byte(`at: 2027-01-01
tests:
  - name: fetch
    source: 10.20.1.5
    target: api.example.com:443
    sni: api.example.com
    destination: 203.0.113.7
    expect: allow
    reason: matched
    rule: "@github"
  - {source: 2001:db8::1, dns: api.example.com, qtype: TXT, at: 2027-06-01T10:00:00Z, expect: deny}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Assertions{At: "2027-01-01", Tests: []Assertion{
		{Name: "fetch", Source: "10.20.1.5", Target: "api.example.com:443", SNI: "api.example.com", Destination: "203.0.113.7", Expect: "allow", Reason: "matched", Rule: "@github"},
		{Source: "2001:db8::1", DNS: "api.example.com", QType: "TXT", At: "2027-06-01T10:00:00Z", Expect: "deny"},
	}}
	want.positions = a.positions
	if !reflect.DeepEqual(a, want) {
		t.Errorf("got %+v", a)
	}
	if pos := a.Pos("tests[1].qtype").String(); pos != "t.yaml:11:56" {
		t.Errorf("Pos = %s", pos)
	}
}

func TestParseAssertionsMistakes(t *testing.T) {
	check := func(name, text string, want ...string) {
		t.Helper()
		_, err := ParseAssertions("t.yaml", []byte(text))
		if err == nil {
			t.Errorf("%s: no error", name)
			return
		}
		if got := err.Error(); got != strings.Join(want, "\n") {
			t.Errorf("%s:\n%s\nwant:\n%s", name, got, strings.Join(want, "\n"))
		}
	}
	check("empty", "# nothing\n", `t.yaml:1:1: the file is empty; begin it with the key tests`)
	check("a list", "- {source: 10.0.0.1}\n", `t.yaml:1:1: want keys and values, not a list; begin the file with tests: and indent what follows`)
	check("no tests", "tests: []\n", `t.yaml:1:8: tests: there is no test here; write tests: [{source: 10.20.1.5, target: "api.example.com:443", expect: allow}]`)
	check("keys", "tests:\n- {source: 10.0.0.1, taget: a.test:443, expect: allow}\n- {target: a.test:443}\n",
		`t.yaml:2:22: tests[0].taget: unknown key "taget" in a test; did you mean "target"?`,
		`t.yaml:3:3: tests[1].source: missing; add source: 10.20.1.5`, `t.yaml:3:3: tests[1].expect: missing; add expect: allow`)
	check("types", "tests:\n- {source: [10.0.0.1], target: 443, expect: allow}\n",
		`t.yaml:2:12: tests[0].source: want a string, not a list; write source: 10.20.1.5`, `t.yaml:2:32: tests[0].target: want a string, not the number 443; put it in quotes: "443"`)
	check("combinations", `tests:
- {source: 10.0.0.1, expect: allow}
- {source: 10.0.0.1, target: a.test:443, dns: a.test, expect: allow}
- {source: 10.0.0.1, target: a.test:443, qtype: A, expect: permit}
- {source: 10.0.0.1, dns: a.test, sni: a.test, expect: deny, reason: unlisted}
`,
		`t.yaml:2:3: tests[0]: the test asks for nothing; add target: "api.example.com:443" or dns: api.example.com`,
		`t.yaml:3:47: tests[1].dns: target and dns are two tests; write each with its own source and expect`,
		`t.yaml:4:49: tests[2].qtype: qtype goes with dns; remove it, or ask the resolver: dns: api.example.com`,
		`t.yaml:4:60: tests[2].expect: "permit" is no verdict; write allow, deny or observe`,
		`t.yaml:5:40: tests[3].sni: sni goes with target, not with dns; remove it`,
		`t.yaml:5:70: tests[3].reason: "unlisted" is no reason; write one such as matched, not_listed, explicit_deny or port_not_allowed`)
	check("quotes", "tests:\n- {source: 10.0.0.1, target: a.test:443, expect: deny, rule: @l}\n",
		`t.yaml:2:62: tests[0].rule: @l begins with '@', which YAML gives another meaning; put it in quotes: "@l"`)
	check("brackets", "tests:\n- {source: 10.0.0.1, target: [2001:db8::1]:443, expect: deny}\n",
		"t.yaml:2:1: the mapping that begins here with { has no comma after each value, or no }")
}

func TestAssertionsExplainEveryKey(t *testing.T) {
	keys := 0
	for _, s := range assertionShapes {
		for _, f := range s.fields {
			keys++
			if assertionDocs[f.doc] == "" {
				t.Errorf("assertionDocs lacks %q", f.doc)
			}
		}
	}
	if keys != len(assertionDocs) {
		t.Errorf("assertionDocs has %d keys, there are %d", len(assertionDocs), keys)
	}
}

func TestAssertionHolds(t *testing.T) {
	for _, tt := range []struct {
		a    Assertion
		d    Decision
		want bool
	}{
		{Assertion{Expect: "allow", Reason: "matched", Rule: "r"}, Decision{Verdict: Allow, Reason: ReasonMatched, Rule: "r"}, true},
		{Assertion{Expect: "allow"}, Decision{Verdict: Allow, Reason: ReasonMatched, Rule: "r"}, true},
		{Assertion{Expect: "allow", Rule: "r"}, Decision{Verdict: Allow, Reason: ReasonMatched, Rule: "s"}, false},
		{Assertion{Expect: "deny", Reason: "matched"}, Decision{Reason: ReasonNotListed}, false},
		{Assertion{Expect: "allow"}, Decision{Verdict: Observe, Reason: ReasonNotListed}, false},
		{Assertion{Expect: "deny"}, Decision{}, true},
	} {
		if got := tt.a.Holds(tt.d); got != tt.want {
			t.Errorf("%+v.Holds(%+v) = %v", tt.a, tt.d, got)
		}
	}
}

// FuzzParseAssertions shows that no text stops the parser, that mistakes have their
// places, and that what is accepted is complete.
func FuzzParseAssertions(f *testing.F) {
	f.Add("tests:\n- {source: 10.0.0.1, target: a.test:443, expect: allow}\n")
	f.Add("at: 2027-01-01\ntests:\n  - source: ::1\n    dns: a.test\n    qtype: TXT\n    expect: deny\n    reason: not_listed\n    rule: \"@l\"\n")
	f.Add("tests: []\n")
	f.Add("- *a\n")
	f.Fuzz(func(t *testing.T, text string) {
		a, err := ParseAssertions("t.yaml", []byte(text))
		if err != nil {
			checkErrors(t, []byte(strings.TrimPrefix(text, "\ufeff")), err)
			return
		}
		if len(a.Tests) == 0 {
			t.Fatal("no tests, and no mistake")
		}
		for i := range a.Tests {
			if x := &a.Tests[i]; x.Source == "" && x.Expect == "" || (x.Target == "") == (x.DNS == "") {
				t.Fatalf("incomplete: %+v", x)
			}
		}
	})
}
