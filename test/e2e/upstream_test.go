package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// TestParentProxy puts one gate behind another: curl → gate → parent → origin.
func TestParentProxy(t *testing.T) {
	w := newWorld(t)
	policy := policyText(w, "")
	parent := start(t, w, policy) // knows the gate by its source address
	g := start(t, w, policy, "--set", "proxy.parent=http://"+parent.proxy, "--set", "proxy.source_address="+ciSource)

	t.Run("TLS", func(t *testing.T) {
		m, up := g.mark(), parent.mark()
		origin := fmt.Sprintf("api.ok.test:%d", w.tlsPort)
		out, code := g.curl(ciSource, "--cacert", w.caFile, "https://"+origin+"/x")
		if code != 0 || out != "hello from "+origin+"/x" {
			t.Fatalf("curl: %d %s", code, out)
		}
		g.line(m, map[string]any{"event": "connect", "verdict": "allow", "parent": parent.proxy, "sni": "api.ok.test"})
		parent.line(up, map[string]any{"event": "connect", "verdict": "allow", "src": ciSource, "name": "api.ok.test", "sni": "api.ok.test", "dst": originAddr})
	})
	t.Run("plain HTTP", func(t *testing.T) {
		m, up := g.mark(), parent.mark()
		origin := fmt.Sprintf("api.ok.test:%d", w.httpPort)
		out, code := g.curl(ciSource, "http://"+origin+"/x")
		if code != 0 || out != "hello from "+origin+"/x" {
			t.Fatalf("curl: %d %s", code, out)
		}
		g.line(m, map[string]any{"event": "http", "verdict": "allow", "parent": parent.proxy})
		parent.line(up, map[string]any{"event": "http", "verdict": "allow", "src": ciSource, "name": "api.ok.test"})
	})
	t.Run("the server speaks first", func(t *testing.T) {
		c := dialFrom(t, ciSource, g.proxy)
		fmt.Fprintf(c, "CONNECT echo.ok.test:%d HTTP/1.1\r\n\r\nearly\n", w.echoPort)
		r := bufio.NewReader(c)
		if _, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"}); err != nil {
			t.Fatal(err)
		}
		c.(interface{ CloseWrite() error }).CloseWrite()
		if got, err := io.ReadAll(r); err != nil || string(got) != "220 welcome\r\nearly\n" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("denied here", func(t *testing.T) {
		out, _ := g.curl(ciSource, "-i", "https://other.test/")
		wants(t, "curl -i", out, "403 Forbidden by egress policy", "not_listed")
	})
	t.Run("denied there", func(t *testing.T) {
		if r := parent.reload(strings.Replace(policy, "api.ok.test, ", "", 1)); !r.Policy.LastReload.OK {
			t.Fatal(r)
		}
		m := g.mark()
		out, _ := g.curl(ciSource, "-i", fmt.Sprintf("https://api.ok.test:%d/", w.tlsPort))
		wants(t, "curl -i", out, "HTTP/1.1 502 ", `error=destination_unavailable; details="connect_failed"`)
		l := g.line(m, map[string]any{"event": "connect", "reason": "connect_failed", "status": 502})
		wants(t, "error", fmt.Sprint(l["error"]), "parent "+parent.proxy+" answers 403", "its own policy refuses this")
	})
	t.Run("gone", func(t *testing.T) {
		parent.signal(syscall.SIGTERM)
		parent.wait()
		m := g.mark()
		out, _ := g.curl(ciSource, "-i", fmt.Sprintf("https://api.ok.test:%d/", w.tlsPort))
		wants(t, "curl -i", out, "HTTP/1.1 502 ", "error=connection_refused")
		g.line(m, map[string]any{"event": "connect", "reason": "connect_failed", "parent": parent.proxy})
	})
	parent.mu.Lock() // it has ended, so this is all it ever heard
	defer parent.mu.Unlock()
	for _, l := range parent.lines {
		if l["name"] == "other.test" {
			t.Errorf("the parent heard of what was denied here: %v", l)
		}
	}
}

// TestRoutesReload changes the ways out by SIGHUP, with credentials in a file.
func TestRoutesReload(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	settings, err := os.ReadFile(g.path("sallyport.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	l := listen(t, "127.0.0.1:0")
	asked := make(chan string, 4)
	serve(t, &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		user, password, _ := (&http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}).BasicAuth()
		asked <- r.Method + " " + r.Host + " " + user + ":" + password
		rw.Header().Set("Proxy-Authenticate", "Basic")
		rw.WriteHeader(http.StatusProxyAuthRequired)
	})}, l)
	try := func(extra string) (string, map[string]any) {
		t.Helper()
		before := g.ready().Policy.LastReload.At
		g.write("sallyport.yaml", strings.Replace(string(settings), "proxy:\n", "proxy:\n"+extra, 1))
		g.signal(syscall.SIGHUP)
		g.until("reload", func() bool { return g.ready().Policy.LastReload.At != before })
		m := g.mark()
		out, _ := g.curl(ciSource, "-i", "-p", fmt.Sprintf("http://api.ok.test:%d/", w.httpPort))
		return out, g.line(m, map[string]any{"event": "connect", "name": "api.ok.test"})
	}
	out, l1 := try("  groups: [{group: nobody, parent: direct}]\n")
	wants(t, "curl", out, "hello from api.ok.test")
	if l1["parent"] != nil {
		t.Errorf("%v", l1)
	}
	g.line(0, map[string]any{"level": "warn", "message": g.path("sallyport.yaml") + `: proxy.groups[0].group: the policy has no group "nobody", so this way out is used by nobody`})

	g.write("parent.secret", "deploy:s3:cret\n")
	out, l2 := try(fmt.Sprintf("  groups: [{group: ci, parent: \"http://%s\", parent_credentials_file: parent.secret}]\n", l.Addr()))
	wants(t, "curl", out, "HTTP/1.1 502 ")
	wants(t, "error", fmt.Sprint(l2["error"]), "answers 407", "it wants credentials")
	if got, want := <-asked, fmt.Sprintf("CONNECT api.ok.test:%d deploy:s3:cret", w.httpPort); got != want {
		t.Errorf("the parent got %q, want %q", got, want)
	}
	if strings.Contains(fmt.Sprint(l2), "s3:cret") {
		t.Errorf("%v", l2)
	}

	// What cannot be read changes nothing.
	out, l3 := try("  parent: \"http://192.0.2.1:3128\"\n  parent_credentials_file: none.secret\n")
	wants(t, "curl", out, "HTTP/1.1 502 ")
	wants(t, "error", fmt.Sprint(l3["error"]), "answers 407")
	<-asked
	if r := g.ready(); r.Policy.LastReload.OK || !strings.Contains(r.Policy.LastReload.Error, "none.secret: no such file") {
		t.Errorf("%+v", r)
	}

	out, _ = try("")
	wants(t, "curl", out, "hello from api.ok.test")
}

