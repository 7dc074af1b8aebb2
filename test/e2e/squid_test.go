package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// squidPath finds squid, which Debian keeps where only root's PATH leads.
func squidPath(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"squid", "/usr/sbin/squid"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skip("no squid here, which Debian has in the package squid")
	return ""
}

// startSquid runs a real Squid on loopback, and returns its address and its folder.
func startSquid(t *testing.T) (addr, dir string) {
	t.Helper()
	path := squidPath(t)
	dir = t.TempDir()
	for d := dir; d != filepath.Dir(os.TempDir()) && len(d) > 1; d = filepath.Dir(d) { // as root it becomes somebody else
		if d == os.TempDir() {
			break
		}
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	l := listen(t, "127.0.0.1:0") // a port that is free, and stays so by all likelihood
	addr = l.Addr().String()
	l.Close()
	files := map[string]string{
		"hosts": originAddr + " api.ok.test a.cdn.test echo.ok.test\n",
		"squid.conf": fmt.Sprintf(`
http_port %[1]s
hosts_file %[2]s/hosts
pid_filename %[2]s/squid.pid
access_log stdio:%[2]s/access.log
cache_log %[2]s/cache.log
coredump_dir %[2]s
netdb_filename none
pinger_enable off
cache deny all
memory_cache_shared off
visible_hostname parent.test
shutdown_lifetime 0 seconds
acl forbidden dstdomain .cdn.test
http_access deny forbidden
http_access allow all
`, addr, dir),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(path, "-N", "-n", fmt.Sprintf("sallyport%d", os.Getpid()), "-f", filepath.Join(dir, "squid.conf"))
	out, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM) // it has shared memory to give back
		timeout := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		cmd.Wait()
		timeout.Stop()
		if t.Failed() {
			for _, name := range []string{"out", "cache.log", "access.log"} {
				b, _ := os.ReadFile(filepath.Join(dir, name))
				t.Logf("%s of squid: %s", name, b)
			}
		}
	})
	return addr, dir
}

// TestSquidAsParent puts the gate before a real Squid: what passes here goes through
// it, and what it refuses is told.
func TestSquidAsParent(t *testing.T) {
	parent, dir := startSquid(t)
	w := newWorld(t)
	g := start(t, w, policyText(w, ""), "--set", "proxy.parent=http://"+parent)
	g.until("squid listens", func() bool {
		c, err := net.Dial("tcp", parent)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	origin := fmt.Sprintf("api.ok.test:%d", w.tlsPort)

	t.Run("TLS down", func(t *testing.T) {
		m := g.mark()
		out, code := g.curl(ciSource, "--cacert", w.caFile, "-o", "/dev/null", "-w", "%{http_code} %{size_download}", "https://"+origin+"/big")
		if code != 0 || out != "200 8388608" {
			t.Fatalf("curl: %d %s", code, out)
		}
		l := g.line(m, map[string]any{"event": "connect", "verdict": "allow", "parent": parent, "sni": "api.ok.test"})
		if n, _ := l["bytes_down"].(float64); n < 8<<20 {
			t.Errorf("bytes_down = %v", l["bytes_down"])
		}
	})
	t.Run("TLS up", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "body")
		if err := os.WriteFile(file, make([]byte, 8<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		out, code := g.curl(ciSource, "--cacert", w.caFile, "-T", file, "https://"+origin+"/upload")
		if code != 0 || out != "8388608 bytes" {
			t.Fatalf("curl: %d %s", code, out)
		}
	})
	t.Run("plain HTTP", func(t *testing.T) {
		m := g.mark()
		out, code := g.curl(ciSource, "-o", "/dev/null", "-w", "%{http_code} %{size_download}", fmt.Sprintf("http://api.ok.test:%d/big", w.httpPort))
		if code != 0 || out != "200 8388608" {
			t.Fatalf("curl: %d %s", code, out)
		}
		g.line(m, map[string]any{"event": "http", "verdict": "allow", "parent": parent})
	})
	t.Run("refused there", func(t *testing.T) {
		m := g.mark()
		out, _ := g.curl(ciSource, "-i", fmt.Sprintf("https://a.cdn.test:%d/", w.tlsPort))
		wants(t, "curl -i", out, "HTTP/1.1 502 ", "connect_failed")
		l := g.line(m, map[string]any{"event": "connect", "reason": "connect_failed", "parent": parent})
		wants(t, "error", fmt.Sprint(l["error"]), "parent "+parent+" answers 403")
	})
	t.Run("refused here", func(t *testing.T) {
		out, _ := g.curl(ciSource, "-i", "https://other.test/")
		wants(t, "curl -i", out, "403 Forbidden by egress policy", "not_listed")
	})
	var log []byte
	g.until("squid has logged", func() bool { // a tunnel when it has ended; that of plain HTTP waits for more
		log, _ = os.ReadFile(filepath.Join(dir, "access.log"))
		return strings.Count(string(log), "TCP_TUNNEL/200") >= 2 && strings.Contains(string(log), "TCP_DENIED/403")
	})
	wants(t, "access.log", string(log), "CONNECT "+origin)
	if strings.Contains(string(log), "other.test") {
		t.Errorf("squid heard of what was refused here: %s", log)
	}
}
