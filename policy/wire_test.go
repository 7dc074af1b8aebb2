package policy

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// wireOf returns the wire form of a text of labels.
func wireOf(text string) []byte {
	var b []byte
	for label := range strings.SplitSeq(text, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0)
}

func TestWireName(t *testing.T) {
	long := strings.Repeat("a", 63)
	longest := long + "." + long + "." + long + "." + long[:61] // 253 bytes of text, 255 octets
	for _, text := range []string{"test", "api.ok.test", "API.Ok.TEST", "_srv._tcp.x.test", "a-b.test", "xn--bcher-kva.test", "1.2.3.x", long + ".test", longest,
		strings.Repeat("a.", 126) + "a"} {
		var n WireName
		msg := append(wireOf(text), 0xC0, 0x0C, 'x') // what follows is not looked at
		size, err := n.Parse(msg)
		if err != nil || size != len(text)+2 {
			t.Errorf("Parse(%q) = %d, %v; want %d octets", text, size, err, len(text)+2)
			continue
		}
		if want := MustName(text); n.Name() != want {
			t.Errorf("Parse(%q).Name() = %q, want %q", text, n.Name(), want)
		}
		if !bytes.Equal(n.Bytes(), wireOf(strings.ToLower(text))) {
			t.Errorf("Parse(%q).Bytes() = %q", text, n.Bytes())
		}
	}
	for _, wire := range [][]byte{
		nil, {}, {0}, {1}, {1, 'a'}, {3, 'a', 'b'}, {0xC0, 0x0C}, {1, 'a', 0xC0, 0x0C}, {0x40, 'a', 0}, {0x80, 0},
		wireOf("a b.test"), wireOf("a\x00.test"), wireOf("bücher.test"), wireOf("-a.test"), wireOf("a-.test"),
		wireOf("127.1"), wireOf("x.0x7f"), wireOf("a/b.test"), {3, 'a', '.', 'b', 0},
		wireOf(longest + "a"), wireOf(strings.Repeat("a.", 127) + "a"), append([]byte{64}, bytes.Repeat([]byte("a"), 65)...),
	} {
		n := WireName{size: 9, labels: 2}
		if size, err := n.Parse(wire); !errors.Is(err, ErrWireName) || size != 0 || n.Bytes() != nil || !n.Name().IsZero() {
			t.Errorf("Parse(%q) = %d, %v, %q; want an error and no name", wire, size, err, n.Bytes())
		}
	}
}

// FuzzWireName holds WireName against Name: the same names are good, and every
// policy decides them alike.
func FuzzWireName(f *testing.F) {
	for _, text := range []string{"api.ok.test", "x.*.y", "a.b.c.d.e.f", "s3.eu.cloud.test", "127.0.0.1", "_dns.resolver.arpa", "s3.x.eu.cloud.test"} {
		f.Add(wireOf(text))
	}
	p := mustLoad(f, `
deny: ["*.bad.ok.test"]
unmatched_source: g
groups:
  - name: g
    allow: [.ok.test, "*.cdn.test", one.test, "s3.*.cloud.test", "api-*.x.test", {names: [txt.test], qtypes: [TXT]}, {names: ["*"], allow_public_suffix: true, ports: [8443]}]
`)
	q := mustLoad(f, "unmatched_source: g\ngroups:\n  - {name: g, allow: [.ok.test, a.b.c.d.e.f, '*.e.f', 's3.*.cloud.test', '*-x.*.cloud.test']}\n")
	f.Fuzz(func(t *testing.T, wire []byte) {
		var n WireName
		size, err := n.Parse(wire)
		text, whole := "", false // the text form, if wire is a name that has one
		rest := wire
		for len(rest) > 0 && rest[0] < 64 && int(rest[0]) < len(rest) {
			label := rest[1 : 1+rest[0]]
			rest = rest[1+len(label):]
			if whole = len(label) == 0; whole || bytes.IndexByte(label, '.') >= 0 || bytes.ContainsFunc(label, func(r rune) bool { return r > 127 }) {
				break
			}
			text += "." + string(label)
		}
		want, nameErr := ParseName(strings.TrimPrefix(text, "."))
		good := whole && nameErr == nil && text != ""
		if good != (err == nil) {
			t.Fatalf("Parse(%q): %v, but as text %q is a name: %v", wire, err, text, good)
		}
		if !good {
			return
		}
		if n.Name() != want || size != len(want.String())+2 {
			t.Fatalf("Parse(%q) = %q (%d octets), want %q", wire, n.Name(), size, want)
		}
		for _, p := range []*Policy{p, q} {
			for _, qtype := range []uint16{1, 16, 65} {
				r := Request{Source: addr("10.0.0.1"), Protocol: ProtocolDNS, QType: qtype, Time: at}
				got := p.DecideWire(&n, r)
				r.Name = want
				if d := p.Decide(r); got != d {
					t.Fatalf("DecideWire(%q, type %d) = %+v, Decide %+v", want, qtype, got, d)
				}
			}
		}
	})
}

func TestDecideWireDoesNotAllocate(t *testing.T) {
	p := mustLoad(t, "unmatched_source: g\ngroups:\n  - {name: g, allow: [.ok.test, 's3.*.cloud.test']}\n")
	var n WireName
	for _, name := range []string{"api.ok.test", "s3.eu.cloud.test", "no.test"} {
		msg := wireOf(name)
		if allocs := testing.AllocsPerRun(100, func() {
			if _, err := n.Parse(msg); err != nil {
				t.Fatal(err)
			}
			p.DecideWire(&n, Request{Source: addr("10.0.0.1"), Protocol: ProtocolDNS, QType: 1, Time: at})
		}); allocs != 0 {
			t.Errorf("%s: %v allocations", name, allocs)
		}
	}
}

func BenchmarkDecideWire(b *testing.B) {
	p := sized(b, 1_000_000, 10)
	var msgs [1024][]byte
	for i := range msgs {
		k := i * 7919 % 1_000_000
		msgs[i] = wireOf(fmt.Sprintf("www.host-%d.service-%d.example%d.com", k-k%10, 0, (k-k%10)%1000))
	}
	r := Request{Source: addr("10.1.1.1"), Protocol: ProtocolDNS, QType: 1, Time: at}
	b.ReportAllocs()
	var n WireName
	i := 0
	for b.Loop() {
		if _, err := n.Parse(msgs[i&1023]); err != nil {
			b.Fatal(err)
		}
		if d := p.DecideWire(&n, r); d.Verdict != Allow {
			b.Fatalf("%s: %+v", n.Name(), d)
		}
		i++
	}
}
