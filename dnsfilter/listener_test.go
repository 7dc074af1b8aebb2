package dnsfilter

import (
	"net"
	"net/netip"
	"testing"

	"github.com/rs/zerolog"
)

// fakeConn is a connection from an address.
type fakeConn struct {
	net.Conn
	from netip.Addr
}

func (c fakeConn) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.from, 4711))
}

func TestUnknownSourcesLeaveHalfOfTheConnections(t *testing.T) {
	log := new(logs)
	policy, known := fakePolicy{}, netip.MustParseAddr("198.51.100.1")
	for a := known; a != netip.MustParseAddr("198.51.100.9"); a = a.Next() {
		policy[a.String()] = group{}
	}
	s := NewServer(newResolver(t, Config{Decider: policy, Logger: zerolog.New(log), Upstreams: []string{"127.0.0.1:9"}}, nil))
	fill := func(from netip.Addr, sources int) (kept []*conn) {
		for range sources {
			for range maxSourceConns {
				if c := s.conns.add(fakeConn{nil, from}); c != nil {
					kept = append(kept, c)
				}
			}
			from = from.Next()
		}
		return kept
	}
	if n := len(fill(netip.MustParseAddr("203.0.113.1"), 8)); n != maxConns/2 {
		t.Errorf("unknown sources have %d connections, want %d", n, maxConns/2)
	}
	mine := fill(known, 8)
	if len(mine) != maxConns/2 {
		t.Errorf("known sources have %d connections, want %d", len(mine), maxConns/2)
	}
	fill(known, 8)
	for _, c := range mine {
		s.conns.remove(c)
	}
	if s.conns.add(fakeConn{nil, known}) == nil {
		t.Error("a known source is refused though there is room")
	}
	if s.secureConns.add(fakeConn{nil, netip.MustParseAddr("203.0.113.1")}) == nil {
		t.Error("what is open in clear takes the room of TLS")
	}
	if n := s.resolver.Stats().Dropped; n != 8*maxSourceConns+8*maxSourceConns-maxConns+8*maxSourceConns {
		t.Errorf("Dropped = %d", n)
	}
	if lines := log.with("TCP connections"); len(lines) != 1 {
		t.Errorf("logged %q, want one line", lines)
	}
}
