package config

import (
	"strings"
	"testing"
)

func TestAdminBeyondLoopback(t *testing.T) {
	check := func(admin string, ok bool) {
		t.Helper()
		_, _, err := load(t, "admin: "+admin+"\n", LoadOptions{})
		if ok && err != nil {
			t.Errorf("%s: %v", admin, err)
		}
		if !ok && (err == nil || !strings.Contains(err.Error(), "admin.listen: ") || !strings.Contains(err.Error(), "admin.token_file")) {
			t.Errorf("%s: %v", admin, err)
		}
	}
	for _, listen := range []string{`"127.0.0.1:9128"`, `"127.9.9.9:0"`, `"[::1]:9128"`, `"[::ffff:127.0.0.1]:9128"`, `""`} {
		check("{listen: "+listen+"}", true)
	}
	for _, listen := range []string{`":9128"`, `"0.0.0.0:9128"`, `"[::]:9128"`, `"10.0.0.1:9128"`, `"[2001:db8::1]:9128"`, `"[::ffff:10.0.0.1]:9128"`} {
		check("{listen: "+listen+"}", false)
		check("{listen: "+listen+", open_metrics: true, hosts: [gate.example]}", false)
		check("{listen: "+listen+", tls: {certificate: c.pem, key: k.pem}}", false)
		check("{listen: "+listen+", token_file: token}", true)
		check("{listen: "+listen+", tls: {certificate: c.pem, key: k.pem, client_ca: ca.pem}}", true)
	}
	for admin, want := range map[string]bool{
		`{listen: ":9128", token_file: t}`:                                        true,
		`{listen: "127.0.0.1:9128", token_file: t}`:                               false,
		`{listen: ":9128", token_file: t, tls: {certificate: c.pem, key: k.pem}}`: false,
	} {
		if s := mustLoad(t, "admin: "+admin+"\n", LoadOptions{}); s.Admin.InClear() != want {
			t.Errorf("%s: %v", admin, !want)
		}
	}
}
