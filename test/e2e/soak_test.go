package e2e

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestSoak has good, slow, broken and hostile clients and origins at work for
// SOAKTIME (make soak: 10 minutes) while the policy is reloaded all the time, and
// wants everything back at its start afterwards. Without SOAKTIME, as in make
// test, it runs for a few seconds at a small scale, so that it works when needed.
//
// Good clients must never notice: not a reset, not a refusal. Every request must
// have exactly one event. Connections are bounded by the clients, bytes by what
// each of them does.
func TestSoak(t *testing.T) {
	length, clients, tunnels := 3*time.Second, 8, 50
	if text := os.Getenv("SOAKTIME"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil || length <= 0 {
			t.Fatalf("SOAKTIME=%q: want a duration, such as 10m", text)
		}
		clients, tunnels = 32, 4000
		var limit syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
		// A tunnel takes two descriptors in the gate, and two here.
		tunnels = min(tunnels, int(min(limit.Cur, 1<<20))/4)
	}
	s := newSoak(t)
	begin := s.settle(clients, nil)
	t.Logf("begin: %v", begin)

	stop := make(chan struct{})
	var work sync.WaitGroup
	quiet := s.openTunnels(tunnels)
	t.Logf("%d tunnels open: %v", tunnels, s.figures())
	const keepers = 32 // each has a fair part to keep alive within the idle time
	for part := range slices.Chunk(quiet, max(len(quiet)/keepers, 1)) {
		work.Go(func() { s.keepAlive(part, stop) })
	}
	reloads := 0
	work.Go(func() { reloads = s.reloadAgainAndAgain(stop, min(time.Second, length/10)) })
	for n := range clients {
		of := len(actions)
		if n%2 == 1 { // those that are as fast as they can
			of = quick
		}
		work.Go(func() { s.client(of, rand.New(rand.NewPCG(uint64(n), 1)), stop) })
	}
	<-time.After(length)
	close(stop)
	work.Wait()
	for _, e := range quiet {
		e.echo(t, "still here\n")
		e.Close()
	}
	t.Logf("%d reloads; %d requests, %d broken ones, %d queries", reloads, len(s.seen), s.odd.Load(), s.queries.Load())
	for i, a := range actions {
		t.Logf("%8d × %s", s.done[i].Load(), a.name)
	}
	end := s.settle(clients, &begin)
	t.Logf("end: %v", end)
	s.account()

	s.g.signal(syscall.SIGTERM)
	if code := s.g.wait(); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if out := s.g.stderr.String(); out != "" { // a crash, or what a library says there
		t.Errorf("stderr: %.4000s", out)
	}
}

// A soak is the gate under load and what is known of its events.
type soak struct {
	t       *testing.T
	w       *world
	g       *gate
	hostile int // port of the origin that misbehaves
	roots   *x509.CertPool

	odd              atomic.Int64 // requests that may be lost before they are read: at most one event each
	queries, answers atomic.Int64
	done             [64]atomic.Int64 // by action

	mu      sync.Mutex // guards what follows
	seen    []uint8    // events of each request that has a number
	strange int64      // events of requests without one
	dns     int64      // events of queries
}

func newSoak(t *testing.T) *soak {
	s := &soak{t: t, w: newWorld(t), roots: x509.NewCertPool()}
	pem, err := os.ReadFile(s.w.caFile)
	if err != nil || !s.roots.AppendCertsFromPEM(pem) {
		t.Fatal("no CA", err)
	}
	l := listen(t, originAddr+":0")
	s.hostile = l.Addr().(*net.TCPAddr).Port
	go misbehave(l)
	// Who behaves must not fail for being slow: that would be this machine.
	// What is remembered on purpose, of a hundred thousand made up names, is bounded small:
	// otherwise it would hide what is not.
	s.g = start(t, s.w, s.policy(0), "--set", "proxy.timeouts.connect=20s", "--set", "proxy.timeouts.client_hello=20s", "--set", "proxy.timeouts.request_header=20s",
		"--set", "discovery.entries=1000", "--set", "dns.cache.size=1MiB")
	s.g.mu.Lock()
	s.g.sink = s.take
	s.g.mu.Unlock()
	return s
}

