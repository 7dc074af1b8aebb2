package metrics

import (
	"testing"

	"sallyport/policy"
	"sallyport/policy/event"
)

func TestTotals(t *testing.T) {
	m := New(Options{})
	m.SetPolicy("r", []string{"ci"})
	observe := func(kind event.Kind, listener, group string, v policy.Verdict, times int) {
		for range times {
			m.Observe(&event.Event{Kind: kind, Listener: listener, Decision: policy.Decision{Group: group, Verdict: v, Reason: policy.ReasonNotListed}})
		}
	}
	observe(event.Connect, "proxy", "ci", policy.Allow, 3)
	observe(event.HTTP, "proxy_tls", "", policy.Deny, 2)
	observe(event.Connect, "transparent", "gone", policy.Observe, 1)
	observe(event.DNS, "dns", "ci", policy.Deny, 4)
	m.CountQuery("dns", &policy.Decision{Group: "ci", Verdict: policy.Allow, Reason: policy.ReasonMatched}, 1, 0)
	c, q := m.Totals()
	if c != (Totals{3, 2, 1}) || q != (Totals{1, 4, 0}) {
		t.Errorf("%+v, %+v", c, q)
	}
}
