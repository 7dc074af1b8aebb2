package dashboard

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/html"

	"sallyport/internal/admin"
	"sallyport/internal/live"
)

// hostile are names as clients may send them.
var hostile = []string{
	`<script>alert(1)</script>.example`,
	`"><img src=x onerror=alert(1)>`,
	`' onmouseover='alert(1)`,
	`</title><script>alert(1)</script>`,
	`javascript:alert(1)`,
	"new\nline\r\x00.example",
	"evil\u202emoc.elpmaxe",
	"zero\u200bwidth.example",
	"\xff\xfe.example",
	`{{.}}`, "${alert(1)}",
	strings.Repeat(strings.Repeat("a", 62)+".", 4) + "a",
}

// hostileAPI answers with hostile strings wherever a client or an error could have put one.
func hostileAPI() admin.API {
	at := time.Now().Add(-time.Hour)
	var decisions []live.Decision
	var pairs []admin.Pair
	var tunnels []admin.Tunnel
	for i, h := range hostile {
		decisions = append(decisions, live.Decision{
			Seq: uint64(i + 1), Time: at, Event: "connect", ID: h, Src: h, Group: h, User: h, Mode: h, Listener: h, Method: h, Name: h, Port: 443, SNI: h,
			QType: h, Verdict: "deny", Reason: "not_listed", Rule: h, Policy: h, Dst: h, Error: h,
		})
		pairs = append(pairs, admin.Pair{Group: h, Name: h, Port: 443, Protocol: h, Verdict: "deny", Reason: h, Rule: h, Count: uint64(i), FirstSeen: at, LastSeen: at})
		tunnels = append(tunnels, admin.Tunnel{ID: h, Src: h, Group: h, User: h, Name: h, Port: 443, Dst: h, Rule: h, Since: at})
	}
	zero := uint64(0)
	rule := admin.RuleDetail{ID: hostile[0], Names: hostile, NameCount: 99, Addresses: hostile, Ports: hostile, Protocol: hostile[1], QTypes: hostile,
		Owner: hostile[1], Reason: hostile[2], Expires: hostile[3], Where: hostile[4], Hits: &zero, PrivateDestinations: hostile,
		TLS: &admin.TLSDetail{SNI: hostile[1], ECH: hostile[2], MinVersion: hostile[3]}, Lists: []admin.ListDetail{{Name: hostile[1], File: hostile[2]}}}
	return admin.API{
		Version: hostile[0], Node: hostile[1], Started: at,
		LogDropped: func() uint64 { return 3 },
		Policy: func() (*admin.PolicyDetail, error) {
			p := &admin.PolicyDetail{Revision: hostile[0], UnmatchedSource: hostile[1], Deny: []admin.RuleDetail{rule}, Truncated: true}
			for _, h := range hostile {
				p.Groups = append(p.Groups, admin.GroupDetail{Name: h, Sources: hostile, Users: hostile, Extends: hostile, Mode: h, ObserveUntil: h,
					Allow: []admin.RuleDetail{rule}, Deny: []admin.RuleDetail{rule}})
			}
			return p, nil
		},
		Explain: func(q admin.ExplainQuery) ([]byte, error) {
			if q.Target == "" {
				return nil, fmt.Errorf("%w: target %s", admin.ErrBadRequest, q.Source)
			}
			return json.Marshal(map[string]any{
				"source": q.Source, "target": q.Target, "verdict": "deny", "reason": "not_listed", "rule": q.Target, "group": q.Target, "mode": q.Target,
				"prefix": q.Target, "policy": q.Target, "candidates": []map[string]any{{"effect": "allow", "rule": q.Target, "pattern": q.Target, "reason": q.Target}},
			})
		},
		TunnelCount: func() int { return 7 },
		Tunnels:     func(limit int) ([]admin.Tunnel, int) { return tunnels[:min(limit, len(tunnels))], len(tunnels) },
		Recent:      func(live.Filter, int) []live.Decision { return decisions },
		Series:      func(int) admin.Series { return admin.Series{} },
		Discovery:   func(admin.DiscoveryQuery) ([]admin.Pair, error) { return pairs, nil },
		Proposal: func(w io.Writer, q admin.ProposalQuery) error {
			_, err := io.WriteString(w, q.Group+strings.Join(hostile, "\n"))
			return err
		},
	}
}