// policy is the policy of the n-th reload. Every other one revokes a name.
func (s *soak) policy(n int) string {
	more := fmt.Sprintf(`
      - {names: [hostile.ok.test], ports: [%[1]d], private_destinations: [127.0.0.0/8]}
      - {names: [hostiletcp.ok.test], ports: [%[1]d], protocol: tcp, private_destinations: [127.0.0.0/8]}
      - {names: [nth%[2]d.ok.test]}
`, s.hostile, n)
	if n%2 == 0 {
		more += fmt.Sprintf("      - {names: [brief.ok.test], ports: [%d], protocol: tcp, private_destinations: [127.0.0.0/8]}\n", s.w.echoPort)
	}
	return policyText(s.w, more)
}

// take counts an event. Messages and reloads stay among the lines, unless they
// are of no interest.
func (s *soak) take(line map[string]any) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, crashed := line["panic"]; crashed {
		s.t.Errorf("a panic: %v", line)
	}
	switch line["event"] {
	case "connect", "http":
		agent, _ := line["user_agent"].(string)
		number, ok := strings.CutPrefix(agent, "soak/")
		if n, err := strconv.Atoi(number); ok && err == nil && n < len(s.seen) {
			s.seen[n]++
		} else {
			s.strange++
		}
	case "dns":
		s.dns++
	default:
		return line["event"] == "config"
	}
	return true
}

// number returns the User-Agent field of a request that must have one event.
func (s *soak) number() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = append(s.seen, 0)
	return fmt.Sprintf("User-Agent: soak/%d\r\n", len(s.seen)-1)
}

// account holds the events against the requests, once the last lines are there.
func (s *soak) account() {
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) { // pace: polls
		problem := s.unaccounted()
		if problem == "" {
			return
		}
		if time.Now().After(deadline) {
			s.t.Error(problem)
			return
		}
	}
}

func (s *soak) unaccounted() string {
	lost := int(s.metrics()["sallyport_log_dropped_total"])
	s.mu.Lock()
	defer s.mu.Unlock()
	missing, double := 0, 0
	for _, n := range s.seen {
		switch {
		case n == 0:
			missing++
		case n > 1:
			double++
		}
	}
	if double > 0 || missing > lost {
		return fmt.Sprintf("of %d requests %d have no event and %d more than one; %d lines were dropped", len(s.seen), missing, double, lost)
	}
	if odd := s.odd.Load(); s.strange > odd {
		return fmt.Sprintf("%d events of %d broken requests", s.strange, odd)
	}
	if q, a := s.queries.Load(), s.answers.Load(); s.dns > q || s.dns+int64(lost) < a {
		return fmt.Sprintf("%d events of %d queries, of which %d were answered", s.dns, q, a)
	}
	return ""
}

// figures is what the gate holds.
type figures struct{ goroutines, descriptors, heap, tunnels float64 }

func (f figures) String() string {
	return fmt.Sprintf("%.0f goroutines, %.0f descriptors, %.1f MiB heap, %.0f tunnels", f.goroutines, f.descriptors, f.heap/(1<<20), f.tunnels)
}

func (s *soak) figures() figures {
	m := s.metrics()
	return figures{m["go_goroutines"], m["process_open_fds"], m["go_memstats_heap_alloc_bytes"], m["sallyport_tunnels"]}
}

func (s *soak) metrics() map[string]float64 {
	m := map[string]float64{}
	for line := range strings.Lines(s.g.metrics()) {
		if name, text, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			m[name], _ = strconv.ParseFloat(text, 64)
		}
	}
	return m
}

