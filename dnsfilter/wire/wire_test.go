package wire

import (
	"bytes"
	"net"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func pack(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	p, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func ask(name string, qtype uint16, change ...func(*dns.Msg)) *dns.Msg {
	m := new(dns.Msg).SetQuestion(name, qtype)
	for _, f := range change {
		f(m)
	}
	return m
}

func edns(size uint16, do bool) func(*dns.Msg) {
	return func(m *dns.Msg) { m.SetEdns0(size, do) }
}

// edit returns a packet with the bytes at an offset replaced.
func edit(p []byte, at int, b ...byte) []byte {
	p = bytes.Clone(p)
	copy(p[at:], b)
	return p
}

// options returns a query with options of a code and a length each.
func options(t testing.TB, codeAndLength ...int) []byte {
	return pack(t, ask("Api.Ok.test.", dns.TypeA, edns(1400, true), func(m *dns.Msg) {
		for i := 0; i < len(codeAndLength); i += 2 {
			m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_LOCAL{Code: uint16(codeAndLength[i]), Data: make([]byte, codeAndLength[i+1])})
		}
	}))
}

func TestOptions(t *testing.T) {
	var q Query
	if !q.Parse(options(t, 12, 5, 10, 24, 10, 8)) || !q.Padded || len(q.Cookie) != 24 {
		t.Errorf("query = %+v", q)
	}
	if !q.Parse(options(t)) || q.Padded || q.Cookie != nil {
		t.Errorf("what the last query had stays: %+v", q)
	}
	for _, size := range []int{12, 200, PadBlock - 5, PadBlock - 4, PadBlock - 3, PadBlock, 2 * PadBlock} {
		n := Padding(size, 65535)
		if n < 0 || n >= PadBlock || (size+4+n)%PadBlock != 0 {
			t.Errorf("Padding(%d) = %d", size, n)
		}
	}
	for size, want := range map[int]int{65535: -4, 65531: 0, 65530: 1, 65521: 10} {
		if n := Padding(size, 65535); n != want {
			t.Errorf("Padding(%d) = %d, want %d", size, n, want)
		}
	}
	m := ask("ok.test.", dns.TypeA, edns(1400, true))
	bare := pack(t, m)
	m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"}, &dns.EDNS0_PADDING{Padding: make([]byte, Padding(len(bare)+12, 65535))}}
	got := AppendOption(append([]byte("before"), bare...), 6+len(bare)-OPTSize, OptionCookie, []byte{1, 2, 3, 4, 5, 6, 7, 8})
	got = AppendPadding(got, 6, 6+len(bare)-OPTSize, 65535)
	if want := append([]byte("before"), pack(t, m)...); !bytes.Equal(got, want) || len(got) != 6+PadBlock {
		t.Errorf("with options\n%x, want\n%x", got, want)
	}
}

func TestParse(t *testing.T) {
	plain := pack(t, ask("Api.Ok.test.", dns.TypeA))
	withOPT := pack(t, ask("Api.Ok.test.", dns.TypeA, edns(1400, true)))
	opt := len(plain)
	longest := strings.Repeat(strings.Repeat("a", 62)+".", 4) // 253 bytes on the wire with the root
	tests := []struct {
		name   string
		packet []byte
		plain  bool
	}{
		{"plain", plain, true},
		{"EDNS", withOPT, true},
		{"root", pack(t, ask(".", dns.TypeNS)), false},
		{"name of an address", pack(t, ask("1.2.3.4.", dns.TypeA)), false},
		{"longest", pack(t, ask(longest+"b.", dns.TypeA)), true},
		{"meaningless bits", edit(plain, 2, 0x07, 0xEF), true},
		{"EDNS with an extended RCODE", edit(withOPT, opt+5, 1), true},
		{"empty", nil, false},
		{"header", plain[:12], false},
		{"cut in the name", plain[:15], false},
		{"cut before the class", plain[:len(plain)-2], false},
		{"cut in the OPT", withOPT[:len(withOPT)-1], false},
		{"bytes at the end", append(bytes.Clone(plain), 0), false},
		{"response", edit(plain, 2, 0x80), false},
		{"opcode", edit(plain, 2, 0x08), false},
		{"no question", edit(plain, 5, 0), false},
		{"256 questions", edit(plain, 4, 1, 0), false},
		{"two questions", edit(plain, 5, 2), false},
		{"answer", edit(plain, 7, 1), false},
		{"authority", edit(plain, 9, 1), false},
		{"additional that is not there", edit(plain, 11, 1), false},
		{"two additional", edit(withOPT, 11, 2), false},
		{"256 additional", edit(withOPT, 10, 1), false},
		{"class CH", edit(plain, opt-1, 3), false},
		{"type 0", edit(plain, opt-3, 0), false},
		{"compression", append(edit(plain, 12, 0xC0, 12)[:14], 0, 1, 0, 1), false},
		{"label of 64", edit(plain, 12, 64), false},
		{"EDNS version 1", edit(withOPT, opt+6, 1), false},
		{"OPT below a name", append(append(bytes.Clone(withOPT[:opt]), 1, 'a'), withOPT[opt:]...), false},
		{"TSIG", edit(withOPT, opt+1, 0, 250), false},
		{"cookie", options(t, 10, 8), true},
		{"cookie with the server's part", options(t, 10, 16), true},
		{"long cookie", options(t, 10, 40), true},
		{"short cookie", options(t, 10, 7), false},
		{"cookie with a short server's part", options(t, 10, 15), false},
		{"too long a cookie", options(t, 10, 41), false},
		{"two cookies", options(t, 10, 8, 10, 1), true},
		{"padding", options(t, 12, 300), true},
		{"unknown options", options(t, 20, 0, 65001, 9, 3, 0), true},
		{"client subnet", options(t, 8, 8), false},
		{"keepalive", options(t, 11, 0), false},
		{"option cut short", options(t, 10, 8)[:len(options(t, 10, 8))-1], false},
		{"option longer than the record", edit(options(t, 20, 4), opt+14, 5), false},
		{"half an option", append(edit(options(t, 20, 0), opt+10, 6), 0, 20), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := new(Query).Parse(tt.packet); got != tt.plain {
				t.Errorf("Parse() = %v, want %v", got, tt.plain)
			}
		})
	}
	var q Query
	q.Parse(edit(withOPT, 3, 0x30))
	if q.Type != dns.TypeA || !q.EDNS || q.UDPSize != 1400 || !q.DO || !q.CD || !q.AD {
		t.Errorf("query = %+v", q)
	}
	if got := string(q.Name.Bytes()); got != "\x03api\x02ok\x04test\x00" {
		t.Errorf("Name() = %q", got)
	}
	if got := string(q.Key()); got != "\x03api\x02ok\x04test\x00\x00\x01\x03" {
		t.Errorf("Key() = %q", got)
	}
	if got := string(AppendKey(AppendName(nil, "api.ok.test"), 1, true, true)); got != string(q.Key()) {
		t.Errorf("the key made of a text = %q", got)
	}
	if got := string(AppendText(nil, withOPT[12:])); got != "Api.Ok.test" {
		t.Errorf("AppendText() = %q", got)
	}
}

