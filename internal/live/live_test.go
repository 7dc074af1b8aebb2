package live

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"go.uber.org/goleak"

	"sallyport/policy"
	"sallyport/policy/event"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func sample(name string) *event.Event {
	return &event.Event{
		Time: time.Unix(1_900_000_000, 0), Kind: event.Connect, ID: "c1", Source: netip.MustParseAddrPort("10.1.2.3:4567"),
		Listener: "proxy", Method: "CONNECT", Name: name, Port: 443, SNI: name,
		Decision:    policy.Decision{Verdict: policy.Allow, Reason: policy.ReasonMatched, Rule: ".ok.test", Group: "ci", Revision: "0123456789ab"},
		Destination: netip.MustParseAddrPort("192.0.2.1:443"), Status: 200, BytesUp: 10, BytesDown: 20, Duration: 1500 * time.Microsecond, User: "anna",
	}
}

func denied(name string) *event.Event {
	ev := sample(name)
	ev.Decision.Verdict, ev.Decision.Reason, ev.Decision.Rule = policy.Deny, policy.ReasonNotListed, ""
	return ev
}

func TestRecent(t *testing.T) {
	r := NewRing()
	if got := r.Recent(Filter{}, 10); got == nil || len(got) != 0 {
		t.Errorf("of nothing: %v", got)
	}
	r.Observe(sample("a.ok.test"))
	r.Observe(&event.Event{Kind: event.Config, Name: "policy"})
	r.Observe(denied("B.evil.test"))
	r.Observe(sample("c.ok.test"))
	got := r.Recent(Filter{}, 2)
	if len(got) != 2 || got[0].Name != "c.ok.test" || got[1].Name != "B.evil.test" || got[0].Seq != 3 {
		t.Fatalf("%+v", got)
	}
	want := Decision{
		Seq: 3, Time: time.Unix(1_900_000_000, 0).UTC(), Event: "connect", ID: "c1", Src: "10.1.2.3", SrcPort: 4567, Group: "ci", User: "anna", Mode: "enforce",
		Listener: "proxy", Method: "CONNECT", Name: "c.ok.test", Port: 443, SNI: "c.ok.test", Verdict: "allow", Reason: "matched",
		Rule: ".ok.test", Policy: "0123456789ab", Dst: "192.0.2.1", Status: 200, BytesUp: 10, BytesDown: 20, DurationMS: 1.5,
	}
	if got[0] != want {
		t.Errorf("%+v\nwant %+v", got[0], want)
	}
	for _, tt := range []struct {
		f    Filter
		want int
	}{
		{Filter{Verdict: "deny"}, 1}, {Filter{Verdict: "allow"}, 2}, {Filter{Reason: "not_listed"}, 1}, {Filter{Group: "ci"}, 3},
		{Filter{Group: "c"}, 0}, {Filter{Listener: "proxy"}, 3}, {Filter{Listener: "dns"}, 0}, {Filter{Name: "OK.test"}, 2},
		{Filter{Name: "b.EVIL"}, 1}, {Filter{Name: "a.ok.test."}, 0}, {Filter{Verdict: "deny", Name: "ok"}, 0},
	} {
		if got := r.Recent(tt.f, 10); len(got) != tt.want {
			t.Errorf("%+v: %d decisions, want %d", tt.f, len(got), tt.want)
		}
	}
}

// TestBounds shows that texts of any length are cut, and keep valid UTF-8.
func TestBounds(t *testing.T) {
	r := NewRing()
	long := strings.Repeat("ü", 50_000)
	ev := sample(long)
	ev.ID, ev.SNI, ev.Error, ev.User, ev.Method, ev.Decision.Rule, ev.Decision.Group = long, long, long, long, long, long, long
	r.Observe(ev)
	r.Observe(sample("line\nbreak\x1b[31m\xff"))
	got := r.Recent(Filter{}, 2)
	text, err := json.Marshal(got[1])
	if err != nil || len(text) > 2*slotText || !strings.Contains(got[1].Name, ellipsis) {
		t.Errorf("%d bytes, %v: %s", len(text), err, text)
	}
	text, err = json.Marshal(got[0])
	if err != nil || strings.ContainsAny(string(text), "\n\x1b") || !utf8.Valid(text) || !strings.Contains(string(text), `"name":"line\nbreak\u001b[31m�"`) {
		t.Errorf("%s, %v", text, err)
	}
}

