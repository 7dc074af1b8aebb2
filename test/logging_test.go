package test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"sallyport/internal/eventlog"
	"sallyport/policy"
	"sallyport/policy/event"
)

var updateMappings = flag.Bool("update-mappings", false, "write the golden files of deploy/logging")

// sampleLog returns the lines that the event log writes of one event of each kind, with
// every key in one of them.
func sampleLog(t *testing.T) []string {
	t.Helper()
	at := time.Date(2026, 3, 4, 5, 6, 7, 89e6, time.UTC)
	client, origin := netip.MustParseAddrPort("10.20.1.5:50123"), netip.MustParseAddrPort("203.0.113.7:443")
	allow := policy.Decision{Verdict: policy.Allow, Reason: policy.ReasonMatched, Rule: "github", Group: "ci", Revision: "r1"}
	path := filepath.Join(t.TempDir(), "log")
	w, err := eventlog.Open(eventlog.Options{Output: path, Node: "gate-1"})
	if err != nil {
		t.Fatal(err)
	}
	for _, ev := range []event.Event{
		{
			Time: at, Kind: event.Connect, ID: "1", Source: client, VPCEndpoint: "vpce-08d2", Listener: "proxy", Method: "CONNECT", Name: "api.github.com", Port: 443,
			Decision: allow, SNI: "api.github.com", ALPN: []string{"h2", "http/1.1"}, TLSVersion: 0x0304, PostQuantum: true, JA4: "t13d1516h2_8daaf6152771_e5627efa2ab1",
			Destination: origin, Parent: "proxy.corp.example:3128", Status: 200, BytesUp: 1234, BytesDown: 56789,
			Duration: 1234567 * time.Microsecond, DNSTime: 1500 * time.Microsecond, ConnTime: 20 * time.Millisecond, User: "alice", UserAgent: "curl/8.14.1",
		},
		{
			Time: at, Kind: event.HTTP, ID: "2", Source: netip.MustParseAddrPort("[2001:db8::5]:9"), Listener: "proxy", Method: "GET", Name: "198.51.100.9", Port: 80,
			Decision: policy.Decision{Reason: policy.ReasonIPLiteral, Group: "ci", Revision: "r1"}, Status: 403, Error: "odd \"name\"\n\x1b[31m\u202e",
		},
		{
			Time: at, Kind: event.DNS, ID: "3", Source: client, Listener: "dns", Name: "api.github.com", QType: "A", RCode: "NOERROR",
			Decision: policy.Decision{Verdict: policy.Observe, Mode: policy.ModeObserve, Reason: policy.ReasonNotListed, Group: "old", Revision: "r1"},
			Answers:  []string{"x.example", "203.0.113.7"}, Duration: time.Millisecond,
		},
		{Time: at, Kind: event.Config, Name: "policy", Decision: policy.Decision{Revision: "r2"}},
	} {
		w.Observe(&ev)
	}
	log := w.Logger()
	log.Info().Msg("listening")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.Run(ctx); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	var m map[string]any
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &m); err != nil {
		t.Fatal(err)
	}
	m["time"] = "2026-03-04T05:06:07.089Z"
	if b, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	lines[len(lines)-1] = string(b)
	return lines
}

// lua writes v as an expression of Lua.
func lua(v any) string {
	switch v := v.(type) {
	case map[string]any:
		var b strings.Builder
		for _, k := range slices.Sorted(maps.Keys(v)) {
			fmt.Fprintf(&b, "[%s]=%s,", lua(k), lua(v[k]))
		}
		return "{" + b.String() + "}"
	case []any:
		var b strings.Builder
		for _, x := range v {
			b.WriteString(lua(x) + ",")
		}
		return "{" + b.String() + "}"
	case string:
		var b strings.Builder
		for _, c := range []byte(v) {
			fmt.Fprintf(&b, `\%03d`, c)
		}
		return `"` + b.String() + `"`
	}
	return fmt.Sprint(v)
}

// luaJSON is a program that prints what a function makes of a record as JSON.
const luaJSON = `
local function json(v)
  if type(v) == "table" then
    local parts = {}
    if #v > 0 then
      for _, x in ipairs(v) do parts[#parts + 1] = json(x) end
      return "[" .. table.concat(parts, ",") .. "]"
    end
    for k, x in pairs(v) do parts[#parts + 1] = json(k) .. ":" .. json(x) end
    return "{" .. table.concat(parts, ",") .. "}"
  elseif type(v) == "string" then
    return '"' .. v:gsub('[%c"\\]', function(c) return string.format("\\u%04x", c:byte()) end) .. '"'
  elseif type(v) == "number" then
    return string.format("%.14g", v)
  end
  return tostring(v)
end
dofile(arg[1])
local code, _, record = _G[arg[2]]("sallyport", 0, RECORD)
assert(code == 0 or code == 2)
print(json(record))
`

