package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"sallyport/internal/admin"
	"sallyport/internal/metrics"
	"sallyport/policy"
	"sallyport/policy/event"
)

// A family is a metric as a scrape shows it.
type family struct {
	kind   string                     // counter, gauge, histogram
	labels map[string]map[string]bool // values by name
}

// families scrapes Metrics in which everything has counted something.
func families(t *testing.T) map[string]family {
	t.Helper()
	soon := time.Now().Add(time.Hour)
	m := metrics.New(metrics.Options{
		Version: "v1", Revision: "0123abc",
		Proxy: func() metrics.ProxyStats {
			return metrics.ProxyStats{MaxTunnels: 1, Handshakes: map[string]uint64{
				"closed": 1, "timeout": 1, "not_tls": 1, "no_client_certificate": 1, "bad_client_certificate": 1, "client_alert": 1, "protocol": 1,
			}}
		},
		Log: func() metrics.LogStats { return metrics.LogStats{} },
		Policy: func() metrics.PolicyStats {
			return metrics.PolicyStats{LoadedAt: soon, NextExpiry: soon, Observing: []metrics.Observing{{Group: "g", Until: soon}}}
		},
		Ready: func() bool { return true },
		Certificates: func() map[string]time.Time {
			return map[string]time.Time{"proxy.tls": soon, "dns.tls": soon, "admin.tls": soon}
		},
		Resolver: func() metrics.ResolverStats {
			return metrics.ResolverStats{Upstreams: []metrics.UpstreamStats{{RTT: time.Second}}, Limited: []metrics.Limited{
				{Limit: "responses", Action: "dropped"}, {Limit: "responses", Action: "truncated"}, {Limit: "queries", Action: "dropped"},
				{Limit: "queries", Action: "refused"}, {Limit: "lookups", Action: "crowded"}, {Limit: "tunnel", Action: "suspected"}, {Limit: "tunnel", Action: "refused"},
			}}
		},
	})
	m.ObserveDiscovery(func() metrics.DiscoveryStats { return metrics.DiscoveryStats{} })
	m.ObserveAdmin(admin.New(admin.Config{Metrics: http.NotFoundHandler()}).Refused)
	m.SetPolicy("r1", []string{"g"})
	m.SetReload(true, time.Now())
	for _, listener := range []string{"proxy", "proxy_tls", "dns", "dns_tls", "dns_https"} {
		for _, v := range []policy.Verdict{policy.Allow, policy.Deny, policy.Observe} {
			for _, r := range policy.Reasons() {
				m.Observe(&event.Event{
					Kind: event.Connect, Listener: listener, Decision: policy.Decision{Verdict: v, Reason: r, Group: "g"},
					Status: 200, ConnTime: time.Second, DNSTime: time.Second, Duration: time.Second,
				})
			}
		}
	}
	m.Observe(&event.Event{Kind: event.DNS})
	m.Observe(&event.Event{Kind: event.Config, Name: "policy", Duration: time.Second})
	rec := httptest.NewRecorder()
	m.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	all := map[string]family{}
	for _, typ := range regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)`).FindAllStringSubmatch(rec.Body.String(), -1) {
		all[typ[1]] = family{typ[2], map[string]map[string]bool{}}
	}
	label := regexp.MustCompile(`(\w+)="([^"]*)"`)
	for _, sample := range regexp.MustCompile(`(?m)^([a-z]\w*)\{(.*)\} `).FindAllStringSubmatch(rec.Body.String(), -1) {
		f := all[base(all, sample[1])]
		for _, l := range label.FindAllStringSubmatch(sample[2], -1) {
			if f.labels[l[1]] == nil {
				f.labels[l[1]] = map[string]bool{}
			}
			f.labels[l[1]][l[2]] = true
		}
	}
	return all
}

// base returns the metric that the series called name belongs to.
func base(all map[string]family, name string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if b, ok := strings.CutSuffix(name, suffix); ok && (all[b].kind == "histogram" || all[b].kind == "summary" && suffix != "_bucket") {
			return b
		}
	}
	return name
}

