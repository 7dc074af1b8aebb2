package metrics

import "github.com/prometheus/client_golang/prometheus"

var adminRefusedDesc = desc("admin_refused_total", "Requests that the admin listener turned away, by why.", "reason")

// An adminCollector turns what the admin server refused into samples.
type adminCollector struct{ refused func() map[string]uint64 }

// Describe implements prometheus.Collector.
func (adminCollector) Describe(ch chan<- *prometheus.Desc) { ch <- adminRefusedDesc }

// Collect implements prometheus.Collector.
func (c adminCollector) Collect(ch chan<- prometheus.Metric) {
	for why, n := range c.refused() {
		ch <- prometheus.MustNewConstMetric(adminRefusedDesc, prometheus.CounterValue, float64(n), why)
	}
}

// ObserveAdmin adds what refused returns to the metrics: requests that the admin
// listener turned away, by reasons that are a closed set. It is called at most once.
func (m *Metrics) ObserveAdmin(refused func() map[string]uint64) {
	m.registry.MustRegister(adminCollector{refused})
}
