package dnsfilter

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
)

const (
	alice    = "127.0.0.1" // may ask for what the tests are about
	bob      = "127.0.0.2" // belongs to a group with other names
	stranger = "127.0.0.3" // is in no group
	watcher  = "127.0.0.4" // is in a group that observes
)

var people = fakePolicy{
	alice:   {names: []string{"api.ok.test", "*.cdn.test", "rev.test"}, denied: []string{"bad.cdn.test"}},
	bob:     {names: []string{"other.test"}, qtypes: []uint16{dns.TypeTXT}},
	watcher: {names: []string{"api.ok.test"}, observe: true},
}

func TestT42RefusedWithoutAPacketUpstream(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t))
	qtypes := []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT, dns.TypeMX, dns.TypeNULL, dns.TypeSRV, dns.TypeCNAME,
		dns.TypeANY, dns.TypePTR, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeAXFR, dns.TypeNS, dns.TypeDS, 65400}
	for _, qtype := range qtypes {
		for _, network := range []string{"udp", "tcp"} {
			m := b.ask(t, alice, network, withEDNS(question("evil.test.", qtype)))
			wantRcode(t, m, dns.RcodeRefused, dns.ExtendedErrorCodeBlocked)
			m = b.ask(t, stranger, network, withEDNS(question("api.ok.test.", qtype)))
			wantRcode(t, m, dns.RcodeRefused, dns.ExtendedErrorCodeProhibited)
		}
		ev := b.events.of(t, alice, "evil.test "+dns.Type(qtype).String())
		if ev.Decision.Reason != policy.ReasonNotListed || ev.RCode != "REFUSED" || ev.ID == "" || ev.Listener != "dns" {
			t.Errorf("event = %+v", ev)
		}
	}
	m := b.ask(t, alice, "udp", question("evil.test.", dns.TypeA))
	if m.IsEdns0() != nil {
		t.Error("OPT in the answer to a query without")
	}
	if n := b.packets(); n != 0 {
		t.Errorf("%d packets went upstream", n)
	}
}

func TestT43SubdomainsAreNotImplied(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t))
	wantRcode(t, b.ask(t, alice, "udp", question("secret.api.ok.test.", dns.TypeA)), dns.RcodeRefused, 0)
	wantRcode(t, b.ask(t, alice, "udp", question("notapi.ok.test.", dns.TypeA)), dns.RcodeRefused, 0)
	wantRcode(t, b.ask(t, alice, "udp", question("cdn.test.", dns.TypeA)), dns.RcodeRefused, 0)
	if n := b.packets(); n != 0 {
		t.Errorf("%d packets went upstream", n)
	}
}

func TestT44TypesThatARuleMustName(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t,
		`api.ok.test. 60 IN TXT "secret"`, `other.test. 60 IN TXT "hello"`,
		`api.ok.test. 60 IN HTTPS 1 . alpn=h2,h3 ipv4hint=192.0.2.1,10.0.0.1 ipv6hint=fd00::1 ech=AEX+DQ==`))
	for _, qtype := range []uint16{dns.TypeTXT, dns.TypeNULL, dns.TypeANY, dns.TypeAXFR, dns.TypeIXFR} {
		m := b.ask(t, alice, "tcp", withEDNS(question("api.ok.test.", qtype)))
		wantRcode(t, m, dns.RcodeRefused, dns.ExtendedErrorCodeBlocked)
	}
	if n := b.packets(); n != 0 {
		t.Errorf("%d packets went upstream", n)
	}
	if ev := b.events.of(t, alice, "api.ok.test TXT"); ev.Decision.Reason != policy.ReasonQTypeNotAllowed {
		t.Errorf("reason = %v", ev.Decision.Reason)
	}
	wantData(t, b.ask(t, bob, "udp", question("other.test.", dns.TypeTXT)), `TXT "hello"`)
	wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeHTTPS)), `HTTPS 1 . alpn="h2,h3" ipv4hint="192.0.2.1"`)
}

func TestMetaTypesAreNeverForwarded(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t))
	for _, qtype := range []uint16{dns.TypeAXFR, dns.TypeIXFR, dns.TypeTKEY, dns.TypeMAILB, dns.TypeOPT} {
		wantRcode(t, b.ask(t, watcher, "tcp", question("api.ok.test.", qtype)), dns.RcodeRefused, 0)
	}
	wantData(t, b.ask(t, watcher, "udp", question("api.ok.test.", dns.TypeANY)), `HINFO "RFC8482" ""`)
	if n := b.packets(); n != 0 {
		t.Errorf("%d packets went upstream", n)
	}
}

