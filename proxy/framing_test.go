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

const (
	testGet     = "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n"
	testChunked = "POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
	testLength  = "POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhello"
)

// badBodies are what follows testChunked's head and is not in order.
var badBodies = []struct{ name, body string }{
	{"no size", "\r\n0\r\n\r\n"},
	{"signed size", "+5\r\nhello\r\n0\r\n\r\n"},
	{"negative size", "-5\r\nhello\r\n0\r\n\r\n"},
	{"hexadecimal prefix", "0x5\r\nhello\r\n0\r\n\r\n"},
	{"underscore in the size", "1_0\r\n0123456789abcdef\r\n0\r\n\r\n"},
	{"space before the size", " 5\r\nhello\r\n0\r\n\r\n"},
	{"space after the size", "5 \r\nhello\r\n0\r\n\r\n"},
	{"space before the extension", "5 ;a\r\nhello\r\n0\r\n\r\n"},
	{"size of 17 digits", "00000000000000005\r\nhello\r\n0\r\n\r\n"},
	{"overlong extension", "5;" + strings.Repeat("a", maxChunkExt+1) + "\r\nhello\r\n0\r\n\r\n"},
	{"bare LF in the extension", "5;a\nhello\r\n0\r\n\r\n"},
	{"NUL in the extension", "5;a\x00\r\nhello\r\n0\r\n\r\n"},
	{"bare LF after the size", "5\nhello\r\n0\r\n\r\n"},
	{"bare CR after the size", "5\rhello\r\n0\r\n\r\n"},
	{"CR CR LF after the size", "5\r\r\nhello\r\n0\r\n\r\n"},
	{"no CRLF after the chunk", "5\r\nhello0\r\n\r\n"},
	{"LF alone after the chunk", "5\r\nhello\n0\r\n\r\n"},
	{"chunk longer than its size", "3\r\nhello\r\n0\r\n\r\n"},
	{"bare LF at the end", "0\r\n\n"},
	{"bare LF in the trailers", "0\r\nA: b\n\r\n"},
	{"oversized trailers", "0\r\nA: " + strings.Repeat("b", maxTrailers) + "\r\n\r\n"},
	{"folded trailer", "0\r\nA: b\r\n c\r\n\r\n"},
	{"trailer without a colon", "0\r\nA\r\n\r\n"},
	{"space before a trailer's colon", "0\r\nA : b\r\n\r\n"},
	{"length in the trailers", "0\r\nContent-Length: 3\r\n\r\n"},
	{"coding in the trailers", "0\r\nTransfer-Encoding: chunked\r\n\r\n"},
	{"host in the trailers", "0\r\nHost: b.test\r\n\r\n"},
	{"credentials in the trailers", "0\r\nProxy-Authorization: x\r\n\r\n"},
	{"a request in place of a chunk", testGet},
}

// goodMessages are complete requests.
var goodMessages = []string{
	testGet, testLength,
	testChunked + "0\r\n\r\n",
	testChunked + "5\r\nhello\r\n0\r\n\r\n",
	testChunked + "5;a=b;c=\"d\"\r\nhello\r\n00;x\r\nA: b\r\nB: c\r\n\r\n",
	testChunked + "000000000000000a\r\n0123456789\r\n0\r\n\r\n",
	testChunked + "A\r\n0123456789\r\n1\r\n\n\r\n0\r\n\r\n",
	"HEAD http://a.test/ HTTP/1.0\r\n\r\n",
	"POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: 000\r\n\r\n",
}

// follow passes in through a framed until its end, and returns what came out.
func follow(r io.Reader, edit func(*framed)) (out []byte, f *framed, err error) {
	f = &framed{framing: framing{limit: 8 << 10}}
	if edit != nil {
		edit(f)
	}
	p := make([]byte, 4<<10)
	for {
		n, err := f.read(r, p)
		out = append(out, p[:n]...)
		if err != nil {
			return out, f, err
		}
	}
}

