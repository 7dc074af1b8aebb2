// Package event defines the one record that sallyport makes of each finished
// connection, request or DNS query. Logs, metrics and discovery read the same
// record, so they cannot tell different stories. Proxy and resolver, which never
// import each other, share it beside the policy.
package event

import (
	"net/netip"
	"time"

	"sallyport/policy"
)

// Kind says what an Event records.
type Kind string

// The kinds of Event.
const (
	Connect Kind = "connect" // a CONNECT, from its request line to the end of the tunnel
	HTTP    Kind = "http"    // a plain HTTP request, absolute-form or inside a CONNECT
	TLS     Kind = "tls"     // a transparently redirected connection that spoke TLS
	TCP     Kind = "tcp"     // a transparently redirected connection that did not
	DNS     Kind = "dns"     // a query to the resolver
	Config  Kind = "config"  // a reload of policy or settings
)

// An Event says what happened. Strings that came from a client (Name, SNI, Method,
// UserAgent) are as the client sent them, which may be anything: whoever writes
// them out escapes and bounds them.
type Event struct {
	Time     time.Time       // when it began
	Kind     Kind            // what it records
	ID       string          // unique within the process's life; also X-Sallyport-Id
	Source   netip.AddrPort  // client, or who a load balancer says it is; IPv4 never mapped
	Listener string          // proxy, proxy_tls, dns, dns_tls, dns_https or transparent: which door, a closed set
	Method   string          // HTTP method
	Name     string          // destination name or address asked for
	Port     uint16          // destination port; 0 for DNS
	Path     string          // path of a plain HTTP request, with the ? of a query but not the query; only log formats that need it show it
	Decision policy.Decision // the last decision taken

	Protocol policy.Protocol // what was spoken inside a CONNECT, as far as it was seen; the Kind says it of all else

	VPCEndpoint string // AWS VPC endpoint that the client came through, as a load balancer tells it, or ""

	SNI  string   // server_name of the ClientHello
	ALPN []string // protocols offered (RFC 7301)
	ECH  bool     // Encrypted ClientHello offered
	// PostQuantum says that the ClientHello has a post-quantum key share.
	PostQuantum bool
	TLSVersion  uint16 // highest TLS version offered; 0 if none seen
	JA4         string // fingerprint of the ClientHello, or ""

	Destination netip.AddrPort // address dialled; with a Parent its address; zero if none
	Parent      string         // host:port of the proxy it went through, or ""
	Status      int            // HTTP status sent to the client; 0 if none
	Aborted     bool           // a plain HTTP exchange ended before its response did
	ContentType string         // Content-Type of an HTTP response or refusal, or ""; shown as Path is
	QType       string         // type of the question, such as AAAA or TYPE65400
	RCode       string         // response code, such as NOERROR
	Answers     []string       // addresses and names answered, at most a handful

	BytesUp   int64         // client to destination, body or tunnel
	BytesDown int64         // destination to client
	Duration  time.Duration // from Time to the end
	DNSTime   time.Duration // spent resolving
	ConnTime  time.Duration // spent connecting

	User      string // authenticated user, or ""
	UserAgent string // User-Agent field
	Error     string // what failed, for operators; never shown to clients
}

// An Observer is told of each Event once, when it is over. Observe must not block
// and must not keep ev or its slices after it returns. It may keep strings, but whoever
// does so for long clones them: they may be parts of larger ones.
type Observer interface {
	Observe(ev *Event)
}

// Observers passes each Event to all of them in order.
type Observers []Observer

// Observe implements Observer.
func (os Observers) Observe(ev *Event) {
	for _, o := range os {
		o.Observe(ev)
	}
}
