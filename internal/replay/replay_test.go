package replay

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"sallyport/internal/eventlog"
	"sallyport/policy"
	"sallyport/policy/event"
)

// oracle reads what the scanner reads with encoding/json.
func oracle(line []byte) (map[string]json.RawMessage, bool) {
	var m map[string]json.RawMessage
	if !utf8.Valid(line) || json.Unmarshal(line, &m) != nil || m == nil {
		return nil, false
	}
	return m, true
}

// wrongType reports whether a known key has a value of another type.
func wrongType(m map[string]json.RawMessage) bool {
	for k, v := range m {
		var into any
		switch k {
		case "time", "event", "id", "src", "group", "name", "sni", "tls_version", "verdict", "reason", "rule", "policy", "dst", "parent", "qtype", "user":
			into = new(string)
		case "port", "status":
			into = new(uint16)
		case "ech":
			into = new(bool)
		case "answers":
			into = new([]string)
			var items []json.RawMessage
			if json.Unmarshal(v, &items) == nil {
				for _, i := range items {
					if string(i) == "null" {
						return true
					}
				}
			}
		default:
			continue
		}
		if string(v) == "null" || json.Unmarshal(v, into) != nil {
			return true
		}
	}
	return false
}

func compare(t *testing.T, line []byte) {
	t.Helper()
	var s scanner
	var rec record
	err := s.scan(line, &rec)
	m, ok := oracle(line)
	switch {
	case err == errDepth:
		return
	case err == nil && !ok:
		t.Fatalf("scan takes %q, encoding/json does not", line)
	case err != nil && ok && err != errType:
		t.Fatalf("scan refuses %q: %v", line, err)
	case err == errType || err != nil:
		// encoding/json looks at the last of several equal keys only, so that the one at fault may be hidden.
		if err == errType && ok && !wrongType(m) && !twice(line) {
			t.Fatalf("%q: no key has a wrong type", line)
		}
		return
	case wrongType(m):
		t.Fatalf("scan takes %q", line)
	}
	texts := map[string][]byte{
		"time": rec.time, "event": rec.event, "id": rec.id, "src": rec.src, "group": rec.group, "name": rec.name, "sni": rec.sni,
		"tls_version": rec.tlsVersion, "verdict": rec.verdict, "reason": rec.reason, "rule": rec.rule, "policy": rec.policy,
		"dst": rec.dst, "parent": rec.parent, "qtype": rec.qtype, "user": rec.user,
	}
	for k, got := range texts {
		var want string
		if v, ok := m[k]; ok {
			if err := json.Unmarshal(v, &want); err != nil {
				t.Fatal(err)
			}
		}
		if string(got) != want {
			t.Fatalf("%q: %s is %q, want %q", line, k, got, want)
		}
	}
	var want struct {
		Port, Status uint16
		ECH          bool
		Answers      []string
	}
	for k, to := range map[string]any{"port": &want.Port, "status": &want.Status, "ech": &want.ECH, "answers": &want.Answers} {
		if v, ok := m[k]; ok {
			if err := json.Unmarshal(v, to); err != nil {
				t.Fatal(err)
			}
		}
	}
	var answers []string
	for _, a := range rec.answers {
		answers = append(answers, string(a))
	}
	if rec.port != want.Port || rec.status != want.Status || rec.ech != want.ECH || strings.Join(answers, "\x00") != strings.Join(want.Answers, "\x00") {
		t.Fatalf("%q: %d %d %v %q, want %+v", line, rec.port, rec.status, rec.ech, answers, want)
	}
}

// twice reports whether a key of the object stands there twice.
func twice(line []byte) bool {
	dec := json.NewDecoder(bytes.NewReader(line))
	seen := map[string]bool{}
	if _, err := dec.Token(); err != nil {
		return false
	}
	for dec.More() {
		k, err := dec.Token()
		if err != nil {
			return false
		}
		if s, ok := k.(string); ok && seen[s] {
			return true
		} else if ok {
			seen[s] = true
		}
		var v json.RawMessage
		if dec.Decode(&v) != nil {
			return false
		}
	}
	return false
}

