package dnsfilter

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/rs/zerolog"

	"sallyport/policy"
	"sallyport/policy/event"
)

// A Decider decides requests; *policy.Store is one. If it has a method Policy too, as that
// has, it must decide what it signs with that policy's Revision as that policy does: it is not
// asked again about what cannot come out otherwise (see [policy.Policy.Indifferent]).
type Decider interface {
	Decide(policy.Request) policy.Decision
}

// A WireDecider is a Decider that takes the name asked for as it is on the wire, as
// *policy.Store does: the same decision for less. It does not keep n. A Decider that
// is none is given Names.
type WireDecider interface {
	DecideWire(n *policy.WireName, r policy.Request) policy.Decision
}

// A Counter counts queries. CountQuery must neither block nor keep d.
type Counter interface {
	// CountQuery counts a query of a type, answered with rcode as d says. listener is
	// that of its Event: dns, dns_tls or dns_https.
	CountQuery(listener string, d *policy.Decision, qtype uint16, rcode int)
}

// Config says how a Resolver and its Server behave. It is not changed after New.
type Config struct {
	Decider  Decider        // decides every query, better as a WireDecider too; nil refuses every query
	Observer event.Observer // is told of the queries that Events names; nil: nobody is
	Counter  Counter        // is told of every query; nil: nobody is
	Logger   zerolog.Logger // for what an operator should act on; the zero value is silent

	// Listen holds the addresses of the Server as ip:port or :port, each for UDP and
	// TCP. Port 0 is any free port. Empty: the Server has no listeners.
	Listen []string

	// TLSListen and HTTPSListen hold the addresses where the Server speaks DNS over TLS
	// (RFC 7858) and HTTPS (RFC 8484, path /dns-query), as Listen. They need Certificate,
	// or SetCertificate before the first client.
	TLSListen   []string
	HTTPSListen []string
	Certificate tls.Certificate

	ProxyProtocol ProxyProtocol // on TCP, TLS and HTTPS

	// Upstreams are asked in this order, those that failed lately last: ip, ip:port,
	// udp://, tcp://, tls://host (port 853, RFC 7858) or https://host/path (RFC 8484).
	// Behind tls and https, "#name" is the name that the certificate must carry, for
	// hosts given as addresses: tls://9.9.9.9#dns.quad9.net. A host given by name is
	// looked up with the system's resolver at each new connection. UDP falls back to
	// TCP for truncated answers. Empty: the name servers of ResolvConf.
	Upstreams []string

	// UpstreamMode says which of several upstreams is asked first; "" is UpstreamsSequential.
	UpstreamMode UpstreamMode

	// CaseRandomisation sends names over UDP with letters in random case and ignores
	// answers that do not repeat it (draft-vixie-dnsext-dns0x20), which makes forged ones
	// rarer still. Nothing is heard then of a server that does not keep the case.
	CaseRandomisation bool

	// ResolvConf is read for upstreams if there are none, and again when it changes;
	// "" is /etc/resolv.conf. Its search list and options are ignored.
	ResolvConf string

	RootCAs *x509.CertPool // for tls and https upstreams; nil: the system's
	Zones   []Zone         // names that other upstreams answer; the longest suffix counts
	Records []Record       // answered locally, whatever the upstreams say

	// HostsFile is answered before anything else, and read again when its size or
	// modification time changes. "": no hosts file. It and ResolvConf must be regular
	// files: nothing else is opened, and what was read before stays. Lines of over
	// 64 KiB are skipped.
	HostsFile string

	Events       Events       // which queries Observer is told of; "" is EventsAll
	Deny         Denial       // how a refusal looks; "" is DenyRefused
	HTTPSRecords HTTPSRecords // what becomes of HTTPS and SVCB answers; "" is HTTPSStripECH
	CNAMEs       CNAMEs       // whether alias targets are decided too; "" is CNAMEsTrust
	Cache        Cache        // bounds of the cache
	Limits       Limits       // of what one source can ask for, and have sent
	TunnelGuard  TunnelGuard  // looks for data in the names asked for

	// HealthName is answered to every source, of a group or not, without an upstream
	// and whatever the policy says: A 127.0.0.1, AAAA ::1, TXT "ok". "": no name is.
	HealthName string

	// SearchDomains are suffixes that clients append to names while they search
	// (resolv.conf(5)), such as cluster.local. Unlisted names below them are answered
	// NXDOMAIN whatever Deny says, so that clients go on to the name as it was meant.
	SearchDomains []string

	// MaxUDPSize is the largest UDP answer in bytes, 512 to 4096, for clients that
	// accept as much (RFC 6891, section 6.2.5); 0 is 1232, which is never fragmented.
	MaxUDPSize int

	// Now is the clock for TTLs, decisions and events; nil is time.Now.
	Now func() time.Time
}

