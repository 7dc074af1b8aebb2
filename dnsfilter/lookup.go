package dnsfilter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
)

const resolutionDelay = 50 * time.Millisecond // for the other family's addresses (RFC 8305, section 3)

// LookupNetIP returns the addresses of host, those of IPv6 first, as
// net.Resolver's method of that name does. The network is ip, ip4 or ip6. With ip
// both families are asked for at once; after the first that has addresses the other has
// 50 ms (RFC 8305, section 3). Host must be a name: addresses and what is no
// [policy.Name] are not found. Names are taken as they are, with or without the final
// dot: no search list. No decision is taken: the caller decides the name before,
// and each address after.
//
// An error is a *net.DNSError: IsNotFound if there are no addresses, IsTimeout if
// the upstreams or ctx ran out of time.
func (r *Resolver) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	name, err := policy.ParseName(host)
	if err != nil {
		return nil, &net.DNSError{Err: err.Error(), Name: host, IsNotFound: true}
	}
	var qtypes []uint16
	switch network {
	case "ip":
		qtypes = []uint16{dns.TypeAAAA, dns.TypeA}
	case "ip4":
		qtypes = []uint16{dns.TypeA}
	case "ip6":
		qtypes = []uint16{dns.TypeAAAA}
	default:
		return nil, &net.DNSError{Err: fmt.Sprintf("network %q is none of ip, ip4, ip6", network), Name: host}
	}
	addrs, none := r.families(ctx, name, qtypes)
	if none != nil {
		none.Name = host
		return nil, none
	}
	return addrs, nil
}

// Known returns the addresses of name, those of IPv6 first, if LookupNetIP would find
// them without asking anybody: in the hosts file, the records, or fresh in the cache. Otherwise nil.
// It never blocks.
func (r *Resolver) Known(name policy.Name) []netip.Addr {
	var found [2]family
	for i, t := range []uint16{dns.TypeAAAA, dns.TypeA} {
		rep, _, _ := r.known(key{name: name, qtype: t})
		if rep == nil || !rep.next.IsZero() {
			return nil
		}
		found[i] = addresses(i, rep, nil)
	}
	addrs, _ := merge(found[:])
	return addrs
}

// family is what was found out about the addresses of one family.
type family struct {
	i     int // which of those asked for
	addrs []netip.Addr
	err   *net.DNSError
}

// families returns the addresses of name of each type, in that order.
func (r *Resolver) families(ctx context.Context, name policy.Name, qtypes []uint16) ([]netip.Addr, *net.DNSError) {
	found := make([]family, len(qtypes))
	unknown := 0
	for i, t := range qtypes {
		if rep, _, _ := r.known(key{name: name, qtype: t}); rep != nil && rep.next.IsZero() {
			found[i] = addresses(i, rep, nil)
		} else {
			found[i].err = errUnknown
			unknown++
		}
	}
	if unknown == 0 { // as for nearly every connection
		return merge(found)
	}
	return r.ask(ctx, name, qtypes, found)
}

// errUnknown marks a family that has to be asked for.
var errUnknown = &net.DNSError{}

// ask asks for the families of found that are not known, all at once.
func (r *Resolver) ask(ctx context.Context, name policy.Name, qtypes []uint16, found []family) ([]netip.Addr, *net.DNSError) {
	ctx, cancel := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer asking.Wait() // not for long: everything returns when ctx is cancelled
	defer cancel()
	results := make(chan family, len(qtypes))
	for i, t := range qtypes {
		if found[i].err != errUnknown {
			results <- found[i]
			continue
		}
		found[i].err = nil
		asking.Go(func() {
			rep, err := r.resolve(ctx, key{name: name, qtype: t}, nil)
			results <- addresses(i, rep, err)
		})
	}
	var delay <-chan time.Time
	for range qtypes {
		select {
		case f := <-results:
			found[f.i] = f
			if delay == nil && len(f.addrs) > 0 && len(results) == 0 {
				t := time.NewTimer(r.timing.delay)
				defer t.Stop()
				delay = t.C
			}
		case <-delay:
			return merge(found)
		}
	}
	return merge(found)
}

// addresses turns the answer to one question into what a caller of LookupNetIP is told.
func addresses(i int, rep *reply, err error) family {
	f := family{i: i}
	if err == nil {
		err = rep.err
	}
	if err != nil {
		var ne net.Error
		f.err = &net.DNSError{UnwrapErr: err, Err: err.Error(), IsTemporary: true,
			IsTimeout: errors.As(err, &ne) && ne.Timeout()}
		return f
	}
	for _, rr := range rep.answer {
		if a, ok := addressOf(rr); ok && !slices.Contains(f.addrs, a) {
			f.addrs = append(f.addrs, a)
		}
	}
	if len(f.addrs) == 0 {
		f.err = &net.DNSError{Err: "no such host", IsNotFound: true}
	}
	return f
}

// merge returns the addresses found, or why there are none: a failure rather than
// the absence of one family's.
func merge(found []family) (addrs []netip.Addr, err *net.DNSError) {
	for _, f := range found {
		addrs = append(addrs, f.addrs...)
		if f.err != nil && (err == nil || err.IsNotFound) {
			err = f.err
		}
	}
	if len(addrs) > 0 {
		return addrs, nil
	}
	return nil, err
}

// addressOf returns the address in an A or AAAA record, never IPv4-mapped.
func addressOf(rr dns.RR) (netip.Addr, bool) {
	var a netip.Addr
	switch rr := rr.(type) {
	case *dns.A:
		a, _ = netip.AddrFromSlice(rr.A)
	case *dns.AAAA:
		a, _ = netip.AddrFromSlice(rr.AAAA)
	}
	return a.Unmap(), a.IsValid()
}
