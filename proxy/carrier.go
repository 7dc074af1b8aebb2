package proxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"net/textproto"
	"sync"
	"time"
)

const (
	// Upstream connections kept for another request.
	idlePerHost = 16
	idlePerPool = 256
	idleTime    = 90 * time.Second

	// sweepEvery is how often idle connections are looked at: those that the far side
	// has closed go.
	sweepEvery = 10 * time.Second
)

// Buffers for requests to far sides and responses from them. An idle connection has
// none.
var (
	responseReaders = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, minBuffer) }}
	requestWriters  = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, minBuffer) }}
)

// A carrier takes the exchanges of those who may share connections to the far side.
// Requests that have no body and may be sent twice, which nearly all are, it carries
// in the goroutine of the caller: nobody reads from a connection that is idle, and what
// has come from it is found out before it is used again. It is the http.RoundTripper
// for exchanges alone.
type carrier struct {
	dial dialContext
	rest *http.Transport // carries the others, on connections of its own

	mu      sync.Mutex                 // guards what follows
	idle    map[string][]*upstreamConn // by authority; the newest last
	n       int                        // connections in idle
	retired bool                       // no connection becomes idle any more
	sweeper *time.Timer                // nil: no connection was idle yet
	awaited bool                       // sweeper runs
}

func (s *Server) newCarrier(dial dialContext) *carrier {
	return &carrier{
		dial: dial,
		rest: &http.Transport{
			DialContext:            dial,
			DisableCompression:     true,
			MaxIdleConns:           idlePerPool,
			MaxIdleConnsPerHost:    idlePerHost,
			IdleConnTimeout:        idleTime,
			ExpectContinueTimeout:  expectPatience,
			MaxResponseHeaderBytes: int64(s.cfg.Limits.HeaderBytes),
		},
		idle: make(map[string][]*upstreamConn),
	}
}

// carries reports whether ex's request, which is r, is one that a carrier carries
// itself. Connections through a parent may hold more than their socket shows.
func (ex *exchange) carries(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
	default:
		return false
	}
	return canProbe && ex.body == nil && r.Header["Expect"] == nil && ex.s.wayOf(ex.admitted.Group).Parent == nil
}

// RoundTrip sends r, which belongs to an exchange, and returns the response as
// http.Transport does.
func (c *carrier) RoundTrip(r *http.Request) (*http.Response, error) {
	ex := exchangeOf(r)
	if !ex.carried {
		return c.rest.RoundTrip(r)
	}
	if conn := c.take(r.URL.Host); conn != nil {
		resp, err := c.carry(ex, r, conn, true)
		if err == nil || conn.heard || !isStale(err) || ex.revoked.Load() != nil || ex.abandoned(r) {
			return resp, err
		}
		// The far side closed the connection as we were about to use it, or the rule for
		// it has expired.
	}
	conn, err := c.dial(context.WithValue(r.Context(), exchangeKey{}, ex), "tcp", r.URL.Host)
	if err != nil {
		return nil, err
	}
	return c.carry(ex, r, conn.(*upstreamConn), false)
}

// isStale reports whether err may come from a connection that was of no use any more.
func isStale(err error) bool { return !isTimeout(err) && !isMalformed(err) }

// carry sends r on conn, which it takes over, and reads the head of the response.
func (c *carrier) carry(ex *exchange, r *http.Request, conn *upstreamConn, used bool) (*http.Response, error) {
	conn.heard = false
	if d := ex.reached(conn, used); !d.Passes() { // the rule that opened it has expired since
		conn.Close()
		if used {
			return nil, errExpired
		}
		return nil, denied(d)
	}
	b := &carried{carrier: c, conn: conn, ex: ex, r: r}
	if ex.http2 { // on HTTP/1 watch sees to it
		b.stop = context.AfterFunc(r.Context(), ex.client.live.leave)
	}
	resp, err := conn.exchange(ex, r)
	if err != nil {
		return nil, b.end(err)
	}
	b.ReadCloser, b.keep = resp.Body, !resp.Close
	if resp.Body == http.NoBody {
		b.end(io.EOF)
	}
	resp.Body = b
	return resp, nil
}

var errLeftWithin = errors.New("the client closed before the end of the response")

var errExpired = errors.New("the rule for the connection has expired")

// exchange sends r and reads the head of the response, after the 1xx ones.
func (c *upstreamConn) exchange(ex *exchange, r *http.Request) (*http.Response, error) {
	w := requestWriters.Get().(*bufio.Writer)
	w.Reset(&c.idleConn)
	err := writeRequest(w, r)
	w.Reset(nil)
	requestWriters.Put(w)
	if err != nil {
		return nil, err
	}
	c.reader = responseReaders.Get().(*bufio.Reader)
	c.reader.Reset(c)
	for {
		resp, err := http.ReadResponse(c.reader, r)
		switch {
		case err != nil:
			return nil, err
		case resp.StatusCode == http.StatusSwitchingProtocols:
			return nil, errUnaskedUpgrade
		case resp.StatusCode >= 200:
			return resp, nil
		}
		if err := ex.got1xx(resp.StatusCode, textproto.MIMEHeader(resp.Header)); err != nil {
			return nil, err
		}
	}
}

// writeRequest writes r, which has no body, as http.Request.Write does.
func writeRequest(w *bufio.Writer, r *http.Request) error {
	w.WriteString(r.Method)
	w.WriteByte(' ')
	w.WriteString(r.URL.RequestURI())
	w.WriteString(" HTTP/1.1\r\nHost: ")
	w.WriteString(r.Host)
	w.WriteString("\r\n")
	if agent := r.Header["User-Agent"]; len(agent) == 1 && agent[0] == "" {
		delete(r.Header, "User-Agent") // which asks for none
	}
	r.Header.WriteSubset(w, notWritten)
	w.WriteString("\r\n")
	return w.Flush() // which repeats an error of the others
}

