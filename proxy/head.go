package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
)

// A headError says what is wrong with a request head, and the status to answer.
type headError struct {
	status int
	what   string
}

func (e *headError) Error() string { return e.what }

func badHead(what string) error { return &headError{http.StatusBadRequest, what} }

var (
	errNotHTTP    = badHead("not HTTP")
	errIsTLS      = badHead("TLS to the proxy port; the client's proxy setting needs http://, not https://")
	errBareLF     = badHead("line ends in a bare LF")
	errHeadTooBig = &headError{http.StatusRequestHeaderFieldsTooLarge, "request head exceeds the limit"}
	errURLTooLong = &headError{http.StatusRequestURITooLong, "request target exceeds proxy.limits.url_bytes"}
	errHeadSlow   = &headError{http.StatusRequestTimeout, "request head did not arrive in time"}
	errBodySlow   = &headError{http.StatusRequestTimeout, "body of the request did not arrive in time"}
)

// A head is the part of a request head that is looked at before net/http. The
// slices are part of the buffer it was parsed from.
type head struct {
	method, target []byte
	host           []byte // value of the Host field
	userAgent      []byte
	json           bool   // an Accept field asks for application/json
	credentials    []byte // value of the last Proxy-Authorization field

	minor         byte // of HTTP/1.x: '0' or '1'
	hosts         int
	authorized    int // Proxy-Authorization fields
	contentLength []byte
	chunked       bool
	via           []byte // values of Via, as one
	looped        bool   // one of them says that it has been through this process
}

// readHead reads from r until b holds a whole request head (RFC 9112, section 2.1),
// and returns b with the head's length, the empty line included. b may already
// hold bytes of it; its spare capacity is read into first. limit bounds the head
// in bytes.
//
// The error is a headError, or r's own. b may then hold the start of a head.
func readHead(r io.Reader, b []byte, limit int) (all []byte, n int, err error) {
	var l headLines
	for {
		if err := checkStart(b); err != nil {
			return b, 0, err
		}
		n, err := l.end(b, false)
		if n > limit {
			return b, 0, errHeadTooBig
		}
		if n > 0 || err != nil {
			return b, n, err
		}
		if len(b) >= limit {
			return b, 0, errHeadTooBig
		}
		if len(b) == cap(b) {
			b = append(make([]byte, 0, min(2*cap(b)+minBuffer, limit)), b...)
		}
		m, err := r.Read(b[len(b):min(cap(b), limit)])
		b = b[:len(b)+m]
		if err != nil && m == 0 {
			if isTimeout(err) && len(b) > 0 {
				err = errHeadSlow
			}
			return b, 0, err
		}
	}
}

// checkStart refuses at once what cannot become a request: the rest of it might
// never come.
func checkStart(b []byte) error {
	switch {
	case len(b) == 0:
	case b[0] == 0x16:
		return errIsTLS
	case !tokenByte[b[0]]:
		return errNotHTTP
	}
	return nil
}

// parseHead parses b, a whole request head, as strictly as RFC 9112 allows: what
// two parsers might read differently is refused. On an error the method and the
// target are set if they could be told.
func parseHead(b []byte) (h head, err error) {
	line, rest, _ := bytes.Cut(b, crlf)
	if err := h.requestLine(line); err != nil {
		return h, err
	}
	for len(rest) > len(crlf) {
		line, rest, _ = bytes.Cut(rest, crlf)
		if err := h.field(line); err != nil {
			return h, err
		}
	}
	return h, h.check()
}

var crlf = []byte("\r\n")

// requestLine takes "method SP target SP HTTP-version" apart (RFC 9112, section 3).
func (h *head) requestLine(line []byte) error {
	method, rest, ok := bytes.Cut(line, []byte{' '})
	if !ok || !isToken(method) {
		return badHead("request line")
	}
	h.method = method
	i := bytes.LastIndexByte(rest, ' ')
	if i <= 0 {
		return badHead("request line")
	}
	h.target = rest[:i]
	version := rest[i+1:]
	switch {
	case bytes.IndexByte(h.target, ' ') >= 0:
		return badHead("space in the request target")
	case len(version) != len("HTTP/1.1") || !bytes.HasPrefix(version, []byte("HTTP/")):
		return badHead("HTTP version")
	case string(version) != "HTTP/1.1" && string(version) != "HTTP/1.0":
		return &headError{http.StatusHTTPVersionNotSupported, "HTTP version other than 1.0 and 1.1"}
	}
	h.minor = version[len(version)-1]
	return nil
}

