package dnsfilter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
)

const (
	maxNegative = 3 * time.Hour   // RFC 2308, section 5
	failureTTL  = 2 * time.Second // RFC 9520, section 3.2: at least one second
	staleTTL    = 30              // seconds; RFC 8767, section 4
)

// A key is what is asked of the upstreams, and what their answers are remembered
// by. The class is always IN: nothing else is asked.
type key struct {
	name   policy.Name
	qtype  uint16
	do, cd bool // DNSSEC OK (RFC 3225) and Checking Disabled (RFC 4035, section 3.2.2)
}

func (k key) fqdn() string { return fqdn(k.name) }

// query returns what an upstream is asked. Nothing of the client's own query but
// DO and CD is in it; AD asks for AD in the answer (RFC 6840, section 5.7).
func (k key) query() *dns.Msg {
	q := &dns.Msg{Question: []dns.Question{{Name: k.fqdn(), Qtype: k.qtype, Qclass: dns.ClassINET}}}
	q.RecursionDesired, q.AuthenticatedData, q.CheckingDisabled = true, true, k.cd // each exchange has its own ID
	return q.SetEdns0(defaultEDNSSize, k.do)
}

// A reply is an answer that has not been fitted to a client yet. Whoever holds it
// may change it.
type reply struct {
	rcode     int
	answer    []dns.RR
	authority []dns.RR
	ad        bool        // Authentic Data (RFC 4035, section 3.2.3)
	local     bool        // all of it is the operator's own
	ede       uint16      // Extended DNS Error; 0: none
	why       string      // extra text for ede
	next      policy.Name // the aliases in answer lead here, where nothing has been asked yet; zero: answer is whole
	err       error       // what failed, with SERVFAIL
}

// extend appends what was found out about rep.next.
func (rep *reply) extend(more *reply) {
	rep.rcode, rep.authority, rep.next, rep.err = more.rcode, more.authority, more.next, more.err
	rep.answer = append(rep.answer, more.answer...)
	rep.ad = rep.ad && more.ad
	rep.local = rep.local && more.local
	if more.ede != 0 {
		rep.ede = more.ede
	}
}

// An entry is what upstreams said about a key. It never changes, but for packed, what
// used notes, and its place.
type entry struct {
	place
	wire    []byte // as a message that asks for the key, with TTLs within the cache's bounds
	expires time.Time
	packed  atomic.Pointer[packed] // made when the entry is first asked for again

	stored time.Time
	retry  time.Time   // a stale entry is not refreshed before; as place
	next   policy.Name // as in reply
	ede    uint16      // as in reply
	err    error       // the upstreams failed

	hits       atomic.Uint32 // up to prefetchHits
	refreshing atomic.Bool   // it is being asked for again
}

// newEntry returns what is kept of m, the upstreams' answer to k.
func newEntry(k key, m *dns.Msg, now time.Time, bounds Cache) *entry {
	if !conclusive(m.Rcode) {
		err := fmt.Errorf("upstreams answered %s", dns.RcodeToString[m.Rcode])
		return failedEntry(k, err, upstreamEDE(m), now)
	}
	kept := dns.Msg{Compress: true}
	kept.Response, kept.Rcode, kept.AuthenticatedData = true, m.Rcode, m.AuthenticatedData
	kept.SetQuestion(k.fqdn(), k.qtype)
	end, ok := scrub(&kept, m, k)
	if !ok {
		return failedEntry(k, errors.New("aliases form a loop or are too many"), dns.ExtendedErrorCodeNoReachableAuthority, now)
	}
	for _, rr := range kept.Answer { // as message has it
		if h := rr.Header(); strings.EqualFold(h.Name, k.fqdn()) {
			h.Name = kept.Question[0].Name
		}
	}
	ttl := clampTTLs(&kept, bounds)
	wire, err := kept.Pack()
	if err != nil {
		return failedEntry(k, fmt.Errorf("answer: %w", err), dns.ExtendedErrorCodeNetworkError, now)
	}
	if !rereadable(&kept) {
		if err := new(dns.Msg).Unpack(wire); err != nil {
			return failedEntry(k, fmt.Errorf("%w: %w", errMalformed, err), dns.ExtendedErrorCodeNetworkError, now)
		}
	}
	e := &entry{wire: bytes.Clone(wire), // without Pack's spare room
		stored: now, expires: now.Add(ttl)}
	if len(kept.Ns) == 0 && m.Rcode == dns.RcodeSuccess && !strings.EqualFold(end, k.fqdn()) && !holds(kept.Answer, end, k.qtype) {
		e.next, err = policy.ParseName(end)
		if err != nil {
			return failedEntry(k, fmt.Errorf("alias: %w", err), dns.ExtendedErrorCodeNoReachableAuthority, now)
		}
	}
	return e
}

