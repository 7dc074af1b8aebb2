package policy

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestUsersChooseTheGroup(t *testing.T) {
	p := mustLoad(t, `
groups:
  - {name: net, sources: [10.0.0.0/8], allow: [net.test]}
  - {name: bots, sources: [192.0.2.0/24], users: [deploy-bot, "CN=ops", "spiffe://corp.test:8443/ns/ci"], allow: [bot.test]}
  - {name: people, users: [anna@corp.test], mode: observe, observe_until: 2999-01-01}
`)
	if !p.HasUsers() {
		t.Error("HasUsers() = false")
	}
	for _, tt := range []struct{ source, user, group string }{
		{"10.1.2.3", "", "net"},
		{"10.1.2.3", "deploy-bot", "bots"},
		{"10.1.2.3", "CN=ops", "bots"},
		{"203.0.113.1", "spiffe://corp.test:8443/ns/ci", "bots"},
		{"203.0.113.1", "deploy-bot", "bots"}, // wherever the user comes from
		{"192.0.2.1", "", "bots"},
		{"192.0.2.1", "anna@corp.test", "people"},
		{"10.1.2.3", "Deploy-Bot", "net"}, // names of users are taken as they are
		{"10.1.2.3", "nobody", "net"},
		{"203.0.113.1", "nobody", ""},
		{"203.0.113.1", "", ""},
		{"", "deploy-bot", "bots"},
	} {
		r := Request{User: tt.user, Name: MustName("bot.test"), Port: 443}
		if tt.source != "" {
			r.Source = netip.MustParseAddr(tt.source)
		}
		d := p.Decide(r)
		if d.Group != tt.group {
			t.Errorf("Decide(source %q, user %q): group %q, want %q", tt.source, tt.user, d.Group, tt.group)
		}
		if x := p.Explain(r); x.Decision != d || (x.User != "") != (tt.user != "" && (tt.group == "bots" || tt.group == "people")) {
			t.Errorf("Explain(source %q, user %q) = %+v, Decide %+v", tt.source, tt.user, x, d)
		}
	}
}

func TestBadUsers(t *testing.T) {
	for _, tt := range []struct{ users, want string }{
		{`["a:b"]`, `"a:b" is no name of a user`},
		{`["a b"]`, "no name of a user"},
		{`["://a"]`, "no name of a user"},
		{`["a://"]`, "no name of a user"},
		{`["a:b://c"]`, "no name of a user"},
		{`["spiffe://corp.test/a b"]`, "no name of a user"},
		{`[""]`, "no name of a user"},
		{`["a\u0001"]`, "invisible character"},
		{`["` + strings.Repeat("a", 256) + `"]`, "use 1 to 255 characters"},
		{`[a, a]`, `user a belongs to group "g" already`},
	} {
		d, err := ParseDocument("policy.yaml", []byte("version: 1\ngroups:\n  - {name: g, users: "+tt.users+", allow: [x.test]}\n"))
		if err == nil {
			_, _, err = Compile(d, Options{})
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "groups[0].users[") {
			t.Errorf("users: %s: error %v, want %q at groups[0].users", tt.users, err, tt.want)
		}
	}
}

func TestDiffOfUsers(t *testing.T) {
	at := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	const text = "groups:\n  - {name: a, sources: [10.0.0.0/8], users: [u, moved, gone], allow: [a.test]}\n  - {name: b, users: [v], allow: [b.test]}\n"
	old := mustLoad(t, text)
	same := mustLoad(t, strings.Replace(text, "[u, moved, gone]", "[gone, moved, u]", 1))
	if c := Diff(old, same, at); !c.Empty() {
		t.Errorf("the order of users makes a difference: %+v", c)
	}
	moved := mustLoad(t, strings.NewReplacer("[u, moved, gone]", "[u, new]", "[v]", "[v, moved]").Replace(text))
	c := Diff(old, moved, at)
	want := []UserChange{{"gone", "a", ""}, {"moved", "a", "b"}, {"new", "", "a"}}
	if c.Empty() || len(c.Users) != len(want) || c.Users[0] != want[0] || c.Users[1] != want[1] || c.Users[2] != want[2] {
		t.Errorf("users = %+v, want %+v", c.Users, want)
	}
	// What a group of users may reach is compared although no source belongs to it.
	c = Diff(old, mustLoad(t, strings.Replace(text, "b.test", "c.test", 1)), at)
	if len(c.Groups) != 1 || c.Groups[0].New != "b" || len(c.Groups[0].Changes) != 2 || len(c.Added)+len(c.Removed) != 0 {
		t.Errorf("change of a users' group: %+v", c)
	}
	c = Diff(old, mustLoad(t, strings.Replace(text, "name: b", "name: c", 1)), at)
	if len(c.Added) != 1 || len(c.Removed) != 1 {
		t.Errorf("renamed group of users: added %v, removed %v", c.Added, c.Removed)
	}
}
