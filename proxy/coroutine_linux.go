package proxy

import (
	"iter"
	"net/http"
)

// maxCoroutines bounds those that a lane keeps for later.
const maxCoroutines = 64

// A coroutine serves requests of plain HTTP in a lane, one after another. Its code is what
// any goroutine would run. Where that would have to wait the lane goes on with others,
// and comes back to it: neither Go's scheduler nor another thread is involved, which
// costs more than all else about a small request (docs/decisions/0014).
//
// A coroutine and its lane never run at the same time: it may touch what is the lane's.
type coroutine struct {
	lane  *lane
	visit *visit // whose request it serves; nil: nobody's
	next  func() (struct{}, bool)
	stop  func()
	yield func(struct{}) bool
	moved int // bytes read since it last waited
}

// serveVisit has a coroutine serve the request of v.
func (l *lane) serveVisit(v *visit) {
	var c *coroutine
	if n := len(l.coroutines) - 1; n >= 0 {
		c = l.coroutines[n]
		l.coroutines = l.coroutines[:n]
		l.unneeded = min(l.unneeded, n)
	} else {
		c = &coroutine{lane: l}
		c.next, c.stop = iter.Pull(c.run)
	}
	c.visit, v.coroutine = v, c
	l.resume(c)
}

// dismiss ends half of the coroutines that have had nothing to do since the last sweep.
func (l *lane) dismiss() {
	for range (l.unneeded + 1) / 2 {
		n := len(l.coroutines) - 1
		l.coroutines[n].stop()
		l.coroutines[n] = nil
		l.coroutines = l.coroutines[:n]
	}
	l.unneeded = len(l.coroutines)
}

// run serves requests until it is not needed any more, or the lane ends.
func (c *coroutine) run(yield func(struct{}) bool) {
	c.yield = yield
	for {
		c.visit.serve()
		c.visit = nil
		if !yield(struct{}{}) {
			return
		}
	}
}

// resume lets c go on until it has to wait again, or is done with its request.
func (l *lane) resume(c *coroutine) {
	v := c.visit
	defer l.survive(v.passage)
	l.current = c
	c.next()
	l.current = nil
	if c.visit != nil {
		return
	}
	v.coroutine = nil
	if len(l.coroutines) < maxCoroutines {
		l.coroutines = append(l.coroutines, c)
	} else {
		c.stop()
	}
	v.served()
}

// wait lets the lane go on, until it resumes c.
func (c *coroutine) wait() {
	c.moved = 0
	if !c.yield(struct{}{}) {
		panic(http.ErrAbortHandler) // not reached: a lane ends after its connections
	}
}

// maxMoved is how many bytes a coroutine reads before others get their turn.
const maxMoved = 256 << 10

// pass lets others have their turn, after many bytes.
func (c *coroutine) pass(n int) {
	if c.moved += n; c.moved >= maxMoved {
		c.lane.again = append(c.lane.again, func() { c.lane.resume(c) })
		c.wait()
	}
}

// elsewhere has f, which may block, done in a goroutine of its own, and waits for it.
func (c *coroutine) elsewhere(f func()) {
	l := c.lane
	var crash any
	l.s.wg.Go(func() {
		defer func() {
			crash = recover()
			l.post(func() { l.resume(c) })
		}()
		f()
	})
	c.wait()
	if crash != nil {
		panic(crash)
	}
}
