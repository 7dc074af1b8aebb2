package dnsfilter

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
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
	tryTimeout   = 2 * time.Second  // for one exchange with one upstream
	totalTimeout = 5 * time.Second  // for one question, whatever is tried; stub resolvers wait as long
	maxRounds    = 2                // how often the list of upstreams is gone through
	maxPenalty   = 30 * time.Second // how long an upstream that failed stays behind the others
	fresh        = 10 * time.Second // an answer as recent as this shows that an upstream is well
)

var errNoUpstream = errors.New("no upstream is known")

// An upstream is one server with the memory of how it fared.
type upstream struct {
	exchanger
	text string // as configured
	addr netip.AddrPort

	mu       sync.Mutex // guards what follows
	failures int        // in a row
	until    time.Time  // it stays behind the others until then
	answered time.Time  // last
}

// note records how an exchange ended.
func (u *upstream) note(now time.Time, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if ok {
		u.failures, u.until, u.answered = 0, time.Time{}, now
		return
	}
	u.failures++
	u.until = now.Add(min(time.Second<<min(u.failures, 10), maxPenalty))
}

// penalty returns until when u stays behind the others, zero if it does not.
func (u *upstream) penalty(now time.Time) time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	if now.Before(u.until) {
		return u.until
	}
	return time.Time{}
}

// wellSince reports whether u has answered since t and not failed after that.
func (u *upstream) wellSince(t time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.failures == 0 && !u.answered.Before(t)
}

// A pool is a list of upstreams that can answer the same questions.
type pool struct {
	ups     atomic.Pointer[[]*upstream]
	refresh func() // brings ups up to date before it is read; nil: it never changes
	now     func() time.Time
	timing  *timing
	sent    *atomic.Uint64 // exchanges begun
	failed  *atomic.Uint64 // exchanges without an answer that can be read
	logger  zerolog.Logger
	down    atomic.Bool // it has been logged that all fail
}

// order returns the upstreams, those that failed lately last.
func (p *pool) order() []*upstream {
	if p.refresh != nil {
		p.refresh()
	}
	ups, now := slices.Clone(*p.ups.Load()), p.now()
	if len(ups) < 2 {
		return ups
	}
	penalties := make(map[*upstream]time.Time, len(ups))
	for _, u := range ups {
		penalties[u] = u.penalty(now)
	}
	slices.SortStableFunc(ups, func(a, b *upstream) int { return penalties[a].Compare(penalties[b]) })
	return ups
}

// exchange asks one upstream after the other. An answer that says that the
// upstream could not or would not find out is returned only if no other has a better one.
func (p *pool) exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	ups, last := p.order(), errNoUpstream
	for range maxRounds {
		var unable *dns.Msg
		for _, u := range ups {
			m, err := p.ask(ctx, u, query)
			switch {
			case err != nil:
				last = fmt.Errorf("upstream %s: %w", u.text, err)
			case conclusive(m.Rcode):
				return m, nil
			default:
				unable = m
			}
			if ctx.Err() != nil {
				break
			}
		}
		if unable != nil {
			return unable, nil
		}
		if ctx.Err() != nil {
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
func (p *pool) answered(u *upstream) {
	u.note(p.now(), true)
	if p.down.CompareAndSwap(true, false) {
		p.logger.Info().Str("upstream", u.text).Msg("an upstream answers again")
	}
}

// ask does one exchange within its share of the time.
func (p *pool) ask(ctx context.Context, u *upstream, query *dns.Msg) (*dns.Msg, error) {
	try, cancel := context.WithTimeout(ctx, p.timing.try)
	defer cancel()
	p.sent.Add(1)
	m, err := u.exchange(try, query)
	switch {
	case err == nil:
		p.answered(u)
	case errors.Is(err, errMalformed): // it is there, and not slow
		p.failed.Add(1)
		p.answered(u)
	case isExhausted(err): // which is nobody's fault but ours
		p.failed.Add(1)
	case !errors.Is(ctx.Err(), context.Canceled): // which says nothing about u
		p.failed.Add(1)
		u.note(p.now(), false)
	}
	return m, err
}

// isExhausted reports whether err says that this process or the system has no
// descriptors left.
func isExhausted(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// conclusive reports whether an upstream that answers with rcode has found out.
func conclusive(rcode int) bool {
	return rcode == dns.RcodeSuccess || rcode == dns.RcodeNameError || rcode == dns.RcodeYXDomain
}

// probe returns nil if an upstream has answered lately or answers now.
func (p *pool) probe(ctx context.Context) error {
	if p.well() {
		return nil
	}
	query := new(dns.Msg).SetQuestion(".", dns.TypeNS)
	last := errNoUpstream
	for _, u := range p.order() {
		_, err := p.ask(ctx, u, query)
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

func (p *pool) close() {
	for _, u := range *p.ups.Load() {
		u.close()
	}
}

// parseUpstreams returns the upstreams of texts, and every mistake under path.
func (c Config) parseUpstreams(path string, texts []string) ([]*upstream, error) {
	var ups []*upstream
	var errs []error
	for i, s := range texts {
		u, err := parseUpstream(s, c.RootCAs)
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
		tcp := &stream{addr: u.addr.String()}
		u.exchanger = tcp
		if scheme == "udp" {
			u.exchanger = &datagram{tcp.addr, tcp}
		}
	case "tls":
		u.exchanger, err = parseTLS(rest, roots)
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

func parseTLS(s string, roots *x509.CertPool) (exchanger, error) {
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
	return &stream{addr: addr, tls: tlsConfig(name, roots)}, nil
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
