package policy

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestParseDocumentGolden holds the words that operators read, for each file of
// testdata/decode. Read the difference as one of them would.
func TestParseDocumentGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/decode/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no test data: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := "ok\n"
			if _, err := ParseDocument("policy.yaml", data); err != nil {
				checkErrors(t, data, err)
				got = err.Error() + "\n"
			}
			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("ParseDocument(%s):\n%s\nwant:\n%s", file, got, want)
			}
		})
	}
}

// checkErrors checks what holds for every error of ParseDocument.
func checkErrors(t *testing.T, data []byte, err error) {
	t.Helper()
	var errs Errors
	if !errors.As(err, &errs) || len(errs) == 0 || len(errs) > maxErrors {
		t.Fatalf("error is a %T with %d mistakes", err, len(errs))
	}
	lines := bytes.Split(data, []byte("\n"))
	before := Pos{Line: 1, Column: 1}
	for _, e := range errs {
		p := e.Pos
		if p.Line < before.Line || p.Line == before.Line && p.Column < before.Column {
			t.Errorf("%v comes after %v", p, before)
		}
		before = p
		if p.Line > len(lines) || p.Column < 1 || p.Column > len(lines[p.Line-1])+1 {
			t.Fatalf("%v lies outside of the file: %v", p, e)
		}
		if len(e.Error()) > 1000 {
			t.Errorf("message of %d bytes", len(e.Error()))
		}
	}
}

func TestParseDocumentKeepsTextAsWritten(t *testing.T) {
	doc, err := ParseDocument("p", []byte(`version: 1
groups:
  - name: "10"
    observe_until: 2026-12-31
    sources: [2001:db8:20::/48, 10.0.0.0/8]
    tls: {min_version: 1.2}
    allow:
      - 'no'
      - .Example.COM
      - ports: [22, 0443, 8000-8010, "9000", 22:23]
        expires: 2027-03-31T18:00:00Z
        tls: {min_version: "1.0"}
        allow_public_suffix: True
      - names: [api-*.x.com, Bücher.example, "null"]
        expires: "2027-03-31"
        reason: |
          two
          lines
`))
	if err != nil {
		t.Fatal(err)
	}
	got := doc.Groups
	want := []Group{{
		Name: "10", ObserveUntil: "2026-12-31", Sources: []string{"2001:db8:20::/48", "10.0.0.0/8"}, TLS: &TLSRule{MinVersion: "1.2"},
		Allow: []Rule{
			{Names: []string{"no"}},
			{Names: []string{".Example.COM"}},
			{Ports: []string{"22", "0443", "8000-8010", "9000", "22:23"}, Expires: "2027-03-31T18:00:00Z", TLS: &TLSRule{MinVersion: "1.0"}, AllowPublicSuffix: true},
			{Names: []string{"api-*.x.com", "Bücher.example", "null"}, Expires: "2027-03-31", Reason: "two\nlines\n"},
		},
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("groups = %+v\nwant     %+v", got, want)
	}
}

// TestSyntaxErrorLine holds the lines of texts that are no YAML: the line that a
// person has to mend, which the parser often does not name.
func TestSyntaxErrorLine(t *testing.T) {
	const head = "version: 1\ngroups:\n  - name: a\n" // three lines
	tests := []struct {
		name, text string
		want       string // line:column
	}{
		{"no colon", head + "    sources 10.0.0.0/8\n    allow:\n      - b\n", "4:5"},
		{"no colon, then comments", "a: b\nversion 1\n# c\n\n# d\n\nx: y\n", "2:1"},
		{"too little indentation", head + "   allow:\n      - b\n", "4:4"},
		{"too much indentation", head + "     allow:\n      - b\n", "4:6"},
		{"two colons", head + "    reason: foo: bar\n    b: c\n", "4:5"},
		{"text after quotes", "version: 1\ngroups:\n  - name: \"a\" b\n    reason: c\n    mode: d\n", "3:3"},
		{"text after quotes on the first line", "a: 'it's'\nb: c\n", "1:1"},
		{"quotes not closed", head + "    reason: \"a\n    mode: d\n    b: c\n", "4:5"},
		{"bracket not closed", head + "    allow: [a, b\n    deny: c\n\n\nd: e\n", "4:5"},
		{"other bracket", head + "    allow: {a, b]\n    b: c\n", "4:5"},
		{"dedented key", head + "  allow: b\n    b: c\n", "4:3"},
		{"dedented key after comments", head + "\n# c\n\n  # c\n  allow: b\n\n# d\n\n    b: c\n", "8:3"},
		{"list inside keys", head + "    allow:\n    - b\n    c\n    - d\n", "6:5"},
		{"key after list", "- a\nversion: 1\n", "2:1"},
		{"tab between", head + "    allow:\n      -\tb: c\n", "5:7"},
		{"escape", head + "    reason: \"\\.foo\"\n", "4:5"},
		{"bracket instead of value", "a: b\nc: ]\n", "2:1"},
		{"only a bracket", "}\n", "1:1"},
		{"alias to nothing in a key", "version: 1\n*a : b\nc: ]\n", "2:1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			doc, err := ParseDocument("", []byte(tt.text))
			var errs Errors
			if !errors.As(err, &errs) {
				t.Fatalf("ParseDocument(%q) = %v", tt.text, err)
			}
			checkErrors(t, []byte(tt.text), err)
			if got := fmt.Sprintf("%d:%d", errs[0].Pos.Line, errs[0].Pos.Column); got != tt.want || doc != nil {
				t.Errorf("ParseDocument(%q): at %s: %v; want at %s", tt.text, got, err, tt.want)
			}
		})
	}
}

