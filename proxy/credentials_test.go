package proxy

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/proxy/htpasswd"
)

// theSecret is part of every password of these tests, and may turn up nowhere.
const theSecret = "Sesame"

// usersFile has users with the password theSecret and their name.
func usersFile(t testing.TB, users ...string) *htpasswd.File {
	t.Helper()
	var b strings.Builder
	for _, u := range users {
		hash, err := bcrypt.GenerateFromPassword([]byte(theSecret+u), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s:%s\n", u, hash)
	}
	f, err := htpasswd.Parse("users", []byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// basic is a Proxy-Authorization field line.
func basic(user, password string) string {
	return "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password)) + "\r\n"
}

func withUsers(f *htpasswd.File, edit ...func(*Config)) func(*Config) {
	return func(c *Config) {
		c.Auth = Auth{Users: f, HasUsers: func() bool { return c.Decider.(*policy.Store).Policy().HasUsers() }}
		for _, e := range edit {
			e(c)
		}
	}
}

// userPolicy lets anna reach the origin, and clients of loopback other.test alone.
// Without loopback no group has the tests' source.
func userPolicy(o *origin, loopback string) string {
	return fmt.Sprintf(`
version: 1
groups:
  - {name: net, sources: [%[2]s], allow: [{names: [net.test], ports: [%[1]d], protocol: tcp, private_destinations: [127.0.0.0/8]}]}
  - name: people
    users: [anna, "bert@corp.test"]
    allow:
      - {names: [user.test], ports: [%[1]d], protocol: tcp, private_destinations: [127.0.0.0/8]}
      - {names: [web.test], ports: [%[1]d], protocol: http, private_destinations: [127.0.0.0/8]}
`, o.port(), loopback)
}

const (
	loopback = "127.0.0.0/8"
	nowhere  = "192.0.2.0/24"
)

// asks sends a CONNECT with further field lines and returns the answer. noSecrets
// checks the event of every test that uses it.
func (c *client) asks(target, fields string) (*http.Response, string) {
	c.t.Helper()
	c.send("CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n%s\r\n", target, fields)
	return c.response(http.MethodConnect)
}

func noSecrets(t testing.TB, ev event.Event) {
	t.Helper()
	if text := fmt.Sprintf("%+v", ev); strings.Contains(text, theSecret) || strings.Contains(text, base64.StdEncoding.EncodeToString([]byte("anna:" + theSecret))[:8]) {
		t.Errorf("the event holds a password: %s", text)
	}
}

func TestT63CredentialsWhen407(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	for _, tt := range []struct {
		name, sources string
		required      bool
		users         bool // a file of users is set
		target        string
		fields        string
		status        int
		reason        policy.Reason
		user          string
	}{
		{"right", nowhere, false, true, "user.test", basic("anna", theSecret+"anna"), 200, policy.ReasonMatched, "anna"},
		{"case of the scheme", nowhere, false, true, "user.test", strings.Replace(basic("anna", theSecret+"anna"), "Basic", "bASIC", 1), 200, policy.ReasonMatched, "anna"},
		{"none, unknown source", nowhere, false, true, "user.test", "", 407, policy.ReasonAuthRequired, ""},
		{"none, known source, denied", loopback, false, true, "user.test", "", 403, policy.ReasonNotListed, ""},
		{"none, known source, allowed", loopback, false, true, "net.test", "", 200, policy.ReasonMatched, ""},
		{"none, required", loopback, true, true, "net.test", "", 407, policy.ReasonAuthRequired, ""},
		{"user before source", loopback, false, true, "net.test", basic("anna", theSecret+"anna"), 403, policy.ReasonNotListed, "anna"},
		{"unlisted user, known source", loopback, true, true, "net.test", basic("carl", theSecret+"carl"), 200, policy.ReasonMatched, "carl"},
		{"unlisted user, unknown source", nowhere, false, true, "user.test", basic("carl", theSecret+"carl"), 403, policy.ReasonUnmatchedSource, "carl"},
		{"listed user, not listed name", nowhere, false, true, "other.test", basic("anna", theSecret+"anna"), 403, policy.ReasonNotListed, "anna"},
		{"wrong password", loopback, false, true, "net.test", basic("anna", theSecret), 407, policy.ReasonAuthFailed, ""},
		{"unknown user", loopback, false, true, "net.test", basic("eve", theSecret), 407, policy.ReasonAuthFailed, ""},
		{"no colon", loopback, false, true, "net.test", "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(theSecret)) + "\r\n", 407, policy.ReasonAuthFailed, ""},
		{"not base64", loopback, false, true, "net.test", "Proxy-Authorization: Basic " + theSecret + "!\r\n", 407, policy.ReasonAuthFailed, ""},
		{"another scheme", loopback, false, true, "net.test", "Proxy-Authorization: Bearer " + theSecret + "\r\n", 407, policy.ReasonAuthFailed, ""},
		{"twice", loopback, false, true, "net.test", basic("anna", theSecret+"anna") + basic("anna", theSecret+"anna"), 407, policy.ReasonAuthFailed, ""},
		{"control character in the name", loopback, false, true, "net.test", basic("an\x1bna", theSecret), 407, policy.ReasonAuthFailed, ""},
		{"control character in the password", loopback, false, true, "net.test", basic("anna", theSecret+"\x00"), 407, policy.ReasonAuthFailed, ""},
		{"not UTF-8", loopback, false, true, "net.test", basic("an\xffna", theSecret), 407, policy.ReasonAuthFailed, ""},
		{"too long a name", loopback, false, true, "net.test", basic(strings.Repeat("a", 256), theSecret), 407, policy.ReasonAuthFailed, ""},
		{"too long", loopback, false, true, "net.test", basic("anna", strings.Repeat("a", maxCredentials)), 407, policy.ReasonAuthFailed, ""},
		{"empty", loopback, false, true, "net.test", "Proxy-Authorization:\r\n", 407, policy.ReasonAuthFailed, ""},
		{"no users: ignored", loopback, false, false, "net.test", basic("eve", theSecret), 200, policy.ReasonMatched, ""},
		{"no users: unknown source", nowhere, false, false, "user.test", "", 403, policy.ReasonUnmatchedSource, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, userPolicy(o, tt.sources), func(c *Config) {
				if tt.users {
					withUsers(usersFile(t, "anna", "carl"))(c)
				}
				c.Auth.Required = tt.required
			})
			g.resolver.set("user.test", "127.0.0.1")
			g.resolver.set("net.test", "127.0.0.1")
			c := g.dial()
			resp, body := c.asks(fmt.Sprintf("%s:%d", tt.target, o.port()), tt.fields)
			if resp.StatusCode != tt.status {
				t.Fatalf("%s %s", resp.Status, body)
			}
			if want := `Basic realm="sallyport", charset="UTF-8"`; tt.status == 407 && resp.Header.Get("Proxy-Authenticate") != want {
				t.Errorf("Proxy-Authenticate: %q, want %q", resp.Header["Proxy-Authenticate"], want)
			} else if tt.status != 407 && resp.Header["Proxy-Authenticate"] != nil {
				t.Error("Proxy-Authenticate without a 407")
			}
			if want := `sallyport; error=http_request_denied; details="` + tt.reason.String() + `"`; tt.status > 400 && resp.Header.Get("Proxy-Status") != want {
				t.Errorf("Proxy-Status: %q, want %q", resp.Header["Proxy-Status"], want)
			}
			if strings.Contains(body, theSecret) {
				t.Errorf("the answer holds a password: %s", body)
			}
			if tt.status == 407 && g.resolver.asked.Load() != 0 {
				t.Error("a name was resolved for nobody")
			}
			c.Close()
			if tt.status == 200 {
				o.accept(t).Close()
			}
			ev := g.next()
			noSecrets(t, ev)
			if ev.Decision.Reason != tt.reason || ev.User != tt.user || ev.Status != tt.status {
				t.Errorf("event %v, user %q, status %d", ev.Decision.Reason, ev.User, ev.Status)
			}
		})
	}
}

// A client asks again on the connection where it was asked for credentials, as curl
// --proxy-anyauth does, and each request there is decided on its own.
func TestT15AgainAfter407(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, userPolicy(o, nowhere), withUsers(usersFile(t, "anna")))
	g.resolver.set("user.test", "127.0.0.1")
	g.resolver.set("web.test", "127.0.0.1")
	target := fmt.Sprintf("user.test:%d", o.port())
	right := basic("anna", theSecret+"anna")

	t.Run("CONNECT", func(t *testing.T) {
		c := g.dial()
		for _, fields := range []string{"", basic("anna", "wrong"), ""} {
			resp, _ := c.asks(target, fields)
			if resp.StatusCode != 407 || resp.Close {
				t.Fatalf("%s, close %v", resp.Status, resp.Close)
			}
			noSecrets(t, g.next())
		}
		if resp, body := c.asks(target, right); resp.StatusCode != 200 {
			t.Fatalf("%s %s", resp.Status, body)
		}
		c.send("hello")
		c.CloseWrite()
		if got := o.got(t); got != "hello" {
			t.Errorf("the origin got %q", got)
		}
		c.rest()
		if ev := g.next(); ev.User != "anna" || ev.Decision.Group != "people" {
			t.Errorf("%+v", ev)
		}
	})
	t.Run("then plain HTTP", func(t *testing.T) {
		c := g.dial()
		c.asks(target, "")
		g.next()
		c.send("GET http://web.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
		if resp, _ := c.response("GET"); resp.StatusCode != 407 || resp.Close {
			t.Fatalf("%s, close %v", resp.Status, resp.Close)
		}
		g.next()
		c.send("GET http://web.test:%d/ HTTP/1.1\r\nHost: x\r\n%sX-Other: 1\r\n\r\n", o.port(), right)
		far := o.accept(t)
		head := make([]byte, 4096)
		n, err := far.Read(head)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(head[:n]); strings.Contains(strings.ToLower(got), "authorization") || !strings.Contains(got, "X-Other: 1") {
			t.Errorf("forwarded: %q", got)
		}
		io.WriteString(far, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "ok" {
			t.Fatalf("%s %s", resp.Status, body)
		}
		if ev := g.next(); ev.User != "anna" {
			t.Errorf("%+v", ev)
		}
		// The connection is nobody's: the next request is asked again, of whatever kind.
		c.send("GET http://web.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", o.port())
		if resp, _ := c.response("GET"); resp.StatusCode != 407 {
			t.Errorf("without credentials: %s", resp.Status)
		}
		g.next()
		if resp, _ := c.asks(target, ""); resp.StatusCode != 407 {
			t.Errorf("CONNECT without credentials: %s", resp.Status)
		}
		g.next()
		if resp, _ := c.asks(target, right); resp.StatusCode != 200 {
			t.Errorf("CONNECT: %s", resp.Status)
		}
		c.Close()
		o.got(t)
		g.next()
	})
	t.Run("bytes for the tunnel end it", func(t *testing.T) {
		c := g.dial()
		c.send("CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\nCONNECT %[1]s HTTP/1.1\r\nHost: x\r\n%s\r\n", target, right)
		resp, _ := c.response("CONNECT")
		if resp.StatusCode != 407 || !resp.Close {
			t.Errorf("%s, close %v", resp.Status, resp.Close)
		}
		c.rest()
		g.next()
	})
	t.Run("not for ever", func(t *testing.T) {
		c := g.dial()
		for range maxChallenges {
			c.asks(target, "")
			g.next()
		}
		c.rest()
	})
	g.quiet()
}

// Inside a CONNECT nobody is asked, and what a client sends there goes nowhere.
func TestCredentialsInsideCONNECT(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, userPolicy(o, nowhere), withUsers(usersFile(t, "anna")))
	g.resolver.set("web.test", "127.0.0.1")
	c := g.dial()
	if resp, body := c.asks(fmt.Sprintf("web.test:%d", o.port()), basic("anna", theSecret+"anna")); resp.StatusCode != 200 {
		t.Fatalf("%s %s", resp.Status, body)
	}
	c.send("GET / HTTP/1.1\r\nHost: web.test:%d\r\n%s\r\n", o.port(), basic("eve", theSecret))
	far := o.accept(t)
	head := make([]byte, 4096)
	n, _ := far.Read(head)
	if got := string(head[:n]); strings.Contains(strings.ToLower(got), "authorization") || n == 0 {
		t.Errorf("forwarded: %q", got)
	}
	io.WriteString(far, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	if resp, body := c.response("GET"); resp.StatusCode != 200 {
		t.Errorf("%s %s", resp.Status, body)
	}
	if ev := g.next(); ev.Kind != event.HTTP || ev.User != "anna" {
		t.Errorf("%+v", ev)
	}
	c.Close()
	if ev := g.next(); ev.Kind != event.Connect || ev.User != "anna" {
		t.Errorf("%+v", ev)
	}
}

func TestUsersChangeUnderTunnels(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	both := usersFile(t, "anna", "bert@corp.test")
	g := start(t, userPolicy(o, nowhere), withUsers(both))
	g.resolver.set("user.test", "127.0.0.1")
	target := fmt.Sprintf("user.test:%d", o.port())
	open := func(user string) *client {
		t.Helper()
		c := g.dial()
		if resp, body := c.asks(target, basic(user, theSecret+user)); resp.StatusCode != 200 {
			t.Fatalf("%s: %s %s", user, resp.Status, body)
		}
		o.accept(t)
		return c
	}
	anna, bert := open("anna"), open("bert@corp.test")
	g.until(func() bool { return g.srv.Stats().Tunnels == 2 })
	g.srv.SetUsers(both) // nobody changes
	g.srv.SetUsers(usersFile(t, "anna2"))
	anna.rest()
	bert.rest()
	for range 2 {
		ev := g.next()
		if ev.Decision.Reason != policy.ReasonPolicyRevoked || ev.User == "" {
			t.Errorf("%+v", ev)
		}
	}
	if resp, _ := g.dial().asks(target, basic("anna", theSecret+"anna")); resp.StatusCode != 407 {
		t.Errorf("what was right under another file: %s", resp.Status)
	}
	g.next()

	g.srv.SetUsers(usersFile(t, "anna"))
	anna = open("anna")
	g.until(func() bool { return g.srv.Stats().Tunnels == 1 })
	g.store.Swap(compile(t, strings.Replace(userPolicy(o, nowhere), "users: [anna,", "users: [", 1)))
	anna.rest()
	if ev := g.next(); ev.Decision.Reason != policy.ReasonPolicyRevoked || ev.User != "anna" {
		t.Errorf("a user whom the policy lists no more: %+v", ev)
	}
	if none := start(t, userPolicy(o, loopback)); true {
		none.srv.SetUsers(both) // does nothing
		if none.srv.users.enabled() {
			t.Error("users without a setting")
		}
	}
}

func newCredentials(f *htpasswd.File) *credentials {
	c := new(credentials)
	c.init(Auth{Users: f})
	return c
}

// hold has no attempt come back for an hour: to verify as many passwords as there are
// attempts may take longer than to get one back.
func (as *attempts) hold() {
	as.mu.Lock()
	defer as.mu.Unlock()
	for from, a := range as.m {
		as.m[from] = attempt{a.spent, time.Now().Add(time.Hour)}
	}
}

func TestGuessing(t *testing.T) {
	c := newCredentials(usersFile(t, "anna", "bert"))
	stop := make(chan struct{})
	close(stop) // nobody waits
	src, other := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8:0:1::1")
	check := func(src netip.Addr, user, password string, want error) {
		t.Helper()
		if _, err := c.verify(src, user, password, stop); !errors.Is(err, want) {
			t.Errorf("verify(%s, %s): %v, want %v", src, user, err, want)
		}
	}
	check(src, "anna", theSecret+"anna", nil)
	if len(c.attempts.m) != 0 {
		t.Errorf("a right password counts: %v", c.attempts.m)
	}
	for i := range maxAttempts {
		check(src.Next(), "anna", fmt.Sprint("guess", i), errWrongPassword)
		c.attempts.hold()
	}
	check(src, "anna", "one more", errTooManyAttempts)
	check(src, "eve", "one more", errTooManyAttempts)
	check(src, "anna", theSecret+"anna", nil) // known
	check(src, "bert", theSecret+"bert", errTooManyAttempts)
	check(other, "bert", theSecret+"bert", nil) // others are unharmed
	check(src, "bert", theSecret+"bert", nil)
	spent := c.attempts.m[limitKey(src)]
	if a := spent.after(spent.at.Add(2 * attemptEvery)); a.spent != maxAttempts-2 {
		t.Errorf("after a while: %+v", a)
	}
	if a := spent.after(spent.at.Add(1000 * attemptEvery)); a.spent != 0 {
		t.Errorf("after a long while: %+v", a)
	}
	for i := range 2 * maxAttemptSources {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		c.attempts.take(limitKey(a), time.Now())
	}
	if n := len(c.attempts.m); n > maxAttemptSources {
		t.Errorf("%d sources are counted", n)
	}
}

// While places are taken clients wait, but not too many of them, and those that ask
// for the same wait together.
func TestVerificationsAreBounded(t *testing.T) {
	c := newCredentials(usersFile(t, "anna"))
	for range maxVerifying {
		c.verifying <- struct{}{}
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var right, busy atomic.Int32
	verify := func(src byte, password string) {
		_, err := c.verify(netip.AddrFrom4([4]byte{10, 0, 0, src}), "anna", password, stop)
		switch {
		case err == nil:
			right.Add(1)
		case errors.Is(err, errBusyVerifying):
			busy.Add(1)
		default:
			t.Error(err)
		}
	}
	for i := range 100 {
		wg.Go(func() { verify(byte(i), theSecret+"anna") })
	}
	for end := time.Now().Add(patience); c.waiting.Load() != 1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d wait", c.waiting.Load())
		}
	}
	<-c.verifying
	wg.Wait()
	if right.Load() != 100 {
		t.Errorf("%d of 100 were right", right.Load())
	}

	c.verifying <- struct{}{}
	c.waiting.Store(maxWaiting)
	verify(200, "another")
	if busy.Load() != 1 {
		t.Error("one too many waits")
	}
	c.waiting.Store(0)
	close(stop)
	verify(201, "yet another")
	if busy.Load() != 2 {
		t.Error("the end of the server does not end the wait")
	}
}

func TestVerifiedIsBounded(t *testing.T) {
	b := &book{verified: map[digest]struct{}{}, flights: map[digest]*flight{}}
	for i := range maxVerified + 10 {
		d := digest{byte(i), byte(i >> 8)}
		f, first := b.enter(d)
		if !first {
			t.Fatal("known already")
		}
		b.leave(d, f)
		if f, _ := b.enter(d); f != nil {
			t.Fatal("not known afterwards")
		}
	}
	if len(b.verified) != maxVerified || len(b.flights) != 0 {
		t.Errorf("%d verified, %d under way", len(b.verified), len(b.flights))
	}
}

// A client's next request does not hash its password again.
func TestKnownCredentialsCostNothing(t *testing.T) {
	c := newCredentials(usersFile(t, "anna"))
	src := netip.MustParseAddr("10.0.0.1")
	if _, err := c.verify(src, "anna", theSecret+"anna", nil); err != nil {
		t.Fatal(err)
	}
	for range maxVerifying {
		c.verifying <- struct{}{} // nothing more can be hashed
	}
	stop := make(chan struct{})
	close(stop)
	if _, err := c.verify(src, "anna", theSecret+"anna", stop); err != nil {
		t.Error(err)
	}
	if _, err := c.verify(src, "anna", theSecret+"ann", stop); !errors.Is(err, errBusyVerifying) {
		t.Errorf("another password: %v", err)
	}
	if d := c.digest("ab", "c"); d == c.digest("a", "bc") || d == newCredentials(nil).digest("ab", "c") {
		t.Error("digests of different credentials, or of different processes, are equal")
	}
}

// Too many guesses are told apart from wrong ones, and do not stop those who know.
func TestGuessingIsLimited(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, userPolicy(o, nowhere), withUsers(usersFile(t, "anna")))
	target := fmt.Sprintf("other.test:%d", o.port())
	if resp, _ := g.dial().asks(target, basic("anna", theSecret+"anna")); resp.StatusCode != 403 {
		t.Fatal(resp.Status)
	}
	g.next()
	for i := range maxAttempts {
		if resp, _ := g.dial().asks(target, basic("anna", fmt.Sprint(theSecret, i))); resp.StatusCode != 407 {
			t.Fatal(resp.Status)
		}
		g.srv.users.attempts.hold()
		if ev := g.next(); ev.Error != "wrong password for user anna" {
			t.Errorf("%+v", ev)
		}
	}
	resp, _ := g.dial().asks(target, basic("anna", theSecret))
	if resp.StatusCode != 429 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("%s, %v", resp.Status, resp.Header)
	}
	if ev := g.next(); ev.Decision.Reason != policy.ReasonLimitExceeded {
		t.Errorf("%+v", ev)
	}
	if resp, _ := g.dial().asks(target, basic("anna", theSecret+"anna")); resp.StatusCode != 403 {
		t.Errorf("who knows the password: %s", resp.Status)
	}
	g.next()
}

