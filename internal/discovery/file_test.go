package discovery

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bbolterrors "go.etcd.io/bbolt/errors"

	"sallyport/policy"
)

// reopened flushes and closes s and opens its file again.
func reopened(t *testing.T, s *Store, o Options) (*Store, *bytes.Buffer) {
	t.Helper()
	s.flush()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return openStore(t, o)
}

func samePairs(t *testing.T, got, want []Pair) {
	t.Helper()
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("pairs differ:\n got %+v\nwant %+v", got, want)
	}
}

func TestRestartKeepsEverything(t *testing.T) {
	o := Options{File: filepath.Join(t.TempDir(), "discovery.db")}
	s, _ := openStore(t, o)
	for i := range 20 {
		s.Observe(seen("many.example", from(fmt.Sprintf("10.0.0.%d", i))))
	}
	s.Observe(seen("a.example", asked("TXT")))
	s.Observe(seen("\xff\x00", decided(policy.Deny, policy.ReasonBadRequest, "")))
	s.Observe(seen("b.example", decided(policy.Deny, policy.ReasonExplicitDeny, "feed"), at(monday.Add(-48*time.Hour))))
	s.Observe(seen("b.example", decided(policy.Deny, policy.ReasonExplicitDeny, "feed")))
	want, rules, begun := pairsOf(t, s, Query{}), s.Rules(), s.Stats().Since
	recent := pairsOf(t, s, Query{Since: monday})

	again, log := reopened(t, s, o)
	samePairs(t, pairsOf(t, again, Query{}), want)
	samePairs(t, pairsOf(t, again, Query{Since: monday}), recent)
	if got := again.Rules(); fmt.Sprint(got) != fmt.Sprint(rules) || len(got) != 1 {
		t.Errorf("rules %v, want %v", got, rules)
	}
	if got := again.Stats().Since; !got.Equal(begun) {
		t.Errorf("begun %v, want %v", got, begun)
	}
	if log.Len() > 0 {
		t.Errorf("log: %s", log)
	}

	// It goes on where it was.
	again.Observe(seen("many.example", from("10.0.0.1")))
	if got := pairsOf(t, again, Query{Limit: 1, Since: monday}); got[0].Count != 21 {
		t.Errorf("after a restart %+v", got)
	}
}

// TestDays: --since counts the traffic of those days alone, with a file, without one,
// before and after days are written, and over a restart.
func TestDays(t *testing.T) {
	for _, file := range []string{"", "discovery.db"} {
		t.Run("file "+file, func(t *testing.T) {
			c := &clock{now: monday}
			o := Options{Now: c.Now}
			if file != "" {
				o.File = filepath.Join(t.TempDir(), file)
			}
			s, _ := openStore(t, o)
			day := func(n int) time.Time { return monday.AddDate(0, 0, n) }
			for n := range 5 {
				c.set(day(n))
				for range n + 1 {
					s.Observe(seen("a.example", at(day(n)), from(fmt.Sprintf("10.0.0.%d", n))))
				}
				if n != 2 || file == "" { // a day that nothing was written on
					s.flush()
				}
			}
			check := func(s *Store) {
				t.Helper()
				for n, want := range []uint64{15, 14, 12, 9, 5} {
					got := pairsOf(t, s, Query{Since: day(n)})
					if len(got) != 1 || got[0].Count != want || got[0].BytesDown != 100*want || got[0].Sources != 5-n {
						t.Errorf("since day %d: %+v, want %d times from %d sources", n, got, want, 5-n)
					}
				}
				if got := pairsOf(t, s, Query{Since: day(5)}); len(got) != 0 {
					t.Errorf("since tomorrow: %+v", got)
				}
			}
			check(s)
			if file != "" {
				s, _ = reopened(t, s, o)
				check(s)
			}
		})
	}
}

