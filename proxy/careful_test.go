package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// asked reads a request at the origin, as it is on the wire.
func asked(t testing.TB, u net.Conn) (*bufio.Reader, string) {
	t.Helper()
	br := bufio.NewReader(u)
	var head strings.Builder
	for {
		line, err := br.ReadString('\n')
		if err != nil {
			t.Fatalf("origin: after %q: %v", head.String(), err)
		}
		head.WriteString(line)
		if line == "\r\n" {
			return br, head.String()
		}
	}
}

// TestT19LoopByVia refuses what has been through this process, however it comes.
func TestT19LoopByVia(t *testing.T) {
	port := site(t, dump)
	authority := fmt.Sprintf("api.ok.test:%d", port)
	for _, tt := range []struct {
		name, fields string
		looped       bool
	}{
		{"this process", "Via: 1.1 " + pseudonym + "\r\n", true},
		{"this process among others", "Via: 1.0 a, 1.1 " + pseudonym + " (x), 1.1 b\r\n", true},
		{"in a second field", "Via: 1.1 a\r\nVia: HTTP/1.1 " + pseudonym + "\r\n", true},
		{"hidden by Connection", "Connection: Via\r\nVia: 1.1 " + pseudonym + "\r\n", true},
		{"another gate", "Via: 1.1 sallyport-00000000\r\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, policyFor("", port))
			g.resolver.set("api.ok.test", "127.0.0.1")
			for _, method := range []string{"GET", "CONNECT"} {
				for _, later := range []bool{false, true} {
					c := g.dial()
					if later {
						c.send("GET http://evil.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
						c.response("GET")
						g.next()
					}
					before := g.resolver.asked.Load()
					target := "http://" + authority + "/"
					if method == "CONNECT" {
						target = authority
					}
					c.send("%s %s HTTP/1.1\r\nHost: x\r\n%s\r\n", method, target, tt.fields)
					resp, err := http.ReadResponse(c.Reader, &http.Request{Method: method})
					if err != nil {
						t.Fatal(err)
					}
					if !tt.looped {
						if resp.StatusCode != 200 {
							t.Errorf("%s: %s", method, resp.Status)
						}
						c.Close()
						g.next()
						continue
					}
					if resp.StatusCode != 403 || !strings.Contains(resp.Header.Get("Proxy-Status"), "error=proxy_loop_detected") {
						t.Errorf("%s: %s %v", method, resp.Status, resp.Header)
					}
					if ev := g.next(); ev.Decision.Reason != policy.ReasonLoop || ev.Decision.Group != "g" || ev.Status != 403 {
						t.Errorf("%s: %+v", method, ev)
					}
					if n := g.resolver.asked.Load() - before; n > 0 {
						t.Errorf("%s: %d look-ups", method, n)
					}
					c.Close()
				}
			}
		})
	}
}

