package policy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/fstest"
)

// opener serves list files from memory.
func opener(files map[string]string) func(string) (io.ReadCloser, error) {
	m := fstest.MapFS{}
	for name, text := range files {
		m[name] = &fstest.MapFile{Data: []byte(text)}
	}
	return func(name string) (io.ReadCloser, error) {
		f, err := m.Open(name)
		if err != nil {
			return nil, fs.ErrNotExist
		}
		return f, nil
	}
}

func TestCompileMistakes(t *testing.T) {
	check := func(name, text string, want ...string) {
		t.Helper()
		_, _, err := Load("policy.yaml", []byte("version: 1\n"+text), Options{Now: at, Open: opener(map[string]string{
			"bad.txt":   "good.test\n# comment\n*com\n  x..y # trailing\n",
			"wide.txt":  "ok.test\r\n*.co.uk\r\n",
			"two.txt":   "a.test b.test\n",
			"utf8.txt":  "a.test\nb\xff.test\n",
			"long.txt":  strings.Repeat("a", 5000),
			"empty.txt": "# nothing\n",
		})})
		if err == nil {
			t.Errorf("%s: no error", name)
			return
		}
		var es Errors
		if !errors.As(err, &es) {
			t.Errorf("%s: %T, want Errors", name, err)
		}
		text = err.Error()
		if n := strings.Count(text, "\n") + 1; n != len(want) {
			t.Errorf("%s: %d mistakes, want %d:\n%s", name, n, len(want), text)
		}
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("%s: no %q in\n%s", name, w, text)
			}
		}
	}
	group := func(rest string) string { return "groups:\n- name: g\n  sources: [10.0.0.0/8]\n" + rest }

	check("pattern", group("  allow: [\"*com\", \"x.test:443\"]\n"),
		`policy.yaml:5:11: groups[0].allow[0].names[0]: bad name pattern "*com"`, `policy.yaml:5:19: groups[0].allow[1].names[0]: bad name pattern "x.test:443"`)
	check("registry suffix", group("  allow: [\"*\", \"*.com\", .co.uk, \"a-*.org\"]\n"),
		`allow[0]`, `".com"; name the domains, or set allow_public_suffix: true`, `".co.uk"`, `allow[3]`)
	check("prefixes", group("- name: h\n  sources: [10.0.0.0/8, 10.0.0.1/8, x, \"::ffff:10.0.0.0/104\", fe80::1%eth0, 300.0.0.0/8]\n"),
		`groups[1].sources[0]: prefix 10.0.0.0/8 belongs to group "g" already`, `sources[1]: 10.0.0.1/8 has bits set beyond its length; write 10.0.0.0/8`,
		`sources[2]: "x" is not a prefix`, `sources[3]: prefix 10.0.0.0/8 belongs to group "g"`, `sources[4]`, `sources[5]`)
	check("circle of groups", "groups:\n- {name: a, sources: [10.0.0.0/8], extends: [b]}\n- {name: b, extends: [c]}\n- {name: c, extends: [a]}\n",
		`policy.yaml:5:23: groups[2].extends[0]: groups extend each other in a circle`)
	check("circle of one", "groups:\n- {name: a, sources: [10.0.0.0/8], extends: [a]}\n", `circle`)
	check("circle of lists", "lists:\n- {name: a, names: [\"@b\"]}\n- {name: b, names: [\"@a\", x.test]}\n", `policy.yaml:4:21: lists[1].names[0]: lists hold each other in a circle`)
	check("unknown references", "unmatched_source: nobody\nlists:\n- {name: a, names: [\"@nope\", x.test]}\n"+group("  extends: [base]\n  allow: [\"@github\"]\n"),
		`unmatched_source: there is no group "nobody"; write deny or the name of a group; there are g`, `lists[0].names[0]: there is no list "nope"`,
		`extends[0]: there is no group "base"`, `there is no list "github"; there are a`)
	check("names of groups", "groups:\n- {name: deny, sources: [10.0.0.0/8]}\n- {name: x y, sources: [11.0.0.0/8]}\n- {name: a, sources: [12.0.0.0/8]}\n- {name: a, sources: [13.0.0.0/8]}\n",
		`no group can be called deny`, `group name "x y"`, `a second group is called "a"`)
	check("modes", group("  mode: watch\n- name: h\n  mode: observe\n- name: i\n  observe_until: 2026-01-01\n- name: j\n  mode: observe\n  observe_until: soon\n"),
		`mode "watch" is not known; write enforce or observe`, `add observe_until: 2026-12-31`, `observe_until goes with mode: observe`, `"soon" is not a date`)
	check("rule", group(`  allow:
  - {ports: [443]}
  - {names: [a.test], ports: ["0", "70000", 9-8, http]}
  - {names: [b.test], protocol: udp}
  - {names: [c.test], protocol: tcp}
  - {names: [d.test], protocol: dns, ports: [53]}
  - {names: [e.test], qtypes: [AXFR]}
  - {names: [f.test], private_destinations: [10]}
  - {names: [g.test], tls: {sni: no-match, ech: maybe, min_version: "2.0"}}
  - {names: [h.test], expires: tomorrow}
  - {addresses: [example.com]}
  - {id: same, names: [i.test]}
  - {id: same, names: [j.test]}
  - {id: "a b", names: [k.test]}
  deny:
  - {names: [l.test], tls: {ech: allow}, private_destinations: [10.0.0.0/8]}
`),
		`allow[0]: the rule names no destination`, `allow[1].ports[0]`, `allow[1].ports[1]`, `allow[1].ports[2]`, `allow[1].ports[3]`,
		`allow[2].protocol: protocol "udp" is not known`, `allow[3].protocol: protocol: tcp relays without looking and so needs ports`,
		`allow[4].ports: protocol: dns`, `allow[5].qtypes[0]: "AXFR"`, `allow[6].private_destinations[0]`,
		`tls.sni: sni: "no-match" is not known; write match, listed or optional`, `tls.ech`, `tls.min_version`, `allow[8].expires: "tomorrow" is not a date`,
		`allow[9].addresses[0]: "example.com" is not a prefix`, `allow[11].id: a second rule of this section has the ID "same"`, `allow[12].id`,
		`deny[0].tls: a deny rule`, `deny[0].private_destinations[0]: a deny rule`)
	check("group tls, once", group("  tls: {sni: never}\n  allow: [a.test, {names: [b.test], tls: {ech: allow}}]\n"), `groups[0].tls.sni`)
	check("list file", "lists: [{name: l, file: bad.txt}]\n"+group("  allow: [\"@l\"]\n"),
		`bad.txt:3:1: lists[0].file: bad name pattern "*com"`, `bad.txt:4:3: lists[0].file: bad name pattern "x..y"`)
	check("list file over a registry", "lists: [{name: l, file: wide.txt}]\n"+group("  allow: [\"@l\"]\n"), `wide.txt:2:1: lists[0].file`)
	check("list file, two words", "lists: [{name: l, file: two.txt}]\n"+group("  allow: [\"@l\"]\n"), `two.txt:1:1: lists[0].file: "b.test" follows a pattern; write one pattern a line`)
	check("list file, encoding", "lists: [{name: l, file: utf8.txt}]\n"+group("  allow: [\"@l\"]\n"), `utf8.txt:2:1: lists[0].file: invalid UTF-8`)
	check("list file, long line", "lists: [{name: l, file: long.txt}]\n"+group("  allow: [\"@l\"]\n"), `long.txt:1:1`)
	check("list file, missing", "lists: [{name: l, file: no.txt}]\n"+group("  allow: [\"@l\"]\n"), `policy.yaml:2:25: lists[0].file: list file`)
	check("lists", "lists: [{name: a}, {name: b, names: [x.test], file: bad.txt}, {name: c d, names: [x.test]}, {name: b, names: [x.test]}]\n",
		`lists[0]: list "a" is empty`, `lists[1].file: list "b" has names and a file`, `lists[2].name`, `a second list is called "b"`,
		`bad.txt:3:1`, `bad.txt:4:3`)
	check("both steps at once", group("  alow: [x.test]\n  allow: [\"*com\"]\n"), `policy.yaml:5:3: groups[0].alow`, `groups[0].allow[0].names[0]: bad name pattern`)
}