// TestEnvironment uses the proxy as programs do: by what sallyport env prints.
func TestEnvironment(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	out, code := g.sallyport("env", "--address", g.proxy, "--format", "docker", "--no-proxy", "127.0.0.10")
	if code != 0 {
		t.Fatal(out)
	}
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("no curl: make test installs it")
	}
	run := func(url string) string {
		cmd := exec.CommandContext(t.Context(), "curl", "-sS", "--max-time", "15", "--interface", ciSource, "--cacert", w.caFile, url)
		cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, strings.Split(strings.TrimSpace(out), "\n")...)
		b, _ := cmd.CombinedOutput()
		return string(b)
	}
	for _, url := range []string{fmt.Sprintf("https://api.ok.test:%d/", w.tlsPort), fmt.Sprintf("http://api.ok.test:%d/", w.httpPort)} {
		m := g.mark()
		wants(t, url, run(url), "hello from api.ok.test")
		g.line(m, map[string]any{"verdict": "allow", "name": "api.ok.test"})
	}
	m := g.mark()
	wants(t, "not through the proxy", run(fmt.Sprintf("http://%s:%d/", originAddr, w.httpPort)), "hello from "+originAddr)
	if n := g.mark(); n != m {
		t.Errorf("%d events", n-m)
	}
}

// TestPAC fetches the file with curl, from both listeners, from a source of no group.
func TestPAC(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""), "--set", "proxy.pac.direct=.corp.test,10.0.0.0/8")
	for _, from := range []string{g.proxy, g.admin} {
		out, code := tool(t, "curl", "-sS", "-i", "--interface", noSource, "http://"+from+"/proxy.pac")
		if code != 0 {
			t.Fatal(out)
		}
		wants(t, "curl http://"+from+"/proxy.pac", out, "HTTP/1.1 200 OK", "Content-Type: application/x-ns-proxy-autoconfig", "Cache-Control: no-store",
			`return "PROXY `+g.proxy+`";`, `".corp.test"`, "// 10.0.0.0/8")
	}
	_, port, _ := strings.Cut(g.proxy, ":")
	out, _ := tool(t, "curl", "-sS", "--interface", noSource, "--resolve", "proxy.corp.test:"+port+":127.0.0.1", "http://proxy.corp.test:"+port+"/proxy.pac")
	wants(t, "by name", out, `return "PROXY proxy.corp.test:`+port+`";`)
	out, _ = tool(t, "curl", "-sS", "--interface", noSource, "-H", `Host: x";alert(1)//:1`, "http://"+g.proxy+"/proxy.pac")
	if strings.Contains(out, "alert") {
		t.Errorf("%s", out)
	}
}