// settle waits until the gate is at rest and returns its figures: the lowest heap
// of several collections, which requests with long heads bring about. With goal
// it waits until they are back there, with room for pools and for the runtime's
// own; without, it first does everything once, so that all there is has been
// loaded.
func (s *soak) settle(clients int, goal *figures) figures {
	s.t.Helper()
	if goal == nil {
		rng := rand.New(rand.NewPCG(1, 2))
		for i := range actions {
			s.act(i, rng)
		}
	}
	const (
		roomGoroutines  = 8 + 16 // the gate keeps up to 16 for the next connections
		roomDescriptors = 16
		roomHeap        = 16 << 20
	)
	best := figures{heap: 1 << 40}
	deadline := time.Now().Add(2 * time.Minute) // an idle tunnel takes one
	for round := 0; ; round++ {
		s.reload(-1 - round) // closes idle connections to origins
		for range 20 {
			s.denied(strings.Repeat("X: "+strings.Repeat("x", 4000)+"\r\n", 12))
		}
		f := s.figures()
		best.heap = min(best.heap, f.heap)
		best.goroutines, best.descriptors, best.tunnels = f.goroutines, f.descriptors, f.tunnels
		switch {
		case goal == nil && round >= 20 && f.tunnels == 0:
			return best
		case goal != nil && f.tunnels == 0 && f.goroutines <= goal.goroutines+roomGoroutines &&
			f.descriptors <= goal.descriptors+roomDescriptors && best.heap <= goal.heap+roomHeap && round >= 5:
			return best
		case time.Now().After(deadline):
			s.t.Errorf("not at rest: %v; %v", f, goal)
			return best
		}
		runtime.Gosched()
	}
}

// reload puts the policy of the n-th reload in force.
func (s *soak) reload(n int) {
	before := s.g.ready().Policy.LastReload.At
	s.g.write("policy.yaml", s.policy(n))
	s.g.signal(syscall.SIGHUP)
	s.g.until("the reload", func() bool { return s.g.ready().Policy.LastReload.At != before })
}

// reloadAgainAndAgain reloads every pause, and returns how often.
func (s *soak) reloadAgainAndAgain(stop <-chan struct{}, pause time.Duration) int {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-tick.C:
			s.reload(n)
		case <-stop:
			return n - 1
		}
	}
}

// openTunnels opens n tunnels, which stay.
func (s *soak) openTunnels(n int) []tunnel {
	open := make([]tunnel, n)
	for i := range open {
		c, r, err := s.connect("echo.ok.test", s.w.echoPort, "")
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { c.Close() })
		open[i] = tunnel{c, bufio.NewReaderSize(r, 16)}
		if line, err := open[i].ReadString('\n'); err != nil || line != "220 welcome\r\n" {
			s.t.Fatalf("%q, %v", line, err)
		}
	}
	return open
}

// keepAlive has each tunnel carry a line before it is idle for too long.
func (s *soak) keepAlive(open []tunnel, stop <-chan struct{}) {
	tick := time.NewTicker(20 * time.Second / time.Duration(len(open)))
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-tick.C:
			e := open[n%len(open)]
			e.SetDeadline(time.Now().Add(10 * time.Minute)) // the end of the soak may be late
			e.echo(s.t, "alive\n")
		case <-stop:
			for _, e := range open {
				e.SetDeadline(time.Now().Add(patience))
			}
			return
		}
	}
}

// client does one thing after another, at random one of the first actions.
func (s *soak) client(of int, rng *rand.Rand, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
			s.act(rng.IntN(of), rng)
		}
	}
}

func (s *soak) act(i int, rng *rand.Rand) {
	if err := actions[i].do(s, rng); err != nil {
		s.t.Errorf("%s: %v", actions[i].name, err)
	}
	s.done[i].Add(1)
}

// quick is how many of the first actions take no longer than they must.
const quick = 6

// actions are what clients do. An error is what a client that behaves must not see.
var actions = []struct {
	name string
	do   func(*soak, *rand.Rand) error
}{
	{"a request over TLS", (*soak).overTLS},
	{"a tunnel with an echo", (*soak).echo},
	{"plain HTTP, several hosts", (*soak).plain},
	{"HTTP inside a CONNECT", (*soak).inside},
	{"a name that is denied", func(s *soak, _ *rand.Rand) error { return s.denied("") }},
	{"a hello for another name", (*soak).wrongHello},
	{"a bulk download", (*soak).bulk},
	{"a tunnel until its name is revoked", (*soak).revoked},
	{"a head in small pieces", (*soak).slowHead},
	{"a hello in small pieces", (*soak).slowHello},
	{"an endless head", (*soak).endlessHead},
	{"a reset in the middle of something", (*soak).reset},
	{"nothing at all", (*soak).nothing},
	{"junk", (*soak).junk},
	{"a client that does not read", (*soak).deaf},
	{"an origin that misbehaves, in a tunnel", (*soak).hostileTunnel},
	{"an origin that misbehaves, over HTTP", (*soak).hostileHTTP},
	{"an upload that breaks off", (*soak).brokenUpload},
	{"queries", (*soak).ask},
	{"a flood of queries", (*soak).flood},
}

