package dnsfilter

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"syscall"
	"time"

	"github.com/miekg/dns"

	"sallyport/dnsfilter/wire"
)

// A plain query that nothing is known of goes to the first upstream over UDP without a
// goroutine that waits: who reads the clients' packets sends it, and who reads the
// upstream's socket answers the clients. Whatever is not as it nearly always is
// (truncated, no answer, a failure, aliases) is left to pool.exchange, which takes what
// has been tried into account, and to Server.settle.

// plainKnown reports whether u is asked without EDNS for the time being.
func (p *pool) plainKnown(u *upstream) bool {
	left := time.Duration(u.plain.Load() - p.now().UnixNano())
	return left > 0 && left <= plainFor // more is left only if the clock was set back
}

// noRoom reports whether err says that the system had no room for what was to be sent,
// which forward does not wait for.
func noRoom(err error) bool { return errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.ENOBUFS) }

// ground has f go on in a goroutine.
func (r *Resolver) ground(f *flight, tried *attempt) {
	r.mu.Lock()
	closed := r.closed
	if !closed {
		r.flying.Go(func() { r.fly(f, f.begun, tried) })
	}
	r.mu.Unlock()
	if closed {
		e := failedEntry(f.k, errClosed, dns.ExtendedErrorCodeNotReady, r.cfg.Now())
		deliver(r.land(f, e), e)
	}
}

// newFlightWaiter returns the waiter for f's question to u, one of p. Its random
// numbers, but for the choice of a socket, come from random, which must be fit for keys.
func newFlightWaiter(f *flight, p *pool, u *upstream, exact bool, random *rand.ChaCha8) *waiter {
	const recursion, authentic, checking = 1 << 8, 1 << 5, 1 << 4
	w := waiterPool.Get().(*waiter)
	w.flight, w.pool, w.up, w.exact = f, p, u, exact
	w.asked = f.begun
	w.due = w.asked.Add(min(p.timing.try, p.timing.total))
	be, bits, flags := binary.BigEndian, uint16(recursion|authentic), uint32(0)
	if f.k.cd {
		bits |= checking
	}
	if f.k.do {
		flags = 1 << 15
	}
	b := be.AppendUint16(append(w.buf[:0], 0, 0), bits) // as pack does
	b = be.AppendUint64(b, 1<<48|1)
	b = wire.AppendName(b, f.k.name.String())
	w.name = len(b)
	b = be.AppendUint16(be.AppendUint16(b, f.k.qtype), dns.ClassINET)
	b = be.AppendUint16(append(b, 0), dns.TypeOPT)
	b = be.AppendUint32(be.AppendUint16(b, defaultEDNSSize), flags)
	w.packet = be.AppendUint16(b, 0)
	be.PutUint64(w.random[:], random.Uint64())
	if exact {
		for i := 8; i+8 <= len(w.random); i += 8 {
			be.PutUint64(w.random[i:], random.Uint64())
		}
		randomCase(w.packet[headerSize:w.name], w.random[3:])
	}
	return w
}

// failed ends w, which nobody waits for, with err: its flight goes on with what else
// there is to try.
func (w *waiter) failed(err error) {
	f, p, u, took := w.flight, w.pool, w.up, time.Since(w.asked)
	w.free()
	p.judge(f.r.life, u, err, took)
	f.r.ground(f, &attempt{u: u, err: err})
}

// answered ends w, which nobody waits for, with the packet p that answers it and came at the
// time came; now is that of Config.Now. It returns the clients to answer, and with what; nil if
// the flight goes on.
func (w *waiter) answered(p []byte, came, now time.Time) (*udpQuery, *entry) {
	defer w.free()
	f, u := w.flight, w.up
	r := f.r
	if p[2]&truncated != 0 {
		r.ground(f, &attempt{u: u, truncated: true})
		return nil, nil
	}
	e, ok := plainEntry(f.k, p, w.name+4, w.pool.zone == "", now, r.cfg.Cache)
	if !ok {
		m, err := w.unpack(p)
		if err == nil && m.Rcode == dns.RcodeFormatError && m.IsEdns0() == nil {
			r.ground(f, nil) // from the beginning: askPlain knows what to do
			return nil, nil
		}
		if err != nil || !conclusive(m.Rcode) {
			w.pool.judge(r.life, u, err, came.Sub(w.asked))
			r.ground(f, &attempt{u: u, m: m, err: err})
			return nil, nil
		}
		if w.pool.zone != "" {
			m.AuthenticatedData = false // as fly has it
		}
		e = newEntry(f.k, m, now, r.cfg.Cache)
	}
	w.pool.answered(u, now, came.Sub(w.asked))
	r.cache.put(f.k, e, now) // before the flight ends, as in fly
	return r.land(f, e), e
}

