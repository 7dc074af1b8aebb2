package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/policy"
	"sallyport/policy/event"
)

// http2Client is net/http's client, for which the proxy is an origin.
type http2Client struct {
	g *gate
	*http.Transport
}

func (g *gate) http2(certs ...tls.Certificate) *http2Client {
	tr := &http.Transport{
		TLSClientConfig:   &tls.Config{ServerName: "proxy.ok.test", RootCAs: ca().pool, Certificates: certs},
		ForceAttemptHTTP2: true, DisableCompression: true,
	}
	g.t.Cleanup(tr.CloseIdleConnections)
	return &http2Client{g, tr}
}

// tunnel is a CONNECT stream.
type h2tunnel struct {
	up   *io.PipeWriter
	resp *http.Response
}

func (t h2tunnel) Read(p []byte) (int, error)  { return t.resp.Body.Read(p) }
func (t h2tunnel) Write(p []byte) (int, error) { return t.up.Write(p) }
func (t h2tunnel) Close() error                { t.up.Close(); return t.resp.Body.Close() }
func (t h2tunnel) LocalAddr() net.Addr         { return &net.TCPAddr{} }
func (t h2tunnel) RemoteAddr() net.Addr        { return &net.TCPAddr{} }

func (t h2tunnel) SetDeadline(time.Time) error      { return nil }
func (t h2tunnel) SetReadDeadline(time.Time) error  { return nil }
func (t h2tunnel) SetWriteDeadline(time.Time) error { return nil }

func (c *http2Client) connect(target string, header ...string) h2tunnel {
	c.g.t.Helper()
	r, w := io.Pipe()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	c.g.t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodConnect, "https://"+c.g.tlsAddr(), r)
	if err != nil {
		c.g.t.Fatal(err)
	}
	req.Host = target
	for _, h := range header {
		k, v, _ := strings.Cut(strings.TrimSuffix(h, "\r\n"), ": ")
		req.Header.Add(k, v)
	}
	resp, err := c.RoundTrip(req)
	if err != nil {
		c.g.t.Fatal(err)
	}
	if resp.ProtoMajor != 2 {
		c.g.t.Fatalf("the answer is %s", resp.Proto)
	}
	c.g.t.Cleanup(func() { w.Close(); resp.Body.Close() })
	return h2tunnel{w, resp}
}

