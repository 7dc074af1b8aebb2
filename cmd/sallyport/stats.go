package main

import (
	"time"

	"sallyport/internal/metrics"
)

// What a scrape asks of the gate. Nothing here is kept up while nobody scrapes.

func (g *gate) proxyStats() metrics.ProxyStats {
	st := g.proxy.Stats()
	return metrics.ProxyStats{
		Connections: st.Connections, Tunnels: st.Tunnels, MaxTunnels: g.settings.Proxy.Limits.Tunnels,
		Up: st.BytesUp, Down: st.BytesDown,
		AcceptErrors: st.AcceptErrors, AcceptPauses: st.AcceptPauses, Panics: st.Panics,
		Handshakes: st.Handshakes,
	}
}

func (g *gate) certificateExpiries() map[string]time.Time {
	return map[string]time.Time{
		"proxy.tls": g.proxy.Stats().CertificateExpiry, "dns.tls": g.dns.CertificateExpiry(), "admin.tls": g.admin.CertificateExpiry(),
	}
}

func (g *gate) logStats() metrics.LogStats {
	lines, bytes := g.log.Queued()
	return metrics.LogStats{Dropped: g.log.Dropped(), Lines: lines, Bytes: bytes}
}

func (g *gate) policyStats() (s metrics.PolicyStats) {
	p := g.store.Policy()
	if p == nil {
		return s
	}
	g.status.mu.Lock()
	s.LoadedAt, s.LastGood = g.status.policy.LoadedAt, g.status.policy.LastGood
	g.status.mu.Unlock()
	s.Groups, s.Rules, s.Names = len(p.GroupNames()), p.Rules(), p.Names()
	s.NextExpiry = p.NextExpiry(time.Now())
	for group, until := range p.Observing() {
		s.Observing = append(s.Observing, metrics.Observing{Group: group, Until: until})
	}
	return s
}

// ready is what /readyz says, by what is known of upstreams: nothing is sent.
func (g *gate) ready() bool {
	g.status.mu.Lock()
	up := g.status.up && !g.status.draining && g.status.policy.Revision != ""
	g.status.mu.Unlock()
	return up && g.resolver.UpstreamOK()
}
