package proxy

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// http2Preface is what a client of HTTP/2 says first (RFC 9113, section 3.4).
const http2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

var errNoPreface = errors.New("the client agreed on HTTP/2 and speaks something else")

// An http2Conn is a client's connection with HTTP/2 below net/http, which bounds the
// size of a request head but not the time that it takes. Neither the preface nor a
// header block, which may come in any number of CONTINUATION frames, gets more than
// timeouts.request_header; both are read before anything else of the connection can
// be, so that is the end of the connection.
type http2Conn struct {
	*tls.Conn
	s      *Server
	peer   *peer
	greets bool // the preface was read
	blocks blocks
	since  time.Time // when the header block that is under way began
}

// Read is for one goroutine, net/http's that reads frames.
func (c *http2Conn) Read(b []byte) (int, error) {
	if !c.greets {
		if err := c.readPreface(); err != nil {
			return 0, err
		}
	}
	n, err := c.Conn.Read(b)
	open, begun := c.blocks.open, c.blocks.begun
	c.blocks.saw(b[:n])
	switch {
	case c.blocks.open && c.blocks.begun != begun: // perhaps after the end of another one
		c.since = time.Now()
		c.SetReadDeadline(c.since.Add(c.s.cfg.Timeouts.RequestHeader))
	case !c.blocks.open && open:
		c.SetReadDeadline(time.Time{})
	case open && n == 0 && isTimeout(err):
		err = errHeadSlow
		ev := c.s.newEvent(event.HTTP, c.peer.source, c.since)
		ev.Listener = listenerTLS
		ev.Decision = ev.Decision.Refuse(policy.ReasonBadRequest)
		note(&ev, err)
		c.s.observe(&ev)
	}
	return n, err
}

// readPreface reads the preface, which net/http is told of.
func (c *http2Conn) readPreface() error {
	c.SetReadDeadline(time.Now().Add(c.s.cfg.Timeouts.RequestHeader))
	var b [len(http2Preface)]byte
	if _, err := io.ReadFull(c.Conn, b[:]); err != nil {
		return err
	}
	if string(b[:]) != http2Preface {
		return errNoPreface
	}
	c.greets = true
	return c.SetReadDeadline(time.Time{})
}

// handed is c in the clothes in which net/http takes over a connection of any kind:
// it looks for the method below tls.Conn.
func (c *http2Conn) handed() *tls.Conn { return tls.Client(anyConn{c}, nil) }

type anyConn struct{ net.Conn }

// UnencryptedNetConn returns the connection that is meant.
func (c anyConn) UnencryptedNetConn() net.Conn { return c.Conn }

// blocks follows the frames of a client (RFC 9113, section 4.1), in any pieces, as far
// as is needed to know whether a header block is under way (section 4.3). What breaks
// the rules ends the connection anyway.
type blocks struct {
	open   bool   // from the first frame's head to the last byte of the one with END_HEADERS
	last   bool   // the frame that is under way is that one
	begun  uint64 // header blocks
	head   [9]byte
	have   int    // bytes of head
	unread uint32 // bytes of the frame's payload still to come
}

const (
	frameHeaders      = 0x1
	frameContinuation = 0x9
	flagEndHeaders    = 0x4
)

func (f *blocks) saw(b []byte) {
	for len(b) > 0 {
		if f.unread > 0 {
			n := min(f.unread, uint32(len(b)))
			f.unread -= n
			b = b[n:]
		} else {
			n := copy(f.head[f.have:], b)
			f.have += n
			b = b[n:]
			if f.have < len(f.head) {
				return
			}
			f.have = 0
			f.unread = binary.BigEndian.Uint32(f.head[:]) >> 8
			f.last = false
			if kind := f.head[3]; kind == frameHeaders || kind == frameContinuation {
				if !f.open {
					f.begun++
				}
				f.open, f.last = true, f.head[4]&flagEndHeaders != 0
			}
		}
		if f.unread == 0 && f.last {
			f.open, f.last = false, false
		}
	}
}
