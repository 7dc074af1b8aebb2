package proxy

import (
	"bytes"
	"errors"
	"io"
	"math"
	"sync/atomic"
)

const (
	// maxTrailers bounds the trailer section of a request in bytes, its empty line
	// included. net/http's reader has no room for more.
	maxTrailers = 4 << 10

	maxChunkDigits = 16  // of a chunk's size: 64 bits
	maxChunkExt    = 256 // bytes of a chunk's extensions
)

var (
	errHeadCut    = badHead("the connection ends within a head")
	errChunkSize  = badHead("chunk size")
	errChunkExt   = badHead("chunk extension")
	errChunkEnd   = badHead("no CRLF after a chunk")
	errTrailers   = badHead("trailer section exceeds the limit")
	errTrailer    = badHead("field that cannot be a trailer")
	errUnasked    = errors.New("malformed response: bytes that no request asked for")
	errLongAnswer = errors.New("malformed response: the head exceeds the limit")
)

// A framing follows the messages of one direction of an HTTP/1 connection: where
// each one ends, and that there is one way only to see it (RFC 9112, sections 6
// and 7). The zero value, with a limit, is for requests.
type framing struct {
	limit int // of a head, in bytes

	response bool          // the messages are responses
	asked    atomic.Uint32 // for responses: the request that the next one answers; set by others

	state  frameState
	digits uint8     // of a chunk's size, seen so far
	ext    uint16    // bytes of its extensions, seen so far
	left   uint64    // bytes of a body or chunk that are to come
	lines  headLines // of a head or trailer section that is not complete
}

// The requests that a response may answer.
const (
	nothing  uint32 = iota // a response would be one that nobody asked for
	askedFor               // any method but HEAD
	askedHEAD
)

type frameState uint8

const (
	atHead frameState = iota
	inBody
	inChunkSize
	inChunkExt
	atChunkLF // of the line with the size
	inChunk
	afterChunk   // CR
	afterChunkCR // LF
	inTrailers
	untilEnd // of the connection: not HTTP, or a response without a length
)

// scan looks at b, which follows on what was passed on before. The first n bytes
// are in order and may be passed on. The others are to be presented again: they
// are the beginning of a head or of trailers, which is looked at when it is
// complete, or belong to the next message. With an error the message cannot be
// passed on from n; that is all of it, if it begins in b.
func (f *framing) scan(b []byte) (n int, err error) {
	whole := f.state == atHead
	for n < len(b) {
		m, done, err := f.step(b[n:])
		if err != nil {
			if whole {
				n = 0
			}
			if f.response && isHeadError(err) {
				err = badResponse(err.Error())
			}
			return n, err
		}
		n += m
		if done && f.response && n < len(b) && f.asked.Load() == nothing {
			return n, errUnasked
		}
		if done || m == 0 {
			break
		}
	}
	return n, nil
}

// step looks at the next part of a message in b, which is not empty. Without an
// error and bytes, more are needed.
func (f *framing) step(b []byte) (n int, done bool, err error) {
	switch f.state {
	case atHead:
		return f.head(b)
	case inBody:
		n = f.take(b)
		return n, f.end(f.left == 0), nil
	case inChunk:
		if n = f.take(b); f.left == 0 {
			f.state = afterChunk
		}
		return n, false, nil
	case afterChunk:
		return f.expect(b[0], '\r', afterChunkCR, errChunkEnd)
	case afterChunkCR:
		return f.expect(b[0], '\n', inChunkSize, errChunkEnd)
	case inChunkSize:
		return 1, false, f.chunkSize(b[0])
	case inChunkExt:
		return 1, false, f.chunkExt(b[0])
	case atChunkLF:
		next := inChunk
		if f.left == 0 {
			next = inTrailers
		}
		f.digits, f.ext = 0, 0
		return f.expect(b[0], '\n', next, errChunkSize)
	case inTrailers:
		return f.trailers(b)
	default: // untilEnd
		return len(b), false, nil
	}
}

// end ends the message if it is over.
func (f *framing) end(over bool) bool {
	if over {
		f.state = atHead
	}
	return over
}

// take counts what b has of a body or chunk.
func (f *framing) take(b []byte) int {
	n := min(uint64(len(b)), f.left)
	f.left -= n
	return int(n)
}

func (f *framing) expect(c, want byte, next frameState, otherwise error) (int, bool, error) {
	if c != want {
		return 0, false, otherwise
	}
	f.state = next
	return 1, false, nil
}

// chunkSize takes a byte of chunk-size, or what ends it. Spaces, which RFC 9112
// lets nobody send, are refused in requests.
func (f *framing) chunkSize(c byte) error {
	switch {
	case c >= '0' && c <= '9':
		c -= '0'
	case c|0x20 >= 'a' && c|0x20 <= 'f':
		c = c | 0x20 - 'a' + 10
	case f.digits == 0:
		return errChunkSize
	case c == ';', c == ' ' && f.response: // origins exist that pad
		f.state = inChunkExt
		return nil
	case c == '\r':
		f.state = atChunkLF
		return nil
	default:
		return errChunkSize
	}
	if f.digits++; f.digits > maxChunkDigits {
		return errChunkSize
	}
	f.left = f.left<<4 | uint64(c)
	return nil
}

func (f *framing) chunkExt(c byte) error {
	switch f.ext++; {
	case c == '\r':
		f.state = atChunkLF
	case f.ext > maxChunkExt, c < ' ' && c != '\t', c == 0x7f:
		return errChunkExt
	}
	return nil
}