var odd = []string{
	``, `{}`, ` { } `, `[]`, `null`, `{"name":"a"}`, `{"name":"a","name":"b"}`, `{"name":null}`, `{"name":1}`, `{"port":443}`, `{"port":"443"}`, `{"port":-1}`, `{"port":65536}`,
	`{"port":99999999999999999999}`, `{"port":4.43e2}`, `{"port":01}`, `{"port":0}`, `{"port":-0}`, `{"x":-}`, `{"x":1.}`, `{"x":1e}`, `{"x":.5}`, `{"x":-0.5E+10}`, `{"x":1 2}`, `{"ech":true}`, `{"ech":0}`, `{"ech":tru}`,
	`{"answers":["a","b\n"]}`, `{"answers":[]}`, `{"answers":[1]}`, `{"answers":["a",null]}`, `{"answers":"a"}`, `{"answers":["a"}`, `{"x":{"y":[1,{"z":null}],"name":"no"},"name":"yes"}`, `{"x":[}`, `{"x":[1,]}`, `{"a":1,}`, `{"a"}`, `{"a":}`, `{a:1}`,
	`{"name":"\u0041\ud83d\ude00\ud800x\udc00\"\\\/\b\f\n\r\t"}`, `{"name":"\u12"}`, `{"name":"\x"}`, "{\"name\":\"a\tb\"}", "{\"name\":\"\xff\"}", `{"na\u006de":"x"}`, `{"name":"é漢😀"}`, `{"name":"a"} x`, `{"name":"a`, `{"name":"1234567\"90123456\\89"}`, `{"Name":"A"}`,
}

func TestScan(t *testing.T) {
	for _, line := range odd {
		compare(t, []byte(line))
	}
	if err := new(scanner).scan([]byte(`{"x":`+strings.Repeat("[", 100)+strings.Repeat("]", 100)+`}`), new(record)); err != errDepth {
		t.Errorf("deep nesting: %v", err)
	}
}

func FuzzScan(f *testing.F) {
	for _, line := range odd {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) { compare(t, line) })
}

// Whatever a line is, replaying it neither panics nor grows.
func FuzzLine(f *testing.F) {
	p := compile(f, randomPolicy(rand.New(rand.NewPCG(1, 2))))
	for _, line := range odd {
		f.Add([]byte(line))
	}
	f.Add([]byte(`{"time":"2026-03-04T04:06:07.089Z","event":"connect","id":"1","src":"10.1.0.1","name":"a.x.test","port":443,"sni":"b","tls_version":"0x7f1c","verdict":"deny","reason":"sni_mismatch","status":200}`))
	f.Add([]byte("1772597168.324   1234 10.1.0.1 TCP_TUNNEL/200 56789 CONNECT [2001:db8::1]:443 a%20b HIER_DIRECT/203.0.113.7 -"))
	f.Add([]byte("1772597168.324   1234 10.1.0.1 TCP_DENIED/403 0 GET http://x:/ - HIER_NONE/- text/html"))
	f.Fuzz(func(t *testing.T, line []byte) {
		r := New(Options{Policy: p})
		err := r.Line(line)
		rep := r.Report()
		if sum := rep.Decided + rep.Refused + rep.Undecidable + rep.Other + rep.Malformed; sum != rep.Lines || (err != nil) != (rep.Malformed == 1) {
			t.Errorf("%q: %v, %+v", line, err, rep)
		}
	})
}

func FuzzIPv4(f *testing.F) {
	for _, s := range []string{"10.0.0.1", "255.255.255.255", "01.2.3.4", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1..2.3", "0.0.0.0", "1000.1.1.1", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, ok := parseIPv4([]byte(s))
		want, err := netip.ParseAddr(s)
		if ok != (err == nil && want.Is4()) || ok && got != want {
			t.Errorf("%q: %v %v, want %v %v", s, got, ok, want, err)
		}
	})
}