func TestDocumentPos(t *testing.T) {
	doc, err := ParseDocument("policy.yaml", []byte(`version: 1
lists: [{name: a, names: [x.example, y.example]}]
groups:
  - name: g
    allow:
      - bare.example
      - names:
          - long.example
    tls: {sni: match}
`))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"":                            "1:1",
		"version":                     "1:10",
		"lists[0]":                    "2:9",
		"lists[0].names[1]":           "2:38",
		"lists[0].names[2]":           "2:26",
		"lists[0].file":               "2:9",
		"lists[7].name":               "2:8",
		"groups[0].name":              "4:11",
		"groups[0].allow[0]":          "6:9",
		"groups[0].allow[0].names":    "6:9",
		"groups[0].allow[0].names[0]": "6:9",
		"groups[0].allow[1].names[0]": "8:13",
		"groups[0].allow[1].ports[0]": "7:9",
		"groups[0].tls.sni":           "9:16",
		"groups[0].tls.ech":           "9:10",
		"deny[0].names[0]":            "1:1",
		"groups[x]":                   "4:3",
		"[":                           "1:1",
		"..":                          "1:1",
	} {
		if got := doc.pos(path).String(); got != "policy.yaml:"+want {
			t.Errorf("pos(%q) = %s, want %s", path, got, want)
		}
	}
	if got := new(Document).pos("groups[0]"); got != (Pos{}) {
		t.Errorf("pos without YAML = %v", got)
	}
}

func TestLoadReportsBothSteps(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"both", `
version: 1
groups:
  - name: a
    sources: [10.0.0.1/8]
    allow:
      - {nmaes: [x.example]}
      - names: ["@nowhere"]
    moed: observe
`, `p:5:15: groups[0].sources[0]: 10.0.0.1/8 has bits set beyond its length; write 10.0.0.0/8, or 10.0.0.1/32 for the one address
p:7:10: groups[0].allow[0].nmaes: unknown key "nmaes" in a rule; did you mean "names"?
p:8:17: groups[0].allow[1].names[0]: there is no list "nowhere"
p:9:5: groups[0].moed: unknown key "moed" in a group; did you mean "mode"?`},
		{"what follows from a mistake is none", `
version: 1
list: [{name: a, names: [x.example]}]
groups: [{name: g, sources: [10.0.0.0/8], allow: ["@a"]}]
`, `p:3:1: list: unknown key "list" at the top level; did you mean "lists"?`},
		{"a value without quotes", `
version: 1
groups: [{name: g, sources: [10.0.0.0/8], allow: [*.x.example], extends: [h]}]
`, `p:3:51: groups[0].allow[0]: *.x.example begins with '*', which YAML gives another meaning; put it in quotes: "*.x.example"
p:3:75: groups[0].extends[0]: there is no group "h"; there are g`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, _, err := Load("p", []byte(tt.text), Options{})
			if p != nil || err == nil || err.Error() != tt.want {
				t.Errorf("Load = %v, %v\nwant %s", p, err, tt.want)
			}
		})
	}
	if p, _, err := Load("p", []byte("version: 1\ngroups: [{name: g, sources: [10.0.0.0/8]}]\n"), Options{}); p == nil || err != nil {
		t.Errorf("Load of a good policy = %v, %v", p, err)
	}
}

// hugeTexts are texts of about n bytes that cost a careless reader much.
func hugeTexts(n int) map[string]string {
	fill := func(s string) string { return strings.Repeat(s, n/len(s)) }
	var anchors, tags strings.Builder
	anchors.WriteString("a0: &a0 [x, x]\n")
	for i := 1; anchors.Len() < n; i++ {
		fmt.Fprintf(&anchors, "a%d: &a%d [*a%d, *a%d, *a%d, *a%d]\n", i, i, i-1, i-1, i-1, i-1)
		fmt.Fprintf(&tags, "%%TAG !a%d! b\n", i)
	}
	return map[string]string{
		"laughs":         anchors.String(),
		"tag directives": tags.String() + "--- a\n",
		"brackets":       fill("["),
		"closed":         "[" + fill(strings.Repeat("[", 9000)+strings.Repeat("]", 9000)+",") + "]",
		"dashes":         fill("- "),
		"commas":         "[" + fill("a,") + "]",
		"keys":           "{" + fill("a,") + "}",
		"unknown keys":   fill("a: b\n")[:n/50],
		"unquoted":       "version: 1\ndeny:\n" + fill("- *a.example\n"),
		"no yaml at end": fill("- a\n") + "a: [",
		"no yaml":        fill("- a\n") + "b: c\n" + fill("# d\n"),
		"comments":       fill("#\n"),
		"mistakes":       "version: 1\ndeny:\n" + fill("- 1\n"),
	}
}

