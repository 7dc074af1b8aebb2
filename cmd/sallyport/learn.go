package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/admin"
	"sallyport/internal/config"
	"sallyport/internal/discovery"
	"sallyport/policy"
)

func newLearn(o *options) *cobra.Command {
	var from evidenceFlags
	var group string
	var least uint64
	cmd := &cobra.Command{
		Use:   "learn [--group GROUP]",
		Short: "Propose policy from what groups that observe asked for",
		Long: "Propose policy from what groups that observe asked for: the names that the policy\n" +
			"does not allow yet, each with how often, from how many sources and when last. Names\n" +
			"are folded to *.parent where three of them with digits in a label, or eight of any\n" +
			"kind, stand below one parent that is nobody else's. Read the lines, then put them\n" +
			"into the allow section of the group.\n\n" +
			"A running gate is asked over its admin API. With --store, the file of a gate that\n" +
			"does not run is read.",
		Example: "  sallyport learn --group legacy --since 7d\n" +
			"  sallyport learn --group legacy --min-count 3 --output csv\n" +
			"  sallyport learn --store /var/lib/sallyport/discovery.db --config sallyport.yaml",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			since, err := from.check("yaml", "json", "csv")
			if err != nil {
				return usageError(err)
			}
			if least < 1 {
				return usageError(errors.New("--min-count 0: write 1 or more"))
			}
			if from.store != "" {
				d, p, _, err := from.openStore(o)
				if err != nil {
					return err
				}
				defer d.Close()
				if err := knownGroup(p, group); err != nil {
					return usageError(fmt.Errorf("--group %w", err))
				}
				return badEvidence(writeProposal(cmd.OutOrStdout(), d, p, admin.ProposalQuery{Group: group, Since: since, MinCount: least, Output: from.output}))
			}
			q := url.Values{"group": {group}, "min_count": {strconv.FormatUint(least, 10)}}
			return from.ask(cmd, o, "proposal", q)
		},
	}
	from.add(cmd, "yaml", "yaml, json or csv")
	cmd.Flags().StringVar(&group, "group", "", "group to propose for; default: all that observe")
	cmd.Flags().Uint64Var(&least, "min-count", 1, "leave out names that were seen less often")
	return cmd
}

func newReport(o *options) *cobra.Command {
	var from evidenceFlags
	cmd := &cobra.Command{
		Use:   "report",
		Short: "Sum up for people what left, what was denied and which rules are used",
		Long: "Sum up for people: traffic by group and name, what was denied most, names seen for\n" +
			"the first time, sources without a group, rules that were not used, expire soon or\n" +
			"have expired, and groups that observe.\n\n" +
			"A running gate is asked over its admin API. With --store, the file of a gate that\n" +
			"does not run is read.",
		Example: "  sallyport report --since 7d\n  sallyport report --since 2026-10-01 --output html > october.html",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			since, err := from.check("markdown", "html", "csv", "json")
			if err != nil {
				return usageError(err)
			}
			if from.store == "" {
				return from.ask(cmd, o, "report", url.Values{})
			}
			d, p, s, err := from.openStore(o)
			if err != nil {
				return err
			}
			defer d.Close()
			return badEvidence(writeSummary(cmd.OutOrStdout(), d, p, s.Node, admin.ReportQuery{Since: since, Output: from.output}))
		},
	}
	from.add(cmd, "markdown", "markdown, html, csv or json")
	return cmd
}

// evidenceFlags say where the evidence for a proposal or a report comes from.
type evidenceFlags struct {
	admin                adminFlags
	store, since, output string
}

func (e *evidenceFlags) add(cmd *cobra.Command, output, outputs string) {
	e.admin.add(cmd)
	f := cmd.Flags()
	f.Lookup("admin").Usage = "URL of the gate's admin listener; default: that of the settings"
	f.Lookup("admin").DefValue = ""
	e.admin.url = ""
	f.StringVar(&e.store, "store", "", "file of discovery.store, of a gate that does not run")
	f.StringVar(&e.since, "since", "", "from when on: 7d, 24h or a date (2026-10-31), in whole days (UTC); default: everything known")
	f.StringVar(&e.output, "output", output, outputs)
}

