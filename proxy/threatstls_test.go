package proxy

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	utls "github.com/refraction-networking/utls"

	"sallyport/policy"
)

// browserHellos returns ClientHello messages to api.ok.test as browsers and other
// clients send them. Keys, GREASE and the order of extensions change at each call.
func browserHellos(t testing.TB) map[string][]byte {
	t.Helper()
	hellos := map[string][]byte{"Go": hello("api.ok.test")[5:]}
	for _, id := range []utls.ClientHelloID{
		utls.HelloChrome_58, utls.HelloChrome_87, utls.HelloChrome_102, utls.HelloChrome_106_Shuffle, utls.HelloChrome_115_PQ,
		utls.HelloChrome_120, utls.HelloChrome_131, utls.HelloChrome_133, utls.HelloFirefox_63, utls.HelloFirefox_105, utls.HelloFirefox_120,
		utls.HelloSafari_16_0, utls.HelloIOS_14, utls.HelloEdge_106, utls.HelloAndroid_11_OkHttp, utls.Hello360_11_0, utls.HelloQQ_11_1,
	} {
		client, server := net.Pipe()
		conn := utls.UClient(client, &utls.Config{ServerName: "api.ok.test"}, id)
		err := conn.BuildHandshakeState()
		client.Close()
		server.Close()
		if err != nil {
			t.Fatalf("utls: %s: %v", id.Str(), err)
		}
		hellos[id.Str()] = conn.HandshakeState.Hello.Raw
	}
	return hellos
}

// tlsPolicy allows api.ok.test, www.ok.test on port, as the TLS keys say; the group
// h may reach other.ok.test.
func tlsPolicy(keys string) func(int) string {
	if keys != "" {
		keys = ", tls: {" + keys + "}"
	}
	return func(port int) string {
		return fmt.Sprintf(`
version: 1
groups:
  - name: g
    sources: [127.0.0.0/8]
    allow:
      - {id: r, names: [api.ok.test, www.ok.test], ports: [%[1]d], private_destinations: [127.0.0.0/8]%[2]s}
      - {id: elsewhere, names: [far.ok.test], ports: [1], private_destinations: [127.0.0.0/8]}
      - {id: plain, names: [plain.ok.test], ports: [%[1]d], protocol: http, private_destinations: [127.0.0.0/8]}
    deny: [bad.ok.test]
  - {name: h, sources: [10.0.0.0/8], allow: [{names: [other.ok.test], ports: [%[1]d]}]}
`, port, keys)
	}
}

func TestT21AnotherName(t *testing.T) {
	tr := tryPolicy(t, tlsPolicy(""))
	for _, name := range append([]string{"evil.test", "ok.test", "xapi.ok.test", "a.api.ok.test", "api.ok.test.evil.test", "api.ok.tes", "bad.ok.test"}, lookalikes...) {
		first := string(record(tlsHello(sniExtension(name), tls13)))
		reason, alert := policy.ReasonSNIMismatch, unrecognizedName
		if name == "bad.ok.test" {
			reason, alert = policy.ReasonExplicitDeny, accessDenied
		}
		if ev := tr.deniedInside(name, tr.at("api.ok.test"), first, reason, alert); ev.SNI != name || ev.Name != "api.ok.test" {
			t.Errorf("%+v", ev)
		}
	}
	// The same together with the CONNECT, before its 200.
	tr.one("early", policy.Deny, policy.ReasonSNIMismatch, func() {
		c := tr.dial()
		c.send("CONNECT %s HTTP/1.1\r\n\r\n%s", tr.at("api.ok.test"), record(tlsHello(sniExtension("evil.test"))))
		if got := c.rest(); got != established+unrecognizedName {
			t.Errorf("%q", got)
		}
		if got := tr.far.got(t); got != "" {
			t.Errorf("the far side got %q", got)
		}
	})
}

