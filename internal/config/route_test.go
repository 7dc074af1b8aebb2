package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestRoutes(t *testing.T) {
	s := mustLoad(t, `
proxy:
  parent: https://Proxy.corp.example:8443/
  parent_credentials_file: parent.secret
  parent_resolves: [.Corp.Example., "*.bücher.example", one.example]
  source_address: [192.0.2.7, "2001:DB8::7"]
  groups:
    - {group: a, parent: "http://u:p%40ss@[2001:db8::1]:3128", source_address: [192.0.2.8]}
    - {group: b, parent: http://192.0.2.1:3128, parent_credentials_file: /run/b.secret}
    - {group: c, parent: direct}
  pac: {direct: [.Corp.example, 10.0.0.0/8, 192.0.2.1]}
`, LoadOptions{}).Proxy
	if !slices.Equal(s.ParentResolves, []string{".corp.example", "*.xn--bcher-kva.example", "one.example"}) || !slices.Equal(s.PAC.Direct, []string{".corp.example", "10.0.0.0/8", "192.0.2.1/32"}) {
		t.Errorf("%q, %q", s.ParentResolves, s.PAC.Direct)
	}
	if len(s.Groups) != 3 || s.Groups[0].Parent != "http://u:p%40ss@[2001:db8::1]:3128" || !slices.Equal(s.Groups[0].SourceAddress, []netip.Addr{netip.MustParseAddr("192.0.2.8")}) ||
		s.Groups[1].ParentCredentialsFile != "/run/b.secret" || s.Groups[2].Parent != Direct {
		t.Errorf("%+v", s.Groups)
	}
	if !filepath.IsAbs(s.ParentCredentialsFile) || len(s.SourceAddress) != 2 {
		t.Errorf("%+v", s)
	}
}

// What is said of mistakes never repeats a password.
func TestPasswordsStayUnsaid(t *testing.T) {
	for _, file := range []string{"routes", "routes2"} {
		golden, err := os.ReadFile("testdata/mistakes/" + file + ".golden")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(golden), "s3cret") {
			t.Errorf("%s.golden has a password", file)
		}
	}
	for _, s := range []string{"http://u:s3cret@h", "u:s3cret@h:1", "://u:s3cret@h:1", "http://u:s3cret%zz@h:1", "http://u:s3cret\x01@h:1", "verylongscheme://u:s3cret@h:1"} {
		if _, err := parseParent(nil, s); err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"s3cret", ":s3cret", "u:s3cret\nmore", "u:s3cret\x00", "u:s3cret" + strings.Repeat("x", maxText)} {
		if err := CheckCredentials(s); err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: %v", s, err)
		}
	}
}