// dial connects from one of the group's addresses, so that ports last.
func (s *soak) dial() (*net.TCPConn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+rand.IntN(250)))}, Timeout: patience}
	c, err := d.Dial("tcp", s.g.proxy)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn), nil
}

// connect opens a tunnel; early is sent with the CONNECT.
func (s *soak) connect(host string, port int, early string) (*net.TCPConn, *bufio.Reader, error) {
	c, err := s.dial()
	if err != nil {
		return nil, nil, err
	}
	fmt.Fprintf(c, "CONNECT %s:%d HTTP/1.1\r\n%s\r\n%s", host, port, s.number(), early)
	r := bufio.NewReaderSize(c, 512)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errStatus(resp.StatusCode)
	}
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	return c, r, nil
}

type errStatus int

func (e errStatus) Error() string { return "status " + strconv.Itoa(int(e)) }

// reply reads a response and its body.
func reply(r *bufio.Reader, status int) error {
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != status {
		return errStatus(resp.StatusCode)
	}
	return nil
}

func (s *soak) handshake(sni string) (*tls.Conn, error) {
	c, _, err := s.connect("api.ok.test", s.w.tlsPort, "")
	if err != nil {
		return nil, err
	}
	tc := tls.Client(c, &tls.Config{ServerName: sni, RootCAs: s.roots})
	if err := tc.Handshake(); err != nil {
		tc.Close()
		return nil, err
	}
	return tc, nil
}

