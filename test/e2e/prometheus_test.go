package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPrometheus has a real Prometheus scrape the gate, and asks it what it knows: counts, rules of ours, and the event
// behind a bucket.
func TestPrometheus(t *testing.T) {
	for _, name := range []string{"prometheus", "promtool"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("no %s here, which Debian has in the package prometheus: %v", name, err)
		}
	}
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	m := g.mark()
	if out, code := g.curl(ciSource, "--cacert", w.caFile, fmt.Sprintf("https://api.ok.test:%d/", w.tlsPort)); code != 0 {
		t.Fatalf("curl: %d %s", code, out)
	}
	ev := g.line(m, map[string]any{"event": "connect", "verdict": "allow"})
	g.curl(ciSource, "https://other.test/")
	g.line(m, map[string]any{"event": "connect", "verdict": "deny"})

	t.Run("promtool check metrics", func(t *testing.T) {
		cmd := exec.Command("promtool", "check", "metrics")
		cmd.Stdin = strings.NewReader(g.metrics())
		out, err := cmd.CombinedOutput()
		if code := exitCode(err); code != 0 && code != 3 { // 3: matters of taste, which the Go runtime's metrics have
			t.Errorf("promtool: %v: %s", err, out)
		}
		for line := range strings.Lines(string(out)) {
			if strings.HasPrefix(line, "sallyport_") {
				t.Errorf("promtool: %s", line)
			}
		}
	})

	dir := t.TempDir()
	rules, err := filepath.Abs("../../deploy/prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
  - job_name: sallyport
    static_configs: [{targets: [%q]}]
`, rules, g.admin)
	if err := os.WriteFile(dir+"/prometheus.yml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	l := listen(t, "127.0.0.1:0") // a port that is free, and stays so by all likelihood
	addr := l.Addr().String()
	l.Close()
	cmd := exec.Command("prometheus", "--config.file="+dir+"/prometheus.yml", "--storage.tsdb.path="+dir+"/data",
		"--web.listen-address="+addr, "--enable-feature=exemplar-storage", "--log.level=warn")
	log, err := os.Create(dir + "/log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(dir + "/log")
			t.Logf("prometheus: %s", b)
		}
	})
	// ask returns what the API answers, as JSON.
	ask := func(path string, query url.Values) string {
		resp, err := http.Get("http://" + addr + "/api/v1/" + path + "?" + query.Encode())
		if err != nil {
			return ""
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		var answer struct {
			Status string
			Data   json.RawMessage
		}
		if json.Unmarshal(body, &answer) != nil || answer.Status != "success" {
			return ""
		}
		return string(answer.Data)
	}
	for query, want := range map[string]string{
		`up{job="sallyport"} == 1`: `"1"]`,
		`sallyport_decisions_total{listener="proxy",group="ci",verdict="allow",reason="matched"} == 1`:   `"1"]`,
		`sallyport_decisions_total{listener="proxy",group="ci",verdict="deny",reason="not_listed"} == 1`: `"1"]`,
		`sallyport_connect_duration_seconds_count == 1`:                                                  `"1"]`,
		`sallyport_ready == 1`:                   `"1"]`,
		`process_open_fds / process_max_fds < 1`: `"value"`,
	} {
		g.until(query, func() bool { return strings.Contains(ask("query", url.Values{"query": {query}}), want) })
	}
	g.until("the event of a bucket", func() bool {
		return strings.Contains(ask("query_exemplars", url.Values{"query": {"sallyport_connect_duration_seconds_bucket"}, "start": {"0"}, "end": {"9999999999"}}),
			fmt.Sprintf(`"event_id":"%v"`, ev["id"]))
	})
	g.until("rules", func() bool {
		r := ask("rules", nil)
		return strings.Contains(r, "SallyportDenialsJump") && !strings.Contains(r, `"health":"err"`) && !strings.Contains(r, `"health":"unknown"`)
	})
}
