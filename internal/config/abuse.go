package config

import "net/netip"

// DNSLimits bound what one source can ask of the resolver, and have sent to it.
type DNSLimits struct {
	ResponsesPerSecond int            `yaml:"responses_per_second" kind:"count" max:"100000" doc:"Answers a second over UDP to the clients of one prefix, of each kind: with records, without, errors. The others are not sent, or truncated (slip). Clients with a valid cookie are not bounded. 0: no limit."`
	Slip               int            `yaml:"slip" kind:"count" max:"10" doc:"Every so many-th answer beyond responses_per_second is sent empty and truncated, so that honest clients ask again over TCP. 1: all of them; 0: none."`
	IPv4Prefix         int            `yaml:"ipv4_prefix" kind:"count" min:"8" max:"32" doc:"Bits of an IPv4 address that make one prefix, for responses_per_second."`
	IPv6Prefix         int            `yaml:"ipv6_prefix" kind:"count" min:"16" max:"128" doc:"Bits of an IPv6 address that make one prefix, for responses_per_second."`
	QueriesPerSecond   int            `yaml:"queries_per_second" kind:"count" max:"100000" doc:"Queries a second from one client address, of IPv6 from one /64, over any transport, in the long run. The reason for the others is limit_exceeded. 0: no limit."`
	QueriesBurst       int            `yaml:"queries_burst" kind:"count" max:"100000" doc:"Queries from one client address at once, after a pause. 0: as many as queries_per_second."`
	OverLimit          string         `yaml:"over_limit" kind:"enum" enum:"refuse drop" doc:"Queries beyond queries_per_second: REFUSED, or over UDP not answered."`
	Exempt             []netip.Prefix `yaml:"exempt" kind:"prefix" doc:"Clients whose answers and queries a second are not bounded, such as other resolvers and what checks this one."`
}

// TunnelGuard says what becomes of names that look as if data were carried in them.
type TunnelGuard struct {
	Mode        string   `yaml:"mode" kind:"enum" enum:"off observe refuse" doc:"When one source asks for very many names below one domain that look like data: nothing; a warning in the log and a metric; or refusals too, as long as it goes on. What the cache answers does not count."`
	UniqueNames int      `yaml:"unique_names_per_minute" kind:"count" min:"8" max:"2000" doc:"How many different names of one domain one source may ask for in a minute before they are looked at. A quarter of it is enough for long names; four times as many are too many whatever they look like."`
	Exempt      []string `yaml:"exempt" kind:"name" doc:"Domains at and below which nothing counts, such as those of a CDN whose names look like data."`
}
