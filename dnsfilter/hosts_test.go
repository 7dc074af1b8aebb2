package dnsfilter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/rs/zerolog"
)

func TestWhatIsNoFileIsNotRead(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, dir, "/dev/zero"} {
		t.Run(path, func(t *testing.T) {
			log := new(logs)
			within(t, "New", func() {
				r, err := New(Config{HostsFile: path, ResolvConf: path, Logger: zerolog.New(log)})
				if err != nil {
					t.Error(err)
					return
				}
				r.Close()
			})
			lines := log.with("open " + path + ": ")
			if len(lines) != 2 {
				t.Errorf("logged %q, want one line for each file", lines)
			}
			for _, l := range lines {
				if strings.Count(l, path) != 1 || !strings.Contains(l, "; name a regular file") {
					t.Errorf("logged %q", l)
				}
			}
		})
	}
}

func TestAFileReplacedByAPipeIsKeptAsItWas(t *testing.T) {
	now, log := newClock(), new(logs)
	path := filepath.Join(t.TempDir(), "hosts")
	writeHosts(t, path, "10.0.0.1 a.test\n")
	r := newResolver(t, Config{Now: now.now, HostsFile: path, Logger: zerolog.New(log)}, newOrigin(t))
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		now.advance(fileCheck)
		within(t, "a query", func() {
			if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 10.0.0.1"}) {
				t.Errorf("answer = %q", got)
			}
		})
	}
	if lines := log.with("hosts file"); len(lines) != 1 {
		t.Errorf("logged %q, want one line", lines)
	}
}

func TestOverLongLinesAreSkipped(t *testing.T) {
	log := new(logs)
	path := filepath.Join(t.TempDir(), "hosts")
	long := strings.Repeat(" long.test", maxHostsLine/10)
	writeHosts(t, path, "10.0.0.1 a.test\n10.0.0.2"+long+"\n10.0.0.3 c.test\r\n10.0.0.4"+long+long+"\n10.0.0.5 e.test")
	r := newResolver(t, Config{HostsFile: path, Logger: zerolog.New(log)}, newOrigin(t))
	for name, want := range map[string]string{"a.test": "A 10.0.0.1", "c.test": "A 10.0.0.3", "e.test": "A 10.0.0.5", "long.test": ""} {
		if got := strings.Join(get(t, r, name, dns.TypeA).data(), ","); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	lines := log.with(path)
	if len(lines) != 1 || !strings.Contains(lines[0], `"line":2`) || !strings.Contains(lines[0], `"skipped":2`) {
		t.Errorf("logged %q", lines)
	}
}

func TestTheHostsFileComesBeforeTheRecords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	writeHosts(t, path, "192.0.2.5 api.ok.test\n192.0.2.6 mine.test\n192.0.2.7 alias.test\n192.0.2.8 evil.test\n")
	b := start(t, Config{Decider: people, HostsFile: path, Records: []Record{
		{Name: "api.ok.test", Type: "A", Value: "192.0.2.99"},
		{Name: "mine.test", Type: "A", Value: "192.0.2.99"}, {Name: "mine.test", Type: "TXT", Value: "text"},
		{Name: "to.test", Type: "CNAME", Value: "mine.test"},
		{Name: "alias.test", Type: "CNAME", Value: "mine.test"},
		{Name: "out.test", Type: "CNAME", Value: "evil.test"},
	}}, newOrigin(t))
	for _, tt := range []struct{ name, addr, alias string }{
		{"api.ok.test", "192.0.2.5", ""}, {"mine.test", "192.0.2.6", ""}, {"to.test", "192.0.2.6", "CNAME mine.test."}, {"alias.test", "192.0.2.7", ""},
	} {
		want := []string{"A " + tt.addr}
		if tt.alias != "" {
			want = []string{tt.alias, want[0]}
		}
		wantData(t, b.ask(t, alice, "udp", question(tt.name+".", dns.TypeA)), want...)
		addrs, err := b.resolver.LookupNetIP(context.Background(), "ip", tt.name)
		if got := fmt.Sprint(addrs); got != "["+tt.addr+"]" || err != nil {
			t.Errorf("LookupNetIP(%s) = %s, %v, want what is answered over DNS", tt.name, got, err)
		}
	}
	wantData(t, b.ask(t, alice, "udp", question("mine.test.", dns.TypeTXT)), `TXT "text"`)
	// An alias to a name that only the hosts file has is decided by its own name.
	wantRcode(t, b.ask(t, alice, "udp", question("out.test.", dns.TypeA)), dns.RcodeRefused, 0)
}

func writeHosts(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestAClockSetBackHidesNoChange(t *testing.T) {
	now := newClock()
	path := filepath.Join(t.TempDir(), "hosts")
	writeHosts(t, path, "10.0.0.1 a.test\n")
	r := newResolver(t, Config{Now: now.now, HostsFile: path}, newOrigin(t))
	writeHosts(t, path, "10.0.0.1 b.test\n10.0.0.2 a.test\n")
	now.advance(-time.Hour)
	if got := get(t, r, "a.test", dns.TypeA).data(); !slices.Equal(got, []string{"A 10.0.0.2"}) {
		t.Errorf("answer = %q", got)
	}
}

// watch returns a watched of a file that is there.
func watch(t *testing.T, load func(io.Reader) error) (*watched, *clock) {
	t.Helper()
	now, path := newClock(), filepath.Join(t.TempDir(), "file")
	writeHosts(t, path, "")
	return &watched{path: path, now: now.now, load: load}, now
}

// While one loads a large file, the others go on with what was loaded before.
func TestOneWaitsForALargeFile(t *testing.T) {
	loading, release, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	w, now := watch(t, func(io.Reader) error {
		loading <- struct{}{}
		<-release
		return nil
	})
	go func() { done <- w.refresh() }()
	<-loading
	now.advance(2 * fileCheck)
	within(t, "another look", func() {
		if err := w.refresh(); err != nil {
			t.Error(err)
		}
	})
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A file that changes while there are no descriptors is read when there are some.
func TestAFileIsReadWhenThereAreDescriptorsAgain(t *testing.T) {
	short, loaded := true, 0
	w, now := watch(t, func(io.Reader) error {
		if short {
			return &fs.PathError{Op: "open", Path: "file", Err: syscall.EMFILE}
		}
		loaded++
		return nil
	})
	for i := range 3 {
		if err := w.refresh(); errors.Is(err, syscall.EMFILE) != (i == 0) {
			t.Errorf("look %d: %v; want it said once", i, err)
		}
		now.advance(fileCheck)
	}
	short = false
	for range 2 {
		if err := w.refresh(); err != nil {
			t.Error(err)
		}
		now.advance(fileCheck)
	}
	if loaded != 1 {
		t.Errorf("loaded %d times", loaded)
	}
}
