package relay

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Getenv(peersEnv) != "" {
		peers()
		return
	}
	goleak.VerifyTestMain(m)
}

func tcp(c net.Conn) net.Conn { return c }

// onSplice puts hook in the place of splice(2).
func onSplice(t *testing.T, hook func(r, w, n int) (int64, error)) {
	t.Cleanup(func() { splice = quietSplice })
	splice = func(r int, _ *int64, w int, _ *int64, n, _ int) (int64, error) { return hook(r, w, n) }
}

func kernelSplice(r, w, n int) (int64, error) {
	return quietSplice(r, nil, w, nil, n, spliceFlags)
}

// isPipe reports whether fd is a pipe's end.
func isPipe(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO
}

// download sends size bytes from the upstream to the client and compares.
func (r *rig) download(t *testing.T, size int) {
	t.Helper()
	msg := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(msg)
	go r.upstream.Write(msg)
	got := make([]byte, size)
	if _, err := io.ReadFull(r.client, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, msg) {
		t.Fatal("bytes changed on the way")
	}
}

func (r *rig) end(t *testing.T) Result {
	t.Helper()
	r.client.Close()
	r.upstream.Close()
	return r.wait(t)
}

// settle waits until no direction holds a pipe, and checks that those in the
// pool are empty.
func settle(t *testing.T) {
	t.Helper()
	eventually(t, "all pipes are back", func() bool {
		pipes.mu.Lock()
		defer pipes.mu.Unlock()
		return pipes.lent == 0
	})
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	if len(pipes.idle) > keepPipes {
		t.Errorf("%d pipes kept, want at most %d", len(pipes.idle), keepPipes)
	}
	for _, p := range pipes.idle {
		if n, err := unix.IoctlGetInt(p.r, unix.TIOCINQ); n != 0 || err != nil {
			t.Errorf("a pipe in the pool holds %d bytes, %v", n, err)
		}
	}
}

func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

func TestOnlyBulkIsSpliced(t *testing.T) {
	q := pipes.get()
	if q == nil {
		t.Skip("this user's quota of pipes is used up")
	}
	pipes.put(q, true)
	var calls atomic.Int64
	onSplice(t, func(r, w, n int) (int64, error) {
		calls.Add(1)
		return kernelSplice(r, w, n)
	})
	r := startRig(t, tcp, Options{})
	for range 100 {
		r.swap(t)
		r.download(t, bufSize/2)
	}
	if n := calls.Load(); n != 0 {
		t.Errorf("small exchanges took %d splices", n)
	}
	r.download(t, 64<<20)
	if n := calls.Load(); n == 0 {
		t.Error("a bulky stream was not spliced")
	}
	settle(t) // while the tunnel is still open
	before := calls.Load()
	for range 100 {
		r.swap(t)
	}
	if n := calls.Load() - before; n > 4*turn+lingerTries {
		t.Errorf("small exchanges after a bulky stream took %d splices", n)
	}
	r.end(t)
}

// TestUnpaced: towards a peer on this host a bulky stream is not paced, and only that.
func TestUnpaced(t *testing.T) {
	algorithm := func(c net.Conn) (name string) {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		})
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	r := startRig(t, tcp, Options{})
	for _, c := range []net.Conn{r.t, r.u} {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "bbr") })
		if err != nil {
			t.Skip("this kernel has no BBR, or not for everybody:", err)
		}
	}
	r.swap(t)
	if got := algorithm(r.t); got != "bbr" {
		t.Errorf("%s after a small exchange, want bbr", got)
	}
	r.download(t, 4<<20)
	settle(t)
	if got := algorithm(r.t); got != "reno" {
		t.Errorf("%s towards the reader of a bulky stream, want reno", got)
	}
	if got := algorithm(r.u); got != "bbr" {
		t.Errorf("%s the other way, want bbr", got)
	}
	r.end(t)
}

