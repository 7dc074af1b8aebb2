package proxy

import (
	"fmt"
	"testing"
	"time"
)

// relayingIn returns a tunnel in l that has no sockets.
func relayingIn(l *lane) *passage {
	p := &passage{lane: l, fd: [2]int{-1, -1}, phase: relaying, last: l.now, t: new(tunnel)}
	p.slot[clientSide] = l.take(slot{p: p})
	p.slot[farSide] = l.take(slot{p: p, side: farSide})
	p.awaitSilence()
	return p
}

// A sweep looks at a tunnel when it may have been silent for long enough, and then
// finds out since when it was.
func TestSweep(t *testing.T) {
	l, err := newLane(New(Config{Timeouts: Timeouts{Idle: time.Hour}}))
	if err != nil {
		t.Fatal(err)
	}
	defer l.release()
	p := relayingIn(l)
	began := l.now
	for _, tt := range []struct {
		now, last time.Duration // since began: of the sweep, of the newest byte
		probed    bool
		next      time.Duration // look
	}{
		{probeAfter - 1, 0, false, probeAfter},
		{probeAfter, 2 * time.Second, false, probeAfter + 2*time.Second}, // something was said
		{probeAfter + 2*time.Second, 2 * time.Second, true, time.Hour + 2*time.Second},
		{time.Hour, time.Minute, true, time.Hour + 2*time.Second}, // not looked at
		{time.Hour + 2*time.Second, time.Minute, true, time.Hour + time.Minute},
	} {
		l.now, p.last = began.Add(tt.now), began.Add(tt.last)
		l.sweep()
		if next := time.Duration(l.due[p.slot[clientSide]]) - began.Sub(l.began); p.probed != tt.probed || next != tt.next {
			t.Errorf("at %v: probed %v, next look at %v; want %v, %v", tt.now, p.probed, next, tt.probed, tt.next)
		}
		if l.due[p.slot[farSide]] != never {
			t.Error("both sides are looked at")
		}
	}
}

// BenchmarkSweep is one look of a lane at the times of all of its idle tunnels, which
// have no sockets here.
func BenchmarkSweep(b *testing.B) {
	for _, n := range []int{1000, 100000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := New(Config{Timeouts: Timeouts{Idle: time.Hour}})
			l, err := newLane(s)
			if err != nil {
				b.Fatal(err)
			}
			defer l.release()
			for range n {
				p := relayingIn(l)
				p.probed = true
				p.awaitSilence()
			}
			for b.Loop() {
				l.now = time.Now()
				l.sweep()
			}
		})
	}
}
