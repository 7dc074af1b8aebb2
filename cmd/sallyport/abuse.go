package main

import (
	"sallyport/dnsfilter"
	"sallyport/internal/config"
	"sallyport/internal/metrics"
)

// dnsLimits returns what the settings say about limits of the resolver.
func dnsLimits(l config.DNSLimits) dnsfilter.Limits {
	return dnsfilter.Limits{
		ResponsesPerSecond: l.ResponsesPerSecond, Slip: l.Slip, IPv4Prefix: l.IPv4Prefix, IPv6Prefix: l.IPv6Prefix,
		QueriesPerSecond: l.QueriesPerSecond, QueriesBurst: l.QueriesBurst, OverLimit: dnsfilter.OverLimit(l.OverLimit), Exempt: l.Exempt,
	}
}

// tunnelGuard returns what the settings say about tunnels in names.
func tunnelGuard(g config.TunnelGuard) dnsfilter.TunnelGuard {
	return dnsfilter.TunnelGuard{Mode: dnsfilter.TunnelMode(g.Mode), UniqueNamesPerMinute: g.UniqueNames, Exempt: g.Exempt}
}

// limited returns what the resolver's limits have held back, for metrics.
func limited(st *dnsfilter.Stats) []metrics.Limited {
	return []metrics.Limited{
		{Limit: "responses", Action: "dropped", Count: st.AnswersDropped}, {Limit: "responses", Action: "truncated", Count: st.AnswersTruncated},
		{Limit: "queries", Action: "dropped", Count: st.QueriesDropped}, {Limit: "queries", Action: "refused", Count: st.QueriesRefused},
		{Limit: "lookups", Action: "crowded", Count: st.Crowding},
		{Limit: "tunnel", Action: "suspected", Count: st.TunnelSuspected}, {Limit: "tunnel", Action: "refused", Count: st.TunnelRefused},
	}
}
