package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
)

func TestParseHead(t *testing.T) {
	const get = "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n"
	tests := []struct {
		name, head string
		status     int // 0: accepted
	}{
		{"CONNECT", "CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n", 0},
		{"CONNECT without Host", "CONNECT a.test:443 HTTP/1.1\r\n\r\n", 0},
		{"CONNECT of HTTP/1.0", "CONNECT a.test:443 HTTP/1.0\r\n\r\n", 0},
		{"CONNECT with no content", "CONNECT a.test:443 HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 0},
		{"CONNECT with content", "CONNECT a.test:443 HTTP/1.1\r\nContent-Length: 1\r\n\r\n", 400},
		{"CONNECT in chunks", "CONNECT a.test:443 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"GET", get + "\r\n", 0},
		{"POST", get + "Content-Length: 3\r\n\r\n", 0},
		{"chunks", get + "Transfer-Encoding: Chunked\r\n\r\n", 0},
		{"control character in a field", get + "X: a\x1bb\r\n\r\n", 400},
		{"DEL in a field", get + "X: a\x7f\r\n\r\n", 400},
		{"tab and UTF-8 in a field", get + "X: a\tbé\r\n\r\n", 0},
		{"GET without Host", "GET http://a.test/ HTTP/1.1\r\n\r\n", 400},
		{"HTTP/1.0 without Host", "GET http://a.test/ HTTP/1.0\r\n\r\n", 0},
		{"two Hosts", get + "Host: a.test\r\n\r\n", 400},
		{"both lengths", get + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"two lengths", get + "Content-Length: 3\r\nContent-Length: 3\r\n\r\n", 400},
		{"list of lengths", get + "Content-Length: 3, 3\r\n\r\n", 400},
		{"signed length", get + "Content-Length: +3\r\n\r\n", 400},
		{"empty length", get + "Content-Length:\r\n\r\n", 400},
		{"odd encoding", get + "Transfer-Encoding: chunked, identity\r\n\r\n", 400},
		{"two encodings", get + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"chunks in HTTP/1.0", "POST http://a.test/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"space before the colon", get + "Content-Length : 3\r\n\r\n", 400},
		{"folded field", get + "X: a\r\n b\r\n\r\n", 400},
		{"field without colon", get + "X\r\n\r\n", 400},
		{"field without name", get + ": x\r\n\r\n", 400},
		{"NUL in a field", get + "X: \x00\r\n\r\n", 400},
		{"CR in a field", get + "X: a\rb\r\n\r\n", 400},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\n", 505},
		{"HTTP/1.2", "GET / HTTP/1.2\r\n\r\n", 505},
		{"HTTP/0.9", "GET /\r\n\r\n", 400},
		{"lower-case version", "GET / http/1.1\r\n\r\n", 400},
		{"two spaces", "GET  http://a.test/ HTTP/1.1\r\n\r\n", 400},
		{"space in the target", "CONNECT a.test :443 HTTP/1.1\r\n\r\n", 400},
		{"no target", "GET  HTTP/1.1\r\n\r\n", 400},
		{"method is no token", "G(T / HTTP/1.1\r\n\r\n", 400},
		{"tab for a space", "GET\t/ HTTP/1.1\r\n\r\n", 400},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, n, err := readHead(strings.NewReader(tt.head), nil, 1<<16)
			if err != nil || n != len(tt.head) {
				t.Fatalf("readHead: %d of %d, %v", n, len(tt.head), err)
			}
			_, err = parseHead(b[:n])
			status := 0
			var h *headError
			if errors.As(err, &h) {
				status = h.status
			}
			if status != tt.status {
				t.Errorf("parseHead: %v; want status %d", err, tt.status)
			}
		})
	}
}

func TestParseHeadFields(t *testing.T) {
	h, err := parseHead([]byte("CONNECT a.test:443 HTTP/1.1\r\nhOST: \t b.test \r\nUser-agent: x\t[31m\r\nAccept: text/*, Application/JSON\r\n\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(h.method) + "|" + string(h.target) + "|" + string(h.host) + "|" + string(h.userAgent); got != "CONNECT|a.test:443|b.test|x\t[31m" || !h.json {
		t.Errorf("%s, JSON %v", got, h.json)
	}
}

func TestReadHead(t *testing.T) {
	head := "GET http://a.test/ HTTP/1.1\r\nX: " + strings.Repeat("x", 5000) + "\r\n\r\n"
	whole := head + "rest"
	for _, r := range []io.Reader{strings.NewReader(whole), iotest.OneByteReader(strings.NewReader(whole)), iotest.DataErrReader(strings.NewReader(whole))} {
		b, n, err := readHead(r, make([]byte, 0, 100), 1<<16)
		if err != nil || string(b[:n]) != head || !strings.HasPrefix(whole, string(b)) {
			t.Errorf("%d bytes, rest %q, %v", n, b[n:], err)
		}
	}
	tests := []struct {
		name, in string
		want     error
	}{
		{"empty", "", io.EOF},
		{"cut", "GET / HT", io.EOF},
		{"TLS", "\x16\x03\x01", errIsTLS},
		{"binary", "\x00", errNotHTTP},
		{"starts with an empty line", "\r\nGET / HTTP/1.1\r\n\r\n", errNotHTTP},
		{"bare LF", "GET / HTTP/1.1\nHost: a\n\n", errBareLF},
		{"bare LF in a field", "GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", errBareLF},
		{"bare LF at the end", "GET / HTTP/1.1\r\nHost: a\r\n\n", errBareLF},
		{"too long", "GET / HTTP/1.1\r\n" + strings.Repeat("a", 300), errHeadTooBig},
	}
	for _, tt := range tests {
		for _, r := range []io.Reader{strings.NewReader(tt.in), iotest.OneByteReader(strings.NewReader(tt.in))} {
			if b, n, err := readHead(r, make([]byte, 0, 16), 256); !errors.Is(err, tt.want) || n != 0 || !strings.HasPrefix(tt.in, string(b)) {
				t.Errorf("%s: %d, %v; want %v", tt.name, n, err, tt.want)
			}
		}
	}
}

func TestHostMismatch(t *testing.T) {
	for host, same := range map[string]bool{
		"": true, "a.test:443": true, "A.test": true, "a.test": true, "b.test:443": false, "a.test:80": false, "a.test.": false,
	} {
		if err := hostMismatch(host, "a.test:443"); (err == nil) != same {
			t.Errorf("Host %q: %v", host, err)
		}
	}
}

func TestLooksHTTP(t *testing.T) {
	for b, want := range map[string][2]bool{ // is, known
		"": {}, "G": {}, "GET": {}, "GET ": {}, "GET /": {true, true}, "GET http://": {true, true}, "OPTIONS *": {true, true}, "M-SEARCH /": {true, true},
		"SSH-2.0-x": {false, true}, "SSH-": {}, " GET": {false, true}, "get /": {false, true}, "GET \x00": {false, true}, "EHLO\r\n": {false, true},
		strings.Repeat("A", 21): {false, true}, strings.Repeat("A", 21) + " /": {false, true}, "\x16\x03": {false, true},
	} {
		if is, known := looksHTTP([]byte(b)); is != want[0] || known != want[1] {
			t.Errorf("looksHTTP(%q) = %v, %v", b, is, known)
		}
	}
}

// FuzzHead holds the strict parser against net/http's: what it accepts net/http
// accepts too, apart from what only CONNECT's own parser or net/url judges, and
// reads in the same way.
func FuzzHead(f *testing.F) {
	for _, s := range []string{
		"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n", "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
		"POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\n\r\nabc", "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"GET / HTTP/1.1\nHost: a\n\n", "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", "\x16\x03\x01\x00",
	} {
		f.Add([]byte(s), 7)
	}
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		whole := bytes.Clone(in)
		b, n, err := readHead(bytes.NewReader(in), nil, 4096)
		cut := make([]byte, 0, max(size%64, 0))
		b2, n2, err2 := readHead(iotest.OneByteReader(bytes.NewReader(in)), cut, 4096)
		if n != n2 || (err == nil) != (err2 == nil) || !bytes.HasPrefix(whole, b) || !bytes.HasPrefix(whole, b2) {
			t.Fatalf("in one piece %d, %v; byte by byte %d, %v", n, err, n2, err2)
		}
		if err != nil {
			return
		}
		h, err := parseHead(b[:n])
		if err != nil {
			return
		}
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b[:n])))
		if err != nil {
			if !h.isConnect() && !strings.Contains(err.Error(), "parse ") && !strings.Contains(err.Error(), "invalid") {
				t.Fatalf("accepted %q, but net/http says %v", b[:n], err)
			}
			return
		}
		if r.Method != string(h.method) || r.RequestURI != string(h.target) || r.UserAgent() != string(h.userAgent) && h.hosts < 2 && strings.Count(strings.ToLower(string(b)), "user-agent") < 2 {
			t.Fatalf("%q: %q %q %q, net/http: %q %q %q", b[:n], h.method, h.target, h.userAgent, r.Method, r.RequestURI, r.UserAgent())
		}
		if chunked := len(r.TransferEncoding) > 0; chunked != h.chunked {
			t.Fatalf("%q: chunked %v, net/http: %v", b[:n], h.chunked, chunked)
		}
	})
}