// rereadable reports whether miekg/dns certainly reads what it packs of m. It also
// takes records whose data is missing or ends early, and what it packs of those need be
// no record of their type: an SOA without its names is not.
func rereadable(m *dns.Msg) bool {
	for _, section := range [][]dns.RR{m.Answer, m.Ns} {
		for _, rr := range section {
			switch rr := rr.(type) {
			case *dns.A, *dns.AAAA, *dns.CNAME: // whose data is whole or not there at all
			case *dns.SOA:
				if rr.Ns == "" || rr.Mbox == "" {
					return false
				}
			default:
				return false
			}
		}
	}
	return true
}

// failedEntry returns what is kept of a failure to answer k.
func failedEntry(k key, err error, ede uint16, now time.Time) *entry {
	m := new(dns.Msg).SetQuestion(k.fqdn(), k.qtype)
	m.Rcode = dns.RcodeServerFailure
	wire, perr := m.Pack()
	if perr != nil {
		panic(perr) // a Name always fits
	}
	return &entry{wire: wire, stored: now, expires: now.Add(failureTTL), ede: ede, err: err}
}

// failureEDE returns the Extended DNS Error for a failed exchange.
func failureEDE(err error) uint16 {
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() || errors.Is(err, context.DeadlineExceeded) {
		return dns.ExtendedErrorCodeNoReachableAuthority
	}
	return dns.ExtendedErrorCodeNetworkError
}

// upstreamEDE returns why an upstream answered that it failed: its own word if it gave one.
func upstreamEDE(m *dns.Msg) uint16 {
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if ede, ok := o.(*dns.EDNS0_EDE); ok && ede.InfoCode != 0 {
				return ede.InfoCode
			}
		}
	}
	return dns.ExtendedErrorCodeNoReachableAuthority
}

// reply returns a copy of e as of now, or as what stands in for a failed upstream.
func (e *entry) reply(now time.Time, stale bool) *reply {
	var m dns.Msg
	if err := m.Unpack(e.wire); err != nil {
		panic(err) // newEntry would not have kept it
	}
	rep := &reply{
		rcode: m.Rcode, answer: m.Answer, authority: m.Ns, ad: m.AuthenticatedData,
		ede: e.ede, next: e.next, err: e.err,
	}
	if stale {
		rep.stale()
		return rep
	}
	age := e.age(now)
	eachTTL(rep.answer, rep.authority, func(ttl uint32) uint32 { return ttl - min(age, ttl) })
	return rep
}

// stale marks rep as past its TTL (RFC 8767).
func (rep *reply) stale() {
	rep.ad, rep.ede = false, dns.ExtendedErrorCodeStaleAnswer
	if rep.rcode == dns.RcodeNameError {
		rep.ede = dns.ExtendedErrorCodeStaleNXDOMAINAnswer
	}
	eachTTL(rep.answer, rep.authority, func(uint32) uint32 { return staleTTL })
}

// eachTTL replaces every TTL by what f makes of it.
func eachTTL(answer, authority []dns.RR, f func(uint32) uint32) {
	for _, section := range [][]dns.RR{answer, authority} {
		for _, rr := range section {
			rr.Header().Ttl = f(rr.Header().Ttl)
		}
	}
}

