package discovery

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/policy"
)

// Bounds of a report. Where there is more, a section says so.
const (
	reportNames  = 20  // of each group
	reportRows   = 100 // of a section with names
	reportRules  = 500 // of a section with rules
	expiresSoon  = 30 * 24 * time.Hour
	reportGroups = 1000
)

// Evidence is what a report is made of.
type Evidence struct {
	Pairs  []Pair // of the days from Since on
	Rules  map[RuleKey]Use
	Stats  Stats
	Since  time.Time // zero: everything that is known
	Now    time.Time
	Node   string
	Policy *policy.Policy // in force; nil if it is not known
}

// Summary is a report.
type Summary struct {
	Generated time.Time `json:"generated"`
	Since     time.Time `json:"since"` // zero: everything that is known
	Known     time.Time `json:"known"` // what is known begins then
	Node      string    `json:"node,omitempty"`
	Policy    string    `json:"policy,omitempty"`
	Lost      uint64    `json:"lost"` // destinations forgotten for lack of room, since the start of the process
	Sections  []Section `json:"sections"`
}

// A Section is a table.
type Section struct {
	ID      string   `json:"id"`
	Title   string   `json:"title"`
	Note    string   `json:"note,omitempty"`
	Columns []string `json:"columns"` // of a Row, those that say something here
	Rows    []Row    `json:"rows"`
	More    int      `json:"more,omitempty"` // rows left out
}

// A Row has what a section says of a group, a destination or a rule.
type Row struct {
	Group     string     `json:"group"`
	Name      string     `json:"name,omitempty"`
	Port      uint16     `json:"port,omitempty"`
	Protocol  Protocol   `json:"protocol,omitempty"`
	Verdict   string     `json:"verdict,omitempty"`
	Reason    string     `json:"reason,omitempty"`
	Rule      string     `json:"rule,omitempty"`
	Names     int        `json:"names,omitempty"`
	Count     uint64     `json:"count,omitempty"`
	Denied    uint64     `json:"denied,omitempty"`
	Observed  uint64     `json:"observed,omitempty"`
	BytesUp   uint64     `json:"bytes_up,omitempty"`
	BytesDown uint64     `json:"bytes_down,omitempty"`
	Sources   int        `json:"sources,omitempty"`
	About     bool       `json:"sources_estimated,omitempty"`
	First     *time.Time `json:"first_seen,omitempty"`
	Last      *time.Time `json:"last_seen,omitempty"`
	Until     string     `json:"until,omitempty"`
	Where     string     `json:"where,omitempty"`
	Note      string     `json:"note,omitempty"`

	clients sources
}

// columns are the keys of a Row and how each is written.
var columns = []struct {
	key, title string
	text       func(*Row) string
}{
	{"group", "Group", func(r *Row) string { return r.Group }},
	{"name", "Name", func(r *Row) string { return r.Name }},
	{"port", "Port", func(r *Row) string { return nonZero(uint64(r.Port)) }},
	{"protocol", "Protocol", func(r *Row) string { return string(r.Protocol) }},
	{"verdict", "Verdict", func(r *Row) string { return r.Verdict }},
	{"reason", "Reason", func(r *Row) string { return r.Reason }},
	{"rule", "Rule", func(r *Row) string { return r.Rule }},
	{"names", "Names", func(r *Row) string { return strconv.Itoa(r.Names) }},
	{"count", "Times", func(r *Row) string { return number(r.Count) }},
	{"denied", "Denied", func(r *Row) string { return number(r.Denied) }},
	{"observed", "Let pass by observing", func(r *Row) string { return number(r.Observed) }},
	{"bytes_up", "Bytes up", func(r *Row) string { return number(r.BytesUp) }},
	{"bytes_down", "Bytes down", func(r *Row) string { return number(r.BytesDown) }},
	{"sources", "Sources", func(r *Row) string {
		if r.About {
			return "about " + strconv.Itoa(r.Sources)
		}
		return strconv.Itoa(r.Sources)
	}},
	{"first_seen", "First seen", func(r *Row) string { return moment(r.First, "") }},
	{"last_seen", "Last seen", func(r *Row) string { return moment(r.Last, "never") }},
	{"until", "Until", func(r *Row) string { return r.Until }},
	{"where", "Where", func(r *Row) string { return r.Where }},
	{"note", "Note", func(r *Row) string { return r.Note }},
}

