package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
)

// garbageFloor is how many bytes of garbage may gather before the collector runs, at
// least. By itself it runs when as much was allocated as is alive; with the few
// megabytes that are alive without a large policy that is a hundred times a second, a
// tenth of the CPU time of plain HTTP.
const garbageFloor = 24 << 20

// usualPercent is the runtime's own GOGC.
const usualPercent = 100

// A collector keeps the garbage collector's pace to garbageFloor. It looks after every
// collection.
type collector struct {
	mu      sync.Mutex // guards what follows
	percent int        // in force
	ended   bool
}

// paceCollector begins, and returns what ends it. An operator's GOGC stands; GOMEMLIMIT
// is kept to by the runtime, whatever the pace.
func paceCollector() (end func()) {
	if os.Getenv("GOGC") != "" {
		return func() {}
	}
	c := &collector{percent: usualPercent}
	c.look()
	c.await()
	return c.end
}

// await has look called after the next collection, and again after each.
func (c *collector) await() {
	// The finalizer of something that nobody refers to runs after a collection.
	runtime.SetFinalizer(&struct{ c *collector }{c}, func(sentinel *struct{ c *collector }) {
		if c := sentinel.c; c.look() {
			c.await()
		}
	})
}

// look sets the pace for what is alive now, and reports whether to go on. The runtime
// stops for a moment to take another one, so small changes are let be.
func (c *collector) look() bool {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return false
	}
	if want := percentFor(live[0].Value.Uint64()); want < c.percent*9/10 || want > c.percent*11/10 {
		c.percent = want
		debug.SetGCPercent(want)
	}
	return true
}

// percentFor returns the GOGC with which garbageFloor is reached if live bytes are alive.
func percentFor(live uint64) int {
	return int(max(usualPercent, garbageFloor*usualPercent/max(live, 1<<20)))
}

func (c *collector) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	debug.SetGCPercent(usualPercent)
}