// randomPolicy makes up a policy about few names, so that requests hit rules.
func randomPolicy(rng *rand.Rand) string {
	pick := func(of ...string) string { return of[rng.IntN(len(of))] }
	rule := func() string {
		var b strings.Builder
		fmt.Fprintf(&b, "{names: [%q]", pick("a.x.test", "*.x.test", ".x.test", "b.y.test", "*.y.test", "c.z.test", ".z.test"))
		switch rng.IntN(6) {
		case 0:
			b.WriteString(", protocol: tcp, ports: [443, 22]")
		case 1:
			b.WriteString(", protocol: tls")
		case 2:
			b.WriteString(", protocol: http, ports: [80, 443]")
		case 3:
			b.WriteString(", ports: [8443]")
		case 4:
			b.WriteString(", protocol: dns")
		}
		return b.String()
	}
	more := func() string {
		s := ""
		if rng.IntN(3) == 0 {
			s += ", private_destinations: [10.0.0.0/8]"
		}
		if rng.IntN(4) == 0 {
			s += ", expires: " + pick("2026-03-04", "2026-03-05", "2027-01-01")
		}
		return s + "}"
	}
	var b strings.Builder
	b.WriteString("version: 1\n")
	if rng.IntN(2) == 0 {
		fmt.Fprintf(&b, "deny: [{names: [%q], reason: because}]\n", pick("a.x.test", ".y.test", "*.z.test"))
	}
	b.WriteString("groups:\n")
	for i, sources := range []string{"10.1.0.0/16", "10.2.0.0/16", "\"2001:db8::/32\""} {
		fmt.Fprintf(&b, "- name: g%d\n  sources: [%s]\n", i, sources)
		if rng.IntN(3) == 0 {
			b.WriteString("  users: [user" + fmt.Sprint(i) + "]\n")
		}
		if rng.IntN(3) == 0 {
			b.WriteString("  mode: observe\n  observe_until: " + pick("2026-03-04", "2027-01-01") + "\n")
		}
		if rng.IntN(2) == 0 {
			fmt.Fprintf(&b, "  tls: {sni: %s, ech: %s, min_version: \"%s\"}\n", pick("match", "listed", "optional"), pick("deny", "allow"), pick("1.0", "1.2", "1.3"))
		}
		b.WriteString("  allow:\n")
		for range 1 + rng.IntN(4) {
			b.WriteString("  - " + rule() + more() + "\n")
		}
		if rng.IntN(3) == 0 {
			b.WriteString("  - {addresses: [203.0.113.0/24, 10.9.0.0/16], ports: [80, 443], tls: {sni: optional}}\n")
		}
		if rng.IntN(2) == 0 {
			b.WriteString("  deny:\n  - " + rule() + "}\n")
		}
	}
	return b.String()
}

