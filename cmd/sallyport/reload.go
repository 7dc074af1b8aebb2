package main

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"sallyport/internal/admin"
	"sallyport/policy"
	"sallyport/policy/event"
	"sallyport/policy/provider/lastgood"
)

// request asks the reloader for something; a request that is waiting already will do.
func request(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// reloader reloads when asked, one at a time: the policy when its files changed,
// the settings too on SIGHUP. Users and certificates go with either.
func (g *gate) reloader(ctx context.Context) {
	for {
		var err error
		var tell chan<- admin.Outcome
		select {
		case <-ctx.Done():
			return
		case <-g.hangup:
			err = g.attempt("settings", g.reloadSettings)
		case tell = <-g.adminState.asked:
			err = g.attempt("settings", g.reloadSettings)
		case <-g.changed:
		}
		if len(g.adminFiles()) > 0 {
			err = errors.Join(err, g.attempt("admin", g.reloadAdmin))
		}
		if g.users != nil {
			err = errors.Join(err, g.attempt("users", g.reloadUsers))
		}
		if g.certificates.leaf != nil || g.dnsCertificate.leaf != nil {
			err = errors.Join(err, g.attempt("certificates", g.reloadCertificates))
		}
		err = errors.Join(err, g.attempt("policy", g.reloadPolicy))
		now := time.Now()
		g.metrics.SetReload(err == nil, now)
		g.status.reloaded(g.store.Revision(), err, now)
		if tell != nil {
			tell <- reloadOutcome(g.store.Revision(), err, now)
		}
	}
}

// attempt reloads what, and records how that went.
func (g *gate) attempt(what string, reload func() error) error {
	ev := event.Event{Time: time.Now(), Kind: event.Config, Name: what}
	err := reload()
	ev.Duration = time.Since(ev.Time)
	ev.Decision.Revision = g.store.Revision()
	if err != nil {
		ev.Error = err.Error()
		for line := range strings.SplitSeq(ev.Error, "\n") {
			g.logger.Error().Msg(what + " not reloaded, the last good state stays in force: " + line)
		}
	}
	g.observer.Observe(&ev)
	return err
}

// reloadSettings applies the settings that can change live and names those that
// cannot. Bad settings change nothing.
func (g *gate) reloadSettings() error {
	s, err := g.options.load()
	if err != nil {
		return err
	}
	if err := g.sockets.apply(&s); err != nil {
		return err
	}
	if rest := g.settings.RestartOnly(s); len(rest) > 0 {
		g.logger.Warn().Strs("settings", rest).Msg("these settings change at the next start only")
	}
	if err := g.reloadRoutes(&s); err != nil {
		return err
	}
	if err := g.log.SetLevel(s.Log.Level); err != nil {
		return err
	}
	g.settings.Log.Level = s.Log.Level
	g.resolver.Reload()
	return nil
}

// reloadPolicy compiles the policy anew and puts it in force, or keeps the old one.
func (g *gate) reloadPolicy() error {
	var p *policy.Policy
	var warnings []*policy.Error
	var err error
	g.background.run(func() { p, warnings, err = g.source.load() })
	if err != nil {
		return err
	}
	for _, w := range warnings {
		g.logger.Warn().Msg(w.Error())
	}
	if p.Revision() != g.store.Revision() {
		g.store.Swap(p)
	}
	g.status.fellBack(false) // whatever else may be wrong
	g.background.run(func() {
		g.keep()
		tidy(p)
	})
	return nil
}

// largePolicy is a number of names from which on it is worth to collect at once what
// compiling them took, and the policy before, and to give the memory back: otherwise
// that waits until the heap has doubled.
const largePolicy = 50_000

// tidy frees what loading p has left behind.
func tidy(p *policy.Policy) {
	if p.Names() >= largePolicy {
		debug.FreeOSMemory()
	}
}

// keep copies the policy that was just loaded for a start without its source.
func (g *gate) keep() {
	if g.source.files == nil || g.settings.Policy.LastGood == "" {
		return
	}
	if err := g.source.files.Keep(g.settings.Policy.LastGood); err != nil {
		g.logger.Warn().Err(err).Msg("the policy is in force, but there is no copy of it for the next start")
	}
}

// first puts the first policy in force. If the source has none that is good, it is
// the last good one, if settings name a file for that; and if that cannot be read
// either, everything is denied until the source can be read. A policy with mistakes
// is an error in that case: whoever starts the gate for the first time should see them.
func (g *gate) first(p *policy.Policy, err error) error {
	now := time.Now()
	if err == nil {
		g.store.Swap(p)
		g.status.loaded(p.Revision(), now)
		g.metrics.SetReload(true, now)
		g.keep()
		tidy(p)
		return nil
	}
	_, mistakes := errors.AsType[policy.Errors](err)
	last, _, written, lastErr := lastgood.Load(g.settings.Policy.LastGood)
	switch {
	case lastErr == nil:
		g.store.Swap(last)
		tidy(last)
		g.logger.Error().Str("policy", last.Revision()).Time("written", written).Msg("the last good policy is in force, for that of policy.source cannot be used")
	case mistakes:
		return usageError(fmt.Errorf("%w\n%w", err, lastErr))
	default:
		g.logger.Error().Err(lastErr).Msg("everything is denied: neither policy.source nor policy.last_good can be read")
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		g.logger.Error().Msg("policy not loaded: " + line)
	}
	g.status.reloaded(g.store.Revision(), err, now)
	g.status.fellBack(lastErr == nil)
	g.metrics.SetReload(false, now)
	g.observer.Observe(&event.Event{
		Time: now, Kind: event.Config, Name: "policy", Error: err.Error(), Decision: policy.Decision{Revision: g.store.Revision()},
	})
	return nil
}

// status is what /readyz reports.
type status struct {
	mu       sync.Mutex // guards the rest
	up       bool
	draining bool
	policy   admin.Policy
}

// loaded notes the first policy.
func (s *status) loaded(revision string, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at = at.UTC()
	s.policy = admin.Policy{Revision: revision, LoadedAt: at, LastReload: admin.Reload{OK: true, At: at}}
}

// fellBack notes whether the policy in force is the copy of the last good one.
func (s *status) fellBack(yes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policy.LastGood = yes
}

// reloaded notes an attempt to reload, after it is in force or refused.
func (s *status) reloaded(revision string, err error, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at = at.UTC()
	if revision != s.policy.Revision {
		s.policy.Revision, s.policy.LoadedAt = revision, at
	}
	s.policy.LastReload = admin.Reload{OK: err == nil, At: at}
	if err != nil {
		s.policy.LastReload.Error = err.Error()
	}
}

func (s *status) serving(up bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.up = up
}

func (s *status) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
}

// upstreamPatience bounds what /readyz waits for an upstream.
const upstreamPatience = 2 * time.Second

// readiness answers /readyz.
func (g *gate) readiness(ctx context.Context) admin.Status {
	g.status.mu.Lock()
	st := admin.Status{Draining: g.status.draining, Policy: g.status.policy, Listeners: map[string]bool{}}
	listening := g.status.up && !g.status.draining
	g.status.mu.Unlock()
	for name, addrs := range map[string][]string{"proxy": g.settings.Proxy.Listen, "proxy_tls": g.settings.Proxy.TLSListen,
		"dns": g.settings.DNS.Listen, "dns_tls": g.settings.DNS.TLSListen, "dns_https": g.settings.DNS.HTTPSListen} {
		if len(addrs) > 0 {
			st.Listeners[name] = listening
		}
	}
	ctx, cancel := context.WithTimeout(ctx, upstreamPatience)
	defer cancel()
	st.Upstream.OK = true
	if err := g.resolver.CheckUpstreams(ctx); err != nil {
		st.Upstream = admin.Upstream{Error: err.Error()}
	}
	return st
}
