package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"sallyport/policy/event"
)

func TestUpgradeOf(t *testing.T) {
	for _, tt := range []struct{ connection, upgrade, want string }{
		{"Upgrade", "websocket", "websocket"}, {"keep-alive, upgrade", "WebSocket", "WebSocket"}, {"Upgrade", "SPDY/3.1", "SPDY/3.1"},
		{"", "websocket", ""}, {"keep-alive", "websocket", ""}, {"Upgrade", "", ""}, {"Upgrade", "h2c", ""}, {"Upgrade", "H2C", ""}, {"Upgrade", "TLS/1.2", ""},
		{"Upgrade", "HTTP/2.0", ""}, {"Upgrade", "websocket, h2c", ""},
	} {
		h := http.Header{}
		if tt.connection != "" {
			h.Set("Connection", tt.connection)
		}
		if tt.upgrade != "" {
			h.Set("Upgrade", tt.upgrade)
		}
		if got := upgradeOf(h); got != tt.want {
			t.Errorf("%+v: %q", tt, got)
		}
	}
}

// TestT17WebSocket goes outside and inside a CONNECT.
func TestT17WebSocket(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()), func(c *Config) { c.Limits.Tunnels = 1 })
	g.resolver.set("ws.ok.test", "127.0.0.1")
	authority := fmt.Sprintf("ws.ok.test:%d", o.port())
	const fields = "Connection: Upgrade, X-Hop\r\nX-Hop: 1\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\nearly frame "
	for _, inside := range []bool{false, true} {
		var c *client
		if inside {
			c = g.connect(authority)
			c.send("GET /chat HTTP/1.1\r\nHost: %s\r\n%s", authority, fields)
		} else {
			c = g.dial()
			c.send("GET http://%s/chat HTTP/1.1\r\nHost: x\r\n%s", authority, fields)
		}
		u := o.accept(t)
		br := bufio.NewReader(u)
		r, err := http.ReadRequest(br)
		if err != nil {
			t.Fatal(err)
		}
		if r.Header.Get("Upgrade") != "websocket" || r.Header.Get("Connection") != "Upgrade" || r.Header.Get("Sec-Websocket-Key") != "k" ||
			r.Host != authority || r.Header.Get("X-Hop") != "" || r.Header.Get("Via") == "" || r.RequestURI != "/chat" {
			t.Errorf("%s %s %v", r.Host, r.RequestURI, r.Header)
		}
		if br.Buffered() != 0 {
			t.Error("frames before the 101")
		}
		io.WriteString(u, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: a\r\n\r\nlate frame")
		resp, err := http.ReadResponse(c.Reader, nil)
		if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "websocket" || resp.Header.Get("Sec-Websocket-Accept") != "a" {
			t.Fatal(resp, err)
		}
		c.send("and another")
		c.CloseWrite()
		if b, err := io.ReadAll(br); string(b) != "early frame and another" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		io.WriteString(u, " and more")
		if n := g.srv.Stats().Tunnels; inside != (n == 2) {
			t.Errorf("%d tunnels", n)
		}
		u.Close()
		if got := c.rest(); got != "late frame and more" {
			t.Errorf("%q", got)
		}
		if ev := g.next(); ev.Kind != event.HTTP || ev.Status != 101 || ev.BytesUp != 23 || ev.BytesDown != 19 || ev.Decision.Rule != "r" || ev.Destination != o.addr {
			t.Errorf("%+v", ev)
		}
		if inside {
			if ev := g.next(); ev.Kind != event.Connect || ev.Status != 200 {
				t.Errorf("%+v", ev)
			}
		}
	}
}

// TestUpgradeRefused passes on what the far side says instead of 101.
func TestUpgradeRefused(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, policyFor("", o.port()))
	g.resolver.set("ws.ok.test", "127.0.0.1")
	c := g.dial()
	for _, tt := range []struct {
		answer string
		status int
		body   string
	}{
		{"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\nConnection: X-Hop\r\nX-Hop: 1\r\n\r\nno", 426, "no"},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n", 200, "no"},
		{"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", 502, "reason: connect_failed"},
		{strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", maxInterims+1), 502, "reason: connect_failed"},
		{"SSH-2.0-x\r\n", 502, "reason: connect_failed"},
	} {
		c.send("GET http://ws.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", o.port())
		u := o.accept(t)
		if _, err := http.ReadRequest(bufio.NewReader(u)); err != nil {
			t.Fatal(err)
		}
		io.WriteString(u, tt.answer)
		u.Close()
		resp, body := c.response("GET")
		if resp.StatusCode != tt.status || !strings.Contains(body, tt.body) || resp.Header.Get("X-Hop") != "" || resp.Header.Get("Connection") != "" {
			t.Errorf("%q: %s %v %q", tt.answer, resp.Status, resp.Header, body)
		}
		if ev := g.next(); ev.Status != tt.status {
			t.Errorf("%+v", ev)
		}
	}
	if s := g.srv.Stats(); s.Tunnels != 0 {
		t.Errorf("%+v", s)
	}
}