func TestSpliceFallback(t *testing.T) {
	const size = 16 << 20
	rng := rand.New(rand.NewPCG(1, 1))
	var mu sync.Mutex
	hooks := map[string]func(r, w, n int) (int64, error){
		"unsupported source": func(r, w, n int) (int64, error) { return 0, unix.EINVAL },
		"unsupported destination": func(r, w, n int) (int64, error) {
			if isPipe(r) {
				return 0, unix.EINVAL
			}
			return kernelSplice(r, w, n)
		},
		"interrupted and short": func(r, w, n int) (int64, error) {
			mu.Lock()
			dice := rng.IntN(8)
			n = 1 + rng.IntN(n)
			mu.Unlock()
			if dice == 0 {
				return -1, unix.EINTR
			}
			return kernelSplice(r, w, n)
		},
		"0 for urgent data": func(r, w, n int) (int64, error) {
			mu.Lock()
			dice := rng.IntN(8)
			mu.Unlock()
			if dice == 0 && isPipe(w) {
				return 0, nil
			}
			return kernelSplice(r, w, n)
		},
	}
	for name, hook := range hooks {
		t.Run(name, func(t *testing.T) {
			onSplice(t, hook)
			r := startRig(t, tcp, Options{})
			r.download(t, size)
			if res := r.end(t); res.Down != size {
				t.Errorf("Down = %d, want %d", res.Down, size)
			}
			settle(t)
		})
	}
}

// An error that splice meets is gone from the socket: read would see an end in
// good order.
func TestSpliceError(t *testing.T) {
	var failing atomic.Bool
	onSplice(t, func(r, w, n int) (int64, error) {
		if failing.Load() {
			return 0, unix.ECONNRESET
		}
		return kernelSplice(r, w, n)
	})
	r := startRig(t, tcp, Options{})
	r.download(t, 16<<20)
	failing.Store(true)
	r.upstream.Write([]byte("x"))
	if res := r.wait(t); res.End != UpstreamFailed || !errors.Is(res.Err, unix.ECONNRESET) {
		t.Errorf("Relay = %+v, want %v by %v", res, UpstreamFailed, unix.ECONNRESET)
	}
	settle(t)
}

func TestNoPipeToBeHad(t *testing.T) {
	settle(t)
	saved := pipes.idle
	pipes.idle = nil
	t.Cleanup(func() { pipes.idle, pipes.open = saved, openPipe })
	pipes.open = func(int) *pipe { return nil }
	onSplice(t, func(r, w, n int) (int64, error) {
		t.Error("spliced without a pipe")
		return 0, unix.EINVAL
	})
	r := startRig(t, tcp, Options{})
	r.download(t, 16<<20)
	r.end(t)
}

func TestPipePoolIsBounded(t *testing.T) {
	opened, capacity := 0, 0
	p := pipePool{open: func(size int) *pipe { opened++; capacity += size; return openPipe(size) }}
	var lent []*pipe
	for range maxPipes + 1 {
		if q := p.get(); q != nil {
			lent = append(lent, q)
		}
	}
	if len(lent) != maxPipes || opened != maxPipes {
		t.Errorf("%d pipes lent, %d opened, want %d", len(lent), opened, maxPipes)
	}
	if quota := 16384 * 4096; capacity > quota*3/4 {
		t.Errorf("the pipes hold %d bytes, more than three quarters of the default quota %d", capacity, quota)
	}
	unix.Write(lent[0].w, []byte("stale"))
	p.put(lent[0], false)
	for _, q := range lent[1:] {
		p.put(q, true)
	}
	if p.lent != 0 || len(p.idle) != keepPipes {
		t.Errorf("%d lent and %d idle at the end, want 0 and %d", p.lent, len(p.idle), keepPipes)
	}
	for _, q := range p.idle {
		q.close()
	}
}

// The end of a bulky stream while the reader stalls leaves bytes in a pipe.
func TestCutWithBytesInPipe(t *testing.T) {
	cuts := map[string]func(*rig){
		"cancelled":      func(r *rig) { setDeadlines(r, longAgo) },
		"client reset":   func(r *rig) { reset(r.client) },
		"upstream reset": func(r *rig) { reset(r.upstream); r.client.Close() },
	}
	for name, cut := range cuts {
		t.Run(name, func(t *testing.T) {
			r := startRig(t, tcp, Options{})
			r.download(t, 16<<20)
			fillUp(t, r.upstream)
			cut(r)
			r.wait(t)
			settle(t)
		})
	}
}

func TestUrgentData(t *testing.T) {
	r := startRig(t, tcp, Options{})
	r.download(t, 16<<20)
	raw, err := r.upstream.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	chunk := bytes.Repeat([]byte("b"), 256<<10)
	go func() {
		for range 64 {
			r.upstream.Write(chunk)
			raw.Write(func(fd uintptr) bool {
				return unix.Send(int(fd), []byte("!"), unix.MSG_OOB) != unix.EAGAIN
			})
		}
		r.upstream.Close()
	}()
	got, err := io.ReadAll(r.client)
	if n := bytes.Count(got, []byte("b")); n != 64*len(chunk) || err != nil {
		t.Errorf("%d bytes arrived, %v, want %d", n, err, 64*len(chunk))
	}
	r.end(t)
}

