package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/idna"

	"sallyport/policy"
	"sallyport/policy/event"
)

// What FuzzConnection's clients may reach, said once more in the simplest way: the
// authorities, and the one address of each. Other names exist and may not be reached.
const fuzzPolicy = `
version: 1
groups:
  - name: g
    sources: [10.0.0.0/8]
    allow:
      - names: [api.ok.test, "*.cdn.test"]
      - {names: [db.ok.test], ports: [5432], protocol: tcp}
    deny: [bad.cdn.test]
`

var (
	fuzzAllowed = map[string]string{
		"api.ok.test:443": "93.184.216.1:443", "api.ok.test:80": "93.184.216.1:80",
		"www.cdn.test:443": "93.184.216.2:443", "www.cdn.test:80": "93.184.216.2:80",
		"db.ok.test:5432": "93.184.216.3:5432",
	}
	fuzzAddrs = map[string]string{
		"api.ok.test": "93.184.216.1", "www.cdn.test": "93.184.216.2", "db.ok.test": "93.184.216.3",
		"evil.test": "93.184.216.66", "bad.cdn.test": "93.184.216.67", "private.cdn.test": "10.9.9.9",
	}
)

// clientWords and originWords are what mutation would need long to find.
var (
	clientWords = []string{
		"CONNECT api.ok.test:443 HTTP/1.1\r\nHost: api.ok.test:443\r\n\r\n",
		"CONNECT www.cdn.test:443 HTTP/1.1\r\n\r\n",
		"CONNECT db.ok.test:5432 HTTP/1.1\r\n\r\n",
		"CONNECT api.ok.test:80 HTTP/1.1\r\n\r\n",
		"CONNECT evil.test:443 HTTP/1.1\r\nHost: api.ok.test:443\r\n\r\n",
		"CONNECT bad.cdn.test:443 HTTP/1.1\r\n\r\n",
		"CONNECT private.cdn.test:443 HTTP/1.1\r\n\r\n",
		"CONNECT 93.184.216.1:443 HTTP/1.1\r\n\r\n",
		string(record(tlsHello(sniExtension("api.ok.test"), tls13))),
		string(record(tlsHello(sniExtension("www.cdn.test"), tls13))),
		string(record(tlsHello(sniExtension("evil.test"), tls13))),
		string(record(tlsHello(tls13))),
		"GET http://api.ok.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n",
		"GET http://evil.test/ HTTP/1.1\r\nHost: api.ok.test\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: api.ok.test:80\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n",
		"POST http://www.cdn.test/x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
		"POST http://api.ok.test/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
		"3\r\nabc\r\n", "0\r\n\r\n", "hello", "\r\n\r\n", "\r\n", "Connection: close\r\n", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n",
		"GET http://api.ok.test/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"POST http://api.ok.test/x HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
		"GET http://", "api.ok.test", "evil.test", "CONNECT ", ":443", " HTTP/1.1\r\n", "Host: api.ok.test\r\n", "SSH-2.0-x\r\n", "\x16\x03\x01",
	}
	originWords = []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "2\r\nok\r\n0\r\n\r\n",
		"HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"HTTP/1.0 200 OK\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n", "\x15\x03\x03\x00\x02\x02\x28", "220 welcome\r\n", strings.Repeat("x", 4000),
		"HTTP/1.1 302 Found\r\nLocation: http://evil.test/\r\nContent-Length: 0\r\n\r\n",
	}
)

// A script is what happens around a connection, as FuzzConnection's input says it:
// each step is a byte, and what it needs follows.
type script struct {
	in     []byte
	l      *lab
	client *memConn
	sent   []byte // by the client
	broken bool   // the client has reset the connection
}

// The steps. The rest of the 256 values are these again.
const (
	stepSend = iota
	stepSay
	stepSayInBytes
	stepSayTwoWords
	stepCloseWrite
	stepClose
	stepReset
	stepOriginSend
	stepOriginSay
	stepOriginCloseWrite
	stepOriginClose
	stepOriginReset
	stepWait
	stepPolicy
	stepLookUp
	stepDial
	steps
)

func (s *script) byte() int {
	if len(s.in) == 0 {
		return 0
	}
	b := s.in[0]
	s.in = s.in[1:]
	return int(b)
}

