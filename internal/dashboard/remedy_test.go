package dashboard

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
)

// TestRemedyAllows writes each rule that is offered into the policy that denied, and
// asks again: what was denied passes, and nothing beside it.
func TestRemedyAllows(t *testing.T) {
	const before = `version: 1
groups:
  - name: ci
    sources: [10.20.0.0/16, "2001:db8:20::/48"]
    allow:
      - listed.example
      - {names: [old.example], expires: 2020-01-01}
      - {names: [plain.example], protocol: http}
      - {names: [gist.example]}
      - {names: [secure.example], protocol: tls}
    deny: [forbidden.example]
`
	name := policy.MustName
	src, src6 := netip.MustParseAddr("10.20.1.5"), netip.MustParseAddr("2001:db8:20::7")
	tls := func(sni string, version uint16, ech bool) policy.TLS {
		h := policy.TLS{Seen: true, MaxVersion: version, ECH: ech}
		if sni != "" {
			h.SNI = name(sni)
		}
		return h
	}
	good := policy.Request{Source: src, Name: name("listed.example"), Port: 443, Protocol: policy.ProtocolTLS, TLS: tls("listed.example", 0x0304, false)}
	with := func(change func(*policy.Request)) policy.Request { r := good; change(&r); return r }
	qtype := func(s string) uint16 { q, _ := policy.ParseQType(s); return q }
	check := func(why string, ask policy.Request, r refusal) {
		t.Helper()
		ask.Time = time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
		p, _, err := policy.Load("policy.yaml", []byte(before), policy.Options{})
		if err != nil {
			t.Fatal(err)
		}
		d := p.Decide(ask)
		if d.Passes() || d.Reason.String() != why {
			t.Errorf("%s: before it is %v, %v", why, d.Verdict, d.Reason)
			return
		}
		r.Group, r.Reason, r.Rule, r.Source = d.Group, why, d.Rule, ask.Source.String()
		m := remedyFor(r)
		text := before
		if why == "unmatched_source" {
			text += "  " + strings.ReplaceAll(strings.TrimSpace(m.Rule), "\n", "\n  ") + "\n"
		} else {
			text = strings.Replace(before, "    allow:\n", "    allow:\n      "+strings.ReplaceAll(strings.TrimSpace(m.Rule), "\n", "\n      ")+"\n", 1)
		}
		if p, _, err = policy.Load("policy.yaml", []byte(text), policy.Options{}); err != nil {
			t.Errorf("%s: the rule offered is none: %v\n%s", why, err, m.Rule)
			return
		}
		if d = p.Decide(ask); d.Verdict != policy.Allow {
			t.Errorf("%s: still %v, %v with\n%s", why, d.Verdict, d.Reason, m.Rule)
		}
		other := ask
		other.Name, other.TLS = name("other.example"), tls("other.example", 0x0304, false)
		if d = p.Decide(other); d.Verdict == policy.Allow {
			t.Errorf("%s: opens another name too:\n%s", why, m.Rule)
		}
		if m.Explain == "" || m.Why == "" {
			t.Errorf("%s: %+v", why, m)
		}
	}
	connect := func(host string, port uint16) policy.Request {
		return policy.Request{Source: src, Name: name(host), Port: port}
	}
	check("not_listed", connect("new.example", 443), refusal{Name: "New.Example.", Port: 443})
	check("not_listed", connect("new.example", 80), refusal{Name: "new.example", Port: 80, HTTP: true})
	check("not_listed", connect("new.example", 8443), refusal{Name: "new.example", Port: 8443})
	check("not_listed", connect("new.example", 22), refusal{Name: "new.example", Port: 22})
	check("not_listed", connect("null", 443), refusal{Name: "null", Port: 443})
	check("not_listed", connect("xn--bcher-kva.example", 443), refusal{Name: "bücher.example", Port: 443})
	check("not_listed", policy.Request{Source: src6, Name: name("_x.new.example"), Protocol: policy.ProtocolDNS, QType: qtype("A")}, refusal{Name: "_x.new.example", DNS: true, QType: "A"})
	check("not_listed", policy.Request{Source: src, Name: name("new.example"), Protocol: policy.ProtocolDNS, QType: qtype("TXT")}, refusal{Name: "new.example", DNS: true, QType: "TXT"})
	check("qtype_not_allowed", policy.Request{Source: src, Name: name("listed.example"), Protocol: policy.ProtocolDNS, QType: qtype("SRV")}, refusal{Name: "listed.example", DNS: true, QType: "SRV"})
	check("port_not_allowed", connect("listed.example", 8443), refusal{Name: "listed.example", Port: 8443})
	check("protocol_not_allowed", with(func(r *policy.Request) {
		r.Name, r.TLS, r.Port = name("plain.example"), tls("plain.example", 0x0304, false), 80
	}), refusal{Name: "plain.example", Port: 80})
	check("protocol_not_allowed", policy.Request{Source: src, Name: name("secure.example"), Port: 443, Protocol: policy.ProtocolHTTP}, refusal{Name: "secure.example", Port: 443, HTTP: true})
	check("rule_expired", connect("old.example", 443), refusal{Name: "old.example", Port: 443})
	check("unmatched_source", policy.Request{Source: netip.MustParseAddr("192.0.2.9"), Name: name("new.example"), Port: 443}, refusal{Name: "new.example", Port: 443})
	check("unmatched_source", policy.Request{Source: netip.MustParseAddr("2001:db8:9::9"), Name: name("new.example"), Port: 8443}, refusal{Name: "new.example", Port: 8443})
	lit := netip.MustParseAddr("1.1.1.1")
	check("ip_literal", policy.Request{Source: src, Address: lit, Destination: lit, Port: 443}, refusal{Name: "1.1.1.1", Port: 443})
	lit6 := netip.MustParseAddr("2606:4700:4700::1111")
	check("ip_literal", policy.Request{Source: src, Address: lit6, Destination: lit6, Port: 853}, refusal{Name: "2606:4700:4700::1111", Port: 853})
	check("private_destination", with(func(r *policy.Request) { r.Destination = netip.MustParseAddr("10.1.2.3") }), refusal{Name: "listed.example", Port: 443, Destination: netip.MustParseAddr("10.1.2.3")})
	check("sni_mismatch", with(func(r *policy.Request) { r.TLS = tls("gist.example", 0x0304, false) }), refusal{Name: "listed.example", Port: 443, SNI: "gist.example"})
	check("sni_missing", with(func(r *policy.Request) { r.TLS = tls("", 0x0304, false) }), refusal{Name: "listed.example", Port: 443})
	check("tls_version", with(func(r *policy.Request) { r.TLS = tls("listed.example", 0x0302, false) }), refusal{Name: "listed.example", Port: 443, MinVersion: "1.1"})
	check("ech_not_allowed", with(func(r *policy.Request) { r.TLS = tls("listed.example", 0x0304, true) }), refusal{Name: "listed.example", Port: 443})
	check("not_tls", with(func(r *policy.Request) { r.Protocol, r.TLS = policy.ProtocolTCP, policy.TLS{} }), refusal{Name: "listed.example", Port: 443})
	check("explicit_deny", connect("metadata.google.internal", 443), refusal{Name: "metadata.google.internal", Port: 443})
}

