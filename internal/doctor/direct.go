package doctor

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	directFix = "let nothing but the gate leave the network: deploy/nftables, a security group, a NetworkPolicy"
	cloudFix  = "forbid it in the cloud (a DNS firewall, a resolver rule, a VPC without its resolver): security groups do not see it"
)

// direct returns the probes of what is beyond the gate. Each succeeds if nobody answers.
func (c *Config) direct() (jobs []job) {
	if len(c.Direct) == 0 {
		jobs = append(jobs, result(skipped("direct", "no address beyond the gate was given (--direct)")))
	}
	probes := []struct {
		port  uint16
		over  string
		probe func(context.Context, *Config, netip.AddrPort) error
	}{
		{443, "tcp", probeTLS},
		{443, "udp (QUIC)", probeQUIC},
		{53, "udp (DNS)", probeDNS("udp")},
		{53, "tcp (DNS)", probeDNS("tcp")},
		{853, "tcp (DNS over TLS)", probeTLS},
		{853, "udp (DNS over QUIC)", probeQUIC},
	}
	for _, a := range c.Direct[:min(len(c.Direct), maxTargets)] {
		for _, p := range probes {
			jobs = append(jobs, around("direct", directFix, netip.AddrPortFrom(a, p.port), p.over, p.probe))
		}
	}
	for _, a := range c.Cloud[:min(len(c.Cloud), maxTargets)] {
		for _, over := range []string{"udp", "tcp"} {
			jobs = append(jobs, around("cloud", cloudFix, netip.AddrPortFrom(a, 53), over+" (DNS)", probeDNS(over)))
		}
	}
	return jobs
}

// around makes a job of a probe: its success is a way around the gate.
func around(check, fix string, to netip.AddrPort, over string, probe func(context.Context, *Config, netip.AddrPort) error) job {
	return func(ctx context.Context, c *Config) []Result {
		err := probe(ctx, c, to)
		if err == nil {
			return []Result{problem(check, fmt.Sprintf("%s/%s answers without the gate", to, over), fix)}
		}
		return []Result{ok(check, fmt.Sprintf("%s/%s: %s", to, over, quiet(err)))}
	}
}

var errGateAnswers = errors.New("the gate answers in its place, and refuses")

// quiet says in few words why nobody answered.
func quiet(err error) string {
	timeout, is := errors.AsType[net.Error](err)
	if is && timeout.Timeout() {
		return "no answer"
	}
	if op, is := errors.AsType[*net.OpError](err); is && op.Err != nil {
		return op.Err.Error()
	}
	return err.Error()
}

// accessDenied is the alert with which a gate that was put in the way refuses (RFC
// 8446, section 6.2), as crypto/tls calls it.
var accessDenied = tls.AlertError(49).Error()

// probeTLS returns nil if somebody accepts a connection: unless it is a transparent
// gate, which says so in a TLS alert. Whose certificate it is does not matter.
func probeTLS(ctx context.Context, c *Config, to netip.AddrPort) error {
	conn, err := c.open(ctx, "tcp", to)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := tls.Client(conn, &tls.Config{ServerName: c.Denied, InsecureSkipVerify: true}) //nolint:gosec // nothing is sent over it
	err = client.HandshakeContext(ctx)
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" && op.Err.Error() == accessDenied {
		return errGateAnswers
	}
	return nil
}

// probeDNS returns nil if somebody answers a query, whatever the answer.
func probeDNS(network string) func(context.Context, *Config, netip.AddrPort) error {
	return func(ctx context.Context, c *Config, to netip.AddrPort) error {
		a, err := c.exchange(ctx, network, to, c.Denied, dnsmessage.TypeA)
		switch {
		case errors.Is(err, errGarbled):
			return nil
		case err == nil && (a.ede == edeBlocked || a.ede == edeProhibited):
			return errGateAnswers
		}
		return err
	}
}

// probeQUIC returns nil if somebody speaks QUIC: it sends a packet of a version that
// nobody has, which is answered with those that there are (RFC 9000, section 6.1).
func probeQUIC(ctx context.Context, c *Config, to netip.AddrPort) error {
	conn, err := c.open(ctx, "udp", to)
	if err != nil {
		return err
	}
	defer conn.Close()
	packet, source := strangeInitial()
	b := make([]byte, 1500)
	n, err := c.ask(conn, packet, b)
	for range 8 { // packets that are something else
		if err != nil {
			return err
		}
		if isNegotiation(b[:n], source) {
			return nil
		}
		n, err = conn.Read(b)
	}
	return errors.New("something answers that is not QUIC")
}

const (
	longHeader   = 0xc0       // header form and fixed bit (RFC 9000, section 17.2)
	strange      = 0x1a2a3a4a // a version reserved to provoke negotiation (section 15)
	idLength     = 8
	initialBytes = 1200 // below, servers do not answer (section 14.1)
)

// strangeInitial returns a long header packet of a version that nobody has, and its
// source connection ID.
func strangeInitial() (packet, source []byte) {
	packet = make([]byte, initialBytes)
	rand.Read(packet)
	packet[0] = longHeader | packet[0]&0x0f
	binary.BigEndian.PutUint32(packet[1:], strange)
	packet[5] = idLength
	packet[6+idLength] = idLength
	return packet, packet[7+idLength : 7+2*idLength]
}

// isNegotiation reports whether b is a version negotiation packet for us (RFC 9000,
// section 17.2.1).
func isNegotiation(b, source []byte) bool {
	return len(b) >= 7+idLength && b[0]&0x80 != 0 && binary.BigEndian.Uint32(b[1:]) == 0 &&
		int(b[5]) == len(source) && bytes.Equal(b[6:6+len(source)], source)
}
