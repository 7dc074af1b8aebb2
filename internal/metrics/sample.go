package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"sallyport/policy"
)

// A sample is one count of decisions. There are many at each scrape, so it shares
// its labels with others instead of having them checked, copied and sorted like a
// metric that the library makes.
type sample struct {
	labels [4]*dto.LabelPair // by name: group, listener, reason, verdict
	value  float64
	count  dto.Counter
}

// Desc implements prometheus.Metric.
func (*sample) Desc() *prometheus.Desc { return decisionsDesc }

// Write implements prometheus.Metric.
func (s *sample) Write(m *dto.Metric) error {
	s.count.Value = &s.value
	m.Label, m.Counter = s.labels[:], &s.count
	return nil
}

// The labels of decisions, by the index of what they say.
var (
	listenerLabels = pairs("listener", len(listeners)+1, func(i int) string { return label(listeners[:], i) })
	reasonLabels   = pairs("reason", maxReasons, func(i int) string { return policy.Reason(i).String() })
	verdictLabels  = pairs("verdict", verdicts, func(i int) string { return policy.Verdict(i).String() })
)

func pair(name, value string) *dto.LabelPair { return &dto.LabelPair{Name: &name, Value: &value} }

func pairs(name string, n int, value func(int) string) []*dto.LabelPair {
	all := make([]*dto.LabelPair, n)
	for i := range all {
		all[i] = pair(name, value(i))
	}
	return all
}
