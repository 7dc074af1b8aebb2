package relay

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// peersEnv makes the test binary act as clients and origin of the tunnels under
// measurement, so that their memory is not counted. Its value is the address
// to dial.
const (
	peersEnv = "RELAY_TEST_PEERS"
	tunnels  = 2000
)

// peers dials as many clients as it accepts upstreams, sends a little through
// every tunnel, says so, and waits for the end of its input.
func peers() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(l.Addr())
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go io.Copy(c, c)
		}
	}()
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() { // one line asks for one client
		c, err := net.Dial("tcp", os.Getenv(peersEnv))
		if err != nil {
			panic(err)
		}
		defer c.Close()
		msg := make([]byte, 4<<10)
		if _, err := c.Write(msg); err != nil {
			panic(err)
		}
		if _, err := io.ReadFull(c, msg); err != nil {
			panic(err)
		}
		fmt.Println("ok")
	}
}

// idleCost opens idle tunnels and returns what each of them costs this process.
func idleCost(t testing.TB, n int) (kib, stackKiB, heapKiB, fds float64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), peersEnv+"="+l.Addr().String())
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() {
		t.Fatal("peers did not start")
	}
	origin := lines.Text()

	rss0, mem0, fds0 := footprint(t)
	var live sync.WaitGroup
	for range n {
		fmt.Fprintln(stdin)
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		u, err := net.Dial("tcp", origin)
		if err != nil {
			t.Fatal(err)
		}
		live.Go(func() {
			Relay(c, u, Options{Idle: 1 << 40})
			c.Close()
			u.Close()
		})
		if !lines.Scan() {
			t.Fatal("a tunnel carried nothing")
		}
	}
	rss1, mem1, fds1 := footprint(t)
	stdin.Close()
	live.Wait()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	per := func(a, b uint64) float64 { return (float64(b) - float64(a)) / 1024 / float64(n) }
	return per(rss0, rss1), per(mem0.StackInuse, mem1.StackInuse), per(mem0.HeapAlloc, mem1.HeapAlloc),
		float64(fds1-fds0) / float64(n)
}

// footprint returns the process's resident bytes, what the runtime knows of
// them, and the number of sockets and pipes.
func footprint(t testing.TB) (rss uint64, mem runtime.MemStats, fds int) {
	t.Helper()
	for range 3 { // pools are emptied in two steps
		debug.FreeOSMemory()
	}
	runtime.ReadMemStats(&mem)
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &rss); err == nil {
			break
		}
	}
	return rss << 10, mem, len(descriptors(t))
}

// descriptors returns the targets of the process's open sockets and pipes.
func descriptors(t testing.TB) (targets []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		target, _ := os.Readlink("/proc/self/fd/" + e.Name())
		if strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "pipe:") {
			targets = append(targets, target)
		}
	}
	return targets
}

func BenchmarkIdle(b *testing.B) {
	for b.Loop() {
		kib, stack, heap, fds := idleCost(b, tunnels)
		b.ReportMetric(kib, "KiB/tunnel")
		b.ReportMetric(stack, "stack-KiB/tunnel")
		b.ReportMetric(heap, "heap-KiB/tunnel")
		b.ReportMetric(fds, "fds/tunnel")
	}
}

// relayers are what the benchmarks compare. Relay's rivals close like it does.
var relayers = []struct {
	name  string
	relay func(client, upstream net.Conn)
}{
	{"relay", func(c, u net.Conn) { Relay(c, u, Options{Idle: time.Hour}) }},
	{"portable", func(c, u net.Conn) { Relay(wrapped{c}, wrapped{u}, Options{Idle: time.Hour}) }},
	{"iocopy", func(c, u net.Conn) {
		var up sync.WaitGroup
		up.Go(func() { io.Copy(u, c); u.(*net.TCPConn).CloseWrite() })
		io.Copy(c, u)
		c.(*net.TCPConn).CloseWrite()
		up.Wait()
	}},
}

func bench(b *testing.B, idle int, run func(b *testing.B, client, upstream net.Conn)) {
	for _, r := range relayers {
		b.Run(r.name, func(b *testing.B) {
			var running sync.WaitGroup
			tunnel := func() (client, upstream net.Conn) {
				client, c := tcpPair(b)
				u, upstream := tcpPair(b)
				running.Go(func() { r.relay(c, u); c.Close(); u.Close() })
				return client, upstream
			}
			var open []net.Conn
			for range idle {
				client, upstream := tunnel()
				client.Write([]byte("x"))
				io.ReadFull(upstream, make([]byte, 1))
				open = append(open, client, upstream)
			}
			client, upstream := tunnel()
			run(b, client, upstream)
			for _, c := range append(open, client, upstream) {
				c.Close()
			}
			running.Wait()
		})
	}
}

const bulkChunk = 1 << 20

// bulk measures a download. Its peers are as cheap as can be: the upstream uses
// sendfile(2), the client has the kernel throw away what arrives.
func bulk(b *testing.B, client, upstream net.Conn) {
	f, err := os.CreateTemp(b.TempDir(), "")
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(bulkChunk); err != nil {
		b.Fatal(err)
	}
	raw, err := client.(*net.TCPConn).SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	sink := make([]byte, bulkChunk)
	var n, left int
	discard := func(fd uintptr) bool {
		n, _, err = unix.Recvfrom(int(fd), sink[:min(left, len(sink))], unix.MSG_TRUNC)
		return err != unix.EAGAIN
	}
	go func() {
		for range b.N {
			f.Seek(0, io.SeekStart)
			upstream.(*net.TCPConn).ReadFrom(io.LimitReader(f, bulkChunk))
		}
	}()
	b.SetBytes(bulkChunk)
	b.ResetTimer()
	cpu := cpuTime(b)
	for left = b.N * bulkChunk; left > 0; left -= n {
		if rerr := raw.Read(discard); rerr != nil || err != nil || n == 0 {
			b.Fatal(n, rerr, err)
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(cpuTime(b)-cpu)/float64(b.N*bulkChunk), "cpu-s/GB")
}

// cpuTime returns what the process has used so far, its peers included, in ns.
func cpuTime(b *testing.B) int64 {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return r.Utime.Nano() + r.Stime.Nano()
}

func BenchmarkBulk(b *testing.B) { bench(b, 0, bulk) }

func BenchmarkBulkBeside300Idle(b *testing.B) { bench(b, 300, bulk) }

func BenchmarkPingPong(b *testing.B) {
	bench(b, 0, func(b *testing.B, client, upstream net.Conn) {
		go io.CopyBuffer(struct{ io.Writer }{upstream}, struct{ io.Reader }{upstream}, make([]byte, 4<<10))
		msg := make([]byte, 1<<10)
		b.ReportAllocs()
		b.ResetTimer()
		for range b.N {
			client.Write(msg)
			if _, err := io.ReadFull(client, msg); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
	})
}