func TestResponses(t *testing.T) {
	q := ask("wWw.ok.test.", dns.TypeA, edns(1232, true))
	q.CheckingDisabled = true
	packet := pack(t, q)
	var got Query
	if !got.Parse(packet) {
		t.Fatal("not plain")
	}
	reply := func() *dns.Msg {
		m := new(dns.Msg)
		m.Id, m.Response, m.RecursionDesired, m.RecursionAvailable, m.CheckingDisabled, m.Compress = q.Id, true, true, true, true, true
		m.Question = q.Question
		return m
	}
	opt := func(m *dns.Msg, options ...dns.EDNS0) *dns.Msg {
		m.SetEdns0(1400, true)
		m.IsEdns0().Option = options
		return m
	}
	check := func(name string, p []byte, want *dns.Msg) {
		t.Helper()
		if w := pack(t, want); !bytes.Equal(p, append([]byte("before"), w...)) {
			t.Errorf("%s:\ngot  %x\nwant %x", name, p[6:], w)
		}
	}
	before := []byte("before")
	refused := reply()
	refused.Rcode = dns.RcodeRefused
	check("refused", got.AppendHeader(before, dns.RcodeRefused), refused)
	check("refused with EDE", got.AppendOPT(got.AppendHeader(before, dns.RcodeRefused), 6, 1400, 15, "not_listed"),
		opt(refused, &dns.EDNS0_EDE{InfoCode: 15, ExtraText: "not_listed"}))

	sunk := reply()
	a := &dns.A{Hdr: dns.RR_Header{Name: "wWw.ok.test.", Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 10}, A: net.IPv4zero}
	sunk.Answer = []dns.RR{a}
	check("sinkhole", got.AppendOPT(got.AppendAddress(got.AppendHeader(before, 0), 6, make([]byte, 4), 10), 6, 1400, 0, ""), opt(sunk))

	stored := new(dns.Msg).SetQuestion("www.ok.test.", dns.TypeA)
	stored.Response, stored.Compress, stored.Rcode, stored.Authoritative = true, true, dns.RcodeNameError, true
	alias := func(owner string, ttl uint32) []dns.RR {
		h := dns.RR_Header{Name: owner, Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: ttl}
		a := &dns.A{Hdr: dns.RR_Header{Name: "edge.test.", Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ttl - 50}, A: net.IPv4(192, 0, 2, 1)}
		return []dns.RR{&dns.CNAME{Hdr: h, Target: "edge.test."}, a}
	}
	stored.Answer = alias("www.ok.test.", 60)
	message := pack(t, stored)
	var ttls []uint16
	var seen []Record
	ok := Records(message, func(r Record) {
		ttls, seen = append(ttls, uint16(r.TTL)), append(seen, r)
	})
	if !ok || len(seen) != 2 || seen[0].Type != dns.TypeCNAME || seen[1].Type != dns.TypeA || !seen[1].Answer ||
		!bytes.Equal(message[seen[1].Data:seen[1].End], []byte{192, 0, 2, 1}) {
		t.Fatalf("Records() = %+v, %v", seen, ok)
	}
	whole := reply()
	whole.Rcode, whole.AuthenticatedData = dns.RcodeNameError, true
	whole.Answer = alias("wWw.ok.test.", 60)
	p := got.AppendAnswer(before, message, true)
	check("answer", p, whole)
	Age(p[6:], ttls, 7)
	whole.Answer[0].Header().Ttl, whole.Answer[1].Header().Ttl = 53, 3
	check("aged", p, whole)
	Age(p[6:], ttls, 10)
	whole.Answer[0].Header().Ttl, whole.Answer[1].Header().Ttl = 43, 0
	check("aged past the end", p, whole)
	whole.Answer, whole.Truncated = nil, true
	check("truncated", got.AppendOPT(got.AppendTruncated(before, message, true), 6, 1400, 0, ""), opt(whole))
}