func TestRetention(t *testing.T) {
	for _, file := range []string{"", "discovery.db"} {
		t.Run("file "+file, func(t *testing.T) {
			c := &clock{now: monday}
			o := Options{Now: c.Now, Retention: 7 * 24 * time.Hour}
			if file != "" {
				o.File = filepath.Join(t.TempDir(), file)
			}
			s, _ := openStore(t, o)
			for n := range 20 {
				now := monday.AddDate(0, 0, n)
				c.set(now)
				s.Observe(seen("daily.example", at(now)))
				if n == 0 {
					s.Observe(seen("once.example", decided(policy.Allow, policy.ReasonMatched, "old-rule")))
				}
				s.flush()
			}
			if file != "" {
				s, _ = reopened(t, s, o)
			}
			got := pairsOf(t, s, Query{})
			if len(got) != 1 || got[0].Name != "daily.example" || got[0].Count != 20 {
				t.Errorf("after twenty days: %+v", got)
			}
			if got := pairsOf(t, s, Query{Since: monday.AddDate(0, 0, 1)}); got[0].Count != 8 {
				t.Errorf("of days that are gone: %+v, want those of the last eight", got)
			}
			if _, known := s.Rules()[RuleKey{"legacy", "old-rule", false}]; !known {
				t.Error("when a rule was last used is forgotten although there is room")
			}
			if st := s.Stats(); st.Evicted != 0 {
				t.Errorf("what expires is counted as lost: %+v", st)
			}
		})
	}
}

// TestEvictedPairsLeaveTheFile floods a store between writes.
func TestEvictedPairsLeaveTheFile(t *testing.T) {
	o := Options{File: filepath.Join(t.TempDir(), "discovery.db"), Entries: 300}
	s, _ := openStore(t, o)
	for i := range 3000 {
		s.Observe(seen(fmt.Sprintf("%d.flood.example", i)))
		if i%100 == 0 {
			s.flush()
		}
	}
	s.flush()
	rows := map[uint64]bool{}
	if _, err := s.file.load(func(e *entry) { rows[e.id] = true }, func(useKey, Use) {}); err != nil {
		t.Fatal(err)
	}
	days := 0
	if err := s.file.days(0, func(uint16, uint64, usage) { days++ }); err != nil {
		t.Fatal(err)
	}
	if n := s.Stats().Pairs; len(rows) != n || days != n {
		t.Errorf("%d pairs in memory, %d in the file with %d days", n, len(rows), days)
	}
}

// filled makes a file with some thousand pairs and returns its path and content.
func filled(t *testing.T) (string, []byte) {
	t.Helper()
	o := Options{File: filepath.Join(t.TempDir(), "discovery.db")}
	s, _ := openStore(t, o)
	for day := range 3 {
		for i := range 2000 {
			s.Observe(seen(fmt.Sprintf("n%d.example", i), decided(policy.Allow, policy.ReasonMatched, "r"), at(monday.AddDate(0, 0, day-3))))
		}
		s.flush()
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(o.File)
	if err != nil {
		t.Fatal(err)
	}
	return o.File, data
}

// setAsides returns the files that were renamed.
func setAsides(t *testing.T, file string) []string {
	t.Helper()
	all, err := filepath.Glob(file + ".damaged-*")
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestDamagedFileIsSetAside(t *testing.T) {
	file, good := filled(t)
	half := good[:len(good)/2]
	noise := make([]byte, len(good))
	r := rand.New(rand.NewPCG(3, 4))
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	damages := map[string][]byte{
		"text":                         []byte("this is no store\n"),
		"noise":                        noise,
		"zeros":                        make([]byte, len(good)),
		"half":                         half,
		"meta alone":                   good[:8192],
		"one page":                     good[:4096],
		"noise behind the first pages": append(bytes.Clone(good[:16384]), noise[16384:]...),
	}
	for name, data := range damages {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), filepath.Base(file))
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			s, log := openStore(t, Options{File: path})
			kept := setAsides(t, path)
			if len(kept) != 1 || !strings.Contains(log.String(), "damaged") || !strings.Contains(log.String(), kept[0]) {
				t.Fatalf("set aside: %q, log: %s", kept, log)
			}
			// The library may have written to it before it met the damage.
			if old, err := os.ReadFile(kept[0]); err != nil || len(old) < len(data) {
				t.Errorf("what was set aside has %d bytes of %d (%v)", len(old), len(data), err)
			}
			s.Observe(seen("new.example"))
			s, log = reopened(t, s, Options{File: path})
			if got := pairsOf(t, s, Query{}); len(got) != 1 || log.Len() > 0 {
				t.Errorf("the new file: %+v, log: %s", got, log)
			}
			copied := filepath.Join(t.TempDir(), "copy.db") // what was set aside may stay locked
			if err := os.WriteFile(copied, data, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenReadOnly(copied); !errors.Is(err, errDamaged) {
				t.Errorf("read-only: %v", err)
			}
			if after := setAsides(t, copied); len(after) > 0 {
				t.Error("who only reads has renamed the file")
			}
		})
	}
}

