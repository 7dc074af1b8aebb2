package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"sallyport/dnsfilter"
	"sallyport/internal/admin"
	"sallyport/internal/config"
	"sallyport/internal/discovery"
	"sallyport/internal/eventlog"
	"sallyport/internal/metrics"
	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/proxy"
	"sallyport/proxy/htpasswd"
)

func newRun(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Serve: proxy, resolver and admin in one process",
		Long: "Serve: proxy, resolver and admin in one process. Without settings and policy the\n" +
			"embedded ones serve loopback alone.\n\n" +
			"SIGHUP reloads policy and live settings, SIGUSR1 reopens the log file, SIGTERM and\n" +
			"SIGINT drain and stop (a second one stops at once).",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// From the first moment to the last: by default these would end the process.
			signals := make(chan os.Signal, 4)
			signal.Notify(signals, syscall.SIGHUP, syscall.SIGUSR1)
			settings, err := o.load()
			if err != nil {
				return err
			}
			sockets, err := takeSockets()
			if err == nil {
				err = sockets.apply(&settings)
			}
			if err != nil {
				return usageError(err)
			}
			g, err := newGate(o, settings)
			if err != nil {
				return err
			}
			g.sockets = sockets
			sockets.handOver(g)
			g.signals = signals
			return g.run(cmd.Context(), cmd.ErrOrStderr())
		},
	}
}

// A gate is the whole of a running process.
type gate struct {
	options  *options
	settings config.Settings
	source   source
	store    policy.Store
	status   status
	log      *eventlog.Writer
	logger   zerolog.Logger
	metrics  *metrics.Metrics
	observer event.Observer // of connections
	queries  event.Observer // of queries; nil: none
	resolver *dnsfilter.Resolver
	dns      *dnsfilter.Server
	proxy    *proxy.Server
	users    *htpasswd.File // in force; nil: none
	admin    *admin.Server
	signals  <-chan os.Signal
	hangup   chan struct{} // SIGHUP asks for a reload of settings and policy
	changed  chan struct{} // the policy's files ask for one of the policy

	background background // what takes long

	certificates   certificates // in force, of proxy.tls
	dnsCertificate certificates // in force, of dns.tls
	sockets        inherited

	adminState adminState       // for the admin API
	discovery  *discovery.Store // nil: nothing is remembered
}

// newGate builds everything and loads the policy. Nothing listens yet.
func newGate(o *options, s config.Settings) (*gate, error) {
	g := &gate{options: o, settings: s, source: newSource(s), hangup: make(chan struct{}, 1), changed: make(chan struct{}, 1)}
	begun := time.Now()
	first, warnings, err := g.source.load()
	took := time.Since(begun)
	if err != nil && (s.Policy.LastGood == "" || g.source.files == nil) {
		return nil, usageError(err)
	}
	loadErr := err
	if g.users, err = loadUsers(s.Proxy.Auth); err != nil {
		return nil, usageError(err)
	}
	if len(s.Proxy.TLSListen) > 0 {
		if g.certificates, err = loadCertificates("proxy.tls", s.Proxy.TLS); err != nil {
			return nil, usageError(err)
		}
		if w := g.certificates.warning(s.Proxy.TLS.Certificate, time.Now()); w != nil {
			warnings = append(warnings, w)
		}
	}
	if isEncrypted(s.DNS) {
		if g.dnsCertificate, err = loadDNSCertificate(s.DNS); err != nil {
			return nil, usageError(err)
		}
		if w := g.dnsCertificate.warning(s.DNS.TLS.Certificate, time.Now()); w != nil {
			warnings = append(warnings, w)
		}
	}
	if g.log, err = eventlog.Open(eventlog.Options{
		Format: eventlog.Format(s.Log.Format), Output: s.Log.Output, Level: s.Log.Level, Node: s.Node,
		Facility: s.Log.Facility, Rotate: eventlog.Rotate(s.Log.Rotate),
	}); err != nil {
		return nil, &exitError{exitFailure, err}
	}
	g.logger = g.log.Logger()
	takeLibraryLog(g.logger)
	for _, w := range warnings {
		g.logger.Warn().Msg(w.Error())
	}
	v, rev := build()
	g.metrics = metrics.New(metrics.Options{
		Version: v, Revision: rev, Log: g.logStats, Policy: g.policyStats, Ready: g.ready, Proxy: g.proxyStats, Certificates: g.certificateExpiries,
		Resolver: func() metrics.ResolverStats {
			st := g.resolver.Stats()
			return metrics.ResolverStats{
				Hits: st.CacheHits, Misses: st.CacheMisses, Stale: st.CacheStale,
				Dropped: st.Dropped, Malformed: st.Malformed, Failures: st.UpstreamFailures,
				Ignored: st.UpstreamIgnored, Prefetched: st.Prefetched, Limited: limited(&st), Upstreams: upstreamStats(st.Upstreams),
			}
		},
	})
	g.metrics.Loaded(took)
	if g.discovery, err = newDiscovery(s.Discovery, g.logger); err != nil {
		return nil, usageError(err)
	}
	g.observer, g.queries = g.discovered(g.observers())
	if g.resolver, err = dnsfilter.New(g.dnsConfig()); err != nil {
		return nil, usageError(err)
	}
	g.dns = dnsfilter.NewServer(g.resolver)
	pc := g.proxyConfig()
	if pc.Routes, err = newRoutes(&s.Proxy); err != nil {
		return nil, usageError(err)
	}
	g.proxy = proxy.New(pc)
	warnings, err = g.newAdmin()
	if err != nil {
		return nil, usageError(err)
	}
	for _, w := range warnings {
		g.logger.Warn().Msg(w.Error())
	}
	g.store.OnChange(g.policyChanged)
	return g, g.first(first, loadErr)
}