func (s *script) bytes() []byte {
	n := min(s.byte(), len(s.in))
	b := s.in[:n]
	s.in = s.in[n:]
	return b
}

// send writes without waiting for the reader: what does not fit is not sent.
func send(c *memConn, b []byte) int {
	c.mu.Lock()
	room := windowSize - len(c.tx.buf)
	c.mu.Unlock()
	n, _ := c.Write(b[:min(len(b), max(room, 0))])
	return n
}

func (s *script) say(b []byte) { s.sent = append(s.sent, b[:send(s.client, b)]...) }

func (s *script) run() {
	revoked := false
	for n := 0; len(s.in) > 0 && n < 64; n++ {
		step := s.byte() % steps
		far := s.l.last()
		if far == nil && step >= stepOriginSend && step <= stepOriginReset {
			continue
		}
		switch step {
		case stepSend:
			s.say(s.bytes())
		case stepSay:
			s.say([]byte(clientWords[s.byte()%len(clientWords)]))
		case stepSayInBytes:
			for _, b := range []byte(clientWords[s.byte()%len(clientWords)]) {
				s.say([]byte{b})
				synctest.Wait()
			}
		case stepSayTwoWords:
			first, second := s.byte()%len(clientWords), s.byte()%len(clientWords)
			s.say([]byte(clientWords[first] + clientWords[second]))
		case stepCloseWrite:
			s.client.CloseWrite()
		case stepClose:
			s.client.Close()
		case stepReset:
			s.client.reset()
			s.broken = true
		case stepOriginSend:
			send(far.memConn, s.bytes())
		case stepOriginSay:
			send(far.memConn, []byte(originWords[s.byte()%len(originWords)]))
		case stepOriginCloseWrite:
			far.CloseWrite()
		case stepOriginClose:
			far.Close()
		case stepOriginReset:
			far.reset()
		case stepWait:
			pause(time.Duration(s.byte()) * 50 * time.Millisecond)
		case stepPolicy:
			revoked = !revoked
			s.l.store.Swap(fuzzPolicies[map[bool]int{true: 1}[revoked]])
		case stepLookUp:
			s.l.mu.Lock()
			s.l.lookup = failures[s.byte()%len(failures)]
			s.l.mu.Unlock()
		case stepDial:
			s.l.mu.Lock()
			s.l.dial = failures[s.byte()%len(failures)]
			s.l.mu.Unlock()
		}
		synctest.Wait()
	}
}

// pause lets the bubble's clock go on.
func pause(d time.Duration) { <-time.After(d) }

// failures are how a look-up or a connection attempt may go; nil: well.
var failures = []func(context.Context) error{
	nil,
	func(context.Context) error { return os.NewSyscallError("connect", syscall.ECONNREFUSED) },
	func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	func(ctx context.Context) error { // slow, and then well
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(3 * time.Second):
			return nil
		}
	},
}

var fuzzPolicies [2]*policy.Policy // the usual one; one that allows nothing

