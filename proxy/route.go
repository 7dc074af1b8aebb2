package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"sallyport/policy"
	"sallyport/proxy/upstream"
)

// A Route is a way out. The zero value is the direct one.
type Route struct {
	Source upstream.Source  // where connections come from
	Parent *upstream.Parent // the proxy that they go through; nil: none
}

// Routes say which way connections take. The zero value sends all of them the
// direct way.
type Routes struct {
	Default Route
	Groups  map[string]Route // by name of the source's group; each replaces Default whole

	// ParentByAddress asks parents for the address that was checked. Otherwise they
	// are asked for the name, and then every address of it must pass here, for which
	// of them the parent takes is its own choice (docs/decisions/0008).
	ParentByAddress bool

	// ParentResolves says which names go to a parent even if they do not resolve
	// here, and so without a check of their addresses: "host.corp.example",
	// ".corp.example" (that name and all below it) or "*.corp.example" (all below it).
	ParentResolves []string
}

// SetRoutes changes the routes for connections from now on; live ones go on. The
// caller does not change r any more.
func (s *Server) SetRoutes(r Routes) {
	s.ways.Store(newWays(&r, s.cfg.Resolver))
	s.pools.retire() // idle connections took the old ways
}

// A way is a Route to be taken. It never changes.
type way struct {
	Route
	dialer upstream.Dialer
	routes *Routes
}

// ways are all Routes.
type ways struct {
	rest   *way // for groups without one of their own
	groups map[string]*way
}

func newWays(r *Routes, resolver upstream.Resolver) *ways {
	build := func(one Route) *way {
		return &way{Route: one, dialer: upstream.Dialer{Resolver: resolver, Source: one.Source}, routes: r}
	}
	ws := &ways{rest: build(r.Default), groups: make(map[string]*way, len(r.Groups))}
	for group, one := range r.Groups {
		ws.groups[group] = build(one)
	}
	return ws
}

// wayOf returns the way for sources of group.
func (s *Server) wayOf(group string) *way {
	ws := s.ways.Load()
	if w, ok := ws.groups[group]; ok {
		return w
	}
	return ws.rest
}

// delegates reports whether the parent may be asked for n although it does not
// resolve here.
func (w *way) delegates(n policy.Name) bool {
	if w.Parent == nil {
		return false
	}
	return slices.ContainsFunc(w.routes.ParentResolves, func(pattern string) bool {
		below := strings.TrimPrefix(pattern, "*")
		return strings.HasPrefix(below, ".") && strings.HasSuffix(n.String(), below) || n.String() == strings.TrimPrefix(pattern, ".")
	})
}

// wantsAll reports whether every address of a name must pass.
func (w *way) wantsAll() bool { return w.Parent != nil && !w.routes.ParentByAddress }

// dial connects to the destination of t, whose addresses were checked, the way w.
// It notes in t the destination for further decisions, and the parent.
func (s *Server) dial(ctx context.Context, w *way, t *trip) (net.Conn, *refusal) {
	if w.Parent != nil {
		return s.dialParent(ctx, w, t)
	}
	conn, err := w.dialer.Dial(ctx, t.addresses)
	if err != nil {
		return nil, connectFailed(t.decision, err)
	}
	s.towards(&t.request, remoteAddr(conn).Addr())
	return conn, nil
}

// dialParent connects through w's parent. By address, the next one is tried when
// the parent says that the far side failed.
func (s *Server) dialParent(ctx context.Context, w *way, t *trip) (net.Conn, *refusal) {
	t.parent = w.Parent.String()
	parents, r := s.parentAddresses(ctx, w, t)
	if r != nil {
		return nil, r
	}
	var failed []error
	for _, to := range t.targets(w) {
		conn, err := w.dialer.Dial(ctx, parents)
		if err != nil {
			err = fmt.Errorf("parent %s: %w", w.Parent, err)
			return nil, connectFailed(t.decision, errors.Join(append(failed, err)...))
		}
		if conn, err = w.Parent.Tunnel(ctx, conn, to.authority, extendVia(t.via)); err == nil {
			s.towards(&t.request, to.checked)
			return conn, nil
		}
		failed = append(failed, err)
		if e, ok := errors.AsType[*upstream.ParentError](err); !ok || !e.FarSide() {
			break
		}
	}
	return nil, connectFailed(t.decision, errors.Join(failed...))
}

// A target is what a parent is asked for.
type target struct {
	authority string
	checked   netip.Addr // zero: the name did not resolve here
}

// targets returns what w's parent may be asked for, one after the other.
func (t *trip) targets(w *way) (ts []target) {
	if len(t.addresses) == 0 {
		return []target{{authority: authority(t.request.Name, t.request.Address, t.request.Port)}}
	}
	if w.wantsAll() {
		return []target{{authority(t.request.Name, t.request.Address, t.request.Port), t.addresses[0].Addr()}}
	}
	for _, a := range t.addresses {
		ts = append(ts, target{a.String(), a.Addr()})
	}
	return ts
}

// parentAddresses returns where w's parent is. It is the operator's choice and
// needs no rule, but it must not be this process.
func (s *Server) parentAddresses(ctx context.Context, w *way, t *trip) ([]netip.AddrPort, *refusal) {
	p := w.Parent
	var found []netip.Addr
	if a, err := netip.ParseAddr(p.Host); err == nil {
		found = []netip.Addr{a.Unmap()}
	} else if found, err = w.dialer.Resolve(ctx, p.Host); err != nil {
		r := resolveFailed(t.decision, fmt.Errorf("parent %s: %w", p, err))
		r.decision = t.decision.Refuse(policy.ReasonConnectFailed) // the client's name is not what failed
		return nil, r
	}
	addrs := make([]netip.AddrPort, len(found))
	for i, a := range found {
		if addrs[i] = netip.AddrPortFrom(a, p.Port); s.isSelf(addrs[i]) {
			r := looped(t.decision)
			r.err = errOwnParent
			return nil, r
		}
	}
	return addrs, nil
}

var errOwnParent = errors.New("proxy.parent is this proxy itself")

// redial connects once more to the destination of req, whose address was checked,
// for which d was decided.
func (s *Server) redial(ctx context.Context, req policy.Request, d policy.Decision) (net.Conn, trip, *refusal) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeouts.Connect)
	defer cancel()
	t := trip{request: req, decision: d}
	if req.Destination.IsValid() {
		t.addresses = []netip.AddrPort{netip.AddrPortFrom(req.Destination, req.Port)}
	}
	w := s.wayOf(d.Group)
	if w.wantsAll() && !req.Name.IsZero() {
		// It resolves the name itself, now. What was checked may be another address, or
		// one of several if the connection before did not go through a parent.
		req.Destination, req.PrivateZone = netip.Addr{}, false
		return s.reach(ctx, req, d, "")
	}
	if w.Parent == nil && len(t.addresses) == 0 { // it came through a parent that is no longer there
		return nil, t, connectFailed(d, upstream.ErrNoAddress)
	}
	conn, r := s.dial(ctx, w, &t)
	return conn, t, r
}