func TestT22AnotherListedName(t *testing.T) {
	www := string(record(tlsHello(sniExtension("www.ok.test"), tls13)))
	tr := tryPolicy(t, tlsPolicy(""))
	tr.deniedInside("match", tr.at("api.ok.test"), www, policy.ReasonSNIMismatch, unrecognizedName)

	tr = tryPolicy(t, tlsPolicy("sni: listed"))
	if ev := tr.passes("listed", tr.at("api.ok.test"), []byte(www), nil); ev.Name != "api.ok.test" || ev.SNI != "www.ok.test" || ev.Destination != tr.far.addr {
		t.Errorf("%+v", ev)
	}
	if n := tr.resolver.asked.Load(); n != 1 { // the CONNECT's name, and no other
		t.Errorf("%d look-ups", n)
	}
	for _, name := range []string{"evil.test", "other.ok.test", "far.ok.test", "plain.ok.test", "ok.test"} { // not this group's, this port's, this protocol's
		tr.deniedInside(name, tr.at("api.ok.test"), string(record(tlsHello(sniExtension(name)))), policy.ReasonSNIMismatch, unrecognizedName)
	}
	tr.deniedInside("guarded", tr.at("api.ok.test"), string(record(tlsHello(sniExtension("bad.ok.test")))), policy.ReasonExplicitDeny, accessDenied)

	tr = tryPolicy(t, tlsPolicy("sni: optional")) // present, it is checked
	tr.deniedInside("optional", tr.at("api.ok.test"), www, policy.ReasonSNIMismatch, unrecognizedName)
}

func TestT23NoName(t *testing.T) {
	nameless := map[string][]byte{
		"TLS 1.3": record(tlsHello(tls13)), "no extensions": record(tlsHello()), "Go": hello(""),
	}
	for what, first := range nameless {
		tr := tryPolicy(t, tlsPolicy(""))
		tr.deniedInside(what, tr.at("api.ok.test"), string(first), policy.ReasonSNIMissing, unrecognizedName)
		tr = tryPolicy(t, tlsPolicy("sni: listed"))
		tr.deniedInside(what, tr.at("api.ok.test"), string(first), policy.ReasonSNIMissing, unrecognizedName)
		tr = tryPolicy(t, tlsPolicy("sni: optional"))
		if ev := tr.passes(what, tr.at("api.ok.test"), first, nil); ev.SNI != "" {
			t.Errorf("%+v", ev)
		}
	}
}

func TestT24NotTLS(t *testing.T) {
	tr := try(t, "") // web: TLS on the port; HTTP too, for policyFor replaces both numbers
	for _, first := range []string{
		"SSH-2.0-OpenSSH_9.9\r\n", "\x00\x00\x00\x08\x04\xd2\x16\x2f", "GET\r\n", "get / HTTP/1.1\r\n", "\x05\x01\x00", "\x04\x01\x00\x50", "\r\n\r\n", "\x80\x2e\x01\x00\x02",
		"{\"a\":1}\n", "*1\r\n$4\r\nPING\r\n", "\x16\xfe\xff\x00\x00", "\x16\x02\x00\x00\x05", "\x00",
	} {
		tr.deniedInside(fmt.Sprintf("%q", first), tr.at("api.ok.test"), first, policy.ReasonNotTLS, "")
	}
	tr = try(t, ", protocol: tls")
	tr.deniedInside("HTTP where only TLS is allowed", tr.at("api.ok.test"), "GET / HTTP/1.1\r\nHost: api.ok.test\r\n\r\n", policy.ReasonNotTLS, "")
	tr = try(t, ", protocol: tcp")
	for _, first := range []string{"SSH-2.0-OpenSSH_9.9\r\n", "GET / HTTP/1.1\r\n\r\n", string(hello("evil.test")), "\x16", "\x00"} {
		tr.passes("tcp", tr.at("api.ok.test"), []byte(first), nil)
	}
}

