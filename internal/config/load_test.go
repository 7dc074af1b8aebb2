package config

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
)

var update = flag.Bool("update", false, "write the golden files")

// defaults is a small stand-in for the embedded settings.
const defaults = `
proxy:
  listen: ["127.0.0.1:3128"]
  help_url: ""
  proxy_protocol: {trusted: []}
  auth: {htpasswd: "", realm: sallyport, required: false}
  tls_listen: []
  tls: {certificate: "", key: "", client_ca: "", require_client_certificate: false, user_from: san, min_version: "1.2"}
  timeouts: {connect: 10s, client_hello: 10s, request_header: 10s, idle: 10m, drain: 30s}
  limits: {tunnels: 0, tunnels_per_source: 0, client_hello_bytes: 16384, header_bytes: 65536}
  parent: ""
  parent_credentials_file: ""
  parent_target: name
  parent_resolves: []
  source_address: []
  groups: []
  pac: {direct: []}
dns:
  listen: ["127.0.0.1:1053"]
  tls_listen: []
  https_listen: []
  tls: {certificate: "", key: ""}
  proxy_protocol: {trusted: []}
  upstreams: []
  zones: []
  records: []
  hosts_file: /etc/hosts
  deny: refused
  https_records: strip_ech
  cnames: trust
  edns_size: 1232
  upstream_mode: sequential
  case_randomisation: false
  health_name: ""
  search_domains: []
  cache: {size: 64MiB, min_ttl: 0s, max_ttl: 24h, serve_stale: 1h, prefetch: false}
admin: {listen: "127.0.0.1:9128"}
policy: {source: embedded}
log: {format: json, output: stdout, level: info}
node: gate-1
`