// get asks h for a page and returns the answer with its body.
func get(t *testing.T, h http.Handler, target string) (*http.Response, string) {
	t.Helper()
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest("GET", target, nil))
	return rec.Result(), rec.Body.String()
}

// TestHostileStrings wants that whatever strangers send adds no element, attribute or
// address to a page that the same page has not with harmless strings.
func TestHostileStrings(t *testing.T) {
	status := func(context.Context) admin.Status {
		return admin.Status{Listeners: map[string]bool{hostile[0]: false}, Upstream: admin.Upstream{Error: hostile[1]},
			Policy: admin.Policy{Revision: hostile[2], LastReload: admin.Reload{Error: strings.Join(hostile, "\n")}}}
	}
	h := New(Config{Status: status, API: hostileAPI()})
	all := url.QueryEscape(strings.Join(hostile, " "))
	pages := []string{
		"/", "/?name=" + all + "&group=" + all + "&verdict=" + all, "/policy", "/policy?q=" + url.QueryEscape(hostile[0]), "/tunnels", "/tunnels?q=" + all,
		"/health", "/discovery", "/discovery?name=a&group=" + all + "&min_count=" + all, "/explain?source=" + all, "/explain?source=" + all + "&target=" + all + "&sni=" + all, "/" + all,
	}
	for _, h1 := range hostile {
		pages = append(pages, "/discovery?proposal="+url.QueryEscape(h1))
	}
	allowed := regexp.MustCompile(`^(a|body|br|button|code|dd|details|dialog|div|dl|dt|figcaption|figure|footer|form|h1|h2|head|header|html|input|kbd|label|li|link|main|meta|nav|option|p|path|pre|script|section|select|span|strong|summary|svg|table|tbody|td|template|th|thead|time|title|tr|ul)$`)
	for _, target := range pages {
		resp, body := get(t, h, target)
		if resp.Header.Get("Content-Security-Policy") != security {
			t.Errorf("%.60s: no policy", target)
		}
		shapeless := func(where, s string) {
			for _, r := range s {
				if r != '\n' && r != '…' && visible(string(r)) != string(r) {
					t.Errorf("%.60s: %U in %s", target, r, where)
				}
			}
		}
		scripts := 0
		for z := html.NewTokenizer(strings.NewReader(body)); ; {
			kind := z.Next()
			if kind == html.ErrorToken {
				if !errors.Is(z.Err(), io.EOF) {
					t.Errorf("%.60s: %v", target, z.Err())
				}
				break
			}
			tok := z.Token()
			if kind != html.StartTagToken && kind != html.SelfClosingTagToken {
				if kind == html.TextToken {
					shapeless("text", tok.Data)
				}
				continue
			}
			if !allowed.MatchString(tok.Data) {
				t.Errorf("%.60s: element %s", target, tok.Data)
			}
			if tok.Data == "script" {
				scripts++
			}
			for _, a := range tok.Attr {
				if a.Key != "value" && a.Key != "data-close" { // which go back as they came
					shapeless(a.Key, a.Val)
				}
				if strings.HasPrefix(a.Key, "on") || a.Key == "style" {
					t.Errorf("%.60s: attribute %s=%q", target, a.Key, a.Val)
				}
				if (a.Key == "href" || a.Key == "src" || a.Key == "action") && !strings.HasPrefix(a.Val, "/") && !strings.HasPrefix(a.Val, "#") || strings.HasPrefix(a.Val, "//") {
					t.Errorf("%.60s: %s=%q leads elsewhere", target, a.Key, a.Val)
				}
			}
		}
		if want := map[bool]int{true: 2, false: 1}[strings.HasPrefix(target, "/?") || target == "/"]; scripts != want {
			t.Errorf("%.60s: %d scripts", target, scripts)
		}
	}
}

// TestUnknown wants every page to say so where the API has nothing to tell.
func TestUnknown(t *testing.T) {
	h := New(Config{Status: func(context.Context) admin.Status { return admin.Status{} }})
	for _, target := range []string{"/", "/policy", "/tunnels", "/health", "/discovery?proposal=x", "/explain?source=10.0.0.1&target=x"} {
		if resp, body := get(t, h, target); resp.StatusCode != 200 || !strings.Contains(body, "</html>") {
			t.Errorf("%s: %d %s", target, resp.StatusCode, body)
		}
	}
	if resp, _ := get(t, h, "/no/such"); resp.StatusCode != 404 {
		t.Errorf("/no/such: %d", resp.StatusCode)
	}
}

