package configs_test

import (
	"bytes"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/configs"
	"sallyport/internal/config"
	"sallyport/policy"
)

var update = flag.Bool("update", false, "write the schemas")

func TestSchemas(t *testing.T) {
	for file, want := range map[string][]byte{
		"sallyport.schema.json": config.Schema(),
		"policy.schema.json":    policy.Schema(),
	} {
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the program prints; run go generate ./configs", file)
		}
	}
}

// The starter policy opens a few names for loopback, and nothing for anyone else.
func TestPolicies(t *testing.T) {
	example, err := os.ReadFile("examples/enterprise-policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	compile := func(name string, data []byte) *policy.Policy {
		t.Helper()
		d, err := policy.ParseDocument(name, data)
		if err != nil {
			t.Fatal(err)
		}
		p, warnings, err := policy.Compile(d, policy.Options{})
		if err != nil || len(warnings) > 0 {
			t.Fatalf("%s: %v, warnings %v", name, err, warnings)
		}
		return p
	}
	compile("enterprise-policy.yaml", example)
	p := compile("policy.yaml", configs.Policy)
	for _, tt := range []struct {
		source, name string
		want         policy.Reason
	}{
		{"127.0.0.1", "www.example.com", policy.ReasonMatched},
		{"::1", "debian.org", policy.ReasonMatched},
		{"127.0.0.1", "evil.test", policy.ReasonNotListed},
		{"192.0.2.1", "www.example.com", policy.ReasonUnmatchedSource},
	} {
		d := p.Decide(policy.Request{Source: netip.MustParseAddr(tt.source), Name: policy.MustName(tt.name), Port: 443})
		if d.Reason != tt.want {
			t.Errorf("%s from %s: %s, want %s", tt.name, tt.source, d.Reason, tt.want)
		}
	}
}

func TestEmbeddedSettings(t *testing.T) {
	s, _, err := config.Load(config.LoadOptions{Default: configs.Settings})
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range append(append([]string{s.Admin.Listen}, s.Proxy.Listen...), s.DNS.Listen...) {
		if !strings.HasPrefix(addr, "127.0.0.1:") {
			t.Errorf("the embedded settings listen on %s, which is not loopback", addr)
		}
	}
	if s.Policy.Source != config.Embedded {
		t.Errorf("policy.source = %q, want %q", s.Policy.Source, config.Embedded)
	}
}

func TestExamples(t *testing.T) {
	for _, name := range []string{"sidecar.yaml", "vpc.yaml"} {
		t.Run(name, func(t *testing.T) {
			_, _, err := config.Load(config.LoadOptions{File: filepath.Join("examples", name), Default: configs.Settings})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// Editors complete and explain keys only where the first line names the schema.
func TestSchemaNamed(t *testing.T) {
	files, err := filepath.Glob("*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("examples/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range append(files, more...) {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(data), "\n")
		schema, ok := strings.CutPrefix(first, "# yaml-language-server: $schema=")
		if !ok {
			t.Errorf("%s: the first line is %q and names no schema", file, first)
			continue
		}
		if base := filepath.Base(schema); base != "sallyport.schema.json" && base != "policy.schema.json" {
			t.Errorf("%s names the schema %s", file, schema)
		}
	}
}
