package main

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// What runs in the background gives way, in a thread that nobody has afterwards, and on
// one processor leaves the runtime another to run what serves with.
func TestBackground(t *testing.T) {
	own := os.Getpid()
	before, err := unix.Getpriority(unix.PRIO_PROCESS, own)
	if err != nil {
		t.Fatal(err)
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	t.Setenv("GOMAXPROCS", "1") // which is what to go back to
	priority, processors, thread := 0, 0, 0
	new(background).run(func() {
		thread, processors = unix.Gettid(), runtime.GOMAXPROCS(0)
		priority, err = unix.Getpriority(unix.PRIO_PROCESS, thread)
	})
	if want := max(before-backgroundNice, 1); err != nil || priority != want { // 20 minus the nice value, which ends at 19
		t.Errorf("priority %d, %v; want %d, of the process %d", priority, err, want, before)
	}
	if after := runtime.GOMAXPROCS(0); processors != enoughProcessors || after != 1 {
		t.Errorf("%d processors meanwhile, %d afterwards; want %d and 1", processors, after, enoughProcessors)
	}
	if now, err := unix.Getpriority(unix.PRIO_PROCESS, own); err != nil || now != before {
		t.Errorf("the process has priority %d, %v; before it was %d", now, err, before)
	}
}
