package configs_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/configs"
	"sallyport/internal/config"
)

var update = flag.Bool("update", false, "write sallyport.schema.json")

func TestSettingsSchema(t *testing.T) {
	const file = "sallyport.schema.json"
	if *update {
		if err := os.WriteFile(file, config.Schema(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, config.Schema()) {
		t.Errorf("%s is not what config.Schema returns; run go generate ./configs", file)
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
