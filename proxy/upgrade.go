package proxy

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
)

// upgradeOf returns the protocol that a request asks to change to (RFC 9110,
// section 7.8), or "". HTTP/2 and TLS are not passed on: they would hide from us
// what the connection carries.
func upgradeOf(h http.Header) string {
	asks := false
	for _, v := range h["Connection"] {
		for k := range strings.SplitSeq(v, ",") {
			asks = asks || strings.EqualFold(strings.TrimSpace(k), "upgrade")
		}
	}
	protocol := h.Get("Upgrade")
	if !asks || len(h["Upgrade"]) != 1 || !isToken([]byte(strings.Replace(protocol, "/", "", 1))) {
		return ""
	}
	p := strings.ToLower(protocol)
	if p == "h2c" || p == "h2" || strings.HasPrefix(p, "tls") || strings.HasPrefix(p, "http") {
		return ""
	}
	return protocol
}

// upgrade forwards a request for another protocol on a connection of its own. If
// the far side agrees, the connections become a tunnel.
func (ex *exchange) upgrade(r *http.Request, protocol string) {
	if ex.client.session == nil { // otherwise the CONNECT has a place
		var refused *refusal
		if ex.place, refused = ex.s.tunnels.reserve(ex.request.Source, ex.decision); refused != nil {
			ex.refuse(refused)
			return
		}
		defer func() { ex.s.tunnels.release(ex.place) }() // unless a tunnel has it
	}
	conn, refused := ex.dialUpgrade(r.Context())
	if refused == nil {
		defer context.AfterFunc(r.Context(), func() { conn.SetDeadline(longAgo) })()
		refused = ex.negotiate(r, conn, protocol)
	}
	switch {
	case refused == nil:
	case ex.abandoned(r): // nobody reads an answer, and the far side has not failed
		ex.broken = errClientLeft
	default:
		if d := ex.revoked.Load(); d != nil {
			refused = revokedBy(d, refused)
		}
		ex.refuse(refused)
	}
}

// dialUpgrade connects to the far side, in a session with its own connection first.
func (ex *exchange) dialUpgrade(ctx context.Context) (net.Conn, *refusal) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ex.client.live.dialling(cancel)
	if t := ex.client.session; t != nil {
		conn, err := t.dial(ctx, "", "")
		if err != nil {
			return nil, exchangeFailed(ex.decision, err)
		}
		ex.ev.Destination, ex.ev.Parent = t.to, t.tunnel.ev.Parent
		conn = conn.(*upstreamConn).Conn
		ex.client.live.reached(conn, ex.request)
		return conn, nil
	}
	conn, t, refused := ex.s.reach(ctx, ex.request, ex.admitted, ex.via)
	ex.ev.DNSTime, ex.ev.ConnTime, ex.ev.Parent = t.dnsTime, t.connTime, t.parent
	if refused != nil {
		return nil, refused
	}
	ex.request, ex.decision = t.request, t.decision
	ex.ev.Destination = remoteAddr(conn)
	ex.client.live.reached(conn, ex.request)
	return conn, nil
}

// negotiate sends the request and passes the response on. It takes over conn.
func (ex *exchange) negotiate(r *http.Request, conn net.Conn, protocol string) *refusal {
	conn.SetDeadline(time.Now().Add(ex.s.cfg.Timeouts.Idle))
	prepare(r)
	delete(r.Header, "Te")
	r.Header.Set("Connection", "Upgrade")
	r.Header.Set("Upgrade", protocol)
	if r.ContentLength == 0 {
		r.Body = http.NoBody
	}
	from := newResponseReader(conn, ex.s.cfg.Limits.HeaderBytes)
	br := bufio.NewReader(from)
	resp, err := readResponse(r, conn, br)
	if err != nil {
		conn.Close()
		return exchangeFailed(ex.decision, err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols && strings.EqualFold(resp.Header.Get("Upgrade"), protocol) {
		late, _ := br.Peek(br.Buffered())
		return ex.switchTo(conn, slices.Concat(late, from.in.held), resp)
	}
	defer conn.Close()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return exchangeFailed(ex.decision, errUnaskedUpgrade)
	}
	ex.receive(resp)
	defer resp.Body.Close()
	for k, vs := range resp.Header {
		ex.Header()[k] = vs
	}
	ex.WriteHeader(resp.StatusCode)
	if _, err := ex.ReadFrom(resp.Body); err != nil && ex.broken == nil {
		ex.broken = err
	}
	return nil
}

// readResponse sends r and reads the response to it, but for other 1xx ones.
func readResponse(r *http.Request, conn net.Conn, br *bufio.Reader) (*http.Response, error) {
	if err := r.Write(conn); err != nil {
		return nil, err
	}
	for range maxInterims {
		resp, err := http.ReadResponse(br, r)
		if err != nil || resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			return resp, err
		}
	}
	return nil, errInterims
}

// switchTo answers 101 and makes a tunnel of the two connections. Not before now
// do bytes pass that are not HTTP. late is what the far side sent after its 101.
func (ex *exchange) switchTo(conn net.Conn, late []byte, resp *http.Response) *refusal {
	upgrade := resp.Header.Get("Upgrade")
	stripHopByHop(resp.Header)
	addVia(resp.Header, resp.ProtoMajor, resp.ProtoMinor)
	resp.Header.Set("Connection", "Upgrade")
	resp.Header.Set("Upgrade", upgrade)
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 101 %s\r\n", http.StatusText(http.StatusSwitchingProtocols))
	resp.Header.Write(&b)
	b.WriteString("\r\n")
	b.Write(late)

	ex.s.wg.Add(1) // the connection is net/http's no longer, and not yet the tunnel's
	defer ex.s.wg.Done()
	client, early, err := ex.client.hijack(ex.ResponseWriter)
	if err != nil {
		conn.Close()
		return exchangeFailed(ex.decision, err)
	}
	ex.taken = true
	ex.ev.Status, ex.ev.Decision = http.StatusSwitchingProtocols, ex.decision
	t := &tunnel{s: ex.s, client: client, upstream: conn, request: ex.request, hash: ex.who.hash, ev: ex.ev, place: ex.place}
	ex.place = nil
	if s := ex.client.session; s != nil {
		t.then = s.end
	}
	t.up.Store(int64(len(early)))
	t.down.Store(int64(len(late)))
	limit := time.Now().Add(ex.s.cfg.Timeouts.Connect)
	client.SetWriteDeadline(limit)
	conn.SetDeadline(limit)
	_, err = client.Write(b.Bytes())
	if err == nil && len(early) > 0 {
		_, err = conn.Write(early)
	}
	if err != nil { // the relay, which finds the connections closed, reports it
		note(&t.ev, err)
		t.cut()
	}
	client.SetDeadline(time.Time{})
	conn.SetDeadline(time.Time{})
	t.start(ex.generation)
	return nil
}

// hijack takes the connection back from net/http, without the wrapper, and with
// what was read of it but not yet used.
func (c *clientConn) hijack(w http.ResponseWriter) (conn net.Conn, early []byte, err error) {
	h, ok := w.(http.Hijacker)
	if !ok {
		return nil, nil, http.ErrNotSupported
	}
	_, rw, err := h.Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("hijack: %w", err)
	}
	early = make([]byte, 0, minBuffer)
	buffered, _ := rw.Peek(rw.Reader.Buffered())
	early = append(append(early, buffered...), c.in.held...)
	c.in.held = nil
	c.Conn.SetDeadline(time.Time{})
	return c.Conn, early, nil
}
