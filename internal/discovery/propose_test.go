package discovery

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/net/publicsuffix"

	"sallyport/policy"
	"sallyport/policy/event"
)

const learnPolicy = `
version: 1
deny:
  - {id: feed, names: [.evil.example], reason: threat feed}
groups:
  - name: base
    allow: [.base.example]
  - name: legacy
    sources: [10.30.0.0/16]
    extends: [base]
    mode: observe
    observe_until: 2026-12-31
    allow:
      - old.example
      - {id: ssh, names: [git.example], ports: [22], protocol: tcp}
      - {id: over, names: [expired.example], expires: 2026-01-01}
    deny: [no.example]
`

func load(t testing.TB, text string) *policy.Policy {
	t.Helper()
	p, _, err := policy.Load("policy.yaml", []byte(text), policy.Options{})
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return p
}

// observe has p decide ev for a source of legacy, as a server would.
func observe(t testing.TB, s *Store, p *policy.Policy, ev *event.Event) {
	t.Helper()
	pair := Pair{Name: strings.TrimSuffix(strings.ToLower(ev.Name), "."), Port: ev.Port, Protocol: protocolNames[spoken(ev)], QType: qtypeName(qtypeOf(ev.QType))}
	r, ok := requestOf(&pair, ev.Time)
	if ok {
		ev.Decision, _ = p.DecideFor("legacy", r)
	} else {
		ev.Decision = policy.Decision{Group: "legacy", Reason: policy.ReasonBadRequest}
	}
	s.Observe(ev)
}

func traffic(t testing.TB, s *Store, p *policy.Policy) {
	t.Helper()
	for range 12 {
		observe(t, s, p, seen("api.partner.example"))
	}
	observe(t, s, p, seen("api.partner.example", asked("AAAA")))
	observe(t, s, p, seen("api.partner.example", asked("TXT")))
	observe(t, s, p, seen("www.partner.example", onPort(80, 0), func(ev *event.Event) { ev.Kind = event.HTTP }))
	observe(t, s, p, seen("sftp.partner.example", onPort(22, policy.ProtocolTCP), from("10.30.0.9")))
	observe(t, s, p, seen("sftp.partner.example", onPort(2222, policy.ProtocolTCP)))
	observe(t, s, p, seen("both.partner.example", onPort(8443, policy.ProtocolTLS)))
	observe(t, s, p, seen("both.partner.example", onPort(8443, 0), func(ev *event.Event) { ev.Kind = event.HTTP }))
	observe(t, s, p, seen("odd.partner.example", onPort(443, policy.ProtocolTCP)))
	observe(t, s, p, seen("plain443.partner.example", onPort(443, 0), func(ev *event.Event) { ev.Kind = event.HTTP }))
	observe(t, s, p, seen("silent.partner.example", onPort(9000, 0)))
	observe(t, s, p, seen("git.example", onPort(443, policy.ProtocolTCP)))
	observe(t, s, p, seen("only-asked.example", asked("A")))
	observe(t, s, p, seen("_sip._tcp.example", asked("SRV")))
	observe(t, s, p, seen("any.example", asked("ANY")))
	observe(t, s, p, seen("203.0.113.7"))
	observe(t, s, p, seen("2001:db8:1::7", onPort(5432, policy.ProtocolTCP)))
	for i := range 4 {
		observe(t, s, p, seen(fmt.Sprintf("shard-%d.cdn.example", i), from(fmt.Sprintf("10.30.1.%d", i))))
		observe(t, s, p, seen(fmt.Sprintf("bucket%d.s3.amazonaws.com", i)))
		observe(t, s, p, seen(fmt.Sprintf("site%d.co.uk", i)))
	}
	observe(t, s, p, seen("x.evil.example"))
	observe(t, s, p, seen("no.example"))
	observe(t, s, p, seen("old.example"))
	observe(t, s, p, seen("a.base.example"))
	observe(t, s, p, seen("expired.example"))
	s.Observe(seen("tls.example", func(ev *event.Event) {
		ev.Decision.Reason, ev.Decision.Rule = policy.ReasonTLSVersion, "tls.example\n# forged"
	}))
	for _, name := range []string{"\x1b]0;owned\a", "a\nallow: [evil]", "*.com", "=1+1"} {
		s.Observe(seen(name))
	}
}

var learnOptions = ProposalOptions{Group: "legacy", Now: monday}

func proposed(t testing.TB) (*Proposal, []Pair, *policy.Policy) {
	t.Helper()
	s, err := Open(Options{Now: func() time.Time { return monday }})
	if err != nil {
		t.Fatal(err)
	}
	p := load(t, learnPolicy)
	traffic(t, s, p)
	pairs, err := s.Pairs(Query{})
	if err != nil {
		t.Fatal(err)
	}
	return Propose(pairs, p, learnOptions), pairs, p
}

