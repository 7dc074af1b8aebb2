package relay

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// patience bounds every wait for something that must happen.
const patience = 20 * time.Second

// tcpPair returns the two ends of a loopback connection, closed with the test.
func tcpPair(t testing.TB) (dialled, accepted *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// A rig is a running tunnel with both of its peers in hand.
type rig struct {
	t                net.Conn // the tunnel's end towards the client
	u                net.Conn // the tunnel's end towards the upstream
	client, upstream net.Conn // the peers
	result           chan Result
}

// wrapped hides the type of a TCP connection, so that it is copied the
// portable way.
type wrapped struct{ net.Conn }

func (w wrapped) CloseWrite() error { return w.Conn.(*net.TCPConn).CloseWrite() }

// plain is wrapped without half-close.
type plain struct{ net.Conn }

// ways are the ways to move bytes between TCP connections.
var ways = map[string]func(net.Conn) net.Conn{
	"tcp":      func(c net.Conn) net.Conn { return c },
	"portable": func(c net.Conn) net.Conn { return wrapped{c} },
}

// eachWay runs a test for all of them. start begins the relaying.
func eachWay(t *testing.T, test func(t *testing.T, start func(Options) *rig)) {
	for name, wrap := range ways {
		t.Run(name, func(t *testing.T) {
			test(t, func(o Options) *rig { return startRig(t, wrap, o) })
		})
	}
}

func startRig(t testing.TB, wrap func(net.Conn) net.Conn, o Options) *rig {
	t.Helper()
	client, c := tcpPair(t)
	u, upstream := tcpPair(t)
	for _, p := range []net.Conn{client, upstream} {
		p.SetDeadline(time.Now().Add(patience))
	}
	return relayed(client, wrap(c), wrap(u), upstream, o)
}

func relayed(client, c, u, upstream net.Conn, o Options) *rig {
	r := &rig{t: c, u: u, client: client, upstream: upstream, result: make(chan Result, 1)}
	go func() {
		res := Relay(c, u, o)
		c.Close()
		u.Close()
		r.result <- res
	}()
	return r
}

// wait returns how the tunnel ended.
func (r *rig) wait(t testing.TB) Result {
	t.Helper()
	select {
	case res := <-r.result:
		return res
	case <-time.After(patience):
		t.Fatal("the tunnel did not end")
		return Result{}
	}
}

// swap sends a message each way.
func (r *rig) swap(t testing.TB) {
	t.Helper()
	for _, d := range [][2]net.Conn{{r.client, r.upstream}, {r.upstream, r.client}} {
		if _, err := d[0].Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(d[1], make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
	}
}

func closeWrite(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
}

func reset(c net.Conn) {
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

// expectEOF fails the test if c has something else to read than an end.
func expectEOF(t testing.TB, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("Read = %d, %v, want EOF", n, err)
	}
}

// send writes about size random bytes in chunks of random sizes, some of them
// larger than any buffer and some with a pause behind, and returns their sum.
func send(w io.Writer, seed uint64, size int) (sum []byte, n int64, err error) {
	rng := rand.New(rand.NewPCG(seed, 1))
	src := rand.NewChaCha8([32]byte{byte(seed)})
	h := sha256.New()
	buf := make([]byte, 600<<10)
	for int(n) < size {
		chunk := buf[:1+rng.IntN(1<<(1+rng.IntN(19)))]
		src.Read(chunk)
		h.Write(chunk)
		m, err := w.Write(chunk)
		n += int64(m)
		if err != nil {
			return nil, n, err
		}
		if rng.IntN(8) == 0 {
			time.Sleep(time.Duration(rng.IntN(300)) * time.Microsecond) // pace: lets the relay run dry
		}
	}
	return h.Sum(nil), n, nil
}

// receive reads to the end in pieces of random sizes.
func receive(r io.Reader, seed uint64) (sum []byte, n int64, err error) {
	rng := rand.New(rand.NewPCG(seed, 2))
	var h hash.Hash = sha256.New()
	buf := make([]byte, 600<<10)
	for {
		m, err := r.Read(buf[:1+rng.IntN(1<<(1+rng.IntN(19)))])
		h.Write(buf[:m])
		n += int64(m)
		if err == io.EOF {
			return h.Sum(nil), n, nil
		}
		if err != nil {
			return nil, n, err
		}
	}
}

func TestRandomSizesBothWays(t *testing.T) {
	eachWay(t, func(t *testing.T, start func(Options) *rig) {
		var up, down atomic.Int64
		r := start(Options{Idle: time.Minute, Up: &up, Down: &down})
		const size = 24 << 20
		var sums [4][]byte
		var counts [4]int64
		var errs [4]error
		var g sync.WaitGroup
		g.Go(func() { sums[0], counts[0], errs[0] = send(r.client, 1, size); closeWrite(t, r.client) })
		g.Go(func() { sums[1], counts[1], errs[1] = receive(r.upstream, 2) })
		g.Go(func() { sums[2], counts[2], errs[2] = send(r.upstream, 3, size); closeWrite(t, r.upstream) })
		g.Go(func() { sums[3], counts[3], errs[3] = receive(r.client, 4) })
		g.Wait()
		if err := errors.Join(errs[:]...); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(sums[0], sums[1]) || !bytes.Equal(sums[2], sums[3]) {
			t.Errorf("checksums differ: sent %d and %d bytes, received %d and %d", counts[0], counts[2], counts[1], counts[3])
		}
		res := r.wait(t)
		if res.Up != counts[0] || res.Down != counts[2] || res.Err != nil {
			t.Errorf("Relay = %+v, want Up %d, Down %d", res, counts[0], counts[2])
		}
		if up.Load() != res.Up || down.Load() != res.Down {
			t.Errorf("counters = %d, %d, want those of %+v", up.Load(), down.Load(), res)
		}
	})
}

func TestHalfClose(t *testing.T) {
	eachWay(t, func(t *testing.T, start func(Options) *rig) {
		for _, first := range []End{ClientClosed, UpstreamClosed} {
			r := start(Options{})
			r.swap(t)
			a, b := r.client, r.upstream
			if first == UpstreamClosed {
				a, b = b, a
			}
			closeWrite(t, a)
			expectEOF(t, b)
			// The other direction lives on, past many chunks.
			msg := bytes.Repeat([]byte("late"), 1<<20)
			go func() { b.Write(msg); b.Close() }()
			got, err := io.ReadAll(a)
			if err != nil || !bytes.Equal(got, msg) {
				t.Errorf("%v: %d bytes after half-close, %v, want %d", first, len(got), err, len(msg))
			}
			if res := r.wait(t); res.End != first || res.Err != nil || res.Up+res.Down != int64(10+len(msg)) {
				t.Errorf("Relay = %+v, want %v", res, first)
			}
		}
	})
}

func TestReset(t *testing.T) {
	eachWay(t, func(t *testing.T, start func(Options) *rig) {
		for _, want := range []End{ClientFailed, UpstreamFailed} {
			r := start(Options{})
			r.swap(t)
			a, b := r.client, r.upstream
			if want == UpstreamFailed {
				a, b = b, a
			}
			reset(a)
			if res := r.wait(t); res.End != want || res.Err == nil {
				t.Errorf("Relay = %+v, want %v", res, want)
			}
			if _, err := b.Read(make([]byte, 1)); err == nil {
				t.Error("the other side still reads")
			}
		}
	})
}

// A client that sends its last words and closes without reading what has come
// for it resets the connection. The words must arrive all the same.
func TestLastWordsBeforeReset(t *testing.T) {
	eachWay(t, func(t *testing.T, start func(Options) *rig) {
		r := start(Options{})
		r.swap(t)
		r.upstream.Write([]byte("unread"))
		io.ReadFull(r.client, make([]byte, 1))
		msg := bytes.Repeat([]byte("last"), 4<<10)
		r.client.Write(msg)
		r.client.Close()
		got, _ := io.ReadAll(r.upstream)
		if !bytes.Equal(got, msg) {
			t.Errorf("%d bytes arrived, want %d", len(got), len(msg))
		}
		r.upstream.Close()
		r.wait(t)
	})
}

func TestIdle(t *testing.T) {
	const idle = 150 * time.Millisecond
	eachWay(t, func(t *testing.T, start func(Options) *rig) {
		expect := func(what string, r *rig) {
			t.Helper()
			began := time.Now()
			if res := r.wait(t); res.End != IdleTimeout || res.Err != nil {
				t.Errorf("%s: Relay = %+v, want %v", what, res, IdleTimeout)
			}
			if took := time.Since(began); took < idle/2 {
				t.Errorf("%s: ended after %v", what, took)
			}
		}
		r := start(Options{Idle: idle})
		expect("silent from the start", r)

		r = start(Options{Idle: idle})
		r.swap(t)
		expect("silent after an exchange", r)

		r = start(Options{Idle: idle})
		r.swap(t)
		closeWrite(t, r.client)
		expectEOF(t, r.upstream)
		expect("half-closed", r)

		r = start(Options{Idle: idle})
		r.upstream.SetWriteDeadline(time.Now().Add(patience))
		go func() { // ends when the tunnel does
			for {
				if _, err := r.upstream.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}()
		expect("client that does not read", r)
	})
}

// Bytes in one direction keep the tunnel open, however silent the other is.
func TestOneDirectionCountsAsActivity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRig(Options{Idle: time.Minute})
		for range 10 {
			time.Sleep(59 * time.Second)
			r.client.Write([]byte("x"))
			io.ReadFull(r.upstream, make([]byte, 1))
		}
		began := time.Now()
		if res := <-r.result; res.End != IdleTimeout || res.Up != 10 {
			t.Errorf("Relay = %+v, want %v", res, IdleTimeout)
		}
		if took := time.Since(began); took != time.Minute {
			t.Errorf("idle for %v, want 1m", took)
		}
	})
}