func nonZero(n uint64) string {
	if n == 0 {
		return ""
	}
	return number(n)
}

func moment(t *time.Time, none string) string {
	if t == nil {
		return none
	}
	return stamp(*t)
}

// Report sums up e. An error is about the text of the policy.
func Report(e Evidence) (*Summary, error) {
	s := &Summary{Generated: e.Now, Since: e.Since, Known: e.Stats.Since, Node: e.Node, Lost: e.Stats.Evicted}
	s.byGroup(&e)
	s.byName(&e)
	s.denied(&e)
	if !e.Since.IsZero() {
		s.firstSeen(&e)
	}
	s.unmatched(&e)
	if e.Policy == nil {
		return s, nil
	}
	s.Policy = e.Policy.Revision()
	doc, err := e.Policy.Document()
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	if doc != nil {
		rules := rulesOf(doc, &e)
		s.unused(rules, &e)
		s.expiring(rules, &e)
		s.observing(doc, &e)
	}
	return s, nil
}

// add adds a section with at most limit of rows.
func (s *Summary) add(id, title, note string, rows []Row, limit int, columns ...string) {
	sec := Section{ID: id, Title: title, Note: note, Columns: columns, Rows: append([]Row{}, rows[:min(limit, len(rows))]...)}
	sec.More = len(rows) - len(sec.Rows)
	s.Sections = append(s.Sections, sec)
}

// tally counts pair in r.
func (r *Row) tally(pair *Pair) {
	switch pair.Verdict {
	case policy.Deny.String():
		r.Denied += pair.Count
	case policy.Observe.String():
		r.Observed += pair.Count
	}
	r.Count += pair.Count
	r.BytesUp += pair.BytesUp
	r.BytesDown += pair.BytesDown
	r.clients.merge(&pair.clients)
	r.Sources, r.About = r.clients.count(pair.since)
	if r.First == nil || pair.FirstSeen.Before(*r.First) {
		r.First = &pair.FirstSeen
	}
	if r.Last == nil || pair.LastSeen.After(*r.Last) {
		r.Last = &pair.LastSeen
	}
}

// gather counts pairs in rows, by what key says.
func gather[K comparable](pairs []Pair, takes func(*Pair) bool, key func(*Pair) K, start func(*Pair) Row) []Row {
	index := map[K]int{}
	var rows []Row
	for i := range pairs {
		pair := &pairs[i]
		if !takes(pair) {
			continue
		}
		k := key(pair)
		at, ok := index[k]
		if !ok {
			at = len(rows)
			index[k] = at
			rows = append(rows, start(pair))
		}
		rows[at].tally(pair)
	}
	slices.SortFunc(rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.Group, b.Group), strings.Compare(a.Name, b.Name),
			cmp.Compare(a.Port, b.Port), strings.Compare(string(a.Protocol), string(b.Protocol)), strings.Compare(a.Reason, b.Reason), strings.Compare(a.Rule, b.Rule))
	})
	return rows
}

func anyPair(*Pair) bool { return true }

type groupName struct{ group, name string }

func nameOf(p *Pair) groupName { return groupName{p.Group, p.Name} }

func (s *Summary) byGroup(e *Evidence) {
	names := map[string]map[string]bool{}
	for i := range e.Pairs {
		p := &e.Pairs[i]
		if names[p.Group] == nil {
			names[p.Group] = map[string]bool{}
		}
		names[p.Group][p.Name] = true
	}
	rows := gather(e.Pairs, anyPair, func(p *Pair) string { return p.Group }, func(p *Pair) Row { return Row{Group: p.Group} })
	for i := range rows {
		rows[i].Names = len(names[rows[i].Group])
	}
	s.add("groups", "Traffic by group", "Connections, requests and DNS queries. Of DNS queries that are allowed only one a minute counts for each source, name and type, unless log.dns is all.",
		rows, reportGroups, "group", "names", "count", "denied", "observed", "bytes_up", "bytes_down", "sources", "last_seen")
}