func upstreamStats(all []dnsfilter.UpstreamStats) []metrics.UpstreamStats {
	out := make([]metrics.UpstreamStats, len(all))
	for i, u := range all {
		out[i] = metrics.UpstreamStats(u)
	}
	return out
}

func (g *gate) dnsConfig() dnsfilter.Config {
	c := dnsConfig(g.settings.DNS)
	c.Decider, c.Counter, c.Observer, c.Logger = &g.store, g.metrics, g.queries, g.logger
	c.Events = dnsfilter.Events(g.settings.Log.DNS)
	c.Certificate = g.dnsCertificate.Certificate
	if g.settings.Log.Format != string(eventlog.JSON) && c.Events == dnsfilter.EventsAll {
		c.Events = dnsfilter.EventsSample // see observers
	}
	if g.discovery != nil && c.Events == dnsfilter.EventsDenied {
		c.Events = dnsfilter.EventsSample // see discovered
	}
	return c
}

// dnsConfig returns what the settings say about the resolver.
func dnsConfig(s config.DNS) dnsfilter.Config {
	c := dnsfilter.Config{
		TLSListen: s.TLSListen, HTTPSListen: s.HTTPSListen, ProxyProtocol: dnsfilter.ProxyProtocol{Trusted: s.ProxyProtocol.Trusted},
		Listen: s.Listen, Upstreams: s.Upstreams, HostsFile: s.HostsFile,
		Deny: dnsfilter.Denial(s.Deny), HTTPSRecords: dnsfilter.HTTPSRecords(s.HTTPSRecords), CNAMEs: dnsfilter.CNAMEs(s.CNAMEs),
		MaxUDPSize: s.EDNSSize, HealthName: s.HealthName, SearchDomains: s.SearchDomains,
		UpstreamMode: dnsfilter.UpstreamMode(s.UpstreamMode), CaseRandomisation: s.CaseRandomisation,
		Cache: dnsfilter.Cache{
			Size: s.Cache.Size, MinTTL: s.Cache.MinTTL, MaxTTL: s.Cache.MaxTTL, ServeStale: s.Cache.ServeStale,
			Prefetch: s.Cache.Prefetch,
		},
		Limits: dnsLimits(s.Limits), TunnelGuard: tunnelGuard(s.TunnelGuard),
	}
	for _, z := range s.Zones {
		c.Zones = append(c.Zones, dnsfilter.Zone{Zone: z.Zone, Upstreams: z.Upstreams, PrivateDestinations: z.PrivateDestinations})
	}
	for _, r := range s.Records {
		c.Records = append(c.Records, dnsfilter.Record{Name: r.Name, Type: r.Type, Value: r.Value, TTL: r.TTL})
	}
	return c
}