func pipeRig(o Options) *rig {
	client, c := net.Pipe()
	u, upstream := net.Pipe()
	return relayed(client, c, u, upstream, o)
}

func TestInMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRig(Options{})
		r.swap(t)
		r.client.Close() // a net.Pipe has no half-close: this ends all
		expectEOF(t, r.upstream)
		if res := <-r.result; res != (Result{Up: 5, Down: 5, End: ClientClosed}) {
			t.Errorf("Relay = %+v", res)
		}

		r = pipeRig(Options{Idle: time.Hour})
		go r.client.Write(make([]byte, 100)) // nobody reads it
		began := time.Now()
		if res := <-r.result; res.End != IdleTimeout || res.Up != 0 {
			t.Errorf("Relay = %+v, want %v", res, IdleTimeout)
		}
		if took := time.Since(began); took != time.Hour {
			t.Errorf("a stalled writer idled for %v, want 1h", took)
		}
	})
}

// mute refuses all bytes, but never ends its own stream.
type mute struct{ net.Conn }

func (mute) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestDeadConnectionIsGivenUp(t *testing.T) {
	for _, idle := range []time.Duration{0, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			client, c := net.Pipe()
			u, upstream := net.Pipe()
			r := relayed(client, mute{c}, u, upstream, Options{Idle: idle})
			began := time.Now()
			upstream.Write([]byte("x"))
			client.Write([]byte("last words"))
			io.ReadFull(upstream, make([]byte, 10))
			res := <-r.result
			if res.End != ClientFailed || !errors.Is(res.Err, io.ErrClosedPipe) || res.Up != 10 {
				t.Errorf("Relay = %+v, want %v", res, ClientFailed)
			}
			if took := time.Since(began); took != lastBytes {
				t.Errorf("ended after %v, want %v", took, lastBytes)
			}
			client.Close()
			upstream.Close()
		})
	}
}

