package dnsfilter

import (
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

func TestServiceBindings(t *testing.T) {
	public := func(a netip.Addr) bool { return !a.IsPrivate() && !a.IsLoopback() }
	for _, tt := range []struct{ in, stripped, filtered string }{
		{`1 . alpn="h2"`, `1 . alpn="h2"`, `1 . alpn="h2"`},
		{`1 . alpn="h2" ech="AEX+DQ=="`, `1 . alpn="h2"`, `1 . alpn="h2" ech="AEX+DQ=="`},
		{`1 . mandatory="ech" ech="AEX+DQ=="`, `1 .`, `1 . mandatory="ech" ech="AEX+DQ=="`},
		{`1 . mandatory="alpn,ech" alpn="h2" ech="AEX+DQ=="`, `1 . mandatory="alpn" alpn="h2"`, `1 . mandatory="alpn,ech" alpn="h2" ech="AEX+DQ=="`},
		{`1 . ipv4hint="10.0.0.1,192.0.2.1"`, `1 . ipv4hint="10.0.0.1,192.0.2.1"`, `1 . ipv4hint="192.0.2.1"`},
		{`1 . mandatory="ipv4hint" ipv4hint="10.0.0.1" ipv6hint="fd00::1,2001:db8::1" port="8443"`,
			`1 . mandatory="ipv4hint" ipv4hint="10.0.0.1" ipv6hint="fd00::1,2001:db8::1" port="8443"`, `1 . ipv6hint="2001:db8::1" port="8443"`},
		{`1 . ipv4hint="127.0.0.1" ipv6hint="::1"`, `1 . ipv4hint="127.0.0.1" ipv6hint="::1"`, `1 .`},
		{`0 other.test.`, `0 other.test.`, `0 other.test.`},
		{`1 . key65000="x"`, `1 . key65000="x"`, `1 . key65000="x"`},
	} {
		for _, typ := range []string{"SVCB", "HTTPS"} {
			parse := func() dns.RR {
				rr, err := dns.NewRR("a.test. 60 IN " + typ + " " + tt.in)
				if err != nil {
					t.Fatal(err)
				}
				return rr
			}
			rr := parse()
			changed := stripECH(serviceBinding(rr))
			if got := data(&dns.Msg{Answer: []dns.RR{rr}})[0]; got != typ+" "+tt.stripped || changed != (tt.in != tt.stripped) {
				t.Errorf("without ech: %s, want %s", got, tt.stripped)
			}
			rr = parse()
			changed = filterHints(serviceBinding(rr), public)
			if got := data(&dns.Msg{Answer: []dns.RR{rr}})[0]; got != typ+" "+tt.filtered || changed != (tt.in != tt.filtered) {
				t.Errorf("filtered: %s, want %s", got, tt.filtered)
			}
			p, err := (&dns.Msg{Answer: []dns.RR{rr}}).Pack()
			if err != nil || new(dns.Msg).Unpack(p) != nil {
				t.Errorf("%v cannot be sent: %v", rr, err)
			}
		}
	}
}