// head judges a head once it is complete.
func (f *framing) head(b []byte) (n int, done bool, err error) {
	if f.response {
		return f.responseHead(b)
	}
	if err := checkStart(b); err != nil {
		return 0, false, err
	}
	if n, err = f.lines.end(b, false); err != nil {
		return 0, false, err
	}
	if n > f.limit || n == 0 && len(b) >= f.limit {
		return 0, false, errHeadTooBig
	}
	if n == 0 {
		return 0, false, nil
	}
	h, err := parseHead(b[:n])
	if err != nil {
		return 0, false, err
	}
	switch {
	case h.isConnect(): // what follows belongs to the tunnel, and is looked at there
		f.state = untilEnd
		return n, true, nil
	case h.chunked:
		f.state, f.left = inChunkSize, 0
		return n, false, nil
	}
	f.left, err = parseLength(h.contentLength)
	if f.left > 0 {
		f.state = inBody
	}
	return n, f.left == 0, err
}

// parseLength returns the value of a Content-Length, which has digits alone.
func parseLength(b []byte) (n uint64, err error) {
	for _, c := range b {
		if n > (math.MaxInt64-9)/10 {
			return 0, badHead("Content-Length")
		}
		n = n*10 + uint64(c-'0')
	}
	return n, nil
}

// trailers judges a trailer section once it is complete.
func (f *framing) trailers(b []byte) (n int, done bool, err error) {
	limit := maxTrailers
	if f.response {
		limit = f.limit
	}
	if n, err = f.lines.end(b, f.response); err != nil {
		return 0, false, err
	}
	if n > limit || n == 0 && len(b) >= limit {
		return 0, false, errTrailers
	}
	if n == 0 {
		return 0, false, nil
	}
	if !f.response {
		err = checkTrailers(b[:n])
	}
	return n, f.end(true), err
}

// checkTrailers refuses what is no field, and fields that say how a message is
// framed, routed or authenticated, which no trailer may (RFC 9110, section 6.5.1).
func checkTrailers(b []byte) error {
	for len(b) > len(crlf) {
		var line []byte
		line, b, _ = bytes.Cut(b, crlf)
		name, _, err := splitField(line)
		if err != nil {
			return err
		}
		for _, k := range notTrailers {
			if equalFold(name, k) {
				return errTrailer
			}
		}
	}
	return nil
}

var notTrailers = []string{
	"authorization", "connection", "content-length", "expect", "host", "keep-alive", "max-forwards", "proxy-authorization",
	"proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "via",
}

// A headLines finds the empty line at the end of a head or trailer section in a
// buffer that grows from call to call.
type headLines struct{ line, pos int } // start of the current line; what was searched

// end returns the length of the section at the start of b, the empty line
// included; 0 if it is not complete. Lines end in CRLF, with lax set also in LF.
func (l *headLines) end(b []byte, lax bool) (n int, err error) {
	for l.pos < len(b) {
		i := bytes.IndexByte(b[l.pos:], '\n')
		if i < 0 {
			l.pos = len(b)
			return 0, nil
		}
		end := l.pos + i // of the line
		l.pos = end + 1
		if end > l.line && b[end-1] == '\r' {
			end--
		} else if !lax {
			return 0, errBareLF
		}
		if end == l.line {
			n = l.pos
			*l = headLines{}
			return n, nil
		}
		l.line = l.pos
	}
	return 0, nil
}

// A framed is the reading side of a connection whose messages a framing follows.
// Of what it reads it passes on what is in order: a head as a whole, and one
// message after another. In the usual case, a head or a part of a body in one
// piece, it has no buffer and copies nothing.
type framed struct {
	framing
	held  []byte // read, and not passed on yet
	ready int    // bytes of held that are in order
	short bool   // what else is held is not complete
	bad   error  // what ends the messages
}

// read fills p, which has room for more than one byte, from r. Once a message is
// not in order the error says why, each time.
func (f *framed) read(r io.Reader, p []byte) (int, error) {
	for f.ready == 0 && f.bad == nil {
		if len(f.held) > 0 && !f.short {
			f.ready, f.bad = f.scan(f.held)
			f.short = f.ready == 0
			continue
		}
		if len(f.held) >= len(p) {
			if err := f.grow(r); err != nil {
				return 0, err
			}
			continue
		}
		n := copy(p, f.held)
		m, err := r.Read(p[n:])
		if m == 0 && err != nil {
			return 0, err
		}
		b := p[:n+m]
		n, f.bad = f.scan(b)
		f.short = n == 0
		f.held = append(f.held[:0], b[n:]...)
		if n > 0 {
			f.release()
			return n, nil
		}
	}
	if f.ready == 0 {
		return 0, f.bad
	}
	n := copy(p, f.held[:f.ready])
	f.held, f.ready = f.held[n:], f.ready-n
	f.release()
	return n, nil
}

// grow reads more of a head than the reader has room for.
func (f *framed) grow(r io.Reader) error {
	if len(f.held) == cap(f.held) {
		f.held = append(make([]byte, 0, min(2*cap(f.held)+minBuffer, f.limit+minBuffer)), f.held...)
	}
	n, err := r.Read(f.held[len(f.held):cap(f.held)])
	if f.held = f.held[:len(f.held)+n]; n == 0 && err != nil {
		return err
	}
	f.short = false
	return nil
}

func (f *framed) release() {
	if len(f.held) == 0 {
		f.held = nil
	}
}

// between reports whether every message so far was passed on to its end.
func (f *framed) between() bool { return f.state == atHead && f.ready == 0 }

// begun reports whether a head has begun to arrive.
func (f *framed) begun() bool { return f.between() && len(f.held) > 0 }