func TestProposal(t *testing.T) {
	p, _, _ := proposed(t)
	var b bytes.Buffer
	if err := p.Write(&b, YAML); err != nil {
		t.Fatal(err)
	}
	golden(t, "proposal.yaml", b.Bytes())
	b.Reset()
	if err := p.Write(&b, CSV); err != nil {
		t.Fatal(err)
	}
	golden(t, "proposal.csv", b.Bytes())
	b.Reset()
	if err := p.Write(&b, JSON); err != nil {
		t.Fatal(err)
	}
	golden(t, "proposal.json", b.Bytes())
	if err := p.Write(&b, HTML); err == nil {
		t.Error("a proposal in HTML")
	}
}

// golden compares with a file, or writes it with UPDATE=1.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("UPDATE") != "" {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (UPDATE=1 writes it anew):\n%s", name, got)
	}
}

// TestProposalAllowsWhatWasSeen pastes a proposal into the policy and decides everything
// again, but what remarks name.
func TestProposalAllowsWhatWasSeen(t *testing.T) {
	p, pairs, _ := proposed(t)
	var b bytes.Buffer
	if err := p.Write(&b, YAML); err != nil {
		t.Fatal(err)
	}
	if _, _, err := policy.Load("proposal.yaml", b.Bytes(), policy.Options{}); err != nil {
		t.Fatalf("the proposal on its own: %v\n%s", err, &b)
	}
	_, lines, ok := strings.Cut(b.String(), "    allow:\n")
	if !ok {
		t.Fatal(b.String())
	}
	after := load(t, strings.Replace(learnPolicy, "    allow:\n      - old.example\n", "    allow:\n"+lines+"      - old.example\n", 1))
	remarked := map[string]bool{}
	for _, r := range p.Groups[0].Remarks {
		remarked[fmt.Sprint(r.Name, r.Port)] = true
	}
	allowed := 0
	for i := range pairs {
		pair := &pairs[i]
		r, ok := requestOf(pair, monday)
		if !ok || remarked[fmt.Sprint(pair.Name, pair.Port)] {
			continue
		}
		if d, _ := after.DecideFor("legacy", r); d.Verdict != policy.Allow {
			t.Errorf("%+v: %+v", pair, d)
		}
		allowed++
	}
	if allowed < 25 || len(remarked) < 6 {
		t.Errorf("%d allowed, %d remarked", allowed, len(remarked))
	}
	// And then there is nothing left to propose.
	if again := Propose(pairs, after, learnOptions); len(again.Groups[0].Rules) != 0 {
		t.Errorf("proposed again: %+v", again.Groups[0].Rules)
	}
}

func TestProposalIsStable(t *testing.T) {
	p, pairs, pol := proposed(t)
	r := rand.New(rand.NewPCG(1, 1))
	want := p.yaml()
	for range 20 {
		r.Shuffle(len(pairs), func(i, j int) { pairs[i], pairs[j] = pairs[j], pairs[i] })
		if got := Propose(pairs, pol, learnOptions).yaml(); got != want {
			t.Fatalf("the order of pairs matters:\n%s", got)
		}
	}
}

func TestMinCount(t *testing.T) {
	_, pairs, pol := proposed(t)
	o := learnOptions
	o.MinCount = 5
	g := Propose(pairs, pol, o).Groups[0]
	if len(g.Rules) != 2 || len(g.Rules[0].Lines) != 1 || g.Rules[0].Lines[0].Pattern != "api.partner.example" || g.Rare == 0 {
		t.Errorf("%+v", g)
	}
}

func TestNothingToPropose(t *testing.T) {
	for _, o := range []ProposalOptions{{Now: monday}, learnOptions} {
		text := Propose(nil, nil, o).yaml()
		if _, err := policy.ParseDocument("p", []byte(text)); err != nil {
			t.Errorf("%v\n%s", err, text)
		}
	}
}

func TestFold(t *testing.T) {
	tests := []struct {
		name        string
		names, want string
	}{
		{"words stay", "api.x.com www.x.com login.x.com static.x.com", "api.x.com login.x.com static.x.com www.x.com"},
		{"numbers fold", "a1.x.com a2.x.com a3.x.com", "*.x.com"},
		{"two do not", "a1.x.com a2.x.com", "a1.x.com a2.x.com"},
		{"many words fold", "a.x.com b.x.com c.x.com d.x.com e.x.com f.x.com g.x.com h.x.com", "*.x.com"},
		{"the parent stays", "x.com a1.x.com a2.x.com a3.x.com", "x.com *.x.com"},
		{"at the lowest place", "a1.eu.x.com a2.eu.x.com a3.eu.x.com www.x.com", "*.eu.x.com www.x.com"},
		{"below other labels", "a.s1.x.com a.s2.x.com a.s3.x.com", "*.x.com"},
		{"a registry's suffix", "a1.com a2.com a3.com a4.com", "a1.com a2.com a3.com a4.com"},
		{"of two labels", "a1.co.uk a2.co.uk a3.co.uk", "a1.co.uk a2.co.uk a3.co.uk"},
		{"of those who rent out", "a1.github.io a2.github.io a3.github.io", "a1.github.io a2.github.io a3.github.io"},
		{"a label that is nobody's", "a1.corp a2.corp a3.corp", "a1.corp a2.corp a3.corp"},
		{"IDN is no number", "xn--1.x.com xn--2.x.com xn--3.x.com", "xn--1.x.com xn--2.x.com xn--3.x.com"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			names := strings.Fields(tt.names)
			slices.Sort(names)
			var got []string
			for _, f := range fold(names) {
				got = append(got, f.pattern)
			}
			if strings.Join(got, " ") != tt.want {
				t.Errorf("got %q, want %q", strings.Join(got, " "), tt.want)
			}
		})
	}
}

