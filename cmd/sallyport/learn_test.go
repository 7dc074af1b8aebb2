package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/internal/admin"
	"sallyport/internal/config"
	"sallyport/internal/discovery"
	"sallyport/policy"
	"sallyport/policy/event"
)

const observing = `
version: 1
groups:
  - name: legacy
    sources: [127.0.0.0/8]
    mode: observe
    observe_until: 2999-12-31
    allow: [listed.test]
`

// sallyport runs a command as main does and returns what it prints and its status.
func sallyport(t *testing.T, args ...string) (stdout string, status int, err error) {
	t.Helper()
	root := newRoot()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(io.Discard)
	root.SetArgs(args)
	err = root.ExecuteContext(t.Context())
	if err != nil {
		status = exitUsage
		if exit, ok := errors.AsType[*exitError](err); ok {
			status = exit.code
		}
	}
	return out.String(), status, err
}

// folder makes the files of a gate that observes and returns its settings.
func folder(t *testing.T, text string) (settings, store string) {
	t.Helper()
	dir := t.TempDir()
	settings, store = filepath.Join(dir, "sallyport.yaml"), filepath.Join(dir, "discovery.db")
	for path, data := range map[string]string{
		filepath.Join(dir, "policy.yaml"): observing,
		settings:                          "policy: {source: policy.yaml}\ndiscovery: {store: discovery.db}\n" + text,
	} {
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return settings, store
}

// seen makes an event of a connection that legacy let pass.
func seen(name string) *event.Event {
	return &event.Event{
		Time: time.Now(), Kind: event.Connect, Protocol: policy.ProtocolTLS, Listener: "proxy", Name: name, Port: 443,
		Source: netip.MustParseAddrPort("127.0.0.1:40000"), BytesUp: 10, BytesDown: 100,
		Decision: policy.Decision{Group: "legacy", Verdict: policy.Observe, Mode: policy.ModeObserve, Reason: policy.ReasonNotListed},
	}
}

func TestLearnAndReportFromAFile(t *testing.T) {
	settings, store := folder(t, "")
	d, err := discovery.Open(discovery.Options{File: store})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"listed.test", "wanted.test", "wanted.test", "once.test", hostile} {
		d.Observe(seen(name))
	}

	// As long as it is open there is nothing to read.
	if _, status, err := sallyport(t, "learn", "--config", settings, "--store", store); status != exitUsage || !strings.Contains(err.Error(), "--admin") {
		t.Errorf("an open store: status %d, %v", status, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.Run(ctx); err != nil {
		t.Fatal(err)
	}

	out, _, err := sallyport(t, "learn", "--config", settings, "--store", store, "--group", "legacy", "--since", "7d")
	if err != nil {
		t.Fatal(err)
	}
	p, _, err := policy.Load("learn", []byte(out), policy.Options{})
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if got := strings.Count(out, "\n      - "); got != 2 || p.Names() < 2 || !strings.Contains(out, "- wanted.test # 2 times") {
		t.Errorf("%d rules:\n%s", got, out)
	}
	if out, _, err := sallyport(t, "learn", "--config", settings, "--store", store, "--min-count", "2", "--output", "json"); err != nil || strings.Contains(out, "once.test") || !json.Valid([]byte(out)) {
		t.Errorf("%v\n%s", err, out)
	}
	for output, want := range map[string]string{"markdown": "# What left", "html": "<!doctype html>", "csv": "section,group,", "json": `"sections"`} {
		out, _, err := sallyport(t, "report", "--config", settings, "--store", store, "--since", "7d", "--output", output)
		if err != nil || !strings.Contains(out, want) || !strings.Contains(out, "wanted.test") {
			t.Errorf("%s: %v\n%s", output, err, out)
		}
		if strings.ContainsAny(out, "\x1b\x07\r\u202e") {
			t.Errorf("%s has what a terminal acts on: %q", output, out)
		}
	}
}

func TestLearnMistakes(t *testing.T) {
	settings, store := folder(t, `admin: {listen: ""}`)
	tests := []struct {
		want string
		args []string
	}{
		{"--output", []string{"learn", "--output", "html"}},
		{"--output", []string{"report", "--output", "yaml"}},
		{"--since", []string{"learn", "--since", "yesterday"}},
		{"--since", []string{"report", "--since", "-7d"}},
		{"--min-count", []string{"learn", "--min-count", "0"}},
		{"leave out --admin", []string{"learn", "--store", store, "--admin", "http://127.0.0.1:1"}},
		{"no such file", []string{"learn", "--config", settings, "--store", store}},
		{"admin.listen", []string{"report", "--config", settings}},
		{"does the gate run", []string{"report", "--admin", "http://127.0.0.1:1"}},
		{"unknown command", []string{"learn", "legacy"}},
	}
	for _, tt := range tests {
		if out, status, err := sallyport(t, tt.args...); status != exitUsage || !strings.Contains(err.Error(), tt.want) || out != "" {
			t.Errorf("%q: status %d, %v; want %q", tt.args, status, err, tt.want)
		}
	}
	// A file that is there and is no store.
	if _, status, err := sallyport(t, "learn", "--config", settings, "--store", settings); status != exitUsage || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("status %d, %v", status, err)
	}
	if _, err := os.Stat(settings); err != nil {
		t.Errorf("the file was moved: %v", err)
	}
}

func TestAdminURL(t *testing.T) {
	for listen, want := range map[string]string{
		"127.0.0.1:9128": "http://127.0.0.1:9128", ":9128": "http://127.0.0.1:9128", "0.0.0.0:1": "http://127.0.0.1:1", "[::]:1": "http://127.0.0.1:1", "[2001:db8::1]:1": "http://[2001:db8::1]:1",
	} {
		if got, err := adminURL(config.Admin{Listen: listen}); got != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", listen, got, err, want)
		}
	}
}

