package metrics

import (
	"fmt"
	"io"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

const openMetrics = "application/openmetrics-text;version=1.0.0"

// get scrapes in the format that accept asks for.
func get(t testing.TB, m *Metrics, accept string) string {
	t.Helper()
	r := httptest.NewRequest("GET", "/metrics", nil)
	r.Header.Set("Accept", accept)
	rec := httptest.NewRecorder()
	m.Handler().ServeHTTP(rec, r)
	if rec.Code != 200 {
		t.Fatalf("status %d\n%s", rec.Code, rec.Body)
	}
	return rec.Body.String()
}

// An event leads from a bucket to the log: the first of each second.
func TestExemplars(t *testing.T) {
	m := New(Options{})
	at := time.Unix(1700000000, 0)
	for i, took := range []time.Duration{20, 20, 700, 20} { // ms
		ev := connect("ci", policy.Allow, policy.ReasonMatched)
		ev.ID, ev.Time, ev.ConnTime = fmt.Sprintf("node-%d", i), at.Add(time.Duration(i)*300*time.Millisecond), took*time.Millisecond
		m.Observe(ev)
	}
	page := get(t, m, openMetrics)
	if !strings.HasSuffix(page, "# EOF\n") {
		t.Errorf("not OpenMetrics: …%q", page[max(0, len(page)-100):])
	}
	for le, want := range map[string]string{"0.025": "node-0", "1.0": "node-2"} {
		line := regexp.MustCompile(`(?m)^sallyport_connect_duration_seconds_bucket\{le="` + regexp.QuoteMeta(le) + `"\} .*$`).FindString(page)
		if !strings.Contains(line, `# {event_id="`+want+`"}`) {
			t.Errorf("bucket %s: %q, want the exemplar %s", le, line, want)
		}
	}
	ev := connect("ci", policy.Allow, policy.ReasonMatched)
	ev.ID, ev.Time = "node-9", at.Add(5*time.Second)
	m.Observe(ev)
	if page := get(t, m, openMetrics); !strings.Contains(page, `{event_id="node-9"}`) {
		t.Error("a later event is no exemplar")
	}
	if page := get(t, m, "text/plain"); strings.Contains(page, "event_id") {
		t.Error("Prometheus' text format has no exemplars")
	}
}

// thousand returns Metrics of 1,000 groups, each with what a group does in practice.
func thousand() *Metrics {
	groups := make([]string, 1000)
	observing := make([]Observing, 0, 100)
	for i := range groups {
		groups[i] = fmt.Sprintf("team-%03d-production", i)
		if i%10 == 0 {
			observing = append(observing, Observing{groups[i], time.Unix(1800000000, 0)})
		}
	}
	m := New(Options{
		Proxy: func() ProxyStats { return ProxyStats{} }, Log: func() LogStats { return LogStats{} },
		Policy: func() PolicyStats { return PolicyStats{Groups: len(groups), Observing: observing} },
	})
	m.SetPolicy("r1", groups)
	for _, g := range groups {
		for _, d := range []struct {
			listener string
			verdict  policy.Verdict
			reason   policy.Reason
		}{
			{"proxy", policy.Allow, policy.ReasonMatched}, {"proxy", policy.Deny, policy.ReasonNotListed},
			{"proxy", policy.Deny, policy.ReasonExplicitDeny}, {"proxy", policy.Deny, policy.ReasonSNIMismatch},
			{"proxy", policy.Deny, policy.ReasonConnectFailed}, {"proxy", policy.Deny, policy.ReasonResolveFailed},
			{"proxy", policy.Deny, policy.ReasonIPLiteral}, {"dns", policy.Allow, policy.ReasonMatched},
			{"dns", policy.Deny, policy.ReasonNotListed}, {"dns", policy.Deny, policy.ReasonExplicitDeny},
			{"dns", policy.Deny, policy.ReasonQTypeNotAllowed}, {"dns", policy.Deny, policy.ReasonResolveFailed},
		} {
			m.Observe(&event.Event{Kind: event.Connect, Listener: d.listener, Decision: policy.Decision{Verdict: d.verdict, Reason: d.reason, Group: g}, ConnTime: time.Millisecond})
		}
	}
	return m
}

// BenchmarkScrape scrapes 1,000 groups with 12 series each, as Prometheus does.
func BenchmarkScrape(b *testing.B) {
	m := thousand()
	h := m.Handler()
	for _, encoding := range []string{"identity", "gzip"} {
		b.Run(encoding, func(b *testing.B) {
			r := httptest.NewRequest("GET", "/metrics", nil)
			r.Header.Set("Accept", openMetrics)
			r.Header.Set("Accept-Encoding", encoding)
			b.ReportAllocs()
			for b.Loop() {
				rec := httptest.NewRecorder()
				h.ServeHTTP(rec, r)
				n, _ := io.Copy(io.Discard, rec.Body)
				b.ReportMetric(float64(n), "bytes/scrape")
			}
		})
	}
}

// BenchmarkObserveExemplar is an event a second apart from the one before, so that
// each becomes an exemplar: the worst case.
func BenchmarkObserveExemplar(b *testing.B) {
	m := New(Options{})
	m.SetPolicy("r1", []string{"ci"})
	ev := connect("ci", policy.Allow, policy.ReasonMatched)
	ev.ID = "abcdefgh-1"
	b.ReportAllocs()
	for b.Loop() {
		ev.Time = ev.Time.Add(time.Second)
		m.Observe(ev)
	}
}
