package metrics

import (
	"sort"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/policy/event"
)

// Buckets, in seconds. Those of exchanges with the network begin where a data centre
// ends and stop at the longest that the default timeouts allow.
var (
	connectBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	resolveBuckets = []float64{.0001, .001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}
	tunnelBuckets  = []float64{.1, 1, 10, 60, 600, 3600, 4 * 3600, 24 * 3600}
	loadBuckets    = []float64{.001, .01, .1, .5, 1, 2.5, 5, 10, 30, 60}
)

// A histogram is one of Prometheus whose buckets show an event each: the first of
// every second, for an exemplar has to be allocated.
type histogram struct {
	prometheus.Histogram
	buckets []float64
	marked  []atomic.Int64 // by bucket: when it was given an exemplar last, Unix time
}

func newHistogram(name, help string, buckets []float64) *histogram {
	return &histogram{
		Histogram: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "sallyport_" + name, Help: help, Buckets: buckets}),
		buckets:   buckets,
		marked:    make([]atomic.Int64, len(buckets)+1),
	}
}

// observe counts d, which is something that ev tells. 0 is nothing to count.
func (h *histogram) observe(ev *event.Event, d time.Duration) {
	if d <= 0 {
		return
	}
	v, now := d.Seconds(), ev.Time.Add(ev.Duration).Unix()
	last := &h.marked[sort.SearchFloat64s(h.buckets, v)]
	if was := last.Load(); ev.ID == "" || was == now || !last.CompareAndSwap(was, now) {
		h.Observe(v)
		return
	}
	h.Histogram.(prometheus.ExemplarObserver).ObserveWithExemplar(v, prometheus.Labels{"event_id": ev.ID})
}