// TestEveryMetricIsSeen holds the scrape of families against the code: a metric that
// is new has to be given a value there, or nothing checks what is said of it.
func TestEveryMetricIsSeen(t *testing.T) {
	all := families(t)
	names, err := filepath.Glob(root + "/internal/metrics/*.go")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?:desc|newHistogram)\("(\w+)"`).FindAllSubmatch(text, -1) {
			if _, ok := all["sallyport_"+string(m[1])]; !ok {
				t.Errorf("%s: sallyport_%s has no sample in families", name, m[1])
			}
		}
	}
}

// TestMetricsTable holds the table in docs/metrics.md against the types and labels.
func TestMetricsTable(t *testing.T) {
	page := readDoc(t, "docs/metrics.md")
	for name, f := range families(t) {
		if !strings.HasPrefix(name, "sallyport_") {
			continue
		}
		row := regexp.MustCompile("(?m)^\\| `" + name + "` \\| ([^|]*)\\|([^|]*)\\|").FindStringSubmatch(page)
		if row == nil {
			t.Errorf("docs/metrics.md has no row of %s", name)
			continue
		}
		if !strings.HasPrefix(row[1], f.kind) {
			t.Errorf("docs/metrics.md: %s is a %s, not a %s", name, f.kind, row[1])
		}
		var labels []string
		for _, l := range regexp.MustCompile("`(\\w+)`").FindAllStringSubmatch(regexp.MustCompile(`\([^)]*\)`).ReplaceAllString(row[2], ""), -1) {
			labels = append(labels, l[1])
		}
		slices.Sort(labels)
		want := slices.DeleteFunc(slices.Sorted(maps.Keys(f.labels)), func(l string) bool { return l == "le" })
		if !slices.Equal(labels, want) {
			t.Errorf("docs/metrics.md: %s has the labels %v, not %v", name, want, labels)
		}
	}
}

// An expression is some PromQL, and where it stands.
type expression struct{ where, text string }

var (
	quoted     = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)
	grouping   = regexp.MustCompile(`\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)`)
	duration   = regexp.MustCompile(`\[[^\]]*\]|\boffset\s+\w+`)
	selector   = regexp.MustCompile(`([a-zA-Z_:][\w:]*)\s*(\{[^}]*\}|\()?`)
	matcher    = regexp.MustCompile(`(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"`)
	plain      = regexp.MustCompile(`^\w+(\|\w+)*$`)
	words      = []string{"and", "or", "unless", "bool"}
	fromScrape = []string{"job", "instance"} // labels that a scrape adds
)

// problems says what in e is about metrics, labels or values that are not in all.
func (e expression) problems(all map[string]family) (found []string) {
	text := duration.ReplaceAllString(e.text, "")
	known := map[string]bool{}
	for _, l := range fromScrape {
		known[l] = true
	}
	metrics := 0
	for _, m := range selector.FindAllStringSubmatch(grouping.ReplaceAllString(quoted.ReplaceAllStringFunc(text, hideBraces), ""), -1) {
		if m[2] == "(" || slices.Contains(words, m[1]) {
			continue
		}
		f, ok := all[base(all, m[1])]
		if m[1] == "up" {
			f, ok = family{}, true
		}
		if !ok {
			found = append(found, "no metric "+m[1])
			continue
		}
		metrics++
		for l := range f.labels {
			known[l] = true
		}
		for _, lm := range matcher.FindAllStringSubmatch(m[2], -1) {
			values, ok := f.labels[lm[1]]
			switch {
			case slices.Contains(fromScrape, lm[1]):
			case !ok:
				found = append(found, fmt.Sprintf("%s has no label %s", m[1], lm[1]))
			case plain.MatchString(lm[3]):
				for v := range strings.SplitSeq(lm[3], "|") {
					if !values[v] {
						found = append(found, fmt.Sprintf("%s of %s is never %q", lm[1], m[1], v))
					}
				}
			}
		}
	}
	if metrics == 0 {
		found = append(found, "no metric at all")
	}
	for _, g := range grouping.FindAllStringSubmatch(text, -1) {
		for l := range strings.SplitSeq(g[1], ",") {
			if l = strings.TrimSpace(l); l != "" && !known[l] {
				found = append(found, "no label "+l)
			}
		}
	}
	return found
}