// TestNoRemedy holds that no rule is offered where none would help, or where what was
// asked for cannot be written in one.
func TestNoRemedy(t *testing.T) {
	check := func(r refusal) {
		t.Helper()
		r.Group, r.Source = "ci", "10.20.1.5"
		if m := remedyFor(r); m.Rule != "" || m.Why == "" {
			t.Errorf("%+v: %+v", r, m)
		}
	}
	check(refusal{Name: "forbidden.example", Port: 443, Reason: "explicit_deny", Rule: "forbidden.example"})
	check(refusal{Name: "forbidden.example", DNS: true, QType: "A", Reason: "explicit_deny", Rule: "forbidden.example"})
	check(refusal{Name: "x.example", Port: 443, Reason: "loop"})
	check(refusal{Name: "x.example", Port: 443, Reason: "connect_failed"})
	check(refusal{Name: "x.example", Port: 443, Reason: "private_destination"}) // where to is not known
	check(refusal{Name: "x.example", Port: 443, Reason: "something_new"})
	check(refusal{Name: "x.example", Port: 0, Reason: "not_listed"})
	for _, name := range []string{"", "<script>alert(1)</script>", "a\nb.example", `x"]}, deny: [`, "a b", "\u202eelpmaxe.x", "$(reboot).example", strings.Repeat("a.", 200)} {
		r := refusal{Name: name, Port: 443, Reason: "not_listed"}
		check(r)
		r.Group, r.Source = "ci", "10.20.1.5"
		if m := remedyFor(r); m.Explain != "" {
			t.Errorf("a command with %q: %s", name, m.Explain)
		}
	}
}

func TestExplainCommand(t *testing.T) {
	check := func(want string, r refusal) {
		t.Helper()
		if got := remedyFor(r).Explain; got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
	check("sallyport explain --source 10.20.1.5 api.example:443", refusal{Source: "10.20.1.5", Name: "api.example", Port: 443})
	check("sallyport explain --source 10.20.1.5 http://api.example:80/", refusal{Source: "10.20.1.5", Name: "api.example", Port: 80, HTTP: true})
	check("sallyport explain --source 10.20.1.5 --dns TXT api.example", refusal{Source: "10.20.1.5", Name: "api.example", DNS: true, QType: "TXT"})
	check("sallyport explain --source 10.20.1.5 --dns A api.example", refusal{Source: "10.20.1.5", Name: "api.example", DNS: true, QType: "$(x)"})
	check("sallyport explain --source 2001:db8::1 --sni b.example '[2001:db8::2]:443'", refusal{Source: "2001:db8::1", Name: "2001:db8::2", Port: 443, SNI: "b.example"})
	check(`sallyport explain --source 10.20.1.5 --user 'o'\''neill' api.example:443`, refusal{Source: "10.20.1.5", User: "o'neill", Name: "api.example", Port: 443})
	check("", refusal{Source: "", Name: "api.example", Port: 443})
}

// TestEveryReasonIsExplained keeps the page's words complete.
func TestEveryReasonIsExplained(t *testing.T) {
	known := map[string]bool{}
	for _, r := range policy.Reasons() {
		known[r.String()] = true
		if reasons[r.String()].why == "" {
			t.Errorf("reason %s has no explanation", r)
		}
	}
	for r := range reasons {
		if !known[r] {
			t.Errorf("%s is no reason", r)
		}
	}
}
