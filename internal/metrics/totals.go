package metrics

import (
	"strings"
	"sync/atomic"

	"sallyport/policy"
)

// Totals are decisions by verdict.
type Totals struct{ Allow, Deny, Observe uint64 }

// Totals returns how many connections and requests were decided since the start, and
// how many queries, but for those of groups that are no longer in the policy.
func (m *Metrics) Totals() (connections, queries Totals) {
	for _, c := range m.current.Load().groups {
		for l := range c {
			t := &connections
			if strings.HasPrefix(label(listeners[:], l), "dns") {
				t = &queries
			}
			t.Allow += sum(&c[l][policy.Allow])
			t.Deny += sum(&c[l][policy.Deny])
			t.Observe += sum(&c[l][policy.Observe])
		}
	}
	return connections, queries
}

func sum(counts *[maxReasons]atomic.Uint64) (n uint64) {
	for i := range counts {
		n += counts[i].Load()
	}
	return n
}