func TestFollow(t *testing.T) {
	r := NewRing()
	r.Observe(sample("before.test"))
	c := r.Follow("")
	f := &Filter{}
	if d, ok := c.Next(f); ok {
		t.Fatalf("%+v", d)
	}
	r.Observe(sample("one.test"))
	r.Observe(denied("two.test"))
	id := ""
	for _, want := range []string{"one.test", "two.test"} {
		d, ok := c.Next(f)
		if !ok || d.Name != want {
			t.Fatalf("%+v, %v, want %s", d, ok, want)
		}
		if id == "" {
			id = c.ID()
		}
	}
	if _, ok := c.Next(f); ok || c.Lost() != 0 {
		t.Error("more than there is")
	}
	resumed := r.Follow(id)
	if d, ok := resumed.Next(f); !ok || d.Name != "two.test" {
		t.Errorf("after %s: %+v", id, d)
	}
	for _, bad := range []string{"x", "-", "x-1", r.epoch() + "-99", r.epoch() + "-x", NewRing().epoch() + "-1"} {
		if d, ok := r.Follow(bad).Next(f); ok {
			t.Errorf("after %q: %+v", bad, d)
		}
	}
	if d, ok := r.Follow(r.epoch() + "-0").Next(&Filter{Verdict: "deny"}); !ok || d.Name != "two.test" {
		t.Errorf("filtered: %+v", d)
	}
}

// TestLaggard shows that who does not read loses the oldest and is told how many.
func TestLaggard(t *testing.T) {
	r := NewRing()
	c := r.Follow("")
	for i := range ringSlots + 100 {
		r.Observe(sample(fmt.Sprintf("n%d.test", i)))
	}
	d, ok := c.Next(&Filter{})
	if !ok || d.Name != "n100.test" || c.Lost() != 100 {
		t.Errorf("%+v, lost %d", d, c.Lost())
	}
	n := 1
	for _, ok := c.Next(&Filter{}); ok; _, ok = c.Next(&Filter{}) {
		n++
	}
	if n != ringSlots || c.Lost() != 100 {
		t.Errorf("%d read, %d lost", n, c.Lost())
	}
	// A number whose writer never came is given up at the second look.
	r.next.Add(1)
	r.Observe(sample("last.test"))
	if _, ok := c.Next(&Filter{}); ok {
		t.Error("read before what is on its way")
	}
	if d, ok := c.Next(&Filter{}); !ok || d.Name != "last.test" || c.Lost() != 101 {
		t.Errorf("%+v, lost %d", d, c.Lost())
	}
}

