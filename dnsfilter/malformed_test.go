package dnsfilter

import (
	"context"
	"encoding/binary"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
)

// Where the header of a message counts records.
const (
	answerCount     = 6
	authorityCount  = 8
	additionalCount = 10
)

// withRecord appends to p, a message, a record of the name asked for, and counts it at
// count.
func withRecord(p []byte, count int, qtype uint16, rdata ...byte) []byte {
	binary.BigEndian.PutUint16(p[count:], binary.BigEndian.Uint16(p[count:])+1)
	p = append(p, 0xC0, headerSize, byte(qtype>>8), byte(qtype), 0, dns.ClassINET, 0, 0, 0, 60, 0, byte(len(rdata)))
	return append(p, rdata...)
}

// withCount returns m with a record counted, at count, that is not there. Its ID is 4711.
func withCount(t testing.TB, m *dns.Msg, count int) []byte {
	t.Helper()
	m.Id = 4711
	p, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	p[count+1]++
	return p
}

// TestT56AnswersCutBetweenRecords: an answer that ends before the last of the records it
// counts is malformed, and not one without them. The next upstream is asked.
func TestT56AnswersCutBetweenRecords(t *testing.T) {
	for _, scheme := range []string{"udp://", "tcp://"} {
		for _, count := range []int{answerCount, authorityCount, additionalCount} {
			cut, whole := newOrigin(t), newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1")
			cut.set(func(w dns.ResponseWriter, q, _ *dns.Msg) {
				p, err := new(dns.Msg).SetReply(q).Pack()
				if err != nil {
					t.Error(err)
				}
				p[count+1] = 1
				w.Write(p)
			})
			r := newResolver(t, Config{Upstreams: []string{scheme + cut.addr, scheme + whole.addr}}, nil)
			patient(r)
			if rep := get(t, r, "api.ok.test", dns.TypeA); rep.err != nil || len(rep.answer) != 1 {
				t.Errorf("%s, count at %d: reply = %+v", scheme, count, rep)
			}
			if n := r.Stats().UpstreamFailures; n != 1 {
				t.Errorf("%s, count at %d: %d failures, want 1", scheme, count, n)
			}
		}
	}
}

// TestT56RecordsWithoutData: miekg/dns reads an SOA whose data ends early, and packs of it
// what it cannot read. That is a failed upstream, no end of
// the program.
func TestT56RecordsWithoutData(t *testing.T) {
	for _, tt := range []struct {
		name  string
		rdata []byte
	}{
		{"none at all", nil},
		{"one name of two", []byte{0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := newOrigin(t)
			o.set(func(w dns.ResponseWriter, q, _ *dns.Msg) {
				p, err := new(dns.Msg).SetReply(q).Pack()
				if err != nil {
					t.Error(err)
				}
				w.Write(withRecord(p, authorityCount, dns.TypeSOA, tt.rdata...))
			})
			b := start(t, Config{Decider: people, Cache: Cache{Size: mib}}, o, patient)
			if addrs, err := b.resolver.LookupNetIP(context.Background(), "ip4", "api.ok.test"); err == nil {
				t.Errorf("LookupNetIP() = %v", addrs)
			}
			for _, network := range []string{"udp", "tcp"} {
				wantRcode(t, b.ask(t, alice, network, withEDNS(question("api.ok.test.", dns.TypeA))), dns.RcodeServerFailure, dns.ExtendedErrorCodeNetworkError)
			}
		})
	}
}

// FuzzUpstreamAnswer has whatever an upstream says remembered, and answered again both
// ways.
func FuzzUpstreamAnswer(f *testing.F) {
	q := question("api.ok.test.", dns.TypeA)
	for _, line := range []string{"api.ok.test. 60 IN A 192.0.2.1", "api.ok.test. 60 IN CNAME b.test.", "test. 60 IN DNAME new.test.",
		"api.ok.test. 60 IN HTTPS 1 . alpn=h2,h3 ipv4hint=192.0.2.1 ech=AEX+DQ==", "api.ok.test. 60 IN RRSIG A 13 3 60 20300101000000 20200101000000 1 test. AAAA"} {
		m := new(dns.Msg).SetReply(q)
		m.Answer = parseRRs(f, []string{line})
		m.Ns = parseRRs(f, []string{soa})
		p, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p, m.Answer[0].Header().Rrtype, true)
		f.Add(withRecord(p, answerCount, dns.TypeHTTPS), dns.TypeHTTPS, false)
		f.Add(withRecord(p, authorityCount, dns.TypeSOA, 0), dns.TypeA, false)
	}
	l := newLab(f, Config{})
	f.Fuzz(func(t *testing.T, p []byte, qtype uint16, do bool) {
		m := new(dns.Msg)
		if qtype == 0 || m.Unpack(p) != nil {
			return
		}
		k, now := key{name: policy.MustName("api.ok.test"), qtype: qtype, do: do}, l.clock.now()
		e := newEntry(k, m, now, Cache{MaxTTL: time.Hour})
		e.reply(now.Add(time.Minute), false)
		e.reply(now, true)
		if packed := l.s.pack(k.appendWire(nil), qtype, e); packed != unpackable && new(dns.Msg).Unpack(packed.message) != nil {
			t.Errorf("%x is kept as %x", p, packed.message)
		}
	})
}

// An answer that is cut short is malformed over TCP, whatever its TC bit says.
func TestTruncationIsForUDP(t *testing.T) {
	o := newOrigin(t, "a.test. 60 IN A 192.0.2.1", "a.test. 60 IN A 192.0.2.2")
	o.set(func(w dns.ResponseWriter, _, m *dns.Msg) {
		m.Truncated, m.Extra = true, nil
		p, err := m.Pack()
		if err != nil {
			t.Error(err)
		}
		w.Write(p[:len(p)-5])
	})
	r := newResolver(t, Config{Upstreams: []string{"tcp://" + o.addr}}, nil)
	patient(r)
	if rep := get(t, r, "a.test", dns.TypeA); rep.err == nil || !strings.Contains(rep.err.Error(), "malformed answer") {
		t.Errorf("reply = %+v", rep)
	}
}

// How long there is nothing says the SOA, not the TTL of an alias that leads there.
func TestNXDOMAINWithoutSOAIsNotKept(t *testing.T) {
	now := newClock()
	o := newOrigin(t)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		m.Rcode, m.Answer = dns.RcodeNameError, parseRRs(t, []string{"www.test. 3600 IN CNAME gone.test."})
		w.WriteMsg(m)
	})
	r := newResolver(t, Config{Now: now.now, Cache: Cache{Size: mib}}, o)
	patient(r)
	for range 2 {
		if rep := get(t, r, "www.test", dns.TypeA); rep.rcode != dns.RcodeNameError || len(rep.answer) != 1 {
			t.Errorf("reply = %+v", rep)
		}
	}
	if n := o.packets(); n != 2 {
		t.Errorf("%d packets, want 2: the first answer is not kept", n)
	}
}
