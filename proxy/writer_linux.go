package proxy

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
)

// A plainWriter is the http.ResponseWriter of a request that a lane serves. It says what
// net/http's server would, of HTTP/1.1 alone: the tests of the proxy hold both against
// each other.
type plainWriter struct {
	w        *bufio.Writer // nil: nothing was written yet
	to       io.Writer
	header   http.Header
	head     bool // the request is HEAD
	close    bool // the connection ends after the response
	status   int  // of the final head; 0: not known yet
	begun    bool // it is written
	ended    bool // so is everything
	bodiless bool // the response has no body, whatever its fields say
	chunked  bool
	length   int64    // of the body as announced; -1: unknown
	written  int64    // bytes of it
	trailers []string // announced
	err      error
}

// reset makes w ready for the response to r.
func (w *plainWriter) reset(to io.Writer, r *http.Request) {
	h := w.header
	if h == nil {
		h = make(http.Header)
	}
	*w = plainWriter{to: to, header: h, head: r.Method == http.MethodHead, close: r.Close, trailers: w.trailers[:0], length: -1}
}

// release gives the buffer back, and keeps nothing of the response.
func (w *plainWriter) release() {
	clear(w.header)
	if w.w != nil {
		w.w.Reset(nil)
		requestWriters.Put(w.w)
		w.w = nil
	}
}

func (w *plainWriter) Header() http.Header { return w.header }

// WriteHeader takes the final status, with which the header is complete. A 1xx response
// is sent at once.
func (w *plainWriter) WriteHeader(status int) {
	if w.status != 0 {
		return
	}
	if w.w == nil {
		w.w = requestWriters.Get().(*bufio.Writer)
		w.w.Reset(w.to)
	}
	if status >= http.StatusOK {
		w.status = status
		w.frame()
		return
	}
	w.statusLine(status)
	w.header.WriteSubset(w.w, noFraming)
	w.w.WriteString("\r\n")
	w.note(w.w.Flush())
}

// begin writes the head, once.
func (w *plainWriter) begin() {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	if w.begun {
		return
	}
	w.begun = true
	w.statusLine(w.status)
	var skipped map[string]bool
	switch {
	case w.status == http.StatusNotModified:
		skipped = notOf304
	case w.bodiless || w.chunked:
		skipped = noFraming
	}
	w.header.WriteSubset(w.w, skipped)
	if w.chunked {
		w.w.WriteString("Transfer-Encoding: chunked\r\n")
	}
	w.w.WriteString("\r\n")
}

// What is not written of a response without a body, or with one in chunks.
var (
	noFraming = map[string]bool{"Content-Length": true, "Transfer-Encoding": true}
	notOf304  = map[string]bool{"Content-Length": true, "Transfer-Encoding": true, "Content-Type": true}
)

func (w *plainWriter) statusLine(status int) {
	var b [3]byte
	w.w.WriteString("HTTP/1.1 ")
	w.w.Write(strconv.AppendInt(b[:0], int64(status), 10))
	w.w.WriteByte(' ')
	if text := http.StatusText(status); text != "" {
		w.w.WriteString(text)
	} else {
		w.w.WriteString("status code ")
		w.w.Write(strconv.AppendInt(b[:0], int64(status), 10))
	}
	w.w.WriteString("\r\n")
}

// frame finds out how the response's end will be told (RFC 9112, section 6), and whether
// the connection's comes after it.
func (w *plainWriter) frame() {
	h, status := w.header, w.status
	w.bodiless = status == http.StatusNoContent || status == http.StatusNotModified
	if vs := h["Content-Length"]; len(vs) > 0 {
		n, err := strconv.ParseInt(vs[0], 10, 64)
		if err != nil || n < 0 {
			delete(h, "Content-Length")
		} else {
			w.length = n
		}
	}
	w.chunked = w.length < 0 && !w.bodiless && !w.head
	for _, v := range h["Trailer"] {
		for k := range strings.SplitSeq(v, ",") {
			if k = http.CanonicalHeaderKey(strings.TrimSpace(k)); httpguts.ValidTrailerHeader(k) {
				w.trailers = append(w.trailers, k)
			}
		}
	}
	for _, v := range h["Connection"] {
		w.close = w.close || strings.EqualFold(v, "close")
	}
	if w.close {
		h["Connection"] = closeField
	}
	if _, ok := h["Date"]; !ok {
		h["Date"] = []string{time.Now().UTC().Format(http.TimeFormat)}
	}
}

// Values of fields, which nobody changes.
var (
	closeField = []string{"close"}
	noContent  = []string{"0"}
)

func (w *plainWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	switch {
	case w.bodiless:
		return 0, http.ErrBodyNotAllowed
	case w.err != nil:
		return 0, w.err
	case w.length >= 0 && w.written+int64(len(b)) > w.length:
		return 0, http.ErrContentLength
	}
	w.written += int64(len(b))
	if w.head || len(b) == 0 {
		return len(b), nil
	}
	w.begin()
	if w.chunked {
		var size [16]byte
		w.w.Write(strconv.AppendUint(size[:0], uint64(len(b)), 16))
		w.w.WriteString("\r\n")
	}
	n, err := w.w.Write(b)
	if w.chunked {
		_, err = w.w.WriteString("\r\n")
	}
	w.note(err)
	return n, w.err
}

// note keeps the first error.
func (w *plainWriter) note(err error) {
	if w.err == nil {
		w.err = err
	}
}

// Flush sends what is buffered.
func (w *plainWriter) Flush() {
	w.begin()
	w.note(w.w.Flush())
}

var errShortBody = errors.New("the body is shorter than announced")

// end ends the response, and reports whether another request may follow.
func (w *plainWriter) end() (again bool) {
	if !w.begun && w.chunked && len(w.header["Trailer"]) == 0 {
		w.chunked, w.length = false, 0
		w.header["Content-Length"] = noContent
	}
	w.begin()
	if w.length >= 0 && w.written < w.length && !w.bodiless && !w.head {
		w.note(errShortBody)
	}
	if w.chunked {
		w.w.WriteString("0\r\n")
		w.trailer()
		w.w.WriteString("\r\n")
	}
	w.ended = w.w.Flush() == nil && w.err == nil
	return w.ended && !w.close
}

// trailer writes what was announced, and what the prefix says is one.
func (w *plainWriter) trailer() {
	t := make(http.Header)
	for k, vs := range w.header {
		if name, ok := strings.CutPrefix(k, http.TrailerPrefix); ok {
			t[http.CanonicalHeaderKey(name)] = vs
		}
	}
	for _, k := range w.trailers {
		t[k] = append(t[k], w.header[k]...)
	}
	t.Write(w.w)
}
