package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/admin"
	"sallyport/internal/live"
)

const testToken = "0123456789abcdef0123456789abcdef"

// hostile is what a client may ask for.
const hostile = "evil\x1b[2J\x1b]0;owned\x07\r\n\u202e\xff.test"

// fakeGate serves the admin API of a gate that never was.
func fakeGate(t *testing.T, credentials admin.Credentials) string {
	t.Helper()
	at := time.Now().Add(-90 * time.Second)
	rates := admin.Verdicts{Allow: []float64{1, 12.5}, Deny: []float64{0, 3}, Observe: []float64{0, 0}}
	s := admin.New(admin.Config{
		Listen: "127.0.0.1:0", Metrics: http.NotFoundHandler(), Credentials: credentials,
		Status: func(context.Context) admin.Status {
			return admin.Status{Policy: admin.Policy{Revision: "0123456789ab"}, Upstream: admin.Upstream{OK: true}}
		},
		API: admin.API{
			Version: "v1.2.3", Node: "gate-1", Started: at,
			Series: func(int) admin.Series {
				return admin.Series{Time: []int64{1, 2}, Decisions: rates, DNSQueries: rates, BytesUp: []float64{0, 2e6}, BytesDown: []float64{0, 3.5e9}, Tunnels: []int{1, 2}}
			},
			Top: func(by live.By, n int) live.Top {
				return live.Top{Since: time.Now().Add(-46*time.Minute - 30*time.Second), Talkers: []live.Talker{{Key: string(by) + ".test", Group: "ci", Reason: "not_listed", Count: 123456}, {Key: hostile, Group: hostile, Reason: hostile, Count: 2},
					{Key: "watched.test", Group: "legacy", Reason: "not_listed", Verdict: "observe", Count: 1}}}
			},
			Tunnels: func(int) ([]admin.Tunnel, int) {
				return []admin.Tunnel{{ID: "t1", Src: "10.1.2.3", Group: "ci", Name: hostile, Port: 443, Since: at, BytesUp: 5, BytesDown: 12_345_678}}, 7
			},
			Follow: live.NewRing().Follow,
			Recent: func(live.Filter, int) []live.Decision {
				return []live.Decision{{Time: at, Src: "10.1.2.3", Group: "ci", Name: hostile, Port: 443, Verdict: "deny", Reason: "not_listed"},
					{Time: at, Src: "10.1.2.4", Group: "ci", Name: "q.test", QType: "AAAA", Verdict: "allow", Reason: "matched"}}
			},
		},
	})
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + s.Addrs()[0].String()
}

// top runs the command and returns its output and exit status.
func top(t *testing.T, args ...string) (string, int) {
	t.Helper()
	root := newRoot()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(append([]string{"top"}, args...))
	err := root.ExecuteContext(t.Context())
	var exit *exitError
	switch {
	case err == nil:
		return out.String(), 0
	case errors.As(err, &exit):
		return err.Error(), exit.code
	}
	return err.Error(), exitUsage
}

func TestTopOnce(t *testing.T) {
	url := fakeGate(t, admin.Credentials{})
	for _, args := range [][]string{{"--admin", url, "--once"}, {"--admin", url + "/"}} { // the second has no terminal
		out, code := top(t, args...)
		if code != 0 {
			t.Fatalf("%d: %s", code, out)
		}
		for _, want := range []string{
			"sallyport v1.2.3 on gate-1   ready   policy 0123456789ab   up 1m30s   7 tunnels   0 log lines lost\n",
			"connections allow 12.5  deny 3  observe 0   queries allow 12.5", "bytes up 2.0M  down 3.5G",
			"    COUNT  NAME, LAST 47 MINUTES ", "  COUNT  DENIED, LAST 47 MINUTES\n", "   123.5k  name.test", "   123.5k  denied.test                          ci, not_listed\n", "legacy, not_listed (passed: observed)\n",
			`evil\x1b[2J\x1b]0;owned\a\r\n\u..:443`, "12.3M  t1\n", " deny    not_listed           10.1.2.3                 ci               evil\\x1b[2J\\x1b]0;owned\\a\\r\\n\\u202e\\ufffd.test:443\n",
			"q.test AAAA\n",
		} {
			if !strings.Contains(out, want) {
				t.Errorf("no %q in\n%s", want, out)
			}
		}
		for _, r := range out {
			if r != '\n' && (r < ' ' || r > '~') {
				t.Fatalf("%q reaches the terminal:\n%q", r, out)
			}
		}
	}
}

func TestTopToken(t *testing.T) {
	url := fakeGate(t, admin.Credentials{Token: testToken})
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(testToken+"\nsecond line\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := top(t, "--admin", url, "--token-file", file); code != 0 {
		t.Errorf("%d %s", code, out)
	}
	if out, code := top(t, "--admin", url); code != 1 || !strings.Contains(out, "401 Unauthorized: write the token of admin.token_file") {
		t.Errorf("%d %s", code, out)
	}
}

func TestTopMistakes(t *testing.T) {
	var redirected bool
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/elsewhere" {
			redirected = true
		}
		http.Redirect(w, r, "/elsewhere", http.StatusFound)
	}))
	defer other.Close()
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }))
	defer page.Close()
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--admin", "gate:9128"}, 2, "write a URL such as http://127.0.0.1:9128"},
		{[]string{"--admin", "http://user:secret@gate:9128"}, 2, "write a URL"},
		{[]string{"--token-file", "/nonexistent"}, 2, "--token-file"},
		{[]string{"--cacert", os.DevNull}, 2, "holds no certificate"},
		{[]string{"--cert", os.DevNull, "--key", os.DevNull}, 2, "--cert, --key"},
		{[]string{"--interval", "1ms"}, 2, "write 100ms to 1h0m0s"},
		{[]string{"--admin", other.URL}, 1, "is this sallyport's admin listener?"},
		{[]string{"--admin", page.URL}, 1, "does not answer as sallyport's admin API does"},
		{[]string{"--admin", "http://127.0.0.1:1"}, 1, "refused"},
	} {
		if out, code := top(t, tt.args...); code != tt.code || !strings.Contains(out, tt.want) {
			t.Errorf("%q: %d %s", tt.args, code, out)
		}
	}
	if redirected {
		t.Error("a redirect was followed")
	}
}

// TestFrame draws on screens of all sizes: no line is longer than they are wide.
func TestFrame(t *testing.T) {
	c, err := (&adminFlags{url: fakeGate(t, admin.Credentials{})}).client()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	s, err := c.snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range [][2]int{{200, 60}, {80, 24}, {40, 10}, {10, 3}, {1, 1}} {
		for _, s := range []*snapshot{s, nil} {
			text := frame(s, clean(hostile, 300), size[0], size[1])
			body := strings.TrimSuffix(strings.TrimPrefix(text, screenHome), screenRest)
			lines := strings.Split(body, screenLine)
			if len(lines) > size[1] {
				t.Errorf("%v: %d lines", size, len(lines))
			}
			for _, line := range lines {
				if len(line) > size[0] || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r > '~' }) {
					t.Errorf("%v: %q", size, line)
				}
			}
		}
	}
}

func TestQuantities(t *testing.T) {
	for n, want := range map[float64]string{0: "0", 0.5: "0.5", 9999: "9999", 10_000: "10.0k", 999_999: "1000.0k", 1e6: "1.0M", 2.5e9: "2.5G", 1e13: "10.0T"} {
		if got := quantity(n); got != want {
			t.Errorf("%v: %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-time.Second: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m01s", 25 * time.Hour: "25h00m", 72 * time.Hour: "3d"} {
		if got := age(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}
