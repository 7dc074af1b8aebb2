package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"sallyport/dnsfilter"
	"sallyport/internal/admin"
	"sallyport/internal/config"
	"sallyport/internal/discovery"
	"sallyport/internal/metrics"
	"sallyport/policy"
	"sallyport/policy/event"
)

// newDiscovery opens what the settings say; nil if nothing is to be remembered.
func newDiscovery(s config.Discovery, logger zerolog.Logger) (*discovery.Store, error) {
	if s.Entries == 0 {
		return nil, nil //nolint:nilnil // it is no error to have none
	}
	return discovery.Open(discovery.Options{File: s.Store, Entries: s.Entries, Retention: s.Retention, Logger: logger})
}

// discovered adds discovery to who is told of connections and of queries. It is told of
// queries whatever log.dns and log.format say: of all of them if the log is, and
// otherwise of denied ones and of a sample of the others, so that the answers that come
// from the cache cost no more than a sample does.
func (g *gate) discovered(connections, queries event.Observer) (_, _ event.Observer) {
	if g.discovery == nil {
		return connections, queries
	}
	some := &atMost{most: maxQueriesDiscovered, to: g.discovery}
	g.metrics.ObserveDiscovery(func() metrics.DiscoveryStats {
		st := g.discovery.Stats()
		return metrics.DiscoveryStats{Pairs: st.Pairs, Evicted: st.Evicted + some.skipped.Load(), WriteErrors: st.WriteErrors}
	})
	connections = event.Observers{connections, g.discovery}
	switch {
	case queries == nil:
		return connections, some
	case g.settings.Log.DNS == string(dnsfilter.EventsDenied):
		queries = notAllowed{queries}
	}
	return connections, event.Observers{queries, some}
}

// maxQueriesDiscovered is how many queries of a second discovery looks at. More is a
// flood, and remembering where it came from is not worth as much as answering it.
const maxQueriesDiscovered = 10_000

// atMost passes the first events of each second on, most of them.
type atMost struct {
	most    uint32
	to      event.Observer
	second  atomic.Int64 // Unix time
	passed  atomic.Uint32
	skipped atomic.Uint64
}

// Observe implements event.Observer. It is for events that have just begun.
func (a *atMost) Observe(ev *event.Event) {
	if now := ev.Time.Unix(); a.second.Load() != now {
		a.second.Store(now)
		a.passed.Store(0)
	}
	if a.passed.Add(1) > a.most {
		a.skipped.Add(1)
		return
	}
	a.to.Observe(ev)
}

// notAllowed passes on what policy did not allow, as log.dns: denied wants.
type notAllowed struct{ to event.Observer }

// Observe implements event.Observer.
func (n notAllowed) Observe(ev *event.Event) {
	if ev.Decision.Verdict != policy.Allow {
		n.to.Observe(ev)
	}
}

// startDiscovery has what is observed written from time to time. The func it returns,
// called when nobody observes any more, has the rest written and waits for that.
func (g *gate) startDiscovery(ctx context.Context) (stop func() error) {
	if g.discovery == nil {
		return func() error { return nil }
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- g.discovery.Run(ctx) }()
	return func() error {
		cancel()
		return <-done
	}
}

// offerDiscovery lets the admin API answer from what was observed.
func (g *gate) offerDiscovery(api *admin.API) {
	d := g.discovery
	if d == nil {
		return
	}
	g.adminState.policy.uses = d.Rules
	api.Discovery = func(q admin.DiscoveryQuery) ([]admin.Pair, error) {
		pairs, err := d.Pairs(discovery.Query{Group: q.Group, Verdict: q.Verdict, Since: q.Since, MinCount: q.MinCount})
		out := make([]admin.Pair, len(pairs))
		for i := range pairs {
			p := &pairs[i]
			out[i] = admin.Pair{
				Group: p.Group, Name: p.Name, Port: p.Port, Protocol: string(p.Protocol), Listeners: p.Listeners,
				Verdict: p.Verdict, Reason: p.Reason, Rule: p.Rule, Count: p.Count,
				BytesUp: int64(p.BytesUp), BytesDown: int64(p.BytesDown), FirstSeen: p.FirstSeen, LastSeen: p.LastSeen,
				QType: p.QType, Strange: p.Strange, Sources: p.Sources, SourcesEstimated: p.SourcesEstimated,
			}
		}
		return out, err
	}
	api.Proposal = func(w io.Writer, q admin.ProposalQuery) error {
		p := g.store.Policy()
		if err := knownGroup(p, q.Group); err != nil {
			return fmt.Errorf("%w: group: %w", admin.ErrBadRequest, err)
		}
		return writeProposal(w, d, p, q)
	}
	api.Report = func(w io.Writer, q admin.ReportQuery) error {
		return writeSummary(w, d, g.store.Policy(), g.settings.Node, q)
	}
}

// knownGroup returns an error if the policy has no group called name, which "" need not be.
func knownGroup(p *policy.Policy, name string) error {
	if p == nil || name == "" || slices.Contains(p.GroupNames(), name) {
		return nil
	}
	return fmt.Errorf("%q: the policy has no group of that name; there are %s", name, strings.Join(p.GroupNames(), ", "))
}

// writeProposal writes what learn prints.
func writeProposal(w io.Writer, d *discovery.Store, p *policy.Policy, q admin.ProposalQuery) error {
	pairs, err := d.Pairs(discovery.Query{Group: q.Group, Since: q.Since})
	if err != nil {
		return err
	}
	o := discovery.ProposalOptions{Group: q.Group, Since: q.Since, MinCount: q.MinCount, Now: time.Now()}
	return discovery.Propose(pairs, p, o).Write(w, discovery.Format(q.Output))
}

// writeSummary writes what report prints.
func writeSummary(w io.Writer, d *discovery.Store, p *policy.Policy, node string, q admin.ReportQuery) error {
	pairs, err := d.Pairs(discovery.Query{Since: q.Since})
	if err != nil {
		return err
	}
	s, err := discovery.Report(discovery.Evidence{
		Pairs: pairs, Rules: d.Rules(), Stats: d.Stats(), Since: q.Since, Now: time.Now(), Node: node, Policy: p,
	})
	if err != nil {
		return err
	}
	return s.Write(w, discovery.Format(q.Output))
}
