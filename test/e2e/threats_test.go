package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// The tests here are named after the cases of docs/threats.md that need the whole
// program.

// TestT01NoQueryForWhatIsDenied counts what reaches the upstream resolver.
func TestT01NoQueryForWhatIsDenied(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	for _, src := range []string{ciSource, noSource} {
		for _, target := range []string{"other.test:443", "secret-data.evil.test:443", "api.ok.test:22", "2130706433:443", "api.ok.test@evil.test:443"} {
			for _, head := range []string{"CONNECT %s HTTP/1.1\r\n\r\n", "GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n"} {
				asked := w.questions.Load()
				c := dialFrom(t, src, g.proxy)
				fmt.Fprintf(c, head, target)
				if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 400 && resp.StatusCode != 403 {
					t.Errorf("%s from %s: %v %v", target, src, resp, err)
				}
				c.Close()
				if n := w.questions.Load() - asked; n != 0 {
					t.Errorf("%s from %s: %d queries", target, src, n)
				}
			}
		}
	}
}

// TestT69LogInjection lets clients choose every string of the log that they can.
// The harness fails the test for a line that is not JSON, or too long.
func TestT69LogInjection(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	junk := []string{
		`","verdict":"allow","x":"`, "a\x1b[2J\x1b]0;x\x07", "\xff\xfe\xc0\xaf", "\u2028\u2029\u0085", `\u0000\n`, "a\tb", "\x7f\x80", strings.Repeat("\"\\", 9000), "{}[]", "é\u0301",
		"\rfake", "a\x0bb\x0c", "<script>", "%0d%0a{}", "\u202e",
	}
	lines := 0
	for _, j := range junk {
		heads := []string{
			"CONNECT evil.test:443 HTTP/1.1\r\nUser-Agent: " + j + "\r\n\r\n",
			"CONNECT " + j + ":443 HTTP/1.1\r\n\r\n",
			"GET http://evil.test/" + j + " HTTP/1.1\r\nHost: " + j + "\r\nConnection: close\r\nUser-Agent: " + j + "\r\n\r\n",
			"CONNECT evil.test:443 HTTP/1.1\r\nHost: " + j + "\r\n\r\n",
			j + " http://evil.test/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
			"GET http://" + j + "/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
		}
		for _, head := range heads {
			c := dialFrom(t, ciSource, g.proxy)
			io.WriteString(c, head)
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Errorf("%q: %v", head, err)
			}
			c.Close()
			lines++
		}
		// The same as the name of a query, as far as a name can hold it.
		q := new(dns.Msg).SetQuestion(dns.Fqdn(strings.ReplaceAll(strings.ReplaceAll(j[:min(len(j), 40)], `\`, `\\`), ".", `\.`)), dns.TypeA)
		if packed, err := q.Pack(); err == nil {
			conn, err := net.Dial("udp", g.dns)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write(packed)
			conn.SetReadDeadline(time.Now().Add(patience))
			if _, err := conn.Read(make([]byte, 512)); err != nil {
				t.Errorf("query for %q: %v", j, err)
			}
			conn.Close()
			lines++
		}
	}
	events := func() (n int) {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, l := range g.lines {
			switch l["event"] {
			case "connect", "http", "dns":
				n++
				if l["verdict"] != "deny" {
					t.Errorf("a client wrote a verdict: %v", l)
				}
			}
		}
		return n
	}
	g.until("an event for each of them", func() bool { return events() >= lines })
	if n := events(); n != lines {
		t.Errorf("%d events of %d requests", n, lines)
	}
}

// TestT69OriginsDoNotWrite has an origin say what nobody asked for, which net/http
// would print: not on our standard error, where there are no bounds and no JSON.
func TestT69OriginsDoNotWrite(t *testing.T) {
	w := newWorld(t)
	l := listen(t, originAddr+":0")
	port := l.Addr().(*net.TCPAddr).Port
	answered := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		c.Read(make([]byte, 4096))
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		<-answered
		io.WriteString(c, "unasked\r\n"+strings.Repeat("x", 2000))
	}()
	g := start(t, w, policyText(w, fmt.Sprintf("      - {names: [says.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}", port)), "--log-level", "debug")
	c := dialFrom(t, ciSource, g.proxy)
	fmt.Fprintf(c, "GET http://says.ok.test:%d/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
	if _, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil {
		t.Fatal(err)
	}
	close(answered)
	<-done
	c.Close()
	g.signal(syscall.SIGTERM)
	g.wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stderr.Len() > 0 {
		t.Errorf("stderr: %s", g.stderr.String())
	}
}

// TestT70ControlPlane cannot be reached through the proxy, even where rules allow it.
func TestT70ControlPlane(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	var more strings.Builder
	for _, addr := range []string{g.admin, g.proxy, g.dns} {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&more, "      - {addresses: [127.0.0.0/8], ports: [%s], protocol: tcp}\n", port)
		fmt.Fprintf(&more, "      - {names: [self.ok.test], ports: [%s], private_destinations: [127.0.0.0/8]}\n", port)
	}
	g.reload(policyText(w, more.String()))
	for _, addr := range []string{g.admin, g.proxy, g.dns} {
		m := g.mark()
		out, _ := g.curl(ciSource, "-i", "-p", "http://"+addr+"/metrics")
		wants(t, "curl -i", out, "403 Forbidden by egress policy", "X-Sallyport-Reason: loop", "error=proxy_loop_detected")
		g.line(m, map[string]any{"event": "connect", "verdict": "deny", "reason": "loop"})
	}
	// The admin listener itself answers only who can reach it.
	if out, code := tool(t, "curl", "-sS", "--noproxy", "*", "http://"+g.admin+"/healthz"); code != 0 {
		t.Errorf("curl: %d %s", code, out)
	}
	// Without a rule its address is one like any other.
	g.reload(policyText(w, ""))
	m := g.mark()
	out, _ := g.curl(ciSource, "-i", "-p", "http://"+g.admin+"/metrics")
	wants(t, "curl -i", out, "X-Sallyport-Reason: ip_literal")
	g.line(m, map[string]any{"event": "connect", "verdict": "deny", "reason": "ip_literal"})
}

// TestT64ReloadUnderLoad reloads again and again under open tunnels and new ones.
// This is the scale of every test run; make soak has the large one.
func TestT64ReloadUnderLoad(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	tunnels := make([]tunnel, 100)
	for i := range tunnels {
		tunnels[i] = echoTunnel(t, g, w, "echo.ok.test")
		tunnels[i].SetDeadline(time.Now().Add(10 * patience))
	}
	var stop atomic.Bool
	var served, failed atomic.Int64
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for !stop.Load() {
				if err := requestOnce(g.proxy, w.echoPort); err != nil {
					failed.Add(1)
					t.Errorf("a request during a reload: %v", err)
					return
				}
				served.Add(1)
			}
		})
	}
	for i := range 20 {
		before := g.ready().Policy.LastReload.At
		if i%5 == 4 { // and now and then a broken one, which changes nothing
			g.write("policy.yaml", "version: 1\nnonsense: "+strconv.Itoa(i)+"\n")
		} else {
			g.write("policy.yaml", policyText(w, fmt.Sprintf("      - another%d.ok.test\n", i)))
		}
		g.signal(syscall.SIGHUP)
		g.until("the reload", func() bool { return g.ready().Policy.LastReload.At != before })
	}
	had := served.Load()
	g.until("requests after the last reload", func() bool { return served.Load() > had+10 || failed.Load() > 0 })
	stop.Store(true)
	clients.Wait()
	for _, e := range tunnels {
		e.echo(t, "still here\n")
		e.Close()
	}
	t.Logf("%d requests served meanwhile", served.Load())
}

// requestOnce opens a tunnel to the echo service, has a line echoed, and closes it.
func requestOnce(proxy string, echoPort int) error {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ciSource)}, Timeout: patience}
	c, err := d.Dial("tcp", proxy)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "CONNECT echo.ok.test:%d HTTP/1.1\r\n\r\nping\n", echoPort)
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s", resp.Status)
	}
	for _, want := range []string{"220 welcome\r\n", "ping\n"} {
		if got, err := r.ReadString('\n'); err != nil || got != want {
			return fmt.Errorf("%q, %w", got, err)
		}
	}
	return nil
}

// TestT68BlockedLog stops reading the log. Traffic goes on, what cannot be written
// is counted, and once the reader is back so is the log.
func TestT68BlockedLog(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	dropped := func() (n int) {
		for line := range strings.Lines(g.metrics()) {
			if text, ok := strings.CutPrefix(line, "sallyport_log_dropped_total "); ok {
				f, _ := strconv.ParseFloat(strings.TrimSpace(text), 64)
				n = int(f)
			}
		}
		return n
	}
	// Of most of these requests the line is long: the queue has a bound in bytes.
	denied := "CONNECT other.test:443 HTTP/1.1\r\nUser-Agent: " + strings.Repeat("x", 4000) + "\r\n\r\n"
	sent := 0
	func() {
		g.hold.Lock()
		defer g.hold.Unlock()
		for ; dropped() == 0; sent++ {
			if sent > 20_000 {
				t.Fatal("nothing is dropped")
			}
			for range 50 {
				c := dialFrom(t, ciSource, g.proxy)
				io.WriteString(c, denied)
				line, err := bufio.NewReader(c).ReadString('\n')
				c.Close()
				if err != nil || !strings.HasPrefix(line, "HTTP/1.1 403 ") {
					t.Fatalf("with the log blocked: %q, %v", line, err)
				}
			}
		}
		if err := requestOnce(g.proxy, w.echoPort); err != nil {
			t.Errorf("with the log blocked: %v", err)
		}
		if r := g.ready(); r.status != 200 {
			t.Errorf("with the log blocked: /readyz %d", r.status)
		}
	}()
	m := g.mark()
	g.until("the log is back", func() bool {
		if err := requestOnce(g.proxy, w.echoPort); err != nil {
			t.Fatal(err)
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, l := range g.lines[m:] {
			if l["event"] == "connect" && l["name"] == "echo.ok.test" {
				return true
			}
		}
		return false
	})
	t.Logf("%d lines dropped", dropped())
	g.signal(syscall.SIGTERM) // the end of the test would cut the last line off
	if code := g.wait(); code != 0 {
		t.Errorf("exit status %d", code)
	}
}
