package proxy

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"sallyport/policy"
	"sallyport/policy/event"
)

// badHeads are requests whose head is refused; %s is the target's authority.
var badHeads = []struct {
	name, request string
	status        int
}{
	{"both lengths", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
	{"both lengths, the other way round", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400},
	{"two lengths", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nhello", 400},
	{"the same length twice", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400},
	{"list of lengths", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\nhello", 400},
	{"length with a sign", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello", 400},
	{"length in hexadecimal", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\nhello", 400},
	{"length beyond 63 bits", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551621\r\n\r\nhello", 400},
	{"coding before chunked", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400},
	{"coding after chunked", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400},
	{"chunked twice", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
	{"identity", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n", 400},
	{"quoted chunked", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n", 400},
	{"vertical tab before chunked", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \vchunked\r\n\r\n0\r\n\r\n", 400},
	{"empty coding", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n", 400},
	{"chunks in HTTP/1.0", "POST http://%s/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
	{"bare LF after the request line", "GET http://%s/ HTTP/1.1\nHost: a\r\n\r\n", 400},
	{"bare LF after a field", "GET http://%s/ HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", 400},
	{"bare LF for the empty line", "GET http://%s/ HTTP/1.1\r\nHost: a\r\n\n", 400},
	{"bare CR in the request line", "GET http://%s/ HTTP/1.1\rHost: a\r\n\r\n", 400},
	{"bare CR in a value", "GET http://%s/ HTTP/1.1\r\nHost: a\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n", 400},
	{"folded field", "GET http://%s/ HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n", 400},
	{"folded coding", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400},
	{"space before the first field", "GET http://%s/ HTTP/1.1\r\n Host: a\r\n\r\n", 400},
	{"space before the colon", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\nhello", 400},
	{"tab before the colon", "POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n", 400},
	{"NUL in a value", "GET http://%s/ HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400},
	{"control character in a value", "GET http://%s/ HTTP/1.1\r\nHost: a\r\nX: a\x1bb\r\n\r\n", 400},
	{"name that is no token", "GET http://%s/ HTTP/1.1\r\nHost: a\r\nX(y): z\r\n\r\n", 400},
	{"name with UTF-8", "GET http://%s/ HTTP/1.1\r\nHost: a\r\nXé: z\r\n\r\n", 400},
	{"no name", "GET http://%s/ HTTP/1.1\r\nHost: a\r\n: z\r\n\r\n", 400},
	{"no colon", "GET http://%s/ HTTP/1.1\r\nHost: a\r\nX\r\n\r\n", 400},
	{"two Hosts", "GET http://%s/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400},
	{"no Host", "GET http://%s/ HTTP/1.1\r\n\r\n", 400},
	{"NUL in the method", "G\x00T http://%s/ HTTP/1.1\r\nHost: a\r\n\r\n", 400},
	{"two spaces", "GET  http://%s/ HTTP/1.1\r\nHost: a\r\n\r\n", 400},
	{"HTTP/1.2", "GET http://%s/ HTTP/1.2\r\nHost: a\r\n\r\n", 505},
	{"preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n%.0s", 505},
	{"an empty line first", "\r\nGET http://%s/ HTTP/1.1\r\nHost: a\r\n\r\n", 400},
	{"TLS", "\x16\x03\x01\x00\x05hello%.0s", 400},
}

// TestT16RequestSmuggling sends requests, each of which must be refused, at every place where a
// request may stand: on a connection and inside a CONNECT.
func TestT16RequestSmuggling(t *testing.T) {
	var reached atomic.Int64 // whole requests but for the good ones
	port := site(t, func(_ http.ResponseWriter, r *http.Request) {
		// A body may be found out when its head is gone. It must not look complete.
		if _, err := io.Copy(io.Discard, r.Body); err == nil && r.URL.Path != "/good" {
			reached.Add(1)
		}
	})
	authority := fmt.Sprintf("api.ok.test:%d", port)
	type attack struct {
		name, request string
		status        int
	}
	var attacks []attack
	for _, tt := range badHeads {
		attacks = append(attacks, attack{tt.name, fmt.Sprintf(tt.request, authority), tt.status})
	}
	for _, tt := range badBodies {
		attacks = append(attacks, attack{tt.name, strings.Replace(testChunked, "a.test", authority, 1) + tt.body, 400})
	}
	good := "GET http://" + authority + "/good HTTP/1.1\r\nHost: " + authority + "\r\n\r\n"
	upload := "POST http://" + authority + "/good HTTP/1.1\r\nHost: " + authority + "\r\nContent-Length: 3\r\n\r\nabc"
	attacks = append(attacks, attack{"garbage", "garbage\r\n\r\n", 400})
	g := start(t, policyFor("", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	for _, tt := range attacks {
		for _, place := range []string{"first", "kept alive", "pipelined", "after a body", "first in a CONNECT", "kept alive in a CONNECT", "pipelined in a CONNECT"} {
			if place == "first in a CONNECT" && (tt.status == 505 || strings.ContainsAny(tt.request[:1], "\r\x16g") || strings.HasPrefix(tt.request, "G\x00") || strings.HasPrefix(tt.request, "GET  ")) {
				continue // what does not begin like HTTP is not taken for HTTP there
			}
			t.Run(tt.name+", "+place, func(t *testing.T) {
				g.t = t
				c := g.dial()
				c.t = t
				inside := strings.Contains(place, "CONNECT")
				if inside {
					c = g.connect(authority)
				}
				goods := 0
				switch {
				case strings.HasPrefix(place, "first"):
					c.send("%s%s", tt.request, good)
				case strings.HasPrefix(place, "kept alive"):
					goods = 1
					c.send("%s", good)
					if resp, _ := c.response("GET"); resp.StatusCode != 200 {
						t.Fatal(resp.Status)
					}
					c.send("%s%s", tt.request, good)
				case strings.HasPrefix(place, "pipelined"):
					goods = 2
					c.send("%s", good+good+tt.request+good)
				default:
					goods = 1
					c.send("%s", upload+tt.request+good)
				}
				for range goods {
					if strings.HasPrefix(place, "kept alive") {
						break
					}
					if resp, _ := c.response("GET"); resp.StatusCode != 200 {
						t.Fatalf("a good request before: %s", resp.Status)
					}
				}
				resp, _ := c.response("GET")
				if resp.StatusCode != tt.status && resp.StatusCode != 400 || resp.Header.Get("X-Sallyport-Reason") != "bad_request" || !resp.Close {
					t.Errorf("%s %v", resp.Status, resp.Header)
				}
				if rest := c.rest(); rest != "" {
					t.Errorf("after the refusal: %q", rest)
				}
				c.Close()
				for range goods {
					if ev := g.next(); ev.Status != 200 || ev.Decision.Verdict != policy.Allow {
						t.Errorf("a good request before: %+v", ev)
					}
				}
				ev := g.next()
				if ev.Decision.Reason != policy.ReasonBadRequest || ev.Kind == event.HTTP && ev.Status != resp.StatusCode || ev.Error == "" {
					t.Errorf("%+v", ev)
				}
				if inside && ev.Kind != event.Connect { // it got as far as a session, which has an event too
					if ev := g.next(); ev.Decision.Verdict != policy.Allow || ev.Kind != event.Connect {
						t.Errorf("%+v", ev)
					}
				}
				g.quiet()
			})
		}
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("%d requests reached the origin", n)
	}
}
