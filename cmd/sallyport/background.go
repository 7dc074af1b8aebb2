package main

import (
	"os"
	"runtime"
)

// inBackground runs f, which takes long and hurries for nobody, in a thread of its own
// that gives way to those which serve, and waits for it. Without a thread of its own,
// what serves would wait for f on a machine with one processor, ten milliseconds at a
// time: the runtime divides one processor among goroutines that coarsely, the kernel
// divides it among threads at once.
func inBackground(f func()) {
	defer spareProcessor()()
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

// spareProcessor has the runtime run two threads at a time where it would run one, and
// returns what undoes that.
func spareProcessor() (restore func()) {
	if runtime.GOMAXPROCS(0) > 1 {
		return func() {}
	}
	runtime.GOMAXPROCS(2)
	if os.Getenv("GOMAXPROCS") != "" {
		return func() { runtime.GOMAXPROCS(1) }
	}
	return runtime.SetDefaultGOMAXPROCS // which follows the limits of the container again
}
