package proxy

import (
	"context"
	"net"
	"net/netip"
	"sync"

	"sallyport/policy"
)

// A session is HTTP inside a CONNECT: the client's connection is served by
// net/http, for the authority of the CONNECT alone, and all requests go to the
// address that was checked for it. The tunnel stands for it in the registry.
type session struct {
	tunnel  *tunnel
	carrier *carrier // shared with nobody
	to      netip.AddrPort

	mu   sync.Mutex // guards conn
	conn net.Conn   // dialled for the CONNECT; nil once used
}

// startSession gives the connection to net/http. raw is the start of the first
// request; its head is read as strictly as one outside a CONNECT. It takes over
// upstream.
func (c *connect) startSession(upstream net.Conn, raw []byte) {
	raw, n, err := readHead(c.client, raw, c.s.cfg.Limits.HeaderBytes)
	if err == nil {
		_, err = parseHead(raw[:n])
	}
	if err != nil {
		upstream.Close()
		if isHeadError(err) {
			c.refuse(badRequest(c.decision, err))
		} else {
			c.gone(err)
		}
		return
	}
	s := &session{tunnel: c.newTunnel(), to: c.ev.Destination, conn: upstream}
	s.carrier = c.s.newCarrier(s.dial)
	c.s.register(s.tunnel, c.generation)
	c.s.serveByHTTP(&clientConn{
		idleConn: idleConn{Conn: c.client, idle: c.s.clientIdle()},
		s:        c.s, source: asker{c.ev.Source, c.ev.VPCEndpoint}, in: requests(c.s, raw), session: s,
	})
}

// isFor reports whether r is for the authority of the CONNECT.
func (s *session) isFor(r *policy.Request) bool {
	t := &s.tunnel.request
	return r.Name == t.Name && r.Address == t.Address && r.Port == t.Port
}

// dial returns the connection of the CONNECT, and when that has ended, another
// one to the same address.
func (s *session) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	srv := s.tunnel.s
	conn, t := s.take(), trip{request: s.tunnel.request, parent: s.tunnel.ev.Parent}
	if conn == nil {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(srv.life, cancel)()
		if ex, ok := ctx.Value(exchangeKey{}).(*exchange); ok {
			ex.client.live.dialling(cancel)
		}
		var r *refusal
		if conn, t, r = srv.redial(ctx, s.tunnel.request, s.tunnel.ev.Decision); r != nil {
			return nil, r
		}
	}
	return srv.newUpstreamConn(conn, t), nil
}

// take returns the connection of the CONNECT, once.
func (s *session) take() net.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	conn := s.conn
	s.conn = nil
	return conn
}

// end is called when the client's connection has ended.
func (s *session) end() {
	if conn := s.take(); conn != nil {
		conn.Close()
	}
	s.carrier.CloseIdleConnections()
	s.tunnel.end("")
}
