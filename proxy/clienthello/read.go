package clienthello

import (
	"errors"
	"fmt"
	"io"
)

// DefaultLimit is the limit in bytes that stands in for one below 1. Browsers
// send 500 to 2000 bytes; session tickets and padding can add a few thousand.
const DefaultLimit = 16 << 10

var (
	// ErrNotTLS means that the stream does not start with a TLS handshake
	// record: the bytes belong to some other protocol.
	ErrNotTLS = errors.New("not TLS")

	// ErrTooLarge means that the ClientHello, with the headers of its records,
	// is longer than the limit.
	ErrTooLarge = errors.New("ClientHello too large")

	// ErrMalformed means that the stream is TLS, but does not start with a
	// ClientHello that this package accepts; see the package documentation.
	ErrMalformed = errors.New("malformed ClientHello")

	// ErrIncomplete means that Parse was given a good beginning, and needs more
	// bytes to tell. Read does not return it.
	ErrIncomplete = errors.New("incomplete ClientHello")
)

// malformed returns an ErrMalformed that says what is wrong. It never quotes
// the client, whose bytes would end up in logs.
func malformed(what string) error {
	return fmt.Errorf("%w: %s", ErrMalformed, what)
}

const (
	recordHeaderLen  = 5       // ContentType, ProtocolVersion, uint16 length
	messageHeaderLen = 4       // HandshakeType, uint24 length
	maxPlaintext     = 1 << 14 // RFC 8446, section 5.1

	contentTypeHandshake = 22
	recordMajorVersion   = 3
	typeClientHello      = 1

	firstReadSize = 4096 // buffer to start with; holds a post-quantum hello
	minReadSize   = 512  // free space below which the buffer grows
	maxEmptyReads = 100  // reads without a byte or an error, as in bufio
)

// Read reads from r until it has a whole ClientHello, or knows that there will
// be none. buf holds what was already received from the peer and may be empty;
// its spare capacity is read into. limit bounds the ClientHello in bytes,
// headers of its records included; below 1 it is DefaultLimit.
//
// raw is everything received so far, buf first, on error too. It may hold bytes
// after the ClientHello, but never outgrows the greater of limit and cap(buf).
// Read owns buf until it returns; from then on the caller owns raw, which may
// share memory with buf and with hello (see Hello).
//
// The error wraps ErrNotTLS, ErrTooLarge or ErrMalformed, or is r's own, with
// io.ErrUnexpectedEOF for an EOF after the first byte. A ClientHello without
// server_name is no error. The caller sets the read deadline and keeps r.
func Read(r io.Reader, buf []byte, limit int) (hello Hello, raw []byte, err error) {
	s := newScanner(limit)
	for raw = buf; ; {
		body, err := s.scan(raw)
		if err == nil {
			hello, err = parseBody(body)
			return hello, raw, err
		}
		if !errors.Is(err, ErrIncomplete) {
			return Hello{}, raw, err
		}
		if raw, err = readMore(r, s.makeRoom(raw)); err != nil {
			return Hello{}, raw, err
		}
	}
}

// Parse reads the ClientHello at the start of raw, as Read does, and returns
// its length in raw, headers of its records included. The error wraps
// ErrIncomplete if raw ends too early, else ErrNotTLS, ErrTooLarge or
// ErrMalformed. hello shares memory with raw (see Hello).
func Parse(raw []byte, limit int) (hello Hello, n int, err error) {
	s := newScanner(limit)
	body, err := s.scan(raw)
	if err != nil {
		return Hello{}, 0, err
	}
	if hello, err = parseBody(body); err != nil {
		return Hello{}, 0, err
	}
	return hello, s.pos, nil
}

// readMore appends to raw what one read from r yields, at least a byte. An error
// that comes with bytes is left for the next read to repeat.
func readMore(r io.Reader, raw []byte) ([]byte, error) {
	for range maxEmptyReads {
		n, err := r.Read(raw[len(raw):cap(raw)])
		raw = raw[:len(raw)+n]
		switch {
		case n > 0:
			return raw, nil
		case err == io.EOF && len(raw) > 0:
			return raw, io.ErrUnexpectedEOF
		case err != nil:
			return raw, err
		}
	}
	return raw, io.ErrNoProgress
}

