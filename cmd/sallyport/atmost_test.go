package main

import (
	"testing"
	"time"

	"sallyport/policy/event"
)

type counting int

func (c *counting) Observe(*event.Event) { *c++ }

// TestAtMost: of each second so many are passed on, and the others are counted.
func TestAtMost(t *testing.T) {
	var got counting
	a := &atMost{most: 3, to: &got}
	for second := range int64(4) {
		for range 5 {
			a.Observe(&event.Event{Time: time.Unix(1000+second, 0)})
		}
	}
	if got != 12 || a.skipped.Load() != 8 {
		t.Errorf("%d passed, %d skipped", got, a.skipped.Load())
	}
}
