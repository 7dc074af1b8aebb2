package dnsfilter

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"sallyport/proxyproto"
)

// unmapped returns ps with IPv4-mapped prefixes as those of IPv4.
func unmapped(ps []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(ps))
	for _, p := range ps {
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		out = append(out, p.Masked())
	}
	return out
}

func contains(ps []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
}

// introduce finds out who asks on c. From a trusted peer it reads the PROXY protocol
// header, which must come. It returns false if the connection is of no use.
func (s *Server) introduce(c *conn) bool {
	if !c.trusted {
		return true
	}
	if !c.within(firstQuery, s.down) {
		return false
	}
	h, rest, err := proxyproto.Read(c.Conn, nil)
	if err != nil {
		if len(rest) > 0 { // or it is a load balancer that looks whether somebody listens
			s.misled(fmt.Errorf("%w, which dns.proxy_protocol.trusted demands of %s", err, c.peer))
		}
		return false
	}
	c.early = rest
	if h.Source.IsValid() {
		c.client = netip.AddrPortFrom(h.Source.Addr().WithZone(""), h.Source.Port())
		return c.conns.adopt(c)
	}
	return true
}

// isIntroduction reports whether b, how a connection begins after what introduce has
// taken, is a PROXY protocol header. As the beginning of a query it would make none that
// a client sends.
func isIntroduction(b []byte) bool {
	const v1, v2 = 6, 12 // bytes of what the versions begin with
	return len(b) >= v2 && proxyproto.Starts(b[:v2]) || len(b) >= v1 && b[0] == 'P' && proxyproto.Starts(b)
}

// uninvited counts a header from who is to send none.
func (s *Server) uninvited(from netip.Addr) {
	s.misled(fmt.Errorf("a PROXY protocol header from %s, which is to send none, or no second one; see dns.proxy_protocol.trusted", from))
}

// misled counts a connection that begins with the wrong thing, and says so the first time.
func (s *Server) misled(err error) {
	s.counts.malformed.Add(1)
	if s.said.CompareAndSwap(false, true) {
		s.cfg.Logger.Warn().Err(err).Msg("connections to the resolver are closed for their PROXY protocol header, or for lack of one. Said once")
	}
}

// within gives the other side a time for what it is to send, and reports whether there
// is still somebody to read it.
func (c *conn) within(d time.Duration, down <-chan struct{}) bool {
	return c.SetReadDeadline(time.Now().Add(d)) == nil && !isClosed(down)
}