// field reads one header field line (RFC 9112, section 5). A line that starts
// with a space (obs-fold) and a space before the colon fail as names.
func (h *head) field(line []byte) error {
	name, value, err := splitField(line)
	if err != nil {
		return err
	}
	switch {
	case equalFold(name, "host"):
		h.host = value
		h.hosts++
	case equalFold(name, "content-length"):
		if h.contentLength != nil || !isNumber(value) {
			return badHead("Content-Length")
		}
		if _, err := parseLength(value); err != nil {
			return err
		}
		h.contentLength = value
	case equalFold(name, "transfer-encoding"):
		if h.chunked || !equalFold(value, "chunked") {
			return badHead("Transfer-Encoding")
		}
		h.chunked = true
	case equalFold(name, "user-agent"):
		h.userAgent = value
	case equalFold(name, "accept"):
		h.json = h.json || wantsJSON(string(value))
	case equalFold(name, "via"):
		h.looped = h.looped || bytes.Contains(value, []byte(pseudonym))
		if h.via != nil {
			value = slices.Concat(h.via, []byte(", "), value)
		}
		h.via = value
	case equalFold(name, "proxy-authorization"):
		h.credentials = value
		h.authorized++
	}
	return nil
}

// splitField takes a field line apart. Control characters, which RFC 9110,
// section 5.5, forbids in values, are refused like those in names.
func splitField(line []byte) (name, value []byte, err error) {
	i := bytes.IndexByte(line, ':')
	if i < 0 || !isToken(line[:i]) {
		return nil, nil, badHead("header field line")
	}
	name, value = line[:i], line[i+1:]
	for _, c := range value {
		if c < ' ' && c != '\t' || c == 0x7f {
			return nil, nil, badHead("control character in a header field")
		}
	}
	return name, bytes.Trim(value, " \t"), nil
}

// check judges what only all fields together tell (RFC 9112, sections 3.2 and 6.1).
func (h *head) check() error {
	connect := h.isConnect()
	switch {
	case h.hosts > 1:
		return badHead("more than one Host")
	case h.hosts == 0 && h.minor == '1' && !connect:
		return badHead("no Host")
	case h.chunked && h.contentLength != nil:
		return badHead("both Content-Length and Transfer-Encoding")
	case h.chunked && h.minor == '0':
		return badHead("Transfer-Encoding in HTTP/1.0")
	case connect && (h.chunked || strings.Trim(string(h.contentLength), "0") != ""):
		// What follows a CONNECT belongs to the tunnel (RFC 9110, section 9.3.6).
		return badHead("CONNECT with content")
	}
	return nil
}

func (h *head) isConnect() bool { return string(h.method) == http.MethodConnect }

// hostMismatch returns what to note if the Host field names another host than
// target, the CONNECT target, which wins (RFC 9112, section 3.2.2).
func hostMismatch(host, target string) error {
	name := target[:max(strings.LastIndexByte(target, ':'), 0)]
	if host == "" || strings.EqualFold(host, target) || strings.EqualFold(host, name) {
		return nil
	}
	return fmt.Errorf("the Host field says %q", clip(host))
}

// wantsJSON reports whether an Accept field prefers a JSON answer. Quality values
// are not weighed: who names the type wants it.
func wantsJSON(accept string) bool {
	return strings.Contains(strings.ToLower(accept), "application/json")
}

// isHeadError reports whether err is about the head, not about the connection.
func isHeadError(err error) bool {
	var h *headError
	return errors.As(err, &h)
}

// tokenByte tells which bytes a token may hold (RFC 9110, section 5.6.2).
var tokenByte = func() (t [256]bool) {
	for c := range t {
		t[c] = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
			c > ' ' && c < 0x7f && strings.IndexByte("!#$%&'*+-.^_`|~", byte(c)) >= 0
	}
	return t
}()

func isToken(b []byte) bool {
	for _, c := range b {
		if !tokenByte[c] {
			return false
		}
	}
	return len(b) > 0
}

func isNumber(b []byte) bool {
	for _, c := range b {
		if c < '0' || c > '9' {
			return false
		}
	}
	return len(b) > 0
}

// equalFold is strings.EqualFold for ASCII; s is in lower case.
func equalFold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i := range b {
		c := b[i]
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != s[i] {
			return false
		}
	}
	return true
}