func TestParseDocumentIsBounded(t *testing.T) {
	// What is quadratic in the size, or worse, would run into the time-out of go test.
	for name, text := range hugeTexts(1 << 18) {
		t.Run(name, func(t *testing.T) {
			_, err := ParseDocument("p", []byte(text))
			if err == nil {
				t.Fatal("no error")
			}
			checkErrors(t, []byte(text), err)
		})
	}
	t.Run("larger than allowed", func(t *testing.T) {
		_, err := ParseDocument("p", make([]byte, MaxDocument+1))
		if err == nil || !strings.Contains(err.Error(), "larger than 64 MiB") {
			t.Errorf("error = %v", err)
		}
	})
	t.Run("more values than allowed", func(t *testing.T) {
		_, err := ParseDocument("p", []byte("version: 1\n"+strings.Repeat("#\n", maxItems)))
		if err == nil || !strings.Contains(err.Error(), "values; move names to list files") {
			t.Errorf("error = %v", err)
		}
	})
}

func TestEncodeDocument(t *testing.T) {
	doc := &Document{
		Version: 1,
		Lists:   []List{{Name: "a", Names: []string{"*.x.example", "@b"}}, {Name: "b", File: "b.txt"}},
		Deny:    []Rule{{Names: []string{"@a"}}},
		Groups: []Group{{
			Name: "no", Sources: []string{"2001:db8::/32"}, Mode: "observe", ObserveUntil: "2027-01-01", TLS: &TLSRule{MinVersion: "1.2"},
			Allow: []Rule{
				{Names: []string{"x.example"}, Ports: []string{"443", "8000-8010", "0443"}, Expires: "2027-01-01"},
				{Addresses: []string{"2001:db8::"}, AllowPublicSuffix: true, Reason: "a: b # c\n\td"},
				{Names: []string{"a", "b", "c", "d", "e"}},
				{},
			},
		}},
	}
	const want = `version: 1
lists:
  - name: a
    names:
      - '*.x.example'
      - '@b'
  - name: b
    file: b.txt
deny:
  - '@a'
groups:
  - name: "no"
    sources:
      - 2001:db8::/32
    mode: observe
    observe_until: "2027-01-01"
    tls:
      min_version: "1.2"
    allow:
      - names: [x.example]
        ports: [443, 8000-8010, "0443"]
        expires: "2027-01-01"
      - addresses: ['2001:db8::']
        allow_public_suffix: true
        reason: "a: b # c\n\td"
      - names:
          - a
          - b
          - c
          - d
          - e
      - {}
`
	var b bytes.Buffer
	if err := EncodeDocument(&b, doc); err != nil {
		t.Fatal(err)
	}
	if b.String() != want {
		t.Errorf("EncodeDocument:\n%s\nwant:\n%s", b.String(), want)
	}
	back, err := ParseDocument("p", b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	back.parts = nil
	if !reflect.DeepEqual(back, doc) {
		t.Errorf("read back: %+v\nwant %+v", back, doc)
	}
}

func FuzzParseDocument(f *testing.F) {
	files, err := filepath.Glob("testdata/decode/*.yaml")
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
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, err := ParseDocument("p", data)
		if err != nil {
			checkErrors(t, data, err)
			return
		}
		doc.pos(string(data[:min(len(data), 40)]))
		var b bytes.Buffer
		if err := EncodeDocument(&b, doc); err != nil {
			t.Fatal(err)
		}
		back, err := ParseDocument("p", b.Bytes())
		if err != nil {
			t.Fatalf("read back: %v\n%s", err, b.Bytes())
		}
		doc.parts, back.parts = nil, nil
		var again bytes.Buffer
		if err := EncodeDocument(&again, back); err != nil || !bytes.Equal(again.Bytes(), b.Bytes()) {
			t.Errorf("written twice: %v\n%s\nwas:\n%s", err, again.Bytes(), b.Bytes())
		}
	})
}

func BenchmarkParseDocument(b *testing.B) {
	var text bytes.Buffer
	text.WriteString("version: 1\nlists:\n  - name: a\n    names:\n")
	for i := range 100_000 {
		fmt.Fprintf(&text, "      - host%d.example.com\n", i)
	}
	b.SetBytes(int64(text.Len()))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseDocument("p", text.Bytes()); err != nil {
			b.Fatal(err)
		}
	}
}
