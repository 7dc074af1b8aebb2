package config

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestResolverOverTLS(t *testing.T) {
	s := mustLoad(t, `
dns:
  listen: []
  tls_listen: [":853"]
  https_listen: ["[::1]:443"]
  tls: {certificate: c.pem, key: /k.pem}
  proxy_protocol: {trusted: [10.0.0.0/28, 192.0.2.1/32]}
`, LoadOptions{})
	d, want := s.DNS, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/28"), netip.MustParsePrefix("192.0.2.1/32")}
	if d.TLS.Certificate != filepath.Join(filepath.Dir(s.File), "c.pem") || d.TLS.Key != "/k.pem" ||
		!slices.Equal(d.TLSListen, []string{":853"}) || !slices.Equal(d.HTTPSListen, []string{"[::1]:443"}) || !slices.Equal(d.ProxyProtocol.Trusted, want) {
		t.Errorf("dns = %+v", d)
	}
	// An encrypted listener alone is something to run.
	mustLoad(t, "proxy: {listen: []}\ndns: {listen: [], https_listen: [\":443\"], tls: {certificate: c.pem, key: k.pem}}\n", LoadOptions{})
	_, _, err := load(t, `
dns:
  tls_listen: [":853", "127.0.0.1:3128"]
  https_listen: [":853"]
  tls: {certificate: c.pem, client_ca: x}
`, LoadOptions{})
	for _, want := range []string{
		`:3:15: dns.tls_listen: TLS needs a certificate; write dns.tls.certificate and dns.tls.key, or []`,
		`:3:24: dns.tls_listen[1]: "127.0.0.1:3128" is taken by proxy.listen[0] already`,
		`:4:17: dns.https_listen: TLS needs a certificate`,
		`:4:18: dns.https_listen[0]: ":853" is taken by dns.tls_listen[0] already`,
		`dns.tls: unknown key "client_ca"`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the mistakes lack %q:\n%v", want, err)
		}
	}
}
