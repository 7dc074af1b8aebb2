package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/admin"
	"sallyport/internal/live"
	"sallyport/policy"
)

func newTop() *cobra.Command {
	var a adminFlags
	var once bool
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show what a running gate does, over its admin API",
		Long: "Show what a running gate does, over its admin API: rates, the names asked for and\n" +
			"denied most in the last half hour to hour (the tables say since when), tunnels, the\n" +
			"last decisions. q quits, space refreshes at once. With --once, or where there is no\n" +
			"terminal, it prints one snapshot. sallyport report looks back further.",
		Example: "  sallyport top\n" +
			"  sallyport top --once --admin https://gate.corp.example:9128 --token-file token",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return usageError(err)
			}
			defer c.close()
			if every < minTopPause || every > maxTopPause {
				return usageError(fmt.Errorf("--interval %s: write %s to %s", every, minTopPause, maxTopPause))
			}
			in, inFile := cmd.InOrStdin().(*os.File)
			out, outFile := cmd.OutOrStdout().(*os.File)
			if !once && inFile && outFile && isScreen(in, out) {
				return failure(showTop(cmd.Context(), c, in, out, every))
			}
			s, err := c.snapshot(cmd.Context())
			if err != nil {
				return failure(err)
			}
			_, err = io.WriteString(cmd.OutOrStdout(), strings.Join(s.lines(layout{names: 10, tunnels: 10, decisions: 20}), "\n")+"\n")
			return err
		},
	}
	a.add(cmd)
	f := cmd.Flags()
	f.BoolVar(&once, "once", false, "print one snapshot and end")
	f.DurationVar(&every, "interval", 2*time.Second, "time from one refresh to the next")
	return cmd
}

const (
	minTopPause = 100 * time.Millisecond
	maxTopPause = time.Hour
	topRows     = 100 // of each table, at most
)

// A snapshot is what top shows.
type snapshot struct {
	at     time.Time
	status struct {
		Ready, Draining bool
		Version, Node   string
		Policy          struct{ Revision string }
		Uptime          float64 `json:"uptime_seconds"`
		LogDropped      uint64  `json:"log_dropped"`
	}
	series        admin.Series
	names, denied live.Top
	tunnels       struct {
		Total   int
		Tunnels []admin.Tunnel
	}
	decisions struct{ Decisions []live.Decision }
}

