package discovery

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// manyEvents returns one event for each of n names.
func manyEvents(n int) []event.Event {
	evs := make([]event.Event, n)
	start := time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)
	for i := range evs {
		evs[i] = event.Event{
			Time: start, Kind: event.Connect, Protocol: policy.ProtocolTLS, Listener: "proxy",
			Source: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 30, byte(i >> 8), byte(i)}), 40000),
			Name:   fmt.Sprintf("host-%d.department.example.com", i), Port: 443, BytesUp: 700, BytesDown: 4000,
			Decision: policy.Decision{
				Group: fmt.Sprintf("group-%d", i%10), Verdict: policy.Observe, Mode: policy.ModeObserve, Reason: policy.ReasonNotListed,
			},
		}
	}
	return evs
}

// An asking is what differs from event to event in a benchmark.
type asking struct {
	name, group string
	source      netip.AddrPort
}

// shuffled returns what evs ask for in an order that the table does not know, side by side in
// memory: a server has just read the name that it tells of.
func shuffled(evs []event.Event) []asking {
	out := make([]asking, len(evs))
	for i := range out {
		ev := &evs[i*7919%len(evs)]
		out[i] = asking{strings.Clone(ev.Name), ev.Decision.Group, ev.Source}
	}
	return out
}

func observeAll(s *Store, ev event.Event, asked []asking, next func() bool) {
	for i := 0; next(); i++ {
		a := &asked[i%len(asked)]
		ev.Name, ev.Source, ev.Decision.Group = a.name, a.source, a.group
		s.Observe(&ev)
	}
}

func BenchmarkObserveKnown(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s, err := Open(Options{})
			if err != nil {
				b.Fatal(err)
			}
			evs := manyEvents(n)
			for i := range evs {
				s.Observe(&evs[i])
			}
			asked := shuffled(evs)
			b.ReportAllocs()
			observeAll(s, evs[0], asked, b.Loop)
		})
	}
}

func BenchmarkObserveKnownParallel(b *testing.B) {
	s, err := Open(Options{})
	if err != nil {
		b.Fatal(err)
	}
	evs := manyEvents(100_000)
	for i := range evs {
		evs[i].Decision.Verdict, evs[i].Decision.Reason, evs[i].Decision.Rule = policy.Allow, policy.ReasonMatched, "*.example.com"
		s.Observe(&evs[i])
	}
	asked := shuffled(evs)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) { observeAll(s, evs[0], asked, pb.Next) })
}

// BenchmarkObserveNew is a flood of names that nobody has asked for before.
func BenchmarkObserveNew(b *testing.B) {
	s, err := Open(Options{})
	if err != nil {
		b.Fatal(err)
	}
	ev := manyEvents(1)[0]
	ev.Decision.Verdict = policy.Deny
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		ev.Name = fmt.Sprintf("x%d.flood.example", i)
		s.Observe(&ev)
	}
}

func BenchmarkFlush(b *testing.B) {
	s, err := Open(Options{File: b.TempDir() + "/discovery.db"})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	evs := manyEvents(100_000)
	for b.Loop() {
		for i := range evs {
			s.Observe(&evs[i])
		}
		s.flush()
	}
}

// BenchmarkMemory reports what a pair takes.
func BenchmarkMemory(b *testing.B) {
	for _, n := range []int{100_000, DefaultEntries} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			evs := manyEvents(n)
			for b.Loop() {
				var before, after runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&before)
				s, err := Open(Options{})
				if err != nil {
					b.Fatal(err)
				}
				for i := range evs {
					s.Observe(&evs[i])
				}
				runtime.GC()
				runtime.ReadMemStats(&after)
				b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(s.Stats().Pairs), "B/pair")
				b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB")
				b.ReportMetric(float64(s.Stats().Evicted), "evicted")
				runtime.KeepAlive(s)
			}
		})
	}
}
