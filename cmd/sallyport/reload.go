package main

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"sallyport/internal/admin"
	"sallyport/policy/event"
)

// request asks the reloader for something; a request that is waiting already will do.
func request(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// reloader reloads when asked, one at a time: the policy when its files changed,
// the settings too on SIGHUP.
func (g *gate) reloader(ctx context.Context) {
	for {
		var err error
		select {
		case <-ctx.Done():
			return
		case <-g.hangup:
			err = g.attempt("settings", g.reloadSettings)
		case <-g.changed:
		}
		err = errors.Join(err, g.attempt("policy", g.reloadPolicy))
		now := time.Now()
		g.metrics.SetReload(err == nil, now)
		g.status.reloaded(g.store.Policy().Revision(), err, now)
	}
}

// attempt reloads what, and records how that went.
func (g *gate) attempt(what string, reload func() error) error {
	ev := event.Event{Time: time.Now(), Kind: event.Config, Name: what}
	err := reload()
	ev.Duration = time.Since(ev.Time)
	ev.Decision.Revision = g.store.Policy().Revision()
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
	if rest := g.settings.RestartOnly(s); len(rest) > 0 {
		g.logger.Warn().Strs("settings", rest).Msg("these settings change at the next start only")
	}
	if err := g.log.SetLevel(s.Log.Level); err != nil {
		return err
	}
	g.settings.Log.Level = s.Log.Level
	return nil
}

// reloadPolicy compiles the policy anew and puts it in force, or keeps the old one.
func (g *gate) reloadPolicy() error {
	p, warnings, err := g.source.load()
	if err != nil {
		return err
	}
	for _, w := range warnings {
		g.logger.Warn().Msg(w.Error())
	}
	if p.Revision() != g.store.Policy().Revision() {
		g.store.Swap(p)
	}
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
	for name, addrs := range map[string][]string{"proxy": g.settings.Proxy.Listen, "dns": g.settings.DNS.Listen} {
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
