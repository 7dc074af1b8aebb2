package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs a Server whose status is st and returns its base URL.
func serve(t *testing.T, st *Status) string {
	t.Helper()
	return serveConfig(t, Config{Status: func(context.Context) Status { return *st }})
}

// serveConfig runs a Server with c and returns its base URL.
func serveConfig(t *testing.T, c Config) string {
	t.Helper()
	url, _ := serveServer(t, c)
	return url
}

// serveServer is serveConfig for tests that change the Server, before it serves or
// while it does.
func serveServer(t *testing.T, c Config, change ...func(*Server)) (string, *Server) {
	t.Helper()
	if c.Listen == "" {
		c.Listen = "127.0.0.1:0"
	}
	if c.Status == nil {
		c.Status = func(context.Context) Status { return Status{Listeners: map[string]bool{"proxy": true}} }
	}
	c.Metrics = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "some_metric 1") })
	s := New(c)
	for _, f := range change {
		f(s)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if c.Credentials.Certificate != nil {
		return "https://" + s.Addrs()[0].String(), s
	}
	return "http://" + s.Addrs()[0].String(), s
}

func ask(t *testing.T, method, url string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
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
	return resp, string(body)
}

func TestReady(t *testing.T) {
	good := func() *Status {
		return &Status{
			Policy: Policy{Revision: "abc", LoadedAt: time.Unix(1, 0).UTC(),
				LastReload: Reload{OK: true, At: time.Unix(2, 345).UTC()}},
			Listeners: map[string]bool{"proxy": true, "dns": true}, Upstream: Upstream{OK: true},
		}
	}
	check := func(name string, status int, change func(*Status)) {
		t.Helper()
		st := good()
		change(st)
		resp, body := ask(t, "GET", serve(t, st)+"/readyz")
		var got map[string]any
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Errorf("%s: %v in %s", name, err, body)
		}
		if resp.StatusCode != status || got["ready"] != (status == 200) || got["draining"] != st.Draining {
			t.Errorf("%s: %d %s", name, resp.StatusCode, body)
		}
	}
	check("all is well", 200, func(*Status) {})
	check("no policy", 503, func(s *Status) { s.Policy.Revision = "" })
	check("draining", 503, func(s *Status) { s.Draining = true })
	check("a listener is down", 503, func(s *Status) { s.Listeners["dns"] = false })
	check("no upstream answers", 503, func(s *Status) { s.Upstream = Upstream{Error: "timeout"} })
	check("a refused reload", 200, func(s *Status) { s.Policy.LastReload = Reload{Error: "policy.yaml:1:1: no"} })

	_, body := ask(t, "GET", serve(t, good())+"/readyz")
	for _, want := range []string{`"last_reload":{"ok":true,"at":"1970-01-01T00:00:02.000000345Z","error":""}`, `"loaded_at":"1970-01-01T00:00:01Z"`} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in %s", want, body)
		}
	}
}

func TestPages(t *testing.T) {
	url := serve(t, &Status{})
	for path, want := range map[string]string{"/healthz": "ok\n", "/metrics": "some_metric 1\n", "/": "sallyport"} {
		resp, body := ask(t, "GET", url+path)
		if resp.StatusCode != 200 || !strings.Contains(body, want) || resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %d %v %s", path, resp.StatusCode, resp.Header, body)
		}
	}
	if resp, _ := ask(t, "POST", url+"/readyz"); resp.StatusCode != http.StatusForbidden {
		t.Errorf("POST: %d", resp.StatusCode)
	}
	if resp, _ := ask(t, "GET", url+"/other"); resp.StatusCode != http.StatusNotFound {
		t.Errorf("/other: %d", resp.StatusCode)
	}
}

func TestTakenAddress(t *testing.T) {
	addr := strings.TrimPrefix(serve(t, &Status{}), "http://")
	s := New(Config{Listen: addr, Metrics: http.NotFoundHandler()})
	if err := s.Listen(); err == nil || !strings.Contains(err.Error(), addr) {
		t.Errorf("Listen on a taken address: %v", err)
	}
}

func TestNoListener(t *testing.T) {
	s := New(Config{Metrics: http.NotFoundHandler()})
	if err := s.Listen(); err != nil || s.Addrs() != nil {
		t.Fatalf("Listen: %v, %v", err, s.Addrs())
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Serve(ctx); err != nil {
		t.Error(err)
	}
}
