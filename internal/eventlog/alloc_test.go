//go:build !race

package eventlog

import "testing"

// The race detector makes pools forget, so that this holds without it only.
func TestAllocations(t *testing.T) {
	for _, format := range []Format{JSON, Squid, Aviatrix} {
		w, err := Open(Options{Format: format, Node: "gate-1"})
		if err != nil {
			t.Fatal(err)
		}
		ev := tunnel()
		w.Observe(ev) // fills the pools
		allocs := testing.AllocsPerRun(200, func() {
			w.events.pending, w.events.lines = w.events.pending[:0], 0
			w.Observe(ev)
		})
		if allocs >= 1 {
			t.Errorf("%s: %v allocations a line, want 0", format, allocs)
		}
	}
}