func TestCompileWarnings(t *testing.T) {
	_, warnings, err := Load("policy.yaml", []byte(`version: 1
lists:
  - {name: unused, names: [x.test]}
groups:
  - {name: nobody, allow: [x.test]}
  - name: g
    sources: [10.0.0.0/8]
    mode: observe
    observe_until: 2026-01-01
    allow: [.github.io, {names: [y.test], expires: 2026-01-01}]
`), Options{Now: at})
	if err != nil {
		t.Fatal(err)
	}
	text := Errors(warnings).Error()
	for _, want := range []string{
		`policy.yaml:3:12: lists[0].name: no rule uses the list "unused"`, `groups[0].name: group "nobody" has no sources`,
		`observe_until: group "g" has enforced since 2026-01-01`, `anybody can rent a name below "github.io"`, `rule "y.test" expired on 2026-01-01`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if len(warnings) != 5 {
		t.Errorf("%d warnings:\n%s", len(warnings), text)
	}
}

func TestListFiles(t *testing.T) {
	p, _, err := Load("policy.yaml", []byte(`version: 1
lists: [{name: l, file: l.txt}, {name: hosts, file: hosts.txt}]
deny: ["@hosts"]
groups: [{name: g, sources: [10.0.0.0/8], allow: ["@l"]}]
`), Options{Open: opener(map[string]string{
		"l.txt":     "\ufeffplain.test\r\n\r\n# comment\r\n*.wild.test # why\r\nUPPER.test.\r\nbücher.test\n.both.test",
		"hosts.txt": "127.0.0.1 localhost\n::1 localhost ip6-loopback\n0.0.0.0 ad.test track.test\n",
	})})
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]Reason{
		"plain.test": ReasonMatched, "a.wild.test": ReasonMatched, "wild.test": ReasonNotListed, "upper.test": ReasonMatched,
		"xn--bcher-kva.test": ReasonMatched, "both.test": ReasonMatched, "ad.test": ReasonExplicitDeny, "track.test": ReasonExplicitDeny,
		"localhost": ReasonNotListed,
	} {
		d := p.Decide(Request{Source: addr("10.0.0.1"), Name: MustName(host), Port: 443, Time: at})
		if d.Reason != want {
			t.Errorf("%s: %v, want %v", host, d.Reason, want)
		}
	}
}