func TestT45ChainOfAListedNameIsWholeButItsTargetsAreNotListed(t *testing.T) {
	zone := []string{"www.cdn.test. 60 IN CNAME b.else.test.", "b.else.test. 60 IN CNAME c.else.test.", "c.else.test. 60 IN A 192.0.2.7"}
	chain := []string{"CNAME b.else.test.", "CNAME c.else.test.", "A 192.0.2.7"}
	t.Run("trust", func(t *testing.T) {
		b := start(t, Config{Decider: people}, newOrigin(t, zone...))
		wantData(t, b.ask(t, alice, "udp", question("www.cdn.test.", dns.TypeA)), chain...)
		wantRcode(t, b.ask(t, alice, "udp", question("b.else.test.", dns.TypeA)), dns.RcodeRefused, 0)
		if ev := b.events.of(t, alice, "www.cdn.test A"); !slices.Equal(ev.Answers, []string{"b.else.test", "c.else.test", "192.0.2.7"}) {
			t.Errorf("answers = %q", ev.Answers)
		}
	})
	t.Run("inspect", func(t *testing.T) {
		b := start(t, Config{Decider: people, CNAMEs: CNAMEsInspect}, newOrigin(t, append(zone,
			"in.cdn.test. 60 IN CNAME api.ok.test.", "api.ok.test. 60 IN A 192.0.2.8",
			"svc.cdn.test. 60 IN HTTPS 0 c.else.test.", `odd.cdn.test. 60 IN CNAME a\000b.cdn.test.`)...))
		m := b.ask(t, alice, "udp", withEDNS(question("www.cdn.test.", dns.TypeA)))
		wantRcode(t, m, dns.RcodeRefused, dns.ExtendedErrorCodeBlocked)
		wantData(t, m)
		wantData(t, b.ask(t, alice, "udp", question("in.cdn.test.", dns.TypeA)), "CNAME api.ok.test.", "A 192.0.2.8")
		wantRcode(t, b.ask(t, alice, "udp", question("svc.cdn.test.", dns.TypeHTTPS)), dns.RcodeRefused, 0)
	})
}

func TestInspectDecidesBeforeItAsks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	writeHosts(t, path, "192.0.2.8 evil.test\n")
	o := newOrigin(t, "www.cdn.test. 60 IN CNAME b.else.test.", "b.else.test. 60 IN A 192.0.2.7",
		"in.cdn.test. 60 IN CNAME api.ok.test.", "api.ok.test. 60 IN A 192.0.2.8")
	b := start(t, Config{Decider: people, CNAMEs: CNAMEsInspect, HostsFile: path, Records: []Record{
		{Name: "rec.cdn.test", Type: "CNAME", Value: "b.else.test"}, {Name: "hosts.cdn.test", Type: "CNAME", Value: "evil.test"},
	}}, o)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		m.Answer = m.Answer[:1] // an upstream that does not follow aliases
		w.WriteMsg(m)
	})
	for name, alias := range map[string]string{"www.cdn.test": "b.else.test", "rec.cdn.test": "b.else.test", "hosts.cdn.test": "evil.test"} {
		wantRcode(t, b.ask(t, alice, "udp", withEDNS(question(name+".", dns.TypeA))), dns.RcodeRefused, dns.ExtendedErrorCodeBlocked)
		if ev := b.events.of(t, alice, name+" A"); !strings.Contains(ev.Error, alias) || ev.Decision.Reason != policy.ReasonNotListed {
			t.Errorf("event = %+v, want %s named", ev, alias)
		}
	}
	if n := b.packets(); n != 1 {
		t.Errorf("%d packets went upstream, want 1", n)
	}
	wantData(t, b.ask(t, alice, "udp", question("in.cdn.test.", dns.TypeA)), "CNAME api.ok.test.", "A 192.0.2.8")
}

func TestInspectDecidesTheTargetOfADNAME(t *testing.T) {
	o := newOrigin(t)
	o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		m.Rcode, m.Answer = 0, parseRRs(t, []string{"cdn.test. 60 IN DNAME new.test.", "x.cdn.test. 60 IN CNAME x.new.test.", "x.new.test. 60 IN A 192.0.2.9"})
		w.WriteMsg(m)
	})
	for _, tt := range []struct {
		names []string
		rcode int
	}{{[]string{"x.cdn.test", "x.new.test"}, dns.RcodeRefused}, {[]string{"x.cdn.test", "x.new.test", "new.test"}, dns.RcodeSuccess}} {
		b := start(t, Config{Decider: fakePolicy{alice: {names: tt.names}}, CNAMEs: CNAMEsInspect}, o)
		wantRcode(t, b.ask(t, alice, "udp", question("x.cdn.test.", dns.TypeA)), tt.rcode, 0)
	}
}

func TestT46UnlistedAliasOfAListedNameIsRefused(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t, "alias.test. 60 IN CNAME api.ok.test.", "api.ok.test. 60 IN A 192.0.2.1"))
	wantRcode(t, b.ask(t, alice, "udp", question("alias.test.", dns.TypeA)), dns.RcodeRefused, 0)
}

