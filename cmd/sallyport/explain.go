package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sallyport/policy"
)

func newExplain(o *options) *cobra.Command {
	var q question
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "explain --source ADDRESS [--sni NAME] [--dns TYPE] TARGET",
		Short: "Show what the policy decides for a request, and why",
		Long: "Show what the policy decides for a request, and why. TARGET is host:port for a\n" +
			"CONNECT, http://host/ for a plain HTTP request, or with --dns a name. Nothing is\n" +
			"resolved or contacted; say with --destination what the name resolves to.\n\n" +
			"Exit status: 0 allowed (or observed), 1 denied, 2 error.",
		Example: "  sallyport explain --source 10.20.1.5 api.github.com:443\n" +
			"  sallyport explain --source 10.20.1.5 --sni other.example api.github.com:443\n" +
			"  sallyport explain --source 10.20.1.5 --dns TXT github.com",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("explain wants one TARGET, such as api.github.com:443, not %d; see sallyport explain --help", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			q.target = args[0]
			r, err := q.request(time.Now())
			if err != nil {
				return usageError(flagError(err))
			}
			settings, err := o.load()
			if err != nil {
				return err
			}
			p, _, err := newSource(settings).load()
			if err != nil {
				return usageError(err)
			}
			r.PrivateZone = dnsConfig(settings.DNS).PrivateZone(r.Name, r.Destination)
			x := p.Explain(r)
			write := writeExplanation
			if asJSON {
				write = writeExplanationJSON
			}
			if err := write(cmd.OutOrStdout(), q, x); err != nil {
				return err
			}
			if !x.Decision.Passes() {
				return &exitError{code: exitFailure}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.source, "source", "", "address of the client (required)")
	f.StringVar(&q.user, "user", "", "user that the client is known as")
	f.StringVar(&q.sni, "sni", "", "server_name that the client's TLS ClientHello carries")
	f.StringVar(&q.dns, "dns", "", "ask the resolver: type of the question, such as A or TXT")
	f.StringVar(&q.destination, "destination", "", "address that the name resolves to")
	f.StringVar(&q.at, "at", "", "decide as of this date (2027-01-31) or time (RFC 3339); default now")
	f.BoolVar(&asJSON, "json", false, "print one JSON object")
	cobra.CheckErr(cmd.MarkFlagRequired("source"))
	return cmd
}

func writeExplanation(out io.Writer, q question, x policy.Explanation) error {
	d := x.Decision
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "verdict\t%s\n", d.Verdict)
	fmt.Fprintf(w, "reason\t%s\n", d.Reason)
	if d.Rule != "" {
		fmt.Fprintf(w, "rule\t%s\n", d.Rule)
	}
	switch {
	case d.Group == "":
		fmt.Fprintf(w, "group\tnone: no group has %s\n", q.source)
	case x.User != "":
		fmt.Fprintf(w, "group\t%s (user %s), %s\n", d.Group, x.User, d.Mode)
	case !x.Prefix.IsValid():
		fmt.Fprintf(w, "group\t%s (unmatched_source), %s\n", d.Group, d.Mode)
	default:
		fmt.Fprintf(w, "group\t%s (source %s), %s\n", d.Group, x.Prefix, d.Mode)
	}
	fmt.Fprintf(w, "policy\t%s\n", d.Revision)
	if d.Group != "" && len(x.Candidates) == 0 {
		fmt.Fprintf(w, "\nno rule covers %s\n", q.target)
	}
	if len(x.Candidates) > 0 {
		fmt.Fprintln(w)
		writeCandidates(w, x)
	}
	return w.Flush()
}

// writeCandidates writes the rules that cover what was asked for, as a table.
func writeCandidates(w io.Writer, x policy.Explanation) {
	fmt.Fprintf(w, "effect\trule\twritten in\tmatched by\toutcome\n")
	for _, c := range x.Candidates {
		outcome := "matched"
		if !c.Matched {
			outcome = c.Reason.String()
			if c.Deny {
				outcome = "does not apply"
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", effect(c), c.Rule, writtenIn(c), c.Pattern, outcome)
	}
}

func effect(c policy.Candidate) string {
	if c.Deny {
		return "deny"
	}
	return "allow"
}

func writtenIn(c policy.Candidate) string {
	if c.Group == "" {
		return "deny (all groups)"
	}
	return c.Group
}

func writeExplanationJSON(out io.Writer, q question, x policy.Explanation) error {
	type candidate struct {
		Effect  string `json:"effect"`
		Rule    string `json:"rule"`
		Group   string `json:"group,omitempty"`
		Pattern string `json:"pattern,omitempty"`
		Matched bool   `json:"matched"`
		Reason  string `json:"reason,omitempty"`
	}
	d := x.Decision
	v := struct {
		Source     string      `json:"source"`
		Target     string      `json:"target"`
		Verdict    string      `json:"verdict"`
		Reason     string      `json:"reason"`
		Rule       string      `json:"rule,omitempty"`
		Group      string      `json:"group,omitempty"`
		Mode       string      `json:"mode"`
		User       string      `json:"user,omitempty"`
		Prefix     string      `json:"prefix,omitempty"`
		Policy     string      `json:"policy"`
		Candidates []candidate `json:"candidates"`
	}{
		Source: q.source, Target: q.target, Verdict: d.Verdict.String(), Reason: d.Reason.String(), Rule: d.Rule,
		Group: d.Group, User: x.User, Mode: d.Mode.String(), Policy: d.Revision, Candidates: []candidate{},
	}
	if x.Prefix.IsValid() {
		v.Prefix = x.Prefix.String()
	}
	for _, c := range x.Candidates {
		v.Candidates = append(v.Candidates, candidate{effect(c), c.Rule, c.Group, c.Pattern, c.Matched, c.Reason.String()})
	}
	return json.NewEncoder(out).Encode(v)
}
