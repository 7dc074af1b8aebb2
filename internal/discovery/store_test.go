package discovery

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"sallyport/policy"
	"sallyport/policy/event"
)

func TestMain(m *testing.M) {
	if file := os.Getenv("DISCOVERY_TEST_WRITER"); file != "" {
		writeForEver(file)
	}
	goleak.VerifyTestMain(m)
}

var monday = time.Date(2026, 11, 16, 12, 0, 0, 0, time.UTC)

// seen makes an event of a TLS connection that group legacy, which observes, lets pass.
func seen(name string, change ...func(*event.Event)) *event.Event {
	ev := &event.Event{
		Time: monday, Kind: event.Connect, Protocol: policy.ProtocolTLS, Listener: "proxy", Name: name, Port: 443,
		Source: netip.MustParseAddrPort("10.30.0.1:40000"), BytesUp: 10, BytesDown: 100,
		Decision: policy.Decision{Group: "legacy", Verdict: policy.Observe, Mode: policy.ModeObserve, Reason: policy.ReasonNotListed},
	}
	for _, f := range change {
		f(ev)
	}
	return ev
}

func at(t time.Time) func(*event.Event) { return func(ev *event.Event) { ev.Time = t } }

func from(a string) func(*event.Event) {
	return func(ev *event.Event) { ev.Source = netip.AddrPortFrom(netip.MustParseAddr(a), 1) }
}

func decided(v policy.Verdict, r policy.Reason, rule string) func(*event.Event) {
	return func(ev *event.Event) {
		ev.Decision.Verdict, ev.Decision.Reason, ev.Decision.Rule = v, r, rule
		ev.Decision.Mode = policy.ModeEnforce
	}
}

func onPort(port uint16, p policy.Protocol) func(*event.Event) {
	return func(ev *event.Event) { ev.Port, ev.Protocol = port, p }
}

func asked(qtype string) func(*event.Event) {
	return func(ev *event.Event) {
		ev.Kind, ev.QType, ev.Port, ev.Protocol, ev.Listener, ev.BytesUp, ev.BytesDown = event.DNS, qtype, 0, 0, "dns", 0, 0
	}
}

// clock is a time that a test sets.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) set(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = t
}