func (s *soak) overTLS(*rand.Rand) error {
	c, err := s.handshake("api.ok.test")
	if err != nil {
		return err
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: api.ok.test\r\n\r\n")
	return reply(bufio.NewReader(c), 200)
}

func (s *soak) wrongHello(*rand.Rand) error {
	c, err := s.handshake("evil.ok.test")
	if err == nil {
		c.Close()
		return errors.New("a hello for another name passed")
	}
	if !strings.Contains(err.Error(), "unrecognized name") {
		return err
	}
	return nil
}

func (s *soak) echo(rng *rand.Rand) error {
	text := strings.Repeat("x", rng.IntN(100)) + "\n"
	c, r, err := s.connect("echo.ok.test", s.w.echoPort, text)
	if err != nil {
		return err
	}
	defer c.Close()
	c.CloseWrite()
	got, err := io.ReadAll(r)
	if err != nil || string(got) != "220 welcome\r\n"+text {
		return fmt.Errorf("%q, %w", got, err)
	}
	return nil
}

func (s *soak) plain(rng *rand.Rand) error {
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	for range 1 + rng.IntN(4) {
		host, status := "api.ok.test", 200
		if rng.IntN(4) == 0 {
			host, status = "other.test", 403
		}
		fmt.Fprintf(c, "GET http://%s:%d/ HTTP/1.1\r\nHost: x\r\n%s\r\n", host, s.w.httpPort, s.number())
		if err := reply(r, status); err != nil {
			return err
		}
	}
	return nil
}

func (s *soak) inside(*rand.Rand) error {
	c, r, err := s.connect("api.ok.test", s.w.httpPort, "")
	if err != nil {
		return err
	}
	defer c.Close()
	for range 2 {
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: api.ok.test:%d\r\n%s\r\n", s.w.httpPort, s.number())
		if err := reply(r, 200); err != nil {
			return err
		}
	}
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: evil.test\r\n%s\r\n", s.number())
	return reply(r, 403)
}

func (s *soak) bulk(rng *rand.Rand) error {
	if rng.IntN(10) > 0 { // in every tenth case: 8 MiB each
		return nil
	}
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Fprintf(c, "GET http://api.ok.test:%d/big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n", s.w.httpPort, s.number())
	return reply(bufio.NewReader(c), 200)
}

func (s *soak) denied(fields string) error {
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Fprintf(c, "CONNECT other.test:443 HTTP/1.1\r\n%s%s\r\n", s.number(), fields)
	return reply(bufio.NewReader(c), 403)
}

// revoked keeps a tunnel that a reload ends, or one that there cannot be just now.
func (s *soak) revoked(*rand.Rand) error {
	c, r, err := s.connect("brief.ok.test", s.w.echoPort, "")
	var status errStatus
	if errors.As(err, &status) && status == 403 {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(500 * time.Millisecond)) // or the client's patience does
	io.Copy(io.Discard, r)
	return nil
}

// pieces writes text a few bytes at a time.
func pieces(c net.Conn, text string, rng *rand.Rand) {
	for len(text) > 0 {
		n := min(1+rng.IntN(40), len(text))
		if _, err := io.WriteString(c, text[:n]); err != nil {
			return
		}
		text = text[n:]
		time.Sleep(time.Duration(rng.IntN(5)) * time.Millisecond) // pace: a slow client
	}
}

func (s *soak) slowHead(rng *rand.Rand) error {
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	pieces(c, fmt.Sprintf("CONNECT other.test:443 HTTP/1.1\r\nHost: other.test:443\r\n%s\r\n", s.number()), rng)
	return reply(bufio.NewReader(c), 403)
}

func (s *soak) slowHello(rng *rand.Rand) error {
	c, _, err := s.connect("api.ok.test", s.w.tlsPort, "")
	if err != nil {
		return err
	}
	defer c.Close()
	tc := tls.Client(slowConn{c, rng}, &tls.Config{ServerName: "api.ok.test", RootCAs: s.roots})
	return tc.Handshake()
}

type slowConn struct {
	net.Conn
	rng *rand.Rand
}

func (c slowConn) Write(p []byte) (int, error) {
	pieces(c.Conn, string(p), c.rng)
	return len(p), nil
}

func (s *soak) endlessHead(*rand.Rand) error {
	s.odd.Add(1) // the head is cut before it is known whose it is
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	io.WriteString(c, "GET http://api.ok.test/ HTTP/1.1\r\n")
	line := "X: " + strings.Repeat("x", 4000) + "\r\n"
	for range 256 { // 1 MiB; the answer is a 431, and soon a reset
		if _, err := io.WriteString(c, line); err != nil {
			return nil
		}
	}
	io.Copy(io.Discard, c)
	return nil
}

// reset breaks a connection at a random place of what would have been in order.
func (s *soak) reset(rng *rand.Rand) error {
	s.odd.Add(2) // what is inside a CONNECT may be one more
	c, err := s.dial()
	if err != nil {
		return err
	}
	var text string
	switch rng.IntN(3) {
	case 0:
		text = fmt.Sprintf("CONNECT api.ok.test:%d HTTP/1.1\r\n\r\n\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", s.w.tlsPort)
	case 1:
		text = fmt.Sprintf("GET http://api.ok.test:%d/big HTTP/1.1\r\nHost: x\r\n\r\n", s.w.httpPort)
	case 2:
		text = fmt.Sprintf("CONNECT api.ok.test:%d HTTP/1.1\r\n\r\nGET /big HTTP/1.1\r\nHost: api.ok.test:%[1]d\r\n\r\n", s.w.httpPort)
	}
	io.WriteString(c, text[:1+rng.IntN(len(text))])
	if rng.IntN(2) == 0 {
		c.SetReadDeadline(time.Now().Add(time.Duration(rng.IntN(100)) * time.Millisecond))
		io.CopyN(io.Discard, c, int64(rng.IntN(1<<20)))
	}
	if rng.IntN(2) == 0 {
		c.SetLinger(0)
	}
	return c.Close()
}

func (s *soak) nothing(rng *rand.Rand) error {
	c, err := s.dial()
	if err != nil {
		return err
	}
	c.SetReadDeadline(time.Now().Add(time.Duration(rng.IntN(200)) * time.Millisecond))
	c.Read(make([]byte, 1))
	return c.Close()
}

func (s *soak) junk(rng *rand.Rand) error {
	s.odd.Add(1)
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, 1+rng.IntN(5000))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	if rng.IntN(2) == 0 {
		copy(b, "GET http://api.ok.test/")
	}
	c.Write(b)
	c.CloseWrite()
	io.Copy(io.Discard, c)
	return nil
}

// deaf has the echo fill everything on the way, and goes.
func (s *soak) deaf(*rand.Rand) error {
	c, _, err := s.connect("echo.ok.test", s.w.echoPort, "")
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	b := make([]byte, 64<<10)
	for range 64 { // 4 MiB
		if _, err := c.Write(b); err != nil {
			break
		}
	}
	return nil
}