// ProxyProtocol says who speaks for others. The zero value: nobody.
type ProxyProtocol struct {
	// Trusted are the peers, load balancers, that must begin every connection with a
	// PROXY protocol header, version 1 or 2. Its source is then who asks, in every
	// respect. Peers outside of them that send one are cut off.
	Trusted []netip.Prefix
}

// A Zone is a name below which, and for which, other upstreams are asked.
type Zone struct {
	Zone      string   // such as corp.example
	Upstreams []string // as Config.Upstreams, at least one

	// PrivateDestinations are prefixes outside the globally reachable space that names
	// of the zone may lead to, where no rule says so: see Resolver.PrivateZone.
	PrivateDestinations []netip.Prefix
}

// A Record is answered locally. A name that has any record has no others than its Records.
type Record struct {
	Name  string        // owner, such as proxy.egress.internal
	Type  string        // A, AAAA, CNAME, TXT, PTR or SRV
	Value string        // an address, a name, a text, or "priority weight port target"
	TTL   time.Duration // in whole seconds; 0 is one minute
}

// Cache bounds what is remembered of the upstreams' answers.
type Cache struct {
	Size       int64         // bytes; 0 remembers nothing
	MinTTL     time.Duration // shorter TTLs are raised to it; 0 raises none
	MaxTTL     time.Duration // longer TTLs are cut to it; 0 is 24 hours
	ServeStale time.Duration // how long after its TTL an answer may stand in for a failed upstream (RFC 8767); 0: never
	Prefetch   bool          // an answer in use is asked for again in the last tenth of its TTL, so that nobody waits for it
}

// UpstreamMode says which of several upstreams is asked first. Those that failed
// lately always come after the others, those that are down last.
type UpstreamMode string

// The orders in which upstreams are asked.
const (
	UpstreamsSequential UpstreamMode = "sequential" // as they are listed
	UpstreamsFastest    UpstreamMode = "fastest"    // by smoothed round-trip time; one question in 32 goes to another, to know its time
)

// Denial is how a refusal looks to clients.
type Denial string

// The denials.
const (
	DenyRefused  Denial = "refused"  // RCODE REFUSED
	DenyNXDomain Denial = "nxdomain" // RCODE NXDOMAIN
	DenyNodata   Denial = "nodata"   // NOERROR without an answer
	DenySinkhole Denial = "sinkhole" // 0.0.0.0 and ::, NODATA for other types
)

// HTTPSRecords is what becomes of HTTPS and SVCB answers (RFC 9460).
type HTTPSRecords string

// The treatments of HTTPS and SVCB answers.
const (
	HTTPSPass     HTTPSRecords = "pass"      // answered as they are, but for addresses that do not pass
	HTTPSStripECH HTTPSRecords = "strip_ech" // without ech, so that honest clients send a plain server_name
	HTTPSNodata   HTTPSRecords = "nodata"    // never answered
)

// CNAMEs says whether the targets of aliases are decided too.
type CNAMEs string

// The treatments of alias targets.
const (
	CNAMEsTrust   CNAMEs = "trust"   // a listed name may lead anywhere
	CNAMEsInspect CNAMEs = "inspect" // every name on the way must be allowed for the source
)

const (
	defaultMaxTTL   = 24 * time.Hour
	defaultEDNSSize = 1232 // bytes; what DNS flag day 2020 settled on
	maxEDNSSize     = 4096
	minUDPSize      = 512 // RFC 1035, section 2.3.4
)

