package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// api asks the admin API and decodes the answer into v, unless nil.
func (g *gate) api(method, path string, v any, header ...string) (int, string) {
	g.t.Helper()
	r, err := http.NewRequest(method, "http://"+g.admin+"/api/v1/"+path, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	if method != "GET" {
		r.Header.Set("X-Sallyport-Client", "test")
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		g.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	if v != nil {
		if err := json.Unmarshal(body, v); err != nil {
			g.t.Fatalf("%s: %v: %s", path, err, body)
		}
	}
	return resp.StatusCode, string(body)
}

// adminTunnels is the answer of /api/v1/tunnels.
type adminTunnels struct {
	Total   int
	Tunnels []struct {
		ID, Src, Group, Name, Dst, Rule string
		Port                            int
		BytesUp                         int `json:"bytes_up"`
	}
}

func TestAdminAPI(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	streamed, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+g.admin+"/api/v1/decisions?verdict=deny", nil)
	if err != nil {
		t.Fatal(err)
	}
	streamed.Header.Set("Accept", "text/event-stream")
	stream, err := http.DefaultClient.Do(streamed)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Body.Close()

	// A tunnel, as it lives and as an operator ends it.
	c := dialFrom(t, ciSource, g.proxy)
	fmt.Fprintf(c, "CONNECT echo.ok.test:%d HTTP/1.1\r\n\r\nhello\n", w.echoPort)
	in := bufio.NewReader(c)
	resp, err := http.ReadResponse(in, &http.Request{Method: "CONNECT"})
	if err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	var live adminTunnels
	g.until("the tunnel is listed with its bytes", func() bool {
		g.api("GET", "tunnels", &live)
		return live.Total == 1 && live.Tunnels[0].BytesUp == 6
	})
	tn := live.Tunnels[0]
	if tn.Src != ciSource || tn.Group != "ci" || tn.Name != "echo.ok.test" || tn.Port != w.echoPort || tn.Rule != "echo" || !strings.HasPrefix(tn.Dst, "127.") {
		t.Errorf("%+v", tn)
	}
	if code, body := g.api("GET", "tunnels/"+tn.ID, nil); code != 405 {
		t.Errorf("%d %s", code, body)
	}
	m := g.mark()
	if code, body := g.api("DELETE", "tunnels/"+tn.ID, nil); code != 204 {
		t.Errorf("%d %s", code, body)
	}
	ev := g.line(m, map[string]any{"event": "connect", "id": tn.ID})
	if ev["reason"] != "matched" || ev["error"] != "closed by an operator" {
		t.Errorf("%v", ev)
	}
	g.line(m, map[string]any{"message": "a tunnel was closed over the admin API", "id": tn.ID})
	_, _ = io.Copy(io.Discard, in) // to the end, or a reset

	// Denials are streamed as they come, of the proxy and of the resolver.
	g.curl(ciSource, "https://other.test/")
	g.dig(ciSource, "denied.test")
	events := bufio.NewScanner(stream.Body)
	for _, want := range []string{"other.test", "denied.test"} {
		for found := false; !found; {
			if !events.Scan() {
				t.Fatalf("the stream ended before %s: %v", want, events.Err())
			}
			var d struct{ Name, Verdict, Reason string }
			if data, ok := strings.CutPrefix(events.Text(), "data: "); ok {
				if err := json.Unmarshal([]byte(data), &d); err != nil {
					t.Fatal(err)
				}
				found = d.Name == want && d.Reason == "not_listed"
			}
		}
	}
	var decisions struct {
		Decisions []struct{ Name, Listener string }
	}
	g.api("GET", "decisions?verdict=deny&listener=dns", &decisions)
	if len(decisions.Decisions) != 1 || decisions.Decisions[0].Name != "denied.test" {
		t.Errorf("%+v", decisions)
	}

	// Talkers are counted a second later.
	var top struct {
		Talkers []struct {
			Key, Group, Reason string
			Count              int
		}
	}
	g.until("denied names are counted", func() bool {
		g.api("GET", "top?by=denied", &top)
		return len(top.Talkers) == 2
	})

	// Explain is what the command prints, byte for byte.
	for _, q := range []struct{ args, query string }{
		{"api.ok.test:443", "target=api.ok.test:443"}, {"--sni x.test api.ok.test:443", "target=api.ok.test:443&sni=x.test"},
		{"--dns TXT www.evil.test", "target=www.evil.test&dns=TXT"}, {"--at 2027-01-01 [::1]:443", "target=[::1]:443&at=2027-01-01"},
		{"--destination 127.0.0.1 cdn.cdn.test:80", "target=cdn.cdn.test:80&destination=127.0.0.1"}, {"http://other.test/", "target=http://other.test/"},
	} {
		want, _ := g.sallyport(append([]string{"explain", "--json", "--source", ciSource}, strings.Fields(q.args)...)...)
		if code, got := g.api("GET", "explain?source="+ciSource+"&"+q.query, nil); code != 200 || got != want {
			t.Errorf("%s: %d %s\nwant %s", q.query, code, got, want)
		}
	}
	if code, body := g.api("GET", "explain?source=nobody&target=x", nil); code != 400 || !strings.Contains(body, `source: \"nobody\": not an address`) {
		t.Errorf("%d %s", code, body)
	}

	// The policy, with the place of each rule.
	var policy struct {
		Revision string
		Deny     []struct{ ID, Reason, Where string }
		Groups   []struct {
			Name, Mode string
			Allow      []struct {
				ID, Where string
				Names     []string
				Ports     []string
			}
		}
	}
	g.api("GET", "policy", &policy)
	if policy.Revision != g.ready().Policy.Revision || len(policy.Groups) != 2 || policy.Groups[0].Allow[0].ID != "api" || policy.Groups[1].Mode != "observe" ||
		policy.Groups[0].Allow[0].Where != g.path("policy.yaml")+":12:9" || policy.Deny[0].ID != "@threats" {
		t.Errorf("%+v", policy)
	}

	// top at a pipe.
	out, code := g.sallyport("top", "--once", "--admin", "http://"+g.admin)
	if code != 0 {
		t.Errorf("top: %d", code)
	}
	wants(t, "top", out, "ready   policy "+policy.Revision, "denied.test A\n", "other.test:443\n", "ci, not_listed")

	// A reload answers how it went.
	var o struct {
		OK, Changed bool
		Revision    string
		Errors      []string
	}
	g.write("policy.yaml", policyText(w, "      - new.ok.test"))
	if code, body := g.api("POST", "reload", &o); code != 200 || !o.OK || len(o.Errors) != 0 {
		t.Errorf("%d %s", code, body)
	}
	if o.Revision == policy.Revision || o.Revision != g.ready().Policy.Revision {
		t.Errorf("%+v", o)
	}
	g.write("policy.yaml", "version: 1\ngrups: []\n")
	good := o.Revision
	if code, body := g.api("POST", "reload", &o); code != 200 || o.OK || o.Revision != good || len(o.Errors) == 0 || !strings.Contains(o.Errors[0], "policy.yaml:2:1: grups") {
		t.Errorf("%d %s", code, body)
	}
	g.api("GET", "policy", &policy) // which the file is no longer
	if a := policy.Groups[0].Allow; policy.Revision != good || a[len(a)-1].ID != "new.ok.test" {
		t.Errorf("%+v", policy)
	}

	// The end.
	if code, _ := g.api("GET", "drain", nil); code != 405 {
		t.Errorf("GET drain: %d", code)
	}
	m = g.mark()
	if code, body := g.api("POST", "drain", nil); code != 202 {
		t.Errorf("%d %s", code, body)
	}
	g.line(m, map[string]any{"message": "the admin API was asked to drain and stop"})
	if code := g.wait(); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

// TestAdminToken has the token changed while the gate runs.
func TestAdminToken(t *testing.T) {
	w := newWorld(t)
	const token = "0123456789abcdef0123456789abcdef"
	file := t.TempDir() + "/token"
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(token + "\n")
	g := start(t, w, policyText(w, ""), "--set", "admin.token_file="+file)
	ask := func(token string) int {
		code, _ := g.api("GET", "status", nil, "Authorization", "Bearer "+token)
		return code
	}
	if code, _ := g.api("GET", "status", nil); code != 401 {
		t.Errorf("without: %d", code)
	}
	if code := ask(token); code != 200 {
		t.Errorf("with: %d", code)
	}
	g.write("token", token) // top reads its own copy
	out, code := g.sallyport("top", "--once", "--admin", "http://"+g.admin, "--token-file", g.path("token"))
	if code != 0 {
		t.Errorf("top: %d %s", code, out)
	}
	write("short\n")
	var o struct {
		OK     bool
		Errors []string
	}
	if g.api("POST", "reload", &o, "Authorization", "Bearer "+token); o.OK || len(o.Errors) != 1 || !strings.Contains(o.Errors[0], "admin.token_file: its first line is no token") {
		t.Errorf("%+v", o)
	}
	if code := ask(token); code != 200 {
		t.Errorf("after a bad file: %d", code)
	}
	write("another-0123456789abcdef\n")
	g.until("the new token is in force", func() bool { return ask("another-0123456789abcdef") == 200 }) // without being asked
	if code := ask(token); code != 401 {
		t.Errorf("the old one: %d", code)
	}
}

// TestAdminStuckStreams is about streams that nobody reads: they are bounded, and
// what is decided meanwhile is not held up.
func TestAdminStuckStreams(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	for range 40 { // more than may follow at a time
		c := dialFrom(t, "127.0.0.1", g.admin)
		fmt.Fprint(c, "GET /api/v1/decisions HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
	}
	began := time.Now()
	for i := range 50 {
		g.dig(ciSource, fmt.Sprintf("n%d.test", i))
	}
	t.Logf("50 queries in %v", time.Since(began))
	if code, _ := g.api("GET", "status", nil); code != 200 {
		t.Errorf("status: %d", code)
	}
}
