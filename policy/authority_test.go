package policy

import "testing"

func TestParseAuthority(t *testing.T) {
	good := func(in, host string, port uint16) {
		t.Helper()
		n, a, p, err := ParseAuthority(in)
		got := n.String()
		if a.IsValid() {
			got = a.String()
		}
		if err != nil || got != host || p != port || a.IsValid() != n.IsZero() {
			t.Errorf("ParseAuthority(%q) = %q %v, %d, %v, want %q, %d", in, n, a, p, err, host, port)
		}
	}
	good("api.ok.test:443", "api.ok.test", 443)
	good("API.ok.test.:65535", "api.ok.test", 65535)
	good("93.184.216.34:1", "93.184.216.34", 1)
	good("[::1]:443", "::1", 443)
	good("[::ffff:127.0.0.1]:443", "::ffff:127.0.0.1", 443)
	good("bücher.test:443", "xn--bcher-kva.test", 443)

	for _, in := range []string{
		"", ":", ":443", "api.ok.test", "api.ok.test:", "api.ok.test:0", "api.ok.test:65536", "api.ok.test:4294967739",
		"api.ok.test:443 ", "api.ok.test: 443", "api.ok.test:+443", "api.ok.test:-1", "api.ok.test:0443", "api.ok.test:0x1bb",
		"api.ok.test:https", "[::1%eth0]:443", "[fe80::1%25eth0]:443", "[127.0.0.1]:443", "[api.ok.test]:443", "[::1:443",
		"::1:443", "2001:db8::1:443", "user@api.ok.test:443", "api.ok.test/x:443", "http://api.ok.test:443",
		"2130706433:443", "0x7f000001:443", "0177.0.0.1:443", "127.1:443", "0:443", "a..b:443", "api.ok.test\x00:443",
		"api.ok.test%00.evil.test:443", "api.ok.test#.evil.test:443", "api.ok.test:443:443",
	} {
		if n, a, p, err := ParseAuthority(in); err == nil {
			t.Errorf("ParseAuthority(%q) = %q %v, %d, want an error", in, n, a, p)
		}
	}
}
