package dnsfilter

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/rs/zerolog"

	"sallyport/policy"
)

const (
	tryTimeout   = 1500 * time.Millisecond // for one exchange with one upstream
	totalTimeout = 4 * time.Second         // for one question, whatever is tried; stub resolvers wait for five
	maxRounds    = 2                       // how often the list of upstreams is gone through
	maxPenalty   = 30 * time.Second        // how long an upstream that failed stays behind the others
	fresh        = 10 * time.Second        // an answer as recent as this shows that an upstream is well
	downAfter    = 3                       // failures in a row: then it is down, and probed until it answers
	probeWait    = time.Second             // before the first probe; each wait is twice the last one
	maxProbeWait = 30 * time.Second        // between probes
	plainFor     = 10 * time.Minute        // a server that answered FORMERR to EDNS is asked without
	explore      = 32                      // in UpstreamsFastest, one question of so many goes to another than the fastest
)

var errNoUpstream = errors.New("no upstream is known")

// An upstream is one server with the memory of how it fared.
type upstream struct {
	exchanger
	text    string // as configured
	addr    netip.AddrPort
	sent    atomic.Uint64 // exchanges begun
	failed  atomic.Uint64 // exchanges without an answer that can be read
	ignored atomic.Uint64 // answers that match no query
	plain   atomic.Int64  // until when it is asked without EDNS, in Unix nanoseconds
	gone    atomic.Bool   // not used any more

	mu       sync.Mutex    // guards what follows
	failures int           // in a row
	until    time.Time     // it stays behind the others until then
	answered time.Time     // last
	rtt      time.Duration // smoothed; 0: nothing is known
	probing  bool
}

// succeeded records that u answered after took.
func (u *upstream) succeeded(now time.Time, took time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.failures, u.until, u.answered = 0, time.Time{}, now
	if u.rtt == 0 {
		u.rtt = took
	}
	u.rtt += (took - u.rtt) / 8 // RFC 6298, section 2.3
}

// missed records that u failed, and reports whether somebody has to probe it from now on.
func (u *upstream) missed(now time.Time) (probe bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.failures++
	u.until = now.Add(min(time.Second<<min(u.failures, 10), maxPenalty))
	probe = u.failures >= downAfter && !u.probing && !u.gone.Load()
	u.probing = u.probing || probe
	return probe
}

// A standing is how an upstream compares with others.
type standing struct {
	*upstream
	down    bool
	penalty time.Time // until when it stays behind the others, zero if it does not
	rtt     time.Duration
}

// compare orders those that are well first, and of these the fastest if fastest is set.
func (s standing) compare(other standing, fastest bool) int {
	switch {
	case s.down != other.down:
		if s.down {
			return 1
		}
		return -1
	case s.down || !s.penalty.Equal(other.penalty):
		return s.penalty.Compare(other.penalty)
	case fastest:
		return cmp.Compare(s.rtt, other.rtt)
	}
	return 0
}

func (u *upstream) standing(now time.Time) standing {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := standing{upstream: u, down: u.failures >= downAfter, rtt: u.rtt}
	if now.Before(u.until) {
		s.penalty = u.until
	}
	return s
}

// wellSince reports whether u has answered since t and not failed after that.
func (u *upstream) wellSince(t time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.failures == 0 && !u.answered.Before(t)
}

// UpstreamStats are numbers of one upstream since it has been in use.
type UpstreamStats struct {
	Zone     string        // "" for Config.Upstreams
	Index    int           // in the list it stands in
	Upstream string        // as configured, without the path of a URL, which may be a secret
	Up       bool          // it answered last time, or has not been asked yet
	RTT      time.Duration // smoothed; 0: nothing is known
	Queries  uint64        // exchanges begun
	Failures uint64        // exchanges that ended without an answer, or with a malformed one
}

func (u *upstream) stats(zone string, i int) UpstreamStats {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := UpstreamStats{Zone: zone, Index: i, Upstream: u.text, Up: u.failures < downAfter, RTT: u.rtt,
		Queries: u.sent.Load(), Failures: u.failed.Load()}
	if scheme, rest, ok := strings.Cut(u.text, "://"); ok {
		host, _, _ := strings.Cut(rest, "/")
		s.Upstream = scheme + "://" + host
	}
	return s
}

// A pool is a list of upstreams that can answer the same questions.
type pool struct {
	ups     atomic.Pointer[[]*upstream]
	zone    string                           // "" for the names that are in none
	private []netip.Prefix                   // Zone.PrivateDestinations
	fastest bool                             // as UpstreamsFastest
	refresh func()                           // brings ups up to date before it is read; nil: it never changes
	start   func(func(context.Context)) bool // runs something until the Resolver is closed
	now     func() time.Time
	timing  *timing
	counts  *counts
	logger  zerolog.Logger
	down    atomic.Bool // it has been logged that all fail
}