// notWritten are the fields that are written otherwise, or not at all for lack of a
// body.
var notWritten = map[string]bool{"Host": true, "Content-Length": true, "Transfer-Encoding": true, "Trailer": true}

// drop closes the connection.
func (c *upstreamConn) drop() {
	c.Close()
	c.forgetReader()
}

func (c *upstreamConn) forgetReader() {
	if c.reader != nil {
		c.reader.Reset(nil)
		responseReaders.Put(c.reader)
		c.reader = nil
	}
}

// clean reports whether nothing has come since the end of the last response.
func (c *upstreamConn) clean() bool {
	return c.reader.Buffered() == 0 && c.in.between() && len(c.in.held) == 0 && c.in.bad == nil
}

// carried is the body of a response. Its end gives the connection back.
type carried struct {
	io.ReadCloser // of net/http; it is not closed, which could only read on
	carrier       *carrier
	conn          *upstreamConn // nil: it was given back, or closed
	ex            *exchange
	r             *http.Request
	stop          func() bool // ends the watch for the client's going; nil: that is not ours
	keep          bool        // both sides would keep the connection
	err           error       // of reads from now on
}

func (b *carried) Read(p []byte) (int, error) {
	if b.conn == nil {
		return 0, b.err
	}
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		err = b.end(err)
	}
	return n, err
}

// Close ends the response. If there is more of it the connection is of no use any more.
func (b *carried) Close() error {
	if b.conn != nil {
		b.end(http.ErrBodyReadAfterClose)
	}
	return nil
}

// end gives the connection back, or closes it unless err is io.EOF. It returns the
// error for the reader.
func (b *carried) end(err error) error {
	conn := b.conn
	b.conn, b.err = nil, err
	whole := errors.Is(err, io.EOF)
	if b.stop != nil {
		b.stop()
	}
	b.ex.client.live.done()
	if whole && b.keep && !b.ex.abandoned(b.r) && conn.clean() {
		conn.forgetReader()
		b.carrier.put(b.r.URL.Host, conn)
		return err
	}
	conn.drop()
	if !whole && b.ex.abandoned(b.r) {
		b.err = errLeftWithin
	}
	return b.err
}

// take returns an idle connection to authority that can be used; nil: there is none.
func (c *carrier) take(authority string) *upstreamConn {
	for {
		conn := c.pop(authority)
		if conn == nil || conn.usable(time.Now()) {
			return conn
		}
		conn.Close()
	}
}

func (c *carrier) pop(authority string) *upstreamConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	conns := c.idle[authority]
	if len(conns) == 0 {
		return nil
	}
	return c.remove(authority, len(conns)-1)
}

// remove takes a connection out of idle. The caller holds mu.
func (c *carrier) remove(authority string, i int) *upstreamConn {
	conns := c.idle[authority]
	conn := conns[i]
	copy(conns[i:], conns[i+1:])
	conns[len(conns)-1] = nil
	if c.idle[authority] = conns[:len(conns)-1]; len(conns) == 1 && len(c.idle) > idlePerPool {
		delete(c.idle, authority) // else the sweeper does, for it may be asked for again at once
	}
	c.n--
	return conn
}

// usable reports whether a request may be sent on an idle connection: it is not
// too old, and the far side has neither closed it nor sent what nobody asked for.
func (c *upstreamConn) usable(now time.Time) bool {
	return now.Sub(c.since) < idleTime && c.silent()
}

// put makes conn an idle connection, or closes it if there are enough.
func (c *carrier) put(authority string, conn *upstreamConn) {
	conn.since = time.Now()
	c.mu.Lock()
	conns := c.idle[authority]
	if c.retired || len(conns) >= idlePerHost {
		c.mu.Unlock()
		conn.Close()
		return
	}
	var old *upstreamConn
	if c.n >= idlePerPool {
		old = c.oldest()
	}
	c.idle[authority] = append(c.idle[authority], conn)
	if c.n++; c.sweeper == nil {
		c.sweeper = time.AfterFunc(sweepEvery, c.sweep)
	} else if !c.awaited {
		c.sweeper.Reset(sweepEvery)
	}
	c.awaited = true
	c.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

// oldest takes the connection out of idle that has been there for the longest time.
// The caller holds mu.
func (c *carrier) oldest() *upstreamConn {
	var of string
	var since time.Time
	for authority, conns := range c.idle {
		if len(conns) > 0 && (since.IsZero() || conns[0].since.Before(since)) {
			of, since = authority, conns[0].since
		}
	}
	return c.remove(of, 0)
}

// sweep closes what is of no use any more.
func (c *carrier) sweep() {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for authority, conns := range c.idle {
		kept := conns[:0]
		for _, conn := range conns {
			if conn.usable(now) {
				kept = append(kept, conn)
			} else {
				conn.Close()
				c.n--
			}
		}
		clear(conns[len(kept):])
		if c.idle[authority] = kept; len(kept) == 0 {
			delete(c.idle, authority)
		}
	}
	if c.awaited = len(c.idle) > 0 && !c.retired; c.awaited {
		c.sweeper.Reset(sweepEvery)
	}
}

// CloseIdleConnections closes them. What is in use is closed when it becomes idle.
func (c *carrier) CloseIdleConnections() {
	c.mu.Lock()
	c.retired = true
	for _, conns := range c.idle {
		for _, conn := range conns {
			conn.Close()
		}
	}
	clear(c.idle)
	c.n = 0
	if c.sweeper != nil {
		c.sweeper.Stop()
	}
	c.mu.Unlock()
	c.rest.CloseIdleConnections()
}
