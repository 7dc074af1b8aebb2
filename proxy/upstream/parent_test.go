package upstream

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"
)

const patience = 20 * time.Second

// parentServer takes one connection at a time, reads a request head, and leaves the rest to answer.
func parentServer(t *testing.T, answer func(c net.Conn, head string)) (*Parent, netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(patience))
			answer(c, readHead(c))
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	a := l.Addr().(*net.TCPAddr).AddrPort()
	return &Parent{Host: a.Addr().String(), Port: a.Port()}, a
}

// readHead reads to the empty line, byte by byte so that nothing further is taken.
func readHead(c net.Conn) string {
	var b strings.Builder
	one := make([]byte, 1)
	for !strings.HasSuffix(b.String(), "\r\n\r\n") {
		if _, err := io.ReadFull(c, one); err != nil {
			return b.String()
		}
		b.Write(one)
	}
	return b.String()
}

func tunnelTo(t *testing.T, p *Parent, a netip.AddrPort, patience time.Duration) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var d Dialer
	conn, err := d.Dial(ctx, []netip.AddrPort{a})
	if err != nil {
		t.Fatal(err)
	}
	conn, err = p.Tunnel(ctx, conn, "api.ok.test:443", "1.1 gate")
	if err == nil {
		t.Cleanup(func() { conn.Close() })
	}
	return conn, err
}

func TestTunnel(t *testing.T) {
	heads := make(chan string, 16)
	answers := make(chan []string, 1) // pieces, each in a segment of its own as far as one can tell
	p, a := parentServer(t, func(c net.Conn, head string) {
		heads <- head
		for _, piece := range <-answers {
			io.WriteString(c, piece)
		}
		io.Copy(c, c) // then an echo
	})
	for _, tt := range []struct {
		name   string
		answer []string
		early  string
		bare   bool // nothing was read ahead: the kernel can splice
	}{
		{"plain", []string{"HTTP/1.1 200 Connection established\r\n\r\n"}, "", true},
		{"HTTP/1.0 with fields", []string{"HTTP/1.0 200 OK\r\nVia: x\r\nContent-Length: 7\r\n\r\n"}, "", true},
		{"no phrase, other 2xx", []string{"HTTP/1.1 204\r\n\r\n"}, "", true},
		{"in pieces", strings.SplitAfter("HTTP/1.1 200 OK\r\nA: b\r\n\r\n", ""), "", true},
		{"early bytes", []string{"HTTP/1.1 200 OK\r\n\r\nSSH-2.0-x\r\n"}, "SSH-2.0-x\r\n", false},
		{"early bytes that look like a head", []string{"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 400 No\r\n\r\n"}, "HTTP/1.1 400 No\r\n\r\n", false},
		{"interim", []string{"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 X\r\nLink: y\r\n\r\nHTTP/1.1 200 OK\r\n\r\nearly"}, "early", false},
		{"long head", []string{"HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", 15<<10) + "\r\n\r\n"}, "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			answers <- tt.answer
			conn, err := tunnelTo(t, p, a, patience)
			if err != nil {
				t.Fatal(err)
			}
			if head, want := <-heads, "CONNECT api.ok.test:443 HTTP/1.1\r\nHost: api.ok.test:443\r\nVia: 1.1 gate\r\n\r\n"; head != want {
				t.Errorf("asked %q, want %q", head, want)
			}
			if _, ok := conn.(*net.TCPConn); ok != tt.bare {
				t.Errorf("the connection is a %T", conn)
			}
			io.WriteString(conn, "ping")
			if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Error(err)
			}
			if b, err := io.ReadAll(conn); err != nil || string(b) != tt.early+"ping" {
				t.Errorf("%q, %v; want %q", b, err, tt.early+"ping")
			}
		})
	}
}

// deadlines remembers the last deadline that was set.
type deadlines struct {
	net.Conn
	last time.Time
}

func (d *deadlines) SetDeadline(t time.Time) error {
	d.last = t
	return d.Conn.SetDeadline(t)
}

