package dnsfilter

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	maxIdleConns = 8               // kept open to one upstream
	maxIdle      = 5 * time.Second // reused at most this long after their last answer; servers close soon after (RFC 7766, section 6.2.3)
)

// errMalformed is an answer to the question asked whose records cannot be read.
var errMalformed = errors.New("malformed answer")

// An exchanger asks one server one question. The answer matches the query's
// question, and its ID as sent. The context has a deadline.
type exchanger interface {
	exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error)
	close()
}

// A datagram asks over UDP, and over TCP again if the answer was truncated.
type datagram struct {
	addr   string
	stream *stream
}

// exchange uses a socket of its own for each query: the kernel chooses a random
// port, and a connected socket hears only the address asked (RFC 5452, section 9).
func (d *datagram) exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	c, err := new(net.Dialer).DialContext(ctx, "udp", d.addr)
	if err != nil {
		return nil, err
	}
	m, err := d.ask(ctx, c, query)
	c.Close()
	if err == nil && m.Truncated {
		return d.stream.exchange(ctx, query)
	}
	return m, err
}

func (d *datagram) ask(ctx context.Context, c net.Conn, query *dns.Msg) (*dns.Msg, error) {
	defer interrupt(ctx, c)()
	q := withID(query)
	conn := dns.Conn{Conn: c, UDPSize: maxEDNSSize}
	if err := conn.WriteMsg(q); err != nil {
		return nil, err
	}
	for { // what does not match is somebody else's: keep listening until the deadline
		p, err := conn.ReadMsgHeader(nil)
		if errors.Is(err, dns.ErrShortRead) {
			continue
		}
		if err != nil {
			return nil, err
		}
		m := new(dns.Msg)
		malformed := m.Unpack(p)
		if !answers(m, q) {
			continue
		}
		if malformed != nil && !m.Truncated {
			return nil, fmt.Errorf("%w: %w", errMalformed, malformed)
		}
		return m, nil
	}
}

func (d *datagram) close() { d.stream.close() }

// A stream asks over TCP, or TLS if tls is set. It keeps connections for the next query.
type stream struct {
	addr string
	tls  *tls.Config

	mu     sync.Mutex // guards what follows
	idle   []idleConn
	closed bool
}

type idleConn struct {
	net.Conn
	since time.Time
}

func (s *stream) exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	if c := s.take(); c != nil {
		if m, err := s.ask(ctx, c, query); err == nil || errors.Is(err, errMalformed) || ctx.Err() != nil {
			return m, err
		}
		// The server may have closed it while it was idle: that is no failure yet.
	}
	c, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	return s.ask(ctx, c, query)
}

func (s *stream) dial(ctx context.Context) (net.Conn, error) {
	if s.tls == nil {
		return new(net.Dialer).DialContext(ctx, "tcp", s.addr)
	}
	return (&tls.Dialer{Config: s.tls}).DialContext(ctx, "tcp", s.addr)
}

// ask takes ownership of c: it is kept for later or closed.
func (s *stream) ask(ctx context.Context, c net.Conn, query *dns.Msg) (*dns.Msg, error) {
	release := interrupt(ctx, c)
	m, err := roundTrip(&dns.Conn{Conn: c}, withID(query))
	if !release() || err != nil || !s.keep(c) {
		c.Close()
	}
	return m, err
}

func roundTrip(c *dns.Conn, q *dns.Msg) (*dns.Msg, error) {
	if err := c.WriteMsg(q); err != nil {
		return nil, err
	}
	m, err := c.ReadMsg()
	if m == nil {
		return nil, err
	}
	return matching(m, err, q)
}

// matching returns m if it answers q and could be unpacked.
func matching(m *dns.Msg, unpacked error, q *dns.Msg) (*dns.Msg, error) {
	switch {
	case !answers(m, q):
		return nil, errors.Join(errors.New("the answer does not match the question"), unpacked)
	case unpacked != nil:
		return nil, fmt.Errorf("%w: %w", errMalformed, unpacked)
	}
	return m, nil
}

// take returns the connection used last, or nil. Those idle for too long are closed.
func (s *stream) take() net.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.idle)
	if n == 0 {
		return nil
	}
	c := s.idle[n-1]
	s.idle = s.idle[:n-1]
	if time.Since(c.since) < maxIdle {
		return c.Conn
	}
	c.Close()
	s.drop() // the others have been idle for longer
	return nil
}

// keep reports whether it took c for the next query.
func (s *stream) keep(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.idle) == maxIdleConns {
		return false
	}
	s.idle = append(s.idle, idleConn{c, time.Now()})
	return true
}

func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.drop()
}

// drop closes what is idle. The caller holds mu.
func (s *stream) drop() {
	for _, c := range s.idle {
		c.Close()
	}
	s.idle = nil
}

// A doh asks over HTTPS (RFC 8484).
type doh struct {
	url    string
	client *http.Client
}

// newDoH returns a doh for url. If dial is not "", it is dialled instead of the
// URL's host, whose name the certificate must carry all the same.
func newDoH(url, dial string, config *tls.Config) *doh {
	t := &http.Transport{
		TLSClientConfig:     config,
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: maxIdleConns,
		IdleConnTimeout:     30 * time.Second,
	}
	if dial != "" {
		t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, dial)
		}
	}
	noRedirect := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &doh{url, &http.Client{Transport: t, CheckRedirect: noRedirect}}
}

const dnsMessage = "application/dns-message"

func (d *doh) exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	q := *query
	q.Id = 0 // RFC 8484, section 4.1
	body, err := q.Pack()
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", dnsMessage)
	req.Header.Set("Accept", dnsMessage)
	resp, err := d.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != dnsMessage {
		return nil, fmt.Errorf("%s with content type %q", resp.Status, resp.Header.Get("Content-Type"))
	}
	p, err := io.ReadAll(io.LimitReader(resp.Body, dns.MaxMsgSize+1))
	if err != nil {
		return nil, err
	}
	m := new(dns.Msg)
	return matching(m, m.Unpack(p), &q)
}

func (d *doh) close() { d.client.CloseIdleConnections() }

// withID returns a copy of query with a random ID (RFC 5452, section 9.2).
func withID(query *dns.Msg) *dns.Msg {
	q := *query
	q.Id = dns.Id()
	return &q
}

// answers reports whether m is a response to q.
func answers(m, q *dns.Msg) bool {
	if !m.Response || m.Id != q.Id || m.Opcode != q.Opcode || len(m.Question) != 1 {
		return false
	}
	a, b := m.Question[0], q.Question[0]
	return a.Qtype == b.Qtype && a.Qclass == b.Qclass && strings.EqualFold(a.Name, b.Name)
}

// interrupt gives c the deadline of ctx and ends what c waits for when ctx is
// cancelled. The function it returns ends that; it is false if it came too late.
func interrupt(ctx context.Context, c net.Conn) func() bool {
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)                                                  // fails on closed connections only, where the next call says so
	return context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) }) // as above
}
