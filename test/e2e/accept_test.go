package e2e

import (
	"bufio"
	bytesorder "encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// balancer is a load balancer in front of the gate: it sends header before the
// bytes of each connection. It returns its address.
func balancer(t *testing.T, to, header string) string {
	t.Helper()
	l := listen(t, "127.0.0.1:0")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				g, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer g.Close()
				io.WriteString(g, header)
				go func() {
					io.Copy(g, c)
					g.(*net.TCPConn).CloseWrite()
				}()
				io.Copy(c, g)
			}()
		}
	}()
	return l.Addr().String()
}

// proxyHeader is a PROXY protocol header of version 2 from source, as an AWS
// Network Load Balancer sends it for a client behind a VPC endpoint.
func proxyHeader(source, endpoint string) string {
	src := netip.MustParseAddrPort(source)
	block := append(src.Addr().AsSlice(), 127, 0, 0, 1)
	block = bytesorder.BigEndian.AppendUint16(block, src.Port())
	block = bytesorder.BigEndian.AppendUint16(block, 3128)
	block = bytesorder.BigEndian.AppendUint16(append(block, 0xea), uint16(1+len(endpoint)))
	block = append(append(block, 1), endpoint...)
	b := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), 0x21, 0x11)
	return string(append(bytesorder.BigEndian.AppendUint16(b, uint16(len(block))), block...))
}

func TestT59ProxyProtocol(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""), "--set", "proxy.proxy_protocol.trusted=127.0.0.0/24")
	url := fmt.Sprintf("https://api.ok.test:%d/x", w.tlsPort)
	curl := func(proxy, src string, args ...string) (string, int) {
		return tool(t, "curl", append([]string{"-sS", "--max-time", "15", "--interface", src, "--cacert", w.caFile, "-x", "http://" + proxy}, args...)...)
	}

	lb := balancer(t, g.proxy, proxyHeader("127.0.1.77:40123", "vpce-08d2bf15fac5001c9"))
	if out, code := curl(lb, "127.0.0.1", url); code != 0 || !strings.HasPrefix(out, "hello from api.ok.test") {
		t.Errorf("through a load balancer: %d %s", code, out)
	}
	g.line(0, map[string]any{"event": "connect", "src": "127.0.1.77", "src_port": 40123, "group": "ci", "vpc_endpoint": "vpce-08d2bf15fac5001c9", "sni": "api.ok.test", "verdict": "allow"})

	// Another client, whom the policy does not know, behind the same address.
	lb = balancer(t, g.proxy, "PROXY TCP4 127.0.3.9 127.0.0.1 40123 3128\r\n")
	if out, code := curl(lb, "127.0.0.1", url); code == 0 {
		t.Errorf("an unknown client gets out: %s", out)
	}
	g.line(0, map[string]any{"src": "127.0.3.9", "reason": "unmatched_source", "status": 403})

	// curl's own header, which it sends before a plain request. Its address is that of
	// a load balancer here, so that the group is another.
	out, _ := curl(g.proxy, "127.0.0.1", "--haproxy-protocol", fmt.Sprintf("http://api.ok.test:%d/", w.httpPort))
	wants(t, "curl --haproxy-protocol", out, "unmatched_source", "127.0.0.1")
	if help, _ := tool(t, "curl", "--help", "all"); strings.Contains(help, "--haproxy-clientip") {
		out, code := curl(g.proxy, "127.0.0.1", "--haproxy-clientip", "127.0.1.78", fmt.Sprintf("http://api.ok.test:%d/", w.httpPort))
		if code != 0 || !strings.HasPrefix(out, "hello from") {
			t.Errorf("curl --haproxy-clientip: %d %s", code, out)
		}
		g.line(0, map[string]any{"event": "http", "src": "127.0.1.78", "group": "ci", "verdict": "allow"})
	}

	// No header from a load balancer, and one from anybody else.
	if out, code := curl(g.proxy, "127.0.0.1", url); code == 0 || strings.Contains(out, "response 4") {
		t.Errorf("no header: %d %s", code, out)
	}
	wants(t, "the event", fmt.Sprint(g.line(0, map[string]any{"src": "127.0.0.1", "reason": "bad_request", "verdict": "deny"})["error"]), "no PROXY protocol header", "proxy.proxy_protocol.trusted")
	mark := g.mark()
	if out, code := curl(g.proxy, ciSource, "--haproxy-protocol", fmt.Sprintf("http://api.ok.test:%d/", w.httpPort)); code == 0 {
		t.Errorf("a header from anybody: %s", out)
	}
	wants(t, "the event", fmt.Sprint(g.line(mark, map[string]any{"src": ciSource, "reason": "bad_request", "verdict": "deny"})["error"]), "is to send none")
	if out, code := curl(g.proxy, ciSource, url); code != 0 {
		t.Errorf("everybody else, without a header: %d %s", code, out)
	}
}

