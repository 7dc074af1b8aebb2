package dnsfilter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"sallyport/policy"
)

const (
	maxFlights = 4096                    // questions being asked of upstreams at a time
	staleWait  = 1800 * time.Millisecond // for a refresh, before the stale answer is given (RFC 8767, section 5)
)

var (
	errBusy   = fmt.Errorf("over %d questions are being asked of upstreams", maxFlights)
	errClosed = errors.New("the resolver is closed")
)

// A Resolver finds answers: in the hosts file, in the local records, in its cache,
// and at the upstreams. It decides nothing. It is safe for concurrent use.
type Resolver struct {
	cfg     Config
	hosts   *hosts
	records records
	pool    *pool         // of the names that are in no zone
	system  *watched      // resolv.conf; nil with Config.Upstreams
	search  []policy.Name // Config.SearchDomains
	health  policy.Name   // Config.HealthName; zero: none

	privateZones bool             // a zone has PrivateDestinations
	zones        map[string]*pool // by zone
	cache        *cache
	timing       timing
	counts       counts

	life context.Context // of the exchanges with upstreams, which outlive who asked first
	end  context.CancelFunc

	mu      sync.Mutex // guards what follows
	flights map[key]*flight
	closed  bool
	flying  sync.WaitGroup
}

// timing holds the bounds that tests shorten.
type timing struct{ try, total, staleWait, delay, probe time.Duration }

// counts are the numbers behind Stats.
type counts struct {
	hits, misses, stale, coalesced, prefetched, sent, failed, dropped, malformed atomic.Uint64

	answersDropped, answersTruncated, queriesDropped, queriesRefused, crowding, suspected, tunnelsRefused atomic.Uint64 // see Stats
}

// Stats are numbers since the start, but for CacheEntries, CacheBytes and InFlight.
type Stats struct {
	CacheHits        uint64 // answered from the cache within the TTL
	CacheMisses      uint64 // answered by upstreams or not at all; counted when that is known
	CacheStale       uint64 // answered from the cache past the TTL; neither hits nor misses
	CacheEvictions   uint64 // forgotten for lack of room
	CacheEntries     int    // answers in the cache
	CacheBytes       int64  // their size in bytes
	InFlight         int    // questions being asked of upstreams
	Coalesced        uint64 // lookups that waited for somebody else's question
	Prefetched       uint64 // questions asked because an answer in use was about to expire
	UpstreamQueries  uint64 // exchanges with upstreams
	UpstreamFailures uint64 // exchanges that ended without an answer, or with a malformed one
	UpstreamIgnored  uint64 // what upstreams in use, or others, sent that matches no query under way: forged, or too late
	Dropped          uint64 // queries and connections dropped because too many were under way
	Malformed        uint64 // packets that are no query to answer: FORMERR, NOTIMP, BADVERS, or ignored

	AnswersDropped   uint64 // over UDP, that Limits.ResponsesPerSecond kept back
	AnswersTruncated uint64 // the same, sent empty instead
	QueriesDropped   uint64 // beyond Limits.QueriesPerSecond, without an answer
	QueriesRefused   uint64 // the same, answered
	Crowding         uint64 // of Dropped: queries of sources that had their share of those under way. Over TCP they wait
	TunnelSuspected  uint64 // new names that looked like a tunnel
	TunnelRefused    uint64 // queries refused for that

	Upstreams []UpstreamStats // those in use, of Config.Upstreams and then of each zone
}

// A flight is one question on its way to the upstreams, and all who wait for it.
type flight struct {
	r       *Resolver
	k       key
	begun   time.Time
	done    chan struct{} // nil as long as nobody waits for it; guarded by Resolver.mu
	entry   *entry        // set before done is closed
	clients *udpQuery     // that no goroutine waits for; guarded by Resolver.mu
}

// New returns a Resolver for c, or every mistake in c, each with its path in the
// settings file. It reads the hosts file and resolv.conf but sends nothing. The
// caller calls Close in the end.
func New(c Config) (*Resolver, error) {
	r, err := parse(c)
	if err != nil {
		return nil, err
	}
	r.cache = newCache(r.cfg.Cache)
	r.life, r.end = context.WithCancel(context.Background())
	if len(c.Upstreams) == 0 {
		r.useSystem()
	}
	if c.HostsFile != "" {
		r.hosts = newHosts(c.HostsFile, r.cfg.Now, c.Logger)
		r.refreshHosts()
	}
	return r, nil
}

// Reload has the hosts file and resolv.conf read again before the next answer, whether
// they look changed or not. Otherwise that happens within a second of a change.
func (r *Resolver) Reload() {
	if r.hosts != nil {
		r.hosts.file.forget()
	}
	if r.system != nil {
		r.system.forget()
	}
}