// byName lists what passed.
func (s *Summary) byName(e *Evidence) {
	passed := func(p *Pair) bool { return p.Verdict != policy.Deny.String() }
	all := gather(e.Pairs, passed, nameOf, func(p *Pair) Row { return Row{Group: p.Group, Name: p.Name} })
	slices.SortStableFunc(all, func(a, b Row) int { return strings.Compare(a.Group, b.Group) })
	var rows []Row
	left, more := 0, 0
	for i := range all {
		if i == 0 || all[i].Group != all[i-1].Group {
			left = reportNames
		}
		if left == 0 {
			more++
			continue
		}
		left--
		rows = append(rows, all[i])
	}
	s.add("names", "Traffic by group and name", fmt.Sprintf("What passed: the %d names of each group that were asked for most.", reportNames),
		rows, len(rows), "group", "name", "count", "observed", "bytes_up", "bytes_down", "sources", "first_seen", "last_seen")
	s.Sections[len(s.Sections)-1].More = more
}

func (s *Summary) denied(e *Evidence) {
	type key struct {
		groupName
		port                   uint16
		protocol, reason, rule string
	}
	rows := gather(e.Pairs, func(p *Pair) bool {
		return p.Verdict == policy.Deny.String() && p.Reason != policy.ReasonUnmatchedSource.String()
	},
		func(p *Pair) key { return key{nameOf(p), p.Port, string(p.Protocol), p.Reason, p.Rule} },
		func(p *Pair) Row {
			return Row{Group: p.Group, Name: p.Name, Port: p.Port, Protocol: p.Protocol, Reason: p.Reason, Rule: p.Rule}
		})
	s.add("denied", "Denied most", "", rows, reportRows, "group", "name", "port", "protocol", "reason", "rule", "count", "sources", "last_seen")
}

func (s *Summary) firstSeen(e *Evidence) {
	rows := gather(e.Pairs, anyPair, nameOf, func(p *Pair) Row { return Row{Group: p.Group, Name: p.Name} })
	rows = slices.DeleteFunc(rows, func(r Row) bool { return dayOf(*r.First) < dayOf(e.Since) })
	slices.SortStableFunc(rows, func(a, b Row) int { return b.First.Compare(*a.First) })
	s.add("first_seen", "Seen for the first time", "Names that a group had not asked for before, the latest first.",
		rows, reportRows, "group", "name", "count", "denied", "observed", "sources", "first_seen")
}

func (s *Summary) unmatched(e *Evidence) {
	rows := gather(e.Pairs, func(p *Pair) bool { return p.Reason == policy.ReasonUnmatchedSource.String() },
		func(p *Pair) string { return p.Name }, func(p *Pair) Row { return Row{Name: p.Name} })
	s.add("unmatched_sources", "Sources without a group", "What they asked for. Who they are is in the log: reason unmatched_source.",
		rows, reportRows, "name", "count", "sources", "first_seen", "last_seen")
}

// A writtenRule is a rule as the policy has it, with its use.
type writtenRule struct {
	Row
	expires time.Time // zero: never
	hits    uint64
}

// rulesOf returns every rule of doc in its order.
func rulesOf(doc *policy.Document, e *Evidence) (out []writtenRule) {
	uses := UsesByWriter(doc.Lineages(), e.Rules)
	add := func(group, path string, rules []policy.Rule, deny bool) {
		ids := policy.RuleIDs(rules)
		for i := range rules {
			r := &rules[i]
			w := writtenRule{Row: Row{Group: group, Rule: ids[i], Verdict: "allow", Until: r.Expires, Where: doc.Where(fmt.Sprintf("%s[%d]", path, i)).String()}}
			if deny {
				w.Verdict = "deny"
			}
			w.Note = strings.Join(slices.DeleteFunc([]string{r.Owner, r.Reason}, func(s string) bool { return s == "" }), ", ")
			if u, ok := uses[RuleKey{group, ids[i], deny}]; ok {
				w.hits, w.Last, w.Count = u.Hits, &u.LastUsed, u.Hits
			}
			w.expires = dateOrTime(r.Expires)
			out = append(out, w)
		}
	}
	add("", "deny", doc.Deny, true)
	for i := range doc.Groups {
		g, path := &doc.Groups[i], fmt.Sprintf("groups[%d]", i)
		add(g.Name, path+".allow", g.Allow, false)
		add(g.Name, path+".deny", g.Deny, true)
	}
	return out
}

// dateOrTime reads what a policy in force says, "" as zero.
func dateOrTime(s string) time.Time {
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, s); err == nil {
			return t
		}
	}
	return time.Time{}
}