// TestFlippedBytes damages single bytes all over a file: it is taken as it was, or set
// aside; never half.
func TestFlippedBytes(t *testing.T) {
	file, good := filled(t)
	r := rand.New(rand.NewPCG(5, 6))
	aside := 0
	const rounds = 30
	for range rounds {
		bad := bytes.Clone(good)
		bad[r.IntN(len(bad))] ^= byte(1 + r.IntN(255))
		path := filepath.Join(t.TempDir(), filepath.Base(file))
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, _ := openStore(t, Options{File: path})
		s.Observe(seen("new.example"))
		s.flush() // may find more, and then begins anew
		s.Observe(seen("new.example"))
		s.flush()
		n := len(pairsOf(t, s, Query{}))
		switch kept := setAsides(t, path); {
		case len(kept) == 0 && n != 2001, len(kept) > 0 && n != 1 && n != 2001:
			t.Errorf("%d pairs, set aside %q", n, kept)
		case len(kept) > 0:
			aside++
		}
		_, _ = s.Pairs(Query{Since: monday.AddDate(0, 0, -1)}) // an error or not, but no crash
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d of %d files were set aside", aside, rounds)
	if aside == 0 {
		t.Error("no damage was noticed at all")
	}
}

// TestCutWhileOpen cuts the file short under a running process: the mapping has no pages
// behind it any more.
func TestCutWhileOpen(t *testing.T) {
	file, _ := filled(t)
	s, log := openStore(t, Options{File: file})
	if err := os.Truncate(file, 8192); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pairs(Query{Since: monday.AddDate(0, 0, -2)}); err == nil {
		t.Log("the days could still be read")
	}
	for i := range 3000 {
		s.Observe(seen(fmt.Sprintf("n%d.example", i), decided(policy.Allow, policy.ReasonMatched, "r")))
	}
	s.flush() // finds out
	s.flush() // writes everything
	if kept := setAsides(t, file); len(kept) != 1 {
		t.Fatalf("set aside: %q, log: %s", kept, log)
	}
	want := pairsOf(t, s, Query{})
	if len(want) != 3000 {
		t.Fatalf("%d pairs in memory", len(want))
	}
	s, log = reopened(t, s, Options{File: file})
	samePairs(t, pairsOf(t, s, Query{}), want)
	if log.Len() > 0 {
		t.Errorf("log: %s", log)
	}
}

// TestLockedFile: while one process has the file another uses memory, and takes the file
// over when it is free, with what both have seen.
func TestLockedFile(t *testing.T) {
	o := Options{File: filepath.Join(t.TempDir(), "discovery.db")}
	first, _ := openStore(t, o)
	first.Observe(seen("old.example"))
	first.Observe(seen("both.example", from("10.0.0.1"), at(monday.Add(-time.Hour))))
	second, log := openStore(t, o)
	if !strings.Contains(log.String(), "another process") || len(setAsides(t, o.File)) > 0 {
		t.Errorf("log: %s", log)
	}
	if _, err := OpenReadOnly(o.File); !errors.Is(err, bbolterrors.ErrTimeout) {
		t.Errorf("read-only: %v", err)
	}
	second.Observe(seen("both.example", from("10.0.0.2")))
	second.flush()
	if st := second.Stats(); st.WriteErrors == 0 || st.Writes != 0 {
		t.Errorf("%+v", st)
	}
	first.flush()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second.flush()
	second, log = reopened(t, second, o)
	got := pairsOf(t, second, Query{Since: monday})
	if len(got) != 2 || got[0].Name != "both.example" || got[0].Count != 2 || got[0].Sources != 2 || !got[0].FirstSeen.Equal(monday.Add(-time.Hour)) {
		t.Errorf("%+v", got)
	}
	if log.Len() > 0 {
		t.Errorf("log: %s", log)
	}
}

func TestNoFolder(t *testing.T) {
	s, log := openStore(t, Options{File: filepath.Join(t.TempDir(), "no", "such", "folder", "discovery.db")})
	s.Observe(seen("a.example"))
	s.flush()
	s.flush()
	if got := strings.Count(log.String(), "\n"); got != 1 || s.Stats().WriteErrors != 3 {
		t.Errorf("%d lines in the log, %+v: %s", got, s.Stats(), log)
	}
	if len(pairsOf(t, s, Query{})) != 1 {
		t.Error("nothing is kept in memory")
	}
}

// TestFullDisk bounds the size of the file instead.
func TestFullDisk(t *testing.T) {
	file := filepath.Join(t.TempDir(), "discovery.db")
	s, log := openStore(t, Options{File: file})
	s.Observe(seen("early.example"))
	s.flush()
	s.file.db.MaxSize = 64 << 10
	for i := range 5000 {
		s.Observe(seen(fmt.Sprintf("n%d.example", i)))
	}
	s.flush()
	s.flush()
	if st := s.Stats(); st.WriteErrors != 2 || strings.Count(log.String(), `"level":"warn"`) != 1 {
		t.Fatalf("%+v, log: %s", st, log)
	}
	want := pairsOf(t, s, Query{})
	if len(want) != 5001 {
		t.Fatalf("%d pairs in memory", len(want))
	}
	s.file.db.MaxSize = 0
	s.flush()
	if !strings.Contains(log.String(), "written again") {
		t.Errorf("log: %s", log)
	}
	s, log = reopened(t, s, Options{File: file})
	samePairs(t, pairsOf(t, s, Query{}), want)
	if log.Len() > 0 {
		t.Errorf("log: %s", log)
	}
}

// TestKilled kills a process in the midst of writing, several times.
func TestKilled(t *testing.T) {
	file := filepath.Join(t.TempDir(), "discovery.db")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(7, 8))
	var last uint64
	for round := range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		cmd := exec.CommandContext(ctx, exe)
		cmd.Env = append(os.Environ(), "DISCOVERY_TEST_WRITER="+file)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 3 + r.IntN(20); n > 0 && lines.Scan(); n-- { // then it is somewhere in a write
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		cancel()
		if stderr.Len() > 0 {
			t.Fatalf("round %d: %s", round, &stderr)
		}

		s, log := openStore(t, Options{File: file})
		got := pairsOf(t, s, Query{})
		if log.Len() > 0 || len(setAsides(t, file)) > 0 || len(got) != 500 {
			t.Fatalf("round %d: %d pairs, log: %s", round, len(got), log)
		}
		if got[0].Count <= last {
			t.Errorf("round %d: the most frequent pair was seen %d times, and %d in the round before", round, got[0].Count, last)
		}
		last = got[0].Count
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpenReadOnly(t *testing.T) {
	file, data := filled(t)
	s, err := OpenReadOnly(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := pairsOf(t, s, Query{Since: monday.AddDate(0, 0, -2)}); len(got) != 2000 || got[0].Count != 2 {
		t.Errorf("%d pairs, the first %+v", len(got), got[0])
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(after, data) {
		t.Errorf("the file has changed (%v)", err)
	}
	if _, err := OpenReadOnly(file + ".none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err := os.Stat(file + ".none"); !errors.Is(err, os.ErrNotExist) {
		t.Error("it is there now")
	}
}