func TestRecordsOfNoMessage(t *testing.T) {
	m := ask("ok.test.", dns.TypeA)
	m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "ok.test.", Rrtype: dns.TypeA, Class: 1}, A: net.IPv4zero}}
	p := pack(t, m)
	ignore := func(Record) {}
	if ok := Records(p, ignore); !ok {
		t.Fatal("a message is none")
	}
	for n := range p {
		if ok := Records(p[:n], ignore); ok {
			t.Errorf("the first %d bytes of a message are one", n)
		}
	}
	for _, bad := range [][]byte{append(bytes.Clone(p), 0), edit(p, 5, 2), edit(p, 7, 2), edit(p, 12, 64)} {
		if ok := Records(bad, ignore); ok {
			t.Errorf("%x is a message", bad)
		}
	}
}

func TestAllocations(t *testing.T) {
	packet := pack(t, ask("Api.Ok.test.", dns.TypeA, edns(1400, true)))
	var q Query
	var buf [512]byte
	n := testing.AllocsPerRun(100, func() {
		if !q.Parse(packet) || len(q.Key()) == 0 {
			t.Fatal("not plain")
		}
		q.AppendOPT(q.AppendHeader(buf[:0], 5), 0, 1232, 15, "not_listed")
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzParse holds Parse against miekg/dns: what is plain is what Parse says it is.
func FuzzParse(f *testing.F) {
	for _, m := range []*dns.Msg{ask("Api.Ok.test.", dns.TypeA), ask(".", dns.TypeNS, edns(4096, true)), ask(`a\000b.test.`, dns.TypeTXT, edns(0, false))} {
		p := pack(f, m)
		f.Add(p)
		f.Add(edit(p, 3, 0x30))
		f.Add(p[:len(p)-1])
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		var q Query
		if !q.Parse(packet) {
			return
		}
		m := new(dns.Msg)
		if err := m.Unpack(packet); err != nil {
			t.Fatalf("%x is no message: %v", packet, err)
		}
		if m.Response || m.Opcode != dns.OpcodeQuery || len(m.Question) != 1 || len(m.Answer)+len(m.Ns) > 0 || len(m.Extra) > 1 {
			t.Fatalf("%v is not plain", m)
		}
		opt, asked := m.IsEdns0(), m.Question[0]
		if q.EDNS != (opt != nil) || asked.Qtype != q.Type || asked.Qclass != dns.ClassINET || q.CD != m.CheckingDisabled || q.AD != m.AuthenticatedData {
			t.Fatalf("%v is read as %+v", m, q)
		}
		if opt != nil && (opt.UDPSize() != q.UDPSize || opt.Do() != q.DO || opt.Version() != 0 || len(opt.Option) > 0 || opt.Hdr.Name != ".") {
			t.Fatalf("%v is read as %+v", opt, q)
		}
		name, _, err := dns.UnpackDomainName(q.Name.Bytes(), 0)
		if err != nil || name != dns.CanonicalName(asked.Name) {
			t.Fatalf("%q is read as %q (%v)", asked.Name, name, err)
		}
		p := q.AppendOPT(q.AppendHeader(nil, dns.RcodeRefused), 0, 1232, 18, "x")
		back := new(dns.Msg)
		if err := back.Unpack(p); err != nil || !back.Response || back.Id != m.Id || back.Question[0] != asked || back.Rcode != dns.RcodeRefused ||
			back.RecursionDesired != m.RecursionDesired || back.CheckingDisabled != m.CheckingDisabled {
			t.Fatalf("%v is answered %v (%v)", m, back, err)
		}
	})
}