// TestTunnelOutlivesItsContext: the deadline was for the parent's answer alone.
func TestTunnelOutlivesItsContext(t *testing.T) {
	p, a := parentServer(t, func(c net.Conn, _ string) { io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n") })
	raw, err := net.Dial("tcp", a.String())
	if err != nil {
		t.Fatal(err)
	}
	d := &deadlines{Conn: raw}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	conn, err := p.Tunnel(ctx, d, "api.ok.test:443", "1.1 gate")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel()
	if !d.last.IsZero() {
		t.Errorf("the tunnel ends at %v", d.last)
	}
}

func TestTunnelRefused(t *testing.T) {
	answers := make(chan string, 1)
	p, a := parentServer(t, func(c net.Conn, _ string) {
		io.WriteString(c, <-answers)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
	})
	p.Credentials = "deploy:s3cret"
	endless := "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", 4<<10)
	for _, tt := range []struct {
		name, answer string
		status       int // of the ParentError; 0: none
		is           error
		text         string
	}{
		{"its policy", "HTTP/1.1 403 Forbidden\r\n\r\n<html>", 403, nil, `answers 403 "Forbidden": its own policy refuses this`},
		{"credentials", "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n", 407, nil, `answers 407 "Proxy Authentication Required": it wants credentials`},
		{"far side", "HTTP/1.1 502 Bad Gateway\r\n\r\n", 502, nil, "answers 502"},
		{"redirect", "HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", 302, nil, "answers 302"},
		{"phrase with control characters", "HTTP/1.1 500 a\tb\x1b[31m\r\n\r\n", 500, nil, `"a\tb\x1b[31m"`},
		{"garbage", "SSH-2.0-OpenSSH\r\n\r\n", 0, ErrParentAnswer, "not HTTP/1"},
		{"TLS", "\x15\x03\x01\x00\x02\x02\x46", 0, ErrParentAnswer, "not HTTP/1"},
		{"HTTP/2", "HTTP/2 200\r\n\r\n", 0, ErrParentAnswer, "not HTTP/1"},
		{"odd status", "HTTP/1.1 2000 OK\r\n\r\n", 0, ErrParentAnswer, "status line"},
		{"signed status", "HTTP/1.1 +20 OK\r\n\r\n", 0, ErrParentAnswer, "status line"},
		{"no status", "HTTP/1.1\r\n\r\n", 0, ErrParentAnswer, "status line"},
		{"status 0", "HTTP/1.1 020 OK\r\n\r\n", 0, ErrParentAnswer, "status line"},
		{"odd version", "HTTP/1.x 200 OK\r\n\r\n", 0, ErrParentAnswer, "status line"},
		{"endless head", endless, 0, ErrParentAnswer, "more than 16384 bytes"},
		{"endless interim", strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 100), 0, ErrParentAnswer, "too many interim"},
		{"nothing", "", 0, io.ErrUnexpectedEOF, ""},
		{"half a head", "HTTP/1.1 200 OK\r\nA: b\r\n", 0, io.ErrUnexpectedEOF, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			answers <- tt.answer
			_, err := tunnelTo(t, p, a, patience)
			refused, ok := errors.AsType[*ParentError](err)
			switch {
			case err == nil, ok != (tt.status != 0), ok && refused.Status != tt.status, tt.is != nil && !errors.Is(err, tt.is):
				t.Errorf("%v", err)
			case !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), "parent "+p.String()):
				t.Errorf("%v: want %q", err, tt.text)
			case strings.Contains(err.Error(), "s3cret") || strings.ContainsAny(err.Error(), "\x1b\t\n"):
				t.Errorf("%q has what it should not", err)
			}
		})
	}
}

// TestTunnelSlow waits for a parent that drips its answer, and for one that is
// silent, no longer than its context says; and no less when that is cancelled.
func TestTunnelSlow(t *testing.T) {
	stop := make(chan struct{})
	p, a := parentServer(t, func(c net.Conn, _ string) {
		io.WriteString(c, "HTTP/1.1 200 OK\r\n")
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				if _, err := io.WriteString(c, "A"); err != nil {
					return
				}
			}
		}
	})
	t.Cleanup(func() { close(stop) }) // before the server is waited for
	_, err := tunnelTo(t, p, a, 100*time.Millisecond)
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var d Dialer
	conn, err := d.Dial(ctx, []netip.AddrPort{a})
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := p.Tunnel(ctx, conn, "api.ok.test:443", "1.1 gate"); err == nil {
		t.Error("a tunnel after the cancellation")
	}
}