func TestT47PrivateAddressesAreRemoved(t *testing.T) {
	b := start(t, Config{Decider: fakePolicy{alice: people[alice], bob: {names: []string{"*.test"}, private: true}}}, newOrigin(t,
		"mixed.cdn.test. 60 IN A 10.0.0.1", "mixed.cdn.test. 60 IN A 192.0.2.1",
		"in.cdn.test. 60 IN CNAME x.test.", "x.test. 60 IN A 169.254.169.254",
		"in.cdn.test. 60 IN AAAA fd00:ec2::254",
		"map.cdn.test. 60 IN AAAA ::ffff:127.0.0.1"))
	wantData(t, b.ask(t, alice, "udp", withEDNS(question("mixed.cdn.test.", dns.TypeA))), "A 192.0.2.1")
	for _, tt := range []struct {
		name  string
		qtype uint16
	}{{"in.cdn.test.", dns.TypeA}, {"in.cdn.test.", dns.TypeAAAA}, {"map.cdn.test.", dns.TypeAAAA}} {
		m := b.ask(t, alice, "udp", withEDNS(question(tt.name, tt.qtype)))
		wantRcode(t, m, dns.RcodeSuccess, dns.ExtendedErrorCodeBlocked)
		wantData(t, m)
		if ev := b.events.of(t, alice, tt.name[:len(tt.name)-1]+" "+dns.Type(tt.qtype).String()); ev.Decision.Reason != policy.ReasonPrivateDestination || ev.Decision.Verdict != policy.Deny || ev.RCode != "NOERROR" {
			t.Errorf("event = %+v", ev)
		}
	}
	// T52 as well: what was filtered for one source is whole for the next.
	wantData(t, b.ask(t, bob, "udp", question("mixed.cdn.test.", dns.TypeA)), "A 10.0.0.1", "A 192.0.2.1")
	wantData(t, b.ask(t, alice, "udp", question("mixed.cdn.test.", dns.TypeA)), "A 192.0.2.1")
}

func TestT48NamesAreComparedAsOnTheWire(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	m := b.ask(t, alice, "udp", question("aPi.Ok.tEST.", dns.TypeA))
	wantData(t, m, "A 192.0.2.1")
	if m.Question[0].Name != "aPi.Ok.tEST." || m.Answer[0].Header().Name != "aPi.Ok.tEST." {
		t.Errorf("case not kept: %v", m)
	}
	if n := b.origin.last().Question[0].Name; n != "api.ok.test." {
		t.Errorf("upstream was asked for %q", n)
	}
	asked := b.packets()
	for _, name := range []string{`api\.ok.test.`, `a\000pi.ok.test.`, `api.ok.test\032.`, `x\255.cdn.test.`, `\046.cdn.test.`, "1.2.3.4.", "0x7f000001.", "."} {
		m := b.ask(t, alice, "udp", withEDNS(question(name, dns.TypeA)))
		wantRcode(t, m, dns.RcodeRefused, dns.ExtendedErrorCodeBlocked)
		sent, _ := question(name, dns.TypeA).Pack()
		echoed, _ := m.Pack()
		if !bytes.Equal(sent[12:], echoed[12:len(sent)]) {
			t.Errorf("question %q echoed as %q", name, m.Question[0].Name)
		}
		// Malformed input is enforced even where a group observes.
		wantRcode(t, b.ask(t, watcher, "udp", question(name, dns.TypeA)), dns.RcodeRefused, 0)
	}
	if b.packets() != asked {
		t.Error("packets went upstream")
	}
}

func TestT49PacketsThatAreNoQuestion(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t))
	two := question("api.ok.test.", dns.TypeA)
	two.Question = append(two.Question, two.Question[0])
	chaos := question("version.bind.", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	update := question("api.ok.test.", dns.TypeA)
	update.Opcode = dns.OpcodeUpdate
	notify := question("api.ok.test.", dns.TypeA)
	notify.Opcode = dns.OpcodeNotify
	twoOPT := withEDNS(withEDNS(question("api.ok.test.", dns.TypeA)))
	v1 := withEDNS(question("api.ok.test.", dns.TypeA))
	v1.IsEdns0().SetVersion(1)
	none := new(dns.Msg)
	none.Id = 7
	for _, tt := range []struct {
		name  string
		q     *dns.Msg
		rcode int
	}{
		{"two questions", two, dns.RcodeFormatError},
		{"no question", none, dns.RcodeFormatError},
		{"class CH", chaos, dns.RcodeRefused},
		{"UPDATE", update, dns.RcodeNotImplemented},
		{"NOTIFY", notify, dns.RcodeNotImplemented},
		{"two OPT", twoOPT, dns.RcodeFormatError},
		{"EDNS version 1", v1, dns.RcodeBadVers},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, network := range []string{"udp", "tcp"} {
				m := b.ask(t, alice, network, tt.q)
				if m.Rcode != tt.rcode || m.Opcode != tt.q.Opcode {
					t.Errorf("over %s: %v, want %s", network, m, dns.RcodeToString[tt.rcode])
				}
			}
		})
	}
	if ev := b.events.of(t, alice, "version.bind TXT"); ev.Decision.Reason != policy.ReasonBadRequest {
		t.Errorf("event = %+v", ev)
	}
	if n := b.packets(); n != 0 {
		t.Errorf("%d packets went upstream", n)
	}
	if s := b.resolver.Stats(); s.Malformed != 12 {
		t.Errorf("Malformed = %d, want 12", s.Malformed)
	}
}

