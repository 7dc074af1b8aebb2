//go:build !linux

package dnsfilter

import (
	"net"
	"net/netip"

	"github.com/miekg/dns"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// A udpSocket is the socket of an address.
type udpSocket struct{ conn *net.UDPConn }

// shareUDP returns the one socket of an address, first, which it takes ownership of.
func shareUDP(first *net.UDPConn) ([]*udpSocket, error) {
	u, err := newUDPSocket(first)
	return []*udpSocket{u}, err
}

func newUDPSocket(c *net.UDPConn) (*udpSocket, error) {
	// One of the two is for the other family, and where neither works answers may leave
	// a host with several addresses by another than the one asked.
	_ = ipv6.NewPacketConn(c).SetControlMessage(ipv6.FlagDst|ipv6.FlagInterface, true)
	_ = ipv4.NewPacketConn(c).SetControlMessage(ipv4.FlagDst|ipv4.FlagInterface, true)
	return &udpSocket{c}, nil
}

// A udpQuery is a query with the way back.
type udpQuery struct {
	u       *udpSocket
	session *dns.SessionUDP
	addr    netip.AddrPort
	missed  bool // as in fast
	proven  bool // the client is
	packet  []byte
}

// serveUDP answers what comes in by u until the server shuts down.
func (s *Server) serveUDP(u *udpSocket) error {
	f := newFast(s)
	buf, written := make([]byte, readSize), make([]byte, 0, maxEDNSSize)
	for {
		n, session, err := dns.ReadFromSessionUDP(u.conn, buf)
		if isClosed(s.down) {
			return nil
		}
		if err != nil {
			return err
		}
		ap := session.RemoteAddr().(*net.UDPAddr).AddrPort()
		q := &udpQuery{u: u, session: session, addr: netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())}
		s.resolver.refreshHosts()
		var o outcome
		now := s.cfg.Now()
		if answer, ok := f.answer(written, buf[:n], client{addr: q.addr, udp: true}, now, &o); ok {
			if len(answer) == 0 {
				continue
			}
			err := q.send(answer)
			f.observe(&o, buf[:n], now, s.cfg.Now(), err)
			continue
		}
		q.proven = f.proven(client{addr: q.addr, udp: true}, now)
		if !s.enter(q.addr.Addr(), q.proven) {
			s.counts.dropped.Add(1)
			continue
		}
		q.packet, q.missed = append(q.packet, buf[:n]...), f.missed
		s.slow.Add(1)
		go s.answerUDP(q)
	}
}

func (s *Server) answerUDP(q *udpQuery) {
	defer s.slow.Done()
	defer s.leave(q.addr.Addr(), q.proven)
	s.serveLater(s.life, client{addr: q.addr, udp: true, back: q}, q.packet, q.missed)
}

// deliver does nothing: every query has a goroutine.
func deliver(*udpQuery, *entry) {}

func (s *Server) newOutbox() any { return nil }

func (s *Server) cutOff() {}

// read hands out what comes until no query is under way.
func (s *socket) read() {
	defer s.Close()
	var buf [maxEDNSSize]byte
	for {
		n, err := s.Read(buf[:])
		if err != nil {
			s.waiting.fail(err)
			return
		}
		if s.waiting.deliver(buf[:n]) && s.waiting.end(errRetired) {
			return
		}
	}
}

// send implements the way back of a client.
func (q *udpQuery) send(answer []byte) error {
	_, err := dns.WriteToSessionUDP(q.u.conn, answer, q.session)
	return err
}