// Check returns every mistake that New would find in c, as New says them. It
// reads no files, binds nothing and sends nothing.
func Check(c Config) error {
	_, err := parse(c)
	return err
}

// parse returns the parts of a Resolver that take no more than c, or every mistake in c.
func parse(c Config) (*Resolver, error) {
	c = c.withDefaults()
	r := &Resolver{
		cfg:     c,
		zones:   make(map[string]*pool),
		timing:  timing{tryTimeout, totalTimeout, staleWait, resolutionDelay, probeWait},
		flights: make(map[key]*flight),
	}
	errs := []error{c.check()}
	var err error
	r.records, err = parseRecords(c.Records)
	errs = append(errs, err)
	ups, err := c.parseUpstreams("dns.upstreams", c.Upstreams)
	errs = append(errs, err)
	r.pool = r.newPool("", ups)
	errs = append(errs, r.addZones(), r.addLocal())
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return r, nil
}

// newPool returns the pool of a zone, "" for the names that are in none.
func (r *Resolver) newPool(zone string, ups []*upstream) *pool {
	p := &pool{zone: zone, fastest: r.cfg.UpstreamMode == UpstreamsFastest, start: r.start,
		now: r.cfg.Now, timing: &r.timing, counts: &r.counts, logger: r.cfg.Logger}
	if zone != "" {
		p.logger = p.logger.With().Str("zone", zone).Logger()
	}
	p.ups.Store(&ups)
	return p
}

func (r *Resolver) addZones() error {
	var errs []error
	for i, z := range r.cfg.Zones {
		path := fmt.Sprintf("dns.zones[%d]", i)
		name, err := policy.ParseName(z.Zone)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s.zone: %w", path, err))
		}
		if r.zones[name.String()] != nil {
			errs = append(errs, fmt.Errorf("%s.zone: %s is there already; put all its upstreams together", path, name))
		}
		ups, err := r.cfg.parseUpstreams(path+".upstreams", z.Upstreams)
		errs = append(errs, err)
		if len(z.Upstreams) == 0 {
			errs = append(errs, fmt.Errorf("%s.upstreams: none; a zone needs servers to ask", path))
		}
		p := r.newPool(name.String(), ups)
		for j, private := range z.PrivateDestinations {
			if err := checkPrivate(private); err != nil {
				errs = append(errs, fmt.Errorf("%s.private_destinations[%d]: %w", path, j, err))
			}
			p.private = append(p.private, private.Masked())
		}
		r.zones[name.String()] = p
		r.privateZones = r.privateZones || len(p.private) > 0
	}
	return errors.Join(errs...)
}

// listensOn reports whether a query to addr would come back to a Server of c.
func (c Config) listensOn(addr netip.AddrPort) bool {
	return slices.ContainsFunc(c.Listen, func(s string) bool {
		l, err := parseListen(s)
		all := !l.Addr().IsValid() || l.Addr().IsUnspecified()
		return err == nil && addr.IsValid() && l.Port() == addr.Port() &&
			(l.Addr() == addr.Addr().Unmap() || all && addr.Addr().Unmap().IsLoopback())
	})
}

// useSystem takes the upstreams from resolv.conf, and again whenever it changes.
func (r *Resolver) useSystem() {
	file := &watched{path: r.cfg.ResolvConf, now: r.cfg.Now, load: r.loadResolvConf}
	r.system = file
	r.pool.refresh = func() {
		if err := file.refresh(); err != nil {
			r.cfg.Logger.Warn().Err(err).Msg("cannot read the system's name servers; set dns.upstreams")
		}
	}
	r.pool.refresh()
}

func (r *Resolver) loadResolvConf(f io.Reader) error {
	conf, err := dns.ClientConfigFromReader(f)
	if err != nil {
		return err
	}
	old := *r.pool.ups.Load()
	var ups []*upstream
	for _, s := range conf.Servers {
		named := func(u *upstream) bool { return u.text == s }
		if i := slices.IndexFunc(old, named); i >= 0 { // it stays, with the questions under way
			if !slices.ContainsFunc(ups, named) {
				ups = append(ups, old[i])
			}
			continue
		}
		u, err := r.cfg.parseUpstream(s)
		if err != nil || r.cfg.listensOn(u.addr) {
			r.cfg.Logger.Warn().Str("file", r.cfg.ResolvConf).Str("nameserver", s).Msg("name server not used: no address, or this resolver itself")
			continue
		}
		ups = append(ups, u)
	}
	if len(ups) == 0 {
		r.cfg.Logger.Warn().Str("file", r.cfg.ResolvConf).Msg("no name server found; set dns.upstreams")
	}
	r.pool.ups.Store(&ups)
	gone := slices.DeleteFunc(slices.Clone(old), func(u *upstream) bool { return slices.Contains(ups, u) })
	if !r.start(func(context.Context) { closeAll(gone) }) { // questions under way go to the new ones
		closeAll(gone)
	}
	return nil
}

