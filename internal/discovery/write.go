package discovery

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// maxRemarks bounds the remarks in the YAML of a group; JSON and CSV have all.
const maxRemarks = 100

// Write writes p as YAML, which is a policy to take lines from, as JSON or as CSV.
func (p *Proposal) Write(w io.Writer, f Format) error {
	switch f {
	case YAML:
		_, err := io.WriteString(w, p.yaml())
		return err
	case JSON:
		return writeJSON(w, p)
	case CSV:
		return p.writeCSV(w)
	}
	return fmt.Errorf("%q: write yaml, json or csv", f)
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func (p *Proposal) yaml() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Proposed on %s from what was observed%s. Read every line before it\n# goes into the allow section of its group: what was seen is not always what is needed.\n",
		p.Generated.UTC().Format(time.DateOnly), sinceText(p.Since))
	fmt.Fprintf(&b, "version: 1\n")
	if len(p.Groups) == 0 {
		b.WriteString("# No group has observed anything.\ngroups: []\n")
		return b.String()
	}
	b.WriteString("groups:\n")
	for i := range p.Groups {
		p.Groups[i].yaml(&b, p.MinCount)
	}
	return b.String()
}

func sinceText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return " since " + t.UTC().Format(time.DateOnly)
}

func (g *GroupProposal) yaml(b *strings.Builder, min uint64) {
	fmt.Fprintf(b, "  - name: %s\n", scalar(g.Group))
	if g.Allowed > 0 {
		fmt.Fprintf(b, "    # %s left out: allowed already.\n", plural(uint64(g.Allowed), "destination"))
	}
	if g.Rare > 0 {
		fmt.Fprintf(b, "    # %s left out: seen less than %s.\n", plural(uint64(g.Rare), "destination"), plural(min, "time"))
	}
	if len(g.Rules) == 0 {
		b.WriteString("    # Nothing to propose.\n")
	} else {
		b.WriteString("    allow:\n")
	}
	for i := range g.Rules {
		g.Rules[i].yaml(b)
	}
	for i, r := range g.Remarks {
		if i == maxRemarks {
			fmt.Fprintf(b, "    # not proposed: %d more\n", len(g.Remarks)-i)
			break
		}
		at := r.Name
		if r.Port != 0 {
			at += ":" + strconv.Itoa(int(r.Port))
		}
		fmt.Fprintf(b, "    # not proposed: %s (%s, last %s): %s\n", visible(at), plural(r.Count, "time"),
			r.LastSeen.UTC().Format(time.DateOnly), visible(r.Why))
	}
}

func (r *ProposedRule) yaml(b *strings.Builder) {
	if r.isBare() {
		for i := range r.Lines {
			fmt.Fprintf(b, "      - %s # %s\n", scalar(r.Lines[i].Pattern), visible(r.Lines[i].evidence()))
		}
		return
	}
	key := "names"
	if r.Addresses {
		key = "addresses"
	}
	fmt.Fprintf(b, "      - %s:\n", key)
	for i := range r.Lines {
		fmt.Fprintf(b, "          - %s # %s\n", scalar(r.Lines[i].Pattern), visible(r.Lines[i].evidence()))
	}
	if len(r.Ports) > 0 {
		fmt.Fprintf(b, "        ports: [%s]\n", strings.ReplaceAll(join(r.Ports, func(p uint16) string { return strconv.Itoa(int(p)) }), ",", ", "))
	}
	if r.Protocol != "" {
		fmt.Fprintf(b, "        protocol: %s\n", r.Protocol)
	}
	if len(r.QTypes) > 0 {
		fmt.Fprintf(b, "        qtypes: [%s]\n", strings.Join(r.QTypes, ", "))
	}
}

// scalar writes a name or a pattern as YAML: bare where nobody can take it for anything
// but a string.
func scalar(s string) string {
	bare := len(s) > 1 && s[0] >= 'a' && s[0] <= 'z' && strings.Contains(s, ".") && s[len(s)-1] != '.'
	for i := 0; i < len(s) && bare; i++ {
		c := s[i]
		bare = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '.'
	}
	if bare {
		return s
	}
	text, err := json.Marshal(visible(s)) // JSON strings are YAML strings
	if err != nil {
		panic(err) // strings can be written
	}
	return string(text)
}

func (p *Proposal) writeCSV(w io.Writer) error {
	c := csv.NewWriter(w)
	rows := [][]string{{"group", "kind", "pattern", "protocol", "ports", "qtypes", "count", "sources", "sources_estimated", "first_seen", "last_seen", "names", "note"}}
	for i := range p.Groups {
		g := &p.Groups[i]
		for _, r := range g.Rules {
			for _, l := range r.Lines {
				kind := "name"
				switch {
				case r.Addresses:
					kind = "address"
				case strings.HasPrefix(l.Pattern, "*."):
					kind = "pattern"
				}
				note := strings.Join(l.Covers, " ")
				if l.Unseen {
					note = "what was spoken was not seen"
				}
				rows = append(rows, []string{
					g.Group, kind, l.Pattern, r.Protocol, join(r.Ports, func(p uint16) string { return strconv.Itoa(int(p)) }),
					strings.Join(r.QTypes, ","), number(l.Count), strconv.Itoa(l.Sources), strconv.FormatBool(l.SourcesEstimated),
					stamp(l.FirstSeen), stamp(l.LastSeen), strconv.Itoa(l.Names), note,
				})
			}
		}
		for _, r := range g.Remarks {
			port := ""
			if r.Port != 0 {
				port = strconv.Itoa(int(r.Port))
			}
			rows = append(rows, []string{g.Group, "not proposed", r.Name, "", port, "", number(r.Count), "", "", "", stamp(r.LastSeen), "", r.Why})
		}
	}
	for _, row := range rows {
		for i := range row {
			row[i] = cell(row[i])
		}
		if err := c.Write(row); err != nil {
			return err
		}
	}
	c.Flush()
	return c.Error()
}

func number(n uint64) string { return strconv.FormatUint(n, 10) }

// stamp writes a time to the second; "" for none.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