// snapshot asks for everything.
func (c *adminClient) snapshot(ctx context.Context) (*snapshot, error) {
	s := &snapshot{at: time.Now()}
	limit := strconv.Itoa(topRows)
	for _, part := range []struct {
		path string
		to   any
	}{
		{"status", &s.status}, {"series?minutes=1", &s.series}, {"top?by=name&n=" + limit, &s.names}, {"top?by=denied&n=" + limit, &s.denied},
		{"tunnels?limit=" + limit, &s.tunnels}, {"decisions?limit=" + limit, &s.decisions},
	} {
		if err := c.get(ctx, part.path, part.to); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// A layout says how many rows of each table there is room for.
type layout struct {
	names, tunnels, decisions int
}

// layoutOf divides a screen.
func layoutOf(height int) layout {
	rows := max(0, height-topFixed)
	l := layout{names: rows * 3 / 10, tunnels: rows * 2 / 10}
	l.decisions = rows - l.names - l.tunnels
	return l
}

// topFixed are the lines of a screen that are no rows of a table.
const topFixed = 9

// lines returns the snapshot as lines of printable ASCII.
func (s *snapshot) lines(l layout) []string {
	st := &s.status
	state := "ready"
	switch {
	case st.Draining:
		state = "draining"
	case !st.Ready:
		state = "not ready"
	}
	out := []string{
		fmt.Sprintf("sallyport %s on %s   %s   policy %s   up %s   %d tunnels   %d log lines lost",
			clean(st.Version, 40), clean(st.Node, 60), state, clean(st.Policy.Revision, 20), time.Duration(st.Uptime)*time.Second, s.tunnels.Total, st.LogDropped),
		s.rates(), "",
	}
	names, denied := s.talkers(&s.names, l.names, "NAME"), s.talkers(&s.denied, l.names, "DENIED")
	for i := range max(len(names), len(denied)) {
		out = append(out, strings.TrimRight(fmt.Sprintf("%-58s  %s", at(names, i), at(denied, i)), " "))
	}
	out = append(out, "", fmt.Sprintf("%-8s %-24s %-16s %-40s %9s %9s  %s", "TUNNEL", "SOURCE", "GROUP", "DESTINATION", "UP", "DOWN", "ID"))
	for i, t := range s.tunnels.Tunnels {
		if i == l.tunnels {
			break
		}
		out = append(out, fmt.Sprintf("%-8s %-24s %-16s %-40s %9s %9s  %s", age(s.at.Sub(t.Since)), clean(t.Src, 24), clean(t.Group, 16),
			clean(t.Name, 33)+":"+strconv.Itoa(int(t.Port)), quantity(float64(t.BytesUp)), quantity(float64(t.BytesDown)), clean(t.ID, 40)))
	}
	out = append(out, "", fmt.Sprintf("%-8s %-7s %-20s %-24s %-16s %s", "TIME", "VERDICT", "REASON", "SOURCE", "GROUP", "NAME"))
	for i := range s.decisions.Decisions {
		d := &s.decisions.Decisions[i]
		if i == l.decisions {
			break
		}
		what := clean(d.Name, 200)
		if d.Port != 0 {
			what += ":" + strconv.Itoa(int(d.Port))
		}
		if d.QType != "" {
			what += " " + clean(d.QType, 20)
		}
		out = append(out, fmt.Sprintf("%-8s %-7s %-20s %-24s %-16s %s", d.Time.Local().Format(time.TimeOnly), clean(d.Verdict, 7), clean(d.Reason, 20),
			clean(d.Src, 24), clean(d.Group, 16), what))
	}
	return out
}

// rates returns the last step of the series in a line.
func (s *snapshot) rates() string {
	r := &s.series
	verdicts := func(v *admin.Verdicts) string {
		return fmt.Sprintf("allow %s  deny %s  observe %s", quantity(last(v.Allow)), quantity(last(v.Deny)), quantity(last(v.Observe)))
	}
	return fmt.Sprintf("a second: connections %s   queries %s   bytes up %s  down %s", verdicts(&r.Decisions), verdicts(&r.DNSQueries),
		quantity(last(r.BytesUp)), quantity(last(r.BytesDown)))
}

func last(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	return v[len(v)-1]
}

// at returns line i, or nothing.
func at(lines []string, i int) string {
	if i < len(lines) {
		return lines[i]
	}
	return ""
}

// talkers returns a table.
func (s *snapshot) talkers(t *live.Top, rows int, title string) []string {
	out := []string{fmt.Sprintf("%9s  %s, LAST %.0f MINUTES", "COUNT", title, math.Ceil(s.at.Sub(t.Since).Minutes()))}
	for i, k := range t.Talkers {
		if i == rows {
			break
		}
		line := fmt.Sprintf("%9s  %s", quantity(float64(k.Count)), clean(k.Key, 44))
		if title == "DENIED" {
			line = fmt.Sprintf("%9s  %-36s %s, %s", quantity(float64(k.Count)), clean(k.Key, 36), clean(k.Group, 16), clean(k.Reason, 20))
			if k.Verdict == policy.Observe.String() {
				line += " (passed: observed)"
			}
		}
		out = append(out, line)
	}
	return out
}

// clean returns s as printable ASCII of at most limit characters: whatever somebody
// has asked for, it moves no cursor and changes no colour.
func clean(s string, limit int) string {
	q := strconv.QuoteToASCII(s[:min(len(s), 4*limit)])
	q = q[1 : len(q)-1]
	if len(q) > limit {
		q = q[:max(0, limit-2)] + ".."
	}
	return q
}

// age returns d in about five characters.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours())/24)
}

// quantity returns n in at most seven characters.
func quantity(n float64) string {
	for _, u := range []struct {
		of   float64
		unit string
	}{{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e4, "k"}} {
		if n >= u.of {
			by := u.of
			if u.unit == "k" {
				by = 1e3
			}
			return strconv.FormatFloat(n/by, 'f', 1, 64) + u.unit
		}
	}
	if n == float64(int64(n)) {
		return strconv.FormatInt(int64(n), 10)
	}
	return strconv.FormatFloat(n, 'f', 1, 64)
}
