package doctor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	optEDE = 15 // Extended DNS Error (RFC 8914), an EDNS option

	edeBlocked    = 15
	edeProhibited = 18

	maxMessage = 4096 // bytes of a DNS message over UDP, as offered
)

// Nameservers returns the resolvers of a file such as /etc/resolv.conf, of which
// programs use three at most.
func Nameservers(file string) ([]netip.AddrPort, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var found []netip.AddrPort
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" || len(found) == 3 {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			found = append(found, netip.AddrPortFrom(a, 53))
		}
	}
	return found, nil
}

// answer is what matters of an answer.
type answer struct {
	rcode   dnsmessage.RCode
	ede     int // first Extended DNS Error; -1: none
	answers int
}

func (a answer) String() string {
	s := strings.TrimPrefix(a.rcode.String(), "RCode")
	if a.ede >= 0 {
		s += fmt.Sprintf(" with EDE %d", a.ede)
	}
	return s
}

// query returns a query for name with EDNS.
func query(id uint16, name string, typ dnsmessage.Type) ([]byte, error) {
	n, err := dnsmessage.NewName(strings.TrimSuffix(name, ".") + ".")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", show(name), err)
	}
	var opt dnsmessage.ResourceHeader
	if err := opt.SetEDNS0(maxMessage, dnsmessage.RCodeSuccess, false); err != nil {
		return nil, err
	}
	m := dnsmessage.Message{
		Header:      dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions:   []dnsmessage.Question{{Name: n, Type: typ, Class: dnsmessage.ClassINET}},
		Additionals: []dnsmessage.Resource{{Header: opt, Body: &dnsmessage.OPTResource{}}},
	}
	return m.Pack()
}

var errGarbled = errors.New("what it answers is no answer")

// parse reads the answer to the query with id.
func parse(msg []byte, id uint16) (answer, error) {
	var m dnsmessage.Message
	if err := m.Unpack(msg); err != nil || m.ID != id || !m.Response {
		return answer{}, errGarbled
	}
	a := answer{rcode: m.RCode, ede: -1, answers: len(m.Answers)}
	for _, r := range m.Additionals {
		opt, ok := r.Body.(*dnsmessage.OPTResource)
		if !ok {
			continue
		}
		for _, o := range opt.Options {
			if o.Code == optEDE && len(o.Data) >= 2 && a.ede < 0 {
				a.ede = int(binary.BigEndian.Uint16(o.Data))
			}
		}
	}
	return a, nil
}

// exchange asks one resolver, over udp or tcp.
func (c *Config) exchange(ctx context.Context, network string, to netip.AddrPort, name string, typ dnsmessage.Type) (answer, error) {
	id := uint16(rand.Uint32())
	msg, err := query(id, name, typ)
	if err != nil {
		return answer{}, err
	}
	conn, err := c.open(ctx, network, to)
	if err != nil {
		return answer{}, err
	}
	defer conn.Close()
	if network == "tcp" {
		if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...)); err != nil {
			return answer{}, err
		}
		var size [2]byte
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return answer{}, err
		}
		b := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(conn, b); err != nil {
			return answer{}, err
		}
		return parse(b, id)
	}
	b := make([]byte, maxMessage)
	n, err := c.ask(conn, msg, b)
	if err != nil {
		return answer{}, err
	}
	return parse(b[:n], id)
}

// udpTries is how often a packet is sent, for the network may lose one: a resolver
// would look dead then, and a way around the gate closed.
const udpTries = 3

// ask sends a packet until there is an answer, which it reads into b, within the timeout.
func (c *Config) ask(conn net.Conn, packet, b []byte) (n int, err error) {
	for range udpTries {
		if _, err = conn.Write(packet); err != nil {
			return 0, err
		}
		conn.SetReadDeadline(time.Now().Add(c.Timeout / udpTries))
		if n, err = conn.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
	}
	return 0, err
}

// open connects within the timeout. What follows has as long again.
func (c *Config) open(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Timeout: c.Timeout}
	conn, err := d.DialContext(ctx, network, to.String())
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(c.Timeout))
	return conn, nil
}

// resolvers returns what there is to ask of this machine's resolvers. Programs use
// all of them, so each has to be the gate's.
func (c *Config) resolvers() (jobs []job) {
	if len(c.Resolvers) == 0 {
		return []job{result(skipped("resolver", "this machine has no resolver"))}
	}
	for _, r := range c.Resolvers[:min(len(c.Resolvers), maxTargets)] {
		jobs = append(jobs, func(ctx context.Context, c *Config) []Result { return c.resolver(ctx, r) })
	}
	return jobs
}

const resolverFix = "let every nameserver in resolv.conf be the gate's resolver (deploy/dhcp), and block the others"

func (c *Config) resolver(ctx context.Context, at netip.AddrPort) (found []Result) {
	known := false
	if c.Health != "" {
		a, err := c.exchange(ctx, "udp", at, c.Health, dnsmessage.TypeTXT)
		known = err == nil && a.rcode == dnsmessage.RCodeSuccess && a.answers > 0
		switch {
		case err != nil:
			return []Result{problem("resolver", fmt.Sprintf("%s does not answer: %v", at, err), "is sallyport running there (dns.listen)? "+resolverFix)}
		case known:
			found = append(found, ok("resolver", fmt.Sprintf("%s answers for the health name %s", at, c.Health)))
		default:
			found = append(found, problem("resolver", fmt.Sprintf("%s does not know the health name %s (%s)", at, c.Health, a), resolverFix+"; dns.health_name has to be set there"))
		}
	}
	if c.Denied == "" {
		return append(found, skipped("resolver", "no name that should be refused was given (--denied)"))
	}
	a, err := c.exchange(ctx, "udp", at, c.Denied, dnsmessage.TypeA)
	said := fmt.Sprintf("%s answers %s for %s", at, a, c.Denied)
	switch {
	case err != nil:
		return append(found, problem("resolver", fmt.Sprintf("%s does not answer: %v", at, err), "is sallyport running there (dns.listen)? "+resolverFix))
	case a.ede == edeProhibited:
		return append(found, problem("resolver", said+": no group of the policy has this machine", "add its network to a group; if the gate sees another address, NAT or another resolver is between"))
	case a.ede == edeBlocked:
		return append(found, ok("resolver", said+": it refuses by policy"))
	case a.rcode == dnsmessage.RCodeRefused && known:
		return append(found, ok("resolver", said+"; another resolver is between, which keeps the reason to itself"))
	case a.rcode == dnsmessage.RCodeRefused:
		return append(found, problem("resolver", said+", without saying that it is by policy: it may be another resolver", "give the gate's dns.health_name with --health-name to be sure. "+resolverFix))
	}
	return append(found, problem("resolver", said+": it does not refuse by policy", resolverFix+". In a group that observes this is as it should be"))
}