// start runs f in a goroutine that Close waits for, with a context that Close ends. It
// returns false, and does not, once the Resolver is closed.
func (r *Resolver) start(f func(context.Context)) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.flying.Go(func() { f(r.life) })
	}
	return !r.closed
}

func (r *Resolver) refreshHosts() {
	if r.hosts == nil {
		return
	}
	if err := r.hosts.file.refresh(); err != nil {
		r.cfg.Logger.Warn().Err(err).Msg(`cannot read the hosts file; mend it or dns.hosts_file, "" is none`)
	}
}

// Close ends what is under way with the upstreams and waits for it. What is
// asked afterwards fails.
func (r *Resolver) Close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.end()
	r.flying.Wait()
	for _, p := range r.pools() {
		p.close()
	}
}

// Stats returns the numbers so far, of the Resolver and its Server.
func (r *Resolver) Stats() Stats {
	c := &r.counts
	s := Stats{
		CacheHits: c.hits.Load(), CacheMisses: c.misses.Load(), CacheStale: c.stale.Load(),
		CacheEvictions: r.cache.evicted.Load(), Coalesced: c.coalesced.Load(),
		UpstreamQueries: c.sent.Load(), UpstreamFailures: c.failed.Load(),
		Dropped: c.dropped.Load(), Malformed: c.malformed.Load(), Prefetched: c.prefetched.Load(),
		AnswersDropped: c.answersDropped.Load(), AnswersTruncated: c.answersTruncated.Load(),
		QueriesDropped: c.queriesDropped.Load(), QueriesRefused: c.queriesRefused.Load(), Crowding: c.crowding.Load(),
		TunnelSuspected: c.suspected.Load(), TunnelRefused: c.tunnelsRefused.Load(),
	}
	for _, p := range r.pools() {
		for i, u := range *p.ups.Load() {
			s.Upstreams = append(s.Upstreams, u.stats(p.zone, i))
			s.UpstreamIgnored += u.ignored.Load()
		}
	}
	s.CacheEntries, s.CacheBytes = r.cache.size()
	r.mu.Lock()
	s.InFlight = len(r.flights)
	r.mu.Unlock()
	return s
}

// pools returns those of Config.Upstreams and of the zones in their order.
func (r *Resolver) pools() []*pool {
	all := []*pool{r.pool}
	for _, z := range r.cfg.Zones {
		if name, err := policy.ParseName(z.Zone); err == nil {
			all = append(all, r.zones[name.String()])
		}
	}
	return all
}

// CheckUpstreams returns nil if one of Config.Upstreams has answered within the
// last ten seconds or answers now, whatever it answers. Otherwise the error is
// that of the last one asked. Zones are not looked at.
func (r *Resolver) CheckUpstreams(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.timing.total)
	defer cancel()
	return r.pool.probe(ctx)
}

// UpstreamOK reports whether the last exchange with at least one of
// Config.Upstreams went well, or none has been tried yet. It sends nothing.
func (r *Resolver) UpstreamOK() bool { return !r.pool.failing() }

// resolve returns the whole answer to k, following aliases that an upstream or a
// local record leaves open. The error is that of ctx, or that the Resolver is busy or closed;
// what upstreams failed at is in the reply. If follow is not nil, it is asked before
// each alias that is followed; when it says no, the reply is what there is so far,
// with next set.
func (r *Resolver) resolve(ctx context.Context, k key, follow func(*reply) bool) (*reply, error) {
	begun := time.Now()
	rep, err := r.lookup(ctx, k)
	for hops := 0; err == nil && !rep.next.IsZero(); hops++ {
		if hops == maxChain {
			return &reply{rcode: dns.RcodeServerFailure, ede: dns.ExtendedErrorCodeNoReachableAuthority, err: errors.New("too many aliases")}, nil
		}
		if time.Since(begun) > r.timing.total {
			err := fmt.Errorf("aliases take too long: %w", context.DeadlineExceeded)
			return &reply{rcode: dns.RcodeServerFailure, ede: dns.ExtendedErrorCodeNoReachableAuthority, err: err}, nil
		}
		if follow != nil && !follow(rep) {
			return rep, nil
		}
		k.name = rep.next
		var more *reply
		if more, err = r.lookup(ctx, k); err == nil {
			rep.extend(more)
		}
	}
	return rep, err
}

// lookup returns what is known of k, or can be found out.
func (r *Resolver) lookup(ctx context.Context, k key) (*reply, error) {
	rep, stale, retry := r.known(k)
	if rep != nil {
		return rep, nil
	}
	e := stale
	if stale == nil || retry {
		var err error
		if e, err = r.fetch(ctx, k, stale); err != nil {
			r.counts.misses.Add(1)
			if errors.Is(err, errBusy) {
				r.counts.dropped.Add(1)
			}
			return nil, err
		}
	}
	if e == stale {
		r.counts.stale.Add(1)
	} else {
		r.counts.misses.Add(1)
	}
	return e.reply(r.cfg.Now(), e == stale), nil
}

