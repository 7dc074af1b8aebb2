package dnsfilter

import (
	"bytes"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"

	"sallyport/dnsfilter/wire"
)

// maxPackedAddrs bounds the decisions that one answer takes on the fast path.
const maxPackedAddrs = 32

// packedOverhead is what a packed takes, in bytes, beside its slices.
const packedOverhead = 200

// A packed is an entry ready to be sent: the bytes that message and Pack would make
// of it for a source whose addresses all pass, and what has to be known to tell. It
// holds no verdict, and what it holds is the same for every source.
type packed struct {
	message []byte       // within its TTL, without OPT; the question in lower case
	ttls    []uint16     // where in message
	addrs   []netip.Addr // to be decided for each source
	leads   bool         // to other names, which inspect decides
	ad      bool         // as in reply
	answers []string     // as in an Event
	alone   bool         // addrs are the answers, which stands for answers

	ttl  [4]uint16 // room for the first few, close by
	addr [2]netip.Addr
}

func newPacked() *packed { return new(packed).init() }

func (p *packed) init() *packed {
	p.ttls, p.addrs = p.ttl[:0], p.addr[:0]
	return p
}

// unpackable stands for entries that the fast path leaves alone.
var unpackable = new(packed)

// packedOf returns e, what is remembered of the key k on the wire, as it is sent, or
// unpackable.
func (s *Server) packedOf(k []byte, qtype uint16, e *entry) *packed {
	if p := e.packed.Load(); p != nil {
		return p
	}
	p := s.pack(k, qtype, e)
	if e.packed.CompareAndSwap(nil, p) && p != unpackable {
		s.resolver.cache.grow(k, e, p.size(e))
	}
	return e.packed.Load()
}

// pack makes of e what the slow path would.
func (s *Server) pack(k []byte, qtype uint16, e *entry) *packed {
	if e.err != nil || !e.next.IsZero() {
		return unpackable
	}
	if p, ok := packPlain(e.wire); ok {
		return p
	}
	p, rep := newPacked(), e.reply(e.stored, false)
	for _, rr := range rep.answer {
		if _, leads := leadsTo(rr); leads {
			p.leads = true
		}
	}
	emptied := s.strip(rep, qtype, func(a netip.Addr) bool {
		p.addrs = append(p.addrs, a)
		return true
	})
	if emptied || len(p.addrs) > maxPackedAddrs {
		return unpackable
	}
	name := string(wire.AppendText(nil, k)) + "."
	qu := &query{msg: new(dns.Msg).SetQuestion(name, qtype)}
	qu.q = qu.msg.Question[0]
	message, err := s.message(qu, rep).Pack()
	if err != nil || !wire.Records(message, func(r wire.Record) { p.ttls = append(p.ttls, uint16(r.TTL)) }) {
		return unpackable
	}
	p.message, p.ad, p.answers = bytes.Clone(message), rep.ad, summary(rep.answer)
	return p
}

// packPlain is pack for a message that the slow path would pack just as newEntry did:
// with addresses and aliases, in which nothing changes as long as they pass, and the
// SOA of negative answers.
func packPlain(message []byte) (*packed, bool) {
	p, plain := newPacked(), true
	p.message, p.ad = message, message[3]&0x20 != 0
	ok := wire.Records(message, func(r wire.Record) {
		data := message[r.Data:r.End]
		switch {
		case r.Answer && (r.Type == dns.TypeA || r.Type == dns.TypeAAAA):
			a, ok := netip.AddrFromSlice(data)
			plain = plain && ok
			p.addrs = append(p.addrs, a.Unmap())
			p.answer(a.Unmap().String())
		case r.Answer && r.Type == dns.TypeCNAME:
			target, _, err := dns.UnpackDomainName(message, r.Data)
			plain = plain && err == nil
			p.leads = true // or to itself, which is seen on the slow path
			p.answer(strings.TrimSuffix(target, "."))
		case r.Answer || r.Type != dns.TypeSOA:
			plain = false
		}
		p.ttls = append(p.ttls, uint16(r.TTL))
	})
	return p, ok && plain && len(p.addrs) <= maxPackedAddrs
}

// answer adds to what an Event says.
func (p *packed) answer(what string) {
	if len(p.answers) < maxAnswers {
		p.answers = append(p.answers, what)
	}
}

// size is what p takes beside e, in bytes.
func (p *packed) size(e *entry) int64 {
	n := packedOverhead + 2*cap(p.ttls) + 24*cap(p.addrs)
	if &p.message[0] != &e.wire[0] {
		n += cap(p.message)
	}
	for _, a := range p.answers {
		n += 16 + len(a)
	}
	return int64(n)
}

// age returns how many seconds of e's TTLs are over.
func (e *entry) age(now time.Time) uint32 {
	return uint32(max(now.Sub(e.stored), 0) / time.Second)
}
