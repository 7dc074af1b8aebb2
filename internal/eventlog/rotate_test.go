package eventlog

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"sallyport/policy/event"
)

// readAside returns the lines of path and of what was put aside, oldest first.
func readAside(t *testing.T, path string, keep int) (lines []string) {
	t.Helper()
	for n := keep; n >= 0; n-- {
		name := path
		if n > 0 {
			name += "." + strconv.Itoa(n)
		}
		b, err := os.ReadFile(name)
		if z, zerr := os.Open(name + ".gz"); zerr == nil {
			if err == nil {
				t.Errorf("%s is there twice", name)
			}
			r, gerr := gzip.NewReader(z)
			if gerr != nil {
				t.Fatal(gerr)
			}
			b, err = io.ReadAll(r)
			z.Close()
		}
		if os.IsNotExist(err) {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		if len(b) > 0 && b[len(b)-1] != '\n' {
			t.Errorf("%s ends within a line", name)
		}
		lines = append(lines, strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")...)
	}
	return lines
}

// Nothing is lost, doubled or out of order at the turn.
func TestRotation(t *testing.T) {
	for _, squeeze := range []bool{false, true} {
		t.Run(fmt.Sprintf("compress %v", squeeze), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "log")
			w := open(t, Options{Output: path, Rotate: Rotate{Size: 4 << 10, Keep: 1000, Compress: squeeze}})
			stop := start(t, w)
			const n = 3000
			for i := range n {
				w.Observe(&event.Event{Kind: event.Connect, ID: fmt.Sprint(i)})
				if i%100 == 0 { // otherwise all are written at once
					eventually(t, "a write", func() bool { w.events.mu.Lock(); defer w.events.mu.Unlock(); return w.events.lines == 0 })
				}
				if i == n/2 {
					if err := w.Reopen(); err != nil {
						t.Error(err)
					}
				}
			}
			if err := stop(); err != nil || w.Dropped() != 0 {
				t.Fatalf("%v, %d dropped", err, w.Dropped())
			}
			lines := readAside(t, path, 1000)
			for i, l := range lines {
				var m struct{ ID string }
				if err := json.Unmarshal([]byte(l), &m); err != nil || m.ID != fmt.Sprint(i) {
					t.Fatalf("line %d is %s: %v", i, l, err)
				}
			}
			if len(lines) != n {
				t.Errorf("%d lines, want %d", len(lines), n)
			}
			if _, err := os.Stat(path + ".1"); err != nil && !squeeze {
				t.Errorf("nothing was put aside: %v", err)
			}
			if parts, _ := filepath.Glob(path + "*.part"); len(parts) > 0 {
				t.Errorf("left behind: %v", parts)
			}
		})
	}
}

func TestRotationKeeps(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w := open(t, Options{Output: path, Rotate: Rotate{Size: 100, Keep: 2}})
	s := w.events
	for i := range 6 {
		s.send([]byte(strings.Repeat(strconv.Itoa(i), 59) + "\n"))
	}
	for name, want := range map[string]string{"": "5", ".1": "4", ".2": "3", ".3": ""} {
		b, err := os.ReadFile(path + name)
		if want == "" && os.IsNotExist(err) {
			continue
		}
		if err != nil || !bytes.HasPrefix(b, []byte(want)) {
			t.Errorf("%s has %q, %v; want %s", name, b, err, want)
		}
	}
	// Somebody else moves the file: it is not ours to put aside.
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	s.send([]byte(strings.Repeat("6", 59) + "\n"))
	if b, err := os.ReadFile(path + ".1"); err != nil || !bytes.HasPrefix(b, []byte("4")) {
		t.Errorf(".1 has %q, %v; want what it had", b, err)
	}
	if b, err := os.ReadFile(path); err != nil || !bytes.HasPrefix(b, []byte("6")) {
		t.Errorf("the file has %q, %v", b, err)
	}
	s.close()
}

// Where no file can be put aside the log goes on in the one there is, and says so.
func TestRotationFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	w := open(t, Options{Output: path, Rotate: Rotate{Size: 100, Keep: 1}})
	if err := os.MkdirAll(path+".1/full", 0o700); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		w.events.send([]byte(strings.Repeat("x", 59) + "\n"))
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != 180 {
		t.Errorf("%v, %v", fi, err)
	}
	if stop := start(t, w); stop() != nil {
		t.Error("Run failed")
	}
	b, err := os.ReadFile(path)
	if err != nil || !bytes.Contains(b, []byte("the log goes on in the same file")) {
		t.Errorf("%s, %v", b, err)
	}
}

// The end does not wait for a large file to be compressed, and loses nothing of it.
func TestCompressCutShort(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.1")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := gzipFile(ctx, path); err == nil {
		t.Error("compressed though it was to end")
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != 1<<20 {
		t.Errorf("%v, %v", fi, err)
	}
	if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