// UsesByWriter sums up uses for the groups that may have written the rules: that whose
// traffic it was, its ancestors, and of deny rules all groups (""). Events name the group
// whose traffic it was, so a rule counts for each ancestor that has one of the same ID.
// lineages are what [policy.Document.Lineages] says of the policy.
func UsesByWriter(lineages map[string][]string, uses map[RuleKey]Use) map[RuleKey]Use {
	sum := map[RuleKey]Use{}
	for k, u := range uses {
		all := lineages[k.Group]
		if k.Deny {
			all = append(slices.Clip(all), "")
		}
		for _, w := range all {
			to := sum[RuleKey{w, k.Rule, k.Deny}]
			to.Hits += u.Hits
			if u.LastUsed.After(to.LastUsed) {
				to.LastUsed = u.LastUsed
			}
			sum[RuleKey{w, k.Rule, k.Deny}] = to
		}
	}
	return sum
}

func (s *Summary) unused(rules []writtenRule, e *Evidence) {
	var rows []Row
	for _, r := range rules {
		if r.Last == nil || !e.Since.IsZero() && dayOf(*r.Last) < dayOf(e.Since) {
			rows = append(rows, r.Row)
		}
	}
	s.add("unused_rules", "Rules that were not used", "Last seen is when a rule last decided, as far as is known. Rules of other policies in the same time are not looked at.",
		rows, reportRules, "group", "rule", "verdict", "last_seen", "where", "note")
}

func (s *Summary) expiring(rules []writtenRule, e *Evidence) {
	var rows []writtenRule
	for _, r := range rules {
		switch {
		case r.expires.IsZero() || r.expires.After(e.Now.Add(expiresSoon)):
			continue
		case r.expires.After(e.Now):
			r.Reason = "expires soon"
		default:
			r.Reason = "expired"
		}
		rows = append(rows, r)
	}
	slices.SortStableFunc(rows, func(a, b writtenRule) int { return a.expires.Compare(b.expires) })
	plain := make([]Row, len(rows))
	for i := range rows {
		plain[i] = rows[i].Row
	}
	s.add("expiring_rules", "Rules that expire within 30 days or have expired", "",
		plain, reportRules, "until", "reason", "group", "rule", "count", "last_seen", "where", "note")
}

func (s *Summary) observing(doc *policy.Document, e *Evidence) {
	observed := map[string]*Row{}
	for i := range e.Pairs {
		if p := &e.Pairs[i]; p.Verdict == policy.Observe.String() {
			if observed[p.Group] == nil {
				observed[p.Group] = &Row{}
			}
			observed[p.Group].Names++
			observed[p.Group].tally(p)
		}
	}
	var rows []Row
	for i := range doc.Groups {
		g := &doc.Groups[i]
		if g.Mode != policy.ModeObserve.String() {
			continue
		}
		r := Row{Group: g.Name, Until: g.ObserveUntil, Note: "observes"}
		if !dateOrTime(g.ObserveUntil).After(e.Now) {
			r.Note = "enforces since then"
		}
		if o := observed[g.Name]; o != nil {
			r.Names, r.Observed, r.Last = o.Names, o.Observed, o.Last
		}
		rows = append(rows, r)
	}
	s.add("observing_groups", "Groups that observe", "What a policy that enforced would have denied them; names counts each destination with its port and protocol.",
		rows, reportGroups, "group", "until", "note", "names", "observed", "last_seen")
}

// Write writes s as Markdown, HTML, CSV or JSON.
func (s *Summary) Write(w io.Writer, f Format) error {
	switch f {
	case Markdown:
		_, err := io.WriteString(w, s.markdown())
		return err
	case HTML:
		_, err := io.WriteString(w, s.html())
		return err
	case CSV:
		return s.writeCSV(w)
	case JSON:
		return writeJSON(w, s)
	}
	return fmt.Errorf("%q: write markdown, html, csv or json", f)
}

// heading returns the lines under the title.
func (s *Summary) heading() []string {
	period := "Everything that is known"
	if !s.Since.IsZero() {
		period = "From " + s.Since.UTC().Format(time.DateOnly) + " on (whole days, UTC)"
	}
	lines := []string{fmt.Sprintf("%s; made %s. What is known begins %s.", period, stamp(s.Generated), stamp(s.Known))}
	if s.Policy != "" {
		lines = append(lines, "Policy "+s.Policy+".")
	}
	if s.Node != "" {
		lines = append(lines, "Node "+s.Node+".")
	}
	if s.Lost > 0 {
		lines = append(lines, plural(s.Lost, "destination")+" had to be forgotten for lack of room since the process began.")
	}
	return lines
}

