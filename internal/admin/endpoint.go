package admin

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/live"
)

// OpenAPI describes the API (OpenAPI 3.1).
//
//go:embed openapi.yaml
var OpenAPI []byte

// An endpoint is one method of one path of the API. A test compares them with OpenAPI.
type endpoint struct {
	method, path string
	serve        func(s *Server, w http.ResponseWriter, r *http.Request)
	streams      bool // for requests that accept an event stream
}

var endpoints = []endpoint{
	{"GET", "/api/v1/status", (*Server).getStatus, false},
	{"GET", "/api/v1/policy", (*Server).getPolicy, false},
	{"GET", "/api/v1/explain", (*Server).getExplain, false},
	{"GET", "/api/v1/tunnels", (*Server).getTunnels, false},
	{"DELETE", "/api/v1/tunnels/{id}", (*Server).deleteTunnel, false},
	{"GET", "/api/v1/top", (*Server).getTop, false},
	{"GET", "/api/v1/decisions", (*Server).getDecisions, true},
	{"GET", "/api/v1/series", (*Server).getSeries, false},
	{"GET", "/api/v1/discovery", (*Server).getDiscovery, false},
	{"GET", "/api/v1/proposal", (*Server).getProposal, false},
	{"GET", "/api/v1/report", (*Server).getReport, false},
	{"POST", "/api/v1/reload", (*Server).postReload, false},
	{"POST", "/api/v1/drain", (*Server).postDrain, false},
	{"GET", "/api/v1/openapi.yaml", (*Server).getOpenAPI, false},
}

const (
	defaultDecisions = 100
	maxDecisions     = 1000
	defaultTop       = 20
	maxTop           = 500
	defaultTunnels   = 1000
	maxTunnels       = 10_000
	defaultPairs     = 1000
	maxPairs         = 20_000
	maxMinCount      = 1 << 30

	// reloadPatience bounds what a request waits for a reload.
	reloadPatience = 20 * time.Second
	// answerPatience bounds what a request waits for others.
	answerPatience = 2 * time.Second
)

// answer serves e, unless too many are served.
func (s *Server) answer(e endpoint) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if e.streams && strings.Contains(r.Header.Get("Accept"), "text/event-stream") {
			s.streamDecisions(w, r)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), answerPatience)
		defer cancel()
		select {
		case s.answers <- struct{}{}:
			defer func() { <-s.answers }()
			c := compress(w, r)
			defer c.close()
			e.serve(s, c, r)
		case <-ctx.Done():
			w.Header().Set("Retry-After", "2")
			fail(w, http.StatusServiceUnavailable, fmt.Errorf("%d requests are under way", maxAnswers))
		}
	}
}

// noEndpoint answers what is none.
func noEndpoint(w http.ResponseWriter, r *http.Request) {
	var methods []string
	for _, e := range endpoints {
		if e.path == r.URL.Path || e.method == http.MethodDelete && strings.HasPrefix(r.URL.Path, strings.TrimSuffix(e.path, "{id}")) {
			methods = append(methods, e.method)
		}
	}
	if len(methods) > 0 {
		w.Header().Set("Allow", strings.Join(methods, ", "))
		fail(w, http.StatusMethodNotAllowed, fmt.Errorf("write %s", strings.Join(methods, " or ")))
		return
	}
	fail(w, http.StatusNotFound, errors.New("there is no such endpoint; see /api/v1/openapi.yaml"))
}

// has reports whether the func of an endpoint is there, and answers otherwise.
func has(w http.ResponseWriter, there bool) bool {
	if !there {
		fail(w, http.StatusNotImplemented, errors.New("this process does not have it"))
	}
	return there
}

// statusDetail is what /api/v1/status answers.
type statusDetail struct {
	readiness
	Version       string    `json:"version"`
	Node          string    `json:"node"`
	Started       time.Time `json:"started"`
	UptimeSeconds float64   `json:"uptime_seconds"`
	Tunnels       int       `json:"tunnels"`
	LogDropped    uint64    `json:"log_dropped"`
}

func (s *Server) getStatus(w http.ResponseWriter, r *http.Request) {
	if err := queryOf(r).done(); err != nil {
		failed(w, err)
		return
	}
	st := s.status(r.Context())
	d := statusDetail{readiness: readiness{st.Ready(), st}, Version: s.api.Version, Node: s.api.Node, Started: s.api.Started.UTC()}
	d.UptimeSeconds = time.Since(s.api.Started).Round(time.Millisecond).Seconds()
	if s.api.TunnelCount != nil {
		d.Tunnels = s.api.TunnelCount()
	}
	if s.api.LogDropped != nil {
		d.LogDropped = s.api.LogDropped()
	}
	writeJSON(w, http.StatusOK, d)
}

func (s *Server) getPolicy(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Policy != nil) {
		return
	}
	q := queryOf(r)
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	p, err := s.api.Policy()
	if err != nil {
		failed(w, err)
		return
	}
	writeJSON(w, http.StatusOK, p)
}

