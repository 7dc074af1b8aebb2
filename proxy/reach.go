package proxy

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"sallyport/policy"
)

// A trip is how a connection to the far side came about.
type trip struct {
	decision  policy.Decision // the last one, on the address dialled
	request   policy.Request  // what it was asked
	dnsTime   time.Duration
	connTime  time.Duration
	addresses []netip.AddrPort // that passed
	parent    string           // the proxy it went through, host:port; "": none
	via       string           // the proxies that the client's request says it came through, for a parent
}

// reach connects to the destination of req, for which d was decided: it resolves
// the name once, has every address decided, and dials those that pass, or asks the
// parent of the source's group for them. via is the request's Via. The trip is good
// on error too, as far as it went. ctx and timeouts.connect bound it all.
func (s *Server) reach(ctx context.Context, req policy.Request, d policy.Decision, via string) (net.Conn, trip, *refusal) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeouts.Connect)
	defer cancel()
	return s.reachIn(ctx, req, d, via)
}

// reachFor is reach for a CONNECT of client, and ends too when that goes away.
func (s *Server) reachFor(client net.Conn, req policy.Request, d policy.Decision, via string) (net.Conn, trip, *refusal) {
	ctx, cancel := context.WithTimeout(s.life, s.cfg.Timeouts.Connect)
	defer cancel()
	f := watch(client, cancel)
	conn, t, r := s.reachIn(ctx, req, d, via)
	if f.stop() && r != nil {
		r.err = errLeftDialling
	}
	return conn, t, r
}

// reachIn is reach within ctx.
func (s *Server) reachIn(ctx context.Context, req policy.Request, d policy.Decision, via string) (net.Conn, trip, *refusal) {
	t := trip{decision: d, request: req, via: via}
	w := s.wayOf(d.Group)
	addrs := []netip.Addr{req.Address.Unmap()}
	if !req.Name.IsZero() {
		start := time.Now()
		var err error
		addrs, err = w.dialer.Resolve(ctx, req.Name.String())
		t.dnsTime = time.Since(start)
		if err != nil && (ctx.Err() != nil || !w.delegates(req.Name)) {
			return nil, t, resolveFailed(d, err)
		}
	}
	if len(addrs) > 0 {
		if r := s.check(&t, addrs, w.wantsAll()); r != nil {
			return nil, t, r
		}
	}
	start := time.Now()
	conn, r := s.dial(ctx, w, &t)
	t.connTime = time.Since(start)
	if r != nil {
		return nil, t, r
	}
	if s.descriptors.spent(conn) {
		conn.Close()
		return nil, t, limited(t.decision, http.StatusServiceUnavailable, errDescriptors)
	}
	// Which rule let the connection pass depends on the address, and the policy
	// may have changed on the way.
	t.decision = s.cfg.Decider.Decide(t.request)
	if !t.decision.Passes() {
		conn.Close()
		return nil, t, denied(t.decision)
	}
	return conn, t, nil
}

// check decides on each address and keeps those that pass. If none does, or all
// are wanted and one does not, the first denial is the refusal.
func (s *Server) check(t *trip, addrs []netip.Addr, all bool) *refusal {
	var first *refusal
	for _, a := range addrs {
		to := netip.AddrPortFrom(a, t.request.Port)
		var r *refusal
		req := t.request
		s.towards(&req, a)
		if s.isSelf(to) {
			r = looped(t.decision)
		} else if d := s.cfg.Decider.Decide(req); !d.Passes() {
			r = denied(d)
		}
		if r == nil {
			t.addresses = append(t.addresses, to)
		} else if first == nil {
			first = r
		}
	}
	if len(t.addresses) > 0 && (first == nil || !all) {
		return nil
	}
	return first
}

// towards makes a the destination of req.
func (s *Server) towards(req *policy.Request, a netip.Addr) {
	req.Destination = a
	req.PrivateZone = s.cfg.PrivateZone != nil && s.cfg.PrivateZone(req.Name, a)
}

// isSelf reports whether a connection to a would come back to this process.
func (s *Server) isSelf(a netip.AddrPort) bool {
	return slices.ContainsFunc(s.own, func(l netip.AddrPort) bool {
		if l.Port() != a.Port() {
			return false
		}
		// Connecting to the unspecified address reaches this host.
		return l.Addr() == a.Addr() || a.Addr().IsUnspecified() || l.Addr().IsUnspecified() && isLocal(a.Addr())
	})
}

// isLocal reports whether a is an address of this host. It asks the system, for
// addresses come and go; that is rare, as the port was ours already.
func isLocal(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	local, err := net.InterfaceAddrs()
	if err != nil {
		return true // better a refusal too many than a loop
	}
	return slices.ContainsFunc(local, func(l net.Addr) bool {
		p, err := netip.ParsePrefix(l.String())
		return err == nil && p.Addr().Unmap() == a
	})
}

// remoteAddr returns the address of c's peer, unmapped; zero if it is not a TCP address.
func remoteAddr(c net.Conn) netip.AddrPort { return addrPort(c.RemoteAddr()) }

// addrPort returns a as a netip.AddrPort, unmapped and without a zone.
func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := t.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port())
}
