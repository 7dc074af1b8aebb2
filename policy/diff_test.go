package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// mustLoad compiles a policy text without its first line.
func mustLoad(t testing.TB, text string) *Policy {
	t.Helper()
	p, _, err := Load("policy.yaml", []byte("version: 1\n"+text), Options{Now: at})
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return p
}

// summary writes changes one a line, as the command does but shorter.
func summary(c *Changes) []string {
	var out []string
	for _, g := range c.Groups {
		name := g.New
		if g.Old != g.New {
			name = g.Old + ">" + g.New
			out = append(out, strings.TrimSpace(fmt.Sprint(name, " ", g.Sources)))
			if g.Rest {
				out = append(out, name+" rest")
			}
			if g.Whole {
				out = append(out, name+" whole")
			}
		}
		if g.OldMode != g.NewMode {
			out = append(out, fmt.Sprintf("%s mode %s > %s", name, g.OldMode, g.NewMode))
		}
		for _, x := range g.Changes {
			sign := "-"
			if x.Opened {
				sign = "+"
			}
			line := fmt.Sprintf("%s %s %s %s", name, sign, x.Target, strings.Join(x.Facets, " "))
			if x.Kind == TargetDestination {
				line = fmt.Sprintf("%s %s to %s %s", name, sign, x.Target, strings.Join(x.Facets, " "))
			}
			if x.To != nil {
				line += fmt.Sprint(" to ", x.To)
			}
			if x.Observed {
				line += " observed"
			}
			if x.Excepted > 0 {
				line += fmt.Sprint(" except ", x.Excepted, x.Except)
			}
			if x.Until != "" {
				line += " until " + x.Until
			}
			out = append(out, line)
		}
	}
	for _, e := range c.Expiry {
		out = append(out, fmt.Sprintf("expiry %s/%s %q > %q", e.Group, e.Rule, e.Old, e.New))
	}
	return out
}

