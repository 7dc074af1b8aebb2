// Package metrics counts events and serves the counts to Prometheus. It is the
// only package that knows the Prometheus client.
//
// Every label has a closed set of values: verdicts, reasons, doors, the groups of
// the policy in force, the DNS types and response codes listed here. Nothing that
// a client chooses becomes a label.
package metrics

import (
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"

	"sallyport/policy"
	"sallyport/policy/event"
)

// ResolverStats are the resolver's numbers since the start. Each look-up in its
// cache is one of the first three.
type ResolverStats struct {
	Hits, Misses uint64
	Stale        uint64 // answered past the TTL because no upstream answered
	Dropped      uint64 // queries and connections dropped because too many were under way
	Malformed    uint64 // packets that are no query to answer
	Failures     uint64 // exchanges with upstreams that ended without an answer
	Ignored      uint64 // packets from upstreams that answer no query under way
	Prefetched   uint64 // questions asked because an answer in use was about to expire
	Limited      []Limited
	Upstreams    []UpstreamStats
}

// Limited is what one of the resolver's limits has done. Limit and Action are closed sets.
type Limited struct {
	Limit, Action string
	Count         uint64
}

// UpstreamStats are one upstream's numbers. Zone, Index and Upstream tell it from all others.
type UpstreamStats struct {
	Zone     string // "" for the general ones
	Index    int    // in their list
	Upstream string // its address, as configured
	Up       bool
	RTT      time.Duration // 0: not known
	Queries  uint64        // exchanges begun
	Failures uint64        // of these, those that ended without an answer
}

// ProxyStats are the proxy's numbers.
type ProxyStats struct {
	Connections  int    // of clients, open now, tunnels included
	Tunnels      int    // open now
	MaxTunnels   int    // how many may be open; 0: no limit
	Up, Down     int64  // bytes relayed since the start, of live connections too
	AcceptErrors uint64 // failed accepts since the start
	AcceptPauses uint64 // how often accepting paused since then
	Panics       uint64 // connections closed because of a mistake in the program, since then

	Handshakes map[string]uint64 // TLS handshakes of clients that failed since then, by cause, a closed set
}

// LogStats are the log's numbers.
type LogStats struct {
	Dropped uint64 // lines lost since the start
	Lines   int    // waiting to be written
	Bytes   int    // of these
}

// Options say where the numbers come from that events do not tell. A nil func
// leaves its metric out.
type Options struct {
	Version, Revision string // of the program
	Proxy             func() ProxyStats
	Resolver          func() ResolverStats
	Policy            func() PolicyStats
	Log               func() LogStats
	Ready             func() bool // traffic may be sent here

	// Certificates returns when the certificate of each section of the settings
	// expires; zero: it has none.
	Certificates func() map[string]time.Time
}

// Metrics counts. It is an [event.Observer] that neither blocks nor allocates.
type Metrics struct {
	options  Options
	registry *prometheus.Registry

	current atomic.Pointer[table]
	queries [verdicts][len(qtypes) + 1][len(rcodes) + 1]atomic.Uint64
	reload  atomic.Pointer[reload]
	reloads reloads

	connect, resolve, tunnel, load *histogram
}

var _ event.Observer = (*Metrics)(nil)

// New returns Metrics that count from zero.
func New(o Options) *Metrics {
	m := &Metrics{
		options:  o,
		registry: prometheus.NewRegistry(),
		connect:  newHistogram("connect_duration_seconds", "Time to connect to a destination, after its name was resolved.", connectBuckets),
		resolve:  newHistogram("resolve_duration_seconds", "Time to resolve the name of a connection or request of the proxy, the cache included.", resolveBuckets),
		tunnel:   newHistogram("tunnel_duration_seconds", "Life of a tunnel, from its request to its end.", tunnelBuckets),
		load:     newHistogram("policy_load_duration_seconds", "Time to read and compile a policy, and to put it in force or refuse it.", loadBuckets),
	}
	m.current.Store(newTable("", nil, nil))
	m.registry.MustRegister(m.connect, m.resolve, m.tunnel, m.load, collector{m},
		collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(collectors.MetricsScheduler)),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Handler serves the metrics, in the format that is asked for: Prometheus' text, its
// protocol buffers, or OpenMetrics, which alone has room for exemplars.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4, Timeout: 10 * time.Second, EnableOpenMetrics: true,
	})
}

// SetPolicy says which policy is in force. The decisions counted for groups that
// it does not have are forgotten; those of the others go on.
func (m *Metrics) SetPolicy(revision string, groups []string) {
	m.current.Store(newTable(revision, groups, m.current.Load()))
}

// reload is the outcome of the last attempt to load a policy.
type reload struct {
	ok bool
	at time.Time
}

// SetReload says how the last attempt to load a policy ended.
func (m *Metrics) SetReload(ok bool, at time.Time) { m.reload.Store(&reload{ok, at}) }