// check reads what does not depend on the gate.
func (e *evidenceFlags) check(outputs ...string) (since time.Time, err error) {
	if !slices.Contains(outputs, e.output) {
		return since, fmt.Errorf("--output %q: write one of %s", e.output, strings.Join(outputs, ", "))
	}
	if e.store != "" && e.admin != (adminFlags{}) {
		return since, errors.New("--store reads a file and asks nobody; leave out --admin and what goes with it")
	}
	return parseSince(e.since, time.Now())
}

// maxSince bounds how far back a question goes, in days.
const maxSince = 3650

// parseSince reads 7d, 24h, a date or a time; "" is the zero time.
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if t, err := parseTime(s); err == nil {
		return t, nil
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.Atoi(days); err == nil && n >= 0 && n <= maxSince {
			return now.AddDate(0, 0, -n), nil
		}
	} else if d, err := time.ParseDuration(s); err == nil && d >= 0 && d <= maxSince*24*time.Hour {
		return now.Add(-d), nil
	}
	return time.Time{}, fmt.Errorf("--since %q: write 7d, 24h, 2026-10-31 or 2026-10-31T18:00:00Z", s)
}

// openStore opens --store and loads the policy that it is held against.
func (e *evidenceFlags) openStore(o *options) (*discovery.Store, *policy.Policy, config.Settings, error) {
	settings, err := o.load()
	if err != nil {
		return nil, nil, settings, err
	}
	p, _, err := newSource(settings).load()
	if err != nil {
		return nil, nil, settings, usageError(err)
	}
	d, err := discovery.OpenReadOnly(e.store)
	if err != nil {
		return nil, nil, settings, usageError(err)
	}
	return d, p, settings, nil
}

// ask prints what the admin API of the gate answers.
func (e *evidenceFlags) ask(cmd *cobra.Command, o *options, path string, q url.Values) error {
	if e.admin.url == "" {
		settings, err := o.load()
		if err != nil {
			return err
		}
		if e.admin.url, err = adminURL(settings.Admin); err != nil {
			return usageError(err)
		}
		if e.admin.tokenFile == "" {
			e.admin.tokenFile = settings.Admin.TokenFile
		}
	}
	c, err := e.admin.client()
	if err != nil {
		return usageError(err)
	}
	defer c.close()
	c.http.Timeout = evidencePatience
	q.Set("since", e.since)
	q.Set("output", e.output)
	for key := range q {
		if q.Get(key) == "" {
			q.Del(key)
		}
	}
	err = c.copy(cmd.Context(), path+"?"+q.Encode(), cmd.OutOrStdout())
	if errors.Is(err, syscall.ECONNREFUSED) {
		err = fmt.Errorf("%w; does the gate run? If not, read its file with --store", err)
	}
	return badEvidence(err)
}

// badEvidence gives err the exit status of these commands.
func badEvidence(err error) error {
	if err == nil {
		return nil
	}
	return usageError(err)
}

// evidencePatience is how long a gate may take to go through everything it remembers.
const evidencePatience = time.Minute

// adminURL returns where the gate with settings s listens.
func adminURL(s config.Admin) (string, error) {
	if s.Listen == "" {
		return "", errors.New("the settings have no admin.listen to ask; write --admin URL, or read the file of a gate that does not run with --store")
	}
	scheme := "http"
	if s.TLS.Certificate != "" {
		scheme = "https"
	}
	host, port, err := net.SplitHostPort(s.Listen)
	if err != nil {
		return "", fmt.Errorf("admin.listen: %w", err)
	}
	if a, err := netip.ParseAddr(host); host == "" || err == nil && a.IsUnspecified() {
		host = "127.0.0.1"
	}
	return scheme + "://" + net.JoinHostPort(host, port), nil
}

// copy writes what the API answers at path to w. An answer that breaks off is an error.
func (c *adminClient) copy(ctx context.Context, path string, w io.Writer) error {
	resp, at, err := c.ask(ctx, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	return nil
}