func TestT25SplitHellos(t *testing.T) {
	tr := tryPolicy(t, tlsPolicy("ech: allow, sni: match"), func(c *Config) { c.Limits.ClientHelloBytes = 64 << 10 })
	target := tr.at("api.ok.test")
	bytewise := func(c *client, b []byte) {
		for i := range b {
			if _, err := c.TCPConn.Write(b[i : i+1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	inTwo := func(n int) func(*client, []byte) {
		return func(c *client, b []byte) {
			c.send("%s", b[:n])
			c.send("%s", b[n:])
		}
	}
	for name, msg := range browserHellos(t) {
		tr.passes(name, target, record(msg), nil)
		tr.passes(name+" byte by byte", target, record(msg), bytewise)
		tr.passes(name+" 511+1", target, record(msg), inTwo(min(511, len(msg)-1)))
		for _, n := range []int{1, 2, 5, 64, 511, 512, len(msg) - 1, (len(msg) + 1) / 2} {
			tr.passes(fmt.Sprintf("%s in records of %d", name, n), target, records(msg, n), nil)
		}
	}
	msg := tlsHello(sniExtension("api.ok.test"), tls13)
	evil := tlsHello(sniExtension("evil.test"), tls13)
	at := bytes.Index(evil, []byte("evil.test"))
	for n := 1; n < len(msg); n++ { // two records, cut anywhere
		tr.passes(fmt.Sprintf("two records, %d", n), target, slices.Concat(record(msg[:n]), record(msg[n:])), nil)
	}
	for n := at - 1; n <= at+len("evil.test"); n++ { // cut inside the name
		tr.deniedInside(fmt.Sprintf("evil, two records, %d", n), target, string(slices.Concat(record(evil[:n]), record(evil[n:]))), policy.ReasonSNIMismatch, unrecognizedName)
	}
	tr.deniedInside("evil in records of a byte", target, string(records(evil, 1)), policy.ReasonSNIMismatch, unrecognizedName)

	// What comes between or before the records of the hello is refused.
	head, tail := records(msg[:20], 20), records(msg[20:], 1<<14)
	for what, other := range map[string]string{
		"warning alert": "\x15\x03\x03\x00\x02\x01\x00", "fatal alert": "\x15\x03\x03\x00\x02\x02\x28", "change_cipher_spec": "\x14\x03\x03\x00\x01\x01", "application data": "\x17\x03\x03\x00\x01x",
		"heartbeat": "\x18\x03\x03\x00\x01x", "empty handshake record": "\x16\x03\x03\x00\x00", "record version 2": "\x16\x02\x00\x00\x01\x00", "record too long": "\x16\x03\x03\x40\x01",
	} {
		tr.deniedInside(what+" in between", target, string(head)+other+string(tail), policy.ReasonHelloMalformed, accessDenied)
		if other[0] != 22 {
			tr.deniedInside(what+" first", target, other+string(record(msg)), policy.ReasonHelloMalformed, accessDenied)
		}
	}
	tr.deniedInside("empty record first", target, "\x16\x03\x03\x00\x00"+string(record(msg)), policy.ReasonHelloMalformed, accessDenied)
	tr.deniedInside("two hellos in a record", target, string(record(slices.Concat(msg, evil))), policy.ReasonHelloMalformed, accessDenied)
	tr.deniedInside("another message first", target, string(record(slices.Concat([]byte{0, 0, 0, 0}, evil))), policy.ReasonHelloMalformed, accessDenied)
}

func TestT26LargeHellos(t *testing.T) {
	tr := tryPolicy(t, tlsPolicy("ech: allow"))
	target := tr.at("api.ok.test")
	mlkem := extension(51, vec16([]byte{0x11, 0xec}, vec16(make([]byte, 1216)), []byte{0, 29}, vec16(make([]byte, 32))))
	ticket := func(n int) []byte { return extension(35, make([]byte, n)) }
	name := sniExtension("api.ok.test")
	for what, msg := range map[string][]byte{
		"ML-KEM":                        tlsHello(name, tls13, mlkem),
		"ML-KEM, name last":             tlsHello(tls13, mlkem, name),
		"ticket of 8 KiB":               tlsHello(tls13, mlkem, ticket(8<<10), name),
		"pre_shared_key of 8 KiB":       tlsHello(name, tls13, mlkem, extension(41, make([]byte, 8<<10))),
		"padding":                       tlsHello(extension(21, make([]byte, 12<<10)), tls13, name),
		"exactly the limit":             tlsHello(name, extension(21, make([]byte, 16<<10-5-len(tlsHello(name, extension(21)))))),
		"more than a hundred extension": tlsHello(append(manyExtensions(150), name)...),
	} {
		if ev := tr.passes(what, target, record(msg), nil); ev.SNI != "api.ok.test" {
			t.Errorf("%s: %+v", what, ev)
		}
		if 6*len(msg) <= 16<<10 {
			tr.passes(what+" in records of a byte", target, records(msg, 1), nil)
		}
	}
	for what, first := range map[string][]byte{
		"a byte over":               record(tlsHello(name, extension(21, make([]byte, 16<<10-4-len(tlsHello(name, extension(21))))))),
		"over by its record header": records(tlsHello(name, extension(21, make([]byte, 16<<10-5-len(tlsHello(name, extension(21)))))), 8<<10),
		"60 KiB":                    record(tlsHello(name, ticket(60<<10))),
		"16 MiB, announced":         {22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff},
	} {
		tr.deniedInside(what, target, string(first), policy.ReasonHelloTooLarge, accessDenied)
	}
	tr = tryPolicy(t, tlsPolicy(""), func(c *Config) { c.Limits.ClientHelloBytes = 60 << 10 })
	tr.passes("40 KiB over records, limit raised", tr.at("api.ok.test"), record(tlsHello(ticket(40<<10), name)), nil)
}

func manyExtensions(n int) (list [][]byte) {
	for id := range uint16(n) {
		list = append(list, extension(0x4000+id))
	}
	return list
}

func TestT27GREASEAndOldVersions(t *testing.T) {
	name := sniExtension("api.ok.test")
	grease := tlsHello(extension(0x0a0a), name, extension(43, vec8([]byte{0xba, 0xba, 3, 4, 3, 3})), extension(0xfafa, []byte{0}),
		extension(10, vec16([]byte{0x2a, 0x2a, 0, 29})), extension(51, vec16([]byte{0x2a, 0x2a}, vec16([]byte{0}), []byte{0, 29}, vec16(make([]byte, 32)))), extension(16, vec16(vec8([]byte{0x0a, 0x0a}), vec8([]byte("h2")))))
	tr := tryPolicy(t, tlsPolicy(""))
	target := tr.at("api.ok.test")
	if ev := tr.passes("GREASE", target, record(grease), nil); ev.TLSVersion != tls.VersionTLS13 {
		t.Errorf("%+v", ev)
	}
	old := map[string][]byte{
		"TLS 1.1": versionHello(0x0302, name), "TLS 1.0": versionHello(0x0301, name), "SSL 3.0": versionHello(0x0300, name),
		"TLS 1.0 by supported_versions": tlsHello(name, extension(43, vec8([]byte{3, 1}))), "GREASE is no version": tlsHello(name, extension(43, vec8([]byte{0xfa, 0xfa, 3, 2}))),
		"made-up version": tlsHello(name, extension(43, vec8([]byte{3, 5}))), "none": versionHello(0x0002, name),
	}
	for what, msg := range old {
		tr.deniedInside(what, target, string(record(msg)), policy.ReasonTLSVersion, accessDenied)
	}
	tr.deniedInside("SSLv2", target, "\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10", policy.ReasonNotTLS, "")

	tr = tryPolicy(t, tlsPolicy(`min_version: "1.0"`))
	for _, v := range []string{"TLS 1.1", "TLS 1.0", "TLS 1.0 by supported_versions", "GREASE is no version"} {
		tr.passes(v, tr.at("api.ok.test"), record(old[v]), nil)
	}
	for _, v := range []string{"SSL 3.0", "made-up version", "none"} {
		tr.deniedInside(v, tr.at("api.ok.test"), string(record(old[v])), policy.ReasonTLSVersion, accessDenied)
	}
	tr = tryPolicy(t, tlsPolicy(`min_version: "1.3"`))
	tr.passes("TLS 1.3", tr.at("api.ok.test"), record(grease), nil)
	tr.deniedInside("TLS 1.2", tr.at("api.ok.test"), string(record(tlsHello(name))), policy.ReasonTLSVersion, accessDenied)
}

func TestT28IllegalServerNames(t *testing.T) {
	tr := tryPolicy(t, tlsPolicy("sni: optional")) // even where none is needed
	target := tr.at("api.ok.test")
	good := hostName(0, "api.ok.test")
	list := func(entries ...[]byte) []byte { return extension(0, vec16(entries...)) }
	for what, extensions := range map[string][][]byte{
		"two extensions":               {sniExtension("api.ok.test"), sniExtension("evil.test")},
		"the same twice":               {sniExtension("api.ok.test"), sniExtension("api.ok.test")},
		"far apart":                    append(append([][]byte{sniExtension("api.ok.test")}, manyExtensions(100)...), sniExtension("evil.test")),
		"two names":                    {list(good, hostName(0, "evil.test"))},
		"a name twice":                 {list(good, good)},
		"another type":                 {list(hostName(1, "api.ok.test"))},
		"another type first":           {list(hostName(7, "evil.test"), good)},
		"another type second":          {list(good, hostName(7, "evil.test"))},
		"empty name":                   {sniExtension("")},
		"empty list":                   {list()},
		"no list":                      {extension(0)},
		"a byte too many":              {extension(0, vec16(good), []byte{0})},
		"list too short":               {extension(0, []byte{0, 3}, good)},
		"list too long":                {extension(0, []byte{0, 99}, good)},
		"IPv4":                         {sniExtension("127.0.0.1")},
		"IPv4, short":                  {sniExtension("127.1")},
		"IPv4, number":                 {sniExtension("2130706433")},
		"IPv4, hexadecimal":            {sniExtension("0x7f.1")},
		"IPv6":                         {sniExtension("::1")},
		"IPv6 in brackets":             {sniExtension("[::1]")},
		"final dot":                    {sniExtension("api.ok.test.")},
		"first dot":                    {sniExtension(".api.ok.test")},
		"two dots":                     {sniExtension("api..ok.test")},
		"NUL":                          {sniExtension("api.ok.test\x00.evil.test")},
		"NUL at the end":               {sniExtension("api.ok.test\x00")},
		"space":                        {sniExtension("api.ok.test ")},
		"port":                         {sniExtension("api.ok.test:443")},
		"slash":                        {sniExtension("evil.test/api.ok.test")},
		"at":                           {sniExtension("api.ok.test@evil.test")},
		"percent":                      {sniExtension("api%2eok.test")},
		"wildcard":                     {sniExtension("*.ok.test")},
		"U-label":                      {sniExtension("bücher.test")},
		"fullwidth dot":                {sniExtension("api。ok。test")},
		"invalid UTF-8":                {sniExtension("api\xff.ok.test")},
		"label of 64 bytes":            {sniExtension(strings.Repeat("a", 64) + ".ok.test")},
		"254 bytes":                    {sniExtension(strings.Repeat("a.", 123) + "ok.test.a")},
		"hyphen first":                 {sniExtension("-api.ok.test")},
		"duplicate of another":         {sniExtension("api.ok.test"), tls13, tls13},
		"duplicate unknown":            {sniExtension("api.ok.test"), extension(0x5000), extension(0x5000)},
		"duplicate GREASE":             {sniExtension("api.ok.test"), extension(0x0a0a), extension(0x0a0a)},
		"pre_shared_key in the middle": {extension(41, []byte{0}), sniExtension("api.ok.test")},
		"bytes after extensions":       {sniExtension("api.ok.test"), {0}},
		"inner ECH":                    {sniExtension("api.ok.test"), extension(0xfe0d, []byte{1})},
	} {
		tr.deniedInside(what, target, string(record(tlsHello(extensions...))), policy.ReasonHelloMalformed, accessDenied)
	}
	if ev := tr.passes("upper case", target, record(tlsHello(sniExtension("API.Ok.Test"))), nil); ev.SNI != "api.ok.test" {
		t.Errorf("%+v", ev)
	}
}

func TestT29ECH(t *testing.T) {
	with := func(name string) string { return string(record(tlsHello(sniExtension(name), tls13, echExtension))) }
	tr := tryPolicy(t, tlsPolicy(""))
	target := tr.at("api.ok.test")
	if ev := tr.deniedInside("same name", target, with("api.ok.test"), policy.ReasonECHNotAllowed, accessDenied); !ev.ECH {
		t.Errorf("%+v", ev)
	}
	tr.deniedInside("public name of the far side", target, with("public.test"), policy.ReasonSNIMismatch, unrecognizedName)
	tr.deniedInside("no outer name", target, string(record(tlsHello(tls13, echExtension))), policy.ReasonSNIMissing, unrecognizedName)
	tr.deniedInside("encrypted_server_name of the drafts", target, string(record(tlsHello(sniExtension("api.ok.test"), extension(0xffce, []byte("x"))))), policy.ReasonECHNotAllowed, accessDenied)
	hellos := browserHellos(t)
	for _, browser := range []string{"Chrome-120", "Chrome-133", "Firefox-120"} { // GREASE ECH looks the same
		tr.deniedInside(browser, target, string(record(hellos[browser])), policy.ReasonECHNotAllowed, accessDenied)
	}
	tr = tryPolicy(t, tlsPolicy("ech: allow"))
	target = tr.at("api.ok.test")
	if ev := tr.passes("allowed", target, []byte(with("api.ok.test")), nil); !ev.ECH {
		t.Errorf("%+v", ev)
	}
	tr.deniedInside("allowed, but another name", target, with("public.test"), policy.ReasonSNIMismatch, unrecognizedName)
}

// TestT32EarlyDataIsBounded has a client send without end before its CONNECT is
// answered: no more is taken in than a head may be long.
func TestT32EarlyDataIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(compile(t, fuzzPolicy))
		l.addrs, l.dial = fuzzAddrs, failures[2] // connecting takes for ever
		c := l.client()
		go func() {
			io.WriteString(c, "CONNECT db.ok.test:5432 HTTP/1.1\r\n\r\n")
			for {
				if _, err := c.Write(make([]byte, 4096)); err != nil {
					return
				}
			}
		}()
		synctest.Wait()
		if n := c.taken(); n > defaultHeaderBytes {
			t.Errorf("%d bytes taken in before the 200", n)
		}
		pause(time.Minute)
		c.Close()
		l.close()
		if evs := l.seen(); len(evs) != 1 || evs[0].Decision.Reason != policy.ReasonConnectFailed || evs[0].Status != 504 {
			t.Errorf("%+v", evs)
		}
	})
}

// TestT33SlowHello sends a byte a second: the deadline is for the whole hello.
func TestT33SlowHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(compile(t, fuzzPolicy))
		l.addrs = fuzzAddrs
		c := l.client()
		io.WriteString(c, "CONNECT api.ok.test:443 HTTP/1.1\r\n\r\n")
		io.ReadFull(c, make([]byte, len(established)))
		begun := time.Now()
		go func() {
			for _, b := range record(tlsHello(sniExtension("api.ok.test"))) {
				if _, err := c.Write([]byte{b}); err != nil {
					return
				}
				pause(time.Second)
			}
		}()
		got, err := io.ReadAll(c)
		if string(got) != accessDenied || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		if took := time.Since(begun); took != defaultClientHello {
			t.Errorf("cut after %v, want %v", took, defaultClientHello)
		}
		c.Close()
		pause(time.Minute)
		if st := l.srv.Stats(); st.Connections != 0 || len(l.last().got) != 0 {
			t.Errorf("%+v, the far side got %q", st, l.last().got)
		}
		l.close()
		if evs := l.seen(); len(evs) != 1 || evs[0].Decision.Reason != policy.ReasonHelloTimeout {
			t.Errorf("%+v", evs)
		}
	})
}