func TestNoHalfCloseEndsBoth(t *testing.T) {
	client, c := tcpPair(t)
	u, upstream := tcpPair(t)
	r := relayed(client, c, plain{u}, upstream, Options{})
	r.swap(t)
	closeWrite(t, client)
	if res := r.wait(t); res != (Result{Up: 5, Down: 5, End: ClientClosed}) {
		t.Errorf("Relay = %+v", res)
	}
	expectEOF(t, upstream)
}

func TestCancel(t *testing.T) {
	cancel := map[string]func(*rig){
		"close":            func(r *rig) { r.t.Close(); r.u.Close() },
		"deadline passed":  func(r *rig) { setDeadlines(r, time.Unix(1, 0)) },
		"deadline to come": func(r *rig) { setDeadlines(r, time.Now().Add(20*time.Millisecond)) },
	}
	state := map[string]func(*testing.T, *rig){
		"idle":        func(t *testing.T, r *rig) { r.swap(t) },
		"half-closed": func(t *testing.T, r *rig) { r.swap(t); closeWrite(t, r.client); expectEOF(t, r.upstream) },
		"stalled":     func(t *testing.T, r *rig) { fillUp(t, r.upstream) },
		"busy": func(t *testing.T, r *rig) {
			go send(r.upstream, 1, 1<<40)
			go io.Copy(io.Discard, r.client)
		},
	}
	eachWay(t, func(t *testing.T, start func(Options) *rig) {
		for was, prepare := range state {
			for how, cancel := range cancel {
				r := start(Options{Idle: time.Hour})
				prepare(t, r)
				cancel(r)
				res := r.wait(t)
				if res.End != Cancelled || res.Err != nil {
					t.Errorf("%s, %s: Relay = %+v, want %v", was, how, res, Cancelled)
				}
				r.client.Close()
				r.upstream.Close()
			}
		}
	})
}

