package doctor

import (
	"errors"
	"strings"
	"testing"
)

const gateURL = "http://10.0.0.10:3128"

func TestEnvironment(t *testing.T) {
	both := func(no string) []string {
		return []string{"http_proxy=" + gateURL, "HTTP_PROXY=" + gateURL, "https_proxy=" + gateURL, "HTTPS_PROXY=" + gateURL, "no_proxy=" + no, "NO_PROXY=" + no}
	}
	with := func(more ...string) []string { return append(both("localhost,127.0.0.1,::1,.corp.example"), more...) }
	for _, tt := range []struct {
		name  string
		env   []string
		proxy string
		want  string   // the proxy that is looked at
		found []string // a part of each problem, in order
	}{
		{"as sallyport env prints it", with(), "", gateURL, nil},
		{"nothing", nil, "", "", []string{"http_proxy and HTTP_PROXY are not set", "https_proxy and HTTPS_PROXY are not set"}},
		{"nothing, but a flag", nil, gateURL, gateURL, []string{"http_proxy and HTTP_PROXY are not set", "https_proxy and HTTPS_PROXY are not set"}},
		{"capitals alone", []string{"HTTP_PROXY=" + gateURL, "HTTPS_PROXY=" + gateURL}, "", gateURL, []string{"HTTP_PROXY is set and http_proxy is not", "HTTPS_PROXY is set and https_proxy is not"}},
		{"small letters alone", []string{"http_proxy=" + gateURL, "https_proxy=" + gateURL, "no_proxy=localhost"}, "", gateURL,
			[]string{"http_proxy is set and HTTP_PROXY is not", "https_proxy is set and HTTPS_PROXY is not", "no_proxy is set and NO_PROXY is not"}},
		{"spellings differ", append(both("localhost"), "HTTPS_PROXY=http://other:1"), "", gateURL, []string{`https_proxy and HTTPS_PROXY differ: "http://10.0.0.10:3128", "http://other:1"`}},
		{"protocols differ", []string{"http_proxy=" + gateURL, "HTTP_PROXY=" + gateURL, "https_proxy=http://other:1", "HTTPS_PROXY=http://other:1"}, "", "http://other:1", []string{"http_proxy and https_proxy differ"}},
		{"another than the flag's", with(), "http://other:1", "http://other:1", []string{`https_proxy leads to "http://10.0.0.10:3128", not to http://other:1`, "http_proxy leads to"}},
		{"socks beside", with("ALL_PROXY=socks5://x:1"), "", gateURL, []string{"ALL_PROXY is"}},
		{"socks", []string{"http_proxy=socks5://x:1", "HTTP_PROXY=socks5://x:1", "https_proxy=socks5://x:1", "HTTPS_PROXY=socks5://x:1"}, "", "", []string{`does not speak "socks5"`}},
		{"no scheme", []string{"http_proxy=gate:3128", "HTTP_PROXY=gate:3128", "https_proxy=gate:3128", "HTTPS_PROXY=gate:3128"}, "", "http://gate:3128", []string{"without a scheme"}},
		{"no port", []string{"http_proxy=https://gate", "HTTP_PROXY=https://gate", "https_proxy=https://gate", "HTTPS_PROXY=https://gate"}, "", "https://gate:443", nil},
		{"no host", []string{"http_proxy=http://:1", "HTTP_PROXY=http://:1", "https_proxy=http://:1", "HTTPS_PROXY=http://:1"}, "", "", []string{"names no host"}},
		{"a password is not shown", []string{"http_proxy=http://u:secret@a:1", "HTTP_PROXY=http://u:secret@b:1", "https_proxy=x://u:secret@a:1", "HTTPS_PROXY=x://u:secret@a:1"}, "", "",
			[]string{`"http://…@a:1", "http://…@b:1"`, "http_proxy and https_proxy differ", `"x://…@a:1"`}},
		{"a bundle that is not there", with("SSL_CERT_FILE=/missing", "CURL_CA_BUNDLE=/there"), "", gateURL, []string{"SSL_CERT_FILE names a file that cannot be read"}},
		{"everything past", both("*"), "", gateURL, []string{"no_proxy has *: nothing"}},
		{"spaces", both("localhost, corp.example"), "", gateURL, []string{"spaces or semicolons"}},
		{"metadata", both("localhost,169.254.169.254"), "", gateURL, []string{"169.254.169.254: every program may ask past the gate"}},
		{"metadata that is meant", both("localhost,169.254.169.254"), "", gateURL, nil},
		{"metadata with a port, and IPv6", both("169.254.169.254:80,[fd00:ec2::254]"), "", gateURL, []string{"169.254.169.254:", "fd00:ec2::254:"}},
		{"metadata in a prefix", both("169.254.0.0/16"), "", gateURL, []string{"169.254.0.0/16, in which a cloud's metadata service lies"}},
		{"a prefix", both("10.0.0.0/8"), "", gateURL, []string{"the prefix 10.0.0.0/8"}},
		{"patterns", both("*.corp.example,a*.corp.example"), "", gateURL, []string{`"*.corp.example": few programs know`, `"a*.corp.example": programs know no *`}},
		{"a URL", both("http://corp.example"), "", gateURL, []string{"has a URL"}},
		{"a whole top-level domain", both(".com"), "", gateURL, []string{`".com": every name below it`}},
		{"a suffix and a host with a port are fine", both("corp.example,.corp.example,db.corp.example:5432,10.1.2.3,::1,intranet"), "", gateURL, nil},
		{"a terminal is not harmed", both("\x1b[31m*x"), "", gateURL, []string{`"\x1b[31m*x"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := Config{Metadata: strings.Contains(tt.name, "is meant"), Env: tt.env, Proxy: tt.proxy, Exists: func(name string) error {
				if name == "/missing" {
					return errors.New("no such file")
				}
				return nil
			}}
			proxy, results := c.environment()
			got := ""
			if proxy != nil {
				got = proxy.String()
			}
			if got != tt.want && !strings.Contains(got, "secret") {
				t.Errorf("proxy %q, want %q", got, tt.want)
			}
			var problems []Result
			for _, r := range results {
				if r.Status == Problem {
					problems = append(problems, r)
				}
				if strings.Contains(r.What, "secret") {
					t.Errorf("a password is shown: %s", r.What)
				}
				if r.Status == Problem && r.Fix == "" {
					t.Errorf("nothing to do about %s", r.What)
				}
			}
			if len(problems) != len(tt.found) {
				t.Fatalf("found %q, want %q", problems, tt.found)
			}
			for i, p := range problems {
				if !strings.Contains(p.What, tt.found[i]) {
					t.Errorf("problem %d is %q, want %q", i, p.What, tt.found[i])
				}
			}
			if len(results) == 0 {
				t.Error("nothing is said")
			}
		})
	}
}