func TestMaxForwards(t *testing.T) {
	port := site(t, dump)
	g := start(t, policyFor("", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, tt := range []struct {
		request, fields string
		status          int
		want            string // in the body, or in Allow
	}{
		{"OPTIONS http://api.ok.test:%d/x", "Max-Forwards: 3\r\n", 200, "Max-Forwards: 2\r\n"},
		{"OPTIONS http://api.ok.test:%d/x", "Max-Forwards: 1\r\n", 200, "Max-Forwards: 0\r\n"},
		{"OPTIONS http://api.ok.test:%d/x", "Max-Forwards: 0\r\n", 200, "OPTIONS"},
		{"OPTIONS http://api.ok.test:%d/x", "Max-Forwards: -1\r\n", 400, ""},
		{"OPTIONS http://api.ok.test:%d/x", "Max-Forwards: 1\r\nMax-Forwards: 2\r\n", 400, ""},
		{"OPTIONS http://api.ok.test:%d/x", "Max-Forwards: 99999999999\r\n", 400, ""},
		{"GET http://api.ok.test:%d/x", "Max-Forwards: 0\r\n", 200, "Max-Forwards: 0\r\n"}, // means nothing there
		{"OPTIONS http://evil.test:%d/x", "Max-Forwards: 0\r\n", 403, ""},
		{"OPTIONS http://api.ok.test:%d", "", 200, ""}, // net/http answers "OPTIONS *" itself
		{"OPTIONS http://api.ok.test:%d/", "", 200, "OPTIONS /\n"},
		{"TRACE http://api.ok.test:%d/", "Cookie: secret\r\n", 501, ""},
		{"TRACE http://api.ok.test:%d/", "Max-Forwards: 0\r\n", 501, ""},
	} {
		if strings.HasSuffix(tt.request, "%d") {
			o := listen(t, "127.0.0.1:0")
			g := start(t, policyFor("", o.port()))
			g.resolver.set("api.ok.test", "127.0.0.1")
			g.dial().send(tt.request+" HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
			if _, head := asked(t, o.accept(t)); !strings.HasPrefix(head, "OPTIONS * HTTP/1.1\r\n") {
				t.Errorf("%q", head)
			}
		}
		c := g.dial()
		c.send(tt.request+" HTTP/1.1\r\nHost: x\r\n%s\r\n", port, tt.fields)
		resp, body := c.response("GET")
		if resp.StatusCode != tt.status || !strings.Contains(body+resp.Header.Get("Allow"), tt.want) || strings.Contains(body, "secret") {
			t.Errorf("%s, %q: %s %v\n%s", tt.request, tt.fields, resp.Status, resp.Header, body)
		}
		if ev := g.next(); ev.Status != tt.status || (ev.Destination.IsValid() && tt.want == "OPTIONS") {
			t.Errorf("%s, %q: %+v", tt.request, tt.fields, ev)
		}
		c.Close()
	}
}

// TestInterim passes 1xx on, to those who know it.
func TestInterim(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	const final = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
	for _, tt := range []struct {
		version, answer string
		interims        []int
		status          int
	}{
		{"1.1", "HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nConnection: X-Hop\r\nX-Hop: 1\r\n\r\n" + final, []int{103}, 200},
		{"1.1", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + final, []int{100, 102}, 200},
		{"1.0", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + final, nil, 200},
		{"1.0", "HTTP/1.0 200 OK\r\n\r\nok", nil, 200},
		{"1.1", strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", maxInterims+1), nil, 502},
	} {
		c := g.dial()
		c.send("GET http://api.ok.test:%d/ HTTP/%s\r\nHost: x\r\n\r\n", o.port(), tt.version)
		u := o.accept(t)
		asked(t, u)
		io.WriteString(u, tt.answer)
		u.(*net.TCPConn).CloseWrite()
		var interims []int
		for {
			resp, err := http.ReadResponse(c.Reader, nil)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode >= 200 {
				body, err := io.ReadAll(resp.Body)
				if resp.StatusCode != tt.status || tt.status == 200 && (string(body) != "ok" || resp.Header.Get("Link") != "") || err != nil {
					t.Errorf("%q: %s %v %q, %v", tt.answer, resp.Status, resp.Header, body, err)
				}
				break
			}
			if interims = append(interims, resp.StatusCode); resp.StatusCode == 103 && (resp.Header.Get("Link") == "" || resp.Header.Get("X-Hop") != "" || resp.Header.Get("Via") != viaFields[1][0]) {
				t.Errorf("%v", resp.Header)
			}
		}
		if fmt.Sprint(interims) != fmt.Sprint(tt.interims) && tt.status == 200 {
			t.Errorf("%q: 1xx: %v, want %v", tt.answer, interims, tt.interims)
		}
		if ev := g.next(); ev.Status != tt.status {
			t.Errorf("%+v", ev)
		}
		c.Close()
		u.Close()
	}
}

// TestExpectContinue is end to end: the client is told to send its content when the
// far side says so, once.
func TestExpectContinue(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	post := func(version, expect string) (*client, net.Conn, *bufio.Reader, string) {
		c := g.dial()
		c.send("POST http://api.ok.test:%d/ HTTP/%s\r\nHost: x\r\nContent-Length: 5\r\nExpect: %s\r\n\r\n", o.port(), version, expect)
		u := o.accept(t)
		br, head := asked(t, u)
		return c, u, br, head
	}
	t.Run("the far side wants it", func(t *testing.T) {
		c, u, br, head := post("1.1", "100-continue")
		if !strings.Contains(head, "\r\nExpect: 100-continue\r\n") {
			t.Errorf("%q", head)
		}
		io.WriteString(u, "HTTP/1.1 100 Continue\r\n\r\n")
		if resp, err := http.ReadResponse(c.Reader, nil); err != nil || resp.StatusCode != 100 {
			t.Fatal(resp, err)
		}
		c.send("hello")
		b := make([]byte, 5)
		if _, err := io.ReadFull(br, b); string(b) != "hello" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		io.WriteString(u, "HTTP/1.1 201 Created\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		if resp, _ := c.response("POST"); resp.StatusCode != 201 {
			t.Error(resp.Status)
		}
		g.next()
	})
	t.Run("the far side does not want it", func(t *testing.T) {
		c, u, _, _ := post("1.1", "100-continue")
		io.WriteString(u, "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		u.Close()
		if resp, _ := c.response("POST"); resp.StatusCode != 417 || !resp.Close {
			t.Error(resp)
		}
		if ev := g.next(); ev.Status != 417 || ev.BytesUp != 0 {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("HTTP/1.0", func(t *testing.T) {
		c, u, br, head := post("1.0", "100-continue")
		if strings.Contains(head, "Expect") {
			t.Errorf("%q", head)
		}
		c.send("hello")
		b := make([]byte, 5)
		if _, err := io.ReadFull(br, b); string(b) != "hello" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		io.WriteString(u, "HTTP/1.1 201 Created\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		if resp, _ := c.response("POST"); resp.StatusCode != 201 {
			t.Error(resp.Status)
		}
		g.next()
	})
	t.Run("something else", func(t *testing.T) {
		c := g.dial()
		c.send("POST http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: a-miracle\r\n\r\n", o.port())
		if resp, _ := c.response("POST"); resp.StatusCode != 417 {
			t.Error(resp.Status)
		}
		g.next()
	})
}

// before is an observer that does something first.
type before struct {
	event.Observer
	do func()
}

func (b before) Observe(ev *event.Event) {
	b.do()
	b.Observer.Observe(ev)
}

// TestEarlyAnswer has a client receive an answer at once that comes before its body,
// however long the rest of that is waited for.
func TestEarlyAnswer(t *testing.T) {
	t.Parallel() // it waits
	o := listen(t, "127.0.0.1:0")
	clients, answers := make(chan *client, 1), make(chan *http.Response, 1)
	g := start(t, policyFor("", o.port()), func(cfg *Config) {
		cfg.Observer = before{cfg.Observer, func() {
			resp, _ := http.ReadResponse((<-clients).Reader, nil)
			answers <- resp
		}}
	})
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, fields := range []string{"Content-Length: 5\r\nExpect: 100-continue\r\n", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"} {
		for name, status := range map[string]int{"api.ok.test": 401, "evil.test": 403} {
			c := g.dial()
			c.SetReadDeadline(time.Now().Add(patience / 4))
			clients <- c
			c.send("POST http://%s:%d/ HTTP/1.1\r\nHost: x\r\n%s\r\n", name, o.port(), fields)
			if status == 401 {
				u := o.accept(t)
				asked(t, u)
				io.WriteString(u, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
			}
			g.next()
			if resp := <-answers; resp == nil || resp.StatusCode != status || !resp.Close {
				t.Errorf("%s, %q: %+v", name, fields, resp)
			}
			c.Close()
		}
	}
}

// TestTrailers passes them on in both directions, announced or not.
func TestTrailers(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, announced := range []string{"", "Trailer: X-Sum\r\n"} {
		c := g.dial()
		c.send("POST http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nTE: trailers\r\nConnection: TE\r\nTransfer-Encoding: chunked\r\n%s\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n", o.port(), announced)
		u := o.accept(t)
		r, err := http.ReadRequest(bufio.NewReader(u))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		if string(body) != "abc" || err != nil || r.Trailer.Get("X-Sum") != "1" || r.Header.Get("Te") != "trailers" {
			t.Errorf("%q, %v, trailers %v, header %v", body, err, r.Trailer, r.Header)
		}
		io.WriteString(u, "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"+announced+"\r\n2\r\nok\r\n0\r\nX-Sum: 2\r\n\r\n")
		resp, got := c.response("POST")
		if got != "ok" || resp.Trailer.Get("X-Sum") != "2" {
			t.Errorf("%q, trailers %v", got, resp.Trailer)
		}
		g.next()
		c.Close()
		u.Close()
	}
}

// TestHTTP10 serves clients of HTTP/1.0, who see no chunks, and whose connection is
// kept only if they ask for it.
func TestHTTP10(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, tt := range []struct {
		fields, answer, want string
		kept, reset          bool
	}{
		{"", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok", false, false},
		{"Connection: keep-alive\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok", true, false},
		{"Connection: keep-alive\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "ok", false, false},
		{"", "HTTP/1.1 200 OK\r\n\r\nuntil the end", "until the end", false, false},
		// The end of the connection is all that this client has to go by: it is a reset.
		{"", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", "", false, true},
	} {
		c := g.dial()
		c.send("GET http://api.ok.test:%d/ HTTP/1.0\r\n%s\r\n", o.port(), tt.fields)
		u := o.accept(t)
		if _, head := asked(t, u); !strings.Contains(head, "\r\nVia: "+viaFields[0][0]+"\r\n") {
			t.Errorf("%q", head)
		}
		io.WriteString(u, tt.answer)
		u.(*net.TCPConn).CloseWrite()
		if tt.reset {
			if b, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%q: a clean end after %q", tt.answer, b)
			}
		} else {
			resp, body := c.response("GET")
			if body != tt.want || len(resp.TransferEncoding) > 0 || resp.Close == tt.kept {
				t.Errorf("%q: %q, %+v", tt.answer, body, resp)
			}
			if !tt.kept && c.rest() != "" {
				t.Error("the connection goes on")
			}
		}
		if ev := g.next(); (ev.Error != "") != tt.reset {
			t.Errorf("%+v", ev)
		}
		c.Close()
		u.Close()
	}
}

// TestTruncated has origins break off; no client may take that for the end.
func TestTruncated(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, answer := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n-1\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalfmore\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\nno colon\r\n\r\n",
	} {
		c := g.dial()
		c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
		u := o.accept(t)
		asked(t, u)
		io.WriteString(u, answer)
		u.(*net.TCPConn).CloseWrite()
		resp, err := http.ReadResponse(c.Reader, nil)
		if err == nil && resp.StatusCode == 200 {
			if body, err := io.ReadAll(resp.Body); err == nil {
				t.Errorf("%q: a clean end after %q", answer, body)
			}
		} else if err == nil && resp.StatusCode != 502 {
			t.Errorf("%q: %s", answer, resp.Status)
		}
		if ev := g.next(); ev.Error == "" {
			t.Errorf("%q: %+v", answer, ev)
		}
		c.Close()
		u.Close()
	}
}

// TestBadResponses answers 502 for heads that two readers might read differently.
func TestBadResponses(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()), func(c *Config) { c.Limits.HeaderBytes = 8 << 10 })
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, fields := range []string{"", "Connection: Upgrade\r\nUpgrade: websocket\r\n"} {
		for _, answer := range badResponses {
			c := g.dial()
			c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n%s\r\n", o.port(), fields)
			u := o.accept(t)
			asked(t, u)
			io.WriteString(u, answer)
			u.(*net.TCPConn).CloseWrite()
			if resp, _ := c.response("GET"); resp.StatusCode != 502 || !strings.Contains(resp.Header.Get("Proxy-Status"), "http_protocol_error") {
				t.Errorf("%.80q: %s %v", answer, resp.Status, resp.Header)
			}
			if ev := g.next(); ev.Decision.Reason != policy.ReasonConnectFailed || !strings.Contains(ev.Error, "malformed") {
				t.Errorf("%.80q: %+v", answer, ev)
			}
			c.Close()
			u.Close()
		}
	}
}

// TestTypeIsNotGuessed passes a response without a Content-Type on as it is.
func TestTypeIsNotGuessed(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, tt := range []struct{ method, fields string }{
		{"GET", ""},
		{"POST", "Content-Length: 0\r\n"},
		{"GET", "Connection: Upgrade\r\nUpgrade: websocket\r\n"},
	} {
		c := g.dial()
		c.send("%s http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n%s\r\n", tt.method, o.port(), tt.fields)
		u := o.accept(t)
		asked(t, u)
		io.WriteString(u, "HTTP/1.1 200 OK\r\nContent-Length: 13\r\nConnection: close\r\n\r\n<html></html>")
		resp, body := c.response(tt.method)
		if types := resp.Header["Content-Type"]; body != "<html></html>" || types != nil {
			t.Errorf("%s %q: %q of type %q", tt.method, tt.fields, body, types)
		}
		g.next()
		c.Close()
		u.Close()
	}
}

// TestHeadAlone passes the head of a stream on that has no event yet.
func TestHeadAlone(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, tt := range []struct{ method, fields string }{
		{"GET", "Transfer-Encoding: chunked\r\n"},
		{"GET", "Transfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n"},
		{"POST", "Transfer-Encoding: chunked\r\nContent-Type: text/event-stream; charset=utf-8\r\n"},
	} {
		c := g.dial()
		c.SetReadDeadline(time.Now().Add(patience / 4))
		c.send("%s http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", tt.method, o.port())
		u := o.accept(t)
		asked(t, u)
		fmt.Fprintf(u, "HTTP/1.1 200 OK\r\n%s\r\n", tt.fields)
		resp, err := http.ReadResponse(c.Reader, nil)
		if err != nil {
			t.Errorf("%s, %q: %v", tt.method, tt.fields, err)
		}
		io.WriteString(u, "2\r\nok\r\n0\r\n\r\n")
		if err == nil {
			if body, err := io.ReadAll(resp.Body); string(body) != "ok" || err != nil {
				t.Errorf("%s, %q: %q, %v", tt.method, tt.fields, body, err)
			}
		}
		g.next()
		c.Close()
		u.Close()
	}
}

// TestUnaskedResponse has an origin answer one request twice: the second response
// must not become that of another request.
func TestUnaskedResponse(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
	for i, bodies := range []string{answer + "good" + answer + "evil", answer + "good"} {
		c.send("GET http://api.ok.test:%d/%d HTTP/1.1\r\nHost: x\r\n\r\n", o.port(), i)
		u := o.accept(t)
		asked(t, u)
		io.WriteString(u, bodies)
		if _, body := c.response("GET"); body != "good" {
			t.Errorf("request %d: %q", i, body)
		}
		g.next()
	}
}

// TestHeadBounds bounds later heads as the first: in size and in time.
func TestHeadBounds(t *testing.T) {
	port := site(t, dump)
	for _, later := range []bool{false, true} {
		for _, tt := range []struct {
			name, head string
			status     int
		}{
			{"large", "GET http://api.ok.test/ HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 9<<10) + "\r\n\r\n", 431},
			{"endless", "GET http://api.ok.test/" + strings.Repeat("x", 9<<10), 431},
			{"slow", "GET http://api.ok.test/ HTTP/1.1\r\nHost", 408},
			{"one byte", "G", 408},
		} {
			t.Run(fmt.Sprintf("%s, later %v", tt.name, later), func(t *testing.T) {
				g := start(t, policyFor("", port), func(c *Config) {
					c.Limits.HeaderBytes = 8 << 10
					if tt.status == 408 {
						c.Timeouts.RequestHeader = 100 * time.Millisecond
					}
				})
				g.resolver.set("api.ok.test", "127.0.0.1")
				c := g.dial()
				if later {
					c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
					c.response("GET")
					g.next()
				}
				c.send("%s", tt.head)
				resp, _ := c.response("GET")
				if resp.StatusCode != tt.status || !resp.Close || c.rest() != "" {
					t.Errorf("%s %v", resp.Status, resp.Header)
				}
				if ev := g.next(); ev.Decision.Reason != policy.ReasonBadRequest || ev.Status != tt.status {
					t.Errorf("%+v", ev)
				}
				g.quiet()
			})
		}
	}
}

// TestIdleBody ends a request whose body does not come, and says so to the client.
func TestIdleBody(t *testing.T) {
	t.Parallel() // it waits
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()), func(c *Config) { c.Timeouts.Idle = 200 * time.Millisecond })
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, start := range []string{"Content-Length: 100\r\n\r\nstart", "Transfer-Encoding: chunked\r\n\r\n5\r\nstart\r\n"} {
		c := g.dial()
		c.send("POST http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n%s", o.port(), start)
		u := o.accept(t)
		br, _ := asked(t, u)
		if b, _ := io.ReadAll(br); !strings.Contains(string(b), "start") {
			t.Errorf("origin: %q", b)
		}
		if resp, _ := c.response("POST"); resp.StatusCode != 408 || !resp.Close || c.rest() != "" {
			t.Errorf("%s %v", resp.Status, resp.Header)
		}
		if ev := g.next(); ev.BytesUp != 5 || ev.Status != 408 || ev.Decision.Reason != policy.ReasonBadRequest || ev.Error != errBodySlow.Error() {
			t.Errorf("%+v", ev)
		}
	}
}

// TestT60ClientFieldsAreNotBelieved has a client say where it comes from.
func TestT60ClientFieldsAreNotBelieved(t *testing.T) {
	port := site(t, dump)
	text := "version: 1\ngroups:\n  - {name: a, sources: [127.0.0.1/32], allow: []}\n  - {name: b, sources: [192.0.2.0/24], allow: [{names: [.ok.test], ports: [" +
		fmt.Sprint(port) + "], private_destinations: [127.0.0.0/8]}]}\n"
	fields := "X-Forwarded-For: 192.0.2.1\r\nForwarded: for=192.0.2.1\r\nX-Real-IP: 192.0.2.1\r\nX-Client-IP: 192.0.2.1\r\n"
	g := start(t, text)
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n%s\r\n", port, fields)
	if resp, _ := c.response("GET"); resp.StatusCode != 403 {
		t.Error(resp.Status)
	}
	if ev := g.next(); ev.Decision.Group != "a" {
		t.Errorf("%+v", ev)
	}
	g = start(t, policyFor("", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	c = g.dial()
	c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n%s\r\n", port, fields)
	if _, body := c.response("GET"); strings.Contains(body, "192.0.2.1") {
		t.Errorf("%s", body)
	}
}

// TestBodiesAreNotHeld streams far more than the memory that it allows for.
func TestBodiesAreNotHeld(t *testing.T) {
	const size, room = 256 << 20, 64 << 20
	block := make([]byte, 64<<10)
	port := site(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			n, err := io.Copy(io.Discard, r.Body)
			fmt.Fprint(w, n, err)
			return
		}
		for range size / len(block) {
			w.Write(block)
		}
	})
	g := start(t, policyFor("", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	c := g.dial()
	c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
	resp, err := http.ReadResponse(c.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
		t.Errorf("%d bytes down, %v", n, err)
	}
	c.send("POST http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", port, size)
	for range size / len(block) {
		if _, err := c.TCPConn.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	if _, body := c.response("POST"); body != fmt.Sprint(size, nil) {
		t.Errorf("%s bytes up", body)
	}
	runtime.ReadMemStats(&after)
	// What was allocated, collected or not, bounds what was ever held.
	if n := after.TotalAlloc - before.TotalAlloc; n > room {
		t.Errorf("%d MiB allocated for %d MiB", n>>20, 2*size>>20)
	}
}

// TestRevokedResponse cuts a plain HTTP exchange when its rule goes away.
func TestRevokedResponse(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	authority := fmt.Sprintf("api.ok.test:%d", o.port())
	for _, started := range []bool{false, true} {
		for _, inside := range []bool{false, true} {
			g := start(t, policyFor("", o.port()))
			g.resolver.set("api.ok.test", "127.0.0.1")
			var c *client
			if inside {
				c = g.connect(authority)
			} else {
				c = g.dial()
			}
			c.send("GET http://%s/ HTTP/1.1\r\nHost: %[1]s\r\n\r\n", authority)
			u := o.accept(t)
			asked(t, u)
			if started {
				io.WriteString(u, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")
				if resp, err := http.ReadResponse(c.Reader, nil); err != nil || resp.StatusCode != 200 {
					t.Fatal(resp, err)
				}
				io.ReadFull(c, make([]byte, 4))
			}
			g.store.Swap(compile(t, policyFor("", o.port(), 1))) // the rest never notices
			g.store.Swap(compile(t, policyFor("", 1)))
			if !started && !inside {
				if resp, _ := c.response("GET"); resp.StatusCode != 403 || resp.Header.Get("X-Sallyport-Reason") != "policy_revoked" {
					t.Errorf("%s %v", resp.Status, resp.Header)
				}
			} else if rest, _ := io.ReadAll(c); len(rest) > 0 && started {
				t.Errorf("inside %v: %q", inside, rest)
			}
			if b, err := io.ReadAll(u); len(b) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("started %v, inside %v: origin: %q, %v", started, inside, b, err)
			}
			events := 1
			if inside {
				events = 2
			}
			for range events {
				if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked || ev.Decision.Verdict != policy.Deny {
					t.Errorf("started %v, inside %v: %+v", started, inside, ev)
				}
			}
		}
	}
}

// TestRevokedDial ends the way to the far side at once.
func TestRevokedDial(t *testing.T) {
	for _, request := range []string{"GET", "POST", "upgrade"} {
		g := start(t, policyFor("", 80))
		under := make(chan struct{})
		g.resolver.intercept(func(ctx context.Context, _ string) ([]netip.Addr, error) {
			close(under)
			<-ctx.Done()
			return nil, ctx.Err()
		})
		method, fields := request, "Content-Length: 0\r\n"
		if request == "upgrade" {
			method, fields = "GET", "Connection: Upgrade\r\nUpgrade: websocket\r\n"
		}
		c := g.dial()
		c.SetReadDeadline(time.Now().Add(patience / 4))
		c.send("%s http://api.ok.test/ HTTP/1.1\r\nHost: x\r\n%s\r\n", method, fields)
		<-under
		g.store.Swap(compile(t, policyFor("", 1)))
		if resp, err := http.ReadResponse(c.Reader, nil); err != nil || resp.StatusCode != 403 || resp.Header.Get("X-Sallyport-Reason") != "policy_revoked" {
			t.Errorf("%s: %+v, %v", request, resp, err)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked {
			t.Errorf("%s: %+v", request, ev)
		}
		c.Close()
	}
}

// TestStopped blames the end of the drain, and not the client, for what it cuts.
func TestStopped(t *testing.T) {
	for _, answer := range []string{"", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart"} {
		for _, request := range []string{"Content-Length: 0\r\n\r\n", "Content-Length: 9\r\n\r\nstart", "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"} {
			o := listen(t, "127.0.0.1:0")
			g := start(t, policyFor("", o.port()), func(c *Config) { c.Timeouts.Drain = 10 * time.Millisecond })
			g.resolver.set("api.ok.test", "127.0.0.1")
			c := g.dial()
			c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n%s", o.port(), request)
			u := o.accept(t)
			asked(t, u)
			io.WriteString(u, answer)
			if answer != "" {
				if _, err := http.ReadResponse(c.Reader, nil); err != nil {
					t.Fatal(err)
				}
			}
			g.srv.Shutdown(context.Background())
			if ev := g.next(); !strings.Contains(ev.Error, errDraining.Error()) || !ev.Aborted {
				t.Errorf("%q, %q: %q", request, answer, ev.Error)
			}
			c.Close()
		}
	}
}
