package policy

import (
	"runtime"
	"testing"
	"weak"
)

// The memory of a replaced policy is free after one collection: nothing outside the
// Store holds on to any part of it.
func TestReplacedPolicyIsGarbage(t *testing.T) {
	var s Store
	s.Swap(sized(t, 100_000, 1000))
	d := s.Decide(Request{Source: addr("10.0.0.1"), Name: MustName("host-7.service-7.example7.com"), Port: 443, Time: at})
	old := weak.Make(s.Policy())
	one := heap() // with one policy
	s.Swap(sized(t, 100_000, 1000))
	runtime.GC()
	if old.Value() != nil {
		t.Error("the old policy is still reachable")
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if two := int64(m.HeapAlloc); two > one+one/10 {
		t.Errorf("heap after the swap and one collection: %d bytes, %d with one policy", two, one)
	}
	if d.Verdict != Allow {
		t.Errorf("%+v", d)
	}
	runtime.KeepAlive(d)
	runtime.KeepAlive(&s)
}
