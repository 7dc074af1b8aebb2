package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// What the gate has logged replays to the same verdicts under its own policy, and to
// what was changed under another one.
func TestReplay(t *testing.T) {
	w := newWorld(t)
	text := policyText(w, "")
	g := start(t, w, text)
	https, http := fmt.Sprintf("api.ok.test:%d", w.tlsPort), fmt.Sprintf("http://api.ok.test:%d/", w.httpPort)
	g.curl(ciSource, "--cacert", w.caFile, "https://"+https+"/")
	g.curl(ciSource, "--cacert", w.caFile, "--connect-to", "::"+https, "https://other.test/") // another server name
	g.curl(ciSource, http)
	g.curl(ciSource, "-p", http)
	g.curl(ciSource, "https://other.test/")
	g.curl(ciSource, "https://pastes.evil.test/")
	g.curl(ciSource, fmt.Sprintf("https://rebind.ok.test:%d/", w.tlsPort))
	g.curl(ciSource, fmt.Sprintf("https://gone.ok.test:%d/", w.tlsPort))
	g.curl(ciSource, fmt.Sprintf("telnet://echo.ok.test:%d", w.echoPort), "--max-time", "1", "-p")
	g.curl("127.0.2.1", "--cacert", w.caFile, "https://"+https+"/") // observed
	g.curl(noSource, "https://"+https+"/")
	g.dig(ciSource, "api.ok.test")
	g.dig(ciSource, "api.ok.test", "TXT")
	g.dig(ciSource, "rebind.ok.test")
	g.dig(ciSource, "other.test")
	g.line(0, map[string]any{"event": "dns", "name": "other.test"})
	g.until("every event", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		n := 0
		for _, l := range g.lines {
			if l["event"] == "connect" || l["event"] == "http" || l["event"] == "dns" {
				n++
			}
		}
		return n >= 15
	})
	g.mu.Lock()
	var log strings.Builder
	for _, l := range g.lines {
		delete(l, "policy") // it is not by the revision that replay knows
		b, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		log.WriteString(string(b) + "\n")
	}
	g.mu.Unlock()
	g.write("events.jsonl", log.String())

	replay := func(policy string) (r struct {
		Decided   uint64
		Unchanged uint64
		Malformed uint64
		Totals    map[string]uint64
		Changes   []struct{ Change, Name, Was, Now string }
	}) {
		t.Helper()
		g.write("candidate.yaml", policy)
		out, code := g.sallyport("replay", "--policy", g.path("candidate.yaml"), "--output", "json", g.path("events.jsonl"))
		if err := json.Unmarshal([]byte(out), &r); code != 0 || err != nil {
			t.Fatalf("replay: %d, %v\n%s", code, err, out)
		}
		return r
	}
	if r := replay(text); r.Unchanged != r.Decided || r.Decided < 14 || r.Malformed != 0 {
		t.Errorf("the same policy: %+v\n%s", r, log.String())
	}
	r := replay(strings.Replace(text, "names: [api.ok.test,", "names: [other.test,", 1))
	seen := map[string]bool{}
	for _, c := range r.Changes {
		seen[c.Change+" "+c.Name] = true
	}
	for _, want := range []string{"newly_denied api.ok.test", "newly_allowed other.test"} {
		if !seen[want] {
			t.Errorf("no %s in %+v", want, r.Changes)
		}
	}
}