func setDeadlines(r *rig, at time.Time) {
	r.t.SetDeadline(at)
	r.u.SetDeadline(at)
}

// fillUp writes to c until nothing more fits.
func fillUp(t testing.TB, c net.Conn) {
	t.Helper()
	for {
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.Write(make([]byte, 1<<20)); err != nil {
			return
		}
	}
}

// A reader that was away for a while gets every byte.
func TestStalledReaderLosesNothing(t *testing.T) {
	eachWay(t, func(t *testing.T, start func(Options) *rig) {
		r := start(Options{Idle: time.Minute})
		type sent struct {
			sum []byte
			n   int64
		}
		stalled, done := make(chan struct{}), make(chan sent, 1)
		go func() {
			h := sha256.New()
			w := io.MultiWriter(h, &stallWriter{c: r.upstream, stalled: stalled})
			_, n, err := send(w, 7, 40<<20)
			if err != nil {
				t.Error(err)
			}
			closeWrite(t, r.upstream)
			done <- sent{h.Sum(nil), n}
		}()
		<-stalled
		sum, n, err := receive(r.client, 8)
		if err != nil {
			t.Fatal(err)
		}
		want := <-done
		if n != want.n || !bytes.Equal(sum, want.sum) {
			t.Errorf("received %d bytes, want %d, or their sums differ", n, want.n)
		}
		closeWrite(t, r.client)
		if res := r.wait(t); res.End != UpstreamClosed || res.Down != n {
			t.Errorf("Relay = %+v, want %v and Down %d", res, UpstreamClosed, n)
		}
	})
}

// stallWriter closes stalled when c takes nothing for a while, and then waits
// for as long as it takes.
type stallWriter struct {
	c       net.Conn
	stalled chan struct{}
	seen    bool
}

func (s *stallWriter) Write(p []byte) (n int, err error) {
	if !s.seen {
		s.c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		n, err = s.c.Write(p)
		if err == nil {
			return n, nil
		}
		s.seen = true
		close(s.stalled)
		s.c.SetWriteDeadline(time.Now().Add(patience))
	}
	m, err := s.c.Write(p[n:])
	return n + m, err
}

func TestEndStrings(t *testing.T) {
	want := map[End]string{
		0: "unknown", ClientClosed: "client_closed", UpstreamClosed: "upstream_closed", ClientFailed: "client_failed",
		UpstreamFailed: "upstream_failed", IdleTimeout: "idle_timeout", Cancelled: "cancelled",
	}
	for e, s := range want {
		if e.String() != s {
			t.Errorf("End(%d) = %q, want %q", e, e, s)
		}
	}
}

// faulty panics when it is read.
type faulty struct{ net.Conn }

func (faulty) Read([]byte) (int, error) { panic("a mistake") }

// A panic in either direction reaches the caller, who can recover.
func TestPanicReachesTheCaller(t *testing.T) {
	for name, broken := range map[string]func(a, b net.Conn) (client, upstream net.Conn){
		"up":   func(a, b net.Conn) (net.Conn, net.Conn) { return faulty{a}, b },
		"down": func(a, b net.Conn) (net.Conn, net.Conn) { return a, faulty{b} },
	} {
		a, farA := net.Pipe()
		b, farB := net.Pipe()
		if name == "down" { // which is the caller's own: the other direction ends as its client goes
			farA.Close()
		}
		func() {
			defer func() {
				if p := recover(); p != "a mistake" {
					t.Errorf("%s: recovered %v", name, p)
				}
			}()
			client, upstream := broken(a, b)
			Relay(client, upstream, Options{})
		}()
		for _, c := range []net.Conn{a, b, farA, farB} {
			c.Close()
		}
	}
}
