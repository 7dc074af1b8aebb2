package eventlog

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// TestMemo: what a line has in common with those before it changes nothing of it, whichever
// fields are new.
func TestMemo(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	of := func(all ...string) string { return all[random.IntN(len(all))] }
	times := []time.Time{{}, when, when.Add(time.Second), when.Add(7 * time.Millisecond), when.UTC(), time.Unix(0, 0), time.Unix(-1, 999_000_000),
		time.Unix(0, 1_000_000), time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)}
	sources := []netip.Addr{{}, netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.10"), netip.MustParseAddr("::ffff:10.0.0.1"),
		netip.MustParseAddr("fe80::1"), netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("fe80::1%eth1\"\n")}
	strange := strings.Repeat("\"\n", maxRule)
	kept := memos.New().(*memo)
	for range 50_000 {
		ev := event.Event{
			Kind: event.DNS, Name: "a.test", Time: times[random.IntN(len(times))], Source: netip.AddrPortFrom(sources[random.IntN(len(sources))], 53),
			Decision: policy.Decision{
				Verdict: policy.Verdict(random.IntN(3)), Mode: policy.Mode(random.IntN(2)), Reason: policy.Reason(random.IntN(3)),
				Rule: of("", "a", "ab", strange, strange+"x"), Group: of("", "a", "ab", "b"), Revision: of("", "a", "b"),
			},
		}
		want := string(memos.New().(*memo).appendJSON(nil, &ev, "node"))
		if got := string(kept.appendJSON(nil, &ev, "node")); got != want {
			t.Fatalf("%+v\n%s\nafter others, at first\n%s", ev, got, want)
		}
	}
}
