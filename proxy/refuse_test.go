package proxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"sallyport/policy"
)

var (
	dateField = regexp.MustCompile(`\r\nDate: [A-Z][a-z][a-z], [^\r]* GMT\r\n`)
	anID      = regexp.MustCompile(`[0-9a-v]{8}-[0-9a-v]+`)
)

// TestRefusalBytes pins what a refused client sees, but for the time and the ID.
func TestRefusalBytes(t *testing.T) {
	g := start(t, policyFor("", 443))
	for _, tt := range []struct{ name, sent, want string }{
		{"CONNECT", "CONNECT other.test:443 HTTP/1.1\r\nHost: other.test:443\r\n\r\n", "HTTP/1.1 403 Forbidden by egress policy\r\n" +
			"Proxy-Status: sallyport; error=http_request_denied; details=\"not_listed\"\r\n" +
			"X-Sallyport-Reason: not_listed\r\n" +
			"X-Sallyport-Id: ID\r\n" +
			"Cache-Control: no-store\r\n" +
			"Content-Type: text/plain; charset=utf-8\r\n" +
			"Content-Length: LEN\r\n" +
			"Connection: close\r\n\r\n" +
			"Refused by sallyport, the egress proxy of this network.\n\n" +
			"source: 127.0.0.1\n" +
			"name:   other.test\n" +
			"port:   443\n" +
			"reason: not_listed (no rule of your group lists this name)\n" +
			"id:     ID\n" +
			"help:   https://help.test/\n"},
		{"CONNECT, JSON", "CONNECT api.ok.test:22 HTTP/1.1\r\nAccept: application/json\r\n\r\n", "HTTP/1.1 403 Forbidden by egress policy\r\n" +
			"Proxy-Status: sallyport; error=http_request_denied; details=\"port_not_allowed\"\r\n" +
			"X-Sallyport-Reason: port_not_allowed\r\n" +
			"X-Sallyport-Id: ID\r\n" +
			"Cache-Control: no-store\r\n" +
			"Content-Type: application/json\r\n" +
			"Content-Length: LEN\r\n" +
			"Connection: close\r\n\r\n" +
			`{"source":"127.0.0.1","name":"api.ok.test","port":22,"reason":"port_not_allowed","detail":"the name is listed, but not on this port","rule":"r","id":"ID","help_url":"https://help.test/"}` + "\n"},
		{"bad target", "CONNECT <b>\x1b[31m:443 HTTP/1.1\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n" +
			"Proxy-Status: sallyport; error=http_request_error; details=\"bad_request\"\r\n" +
			"X-Sallyport-Reason: bad_request\r\n" +
			"X-Sallyport-Id: ID\r\n" +
			"Cache-Control: no-store\r\n" +
			"Content-Type: text/plain; charset=utf-8\r\n" +
			"Content-Length: LEN\r\n" +
			"Connection: close\r\n\r\n" +
			"Refused by sallyport, the egress proxy of this network.\n\n" +
			"source: 127.0.0.1\n" +
			"name:   ?b??[31m:443\n" +
			"reason: bad_request (the request is malformed)\n" +
			"id:     ID\n" +
			"help:   https://help.test/\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := g.dial()
			c.send("%s", tt.sent)
			got := c.rest()
			if !dateField.MatchString(got) {
				t.Error("no Date")
			}
			head, body, _ := strings.Cut(got, "\r\n\r\n")
			if !strings.Contains(head, fmt.Sprintf("Content-Length: %d", len(body))) {
				t.Errorf("body of %d bytes after %s", len(body), head)
			}
			got = dateField.ReplaceAllString(got, "\r\n")
			got = strings.Replace(got, fmt.Sprintf("Content-Length: %d", len(body)), "Content-Length: LEN", 1)
			if got = anID.ReplaceAllString(got, "ID"); got != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
			ev := g.next()
			if !strings.Contains(head, "X-Sallyport-Id: "+ev.ID+"\r\n") {
				t.Errorf("the event's ID is %s, the client was told %s", ev.ID, head)
			}
		})
	}
}

