package eventlog

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"sallyport/policy"
	"sallyport/policy/event"
)

var (
	when   = time.Date(2026, 3, 4, 5, 6, 7, 89_999_999, time.FixedZone("", 3600))
	client = netip.MustParseAddrPort("10.20.1.5:50123")
	origin = netip.MustParseAddrPort("203.0.113.7:443")
	passed = policy.Decision{Verdict: policy.Allow, Reason: policy.ReasonMatched, Rule: "github", Group: "ci", Revision: "r1"}
	denied = policy.Decision{Reason: policy.ReasonNotListed, Group: "ci", Revision: "r1"}
)

func tunnel() *event.Event {
	return &event.Event{
		Time: when, Kind: event.Connect, ID: "8f3a", Source: client, Listener: "proxy", Method: "CONNECT",
		Name: "api.github.com", Port: 443, Decision: passed, SNI: "api.github.com", ALPN: []string{"h2", "http/1.1"},
		TLSVersion: 0x0304, PostQuantum: true, JA4: "t13d1516h2_8daaf6152771_e5627efa2ab1", Destination: origin, Status: 200, BytesUp: 1234, BytesDown: 56789,
		Duration: 1234567 * time.Microsecond, DNSTime: 1500 * time.Microsecond, ConnTime: 20 * time.Millisecond, User: "alice", UserAgent: "curl/8.14.1",
	}
}

// lines returns what w writes for events, without running it.
func lines(t testing.TB, format Format, evs ...*event.Event) string {
	t.Helper()
	w, err := Open(Options{Format: format, Node: "gate-1", Stdout: os.Stdout})
	if err != nil {
		t.Fatal(err)
	}
	for _, ev := range evs {
		w.Observe(ev)
	}
	out := string(w.events.pending)
	if w.messages != w.events {
		out += string(w.messages.pending)
	}
	return out
}

