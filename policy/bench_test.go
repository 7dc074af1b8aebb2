package policy

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"testing"
	"time"
)

// listText returns a list file of n names, one in ten a wildcard.
func listText(n int) []byte {
	var b bytes.Buffer
	for i := range n {
		if i%10 == 0 {
			b.WriteString("*.")
		}
		fmt.Fprintf(&b, "host-%d.service-%d.example%d.com\n", i, i%10, i%1000)
	}
	return b.Bytes()
}

// sized compiles a policy of ten groups that allow one list of n names, with
// further source prefixes up to prefixes in all.
func sized(tb testing.TB, n, prefixes int) *Policy {
	tb.Helper()
	d := &Document{Version: 1, Lists: []List{{Name: "big", File: "big.txt"}}}
	for g := range 10 {
		d.Groups = append(d.Groups, Group{Name: fmt.Sprint("g", g), Sources: []string{fmt.Sprintf("10.%d.0.0/16", g)}, Allow: bare("@big")})
	}
	for i := range prefixes - 10 {
		a := netip.AddrFrom4([4]byte{100, byte(i >> 16), byte(i >> 8), byte(i)})
		g := &d.Groups[i%10]
		g.Sources = append(g.Sources, netip.PrefixFrom(a, 32).String())
	}
	return compileList(tb, d, listText(n))
}

func compileList(tb testing.TB, d *Document, text []byte) *Policy {
	tb.Helper()
	p, _, err := Compile(d, Options{Open: func(string) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(text)), nil
	}})
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// BenchmarkDecide decides for names all over the list, so that at a million names
// the caches of the processor do not hold them.
func BenchmarkDecide(b *testing.B) {
	for _, size := range []struct{ names, prefixes int }{{1_000, 10}, {100_000, 10}, {1_000_000, 10}, {1_000_000, 100_000}} {
		b.Run(fmt.Sprintf("names=%d/prefixes=%d", size.names, size.prefixes), func(b *testing.B) {
			p := sized(b, size.names, size.prefixes)
			b.Run("allow", func(b *testing.B) { benchDecide(b, p, size.names, size.prefixes, ReasonMatched) })
			b.Run("deny", func(b *testing.B) { benchDecide(b, p, size.names, size.prefixes, ReasonNotListed) })
		})
	}
}

func benchDecide(b *testing.B, p *Policy, names, prefixes int, want Reason) {
	requests := make([]Request, 1024)
	for i := range requests {
		k := i * 7919 % names
		name := fmt.Sprintf("host-%d.service-%d.example%d.com", k, k%10, k%1000)
		switch {
		case want == ReasonNotListed:
			name = "x" + name
		case k%10 == 0:
			name = "www." + name
		}
		src := netip.AddrFrom4([4]byte{10, byte(i % 10), 1, 1})
		if prefixes > 10 {
			k := i * 97 % (prefixes - 10)
			src = netip.AddrFrom4([4]byte{100, byte(k >> 16), byte(k >> 8), byte(k)})
		}
		requests[i] = Request{Source: src, Name: MustName(name), Port: 443, Time: at}
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if d := p.Decide(requests[i&1023]); d.Reason != want {
			b.Fatalf("%v: %v", requests[i&1023], d)
		}
		i++
	}
}

// BenchmarkCompile compiles a list of a million names, and says what it keeps.
func BenchmarkCompile(b *testing.B) {
	const n = 1_000_000
	d := &Document{
		Version: 1, Lists: []List{{Name: "big", File: "big.txt"}},
		Groups: []Group{{Name: "g", Sources: []string{"10.0.0.0/8"}, Allow: bare("@big")}},
	}
	text := listText(n)
	before := heap()
	var p *Policy
	for b.Loop() {
		p = compileList(b, d, text)
	}
	b.ReportMetric(float64(heap()-before)/n, "B/name")
	b.ReportMetric(float64(len(text))/n, "text-B/name")
	runtime.KeepAlive(p)
	runtime.KeepAlive(text)
}

// heap returns the live heap in bytes.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkDecideWhileReloading measures single decisions while another goroutine
// compiles a million names over and over and swaps them in.
func BenchmarkDecideWhileReloading(b *testing.B) {
	d := &Document{
		Version: 1, Lists: []List{{Name: "big", File: "big.txt"}},
		Groups: []Group{{Name: "g", Sources: []string{"10.0.0.0/8"}, Allow: bare("@big")}},
	}
	text := listText(1_000_000)
	var s Store
	s.Swap(compileList(b, d, text))
	stop, done, reloads := make(chan struct{}), make(chan struct{}), 0
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				s.Swap(compileList(b, d, text))
				debug.FreeOSMemory() // as the program does after a large one
				reloads++
			}
		}
	}()
	r := Request{Source: addr("10.0.0.1"), Name: MustName("host-7.service-7.example7.com"), Port: 443, Time: at}
	took := make([]time.Duration, 0, 1<<22)
	for b.Loop() {
		began := time.Now()
		s.Decide(r)
		if len(took) < cap(took) {
			took = append(took, time.Since(began))
		}
	}
	close(stop)
	<-done
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*999/1000].Nanoseconds()), "p99.9-ns")
	b.ReportMetric(float64(took[len(took)-1].Nanoseconds()), "max-ns")
	b.ReportMetric(float64(reloads), "reloads")
}