// wild is a client that asks the gate of a policy for something, and the event that
// the gate would write: stage by stage as proxy and resolver decide (connect.go,
// forward.go, handler.go).
func wild(rng *rand.Rand, p *policy.Policy) *event.Event {
	pick := func(of ...string) string { return of[rng.IntN(len(of))] }
	start := time.Date(2026, 3, 4, 23, 59, 50, 0, time.UTC).Add(time.Duration(rng.IntN(20000)) * time.Millisecond)
	ev := &event.Event{Time: start, ID: "1", Listener: "proxy", Kind: event.Connect, Port: []uint16{80, 443, 443, 443, 22, 8443}[rng.IntN(6)]}
	ev.Source = netip.AddrPortFrom(netip.MustParseAddr(pick("10.1.0.1", "10.2.3.4", "2001:db8::1", "192.0.2.1")), 5)
	req := policy.Request{Source: ev.Source.Addr(), Port: ev.Port, Time: start}
	ev.Name = pick("a.x.test", "b.x.test", "x.test", "b.y.test", "c.z.test", "z.test", "other.test", "203.0.113.9", "10.9.1.1", "2001:db8::9")
	if a, err := netip.ParseAddr(ev.Name); err == nil {
		req.Address = a
	} else {
		req.Name = policy.MustName(ev.Name)
	}
	if rng.IntN(6) == 0 {
		req.User = pick("user0", "user1", "nobody")
		ev.User = req.User
	}
	where := netip.MustParseAddr(pick("203.0.114.7", "203.0.114.7", "10.5.5.5", "2001:db8:1::1", "127.0.0.1"))
	if req.Address.IsValid() {
		where = req.Address
	}
	decide := func() bool { ev.Decision = p.Decide(req); return ev.Decision.Passes() }
	refuse := func(r policy.Reason) *event.Event { ev.Decision = ev.Decision.Refuse(r); return ev }
	dial := func() bool {
		req.Destination = where
		if !decide() {
			ev.Status = 403
			return false
		}
		ev.Destination = netip.AddrPortFrom(where, ev.Port)
		return true
	}
	switch rng.IntN(4) {
	case 0:
		ev.Kind, ev.Listener, ev.Port, req.Port, req.Protocol, ev.QType = event.DNS, "dns", 0, 0, policy.ProtocolDNS, pick("A", "AAAA", "TXT", "HTTPS")
		if req.Name.IsZero() {
			req.Name = policy.MustName("a.x.test")
			ev.Name, req.Address = "a.x.test", netip.Addr{}
		}
		req.QType, _ = policy.ParseQType(ev.QType)
		if decide() && rng.IntN(2) == 0 {
			question := ev.Decision
			req.Destination = where
			if decide() {
				ev.Decision, ev.Answers = question, []string{"alias.test", where.String()}
			}
		}
		return ev
	case 1:
		ev.Kind, req.Protocol = event.HTTP, policy.ProtocolHTTP
		if !decide() {
			return ev
		}
		if rng.IntN(6) == 0 && !req.Name.IsZero() {
			return refuse(policy.ReasonResolveFailed)
		}
		dial()
		return ev
	}
	if !decide() {
		ev.Status = 403
		return ev
	}
	switch n := rng.IntN(12); {
	case n == 0 && !req.Name.IsZero():
		return refuse(policy.ReasonResolveFailed)
	case n == 1:
		return refuse(policy.ReasonLimitExceeded)
	}
	if !dial() {
		return ev
	}
	ev.Status = 200
	if ev.Decision.Verdict == policy.Allow && ev.Decision.Inspect&policy.InspectNone != 0 {
		return ev
	}
	switch rng.IntN(8) {
	case 0:
		return ev // left before it said anything
	case 1:
		return refuse(policy.ReasonHelloTimeout)
	case 2:
		req.Protocol = policy.ProtocolTCP
		if ev.Decision.Inspect&policy.InspectHTTP != 0 {
			req.Protocol = policy.ProtocolHTTP
		}
	case 3:
		req.Protocol = policy.ProtocolTCP
	default:
		req.Protocol = policy.ProtocolTLS
		req.TLS = policy.TLS{Seen: true, MaxVersion: uint16(0x0301 + rng.IntN(4)), ECH: rng.IntN(4) == 0}
		if s := pick("", ev.Name, ev.Name, ev.Name, "a.x.test", "b.y.test", "other.test"); s != "" && !req.Address.IsValid() {
			req.TLS.SNI, ev.SNI = policy.MustName(s), s
		}
		ev.TLSVersion, ev.ECH = req.TLS.MaxVersion, req.TLS.ECH
	}
	decide()
	return ev
}

// logOf returns what the event log writes of evs, without the policy's revision: the
// replay must not know it by that.
func logOf(t *testing.T, evs []*event.Event) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	w, err := eventlog.Open(eventlog.Options{Output: path})
	if err != nil {
		t.Fatal(err)
	}
	for _, ev := range evs {
		w.Observe(ev)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.Run(ctx); err != nil || w.Dropped() > 0 {
		t.Fatal(err, w.Dropped())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`,"policy":"[^"]*"`).ReplaceAll(b, nil)
}