func TestJSON(t *testing.T) {
	refused := &event.Event{Time: when, Kind: event.HTTP, ID: "2", Source: netip.MustParseAddrPort("[2001:db8::5]:9"), VPCEndpoint: "vpce-08d2", Listener: "proxy", Method: "GET", Name: "evil.example", Port: 80, Decision: denied, Status: 403}
	query := &event.Event{Time: when, Kind: event.DNS, ID: "3", Source: client, Listener: "dns", Name: "api.github.com", Decision: passed, QType: "A", RCode: "NOERROR", Answers: []string{"203.0.113.7", "x.example"}, Duration: time.Millisecond}
	unknown := &event.Event{Time: when, Kind: event.Connect, ID: "4", Source: client, Listener: "proxy", Method: "CONNECT", Name: "a.example", Port: 22, Decision: policy.Decision{Reason: policy.ReasonUnmatchedSource, Revision: "r1"}, TLSVersion: 0x7f1c, ECH: true, Error: "dial tcp: refused"}
	reload := &event.Event{Time: when, Kind: event.Config, Name: "policy", Decision: policy.Decision{Revision: "r2"}}
	failed := &event.Event{Time: when, Kind: event.Config, Name: "policy", Decision: policy.Decision{Revision: "r2"}, Error: "policy.yaml:1:1: bad\npolicy.yaml:2:1: worse"}
	want := `{"time":"2026-03-04T04:06:07.089Z","event":"connect","id":"8f3a","node":"gate-1","src":"10.20.1.5","src_port":50123,"group":"ci","mode":"enforce","listener":"proxy","method":"CONNECT","name":"api.github.com","port":443,"sni":"api.github.com","alpn":["h2","http/1.1"],"ech":false,"post_quantum":true,"tls_version":"1.3","ja4":"t13d1516h2_8daaf6152771_e5627efa2ab1","verdict":"allow","reason":"matched","rule":"github","policy":"r1","dst":"203.0.113.7","status":200,"bytes_up":1234,"bytes_down":56789,"duration_ms":1234.567,"dns_ms":1.5,"connect_ms":20,"user":"alice","user_agent":"curl/8.14.1"}
{"time":"2026-03-04T04:06:07.089Z","event":"http","id":"2","node":"gate-1","src":"2001:db8::5","src_port":9,"vpc_endpoint":"vpce-08d2","group":"ci","mode":"enforce","listener":"proxy","method":"GET","name":"evil.example","port":80,"verdict":"deny","reason":"not_listed","policy":"r1","status":403,"bytes_up":0,"bytes_down":0,"duration_ms":0}
{"time":"2026-03-04T04:06:07.089Z","event":"dns","id":"3","node":"gate-1","src":"10.20.1.5","src_port":50123,"group":"ci","mode":"enforce","listener":"dns","name":"api.github.com","verdict":"allow","reason":"matched","rule":"github","policy":"r1","qtype":"A","rcode":"NOERROR","answers":["203.0.113.7","x.example"],"duration_ms":1}
{"time":"2026-03-04T04:06:07.089Z","event":"connect","id":"4","node":"gate-1","src":"10.20.1.5","src_port":50123,"listener":"proxy","method":"CONNECT","name":"a.example","port":22,"ech":true,"post_quantum":false,"tls_version":"0x7f1c","verdict":"deny","reason":"unmatched_source","policy":"r1","bytes_up":0,"bytes_down":0,"duration_ms":0,"error":"dial tcp: refused"}
{"time":"2026-03-04T04:06:07.089Z","event":"config","node":"gate-1","what":"policy","ok":true,"policy":"r2"}
{"time":"2026-03-04T04:06:07.089Z","event":"config","node":"gate-1","what":"policy","ok":false,"policy":"r2","error":"policy.yaml:1:1: bad\u000apolicy.yaml:2:1: worse"}
`
	if got := lines(t, JSON, tunnel(), refused, query, unknown, reload, failed); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestSquid(t *testing.T) {
	ev := func(change func(*event.Event)) *event.Event {
		e := tunnel()
		change(e)
		return e
	}
	tests := []struct {
		name string
		ev   *event.Event
		want string
	}{
		{"tunnel", ev(func(e *event.Event) { e.User = "" }),
			"1772597168.324   1234 10.20.1.5 TCP_TUNNEL/200 56789 CONNECT api.github.com:443 - HIER_DIRECT/203.0.113.7 -"},
		{"observed", ev(func(e *event.Event) { e.Decision.Verdict, e.Decision.Reason = policy.Observe, policy.ReasonNotListed }),
			"1772597168.324   1234 10.20.1.5 TCP_TUNNEL/200 56789 CONNECT api.github.com:443 alice HIER_DIRECT/203.0.113.7 -"},
		{"through a parent", ev(func(e *event.Event) { e.Parent = "proxy.corp.example:3128" }),
			"1772597168.324   1234 10.20.1.5 TCP_TUNNEL/200 56789 CONNECT api.github.com:443 alice FIRSTUP_PARENT/203.0.113.7 -"},
		{"denied", ev(func(e *event.Event) {
			*e = event.Event{Time: when, Kind: event.Connect, Source: client, Method: "CONNECT", Name: "evil.example", Port: 443, Decision: denied, Status: 403}
		}),
			"1772597167.089      0 10.20.1.5 TCP_DENIED/403 0 CONNECT evil.example:443 - HIER_NONE/- -"},
		{"plain", ev(func(e *event.Event) { e.Kind, e.Method, e.Port, e.Name = event.HTTP, "GET", 80, "www.example.com" }),
			"1772597168.324   1234 10.20.1.5 TCP_MISS/200 56789 GET http://www.example.com/ alice HIER_DIRECT/203.0.113.7 -"},
		{"plain, other port, v6", ev(func(e *event.Event) { e.Kind, e.Method, e.Port, e.Name = event.HTTP, "GET", 8080, "2001:db8::1" }),
			"1772597168.324   1234 10.20.1.5 TCP_MISS/200 56789 GET http://[2001:db8::1]:8080/ alice HIER_DIRECT/203.0.113.7 -"},
		{"connect failed", ev(func(e *event.Event) {
			e.Decision, e.Status, e.Destination = passed.Refuse(policy.ReasonConnectFailed), 502, netip.AddrPort{}
		}),
			"1772597168.324   1234 10.20.1.5 NONE_NONE/502 56789 CONNECT api.github.com:443 alice HIER_NONE/- -"},
		{"revoked", ev(func(e *event.Event) { e.Decision = passed.Refuse(policy.ReasonPolicyRevoked) }),
			"1772597168.324   1234 10.20.1.5 TCP_TUNNEL_ABORTED/200 56789 CONNECT api.github.com:443 alice HIER_DIRECT/203.0.113.7 -"},
		{"bad request", ev(func(e *event.Event) {
			*e = event.Event{Time: when, Kind: event.Connect, Source: client, Decision: denied.Refuse(policy.ReasonBadRequest), Status: 400}
		}),
			"1772597167.089      0 10.20.1.5 NONE_NONE/400 0 NONE error:invalid-request - HIER_NONE/- -"},
		{"injection", ev(func(e *event.Event) { e.Name, e.User, e.Method = "a b\r\n%é\"", "x y", "G ET" }),
			"1772597168.324   1234 10.20.1.5 TCP_TUNNEL/200 56789 G%20ET a%20b%0D%0A%25%C3%A9%22:443 x%20y HIER_DIRECT/203.0.113.7 -"},
		// The rest, but for addresses, times and sizes, was compared with what Squid 5.7 wrote of the same requests.
		{"path, type", ev(func(e *event.Event) {
			e.Kind, e.Method, e.Port, e.Path, e.ContentType, e.User = event.HTTP, "GET", 8080, "/a%20b?", "text/html; charset=utf-8", ""
		}),
			"1772597168.324   1234 10.20.1.5 TCP_MISS/200 56789 GET http://api.github.com:8080/a%20b? - HIER_DIRECT/203.0.113.7 text/html"},
		{"odd path", ev(func(e *event.Event) {
			e.Kind, e.Method, e.Port, e.Path, e.User = event.HTTP, "GET", 80, "/\"<>|\\^`{}~%zz", ""
		}),
			"1772597168.324   1234 10.20.1.5 TCP_MISS/200 56789 GET http://api.github.com/\"<>|\\^`{}~%zz - HIER_DIRECT/203.0.113.7 -"},
		{"hostile path", ev(func(e *event.Event) { e.Kind, e.Port, e.Path, e.ContentType = event.HTTP, 80, "/a\r\n é", "a\nb" }),
			"1772597168.324   1234 10.20.1.5 TCP_MISS/200 56789 CONNECT http://api.github.com/a%0D%0A%20%C3%A9 alice HIER_DIRECT/203.0.113.7 a%0Ab"},
		{"user", ev(func(e *event.Event) { e.User = "élise%a\"b\\c[]" }),
			"1772597168.324   1234 10.20.1.5 TCP_TUNNEL/200 56789 CONNECT api.github.com:443 %c3%a9lise%25a\"b\\\\c%5b%5d HIER_DIRECT/203.0.113.7 -"},
		{"plain denied", ev(func(e *event.Event) {
			*e = event.Event{Time: when, Kind: event.HTTP, Source: client, Method: "GET", Name: "evil.example", Port: 80, Path: "/foo", Decision: denied, Status: 403, ContentType: "text/html"}
		}),
			"1772597167.089      0 10.20.1.5 TCP_DENIED/403 0 GET http://evil.example/foo - HIER_NONE/- text/html"},
		{"password wanted", ev(func(e *event.Event) {
			*e = event.Event{Time: when, Kind: event.HTTP, Source: client, Method: "GET", Name: "a.example", Port: 80, Path: "/", Decision: denied.Refuse(policy.ReasonAuthRequired), Status: 407}
		}),
			"1772597167.089      0 10.20.1.5 TCP_DENIED/407 0 GET http://a.example/ - HIER_NONE/- -"},
		{"plain, resolve failed", ev(func(e *event.Event) {
			*e = event.Event{Time: when, Kind: event.HTTP, Source: client, Method: "GET", Name: "a.example", Port: 80, Decision: passed.Refuse(policy.ReasonResolveFailed), Status: 502}
		}),
			"1772597167.089      0 10.20.1.5 TCP_MISS/502 0 GET http://a.example/ - HIER_NONE/- -"},
		{"plain, broken off", ev(func(e *event.Event) {
			e.Kind, e.Method, e.Port, e.Aborted, e.ContentType, e.User = event.HTTP, "GET", 80, true, "text/plain", ""
		}),
			"1772597168.324   1234 10.20.1.5 TCP_MISS_ABORTED/200 56789 GET http://api.github.com/ - HIER_DIRECT/203.0.113.7 text/plain"},
		{"plain, client left early", ev(func(e *event.Event) {
			e.Kind, e.Method, e.Port, e.Aborted, e.Status, e.BytesDown, e.User = event.HTTP, "GET", 80, true, 0, 0, ""
		}),
			"1772597168.324   1234 10.20.1.5 TCP_MISS_ABORTED/000 0 GET http://api.github.com/ - HIER_DIRECT/203.0.113.7 -"},
		{"no port", ev(func(e *event.Event) {
			*e = event.Event{Time: when, Kind: event.Connect, Source: client, Method: "CONNECT", Name: "ok.test", Decision: denied.Refuse(policy.ReasonBadRequest), Status: 400}
		}),
			"1772597167.089      0 10.20.1.5 NONE_NONE/400 0 CONNECT ok.test - HIER_NONE/- -"},
		{"query", &event.Event{Kind: event.DNS}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := strings.TrimSuffix(lines(t, Squid, tt.ev), "\n"); got != tt.want {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
		})
	}
}

func TestAviatrix(t *testing.T) {
	const head = "2026-03-04T04:06:07.089999+00:00 gate-1 sallyport: AviatrixFQDNRule0[CRIT]decide() L#0  Gateway=gate-1 S_IP=10.20.1.5 "
	tests := []struct {
		name, want string
		change     func(*event.Event)
	}{
		{"allowed", "D_IP=203.0.113.7 hostname=api.github.com state=MATCHED Rule=github", func(*event.Event) {}},
		{"not listed", "D_IP=- hostname=api.github.com state=NO_MATCH drop_reason=NOT_WHITELISTED",
			func(e *event.Event) { e.Decision, e.Destination = denied, netip.AddrPort{} }},
		{"denied by rule", "D_IP=203.0.113.7 hostname=api.github.com state=MATCHED drop_reason=BLACKLISTED Rule=no-pastes",
			func(e *event.Event) {
				e.Decision.Verdict, e.Decision.Reason, e.Decision.Rule = policy.Deny, policy.ReasonExplicitDeny, "no-pastes"
			}},
		{"observed", "D_IP=203.0.113.7 hostname=api.github.com state=NO_MATCH",
			func(e *event.Event) {
				e.Decision = denied
				e.Decision.Verdict = policy.Observe
			}},
		{"failed", "D_IP=203.0.113.7 hostname=api.github.com state=MATCHED Rule=github",
			func(e *event.Event) { e.Decision = passed.Refuse(policy.ReasonConnectFailed) }},
		{"injection", "D_IP=203.0.113.7 hostname=a%20state=MATCHED%0A state=MATCHED Rule=github",
			func(e *event.Event) { e.Name = "a state=MATCHED\n" }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ev := tunnel()
			tt.change(ev)
			if got := lines(t, Aviatrix, ev); got != head+tt.want+"\n" {
				t.Errorf("got  %q\nwant %q", got, head+tt.want)
			}
		})
	}
}

