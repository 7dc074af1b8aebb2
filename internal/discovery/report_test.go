package discovery

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

const reportPolicy = `
version: 1
deny:
  - {id: feed, names: [.evil.example], reason: threat feed, owner: soc}
  - {id: never-hit, names: [.worse.example]}
groups:
  - name: base
    allow:
      - .base.example
      - dusty.example
  - name: ci
    sources: [10.20.0.0/16]
    extends: [base]
    allow:
      - {id: soon, names: [soon.example], expires: 2026-12-01, owner: "=pay|team"}
      - {id: over, names: [over.example], expires: 2026-11-01T00:00:00Z}
      - {id: later, names: [later.example], expires: 2027-12-01}
  - name: legacy
    sources: [10.30.0.0/16]
    mode: observe
    observe_until: 2026-12-31
  - name: done
    sources: [10.40.0.0/16]
    mode: observe
    observe_until: 2026-11-01
`

func inCI(ev *event.Event) { ev.Decision.Group = "ci" }

// reported makes a report of a week with hostile names in it.
func reported(t testing.TB) *Summary {
	t.Helper()
	s, err := Open(Options{Now: func() time.Time { return monday }})
	if err != nil {
		t.Fatal(err)
	}
	allow := func(rule string) func(*event.Event) { return decided(policy.Allow, policy.ReasonMatched, rule) }
	old := at(monday.AddDate(0, 0, -20))
	s.Observe(seen("a.base.example", allow(".base.example"), inCI))
	s.Observe(seen("a.base.example", allow(".base.example"), inCI, from("10.20.0.9")))
	s.Observe(seen("soon.example", allow("soon"), inCI, old))
	s.Observe(seen("x.evil.example", decided(policy.Deny, policy.ReasonExplicitDeny, "feed"), inCI))
	for range 3 {
		s.Observe(seen("nope.example", decided(policy.Deny, policy.ReasonNotListed, ""), inCI))
	}
	s.Observe(seen("wanted.example"))
	s.Observe(seen("who.example", decided(policy.Deny, policy.ReasonUnmatchedSource, ""), func(ev *event.Event) { ev.Decision.Group = "" }))
	for _, name := range hostileNames {
		s.Observe(seen(name, decided(policy.Deny, policy.ReasonBadRequest, ""), inCI, func(ev *event.Event) { ev.UserAgent = name }))
		s.Observe(seen(name))
	}
	since := monday.AddDate(0, 0, -7)
	pairs, err := s.Pairs(Query{Since: since})
	if err != nil {
		t.Fatal(err)
	}
	sum, err := Report(Evidence{
		Pairs: pairs, Rules: s.Rules(), Stats: s.Stats(), Since: since, Now: monday, Node: "gate-1 <b>", Policy: load(t, reportPolicy),
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

var hostileNames = []string{
	"<script>alert(1)</script>", "a|b|c", "[x](javascript:alert(1))", "`code`", "![](https://evil.example/x.png)", "www.evil.example/phish me",
	"=HYPERLINK(\"https://evil.example\")", "+1", "-1", "@sum", "\tx", "\"quoted\",x", "\x1b[2J", "\u202egpj.exe", "line\nbreak", "<!--", "*bold* _it_ ~~no~~", "\xff\xfe",
}

func TestReport(t *testing.T) {
	s := reported(t)
	for f, file := range map[Format]string{Markdown: "report.md", HTML: "report.html", CSV: "report.csv", JSON: "report.json"} {
		var b bytes.Buffer
		if err := s.Write(&b, f); err != nil {
			t.Fatal(err)
		}
		harmless(t, b.String())
		golden(t, file, b.Bytes())
	}
	if err := s.Write(new(bytes.Buffer), YAML); err == nil {
		t.Error("a report in YAML")
	}
}

// section returns what the rows of a section say, column by column.
func section(t *testing.T, s *Summary, id string) (rows []string) {
	t.Helper()
	for i := range s.Sections {
		sec := &s.Sections[i]
		if sec.ID != id {
			continue
		}
		for j := range sec.Rows {
			rows = append(rows, strings.Join(sec.cells(&sec.Rows[j]), " "))
		}
		return rows
	}
	t.Fatalf("there is no section %s", id)
	return nil
}

func TestReportSections(t *testing.T) {
	s := reported(t)
	now := stamp(monday)
	tests := map[string][]string{
		"unused_rules": {
			" deny never-hit never policy.yaml:5:5 ", "base allow dusty.example never policy.yaml:10:9 ",
			"ci allow soon " + stamp(monday.AddDate(0, 0, -20)) + " policy.yaml:15:9 =pay|team", "ci allow over never policy.yaml:16:9 ", "ci allow later never policy.yaml:17:9 ",
		},
		"expiring_rules": {
			"ci expired over 0 never 2026-11-01T00:00:00Z policy.yaml:16:9 ",
			"ci expires soon soon 1 " + stamp(monday.AddDate(0, 0, -20)) + " 2026-12-01 policy.yaml:15:9 =pay|team",
		},
		"observing_groups":  {fmt.Sprintf("legacy %d %d %s 2026-12-31 observes", 1+len(hostileNames), 1+len(hostileNames), now), "done 0 0 never 2026-11-01 enforces since then"},
		"unmatched_sources": {"who.example 1 1 " + now + " " + now},
	}
	for id, want := range tests {
		if got := section(t, s, id); strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("%s:\n%s\nwant\n%s", id, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	if got := section(t, s, "denied"); got[0] != "ci nope.example 443 tls not_listed  3 1 "+now {
		t.Errorf("denied most: %q", got[0])
	}
	if got := section(t, s, "names"); got[0] != fmt.Sprintf("ci a.base.example 2 0 20 200 2 %s %s", now, now) {
		t.Errorf("first name: %q", got[0])
	}
}

// TestReportEscapes looks for what hostile names must not become.
func TestReportEscapes(t *testing.T) {
	s := reported(t)
	text := map[Format]string{}
	for _, f := range []Format{Markdown, HTML, CSV, JSON} {
		var b bytes.Buffer
		if err := s.Write(&b, f); err != nil {
			t.Fatal(err)
		}
		text[f] = b.String()
	}
	body, _ := strings.CutPrefix(text[HTML], htmlHead)
	for _, bad := range []string{"<script", "<b>", "<!--", "\"quoted"} {
		if strings.Contains(body, bad) {
			t.Errorf("HTML has %s", bad)
		}
	}
	for _, bad := range []string{"<", "](", "`", "![", "www.", "://", "*b", "a|b", "~~"} {
		if strings.Contains(text[Markdown], bad) {
			t.Errorf("Markdown has %s", bad)
		}
	}
	columns := 0
	for line := range strings.SplitSeq(text[Markdown], "\n") { // a table keeps its columns
		switch n := strings.Count(line, "|"); {
		case !strings.HasPrefix(line, "|"):
			columns = 0
		case columns == 0:
			columns = n
		case n != columns:
			t.Errorf("%d columns instead of %d: %s", n, columns, line)
		}
	}
	rows, err := csv.NewReader(strings.NewReader(text[CSV])).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		for _, c := range row {
			if c != "" && strings.IndexByte("=+-@\t\r", c[0]) >= 0 {
				t.Errorf("a cell begins a formula: %q", c)
			}
		}
	}
	if !json.Valid([]byte(text[JSON])) {
		t.Error("JSON is not valid")
	}
}