// A scanner takes the first handshake message out of its records. It sees the
// stream from its start each time, longer than before, and goes on where it
// stopped. Its verdict depends on the bytes alone, not on how they were cut.
type scanner struct {
	limit   int
	pos     int    // bytes of the stream that were scanned
	record  int    // payload bytes left in the current record
	missing int    // bytes left of the message, or of its header until sized
	sized   bool   // the header of the message was read
	msg     []byte // the message so far, once it spans records
}

func newScanner(limit int) scanner {
	if limit < 1 {
		limit = DefaultLimit
	}
	// Without room for both headers there would be no length to judge.
	return scanner{limit: max(limit, recordHeaderLen+messageHeaderLen), missing: messageHeaderLen}
}

// scan returns the body of the ClientHello message at the start of raw. The
// body is part of raw if it came in one record, as it nearly always does.
func (s *scanner) scan(raw []byte) ([]byte, error) {
	for s.missing > 0 {
		if s.record == 0 {
			if err := s.nextRecord(raw); err != nil {
				return nil, err
			}
		}
		n := min(len(raw)-s.pos, s.record, s.missing)
		if n == 0 {
			return nil, ErrIncomplete
		}
		if s.msg != nil {
			s.msg = append(s.msg, raw[s.pos:s.pos+n]...)
		}
		s.pos += n
		s.record -= n
		s.missing -= n
		if s.missing == 0 && !s.sized {
			if err := s.readSize(s.message(raw)); err != nil {
				return nil, err
			}
		}
	}
	return s.message(raw)[messageHeaderLen:], nil
}

// message returns what was scanned of the handshake message.
func (s *scanner) message(raw []byte) []byte {
	if s.msg != nil {
		return s.msg
	}
	return raw[recordHeaderLen:s.pos]
}

// nextRecord reads a record header, judging each byte as soon as it is there.
func (s *scanner) nextRecord(raw []byte) error {
	header := raw[s.pos:]
	if len(header) > 0 && header[0] != contentTypeHandshake {
		if s.pos == 0 {
			return ErrNotTLS
		}
		return malformed("record of another content type in between")
	}
	if len(header) > 1 && header[1] != recordMajorVersion {
		if s.pos == 0 {
			return ErrNotTLS
		}
		return malformed("record version")
	}
	if len(header) < recordHeaderLen {
		return ErrIncomplete
	}
	n := int(header[3])<<8 | int(header[4])
	if n == 0 || n > maxPlaintext {
		return malformed("record length")
	}
	if s.pos > 0 && s.msg == nil {
		s.msg = append(s.msg, s.message(raw)...)
	}
	s.pos += recordHeaderLen
	s.record = n
	return s.checkSize()
}

// readSize reads the header of the handshake message.
func (s *scanner) readSize(header []byte) error {
	if header[0] != typeClientHello {
		return malformed("first handshake message is another one")
	}
	s.missing = int(header[1])<<16 | int(header[2])<<8 | int(header[3])
	s.sized = true
	return s.checkSize()
}

// checkSize judges the lengths announced so far.
func (s *scanner) checkSize() error {
	if s.sized && s.record > s.missing {
		return malformed("record goes on after the message")
	}
	end := s.pos + s.missing
	if s.record < s.missing {
		end += recordHeaderLen // at least one more record
	}
	if end > s.limit {
		return ErrTooLarge
	}
	return nil
}

// makeRoom returns raw with room to read into. Since checkSize lets nothing pass
// that would end beyond limit, an incomplete raw is shorter than limit.
func (s *scanner) makeRoom(raw []byte) []byte {
	size := min(max(2*cap(raw), firstReadSize), s.limit)
	if cap(raw)-len(raw) >= minReadSize || size <= cap(raw) {
		return raw
	}
	grown := make([]byte, len(raw), size)
	copy(grown, raw)
	return grown
}