func TestStaticFiles(t *testing.T) {
	h := New(Config{Status: func(context.Context) admin.Status { return admin.Status{} }})
	_, page := get(t, h, "/")
	paths := regexp.MustCompile(`(?:src|href)="(/assets/[^"]+)"`).FindAllStringSubmatch(page, -1)
	if len(paths) != 5 {
		t.Fatalf("static files of the overview: %v", paths)
	}
	for _, m := range paths {
		resp, plain := get(t, h, m[1])
		etag := resp.Header.Get("ETag")
		if resp.StatusCode != 200 || etag == "" || !strings.Contains(resp.Header.Get("Cache-Control"), "immutable") || plain == "" {
			t.Errorf("%s: %d %v", m[1], resp.StatusCode, resp.Header)
		}
		ask := func(field, value string) *http.Response {
			r := httptest.NewRequest("GET", m[1], nil)
			r.Header.Set(field, value)
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, r)
			return rec.Result()
		}
		zr, err := gzip.NewReader(ask("Accept-Encoding", "br, gzip;q=0.5").Body)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(zr); err != nil || string(b) != plain {
			t.Errorf("%s: gzip: %v", m[1], err)
		}
		if enc := ask("Accept-Encoding", "gzip;q=0").Header.Get("Content-Encoding"); enc != "" {
			t.Errorf("%s: gzip was refused, but %s came", m[1], enc)
		}
		if resp := ask("If-None-Match", etag); resp.StatusCode != http.StatusNotModified {
			t.Errorf("%s: If-None-Match: %d", m[1], resp.StatusCode)
		}
	}
	if resp, _ := get(t, h, "/assets/app.js"); resp.StatusCode != 404 {
		t.Errorf("without its hash: %d", resp.StatusCode)
	}
}

// TestLibraryVersion compares what the embedded library says of itself with what the
// documentation and the Makefile say.
func TestLibraryVersion(t *testing.T) {
	js, err := embedded.ReadFile("static/uPlot.iife.min.js")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`\(v([0-9.]+)\)`).FindSubmatch(js[:200])
	if m == nil {
		t.Fatal("uPlot says no version")
	}
	for file, want := range map[string]string{"../../Makefile": "UPLOT = " + string(m[1]), "../../docs/dependencies.md": "uplot | " + string(m[1])} {
		if text, err := os.ReadFile(file); err != nil || !strings.Contains(string(text), want) {
			t.Errorf("%s does not say %q: %v", file, want, err)
		}
	}
}

func TestPolicyPage(t *testing.T) {
	hits, none := uint64(12345), uint64(0)
	used := time.Now().Add(-3 * time.Hour)
	day := func(d int) string { return time.Now().AddDate(0, 0, d).Format(time.DateOnly) }
	detail := &admin.PolicyDetail{Revision: "abc", UnmatchedSource: "deny", Groups: []admin.GroupDetail{
		{Name: "baseline", Allow: []admin.RuleDetail{{ID: ".debian.org", Names: []string{".debian.org"}, Hits: &hits, LastUsed: &used}}, Extends: []string{"ci"}}, // a circle ends
		{Name: "ci", Sources: []string{"10.20.0.0/16"}, Extends: []string{"baseline"}, Mode: "observe", ObserveUntil: day(10),
			Allow: []admin.RuleDetail{{ID: "old", Names: []string{"old.example"}, Expires: day(-1), Hits: &none}, {ID: "soon", Names: []string{"soon.example"}, Expires: day(5)},
				{ID: "own", Names: []string{"@feed"}, PrivateDestinations: []string{"10.0.0.0/8"}, TLS: &admin.TLSDetail{MinVersion: "1.3"}, Lists: []admin.ListDetail{{Name: "feed", File: "lists/feed.txt"}}}}},
	}}
	h := New(Config{Status: func(context.Context) admin.Status { return admin.Status{} }, API: admin.API{Policy: func() (*admin.PolicyDetail, error) { return detail, nil }}})
	check := func(target string, want, not []string) {
		t.Helper()
		_, body := get(t, h, target)
		for _, w := range want {
			if !strings.Contains(body, w) {
				t.Errorf("%s: no %q in\n%s", target, w, body)
			}
		}
		for _, n := range not {
			if strings.Contains(body, n) {
				t.Errorf("%s: %q", target, n)
			}
		}
	}
	check("/policy", []string{"12,345", "3 h ago", "expired " + day(-1), "expires " + day(5) + ", in 4 days", "observes until", `<span class="badge warn">unused</span>`, `from <a href="#group-1">baseline</a>`,
		"to private 10.0.0.0/8", "@feed from lists/feed.txt", "TLS ≥ 1.3"}, nil)
	check("/policy?q=old.example", []string{"old.example"}, []string{"soon.example", ".debian.org"})
	check("/policy?show=unused", []string{"old.example"}, []string{"soon.example"})
	check("/policy?show=expiring", []string{"old.example", "soon.example"}, []string{".debian.org"})
}

