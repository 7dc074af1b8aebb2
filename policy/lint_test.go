package policy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestLint(t *testing.T) {
	// check compiles text; want are the findings, as "kind position: text", of which
	// only the beginning counts.
	check := func(name, text string, want ...string) {
		t.Helper()
		_, warnings, err := Load("p", []byte("version: 1\n"+text), Options{Now: at, Open: opener(map[string]string{
			"l": "x.a.test\n.a.test\nx.b.test # why\nshadow.c.test\n",
		})})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var got []string
		kinds := FindingKinds()
		for _, w := range warnings {
			f, ok := errors.AsType[*Finding](w)
			if !ok || kinds[f.Kind] == "" {
				t.Errorf("%s: %v is of no known kind", name, w)
			}
			if f, ok := errors.AsType[*Finding](w); ok && f.Kind != findExpired {
				got = append(got, fmt.Sprintf("%s %s: %s", f.Kind, w.Pos, f))
			}
		}
		ok := len(got) == len(want)
		for i := range got {
			ok = ok && strings.HasPrefix(got[i], want[i])
		}
		if !ok {
			t.Errorf("%s:\n%s\nwant:\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	// group is a policy of one group, whose rest begins in line 5.
	group := func(rest string) string { return "groups:\n- name: g\n  sources: [10.0.0.0/8]\n" + rest + "\n" }

	check("nothing", group(`  allow: [a.test, .b.test, "*.c.test", {names: [a.test], ports: [22], protocol: tcp}]`))
	check("twice", group(`  allow: [a.test, b.test, A.test.]`), `duplicate p:5:27: "a.test" is written twice here; remove one`)
	check("twice in a rule", group(`  allow: [{names: [a.test, a.test], ports: [22]}]`), `duplicate p:5:28: "a.test"`)
	check("twice with the same ports", group(`  allow: [{id: r, names: [a.test], ports: [22, 23]}, {names: [a.test], ports: [22]}]`), `covered p:5:63: "a.test" is covered by "a.test" of rule "r" already`)
	check("equals", group(`  allow: [{id: r, names: [a.test], ports: [22]}, {id: s, names: [a.test], ports: [22]}]`), `covered p:5:66: "a.test" is covered by "a.test" of rule "r" already`)
	check("wider", group(`  allow: [a.test, .a.test, x.a.test, "*.y.a.test", "api-*.a.test"]`),
		`covered p:5:11: "a.test" is covered by ".a.test" already`, `covered p:5:28: "x.a.test" is covered by ".a.test"`,
		`covered p:5:38: "*.y.a.test" is covered by ".a.test"`, `covered p:5:52: "api-*.a.test" is covered by ".a.test"`)
	check("below is not the apex", group(`  allow: ["*.a.test", a.test, .a.x.test, "*.x.test"]`), `covered p:5:31: ".a.x.test" is covered by "*.x.test"`)
	check("both", group(`  allow: ["*.a.test", .a.test]`), `covered p:5:11: "*.a.test" is covered by ".a.test" already`)
	check("covered by a wildcard", group(`  allow: ["api-*.a.test", api-eu.a.test, "*.a.test.example"]`), `covered p:5:27: "api-eu.a.test" is covered by "api-*.a.test" already`)
	check("the same wildcard", group(`  allow: ["api-*.a.test", {id: r, names: ["api-*.a.test"], protocol: tls}]`), `covered p:5:43: "api-*.a.test" is covered by "api-*.a.test" already`)
	check("other ports", group(`  allow: [.a.test, {names: [x.a.test], ports: [8443]}, {names: [y.a.test], protocol: dns}]`), `covered p:5:65: "y.a.test" is covered by ".a.test"`)
	check("other protocol", group(`  allow: [{names: [.a.test], protocol: tls}, x.a.test]`))
	check("other types", group(`  allow: [.a.test, {names: [x.a.test], qtypes: [TXT]}]`))
	check("stricter hello", group(`  allow: [.a.test, {names: [x.a.test], tls: {min_version: "1.3"}}]`), `covered p:5:29`)
	check("laxer hello", group(`  allow: [.a.test, {names: [x.a.test], tls: {ech: allow}}]`))
	check("private", group(`  allow: [{id: r, names: [.a.test], private_destinations: [10.0.0.0/8]}, {names: [x.a.test], private_destinations: [10.1.0.0/16]}, {id: s, names: [y.a.test], private_destinations: [192.168.0.0/16]}]`), `covered p:5:83`)
	check("expiry", group(`  allow: [.a.test, {names: [x.a.test], expires: 2027-01-01}]`), `covered p:5:29: "x.a.test" is covered by ".a.test"`)
	check("expiry of the wider", group(`  allow: [{names: [.a.test], expires: 2027-01-01}, x.a.test]`))
	check("expired", group(`  allow: [{names: [.a.test], expires: 2026-01-01}, x.a.test]`))
	check("another group", "groups:\n- {name: base, allow: [.a.test]}\n- {name: g, sources: [10.0.0.0/8], extends: [base], allow: [x.a.test]}\n")
	check("lifting", group(`  allow: [.internal, metadata.google.internal]`))
	check("deny", group(`  deny: [.a.test, x.a.test, {names: [y.a.test], ports: [22]}, {names: [z.test], qtypes: [TXT]}, {names: [z.test], qtypes: [TXT]}]`),
		`covered p:5:19`, `covered p:5:38`, `covered p:5:106`)

	check("shadowed", group("  allow: [x.a.test, b.test]\n  deny: [.a.test]"), `shadowed p:5:11: "x.a.test" can never match: rule ".a.test" (deny of group "g") denies it`)
	check("shadowed by a guardrail", "deny: [{id: never, names: [.a.test]}]\n"+group("  allow: [{names: [x.a.test], ports: [22], protocol: tcp}]"), `shadowed p:6:20: "x.a.test" can never match: rule "never" (for all groups) denies it`)
	check("shadowed by a parent", "groups:\n- {name: base, deny: [.a.test]}\n- {name: g, sources: [10.0.0.0/8], extends: [base], allow: [x.a.test]}\n", `shadowed p:4:61: "x.a.test" can never match: rule ".a.test" (deny of group "base")`)
	check("denied to a child", "groups:\n- {name: base, allow: [x.a.test]}\n- {name: g, sources: [10.0.0.0/8], extends: [base], deny: [.a.test]}\n")
	check("a part is denied", group("  allow: [.a.test, b.test]\n  deny: [x.a.test, {names: [b.test], ports: [22]}]"))
	check("its ports are denied", group("  allow: [{names: [b.test], ports: [22], protocol: tcp}]\n  deny: [{names: [b.test], ports: [1-1000]}]"), `shadowed p:5:20`)
	check("denied for a while", group("  allow: [b.test]\n  deny: [{names: [b.test], expires: 2027-01-01}]"))
	check("shadowed by what is built in", group(`  allow: ["*.resolver.arpa", x.resolver.arpa]`), `shadowed p:5:11: "*.resolver.arpa" can never match: rule "builtin:encrypted-dns"`)

	list := "lists: [{name: l, file: l}, {name: m, names: [.c.test, x.c.test]}]\n"
	check("list file", list+group("  allow: [\"@l\", \"@m\"]\n  deny: [shadow.c.test]"),
		`covered l:1:1: "x.a.test" is covered by ".a.test" already`, `shadowed l:4:1: "shadow.c.test" can never match`,
		`covered p:2:56: "x.c.test" is covered by ".c.test" already`)
	check("feeds are not judged", list+group("  deny: [\"@l\", \"@m\"]"), `covered p:2:56: "x.c.test" is covered by ".c.test" already`)
	check("list of two groups", "lists: [{name: l, names: [x.a.test]}]\ngroups:\n- {name: g, sources: [10.0.0.0/8], allow: [\"@l\"], deny: [.a.test]}\n- {name: h, sources: [11.0.0.0/8], allow: [\"@l\"]}\n")

	check("addresses", group("  allow: [{id: r, addresses: [1.2.0.0/16]}, {addresses: [1.2.3.0/24]}, {addresses: [8.8.8.8]}]\n  deny: [{id: d, addresses: [8.0.0.0/8]}]"),
		`covered p:5:58: 1.2.3.0/24 is covered by rule "r" already`, `shadowed p:5:85: 8.8.8.8/32 can never match: rule "d"`)
	check("everything", group(`  allow: [{names: ["*"], allow_public_suffix: true}, {addresses: [0.0.0.0/0, "2000::/3", 10.0.0.0/8]}]`),
		`allow-all p:5:11: rule "*" allows every name`, `allow-all p:5:67: 0.0.0.0/0 is a large part`, `allow-all p:5:78: 2000::/3`)
	check("everything denied", group(`  deny: [{names: ["*"]}, {addresses: [0.0.0.0/0]}]`))
	check("never", group("  allow: [{addresses: [1.2.3.4], protocol: dns}]\n  deny: [{names: [a.test], qtypes: [TXT], ports: [22]}, {names: [b.test], qtypes: [TXT], protocol: tls}]"),
		`never-matches p:5:44`, `never-matches p:6:36`, `never-matches p:6:83`)
	check("no effect", group(`  allow: [{names: [a.test], ports: [22], protocol: tcp, tls: {ech: allow}}]`), `no-effect p:5:62: tls has no effect with protocol: tcp`)

	check("unreachable", "groups:\n- {name: g, sources: [10.0.0.0/8]}\n- {name: h, sources: [10.0.0.0/9]}\n- {name: i, sources: [10.128.0.0/9]}\n", `unreachable-group p:3:10: group "g" is never chosen`)
	check("reachable in the middle", "groups:\n- {name: g, sources: [10.0.0.0/8]}\n- {name: h, sources: [10.0.0.0/10]}\n- {name: i, sources: [10.192.0.0/10]}\n")
	check("extended in vain", "groups:\n- {name: base}\n- {name: g, sources: [10.0.0.0/8], extends: [base]}\n- {name: h, sources: [10.0.0.0/9, 10.128.0.0/9]}\n",
		`unreachable-group p:3:10: group "base" is extended only by groups`, `unreachable-group p:4:10: group "g"`)
}

// TestLintIsRight holds findings to their meaning: without a pattern that is called
// covered, duplicate or shadowed nothing is decided differently.
func TestLintIsRight(t *testing.T) {
	rng := rand.New(rand.NewPCG(13, 14))
	kinds := map[string]int{}
	for range 1500 {
		d := randomPolicy(rng)
		d.Groups[1].Allow = append(d.Groups[1].Allow, randomPolicy(rng).Groups[1].Allow...)
		old, warnings, err := Compile(d, Options{Now: at})
		if err != nil {
			continue
		}
		for _, w := range warnings {
			f, ok := errors.AsType[*Finding](w)
			var g, r, n int
			if !ok || f.Kind == findAllowAll {
				continue
			}
			var kind string
			if _, err := fmt.Sscanf(strings.NewReplacer("[", " ", "]", " ", ".", " ").Replace(w.Path), "groups %d allow %d %s %d", &g, &r, &kind, &n); err != nil || kind != "names" {
				continue
			}
			less := *d
			less.Groups = append([]Group(nil), d.Groups...)
			less.Groups[g].Allow = append([]Rule(nil), d.Groups[g].Allow...)
			rule := &less.Groups[g].Allow[r]
			rule.Names = append(append([]string(nil), rule.Names[:n]...), rule.Names[n+1:]...)
			if len(rule.Names)+len(rule.Addresses) == 0 {
				less.Groups[g].Allow = append(less.Groups[g].Allow[:r], less.Groups[g].Allow[r+1:]...)
			}
			new, _, err := Compile(&less, Options{Now: at})
			if err != nil {
				continue // such as IDs that are no longer unlike
			}
			changes := Diff(old, new, at)
			changes.Expiry = nil
			if f.Kind == findShadowed { // the name may still resolve, and private_destinations lets a group observe
				changes.Groups = slices.DeleteFunc(changes.Groups, func(g GroupChange) bool {
					return !slices.ContainsFunc(g.Changes, func(x Change) bool {
						return !x.Observed && slices.ContainsFunc(x.Facets, func(f string) bool { return !strings.HasPrefix(f, "dns") && !strings.HasSuffix(f, "/connect") })
					})
				})
			}
			kinds[f.Kind]++
			if !changes.Empty() {
				t.Fatalf("%v\n%s\n%+v", w, strings.Join(summary(changes), "\n"), d)
			}
		}
	}
	if kinds[findShadowed] < 20 || kinds[findCovered] < 50 || kinds[findDuplicate] < 5 {
		t.Errorf("too few findings to show anything: %v", kinds)
	}
}
