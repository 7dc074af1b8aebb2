package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/internal/admin"
	"sallyport/internal/discovery"
	"sallyport/policy"
)

// view returns the detail of a policy, with uses unless nil.
func view(t *testing.T, text string, uses map[discovery.RuleKey]discovery.Use) *admin.PolicyDetail {
	t.Helper()
	p, _, err := policy.Load("policy.yaml", []byte(text), policy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{}
	if uses != nil {
		g.adminState.policy.uses = func() map[discovery.RuleKey]discovery.Use { return uses }
	}
	if _, err := g.policyDetail(); err == nil || !strings.Contains(err.Error(), "no policy is in force") {
		t.Errorf("before a policy: %v", err)
	}
	g.store.Swap(p)
	d, err := g.policyDetail()
	if err != nil {
		t.Fatal(err)
	}
	if d.Revision != p.Revision() {
		t.Errorf("revision %s", d.Revision)
	}
	return d
}

func TestPolicyDetail(t *testing.T) {
	const text = `version: 1
deny: [evil.example]
groups:
  - name: base
    allow: [.debian.org, {id: time, names: [time.example], ports: [123], protocol: tcp, owner: net, reason: NET-1, expires: 2999-01-01}]
  - name: ci
    sources: [10.1.0.0/16]
    extends: [base]
    allow: [Api.Example]
    deny: [evil.example]
  - name: web
    sources: [10.2.0.0/16]
    extends: [ci]
    mode: observe
    observe_until: 2999-01-01
    allow: [.debian.org]
`
	at := time.Unix(1_900_000_000, 0)
	use := func(hits uint64, late time.Duration) discovery.Use {
		return discovery.Use{Hits: hits, LastUsed: at.Add(late)}
	}
	key := func(group, rule string, deny bool) discovery.RuleKey {
		return discovery.RuleKey{Group: group, Rule: rule, Deny: deny}
	}
	d := view(t, text, map[discovery.RuleKey]discovery.Use{
		key("ci", ".debian.org", false): use(1, 0), key("web", ".debian.org", false): use(10, time.Hour), key("ci", "time", false): use(5, 0),
		key("web", "api.example", false): use(7, 0), key("ci", "evil.example", true): use(3, 0), key("", "evil.example", true): use(2, 0),
		key("gone", ".debian.org", false): use(1000, 0),
	})
	var got []string
	section := func(name string, rules []admin.RuleDetail) {
		for _, r := range rules {
			used := "never"
			if r.LastUsed != nil {
				used = r.LastUsed.Sub(at.UTC()).String()
			}
			got = append(got, fmt.Sprintf("%s %s %s %d %s", name, r.ID, r.Where, *r.Hits, used))
		}
	}
	section("all", d.Deny)
	for _, g := range d.Groups {
		section(g.Name, g.Allow)
		section(g.Name+" deny", g.Deny)
	}
	want := `all evil.example policy.yaml:2:8 5 0s
base .debian.org policy.yaml:5:13 11 1h0m0s
base time policy.yaml:5:26 5 0s
ci api.example policy.yaml:9:13 7 0s
ci deny evil.example policy.yaml:10:12 3 0s
web .debian.org policy.yaml:16:13 10 1h0m0s`
	if s := strings.Join(got, "\n"); s != want {
		t.Errorf("%s\nwant\n%s", s, want)
	}
	r := d.Groups[0].Allow[1]
	if r.Owner != "net" || r.Reason != "NET-1" || r.Expires != "2999-01-01" || r.Protocol != "tcp" || fmt.Sprint(r.Ports) != "[123]" {
		t.Errorf("%+v", r)
	}
	if d.UnmatchedSource != "deny" || d.Truncated || d.Groups[1].Mode != "enforce" || d.Groups[2].Mode != "observe" || d.Groups[2].ObserveUntil != "2999-01-01" || d.Groups[1].Extends[0] != "base" {
		t.Errorf("%+v", d)
	}
	if d := view(t, text, nil); d.Deny[0].Hits != nil || d.Deny[0].LastUsed != nil {
		t.Errorf("hits that nobody counts: %+v", d.Deny[0])
	}
}

func TestPolicyDetailSaysWhatRulesRestrict(t *testing.T) {
	d := view(t, `version: 1
lists: [{name: a, names: [a.example]}, {name: b, names: [b.example]}]
groups:
  - name: ci
    sources: [10.1.0.0/16]
    tls: {min_version: "1.3", sni: optional}
    allow:
      - {names: ["@a", "@b", c.example], private_destinations: [10.0.0.0/8], tls: {ech: allow, sni: match}}
      - d.example
  - {name: plain, sources: [10.2.0.0/16], allow: [e.example]}
`, nil)
	r := d.Groups[0].Allow
	if got := fmt.Sprintf("%v %+v %+v", r[0].PrivateDestinations, *r[0].TLS, r[0].Lists); got != "[10.0.0.0/8] {SNI:match ECH:allow MinVersion:1.3} [{Name:a File:} {Name:b File:}]" {
		t.Error(got)
	}
	if got := fmt.Sprintf("%v %+v %+v", r[1].PrivateDestinations, *r[1].TLS, r[1].Lists); got != "[] {SNI:optional ECH: MinVersion:1.3} []" {
		t.Error(got)
	}
	if r := d.Groups[1].Allow[0]; r.TLS != nil || r.Lists == nil || r.PrivateDestinations == nil {
		t.Errorf("%+v", r)
	}
}

// TestPolicyDetailIsBounded has more rules, and more names in one, than are shown.
func TestPolicyDetailIsBounded(t *testing.T) {
	var b strings.Builder
	b.WriteString("version: 1\ngroups:\n  - name: all\n    sources: [10.0.0.0/8]\n    allow:\n      - names:\n")
	for i := range viewNames + 5 {
		fmt.Fprintf(&b, "          - many%d.example\n", i)
	}
	for i := range viewRules {
		fmt.Fprintf(&b, "      - one%d.example\n", i)
	}
	b.WriteString("  - name: more\n    sources: [192.0.2.0/24]\n    allow: [x.example]\n")
	d := view(t, b.String(), nil)
	if a := d.Groups[0].Allow; len(a) != viewRules || len(a[0].Names) != viewNames || a[0].NameCount != viewNames+5 || !d.Truncated || len(d.Groups[1].Allow) != 0 {
		t.Errorf("%d rules, %d of %d names", len(a), len(a[0].Names), a[0].NameCount)
	}
}