// FuzzFold: what is folded is a pattern that the policy takes, over no public suffix, and
// each name is in exactly one.
func FuzzFold(f *testing.F) {
	f.Add("a1.x.com a2.x.com a3.x.com x.com")
	f.Add("a1.co.uk a2.co.uk a3.co.uk a1.b.c.d.kobe.jp a2.b.c.d.kobe.jp")
	f.Add("a.b a.c 1.s3.amazonaws.com 2.s3.amazonaws.com 3.s3.amazonaws.com")
	f.Fuzz(func(t *testing.T, text string) {
		var names []string
		for s := range strings.FieldsSeq(text) {
			if n, err := policy.ParseName(s); err == nil && !slices.Contains(names, n.String()) && len(names) < 200 {
				names = append(names, n.String())
			}
		}
		slices.Sort(names)
		seenNames := map[string]int{}
		doc := &policy.Document{Version: policy.Version, Groups: []policy.Group{{Name: "g", Sources: []string{"10.0.0.0/8"}}}}
		for _, f := range fold(names) {
			if below, ok := strings.CutPrefix(f.pattern, "*."); ok {
				if ps, _ := publicsuffix.PublicSuffix(below); ps == below {
					t.Errorf("%s is over a public suffix", f.pattern)
				}
			}
			for _, n := range f.names {
				seenNames[n]++
			}
			doc.Groups[0].Allow = append(doc.Groups[0].Allow, policy.Rule{Names: []string{f.pattern}})
		}
		p, _, err := policy.Compile(doc, policy.Options{})
		if err != nil {
			t.Fatalf("%v: %v", doc.Groups[0].Allow, err)
		}
		for _, n := range names {
			if seenNames[n] != 1 {
				t.Errorf("%s is in %d patterns", n, seenNames[n])
			}
			d, _ := p.DecideFor("g", policy.Request{Name: policy.MustName(n), Port: 443})
			if d.Verdict != policy.Allow && d.Reason != policy.ReasonExplicitDeny { // built-in guardrails
				t.Errorf("%s: %+v", n, d)
			}
		}
	})
}

// FuzzProposal: whatever names clients send, the YAML is a policy, the JSON and the CSV
// can be read, and nothing reaches a terminal.
func FuzzProposal(f *testing.F) {
	f.Add("api.example", uint16(443), uint8(1), "legacy")
	f.Add("=cmd|'/C calc'!A0", uint16(22), uint8(3), "x\n")
	f.Add("\x1b[2J\u202eevil\r\n- '*'", uint16(0), uint8(4), "not_listed")
	f.Fuzz(func(t *testing.T, name string, port uint16, proto uint8, rule string) {
		s, err := Open(Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, reason := range []policy.Reason{policy.ReasonNotListed, policy.ReasonTLSVersion} {
			ev := seen(name, onPort(port, policy.Protocol(proto%4)))
			if proto%5 == 4 {
				ev = seen(name, asked(rule))
			}
			ev.Decision.Rule, ev.Decision.Reason = rule, reason
			s.Observe(ev)
		}
		pairs, err := s.Pairs(Query{})
		if err != nil {
			t.Fatal(err)
		}
		p := Propose(pairs, load(t, learnPolicy), learnOptions)
		text := p.yaml()
		if _, _, err := policy.Load("proposal.yaml", []byte(text), policy.Options{}); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		var b bytes.Buffer
		if err := p.Write(&b, JSON); err != nil || !json.Valid(b.Bytes()) {
			t.Fatalf("%v\n%s", err, &b)
		}
		b.Reset()
		if err := p.Write(&b, CSV); err != nil {
			t.Fatal(err)
		}
		harmless(t, text+b.String())
		rows, err := csv.NewReader(&b).ReadAll()
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range rows {
			for _, c := range row {
				if c != "" && strings.ContainsRune("=+-@\t\r", rune(c[0])) {
					t.Errorf("a cell begins a formula: %q", c)
				}
			}
		}
	})
}

// harmless fails if text holds what a terminal acts on.
func harmless(t *testing.T, text string) {
	t.Helper()
	if !utf8.ValidString(text) {
		t.Errorf("invalid UTF-8: %q", text)
	}
	for _, r := range text {
		if r != '\n' && (r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x200b && r <= 0x200f || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069) {
			t.Fatalf("%U in %q", r, text)
		}
	}
}