// order returns the upstreams in the order in which to ask them: those that are
// down last, before them those that failed lately. The caller does not change the list.
func (p *pool) order() []*upstream {
	if p.refresh != nil {
		p.refresh()
	}
	ups := *p.ups.Load()
	if len(ups) < 2 {
		return ups
	}
	now := p.now()
	all := make([]standing, len(ups))
	for i, u := range ups {
		all[i] = u.standing(now)
	}
	slices.SortStableFunc(all, func(a, b standing) int { return a.compare(b, p.fastest) })
	well := slices.IndexFunc(all, func(s standing) bool { return s.down || !s.penalty.IsZero() })
	if well < 0 {
		well = len(all)
	}
	if p.fastest && well > 1 && rand.IntN(explore) == 0 {
		i := 1 + rand.IntN(well-1)
		all[0], all[i] = all[i], all[0]
	}
	sorted := make([]*upstream, len(all))
	for i := range all {
		sorted[i] = all[i].upstream
	}
	return sorted
}

// An attempt is an exchange with an upstream that is over, and what came of it.
type attempt struct {
	u         *upstream
	m         *dns.Msg
	err       error
	truncated bool // the answer, so that TCP is left to try
}

// exchange asks one upstream after the other. An answer that says that the
// upstream could not or would not find out is returned only if no other has a better
// one. It takes until timing.total after begun at most. If tried is not nil, it stands
// for the first exchange with its upstream.
func (p *pool) exchange(ctx context.Context, query *dns.Msg, begun time.Time, tried *attempt) (*dns.Msg, error) {
	last := errNoUpstream
	end := begun.Add(p.timing.total)
	over := func() bool { return ctx.Err() != nil || !time.Now().Before(end) }
	for range maxRounds {
		var unable *dns.Msg
		for _, u := range p.order() { // anew: those of the first round may have been replaced meanwhile
			var m *dns.Msg
			var err error
			switch within := min(p.timing.try, time.Until(end)); {
			case tried == nil || tried.u != u:
				m, err = p.ask(ctx, u, query, within)
			case tried.truncated:
				m, err = p.askStream(ctx, u, query, within)
				tried = nil
			default:
				m, err = tried.m, tried.err
				tried = nil
			}
			switch {
			case err != nil:
				last = fmt.Errorf("upstream %s: %w", u.text, err)
			case conclusive(m.Rcode):
				return m, nil
			default:
				unable = m
			}
			if over() {
				break
			}
		}
		if unable != nil {
			return unable, nil
		}
		if over() {
			break
		}
	}
	p.warn(ctx, last)
	return nil, last
}

// warn logs that all upstreams fail, err being the last failure, unless it has been
// logged since one answered.
func (p *pool) warn(ctx context.Context, err error) {
	if !errors.Is(ctx.Err(), context.Canceled) && len(*p.ups.Load()) > 0 && p.failing() && p.down.CompareAndSwap(false, true) {
		p.logger.Warn().Err(err).Msg("no upstream answers; check dns.upstreams, dns.zones and the way there")
	}
}

// answered notes that u has answered, and logs it if all had failed.
func (p *pool) answered(u *upstream, now time.Time, took time.Duration) {
	u.succeeded(now, took)
	if p.down.Load() && p.down.CompareAndSwap(true, false) {
		p.logger.Info().Str("upstream", u.text).Msg("an upstream answers again")
	}
}

// ask does one exchange within a time.
func (p *pool) ask(ctx context.Context, u *upstream, query *dns.Msg, within time.Duration) (*dns.Msg, error) {
	try, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	p.counts.sent.Add(1)
	u.sent.Add(1)
	begun := time.Now()
	m, err := p.askPlain(try, u, query)
	p.judge(ctx, u, err, time.Since(begun))
	return m, err
}

// askStream is ask for a query that has been asked over UDP, with a truncated answer.
func (p *pool) askStream(ctx context.Context, u *upstream, query *dns.Msg, within time.Duration) (*dns.Msg, error) {
	try, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	begun := time.Now()
	m, err := u.exchanger.(*datagram).stream.exchange(try, query)
	p.judge(ctx, u, err, time.Since(begun))
	return m, err
}

