package main

import "golang.org/x/sys/unix"

// backgroundNice is the nice value that background work has beside that of the
// process: a tenth of the weight of what serves, so that it still gets on beside a
// server that is never idle, and lets go soon of what it has locked.
const backgroundNice = 10

// isFirstThread reports whether the calling thread is the one that the process began with.
func isFirstThread() bool { return unix.Gettid() == unix.Getpid() }

// giveWay lowers the priority of the calling thread, for good.
func giveWay() {
	tid := unix.Gettid()
	now, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
	if err != nil {
		return
	}
	now = 20 - now                                                   // what the system call means (getpriority(2))
	_ = unix.Setpriority(unix.PRIO_PROCESS, tid, now+backgroundNice) // the kernel cuts it to 19; lowering is always allowed
}
