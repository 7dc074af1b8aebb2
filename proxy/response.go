package proxy

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"strconv"
)

// A responseHead is what a response's head says about its framing.
type responseHead struct {
	status  int
	minor   byte // of HTTP/1.x: '0' or later
	length  []byte
	chunked bool
}

func badResponse(what string) error { return errors.New("malformed response: " + what) }

// responseHead judges the head of a response once it is complete. Of what two
// readers might see in it only the framing is looked at; the rest is written anew
// to the client. Lines may end in a bare LF (RFC 9112, section 2.2).
func (f *framing) responseHead(b []byte) (n int, done bool, err error) {
	asked := f.asked.Load()
	if asked == nothing {
		return 0, false, errUnasked
	}
	if k := min(len(b), len(httpPrefix)); string(b[:k]) != httpPrefix[:k] {
		return 0, false, badResponse("not HTTP")
	}
	if n, _ = f.lines.end(b, true); n == 0 {
		if len(b) >= f.limit {
			err = errLongAnswer
		}
		return 0, false, err
	}
	if n > f.limit {
		return 0, false, errLongAnswer
	}
	h, err := parseResponseHead(b[:n])
	if err != nil {
		return 0, false, err
	}
	switch {
	case h.status == http.StatusSwitchingProtocols:
		f.state = untilEnd
		f.asked.Store(nothing)
		return n, false, nil
	case h.status < 200: // another one follows
		return n, true, nil
	}
	f.asked.Store(nothing)
	switch {
	case asked == askedHEAD, h.status == http.StatusNoContent, h.status == http.StatusNotModified:
		return n, true, nil
	case h.chunked:
		f.state, f.left = inChunkSize, 0
		return n, false, nil
	case h.length == nil:
		f.state = untilEnd
		return n, false, nil
	}
	if f.left, err = parseLength(h.length); err != nil {
		return 0, false, badResponse("Content-Length")
	}
	if f.left > 0 {
		f.state = inBody
	}
	return n, f.left == 0, nil
}

const httpPrefix = "HTTP/1."

// parseResponseHead reads what b, a whole head, says about its framing (RFC 9112,
// section 6.3). A length and a transfer coding together, a coding other than
// chunked, and lengths that differ are errors.
func parseResponseHead(b []byte) (h responseHead, err error) {
	line, rest, _ := bytes.Cut(b, []byte{'\n'})
	line = bytes.TrimSuffix(line, []byte{'\r'})
	version, status, ok := bytes.Cut(line, []byte{' '})
	if !ok || len(version) != len("HTTP/1.1") || len(status) < 3 || len(status) > 3 && status[3] != ' ' || !isNumber(status[:3]) {
		return h, badResponse("status line")
	}
	h.minor = version[len(version)-1]
	h.status, _ = strconv.Atoi(string(status[:3]))
	if h.status < 100 || h.minor < '0' || h.minor > '9' {
		return h, badResponse("status line")
	}
	framing := false // the previous field was one about framing
	for len(rest) > 0 {
		line, rest, _ = bytes.Cut(rest, []byte{'\n'})
		line = bytes.TrimSuffix(line, []byte{'\r'})
		if len(line) == 0 {
			break
		}
		if line[0] == ' ' || line[0] == '\t' {
			if framing {
				return h, badResponse("folded length or transfer coding")
			}
			continue
		}
		i := bytes.IndexByte(line, ':')
		if i < 0 || !isToken(line[:i]) {
			return h, badResponse("header field line")
		}
		if framing, err = h.field(line[:i], bytes.Trim(line[i+1:], " \t")); err != nil {
			return h, err
		}
	}
	switch {
	case h.chunked && h.length != nil:
		return h, badResponse("both Content-Length and Transfer-Encoding")
	case h.chunked && h.minor == '0':
		return h, badResponse("Transfer-Encoding in HTTP/1.0")
	}
	return h, nil
}

// field takes a field. It reports whether that is about framing.
func (h *responseHead) field(name, value []byte) (framing bool, err error) {
	switch {
	case equalFold(name, "content-length"):
		if !isNumber(value) || h.length != nil && !bytes.Equal(h.length, value) {
			return true, badResponse("Content-Length")
		}
		h.length = value
		return true, nil
	case equalFold(name, "transfer-encoding"):
		if h.chunked || !equalFold(value, "chunked") {
			return true, badResponse("Transfer-Encoding")
		}
		h.chunked = true
		return true, nil
	}
	return false, nil
}

// A responseReader reads the response to one request that is not HEAD.
type responseReader struct {
	in framed
	r  io.Reader
}

func newResponseReader(r io.Reader, limit int) *responseReader {
	p := &responseReader{r: r, in: framed{framing: framing{limit: limit, response: true}}}
	p.in.asked.Store(askedFor)
	return p
}

func (p *responseReader) Read(b []byte) (int, error) { return p.in.read(p.r, b) }