// The foreign formats have no place for these: they go to standard error as JSON.
func TestConfigElsewhere(t *testing.T) {
	w, err := Open(Options{Format: Squid})
	if err != nil {
		t.Fatal(err)
	}
	w.Observe(&event.Event{Kind: event.Config, Name: "policy"})
	log := w.Logger()
	log.Info().Msg("hello")
	if len(w.events.pending) != 0 || w.messages.lines != 2 {
		t.Errorf("access log %q, messages %q", w.events.pending, w.messages.pending)
	}
}

// lineError says what is wrong with one line of JSON, if anything is.
func lineError(line string) error {
	body, ok := strings.CutSuffix(line, "\n")
	switch {
	case !ok:
		return errors.New("no newline at the end")
	case len(line) > maxLine:
		return fmt.Errorf("%d bytes, bound %d", len(line), maxLine)
	case !json.Valid([]byte(body)) || !utf8.ValidString(body):
		return errors.New("not valid JSON")
	}
	if i := strings.IndexFunc(body, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
		return fmt.Errorf("an unescaped %q", body[i:min(len(body), i+4)])
	}
	return nil
}

func checkLine(t *testing.T, line string) {
	t.Helper()
	if err := lineError(line); err != nil {
		t.Errorf("%v: %.200q", err, line)
	}
}