// FuzzConnection runs a Server in memory with one client connection, and lets the
// input say what client, origins, resolver and operator do. Whatever it is: no
// panic, an end in time, nothing left over, exactly one event a request, and the
// far side sees nothing that a simple reading of the client's bytes and of the
// policy does not account for.
func FuzzConnection(f *testing.F) {
	fuzzPolicies[0] = compile(f, fuzzPolicy)
	fuzzPolicies[1] = compile(f, "version: 1\ngroups:\n  - {name: g, sources: [10.0.0.0/8]}\n")
	for first := range clientWords {
		f.Add([]byte{0, stepSay, byte(first), stepSay, 8, stepOriginSay, 0, stepClose})
		f.Add([]byte{1, stepSayTwoWords, byte(first), 14, stepOriginSay, 4, stepSay, 20, stepOriginClose})
	}
	f.Add([]byte{0, stepSay, 0, stepSayInBytes, 8, stepSay, 20, stepOriginSay, 8, stepPolicy})
	f.Add([]byte{0, stepSay, 2, stepOriginSay, 8, stepCloseWrite, stepOriginSay, 9, stepOriginReset})
	f.Add([]byte{1, stepDial, 3, stepSayTwoWords, 0, 8, stepWait, 100, stepOriginCloseWrite})
	f.Add([]byte{1, stepSay, 0}) // silence in every phase
	f.Add([]byte{1, stepSay, 0, stepSay, 36})
	f.Add([]byte{1, stepSay, 36})
	f.Add([]byte{1, stepSay, 31})
	f.Add([]byte{1, stepSay, 3, stepSay, 28})
	f.Add([]byte{1})
	f.Add([]byte{0, stepSay, 3, stepSay, 15}) // a session that needs no far side
	f.Add([]byte{0, stepLookUp, 2, stepSay, 0, stepReset})
	f.Add([]byte{0, stepSay, 12, stepOriginSay, 0, stepSay, 12, stepOriginSay, 0, stepSay, 0, stepSay, 8, stepOriginSay, 7})
	f.Add([]byte{0, stepSay, 17, stepSay, 18, stepSay, 19, stepOriginSay, 1, stepOriginSay, 2, stepSay, 13})
	f.Fuzz(func(t *testing.T, in []byte) {
		synctest.Test(t, func(t *testing.T) { tryConnection(t, in) })
	})
}

func tryConnection(t *testing.T, in []byte) {
	l := newLab(fuzzPolicies[0])
	l.addrs, l.hasty = fuzzAddrs, true
	s := &script{in: in, l: l, client: l.client()}
	patient := s.byte()%2 == 1
	s.run()
	answer := s.drain()
	if patient { // nobody closes anything: the time-outs of each pipelined request must
		pause(24 * time.Hour)
	} else {
		s.client.Close()
		l.mu.Lock()
		far := l.far
		l.down = true
		l.mu.Unlock()
		for _, f := range far {
			f.Close()
		}
		pause(time.Minute)
	}
	synctest.Wait()
	if st := l.srv.Stats(); st.Connections != 0 || st.Tunnels != 0 || st.Panics != 0 {
		t.Errorf("after the end: %+v", st)
	}
	s.client.Close()
	<-answer
	l.close() // and synctest waits for every goroutine
	if st := l.srv.Stats(); st.Panics != 0 {
		t.Errorf("%d panics", st.Panics)
	}
	if n := l.open(); n != 0 {
		t.Errorf("%d connections were left open", n)
	}
	judge(t, s)
}

// drain reads what the client is told, and throws it away.
func (s *script) drain() <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(io.Discard, s.client)
	}()
	return done
}

var (
	asksConnect  = regexp.MustCompile(`CONNECT ([^ \r\n]+) HTTP/1`)
	asksAbsolute = regexp.MustCompile(`(?i) http://([^/?# \r\n]+)[^ \r\n]* HTTP/1`)
)

// canonical is the authority that text stands for.
func canonical(text, port string) string {
	host, p, ok := strings.Cut(text, ":")
	if ok {
		port = p
	}
	if u, err := url.PathUnescape(host); err == nil {
		host = u
	}
	if a, err := idna.Lookup.ToASCII(host); err == nil {
		host = a
	}
	return strings.ToLower(strings.TrimSuffix(host, ".")) + ":" + port
}

// judge is the oracle: it holds what happened against a simple reading of what
// the client sent.
func judge(t *testing.T, s *script) {
	asked := map[string]bool{} // addresses that the client's bytes may lead to
	for _, m := range asksConnect.FindAllSubmatch(s.sent, -1) {
		asked[fuzzAllowed[canonical(string(m[1]), "")]] = true
	}
	for _, m := range asksAbsolute.FindAllSubmatch(s.sent, -1) {
		asked[fuzzAllowed[canonical(string(m[1]), "80")]] = true
	}
	delete(asked, "")
	var connects, requests int
	var tunnel event.Event
	ids := map[string]bool{}
	for _, ev := range s.l.events {
		if ids[ev.ID] {
			t.Errorf("two events %s", ev.ID)
		}
		ids[ev.ID] = true
		if ev.Kind == event.Connect {
			connects++
			tunnel = ev
		} else {
			requests++
		}
	}
	head, early, whole := bytes.Cut(s.sent, []byte("\r\n\r\n"))
	isConnect := whole && bytes.HasPrefix(head, []byte("CONNECT ")) && !bare(s.sent[:len(head)+4])
	switch {
	case connects > 1:
		t.Errorf("%d events of a CONNECT on one connection", connects)
	case len(s.sent) == 0 && connects+requests > 0:
		t.Errorf("%d events of a client that sent nothing", connects+requests)
	case len(s.sent) > 0 && connects+requests == 0 && !s.broken:
		t.Errorf("no event for %q", s.sent)
	case isConnect && connects != 1 && !s.broken:
		t.Errorf("%d events of the CONNECT in %q", connects, s.sent)
	}
	for _, f := range s.l.far {
		if !asked[f.to.String()] {
			t.Errorf("a connection to %v, which %q does not ask for or may not reach", f.to, s.sent)
		}
	}
	if isConnect && requests == 0 {
		judgeTunnel(t, s, &tunnel, early)
		return
	}
	judgeHTTP(t, s, requests)
}