// known returns the answer to k as far as it takes no upstream, or what stands in
// if the upstreams fail and whether to ask them.
func (r *Resolver) known(k key) (rep *reply, stale *entry, retry bool) {
	r.refreshHosts()
	if rep := r.hosts.reply(k); rep != nil {
		return rep, nil, false
	}
	if rep := r.records.reply(k, r.hosts); rep != nil {
		return rep, nil, false
	}
	now := r.cfg.Now()
	fresh, stale, retry := r.cache.get(k, now)
	if fresh == nil {
		return nil, stale, retry
	}
	r.counts.hits.Add(1)
	r.used(k, fresh, now)
	return fresh.reply(now, false), nil, false
}

// cached reports whether the answer to k is known.
func (r *Resolver) cached(k key, now time.Time) bool {
	e, _, _ := r.cache.get(k, now)
	return e != nil
}

// recorded returns the answer to k if its name has records, else nil.
func (r *Resolver) recorded(k key) *reply {
	r.refreshHosts()
	return r.records.reply(k, r.hosts)
}

// fetch asks the upstreams, together with everybody who asks the same. It gives
// up on them after a while, or if they fail or too much is being asked of them, if there
// is something stale to return.
func (r *Resolver) fetch(ctx context.Context, k key, stale *entry) (*entry, error) {
	f, err := r.join(k)
	if stale != nil && errors.Is(err, errBusy) {
		return stale, nil
	}
	if err != nil {
		return nil, err
	}
	var patience <-chan time.Time
	if stale != nil {
		t := time.NewTimer(r.timing.staleWait - time.Since(f.begun)) // whoever asked first has waited already
		defer t.Stop()
		patience = t.C
	}
	select {
	case <-f.done:
	case <-patience:
		return stale, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if f.entry.err != nil && stale != nil {
		return stale, nil
	}
	return f.entry, nil
}

// join returns the flight for k that is under way, or starts one.
func (r *Resolver) join(k key) (*flight, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.flights[k]
	switch {
	case f != nil:
		r.counts.coalesced.Add(1)
	case r.closed:
		return nil, errClosed
	case len(r.flights) == maxFlights:
		return nil, errBusy
	default:
		f = r.launch(k)
	}
	if f.done == nil {
		f.done = make(chan struct{})
	}
	return f, nil
}

// launch starts a flight for k. The caller holds mu, and has seen that there is room.
func (r *Resolver) launch(k key) *flight {
	begun := time.Now()
	f := r.newFlight(k, begun)
	r.flying.Go(func() { r.fly(f, begun, nil) })
	return f
}

// newFlight returns a flight for k that others can join. The caller holds mu.
func (r *Resolver) newFlight(k key, begun time.Time) *flight {
	f := &flight{r: r, k: k, begun: begun}
	r.flights[k] = f
	return f
}

// fly asks the upstreams, with the time that is left since begun, and remembers the
// answer. If tried is not nil, one of them has been asked already.
func (r *Resolver) fly(f *flight, begun time.Time, tried *attempt) {
	k := f.k
	p := r.poolFor(k.name)
	m, err := p.exchange(r.life, k.query(), begun, tried)
	if err == nil && p.zone != "" {
		m.AuthenticatedData = false // a chain of trust to a zone of one's own is nobody's to vouch for
	}
	now := r.cfg.Now()
	var e *entry
	if err != nil {
		e = failedEntry(k, err, failureEDE(err), now)
	} else {
		e = newEntry(k, m, now, r.cfg.Cache)
	}
	if !isExhausted(err) { // for that may be over in a moment
		r.cache.put(k, e, now) // before the flight ends, so that nobody begins another
	}
	deliver(r.land(f, e), e)
}

// land ends f with e, which has been remembered. The caller answers the clients returned.
func (r *Resolver) land(f *flight, e *entry) *udpQuery {
	f.entry = e
	r.mu.Lock()
	delete(r.flights, f.k)
	clients, done := f.clients, f.done
	f.clients = nil
	r.mu.Unlock()
	if done != nil {
		close(done)
	}
	return clients
}

// poolFor returns the upstreams of the longest zone that name is in, or the general ones.
func (r *Resolver) poolFor(name policy.Name) *pool {
	for s := name.String(); len(r.zones) > 0; {
		if p, ok := r.zones[s]; ok {
			return p
		}
		_, parent, ok := strings.Cut(s, ".")
		if !ok {
			break
		}
		s = parent
	}
	return r.pool
}