// hostile puts s wherever a client, or a careless operator, could put it.
func hostile(s string, most int) *event.Event {
	many := slices.Repeat([]string{s}, most)
	ev := tunnel()
	ev.ID, ev.Listener, ev.Method, ev.Name, ev.SNI, ev.ALPN, ev.JA4 = s, s, s, s, s, many, s
	ev.QType, ev.RCode, ev.Answers, ev.User, ev.UserAgent, ev.Error, ev.VPCEndpoint = s, s, many, s, s, s, s
	ev.Path, ev.ContentType = s, s
	ev.Decision.Rule, ev.Decision.Group, ev.Decision.Revision = s, s, s
	return ev
}

// The longest possible line keeps the bound, whatever escaping makes of it.
func TestLongestLine(t *testing.T) {
	for _, s := range []string{"a", "\x00", "\xff", "\"", "\u2028", "é", "漢", "\U0001F600", "\U000E0001"} {
		ev := hostile(strings.Repeat(s, 100_000), 1000)
		ev.Source = netip.AddrPortFrom(netip.MustParseAddr("fe80::1%"+strings.Repeat("z", 300)), 65535)
		ev.Destination = ev.Source
		checkLine(t, lines(t, JSON, ev))
		for _, f := range []Format{Squid, Aviatrix} {
			if l := lines(t, f, ev); len(l) > maxLine || strings.Count(l, "\n") != 1 {
				t.Errorf("%s: %d bytes, %d lines", f, len(l), strings.Count(l, "\n"))
			}
		}
		ev.Kind = event.Config
		checkLine(t, lines(t, JSON, ev))
	}
}