// The same policy decides what it has decided before.
func TestSamePolicy(t *testing.T) {
	seen := map[policy.Reason]int{}
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 7))
		text := randomPolicy(rng)
		p := compile(t, text)
		var evs []*event.Event
		for range 150 {
			ev := wild(rng, p)
			seen[ev.Decision.Reason]++
			evs = append(evs, ev)
		}
		lines := bytes.SplitAfter(logOf(t, evs), []byte("\n"))
		for i, ev := range evs {
			r := New(Options{Policy: p})
			if err := r.Line(lines[i]); err != nil {
				t.Fatalf("seed %d: %s: %v", seed, lines[i], err)
			}
			if rep := r.Report(); rep.Changes != (Counts{}) || rep.Decided+rep.Refused != 1 {
				t.Fatalf("seed %d: %s\n%+v\n%s\n%+v", seed, lines[i], ev.Decision, text, *rep.Rows[0])
			}
		}
	}
	for _, r := range []policy.Reason{
		policy.ReasonMatched, policy.ReasonNotListed, policy.ReasonExplicitDeny, policy.ReasonUnmatchedSource, policy.ReasonPortNotAllowed, policy.ReasonProtocolNotAllowed,
		policy.ReasonRuleExpired, policy.ReasonIPLiteral, policy.ReasonPrivateDestination, policy.ReasonSNIMismatch, policy.ReasonSNIMissing, policy.ReasonNotTLS,
		policy.ReasonTLSVersion, policy.ReasonECHNotAllowed, policy.ReasonQTypeNotAllowed, policy.ReasonResolveFailed, policy.ReasonLimitExceeded,
	} {
		if seen[r] == 0 {
			t.Errorf("no request came out as %s, so that nothing is known about it", r)
		}
	}
}

const before = `version: 1
groups:
- {name: ci, sources: [10.1.0.0/16], allow: [a.test, {names: [ssh.test], ports: [22], protocol: tcp}]}
- {name: old, sources: [10.2.0.0/16], mode: observe, observe_until: 2999-01-01, allow: [a.test]}
`

const after = `version: 1
groups:
- {name: ci, sources: [10.1.0.0/16], allow: [b.test, {names: [ssh.test], ports: [443]}]}
- {name: old, sources: [10.2.0.0/16], allow: [b.test, {names: [c.test], mode: x}]}
`

