package policy

import (
	"net/netip"
	"testing"
	"time"
)

func TestDecideForIsDecide(t *testing.T) {
	p, _, err := Load("policy.yaml", []byte(`
version: 1
deny: [bad.example]
groups:
  - {name: base, allow: [.base.example]}
  - {name: a, sources: [10.1.0.0/16], extends: [base], allow: [a.example], deny: [no.base.example]}
  - {name: b, sources: [10.2.0.0/16], mode: observe, observe_until: 2027-01-01, allow: [{names: [b.example], ports: [22], protocol: tcp}]}
`), Options{})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	for group, source := range map[string]string{"a": "10.1.0.1", "b": "10.2.0.1"} {
		for _, name := range []string{"a.example", "b.example", "x.base.example", "no.base.example", "bad.example", "other.example"} {
			for _, port := range []uint16{22, 443} {
				r := Request{Name: MustName(name), Port: port, Time: now}
				got, ok := p.DecideFor(group, r)
				r.Source = netip.MustParseAddr(source)
				if want := p.Decide(r); !ok || got != want {
					t.Errorf("%s, %s:%d: %+v, want %+v", group, name, port, got, want)
				}
			}
		}
	}
	if d, ok := p.DecideFor("none", Request{Name: MustName("a.example"), Port: 443}); ok || d.Passes() {
		t.Errorf("a group that there is not: %+v, %v", d, ok)
	}
}