func TestLimits(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""), "--set", "proxy.limits.tunnels_per_group=2", "--set", "proxy.limits.url_bytes=512")
	echoTunnel(t, g, w, "echo.ok.test")
	e := echoTunnel(t, g, w, "echo.ok.test")
	url := fmt.Sprintf("https://api.ok.test:%d/", w.tlsPort)
	out, code := g.curl("127.0.1.2", "--cacert", w.caFile, "-v", url)
	wants(t, "a third tunnel of the group", out, "503", "Retry-After", "limit_exceeded")
	if code == 0 {
		t.Error("it gets out")
	}
	g.line(0, map[string]any{"src": "127.0.1.2", "reason": "limit_exceeded", "status": 503, "error": "proxy.limits.tunnels_per_group reached"})
	if out, code := g.curl(webSource, "--cacert", w.caFile, fmt.Sprintf("https://web.ok.test:%d/", w.tlsPort)); code != 0 {
		t.Errorf("the other group: %d %s", code, out)
	}
	e.echo(t, "the tunnels go on\n")

	out, _ = g.curl(ciSource, "-i", fmt.Sprintf("http://api.ok.test:%d/%s", w.httpPort, strings.Repeat("x", 512)))
	wants(t, "a long URL", out, "414", "bad_request")
}

// counter returns the value of a metric.
func (g *gate) counter(name string) float64 {
	g.t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindStringSubmatch(g.metrics())
	if m == nil {
		g.t.Fatalf("no metric %s", name)
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		g.t.Fatal(err)
	}
	return v
}

// TestBytesWhileTheTunnelRuns looks at the counters of bytes before the end, and
// after it, when nothing is counted twice.
func TestBytesWhileTheTunnelRuns(t *testing.T) {
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	e := echoTunnel(t, g, w, "echo.ok.test") // 13 bytes down
	text := strings.Repeat("x", 999) + "\n"
	e.echo(t, text)
	both := func() [2]float64 {
		return [2]float64{g.counter(`sallyport_bytes_total{direction="up"}`), g.counter(`sallyport_bytes_total{direction="down"}`)}
	}
	want := [2]float64{1000, 1013}
	g.until("the bytes are counted", func() bool { return both() == want }) // the relay counts after it has sent
	e.Close()
	g.line(0, map[string]any{"event": "connect", "name": "echo.ok.test", "bytes_up": 1000, "bytes_down": 1013})
	if got := both(); got != want {
		t.Errorf("after the end: %v, want %v", got, want)
	}
	if out, code := g.curl(ciSource, fmt.Sprintf("http://api.ok.test:%d/", w.httpPort)); code != 0 {
		t.Error(out)
	} else if got := both(); got[1] != want[1]+float64(len(out)) {
		t.Errorf("after %d bytes more: %v", len(out), got)
	}
}

// withDescriptors runs the program with at most n descriptors.
func withDescriptors(n int) []string {
	return []string{"sh", "-c", fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, n), binary}
}