// bare reports whether b has a line end that is no CRLF.
func bare(b []byte) bool { return bytes.Count(b, []byte("\n")) != bytes.Count(b, []byte("\r\n")) }

// judgeTunnel judges a CONNECT that carried no HTTP; early is what the client sent
// inside it.
func judgeTunnel(t *testing.T, s *script, ev *event.Event, early []byte) {
	if len(s.l.far) > 1 {
		t.Errorf("%d connections for one CONNECT", len(s.l.far))
	}
	if len(s.l.far) == 0 {
		return
	}
	far := s.l.far[0]
	if !bytes.HasPrefix(early, far.got) {
		t.Errorf("the client sent %q, the far side got %q", early, far.got)
	}
	if ev.Decision.Verdict != policy.Allow && ev.Decision.Reason != policy.ReasonPolicyRevoked && len(far.got) > 0 {
		t.Errorf("%v, and the far side got %q", ev.Decision.Reason, far.got)
	}
	if far.to.Port() == 443 && len(far.got) > 0 {
		if sni, ok := serverSees(far.got); ok && sni+":443" != authorityOf(far.to) {
			t.Errorf("the far side of %s got a hello for %q", authorityOf(far.to), sni)
		}
		if far.got[0] != 22 {
			t.Errorf("the far side of a TLS rule got %q", far.got)
		}
	}
}

func authorityOf(to netip.AddrPort) string {
	for a, addr := range fuzzAllowed {
		if addr == to.String() {
			return a
		}
	}
	return ""
}

// serverSees returns the server_name that crypto/tls reads in a ClientHello, if it can.
func serverSees(b []byte) (name string, ok bool) {
	stop := errors.New("seen")
	c := &hearing{r: bytes.NewReader(b)}
	tls.Server(c, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		name, ok = h.ServerName, true
		return nil, stop
	}}).Handshake()
	return strings.ToLower(name), ok
}

// hearing is a connection that has heard everything already.
type hearing struct {
	net.Conn
	r io.Reader
}

func (h *hearing) Read(p []byte) (int, error)  { return h.r.Read(p) }
func (h *hearing) Write(p []byte) (int, error) { return len(p), nil }
func (h *hearing) Close() error                { return nil }

// judgeHTTP reads what far sides got as an origin would: every request is for the
// authority whose address it is, and there are no more of them than were decided.
func judgeHTTP(t *testing.T, s *script, requests int) {
	seen := 0
	for _, f := range s.l.far {
		if f.to.Port() != 80 {
			continue
		}
		r := bufio.NewReader(bytes.NewReader(f.got))
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				break
			}
			seen++
			if got := canonical(req.Host, "80"); fuzzAllowed[got] != f.to.String() || req.URL.Host != "" {
				t.Errorf("%v got %s %s for %s", f.to, req.Method, req.RequestURI, req.Host)
			}
			if req.Header.Get("Upgrade") != "" {
				break // what follows belongs to the tunnel
			}
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				break
			}
		}
	}
	// net/http sends a request again if a connection that it had used before ends
	// without a byte of the answer: on another connection.
	if seen > requests+max(len(s.l.far)-1, 0) {
		t.Errorf("far sides got %d requests, %d were decided, of %q", seen, requests, s.sent)
	}
}