func TestT49RawPackets(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	c, err := net.Dial("udp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	header := func(bits, qd uint16) []byte {
		h := make([]byte, 12)
		binary.BigEndian.PutUint16(h, 4711)
		binary.BigEndian.PutUint16(h[2:], bits)
		binary.BigEndian.PutUint16(h[4:], qd)
		return h
	}
	for _, tt := range []struct {
		name   string
		packet []byte
		rcode  int // -1: no answer
	}{
		{"response", header(0x8000, 1), -1},
		{"short", []byte{1, 2, 3}, -1},
		{"compression loop", append(header(0, 1), 0xC0, 12, 0, 1, 0, 1), dns.RcodeFormatError},
		{"cut in the name", append(header(0, 1), 3, 'a'), dns.RcodeFormatError},
		{"cut before the type", append(header(0, 1), 1, 'a', 0), dns.RcodeFormatError},
		{"cut before the class", append(header(0, 1), 1, 'a', 0, 0, 1), dns.RcodeFormatError},
		{"cut before the OPT record it counts", withCount(t, question("api.ok.test.", dns.TypeA), additionalCount), dns.RcodeFormatError},
		{"cut before the answer it counts", withCount(t, question("api.ok.test.", dns.TypeA), answerCount), dns.RcodeFormatError},
		{"a thousand questions", append(header(0, 1000), make([]byte, 480)...), dns.RcodeFormatError},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c.Write(tt.packet)
			sentinel := question("sentinel.test.", dns.TypeA)
			want := sentinel.Id
			if tt.rcode >= 0 {
				want = 4711
			} else {
				p, _ := sentinel.Pack()
				c.Write(p) // a late answer to the packet would come before or after this one's, under its own ID
			}
			buf := make([]byte, 512)
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, err := c.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			if id := binary.BigEndian.Uint16(buf); id != want {
				t.Fatalf("answer with ID %d, want %d", id, want)
			}
			if got := int(buf[3] & 0xF); tt.rcode >= 0 && got != tt.rcode {
				t.Errorf("RCODE %d, want %d", got, tt.rcode)
			}
			if n > len(tt.packet)+16 && tt.rcode >= 0 {
				t.Errorf("%d bytes answered to %d", n, len(tt.packet))
			}
		})
	}
}

func TestT50AnswersStayWithinWhatTheClientTakes(t *testing.T) {
	var zone []string
	for i := range 100 {
		zone = append(zone, fmt.Sprintf("big.cdn.test. 60 IN A 192.0.2.%d", i))
	}
	for i := range 40 {
		zone = append(zone, fmt.Sprintf("mid.cdn.test. 60 IN A 192.0.2.%d", i))
	}
	b := start(t, Config{Decider: people}, newOrigin(t, zone...))
	for _, tt := range []struct {
		name, network string
		edns          uint16 // 0: none
		records       int
	}{
		{"big.cdn.test.", "udp", 0, 0},
		{"big.cdn.test.", "udp", 4096, 0},
		{"mid.cdn.test.", "udp", 0, 0},
		{"mid.cdn.test.", "udp", 100, 0}, // below 512 means 512
		{"mid.cdn.test.", "udp", 1232, 40},
		{"big.cdn.test.", "tcp", 0, 100},
		{"big.cdn.test.", "tcp", 512, 100},
	} {
		q := question(tt.name, dns.TypeA)
		if tt.edns > 0 {
			q.SetEdns0(tt.edns, false)
		}
		m := b.ask(t, alice, tt.network, q)
		if len(m.Answer) != tt.records || m.Truncated != (tt.records == 0) {
			t.Errorf("%+v: %d records, TC %v", tt, len(m.Answer), m.Truncated)
		}
		if opt := m.IsEdns0(); (opt != nil) != (tt.edns > 0) || opt != nil && opt.UDPSize() != 1232 {
			t.Errorf("%+v: OPT %v", tt, opt)
		}
	}
	q := withEDNS(question("refused.test.", dns.TypeA))
	if m := b.ask(t, alice, "udp", q); m.Len() > q.Len()+24 {
		t.Errorf("refusal of %d bytes to a query of %d", m.Len(), q.Len())
	}
}

