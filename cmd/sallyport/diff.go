package main

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sallyport/policy"
	"sallyport/policy/provider/file"
)

func newDiff() *cobra.Command {
	var at, output string
	cmd := &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Show what a change of the policy opens and closes",
		Long: "Show what a change of the policy opens and closes, group by group. The compiled\n" +
			"policies are compared: rules that were moved, split, renamed or are covered by\n" +
			"others make no difference.\n\n" +
			"Exit status: 0 no decision differs, 1 some do, 2 error.",
		Example: "  sallyport diff policy.yaml candidate.yaml\n" +
			"  sallyport diff --output markdown main/policy.yaml policy.yaml",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			write, ok := map[string]func(io.Writer, *policy.Changes) error{
				"text": writeChanges, "json": writeChangesJSON, "markdown": writeChangesMarkdown,
			}[output]
			if !ok {
				return usageError(fmt.Errorf("--output %q: write text, json or markdown", output))
			}
			when := time.Now()
			if at != "" {
				var err error
				if when, err = parseTime(at); err != nil {
					return usageError(fmt.Errorf("--at %q: %w", at, err))
				}
			}
			var policies [2]*policy.Policy
			for i, name := range args {
				p, _, err := file.New(name).Load()
				if err != nil {
					return usageError(err)
				}
				policies[i] = p
			}
			c := policy.Diff(policies[0], policies[1], when)
			if err := write(cmd.OutOrStdout(), c); err != nil {
				return err
			}
			if !c.Empty() {
				return &exitError{code: exitFailure}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&at, "at", "", "compare as of this date (2027-01-31) or time (RFC 3339); default now")
	f.StringVar(&output, "output", "text", "text, json or markdown")
	return cmd
}

func writeChangesJSON(out io.Writer, c *policy.Changes) error { return encode(out, c) }

func writeChanges(out io.Writer, c *policy.Changes) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, g := range c.Groups {
		fmt.Fprintln(w, groupTitle(g))
		for _, s := range groupFacts(g) {
			fmt.Fprintln(w, "  "+s)
		}
		for _, x := range g.Changes {
			sign := "-"
			if x.Opened {
				sign = "+"
			}
			fmt.Fprintf(w, "  %s %s\t%s", sign, target(x), what(x))
			if notes := notes(x); len(notes) > 0 {
				fmt.Fprintf(w, "\t(%s)", strings.Join(notes, "; "))
			}
			fmt.Fprintln(w)
		}
		fmt.Fprintln(w)
	}
	if len(c.Users) > 0 {
		fmt.Fprintln(w, "users")
		for _, u := range c.Users {
			fmt.Fprintf(w, "  %s\t%s -> %s\n", u.User, orNone(u.Old), orNone(u.New))
		}
		fmt.Fprintln(w)
	}
	if len(c.Expiry) > 0 {
		fmt.Fprintln(w, "expiry")
		for _, e := range c.Expiry {
			fmt.Fprintf(w, "  %s\t%s -> %s\n", expiringRule(e), orNever(e.Old), orNever(e.New))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w, summary(c))
	return w.Flush()
}

// summary counts what differs.
func summary(c *policy.Changes) string {
	if c.Empty() {
		return "same: no decision differs"
	}
	count := map[bool]int{}
	var modes []string
	for _, g := range c.Groups {
		for _, x := range g.Changes {
			count[x.Opened]++
		}
		if g.Whole {
			count[g.Old == ""]++
		}
		if g.OldMode != g.NewMode {
			modes = append(modes, g.New)
		}
	}
	s := fmt.Sprintf("%d opened, %d closed", count[true], count[false])
	for _, n := range []struct {
		what  string
		names []string
	}{{"groups added", c.Added}, {"groups removed", c.Removed}, {"mode changed", modes}} {
		if len(n.names) > 0 {
			s += fmt.Sprintf("; %s: %s", n.what, strings.Join(n.names, ", "))
		}
	}
	if n := len(c.Users); n > 0 {
		s += fmt.Sprintf("; users moved: %d", n)
	}
	if n := len(c.Expiry); n > 0 {
		s += fmt.Sprintf("; expiry changed: %d", n)
	}
	if c.Partial {
		s += "; not all looked at: patterns with * overlap too often"
	}
	return s
}

// groupTitle says for which sources g is.
func groupTitle(g policy.GroupChange) string {
	switch {
	case g.Old == g.New:
		return "group " + g.New
	case g.Old == "":
		return "sources that had no group, now " + g.New
	case g.New == "":
		return "sources of " + g.Old + ", now without a group"
	}
	return "sources of " + g.Old + ", now " + g.New
}