// readers give b in all kinds of pieces.
func readers(b string) map[string]io.Reader {
	return map[string]io.Reader{
		"whole": strings.NewReader(b), "bytes": iotest.OneByteReader(strings.NewReader(b)), "halves": iotest.HalfReader(strings.NewReader(b)),
		"data with the error": iotest.DataErrReader(strings.NewReader(b)),
	}
}

func TestFramingPasses(t *testing.T) {
	all := strings.Join(goodMessages, "")
	for _, m := range append(goodMessages, all, all+"CONNECT a.test:443 HTTP/1.1\r\n\r\nany\nthing") {
		for name, r := range readers(m) {
			out, f, err := follow(r, nil)
			if string(out) != m || err != io.EOF || len(f.held) > 0 {
				t.Errorf("%s: %q became %q, %v", name, m, out, err)
			}
		}
	}
}

func TestFramingRefuses(t *testing.T) {
	for _, tt := range badBodies {
		t.Run(tt.name, func(t *testing.T) {
			m := testChunked + tt.body
			for name, r := range readers(testGet + m) {
				out, f, err := follow(r, nil)
				if !isHeadError(err) || !strings.HasPrefix(testGet+m, string(out)) {
					t.Errorf("%s: %q became %q, %v", name, m, out, err)
				}
				if name == "whole" && len(m) < 4<<10 && string(out) != testGet {
					t.Errorf("some of the message was passed on: %q", out)
				}
				if _, again := f.read(strings.NewReader(testGet), make([]byte, 10)); again != err {
					t.Errorf("it goes on with %v", again)
				}
			}
		})
	}
}

func TestFramingBoundsHeads(t *testing.T) {
	long := "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\nX: "
	for name, r := range readers(long + strings.Repeat("x", 7<<10) + "\r\n\r\n") {
		if out, _, err := follow(r, nil); len(out) < 7<<10 || err != io.EOF {
			t.Errorf("%s: %d bytes, %v", name, len(out), err)
		}
	}
	for name, r := range readers(long + strings.Repeat("x", 64<<10)) {
		out, f, err := follow(r, nil)
		if !errors.Is(err, errHeadTooBig) || len(out) > 0 || cap(f.held) > 32<<10 {
			t.Errorf("%s: %d bytes passed on, %d held, %v", name, len(out), cap(f.held), err)
		}
	}
}

// TestFramingAllocates checks that a request in one piece costs no memory.
func TestFramingAllocates(t *testing.T) {
	f := &framed{framing: framing{limit: 8 << 10}}
	p := make([]byte, 4<<10)
	r := new(bytes.Reader)
	for _, m := range goodMessages {
		b := []byte(m)
		if n := testing.AllocsPerRun(100, func() {
			r.Reset(b)
			for got := 0; got < len(b); {
				n, err := f.read(r, p)
				if err != nil {
					t.Fatal(err)
				}
				got += n
			}
		}); n > 0 {
			t.Errorf("%q: %v allocations", m, n)
		}
	}
}

// badResponses are heads that a client must not get to see.
var badResponses = []string{
	"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
	"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
	"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
	"HTTP/1.1 200 OK\r\nContent-Length:\r\n 5\r\n\r\nhello",
	"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\t5\r\n\r\nhello",
	"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nhello",
	"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\nhello",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nhello",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
	"HTTP/1.1 2000 OK\r\n\r\n", "HTTP/1.1 20 OK\r\n\r\n", "HTTP/1.1 099 OK\r\n\r\n", "HTTP/2.0 200 OK\r\n\r\n", "ICY 200 OK\r\n\r\n",
	"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 9<<10) + "\r\n\r\n",
}

