package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"sallyport/dnsfilter"
	"sallyport/internal/discovery"
	"sallyport/internal/replay"
)

func newReplay(o *options) *cobra.Command {
	var format, output, at, failOn string
	var top int
	cmd := &cobra.Command{
		Use:   "replay --policy NEW FILE…",
		Short: "Show what another policy would have decided on a recorded log",
		Long: "Decide every request of a log again under another policy and show what would\n" +
			"change: newly denied, newly allowed, newly observed, by group and name. FILE is a\n" +
			"log of sallyport (JSON) or Squid's native access.log, compressed with gzip or not;\n" +
			"- is standard input.\n\n" +
			"Exit status: 0, 1 with --fail-on if there is such a change, 2 error.",
		Example: "  sallyport replay --policy candidate.yaml /var/log/sallyport/events.log*\n" +
			"  sallyport replay --policy candidate.yaml --output csv --fail-on denied events.log.gz\n" +
			"  zcat access.log.*.gz | sallyport replay --policy first.yaml -",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("replay wants log files, or - for standard input; see sallyport replay --help")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			write, ok := map[string]func(io.Writer, *replay.Report, int) error{
				"text": writeReplay, "json": writeReplayJSON, "csv": writeReplayCSV, "markdown": writeReplayMarkdown,
			}[output]
			if !ok {
				return usageError(fmt.Errorf("--output %q: write text, json, csv or markdown", output))
			}
			fails, ok := failOns[failOn]
			if !ok {
				return usageError(fmt.Errorf("--fail-on %q: write %s", failOn, strings.Join(slices.Sorted(maps.Keys(failOns))[1:], ", ")))
			}
			rep, err := runReplay(cmd, o, format, at, args)
			if err != nil {
				return err
			}
			if err := write(cmd.OutOrStdout(), rep, top); err != nil {
				return err
			}
			for _, c := range fails {
				if rep.Changes[c] > 0 {
					return &exitError{code: exitFailure}
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "auto", "auto, json or squid")
	f.StringVar(&output, "output", "text", "text, json, csv or markdown")
	f.StringVar(&at, "at", "", "decide as of this date (2027-01-31) or time (RFC 3339); default: when each request was made")
	f.StringVar(&failOn, "fail-on", "", "exit with 1 if requests are newly denied, allowed, or any")
	f.IntVar(&top, "top", 20, "names shown of each change in a group, in text and markdown; 0: all")
	return cmd
}

// failOns are the values of --fail-on.
var failOns = map[string][]replay.Change{
	"": nil, "denied": {replay.Denied}, "allowed": {replay.Allowed}, "any": {replay.Denied, replay.Allowed, replay.Observed},
}

func runReplay(cmd *cobra.Command, o *options, format, at string, names []string) (*replay.Report, error) {
	opt := replay.Options{Format: replay.Format(format)}
	if !slices.Contains([]replay.Format{replay.Auto, replay.JSON, replay.Squid}, opt.Format) {
		return nil, usageError(fmt.Errorf("--format %q: write auto, json or squid", format))
	}
	if at != "" {
		var err error
		if opt.At, err = parseTime(at); err != nil {
			return nil, usageError(fmt.Errorf("--at %q: %w", at, err))
		}
	}
	settings, err := o.load()
	if err != nil {
		return nil, err
	}
	if opt.Policy, _, err = newSource(settings).load(); err != nil {
		return nil, usageError(err)
	}
	if c := dnsConfig(settings.DNS); slices.ContainsFunc(c.Zones, func(z dnsfilter.Zone) bool { return len(z.PrivateDestinations) > 0 }) {
		opt.PrivateZone = c.PrivateZone
	}
	r := replay.New(opt)
	p := newProgress(cmd.ErrOrStderr(), names)
	defer p.clear()
	for _, name := range names {
		if err := replayFile(cmd.InOrStdin(), r, p, name); err != nil {
			return nil, usageError(err)
		}
	}
	return r.Report(), nil
}

func replayFile(stdin io.Reader, r *replay.Replay, p *progress, name string) error {
	if name == "-" {
		return r.Read("standard input", p.of(stdin))
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return r.Read(name, p.of(f))
}

// A progress draws a bar on a terminal while files are read. On anything else it
// does nothing.
type progress struct {
	out         io.Writer // nil: no terminal
	total, read int64
	began, next time.Time
	in          io.Reader
	drawn       bool
}

// progressPause is the time between two drawings.
const progressPause = 200 * time.Millisecond

func newProgress(out io.Writer, names []string) *progress {
	f, ok := out.(*os.File)
	if !ok {
		return &progress{}
	}
	if fi, err := f.Stat(); err != nil || fi.Mode()&os.ModeCharDevice == 0 || os.Getenv("TERM") == "dumb" {
		return &progress{}
	}
	p := &progress{out: out, began: time.Now(), next: time.Now().Add(time.Second)} // nothing for short input
	for _, name := range names {
		fi, err := os.Stat(name)
		if err != nil || !fi.Mode().IsRegular() {
			p.total = 0 // how much there is nobody knows
			break
		}
		p.total += fi.Size()
	}
	return p
}

// of returns in, read under p's eyes.
func (p *progress) of(in io.Reader) io.Reader {
	if p.out == nil {
		return in
	}
	p.in = in
	return p
}

func (p *progress) Read(b []byte) (int, error) {
	n, err := p.in.Read(b)
	p.read += int64(n)
	if now := time.Now(); now.After(p.next) {
		p.next = now.Add(progressPause)
		p.draw(now)
	}
	return n, err
}

func (p *progress) draw(now time.Time) {
	const width = 30
	p.drawn = true
	mib := float64(p.read) / (1 << 20)
	rate := mib / now.Sub(p.began).Seconds()
	if p.total <= 0 {
		fmt.Fprintf(p.out, "\r\x1b[K%.0f MiB, %.0f MiB/s", mib, rate)
		return
	}
	done := min(float64(p.read)/float64(p.total), 1)
	full := int(done * width)
	fmt.Fprintf(p.out, "\r\x1b[K[%s%s] %3.0f %%  %.0f MiB/s", strings.Repeat("#", full), strings.Repeat(".", width-full), 100*done, rate)
}

// clear takes the bar away.
func (p *progress) clear() {
	if p.drawn {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}

func writeReplayJSON(out io.Writer, r *replay.Report, _ int) error { return encode(out, r) }

// replayTitles head the sections of a report.
var replayTitles = map[replay.Change]string{
	replay.Denied: "newly denied", replay.Allowed: "newly allowed", replay.Observed: "newly observed (allowed before, not listed now)",
}

func writeReplay(out io.Writer, r *replay.Report, top int) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, s := range replayFacts(r) {
		fmt.Fprintf(w, "%s\t%s\n", s[0], s[1])
	}
	for _, section := range sections(r, top) {
		fmt.Fprintf(w, "\n%s, %s: %d\n", replayTitles[section.change], groupWords(section.group), r.Groups[section.group].Changes[section.change])
		for _, row := range section.rows {
			fmt.Fprintf(w, "  %d\t%s\t%s\t%s -> %s\t%s\n", row.Count, plainText(row.Name), plainText(row.Traffic()), plainText(row.Was), plainText(row.Now), "e.g. "+example(row))
		}
		if section.more > 0 {
			fmt.Fprintf(w, "  and %d more names; --top 0 shows all\n", section.more)
		}
	}
	for _, p := range r.Problems {
		fmt.Fprintf(w, "\nskipped %s:%d: %s", plainText(p.File), p.Line, p.Error)
	}
	if n := r.Malformed - uint64(len(r.Problems)); n > 0 {
		fmt.Fprintf(w, "\nmore lines skipped: %d", n)
	}
	if r.Malformed > 0 {
		fmt.Fprintln(w)
	}
	return w.Flush()
}

// replayFacts are the figures of a report, with their names.
func replayFacts(r *replay.Report) [][2]string {
	number := func(n uint64) string { return strconv.FormatUint(n, 10) }
	facts := [][2]string{{"policy", r.Revision}}
	if !r.First.IsZero() {
		facts = append(facts, [2]string{"period", r.First.Format(time.RFC3339) + " to " + r.Last.Format(time.RFC3339)})
	}
	facts = append(facts, [2]string{"requests", fmt.Sprintf("%d compared: %d unchanged, %d newly denied, %d newly allowed, %d newly observed",
		r.Decided, r.Same, r.Changes[replay.Denied], r.Changes[replay.Allowed], r.Changes[replay.Observed])})
	for _, f := range []struct {
		n    uint64
		text string
	}{
		{r.Open, "unchanged, but that depends on what the log does not say"},
		{r.Refused, "not compared, refused for limits, passwords, malformed requests and the like"},
		{r.Undecidable, "not compared, without a source, name or port that can be read, or with another scheme"},
		{r.Folded, "changes folded into registrable domains or (others), as there are too many names"},
		{r.Malformed, "malformed lines skipped"},
	} {
		if f.n > 0 {
			facts = append(facts, [2]string{"", f.text + ": " + number(f.n)})
		}
	}
	for _, a := range replay.Assumptions {
		if n := r.Assumed[a.Key]; n > 0 {
			facts = append(facts, [2]string{"assumed", fmt.Sprintf("%s (%d): %s", a.Key, n, a.Text)})
		}
	}
	return facts
}

// A section is what changes in one way for one group.
type section struct {
	change replay.Change
	group  string
	rows   []*replay.Row
	more   int // rows not shown
}

// sections takes the rows, which are sorted, apart, with at most top rows each.
func sections(r *replay.Report, top int) (all []*section) {
	for _, row := range r.Rows {
		if n := len(all); n == 0 || all[n-1].change != row.Change || all[n-1].group != row.Group {
			all = append(all, &section{change: row.Change, group: row.Group})
		}
		s := all[len(all)-1]
		if top > 0 && len(s.rows) >= top {
			s.more++
			continue
		}
		s.rows = append(s.rows, row)
	}
	return all
}

func groupWords(g string) string {
	if g == "" {
		return "sources without a group"
	}
	return "group " + g
}

// example shows the first request of a row.
func example(row *replay.Row) string {
	e := row.Examples[0]
	return strings.TrimSpace(e.Time.Format(time.RFC3339) + " " + e.Source.String() + " " + plainText(e.ID))
}

// plainText returns s without anything that moves a terminal's cursor or turns the
// direction of writing.
func plainText(s string) string {
	return strings.Map(func(c rune) rune {
		if unicode.IsPrint(c) && c != unicode.ReplacementChar {
			return c
		}
		return '?'
	}, s)
}

func writeReplayCSV(out io.Writer, r *replay.Report, _ int) error {
	w := csv.NewWriter(out)
	_ = w.Write([]string{"change", "group", "name", "event", "port", "qtype", "was", "now", "count", "first", "last", "example_time", "example_src", "example_id"}) // Flush and Error tell
	for _, row := range r.Rows {
		e := row.Examples[0]
		port := ""
		if row.Port != 0 {
			port = strconv.Itoa(int(row.Port))
		}
		fields := []string{
			row.Kind, row.Group, row.Name, row.Event, port, row.QType, row.Was, row.Now, strconv.FormatUint(row.Count, 10),
			row.First.Format(time.RFC3339), row.Last.Format(time.RFC3339), e.Time.Format(time.RFC3339Nano), e.Source.String(), e.ID,
		}
		for i, f := range fields {
			fields[i] = csvCell(f)
		}
		_ = w.Write(fields)
	}
	w.Flush()
	return w.Error()
}

// csvCell makes s harmless in a spreadsheet.
func csvCell(s string) string { return discovery.Harmless(plainText(s)) }

func writeReplayMarkdown(out io.Writer, r *replay.Report, top int) error {
	var b strings.Builder
	b.WriteString("### Replay\n\n")
	for _, f := range replayFacts(r) {
		fmt.Fprintf(&b, "- %s\n", strings.TrimSpace(f[0]+" "+markdownText(f[1])))
	}
	for _, s := range sections(r, top) {
		fmt.Fprintf(&b, "\n#### %s, %s: %d\n\n", replayTitles[s.change], markdownText(groupWords(s.group)), r.Groups[s.group].Changes[s.change])
		b.WriteString("| count | name | traffic | was | now | example |\n|---:|---|---|---|---|---|\n")
		for _, row := range s.rows {
			fmt.Fprintf(&b, "| %d | %s | %s | %s | %s | %s |\n", row.Count, markdownCode(row.Name), markdownText(row.Traffic()), markdownText(row.Was), markdownText(row.Now), markdownText(example(row)))
		}
		if s.more > 0 {
			fmt.Fprintf(&b, "\nand %d more names\n", s.more)
		}
	}
	if r.Malformed > 0 {
		b.WriteString("\nSkipped lines:\n\n")
		for _, p := range r.Problems {
			fmt.Fprintf(&b, "- %s line %d: %s\n", markdownCode(p.File), p.Line, markdownText(p.Error))
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// markdownText escapes what Markdown or HTML would make something of.
func markdownText(s string) string {
	var b strings.Builder
	for _, c := range plainText(s) {
		if strings.ContainsRune("\\`*_{}[]<>()#+!|&~", c) {
			b.WriteByte('\\')
		}
		b.WriteRune(c)
	}
	return b.String()
}

// markdownCode shows s as code, in a table too.
func markdownCode(s string) string {
	return "`" + strings.NewReplacer("`", "'", "|", "¦").Replace(plainText(s)) + "`"
}
