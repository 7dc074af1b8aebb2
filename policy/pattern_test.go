package policy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestPattern(t *testing.T) {
	check := func(pat, name string, want bool) {
		t.Helper()
		p, err := parsePattern(pat)
		if err != nil {
			t.Errorf("parsePattern(%q): %v", pat, err)
			return
		}
		if got := indexed(t, p, name); got != want {
			t.Errorf("%q matches %q: %v, want %v", pat, name, got, want)
		}
		if got := naiveMatch(pat, name); got != want {
			t.Errorf("the naive matcher: %q matches %q: %v, want %v", pat, name, got, want)
		}
	}
	check("x.com", "x.com", true)
	check("x.com", "a.x.com", false)
	check("x.com", "ax.com", false)
	check("*.x.com", "x.com", false)
	check("*.x.com", "a.x.com", true)
	check("*.x.com", "a.b.x.com", true)
	check("*.x.com", "ax.com", false)
	check(".x.com", "x.com", true)
	check(".x.com", "a.b.x.com", true)
	check(".x.com", "ax.com", false)
	check(".x.com", "x.com.evil.net", false)
	check("*", "com", true)
	check("*", "a.b.c", true)
	check("s3.*.cloud.test", "s3.eu.cloud.test", true)
	check("s3.*.cloud.test", "s3.cloud.test", false)
	check("s3.*.cloud.test", "a.s3.eu.cloud.test", false)
	check("*.s3.*.cloud.test", "a.b.s3.eu.cloud.test", true)
	check("*.s3.*.cloud.test", "s3.eu.cloud.test", false)
	check(".s3.*.cloud.test", "s3.eu.cloud.test", true)
	check("api-*.x.com", "api-.x.com", true)
	check("api-*.x.com", "api-1.x.com", true)
	check("api-*.x.com", "a.api-1.x.com", false)
	check("a*b*c.x.com", "abxbc.x.com", true)
	check("a*b*c.x.com", "acb.x.com", false)
	check("API-*.X.com", "api-1.x.com", true)

	bad := func(pat, hint string) {
		t.Helper()
		_, err := parsePattern(pat)
		if !errors.Is(err, ErrPattern) || !strings.Contains(err.Error(), hint) {
			t.Errorf("parsePattern(%q) = %v, want an error with %q", pat, err, hint)
		}
	}
	bad("", "empty")
	bad("*com", `"*.example.com"`)
	bad("x.*", `"*.example.com"`)
	bad("https://x.com/", "without scheme")
	bad("x.com:443", "ports: [443]")
	bad("10.0.0.0/8", "addresses")
	bad("10.0.0.1", "addresses")
	bad("..x.com", "empty label")
	bad("*..x.com", "empty label")
	bad("a b.com", "illegal")
	bad("ü*.x.com", "illegal")
}

// indexed reports whether an index that holds only p matches name.
func indexed(t testing.TB, p pattern, name string) bool {
	x, ps := newNameIndex(), newPostings()
	if err := x.add(&ps, p, ps.intern([]ref{{owner: 1}})); err != nil {
		t.Fatal(err)
	}
	pol := &Policy{names: x, postings: ps, rules: []rule{{id: "r", protocols: forAny}}}
	e := eval{p: pol, g: &group{owners: []uint32{1}}, named: true}
	pol.names.match(name, &e, &Request{Protocol: ProtocolDNS, QType: 1})
	return e.allow != ""
}

// naiveMatch is the obvious matcher, label by label, that the index is held against.
func naiveMatch(pat, name string) bool {
	labels := strings.Split(name, ".")
	if pat == "*" {
		return true
	}
	deep, apex := false, true
	if rest, ok := strings.CutPrefix(pat, "*."); ok {
		pat, deep, apex = rest, true, false
	} else if rest, ok := strings.CutPrefix(pat, "."); ok {
		pat, deep = rest, true
	}
	want := strings.Split(strings.ToLower(pat), ".")
	switch over := len(labels) - len(want); {
	case over < 0, over == 0 && !apex, over > 0 && !deep:
		return false
	default:
		labels = labels[over:]
	}
	for i := range want {
		if !naiveLabel(want[i], labels[i]) {
			return false
		}
	}
	return true
}

