package eventlog

import "testing"

func TestQueued(t *testing.T) {
	r, out := pipe(t)
	w := open(t, Options{Format: Squid, Stdout: out, Stderr: out})
	w.events.put([]byte("one\n"))
	w.messages.put([]byte("three\n"))
	if lines, bytes := w.Queued(); lines != 2 || bytes != 10 {
		t.Errorf("Queued = %d, %d; want 2, 10", lines, bytes)
	}
	if err := start(t, w)(); err != nil {
		t.Fatal(err)
	}
	if lines, bytes := w.Queued(); lines != 0 || bytes != 0 {
		t.Errorf("after all is written: %d, %d", lines, bytes)
	}
	r.Close()
}