// Users do not share connections to far sides, where one of them may have logged in.
func TestT15UsersDoNotShareUpstreams(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	g := start(t, userPolicy(o, nowhere), withUsers(usersFile(t, "anna", "bert@corp.test")))
	g.resolver.set("web.test", "127.0.0.1")
	c := g.dial()
	far := map[string]io.ReadWriter{}
	for _, user := range []string{"anna", "bert@corp.test", "anna"} {
		c.send("GET http://web.test:%d/ HTTP/1.1\r\nHost: x\r\n%s\r\n", o.port(), basic(user, theSecret+user))
		if far[user] == nil {
			far[user] = o.accept(t)
		}
		if _, err := far[user].Read(make([]byte, 4096)); err != nil {
			t.Fatalf("%s: %v", user, err)
		}
		io.WriteString(far[user], "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		if resp, body := c.response("GET"); resp.StatusCode != 200 {
			t.Fatalf("%s: %s %s", user, resp.Status, body)
		}
		if ev := g.next(); ev.User != user {
			t.Errorf("%+v", ev)
		}
	}
	for i := range 2 * maxPools {
		g.srv.pools.get(poolKey{user: fmt.Sprint(i)})
	}
	if n := len(g.srv.pools.m); n > maxPools {
		t.Errorf("%d pools", n)
	}
}

// net/http reads the same from a field, where it reads anything.
func FuzzParseBasic(f *testing.F) {
	for _, s := range []string{"Basic " + base64.StdEncoding.EncodeToString([]byte("anna:secret")), "basic  YTpi", "Basic", "Bearer x", "Basic YTpi\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		user, password, ok := parseBasic(value)
		if !ok {
			return
		}
		if !htpasswd.ValidUser(user) || strings.ContainsAny(password, "\x00\r\n\x7f") {
			t.Errorf("%q: user %q, password %q", value, user, password)
		}
		r := http.Request{Header: http.Header{"Authorization": {"Basic " + strings.TrimLeft(value[len("basic "):], " ")}}}
		if u, p, ok := r.BasicAuth(); !ok || u != user || p != password {
			t.Errorf("%q: %q, %q; net/http reads %q, %q, %v", value, user, password, u, p, ok)
		}
	})
}