func openStore(t *testing.T, o Options) (*Store, *bytes.Buffer) {
	t.Helper()
	log := new(bytes.Buffer)
	o.Logger = zerolog.New(zerolog.SyncWriter(log))
	if o.Now == nil {
		o.Now = func() time.Time { return monday }
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, log
}

func pairsOf(t *testing.T, s *Store, q Query) []Pair {
	t.Helper()
	ps, err := s.Pairs(q)
	if err != nil {
		t.Fatal(err)
	}
	return ps
}

func TestPairs(t *testing.T) {
	s, _ := openStore(t, Options{})
	s.Observe(seen("API.Example.com."))
	s.Observe(seen("api.example.com", from("10.30.0.2"), at(monday.Add(time.Hour))))
	s.Observe(seen("api.example.com", asked("AAAA")))
	s.Observe(seen("api.example.com", asked("TXT")))
	s.Observe(seen("b.example", decided(policy.Deny, policy.ReasonExplicitDeny, "feed")))
	s.Observe(seen("policy", func(ev *event.Event) { ev.Kind = event.Config }))
	s.Observe(seen("inside.example", onPort(80, policy.ProtocolHTTP))) // its requests have events of their own

	got := pairsOf(t, s, Query{})
	want := []Pair{
		{
			Group: "legacy", Name: "api.example.com", Port: 443, Protocol: TLS, Verdict: "observe", Reason: "not_listed",
			Listeners: []string{"proxy"}, Count: 2, BytesUp: 20, BytesDown: 200, Sources: 2, FirstSeen: monday, LastSeen: monday.Add(time.Hour),
		},
		{
			Group: "legacy", Name: "api.example.com", Protocol: DNS, Verdict: "observe", Reason: "not_listed",
			Listeners: []string{"dns"}, Count: 1, Sources: 1, FirstSeen: monday, LastSeen: monday,
		},
		{
			Group: "legacy", Name: "api.example.com", Protocol: DNS, QType: "TXT", Verdict: "observe", Reason: "not_listed",
			Listeners: []string{"dns"}, Count: 1, Sources: 1, FirstSeen: monday, LastSeen: monday,
		},
		{
			Group: "legacy", Name: "b.example", Port: 443, Protocol: TLS, Verdict: "deny", Reason: "explicit_deny", Rule: "feed",
			Listeners: []string{"proxy"}, Count: 1, BytesUp: 10, BytesDown: 100, Sources: 1, FirstSeen: monday, LastSeen: monday,
		},
	}
	if len(got) != len(want) {
		t.Fatalf("got %d pairs, want %d: %+v", len(got), len(want), got)
	}
	for i := range want {
		got[i].clients = sources{}
		if fmt.Sprintf("%+v", got[i]) != fmt.Sprintf("%+v", want[i]) {
			t.Errorf("pair %d:\n got %+v\nwant %+v", i, got[i], want[i])
		}
	}
	if got := pairsOf(t, s, Query{Verdict: "observe", MinCount: 2}); len(got) != 1 {
		t.Errorf("observed twice: %+v, want one", got)
	}
	if got := pairsOf(t, s, Query{Group: "other"}); len(got) != 0 {
		t.Errorf("of another group: %+v, want none", got)
	}
	if got := pairsOf(t, s, Query{Limit: 1}); len(got) != 1 || got[0].Count != 2 {
		t.Errorf("the most frequent: %+v", got)
	}
	if u := s.Rules()[RuleKey{"legacy", "feed", true}]; u.Hits != 1 || !u.LastUsed.Equal(monday) {
		t.Errorf("use of the rule that denied: %+v", u)
	}
}

func TestRuleUse(t *testing.T) {
	tests := []struct {
		name string
		ev   *event.Event
		hits uint64
	}{
		{"matched", seen("a.example", decided(policy.Allow, policy.ReasonMatched, "r")), 1},
		{"came closest only", seen("a.example", decided(policy.Deny, policy.ReasonPortNotAllowed, "r")), 0},
		{"matched, then unreachable", seen("a.example", decided(policy.Deny, policy.ReasonConnectFailed, "r")), 1},
		{"unreachable while observing", seen("a.example", decided(policy.Deny, policy.ReasonConnectFailed, "r"), func(ev *event.Event) {
			ev.Decision.Mode = policy.ModeObserve
		}), 0},
		{"expired", seen("a.example", decided(policy.Deny, policy.ReasonRuleExpired, "r")), 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := openStore(t, Options{})
			s.Observe(tt.ev)
			if got := s.Rules()[RuleKey{"legacy", "r", false}].Hits; got != tt.hits {
				t.Errorf("hits = %d, want %d", got, tt.hits)
			}
		})
	}
}

func TestNamesAreBounded(t *testing.T) {
	s, _ := openStore(t, Options{})
	for _, name := range []string{
		"", ".", strings.Repeat("a", 100_000), "\x00\xff\n\x1b[31m", `=cmd|' /C calc'!A0`, "bücher.example", "BÜCHER.example",
		"2001:DB8::1", "203.0.113.7", "fe80::1%eth0", strings.Repeat("é", 300), `back\slash`,
	} {
		s.Observe(seen(name))
	}
	byName := map[string]Pair{}
	for _, p := range pairsOf(t, s, Query{}) {
		byName[p.Name] = p
		if len(p.Name) > maxName || strings.ContainsFunc(p.Name, func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Errorf("name %q is remembered as it came", p.Name)
		}
	}
	for name, strange := range map[string]bool{
		"": true, ".": true, `\x00\xff\x0a\x1b[31m`: true, "xn--bcher-kva.example": false, "2001:db8::1": false,
		"203.0.113.7": false, "fe80::1%eth0": true, `back\\slash`: true,
	} {
		if p, ok := byName[name]; !ok || p.Strange != strange {
			t.Errorf("%q: known %v, strange %v, want strange %v; all: %q", name, ok, p.Strange, strange, slices.Sorted(mapsKeys(byName)))
		}
	}
	if byName["xn--bcher-kva.example"].Count != 2 {
		t.Errorf("two spellings of one name count %d", byName["xn--bcher-kva.example"].Count)
	}
}

