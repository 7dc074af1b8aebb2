package admin

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"sallyport/internal/live"
)

// fullAPI answers with every field of everything set.
func fullAPI() API {
	at, hits := time.Unix(1_700_000_000, 0).UTC(), uint64(7)
	texts := []string{"x"}
	rules := []RuleDetail{{
		ID: "x", Names: texts, NameCount: 3, Addresses: texts, Ports: texts, Protocol: "tcp", QTypes: texts, Owner: "o", Reason: "r",
		Expires: "2030-01-01", Where: "policy.yaml:1:2", Hits: &hits, LastUsed: &at,
		PrivateDestinations: texts, TLS: &TLSDetail{SNI: "match", ECH: "deny", MinVersion: "1.3"}, Lists: []ListDetail{{Name: "a", File: "a.txt"}, {Name: "b"}},
	}, {ID: "y", Names: []string{}, Addresses: []string{}, Ports: []string{}, QTypes: []string{}, PrivateDestinations: []string{}, Lists: []ListDetail{}}}
	ring := live.NewRing()
	rates := []float64{1.5}
	verdicts := Verdicts{rates, rates, rates}
	return API{
		Version: "v", Node: "n", Started: at, LogDropped: func() uint64 { return 1 }, TunnelCount: func() int { return 2 },
		Policy: func() (*PolicyDetail, error) {
			return &PolicyDetail{Revision: "r", LoadedAt: at, UnmatchedSource: "deny", Deny: rules, Truncated: true, Groups: []GroupDetail{{
				Name: "g", Sources: texts, Users: texts, Extends: texts, Mode: "observe", ObserveUntil: "2030-01-01", Allow: rules, Deny: rules,
			}}}, nil
		},
		Explain: func(q ExplainQuery) ([]byte, error) {
			if q.Source == "bad" {
				return nil, fmt.Errorf("%w: source", ErrBadRequest)
			}
			return []byte(`{"source":"10.0.0.1","target":"a:443","verdict":"deny","reason":"not_listed","mode":"enforce","policy":"r","candidates":[]}` + "\n"), nil
		},
		Tunnels: func(limit int) ([]Tunnel, int) {
			return []Tunnel{{ID: "i", Src: "10.0.0.1", Group: "g", User: "u", Name: "n", Port: 443, Dst: "192.0.2.1", Rule: "r", Since: at, BytesUp: 1, BytesDown: 2}}, 5
		},
		CloseTunnel: func(id, by string) bool { return id == "i" },
		Recent: func(live.Filter, int) []live.Decision {
			return []live.Decision{{Seq: 1, Time: at, Event: "dns", ID: "i", Src: "10.0.0.1", SrcPort: 1, Group: "g", User: "u", Mode: "enforce", Listener: "dns",
				Method: "GET", Name: "n\n", Port: 1, SNI: "s", QType: "A", RCode: "NOERROR", Verdict: "allow", Reason: "matched", Rule: "r", Policy: "p", Dst: "d",
				Status: 200, BytesUp: 1, BytesDown: 1, DurationMS: 1.5, Error: "e"}}
		},
		Follow: ring.Follow,
		Top: func(by live.By, n int) live.Top {
			return live.Top{Since: at, Skipped: 1, Talkers: []live.Talker{{Key: "k", Group: "g", Reason: "r", Count: 2, Error: 1, BytesUp: 1, BytesDown: 1}}}
		},
		Series: func(int) Series {
			return Series{StepSeconds: 10, Time: []int64{1}, Decisions: verdicts, DNSQueries: verdicts, BytesUp: rates, BytesDown: rates, Tunnels: []int{1}}
		},
		Discovery: func(DiscoveryQuery) ([]Pair, error) {
			return []Pair{{Group: "g", Name: "n", Port: 1, QType: "TXT", Protocol: "dns", Listeners: texts, Verdict: "observe", Reason: "r", Rule: "r", Count: 1,
				BytesUp: 1, BytesDown: 1, Strange: true, Sources: 1, SourcesEstimated: true, FirstSeen: at, LastSeen: at}}, nil
		},
		Proposal: func(w io.Writer, q ProposalQuery) error { _, err := io.WriteString(w, `"`+q.Output+`"`); return err },
		Report:   func(w io.Writer, q ReportQuery) error { _, err := io.WriteString(w, `"`+q.Output+`"`); return err },
		Reload: func(ctx context.Context, by string) (Outcome, error) {
			return Outcome{OK: true, Revision: "r", Changed: true, At: at, Errors: texts, Pending: true}, nil
		},
		Drain: func(string) {},
	}
}

// description reads OpenAPI.
func description(t *testing.T) (*openapi3.T, routers.Router) {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(context.Background()); err != nil {
		t.Fatal(err)
	}
	router, err := gorillamux.NewRouter(doc)
	if err != nil {
		t.Fatal(err)
	}
	return doc, router
}

func TestEveryEndpointIsDescribed(t *testing.T) {
	doc, _ := description(t)
	var described, served []string
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			described = append(described, method+" "+path)
		}
	}
	for _, e := range endpoints {
		served = append(served, e.method+" "+e.path)
	}
	slices.Sort(described)
	slices.Sort(served)
	if !slices.Equal(described, served) {
		t.Errorf("described %q\nserved    %q", described, served)
	}
}