// TestT33SlowHead does the same before the CONNECT is complete.
func TestT33SlowHead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(compile(t, fuzzPolicy))
		c := l.client()
		begun := time.Now()
		go func() {
			for _, b := range []byte("CONNECT api.ok.test:443 HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", 100)) {
				if _, err := c.Write([]byte{b}); err != nil {
					return
				}
				pause(time.Second)
			}
		}()
		got, err := io.ReadAll(c)
		if !strings.HasPrefix(string(got), "HTTP/1.1 408 ") || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		if took := time.Since(begun); took != defaultRequestHeader {
			t.Errorf("cut after %v, want %v", took, defaultRequestHeader)
		}
		c.Close()
		pause(time.Minute)
		l.close()
		if evs := l.seen(); len(evs) != 1 || evs[0].Decision.Reason != policy.ReasonBadRequest {
			t.Errorf("%+v", evs)
		}
	})
}

// TestT67IdleCountsBothWays keeps a tunnel with traffic one way alone for days, and
// ends one without any: with a peer, or with one that vanished without a word.
func TestT67IdleCountsBothWays(t *testing.T) {
	for _, talks := range []string{"the client", "the far side", "nobody"} {
		synctest.Test(t, func(t *testing.T) {
			l := newLab(compile(t, fuzzPolicy))
			l.addrs = fuzzAddrs
			c := l.client()
			io.WriteString(c, "CONNECT db.ok.test:5432 HTTP/1.1\r\n\r\n")
			io.ReadFull(c, make([]byte, len(established)))
			go io.Copy(io.Discard, c)
			synctest.Wait()
			begun, last := time.Now(), time.Now()
			const beats = 300
			for range beats {
				if talks == "nobody" {
					break
				}
				pause(defaultIdle - time.Second)
				last = time.Now()
				if talks == "the client" {
					io.WriteString(c, "x")
				} else {
					io.WriteString(l.last(), "x")
				}
				synctest.Wait()
				if l.srv.Stats().Tunnels != 1 {
					t.Fatalf("%s talks: the tunnel ended after %v", talks, time.Since(begun))
				}
			}
			for end := last.Add(2 * defaultIdle); l.srv.Stats().Tunnels == 1 && time.Now().Before(end); {
				pause(time.Second)
			}
			if idle := time.Since(last); idle < defaultIdle || idle > defaultIdle+defaultIdle/2 {
				t.Errorf("%s talked: it ended after %v of silence", talks, idle)
			}
			l.close()
			if evs := l.seen(); len(evs) != 1 || evs[0].Error != "idle_timeout" || evs[0].BytesUp+evs[0].BytesDown != int64(map[bool]int{true: beats}[talks != "nobody"]) {
				t.Errorf("%s talks: %+v", talks, evs)
			}
		})
	}
}