func TestT51OptionsOfClientsStayHere(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	q := question("api.ok.test.", dns.TypeA)
	q.CheckingDisabled = true
	q.SetEdns0(4096, true)
	opt := q.IsEdns0()
	opt.Option = append(opt.Option,
		&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(198, 51, 100, 0)},
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"},
		&dns.EDNS0_LOCAL{Code: dns.EDNS0LOCALSTART, Data: []byte("exfiltrated")})
	m := b.ask(t, alice, "udp", q)
	wantData(t, m, "A 192.0.2.1")
	got := b.origin.last()
	if o := got.IsEdns0(); o == nil || len(o.Option) != 0 || !o.Do() || !got.CheckingDisabled || !got.RecursionDesired {
		t.Errorf("upstream was asked %v", got)
	}
	if o := m.IsEdns0(); len(o.Option) != 1 || o.Option[0].Option() != dns.EDNS0COOKIE || !o.Do() || !m.CheckingDisabled || !m.RecursionAvailable || m.Authoritative {
		t.Errorf("answer = %v", m)
	}
	b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)) // neither DO nor CD: another question
	if got := b.origin.last(); got.IsEdns0().Do() || got.CheckingDisabled || b.packets() != 2 {
		t.Errorf("upstream was asked %v in %d packets", got, b.packets())
	}
}

func TestT52VerdictsDoNotLeakThroughTheCache(t *testing.T) {
	b := start(t, Config{Decider: people, Cache: Cache{Size: 1 << 20}}, newOrigin(t,
		"api.ok.test. 60 IN A 192.0.2.1", "other.test. 60 IN A 192.0.2.2"))
	for range 2 { // the second time from the cache
		wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 192.0.2.1")
		cached := b.ask(t, bob, "udp", withEDNS(question("api.ok.test.", dns.TypeA)))
		absent := b.ask(t, bob, "udp", withEDNS(question("nothing.test.", dns.TypeA)))
		wantRcode(t, cached, dns.RcodeRefused, dns.ExtendedErrorCodeBlocked)
		if len(cached.Answer) != 0 || cached.MsgHdr.Rcode != absent.MsgHdr.Rcode || len(cached.Ns) != len(absent.Ns) {
			t.Errorf("a cached name is refused otherwise than another:\n%v\n%v", cached, absent)
		}
		wantData(t, b.ask(t, bob, "udp", question("other.test.", dns.TypeA)), "A 192.0.2.2")
	}
	if n := b.packets(); n != 2 {
		t.Errorf("%d packets went upstream, want 2", n)
	}
}

func TestT56UpstreamFailureIsServfail(t *testing.T) {
	for _, tt := range []struct {
		name   string
		behave func(w dns.ResponseWriter, q, m *dns.Msg)
		ede    uint16
	}{
		{"silence", func(dns.ResponseWriter, *dns.Msg, *dns.Msg) {}, dns.ExtendedErrorCodeNoReachableAuthority},
		{"SERVFAIL", func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeServerFailure)) }, dns.ExtendedErrorCodeNoReachableAuthority},
		{"REFUSED", func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeRefused)) }, dns.ExtendedErrorCodeNoReachableAuthority},
		{"its own word", func(w dns.ResponseWriter, q, _ *dns.Msg) {
			m := new(dns.Msg).SetRcode(q, dns.RcodeServerFailure).SetEdns0(1232, false)
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeDNSBogus, ExtraText: "not passed on"}}
			w.WriteMsg(m)
		}, dns.ExtendedErrorCodeDNSBogus},
		{"TC and no TCP", func(w dns.ResponseWriter, q, m *dns.Msg) {
			if m.Truncated = true; isUDP(w) {
				w.WriteMsg(m)
			} else {
				w.Close()
			}
		}, dns.ExtendedErrorCodeNetworkError},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := start(t, Config{Decider: people}, newOrigin(t), hasty)
			b.origin.set(tt.behave)
			m := b.ask(t, alice, "udp", withEDNS(question("api.ok.test.", dns.TypeA)))
			wantRcode(t, m, dns.RcodeServerFailure, tt.ede)
			if ev := b.events.of(t, alice, "api.ok.test A"); ev.RCode != "SERVFAIL" || ev.Error == "" {
				t.Errorf("event = %+v", ev)
			}
		})
	}
	t.Run("closed port", func(t *testing.T) {
		o := newOrigin(t)
		b := start(t, Config{Decider: people}, o)
		o.down()
		m := b.ask(t, alice, "udp", withEDNS(question("api.ok.test.", dns.TypeA)))
		wantRcode(t, m, dns.RcodeServerFailure, dns.ExtendedErrorCodeNetworkError)
	})
}

func TestObservedQueriesPass(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t, "new.test. 60 IN A 192.0.2.1", "in.test. 60 IN A 10.0.0.1"))
	wantData(t, b.ask(t, watcher, "udp", question("new.test.", dns.TypeA)), "A 192.0.2.1")
	if ev := b.events.of(t, watcher, "new.test A"); ev.Decision.Verdict != policy.Observe || ev.Decision.Reason != policy.ReasonNotListed || ev.DNSTime <= 0 || ev.Duration < ev.DNSTime {
		t.Errorf("event = %+v", ev)
	}
	wantData(t, b.ask(t, watcher, "udp", question("in.test.", dns.TypeA)))
}