// The lua filter of deploy/logging maps what the event log writes, and leaves nothing
// out. (LuaJIT is what Fluent Bit has inside.)
func TestFluentBitMapping(t *testing.T) {
	if _, err := exec.LookPath("luajit"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("luajit is missing; make test installs it")
		}
		t.Skip("luajit is not installed; run make test, which installs it")
	}
	script := filepath.Join(root, "deploy/logging/sallyport.lua")
	for _, schema := range []string{"ecs", "ocsf"} {
		var got strings.Builder
		for _, line := range sampleLog(t) {
			dec := json.NewDecoder(strings.NewReader(line))
			dec.UseNumber()
			var m map[string]any
			if err := dec.Decode(&m); err != nil {
				t.Fatal(err)
			}
			program := filepath.Join(t.TempDir(), "program.lua")
			if err := os.WriteFile(program, []byte("local RECORD = "+lua(m)+luaJSON), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("luajit", program, script, schema).CombinedOutput()
			if err != nil {
				t.Fatalf("%s: %v\n%s", schema, err, out)
			}
			var doc any
			if err := json.Unmarshal(out, &doc); err != nil {
				t.Fatalf("%s: %v\n%s", schema, err, out)
			}
			for k, v := range m {
				if _, list := v.([]any); list || m["event"] == nil {
					continue
				}
				if want := fmt.Sprint(v); k != "time" && k != "duration_ms" && k != "verdict" && k != "ok" && !strings.Contains(flatten(doc), want) {
					t.Errorf("%s: %s=%s of %s is lost", schema, k, want, line)
				}
			}
			b, err := json.MarshalIndent(doc, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got.Write(append(b, '\n'))
		}
		golden := filepath.Join(root, "deploy/logging/testdata", schema+".golden")
		if *updateMappings {
			if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if got.String() != string(want) {
			t.Errorf("%s: got\n%s\nwant\n%s", schema, got.String(), want)
		}
	}
}

// flatten returns all values in v, one a line.
func flatten(v any) string {
	switch v := v.(type) {
	case map[string]any:
		var b strings.Builder
		for _, x := range v {
			b.WriteString(flatten(x))
		}
		return b.String()
	case []any:
		var b strings.Builder
		for _, x := range v {
			b.WriteString(flatten(x))
		}
		return b.String()
	case float64:
		return fmt.Sprintf("%.14g\n", v)
	}
	return fmt.Sprintf("%v\n", v)
}

// The mapping tables have every key that the log has, and the configuration is YAML
// that calls what the script has.
func TestLoggingDocs(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join(root, "docs/logging.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, mapping, ok := strings.Cut(string(doc), "\n## Other schemas\n")
	if !ok {
		t.Fatal("docs/logging.md has no section about other schemas")
	}
	for _, line := range sampleLog(t) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatal(err)
		}
		for k := range m {
			if m["event"] != nil && !strings.Contains(mapping, "`"+k+"`") {
				t.Errorf("docs/logging.md does not say what becomes of %s", k)
			}
		}
	}
	text, err := os.ReadFile(filepath.Join(root, "deploy/logging/fluent-bit.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var conf struct {
		Parsers  []map[string]any
		Pipeline struct {
			Inputs, Filters, Outputs []map[string]any
		}
	}
	if err := yaml.Unmarshal(text, &conf); err != nil {
		t.Fatal(err)
	}
	if len(conf.Parsers) != 1 || len(conf.Pipeline.Inputs) != 1 || len(conf.Pipeline.Filters) != 1 || len(conf.Pipeline.Outputs) != 1 {
		t.Fatalf("%+v", conf)
	}
	input, filter := conf.Pipeline.Inputs[0], conf.Pipeline.Filters[0]
	script, err := os.ReadFile(filepath.Join(root, "deploy/logging", fmt.Sprint(filter["script"])))
	if err != nil {
		t.Fatal(err)
	}
	if input["parser"] != conf.Parsers[0]["name"] || filter["match"] != input["tag"] || conf.Pipeline.Outputs[0]["match"] != input["tag"] || !strings.Contains(string(script), "function "+fmt.Sprint(filter["call"])+"(") {
		t.Errorf("names do not agree: %+v", conf)
	}
}