func (g *gate) proxyConfig() proxy.Config {
	s := g.settings.Proxy
	return proxy.Config{
		Decider: &g.store, Resolver: g.resolver, Observer: g.observer, Logger: g.logger,
		PrivateZone: g.resolver.PrivateZone, Known: g.resolver.Known,
		Listen: s.Listen, HelpURL: s.HelpURL, PACDirect: s.PAC.Direct,
		Auth: proxy.Auth{
			Users: g.users, Realm: s.Auth.Realm, Required: s.Auth.Required,
			HasUsers: func() bool { p := g.store.Policy(); return p != nil && p.HasUsers() },
		},
		TLS: proxy.TLS{Listen: s.TLSListen, TLSIdentity: g.certificates.TLSIdentity},
		Timeouts: proxy.Timeouts{
			Connect: s.Timeouts.Connect, ClientHello: s.Timeouts.ClientHello, RequestHeader: s.Timeouts.RequestHeader,
			Idle: s.Timeouts.Idle, Drain: s.Timeouts.Drain,
		},
		Limits: proxy.Limits{
			Tunnels: s.Limits.Tunnels, TunnelsPerSource: s.Limits.TunnelsPerSource, TunnelsPerGroup: s.Limits.TunnelsPerGroup,
			ConnectionsPerSource: s.Limits.ConnectionsPerSource, ConnectionsPerSecond: s.Limits.ConnectionsPerSecond, ConnectionsBurst: s.Limits.ConnectionsBurst,
			ClientHelloBytes: s.Limits.ClientHelloBytes, HeaderBytes: s.Limits.HeaderBytes, URLBytes: s.Limits.URLBytes,
		},
		ProxyProtocol: proxy.ProxyProtocol{Trusted: s.ProxyProtocol.Trusted},
	}
}

// policyChanged tells everything that outlives a request of a new policy.
func (g *gate) policyChanged(p *policy.Policy) {
	g.metrics.SetPolicy(p.Revision(), p.GroupNames())
	g.proxy.Recheck()
	g.warnStrangeGroups(p)
}

// run serves until ctx ends or something fails. It owns every goroutine that
// outlives a request, and waits for all of them.
func (g *gate) run(ctx context.Context, hints io.Writer) error {
	defer paceCollector()()
	logCtx, stopLog := context.WithCancel(context.WithoutCancel(ctx))
	logDone := make(chan error, 1)
	go func() { logDone <- g.log.Run(logCtx) }()
	stopDiscovery := g.startDiscovery(ctx)
	err := g.serve(ctx, hints)
	err = errors.Join(err, failure(stopDiscovery()))
	stopLog()
	return errors.Join(err, failure(<-logDone))
}

// failure gives err the exit status of something that did not work.
func failure(err error) error {
	if err == nil {
		return nil
	}
	return &exitError{exitFailure, err}
}

