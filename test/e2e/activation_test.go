package e2e

import (
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
)

// file returns a copy of a socket's descriptor for a child.
func fileOf(t *testing.T, s interface{ File() (*os.File, error) }) *os.File {
	t.Helper()
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// activated is the command line that starts the program as a service manager does with n
// sockets.
func activated(names ...string) []string {
	script := fmt.Sprintf(`LISTEN_PID=$$ LISTEN_FDS=%d LISTEN_FDNAMES=%s exec "$0" "$@"`, len(names), strings.Join(names, ":"))
	return []string{"sh", "-c", script, binary}
}

// TestSocketActivation starts the program with sockets that are bound already, which it
// uses instead of those in its settings.
func TestSocketActivation(t *testing.T) {
	w := newWorld(t)
	var files []*os.File
	var addrs []string
	keep := func(l net.Listener) {
		addrs = append(addrs, l.Addr().String())
		files = append(files, fileOf(t, l.(*net.TCPListener)))
		l.Close()
	}
	for range 2 {
		keep(listen(t, "127.0.0.1:0"))
	}
	tcp := listen(t, "127.0.0.1:0")
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(tcp.Addr().(*net.TCPAddr).AddrPort()))
	if err != nil {
		t.Fatal(err)
	}
	keep(tcp)
	files = append(files, fileOf(t, udp))
	udp.Close()
	g := beginWith(t, w, activated("proxy", "admin", "dns", "dns"), files, policyText(w, ""))
	if got := []string{g.proxy, g.admin, g.dns}; fmt.Sprint(got) != fmt.Sprint(addrs) {
		t.Fatalf("listening on %v, want %v", got, addrs)
	}
	g.until("ready", func() bool { return g.ready().Ready })
	if out, code := g.curl(ciSource, fmt.Sprintf("http://api.ok.test:%d/x", w.httpPort)); code != 0 || !strings.HasPrefix(out, "hello") {
		t.Errorf("curl: %d %s", code, out)
	}
	for _, args := range [][]string{{"api.ok.test"}, {"+tcp", "api.ok.test"}} {
		wants(t, fmt.Sprint(args), g.dig(ciSource, args...), "status: NOERROR", originAddr)
	}
	m := g.mark()
	g.signal(syscall.SIGHUP)
	g.line(m, map[string]any{"event": "config", "what": "policy", "ok": true})
	g.mu.Lock()
	for _, l := range g.lines[m:] {
		if strings.Contains(fmt.Sprint(l["message"]), "next start only") {
			t.Errorf("what was handed over is told as a change: %v", l)
		}
	}
	g.mu.Unlock()
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", g.cmd.Process.Pid)); err != nil || !strings.Contains(string(env), "sallyport") {
		t.Errorf("the shell is still there: %q, %v", env, err)
	}
	g.signal(syscall.SIGTERM)
	if code := g.wait(); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

// Sockets that nobody has use for are an error, before anything is served.
func TestSocketActivationRefusesMistakes(t *testing.T) {
	stream := fileOf(t, listen(t, "127.0.0.1:0").(*net.TCPListener))
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	unix, err := net.ListenUnix("unix", &net.UnixAddr{Name: t.TempDir() + "/s"})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	datagrams, local := fileOf(t, udp), fileOf(t, unix)
	for _, tt := range []struct {
		names string
		file  *os.File
		want  string
	}{
		{"sallyport.socket", stream, `socket 3 is called "sallyport.socket"; in its unit write FileDescriptorName= and one of proxy`},
		{"proxy", datagrams, "socket 3 (proxy) takes datagrams"},
		{"dns", local, "socket 3 (dns) is for unix"},
		{"proxy_tls", stream, "proxy.tls.certificate"},
		{"dns_tls", stream, "dns.tls.certificate"},
		{"dns:dns", stream, "socket 4"},
	} {
		args := activated(strings.Split(tt.names, ":")...)
		out, code := toolWith(t, []*os.File{tt.file}, args[0], append(args[1:], "run")...)
		if code != 2 || !strings.Contains(out, tt.want) {
			t.Errorf("%s: %d %s, want %q", tt.names, code, out, tt.want)
		}
	}
	// Those of another process are left alone.
	out, code := toolWith(t, []*os.File{stream}, "sh", "-c", `LISTEN_PID=1 LISTEN_FDS=1 LISTEN_FDNAMES=nonsense exec "$0" run --policy /does/not/exist`, binary)
	if code != 2 || strings.Contains(out, "nonsense") {
		t.Errorf("another process's sockets: %d %s", code, out)
	}
}