func TestHTTP2Tunnel(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS())
	for _, n := range []string{"a.ok.test", "web.ok.test", "tcp.ok.test"} {
		g.resolver.set(n, "127.0.0.1")
	}
	c := g.http2()
	target := func(name string) string { return fmt.Sprintf("%s:%d", name, o.port()) }

	t.Run("TLS both ways", func(t *testing.T) {
		tun := c.connect(target("a.ok.test"))
		if tun.resp.StatusCode != 200 {
			t.Fatal(tun.resp.Status)
		}
		served := make(chan error, 1)
		go func() {
			far := tls.Server(o.accept(t), &tls.Config{Certificates: []tls.Certificate{ca().cert}})
			_, err := io.Copy(far, far)
			far.Close()
			served <- err
		}()
		inner := tls.Client(tun, &tls.Config{ServerName: "a.ok.test", RootCAs: ca().pool})
		text := bytes.Repeat([]byte("a stream of HTTP/2 "), 100_000)
		go func() {
			inner.Write(text)
			inner.CloseWrite()
		}()
		if got, err := io.ReadAll(inner); err != nil || !bytes.Equal(got, text) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		if b, err := io.ReadAll(tun); err != nil || len(b) != 0 {
			t.Errorf("the end of the stream: %q, %v", b, err)
		}
		ev := g.next()
		if ev.Listener != "proxy_tls" || ev.SNI != "a.ok.test" || ev.Decision.Rule != "tls" || ev.BytesUp < int64(len(text)) || ev.BytesDown < int64(len(text)) || ev.Error != "" || ev.Status != 200 {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("the client ends first", func(t *testing.T) {
		tun := c.connect(target("tcp.ok.test"))
		io.WriteString(tun, "all I have")
		tun.up.Close()
		far := o.accept(t)
		if got, err := io.ReadAll(far); err != nil || string(got) != "all I have" {
			t.Errorf("%q, %v", got, err)
		}
		io.WriteString(far, "a late answer")
		far.Close()
		if got, err := io.ReadAll(tun); err != nil || string(got) != "a late answer" {
			t.Errorf("%q, %v", got, err)
		}
		if ev := g.next(); ev.BytesUp != 10 || ev.BytesDown != 13 || ev.Error != "" {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("the far side ends first", func(t *testing.T) {
		tun := c.connect(target("tcp.ok.test"))
		far := o.accept(t)
		io.WriteString(far, "bye")
		far.Close()
		if got, err := io.ReadAll(tun); err != nil || string(got) != "bye" {
			t.Errorf("%q, %v", got, err)
		}
		if ev := g.next(); ev.Error != "" {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("the far side breaks", func(t *testing.T) {
		tun := c.connect(target("tcp.ok.test"))
		far := o.accept(t)
		far.(*net.TCPConn).SetLinger(0)
		far.Close()
		if got, err := io.ReadAll(tun); err == nil {
			t.Errorf("%q and a good end", got)
		}
		if ev := g.next(); !strings.HasPrefix(ev.Error, "upstream_failed") {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("the client breaks", func(t *testing.T) {
		tun := c.connect(target("tcp.ok.test"))
		far := o.accept(t)
		tun.up.CloseWithError(errors.New("gone"))
		if _, err := io.ReadAll(far); isTimeout(err) {
			t.Error(err)
		}
		g.next()
	})
	t.Run("another name in the hello", func(t *testing.T) {
		tun := c.connect(target("a.ok.test"))
		tun.Write(hello("b.ok.test"))
		if got, err := io.ReadAll(tun); err != nil || string(got) != string(alertRecord(alertUnrecognizedName)) {
			t.Errorf("%q, %v", got, err)
		}
		if got := o.got(t); got != "" {
			t.Errorf("the origin got %q", got)
		}
		if ev := g.next(); ev.Decision.Reason != policy.ReasonSNIMismatch {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("HTTP inside", func(t *testing.T) {
		tun := c.connect(target("web.ok.test"))
		for i := range 2 {
			fmt.Fprintf(tun, "GET /%d HTTP/1.1\r\nHost: %s\r\n\r\n", i, target("web.ok.test"))
			if i == 0 {
				far := o.accept(t)
				go func() {
					for range 2 {
						far.Read(make([]byte, 4096))
						io.WriteString(far, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
					}
				}()
			}
			buf := make([]byte, 4096)
			n, err := tun.Read(buf)
			for err == nil && !bytes.HasSuffix(buf[:n], []byte("ok")) {
				var m int
				m, err = tun.Read(buf[n:])
				n += m
			}
			if err != nil || !strings.HasPrefix(string(buf[:n]), "HTTP/1.1 200 OK\r\n") {
				t.Fatalf("%q, %v", buf[:n], err)
			}
			if ev := g.next(); ev.Kind != event.HTTP || ev.Listener != "proxy_tls" {
				t.Errorf("%+v", ev)
			}
		}
		fmt.Fprint(tun, "GET / HTTP/1.1\r\nHost: other.test\r\n\r\n")
		if got, err := io.ReadAll(tun); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 403 ") {
			t.Errorf("%q, %v", got, err)
		}
		g.next()
		if ev := g.next(); ev.Kind != event.Connect {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("refused", func(t *testing.T) {
		for name, status := range map[string]int{"other.test:443": 403, "a.ok.test": 400, "[::1]:443": 403} {
			tun := c.connect(name)
			body, err := io.ReadAll(tun)
			if err != nil || tun.resp.StatusCode != status || tun.resp.Header.Get("X-Sallyport-Reason") == "" || tun.resp.Header.Get("Proxy-Status") == "" || !bytes.Contains(body, []byte("Refused by sallyport")) {
				t.Errorf("%s: %s %v %s, %v", name, tun.resp.Status, tun.resp.Header, body, err)
			}
			ev := g.next()
			noSecrets(t, ev)
			if ev.Status != status {
				t.Errorf("%+v", ev)
			}
		}
	})
	g.quiet()
	if n := g.srv.Stats(); n.Tunnels != 0 || n.Panics != 0 {
		t.Errorf("%+v", n)
	}
}

func TestT63CredentialsHTTP2(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	a := newSigner(t)
	g := start(t, userPolicy(o, nowhere), withUsers(usersFile(t, "anna")), withTLS(withClients(a)))
	g.resolver.set("user.test", "127.0.0.1")
	target := fmt.Sprintf("user.test:%d", o.port())
	c := g.http2()
	for _, tt := range []struct {
		header []string
		status int
		user   string
	}{
		{nil, 407, ""},
		{[]string{basic("anna", theSecret)}, 407, ""},
		{[]string{basic("anna", theSecret+"anna"), basic("anna", theSecret+"anna")}, 407, ""},
		{[]string{basic("anna", theSecret+"anna")}, 200, "anna"},
	} {
		tun := c.connect(target, tt.header...)
		if tun.resp.StatusCode != tt.status {
			t.Fatalf("%v: %s", tt.header, tun.resp.Status)
		}
		if got := tun.resp.Header.Get("Proxy-Authenticate"); (got != "") != (tt.status == 407) {
			t.Errorf("Proxy-Authenticate: %q", got)
		}
		tun.Close()
		if tt.status == 200 {
			o.accept(t).Close()
		}
		ev := g.next()
		noSecrets(t, ev)
		if ev.User != tt.user {
			t.Errorf("%+v", ev)
		}
	}
	g.until(func() bool { return g.srv.Stats().Connections == 1 }) // one for four requests
	tun := g.http2(a.sign(t, forUser("bert@corp.test"))).connect(target)
	if tun.resp.StatusCode != 403 { // a DNS name with an @ is no DNS name, but anybody's
		tun.Close()
		o.accept(t).Close()
	}
	if ev := g.next(); ev.User != "bert@corp.test" {
		t.Errorf("%+v", ev)
	}
}

// A change of policy, and the end of the server, reach tunnels in streams.
func TestHTTP2RevokeAndDrain(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS(), func(c *Config) { c.Timeouts.Drain = patience })
	g.resolver.set("tcp.ok.test", "127.0.0.1")
	c := g.http2()
	target := fmt.Sprintf("tcp.ok.test:%d", o.port())

	tun := c.connect(target)
	far := o.accept(t)
	g.until(func() bool { return g.srv.Stats().Tunnels == 1 })
	g.store.Swap(compile(t, strings.Replace(doorPolicy(o.port()), "tcp.ok.test", "no.ok.test", 1)))
	if got, err := io.ReadAll(tun); err == nil {
		t.Errorf("revoked: %q and a good end", got)
	}
	io.ReadAll(far)
	if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked {
		t.Errorf("%+v", ev)
	}
	g.store.Swap(compile(t, doorPolicy(o.port())))

	tun = c.connect(target)
	far = o.accept(t)
	g.until(func() bool { return g.srv.Stats().Tunnels == 1 })
	down := make(chan error, 1)
	go func() { down <- g.srv.Shutdown(context.Background()) }()
	g.until(func() bool { return g.srv.draining.Load() })
	io.WriteString(far, "still here")
	buf := make([]byte, 10)
	if _, err := io.ReadFull(tun, buf); err != nil {
		t.Errorf("while draining: %v", err)
	}
	far.Close()
	if _, err := io.ReadAll(tun); err != nil {
		t.Error(err)
	}
	tun.Close()
	if err := <-down; err != nil {
		t.Error(err)
	}
	g.next()
	g.quiet()
}

// What is left when the patience of a drain ends is cut.
func TestHTTP2DrainEnds(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS(), func(c *Config) { c.Timeouts.Drain = 10 * time.Millisecond })
	g.resolver.set("tcp.ok.test", "127.0.0.1")
	tun := g.http2().connect(fmt.Sprintf("tcp.ok.test:%d", o.port()))
	o.accept(t)
	if err := g.srv.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadAll(tun); err == nil {
		t.Error("a good end")
	}
	g.next()
}

func TestHTTP2Limits(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS(), func(c *Config) {
		c.Limits.TunnelsPerSource = 1
		c.Timeouts.Idle = 100 * time.Millisecond
		c.Timeouts.ClientHello = 50 * time.Millisecond
		c.Limits.HeaderBytes = 4096
	})
	g.resolver.set("tcp.ok.test", "127.0.0.1")
	g.resolver.set("a.ok.test", "127.0.0.1")
	c := g.http2()
	tun := c.connect(fmt.Sprintf("tcp.ok.test:%d", o.port()))
	more := c.connect(fmt.Sprintf("tcp.ok.test:%d", o.port()))
	if more.resp.StatusCode == 429 { // unless the first was idle for too long already
		if more.resp.Header.Get("Retry-After") == "" {
			t.Error(more.resp.Header)
		}
	} else if more.resp.StatusCode != 200 {
		t.Error(more.resp.Status)
	}
	if _, err := io.ReadAll(tun); err == nil {
		t.Error("an idle tunnel has a good end")
	}
	io.ReadAll(more)
	g.event(func(ev *event.Event) bool { return ev.Error == "idle_timeout" })

	silent := c.connect(fmt.Sprintf("a.ok.test:%d", o.port()))
	io.ReadAll(silent)
	g.event(func(ev *event.Event) bool { return ev.Decision.Reason == policy.ReasonHelloTimeout })

	big, err := http.NewRequest(http.MethodConnect, "https://"+g.tlsAddr(), nil)
	if err != nil {
		t.Fatal(err)
	}
	big.Header.Set("X-Big", strings.Repeat("x", 8192))
	if resp, err := c.RoundTrip(big); err == nil && resp.StatusCode != 431 {
		t.Errorf("a large head: %s", resp.Status)
	}
}

// http2Frame is a client that speaks HTTP/2 frame by frame.
type http2Frame struct {
	*http2.Framer
	conn *tlsClient
	t    testing.TB
	enc  *hpack.Encoder
	buf  bytes.Buffer
}

func (g *gate) framed() *http2Frame {
	g.t.Helper()
	c, err := g.dialTLS([]string{"h2"})
	if err != nil {
		g.t.Fatal(err)
	}
	return newFramed(g.t, c)
}

func newFramed(t testing.TB, c *tlsClient) *http2Frame {
	f := &http2Frame{Framer: http2.NewFramer(c.Conn, c.r), conn: c, t: t}
	f.enc = hpack.NewEncoder(&f.buf)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	io.WriteString(c.Conn, http2.ClientPreface)
	f.WriteSettings()
	return f
}

// request sends a head on a stream; fields are names and values.
func (f *http2Frame) request(stream uint32, end bool, fields ...string) {
	f.t.Helper()
	f.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		f.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: f.buf.Bytes(), EndStream: end, EndHeaders: true}); err != nil {
		f.t.Fatal(err)
	}
}

// answer returns the head and body of the response on a stream; reset is true if it
// ended by a reset.
func (f *http2Frame) answer(stream uint32) (head map[string]string, body string, reset bool) {
	f.t.Helper()
	head = map[string]string{}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			f.t.Fatalf("after %v %q: %v", head, body, err)
		}
		if s, ok := frame.(*http2.SettingsFrame); ok && !s.IsAck() {
			f.WriteSettingsAck()
		}
		if frame.Header().StreamID != stream {
			continue
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			for _, h := range frame.Fields {
				head[h.Name] = h.Value
			}
		case *http2.DataFrame:
			body += string(frame.Data())
		case *http2.RSTStreamFrame:
			return head, body, true
		}
		if frame.Header().Flags.Has(http2.FlagDataEndStream) && frame.Header().Type != http2.FrameWindowUpdate {
			return head, body, false
		}
	}
}

// A request head has timeouts.request_header, in however many frames it comes, and the
// connection ends with it: the next stream's could not be read.
func TestHTTP2SlowHead(t *testing.T) {
	g := start(t, doorPolicy(443), withTLS(), func(c *Config) { c.Timeouts.RequestHeader = 2 * time.Second; c.Timeouts.Idle = 10 * patience })
	denied := func(f *http2Frame, stream uint32) {
		t.Helper()
		f.request(stream, false, ":method", "CONNECT", ":authority", "www.bad.test:443")
		if head, _, _ := f.answer(stream); head[":status"] != "403" {
			t.Errorf("%v", head)
		}
		if ev := g.next(); ev.Name != "www.bad.test" {
			t.Errorf("%+v", ev)
		}
	}
	good := g.framed()
	denied(good, 1)
	head := http2.HeadersFrameParam{StreamID: 3, BlockFragment: []byte{0x82}} // :method GET
	for name, begin := range map[string]func(f *http2Frame) (more func() error){
		"continuations": func(f *http2Frame) func() error {
			f.WriteHeaders(head)
			return func() error { return f.WriteContinuation(3, false, []byte{0x84}) }
		},
		"empty continuations": func(f *http2Frame) func() error {
			f.WriteHeaders(head)
			return func() error { return f.WriteContinuation(3, false, nil) }
		},
		"one frame": func(f *http2Frame) func() error {
			f.conn.Write([]byte{0, 0x20, 0, frameHeaders, flagEndHeaders, 0, 0, 0, 3})
			return func() error { _, err := f.conn.Write([]byte{0x84}); return err }
		},
		"preface": nil,
	} {
		t.Run(name, func(t *testing.T) {
			var f *http2Frame
			var more func() error
			if begin == nil {
				c, err := g.dialTLS([]string{"h2"})
				if err != nil {
					t.Fatal(err)
				}
				f = &http2Frame{Framer: http2.NewFramer(c.Conn, c.r), conn: c, t: t}
				io.WriteString(c, http2.ClientPreface[:10])
			} else {
				f = g.framed()
				denied(f, 1)
				more = begin(f)
			}
			gone := make(chan error, 1)
			go func() {
				for {
					if _, err := f.ReadFrame(); err != nil {
						gone <- err
						return
					}
				}
			}()
			for waiting := true; waiting; {
				select {
				case err := <-gone:
					if isTimeout(err) {
						t.Error("the connection lasts")
					}
					waiting = false
				case <-time.After(100 * time.Millisecond): // pace: a drip
					if more != nil {
						more()
					}
				}
			}
			if begin == nil {
				return
			}
			if ev := g.next(); ev.Error != errHeadSlow.Error() || ev.Decision.Reason != policy.ReasonBadRequest || ev.Listener != listenerTLS || ev.Duration < time.Second {
				t.Errorf("%+v", ev)
			}
		})
	}
	denied(good, 3) // has been silent for longer than that
	g.quiet()
}

func TestHTTP2PlainHTTP(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS())
	g.resolver.set("web.ok.test", "127.0.0.1")
	f := g.framed()
	web := fmt.Sprintf("web.ok.test:%d", o.port())

	f.request(1, true, ":method", "GET", ":scheme", "http", ":authority", web, ":path", "/x?y=1",
		"host", "other.test", "te", "trailers", "proxy-authorization", "Basic "+theSecret)
	far := o.accept(t)
	head := make([]byte, 4096)
	n, err := far.Read(head)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(head[:n]); !strings.HasPrefix(got, "GET /x?y=1 HTTP/1.1\r\nHost: "+web+"\r\n") || strings.Contains(got, theSecret) || strings.Contains(got, "other.test") || !strings.Contains(got, "Via: ") {
		t.Errorf("forwarded: %q", got)
	}
	io.WriteString(far, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: X\r\nX: 1\r\n\r\n2\r\nok\r\n0\r\n\r\n")
	if h, body, reset := f.answer(1); h[":status"] != "200" || body != "ok" || reset || h["x"] != "" || h["connection"] != "" {
		t.Errorf("%v %q, reset %v", h, body, reset)
	}
	if ev := g.next(); ev.Kind != event.HTTP || ev.Name != "web.ok.test" || ev.Listener != "proxy_tls" || ev.BytesDown != 2 || ev.Status != 200 {
		t.Errorf("%+v", ev)
	}

	refused := []struct {
		status, reason string
		fields         []string
	}{
		{"403", "not_listed", []string{":method", "GET", ":scheme", "http", ":authority", "other.test", ":path", "/"}},
		{"400", "bad_request", []string{":method", "GET", ":scheme", "https", ":authority", web, ":path", "/"}},
		{"400", "bad_request", []string{":method", "GET", ":scheme", "http", ":authority", web, ":path", "http://other.test/"}},
		{"400", "bad_request", []string{":method", "GET", ":scheme", "http", ":path", "/"}},
	}
	id := uint32(3)
	for _, tt := range refused {
		f.request(id, true, tt.fields...)
		h, body, reset := f.answer(id)
		if h[":status"] != tt.status || h["x-sallyport-reason"] != tt.reason || reset || strings.Contains(body, theSecret) {
			t.Errorf("%q: %v %q, reset %v", tt.fields, h, body, reset)
		}
		ev := g.next()
		noSecrets(t, ev)
		if ev.Decision.Reason.String() != tt.reason {
			t.Errorf("%q: %+v", tt.fields, ev)
		}
		id += 2
	}

	// A refused upload ends its stream, and not the connection.
	f.request(id, false, ":method", "POST", ":scheme", "http", ":authority", "other.test", ":path", "/", "content-length", "1000")
	if h, _, _ := f.answer(id); h[":status"] != "403" {
		t.Errorf("%v", h)
	}
	g.next()
	id += 2
	f.request(id, true, ":method", "GET", ":scheme", "http", ":authority", web, ":path", "/again")
	n, err = far.Read(head)
	if err != nil || !strings.HasPrefix(string(head[:n]), "GET /again ") {
		t.Errorf("%q, %v", head[:n], err)
	}
	io.WriteString(far, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nha")
	far.Close()
	if h, _, reset := f.answer(id); h[":status"] != "200" || !reset {
		t.Errorf("a response that broke off: %v, reset %v", h, reset)
	}
	g.next()
	g.quiet()
}

// A client that does not read holds up its own stream alone, which can be cut.
func TestHTTP2SlowReader(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS())
	g.resolver.set("tcp.ok.test", "127.0.0.1")
	g.resolver.set("web.ok.test", "127.0.0.1")
	f := g.framed()
	f.WriteWindowUpdate(0, 1<<20) // the connection's window is wide; the stream's is not
	f.request(1, false, ":method", "CONNECT", ":authority", fmt.Sprintf("tcp.ok.test:%d", o.port()))
	far := o.accept(t)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(far, io.LimitReader(zeros{}, 64<<20)) // more than windows and socket buffers hold
		sent <- err
	}()
	g.until(func() bool { return g.srv.Stats().BytesDown >= 32<<10 })

	f.request(3, true, ":method", "GET", ":scheme", "http", ":authority", "other.test", ":path", "/")
	if h, _, _ := f.answer(3); h[":status"] != "403" {
		t.Errorf("another stream: %v", h)
	}
	g.next()
	g.store.Swap(compile(t, strings.Replace(doorPolicy(o.port()), "tcp.ok.test", "no.ok.test", 1)))
	if err := <-sent; err == nil || isTimeout(err) {
		t.Errorf("the origin sent all of it: %v", err)
	}
	if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked {
		t.Errorf("%+v", ev)
	}
	f.request(5, true, ":method", "GET", ":scheme", "http", ":authority", "other.test", ":path", "/")
	if h, _, _ := f.answer(5); h[":status"] != "403" {
		t.Errorf("after the cut: %v", h)
	}
	g.next()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Streams that are reset as soon as they are opened do not run away with the proxy.
func TestHTTP2RapidReset(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, doorPolicy(o.port()), withTLS())
	release := make(chan struct{})
	g.resolver.intercept(func(ctx context.Context, _ string) ([]netip.Addr, error) {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return nil, errors.New("no address")
	})
	f := g.framed()
	go func() { // until the proxy has had enough
		for id := uint32(1); ; id += 2 {
			var block bytes.Buffer
			enc := hpack.NewEncoder(&block)
			enc.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"})
			enc.WriteField(hpack.HeaderField{Name: ":authority", Value: fmt.Sprintf("tcp.ok.test:%d", o.port())})
			if f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true}) != nil || f.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
				return
			}
		}
	}()
	code := http2.ErrCode(0)
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			if isTimeout(err) {
				t.Fatal(err)
			}
			break
		}
		if away, ok := frame.(*http2.GoAwayFrame); ok {
			code = away.ErrCode
		}
	}
	f.conn.Conn.Close()
	close(release)
	if code != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("the connection ended with %v", code)
	}
	if n := g.resolver.asked.Load(); n > maxStreams {
		t.Errorf("%d requests were under way", n)
	}
}

func TestStreamDeadlines(t *testing.T) {
	r, w := io.Pipe()
	s := newStream(&peer{}, nil, r)
	defer s.finish()
	read := func() (string, error) {
		buf := make([]byte, 10)
		n, err := s.Read(buf)
		return string(buf[:n]), err
	}
	s.SetReadDeadline(longAgo)
	if _, err := read(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("past: %v", err)
	}
	s.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := read(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("soon: %v", err)
	}
	s.SetReadDeadline(time.Now().Add(patience))
	go io.WriteString(w, "0123456789abcde")
	for _, want := range []string{"0123456789", "abcde"} { // nothing was lost
		if got, err := read(); got != want || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}
	waiting := make(chan error)
	go func() {
		_, err := read()
		waiting <- err
	}()
	s.SetReadDeadline(longAgo)
	if err := <-waiting; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("while waiting: %v", err)
	}
	s.SetReadDeadline(time.Time{})
	s.CloseWrite()
	if _, err := read(); err != io.EOF {
		t.Errorf("after CloseWrite: %v", err)
	}
	s.SetWriteDeadline(longAgo)
	if _, err := s.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write, past: %v", err)
	}
	s.Close()
	if _, err := read(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := s.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
}

// A block that begins as another one ends is a new one, with its own time.
func TestBlocksInARow(t *testing.T) {
	var f blocks
	f.saw([]byte{0, 0, 1, frameHeaders, 0, 0, 0, 0, 1, 0x82})
	if !f.open || f.begun != 1 {
		t.Fatalf("%+v", f)
	}
	f.saw([]byte{0, 0, 1, frameContinuation, flagEndHeaders, 0, 0, 0, 1, 0x84, 0, 0, 9, frameHeaders, flagEndHeaders, 0, 0, 0, 3, 0x82})
	if !f.open || f.begun != 2 {
		t.Errorf("%+v", f)
	}
}

// FuzzBlocks: what is known of a stream of frames does not depend on its pieces.
func FuzzBlocks(f *testing.F) {
	f.Add([]byte{0, 0, 2, frameHeaders, 0, 0, 0, 0, 1, 0x82, 0x84, 0, 0, 1, frameContinuation, flagEndHeaders, 0, 0, 0, 1, 0x86}, uint8(1))
	f.Add([]byte{0, 0, 0, frameHeaders, flagEndHeaders, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 'x'}, uint8(4))
	f.Fuzz(func(t *testing.T, data []byte, size uint8) {
		var whole, pieces blocks
		whole.saw(data)
		for len(data) > 0 {
			n := min(len(data), 1+int(size))
			pieces.saw(data[:n])
			data = data[n:]
		}
		if whole != pieces {
			t.Errorf("%+v, in pieces %+v", whole, pieces)
		}
	})
}