// judge counts an exchange with u that took some time, and remembers how u fared.
func (p *pool) judge(ctx context.Context, u *upstream, err error, took time.Duration) {
	switch {
	case err == nil:
		p.answered(u, p.now(), took)
	case errors.Is(err, errMalformed): // it is there, and not slow
		p.counts.failed.Add(1)
		u.failed.Add(1)
		p.answered(u, p.now(), took)
	case isExhausted(err), noRoom(err): // which is nobody's fault but ours
		p.counts.failed.Add(1)
	case ctx.Err() == nil: // or the caller's time was over, which says nothing about u
		p.counts.failed.Add(1)
		u.failed.Add(1)
		if u.missed(p.now()) {
			p.start(func(ctx context.Context) { p.revive(ctx, u) })
		}
	}
}

// isExhausted reports whether err says that this process or the system has no
// descriptors left. Of a name that could not be looked up for that, package net keeps
// the text alone.
func isExhausted(err error) bool {
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		return true
	}
	failed, ok := errors.AsType[*net.DNSError](err)
	return ok && (strings.HasSuffix(failed.Err, syscall.EMFILE.Error()) || strings.HasSuffix(failed.Err, syscall.ENFILE.Error()))
}

// askPlain asks with EDNS and, if the server does not know it, without (RFC 6891,
// section 7), which is remembered for a while.
func (p *pool) askPlain(ctx context.Context, u *upstream, query *dns.Msg) (*dns.Msg, error) {
	known := p.plainKnown(u)
	if !known {
		m, err := u.exchange(ctx, query)
		if err != nil || m.Rcode != dns.RcodeFormatError || m.IsEdns0() != nil || query.IsEdns0() == nil {
			return m, err
		}
	}
	plain := *query
	plain.Extra = nil
	m, err := u.exchange(ctx, &plain)
	if !known && err == nil && m.Rcode != dns.RcodeFormatError { // or it is the question that it does not like
		u.plain.Store(p.now().Add(plainFor).UnixNano())
	}
	return m, err
}

// revive probes u, which is down, until it answers or is not used any more.
func (p *pool) revive(ctx context.Context, u *upstream) {
	defer func() {
		u.mu.Lock()
		u.probing = false
		u.mu.Unlock()
	}()
	for wait := p.timing.probe; ; wait = min(2*wait, maxProbeWait) {
		t := time.NewTimer(wait/2 + rand.N(wait)) // not all gates at the same time
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		if u.gone.Load() || u.wellSince(time.Time{}) {
			return
		}
		if _, err := p.ask(ctx, u, probeQuery(), p.timing.try); err == nil || errors.Is(err, errMalformed) {
			return
		}
	}
}

// probeQuery returns a question that every server has an answer to, be it a refusal.
func probeQuery() *dns.Msg { return new(dns.Msg).SetQuestion(".", dns.TypeNS) }

// conclusive reports whether an upstream that answers with rcode has found out.
func conclusive(rcode int) bool {
	return rcode == dns.RcodeSuccess || rcode == dns.RcodeNameError || rcode == dns.RcodeYXDomain
}

// probe returns nil if an upstream has answered lately or answers now.
func (p *pool) probe(ctx context.Context) error {
	if p.well() {
		return nil
	}
	last := errNoUpstream
	for _, u := range p.order() {
		_, err := p.ask(ctx, u, probeQuery(), p.timing.try)
		if err == nil {
			return nil
		}
		last = fmt.Errorf("upstream %s: %w", u.text, err)
	}
	p.warn(ctx, last)
	return last
}

// well reports whether an upstream has answered lately.
func (p *pool) well() bool {
	since := p.now().Add(-fresh)
	return slices.ContainsFunc(*p.ups.Load(), func(u *upstream) bool { return u.wellSince(since) })
}

// failing reports whether each upstream's last exchange failed, or there is none.
func (p *pool) failing() bool {
	return !slices.ContainsFunc(*p.ups.Load(), func(u *upstream) bool { return u.wellSince(time.Time{}) })
}

func (p *pool) close() { closeAll(*p.ups.Load()) }

// closeAll ends what is under way with ups and waits for it.
func closeAll(ups []*upstream) {
	for _, u := range ups {
		u.gone.Store(true)
		u.close()
	}
}

// parseUpstreams returns the upstreams of texts, and every mistake under path.
func (c Config) parseUpstreams(path string, texts []string) ([]*upstream, error) {
	var ups []*upstream
	var errs []error
	for i, s := range texts {
		u, err := c.parseUpstream(s)
		if err == nil && c.listensOn(u.addr) {
			err = fmt.Errorf("%q is this resolver itself", s)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s[%d]: %w", path, i, err))
			continue
		}
		ups = append(ups, u)
	}
	return ups, errors.Join(errs...)
}

