// Package upstream reaches the far side of a connection in two steps with a gap
// between them: [Dialer.Resolve] turns a name into addresses, once; the caller
// checks them; [Dialer.Dial] connects to one of exactly those addresses. No name
// ever gets as far as a dial, so there is no second look-up that could answer
// differently (DNS rebinding).
package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"
)

const (
	// maxAddresses bounds how many of a name's addresses are tried.
	maxAddresses = 16

	// Stagger is how long an attempt is waited for before the next address is tried
	// beside it: the Connection Attempt Delay (RFC 8305, section 5).
	Stagger = 250 * time.Millisecond
)

// keepAlive finds peers that vanished without a word within two minutes.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

var (
	// ErrNoAddress means that a name has no address, or that Dial was given none.
	ErrNoAddress = errors.New("no address")

	// ErrNoSource means that Dialer.Source has no address of the family of any of
	// the addresses to dial.
	ErrNoSource = errors.New("no source address of the destination's family")

	// errOtherAddress is the second guard's: it cannot happen.
	errOtherAddress = errors.New("about to connect to an address that was not checked")
)

// A Resolver looks up the addresses of a name. *net.Resolver is one.
type Resolver interface {
	// LookupNetIP returns the addresses of host; network is "ip". It honours ctx.
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// A Source says which address of this machine connections leave from. The zero
// Source leaves that to the system. One that has an address of one family alone
// is for that family alone: the other is not dialled, for whoever sets it lets a
// far side tell connections by their address.
type Source struct {
	V4, V6 netip.Addr // zero: none
}

// of returns the address to bind for a connection to a.
func (s Source) of(a netip.Addr) netip.Addr {
	if a.Is4() {
		return s.V4
	}
	return s.V6
}

// A Dialer resolves and connects. It is safe for concurrent use.
type Dialer struct {
	Resolver Resolver // asked for names; required by Resolve alone
	Source   Source   // where connections come from

	// connect makes one connection; nil: TCP. Replaced by tests.
	connect func(context.Context, netip.AddrPort) (net.Conn, error)
}

// Resolve asks the Resolver for the addresses of name, once. The result holds
// each address once, unmapped, without zones, at most 16 of them; it is not
// empty unless there is an error. The error is the Resolver's, or wraps ErrNoAddress.
func (d *Dialer) Resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	found, err := d.Resolver.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", name, err)
	}
	addrs := Distinct(found)
	if len(addrs) == 0 {
		return nil, fmt.Errorf("resolve %s: %w", name, ErrNoAddress)
	}
	return addrs, nil
}

// Distinct returns each address of found once, unmapped, without zones, at most 16 of
// them, in a slice of its own; nil if there is none.
func Distinct(found []netip.Addr) (addrs []netip.Addr) {
	for _, a := range found {
		a = a.Unmap().WithZone("")
		if a.IsValid() && !slices.Contains(addrs, a) && len(addrs) < maxAddresses {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// Dial connects to one of addrs: IPv6 and IPv4 take turns, the next address is
// tried as soon as one fails, or after 250 ms, and the first to connect wins
// (RFC 8305). All other attempts are over when Dial returns. The caller owns the
// connection. The error joins those of all attempts, or wraps ErrNoAddress or
// ErrNoSource.
func (d *Dialer) Dial(ctx context.Context, addrs []netip.AddrPort) (net.Conn, error) {
	if d.Source != (Source{}) && len(addrs) > 0 {
		addrs = slices.DeleteFunc(slices.Clone(addrs), func(a netip.AddrPort) bool { return !d.Source.of(a.Addr()).IsValid() })
		if len(addrs) == 0 {
			return nil, ErrNoSource
		}
	}
	switch len(addrs) {
	case 0:
		return nil, ErrNoAddress
	case 1:
		return d.attempt(ctx, addrs[0])
	}
	r := race{d: d, addrs: Interleave(addrs), results: make(chan result)}
	return r.run(ctx)
}

// attempt connects to a.
func (d *Dialer) attempt(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
	if d.connect != nil {
		return d.connect(ctx, a)
	}
	nd := net.Dialer{
		FallbackDelay:   -1, // there is one address
		KeepAliveConfig: keepAlive,
		Control: func(_, address string, _ syscall.RawConn) error {
			if got, err := netip.ParseAddrPort(address); err != nil || got != a {
				return errOtherAddress
			}
			return nil
		},
	}
	if src := d.Source.of(a.Addr()); src.IsValid() {
		guard := nd.Control
		nd.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(src, 0))
		nd.Control = func(network, address string, c syscall.RawConn) error {
			if err := guard(network, address, c); err != nil {
				return err
			}
			return bindLate(c)
		}
	}
	return nd.DialContext(ctx, "tcp", a.String())
}

// Interleave orders addrs so that the families take turns, IPv6 first, otherwise
// in the order given (RFC 8305, section 4).
func Interleave(addrs []netip.AddrPort) []netip.AddrPort {
	var six, four []netip.AddrPort
	for _, a := range addrs {
		if a.Addr().Is4() {
			four = append(four, a)
		} else {
			six = append(six, a)
		}
	}
	out := make([]netip.AddrPort, 0, len(addrs))
	for i := range max(len(six), len(four)) {
		if i < len(six) {
			out = append(out, six[i])
		}
		if i < len(four) {
			out = append(out, four[i])
		}
	}
	return out
}

// result is the outcome of one attempt.
type result struct {
	conn net.Conn
	err  error
}

// race is one Dial to several addresses.
type race struct {
	d       *Dialer
	addrs   []netip.AddrPort // still to be tried
	running int              // attempts under way
	results chan result
}

// run starts attempts until one has won or all have lost, and waits for all that
// it started.
func (r *race) run(ctx context.Context) (winner net.Conn, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var lost []error
	r.start(ctx)
	next := time.NewTimer(Stagger)
	defer next.Stop()
	for r.running > 0 {
		select {
		case <-next.C:
			r.start(ctx)
			next.Reset(Stagger)
		case got := <-r.results:
			r.running--
			switch {
			case got.err != nil:
				lost = append(lost, got.err)
				if winner == nil && ctx.Err() == nil {
					r.start(ctx)
					next.Reset(Stagger)
				}
			case winner != nil:
				got.conn.Close()
			default:
				winner, r.addrs = got.conn, nil
				cancel() // the others give up at once
			}
		}
	}
	if winner == nil {
		return nil, errors.Join(lost...)
	}
	return winner, nil
}

// start begins the next attempt, if there is an address left.
func (r *race) start(ctx context.Context) {
	if len(r.addrs) == 0 {
		return
	}
	a := r.addrs[0]
	r.addrs = r.addrs[1:]
	r.running++
	go r.attempt(ctx, a)
}

func (r *race) attempt(ctx context.Context, a netip.AddrPort) {
	conn, err := r.d.attempt(ctx, a)
	r.results <- result{conn, err}
}
