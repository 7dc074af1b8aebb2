package main

import (
	"runtime"
	"runtime/debug"
	"testing"
)

func TestPercentFor(t *testing.T) {
	for live, want := range map[uint64]int{0: 2400, 1 << 20: 2400, 6 << 20: 400, 24 << 20: 100, 1 << 30: 100} {
		if got := percentFor(live); got != want {
			t.Errorf("percentFor(%d) = %d, want %d", live, got, want)
		}
	}
}

// TestPaceCollector: with little alive the collector waits for more garbage, with much
// it goes at its usual pace, and afterwards all is as it was.
func TestPaceCollector(t *testing.T) {
	t.Setenv("GOGC", "")
	percent := func() int {
		p := debug.SetGCPercent(usualPercent)
		debug.SetGCPercent(p)
		return p
	}
	end := paceCollector()
	if p := percent(); p <= usualPercent {
		t.Errorf("GOGC %d with little alive", p)
	}
	large := make([]byte, 2*garbageFloor)
	for range 1000 {
		if runtime.GC(); percent() == usualPercent {
			break
		}
		runtime.Gosched()
	}
	if p := percent(); p != usualPercent {
		t.Errorf("GOGC %d with %d MiB alive", p, len(large)>>20)
	}
	runtime.KeepAlive(large)
	for range 1000 {
		if runtime.GC(); percent() != usualPercent {
			break
		}
		runtime.Gosched()
	}
	if p := percent(); p <= usualPercent {
		t.Errorf("GOGC %d with little alive again", p)
	}
	end()
	if p := percent(); p != usualPercent {
		t.Errorf("GOGC %d at the end", p)
	}
	t.Setenv("GOGC", "50")
	paceCollector()()
	if p := percent(); p != usualPercent {
		t.Errorf("an operator's GOGC did not stand: %d", p)
	}
}