// TestTunnelTLS speaks TLS to the parent, and checks whom it speaks to.
func TestTunnelTLS(t *testing.T) {
	s := httptest.NewUnstartedServer(nil) // for its certificate alone
	s.StartTLS()
	cert := s.TLS.Certificates[0]
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	s.Close()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan string, 4)
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(patience))
			br := bufio.NewReader(c)
			head := ""
			for !strings.HasSuffix(head, "\r\n\r\n") {
				line, err := br.ReadString('\n')
				if head += line; err != nil {
					break
				}
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nearly")
			io.Copy(c, br)
			c.Close()
			done <- head
		}
	}()
	t.Cleanup(func() {
		l.Close()
		for range done {
		}
	})
	a := l.Addr().(*net.TCPAddr).AddrPort()
	p := &Parent{Host: "example.com", Port: a.Port(), Credentials: "deploy:s3cret", TLS: &tls.Config{ServerName: "example.com", RootCAs: pool}}
	conn, err := tunnelTo(t, p, a, patience)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "ping")
	conn.(interface{ CloseWrite() error }).CloseWrite()
	if b, err := io.ReadAll(conn); err != nil || string(b) != "earlyping" {
		t.Errorf("%q, %v", b, err)
	}
	want := "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("deploy:s3cret")) + "\r\n"
	if head := <-done; strings.Count(head, want) != 1 {
		t.Errorf("%q", head)
	}
	p.TLS = &tls.Config{ServerName: "other.test", RootCAs: pool}
	if _, err := tunnelTo(t, p, a, patience); err == nil {
		t.Error("a tunnel through somebody else")
	}
	if head := <-done; head != "" {
		t.Errorf("somebody else was told %q", head)
	}
}

func TestSource(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := l.Addr().(*net.TCPAddr).AddrPort()
	d := Dialer{Source: Source{V4: netip.MustParseAddr("127.0.0.77")}}
	conn, err := d.Dial(t.Context(), []netip.AddrPort{netip.MustParseAddrPort("[::1]:1"), to})
	if err != nil {
		t.Skipf("this machine has no 127.0.0.77: %v", err)
	}
	defer conn.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); from != d.Source.V4 {
		t.Errorf("the connection comes from %v", from)
	}
	// The other family is not used, however reachable it is.
	d.Source = Source{V6: netip.MustParseAddr("::1")}
	if conn, err := d.Dial(t.Context(), []netip.AddrPort{to}); !errors.Is(err, ErrNoSource) {
		t.Errorf("%v, %v", conn, err)
	}
	d.Source = Source{V4: netip.MustParseAddr("192.0.2.77")}
	if conn, err := d.Dial(t.Context(), []netip.AddrPort{to}); err == nil {
		conn.Close()
		t.Error("a connection from somebody else's address")
	}
}

func FuzzAnswer(f *testing.F) {
	for _, s := range []string{"HTTP/1.1 200 OK\r\n\r\nx", "HTTP/1.1 100 C\r\n\r\nHTTP/1.0 200\r\n\r\n", "HTTP/1.1 407 \r\nA:\r\n\r\n", "\r\n\r\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, answer string) {
		p := Parent{Host: "p.test", Port: 1}
		early, err := p.connect(&canned{Reader: strings.NewReader(answer)}, "a.test:443", "1.1 gate")
		if err == nil && !strings.HasSuffix(answer, string(early)) {
			t.Errorf("%q is not the end of %q", early, answer)
		}
		if e, ok := errors.AsType[*ParentError](err); ok && (e.Status < 300 || e.Status > 999 || len(e.Phrase) > maxPhrase) {
			t.Errorf("%+v", e)
		}
	})
}

// canned is a connection that has said everything already.
type canned struct {
	net.Conn
	*strings.Reader
}

func (c *canned) Read(p []byte) (int, error)  { return c.Reader.Read(p) }
func (c *canned) Write(p []byte) (int, error) { return len(p), nil }