func TestDenials(t *testing.T) {
	for _, tt := range []struct {
		denial Denial
		qtype  uint16
		rcode  int
		want   []string
	}{
		{DenyRefused, dns.TypeA, dns.RcodeRefused, nil},
		{DenyNXDomain, dns.TypeA, dns.RcodeNameError, nil},
		{DenyNodata, dns.TypeA, dns.RcodeSuccess, nil},
		{DenySinkhole, dns.TypeA, dns.RcodeSuccess, []string{"A 0.0.0.0"}},
		{DenySinkhole, dns.TypeAAAA, dns.RcodeSuccess, []string{"AAAA ::"}},
		{DenySinkhole, dns.TypeHTTPS, dns.RcodeSuccess, nil},
	} {
		t.Run(fmt.Sprint(tt.denial, tt.qtype), func(t *testing.T) {
			b := start(t, Config{Decider: people, Deny: tt.denial}, newOrigin(t))
			m := b.ask(t, alice, "udp", withEDNS(question("evil.test.", tt.qtype)))
			wantRcode(t, m, tt.rcode, dns.ExtendedErrorCodeBlocked)
			wantData(t, m, tt.want...)
			if m.Authoritative {
				t.Error("AA set")
			}
		})
	}
}

func TestNoDeciderRefuses(t *testing.T) {
	b := start(t, Config{}, newOrigin(t))
	wantRcode(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), dns.RcodeRefused, 0)
}

func TestOwnRecordsAreForEveryGroup(t *testing.T) {
	b := start(t, Config{Decider: people, Records: []Record{
		{Name: "proxy.internal.test", Type: "A", Value: "10.0.0.10", TTL: 90 * time.Second},
		{Name: "alias.internal.test", Type: "CNAME", Value: "proxy.internal.test"},
		{Name: "out.internal.test", Type: "CNAME", Value: "api.ok.test"},
		{Name: "out.cdn.test", Type: "CNAME", Value: "in.test"},
		{Name: "bad.cdn.test", Type: "A", Value: "10.0.0.11"},
		{Name: "10.0.0.10.in-addr.arpa", Type: "ptr", Value: "proxy.internal.test."},
		{Name: "_http._tcp.internal.test", Type: "SRV", Value: "0 5 3128 proxy.internal.test"},
		{Name: "text.internal.test", Type: "TXT", Value: `a "quoted" back\slash ` + strings.Repeat("x", 300)},
	}}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1", "in.test. 60 IN A 10.1.1.1"))
	for _, source := range []string{alice, bob, watcher} {
		m := b.ask(t, source, "udp", question("Proxy.internal.test.", dns.TypeA))
		wantData(t, m, "A 10.0.0.10")
		if !m.Authoritative || m.Answer[0].Header().Ttl != 90 {
			t.Errorf("answer = %v", m)
		}
		wantData(t, b.ask(t, source, "udp", question("alias.internal.test.", dns.TypeA)), "CNAME proxy.internal.test.", "A 10.0.0.10")
		wantData(t, b.ask(t, source, "udp", question("10.0.0.10.in-addr.arpa.", dns.TypePTR)), "PTR proxy.internal.test.")
		wantData(t, b.ask(t, source, "udp", question("_http._tcp.internal.test.", dns.TypeSRV)), "SRV 0 5 3128 proxy.internal.test.")
	}
	m := b.ask(t, alice, "udp", withEDNS(question("text.internal.test.", dns.TypeTXT)))
	if txt := m.Answer[0].(*dns.TXT).Txt; len(txt) != 2 || !strings.HasPrefix(txt[0], `a \"quoted\" back\\slash xxx`) {
		t.Errorf("TXT = %q", txt)
	}
	wantData(t, b.ask(t, alice, "udp", question("proxy.internal.test.", dns.TypeAAAA)))
	ev := b.events.of(t, alice, "Proxy.internal.test A")
	if ev.Decision.Verdict != policy.Allow || ev.Decision.Rule != "dns.records" {
		t.Errorf("decision = %+v", ev.Decision)
	}
	wantRcode(t, b.ask(t, stranger, "udp", withEDNS(question("proxy.internal.test.", dns.TypeA))), dns.RcodeRefused, dns.ExtendedErrorCodeProhibited)
	wantRcode(t, b.ask(t, alice, "udp", question("bad.cdn.test.", dns.TypeA)), dns.RcodeRefused, 0)
	wantRcode(t, b.ask(t, alice, "udp", question("out.internal.test.", dns.TypeA)), dns.RcodeRefused, 0)
	if n := b.packets(); n != 0 {
		t.Errorf("%d packets went upstream", n)
	}
	wantData(t, b.ask(t, alice, "udp", question("out.cdn.test.", dns.TypeA))) // its private address is not the operator's word
}

func TestHTTPSRecords(t *testing.T) {
	zone := []string{
		`x.cdn.test. 60 IN HTTPS 1 . mandatory=ech,alpn alpn=h2 ech=AEX+DQ== port=8443`,
		`y.cdn.test. 60 IN SVCB 1 y.cdn.test. mandatory=ech ech=AEX+DQ==`,
	}
	for _, tt := range []struct {
		how  HTTPSRecords
		x, y []string
	}{
		{HTTPSStripECH, []string{`HTTPS 1 . mandatory="alpn" alpn="h2" port="8443"`}, []string{"SVCB 1 y.cdn.test."}},
		{HTTPSPass, []string{`HTTPS 1 . mandatory="ech,alpn" alpn="h2" ech="AEX+DQ==" port="8443"`}, []string{`SVCB 1 y.cdn.test. mandatory="ech" ech="AEX+DQ=="`}},
		{HTTPSNodata, nil, nil},
	} {
		t.Run(string(tt.how), func(t *testing.T) {
			b := start(t, Config{Decider: people, HTTPSRecords: tt.how}, newOrigin(t, zone...))
			got := b.ask(t, alice, "udp", question("x.cdn.test.", dns.TypeHTTPS))
			// The order of the keys in mandatory does not matter: compare without miekg's re-sorting.
			if len(data(got)) == 1 && tt.how == HTTPSPass {
				if !strings.Contains(data(got)[0], "ech=") {
					t.Errorf("answer = %q", data(got))
				}
			} else {
				wantData(t, got, tt.x...)
			}
			wantData(t, b.ask(t, alice, "udp", question("y.cdn.test.", dns.TypeSVCB)), tt.y...)
		})
	}
}

func TestSignaturesOverWhatWasChangedAreRemoved(t *testing.T) {
	sig := func(typ string) string {
		return "s.cdn.test. 60 IN RRSIG " + typ + " 13 3 60 20300101000000 20200101000000 1 test. AAAA"
	}
	b := start(t, Config{Decider: people}, newOrigin(t))
	b.origin.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
		typ := dns.Type(q.Question[0].Qtype).String()
		lines := map[string]string{"A": "s.cdn.test. 60 IN A 10.0.0.1", "HTTPS": "s.cdn.test. 60 IN HTTPS 1 . ech=AEX+DQ==", "AAAA": "s.cdn.test. 60 IN AAAA 2001:db8::1"}
		m.Rcode, m.AuthenticatedData = 0, true
		for _, l := range []string{lines[typ], "s.cdn.test. 60 IN A 192.0.2.9", sig(typ)} {
			rr, err := dns.NewRR(l)
			if err != nil {
				t.Error(err)
			}
			m.Answer = append(m.Answer, rr)
		}
		w.WriteMsg(m)
	})
	for _, tt := range []struct {
		qtype uint16
		n     int
		ad    bool
	}{{dns.TypeA, 1, false}, {dns.TypeHTTPS, 1, false}, {dns.TypeAAAA, 2, true}} {
		m := b.ask(t, alice, "udp", question("s.cdn.test.", tt.qtype).SetEdns0(1232, true))
		if len(m.Answer) != tt.n || m.AuthenticatedData != tt.ad {
			t.Errorf("type %d: AD %v, %q", tt.qtype, m.AuthenticatedData, data(m))
		}
	}
	m := b.ask(t, alice, "udp", question("s.cdn.test.", dns.TypeAAAA)) // neither AD nor DO asked for
	if m.AuthenticatedData || len(m.Answer) != 1 {
		t.Errorf("answer = %v", m)
	}
}