// groupFacts says what happened to g besides what it may reach.
func groupFacts(g policy.GroupChange) (facts []string) {
	if len(g.Sources) > 0 {
		facts = append(facts, "sources: "+list(g.Sources))
	}
	if g.Rest {
		facts = append(facts, "all sources that no group names")
	}
	if g.OldMode != g.NewMode {
		facts = append(facts, fmt.Sprintf("mode: %s -> %s", g.OldMode, g.NewMode))
	}
	switch {
	case g.Whole && g.Old == "":
		facts = append(facts, "opened: everything that group "+g.New+" allows")
	case g.Whole:
		facts = append(facts, "closed: everything that group "+g.Old+" allows")
	}
	return facts
}

// maxListed bounds how many prefixes are written out.
const maxListed = 20

func list(ps []netip.Prefix) string {
	words := make([]string, 0, len(ps))
	for i, p := range ps {
		if i == maxListed {
			words = append(words, fmt.Sprintf("and %d more", len(ps)-i))
			break
		}
		words = append(words, p.String())
	}
	return strings.Join(words, ", ")
}

func target(x policy.Change) string {
	if x.Kind == policy.TargetDestination {
		return "names that lead to " + x.Target
	}
	return x.Target
}

// what says which kinds of traffic x is about.
func what(x policy.Change) string {
	s := strings.Join(x.Facets, " ")
	if x.To != nil {
		s += " to " + list(x.To)
	}
	return s
}

// notes says what else there is to know of x.
func notes(x policy.Change) (out []string) {
	if x.Excepted > 0 {
		s := "except " + strings.Join(x.Except, ", ")
		if more := x.Excepted - len(x.Except); more > 0 {
			s += fmt.Sprintf(" and %d more", more)
		}
		out = append(out, s)
	}
	switch {
	case x.Observed:
		out = append(out, "observed")
	case x.Opened && x.Rule != "" && x.Rule != x.Target:
		out = append(out, "rule "+x.Rule)
	case !x.Opened && (x.Reason == policy.ReasonExplicitDeny.String() || x.Reason == policy.ReasonRuleExpired.String()):
		out = append(out, x.Reason+" "+x.Rule)
	}
	if x.Until != "" {
		out = append(out, "until "+x.Until)
	}
	return out
}

func expiringRule(e policy.ExpiryChange) string {
	s := "rule " + e.Rule
	if e.Deny {
		s = "deny " + s
	}
	if e.Group != "" {
		s += " of group " + e.Group
	}
	return s
}

func orNone(group string) string {
	if group == "" {
		return "no group of their own"
	}
	return "group " + group
}

func orNever(date string) string {
	if date == "" {
		return "never"
	}
	return date
}

// maxRows bounds the rows of a table, so that a comment on a pull request stays
// within what forges take.
const maxRows = 200

func writeChangesMarkdown(out io.Writer, c *policy.Changes) error {
	var b strings.Builder
	fmt.Fprintf(&b, "### Egress policy: %s\n", summary(c))
	for _, g := range c.Groups {
		fmt.Fprintf(&b, "\n#### %s\n", groupTitle(g))
		if facts := groupFacts(g); len(facts) > 0 {
			b.WriteString("\n")
			for _, s := range facts {
				fmt.Fprintf(&b, "- %s\n", s)
			}
		}
		writeRows(&b, g.Changes)
	}
	if len(c.Users) > 0 {
		b.WriteString("\n#### Users\n\n| user | was in | is in |\n|---|---|---|\n")
		for i, u := range c.Users {
			if i == maxRows {
				fmt.Fprintf(&b, "\n… and %d more.\n", len(c.Users)-i)
				break
			}
			fmt.Fprintf(&b, "| %s | %s | %s |\n", cell(u.User), orNone(u.Old), orNone(u.New))
		}
	}
	if len(c.Expiry) > 0 {
		b.WriteString("\n#### Expiry\n\n| rule | was | is |\n|---|---|---|\n")
		for _, e := range c.Expiry {
			fmt.Fprintf(&b, "| %s | %s | %s |\n", cell(expiringRule(e)), orNever(e.Old), orNever(e.New))
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func writeRows(b *strings.Builder, changes []policy.Change) {
	if len(changes) == 0 {
		return
	}
	b.WriteString("\n| | destination | traffic | |\n|---|---|---|---|\n")
	for i, x := range changes {
		if i == maxRows {
			fmt.Fprintf(b, "\n… and %d more.\n", len(changes)-i)
			break
		}
		verb := "closed"
		if x.Opened {
			verb = "**opened**"
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s |\n", verb, cell(target(x)), what(x), cell(strings.Join(notes(x), "; ")))
	}
}

// cell returns s as code that stays within a table cell.
func cell(s string) string {
	if s == "" {
		return ""
	}
	return "`" + strings.NewReplacer("`", "'", "|", "\\|").Replace(s) + "`"
}