func (s *Server) getExplain(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Explain != nil) {
		return
	}
	q := queryOf(r)
	x := ExplainQuery{
		Source: q.text("source"), Target: q.text("target"), User: q.text("user"), DNS: q.text("dns"), SNI: q.text("sni"),
		Destination: q.text("destination"), At: q.text("at"),
	}
	if x.Source == "" || x.Target == "" {
		q.wrong("source, target", "both must be given: source=10.20.1.5&target=api.github.com:443")
	}
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	text, err := s.api.Explain(x)
	if err != nil {
		failed(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(text) // whoever asked has gone away
}

func (s *Server) getTunnels(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Tunnels != nil) {
		return
	}
	q := queryOf(r)
	limit := q.number("limit", defaultTunnels, maxTunnels)
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	var a struct {
		Total   int      `json:"total"`
		Tunnels []Tunnel `json:"tunnels"`
	}
	a.Tunnels, a.Total = s.api.Tunnels(limit)
	writeJSON(w, http.StatusOK, a)
}

func (s *Server) deleteTunnel(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.CloseTunnel != nil) {
		return
	}
	if !s.api.CloseTunnel(r.PathValue("id"), who(r)) {
		fail(w, http.StatusNotFound, errors.New("no live tunnel has this id"))
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) getTop(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Top != nil) {
		return
	}
	q := queryOf(r)
	by := q.choice("by", string(live.ByName), string(live.BySource), string(live.ByGroup), string(live.ByDenied))
	n := q.number("n", defaultTop, maxTop)
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	writeJSON(w, http.StatusOK, s.api.Top(live.By(by), n))
}

// filter reads which decisions are asked for.
func filter(q *query) live.Filter {
	return live.Filter{
		Group: q.text("group"), Verdict: q.choice("verdict", "", "allow", "deny", "observe"), Reason: q.text("reason"),
		Name: q.text("name"), Listener: q.text("listener"),
	}
}

func (s *Server) getDecisions(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Recent != nil && s.api.Follow != nil) {
		return
	}
	q := queryOf(r)
	f := filter(q)
	limit := q.number("limit", defaultDecisions, maxDecisions)
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	var a struct {
		Cursor    string          `json:"cursor"`
		Decisions []live.Decision `json:"decisions"`
	}
	a.Cursor = s.api.Follow("").ID() // before the rest: nothing is missed between this and a stream
	a.Decisions = s.api.Recent(f, limit)
	writeJSON(w, http.StatusOK, a)
}

func (s *Server) getSeries(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Series != nil) {
		return
	}
	q := queryOf(r)
	minutes := q.number("minutes", seriesMinutes, seriesMinutes)
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	writeJSON(w, http.StatusOK, s.api.Series(minutes))
}

func (s *Server) getDiscovery(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Discovery != nil) {
		return
	}
	q := queryOf(r)
	d := DiscoveryQuery{
		Group: q.text("group"), Verdict: q.choice("verdict", "", "allow", "deny", "observe"),
		Since: q.since("since", time.Now()), MinCount: uint64(q.number("min_count", 1, maxMinCount)),
	}
	limit := q.number("limit", defaultPairs, maxPairs)
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	pairs, err := s.api.Discovery(d)
	if err != nil {
		failed(w, err)
		return
	}
	var a struct {
		Total int    `json:"total"`
		Pairs []Pair `json:"pairs"`
	}
	a.Total = len(pairs)
	a.Pairs = append([]Pair{}, pairs[:min(limit, len(pairs))]...)
	writeJSON(w, http.StatusOK, a)
}

// contentTypes are those of outputs.
var contentTypes = map[string]string{
	"yaml": "application/yaml", "json": "application/json", "csv": "text/csv; charset=utf-8",
	"markdown": "text/markdown; charset=utf-8", "html": "text/html; charset=utf-8",
}

// writeOutput answers with what write writes.
func writeOutput(w http.ResponseWriter, output string, write func(io.Writer) error) {
	var b bytes.Buffer
	if err := write(&b); err != nil {
		failed(w, err)
		return
	}
	h := w.Header()
	h.Set("Content-Type", contentTypes[output])
	if output == "html" { // its styles stand in it; it has no scripts
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
	}
	_, _ = w.Write(b.Bytes()) // whoever asked has gone away
}

func (s *Server) getProposal(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Proposal != nil) {
		return
	}
	q := queryOf(r)
	p := ProposalQuery{
		Group: q.text("group"), Since: q.since("since", time.Now()), MinCount: uint64(q.number("min_count", 1, maxMinCount)),
		Output: q.choice("output", "yaml", "json", "csv"),
	}
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	writeOutput(w, p.Output, func(out io.Writer) error { return s.api.Proposal(out, p) })
}

func (s *Server) getReport(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Report != nil) {
		return
	}
	q := queryOf(r)
	p := ReportQuery{Since: q.since("since", time.Now()), Output: q.choice("output", "markdown", "html", "csv", "json")}
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	writeOutput(w, p.Output, func(out io.Writer) error { return s.api.Report(out, p) })
}

func (s *Server) postReload(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Reload != nil) {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), reloadPatience)
	defer cancel()
	o, err := s.api.Reload(ctx, who(r))
	if o.Errors == nil {
		o.Errors = []string{}
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		o.Pending = true
		writeJSON(w, http.StatusAccepted, o)
	case err != nil:
		failed(w, err)
	default:
		writeJSON(w, http.StatusOK, o)
	}
}

func (s *Server) postDrain(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Drain != nil) {
		return
	}
	// All of the answer goes first: with nothing to drain the process ends at once.
	const text = `{"draining":true}` + "\n"
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(http.StatusAccepted)
	_, _ = io.WriteString(w, text)
	_ = http.NewResponseController(w).Flush() // whoever asked has gone away: it is done all the same
	s.api.Drain(who(r))
}

func (s *Server) getOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/yaml")
	_, _ = w.Write(OpenAPI) // whoever asked has gone away
}