func TestFramingOfResponses(t *testing.T) {
	as := func(asked uint32) func(*framed) {
		return func(f *framed) { f.response = true; f.asked.Store(asked) }
	}
	const plain = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
	for _, tt := range []struct {
		asked     uint32
		in, rest  string
		malformed bool
	}{
		{askedFor, plain, "", false},
		{askedFor, "HTTP/1.0 200\nContent-Length: 5\n\nhello", "", false},
		{askedFor, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\nX: a\r\n b\r\n\r\nhello", "", false},
		{askedFor, "HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + plain, "", false},
		{askedFor, "HTTP/1.1 200 OK\r\n\r\nuntil the end" + plain, "", false},
		{askedFor, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5  \r\nhello\r\n0\r\nA: b\r\n\r\n", "", false},
		{askedFor, "HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\nany\nthing", "", false},
		{askedHEAD, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "", false},
		{askedHEAD, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "hello", true},
		{askedFor, "HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\n", "hello", true},
		{askedFor, "HTTP/1.1 304 No\r\n\r\n", plain, true},
		{askedFor, plain, plain, true},
		{nothing, "", plain, true},
		{nothing, "", "x", true},
	} {
		for name, r := range readers(tt.in + tt.rest) {
			out, _, err := follow(r, as(tt.asked))
			if string(out) != tt.in || (err != io.EOF) != tt.malformed || tt.malformed && !strings.Contains(err.Error(), "malformed") {
				t.Errorf("%s: %q became %q, %v", name, tt.in+tt.rest, out, err)
			}
		}
	}
	for _, m := range badResponses {
		for name, r := range readers(m) {
			out, _, err := follow(r, as(askedFor))
			if len(out) > 0 || err == io.EOF || !strings.Contains(err.Error(), "malformed") {
				t.Errorf("%s: %q became %q, %v", name, m, out, err)
			}
		}
	}
	// What follows a response is found out with it, not when the next request is sent.
	f := &framed{framing: framing{limit: 8 << 10, response: true}}
	f.asked.Store(askedFor)
	r := strings.NewReader(plain + plain)
	if n, err := f.read(r, make([]byte, 4<<10)); n != len(plain) || err != nil {
		t.Fatal(n, err)
	}
	f.asked.Store(askedFor)
	if n, err := f.read(r, make([]byte, 4<<10)); !errors.Is(err, errUnasked) {
		t.Error(n, err)
	}
}

// FuzzFraming holds the framing against net/http's reader: whatever is passed on,
// net/http sees the same number of messages in it, each in full.
func FuzzFraming(f *testing.F) {
	for _, m := range goodMessages {
		f.Add([]byte(m+testGet), uint8(3))
	}
	for _, b := range badBodies {
		f.Add([]byte(testChunked+b.body), uint8(0))
	}
	f.Add([]byte("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), uint8(1))
	f.Fuzz(func(t *testing.T, in []byte, piece uint8) {
		if len(in) > 16<<10 {
			return
		}
		fr := &framed{framing: framing{limit: 8 << 10}}
		r := &pieces{b: in, n: int(piece)}
		p := make([]byte, 4<<10)
		var out []byte
		messages := 0 // complete ones
		var ferr error
		for {
			n, err := fr.read(r, p)
			out = append(out, p[:n]...)
			if n > 0 && fr.between() {
				messages++
			}
			if fr.state == untilEnd {
				return // a CONNECT; its head has been judged, what follows is no HTTP
			}
			if err != nil {
				ferr = err
				break
			}
			if n == 0 {
				t.Fatal("no progress")
			}
		}
		if !bytes.HasPrefix(in, out) {
			t.Fatalf("%q became %q", in, out)
		}
		br := bufio.NewReader(bytes.NewReader(out))
		seen := 0
		for {
			req, err := http.ReadRequest(br)
			if err != nil {
				break
			}
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				break
			}
			seen++
			if req.TransferEncoding != nil && req.Header.Get("Content-Length") != "" {
				t.Fatalf("both lengths in %q", out)
			}
		}
		// net/http may refuse a URL that we leave to it. It must not see more.
		if seen > messages {
			t.Errorf("of %q (%v) net/http sees %d messages, we %d", in, ferr, seen, messages)
		}
	})
}

// pieces gives b in pieces of n bytes; 0: as a whole.
type pieces struct {
	b []byte
	n int
}

func (r *pieces) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	if r.n > 0 {
		p = p[:min(len(p), r.n)]
	}
	n := copy(p, r.b)
	r.b = r.b[n:]
	return n, nil
}
