package eventlog

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyport/policy/event"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs w until the returned function is called, which returns Run's error.
func start(t *testing.T, w *Writer) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- w.Run(ctx) }()
	return func() error {
		cancel()
		select {
		case err := <-result:
			return err
		case <-time.After(10 * time.Second):
			t.Fatal("Run does not return")
			return nil
		}
	}
}

func open(t *testing.T, o Options) *Writer {
	t.Helper()
	w, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// pipe returns a pipe that is closed at the end of the test.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// eventually waits for ok with a bound.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

func TestEverythingIsFlushed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.log")
	w := open(t, Options{Output: path})
	stop := start(t, w)
	const n = 5000
	for i := range n {
		w.Observe(&event.Event{Kind: event.DNS, ID: fmt.Sprint(i)})
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Split(bytes.TrimSuffix(data, newline), newline)
	if len(lines) != n || w.Dropped() != 0 {
		t.Fatalf("%d lines, %d dropped; want %d, 0", len(lines), w.Dropped(), n)
	}
	for i, l := range lines {
		var m struct{ ID string }
		if err := json.Unmarshal(l, &m); err != nil || m.ID != fmt.Sprint(i) {
			t.Fatalf("line %d is %s: %v", i, l, err)
		}
	}
	if w.Observe(&event.Event{}); w.Dropped() != 1 {
		t.Errorf("a line after the end counts as %d dropped, want 1", w.Dropped())
	}
}

// Nobody reads: callers go on, the queue stays within its bound, the end is bounded too.
func TestBlockedPipe(t *testing.T) {
	r, out := pipe(t)
	w := open(t, Options{Stdout: out})
	stop := start(t, w)
	ev := &event.Event{Kind: event.Connect, Name: strings.Repeat("a", 500), UserAgent: strings.Repeat("b", 500)}
	const n = 20000
	for range n {
		w.Observe(ev) // nobody reads before this ends, so if it waited for that it would not end
	}
	if w.Dropped() == 0 {
		t.Error("nothing was dropped, so the queue has no bound")
	}
	if got := cap(w.events.pending); got > 2*maxQueueBytes {
		t.Errorf("the queue holds %d bytes, bound %d", got, maxQueueBytes)
	}
	err := stop()
	if err == nil || !strings.Contains(err.Error(), "lines lost") {
		t.Errorf("Run = %v, want an error that says what was lost", err)
	}
	// Whatever the reader finds in the pipe in the end is whole lines but for the last.
	out.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Split(data, newline)
	for _, l := range lines[:len(lines)-1] {
		if !json.Valid(l) {
			t.Errorf("not JSON: %.100s", l)
		}
	}
	if written := uint64(len(lines) - 1); written+w.Dropped() != n {
		t.Errorf("%d written and %d dropped do not make %d", written, w.Dropped(), n)
	}
}

// After a jam everything goes on, and the log says what is missing.
func TestRecovery(t *testing.T) {
	r, out := pipe(t)
	w := open(t, Options{Stdout: out, Node: "gate-1"})
	stop := start(t, w)
	ev := &event.Event{Kind: event.Connect, Name: strings.Repeat("a", 500)}
	for w.Dropped() == 0 {
		w.Observe(ev)
	}
	lost := make(chan float64, 1)
	read := make(chan error, 1)
	go func() {
		sc := bufio.NewScanner(r)
		for sc.Scan() {
			var m map[string]any
			if err := json.Unmarshal(sc.Bytes(), &m); err != nil {
				read <- fmt.Errorf("%s: %w", sc.Bytes(), err)
				return
			}
			if m["message"] == "log lines were lost" {
				lost <- m["dropped"].(float64)
			}
		}
		read <- sc.Err()
	}()
	if n := <-lost; n != 1 {
		t.Errorf("the log says %v lines were lost, want 1", n)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	out.Close()
	if err := <-read; err != nil {
		t.Error(err)
	}
}

func TestFullDisk(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("no /dev/full here")
	}
	r, stderr := pipe(t)
	w := open(t, Options{Output: "/dev/full", Stderr: stderr})
	stop := start(t, w)
	for i := range 10 {
		w.Observe(&event.Event{Kind: event.DNS})
		eventually(t, "lines dropped", func() bool { return w.Dropped() == uint64(i+1) })
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	stderr.Close()
	said, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(said, newline); n != 1 || !bytes.Contains(said, []byte("/dev/full: write /dev/full: no space left on device")) {
		t.Errorf("standard error has %d lines, want 1 that names the output:\n%s", n, said)
	}
}

// A write that fails in the middle of a line is completed later or not at all.
func TestTornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	f, err := openFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, stderr := pipe(t)
	w := open(t, Options{Output: path, Stderr: stderr})
	s := w.events
	s.torn = []byte("end\n")
	s.write([]byte("one\n"))
	s.file.Close() // now every write fails
	s.write([]byte("two\nthree\n"))
	if w.Dropped() != 2 || !s.failing {
		t.Errorf("%d dropped, failing %v; want 2, true", w.Dropped(), s.failing)
	}
	s.torn = []byte("rest of two\n")
	s.write([]byte("four\n"))
	if string(s.torn) != "rest of two\n" || w.Dropped() != 3 {
		t.Errorf("torn %q, %d dropped", s.torn, w.Dropped())
	}
	s.replace(f)
	s.write(append(s.take(nil), "five\n"...))
	if w.Dropped() != 4 {
		t.Errorf("%d dropped, want 4: the torn line has no other half in the new file", w.Dropped())
	}
	if stop := start(t, w); stop() != nil {
		t.Error("Run failed")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(data); !strings.HasPrefix(got, "end\none\nfive\n") || !strings.Contains(got, `"dropped":4`) {
		t.Errorf("the file has\n%s", got)
	}
}

func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.log")
	w := open(t, Options{Output: path})
	stop := start(t, w)
	w.Observe(&event.Event{ID: "first"})
	size := func(name string) int64 {
		fi, err := os.Stat(name)
		if err != nil {
			return 0
		}
		return fi.Size()
	}
	eventually(t, "first line", func() bool { return size(path) > 0 })
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := w.Reopen(); err != nil {
		t.Fatal(err)
	}
	w.Observe(&event.Event{ID: "second"})
	eventually(t, "second line", func() bool { return size(path) > 0 })

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := w.Reopen(); err == nil || !strings.Contains(err.Error(), "reopen log output: open "+path) {
		t.Errorf("Reopen of a directory = %v", err)
	}
	w.Observe(&event.Event{ID: "third"}) // goes to the file that is still open
	if err := stop(); err != nil {
		t.Error(err)
	}
	if w.Dropped() != 0 {
		t.Errorf("%d lines dropped", w.Dropped())
	}
	if err := w.Reopen(); err == nil {
		t.Error("Reopen of a directory worked after the end")
	}
	if err := open(t, Options{}).Reopen(); err != nil {
		t.Errorf("Reopen of stdout = %v", err)
	}
}

func TestOpenErrors(t *testing.T) {
	for _, tt := range []struct {
		o    Options
		want string
	}{
		{Options{Format: "xml"}, `log format "xml" is none of json, squid, aviatrix`},
		{Options{Level: "loud"}, `log level "loud"`},
		{Options{Output: "/nonexistent/dir/log"}, "log output: open /nonexistent/dir/log: no such file or directory"},
	} {
		if _, err := Open(tt.o); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Open(%+v) = %v, want %s", tt.o, err, tt.want)
		}
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Skipf("this file system has no named pipes: %v", err)
	}
	if _, err := Open(Options{Output: fifo}); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("Open of a named pipe without a reader = %v, want ENXIO at once", err)
	}
}