func TestRevision(t *testing.T) {
	revision := func(text, list string) string {
		t.Helper()
		p, _, err := Load("p", []byte(text), Options{Open: opener(map[string]string{"l": list})})
		if err != nil {
			t.Fatal(err)
		}
		return p.Revision()
	}
	const text = "version: 1\nlists: [{name: l, file: l}]\ndeny: [\"@l\"]\n"
	a := revision(text, "x.test\n")
	if b := revision("# a comment\n"+text, "x.test\n"); a != b {
		t.Errorf("a comment changes the revision: %s, %s", a, b)
	}
	if b := revision(text, "y.test\n"); a == b {
		t.Error("the list's content does not change the revision")
	}
	if len(a) != 12 {
		t.Errorf("revision %q", a)
	}
}

// TestGeneratedIDs shows that IDs depend on what rules say, not on where they stand.
func TestGeneratedIDs(t *testing.T) {
	rules := []Rule{
		{Names: []string{"x.test"}}, {Names: []string{"x.test"}, Ports: []string{"22"}, Protocol: "tcp"},
		{Names: []string{"x.test", "y.test"}}, {Names: []string{"x.test"}, Owner: "a"}, {Addresses: []string{"10.0.0.0/8"}},
	}
	ids := func(order []int) map[string]bool {
		d := &Document{Version: 1, Groups: []Group{{Name: "g", Sources: []string{"10.0.0.0/8"}}}}
		for _, i := range order {
			d.Groups[0].Allow = append(d.Groups[0].Allow, rules[i])
		}
		set := map[string]bool{}
		for _, r := range mustCompile(t, d).rules {
			set[r.id] = true
		}
		return set
	}
	want := ids([]int{0, 1, 2, 3, 4})
	if !want["x.test:22/tcp"] || !want["10.0.0.0/8"] || !want["x.test+1"] || len(want) != len(rules)+len(builtinNames) {
		t.Errorf("IDs %v", want)
	}
	if got := ids([]int{4, 3, 2, 1, 0}); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("IDs depend on the order: %v and %v", got, want)
	}
}