// Loaded counts the policy that the program started with, which took d to load; of
// every later one there is an Event.
func (m *Metrics) Loaded(d time.Duration) { m.load.observe(&event.Event{}, d) }

// Observe implements event.Observer.
func (m *Metrics) Observe(ev *event.Event) {
	if ev.Kind == event.Config {
		m.reloads.count(ev)
		if ev.Name == "policy" {
			m.load.observe(ev, ev.Duration)
		}
		return
	}
	d := &ev.Decision
	m.current.Load().count(ev.Listener, d)
	if ev.Kind == event.DNS {
		m.queries[verdict(d.Verdict)][indexOf(qtypes[:], ev.QType)][indexOf(rcodes[:], ev.RCode)].Add(1)
		return
	}
	m.connect.observe(ev, ev.ConnTime)
	m.resolve.observe(ev, ev.DNSTime)
	if ev.Kind == event.Connect && ev.Status == http.StatusOK {
		m.tunnel.observe(ev, ev.Duration)
	}
}

// CountQuery counts a DNS query of a type that came in by listener and was answered
// with an RCODE as d says, just as Observe counts its Event. Of those two a query is
// for one.
func (m *Metrics) CountQuery(listener string, d *policy.Decision, qtype uint16, rcode int) {
	l := listenerDNS // nearly always
	if listener != "dns" {
		l = indexOf(listeners[:], listener)
	}
	m.current.Load().countAs(l, d)
	q, r := len(qtypes), len(rcodes)
	if int(qtype) < len(qtypeIndex) {
		q = int(qtypeIndex[qtype])
	}
	if rcode >= 0 && rcode < len(rcodeIndex) {
		r = int(rcodeIndex[rcode])
	}
	m.queries[verdict(d.Verdict)][q][r].Add(1)
}

// The closed sets. What is not in one of them counts as other.
const other = "other"

const verdicts = 3