func mapsKeys(m map[string]Pair) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func TestKnownPairsDoNotAllocate(t *testing.T) {
	s, _ := openStore(t, Options{})
	evs := []*event.Event{
		seen("api.example.com"), seen("API.example.com."), seen("203.0.113.7"), seen("a.example", asked("A")),
		seen("a.example", decided(policy.Allow, policy.ReasonMatched, ".example")),
	}
	for _, ev := range evs {
		s.Observe(ev)
	}
	if n := testing.AllocsPerRun(100, func() {
		for _, ev := range evs {
			s.Observe(ev)
		}
	}); n != 0 {
		t.Errorf("%v allocations for %d events that are known", n, len(evs))
	}
}

func TestSources(t *testing.T) {
	for _, n := range []int{0, 1, MaxExactSources, MaxExactSources + 1, 100, 10_000} {
		var s sources
		for i := range n {
			h := sourceHash(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
			s.add(h, 7)
			s.add(h, 8)
		}
		got, guess := s.count(0)
		if guess != (n > MaxExactSources) {
			t.Errorf("%d sources: estimated %v", n, guess)
		}
		// Five standard errors: the hashes are always the same, so this never changes.
		if diff := math.Abs(float64(got - n)); !guess && got != n || diff > 0.65*float64(n)+1 {
			t.Errorf("%d sources are counted as %d", n, got)
		}
	}
}

func TestSourcesOfDays(t *testing.T) {
	var s sources
	a, b := sourceHash(netip.MustParseAddr("10.0.0.1")), sourceHash(netip.MustParseAddr("2001:db8::1"))
	s.add(a, 10)
	s.add(b, 12)
	s.add(a, 11)
	for since, want := range map[uint16]int{0: 2, 11: 2, 12: 1, 13: 0} {
		if got, _ := s.count(since); got != want {
			t.Errorf("since day %d: %d sources, want %d", since, got, want)
		}
	}
}

func TestSourcesMerge(t *testing.T) {
	fill := func(first, n int) (s sources) {
		for i := range n {
			s.add(sourceHash(netip.AddrFrom4([4]byte{10, 0, byte((first + i) >> 8), byte(first + i)})), 1)
		}
		return s
	}
	for _, tt := range [][4]int{{0, 3, 2, 3}, {0, 5, 5, 5}, {0, 3, 0, 500}, {0, 500, 0, 3}, {0, 500, 400, 500}} {
		a, b := fill(tt[0], tt[1]), fill(tt[2], tt[3])
		together := a
		for i := range tt[3] {
			together.add(sourceHash(netip.AddrFrom4([4]byte{10, 0, byte((tt[2] + i) >> 8), byte(tt[2] + i)})), 1)
		}
		a.merge(&b)
		got, _ := a.count(0)
		want, _ := together.count(0)
		if got != want {
			t.Errorf("merge of %v: %d, counted together %d", tt, got, want)
		}
	}
}

// TestFloodKeepsTheRest fills the whole of a small store with what a group asked for,
// and then floods it with denied names.
func TestFloodKeepsTheRest(t *testing.T) {
	const entries = 1000
	s, _ := openStore(t, Options{Entries: entries})
	observed := s.table.keep[classObserve] * len(s.table.shards)
	for range 3 {
		for i := range observed / 2 { // hashes do not spread evenly: half of the share is safe
			s.Observe(seen(fmt.Sprintf("needed-%d.example", i)))
			s.Observe(seen(fmt.Sprintf("allowed-%d.example", i), decided(policy.Allow, policy.ReasonMatched, ".example")))
		}
	}
	const flood = 50_000
	for i := range flood {
		s.Observe(seen(fmt.Sprintf("%d.flood.example", i), decided(policy.Deny, policy.ReasonNotListed, "")))
	}
	for _, verdict := range []string{"observe", "allow"} {
		if got := len(pairsOf(t, s, Query{Verdict: verdict})); got != observed/2 {
			t.Errorf("%d pairs with %s are left of %d", got, verdict, observed/2)
		}
	}
	st := s.Stats()
	if st.Pairs > entries {
		t.Errorf("%d pairs, bound %d", st.Pairs, entries)
	}
	denied := pairsOf(t, s, Query{Verdict: "deny"})
	if got := st.Evicted + uint64(len(denied)); got != flood {
		t.Errorf("%d pairs of the flood are remembered or counted as lost, want %d", got, flood)
	}
	if st.EvictedHits != st.Evicted {
		t.Errorf("%d pairs lost had %d hits, want one each", st.Evicted, st.EvictedHits)
	}
}

// TestFrequentNamesSurvive: among denials too, what is asked for again and again stays.
func TestFrequentNamesSurvive(t *testing.T) {
	s, _ := openStore(t, Options{Entries: 500})
	deny := decided(policy.Deny, policy.ReasonNotListed, "")
	for i := range 20_000 {
		s.Observe(seen(fmt.Sprintf("%d.flood.example", i), deny))
		if i%10 == 0 {
			s.Observe(seen("wanted.example", deny))
		}
	}
	if got := pairsOf(t, s, Query{Limit: 1}); got[0].Name != "wanted.example" || got[0].Count < 1900 {
		t.Errorf("the most frequent name is %+v", got[0])
	}
}

// TestTable holds the table against a plain map, with random churn.
func TestTable(t *testing.T) {
	s, _ := openStore(t, Options{Entries: 3000})
	r := rand.New(rand.NewPCG(1, 2))
	for range 30_000 {
		s.Observe(seen(fmt.Sprintf("n%d.example", r.IntN(6000)), func(ev *event.Event) {
			ev.Decision.Verdict = policy.Verdict(r.IntN(3))
		}))
		if r.IntN(1000) == 0 {
			s.table.expire(0)
		}
	}
	n := 0
	for i := range s.table.shards {
		sh := &s.table.shards[i]
		inIndex := 0
		for h, e := range sh.index {
			for ; e != nil; e = e.next {
				inIndex++
				if e.hash != h || sh.byClass[e.class()][e.place] != e || e.gone {
					t.Fatalf("entry %+v is not where it says", e)
				}
			}
		}
		inClasses := 0
		for _, all := range sh.byClass {
			inClasses += len(all)
		}
		if inIndex != inClasses || inIndex > s.table.room {
			t.Fatalf("shard %d: %d in the index, %d in classes, room %d", i, inIndex, inClasses, s.table.room)
		}
		n += inIndex
	}
	st := s.Stats()
	if st.Pairs != n || st.Evicted == 0 {
		t.Errorf("%d pairs, counted %d, evicted %d", st.Pairs, n, st.Evicted)
	}
}

func TestConcurrency(t *testing.T) {
	file := filepath.Join(t.TempDir(), "discovery.db")
	s, _ := openStore(t, Options{Entries: 2000, File: file, Interval: time.Millisecond})
	ctx, stop := context.WithCancel(context.Background())
	var run, wg sync.WaitGroup
	run.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	const each, workers = 4000, 4
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				s.Observe(seen(fmt.Sprintf("n%d.example", i%3000), decided(policy.Allow, policy.ReasonMatched, "r"),
					from(fmt.Sprintf("10.0.%d.%d", w, i%200)), at(monday.Add(time.Duration(i)*time.Minute))))
				if i%500 == 0 {
					pairsOf(t, s, Query{Since: monday})
					s.Rules()
					s.Stats()
				}
			}
		})
	}
	wg.Wait()
	stop()
	run.Wait()
	if got := s.Rules()[RuleKey{"legacy", "r", false}].Hits; got != each*workers {
		t.Errorf("the rule was used %d times, want %d", got, each*workers)
	}
	again, log := openStore(t, Options{Entries: 2000, File: file})
	if log.Len() > 0 {
		t.Errorf("log: %s", log)
	}
	if got := again.Rules()[RuleKey{"legacy", "r", false}].Hits; got != each*workers {
		t.Errorf("after a restart the rule was used %d times, want %d", got, each*workers)
	}
	if a, b := pairsOf(t, s, Query{}), pairsOf(t, again, Query{}); len(a) != len(b) {
		t.Errorf("%d pairs, after a restart %d", len(a), len(b))
	}
}

// writeForEver is what a process of its own does until it is killed.
func writeForEver(file string) {
	s, err := Open(Options{File: file, Logger: zerolog.New(os.Stderr)})
	if err != nil {
		panic(err)
	}
	for round := 0; ; round++ {
		for i := range 500 {
			s.Observe(seen(fmt.Sprintf("n%d.example", i), decided(policy.Allow, policy.ReasonMatched, "r"), at(monday.Add(time.Duration(round)*time.Hour))))
		}
		s.flush()
		fmt.Println("written", round)
	}
}