// TestProperties holds random policies to what every policy promises.
func TestProperties(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	draw := func() Rule {
		r := Rule{Names: []string{randomName(rng, true)}, AllowPublicSuffix: true}
		for {
			if _, err := parsePattern(r.Names[0]); err == nil {
				break
			}
			r.Names[0] = randomName(rng, true)
		}
		switch rng.IntN(4) {
		case 0:
			r.Ports = []string{"443", "22"}
		case 1:
			r.Protocol = "tls"
		}
		return r
	}
	for range 300 {
		g := Group{Name: "g", Sources: []string{"10.0.0.0/8"}}
		for range 1 + rng.IntN(6) {
			g.Allow = append(g.Allow, draw())
		}
		for range rng.IntN(3) {
			g.Deny = append(g.Deny, draw())
		}
		decide := func(g Group) map[string]Decision {
			p := mustCompile(t, &Document{Version: 1, Groups: []Group{g}})
			ds := map[string]Decision{}
			for _, port := range []uint16{22, 80, 443} {
				names := rand.New(rand.NewPCG(9, 9))
				for range 30 {
					n := randomName(names, false)
					d := p.Decide(Request{Source: addr("10.0.0.1"), Name: MustName(n), Port: port, Time: at})
					d.Revision = ""
					ds[fmt.Sprint(n, port)] = d
				}
			}
			return ds
		}
		was := decide(g)

		shuffled := g
		shuffled.Allow, shuffled.Deny = append([]Rule(nil), g.Allow...), append([]Rule(nil), g.Deny...)
		rng.Shuffle(len(g.Allow), func(i, j int) {
			shuffled.Allow[i], shuffled.Allow[j] = shuffled.Allow[j], shuffled.Allow[i]
		})
		rng.Shuffle(len(g.Deny), func(i, j int) { shuffled.Deny[i], shuffled.Deny[j] = shuffled.Deny[j], shuffled.Deny[i] })
		for q, d := range decide(shuffled) {
			if d != was[q] {
				t.Fatalf("%s: %+v, in another order %+v\n%+v", q, was[q], d, g)
			}
		}

		more := g
		more.Allow = append(append([]Rule(nil), g.Allow...), draw())
		for q, d := range decide(more) {
			if was[q].Passes() && !d.Passes() {
				t.Fatalf("%s: a further allow closes it\n%+v", q, more)
			}
			if was[q].Reason == ReasonExplicitDeny && d.Reason != ReasonExplicitDeny {
				t.Fatalf("%s: an allow beats a deny\n%+v", q, more)
			}
		}

		less := g
		less.Deny = append(append([]Rule(nil), g.Deny...), draw())
		for q, d := range decide(less) {
			if !was[q].Passes() && d.Passes() {
				t.Fatalf("%s: a further deny opens it\n%+v", q, less)
			}
		}
	}
}