// A reset is noticed even on the side that nobody reads any more.
func TestResetAfterHalfClose(t *testing.T) {
	r := startRig(t, tcp, Options{})
	r.swap(t)
	closeWrite(t, r.client)
	expectEOF(t, r.upstream)
	reset(r.client)
	if res := r.wait(t); res.End != ClientClosed || res.Err == nil {
		t.Errorf("Relay = %+v, want %v and an error", res, ClientClosed)
	}
}

func TestIdleTunnelsHoldNothing(t *testing.T) {
	const n = 300
	before := len(descriptors(t))
	rigs := make([]*rig, n)
	for i := range rigs {
		rigs[i] = startRig(t, tcp, Options{Idle: time.Minute})
		rigs[i].swap(t)
	}
	if got := len(descriptors(t)) - before; got != 4*n { // two are the peers'
		t.Errorf("%d idle tunnels hold %d descriptors, want %d", n, got, 4*n)
	}
	// One bulky stream beside them.
	busy := startRig(t, tcp, Options{})
	busy.download(t, 64<<20)
	busy.end(t)
	for _, r := range rigs {
		r.swap(t)
		r.end(t)
	}
	settle(t)
	eventually(t, "all descriptors but the pool's are closed", func() bool {
		return len(descriptors(t)) <= before+2*keepPipes
	})
}

func TestManyTunnelsEndInEveryWay(t *testing.T) {
	before := len(descriptors(t))
	ends := []func(r *rig){
		func(r *rig) { r.client.Close() },
		func(r *rig) { reset(r.upstream) },
		func(r *rig) { setDeadlines(r, longAgo) },
		func(r *rig) { r.u.Close(); r.t.Close() },
	}
	rigs := make([]*rig, 12)
	var moved [12]atomic.Int64
	var peers sync.WaitGroup
	for i := range rigs {
		r := startRig(t, tcp, Options{Idle: time.Minute, Down: &moved[i]})
		for _, d := range [][2]net.Conn{{r.client, r.upstream}, {r.upstream, r.client}} {
			peers.Go(func() { send(d[0], uint64(i), 1<<40); d[0].Close() })
			peers.Go(func() { io.Copy(io.Discard, d[1]) })
		}
		rigs[i] = r
	}
	for i, r := range rigs {
		eventually(t, "bytes flow", func() bool { return moved[i].Load() > 100<<10 })
		ends[i%len(ends)](r)
		r.wait(t)
		r.client.Close()
		r.upstream.Close()
	}
	peers.Wait()
	settle(t)
	eventually(t, "all descriptors but the pool's are closed", func() bool {
		return len(descriptors(t)) <= before+2*keepPipes
	})
}

// The measurement runs in a process of its own, where nothing else has used the
// stacks and heap before.
func TestIdleCost(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector's own memory would be counted")
	}
	out, err := exec.Command(os.Args[0], "-test.run=^$", "-test.bench=^BenchmarkIdle$", "-test.benchtime=1x").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for unit, limit := range map[string]float64{"KiB/tunnel": 12, "fds/tunnel": 2} {
		m := regexp.MustCompile(`([0-9.]+) ` + unit).FindSubmatch(out)
		if m == nil {
			t.Fatalf("no %s in\n%s", unit, out)
		}
		if got, err := strconv.ParseFloat(string(m[1]), 64); err != nil || got > limit {
			t.Errorf("an idle tunnel costs %s %s, want at most %v", m[1], unit, limit)
		}
	}
}

func raceEnabled() bool {
	info, _ := debug.ReadBuildInfo()
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// TestLinger: a stream for which lingering is of no use does so now and then alone.
func TestLinger(t *testing.T) {
	q := pipes.get()
	if q == nil {
		t.Skip("this user's quota of pipes is used up")
	}
	defer pipes.put(q, true)
	var calls int
	onSplice(t, func(_, _, _ int) (int64, error) {
		calls++
		return -1, unix.EAGAIN
	})
	s := &stream{half: &half{left: 1}, pipe: q}
	for range maxVain + 2*lingerAgain {
		if s.linger(-1) {
			t.Fatal("it found something")
		}
	}
	if most := (maxVain + 3) * lingerTries; calls == 0 || calls > most {
		t.Errorf("%d calls, want %d at most", calls, most)
	}
}
