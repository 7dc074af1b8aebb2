package proxy

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"sallyport/internal/metrics"
	"sallyport/policy"
	"sallyport/policy/event"
)

// The tests of threats*_test.go are named after the cases of docs/threats.md. What
// "denied" means is the same in all of them: see trial.denied.

// A trial is a gate with an origin behind it, and everything that either tells.
type trial struct {
	*gate
	far    *origin
	counts *metrics.Metrics
}

// try starts a gate in front of an origin, with policyFor(keys) for the origin's
// port; api.ok.test is the origin's name.
func try(t testing.TB, keys string, edit ...func(*Config)) *trial {
	return tryPolicy(t, func(port int) string { return policyFor(keys, port) }, edit...)
}

// tryPolicy does the same with the policy that text returns for the origin's port.
func tryPolicy(t testing.TB, text func(port int) string, edit ...func(*Config)) *trial {
	tr := &trial{far: listen(t, "127.0.0.1:0"), counts: metrics.New(metrics.Options{})}
	written := text(tr.far.port())
	p := compile(t, written)
	t.Cleanup(func() { tr.quiet() }) // when the gate has stopped, no other event can come
	tr.counts.SetPolicy(p.Revision(), []string{"g", "h"})
	tr.gate = start(t, written, append(edit, func(c *Config) {
		c.Observer = event.Observers{tr.counts, c.Observer}
		c.Timeouts.ClientHello = patience // some are sent byte by byte
	})...)
	tr.resolver.set("api.ok.test", "127.0.0.1")
	return tr
}

// at is the authority of name at the origin's port.
func (tr *trial) at(name string) string { return fmt.Sprintf("%s:%d", name, tr.far.port()) }

// decisions returns the samples of sallyport_decisions_total.
func (tr *trial) decisions() map[string]string {
	rec := httptest.NewRecorder()
	tr.counts.Handler().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	samples := map[string]string{}
	for line := range strings.Lines(rec.Body.String()) {
		if series, n, ok := strings.Cut(line, "} "); ok && strings.HasPrefix(series, "sallyport_decisions_total{") {
			samples[series+"}"] = strings.TrimSpace(n)
		}
	}
	return samples
}

// one runs attempt, which makes one request, and returns the event of it, which
// must have that verdict and reason. The metric must have counted it, and
// nothing else.
func (tr *trial) one(what string, verdict policy.Verdict, reason policy.Reason, attempt func()) event.Event {
	tr.t.Helper()
	before := tr.decisions()
	attempt()
	ev := tr.next()
	if ev.Decision.Verdict != verdict || ev.Decision.Reason != reason {
		tr.t.Errorf("%s: event %v %v (%s), want %v %v", what, ev.Decision.Verdict, ev.Decision.Reason, ev.Error, verdict, reason)
	}
	moved := 0
	for series, n := range tr.decisions() {
		if n == before[series] || n == "0" && before[series] == "" {
			continue
		}
		moved++
		var was, is int
		fmt.Sscan(before[series], &was)
		fmt.Sscan(n, &is)
		if is != was+1 || !strings.Contains(series, fmt.Sprintf("reason=%q", reason)) || !strings.Contains(series, fmt.Sprintf("verdict=%q", verdict)) {
			tr.t.Errorf("%s: %s went from %d to %d", what, series, was, is)
		}
	}
	if moved != 1 {
		tr.t.Errorf("%s: %d series of sallyport_decisions_total moved", what, moved)
	}
	return ev
}

// denied makes a request by its head, which must be refused before anybody was
// asked for an address or connected to: with this status and reason, in the
// answer and in the one event, and one more in the metric.
func (tr *trial) denied(head string, status int, reason policy.Reason) event.Event {
	tr.t.Helper()
	asked := tr.resolver.asked.Load()
	what := fmt.Sprintf("%q", head)
	ev := tr.one(what, policy.Deny, reason, func() {
		c := tr.dial()
		defer c.Close()
		c.send("%s", head)
		resp, _ := c.response(http.MethodGet)
		if resp.StatusCode != status || resp.Header.Get("X-Sallyport-Reason") != reason.String() {
			tr.t.Errorf("%s: %s, %s; want %d, %v", what, resp.Status, resp.Header.Get("X-Sallyport-Reason"), status, reason)
		}
		if resp.Header.Get("Proxy-Authenticate") != "" {
			tr.t.Errorf("%s: asks for credentials", what)
		}
	})
	if ev.Status != status {
		tr.t.Errorf("%s: status %d in the event, want %d", what, ev.Status, status)
	}
	if n := tr.resolver.asked.Load() - asked; n != 0 {
		tr.t.Errorf("%s: %d look-ups", what, n)
	}
	if ev.Destination.IsValid() || ev.ConnTime != 0 || len(tr.far.conns) != 0 {
		tr.t.Errorf("%s: the destination was reached: %+v", what, ev)
	}
	return ev
}

// connectHead is a CONNECT for target.
func connectHead(target string) string {
	return "CONNECT " + target + " HTTP/1.1\r\nHost: api.ok.test:443\r\n\r\n"
}

// getHead is a plain HTTP request to host.
func getHead(host string) string {
	return "GET http://" + host + "/ HTTP/1.1\r\nHost: api.ok.test\r\n\r\n"
}

// deniedInside opens a tunnel to target, says first, and must be refused: the
// client gets alert and the end, the far side the end alone.
func (tr *trial) deniedInside(what, target, first string, reason policy.Reason, alert string) event.Event {
	tr.t.Helper()
	ev := tr.one(what, policy.Deny, reason, func() {
		c := tr.connect(target)
		c.send("%s", first)
		if got := c.rest(); got != alert {
			tr.t.Errorf("%s: the client got %q, want %q", what, got, alert)
		}
		if got := tr.far.got(tr.t); got != "" {
			tr.t.Errorf("%s: the far side got %q", what, got)
		}
	})
	if ev.Status != http.StatusOK || ev.BytesUp != 0 {
		tr.t.Errorf("%s: event %+v", what, ev)
	}
	return ev
}

// passes opens a tunnel to target and sends first in the pieces that write makes
// of it; the far side must get exactly that.
func (tr *trial) passes(what, target string, first []byte, write func(*client, []byte)) event.Event {
	tr.t.Helper()
	return tr.one(what, policy.Allow, policy.ReasonMatched, func() {
		c := tr.connect(target)
		if write == nil {
			c.send("%s", first)
		} else {
			write(c, first)
		}
		c.CloseWrite()
		if got := tr.far.got(tr.t); got != string(first) {
			tr.t.Errorf("%s: %d bytes reached the far side, %d were sent", what, len(got), len(first))
		}
		if got := c.rest(); got != "" {
			tr.t.Errorf("%s: the client got %q", what, got)
		}
	})
}

// The alerts of RFC 8446, section 6.2, and RFC 6066, section 3, as a client gets them.
const (
	accessDenied     = "\x15\x03\x03\x00\x02\x02\x31"
	unrecognizedName = "\x15\x03\x03\x00\x02\x02\x70"
)