// scrub copies to kept what m says about k: the records asked for, on the chain
// of aliases that begins at the name asked for, and of the authority section what
// negative answers and DNSSEC need. It returns where the chain ends; !ok if it does not.
func scrub(kept, m *dns.Msg, k key) (end string, ok bool) {
	owners, ok := chain(m.Answer, k)
	if !ok {
		return "", false
	}
	made := dnames(m.Answer, owners)
	for _, rr := range m.Answer {
		h := rr.Header()
		if h.Class != dns.ClassINET {
			continue
		}
		typ := h.Rrtype
		if sig, ok := rr.(*dns.RRSIG); ok && k.do && k.qtype != dns.TypeRRSIG {
			typ = sig.TypeCovered
		}
		on := slices.ContainsFunc(owners, func(o string) bool { return strings.EqualFold(o, h.Name) })
		switch typ {
		case k.qtype, dns.TypeCNAME:
		case dns.TypeDNAME: // owned by an ancestor (RFC 6672)
			on = slices.ContainsFunc(made, func(d *dns.DNAME) bool {
				return d == rr || h.Rrtype == dns.TypeRRSIG && strings.EqualFold(d.Hdr.Name, h.Name)
			})
		default:
			on = false
		}
		if on {
			kept.Answer = append(kept.Answer, rr)
		}
	}
	end = owners[len(owners)-1]
	negative := !holds(kept.Answer, end, k.qtype)
	for _, rr := range m.Ns {
		h := rr.Header()
		typ, keep := h.Rrtype, false
		if sig, ok := rr.(*dns.RRSIG); ok && k.do {
			typ, keep = sig.TypeCovered, true
		}
		switch typ {
		case dns.TypeSOA: // of a zone that end is in, to say how long it has nothing (RFC 2308, section 3)
			keep = negative && dns.IsSubDomain(h.Name, end)
		case dns.TypeNSEC, dns.TypeNSEC3:
			keep = k.do
		}
		if keep {
			kept.Ns = append(kept.Ns, rr)
		}
	}
	return end, true
}

// dnames returns the DNAMEs in answer that an alias of owners was made from (RFC
// 6672, section 3.1). Others say nothing about the question.
func dnames(answer []dns.RR, owners []string) (made []*dns.DNAME) {
	var aliases []*dns.CNAME
	for _, o := range owners {
		if c := aliasOf(answer, o); c != nil {
			aliases = append(aliases, c)
		}
	}
	for _, rr := range answer {
		d, ok := rr.(*dns.DNAME)
		if ok && slices.ContainsFunc(aliases, func(c *dns.CNAME) bool { return synthesizes(d, c) }) {
			made = append(made, d)
		}
	}
	return made
}

// synthesizes reports whether c is what d makes of c's owner.
func synthesizes(d *dns.DNAME, c *dns.CNAME) bool {
	labels := len(c.Hdr.Name) - len(d.Hdr.Name)
	return labels > 0 && dns.IsSubDomain(d.Hdr.Name, c.Hdr.Name) && strings.EqualFold(c.Target, c.Hdr.Name[:labels]+d.Target)
}

// aliasOf returns the first alias of name in answer, or nil.
func aliasOf(answer []dns.RR, name string) *dns.CNAME {
	for _, rr := range answer {
		if c, ok := rr.(*dns.CNAME); ok && strings.EqualFold(c.Hdr.Name, name) {
			return c
		}
	}
	return nil
}

// chain returns the names that the aliases in answer lead through, first k's own;
// !ok if they are too many.
func chain(answer []dns.RR, k key) (names []string, ok bool) {
	names = []string{k.fqdn()}
	if k.qtype == dns.TypeCNAME {
		return names, true
	}
	for range maxChain {
		c := aliasOf(answer, names[len(names)-1])
		if c == nil {
			return names, true
		}
		names = append(names, c.Target)
	}
	return nil, false
}

// holds reports whether name has a record of a type among rrs.
func holds(rrs []dns.RR, name string, qtype uint16) bool {
	return slices.ContainsFunc(rrs, func(rr dns.RR) bool {
		return rr.Header().Rrtype == qtype && strings.EqualFold(rr.Header().Name, name)
	})
}

// clampTTLs brings the TTLs of m within bounds and returns how long m may be
// kept: the shortest of them, for a negative answer what its SOA says (RFC 2308,
// section 5), and without either not at all.
func clampTTLs(m *dns.Msg, bounds Cache) time.Duration {
	shortest := uint32(1<<32 - 1)
	clamp := func(ttl uint32) uint32 {
		if ttl > 1<<31-1 { // RFC 2181, section 8
			ttl = 0
		}
		ttl = min(max(ttl, seconds(bounds.MinTTL)), seconds(bounds.MaxTTL))
		shortest = min(shortest, ttl)
		return ttl
	}
	said := false // how long there is nothing
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			said = true
			soa.Hdr.Ttl = min(soa.Hdr.Ttl, soa.Minttl, seconds(maxNegative))
		}
	}
	if len(m.Answer)+len(m.Ns) == 0 {
		return bounds.MinTTL
	}
	eachTTL(m.Answer, m.Ns, clamp)
	if m.Rcode != dns.RcodeSuccess && !said { // the TTLs of aliases are about these alone
		return bounds.MinTTL
	}
	return time.Duration(shortest) * time.Second
}

func seconds(d time.Duration) uint32 { return uint32(d / time.Second) }