// The reader of standard output goes away: the process goes on.
func TestReaderGone(t *testing.T) {
	const child = "EVENTLOG_TEST_READER_GONE"
	if os.Getenv(child) != "" {
		w, err := Open(Options{})
		if err != nil {
			os.Exit(2)
		}
		stop := start(t, w)
		for w.Dropped() == 0 {
			w.Observe(&event.Event{Kind: event.DNS})
		}
		_ = stop()
		os.Exit(7)
	}
	r, out := pipe(t)
	r.Close()
	cmd := exec.Command(os.Args[0], "-test.run=^TestReaderGone$")
	cmd.Env = append(os.Environ(), child+"=1")
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 7 {
		t.Errorf("the process ended with %v, want exit status 7\n%s", err, stderr.Bytes())
	}
	if !strings.Contains(stderr.String(), "log output stdout: write /dev/stdout: broken pipe") {
		t.Errorf("standard error has %q", stderr.String())
	}
}

func TestMessages(t *testing.T) {
	r, out := pipe(t)
	w := open(t, Options{Stdout: out, Node: "gate-1", Level: "warn"})
	stop := start(t, w)
	log := w.Logger()
	log.Info().Msg("not important enough")
	log.Warn().Str("addr", ":53").Str("odd", "a\u2028b\x7fc\u202ed\n\x1b[31m\xff").Msg("listener")
	if err := w.SetLevel("debug"); err != nil {
		t.Fatal(err)
	}
	log.Debug().Msg("now it is")
	log.Error().Str("long", strings.Repeat("é\u2028", 20000)).Msg("too long")
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	out.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	if len(lines) != 3 {
		t.Fatalf("%d lines, want 3:\n%s", len(lines), data)
	}
	for _, l := range lines {
		checkLine(t, l+"\n")
	}
	var m map[string]any
	if err := json.Unmarshal([]byte(lines[0]), &m); err != nil {
		t.Fatal(err)
	}
	if m["level"] != "warn" || m["message"] != "listener" || m["node"] != "gate-1" || m["addr"] != ":53" || m["odd"] != "a\u2028b\x7fc\u202ed\n\x1b[31m\ufffd" {
		t.Errorf("message = %v", m)
	}
	if _, err := time.Parse("2006-01-02T15:04:05.000Z", m["time"].(string)); err != nil {
		t.Error(err)
	}
}

// What an event costs in a process that does something else between two of them, so
// that the goroutine which writes has its turn each time.
func BenchmarkWriter(b *testing.B) {
	w, err := Open(Options{Output: filepath.Join(b.TempDir(), "log"), Node: "gate-1"})
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	ev := tunnel()
	b.ReportAllocs()
	for b.Loop() {
		w.Observe(ev)
		runtime.Gosched()
	}
	b.StopTimer()
	stop()
	if err := <-done; err != nil || w.Dropped() > 0 {
		b.Errorf("%v, %d dropped", err, w.Dropped())
	}
}