// TestConcurrent has many write while some read: nobody waits, and what is read is whole.
func TestConcurrent(t *testing.T) {
	r := NewRing()
	var writers, readers sync.WaitGroup
	const each, crowd = 20_000, 4
	stop := make(chan struct{})
	for range 3 {
		readers.Go(func() {
			c := r.Follow("")
			seen, last := uint64(0), uint64(0)
			for end := false; !end; {
				select {
				case <-stop:
					end = true
				default:
				}
				for d, ok := c.Next(&Filter{}); ok; d, ok = c.Next(&Filter{}) {
					seen++
					if d.Name != d.SNI || d.Seq <= last || d.ID != "c1" {
						t.Errorf("%+v after %d", d, last)
						return
					}
					last = d.Seq
				}
			}
			if seen+c.Lost() > each*crowd {
				t.Errorf("%d seen, %d lost", seen, c.Lost())
			}
		})
	}
	for w := range crowd {
		writers.Go(func() {
			for i := range each {
				r.Observe(sample(fmt.Sprintf("w%d-%d.test", w, i)))
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
	if n := r.next.Load(); n != each*crowd {
		t.Errorf("%d", n)
	}
}

func TestTally(t *testing.T) {
	r := NewRing()
	tl := NewTally(r)
	c := r.Follow("")
	observe := func(ev *event.Event, times int) {
		for range times {
			r.Observe(ev)
		}
		tl.count(c, tallyRate)
	}
	observe(sample("often.test"), 30)
	observe(denied("evil.test"), 20)
	other := denied("rare.test")
	other.Source, other.Decision.Group = netip.MustParseAddrPort("10.9.9.9:1"), "legacy"
	observe(other, 3)
	check := func(by By, want string) {
		t.Helper()
		var got []string
		top := tl.Top(by, 2)
		for _, k := range top.Talkers {
			got = append(got, fmt.Sprintf("%s %s %s %d", k.Key, k.Group, k.Reason, k.Count))
		}
		if s := strings.Join(got, ", "); s != want || top.Since.IsZero() || top.Skipped != 0 {
			t.Errorf("%s: %s, want %s", by, s, want)
		}
	}
	check(ByName, "often.test ci matched 30, evil.test ci not_listed 20")
	check(BySource, "10.1.2.3 ci not_listed 50, 10.9.9.9 legacy not_listed 3")
	check(ByGroup, "ci ci not_listed 50, legacy legacy not_listed 3")
	check(ByDenied, "evil.test ci not_listed 20, rare.test legacy not_listed 3")
	observed := denied("observed.test")
	observed.Decision.Verdict = policy.Observe
	observe(observed, 50)
	if b := tl.Top(ByDenied, 2).Talkers; b[0].Verdict != "observe" || b[1].Verdict != "deny" {
		t.Errorf("%+v", b)
	}
	began := tl.now.since
	tl.now, tl.was = newPeriod(began), period{}
	observe(sample("often.test"), 30)
	observe(denied("evil.test"), 20)
	observe(other, 3)
	if b := tl.Top(ByName, 1).Talkers[0]; b.BytesUp != 300 || b.BytesDown != 600 {
		t.Errorf("%+v", b)
	}

	tl.turn(began.Add(tallyPeriod))
	observe(sample("often.test"), 5)
	check(ByName, "often.test ci matched 35, evil.test ci not_listed 20")
	if top := tl.Top(ByName, 1); !top.Since.Equal(began) {
		t.Errorf("since %v, want %v", top.Since, began)
	}
	tl.turn(began.Add(2 * tallyPeriod))
	tl.turn(began.Add(2*tallyPeriod + time.Minute)) // not yet time
	check(ByName, "often.test ci matched 5")
}

// TestTallyIsBounded has more names than there is room for: the frequent ones are
// found all the same, and their counts are as far off as they say.
func TestTallyIsBounded(t *testing.T) {
	r := NewRing()
	tl := NewTally(r)
	c := r.Follow("")
	rnd := rand.New(rand.NewPCG(1, 2))
	const all, often = 100_000, 500
	for i := range all {
		name := fmt.Sprintf("n%d.test", rnd.IntN(1<<30))
		if i%(all/often) == 0 {
			name = "often.test"
		}
		r.Observe(sample(name))
		if i%ringSlots == 0 {
			tl.count(c, tallyRate)
		}
	}
	tl.count(c, tallyRate)
	if n := len(tl.now.names.byKey); n != tallyKeys || len(tl.now.names.items) != n {
		t.Errorf("%d names", n)
	}
	top := tl.Top(ByName, 1).Talkers
	if len(top) != 1 || top[0].Key != "often.test" || top[0].Count < often || top[0].Count-top[0].Error > often {
		t.Errorf("%+v", top)
	}
}

func TestTallyRun(t *testing.T) {
	r := NewRing()
	tl := NewTally(r)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- tl.Run(ctx) }()
	for range wakeEvery {
		r.Observe(sample("a.test"))
	}
	for tl.Top(ByName, 1).Talkers == nil || len(tl.Top(ByName, 1).Talkers) == 0 {
		time.Sleep(time.Millisecond) // pace: the counting goroutine was woken
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestObserveAllocatesNothing(t *testing.T) {
	r := NewRing()
	tl := NewTally(r)
	c := r.Follow("")
	ev := denied("name.ok.test")
	if n := testing.AllocsPerRun(2*ringSlots, func() { r.Observe(ev) }); n != 0 {
		t.Errorf("%v allocations an event", n)
	}
	tl.count(c, tallyRate)
	if n := testing.AllocsPerRun(1000, func() { r.Observe(ev); tl.count(c, tallyRate) }); n != 0 {
		t.Errorf("%v allocations an event that is counted", n)
	}
}

func BenchmarkObserve(b *testing.B) {
	r := NewRing()
	ev := sample("registry.npmjs.test")
	b.ReportAllocs()
	for b.Loop() {
		r.Observe(ev)
	}
}

func BenchmarkObserveParallel(b *testing.B) {
	r := NewRing()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		ev := sample("registry.npmjs.test")
		for pb.Next() {
			r.Observe(ev)
		}
	})
}

func BenchmarkTally(b *testing.B) {
	r := NewRing()
	tl := NewTally(r)
	c := r.Follow("")
	evs := make([]*event.Event, 1<<14)
	for i := range evs {
		evs[i] = denied(fmt.Sprintf("n%d.test", i))
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		r.Observe(evs[i%len(evs)])
		if i++; i%wakeEvery == 0 {
			tl.count(c, tallyRate)
		}
	}
}
