package metrics

import "github.com/prometheus/client_golang/prometheus"

// DiscoveryStats are the numbers of what remembers what clients ask for.
type DiscoveryStats struct {
	Pairs       int    // destinations remembered now
	Evicted     uint64 // destinations forgotten for others, since the start
	WriteErrors uint64 // times that its file could not be written, since then
}

var (
	pairsDesc       = desc("discovery_destinations", "Destinations that discovery remembers.")
	evictedDesc     = desc("discovery_evicted_total", "Destinations that discovery has forgotten for lack of room, and queries of a flood that it has not looked at.")
	writeErrorsDesc = desc("discovery_write_errors_total", "Times that discovery's store could not be opened or written.")
)

// A discoveryCollector turns DiscoveryStats into samples.
type discoveryCollector struct{ stats func() DiscoveryStats }

// Describe implements prometheus.Collector.
func (discoveryCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- pairsDesc
	ch <- evictedDesc
	ch <- writeErrorsDesc
}

// Collect implements prometheus.Collector.
func (c discoveryCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.stats()
	ch <- prometheus.MustNewConstMetric(pairsDesc, prometheus.GaugeValue, float64(s.Pairs))
	ch <- prometheus.MustNewConstMetric(evictedDesc, prometheus.CounterValue, float64(s.Evicted))
	ch <- prometheus.MustNewConstMetric(writeErrorsDesc, prometheus.CounterValue, float64(s.WriteErrors))
}

// ObserveDiscovery adds what stats returns to the metrics. It is called at most once.
func (m *Metrics) ObserveDiscovery(stats func() DiscoveryStats) {
	m.registry.MustRegister(discoveryCollector{stats})
}
