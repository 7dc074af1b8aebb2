package metrics

import (
	"net/http/httptest"
	"strings"
	"testing"
)

func TestDiscovery(t *testing.T) {
	m := New(Options{})
	m.ObserveDiscovery(func() DiscoveryStats { return DiscoveryStats{Pairs: 3, Evicted: 5, WriteErrors: 7} })
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{"\nsallyport_discovery_destinations 3\n", "\nsallyport_discovery_evicted_total 5\n", "\nsallyport_discovery_write_errors_total 7\n"} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("no %q in\n%s", want, w.Body)
		}
	}
}