var fresh = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// adminAnswers checks that new connections to the admin listener are served.
func (g *gate) adminAnswers() {
	g.t.Helper()
	for _, path := range []string{"/healthz", "/metrics", "/healthz", "/readyz"} {
		resp, err := fresh.Get("http://" + g.admin + path)
		if err != nil {
			g.t.Errorf("admin: %v", err)
			continue
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 {
			g.t.Errorf("admin: %s: %s", path, resp.Status)
		}
	}
}

// TestT66FewDescriptors fills a process that may have few descriptors.
func TestT66FewDescriptors(t *testing.T) {
	w := newWorld(t)
	for _, n := range []int{64, 256} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			g := startAs(t, w, withDescriptors(n), policyText(w, ""), "--set", "proxy.timeouts.request_header=1s")
			if got := g.counter("process_max_fds"); got != float64(n) {
				t.Fatalf("the limit is %v", got)
			}
			var open []net.Conn
			refused := 0
			for g.counter("sallyport_accept_pauses_total") == 0 {
				if len(open) > n {
					t.Fatal("accepting does not pause")
				}
				c := dialFrom(t, ciSource, g.proxy)
				fmt.Fprintf(c, "CONNECT echo.ok.test:%d HTTP/1.1\r\n\r\n", w.echoPort)
				resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: "CONNECT"})
				if err != nil {
					t.Fatal(err)
				}
				switch resp.StatusCode {
				case 200:
				case 503:
					refused++
				default:
					t.Fatalf("tunnel %d: %s", len(open), resp.Status)
				}
				open = append(open, c)
			}
			t.Logf("%d tunnels with %d descriptors, %d refused", len(open)-refused, n, refused)
			g.adminAnswers()
			wants(t, "the resolver", g.dig(ciSource, "api.ok.test"), "NOERROR")
			waiting := dialFrom(t, ciSource, g.proxy)
			fmt.Fprintf(waiting, "CONNECT echo.ok.test:%d HTTP/1.1\r\n\r\n", w.echoPort)
			for _, c := range open[:4] {
				c.Close()
			}
			resp, err := http.ReadResponse(bufio.NewReader(waiting), &http.Request{Method: "CONNECT"})
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("with descriptors again: %v %v", resp, err)
			}
			waiting.Close()

			// Many that say nothing: they are closed when their time is over.
			for range n {
				open = append(open, dialFrom(t, webSource, g.proxy))
			}
			g.adminAnswers()
			for _, c := range open {
				c.Close()
			}
			url := fmt.Sprintf("https://api.ok.test:%d/", w.tlsPort)
			if out, code := g.curl(ciSource, "--cacert", w.caFile, "--retry", "5", url); code != 0 {
				t.Errorf("after the flood: %d %s", code, out)
			}
			g.until("every descriptor is back", func() bool { return g.counter("sallyport_tunnels") == 0 && g.counter("process_open_fds") < 30 })
			warnings := 0
			g.mu.Lock()
			for _, l := range g.lines {
				if m, _ := l["message"].(string); strings.HasPrefix(m, "cannot accept connections") {
					warnings++
				}
			}
			g.mu.Unlock()
			if warnings != 1 {
				t.Errorf("%d warnings about one shortage", warnings)
			}
		})
	}
}

// TestT66ManyDescriptors shows that a limit that nobody will ever reach costs nothing.
func TestT66ManyDescriptors(t *testing.T) {
	w := newWorld(t)
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		t.Fatal(err)
	}
	most := int(min(r.Max, 1<<30))
	if b, err := os.ReadFile("/proc/sys/fs/nr_open"); err == nil { // where root may go further
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err == nil && exec.Command("sh", "-c", fmt.Sprintf("ulimit -n %d", n)).Run() == nil {
			most = n
		}
	}
	memory := func(n int) float64 {
		g := startAs(t, w, withDescriptors(n), policyText(w, ""))
		if got := g.counter("process_max_fds"); got != float64(n) {
			t.Fatalf("the limit is %v, want %d", got, n)
		}
		echoTunnel(t, g, w, "echo.ok.test").echo(t, "x\n")
		return g.counter("process_resident_memory_bytes")
	}
	few, many := memory(256), memory(most)
	t.Logf("%.1f MiB with 256 descriptors, %.1f MiB with %d", few/(1<<20), many/(1<<20), most)
	if many > few+(16<<20) {
		t.Errorf("%.0f bytes with %d descriptors, %.0f with 256", many, most, few)
	}
}