// parseUpstream is the function parseUpstream with the settings of c.
func (c Config) parseUpstream(s string) (*upstream, error) {
	u, err := parseUpstream(s, c.RootCAs)
	if err != nil {
		return nil, err
	}
	if d, ok := u.exchanger.(*datagram); ok {
		d.randomCase = c.CaseRandomisation
	}
	return u, nil
}

// parseUpstream returns the upstream that s describes, as Config.Upstreams says.
func parseUpstream(s string, roots *x509.CertPool) (*upstream, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		scheme, rest = "udp", s
	}
	u := &upstream{text: s}
	var err error
	switch scheme {
	case "udp", "tcp":
		if u.addr, err = parseServer(rest); err != nil {
			return nil, fmt.Errorf("%q: %w", s, err)
		}
		tcp := &stream{addr: u.addr.String(), ignored: &u.ignored}
		u.exchanger = tcp
		if scheme == "udp" {
			u.exchanger = &datagram{addr: tcp.addr, remote: net.UDPAddrFromAddrPort(u.addr), stream: tcp, ignored: &u.ignored}
		}
	case "tls":
		u.exchanger, err = parseTLS(rest, roots, &u.ignored)
	case "https":
		u.exchanger, err = parseHTTPS(s, roots)
	default:
		err = fmt.Errorf("%q is none of udp, tcp, tls, https", scheme)
	}
	if err != nil {
		return nil, fmt.Errorf("%q: %w", s, err)
	}
	return u, nil
}

// parseServer parses an address with port 53 as the default.
func parseServer(s string) (netip.AddrPort, error) {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		a, aerr := netip.ParseAddr(strings.Trim(s, "[]"))
		if aerr != nil {
			return netip.AddrPort{}, errors.New("not an address; write ip or ip:port, or [ip]:port for IPv6")
		}
		ap = netip.AddrPortFrom(a, 53)
	}
	if ap.Port() == 0 || ap.Addr().IsUnspecified() {
		return netip.AddrPort{}, errors.New("nothing can be reached there; write the address and port of a server")
	}
	return ap, nil
}

func parseTLS(s string, roots *x509.CertPool, ignored *atomic.Uint64) (exchanger, error) {
	s, name, named := strings.Cut(s, "#")
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = strings.Trim(s, "[]"), "853" // RFC 7858, section 3.1
	}
	if err := checkHost(host, name, named); err != nil {
		return nil, err
	}
	if !named {
		name = host
	}
	addr := net.JoinHostPort(host, port)
	if err := checkPort(port); err != nil {
		return nil, err
	}
	return &stream{addr: addr, tls: tlsConfig(name, roots), ignored: ignored}, nil
}

func parseHTTPS(s string, roots *x509.CertPool) (exchanger, error) {
	u, err := url.Parse(s)
	if err != nil || u.User != nil {
		return nil, errors.New("not a URL; write https://host/dns-query")
	}
	host, name, named := u.Hostname(), u.Fragment, u.Fragment != ""
	if err := checkHost(host, name, named); err != nil {
		return nil, err
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	if err := checkPort(port); err != nil {
		return nil, err
	}
	if u.Path == "" {
		u.Path = "/dns-query"
	}
	u.Fragment = ""
	var dial string
	if named {
		dial = net.JoinHostPort(host, port)
		u.Host = net.JoinHostPort(name, port)
	}
	return newDoH(u.String(), dial, tlsConfig("", roots)), nil
}

// checkHost wants an address or a name as host, and a name behind "#", if there is one.
func checkHost(host, name string, named bool) error {
	if _, err := netip.ParseAddr(host); err != nil {
		if _, err := policy.ParseName(host); err != nil {
			return fmt.Errorf("host %q is neither an address nor a name", host)
		}
	}
	if named {
		if _, err := policy.ParseName(name); err != nil {
			return fmt.Errorf("behind # the name in the server's certificate is wanted: %w", err)
		}
	}
	return nil
}

func checkPort(port string) error {
	if _, err := netip.ParseAddrPort("0.0.0.0:" + port); err != nil || port == "0" {
		return fmt.Errorf("port %q is not between 1 and 65535", port)
	}
	return nil
}

// tlsConfig returns what a TLS upstream is dialled with. Without a name the
// dialler takes the host's.
func tlsConfig(name string, roots *x509.CertPool) *tls.Config {
	return &tls.Config{
		ServerName:         name,
		RootCAs:            roots,
		MinVersion:         tls.VersionTLS12,
		ClientSessionCache: tls.NewLRUClientSessionCache(maxIdleConns),
	}
}