// TestGateRemembers runs a gate whose log has no lines for queries, or for denied ones
// alone: discovery sees all the same, answers over the admin API, and is written after
// the servers have stopped.
func TestGateRemembers(t *testing.T) {
	for _, log := range []string{"log: {format: squid, output: events.log, dns: all}", "log: {output: events.log, dns: denied}"} {
		t.Run(log, func(t *testing.T) {
			settings, store := folder(t, log+`
proxy: {listen: ["127.0.0.1:0"]}
dns: {listen: ["127.0.0.1:0"], upstreams: ["127.0.0.1:1"], records: [{name: listed.test, type: A, value: 203.0.113.1}]}
admin: {listen: "127.0.0.1:0"}
`)
			o := options{file: settings}
			s, err := o.load()
			if err != nil {
				t.Fatal(err)
			}
			g, err := newGate(&o, s)
			if err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- g.run(ctx, io.Discard) }()
			defer func() {
				stop()
				if err := <-done; err != nil {
					t.Error(err)
				}
				checkWritten(t, store)
				logged, err := os.ReadFile(filepath.Join(filepath.Dir(settings), "events.log"))
				if err != nil || strings.Contains(string(logged), `"name":"listed.test"`) {
					t.Errorf("an allowed query is in the log (%v):\n%s", err, logged)
				}
			}()
			adminAt := waitForAdmin(t, g)

			at := g.dns.Addrs()[0].String()
			for _, name := range []string{"listed.test.", "Unlisted.test."} {
				m := new(dns.Msg)
				m.SetQuestion(name, dns.TypeA)
				c := dns.Client{Timeout: 30 * time.Second}
				if _, _, err := c.Exchange(m, at); err != nil {
					t.Fatal(err)
				}
			}
			conn, err := net.Dial("tcp", g.proxy.Addrs()[0].String())
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(conn, "CONNECT 127.0.0.1:443 HTTP/1.1\r\nHost: 127.0.0.1:443\r\nConnection: close\r\n\r\n")
			if answer, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 403") {
				t.Fatalf("%v: %s", err, answer)
			}
			conn.Close()

			out, _, err := sallyport(t, "learn", "--admin", "http://"+adminAt, "--group", "legacy", "--since", "24h")
			if err != nil || !strings.Contains(out, "unlisted.test") || strings.Contains(out, "- listed.test") {
				t.Errorf("%v\n%s", err, out)
			}
			if _, status, err := sallyport(t, "learn", "--admin", "http://"+adminAt, "--group", "legasy"); status != exitUsage || !strings.Contains(err.Error(), "there are legacy") {
				t.Errorf("an unknown group: status %d, %v", status, err)
			}
			out, _, err = sallyport(t, "report", "--admin", "http://"+adminAt, "--output", "json")
			if err != nil || !strings.Contains(out, `"listed.test"`) || !strings.Contains(out, `"127.0.0.1"`) {
				t.Errorf("%v\n%s", err, out)
			}
			resp, err := http.Get("http://" + adminAt + "/api/v1/discovery?group=legacy")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var a struct{ Pairs []admin.Pair }
			if err := json.NewDecoder(resp.Body).Decode(&a); err != nil || len(a.Pairs) != 3 {
				t.Errorf("%v: %+v", err, a)
			}
		})
	}
}

// waitForAdmin waits until the gate serves and returns where its admin listener is.
func waitForAdmin(t *testing.T, g *gate) string {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for time.Now().Before(deadline) {
		g.status.mu.Lock()
		up := g.status.up
		g.status.mu.Unlock()
		if up {
			return g.admin.Addrs()[0].String()
		}
		time.Sleep(time.Millisecond) // pace: the gate starts in goroutines of its own
	}
	t.Fatal("the gate does not serve")
	return ""
}

// checkWritten looks into the file that a gate has left.
func checkWritten(t *testing.T, store string) {
	t.Helper()
	d, err := discovery.OpenReadOnly(store)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	pairs, err := d.Pairs(discovery.Query{})
	if err != nil || len(pairs) != 3 {
		t.Errorf("%v: %+v", err, pairs)
	}
	if u := d.Rules()[discovery.RuleKey{Group: "legacy", Rule: "listed.test"}]; u.Hits != 1 {
		t.Errorf("use of the rule for listed.test: %+v", u)
	}
}