// plainEntry is newEntry for a message that holds addresses of the name asked for, and
// nothing else that is kept: no alias, no signature. The question ends at end. It returns
// false for any other message, and whenever newEntry might not take it.
func plainEntry(k key, msg []byte, end int, vouched bool, now time.Time, bounds Cache) (*entry, bool) {
	const rcode, authentic = 0x0F, 0x20
	be := binary.BigEndian
	size := addressSize(k.qtype)
	if size == 0 || len(msg) < end || msg[3]&rcode != dns.RcodeSuccess || be.Uint16(msg[4:]) != 1 {
		return nil, false
	}
	answers, others := int(be.Uint16(msg[6:])), int(be.Uint16(msg[8:]))
	at := end
	for range answers {
		if at+12+size > len(msg) || be.Uint16(msg[at:]) != 0xC000|headerSize || be.Uint16(msg[at+2:]) != k.qtype ||
			be.Uint16(msg[at+4:]) != dns.ClassINET || int(be.Uint16(msg[at+10:])) != size {
			return nil, false
		}
		at += 12 + size
	}
	if answers == 0 || !droppable(msg, at, others, int(be.Uint16(msg[10:]))) {
		return nil, false
	}
	one := new(struct { // as one allocation
		entry
		packed
	})
	e, ready := &one.entry, one.packed.init()
	packable := answers <= maxPackedAddrs // or what ready holds would be kept without being counted
	kept := make([]byte, at)
	copy(kept, msg)
	kept[0], kept[1], kept[2], kept[3] = 0, 0, 0x81, 0
	if vouched {
		kept[3] = msg[3] & authentic
	}
	clear(kept[8:headerSize])
	lowered(kept[headerSize : end-4])
	shortest := uint32(1<<32 - 1)
	for i := end; i < at; i += 12 + size {
		ttl := be.Uint32(kept[i+6:]) // as clampTTLs does
		if ttl > 1<<31-1 {
			ttl = 0
		}
		ttl = min(max(ttl, seconds(bounds.MinTTL)), seconds(bounds.MaxTTL))
		shortest = min(shortest, ttl)
		be.PutUint32(kept[i+6:], ttl)
		if packable {
			ready.ttls = append(ready.ttls, uint16(i+6))
			a, _ := netip.AddrFromSlice(kept[i+12 : i+12+size])
			ready.addrs = append(ready.addrs, a.Unmap())
		}
	}
	e.wire, e.stored, e.expires = kept, now, now.Add(time.Duration(shortest)*time.Second)
	if packable { // as packPlain does
		ready.message, ready.ad, ready.alone = kept, kept[3]&authentic != 0, true
		e.packed.Store(ready)
	}
	return e, true
}

// addressSize returns how many bytes an address has that a record of a type holds; 0
// if it holds none.
func addressSize(qtype uint16) int {
	switch qtype {
	case dns.TypeA:
		return 4
	case dns.TypeAAAA:
		return 16
	}
	return 0
}

// droppable reports whether what follows at in msg, records of the authority section and
// then additional ones, can be read up to its end and holds nothing that newEntry would keep
// beside addresses, or look at: name servers, their addresses, an OPT record.
func droppable(msg []byte, at, authority, additional int) bool {
	be, opts := binary.BigEndian, 0
	for i := range authority + additional { // each takes at least 11 bytes, or the loop ends
		owner := at
		if at = wire.EndOfName(msg, at); at == 0 || at+10 > len(msg) {
			return false
		}
		typ, data := be.Uint16(msg[at:]), at+10
		end := data + int(be.Uint16(msg[at+8:]))
		if end > len(msg) {
			return false
		}
		switch size := end - data; {
		case i < authority && typ == dns.TypeNS:
			if wire.EndOfName(msg[:end], data) != end {
				return false
			}
		case i >= authority && typ == dns.TypeOPT:
			if opts++; opts > 1 || at != owner+1 || size != 0 || be.Uint16(msg[at+4:]) != 0 { // version and the rest of the RCODE
				return false
			}
		case i < authority || size == 0 || size != addressSize(typ):
			return false
		}
		at = end
	}
	return at == len(msg)
}