// read replays text under the policy after.
func read(t *testing.T, text string, o Options) *Report {
	t.Helper()
	if o.Policy == nil {
		o.Policy = compile(t, strings.Replace(after, ", {names: [c.test], mode: x}", "", 1))
	}
	r := New(o)
	if err := r.Read("log", strings.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	return r.Report()
}

func connect(src, name string, port int, rest string) string {
	return fmt.Sprintf(`{"time":"2026-03-04T04:06:07.089Z","event":"connect","id":"i","src":%q,"name":%q,"port":%d,%s}`+"\n", src, name, port, rest)
}

func TestChanges(t *testing.T) {
	const allowed, refused = `"verdict":"allow","reason":"matched","status":200,"dst":"203.0.114.7"`, `"verdict":"deny","reason":"not_listed","status":403`
	const observed = `"verdict":"observe","reason":"not_listed","status":200,"dst":"203.0.114.7"`
	tests := []struct {
		name, line string
		change     Change
		same       bool
		assumed    string
	}{
		{"listed no longer", connect("10.1.0.1", "a.test", 443, allowed), Denied, false, ""},
		{"listed now", connect("10.1.0.1", "b.test", 443, refused), Allowed, false, "hello_not_seen"},
		{"observed, listed now", connect("10.2.0.1", "b.test", 443, observed+`,"tls_version":"1.3","sni":"b.test"`), Allowed, false, ""},
		{"observed, enforced now", connect("10.2.0.1", "z.test", 443, observed), Denied, false, ""},
		{"could not be reached, listed no longer", connect("10.1.0.1", "a.test", 443, `"verdict":"deny","reason":"connect_failed","status":502`), Denied, false, ""},
		{"limit", connect("10.1.0.1", "a.test", 443, `"verdict":"deny","reason":"limit_exceeded","status":503`), 0, true, ""},
		{"was private", connect("10.1.0.1", "b.test", 443, `"verdict":"deny","reason":"private_destination","status":403`), 0, true, "address_not_known"},
		{"is private", connect("10.1.0.1", "b.test", 443, `"verdict":"allow","reason":"matched","status":200,"dst":"10.3.3.3"`), Denied, false, ""},
		{"through a parent", connect("10.1.0.1", "b.test", 443, `"verdict":"allow","reason":"matched","status":200,"dst":"10.3.3.3","parent":"p:1"`), 0, true, "address_not_known"},
		{"another port", connect("10.1.0.1", "ssh.test", 22, allowed), Denied, false, ""},
		{"name in the hello", connect("10.1.0.1", "b.test", 443, `"verdict":"allow","reason":"matched","status":200,"dst":"203.0.114.7","tls_version":"1.3","sni":"other.test"`), Denied, false, ""},
		{"old TLS", connect("10.1.0.1", "b.test", 443, `"verdict":"allow","reason":"matched","status":200,"dst":"203.0.114.7","tls_version":"1.1","sni":"b.test"`), Denied, false, ""},
		{"not looked at", connect("10.1.0.1", "b.test", 443, allowed), 0, true, "content_not_seen"},
		{"no TLS", connect("10.1.0.1", "b.test", 443, `"verdict":"observe","reason":"not_tls","status":200,"dst":"203.0.114.7"`), Denied, false, ""},
		{"no group", connect("192.0.2.1", "b.test", 443, `"verdict":"allow","reason":"matched","status":200`), Denied, false, ""},
		{"query", `{"time":"2026-03-04T04:06:07.089Z","event":"dns","src":"10.1.0.1","name":"b.test","qtype":"AAAA","verdict":"deny","reason":"not_listed"}`, Allowed, false, "address_not_known"},
		{"another type", `{"time":"2026-03-04T04:06:07.089Z","event":"dns","src":"10.1.0.1","name":"b.test","qtype":"TXT","verdict":"allow","reason":"matched"}`, Denied, false, ""},
		{"private answer", `{"time":"2026-03-04T04:06:07.089Z","event":"dns","src":"10.1.0.1","name":"b.test","qtype":"A","verdict":"allow","reason":"matched","answers":["x.test","10.0.0.1"]}`, Denied, false, ""},
		{"one private answer", `{"time":"2026-03-04T04:06:07.089Z","event":"dns","src":"10.1.0.1","name":"b.test","qtype":"A","verdict":"allow","reason":"matched","answers":["203.0.114.1","10.0.0.1"]}`, 0, true, ""},
		{"local record", `{"time":"2026-03-04T04:06:07.089Z","event":"dns","src":"10.1.0.1","name":"a.test","qtype":"A","verdict":"allow","reason":"matched","rule":"dns.records","answers":["10.0.0.1"]}`, 0, true, ""},
		{"local record, unknown source", `{"time":"2026-03-04T04:06:07.089Z","event":"dns","src":"192.0.2.1","name":"a.test","qtype":"A","verdict":"allow","reason":"matched","rule":"dns.records"}`, Denied, false, ""},
		{"health name", `{"time":"2026-03-04T04:06:07.089Z","event":"dns","src":"192.0.2.1","name":"health.test","qtype":"A","verdict":"allow","reason":"matched","rule":"dns.health_name"}`, 0, true, ""},
		{"squid tunnel", "1772597168.324   1234 10.1.0.1 TCP_TUNNEL/200 56789 CONNECT a.test:443 - HIER_DIRECT/203.0.113.7 -", Denied, false, ""},
		{"squid denied", "1772597168.324   1234 10.1.0.1 TCP_DENIED/403 0 CONNECT b.test:443 - HIER_NONE/- text/html", Allowed, false, "hello_not_seen"},
		{"squid plain", "1772597168.324   1234 10.1.0.1 TCP_MISS/200 56789 GET http://a.test/x?y:1 - HIER_DIRECT/203.0.113.7 text/html", Denied, false, ""},
		{"squid bumped", "1772597168.324   1234 10.1.0.1 TCP_MISS/200 56789 GET https://b.test/x - FIRSTUP_PARENT/10.0.0.1 text/html", 0, true, "address_not_known"},
		{"squid password", "1772597168.324   1234 10.1.0.1 TCP_DENIED/407 0 CONNECT b.test:443 - HIER_NONE/- text/html", 0, true, ""},
		{"squid failed", "1772597168.324   1234 10.1.0.1 NONE_NONE/503 0 CONNECT a.test:443 - HIER_NONE/- -", Denied, false, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rep := read(t, tt.line, Options{})
			var want Counts
			if !tt.same {
				want[tt.change] = 1
			}
			if rep.Changes != want || rep.Decided+rep.Refused != 1 {
				t.Errorf("%+v", rep)
			}
			if tt.assumed != "" && rep.Assumed[tt.assumed] != 1 {
				t.Errorf("assumed %v, want %s", rep.Assumed, tt.assumed)
			}
		})
	}
	// The other way round, newly observed.
	rep := read(t, connect("10.2.0.1", "b.test", 443, allowed), Options{Policy: compile(t, before)})
	if rep.Changes != (Counts{Observed: 1}) || rep.Rows[0].Now != "observe not_listed" || rep.Rows[0].Was != "allow matched" || rep.Rows[0].Group != "old" {
		t.Errorf("%+v", rep.Rows[0])
	}
}

