package policy

import (
	"strings"
	"testing"
)

func TestLoadFragments(t *testing.T) {
	base := Fragment{"policy.d/10-base.yaml", []byte(`version: 1
unmatched_source: guests
lists: [{name: github, names: [.github.com]}]
groups:
  - {name: baseline, allow: [.debian.org]}
  - {name: guests, sources: [10.9.0.0/16], allow: [guest.test]}
`)}
	ci := Fragment{"policy.d/20-ci.yaml", []byte(`version: 1
deny: [evil.test]
groups:
  - {name: ci, sources: [10.1.0.0/16], extends: [baseline], allow: ["@github"]}
`)}
	p, _, err := LoadFragments([]Fragment{base, ci}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ src, name, want string }{
		{"10.1.0.1", "github.com", "matched"}, {"10.1.0.1", "www.debian.org", "matched"}, {"10.1.0.1", "evil.test", "explicit_deny"},
		{"192.0.2.1", "guest.test", "matched"}, {"192.0.2.1", "github.com", "not_listed"},
	} {
		d := p.Decide(Request{Source: addr(tt.src), Name: MustName(tt.name), Port: 443, Time: at})
		if d.Reason.String() != tt.want {
			t.Errorf("%s from %s: %v, want %s", tt.name, tt.src, d.Reason, tt.want)
		}
	}

	check := func(name, second string, want ...string) {
		t.Helper()
		p, _, err := LoadFragments([]Fragment{base, {"policy.d/20-ci.yaml", []byte(second)}}, Options{})
		if p != nil || err == nil {
			t.Errorf("%s: %v, %v", name, p, err)
			return
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: no %q in\n%v", name, w, err)
			}
		}
		if n := strings.Count(err.Error(), "\n") + 1; n != len(want) {
			t.Errorf("%s: %d mistakes, want %d:\n%v", name, n, len(want), err)
		}
	}
	check("same group", "version: 1\ngroups: [{name: baseline, sources: [10.2.0.0/16]}]\n",
		`policy.d/20-ci.yaml:2:17: groups[0].name: a second group is called "baseline"`)
	check("same list", "version: 1\nlists: [{name: github, names: [x.test]}]\n",
		`policy.d/20-ci.yaml:2:16: lists[0].name: a second list is called "github"`)
	check("same prefix", "version: 1\ngroups: [{name: x, sources: [10.9.0.0/16]}]\n",
		`policy.d/20-ci.yaml:2:30: groups[0].sources[0]: prefix 10.9.0.0/16 belongs to group "guests"`)
	check("unmatched_source twice", "version: 1\nunmatched_source: deny\n",
		`policy.d/20-ci.yaml:2:19: unmatched_source: policy.d/10-base.yaml says unmatched_source already`)
	check("mistakes of both steps", "version: 1\ngroups:\n  - {name: x, sources: [10.3.0.0/16], alow: [], allow: [\"*com\"]}\n",
		`policy.d/20-ci.yaml:3:39: groups[0].alow`, `policy.d/20-ci.yaml:3:57: groups[0].allow[0].names[0]: bad name pattern`)
	check("syntax", "version: 1\ngroups: [", "policy.d/20-ci.yaml:")
}