func TestWildcardBindAnswersFromTheAddressAsked(t *testing.T) {
	b := start(t, Config{Decider: people, Listen: []string{":0"}}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	_, port, _ := net.SplitHostPort(b.addr)
	for _, asked := range []string{"127.0.0.1", "127.0.0.9"} {
		b.addr = net.JoinHostPort(asked, port) // a connected socket hears this address only
		wantData(t, b.ask(t, alice, "udp", question("api.ok.test.", dns.TypeA)), "A 192.0.2.1")
		wantData(t, b.ask(t, alice, "tcp", question("api.ok.test.", dns.TypeA)), "A 192.0.2.1")
	}
	b.events.of(t, alice, "api.ok.test A") // the source is unmapped
}

func TestListenNamesTheAddressTaken(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		var taken string
		if network == "udp" {
			c, err := net.ListenPacket("udp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			taken = c.LocalAddr().String()
		} else {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			taken = l.Addr().String()
		}
		s := NewServer(newResolver(t, Config{Listen: []string{"127.0.0.1:0", taken}, Upstreams: []string{"127.0.0.1:9"}}, nil))
		err := s.Listen()
		if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "listen "+network+" "+taken) {
			t.Errorf("Listen() = %v", err)
		}
		if len(s.Addrs()) != 0 {
			t.Error("another address stays bound")
		}
	}
}

