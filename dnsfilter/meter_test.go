package dnsfilter

import (
	"net/netip"
	"testing"
	"time"
)

func TestMeter(t *testing.T) {
	if perSecond(0, 5, time.Now()) != nil {
		t.Error("no rate has a meter")
	}
	began := newClock().now()
	m := perSecond(10, 3, began)
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	now := began.Add(time.Hour)
	try := func(what string, source netip.Addr, kind byte, want ...bool) {
		t.Helper()
		for i, w := range want {
			if got := m.over(source, kind, now); got != w {
				t.Errorf("%s: try %d: over %v, want %v", what, i, got, w)
			}
		}
	}
	try("burst", a, 0, false, false, false, true, true)
	try("another source", b, 0, false, false, false, true)
	try("another kind", a, 1, false, false, false, true)
	now = now.Add(99 * time.Millisecond)
	try("too early", a, 0, true)
	now = now.Add(time.Millisecond)
	try("one more after a tenth of a second", a, 0, false, true)
	now = now.Add(250 * time.Millisecond)
	try("two after a quarter", a, 0, false, false, true)
	for range 3 { // however long it was idle: the clock of the slots begins again after 12.7 days
		now = now.Add(meterClock * time.Microsecond / 2)
		try("never more than the burst", a, 0, false, false, false, true)
	}
	now = now.Add(-time.Hour)
	try("a clock that goes back", a, 0, false, false, false, true)
	if n := testing.AllocsPerRun(100, func() { m.over(a, 0, now) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// However many sources come, who asks too much stays known: it is those who are
// nearest to being idle that make room.
func TestMeterIsBounded(t *testing.T) {
	now := newClock().now()
	m := perSecond(100, 100, now)
	busy := netip.MustParseAddr("192.0.2.1")
	for !m.over(busy, 0, now) {
	}
	for i := range 4 * meterSlots {
		m.over(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 0, now)
	}
	if !m.over(busy, 0, now) {
		t.Error("a source over its limit is forgotten")
	}
}

func TestPrefixOf(t *testing.T) {
	for _, tt := range []struct {
		addr         string
		bits4, bits6 int
		want         string
	}{
		{"192.0.2.77", 24, 56, "192.0.2.0"}, {"192.0.2.77", 32, 56, "192.0.2.77"}, {"192.0.2.77", 8, 56, "192.0.0.0"},
		{"2001:db8:1:2ff::1", 24, 56, "2001:db8:1:200::"}, {"2001:db8:1:2ff::1", 24, 64, "2001:db8:1:2ff::"},
		{"2001:db8::ffff:1:2:3", 24, 80, "2001:db8:0:0:ffff::"}, {"2001:db8::1", 24, 128, "2001:db8::1"}, {"2001:db8::1", 24, 16, "2001::"},
	} {
		if got := prefixOf(netip.MustParseAddr(tt.addr), tt.bits4, tt.bits6).String(); got != tt.want {
			t.Errorf("prefixOf(%s, %d, %d) = %s, want %s", tt.addr, tt.bits4, tt.bits6, got, tt.want)
		}
	}
}