// Texts that are no JSON are taken as they are.
func init() {
	for _, kind := range []string{"application/yaml", "text/csv", "text/markdown", "text/html"} {
		openapi3filter.RegisterBodyDecoder(kind, func(body io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
			b, err := io.ReadAll(body)
			return string(b), err
		})
	}
}

// request asks as a program does.
func request(t *testing.T, method, url string, header ...string) (*http.Request, *http.Response, string) {
	t.Helper()
	r, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if method != "GET" {
		r.Header.Set(ClientHeader, "test")
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
		if header[i] == "Host" {
			r.Host = header[i+1]
		}
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r, resp, string(body)
}

// TestAnswersAreAsDescribed asks everything, and compares requests and answers with
// the description, which allows no field that it does not have.
func TestAnswersAreAsDescribed(t *testing.T) {
	_, router := description(t)
	url := serveConfig(t, Config{API: fullAPI()})
	asked := map[string]bool{}
	check := func(method, path string, status int) string {
		t.Helper()
		r, resp, body := request(t, method, url+path)
		if resp.StatusCode != status {
			t.Errorf("%s %s: %d %s", method, path, resp.StatusCode, body)
		}
		r.URL.Scheme, r.URL.Host = "", "" // servers says /
		route, params, err := router.FindRoute(r)
		if err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		asked[method+" "+route.Path] = true
		in := &openapi3filter.RequestValidationInput{Request: r, PathParams: params, Route: route, Options: &openapi3filter.Options{
			AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true,
		}}
		if err := openapi3filter.ValidateRequest(context.Background(), in); err != nil && status < 300 {
			t.Errorf("%s %s: the request: %v", method, path, err)
		}
		out := &openapi3filter.ResponseValidationInput{RequestValidationInput: in, Status: status, Header: resp.Header, Options: in.Options}
		out.Body = io.NopCloser(bytes.NewReader([]byte(body)))
		if err := openapi3filter.ValidateResponse(context.Background(), out); err != nil {
			t.Errorf("%s %s: %v\n%s", method, path, err, clip(body))
		}
		return body
	}
	check("GET", "/api/v1/status", 200)
	check("GET", "/api/v1/policy", 200)
	check("GET", "/api/v1/explain?source=10.0.0.1&target=a:443&user=u&sni=s&destination=192.0.2.1&at=2030-01-01&dns=", 200)
	check("GET", "/api/v1/tunnels?limit=10", 200)
	check("DELETE", "/api/v1/tunnels/i", 204)
	check("DELETE", "/api/v1/tunnels/other", 404)
	check("GET", "/api/v1/top?by=denied&n=3", 200)
	check("GET", "/api/v1/decisions?limit=5&group=g&verdict=deny&reason=r&name=n&listener=dns", 200)
	check("GET", "/api/v1/series?minutes=5", 200)
	check("GET", "/api/v1/discovery?group=g&verdict=observe&since=7d&min_count=2&limit=3", 200)
	for _, output := range []string{"yaml", "json", "csv"} {
		check("GET", "/api/v1/proposal?group=g&since=24h&min_count=2&output="+output, 200)
	}
	for _, output := range []string{"markdown", "html", "csv", "json"} {
		check("GET", "/api/v1/report?since=2030-01-01&output="+output, 200)
	}
	check("POST", "/api/v1/reload", 200)
	check("POST", "/api/v1/drain", 202)
	if body := check("GET", "/api/v1/openapi.yaml", 200); body != string(OpenAPI) {
		t.Error("another description")
	}
	for _, e := range endpoints {
		if !asked[e.method+" "+e.path] {
			t.Errorf("%s %s was not asked", e.method, e.path)
		}
	}

	for _, bad := range []string{
		"/explain", "/explain?source=bad&target=a", "/tunnels?limit=0", "/tunnels?limit=x", "/tunnels?limit=10001", "/top?by=port", "/top?n=-1", "/top?n=1&n=2",
		"/decisions?verdict=maybe", "/decisions?limit=5000", "/series?minutes=61", "/discovery?since=tomorrow", "/discovery?since=-1h",
		"/discovery?since=9999999999d", "/proposal?output=xml", "/report?output=yaml", "/status?x=1", "/policy?%zz",
	} {
		if body := check("GET", "/api/v1"+bad, 400); !strings.Contains(body, "bad request") {
			t.Errorf("%s: %s", bad, body)
		}
	}

	// A process that has none of it says so.
	url = serveConfig(t, Config{})
	for _, e := range endpoints {
		if e.path != "/api/v1/status" && e.path != "/api/v1/openapi.yaml" {
			check(e.method, strings.Replace(e.path, "{id}", "i", 1), 501)
		}
	}
}

func TestNoEndpoint(t *testing.T) {
	url := serveConfig(t, Config{API: fullAPI()})
	for _, tt := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"GET", "/api/v1/nothing", 404, ""}, {"GET", "/api/", 404, ""}, {"GET", "/api/v1/reload", 405, "POST"}, {"GET", "/api/v1/drain", 405, "POST"},
		{"POST", "/api/v1/policy", 405, "GET"}, {"GET", "/api/v1/tunnels/i", 405, "DELETE"}, {"POST", "/api/v1/tunnels/i", 405, "DELETE"},
	} {
		_, resp, body := request(t, tt.method, url+tt.path)
		if resp.StatusCode != tt.status || resp.Header.Get("Allow") != tt.allow || resp.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s %s: %d %v %s", tt.method, tt.path, resp.StatusCode, resp.Header, body)
		}
	}
}