func TestDiff(t *testing.T) {
	check := func(name, old, new string, want ...string) {
		t.Helper()
		got := summary(Diff(mustLoad(t, old), mustLoad(t, new), at))
		if !slices.Equal(got, want) {
			t.Errorf("%s:\n%s\nwant:\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	// g is a policy of one group.
	g := func(rest string) string { return "groups:\n- {name: g, sources: [10.0.0.0/8], " + rest + "}\n" }

	check("same", g("allow: [a.test]"), g("allow: [a.test]"))
	check("order", g("allow: [a.test, b.test, .c.test]"), g("allow: [.c.test, b.test, a.test]"))
	check("spelling", g("allow: [A.TEST., bücher.test]"), g("allow: [a.test, xn--bcher-kva.test]"))
	check("split", g("allow: [{names: [a.test, b.test], ports: [443, 80]}]"), g("allow: [{names: [a.test], ports: [443, 80]}, {names: [b.test], ports: [80, 443]}]"))
	check("moved to a list", g("allow: [a.test, .b.test]"), "lists: [{name: l, names: [a.test, .b.test]}]\n"+g("allow: [\"@l\"]"))
	check("moved to a parent", g("allow: [a.test, b.test]"),
		"groups:\n- {name: base, allow: [b.test]}\n- {name: g, sources: [10.0.0.0/8], extends: [base], allow: [a.test]}\n")
	check("covered anyway", g("allow: [.a.test]"), g("allow: [.a.test, x.a.test, \"*.y.a.test\", \"s-*.a.test\"]"))
	check("denied anyway", g("deny: [.a.test]"), g("deny: [.a.test], allow: [x.a.test]"))
	check("owner and reason", g("allow: [{names: [a.test], owner: x}]"), g("allow: [{names: [a.test], owner: y, reason: z, id: a}]"))

	check("name", g("allow: [a.test]"), g("allow: [b.test]"), "g - a.test 443/tls 80/http dns", "g + b.test 443/tls 80/http dns")
	check("both spellings", g(""), g("allow: [.a.test]"), "g + .a.test 443/tls 80/http dns")
	check("apex too", g("allow: [\"*.a.test\"]"), g("allow: [.a.test]"), "g + a.test 443/tls 80/http dns")
	check("narrowed", g("allow: [.a.test]"), g("allow: [a.test, x.a.test]"), "g - *.a.test 443/tls 80/http dns except 1 [x.a.test]")
	check("named already", g("allow: [x.a.test]"), g("allow: [.a.test]"), "g + .a.test 443/tls 80/http dns")
	check("still denied", g("deny: [x.a.test]"), g("deny: [x.a.test], allow: [.a.test]"), "g + .a.test 443/tls 80/http dns except 1 [x.a.test]")
	check("more of it denied", g("allow: [.a.test]"), g("allow: [.a.test], deny: [\"*.x.a.test\"]"), "g - *.x.a.test 443/tls 80/http dns")
	check("wildcards", g("allow: [\"api-*.a.test\"]"), g("allow: [\"api-*.a.test\"], deny: [\"*-eu.a.test\"]"),
		"g - api-*.a.test & *-eu.a.test 443/tls 80/http dns")
	check("wildcard beside a record", g("allow: [.b.a.test]"), g("allow: [.b.a.test], deny: [\"x*.b*.a.test\"]"),
		"g - *.b.a.test & x*.b*.a.test 443/tls 80/http dns")
	check("wildcard and below", g(""), g("allow: [.a-*.b.test]"), "g + .a-*.b.test 443/tls 80/http dns")
	check("wildcard, only below", g("allow: [a-*.b.test]"), g("allow: [.a-*.b.test]"), "g + *.a-*.b.test 443/tls 80/http dns")
	check("built-in guardrails", g(""), g("allow: [.internal]"), "g + .internal 443/tls 80/http dns except 3 [instance-data.ec2.internal metadata.azure.internal metadata.google.internal]")
	check("lifted", g("allow: [.google.internal]"), g("allow: [.google.internal, metadata.google.internal]"), "g + metadata.google.internal 443/tls 80/http dns")
	check("everything", g("allow: [a.test]"), g("allow: [{names: [\"*\"], allow_public_suffix: true}]"),
		"g + * 443/tls 80/http dns except 13 [instance-data instance-data.ec2.internal mask-h2.icloud.com]")

	rule := func(rest string) string { return g("allow: [{id: r, names: [a.test], " + rest + "}]") }
	check("ports", rule("ports: [443]"), rule("ports: [443, 8000-8010]"), "g + a.test 8000-8010/tls 8000-8010/http")
	check("a port within", rule("ports: [1-100]"), rule("ports: [1-49, 51-100]"), "g - a.test 50/tls 50/http")
	check("protocol", rule("protocol: tls"), rule("protocol: web"), "g + a.test 80/http")
	check("tcp", rule("ports: [22]"), rule("ports: [22], protocol: tcp"), "g + a.test 22/tcp", "g - a.test 22/http")
	check("unseen", g("allow: [{names: [a.test], protocol: tcp, ports: [22]}], deny: [{names: [a.test], protocol: http}]"), rule("protocol: tcp, ports: [22]"), "g + a.test 22/unseen")
	check("connect", g("allow: [{names: [a.test], protocol: tls}], deny: [{names: [a.test], protocol: tls}]"), g("allow: [{names: [a.test], protocol: dns}]"), "g - a.test 443/connect")
	check("resolution alone", g(""), rule("protocol: dns"), "g + a.test dns")
	check("question types", rule("qtypes: [TXT]"), rule("qtypes: [SRV, TYPE65280]"), "g + a.test dns:SRV dns:TYPE65280", "g - a.test dns:TXT")
	check("a type denied", rule(""), g("allow: [a.test], deny: [{names: [a.test], qtypes: [HTTPS]}]"), "g - a.test dns:HTTPS")
	check("tls", rule(""), rule("tls: {sni: optional, ech: allow, min_version: \"1.0\"}"), "g + a.test 443/tls1.0 443/tls1.1 443/tls+ech 443/tls+no_sni")
	check("tls 1.3", rule(""), rule("tls: {min_version: \"1.3\"}"), "g - a.test 443/tls1.2")
	check("sni listed", rule(""), rule("tls: {sni: listed}"), "g + a.test 443/tls+listed_sni")
	check("group tls", g("allow: [a.test]"), g("tls: {ech: allow}, allow: [a.test]"), "g + a.test 443/tls+ech")
	check("hello of two rules", g("allow: [{names: [a.test], tls: {ech: allow}}, {id: b, names: [a.test], tls: {sni: optional}}]"), rule("tls: {ech: allow, sni: optional}"),
		"g + a.test 443/tls+other")
	check("private", rule(""), rule("private_destinations: [10.0.0.0/8, 192.168.1.0/24]"), "g + a.test 443/tls 80/http dns to [10.0.0.0/8 192.168.1.0/24]")
	check("private, narrowed", rule("private_destinations: [10.0.0.0/8]"), rule("private_destinations: [10.0.0.0/9]"), "g - a.test 443/tls 80/http dns to [10.128.0.0/9]")
	check("platform address", rule("private_destinations: [169.254.0.0/16]"), rule("private_destinations: [169.254.0.0/16, 169.254.169.254]"), "g + a.test 443/tls 80/http dns to [169.254.169.254/32]")

	check("expired meanwhile", rule("expires: 2026-01-01"), g(""))
	check("expires", g(""), rule("expires: 2027-01-01"), "g + a.test 443/tls 80/http dns until 2027-01-01")
	check("expires later", rule("expires: 2027-01-01"), rule("expires: 2028-01-01"), `expiry g/r "2027-01-01" > "2028-01-01"`)
	check("no longer expires", rule("expires: 2027-01-01"), rule("reason: x"), `expiry g/r "2027-01-01" > ""`)

	check("addresses", g("allow: [{addresses: [203.0.112.0/24]}]"), g("allow: [{addresses: [203.0.112.0/25]}]"), "g - 203.0.112.128/25 443/tls 80/http")
	check("private address", g(""), g("allow: [{addresses: [10.1.0.0/16]}]"), "g + 10.1.0.0/16 443/tls 80/http")
	check("address, hello", g("allow: [{addresses: [2001:db8::1]}]"), g("allow: [{addresses: [2001:db8::1], tls: {ech: allow}}]"), "g + 2001:db8::1/128 443/tls+ech")
	check("address denied", g("allow: [a.test, {addresses: [1.2.0.0/16]}]"), g("allow: [a.test, {addresses: [1.2.0.0/16]}], deny: [{addresses: [1.2.3.0/24]}]"),
		"g - 1.2.3.0/24 443/tls 80/http", "g - to 1.2.3.0/24 443/tls 80/http dns")
	check("address denied to nobody", g(""), g("deny: [{addresses: [1.2.3.0/24]}]"))
	check("private address denied", g("allow: [{names: [a.test], private_destinations: [10.1.0.0/16]}]"), g("allow: [{names: [a.test], private_destinations: [10.1.0.0/16]}], deny: [{addresses: [10.1.1.0/24, 10.2.0.0/16]}]"),
		"g - to 10.1.1.0/24 443/tls 80/http dns")

	check("guardrail", g("allow: [a.test]"), "deny: [.test]\n"+g("allow: [a.test]"), "g - a.test 443/tls 80/http dns")
	observe := "mode: observe, observe_until: 2027-01-01, "
	check("mode", g("allow: [a.test]"), g(observe+"allow: [a.test]"), "g mode enforce > observe until 2027-01-01")
	check("mode, past", g("allow: [a.test]"), g("mode: observe, observe_until: 2026-01-01, allow: [a.test]"))
	check("observed", g(observe), g(observe+"allow: [a.test]"), "g + a.test 443/tls 80/http dns")
	check("no longer observed", g(observe), "deny: [a.test]\n"+g(observe), "g - a.test 1-65535/http 1-65535/tcp dns dns:other observed")

	check("group added", g(""), g("")+"- {name: h, sources: [10.1.0.0/16], allow: [a.test]}\n", "g>h [10.1.0.0/16]", "g>h + a.test 443/tls 80/http dns")
	check("group added for others", g(""), g("")+"- {name: h, sources: [11.1.0.0/16], allow: [a.test]}\n", ">h [11.1.0.0/16]", ">h + a.test 443/tls 80/http dns")
	check("group removed", g("")+"- {name: h, sources: [11.1.0.0/16], allow: [a.test]}\n", g(""), "h> [11.1.0.0/16]", "h> - a.test 443/tls 80/http dns")
	check("group renamed", g("allow: [a.test]"), strings.ReplaceAll(g("allow: [a.test]"), "name: g", "name: h"), "g>h [10.0.0.0/8]")
	check("further sources", g("allow: [a.test]"), strings.ReplaceAll(g("allow: [a.test]"), "[10.0.0.0/8]", "[10.0.0.0/8, 11.0.0.0/8]"), ">g [11.0.0.0/8]", ">g whole")
	check("sources spelt otherwise", g(""), strings.ReplaceAll(g(""), "[10.0.0.0/8]", "[10.0.0.0/9, 10.128.0.0/9]"))
	check("unmatched", g("allow: [a.test]"), "unmatched_source: g\n"+g("allow: [a.test]"), ">g []", ">g rest", ">g whole")
	check("group without sources", g(""), g("")+"- {name: base, allow: [b.test]}\n")
}

// TestDiffOfManyWildcards shows that what was not looked at is not called the same.
func TestDiffOfManyWildcards(t *testing.T) {
	load := func(n int, deny ...string) *Policy {
		g := Group{Name: "g", Sources: []string{"10.0.0.0/8"}, Deny: bare(deny...)}
		for i := range n {
			g.Allow = append(g.Allow, bare(fmt.Sprintf("*-a%d.b.test", i))...)
		}
		return mustCompile(t, &Document{Version: 1, Groups: []Group{g}})
	}
	few, many := load(100), load(maxOverlaps+100)
	if c := Diff(few, load(100, "eu-*.b.test"), at); c.Partial || len(c.Groups) != 1 || len(c.Groups[0].Changes) != 100 {
		t.Errorf("partial %v: %v", c.Partial, summary(c))
	}
	if c := Diff(many, load(maxOverlaps+100, "eu-*.b.test"), at); !c.Partial || c.Empty() {
		t.Error("a difference with too many overlaps claims to be whole")
	}
	if c := Diff(many, many, at); !c.Empty() {
		t.Errorf("%v", summary(c))
	}
}

// A probe is a Request and what two policies make of it.
type probe struct {
	r        Request
	old, new bool
}

// probes asks both policies at random where they may differ.
func probes(rng *rand.Rand, old, new *Policy, n int, f func(probe)) {
	hellos := []TLS{{Seen: true, MaxVersion: 0x0304}, {Seen: true, MaxVersion: 0x0303}, {Seen: true, MaxVersion: 0x0301}, {Seen: true, MaxVersion: 0x0304, ECH: true}}
	labels := []string{"a", "b", "c", "ab", "axc", "q", "zz"}
	for range n {
		r := Request{Source: netip.AddrFrom4([4]byte{10, byte(rng.IntN(4)), 0, 1}), Time: at}
		parts := make([]string, 1+rng.IntN(4))
		for i := range parts {
			parts[i] = labels[rng.IntN(3)]
			if rng.IntN(3) == 0 {
				parts[i] = labels[rng.IntN(len(labels))]
			}
		}
		dests := []netip.Addr{{}, {}, addr("8.8.8.8"), addr("10.1.2.3"), addr("10.200.0.1"), addr("192.168.1.1"), addr("1.2.3.4"), addr("169.254.169.254")}
		r.Destination = dests[rng.IntN(len(dests))]
		r.Name = Name{strings.Join(parts, ".")}
		if rng.IntN(8) == 0 {
			r.Name = Name{}
			if r.Address = r.Destination; !r.Address.IsValid() {
				r.Address, r.Destination = addr("8.8.4.4"), addr("8.8.4.4")
			}
		}
		r.Port = []uint16{22, 80, 443, 8080, 8081, 9000}[rng.IntN(6)]
		switch rng.IntN(6) {
		case 0:
		case 1:
			r.Protocol = ProtocolHTTP
		case 2:
			r.Protocol = ProtocolTCP
		case 3:
			if !r.Name.IsZero() {
				r.Protocol, r.Port = ProtocolDNS, 0
				r.QType = []uint16{1, 16, 28, 33, 65}[rng.IntN(5)]
			}
		default:
			r.Protocol, r.TLS = ProtocolTLS, hellos[rng.IntN(len(hellos))]
			switch rng.IntN(4) {
			case 0:
			case 1: // another name; where nobody looks at it, it does not matter
				r.TLS.SNI = Name{strings.Join(append(parts[1:], labels[rng.IntN(3)]), ".")}
				unseen := r
				unseen.Protocol, unseen.TLS = ProtocolUnknown, TLS{}
				if (old.Decide(unseen).Inspect|new.Decide(unseen).Inspect)&InspectNone != 0 {
					continue
				}
			default:
				r.TLS.SNI = r.Name
			}
		}
		f(probe{r, old.Decide(r).Passes(), new.Decide(r).Passes()})
	}
}

// randomPolicy draws a policy in which much overlaps.
func randomPolicy(rng *rand.Rand) *Document {
	pattern := func() string {
		for {
			s := randomName(rng, true)
			if _, err := parsePattern(s); err == nil {
				return s
			}
		}
	}
	pick := func(list ...string) []string {
		if rng.IntN(2) == 0 {
			return nil
		}
		return []string{list[rng.IntN(len(list))]}
	}
	draw := func(deny bool) Rule {
		r := Rule{Names: []string{pattern()}, AllowPublicSuffix: true}
		if rng.IntN(4) == 0 {
			r.Names = append(r.Names, pattern())
		}
		if rng.IntN(6) == 0 {
			r.Addresses = []string{[]string{"10.1.0.0/16", "1.2.0.0/16", "0.0.0.0/0", "8.8.8.8", "192.168.1.0/24"}[rng.IntN(5)]}
			if rng.IntN(2) == 0 {
				r.Names = nil
			}
		}
		if rng.IntN(3) == 0 {
			return r
		}
		r.Ports = pick("22", "443", "80-443", "8080-8081", "443-9000")
		if rng.IntN(3) == 0 {
			r.Protocol = []string{"web", "tls", "http", "tcp", "dns"}[rng.IntN(5)]
		}
		switch {
		case r.Protocol == "tcp" && r.Ports == nil:
			r.Ports = []string{"22"}
		case r.Protocol == "dns":
			r.Ports = nil
		}
		if rng.IntN(4) == 0 {
			r.QTypes = pick("TXT", "SRV", "A")
		}
		if rng.IntN(6) == 0 {
			r.Expires = []string{"2026-01-01", "2027-01-01"}[rng.IntN(2)]
		}
		if !deny && rng.IntN(3) == 0 {
			r.TLS = &TLSRule{SNI: []string{"", "match", "optional", "listed"}[rng.IntN(4)], ECH: []string{"", "allow"}[rng.IntN(2)], MinVersion: []string{"", "1.0", "1.3"}[rng.IntN(3)]}
		}
		if !deny && rng.IntN(3) == 0 {
			r.PrivateDestinations = pick("10.0.0.0/8", "10.1.0.0/16", "192.168.0.0/16", "169.254.0.0/16", "169.254.169.254")
		}
		return r
	}
	d := &Document{Version: 1}
	section := func(n int, deny bool) (rules []Rule) {
		for range rng.IntN(n + 1) {
			rules = append(rules, draw(deny))
		}
		return rules
	}
	d.Deny = section(1, true)
	d.Groups = []Group{
		{Name: "base", Allow: section(1, false), Deny: section(1, true)},
		{Name: "g", Sources: []string{"10.0.0.0/16", "10.1.0.0/16"}, Extends: []string{"base"}, Allow: section(4, false), Deny: section(2, true)},
		{Name: "h", Sources: []string{"10.2.0.0/16"}, Mode: "observe", ObserveUntil: "2027-01-01", Allow: section(2, false), Deny: section(1, true)},
	}
	return d
}

// mutate returns d with something added, removed, moved or changed.
func mutate(rng *rand.Rand, d *Document) *Document {
	other := randomPolicy(rng)
	out := *d
	out.Groups = slices.Clone(d.Groups)
	i := rng.IntN(len(out.Groups))
	g := &out.Groups[i]
	switch rng.IntN(7) {
	case 0:
		g.Allow = append(slices.Clone(g.Allow), other.Groups[1].Allow...)
	case 1:
		g.Deny = append(slices.Clone(g.Deny), other.Groups[1].Deny...)
	case 2:
		g.Allow = g.Allow[:len(g.Allow)/2]
	case 3:
		g.Deny = nil
	case 4:
		out.Deny = other.Deny
	case 5: // nothing but the order
		g.Allow = slices.Clone(g.Allow)
		rng.Shuffle(len(g.Allow), func(i, j int) { g.Allow[i], g.Allow[j] = g.Allow[j], g.Allow[i] })
	case 6:
		out.Groups[1].Sources = out.Groups[1].Sources[:1+rng.IntN(2)]
	}
	return &out
}

// TestDiffAgainstDecide holds Diff to what Decide says of random requests: whatever
// differs has a line that says so, and whatever a line says differs.
func TestDiffAgainstDecide(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	rounds, empty, differing := 600, 0, 0
	if testing.Short() {
		rounds = 200
	}
	for round := range rounds {
		oldDoc := randomPolicy(rng)
		newDoc := mutate(rng, oldDoc)
		if rng.IntN(4) == 0 {
			newDoc = randomPolicy(rng)
		}
		old, _, oldErr := Compile(oldDoc, Options{})
		new, _, newErr := Compile(newDoc, Options{})
		if oldErr != nil || newErr != nil {
			continue // such as a second rule with the same prefix
		}
		c := Diff(old, new, at)
		if c.Empty() {
			empty++
		}
		complain := func(format string, args ...any) {
			t.Helper()
			t.Fatalf("round %d: %s\n%s\nold %+v\nnew %+v", round, fmt.Sprintf(format, args...), strings.Join(summary(c), "\n"), oldDoc, newDoc)
		}
		probes(rng, old, new, 400, func(p probe) {
			if p.old == p.new {
				return
			}
			differing++
			if !explained(c, old, new, p) {
				complain("no line for %+v: %v, now %v", p.r, p.old, p.new)
			}
		})
		for _, g := range c.Groups {
			for _, x := range g.Changes {
				if problem := refuted(g, x, old, new); problem != "" {
					complain("%s", problem)
				}
			}
		}
	}
	if empty == 0 || differing < 1000 {
		t.Errorf("%d empty differences, %d differing requests: too few to show anything", empty, differing)
	}
}

// explained reports whether a line of c says that p comes out differently.
func explained(c *Changes, old, new *Policy, p probe) bool {
	from, _ := old.Source(p.r.Source)
	to, _ := new.Source(p.r.Source)
	for _, g := range c.Groups {
		if g.Old != from || g.New != to {
			continue
		}
		if g.Whole {
			return true
		}
		for _, x := range g.Changes {
			if x.Opened != p.new || !slices.ContainsFunc(x.Facets, func(f string) bool { return facetCovers(f, p.r) }) {
				continue
			}
			listed := p.r // the name in the ClientHello may be what is no longer listed
			listed.Name, listed.Destination = p.r.TLS.SNI, netip.Addr{}
			if covers(x, p.r) || p.r.TLS.SNI != p.r.Name && covers(x, listed) {
				return true
			}
		}
	}
	return false
}

func covers(x Change, r Request) bool {
	in := func(pfx netip.Prefix) bool { return pfx.Contains(r.Destination) }
	switch x.Kind {
	case TargetAddress:
		return r.Name.IsZero() && netip.MustParsePrefix(x.Target).Contains(r.Address)
	case TargetDestination:
		return !r.Name.IsZero() && netip.MustParsePrefix(x.Target).Contains(r.Destination)
	}
	if x.To != nil && !slices.ContainsFunc(x.To, in) {
		return false
	}
	for part := range strings.SplitSeq(x.Target, " & ") {
		if !naiveMatch(part, r.Name.s) {
			return false
		}
	}
	return !r.Name.IsZero()
}

func facetCovers(f string, r Request) bool {
	port, proto, ok := strings.Cut(f, "/")
	if !ok {
		return r.Protocol == ProtocolDNS && (f == "dns" && usualQType(r.QType) || f == "dns:"+qtypeName(r.QType) || f == "dns:other")
	}
	first, last, isRange := strings.Cut(port, "-")
	if !isRange {
		last = first
	}
	a, _ := strconv.Atoi(first)
	b, _ := strconv.Atoi(last)
	if r.Protocol == ProtocolDNS || int(r.Port) < a || int(r.Port) > b {
		return false
	}
	switch r.Protocol {
	case ProtocolTLS:
		return strings.HasPrefix(proto, "tls") || proto == "tcp"
	case ProtocolHTTP:
		return proto == "http"
	case ProtocolTCP:
		return proto == "tcp"
	}
	return true
}

// refuted asks for what x says and returns where the policies say otherwise.
func refuted(g GroupChange, x Change, old, new *Policy) string {
	source := func(p *Policy, want string) netip.Addr {
		for i := range byte(4) {
			a := netip.AddrFrom4([4]byte{10, i, 0, 1})
			if o, _ := old.Source(a); o == g.Old {
				if n, _ := new.Source(a); n == g.New {
					return a
				}
			}
		}
		return netip.Addr{}
	}
	r := Request{Source: source(old, g.Old), Time: at}
	switch x.Kind {
	case TargetAddress:
		r.Address = netip.MustParsePrefix(x.Target).Addr()
		r.Destination = r.Address
	case TargetDestination:
		return "" // which names lead there is not said
	default:
		if strings.Contains(x.Target, " & ") || x.Excepted > 0 {
			return ""
		}
		name := x.Target
		if rest, ok := strings.CutPrefix(name, "."); ok {
			name = rest
		}
		r.Name = Name{strings.TrimPrefix(strings.ReplaceAll(name, "*", "x7q9"), ".")}
		if x.To != nil {
			r.Destination = x.To[0].Addr()
		}
	}
	if strings.Contains(x.Target, "*") && x.Kind == TargetName {
		return "" // the name may match other patterns with wildcards by accident
	}
	for _, f := range x.Facets {
		q := r
		port, proto, ok := strings.Cut(f, "/")
		if first, _, isRange := strings.Cut(port, "-"); isRange {
			port = first
		}
		n, _ := strconv.Atoi(port)
		q.Port = uint16(n)
		switch {
		case !ok:
			q.Port, q.Protocol, q.QType = 0, ProtocolDNS, 1
			if _, t, ok := strings.Cut(f, ":"); ok {
				if q.QType, ok = ParseQType(t); !ok {
					q.QType = qtypeOther
				}
			}
		case proto == "tls" || proto == "tls1.3":
			q.Protocol, q.TLS = ProtocolTLS, TLS{Seen: true, SNI: q.Name, MaxVersion: 0x0304}
		case proto == "tls1.2":
			q.Protocol, q.TLS = ProtocolTLS, TLS{Seen: true, SNI: q.Name, MaxVersion: 0x0303}
		case proto == "tls+ech":
			q.Protocol, q.TLS = ProtocolTLS, TLS{Seen: true, SNI: q.Name, MaxVersion: 0x0304, ECH: true}
		case proto == "tls+no_sni":
			q.Protocol, q.TLS = ProtocolTLS, TLS{Seen: true, MaxVersion: 0x0304}
		case proto == "http":
			q.Protocol = ProtocolHTTP
		case proto == "tcp":
			q.Protocol = ProtocolTCP
		default:
			continue
		}
		if x.Observed { // other rules may deny it too; it passes all the same
			continue
		}
		o, n2 := old.Decide(q).Verdict == Allow, new.Decide(q).Verdict == Allow
		if o == n2 || n2 != x.Opened {
			return fmt.Sprintf("%+v of %+v: allowed %v, now %v", f, x, o, n2)
		}
	}
	return ""
}

// TestDiffOfItself shows that a policy does not differ from itself, however it was drawn.
func TestDiffOfItself(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	for range 300 {
		d := randomPolicy(rng)
		a, _, err := Compile(d, Options{})
		if err != nil {
			continue
		}
		b, _, _ := Compile(d, Options{})
		if c := Diff(a, b, at); !c.Empty() {
			t.Fatalf("%s\n%+v", strings.Join(summary(c), "\n"), d)
		}
	}
}

func TestHitsAgreeWithExplain(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 10))
	for range 200 {
		p, _, err := Compile(randomPolicy(rng), Options{})
		if err != nil {
			continue
		}
		for range 20 {
			name := randomName(rng, false)
			x := p.Explain(Request{Source: addr("10.0.0.1"), Name: Name{name}, Port: 443, Time: at})
			var hits []hit
			p.names.hits(name, func(h hit) { hits = append(hits, h) })
			s := p.side(1, hits)
			if len(s.rules) != len(x.Candidates) {
				t.Fatalf("%s: %d rules, explained %d", name, len(s.rules), len(x.Candidates))
			}
		}
	}
}

func TestPrefixesOfRanges(t *testing.T) {
	for _, tt := range []struct{ first, last, want string }{
		{"0.0.0.0", "255.255.255.255", "[0.0.0.0/0]"},
		{"10.0.0.1", "10.0.0.6", "[10.0.0.1/32 10.0.0.2/31 10.0.0.4/31 10.0.0.6/32]"},
		{"255.255.255.254", "255.255.255.255", "[255.255.255.254/31]"},
		{"::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "[::/0]"},
		{"2001:db8::1", "2001:db8::1", "[2001:db8::1/128]"},
	} {
		if got := fmt.Sprint(addrRange{addr(tt.first), addr(tt.last)}.prefixes()); got != tt.want {
			t.Errorf("%s-%s: %s, want %s", tt.first, tt.last, got, tt.want)
		}
	}
}

// BenchmarkDiff compares two policies of a million names of which one differs.
func BenchmarkDiff(b *testing.B) {
	names := make([]string, 1_000_000)
	for i := range names {
		names[i] = fmt.Sprintf("host-%d.service-%d.example.com", i, i%1000)
	}
	text := strings.Join(names, "\n")
	load := func(list string) *Policy {
		p, _, err := Load("p", []byte("version: 1\nlists: [{name: l, file: l}]\ngroups:\n- {name: g, sources: [10.0.0.0/8], allow: [\"@l\"]}\n- {name: h, sources: [11.0.0.0/8], extends: [g], allow: [.example.org]}\n"),
			Options{Open: opener(map[string]string{"l": list})})
		if err != nil {
			b.Fatal(err)
		}
		return p
	}
	old, new := load(text), load(text+"\n*.other.example\n")
	b.ResetTimer()
	for b.Loop() {
		start := time.Now()
		if c := Diff(old, new, at); len(c.Groups) != 2 {
			b.Fatal(summary(c))
		}
		b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms")
	}
}