// cells returns the texts of a row for the columns of sec.
func (sec *Section) cells(r *Row) (out []string) {
	for _, c := range columns {
		if slices.Contains(sec.Columns, c.key) {
			out = append(out, c.text(r))
		}
	}
	return out
}

func (sec *Section) titles() (out []string) {
	for _, c := range columns {
		if slices.Contains(sec.Columns, c.key) {
			out = append(out, c.title)
		}
	}
	return out
}

func (sec *Section) rest() string {
	switch {
	case len(sec.Rows) == 0:
		return "None."
	case sec.More > 0:
		return fmt.Sprintf("And %d more.", sec.More)
	}
	return ""
}

func (s *Summary) markdown() string {
	var b strings.Builder
	b.WriteString("# What left through sallyport\n\n")
	for _, l := range s.heading() {
		b.WriteString(markdown(l) + "\n")
	}
	for i := range s.Sections {
		sec := &s.Sections[i]
		fmt.Fprintf(&b, "\n## %s\n\n", sec.Title)
		if sec.Note != "" {
			fmt.Fprintf(&b, "%s\n\n", markdown(sec.Note))
		}
		if len(sec.Rows) > 0 {
			titles := sec.titles()
			fmt.Fprintf(&b, "| %s |\n|%s\n", strings.Join(titles, " | "), strings.Repeat("---|", len(titles)))
		}
		for j := range sec.Rows {
			for _, c := range sec.cells(&sec.Rows[j]) {
				b.WriteString("| " + markdown(c) + " ")
			}
			b.WriteString("|\n")
		}
		if rest := sec.rest(); rest != "" {
			if len(sec.Rows) > 0 {
				b.WriteString("\n")
			}
			b.WriteString(rest + "\n")
		}
	}
	return b.String()
}

const htmlHead = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What left through sallyport</title>
<style>body{font:14px/1.4 system-ui,sans-serif;margin:2em;color-scheme:light dark}table{border-collapse:collapse}th,td{border:1px solid #8884;padding:.2em .6em;text-align:left;vertical-align:top;overflow-wrap:anywhere}th{background:#8882}</style>
</head><body>
<h1>What left through sallyport</h1>
`

func (s *Summary) html() string {
	var b strings.Builder
	b.WriteString(htmlHead)
	for _, l := range s.heading() {
		b.WriteString("<p>" + htmlText(l) + "</p>\n")
	}
	for i := range s.Sections {
		sec := &s.Sections[i]
		fmt.Fprintf(&b, "<h2 id=\"%s\">%s</h2>\n", htmlText(sec.ID), htmlText(sec.Title))
		if sec.Note != "" {
			b.WriteString("<p>" + htmlText(sec.Note) + "</p>\n")
		}
		if len(sec.Rows) > 0 {
			b.WriteString("<table>\n<tr>")
			for _, t := range sec.titles() {
				b.WriteString("<th>" + htmlText(t) + "</th>")
			}
			b.WriteString("</tr>\n")
			for j := range sec.Rows {
				b.WriteString("<tr>")
				for _, c := range sec.cells(&sec.Rows[j]) {
					b.WriteString("<td>" + htmlText(c) + "</td>")
				}
				b.WriteString("</tr>\n")
			}
			b.WriteString("</table>\n")
		}
		if rest := sec.rest(); rest != "" {
			b.WriteString("<p>" + rest + "</p>\n")
		}
	}
	b.WriteString("</body></html>\n")
	return b.String()
}

// writeCSV writes all sections as one table; a column that says nothing in a section is
// empty there.
func (s *Summary) writeCSV(w io.Writer) error {
	c := csv.NewWriter(w)
	row := []string{"section"}
	for _, col := range columns {
		row = append(row, col.key)
	}
	if err := c.Write(row); err != nil {
		return err
	}
	for i := range s.Sections {
		sec := &s.Sections[i]
		for j := range sec.Rows {
			row = append(row[:0], sec.ID)
			for _, col := range columns {
				text := ""
				if slices.Contains(sec.Columns, col.key) {
					text = cell(col.text(&sec.Rows[j]))
				}
				row = append(row, text)
			}
			if err := c.Write(row); err != nil {
				return err
			}
		}
	}
	c.Flush()
	return c.Error()
}
