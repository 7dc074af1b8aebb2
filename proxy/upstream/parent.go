package upstream

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"
)

const (
	// maxAnswer bounds what is read of a parent's answer to a CONNECT, in bytes,
	// interim responses included.
	maxAnswer = 16 << 10

	maxInterim = 5  // interim (1xx) responses before the final one
	maxPhrase  = 80 // bytes of a reason phrase that an error repeats
)

var (
	// ErrParentAnswer means that what a parent answered is not HTTP, or too much of it.
	ErrParentAnswer = errors.New("malformed answer")

	longAgo = time.Unix(1, 0) // a deadline that has passed
)

// A Parent is a proxy that connections go through. It never changes.
type Parent struct {
	Host        string      // a name or an address
	Port        uint16      // never 0
	TLS         *tls.Config // speaks TLS to the parent; nil: does not
	Credentials string      // user:password for Basic (RFC 7617); "": none
}

// String returns host and port, as logs show a parent. It never has credentials.
func (p *Parent) String() string { return net.JoinHostPort(p.Host, strconv.Itoa(int(p.Port))) }

// A ParentError is a parent's refusal to open a tunnel.
type ParentError struct {
	Parent string // host:port
	Status int    // of its answer, never 2xx
	Phrase string // its reason phrase, as it came, cut to 80 bytes
}

// Error says what the parent answered, and for whom that is to solve.
func (e *ParentError) Error() string {
	text := fmt.Sprintf("parent %s answers %d %q", e.Parent, e.Status, e.Phrase)
	switch e.Status {
	case 403:
		text += ": its own policy refuses this"
	case 407:
		text += ": it wants credentials, or others than proxy.parent has"
	}
	return text
}

// Timeout reports whether the parent gave up waiting for the far side.
func (e *ParentError) Timeout() bool { return e.Status == 504 }

// FarSide reports whether the parent says that the far side failed, so that
// another address may do better.
func (e *ParentError) FarSide() bool { return e.Status >= 502 && e.Status <= 504 }

// Tunnel asks the parent at the other end of conn for a tunnel to target,
// host:port, saying via in the field Via, so that loops are noticed, and returns the connection to use from then on; nothing that the far
// side said together with the parent's answer is lost. Deadline or end of ctx
// bound it, and 16 KiB of an answer. It takes over conn: on an error conn is
// closed. The error is a ParentError, wraps ErrParentAnswer, or is the
// connection's or ctx's own.
func (p *Parent) Tunnel(ctx context.Context, conn net.Conn, target, via string) (net.Conn, error) {
	raw := conn
	deadline, _ := ctx.Deadline() // zero without one
	raw.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(longAgo) })
	if p.TLS != nil {
		conn = tls.Client(raw, p.TLS) // its handshake is part of the first write
	}
	early, err := p.connect(conn, target, via)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		raw.Close()
		var refused *ParentError
		if errors.As(err, &refused) {
			return nil, err
		}
		return nil, fmt.Errorf("parent %s: %w", p, err)
	}
	raw.SetDeadline(time.Time{})
	if len(early) > 0 {
		return &earlyConn{Conn: conn, early: early}, nil
	}
	return conn, nil
}

// connect sends the CONNECT and reads the answer (RFC 9110, section 9.3.6). It
// returns what followed that.
func (p *Parent) connect(conn net.Conn, target, via string) (early []byte, err error) {
	b := make([]byte, 0, 1024)
	b = append(append(b, "CONNECT "...), target...)
	b = append(append(b, " HTTP/1.1\r\nHost: "...), target...)
	b = append(append(b, "\r\nVia: "...), via...)
	b = append(b, "\r\n"...)
	if p.Credentials != "" {
		b = append(b, "Proxy-Authorization: Basic "...)
		b = append(base64.StdEncoding.AppendEncode(b, []byte(p.Credentials)), "\r\n"...)
	}
	if _, err := conn.Write(append(b, "\r\n"...)); err != nil {
		return nil, err
	}
	b = b[:0]
	budget := maxAnswer
	for range maxInterim + 1 {
		all, n, err := readAnswer(conn, b, budget)
		if err != nil {
			return nil, err
		}
		status, phrase, err := parseStatus(all[:n])
		switch {
		case err != nil:
			return nil, err
		case status/100 == 2: // whatever length it announces, the tunnel begins here
			return bytes.Clone(all[n:]), nil
		case status/100 != 1:
			return nil, &ParentError{Parent: p.String(), Status: status, Phrase: phrase}
		}
		b, budget = all[n:], budget-n
	}
	return nil, fmt.Errorf("%w: too many interim responses", ErrParentAnswer)
}

var startOfAnswer = []byte("HTTP/1.")

// readAnswer reads from r until b holds a whole response head of at most limit
// bytes, and returns b with the head's length. b may hold bytes of it already.
func readAnswer(r io.Reader, b []byte, limit int) (all []byte, n int, err error) {
	for {
		// What cannot become an answer is refused at once: the rest might never come.
		if start := min(len(b), len(startOfAnswer)); !bytes.Equal(b[:start], startOfAnswer[:start]) {
			return nil, 0, fmt.Errorf("%w: not HTTP/1", ErrParentAnswer)
		}
		if i := bytes.Index(b, []byte("\r\n\r\n")); i >= 0 {
			return b, i + 4, nil
		}
		if len(b) >= limit {
			return nil, 0, fmt.Errorf("%w: head of more than %d bytes", ErrParentAnswer, maxAnswer)
		}
		if len(b) == cap(b) {
			b = append(make([]byte, 0, min(2*cap(b)+512, limit)), b...)
		}
		m, err := r.Read(b[len(b):min(cap(b), limit)])
		b = b[:len(b)+m]
		if err != nil && m == 0 {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, 0, err
		}
	}
}

// parseStatus reads the status line of head (RFC 9112, section 4).
func parseStatus(head []byte) (status int, phrase string, err error) {
	line, _, _ := bytes.Cut(head, []byte("\r\n"))
	const prefix, digits = len("HTTP/1.x "), 3
	bad := fmt.Errorf("%w: status line %q", ErrParentAnswer, line[:min(len(line), maxPhrase)])
	if len(line) < prefix+digits || line[prefix-1] != ' ' || len(line) > prefix+digits && line[prefix+digits] != ' ' {
		return 0, "", bad
	}
	for _, c := range line[prefix : prefix+digits] {
		if c < '0' || c > '9' {
			return 0, "", bad
		}
		status = 10*status + int(c-'0')
	}
	if status < 100 || line[prefix-2] < '0' || line[prefix-2] > '9' {
		return 0, "", bad
	}
	rest := bytes.TrimSpace(line[prefix+digits:])
	return status, string(rest[:min(len(rest), maxPhrase)]), nil
}

// An earlyConn is a connection of which something was read already.
type earlyConn struct {
	net.Conn
	early []byte
}

func (c *earlyConn) Read(p []byte) (int, error) {
	if len(c.early) == 0 {
		return c.Conn.Read(p)
	}
	n := copy(p, c.early)
	if c.early = c.early[n:]; len(c.early) == 0 {
		c.early = nil
	}
	return n, nil
}

// CloseWrite ends the stream towards the far side, and keeps the other one.
func (c *earlyConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}