var (
	listeners = [...]string{"proxy", "proxy_tls", "dns", "transparent", "dns_tls", "dns_https"}
	qtypes    = [...]string{"A", "AAAA", "HTTPS", "SVCB", "CNAME", "TXT", "SRV", "MX", "NS", "SOA", "PTR", "CAA",
		"DS", "DNSKEY", "NAPTR", "TLSA", "SSHFP", "URI", "NULL", "ANY", "AXFR", "IXFR"}
	rcodes = [...]string{"NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "BADVERS"}
)

// listenerDNS is the resolver's index in listeners.
var listenerDNS = indexOf(listeners[:], "dns")

// qtypeIndex and rcodeIndex say where in qtypes and rcodes the number of a type and
// of a response code stands (IANA's DNS parameters).
var (
	qtypeIndex = func() (index [258]uint8) {
		for i := range index {
			index[i] = uint8(len(qtypes))
		}
		for i, number := range [len(qtypes)]uint16{1, 28, 65, 64, 5, 16, 33, 15, 2, 6, 12, 257, 43, 48, 35, 52, 44, 256, 10, 255, 252, 251} {
			index[number] = uint8(i)
		}
		return index
	}()
	rcodeIndex = func() (index [17]uint8) {
		for i := range index {
			index[i] = uint8(len(rcodes))
		}
		for i, number := range [len(rcodes)]uint8{0, 1, 2, 3, 4, 5, 16} {
			index[number] = uint8(i)
		}
		return index
	}()
)

// verdict is v as an index.
func verdict(v policy.Verdict) int { return min(int(v), verdicts-1) }

// indexOf returns where s is in set, or its length.
func indexOf(set []string, s string) int {
	for i, v := range set {
		if v == s {
			return i
		}
	}
	return len(set)
}

// label is the value that stands for index i of set.
func label(set []string, i int) string {
	if i < len(set) {
		return set[i]
	}
	return other
}

// maxReasons has room for every reason and for none.
const maxReasons = 32

// reason is r as an index; what has no name counts as none.
func reason(r policy.Reason) int {
	if r.String() == "" || r >= maxReasons {
		return 0
	}
	return int(r)
}

// counts are the decisions of one group, by listener, verdict and reason.
type counts [len(listeners) + 1][verdicts][maxReasons]atomic.Uint64

// A table has the counts of each group of one policy. It never changes; the counts do.
type table struct {
	revision string
	groups   map[string]*counts // "" is no group, or one that is gone
	sorted   []string           // their names
}

// newTable returns a table for groups that goes on with the counts that old has of them.
func newTable(revision string, groups []string, old *table) *table {
	t := &table{revision: revision, groups: make(map[string]*counts, len(groups)+1)}
	for _, g := range append([]string{""}, groups...) {
		if old != nil {
			t.groups[g] = old.groups[g]
		}
		if t.groups[g] == nil {
			t.groups[g] = new(counts)
		}
	}
	t.sorted = slices.Sorted(maps.Keys(t.groups))
	return t
}

func (t *table) count(listener string, d *policy.Decision) {
	t.countAs(indexOf(listeners[:], listener), d)
}

// countAs is count for an index of listeners.
func (t *table) countAs(listener int, d *policy.Decision) {
	c := t.groups[d.Group]
	if c == nil { // a tunnel that outlived its group
		c = t.groups[""]
	}
	c[listener][verdict(d.Verdict)][reason(d.Reason)].Add(1)
}

var (
	decisionsDesc  = desc("decisions_total", "Connections, requests and queries decided, when they end.", "listener", "group", "verdict", "reason")
	tunnelsDesc    = desc("tunnels", "Tunnels open now.")
	bytesDesc      = desc("bytes_total", "Bytes relayed; up is from client to destination.", "direction")
	acceptErrDesc  = desc("accept_errors_total", "Connections that could not be accepted, such as for lack of descriptors.")
	acceptStopDesc = desc("accept_pauses_total", "Pauses in accepting connections, after an error or to leave descriptors to others.")
	queriesDesc    = desc("dns_queries_total", "DNS queries answered.", "verdict", "qtype", "rcode")
	cacheDesc      = desc("dns_cache_total", "Look-ups in the resolver's cache.", "result")
	dnsDroppedDesc = desc("dns_dropped_total", "Queries and connections dropped because too many were under way.")
	malformedDesc  = desc("dns_malformed_total", "Packets that are no query to answer.")
	failuresDesc   = desc("dns_upstream_failures_total", "Exchanges with upstreams that ended without an answer.")
	ignoredDesc    = desc("dns_upstream_ignored_total", "Packets from upstreams' addresses that answer no query under way: forged, or too late.")
	limitedDesc    = desc("dns_limited_total", "Queries and answers that a limit of the resolver was applied to.", "limit", "action")
	prefetchDesc   = desc("dns_prefetch_total", "Questions asked because an answer in use was about to expire.")
	upDesc         = desc("dns_upstream_up", "Whether an upstream answered lately, or has not been asked yet.", "zone", "index", "upstream")
	rttDesc        = desc("dns_upstream_rtt_seconds", "Smoothed time of an exchange with an upstream.", "zone", "index", "upstream")
	exchangesDesc  = desc("dns_upstream_exchanges_total", "Exchanges with an upstream.", "zone", "index", "upstream", "result")
	policyDesc     = desc("policy_info", "The policy in force, always 1.", "revision")
	reloadDesc     = desc("policy_last_reload_success", "Whether the last attempt to load a policy succeeded.")
	reloadAtDesc   = desc("policy_last_reload_timestamp_seconds", "When a policy was last loaded or refused, in Unix time.")
	droppedDesc    = desc("log_dropped_total", "Log lines lost because the output was too slow or failed.")
	logLinesDesc   = desc("log_queue_lines", "Log lines waiting to be written.")
	logBytesDesc   = desc("log_queue_bytes", "Size of the log lines waiting to be written.")
	readyDesc      = desc("ready", "Whether traffic may be sent here: a policy is in force, the listeners are up, an upstream answers, and no drain is under way.")
	connsDesc      = desc("connections", "Connections of clients open now, tunnels included.")
	limitDesc      = desc("tunnels_limit", "How many tunnels may be open.")
	panicsDesc     = desc("panics_total", "Connections closed because of a mistake in the program.")
	handshakesDesc = desc("tls_handshake_failures_total", "TLS handshakes of clients with the proxy that failed.", "cause")
	certDesc       = desc("tls_certificate_expiry_timestamp_seconds", "When the certificate of a section of the settings expires, in Unix time.", "section")
	buildDesc      = desc("build_info", "The program, always 1.", "version", "revision", "goversion")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("sallyport_"+name, help, labels, nil)
}

// A collector turns the counts into samples when they are asked for. Counts that
// are zero are left out where there are many.
type collector struct{ m *Metrics }

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{decisionsDesc, tunnelsDesc, bytesDesc, acceptErrDesc, acceptStopDesc, queriesDesc, cacheDesc, dnsDroppedDesc, malformedDesc, failuresDesc,
		ignoredDesc, prefetchDesc, limitedDesc, upDesc, rttDesc, exchangesDesc,
		policyDesc, reloadDesc, reloadAtDesc, droppedDesc, buildDesc,
		connsDesc, limitDesc, panicsDesc, handshakesDesc, certDesc, logLinesDesc, logBytesDesc, readyDesc,
		reloadsDesc, groupsDesc, rulesDesc, namesDesc, loadedDesc, lastGoodDesc, nextExpiryDesc, observeUntilDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	m, o := c.m, c.m.options
	counter := func(d *prometheus.Desc, n uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	t := m.current.Load()
	t.collect(ch)
	m.collectQueries(counter)
	if t.revision != "" {
		gauge(policyDesc, 1, t.revision)
	}
	if r := m.reload.Load(); r != nil {
		gauge(reloadDesc, truth(r.ok))
		gauge(reloadAtDesc, unix(r.at))
	}
	m.reloads.collect(counter)
	if o.Policy != nil {
		s := o.Policy()
		s.collect(gauge)
	}
	if o.Ready != nil {
		gauge(readyDesc, truth(o.Ready()))
	}
	if o.Proxy != nil {
		s := o.Proxy()
		gauge(tunnelsDesc, float64(s.Tunnels))
		counter(bytesDesc, uint64(s.Up), "up")
		counter(bytesDesc, uint64(s.Down), "down")
		counter(acceptErrDesc, s.AcceptErrors)
		counter(acceptStopDesc, s.AcceptPauses)
		s.collectMore(counter, gauge)
	}
	if o.Resolver != nil {
		s := o.Resolver()
		counter(cacheDesc, s.Hits, "hit")
		counter(cacheDesc, s.Misses, "miss")
		counter(cacheDesc, s.Stale, "stale")
		counter(dnsDroppedDesc, s.Dropped)
		counter(malformedDesc, s.Malformed)
		counter(failuresDesc, s.Failures)
		counter(ignoredDesc, s.Ignored)
		counter(prefetchDesc, s.Prefetched)
		for _, l := range s.Limited {
			counter(limitedDesc, l.Count, l.Limit, l.Action)
		}
		for _, u := range s.Upstreams {
			u.collect(counter, gauge)
		}
	}
	if o.Certificates != nil {
		for section, expires := range o.Certificates() {
			if !expires.IsZero() {
				gauge(certDesc, unix(expires), section)
			}
		}
	}
	if o.Log != nil {
		s := o.Log()
		counter(droppedDesc, s.Dropped)
		gauge(logLinesDesc, float64(s.Lines))
		gauge(logBytesDesc, float64(s.Bytes))
	}
	gauge(buildDesc, 1, o.Version, o.Revision, runtime.Version())
}

// collectMore emits the rest.
func (s *ProxyStats) collectMore(counter emit, gauge emitGauge) {
	gauge(connsDesc, float64(s.Connections))
	if s.MaxTunnels > 0 {
		gauge(limitDesc, float64(s.MaxTunnels))
	}
	counter(panicsDesc, s.Panics)
	for cause, n := range s.Handshakes {
		counter(handshakesDesc, n, cause)
	}
}

// collect emits what there is to say about an upstream. Its labels come from the
// settings, or from resolv.conf.
func (u UpstreamStats) collect(counter emit, gauge emitGauge) {
	labels := []string{u.Zone, strconv.Itoa(u.Index), u.Upstream}
	gauge(upDesc, truth(u.Up), labels...)
	if u.RTT > 0 {
		gauge(rttDesc, u.RTT.Seconds(), labels...)
	}
	failed := min(u.Failures, u.Queries)
	counter(exchangesDesc, u.Queries-failed, append(labels, "answered")...)
	counter(exchangesDesc, failed, append(labels, "failed")...)
}

type emit func(d *prometheus.Desc, n uint64, labels ...string)

// collect emits in the order in which the registry wants them, group, listener, reason,
// verdict, so that it has nothing to sort.
func (t *table) collect(ch chan<- prometheus.Metric) {
	for _, group := range t.sorted {
		c, name := t.groups[group], pair("group", group)
		for _, l := range sortedListeners {
			for _, r := range sortedReasons {
				for _, v := range sortedVerdicts {
					if n := c[l][v][r].Load(); n > 0 {
						ch <- &sample{labels: [...]*dto.LabelPair{name, listenerLabels[l], reasonLabels[r], verdictLabels[v]}, value: float64(n)}
					}
				}
			}
		}
	}
}

// The indices of listeners, reasons and verdicts in the order of their labels.
var (
	sortedListeners = sortedIndices(len(listeners)+1, func(i int) string { return label(listeners[:], i) })
	sortedReasons   = sortedIndices(maxReasons, func(i int) string { return policy.Reason(i).String() })
	sortedVerdicts  = sortedIndices(verdicts, func(i int) string { return policy.Verdict(i).String() })
)

func sortedIndices(n int, label func(int) string) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	slices.SortStableFunc(all, func(a, b int) int { return strings.Compare(label(a), label(b)) })
	return all
}

func (m *Metrics) collectQueries(counter emit) {
	for v := range m.queries {
		for q := range m.queries[v] {
			for r := range m.queries[v][q] {
				if n := m.queries[v][q][r].Load(); n > 0 {
					counter(queriesDesc, n, policy.Verdict(v).String(), label(qtypes[:], q), label(rcodes[:], r))
				}
			}
		}
	}
}
