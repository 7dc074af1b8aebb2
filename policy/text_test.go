package policy

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestDocumentOfPolicy(t *testing.T) {
	var long strings.Builder
	long.WriteString("version: 1\ngroups:\n  - name: b\n    sources: [10.2.0.0/16]\n    allow:\n")
	for i := range 5000 {
		fmt.Fprintf(&long, "      - host%d.b.example\n", i)
	}
	a := "version: 1\nunmatched_source: a\ngroups:\n  - name: a\n    sources: [10.1.0.0/16]\n    mode: observe\n    observe_until: 2030-01-01\n" +
		"    allow:\n      - Host.A.Example.\n      - {id: x, names: [x.example], ports: [22], protocol: tcp}\n      - {names: [y.example], ports: [22], protocol: tcp}\n"
	fragments := []Fragment{{"a.yaml", []byte(a)}, {"b.yaml", []byte(long.String())}}
	if len(fragments[1].Data) <= plainText {
		t.Fatal("the second file is to be kept compressed")
	}
	p, _, err := LoadFragments(fragments, Options{})
	if err != nil {
		t.Fatal(err)
	}
	clear(fragments[0].Data) // which are the caller's
	clear(fragments[1].Data)
	d, err := p.Document()
	if err != nil {
		t.Fatal(err)
	}
	if d.UnmatchedSource != "a" || len(d.Groups) != 2 || len(d.Groups[1].Allow) != 5000 {
		t.Fatalf("%q, %d groups", d.UnmatchedSource, len(d.Groups))
	}
	if ids, want := RuleIDs(d.Groups[0].Allow), []string{"host.a.example", "x", "y.example:22/tcp"}; !reflect.DeepEqual(ids, want) {
		t.Errorf("%q, want %q", ids, want)
	}
	for path, want := range map[string]string{"groups[0].allow[1]": "a.yaml:10:9", "groups[1].allow[4999]": "b.yaml:5005:9"} {
		if got := d.Where(path).String(); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	again, _, err := LoadFragments([]Fragment{{"a.yaml", []byte(a)}, {"b.yaml", []byte(long.String())}}, Options{})
	if err != nil || again.Revision() != p.Revision() {
		t.Errorf("%v, %v", again, err)
	}
	for at, want := range map[string]Mode{"2029-12-31": ModeObserve, "2030-01-02": ModeEnforce} {
		now, err := time.Parse(time.DateOnly, at)
		if got := p.ModeAt("a", now); err != nil || got != want {
			t.Errorf("%s: %v", at, got)
		}
	}
	made, _, err := Compile(d, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if d, err := made.Document(); d != nil || err != nil {
		t.Errorf("of a document made in Go: %v, %v", d, err)
	}
}
