package dnsfilter

import (
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

func TestNewAndCheckReportEveryMistake(t *testing.T) {
	c := Config{
		Listen:       []string{"localhost:53", "127.0.0.1:1053", ":99999", "127.0.0.1"},
		Upstreams:    []string{"127.0.0.1:1053", "dns.test", ""},
		Zones:        []Zone{{Zone: "-bad-", Upstreams: []string{"192.0.2.1"}}, {Zone: "a.test"}, {Zone: "A.test.", Upstreams: []string{"x"}}, {Zone: "c.test", Upstreams: []string{"192.0.2.1", "tcp://127.0.0.1:1053"}}},
		Deny:         "drop",
		HTTPSRecords: "strip",
		CNAMEs:       "follow",
		MaxUDPSize:   100,
		Cache:        Cache{Size: -1, MinTTL: time.Hour, MaxTTL: time.Minute, ServeStale: -1},
		Records: []Record{
			{Name: "a..test", Type: "A", Value: "192.0.2.1"},
			{Name: "a.test", Type: "A", Value: "2001:db8::1"},
			{Name: "a.test", Type: "MX", Value: "10 mail.test"},
			{Name: "a.test", Type: "SRV", Value: "1 2 3"},
			{Name: "a.test", Type: "SRV", Value: "1 2 99999 b.test"},
			{Name: "a.test", Type: "CNAME", Value: "1.2.3.4"},
			{Name: "a.test", Type: "A", Value: "192.0.2.1", TTL: time.Millisecond},
			{Name: "b.test", Type: "CNAME", Value: "c.test"},
			{Name: "b.test", Type: "TXT", Value: "x"},
			{Name: "d.test", Type: "TXT", Value: "x", TTL: 1500 * time.Millisecond},
			{Name: "e.test", Type: "CNAME", Value: "f.test"},
			{Name: "F.test.", Type: "cname", Value: "E.test"},
			{Name: "g.test", Type: "CNAME", Value: "G.test"},
			{Name: "h.test", Type: "CNAME", Value: "i.test"},
		},
	}
	err := Check(c)
	if err == nil {
		t.Fatal("Check() took it")
	}
	if _, nerr := New(c); nerr == nil || nerr.Error() != err.Error() {
		t.Errorf("New() = %v, want what Check() says", nerr)
	}
	got := err.Error()
	for _, want := range []string{
		`dns.listen[0]: "localhost:53"`, "dns.listen[2]:", "dns.listen[3]:",
		"dns.upstreams[0]: \"127.0.0.1:1053\" is this resolver itself", `dns.upstreams[1]: "dns.test"`, `dns.upstreams[2]: ""`,
		"dns.zones[0].zone:", "dns.zones[1].upstreams:", "dns.zones[2].zone:", "dns.zones[2].upstreams[0]:",
		`dns.zones[3].upstreams[1]: "tcp://127.0.0.1:1053" is this resolver itself`, "dns.records[9]: ttl: 1.5s is not in whole seconds",
		`dns.deny: "drop"`, `dns.https_records: "strip"`, `dns.cnames: "follow"`, "dns.edns_size: 100",
		"dns.cache.size: -1", "dns.cache.min_ttl: 1h0m0s is above", "dns.cache.serve_stale:",
		"dns.records[0]: name:", "dns.records[1]: value:", "dns.records[2]: type:", "dns.records[3]: value:", "dns.records[4]: value:",
		"dns.records[5]: value:", "dns.records[6]: ttl:", "dns.records[8]: b.test has a CNAME",
		"dns.records[10]: value: the aliases of e.test", "dns.records[11]: value:", "dns.records[12]: value:",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	for _, good := range []string{"dns.listen[1]", "dns.records[7]", "dns.records[13]"} {
		if strings.Contains(got, good) {
			t.Errorf("%q is complained about in\n%s", good, got)
		}
	}
}

func TestLoopsAreSeen(t *testing.T) {
	for _, tt := range []struct {
		listen, upstream string
		loop             bool
	}{
		{":53", "127.0.0.53", true}, {"0.0.0.0:53", "127.0.0.1", true}, {"[::]:53", "::1", true}, {"127.0.0.1:53", "127.0.0.1:53", true},
		{"127.0.0.1:53", "127.0.0.53", false}, {":1053", "127.0.0.53", false}, {":53", "192.0.2.1", false}, {"127.0.0.1:53", "[::ffff:127.0.0.1]:53", true},
	} {
		r, err := New(Config{Listen: []string{tt.listen}, Upstreams: []string{tt.upstream}})
		if (err != nil) != tt.loop {
			t.Errorf("listen %s, upstream %s: %v", tt.listen, tt.upstream, err)
		}
		if err == nil {
			r.Close()
		}
	}
}

func TestCheckTouchesNothing(t *testing.T) {
	log := new(logs)
	c := Config{HostsFile: t.TempDir(), ResolvConf: t.TempDir(), Listen: []string{"127.0.0.1:0"}, Logger: zerolog.New(log)}
	if err := Check(c); err != nil {
		t.Errorf("Check() = %v", err)
	}
	if lines := log.with(""); len(lines) > 0 {
		t.Errorf("logged %q: a file was looked at", lines)
	}
}