// TestFirstPage adds up what the overview of a busy gate needs: the page, its files
// and an hour of numbers. test/e2e measures the same on the wire, of a quiet one.
func TestFirstPage(t *testing.T) {
	api := hostileAPI()
	var decisions []live.Decision
	var pairs []admin.Pair
	for i := range maxDecisions {
		name := fmt.Sprintf("%x.tenant-%x.region-%d.service.example", i*i*7919, i*104729, i%7)
		decisions = append(decisions, live.Decision{
			Seq: uint64(i + 1), Time: time.Now(), Event: "connect", Src: fmt.Sprintf("10.%d.%d.%d", i, i*3, i*4%256), Group: "ci-runners", Method: "CONNECT",
			Name: name, Port: 443, SNI: name, Verdict: "deny", Reason: "not_listed", BytesUp: int64(i * 9973), BytesDown: int64(i * 999983), DurationMS: float64(i * 31),
		})
		pairs = append(pairs, admin.Pair{Group: "ci-runners", Name: name, Port: 443, Protocol: "tls", Verdict: "deny", Reason: "not_listed", Count: uint64(99999 - i), LastSeen: time.Now()})
	}
	api.Recent = func(live.Filter, int) []live.Decision { return decisions }
	api.Discovery = func(q admin.DiscoveryQuery) ([]admin.Pair, error) { return pairs, nil }
	api.Policy = func() (*admin.PolicyDetail, error) { return &admin.PolicyDetail{}, nil }
	h := New(Config{Status: func(context.Context) admin.Status { return admin.Status{} }, API: api})
	size := func(target string) (int, string) {
		r := httptest.NewRequest("GET", target, nil)
		r.Header.Set("Accept-Encoding", "gzip, deflate, br")
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		n := rec.Body.Len() + 600 // fields of the request and of the answer
		zr, err := gzip.NewReader(rec.Body)
		if err != nil {
			t.Fatalf("%s: %v", target, err)
		}
		body, err := io.ReadAll(zr)
		if err != nil {
			t.Fatalf("%s: %v", target, err)
		}
		return n, string(body)
	}
	sum, page := size("/")
	if n := strings.Count(page, "<tr data-seq"); n < maxDecisions {
		t.Fatalf("%d decisions are on the page", n)
	}
	for _, m := range regexp.MustCompile(`(?:src|href)="(/assets/[^"]+)"`).FindAllStringSubmatch(page, -1) {
		n, _ := size(m[1])
		sum += n
	}
	const steps = 360
	per := func(f float64) []float64 {
		all := make([]float64, steps)
		for i := range all {
			all[i] = f + float64(i%97)/10
		}
		return all
	}
	verdicts := admin.Verdicts{Allow: per(48123), Deny: per(1234), Observe: per(321)}
	series, err := json.Marshal(admin.Series{StepSeconds: 10, Time: make([]int64, steps), Decisions: verdicts, DNSQueries: verdicts,
		BytesUp: per(123456789), BytesDown: per(987654321), Tunnels: make([]int, steps)})
	if err != nil {
		t.Fatal(err)
	}
	sum += len(series) + 10*steps + 600 // times have ten digits more than zero has
	t.Logf("the overview of a busy gate takes %d bytes", sum)
	if sum > 100_000 {
		t.Errorf("the overview of a busy gate takes %d bytes, want at most 100000", sum)
	}
}