func TestAppendQuoted(t *testing.T) {
	tests := []struct {
		in    string
		limit int
		want  string
	}{
		{"", 8, `""`},
		{"abcdefgh", 8, `"abcdefgh"`},
		{"abcdefghi", 8, `"abcde…"`},
		{"a\x00", 8, `"a\u0000"`},
		{"a\x00b", 7, `"a…"`},
		{"ab漢字", 8, `"ab漢字"`},
		{"ab漢字x", 8, `"ab漢…"`},
		{"\U000E0001", 12, `"\udb40\udc01"`},
		{"a\xffb", 99, `"a\ufffdb"`},
		{"\u2028\u0085\u202e", 99, `"\u2028\u0085\u202e"`},
	}
	for _, tt := range tests {
		if got := string(appendQuoted(nil, tt.in, tt.limit)); got != tt.want {
			t.Errorf("appendQuoted(%q, %d) = %s, want %s", tt.in, tt.limit, got, tt.want)
		}
	}
}

func FuzzLine(f *testing.F) {
	f.Add("api.github.com", 1)
	f.Add("a\r\n{\"verdict\":\"allow\"}\n", 20)
	f.Add("\x00\x1b[31m\xff\xc3\u2028\u2029\u0085\u202e\\\"", 3)
	f.Fuzz(func(t *testing.T, s string, most int) {
		ev := hostile(s, min(max(most, 0), 100))
		line := lines(t, JSON, ev)
		checkLine(t, line)
		var m struct{ Name, SNI string }
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatal(err)
		}
		if len(s)*6 <= maxName && utf8.ValidString(s) && (m.Name != s || m.SNI != s) {
			t.Errorf("name %q came out as %q", s, m.Name)
		}
		for _, format := range []Format{Squid, Aviatrix} {
			l := lines(t, format, ev)
			if strings.Count(l, "\n") != 1 || strings.IndexFunc(l[:len(l)-1], func(r rune) bool { return r < ' ' || r > '~' }) >= 0 {
				t.Errorf("%s: %q", format, l)
			}
		}
	})
}

func BenchmarkObserveQuery(b *testing.B) {
	w, err := Open(Options{Node: "gate-1"})
	if err != nil {
		b.Fatal(err)
	}
	ev := &event.Event{Time: when, Kind: event.DNS, ID: "d3", Source: client, Listener: "dns", Name: "evil.example", Decision: denied, QType: "A", RCode: "REFUSED"}
	b.ReportAllocs()
	for b.Loop() {
		w.events.pending, w.events.lines = w.events.pending[:0], 0
		w.Observe(ev)
	}
}

func BenchmarkObserve(b *testing.B) {
	for _, format := range []Format{JSON, Squid, Aviatrix} {
		b.Run(string(format), func(b *testing.B) {
			w, err := Open(Options{Format: format, Node: "gate-1"})
			if err != nil {
				b.Fatal(err)
			}
			ev := tunnel()
			b.ReportAllocs()
			for b.Loop() {
				w.events.pending, w.events.lines = w.events.pending[:0], 0
				w.Observe(ev)
			}
		})
	}
}
