package main

import (
	"os"
	"runtime"
	"sync"
)

// A background runs what takes long, one at a time: each would take a processor from
// what serves.
type background struct {
	turn sync.Mutex // held while something runs
}

// run runs f, which takes long and hurries for nobody, in a thread of its own
// that gives way to those which serve, and waits for it. Without a thread of its own,
// what serves would wait for f on a machine with one processor, ten milliseconds at a
// time: the runtime divides one processor among goroutines that coarsely, the kernel
// divides it among threads at once.
func (b *background) run(f func()) {
	b.turn.Lock()
	defer b.turn.Unlock()
	defer spareProcessors()()
	done := make(chan struct{})
	go runInBackground(f, done)
	<-done
}

// runInBackground runs f and closes done. Its thread ends with it, for what has given
// way cannot take its turn back without privileges. So it is never the first one, which
// would not end, and whose priority is shown as that of the process.
func runInBackground(f func(), done chan<- struct{}) {
	defer close(done)
	runtime.LockOSThread()
	if isFirstThread() {
		inner := make(chan struct{})
		go runInBackground(f, inner)
		<-inner
		runtime.UnlockOSThread()
		return
	}
	giveWay()
	f()
}

// enoughProcessors are as many as the runtime runs threads on beside background work:
// one does that work, and one may sweep what it has left, for the sweeper gives way to
// goroutines alone; while none is idle the runtime looks at the network every ten
// milliseconds only. The third serves.
const enoughProcessors = 3

// spareProcessors has the runtime run enoughProcessors threads at a time where it would
// run fewer, and returns what undoes that.
func spareProcessors() (restore func()) {
	n := runtime.GOMAXPROCS(0)
	if n >= enoughProcessors {
		return func() {}
	}
	runtime.GOMAXPROCS(enoughProcessors)
	if os.Getenv("GOMAXPROCS") != "" {
		return func() { runtime.GOMAXPROCS(n) }
	}
	return runtime.SetDefaultGOMAXPROCS // which follows the limits of the container again
}