// serve listens, runs the servers until ctx ends or one of them fails, drains and
// stops.
func (g *gate) serve(ctx context.Context, hints io.Writer) error {
	if err := g.listen(); err != nil {
		return failure(err)
	}
	g.proxy.Guard(slices.Concat(g.dns.Addrs(), g.dns.TLSAddrs(), g.dns.HTTPSAddrs())...)
	g.proxy.Guard(g.admin.Addrs()...)
	g.announce(hints)

	servers, stopServers := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServers()
	helpers, stopHelpers := context.WithCancel(servers)
	defer stopHelpers()
	failed := make(chan error, 6)
	var wg sync.WaitGroup
	start := func(name string, serve func(context.Context) error, ctx context.Context) {
		wg.Go(func() {
			if err := serve(ctx); err != nil {
				failed <- fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	start("proxy", g.proxy.Serve, servers)
	start("resolver", g.dns.Serve, servers)
	start("admin", g.admin.Serve, servers)
	if g.source.files != nil {
		start("watch policy", g.watch, helpers)
	}
	if g.adminState.tally != nil {
		start("count talkers", g.adminState.tally.Run, servers)
		start("sample counters", g.adminState.sampler.Run, servers)
	}
	if len(g.identityFiles()) > 0 {
		wg.Go(func() { g.watchIdentity(helpers) })
	}
	wg.Go(func() { g.reloader(helpers) })
	wg.Go(func() { g.serveSignals(helpers) })
	g.status.serving(true)

	var err error
	select {
	case <-ctx.Done():
		g.logger.Info().Dur("drain_ms", g.settings.Proxy.Timeouts.Drain).Msg("draining")
	case <-g.adminState.stopping:
		g.logger.Info().Dur("drain_ms", g.settings.Proxy.Timeouts.Drain).Msg("draining")
	case err = <-failed:
		g.logger.Error().Err(err).Msg("a server failed; stopping")
	}
	stopHelpers()
	g.drain()
	stopServers()
	wg.Wait()
	g.resolver.Close()
	g.logger.Info().Msg("stopped")
	return failure(err)
}

// listen binds everything, or nothing: the error names every address that could
// not be had.
func (g *gate) listen() error {
	var errs []error
	for _, l := range []struct {
		setting string
		listen  func() error
	}{{"proxy.listen", g.proxy.Listen}, {"dns.listen", g.dns.Listen}, {"admin.listen", g.admin.Listen}} {
		if err := l.listen(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", l.setting, err))
		}
	}
	if len(errs) > 0 {
		g.closeListeners()
	}
	return errors.Join(errs...)
}

// drain stops the listeners and lets what is under way end, for as long as
// proxy.timeouts.drain says.
func (g *gate) drain() {
	g.status.drain()
	ctx, cancel := context.WithTimeout(context.Background(), g.settings.Proxy.Timeouts.Drain)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := g.dns.Shutdown(ctx); err != nil {
			g.logger.Warn().Err(err).Msg("queries were cut off")
		}
	})
	if err := g.proxy.Shutdown(ctx); err != nil {
		g.logger.Warn().Err(err).Msg("connections were cut off")
	}
	wg.Wait()
}

// closeListeners gives back what was bound before another listener failed.
func (g *gate) closeListeners() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = g.proxy.Shutdown(ctx) // nothing was served yet
	_ = g.dns.Shutdown(ctx)
	g.admin.Close()
	g.resolver.Close()
}

// announce says where the gate listens, in the log for programs and in hints for
// the person who started it.
func (g *gate) announce(hints io.Writer) {
	say := func(listener, addr string) {
		g.logger.Info().Str("listener", listener).Str("addr", addr).Msg("listening")
	}
	for _, a := range g.proxy.Addrs() {
		say("proxy", a.String())
	}
	for _, a := range g.proxy.TLSAddrs() {
		say("proxy_tls", a.String())
	}
	for _, a := range g.dns.Addrs() {
		say("dns", a.String())
	}
	for _, a := range g.dns.TLSAddrs() {
		say("dns_tls", a.String())
	}
	for _, a := range g.dns.HTTPSAddrs() {
		say("dns_https", a.String())
	}
	for _, a := range g.admin.Addrs() {
		say("admin", a.String())
	}
	if g.settings.File != "" {
		return
	}
	fmt.Fprintf(hints, "sallyport serves with its embedded settings; policy: %s. Try:\n", g.settings.Policy.Source)
	if as := g.proxy.Addrs(); len(as) > 0 {
		fmt.Fprintf(hints, "  curl -x http://%s https://www.example.com/\n", as[0])
	}
	if as := g.dns.Addrs(); len(as) > 0 {
		fmt.Fprintf(hints, "  dig @%s -p %d www.example.com\n", as[0].Addr(), as[0].Port())
	}
}

// watch asks for a reload whenever the policy's files change.
func (g *gate) watch(ctx context.Context) error {
	g.source.files.OnError = func(err error) {
		g.logger.Warn().Err(err).Msg("changes of the policy are noticed by polling for now")
	}
	g.source.files.Background = g.background.run
	return g.source.files.Watch(ctx, func() { request(g.changed) })
}

// serveSignals serves SIGHUP and SIGUSR1. Once ctx has ended they do nothing.
func (g *gate) serveSignals(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-g.signals:
			if s == syscall.SIGHUP {
				request(g.hangup)
			} else if err := g.log.Reopen(); err != nil {
				g.logger.Error().Err(err).Msg("the old log file stays in use")
			}
		}
	}
}
