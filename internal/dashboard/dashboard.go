// Package dashboard serves the pages that operators look at: what the gate is
// doing, why it denies, what it was asked for, what its policy says. They are
// rendered on the server from what the admin API knows; scripts, styles and the
// charting library are embedded, so that nothing is built and nothing is fetched
// from anywhere else.
//
// Names, users and errors come from strangers. They reach HTML through
// html/template alone, and what has no shape of its own in them (control
// characters, bidirectional overrides) is written out. The pages forbid inline
// scripts and styles, and change nothing: closing a tunnel is a request of the API.
package dashboard

import (
	"bytes"
	"compress/gzip"
	"context"
	"embed"
	"fmt"
	"html/template"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/admin"
)

// Config says where the pages come from. It is copied by New.
type Config struct {
	Status func(context.Context) admin.Status // as /readyz; required
	API    admin.API                          // what is nil there is said not to be known
}

//go:embed pages
var pageFiles embed.FS

// security is the policy of every page: its own files and nothing else. uPlot sets
// styles through the CSSOM, which needs no 'unsafe-inline'.
const security = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; " +
	"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// A dashboard is the handler that New returns.
type dashboard struct {
	Config
	library *library
	pages   map[string]*template.Template // by name of the file
	making  chan struct{}                 // holds one for each page under way

	deniedMu sync.Mutex // guards denied, deniedAt
	denied   []denial
	deniedAt time.Time
}

// New returns a handler for GET and HEAD of the pages and what they are made of. It
// panics if the program was built with broken pages.
func New(c Config) http.Handler {
	l, err := newLibrary()
	if err != nil {
		panic(err)
	}
	d := &dashboard{Config: c, library: l, pages: map[string]*template.Template{}, making: make(chan struct{}, maxPages)}
	layout := template.Must(template.New("layout.html").Funcs(functions(l)).ParseFS(pageFiles, "pages/layout.html", "pages/parts.html"))
	for _, name := range []string{"overview", "discovery", "explain", "policy", "tunnels", "health", "missing"} {
		d.pages[name] = template.Must(template.Must(layout.Clone()).ParseFS(pageFiles, "pages/"+name+".html"))
	}
	mux := http.NewServeMux()
	mux.Handle("GET "+assets, l)
	for pattern, serve := range map[string]http.HandlerFunc{
		"GET /{$}": d.overview, "GET /discovery": d.discovery, "GET /explain": d.explain, "GET /policy": d.policy,
		"GET /tunnels": d.tunnels, "GET /health": d.health, "GET /": d.missing,
	} {
		mux.HandleFunc(pattern, d.inTurn(serve))
	}
	return mux
}

// maxPages bounds the pages that are made at once; more wait for as long as their
// readers do.
const maxPages = 4

// inTurn keeps what is served to maxPages at once.
func (d *dashboard) inTurn(serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case d.making <- struct{}{}:
			defer func() { <-d.making }()
			serve(w, r)
		case <-r.Context().Done():
		}
	}
}

// A page is what layout.html is executed with.
type page struct {
	Name    string // of the file, and of the entry in the navigation
	Title   string
	Now     time.Time
	Node    string
	Version string
	Status  admin.Status
	Ready   bool
	Content any
}

// render writes the page called name. Its text is complete before anything is sent,
// so that a mistake in a template is a 500 and no half page.
func (d *dashboard) render(w http.ResponseWriter, r *http.Request, status int, name, title string, content any) {
	st := d.Status(r.Context())
	p := page{name, title, time.Now().UTC(), d.API.Node, d.API.Version, st, st.Ready(), content}
	var b bytes.Buffer
	if err := d.pages[name].ExecuteTemplate(&b, "layout.html", p); err != nil {
		http.Error(w, "the page could not be made", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", security)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Vary", "Accept-Encoding")
	body := b.Bytes()
	if admin.AcceptsGzip(r.Header.Get("Accept-Encoding")) { // there is no secret in a page whose length could tell it
		h.Set("Content-Encoding", "gzip")
		body = compress(body, gzip.BestSpeed)
	}
	w.WriteHeader(status)
	_, _ = w.Write(body) // whoever asked has gone away
}

func (d *dashboard) missing(w http.ResponseWriter, r *http.Request) {
	d.render(w, r, http.StatusNotFound, "missing", "No such page", nil)
}

// functions are what templates call.
func functions(l *library) template.FuncMap {
	return template.FuncMap{
		"asset":   func(name string) (string, error) { return l.path(name) },
		"visible": visible,
		"number":  number[uint64],
		"count":   number[int],
		"bytes":   byteSize,
		"rate":    rate,
		"clock":   func(t time.Time) string { return t.UTC().Format("15:04:05") },
		"stamp":   func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05") },
		"iso":     func(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) },
		"ago":     ago,
		"span":    span,
		"why":     func(reason string) string { return reasons[reason].why },
		"base":    filepath.Base,
		"lines":   func(s string) []string { return strings.Split(strings.TrimSpace(s), "\n") },
		"entry": func(p page, name, path, label, key string) any {
			return struct {
				Path, Label, Key string
				Current          bool
			}{path, label, key, p.Name == name}
		},
		"snippet": func(text, label string) any { return struct{ Text, Label string }{text, label} },
		"options": func(name, chosen string, values []string) any {
			if chosen != "" && !slices.Contains(values, chosen) {
				values = append(slices.Clone(values), chosen)
			}
			return struct {
				Name, Chosen string
				Values       []string
			}{name, chosen, values}
		},
	}
}

// path returns the path of the static file called name.
func (l *library) path(name string) (string, error) {
	p, ok := l.paths[name]
	if !ok {
		return "", fmt.Errorf("there is no static file %s", name)
	}
	return p, nil
}

// number writes n with a comma between thousands.
func number[T int | int64 | uint64](n T) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// byteSize writes n bytes with three significant digits and a binary unit.
func byteSize(n int64) string { return binary(float64(n)) }

func binary(f float64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	i := 0
	for ; f >= 999.5 && i < len(units)-1; i++ {
		f /= 1024
	}
	if i == 0 {
		return fmt.Sprintf("%.0f B", f)
	}
	return short(f) + " " + units[i]
}

// rate writes f things a second.
func rate(f float64) string {
	if f >= 10000 {
		return number(int64(f + .5))
	}
	return short(f)
}

// short writes f with about three significant digits.
func short(f float64) string {
	switch {
	case f == 0:
		return "0"
	case f < 10:
		return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.2f", f), "0"), ".")
	case f < 100:
		return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0")
	}
	return fmt.Sprintf("%.0f", f)
}

// ago writes how long before now t was.
func ago(now, t time.Time) string {
	switch d := now.Sub(t); {
	case t.IsZero():
		return "never"
	case d < 2*time.Second:
		return "just now"
	default:
		return span(d) + " ago"
	}
}

// span writes d in its largest fitting unit, rounded down.
func span(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d days", d/(24*time.Hour))
}
