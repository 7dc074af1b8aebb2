package metrics

import (
	"fmt"
	"io"
	"maps"
	"net/http/httptest"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// scrape returns the samples of ours but for the buckets, by their text.
func scrape(t *testing.T, m *Metrics) map[string]string {
	t.Helper()
	rec := httptest.NewRecorder()
	m.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	body, err := io.ReadAll(rec.Result().Body)
	if err != nil || rec.Code != 200 {
		t.Fatalf("status %d, %v\n%s", rec.Code, err, body)
	}
	samples := map[string]string{}
	for line := range strings.Lines(string(body)) {
		if i := strings.LastIndexByte(line, ' '); strings.HasPrefix(line, "sallyport_") && !strings.Contains(line, "_bucket{") {
			samples[line[:i]] = strings.TrimSpace(line[i+1:])
		}
	}
	return samples
}

func connect(group string, v policy.Verdict, r policy.Reason) *event.Event {
	return &event.Event{
		Kind: event.Connect, Listener: "proxy", Decision: policy.Decision{Verdict: v, Reason: r, Group: group},
		BytesUp: 10, BytesDown: 200, ConnTime: 20 * time.Millisecond,
	}
}

func query(qtype, rcode string) *event.Event {
	return &event.Event{Kind: event.DNS, Listener: "dns", QType: qtype, RCode: rcode, Decision: policy.Decision{Reason: policy.ReasonNotListed, Group: "ci"}}
}

func TestScrape(t *testing.T) {
	m := New(Options{
		Version: "v1", Revision: "0123abc",
		Proxy: func() ProxyStats {
			return ProxyStats{Connections: 6, MaxTunnels: 100, Panics: 2, Handshakes: map[string]uint64{"timeout": 7},
				Tunnels: 3, Up: 40, Down: 800, AcceptErrors: 11, AcceptPauses: 12}
		},
		Certificates: func() map[string]time.Time {
			return map[string]time.Time{"proxy.tls": time.Unix(1800000000, 0), "dns.tls": time.Unix(1900000000, 0), "admin.tls": {}}
		},
		Log: func() LogStats { return LogStats{Dropped: 4, Lines: 5, Bytes: 600} },
		Policy: func() PolicyStats {
			return PolicyStats{Groups: 1, Rules: 2, Names: 3, LoadedAt: time.Unix(1600000000, 0), LastGood: true, NextExpiry: time.Unix(1900000000, 0),
				Observing: []Observing{{"legacy", time.Unix(1800000001, 0)}}}
		},
		Ready: func() bool { return true },
		Resolver: func() ResolverStats {
			return ResolverStats{Hits: 5, Misses: 6, Stale: 7, Dropped: 8, Malformed: 9, Failures: 10, Ignored: 11, Prefetched: 12, Limited: []Limited{{"queries", "dropped", 13}}, Upstreams: []UpstreamStats{
				{Upstream: "192.0.2.53", Up: true, RTT: 20 * time.Millisecond, Queries: 5, Failures: 2}, {Zone: "corp.test", Index: 1, Upstream: "tcp://10.0.0.53", Queries: 1, Failures: 1},
			}}
		},
	})
	m.SetPolicy("r1", []string{"ci"})
	m.SetReload(true, time.Unix(1700000000, 5e8))
	m.Observe(connect("ci", policy.Allow, policy.ReasonMatched))
	m.Observe(connect("ci", policy.Allow, policy.ReasonMatched))
	m.Observe(connect("ci", policy.Observe, policy.ReasonNotListed))
	m.Observe(connect("", policy.Deny, policy.ReasonUnmatchedSource))
	m.Observe(query("A", "REFUSED"))
	m.Observe(query("TYPE65400", "RCODE4095"))
	m.Observe(&event.Event{Kind: event.Config, Name: "policy", Duration: 250 * time.Millisecond})
	m.Observe(&event.Event{Kind: event.Config, Name: "settings", Error: "no"})
	ended := connect("ci", policy.Allow, policy.ReasonMatched)
	ended.Status, ended.DNSTime, ended.Duration = 200, 2*time.Millisecond, time.Minute
	m.Observe(ended)
	want := map[string]string{
		`sallyport_decisions_total{group="ci",listener="proxy",reason="matched",verdict="allow"}`:       "3",
		`sallyport_decisions_total{group="ci",listener="proxy",reason="not_listed",verdict="observe"}`:  "1",
		`sallyport_decisions_total{group="ci",listener="dns",reason="not_listed",verdict="deny"}`:       "2",
		`sallyport_decisions_total{group="",listener="proxy",reason="unmatched_source",verdict="deny"}`: "1",
		`sallyport_tunnels`:                                                                                  "3",
		`sallyport_bytes_total{direction="up"}`:                                                              "40",
		`sallyport_bytes_total{direction="down"}`:                                                            "800",
		`sallyport_accept_errors_total`:                                                                      "11",
		`sallyport_accept_pauses_total`:                                                                      "12",
		`sallyport_connect_duration_seconds_sum`:                                                             "0.1",
		`sallyport_connect_duration_seconds_count`:                                                           "5",
		`sallyport_resolve_duration_seconds_sum`:                                                             "0.002",
		`sallyport_resolve_duration_seconds_count`:                                                           "1",
		`sallyport_tunnel_duration_seconds_sum`:                                                              "60",
		`sallyport_tunnel_duration_seconds_count`:                                                            "1",
		`sallyport_policy_load_duration_seconds_sum`:                                                         "0.25",
		`sallyport_policy_load_duration_seconds_count`:                                                       "1",
		`sallyport_reloads_total{result="ok",what="policy"}`:                                                 "1",
		`sallyport_reloads_total{result="failed",what="policy"}`:                                             "0",
		`sallyport_reloads_total{result="ok",what="settings"}`:                                               "0",
		`sallyport_reloads_total{result="failed",what="settings"}`:                                           "1",
		`sallyport_reloads_total{result="ok",what="users"}`:                                                  "0",
		`sallyport_reloads_total{result="failed",what="users"}`:                                              "0",
		`sallyport_reloads_total{result="ok",what="certificates"}`:                                           "0",
		`sallyport_reloads_total{result="failed",what="certificates"}`:                                       "0",
		`sallyport_policy_groups`:                                                                            "1",
		`sallyport_policy_rules`:                                                                             "2",
		`sallyport_policy_names`:                                                                             "3",
		`sallyport_policy_loaded_timestamp_seconds`:                                                          "1.6e+09",
		`sallyport_policy_last_good`:                                                                         "1",
		`sallyport_policy_next_expiry_timestamp_seconds`:                                                     "1.9e+09",
		`sallyport_group_observe_until_timestamp_seconds{group="legacy"}`:                                    "1.800000001e+09",
		`sallyport_ready`:                                                                                    "1",
		`sallyport_connections`:                                                                              "6",
		`sallyport_tunnels_limit`:                                                                            "100",
		`sallyport_panics_total`:                                                                             "2",
		`sallyport_tls_handshake_failures_total{cause="timeout"}`:                                            "7",
		`sallyport_tls_certificate_expiry_timestamp_seconds{section="proxy.tls"}`:                            "1.8e+09",
		`sallyport_tls_certificate_expiry_timestamp_seconds{section="dns.tls"}`:                              "1.9e+09",
		`sallyport_tls_certificate_expiry_timestamp_seconds{section="admin.tls"}`:                            "",
		`sallyport_log_queue_lines`:                                                                          "5",
		`sallyport_log_queue_bytes`:                                                                          "600",
		`sallyport_dns_dropped_total`:                                                                        "8",
		`sallyport_dns_malformed_total`:                                                                      "9",
		`sallyport_dns_upstream_failures_total`:                                                              "10",
		`sallyport_dns_queries_total{qtype="A",rcode="REFUSED",verdict="deny"}`:                              "1",
		`sallyport_dns_queries_total{qtype="other",rcode="other",verdict="deny"}`:                            "1",
		`sallyport_dns_cache_total{result="hit"}`:                                                            "5",
		`sallyport_dns_cache_total{result="miss"}`:                                                           "6",
		`sallyport_dns_cache_total{result="stale"}`:                                                          "7",
		`sallyport_policy_info{revision="r1"}`:                                                               "1",
		`sallyport_policy_last_reload_success`:                                                               "1",
		`sallyport_policy_last_reload_timestamp_seconds`:                                                     "1.7000000005e+09",
		`sallyport_log_dropped_total`:                                                                        "4",
		`sallyport_dns_upstream_ignored_total`:                                                               "11",
		`sallyport_dns_limited_total{action="dropped",limit="queries"}`:                                      "13",
		`sallyport_dns_prefetch_total`:                                                                       "12",
		`sallyport_dns_upstream_up{index="0",upstream="192.0.2.53",zone=""}`:                                 "1",
		`sallyport_dns_upstream_up{index="1",upstream="tcp://10.0.0.53",zone="corp.test"}`:                   "0",
		`sallyport_dns_upstream_rtt_seconds{index="0",upstream="192.0.2.53",zone=""}`:                        "0.02",
		`sallyport_dns_upstream_exchanges_total{index="0",result="answered",upstream="192.0.2.53",zone=""}`:  "3",
		`sallyport_dns_upstream_exchanges_total{index="0",result="failed",upstream="192.0.2.53",zone=""}`:    "2",
		fmt.Sprintf(`sallyport_build_info{goversion=%q,revision="0123abc",version="v1"}`, runtime.Version()): "1",
	}
	if got := scrape(t, m); !maps.Equal(got, want) {
		for _, k := range slices.Sorted(maps.Keys(got)) {
			t.Logf("got  %s %s", k, got[k])
		}
		for _, k := range slices.Sorted(maps.Keys(want)) {
			if got[k] != want[k] {
				t.Errorf("want %s %s", k, want[k])
			}
		}
	}
	m.SetReload(false, time.Unix(1700000001, 0))
	if got := scrape(t, m)["sallyport_policy_last_reload_success"]; got != "0" {
		t.Errorf("after a failed reload policy_last_reload_success = %s", got)
	}
}

// A policy that is replaced takes the series of its vanished groups with it.
func TestReplacedPolicy(t *testing.T) {
	m := New(Options{})
	m.SetPolicy("r1", []string{"kept", "gone"})
	for range 3 {
		m.Observe(connect("kept", policy.Allow, policy.ReasonMatched))
		m.Observe(connect("gone", policy.Allow, policy.ReasonMatched))
	}
	m.SetPolicy("r2", []string{"kept", "new"})
	m.Observe(connect("kept", policy.Allow, policy.ReasonMatched))
	m.Observe(connect("gone", policy.Allow, policy.ReasonMatched)) // a tunnel that outlived its group
	m.Observe(connect("new", policy.Allow, policy.ReasonMatched))
	got := scrape(t, m)
	maps.DeleteFunc(got, func(k, _ string) bool {
		return !strings.HasPrefix(k, "sallyport_decisions") && !strings.HasPrefix(k, "sallyport_policy_info")
	})
	want := map[string]string{
		`sallyport_decisions_total{group="kept",listener="proxy",reason="matched",verdict="allow"}`: "4",
		`sallyport_decisions_total{group="new",listener="proxy",reason="matched",verdict="allow"}`:  "1",
		`sallyport_decisions_total{group="",listener="proxy",reason="matched",verdict="allow"}`:     "1",
		`sallyport_policy_info{revision="r2"}`:                                                      "1",
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
}

// Whatever clients send, the number of series stays.
func TestClosedLabels(t *testing.T) {
	m := New(Options{})
	m.SetPolicy("r1", []string{"ci"})
	for i := range 1000 {
		s := fmt.Sprintf("x%d", i)
		ev := query(s, s)
		ev.Listener, ev.Name, ev.Method, ev.User, ev.Decision.Group, ev.Decision.Rule = s, s, s, s, s, s
		ev.Decision.Reason, ev.Decision.Verdict = policy.Reason(i), policy.Verdict(i%3)
		m.Observe(ev)
	}
	odd := regexp.MustCompile(`"x\d`)
	for k := range scrape(t, m) {
		if odd.MatchString(k) {
			t.Errorf("a client chose the label of %s", k)
		}
	}
}

// Each reason has a counter of its own.
func TestEveryReason(t *testing.T) {
	m := New(Options{})
	for _, r := range policy.Reasons() {
		if r >= maxReasons {
			t.Fatalf("maxReasons has no room for %s", r)
		}
		m.Observe(connect("", policy.Deny, r))
	}
	got := scrape(t, m)
	for _, r := range policy.Reasons() {
		k := fmt.Sprintf(`sallyport_decisions_total{group="",listener="proxy",reason=%q,verdict="deny"}`, r)
		if got[k] != "1" {
			t.Errorf("%s = %q, want 1", k, got[k])
		}
	}
}

func TestConcurrently(t *testing.T) {
	m := New(Options{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 500 {
				m.Observe(connect("ci", policy.Allow, policy.ReasonMatched))
				m.Observe(query("A", "NOERROR"))
				if i%100 == 0 {
					m.SetPolicy(fmt.Sprint(i), []string{"ci"})
					m.SetReload(true, time.Now())
					scrape(t, m)
				}
			}
		})
	}
	wg.Wait()
	if got := scrape(t, m)[`sallyport_dns_queries_total{qtype="A",rcode="NOERROR",verdict="deny"}`]; got != "2000" {
		t.Errorf("%s queries counted, want 2000", got)
	}
}

func TestAllocations(t *testing.T) {
	m := New(Options{})
	m.SetPolicy("r1", []string{"ci"})
	tunnel, dns := connect("ci", policy.Allow, policy.ReasonMatched), query("AAAA", "NXDOMAIN")
	if n := testing.AllocsPerRun(100, func() { m.Observe(tunnel); m.Observe(dns) }); n != 0 {
		t.Errorf("%v allocations for two events, want 0", n)
	}
}

func BenchmarkObserve(b *testing.B) {
	m := New(Options{})
	m.SetPolicy("r1", []string{"ci"})
	ev := connect("ci", policy.Allow, policy.ReasonMatched)
	b.ReportAllocs()
	for b.Loop() {
		m.Observe(ev)
	}
}

// A query counts alike by its numbers and by the Event of it.
func TestCountQuery(t *testing.T) {
	types := map[uint16]string{1: "A", 28: "AAAA", 65: "HTTPS", 64: "SVCB", 5: "CNAME", 16: "TXT", 33: "SRV", 15: "MX", 2: "NS", 6: "SOA", 12: "PTR", 257: "CAA",
		43: "DS", 48: "DNSKEY", 35: "NAPTR", 52: "TLSA", 44: "SSHFP", 256: "URI", 10: "NULL", 255: "ANY", 252: "AXFR", 251: "IXFR", 0: "TYPE0", 3: "MD", 65400: "TYPE65400"}
	codes := map[int]string{0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED", 16: "BADVERS", 6: "YXDOMAIN", -1: "", 4095: "RCODE4095"}
	a, b := New(Options{}), New(Options{})
	a.SetPolicy("r1", []string{"ci"})
	b.SetPolicy("r1", []string{"ci"})
	for number, name := range types {
		for code, text := range codes {
			ev := query(name, text)
			ev.Decision.Verdict = policy.Verdict(number % 3)
			ev.Listener = []string{"dns", "dns_tls", "dns_https", "elsewhere"}[number%4]
			a.Observe(ev)
			b.CountQuery(ev.Listener, &ev.Decision, number, code)
			if x, y := scrape(t, a), scrape(t, b); !maps.Equal(x, y) {
				t.Fatalf("%s %s:\n%v\n%v", name, text, x, y)
			}
		}
	}
}