func naiveLabel(pat, label string) bool {
	before, after, star := strings.Cut(pat, "*")
	if !star {
		return pat == label
	}
	if !strings.HasPrefix(label, before) || label == "" {
		return false
	}
	for i := len(before); i <= len(label); i++ {
		if naiveLabel(after, label[i:]) || after == "" {
			return true
		}
	}
	return false
}

// FuzzMatch holds a policy of many patterns against the naive matcher.
func FuzzMatch(f *testing.F) {
	f.Add(uint64(1), "a.b.c.test")
	f.Add(uint64(7), "b.test")
	f.Fuzz(func(t *testing.T, seed uint64, name string) {
		rng := rand.New(rand.NewPCG(seed, 0))
		n, err := ParseName(name)
		if err != nil {
			n = MustName(randomName(rng, false))
		}
		d := &Document{Version: 1, Groups: []Group{{Name: "g", Sources: []string{"0.0.0.0/0"}}}}
		g := &d.Groups[0]
		for range 1 + rng.IntN(40) {
			pat := randomName(rng, true)
			if rng.IntN(4) == 0 { // aim at the name
				labels := strings.Split(n.String(), ".")
				pat = []string{"", "*.", "."}[rng.IntN(3)] + strings.Join(labels[rng.IntN(len(labels)):], ".")
			}
			if _, err := parsePattern(pat); err != nil {
				continue
			}
			r := Rule{Names: []string{pat}, AllowPublicSuffix: true}
			if rng.IntN(5) == 0 {
				g.Deny = append(g.Deny, r)
			} else {
				g.Allow = append(g.Allow, r)
			}
		}
		p := mustCompile(t, d)
		got := p.Decide(Request{Source: addr("10.0.0.1"), Name: n, Port: 443, Time: at}).Reason
		want := ReasonNotListed
		for _, r := range g.Allow {
			if naiveMatch(r.Names[0], n.String()) {
				want = ReasonMatched
			}
		}
		for _, r := range g.Deny {
			if naiveMatch(r.Names[0], n.String()) {
				want = ReasonExplicitDeny
			}
		}
		if got != want {
			t.Errorf("%s under %+v: %v, want %v", n, *g, got, want)
		}
	})
}

// randomName draws a short name from few labels, so that names meet.
func randomName(rng *rand.Rand, wild bool) string {
	labels := make([]string, 1+rng.IntN(4))
	for i := range labels {
		labels[i] = string("abc"[rng.IntN(3)])
		if wild && rng.IntN(5) == 0 && i < len(labels)-1 {
			labels[i] = []string{"*", "a*", "*b", "a*c"}[rng.IntN(4)]
		}
	}
	s := strings.Join(labels, ".")
	if wild {
		s = []string{"", "", "*.", "."}[rng.IntN(4)] + s
	}
	return s
}

// TestManyNamesAgainstNaive is FuzzMatch at a size that fuzzing does not reach.
func TestManyNamesAgainstNaive(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	exact, below := map[string]bool{}, map[string]bool{}
	var names []string
	for i := range 50_000 {
		base := fmt.Sprintf("%s.n%d.test", randomName(rng, false), rng.IntN(20_000))
		switch i % 3 {
		case 0:
			exact[base] = true
			names = append(names, base)
		case 1:
			below[base] = true
			names = append(names, "*."+base)
		case 2:
			exact[base], below[base] = true, true
			names = append(names, "."+base)
		}
	}
	p := mustCompile(t, &Document{Version: 1, Groups: []Group{{Name: "g", Sources: []string{"0.0.0.0/0"}, Allow: bare(names...)}}})
	for range 50_000 {
		n := fmt.Sprintf("%s.n%d.test", randomName(rng, false), rng.IntN(20_000))
		want := exact[n]
		for rest := n; !want; {
			_, parent, ok := strings.Cut(rest, ".")
			if !ok {
				break
			}
			want, rest = below[parent], parent
		}
		if got := p.Decide(Request{Source: addr("10.0.0.1"), Name: MustName(n), Port: 443, Time: at}).Verdict == Allow; got != want {
			t.Fatalf("%s: %v, want %v", n, got, want)
		}
	}
}