func TestZonesAndTime(t *testing.T) {
	private := connect("10.1.0.1", "b.test", 443, `"verdict":"allow","reason":"matched","status":200,"dst":"10.3.3.3"`)
	if rep := read(t, private, Options{PrivateZone: func(policy.Name, netip.Addr) bool { return true }}); rep.Same != 1 {
		t.Errorf("%+v", rep)
	}
	expiring := compile(t, "version: 1\ngroups: [{name: g, sources: [10.1.0.0/16], allow: [{names: [b.test], expires: 2026-06-01}]}]\n")
	line := connect("10.1.0.1", "b.test", 443, `"verdict":"allow","reason":"matched","status":200,"dst":"203.0.114.7"`)
	if rep := read(t, line, Options{Policy: expiring}); rep.Same != 1 {
		t.Errorf("as of the record: %+v", rep)
	}
	if rep := read(t, line, Options{Policy: expiring, At: time.Date(2026, 6, 2, 0, 0, 0, 0, time.UTC)}); rep.Changes[Denied] != 1 {
		t.Errorf("as of later: %+v", rep)
	}
}

func TestBadLines(t *testing.T) {
	good := connect("10.1.0.1", "a.test", 443, `"verdict":"allow","reason":"matched","status":200`)
	text := good + "\n" + `{"level":"info","message":"x"}` + "\n" + `{"event":"config"}` + "\n" + "garbage\n" + strings.Repeat("x", maxLine+10) + "\n" +
		good + `{"time":"yesterday","event":"connect","src":"10.1.0.1","name":"a.test","port":1,"verdict":"allow"}` + "\n" +
		`{"time":"2026-03-04T04:06:07.089Z","event":"connect","src":"10.1.0.1","name":"..","port":1,"verdict":"deny","reason":"bad_request"}` + "\n" + good[:50]
	rep := read(t, text, Options{})
	if rep.Decided != 2 || rep.Malformed != 4 || rep.Other != 2 || rep.Undecidable != 1 || rep.Lines != 9 {
		t.Errorf("%+v", rep)
	}
	var at []uint64
	for _, p := range rep.Problems {
		at = append(at, p.Line)
	}
	if fmt.Sprint(at) != "[5 6 8 10]" {
		t.Errorf("problems %+v", rep.Problems)
	}
	if rep = read(t, strings.Repeat("x\n", 1000), Options{}); rep.Malformed != 1000 || len(rep.Problems) != maxProblems {
		t.Errorf("%d malformed, %d shown", rep.Malformed, len(rep.Problems))
	}
}