// load is Load with the defaults above, and a settings file if text is not "".
func load(t *testing.T, text string, o LoadOptions) (Settings, []string, error) {
	t.Helper()
	if text != "" {
		o.File = filepath.Join(t.TempDir(), "sallyport.yaml")
		if err := os.WriteFile(o.File, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	o.Default = []byte(defaults)
	return Load(o)
}

func mustLoad(t *testing.T, text string, o LoadOptions) Settings {
	t.Helper()
	s, _, err := load(t, text, o)
	if err != nil {
		t.Fatalf("Load: %v", err)
	}
	return s
}

func TestMistakes(t *testing.T) {
	files, err := filepath.Glob("testdata/mistakes/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no test data: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			_, _, err := Load(LoadOptions{File: file, Default: []byte(defaults)})
			if err == nil {
				t.Fatal("Load found no mistake")
			}
			golden := strings.TrimSuffix(file, "yaml") + "golden"
			if *update {
				if err := os.WriteFile(golden, []byte(err.Error()+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, rerr := os.ReadFile(golden)
			if rerr != nil {
				t.Fatal(rerr)
			}
			if got := err.Error() + "\n"; got != string(want) {
				t.Errorf("mistakes:\n%s\nwant:\n%s", got, want)
			}
			located, ok := errors.AsType[*policy.Error](err)
			if !ok || located.Pos.File != file || located.Pos.Line == 0 {
				t.Errorf("the error has no position: %+v", located)
			}
		})
	}
}

func TestDefaults(t *testing.T) {
	s := mustLoad(t, "", LoadOptions{})
	want := Settings{
		Node: "gate-1",
		Proxy: Proxy{
			Listen:        []string{"127.0.0.1:3128"},
			ProxyProtocol: ProxyProtocol{Trusted: []netip.Prefix{}},
			Auth:          Auth{Realm: "sallyport"},
			TLSListen:     []string{},
			TLS:           TLS{UserFrom: "san", MinVersion: "1.2"},
			Timeouts:      Timeouts{10 * time.Second, 10 * time.Second, 10 * time.Second, 10 * time.Minute, 30 * time.Second},
			Limits:        Limits{ClientHelloBytes: 16384, HeaderBytes: 65536},
			ParentTarget:  "name", ParentResolves: []string{}, SourceAddress: []netip.Addr{}, Groups: []ProxyGroup{}, PAC: PAC{Direct: []string{}},
		},
		DNS: DNS{
			Listen: []string{"127.0.0.1:1053"}, Upstreams: []string{}, Zones: []Zone{}, Records: []Record{},
			HostsFile: "/etc/hosts", Deny: "refused", HTTPSRecords: "strip_ech", CNAMEs: "trust", EDNSSize: 1232,
			UpstreamMode: "sequential", SearchDomains: []string{}, TLSListen: []string{}, HTTPSListen: []string{}, ProxyProtocol: ProxyProtocol{Trusted: []netip.Prefix{}},
			Cache: Cache{Size: 64 << 20, MaxTTL: 24 * time.Hour, ServeStale: time.Hour},
		},
		Admin:  Admin{Listen: "127.0.0.1:9128"},
		Policy: Policy{Source: Embedded},
		Log:    Log{Format: "json", Output: "stdout", Level: "info"},
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("Load() = %+v\nwant    %+v", s, want)
	}
}

func TestFile(t *testing.T) {
	s := mustLoad(t, `
proxy:
  timeouts: {idle: 1d12h}
  limits: # every line of it commented out
dns:
  listen: []
  upstreams: [192.0.2.53, "[2001:db8::53]:5353", "tcp://192.0.2.54", "tls://192.0.2.53#dns.example", "https://dns.example/dns-query"]
  zones: [{zone: Corp.Example., upstreams: [10.0.0.53]}]
  records:
    - {name: proxy.egress.internal, type: A, value: 10.0.0.10}
    - {name: proxy.egress.internal, type: AAAA, value: "2001:DB8::1", ttl: 0s}
  hosts_file: ""
  cache: {size: 1024}
`, LoadOptions{})
	if got := s.Proxy.Timeouts; got.Idle != 36*time.Hour || got.Drain != 30*time.Second {
		t.Errorf("timeouts = %+v: want idle from the file and drain from the default", got)
	}
	if len(s.DNS.Listen) != 0 || s.DNS.HostsFile != "" || s.DNS.Cache.Size != 1024 {
		t.Errorf("dns = %+v: an empty value in the file must win over the default", s.DNS)
	}
	if z := s.DNS.Zones; len(z) != 1 || z[0].Zone != "corp.example" || z[0].Upstreams[0] != "10.0.0.53" {
		t.Errorf("zones = %+v", z)
	}
	want := []Record{{"proxy.egress.internal", "A", "10.0.0.10", time.Minute}, {"proxy.egress.internal", "AAAA", "2001:db8::1", 0}}
	if !reflect.DeepEqual(s.DNS.Records, want) {
		t.Errorf("records = %+v, want %+v", s.DNS.Records, want)
	}
}

func TestPrecedence(t *testing.T) {
	const file = "log: {level: warn}\nproxy: {listen: [\":1\", \":2\"]}\n"
	env := []string{"SALLYPORT_LOG_LEVEL=error", "SALLYPORT_PROXY_LISTEN=127.0.0.1:3, [::1]:4"}
	flags := []Override{{"--log-level", "log.level", "debug"}, {"--set", "proxy.listen", ":5"}}
	tests := []struct {
		name, file string
		env        []string
		flags      []Override
		level      string
		listen     []string
	}{
		{"default", "", nil, nil, "info", []string{"127.0.0.1:3128"}},
		{"file over default", file, nil, nil, "warn", []string{":1", ":2"}},
		{"environment over file", file, env, nil, "error", []string{"127.0.0.1:3", "[::1]:4"}},
		{"flag over environment", file, env, flags, "debug", []string{":5"}},
		{"flag over default", "", nil, flags, "debug", []string{":5"}},
		{"empty variable is not set", file, []string{"SALLYPORT_LOG_LEVEL=", "SALLYPORT_PROXY_LISTEN="}, nil, "warn", []string{":1", ":2"}},
		{"empty list", "", []string{"SALLYPORT_PROXY_LISTEN=[]"}, nil, "info", []string{}},
		{"last flag", "", nil, append(flags, Override{"--log-level", "log.level", "warn"}), "warn", []string{":5"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := mustLoad(t, tt.file, LoadOptions{Env: tt.env, Flags: tt.flags})
			if s.Log.Level != tt.level || !slices.Equal(s.Proxy.Listen, tt.listen) {
				t.Errorf("level %q, listen %q; want %q, %q", s.Log.Level, s.Proxy.Listen, tt.level, tt.listen)
			}
		})
	}
}

// Every setting must be within reach of the environment and of --set.
func TestEveryKeyEverywhere(t *testing.T) {
	values := map[string]string{
		"node": "gate-2", "proxy.listen": ":1", "proxy.help_url": "mailto:net@corp.example", "proxy.proxy_protocol.trusted": "10.0.0.0/8",
		"dns.listen": ":2", "dns.upstreams": "192.0.2.1", "dns.zones": `[{"zone": "corp.example", "upstreams": ["10.0.0.53"], "private_destinations": ["10.0.0.0/8"]}]`,
		"dns.tls_listen": "[]", "dns.https_listen": "[]", "dns.tls.certificate": "c.pem", "dns.tls.key": "k.pem", "dns.proxy_protocol.trusted": "10.0.0.0/8",
		"dns.records":    "[{name: a.example, type: TXT, value: hello}]",
		"dns.hosts_file": "hosts", "dns.deny": "nodata", "dns.https_records": "pass", "dns.cnames": "inspect",
		"dns.upstream_mode": "fastest", "dns.health_name": "health.example", "dns.search_domains": "cluster.local",
		"dns.edns_size": "512", "dns.limits.ipv4_prefix": "8", "dns.limits.ipv6_prefix": "48", "dns.limits.over_limit": "drop",
		"dns.limits.exempt": "10.0.0.0/8", "dns.tunnel_guard.mode": "refuse", "dns.tunnel_guard.unique_names_per_minute": "8", "dns.tunnel_guard.exempt": "cdn.example",
		"dns.cache.min_ttl": "1s", "admin.listen": "127.0.0.1:3", "admin.hosts": "gate.example", "policy.source": "p.yaml",
		"log.format": "squid", "log.output": "stderr", "log.level": "debug", "log.dns": "sample", "log.facility": "local3",
		"proxy.limits.client_hello_bytes": "1KiB", "proxy.limits.header_bytes": "1KiB", "proxy.limits.url_bytes": "1KiB",
		"proxy.parent": "http://192.0.2.1:3128", "proxy.parent_target": "address", "proxy.parent_resolves": ".corp.example",
		"proxy.source_address": "192.0.2.7, 2001:db8::7", "proxy.groups": "[{group: a, parent: direct, source_address: [192.0.2.8]}]",
		"admin.token_file": "token", "admin.tls.certificate": "c.pem", "admin.tls.key": "k.pem", "admin.tls.client_ca": "ca.pem",
		"proxy.pac.direct": "10.0.0.0/8", "discovery.retention": "7d",
		"proxy.auth.htpasswd": "users", "proxy.auth.realm": "corp", "proxy.auth.required": "false", "proxy.tls_listen": "[]",
		"proxy.tls.certificate": "c.pem", "proxy.tls.key": "k.pem", "proxy.tls.client_ca": "ca.pem",
		"proxy.tls.require_client_certificate": "false", "proxy.tls.user_from": "cn", "proxy.tls.min_version": "1.3",
	}
	alone := map[string]bool{ // keys that nothing but their default can stand for alone
		"proxy.auth.required": true, "proxy.tls_listen": true,
		"proxy.tls.require_client_certificate": true, "dns.tls_listen": true, "dns.https_listen": true,
	}
	def := mustLoad(t, "", LoadOptions{})
	seen := map[string]string{}
	for _, f := range leaves {
		value, ok := values[f.path]
		switch {
		case ok:
		case f.kindName == "duration":
			value = "3s"
		case f.kindName == "bool":
			value = "true"
		default:
			value = "7"
		}
		env := mustLoad(t, "", LoadOptions{Env: []string{f.env() + "=" + value}})
		set := mustLoad(t, "", LoadOptions{Flags: []Override{{"--set", f.path, value}}})
		if !reflect.DeepEqual(env, set) {
			t.Errorf("%s=%s and --set %s=%s differ", f.env(), value, f.path, value)
		}
		if reflect.DeepEqual(env, def) && !alone[f.path] {
			t.Errorf("%s=%s changes nothing", f.env(), value)
		}
		if other, ok := seen[f.env()]; ok {
			t.Errorf("%s stands for %s and %s", f.env(), other, f.path)
		}
		seen[f.env()] = f.path
	}
}

func TestOverrideMistakes(t *testing.T) {
	_, _, err := load(t, "", LoadOptions{
		Env: []string{
			"SALLYPORT_PROXY_TIMEOUTS_IDLE=5",
			"SALLYPORT_DNS_ZONES=[{zone: corp.example,\n  upstream: [10.0.0.53]}]",
			"SALLYPORT_DNS_RECORDS={",
			"SALLYPORT_DNS_LISTEN=:53,53",
		},
		Flags: []Override{
			{"--log-level", "log.level", "verbose"},
			{"--set", "proxy.lisen", ":1"},
			{"--set", "dns.cache", "{size: 1}"},
			{"--set", "dns.zones.zone", "x"},
			{"--policy", "policy.source", ""},
		},
	})
	want := `SALLYPORT_PROXY_TIMEOUTS_IDLE: proxy.timeouts.idle: "5" has no unit; write "5s"
SALLYPORT_DNS_ZONES:1:2: dns.zones[0]: upstreams is missing; add it: The zone's resolvers, written as dns.upstreams.
SALLYPORT_DNS_ZONES:2:3: dns.zones[0]: unknown key "upstream"; did you mean "upstreams"?
SALLYPORT_DNS_RECORDS:1:1: not YAML: did not find expected node content; look for a bracket or quote that is not closed, a "[" that needs quotes, or indentation that does not fit
SALLYPORT_DNS_LISTEN: dns.listen[1]: "53" is a port alone; write ":53" for every address of this machine or "127.0.0.1:53" for loopback
--log-level: log.level: "verbose" is unknown; write one of debug, info, warn, error
--set proxy.lisen: no such setting; did you mean proxy.listen?
--set dns.cache: dns.cache: a section, not a value; set one of its keys: size, min_ttl, max_ttl, serve_stale, prefetch
--set dns.zones.zone: no such setting; sallyport schema settings lists them
--policy: policy.source: empty; write the path of a policy file, or "embedded" for the starter policy`
	if err == nil || err.Error() != want {
		t.Errorf("got:\n%v\nwant:\n%s", err, want)
	}
}

// A mistake in the environment is not hidden by one in the file, nor by a flag above it.
func TestMistakesOfAllLayers(t *testing.T) {
	_, _, err := load(t, "log: {level: loud}\n", LoadOptions{
		Env:   []string{"SALLYPORT_LOG_FORMAT=xml", "SALLYPORT_POLICY_SOURC=x"},
		Flags: []Override{{"--set", "log.format", "json"}},
	})
	if es, ok := errors.AsType[policy.Errors](err); !ok || len(es) != 2 {
		t.Errorf("got %v, want one mistake of the file and one of the environment", err)
	}
}

func TestUnknownVariables(t *testing.T) {
	_, warnings, err := load(t, "", LoadOptions{Env: []string{
		"SALLYPORT_PROXY_LISTN=:1", "SALLYPORT_FOO=", "PATH=/bin", "SALLYPORTX=1",
		// What Kubernetes sets beside services called sallyport and sallyport-dns.
		"SALLYPORT_SERVICE_HOST=10.0.0.1", "SALLYPORT_SERVICE_PORT_PROXY=3128", "SALLYPORT_PORT=tcp://10.0.0.1:3128",
		"SALLYPORT_PORT_3128_TCP_ADDR=10.0.0.1", "SALLYPORT_DNS_PORT_53_UDP=udp://10.0.0.1:53", "SALLYPORT_PROXY_PORT=3128",
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"environment variable SALLYPORT_FOO sets nothing",
		"environment variable SALLYPORT_PROXY_LISTN sets nothing; did you mean SALLYPORT_PROXY_LISTEN?",
		"environment variable SALLYPORT_PROXY_PORT sets nothing; did you mean SALLYPORT_PROXY_PARENT?",
	}
	if !slices.Equal(warnings, want) {
		t.Errorf("warnings:\n%s", strings.Join(warnings, "\n"))
	}
}

// What a file names is beside the file; what is typed is relative to the working directory.
func TestRelativePaths(t *testing.T) {
	const text = "policy: {source: p.yaml}\nlog: {output: logs/a.log}\ndns: {hosts_file: hosts}\n"
	s := mustLoad(t, text, LoadOptions{})
	dir := filepath.Dir(s.File)
	if s.Policy.Source != filepath.Join(dir, "p.yaml") || s.Log.Output != filepath.Join(dir, "logs/a.log") || s.DNS.HostsFile != filepath.Join(dir, "hosts") {
		t.Errorf("source %s, output %s, hosts %s; want them in %s", s.Policy.Source, s.Log.Output, s.DNS.HostsFile, dir)
	}
	s = mustLoad(t, text, LoadOptions{Env: []string{"SALLYPORT_LOG_OUTPUT=stderr"}, Flags: []Override{{"--policy", "policy.source", "q.yaml"}}})
	if s.Policy.Source != "q.yaml" || s.Log.Output != "stderr" {
		t.Errorf("source %s, output %s; want q.yaml, stderr", s.Policy.Source, s.Log.Output)
	}
}

func TestFileVariable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "s.yaml")
	if err := os.WriteFile(file, []byte("node: from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, warnings, err := load(t, "", LoadOptions{Env: []string{FileVariable + "=" + file}})
	if err != nil || len(warnings) != 0 || s.Node != "from-file" || s.File != file {
		t.Errorf("Load = %q from %q, warnings %q, error %v", s.Node, s.File, warnings, err)
	}
	_, _, err = load(t, "", LoadOptions{File: file + ".missing"})
	if err == nil || err.Error() != file+".missing: read settings: no such file or directory" {
		t.Errorf("missing file: %v", err)
	}
}

func TestBoundedInput(t *testing.T) {
	_, _, err := load(t, strings.Repeat("x: 1\n", 5000), LoadOptions{})
	if n := strings.Count(err.Error(), "\n"); n != maxMistakes {
		t.Errorf("%d lines of mistakes, want %d", n+1, maxMistakes+1)
	}
	_, _, err = load(t, strings.Repeat("#", maxFile+1), LoadOptions{})
	if err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a file that is too large: %v", err)
	}
}

func TestRestartOnly(t *testing.T) {
	a := mustLoad(t, "", LoadOptions{})
	b := mustLoad(t, "log: {level: debug}\nproxy: {timeouts: {idle: 1m}}\ndns: {listen: [\":53\"]}\n", LoadOptions{})
	if got := a.RestartOnly(b); !slices.Equal(got, []string{"proxy.timeouts.idle", "dns.listen"}) {
		t.Errorf("RestartOnly = %q", got)
	}
	if got := a.RestartOnly(a); got != nil {
		t.Errorf("RestartOnly of the same settings = %q", got)
	}
}

func TestDurationOf(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"0s": 0, "10s": 10 * time.Second, "1h30m": 90 * time.Minute, "7d": 168 * time.Hour, "1d12h": 36 * time.Hour, "250ms": 250 * time.Millisecond,
	} {
		if got, err := durationOf(s); err != nil || time.Duration(got) != want {
			t.Errorf("durationOf(%q) = %v, %v; want %v", s, time.Duration(got), err, want)
		}
	}
	for _, s := range []string{"", "0", "10", "1.5", "s", "-1s", "+1s", "1d-1s", "1.5d", "1h1d", "99999d", "65535d2562047h", "1 s", "10S", "d"} {
		if got, err := durationOf(s); err == nil {
			t.Errorf("durationOf(%q) = %v, want an error", s, time.Duration(got))
		}
	}
}

func TestBytesOf(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "16384": 16384, "16B": 16, "64KiB": 65536, "64MiB": 64 << 20, "2GiB": 2 << 30} {
		if got, err := bytesOf(s); err != nil || got != want {
			t.Errorf("bytesOf(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "MiB", "-1", "1.5MiB", "64MB", "64M", "64 MiB", "9223372036854775807GiB", "1e3", "0x10", "+1"} {
		if got, err := bytesOf(s); err == nil {
			t.Errorf("bytesOf(%q) = %d, want an error", s, got)
		}
	}
}

// FuzzLoad: whatever the file says, Load answers with settings or with located mistakes, one a line.
func FuzzLoad(f *testing.F) {
	f.Add([]byte(defaults))
	files, err := filepath.Glob("testdata/mistakes/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("a: &a [*a]\n<<: *a\nproxy: *a"))
	f.Fuzz(func(t *testing.T, data []byte) {
		l := yamlLayer("sallyport.yaml", "/etc/sallyport", data)
		for _, m := range l.mistakes {
			if m.Pos.File == "" || strings.ContainsAny(m.Error(), "\n\r\x1b\x00") {
				t.Errorf("bad mistake %q", m.Error())
			}
		}
		def := yamlLayer("default", "", []byte(defaults))
		s, err := merge(def, l, newLayer(""), newLayer(""))
		if err != nil {
			t.Fatalf("what the strict pass took does not merge: %v", err)
		}
		s.check(origin([]*layer{def, l}))
	})
}

func TestWhoAsks(t *testing.T) {
	s := mustLoad(t, `
proxy:
  auth: {htpasswd: users, required: true}
  tls_listen: [":3129"]
  tls: {certificate: c.pem, key: /k.pem, client_ca: ca.pem, require_client_certificate: true, min_version: 1.3}
`, LoadOptions{})
	dir := filepath.Dir(s.File)
	if a := s.Proxy.Auth; a.Htpasswd != filepath.Join(dir, "users") || !a.Required || a.Realm != "sallyport" {
		t.Errorf("auth = %+v", a)
	}
	if c := s.Proxy.TLS; c.Certificate != filepath.Join(dir, "c.pem") || c.Key != "/k.pem" || !c.RequireClient || c.MinVersion != "1.3" || c.UserFrom != "san" {
		t.Errorf("tls = %+v", c)
	}
	mustLoad(t, `
proxy:
  auth: {required: true} # by certificates alone
  tls_listen: [":3129"]
  tls: {certificate: c.pem, key: k.pem, client_ca: ca.pem, user_from: uri}
`, LoadOptions{})
	_, _, err := load(t, `
proxy:
  auth: {required: true, realm: 'a "quoted" one'}
  tls_listen: ["127.0.0.1:3128"]
  tls: {require_client_certificate: yes, min_version: "1.1", certificate: c.pem}
`, LoadOptions{})
	for _, want := range []string{
		`:3:20: proxy.auth.required: nobody could pass`,
		`:3:33: proxy.auth.realm: "a \"quoted\" one" is not a realm`,
		`:4:15: proxy.tls_listen: TLS needs a certificate`,
		`:4:16: proxy.tls_listen[0]: "127.0.0.1:3128" is taken by proxy.listen[0] already`,
		`:5:37: proxy.tls.require_client_certificate: "yes" is neither true nor false; write one of them`,
		`proxy.tls.min_version: "1.1" is unknown`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the mistakes lack %q:\n%v", want, err)
		}
	}
}
