package proxy

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"sallyport/policy"
)

// Each of these got through once.

func TestTargetsInsideConnect(t *testing.T) {
	port := site(t, dump)
	for _, target := range []string{
		"ftp:http://evil.test/x", "http:evil.test/x", "x:/y", "foo://api.ok.test/", "https://api.ok.test/", "//evil.test/x", "evil.test/x", "evil.test:80",
	} {
		g := start(t, policyFor("", port))
		g.resolver.set("api.ok.test", "127.0.0.1")
		c := g.dial()
		c.send("CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n", port)
		if resp, body := c.response("CONNECT"); resp.StatusCode != 200 {
			t.Fatal(resp.Status, body)
		}
		c.send("GET %s HTTP/1.1\r\nHost: api.ok.test:%d\r\n\r\n", target, port)
		resp, body := c.response("GET")
		if resp.StatusCode == 200 && !strings.Contains(body, "GET //evil.test/x") || resp.StatusCode != 200 && resp.StatusCode != 400 && resp.StatusCode != 403 {
			t.Errorf("%q: %s\n%s", target, resp.Status, body)
		}
		c.Close()
	}
}

func TestNoRequestAfterABadBody(t *testing.T) {
	reached := make(chan string, 10)
	port := site(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached <- r.URL.Path
		io.Copy(io.Discard, r.Body)
	}))
	g := start(t, policyFor("", port))
	g.resolver.set("api.ok.test", "127.0.0.1")
	host := fmt.Sprintf("api.ok.test:%d", port)
	second := "GET http://" + host + "/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
	for _, body := range []string{"zz\r\n" + second, "5\r\nabc" + second, "3\r\nabcXX" + second} {
		c := g.dial()
		c.send("POST http://%s/first HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%s", host, body)
		rest, _ := io.ReadAll(c)
		if n := strings.Count(string(rest), "HTTP/1.1 "); n > 1 || n == 1 && !strings.Contains(string(rest), "Connection: close") {
			t.Errorf("after %q: %q", body, rest)
		}
		if ev := g.next(); n400(string(rest)) && ev.Decision.Reason != policy.ReasonBadRequest {
			t.Errorf("after %q: event %+v", body, ev)
		}
		c.Close()
	}
	for {
		select {
		case path := <-reached:
			if path == "/smuggled" {
				t.Error("the smuggled request reached the origin")
			}
			continue
		default:
		}
		break
	}
}

func n400(s string) bool { return strings.HasPrefix(s, "HTTP/1.1 400 ") }

// TestRefusalDoesNotWaitForTheBody has a client that announces a body and sends none.
func TestRefusalDoesNotWaitForTheBody(t *testing.T) {
	g := start(t, policyFor("", 80))
	c := g.dial()
	c.send("POST http://evil.test/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
	resp, _ := c.response("POST")
	if resp.StatusCode != 403 || !resp.Close {
		t.Errorf("%s, close: %v", resp.Status, resp.Close)
	}
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("the connection does not end: %v", err)
	}
}

func TestT63PasswordsStayOutOfTheEvent(t *testing.T) {
	g := start(t, policyFor("", 443))
	for _, request := range []string{
		"CONNECT user:s3cret@api.ok.test:443 HTTP/1.1\r\n\r\n",
		"GET http://user:s3cret@api.ok.test/ HTTP/1.1\r\nHost: user:s3cret@api.ok.test\r\n\r\n",
	} {
		c := g.dial()
		c.send("%s", request)
		c.response("GET")
		if ev := g.next(); strings.Contains(fmt.Sprintf("%+v", ev), "s3cret") || ev.Status != 400 {
			t.Errorf("event %+v", ev)
		}
		c.Close()
	}
}

// expiring is a Decider whose rule for addresses ends when told.
type expiring struct {
	Decider
	over atomic.Bool
}

func (d *expiring) Decide(r policy.Request) policy.Decision {
	got := d.Decider.Decide(r)
	if d.over.Load() && r.Destination.IsValid() {
		return got.Refuse(policy.ReasonPrivateDestination)
	}
	return got
}

// TestPooledConnectionEndsWithItsRule has a rule expire while a connection that it
// opened waits for the next request.
func TestPooledConnectionEndsWithItsRule(t *testing.T) {
	port := site(t, dump)
	var d *expiring
	g := start(t, policyFor("", port), func(c *Config) {
		d = &expiring{Decider: c.Decider}
		c.Decider = d
	})
	g.resolver.set("api.ok.test", "127.0.0.1")
	c := g.dial()
	for _, want := range []int{200, 200, 403} {
		d.over.Store(want == 403)
		c.send("GET http://api.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
		if resp, body := c.response("GET"); resp.StatusCode != want {
			t.Errorf("%s, want %d\n%s", resp.Status, want, body)
		}
	}
}