func (s *soak) hostileTunnel(*rand.Rand) error {
	c, r, err := s.connect("hostiletcp.ok.test", s.hostile, "hello\n")
	if err != nil {
		return nil // it may even be reset before we hear of the connection
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	io.CopyN(io.Discard, r, 1<<20)
	return nil
}

func (s *soak) hostileHTTP(*rand.Rand) error {
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	fmt.Fprintf(c, "GET http://hostile.ok.test:%d/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n", s.hostile, s.number())
	io.CopyN(io.Discard, c, 1<<20)
	return nil
}

func (s *soak) brokenUpload(rng *rand.Rand) error {
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	length := "Content-Length: 1000000\r\n\r\n"
	if rng.IntN(2) == 0 {
		length = "Transfer-Encoding: chunked\r\n\r\nfffff\r\n"
	}
	fmt.Fprintf(c, "POST http://api.ok.test:%d/upload HTTP/1.1\r\nHost: x\r\n%s%s%s", s.w.httpPort, s.number(), length, strings.Repeat("x", rng.IntN(100_000)))
	// The head must arrive, or the request has no event: wait for what happens, briefly.
	c.CloseWrite()
	c.SetReadDeadline(time.Now().Add(time.Second))
	io.Copy(io.Discard, c)
	return nil
}

func (s *soak) ask(rng *rand.Rand) error {
	names := []string{"api.ok.test.", "x.cdn.test.", "other.test.", "www.evil.test.", "rebind.ok.test.", fmt.Sprintf("n%d.cdn.test.", rng.IntN(100_000))}
	types := []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeTXT, dns.TypeMX}
	network := []string{"udp", "tcp"}[rng.IntN(2)]
	client := dns.Client{Net: network, Timeout: patience}
	q := new(dns.Msg).SetQuestion(names[rng.IntN(len(names))], types[rng.IntN(len(types))])
	q.SetEdns0(1232, false)
	s.queries.Add(1)
	if _, _, err := client.Exchange(q, s.g.dns); err != nil {
		if network == "udp" { // of which some may be lost
			return nil
		}
		return err
	}
	s.answers.Add(1)
	return nil
}

// flood sends queries and junk without waiting for answers.
func (s *soak) flood(rng *rand.Rand) error {
	conn, err := net.Dial("udp", s.g.dns)
	if err != nil {
		return err
	}
	defer conn.Close()
	for range 100 {
		q := new(dns.Msg).SetQuestion(fmt.Sprintf("f%d.cdn.test.", rng.IntN(1000)), dns.TypeA)
		b, err := q.Pack()
		if err != nil {
			return err
		}
		if rng.IntN(4) == 0 {
			b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
		}
		s.queries.Add(1)
		conn.Write(b)
	}
	return nil
}

// misbehave is an origin that does something else to each connection.
func misbehave(l net.Listener) {
	for n := 0; ; n++ {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go hurt(conn.(*net.TCPConn), n)
	}
}

func hurt(c *net.TCPConn, n int) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	fill := strings.Repeat("x", 16<<10)
	switch n % 9 {
	case 0: // at once
		c.SetLinger(0)
	case 1: // after the request
		c.Read(make([]byte, 100))
		c.SetLinger(0)
	case 2: // in the middle of the body
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"+fill)
		c.SetLinger(0)
	case 3: // a head without end
		io.WriteString(c, "HTTP/1.1 200 OK\r\n")
		for range 64 {
			if _, err := io.WriteString(c, "X: "+fill+"\r\n"); err != nil {
				return
			}
		}
	case 4: // interim responses without end
		for range 1000 {
			if _, err := io.WriteString(c, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"); err != nil {
				return
			}
		}
	case 5: // no HTTP
		io.WriteString(c, "SSH-2.0-x\r\n\x00\xff")
	case 6: // silence, half-closed
		c.CloseWrite()
		io.Copy(io.Discard, c)
	case 7: // silence
		c.Read(make([]byte, 1))
		c.Read(make([]byte, 1<<20))
		c.Read(make([]byte, 1))
	case 8: // a body of bad chunks
		io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n"+fill)
	}
}
