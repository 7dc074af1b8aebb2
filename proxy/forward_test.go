package proxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// site is an HTTP origin on loopback.
func site(t testing.TB, h http.HandlerFunc) (port int) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.Listener.Addr().(*net.TCPAddr).Port
}

// dump answers with the request as it arrived.
func dump(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "%s %s\nHost: %s\n", r.Method, r.RequestURI, r.Host)
	r.Header.Write(w)
}

func TestT13TargetWinsOverHost(t *testing.T) {
	port := site(t, dump)
	g := start(t, policyFor("", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	// T13: the Host field says something else.
	c.send("GET http://API.ok.test.:%d/a%%2Fb?q=%%20 HTTP/1.1\r\nHost: evil.test\r\nAccept-Encoding: br\r\nX-End: 1\r\n"+
		"Connection: close, X-Hop, TE\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\nTE: trailers\r\n"+
		"X-Forwarded-For: 192.0.2.1\r\nForwarded: for=192.0.2.1\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n", port)
	resp, body := c.response("GET")
	want := fmt.Sprintf("GET /a%%2Fb?q=%%20\nHost: api.ok.test:%d\nAccept-Encoding: br\r\nConnection: TE\r\nTe: trailers\r\nVia: 1.1 %s\r\nX-End: 1\r\n", port, pseudonym)
	if resp.StatusCode != 200 || body != want {
		t.Errorf("%s\n%s\nwant\n%s", resp.Status, body, want)
	}
	if resp.Header.Get("Via") != "1.1 "+pseudonym || !resp.Close {
		t.Errorf("%v", resp.Header)
	}
	ev := g.next()
	if ev.Kind != event.HTTP || ev.Method != "GET" || ev.Name != "api.ok.test" || int(ev.Port) != port || ev.Status != 200 || ev.Decision.Rule != "r" ||
		ev.Decision.Verdict != policy.Allow || ev.BytesDown != int64(len(body)) || ev.Destination.Port() != uint16(port) || ev.Error != "" || ev.ConnTime <= 0 {
		t.Errorf("%+v", ev)
	}
	if c.rest() != "" {
		t.Error("the connection goes on after Connection: close")
	}
}

// TestT14TargetForms refuses other forms than absolute-form, and what cannot be forwarded.
func TestT14TargetForms(t *testing.T) {
	port := site(t, dump)
	g := start(t, policyFor("", port, 80))
	for _, tt := range []struct {
		line   string
		status int
		reason policy.Reason
	}{
		{"GET / HTTP/1.1", 400, policy.ReasonBadRequest},
		{"OPTIONS * HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET https://api.ok.test/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET ftp://api.ok.test/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http:api.ok.test HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http:///x HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://api.ok.test:/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://api.ok.test:0/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://api.ok.test:080/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://u@api.ok.test/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://api.ok.test@evil.test/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://api.ok.test%00.evil.test/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://api.ok.test#.evil.test/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://2130706433/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://[fe80::1%25eth0]/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://::1/ HTTP/1.1", 400, policy.ReasonBadRequest},
		{"GET http://evil.test/ HTTP/1.1", 403, policy.ReasonNotListed},
		{"GET http://api.ok.test.evil.test/ HTTP/1.1", 403, policy.ReasonNotListed},
		{"GET http://api.ok.test:22/ HTTP/1.1", 403, policy.ReasonPortNotAllowed},
		{"GET http://127.0.0.1/ HTTP/1.1", 403, policy.ReasonIPLiteral},
		{"GET http://[::1]/ HTTP/1.1", 403, policy.ReasonIPLiteral},
	} {
		c := g.dial()
		c.send("%s\r\nHost: api.ok.test\r\n\r\n", tt.line)
		resp, _ := c.response("GET")
		if resp.StatusCode != tt.status || resp.Header.Get("X-Sallyport-Reason") != tt.reason.String() {
			t.Errorf("%s: %s %v", tt.line, resp.Status, resp.Header)
		}
		if ev := g.next(); ev.Kind != event.HTTP || ev.Decision.Reason != tt.reason || ev.Status != tt.status {
			t.Errorf("%s: %+v", tt.line, ev)
		}
		c.Close()
	}
	if n := g.resolver.asked.Load(); n != 0 {
		t.Errorf("%d look-ups", n)
	}
}

// TestT16Malformed goes as far as a first request on a connection goes, and
// what net/http refuses later.
func TestT16Malformed(t *testing.T) {
	port := site(t, dump)
	g := start(t, policyFor("", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	uri := fmt.Sprintf("http://api.ok.test:%d/", port)
	for _, tt := range []struct {
		first, bad string
	}{
		{"", "POST " + uri + " HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{"", "GET " + uri + " HTTP/1.1\nHost: a\n\n"},
		{"", "GET " + uri + " HTTP/1.1\r\nHost : a\r\n\r\n"},
		{"GET " + uri + " HTTP/1.1\r\nHost: a\r\n\r\n", "GET " + uri + " HTTP/1.1\r\nHost : a\r\n\r\n"},
		{"GET " + uri + " HTTP/1.1\r\nHost: a\r\n\r\n", "G\x00T\r\n\r\n"},
		{"GET " + uri + " HTTP/1.1\r\nHost: a\r\n\r\n", "POST " + uri + " HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n"},
	} {
		c := g.dial()
		if tt.first != "" {
			c.send("%s", tt.first)
			if resp, _ := c.response("GET"); resp.StatusCode != 200 {
				t.Fatal(resp.Status)
			}
			g.next()
		}
		c.send("%s", tt.bad)
		resp, _ := c.response("GET")
		if resp.StatusCode < 400 || resp.Header.Get("X-Sallyport-Reason") != "bad_request" || !resp.Close {
			t.Errorf("%q: %s %v", tt.bad, resp.Status, resp.Header)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonBadRequest || ev.Status != resp.StatusCode || ev.Error == "" {
			t.Errorf("%q: %+v", tt.bad, ev)
		}
		c.Close()
	}
}

// TestT15EachRequest has one connection, several hosts, CONNECT last.
func TestT15EachRequest(t *testing.T) {
	port := site(t, dump)
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", port)+fmt.Sprintf("      - {id: s, names: [ssh.ok.test], ports: [%d], protocol: tcp, private_destinations: [127.0.0.0/8]}\n", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	g.resolver.set("ssh.ok.test", "127.0.0.1")
	c := g.dial()
	for _, tt := range []struct {
		host   string
		status int
	}{{"api.ok.test", 200}, {"evil.test", 403}, {"api.ok.test", 200}} {
		method, rest := "POST", "Content-Length: 3\r\n\r\nabc"
		if tt.status == 403 { // a body that nobody reads would end the connection
			method, rest = "GET", "\r\n"
		}
		c.send("%s http://%s:%d/ HTTP/1.1\r\nHost: api.ok.test\r\n%s", method, tt.host, port, rest)
		if resp, body := c.response("POST"); resp.StatusCode != tt.status {
			t.Errorf("%s: %s %s", tt.host, resp.Status, body)
		}
		ev := g.next()
		if ev.Name != tt.host || ev.Status != tt.status {
			t.Errorf("%+v", ev)
		}
		if tt.status == 200 && ev.BytesUp != 3 {
			t.Errorf("%d bytes up", ev.BytesUp)
		}
	}
	if n := g.resolver.asked.Load(); n != 1 { // the second one used the same connection
		t.Errorf("%d look-ups", n)
	}
	c.send("CONNECT ssh.ok.test:%d HTTP/1.1\r\nHost: x\r\n\r\nearly", o.port())
	if resp, body := c.response("CONNECT"); resp.StatusCode != 200 {
		t.Fatal(resp.Status, body)
	}
	c.send(" bird")
	c.CloseWrite()
	if got := o.got(t); got != "early bird" {
		t.Errorf("%q", got)
	}
	if ev := g.next(); ev.Kind != event.Connect || ev.Protocol != policy.ProtocolTCP || ev.Name != "ssh.ok.test" || ev.Decision.Rule != "s" || ev.BytesUp != 10 {
		t.Errorf("%+v", ev)
	}
	c = g.dial()
	c.send("GET http://evil.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
	c.response("GET")
	c.send("CONNECT evil.test:443 HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, _ := c.response("CONNECT"); resp.Status != "403 Forbidden by egress policy" {
		t.Error(resp.Status)
	}
}

// TestT15GroupsShareNothing: no upstream connection serves two groups.
func TestT15GroupsShareNothing(t *testing.T) {
	var mu sync.Mutex
	peers := map[string]int{}
	port := site(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		peers[r.RemoteAddr]++
	})
	rule := fmt.Sprintf("[{names: [.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}]", port)
	text := "version: 1\ngroups:\n  - {name: a, sources: [127.0.0.1/32], allow: " + rule + "}\n  - {name: b, sources: [127.0.0.2/32], allow: " + rule + "}\n"
	g := start(t, text)
	g.resolver.set("api.ok.test", "127.0.0.1")
	get := func(from string) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		conn, err := d.Dial("tcp", g.addr)
		if err != nil {
			t.Skipf("cannot dial from %s: %v", from, err)
		}
		defer conn.Close()
		c := &client{conn.(*net.TCPConn), bufio.NewReader(conn), t}
		c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
		if resp, _ := c.response("GET"); resp.StatusCode != 200 {
			t.Error(resp.Status)
		}
		g.next()
	}
	get("127.0.0.1")
	get("127.0.0.1")
	get("127.0.0.2")
	if len(peers) != 2 {
		t.Errorf("connections and their requests: %v; want two and one", peers)
	}
	g.store.Swap(compile(t, text+"    \n# the same, and yet another revision\nlists: [{name: l, names: [x.test]}]\n"))
	get("127.0.0.1")
	if len(peers) != 3 {
		t.Errorf("connections after the change of policy: %v; want a new one", peers)
	}
}

// TestStreaming checks both directions: bytes arrive before the end is in sight.
func TestStreaming(t *testing.T) {
	for _, contentType := range []string{"text/event-stream", "application/octet-stream"} {
		port := site(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", contentType)
			rc := http.NewResponseController(w)
			rc.EnableFullDuplex()
			br := bufio.NewReader(r.Body)
			for {
				line, err := br.ReadString('\n')
				if err != nil {
					return
				}
				io.WriteString(w, "echo "+line)
				rc.Flush()
			}
		})
		g := start(t, policyFor("", port))
		g.resolver.set("api.ok.test", "127.0.0.1")
		c := g.dial()
		c.send("POST http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", port)
		var body *bufio.Reader
		for i, line := range []string{"one\n", "two\n"} {
			c.send("%x\r\n%s\r\n", len(line), line)
			if i == 0 {
				resp, err := http.ReadResponse(c.Reader, nil)
				if err != nil || resp.StatusCode != 200 {
					t.Fatal(resp, err)
				}
				body = bufio.NewReader(resp.Body)
			}
			if got, err := body.ReadString('\n'); got != "echo "+line {
				t.Fatalf("%q, %v", got, err)
			}
		}
		c.send("0\r\n\r\n")
		if rest, err := io.ReadAll(body); len(rest) != 0 || err != nil {
			t.Errorf("%q, %v", rest, err)
		}
		if ev := g.next(); ev.BytesUp != 8 || ev.BytesDown != 18 {
			t.Errorf("%+v", ev)
		}
	}
}

// TestBodies moves all kinds of bodies, and sees their ends.
func TestBodies(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	port := site(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/known":
			w.Header().Set("Content-Length", fmt.Sprint(len(big)))
			w.Write(big)
		case "/chunks":
			w.Write(big)
		case "/trailer":
			w.Header().Set("Trailer", "X-Sum")
			w.Write(big)
			w.Header().Set("X-Sum", "7")
		case "/none":
			w.WriteHeader(204)
		case "/not-modified":
			w.WriteHeader(304)
		case "/upload":
			n, err := io.Copy(io.Discard, r.Body)
			fmt.Fprintf(w, "%d %v %s", n, err, r.Trailer.Get("X-Up"))
		case "/breaks":
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("half"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case "/breaks-in-chunks":
			w.Write([]byte("half"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
	})
	g := start(t, policyFor("", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	do := func(method, path, fields, body string) (*http.Response, string, error) {
		c := g.dial()
		c.send("%s http://api.ok.test:%d%s HTTP/1.1\r\nHost: x\r\n%s\r\n%s", method, port, path, fields, body)
		resp, err := http.ReadResponse(c.Reader, &http.Request{Method: method})
		if err == nil && resp.StatusCode == 100 {
			resp, err = http.ReadResponse(c.Reader, &http.Request{Method: method})
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		c.Close()
		return resp, string(b), err
	}
	for _, path := range []string{"/known", "/chunks", "/trailer"} {
		if resp, body, err := do("GET", path, "", ""); resp.StatusCode != 200 || body != string(big) || err != nil || (path == "/trailer") != (resp.Trailer.Get("X-Sum") == "7") {
			t.Errorf("GET %s: %s, %d bytes, %v", path, resp.Status, len(body), err)
		}
		if ev := g.next(); ev.BytesDown != int64(len(big)) {
			t.Errorf("GET %s: %+v", path, ev)
		}
	}
	if resp, body, err := do("HEAD", "/known", "", ""); resp.ContentLength != int64(len(big)) || body != "" || err != nil {
		t.Errorf("HEAD: %v %v", resp.Header, err)
	}
	g.next()
	for path, status := range map[string]int{"/none": 204, "/not-modified": 304} {
		if resp, body, err := do("GET", path, "", ""); resp.StatusCode != status || body != "" || err != nil {
			t.Errorf("GET %s: %s, %q, %v", path, resp.Status, body, err)
		}
		g.next()
	}
	if _, body, err := do("POST", "/upload", fmt.Sprintf("Content-Length: %d\r\nExpect: 100-continue\r\n", len(big)), string(big)); body != "1048576 <nil> " || err != nil {
		t.Errorf("upload: %q, %v", body, err)
	}
	if ev := g.next(); ev.BytesUp != int64(len(big)) || ev.Status != 200 {
		t.Errorf("upload: %+v", ev)
	}
	if _, body, err := do("POST", "/upload", "Transfer-Encoding: chunked\r\nTrailer: X-Up\r\n", "3\r\nabc\r\n0\r\nX-Up: 9\r\n\r\n"); body != "3 <nil> 9" || err != nil {
		t.Errorf("chunked upload: %q, %v", body, err)
	}
	g.next()
	// A response that breaks off must not look whole.
	for _, path := range []string{"/breaks", "/breaks-in-chunks"} {
		if _, body, err := do("GET", path, "", ""); body != "half" || err == nil {
			t.Errorf("GET %s: %q, %v", path, body, err)
		}
		if ev := g.next(); ev.Error == "" || ev.BytesDown != 4 {
			t.Errorf("GET %s: %+v", path, ev)
		}
	}
}

// TestBadOrigin answers for far sides that do not speak HTTP.
func TestBadOrigin(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()), func(c *Config) { c.Timeouts.Idle = time.Second })
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, tt := range []struct {
		answer string
		status int
		token  string
	}{
		{"SSH-2.0-x\r\n\r\n", 502, "http_protocol_error"},
		{"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", 502, "http_protocol_error"},
		{"", 502, "connection_terminated"},
		{"silence", 504, "http_response_timeout"},
	} {
		c := g.dial()
		c.send("POST http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", o.port())
		u := o.accept(t)
		if tt.answer != "silence" {
			if _, err := http.ReadRequest(bufio.NewReader(u)); err != nil {
				t.Fatal(err)
			}
			io.WriteString(u, tt.answer)
			u.Close()
		}
		resp, body := c.response("POST")
		if resp.StatusCode != tt.status || !strings.Contains(resp.Header.Get("Proxy-Status"), "error="+tt.token+";") || strings.Contains(body, "127.0.0.1:") {
			t.Errorf("%q: %s %v\n%s", tt.answer, resp.Status, resp.Header, body)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonConnectFailed || ev.Status != tt.status || ev.Error == "" {
			t.Errorf("%q: %+v", tt.answer, ev)
		}
	}
}

// TestClientLeavesWhileWritten says so in the event if the write of a response is what
// finds out.
func TestClientLeavesWhileWritten(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, method := range []string{"GET", "POST"} {
		c := g.dial()
		c.send("%s http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", method, o.port())
		u := o.accept(t)
		asked(t, u)
		io.WriteString(u, "HTTP/1.1 200 OK\r\n\r\nstart")
		if _, err := http.ReadResponse(c.Reader, nil); err != nil {
			t.Fatal(err)
		}
		c.SetLinger(0) // a reset
		c.Close()
		for buf := make([]byte, 64<<10); ; {
			if _, err := u.Write(buf); err != nil {
				break
			}
		}
		if ev := g.next(); ev.Status != 200 || ev.Error == "" || !ev.Aborted {
			t.Errorf("%s: %+v", method, ev)
		}
	}
}

// TestClientLeaves gives up the far side when nobody waits for it any more.
func TestClientLeaves(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
	u := bufio.NewReader(o.accept(t))
	if _, err := http.ReadRequest(u); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if b, err := io.ReadAll(u); len(b) != 0 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if ev := g.next(); ev.Decision.Verdict != policy.Allow || ev.Error == "" || ev.Status != 0 {
		t.Errorf("%+v", ev)
	}
}
func TestPathOf(t *testing.T) {
	for target, want := range map[string]string{
		"http://a.test:80/x/y?q=secret": "/x/y?", "http://a.test": "", "http://a.test?q": "?", "/x?u=http://b.test/": "/x?", "/http://b/c": "/http://b/c", "*": "*", "": "",
	} {
		if got := pathOf(target); got != want {
			t.Errorf("pathOf(%q) = %q, want %q", target, got, want)
		}
	}
}
