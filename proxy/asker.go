package proxy

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/proxyproto"
)

// An asker is who asks: the client, as the connection's peer or as a load balancer
// tells it.
type asker struct {
	netip.AddrPort        // IPv4 never mapped
	vpcEndpoint    string // see event.Event
}

// unmapPrefixes returns ps with IPv4-mapped prefixes as those of IPv4.
func unmapPrefixes(ps []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(ps))
	for _, p := range ps {
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		out = append(out, p.Masked())
	}
	return out
}

// introduce finds out who asks on p, which began at start and has a read deadline.
// From a trusted peer it reads the PROXY protocol header, which must come. rest is
// what was received after it, in buf. With ok false the connection is closed, and
// logged.
func (s *Server) introduce(p *pending, buf []byte, start time.Time) (who asker, rest []byte, ok bool) {
	who.AddrPort = remoteAddr(p.conn)
	if !s.speaksForOthers(who.Addr()) {
		return who, buf, true
	}
	h, rest, err := proxyproto.Read(p.conn, buf)
	switch {
	case err == nil:
	case len(rest) == 0 && !isTimeout(err): // a load balancer that looks whether somebody listens, or the end of the program
		p.conn.Close()
		return who, nil, false
	case len(rest) == 0:
		err = fmt.Errorf("%w in time", proxyproto.ErrMissing)
		fallthrough
	default:
		s.reject(p, who, start, fmt.Errorf("%w, which proxy.proxy_protocol.trusted demands of %s", err, who.Addr()))
		return who, nil, false
	}
	if h.Source.IsValid() {
		who = asker{h.Source, h.VPCEndpoint}
	}
	if len(rest) > 0 {
		p.begun.Store(true)
	}
	return who, rest, true
}

// unexpected returns an error if raw, the start of a connection after what
// introduce has taken, is a PROXY protocol header or may become one.
func (s *Server) unexpected(p *pending, raw []byte) error {
	if raw[0] != 'P' && raw[0] != '\r' || len(raw) < len("PROXY ") && raw[0] == 'P' || !proxyproto.Starts(raw) {
		return nil
	}
	return errUnexpected(p.conn)
}

func errUnexpected(conn net.Conn) error {
	return fmt.Errorf("a PROXY protocol header from %s, which is to send none, or no second one; see proxy.proxy_protocol.trusted", remoteAddr(conn).Addr())
}

// reject closes a connection on which nothing was asked yet, without an answer.
func (s *Server) reject(p *pending, who asker, start time.Time, err error) {
	ev := s.newEvent(event.HTTP, who, start)
	ev.Listener = p.listener()
	ev.Decision = ev.Decision.Refuse(policy.ReasonBadRequest)
	note(&ev, err)
	p.conn.Close()
	s.observe(&ev)
}

// hurry is how long a client may take for the head of a request that is refused
// because it has opened too many connections.
const hurry = time.Second

// maxHurried bounds the connections that are refused so at a time; further ones
// are closed at once.
const maxHurried = 256

// count counts a new connection from source, and returns what the crowd knows it by,
// or which limit it exceeds.
func (s *Server) count(source netip.Addr, now time.Time) (counted netip.Addr, tooMany error) {
	if s.rates.exceeded(source, now) {
		return netip.Addr{}, errTooFast
	}
	counted, ok := s.crowd.enter(source)
	if !ok {
		return netip.Addr{}, errTooManyConnections
	}
	return counted, nil
}

// speaksForOthers reports whether connections from peer begin with who asks.
func (s *Server) speaksForOthers(peer netip.Addr) bool {
	return slices.ContainsFunc(s.cfg.ProxyProtocol.Trusted, func(t netip.Prefix) bool { return t.Contains(peer) })
}

// refuseTooMany answers the request with head h from a client that has opened too
// many connections: tooMany says by which limit.
func (s *Server) refuseTooMany(p *pending, who asker, start time.Time, h *head, tooMany error) {
	c := &connect{s: s, client: p.conn, json: h.json}
	kind := event.HTTP
	if h.isConnect() {
		kind = event.Connect
	}
	c.ev = s.newEvent(kind, who, start)
	c.ev.Method, c.ev.UserAgent = clip(string(h.method)), clip(string(h.userAgent))
	authority := string(h.target)
	if !h.isConnect() {
		authority = string(h.host)
		if !hasPort(authority) {
			authority += defaultPort
		}
	}
	c.request = policy.Request{Source: who.Addr(), Time: start}
	if name, addr, port, err := policy.ParseAuthority(authority); err == nil {
		c.request.Name, c.request.Address, c.request.Port = name, addr.Unmap(), port
		c.ev.Name, c.ev.Port = destination(name, c.request.Address), port
		c.decide() // for the group
	}
	c.refuse(limited(c.decision, http.StatusTooManyRequests, tooMany))
}

// dropTooMany closes a connection of such a client without having read a request.
func (s *Server) dropTooMany(p *pending, who asker, start time.Time, tooMany error) {
	ev := s.newEvent(event.HTTP, who, start)
	ev.Listener = p.listener()
	ev.Decision = ev.Decision.Refuse(policy.ReasonLimitExceeded)
	note(&ev, tooMany)
	if c, ok := p.conn.(interface{ SetLinger(sec int) error }); ok {
		c.SetLinger(0) // no state is kept for it
	}
	p.conn.Close()
	s.observe(&ev)
}