// hideBraces keeps braces and parentheses inside a string from looking like syntax.
func hideBraces(s string) string {
	return strings.NewReplacer("{", "_", "}", "_", "(", "_", ")", "_").Replace(s)
}

// The check can fail.
func TestExpressionProblems(t *testing.T) {
	all := families(t)
	for text, want := range map[string]string{
		`rate(sallyport_decisions_total{verdict="deny",job=~"$job"}[5m]) > 0`:                        "",
		`sum by (group) (increase(sallyport_decisions_total{reason=~"connect_failed|not_tls"}[5m]))`: "",
		`histogram_quantile(0.9, sum by (le) (rate(sallyport_connect_duration_seconds_bucket[5m])))`: "",
		`process_open_fds / process_max_fds > 0.8 and on (instance) up == 1`:                         "",
		`rate(sallyport_decision_total[5m])`:                                                         "no metric sallyport_decision_total; no metric at all",
		`sallyport_tunnels_bucket`:                                                                   "no metric sallyport_tunnels_bucket; no metric at all",
		`sallyport_tunnels{group="g"}`:                                                               "sallyport_tunnels has no label group",
		`sum by (user) (sallyport_tunnels)`:                                                          "no label user",
		`sallyport_decisions_total{verdict="denied"}`:                                                `verdict of sallyport_decisions_total is never "denied"`,
		`sallyport_decisions_total{reason=~"not_tls|nonsense"}`:                                      `reason of sallyport_decisions_total is never "nonsense"`,
		`vector(1)`: "no metric at all",
	} {
		if got := strings.Join(expression{"", text}.problems(all), "; "); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}

// alert is one rule of deploy/prometheus/alerts.yaml.
type alert struct {
	Alert       string
	Expr        string
	Labels      map[string]string
	Annotations map[string]string
}

func readAlerts(t *testing.T) (alerts []alert) {
	t.Helper()
	var doc struct {
		Groups []struct{ Rules []alert }
	}
	if err := yaml.Unmarshal([]byte(readDoc(t, "deploy/prometheus/alerts.yaml")), &doc); err != nil {
		t.Fatal(err)
	}
	for _, g := range doc.Groups {
		alerts = append(alerts, g.Rules...)
	}
	if len(alerts) == 0 {
		t.Fatal("no alerts")
	}
	return alerts
}

// readPanels returns every expression of the dashboard.
func readPanels(t *testing.T) (all []expression) {
	t.Helper()
	type panel struct {
		Title   string
		Targets []struct{ Expr string }
	}
	var doc struct {
		Panels      []panel
		Annotations struct {
			List []struct{ Name, Expr string }
		}
	}
	if err := json.Unmarshal([]byte(readDoc(t, "deploy/grafana/sallyport.json")), &doc); err != nil {
		t.Fatal(err)
	}
	for _, p := range doc.Panels {
		for _, target := range p.Targets {
			all = append(all, expression{"panel " + p.Title, target.Expr})
		}
	}
	for _, a := range doc.Annotations.List {
		all = append(all, expression{"annotation " + a.Name, a.Expr})
	}
	if len(all) < 20 {
		t.Fatalf("only %d expressions in the dashboard", len(all))
	}
	return all
}

// documented returns the PromQL of the documentation.
func documented(t *testing.T) (all []expression) {
	for _, block := range regexp.MustCompile("(?s)```promql\n(.*?)```").FindAllStringSubmatch(readDoc(t, "docs/metrics.md"), -1) {
		for text := range strings.SplitSeq(block[1], "\n\n") {
			all = append(all, expression{"docs/metrics.md", regexp.MustCompile(`(?m)^#.*$`).ReplaceAllString(text, "")})
		}
	}
	if len(all) == 0 {
		t.Fatal("docs/metrics.md has no promql")
	}
	return all
}

// TestDashboardsAndAlertsMatchMetrics holds every expression in deploy and in the documentation
// against the metrics that there are.
func TestDashboardsAndAlertsMatchMetrics(t *testing.T) {
	all := families(t)
	expressions := append(readPanels(t), documented(t)...)
	for _, a := range readAlerts(t) {
		expressions = append(expressions, expression{"alert " + a.Alert, a.Expr})
	}
	used := map[string]bool{}
	for _, e := range expressions {
		for _, p := range e.problems(all) {
			t.Errorf("%s: %s: %s", e.where, p, e.text)
		}
		for _, name := range regexp.MustCompile(`\bsallyport_\w+`).FindAllString(e.text, -1) {
			used[base(all, name)] = true
		}
	}
	for name := range all {
		if strings.HasPrefix(name, "sallyport_") && !used[name] {
			t.Errorf("%s is in no panel, alert or example: who looks at it?", name)
		}
	}
}

// TestAlertsAreComplete wants, for each alert, a severity, a summary, a section that
// says what to do, and test cases in which it fires and does not.
func TestAlertsAreComplete(t *testing.T) {
	operations := readDoc(t, "docs/operations.md")
	var tests struct {
		Tests []struct {
			AlertRuleTest []struct {
				Alertname string
				ExpAlerts []any `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		}
	}
	if err := yaml.Unmarshal([]byte(readDoc(t, "deploy/prometheus/alerts_test.yaml")), &tests); err != nil {
		t.Fatal(err)
	}
	fires, quiet := map[string]bool{}, map[string]bool{}
	for _, group := range tests.Tests {
		for _, c := range group.AlertRuleTest {
			if len(c.ExpAlerts) > 0 {
				fires[c.Alertname] = true
			} else {
				quiet[c.Alertname] = true
			}
		}
	}
	for _, a := range readAlerts(t) {
		if !slices.Contains([]string{"page", "ticket"}, a.Labels["severity"]) {
			t.Errorf("%s: severity %q", a.Alert, a.Labels["severity"])
		}
		if a.Annotations["summary"] == "" || a.Annotations["runbook"] != "docs/operations.md#"+strings.ToLower(a.Alert) {
			t.Errorf("%s: annotations %v", a.Alert, a.Annotations)
		}
		if !regexp.MustCompile(`(?m)^### ` + a.Alert + `$`).MatchString(operations) {
			t.Errorf("docs/operations.md does not say what to do about %s", a.Alert)
		}
		if !fires[a.Alert] || !quiet[a.Alert] {
			t.Errorf("alerts_test.yaml: %s fires: %v, stays quiet: %v; want a case of each", a.Alert, fires[a.Alert], quiet[a.Alert])
		}
	}
}

// promtool runs Prometheus' own checks.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("promtool", args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func needPromtool(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil {
		t.Skip("no promtool here, which Debian has in the package prometheus: ", err)
	}
}

// TestPromtool has Prometheus' own tool read the alerts, run their tests, and parse
// each expression of the dashboard and the documentation.
func TestPromtool(t *testing.T) {
	needPromtool(t)
	promtool(t, "check", "rules", root+"/deploy/prometheus/alerts.yaml")
	promtool(t, "test", "rules", root+"/deploy/prometheus/alerts_test.yaml")

	type rule struct {
		Record string
		Expr   string
	}
	var rules []rule
	// What Grafana puts in.
	variables := strings.NewReplacer("$__rate_interval", "1m", "$job", "a", "$instance", "b", "$group", "c")
	for i, e := range append(readPanels(t), documented(t)...) {
		rules = append(rules, rule{fmt.Sprintf("panel:%d", i), strings.TrimSpace(variables.Replace(e.text))})
	}
	text, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "panels", "rules": rules}}})
	if err != nil {
		t.Fatal(err)
	}
	if i := bytes.IndexByte(text, '$'); i >= 0 {
		t.Errorf("a variable nobody knows: %s", text[i:min(len(text), i+40)])
	}
	file := filepath.Join(t.TempDir(), "panels.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file)
}
