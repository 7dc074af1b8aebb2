package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// at is when the requests of these tests are made.
var at = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// bare returns one bare-string rule a name.
func bare(names ...string) []Rule {
	rules := make([]Rule, len(names))
	for i, n := range names {
		rules[i].Names = []string{n}
	}
	return rules
}

func mustCompile(t testing.TB, d *Document) *Policy {
	t.Helper()
	p, _, err := Compile(d, Options{Now: at})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// office is the policy of most tests.
func office() *Document {
	return &Document{
		Version: 1,
		Lists: []List{
			{Name: "github", Names: []string{".github.com", "raw.githubusercontent.com"}},
			{Name: "threats", Names: []string{".evil.test", "bad.ok.test"}},
			{Name: "all", Names: []string{"@github", "extra.test"}},
		},
		Deny: []Rule{
			{Names: []string{"@threats"}, Reason: "threat feed"},
			{ID: "no-dark-net", Addresses: []string{"198.51.100.0/24"}},
		},
		Groups: []Group{
			{Name: "baseline", Allow: bare(".debian.org")},
			{
				Name: "ci", Sources: []string{"10.1.0.0/16", "2001:db8:1::/48"}, Extends: []string{"baseline"},
				Allow: append(bare("*.example.com", "api.ok.test", "bad.ok.test", "s3.*.cloud.test", "api-*.x.test", "bücher.test"),
					Rule{Names: []string{"@all"}},
					Rule{ID: "sftp", Names: []string{"sftp.test"}, Ports: []string{"22"}, Protocol: "tcp"},
					Rule{ID: "range", Names: []string{"range.test"}, Ports: []string{"8000-8010"}},
					Rule{ID: "tls-only", Names: []string{"tls.test"}, Protocol: "tls"},
					Rule{ID: "http-only", Names: []string{"http.test"}, Protocol: "http"},
					Rule{ID: "vpce", Names: []string{".vpce.test"}, PrivateDestinations: []string{"10.0.0.0/8"}},
					Rule{ID: "old", Names: []string{"old.test"}, Expires: "2026-11-22"},
					Rule{ID: "soon", Names: []string{"soon.test"}, Expires: "2026-11-23"},
					Rule{ID: "listed", Names: []string{"front.test"}, TLS: &TLSRule{SNI: "listed"}},
					Rule{ID: "lax", Names: []string{"lax.test"}, TLS: &TLSRule{SNI: "optional", ECH: "allow", MinVersion: "1.0"}},
					Rule{ID: "both", Names: []string{"both.test"}, Addresses: []string{"10.7.0.0/16"}},
					Rule{ID: "lit", Addresses: []string{"203.0.113.0/24"}},
					Rule{ID: "lit-all", Addresses: []string{"0.0.0.0/0"}, Ports: []string{"4443"}},
					Rule{ID: "txt", Names: []string{"txt.test"}, QTypes: []string{"TXT"}},
					Rule{ID: "dns-only", Names: []string{"dns.test"}, Protocol: "dns"},
				),
				Deny: bare("gist.github.com"),
			},
			{Name: "lab", Sources: []string{"10.1.9.0/24"}, Mode: "observe", ObserveUntil: "2026-12-31",
				Allow: bare("only.test"), Deny: bare("no.test")},
			{Name: "late", Sources: []string{"10.1.8.0/24"}, Mode: "observe", ObserveUntil: "2026-11-01", Allow: bare("only.test")},
		},
	}
}

func addr(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

func TestDecide(t *testing.T) {
	p := mustCompile(t, office())
	check := func(name, src, host string, port uint16, want string) {
		t.Helper()
		r := Request{Source: addr(src), Port: port, Time: at}
		if a, err := netip.ParseAddr(host); err == nil {
			r.Address = a
		} else {
			r.Name = MustName(host)
		}
		d := p.Decide(r)
		if got := strings.TrimSpace(fmt.Sprint(d.Verdict, " ", d.Reason, " ", d.Rule)); got != want {
			t.Errorf("%s: Decide(%s → %s:%d) = %q, want %q", name, src, host, port, got, want)
		}
	}
	const ci = "10.1.2.3"
	check("subdomain", ci, "api.example.com", 443, "allow matched *.example.com")
	check("deep subdomain", ci, "a.b.c.example.com", 443, "allow matched *.example.com")
	check("wildcard excludes apex", ci, "example.com", 443, "deny not_listed")
	check("lookalike suffix", ci, "evilexample.com", 443, "deny not_listed")
	check("name as prefix of another", ci, "api.example.com.attacker.net", 443, "deny not_listed")
	check("exact", ci, "api.ok.test", 443, "allow matched api.ok.test")
	check("below exact", ci, "x.api.ok.test", 443, "deny not_listed")
	check("above exact", ci, "ok.test", 443, "deny not_listed")
	check("case and dot", ci, "API.OK.TEST.", 443, "allow matched api.ok.test")
	check("inherited, dot form", ci, "debian.org", 443, "allow matched .debian.org")
	check("inherited, below", ci, "www.debian.org", 80, "allow matched .debian.org")
	check("list", ci, "github.com", 443, "allow matched @all")
	check("list in list", ci, "api.github.com", 443, "allow matched @all")
	check("group deny beats list allow", ci, "gist.github.com", 443, "deny explicit_deny gist.github.com")
	check("guardrail beats allow", ci, "bad.ok.test", 443, "deny explicit_deny @threats")
	check("guardrail", ci, "www.evil.test", 443, "deny explicit_deny @threats")
	check("label wildcard", ci, "s3.eu-1.cloud.test", 443, "allow matched s3.*.cloud.test")
	check("label wildcard is one label", ci, "s3.a.b.cloud.test", 443, "deny not_listed")
	check("label wildcard needs a label", ci, "s3.cloud.test", 443, "deny not_listed")
	check("label wildcard not below", ci, "x.s3.eu-1.cloud.test", 443, "deny not_listed")
	check("part wildcard", ci, "api-7.x.test", 443, "allow matched api-*.x.test")
	check("part wildcard other", ci, "web-7.x.test", 443, "deny not_listed")
	check("U-label", ci, "BÜCHER.test", 443, "allow matched xn--bcher-kva.test")
	check("homoglyph", ci, "аpi.ok.test", 443, "deny not_listed")

	check("port", ci, "api.ok.test", 8443, "deny port_not_allowed api.ok.test")
	check("tcp port", ci, "sftp.test", 22, "allow matched sftp")
	check("tcp other port", ci, "sftp.test", 443, "deny port_not_allowed sftp")
	check("range first", ci, "range.test", 8000, "allow matched range")
	check("range last", ci, "range.test", 8010, "allow matched range")
	check("range beyond", ci, "range.test", 8011, "deny port_not_allowed range")
	check("range replaces 443", ci, "range.test", 443, "deny port_not_allowed range")
	check("tls only", ci, "tls.test", 80, "deny port_not_allowed tls-only")
	check("dns only", ci, "dns.test", 443, "deny port_not_allowed dns-only")
	check("expired", ci, "old.test", 443, "deny rule_expired old")
	check("not yet expired", ci, "soon.test", 443, "allow matched soon")

	check("literal", ci, "203.0.113.7", 443, "allow matched lit")
	check("literal, wide rule on a port", ci, "203.0.113.7", 4443, "allow matched lit-all")
	check("literal of an unlisted kind", ci, "8.8.8.8", 443, "deny port_not_allowed lit-all")
	check("IPv6 literal", ci, "2001:db8::1", 443, "deny ip_literal")
	check("guardrail by address", ci, "198.51.100.1", 4443, "deny explicit_deny no-dark-net")

	check("IPv6 source", "2001:db8:1::5", "api.ok.test", 443, "allow matched api.ok.test")
	check("mapped source", "::ffff:10.1.2.3", "api.ok.test", 443, "allow matched api.ok.test")
	check("unknown source", "192.0.2.1", "api.ok.test", 443, "deny unmatched_source")
	check("no source", "", "api.ok.test", 443, "deny unmatched_source")
	check("longest prefix", "10.1.9.1", "only.test", 443, "allow matched only.test")

	check("observe", "10.1.9.1", "other.test", 443, "observe not_listed")
	check("observe port", "10.1.9.1", "only.test", 25, "observe port_not_allowed only.test")
	check("observe own deny", "10.1.9.1", "no.test", 443, "observe explicit_deny no.test")
	check("observe literal", "10.1.9.1", "8.8.8.8", 443, "observe ip_literal")
	check("observe guardrail", "10.1.9.1", "evil.test", 443, "deny explicit_deny @threats")
	check("observe ended", "10.1.8.1", "other.test", 443, "deny not_listed")
}

func TestDecideStages(t *testing.T) {
	p := mustCompile(t, office())
	check := func(name string, r Request, want string) {
		t.Helper()
		if !r.Source.IsValid() {
			r.Source = addr("10.1.2.3")
		}
		r.Time = at
		d := p.Decide(r)
		if got := strings.TrimSpace(fmt.Sprint(d.Verdict, " ", d.Reason, " ", d.Rule)); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	ok := MustName("api.ok.test")
	lab := addr("10.1.9.1")
	dest := func(n, dst string) Request {
		return Request{Name: MustName(n), Port: 443, Destination: addr(dst)}
	}
	check("public", dest("api.ok.test", "93.184.216.34"), "allow matched api.ok.test")
	check("loopback", dest("api.ok.test", "127.0.0.1"), "deny private_destination api.ok.test")
	check("metadata", dest("api.ok.test", "169.254.169.254"), "deny private_destination api.ok.test")
	check("mapped", dest("api.ok.test", "::ffff:127.0.0.1"), "deny private_destination api.ok.test")
	check("named prefix", dest("a.vpce.test", "10.2.3.4"), "allow matched vpce")
	zoned := func(n, dst string) Request {
		r := dest(n, dst)
		r.PrivateZone = true
		return r
	}
	check("zone of the settings", zoned("api.ok.test", "127.0.0.1"), "allow matched api.ok.test")
	check("zone, mapped", zoned("api.ok.test", "::ffff:10.0.0.1"), "allow matched api.ok.test")
	check("zone, metadata", zoned("api.ok.test", "169.254.169.254"), "deny private_destination api.ok.test")
	check("zone, unlisted name", zoned("unlisted.test", "10.0.0.1"), "deny not_listed")
	check("zone, denied address", zoned("api.ok.test", "198.51.100.9"), "deny explicit_deny no-dark-net")
	check("zone, expired rule", zoned("old.test", "10.0.0.1"), "deny rule_expired old")
	check("other private prefix", dest("a.vpce.test", "192.168.0.1"), "deny private_destination vpce")
	check("denied address behind a name", dest("api.ok.test", "198.51.100.9"), "deny explicit_deny no-dark-net")
	check("literal names its block", Request{Address: addr("203.0.113.7"), Port: 443, Destination: addr("203.0.113.7")}, "allow matched lit")
	check("wide literal does not name loopback", Request{Address: addr("127.0.0.1"), Port: 4443, Destination: addr("127.0.0.1")}, "deny private_destination lit-all")
	check("denied address behind NAT64", dest("api.ok.test", "64:ff9b::198.51.100.9"), "deny explicit_deny no-dark-net")
	check("denied literal behind NAT64", Request{Address: addr("64:ff9b::198.51.100.9"), Port: 443}, "deny explicit_deny no-dark-net")
	check("addresses of a rule are not where its names may lead", dest("both.test", "10.7.0.1"), "deny private_destination both")
	check("they are for those who ask for them", Request{Address: addr("10.7.0.1"), Port: 443, Destination: addr("10.7.0.1")}, "allow matched both")
	check("observe: public", Request{Source: lab, Name: ok, Port: 443, Destination: addr("93.184.216.34")}, "observe not_listed")
	check("observe: private", Request{Source: lab, Name: ok, Port: 443, Destination: addr("127.0.0.1")}, "deny private_destination")
	check("observe: private, listed", Request{Source: lab, Name: MustName("only.test"), Port: 443, Destination: addr("10.0.0.1")}, "deny private_destination only.test")

	hello := func(n, sni string, version uint16, ech bool) Request {
		r := Request{Name: MustName(n), Port: 443, Protocol: ProtocolTLS, TLS: TLS{Seen: true, MaxVersion: version, ECH: ech}}
		if sni != "" {
			r.TLS.SNI = MustName(sni)
		}
		return r
	}
	const v10, v12, v13 = 0x0301, 0x0303, 0x0304
	check("sni equal", hello("api.ok.test", "api.ok.test", v13, false), "allow matched api.ok.test")
	check("sni other listed", hello("api.ok.test", "www.example.com", v13, false), "deny sni_mismatch api.ok.test")
	check("sni other", hello("api.ok.test", "other.test", v13, false), "deny sni_mismatch api.ok.test")
	check("sni guardrail", hello("api.ok.test", "evil.test", v13, false), "deny explicit_deny @threats")
	check("sni missing", hello("api.ok.test", "", v13, false), "deny sni_missing api.ok.test")
	check("ech", hello("api.ok.test", "api.ok.test", v13, true), "deny ech_not_allowed api.ok.test")
	check("version", hello("api.ok.test", "api.ok.test", v10, false), "deny tls_version api.ok.test")
	check("listed: same", hello("front.test", "front.test", v12, false), "allow matched listed")
	check("listed: other listed", hello("front.test", "www.example.com", v12, false), "allow matched listed")
	check("listed: not listed", hello("front.test", "other.test", v12, false), "deny sni_mismatch listed")
	check("listed: group denies it", hello("front.test", "gist.github.com", v12, false), "deny explicit_deny gist.github.com")
	check("listed: wrong port there", hello("front.test", "sftp.test", v12, false), "deny sni_mismatch listed")
	check("listed: missing", hello("front.test", "", v12, false), "deny sni_missing listed")
	check("optional: missing, ech, old", hello("lax.test", "", v10, true), "allow matched lax")
	check("optional: other", hello("lax.test", "api.ok.test", v13, false), "deny sni_mismatch lax")
	check("literal without sni", Request{Address: addr("203.0.113.7"), Port: 443, Protocol: ProtocolTLS,
		TLS: TLS{Seen: true, MaxVersion: v13}}, "allow matched lit")
	check("literal with unlisted sni", Request{Address: addr("203.0.113.7"), Port: 443, Protocol: ProtocolTLS,
		TLS: TLS{Seen: true, MaxVersion: v13, SNI: MustName("other.test")}}, "deny sni_mismatch lit")
	check("literal with listed sni", Request{Address: addr("203.0.113.7"), Port: 443, Protocol: ProtocolTLS,
		TLS: TLS{Seen: true, MaxVersion: v13, SNI: ok}}, "allow matched lit")
	observed := hello("only.test", "other.test", v13, false)
	observed.Source = lab
	check("observe: sni", observed, "observe sni_mismatch only.test")
	observed.TLS.SNI = MustName("evil.test")
	check("observe: sni guardrail", observed, "deny explicit_deny @threats")

	spoke := func(n string, port uint16, proto Protocol) Request {
		return Request{Name: MustName(n), Port: port, Protocol: proto}
	}
	check("http on 80", spoke("api.ok.test", 80, ProtocolHTTP), "allow matched api.ok.test")
	check("http on 443", spoke("api.ok.test", 443, ProtocolHTTP), "deny protocol_not_allowed api.ok.test")
	check("tls on 80", spoke("api.ok.test", 80, ProtocolTLS), "deny protocol_not_allowed api.ok.test")
	check("neither on 443", spoke("api.ok.test", 443, ProtocolTCP), "deny not_tls api.ok.test")
	check("neither on 80", spoke("api.ok.test", 80, ProtocolTCP), "deny protocol_not_allowed api.ok.test")
	check("http on tls rule", spoke("tls.test", 443, ProtocolHTTP), "deny protocol_not_allowed tls-only")
	check("http on http rule", spoke("http.test", 80, ProtocolHTTP), "allow matched http-only")
	check("tcp", spoke("sftp.test", 22, ProtocolTCP), "allow matched sftp")
	check("ports replace both numbers", spoke("range.test", 8005, ProtocolHTTP), "allow matched range")

	ask := func(n string, qtype uint16) Request {
		return Request{Name: MustName(n), Protocol: ProtocolDNS, QType: qtype}
	}
	const typeA, typeTXT, typeHTTPS, typeANY = 1, 16, 65, 255
	check("A", ask("api.ok.test", typeA), "allow matched api.ok.test")
	check("HTTPS", ask("api.ok.test", typeHTTPS), "allow matched api.ok.test")
	check("on whatever port", ask("sftp.test", typeA), "allow matched sftp")
	check("resolution alone", ask("dns.test", typeA), "allow matched dns-only")
	check("TXT", ask("api.ok.test", typeTXT), "deny qtype_not_allowed api.ok.test")
	check("TXT where listed", ask("txt.test", typeTXT), "allow matched txt")
	check("A where TXT is listed", ask("txt.test", typeA), "allow matched txt")
	check("ANY", ask("api.ok.test", typeANY), "deny qtype_not_allowed api.ok.test")
	check("not implied", ask("secret.api.ok.test", typeA), "deny not_listed")
	check("denied", ask("gist.github.com", typeA), "deny explicit_deny gist.github.com")
	private := ask("api.ok.test", typeA)
	private.Destination = addr("10.0.0.1")
	check("private answer", private, "deny private_destination api.ok.test")
	check("not a name", Request{Protocol: ProtocolDNS, QType: typeA}, "deny not_listed")
}

func TestInspect(t *testing.T) {
	p := mustCompile(t, office())
	check := func(host string, port uint16, want Inspect) {
		t.Helper()
		d := p.Decide(Request{Source: addr("10.1.2.3"), Name: MustName(host), Port: port, Time: at})
		if d.Inspect != want {
			t.Errorf("%s:%d: Inspect = %b, want %b", host, port, d.Inspect, want)
		}
	}
	check("api.ok.test", 443, InspectTLS)
	check("api.ok.test", 80, InspectHTTP)
	check("range.test", 8000, InspectTLS|InspectHTTP)
	check("sftp.test", 22, InspectNone)
	check("unlisted.test", 443, 0)
}

func TestZeroValuesDeny(t *testing.T) {
	if d := new(Store).Decide(Request{}); d.Passes() {
		t.Errorf("the zero Store passes: %+v", d)
	}
	if (Decision{}).Passes() {
		t.Error("the zero Decision passes")
	}
	p := mustCompile(t, office())
	if d := p.Decide(Request{}); d.Passes() {
		t.Errorf("the zero Request passes: %+v", d)
	}
	// Without a time, dates count as past.
	if d := p.Decide(Request{Source: addr("10.1.2.3"), Name: MustName("soon.test"), Port: 443}); d.Reason != ReasonRuleExpired {
		t.Errorf("no time: %v, want rule_expired", d.Reason)
	}
}

func TestDenyOfOneProtocolForcesALook(t *testing.T) {
	p := mustCompile(t, &Document{Version: 1, Groups: []Group{{
		Name: "g", Sources: []string{"10.0.0.0/8"},
		Allow: []Rule{{Names: []string{"x.test"}, Ports: []string{"443"}, Protocol: "tcp"}},
		Deny:  []Rule{{ID: "no-tls", Names: []string{"x.test"}, Protocol: "tls"}},
	}}})
	r := Request{Source: addr("10.0.0.1"), Name: MustName("x.test"), Port: 443, Time: at}
	if d := p.Decide(r); !d.Passes() || d.Inspect&InspectNone != 0 {
		t.Errorf("before the protocol is known: %+v, want a look", d)
	}
	r.Protocol, r.TLS = ProtocolTLS, TLS{Seen: true, SNI: r.Name, MaxVersion: 0x0304}
	if d := p.Decide(r); d.Rule != "no-tls" {
		t.Errorf("TLS: %+v, want denied by no-tls", d)
	}
	r.Protocol = ProtocolTCP
	if d := p.Decide(r); !d.Passes() {
		t.Errorf("not TLS: %+v, want allowed", d)
	}
}

func TestBuiltinGuardrails(t *testing.T) {
	p := mustCompile(t, &Document{Version: 1, Groups: []Group{
		{Name: "wide", Sources: []string{"10.1.0.0/16"}, Mode: "observe", ObserveUntil: "2999-01-01", Allow: []Rule{
			{ID: "all", Names: []string{"*"}, AllowPublicSuffix: true, PrivateDestinations: []string{"0.0.0.0/0"}}}},
		{Name: "fronting", Sources: []string{"10.3.0.0/16"}, Allow: []Rule{
			{ID: "icloud", Names: []string{".icloud.com"}, TLS: &TLSRule{SNI: "listed"}}}},
		{Name: "exact", Sources: []string{"10.2.0.0/16"}, Allow: []Rule{
			{ID: "meta", Names: []string{"metadata.google.internal"}, Protocol: "http", PrivateDestinations: []string{"169.254.169.254/32"}}}},
	}})
	check := func(src, name, dst, want string) {
		t.Helper()
		d := p.Decide(Request{Source: addr(src), Name: MustName(name), Port: 80, Destination: addr(dst), Time: at})
		if got := fmt.Sprint(d.Verdict, " ", d.Reason, " ", d.Rule); got != want {
			t.Errorf("%s → %s (%s): %s, want %s", src, name, dst, got, want)
		}
	}
	check("10.1.0.1", "metadata.google.internal", "", "deny explicit_deny builtin:cloud-metadata")
	check("10.1.0.1", "_dns.resolver.arpa", "", "deny explicit_deny builtin:encrypted-dns")
	check("10.1.0.1", "use-application-dns.net", "", "deny explicit_deny builtin:encrypted-dns")
	check("10.1.0.1", "anything.test", "10.0.0.1", "allow matched all")
	check("10.1.0.1", "anything.test", "169.254.169.254", "deny private_destination all")
	check("10.1.0.1", "anything.test", "::ffff:169.254.169.254", "deny private_destination all")
	check("10.2.0.1", "metadata.google.internal", "169.254.169.254", "allow matched meta")
	for _, src := range []string{"10.1.0.1", "10.3.0.1"} {
		d := p.Decide(Request{Source: addr(src), Name: MustName("x.icloud.com"), Port: 443, Protocol: ProtocolTLS, Time: at,
			TLS: TLS{Seen: true, SNI: MustName("mask.icloud.com"), MaxVersion: 0x0304}})
		if d.Passes() {
			t.Errorf("SNI of a guardrail from %s: %+v", src, d)
		}
	}
}

func TestDecideDoesNotAllocate(t *testing.T) {
	p := mustCompile(t, office())
	for _, r := range []Request{
		{Source: addr("10.1.2.3"), Name: MustName("a.b.example.com"), Port: 443, Time: at},
		{Source: addr("::ffff:10.1.2.3"), Name: MustName("nothing.test"), Port: 443, Time: at},
		{Source: addr("10.1.2.3"), Name: MustName("s3.eu.cloud.test"), Port: 443, Time: at, Destination: addr("10.0.0.1")},
		{Source: addr("10.1.2.3"), Name: MustName("front.test"), Port: 443, Time: at, Protocol: ProtocolTLS,
			TLS: TLS{Seen: true, SNI: MustName("www.example.com"), MaxVersion: 0x0304}},
		{Source: addr("10.1.2.3"), Address: addr("203.0.113.1"), Port: 443, Time: at},
	} {
		if n := testing.AllocsPerRun(100, func() { p.Decide(r) }); n != 0 {
			t.Errorf("Decide(%v) allocates %v times", r, n)
		}
	}
}

func TestExplainAgreesWithDecide(t *testing.T) {
	p := mustCompile(t, office())
	for _, host := range []string{"gist.github.com", "api.github.com", "sftp.test", "nothing.test", "s3.eu.cloud.test"} {
		r := Request{Source: addr("10.1.2.3"), Name: MustName(host), Port: 443, Time: at}
		x := p.Explain(r)
		if d := p.Decide(r); x.Decision != d {
			t.Errorf("%s: explained %+v, decided %+v", host, x.Decision, d)
		}
		if x.Prefix != netip.MustParsePrefix("10.1.0.0/16") {
			t.Errorf("%s: prefix %v", host, x.Prefix)
		}
	}
	x := p.Explain(Request{Source: addr("10.1.2.3"), Name: MustName("gist.github.com"), Port: 443, Time: at})
	if len(x.Candidates) != 2 {
		t.Errorf("candidates = %+v, want the deny and the list", x.Candidates)
	}
}