// TestHTTPRefusal is the same for plain HTTP, where the connection stays.
func TestHTTPRefusal(t *testing.T) {
	g := start(t, policyFor("", 80))
	c := g.dial()
	c.send("GET http://other.test/a?b HTTP/1.1\r\nHost: other.test\r\nAccept: application/json\r\n\r\n")
	resp, body := c.response("GET")
	if resp.Status != "403 Forbidden" || resp.Header.Get("Proxy-Status") != `sallyport; error=http_request_denied; details="not_listed"` ||
		resp.Header.Get("X-Sallyport-Reason") != "not_listed" || resp.Header.Get("Cache-Control") != "no-store" || resp.Header.Get("Content-Type") != "application/json" || resp.Close {
		t.Errorf("%s %v", resp.Status, resp.Header)
	}
	var page map[string]any
	if err := json.Unmarshal([]byte(body), &page); err != nil || page["name"] != "other.test" || page["source"] != "127.0.0.1" ||
		page["help_url"] != "https://help.test/" || page["id"] != resp.Header.Get("X-Sallyport-Id") {
		t.Errorf("%s: %v", body, err)
	}
	c.send("GET http://other.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n")
	if resp, body := c.response("GET"); resp.StatusCode != 403 || !strings.Contains(body, "reason: not_listed") {
		t.Errorf("second request: %s %s", resp.Status, body)
	}
}

func TestConnectFailed(t *testing.T) {
	op := func(err error) error { return &net.OpError{Op: "dial", Err: err} }
	for _, tt := range []struct {
		err    error
		status int
		token  string
	}{
		{op(syscall.ECONNREFUSED), 502, "connection_refused"},
		{errors.Join(op(syscall.ENETUNREACH), op(syscall.ECONNREFUSED)), 502, "connection_refused"},
		{op(syscall.ENETUNREACH), 502, "destination_ip_unroutable"},
		{op(syscall.EHOSTUNREACH), 502, "destination_ip_unroutable"},
		{op(syscall.ETIMEDOUT), 504, "connection_timeout"},
		{op(syscall.ECONNRESET), 502, "connection_terminated"},
		{io.EOF, 502, "destination_unavailable"},
	} {
		r := connectFailed(policy.Decision{Verdict: policy.Allow, Rule: "r"}, tt.err)
		if r.status != tt.status || r.token != tt.token || r.decision.Passes() || r.decision.Reason != policy.ReasonConnectFailed || r.decision.Rule != "r" {
			t.Errorf("%v: %+v", tt.err, r)
		}
	}
}

// TestAnswerNeverBreaksOut lets a client choose every string that it can.
func TestAnswerNeverBreaksOut(t *testing.T) {
	evil := "a\r\nSet-Cookie: x\r\n\r\n<script>\x1b]0;\x07\xff" + strings.Repeat("x", 10000)
	for _, asJSON := range []bool{false, true} {
		a := answer{refusal: denied(policy.Decision{Reason: policy.ReasonNotListed}), source: netip.MustParseAddr("192.0.2.1"), name: evil, asJSON: asJSON, id: "i"}
		head, body, _ := strings.Cut(string(a.append(nil, a.phrase(true))), "\r\n\r\n")
		if strings.Contains(head, "Cookie") || strings.ContainsAny(body, "<\x1b\r") || !utf8.ValidString(body) || len(body) > 1000 {
			t.Errorf("%s\n%q", head, body)
		}
	}
}

func TestReasonsExplained(t *testing.T) {
	for r, text := range explanations {
		if r.String() == "" || text == "" || strings.ContainsAny(text, "\r\n\"") {
			t.Errorf("%d: %q", r, text)
		}
	}
	for _, status := range []int{429, 503} {
		set := http.Header{}
		a := answer{refusal: limited(policy.Decision{}, status, errTooMany)}
		a.fields(set.Set)
		if set.Get("Retry-After") == "" {
			t.Errorf("%d without Retry-After", status)
		}
	}
}