func TestTCPKeepsAConnection(t *testing.T) {
	b := start(t, Config{Decider: people, Cache: Cache{Size: 1 << 20}}, newOrigin(t, "api.ok.test. 60 IN A 192.0.2.1"))
	c, err := dns.Dial("tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	const n = 200 // miekg/dns alone would stop at 128
	want := make(map[uint16]bool)
	for i := range n {
		q := question("api.ok.test.", dns.TypeA)
		q.Id = uint16(i)
		want[q.Id] = true
		if err := c.WriteMsg(q); err != nil {
			t.Fatal(err)
		}
	}
	for range n {
		m, err := c.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		delete(want, m.Id)
	}
	if len(want) > 0 {
		t.Errorf("%d queries without an answer", len(want))
	}
}

func TestTCPConnectionsOfOneSourceAreBounded(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t))
	for range maxSourceConns {
		c, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	c, err := net.Dial("tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read() = %v, want the connection closed", err)
	}
	wantRcode(t, b.ask(t, bob, "tcp", question("evil.test.", dns.TypeA)), dns.RcodeRefused, 0)
	if n := b.resolver.Stats().Dropped; n != 1 {
		t.Errorf("Dropped = %d", n)
	}
}

func TestOverloadDropsQueries(t *testing.T) {
	b := start(t, Config{Decider: people}, newOrigin(t))
	b.server.inFlight.Add(maxInFlight)
	c, err := net.Dial("udp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	q, _ := question("api.ok.test.", dns.TypeA).Pack()
	c.Write(q)
	eventually(t, "the query to be dropped", func() bool { return b.resolver.Stats().Dropped == 1 })
	b.server.inFlight.Add(-maxInFlight)
	wantRcode(t, b.ask(t, alice, "udp", question("evil.test.", dns.TypeA)), dns.RcodeRefused, 0)
	eventually(t, "no query to be under way", func() bool { return b.server.inFlight.Load() == 0 })
}

func TestShutdown(t *testing.T) {
	o := newOrigin(t)
	asked := make(chan struct{}, 4)
	hold := func() (release chan struct{}) {
		release = make(chan struct{})
		o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
			asked <- struct{}{}
			<-release
			w.WriteMsg(m)
		})
		return release
	}
	release := hold()
	t.Run("waits for queries under way", func(t *testing.T) {
		r := newResolver(t, Config{Decider: people, Listen: []string{"127.0.0.1:0"}}, o)
		s, served := serve(t, context.Background(), r)
		c, _ := dns.Dial("udp", s.Addrs()[0].String())
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		c.WriteMsg(question("api.ok.test.", dns.TypeA))
		<-asked
		down := make(chan error, 1)
		go func() { down <- s.Shutdown(context.Background()) }()
		close(release)
		if m, err := c.ReadMsg(); err != nil || m.Rcode != dns.RcodeNameError {
			t.Errorf("answer while draining: %v, %v", m, err)
		}
		if err := <-down; err != nil {
			t.Errorf("Shutdown() = %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve() = %v", err)
		}
		if err := s.Serve(context.Background()); err == nil {
			t.Error("Serve() after Shutdown went well")
		}
		if err := s.Shutdown(context.Background()); err != nil {
			t.Errorf("second Shutdown() = %v", err)
		}
	})
	release = hold()
	t.Run("cuts when time is up", func(t *testing.T) {
		r := newResolver(t, Config{Decider: people, Listen: []string{"127.0.0.1:0"}}, o)
		s, served := serve(t, context.Background(), r)
		idle, _ := net.Dial("tcp", s.Addrs()[0].String())
		defer idle.Close()
		c, _ := dns.Dial("udp", s.Addrs()[0].String())
		defer c.Close()
		c.WriteMsg(question("api.ok.test.", dns.TypeA))
		<-asked
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown() = %v", err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if m, err := c.ReadMsg(); err != nil || m.Rcode != dns.RcodeServerFailure {
			t.Errorf("answer to who is cut off: %v, %v", m, err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve() = %v", err)
		}
	})
	close(release)
	t.Run("with the context of Serve", func(t *testing.T) {
		r := newResolver(t, Config{Decider: people, Listen: []string{"127.0.0.1:0", "127.0.0.1:0"}}, o)
		ctx, cancel := context.WithCancel(context.Background())
		_, served := serve(t, ctx, r)
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve() = %v", err)
		}
	})
	t.Run("without Serve", func(t *testing.T) {
		s := NewServer(newResolver(t, Config{Listen: []string{"127.0.0.1:0"}}, o))
		if err := errors.Join(s.Listen(), s.Shutdown(context.Background())); err != nil {
			t.Error(err)
		}
	})
	t.Run("without listeners", func(t *testing.T) {
		s, served := serve(t, context.Background(), newResolver(t, Config{}, o))
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil && !errors.Is(err, errServing) { // Shutdown may have come first
			t.Error(err)
		}
	})
}

func serve(t *testing.T, ctx context.Context, r *Resolver) (*Server, <-chan error) {
	t.Helper()
	s := NewServer(r)
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	return s, served
}