// withDefaults returns c with its zero values replaced.
func (c Config) withDefaults() Config {
	if c.Decider == nil {
		c.Decider = refuseAll{}
	}
	if c.ResolvConf == "" {
		c.ResolvConf = "/etc/resolv.conf"
	}
	if c.Events == "" {
		c.Events = EventsAll
	}
	if c.Deny == "" {
		c.Deny = DenyRefused
	}
	if c.HTTPSRecords == "" {
		c.HTTPSRecords = HTTPSStripECH
	}
	if c.UpstreamMode == "" {
		c.UpstreamMode = UpstreamsSequential
	}
	if c.CNAMEs == "" {
		c.CNAMEs = CNAMEsTrust
	}
	if c.Cache.MaxTTL == 0 {
		c.Cache.MaxTTL = defaultMaxTTL
	}
	if c.MaxUDPSize == 0 {
		c.MaxUDPSize = defaultEDNSSize
	}
	c.Limits, c.TunnelGuard = c.Limits.withDefaults(), c.TunnelGuard.withDefaults()
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// refuseAll stands for a missing Decider.
type refuseAll struct{}

func (refuseAll) Decide(policy.Request) policy.Decision {
	return policy.Decision{Reason: policy.ReasonNotListed}
}

// check returns every mistake in the fields that need no more than a look.
// Paths in messages are those of the settings file.
func (c Config) check() error {
	var errs []error
	for _, list := range []struct {
		key   string
		addrs []string
	}{{"listen", c.Listen}, {"tls_listen", c.TLSListen}, {"https_listen", c.HTTPSListen}} {
		for i, l := range list.addrs {
			if _, err := parseListen(l); err != nil {
				errs = append(errs, fmt.Errorf("dns.%s[%d]: %w", list.key, i, err))
			}
		}
	}
	switch c.Events {
	case EventsAll, EventsDenied, EventsSample:
	default:
		errs = append(errs, fmt.Errorf("log.dns: %q is none of all, denied, sample", c.Events))
	}
	switch c.Deny {
	case DenyRefused, DenyNXDomain, DenyNodata, DenySinkhole:
	default:
		errs = append(errs, fmt.Errorf("dns.deny: %q is none of refused, nxdomain, nodata, sinkhole", c.Deny))
	}
	switch c.UpstreamMode {
	case UpstreamsSequential, UpstreamsFastest:
	default:
		errs = append(errs, fmt.Errorf("dns.upstream_mode: %q is none of sequential, fastest", c.UpstreamMode))
	}
	switch c.HTTPSRecords {
	case HTTPSPass, HTTPSStripECH, HTTPSNodata:
	default:
		errs = append(errs, fmt.Errorf("dns.https_records: %q is none of pass, strip_ech, nodata", c.HTTPSRecords))
	}
	switch c.CNAMEs {
	case CNAMEsTrust, CNAMEsInspect:
	default:
		errs = append(errs, fmt.Errorf("dns.cnames: %q is none of trust, inspect", c.CNAMEs))
	}
	if c.MaxUDPSize < minUDPSize || c.MaxUDPSize > maxEDNSSize {
		errs = append(errs, fmt.Errorf("dns.edns_size: %d is not between %d and %d bytes", c.MaxUDPSize, minUDPSize, maxEDNSSize))
	}
	return errors.Join(append(errs, c.Cache.check(), c.Limits.check(), c.TunnelGuard.check())...)
}

func (c Cache) check() error {
	var errs []error
	if c.Size < 0 {
		errs = append(errs, fmt.Errorf("dns.cache.size: %d is negative; 0 turns the cache off", c.Size))
	}
	for _, d := range []struct {
		key string
		d   time.Duration
	}{{"min_ttl", c.MinTTL}, {"max_ttl", c.MaxTTL}, {"serve_stale", c.ServeStale}} {
		if d.d < 0 || d.d > maxTTL {
			errs = append(errs, fmt.Errorf("dns.cache.%s: %v is not between 0s and %v", d.key, d.d, maxTTL))
		}
	}
	if c.MinTTL > c.MaxTTL {
		errs = append(errs, fmt.Errorf("dns.cache.min_ttl: %v is above max_ttl (%v)", c.MinTTL, c.MaxTTL))
	}
	return errors.Join(errs...)
}

// parseListen returns the address and port of ip:port or :port; the zero Addr
// stands for all addresses of both families.
func parseListen(s string) (netip.AddrPort, error) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap, nil
	}
	if len(s) > 1 && s[0] == ':' {
		if port, err := strconv.ParseUint(s[1:], 10, 16); err == nil {
			return netip.AddrPortFrom(netip.Addr{}, uint16(port)), nil
		}
	}
	return netip.AddrPort{}, fmt.Errorf("%q is no address to listen on; write ip:port, [ip]:port or :port", s)
}