// TestLongNames has names and sources that nothing can have, of which none is kept.
func TestLongNames(t *testing.T) {
	r := New(Options{Policy: compile(t, before)})
	for i := range 100 {
		long := fmt.Sprintf("%d%s", i, strings.Repeat("x", maxLine/2))
		for _, line := range []string{
			connect("10.1.0.1", long, 443, `"verdict":"deny","reason":"bad_request"`),
			connect(long, "a.test", 443, `"verdict":"deny","reason":"bad_request"`),
		} {
			if err := r.Line([]byte(line)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(r.targets) > 1 || len(r.sources) > 1 || r.rep.Undecidable != 200 {
		t.Errorf("%d names and %d sources kept, %d undecidable", len(r.targets), len(r.sources), r.rep.Undecidable)
	}
}

func TestGzip(t *testing.T) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	good := connect("10.1.0.1", "a.test", 443, `"verdict":"allow","reason":"matched","status":200`)
	for i := range 1000 {
		io.WriteString(z, strings.Replace(good, `"i"`, fmt.Sprintf(`"%x"`, rand.New(rand.NewPCG(uint64(i), 1)).Uint64()), 1))
	}
	z.Close()
	if rep := read(t, b.String()+b.String(), Options{}); rep.Changes[Denied] != 2000 || rep.Malformed != 0 {
		t.Errorf("%+v", rep)
	}
	rep := read(t, b.String()[:b.Len()-100], Options{})
	if rep.Malformed == 0 || rep.Changes[Denied] == 0 || rep.Problems[len(rep.Problems)-1].Error != "unexpected EOF" {
		t.Errorf("cut short: %+v", rep)
	}
}

// Memory stays bounded however many names there are, and nothing goes uncounted.
func TestManyNames(t *testing.T) {
	r := New(Options{Policy: compile(t, strings.Replace(after, ", {names: [c.test], mode: x}", "", 1))})
	const n = maxAllRows + 70_000
	for i := range n {
		name := fmt.Sprintf("n%d.d%d.example.com", i, i)
		if i > n-60_000 {
			name = fmt.Sprintf("n.d%d.com", i)
		}
		if err := r.Line([]byte(connect("10.1.0.1", name, 443, `"verdict":"allow","reason":"matched","status":200`))); err != nil {
			t.Fatal(err)
		}
	}
	rep := r.Report()
	if len(rep.Rows) > maxAllRows+changesN || rep.Folded == 0 {
		t.Errorf("%d rows, %d folded", len(rep.Rows), rep.Folded)
	}
	sum, folded, rest := uint64(0), false, false
	for _, row := range rep.Rows {
		sum += row.Count
		folded = folded || row.Name == "*.example.com"
		rest = rest || row.Name == others
	}
	if sum != n || !folded || !rest {
		t.Errorf("%d counted of %d; folded %v, rest %v", sum, n, folded, rest)
	}
}

const changesN = int(changes)

func TestTime(t *testing.T) {
	for s, want := range map[string]string{
		"2026-03-04T04:06:07.089Z": "2026-03-04T04:06:07.089Z", "2026-03-04T05:06:07+01:00": "2026-03-04T04:06:07Z", "2026-02-30T00:00:00.000Z": "", "2026-02-29T00:00:00.000Z": "",
		"2024-02-29T00:00:00.000Z": "2024-02-29T00:00:00Z", "": "", "x": "", "2026-13-01T00:00:00.000Z": "", "2026-01-01T24:00:00.000Z": "", "2026x01-01T00:00:00.000Z": "",
	} {
		got, ok := readTime(&record{time: []byte(s)})
		if ok != (want != "") || ok && got.UTC().Format(time.RFC3339Nano) != want {
			t.Errorf("%q: %v %v, want %s", s, got, ok, want)
		}
	}
}
