package policy

import (
	"maps"
	"testing"
	"time"
)

func TestCalendar(t *testing.T) {
	p, _, err := Load("policy.yaml", []byte(`
version: 1
deny: [bad.test]
groups:
  - {name: enforcing, sources: [10.1.0.0/16], allow: [a.test, b.test]}
  - name: observing
    sources: [10.2.0.0/16]
    mode: observe
    observe_until: 2027-01-31
    allow:
      - {id: first, names: [c.test], expires: 2026-03-31}
      - {id: second, names: [d.test], expires: 2026-06-30}
      - {id: never, names: [e.test]}
`), Options{})
	if err != nil {
		t.Fatal(err)
	}
	observing := maps.Collect(p.Observing())
	if until := observing["observing"]; len(observing) != 1 || until.Format(time.DateOnly) != "2027-01-31" && until.Format(time.DateOnly) != "2027-02-01" {
		t.Errorf("Observing = %v", observing)
	}
	for range p.Observing() {
		break
	}
	at := func(s string) time.Time {
		d, err := time.Parse(time.DateOnly, s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := p.NextExpiry(at("2026-01-01"))
	second := p.NextExpiry(first)
	if !first.After(at("2026-03-30")) || !first.Before(at("2026-04-02")) || !second.After(at("2026-06-29")) || !second.Before(at("2026-07-02")) {
		t.Errorf("NextExpiry: %v, then %v", first, second)
	}
	if last := p.NextExpiry(second); !last.IsZero() {
		t.Errorf("after the last expiry: %v", last)
	}
	if got := p.Rules(); got != 5 { // guardrail, bare names, three rules
		t.Errorf("Rules = %d, want 5", got)
	}
}
