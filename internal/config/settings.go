// Package config reads the settings of a sallyport process: listeners, timeouts,
// where the policy and the log are. What is allowed is not a setting; that is
// package policy's.
//
// Settings come from four layers, the first that names a key wins: flags,
// environment variables, the settings file, the embedded default. Each layer is
// checked strictly on its own, so that a mistake is reported where it was made,
// with all the others, and never hidden by a layer above it.
package config

import (
	"net/netip"
	"time"
)

// Embedded is the value of policy.source that stands for the starter policy
// inside the program.
const Embedded = "embedded"

// Settings say how one process runs. The fields are the keys of sallyport.yaml;
// [Load] fills every one of them.
//
// The tags are the one description of a key: yaml is its name, kind what text it
// takes (kinds), min and max its bounds, live that a reload applies it. A doc is
// what the JSON Schema shows in an editor.
type Settings struct {
	File string `yaml:"-"` // the settings file that was read, or ""

	Node   string `yaml:"node" kind:"node" doc:"Name of this process in events. Empty: the host name."`
	Proxy  Proxy  `yaml:"proxy" doc:"The explicit forward proxy."`
	DNS    DNS    `yaml:"dns" doc:"The resolver, which proxy and clients share."`
	Admin  Admin  `yaml:"admin" doc:"Health, readiness, metrics and the admin API."`
	Policy Policy `yaml:"policy" doc:"Where the policy comes from."`
	Log    Log    `yaml:"log" doc:"Events and messages."`

	Discovery Discovery `yaml:"discovery" doc:"What clients ask for is remembered, for sallyport learn and sallyport report."`
}

// Proxy holds the settings of the forward proxy.
type Proxy struct {
	Listen        []string      `yaml:"listen" kind:"listen" doc:"Addresses to listen on, host:port. No host: every address of this machine. []: no proxy. Port 0: any free port."`
	HelpURL       string        `yaml:"help_url" kind:"url" doc:"Shown to a refused client: where to ask for access (https:, http: or mailto:). Empty: nothing is shown."`
	ProxyProtocol ProxyProtocol `yaml:"proxy_protocol" doc:"PROXY protocol from load balancers in front of the proxy."`
	Auth          Auth          `yaml:"auth" doc:"Credentials of clients: who asks, beyond the address."`
	TLSListen     []string      `yaml:"tls_listen" kind:"listen" doc:"Addresses where clients speak TLS to the proxy, with HTTP/1.1 or HTTP/2, host:port. Needs tls.certificate and tls.key. []: none."`
	TLS           TLS           `yaml:"tls" doc:"The TLS of tls_listen, and client certificates."`
	Timeouts      Timeouts      `yaml:"timeouts" doc:"How long the proxy waits."`
	Limits        Limits        `yaml:"limits" doc:"How much the proxy takes on."`

	Parent                string       `yaml:"parent" kind:"parent" live:"true" doc:"A proxy that connections go through: http://host:port, or https://host:port for TLS to it; user:password@ before the host for Basic. Empty: none."`
	ParentCredentialsFile string       `yaml:"parent_credentials_file" kind:"path" live:"true" doc:"A file with user:password for proxy.parent in its first line, so that the secret is in no setting; relative to this file. Empty: none."`
	ParentTarget          string       `yaml:"parent_target" kind:"enum" enum:"name address" live:"true" doc:"What a parent is asked for. name: the name, so that its own policy and log work; it resolves the name again. address: the address that was checked here."`
	ParentResolves        []string     `yaml:"parent_resolves" kind:"suffix" live:"true" doc:"Names that go to the parent even if they do not resolve here, without a check of their addresses: .corp.example is that name and all below it, *.corp.example all below it."`
	SourceAddress         []netip.Addr `yaml:"source_address" kind:"address" live:"true" doc:"Addresses of this machine that connections leave from, at most one IPv4 and one IPv6. With one family alone the other is not used. []: the system chooses."`
	Groups                []ProxyGroup `yaml:"groups" live:"true" doc:"Ways out for groups of the policy."`
	PAC                   PAC          `yaml:"pac" doc:"The file /proxy.pac, which proxy and admin server give to browsers."`
}

// A ProxyGroup is the way out for one group of the policy.
type ProxyGroup struct {
	Group                 string       `yaml:"group" kind:"text" required:"true" doc:"A group of the policy."`
	Parent                string       `yaml:"parent" kind:"group_parent" doc:"As proxy.parent; direct: none. Left out: proxy.parent, with its credentials."`
	ParentCredentialsFile string       `yaml:"parent_credentials_file" kind:"path" doc:"As proxy.parent_credentials_file, for the parent of this group."`
	SourceAddress         []netip.Addr `yaml:"source_address" kind:"address" doc:"As proxy.source_address. Left out: that."`
}

// PAC holds the settings of the proxy auto-configuration file.
type PAC struct {
	Direct []string `yaml:"direct" kind:"direct" doc:"What clients reach without the proxy, besides loopback and names without a dot: intranet.example, .corp.example (with the name itself), *.corp.example, 10.0.0.0/8. Also in the output of sallyport env."`
}

// ProxyProtocol says which peers may send a PROXY protocol header.
type ProxyProtocol struct {
	Trusted []netip.Prefix `yaml:"trusted" kind:"prefix" doc:"Load balancers, as prefixes. Every connection from them must begin with a PROXY protocol header, version 1 or 2, whose source is then who asks. From anyone else such a header closes the connection."`
}

// Auth says how clients prove by a password who they are.
type Auth struct {
	Htpasswd string `yaml:"htpasswd" kind:"path" doc:"File of users and bcrypt hashes, as htpasswd -B writes it; relative to this file. Empty: Proxy-Authorization is not looked at, and never forwarded."`
	Realm    string `yaml:"realm" kind:"realm" doc:"Shown to people who are asked for a password."`
	Required bool   `yaml:"required" kind:"bool" doc:"Nobody passes without a password or a client certificate. false: credentials are asked for where the source has no group and the policy lists users."`
}

// TLS holds the certificate of the TLS listeners and what they want of clients.
type TLS struct {
	Certificate   string `yaml:"certificate" kind:"path" doc:"PEM file of the listener's certificate and the chain to its authority; relative to this file. Read again when it changes."`
	Key           string `yaml:"key" kind:"path" doc:"PEM file of the certificate's key; relative to this file."`
	ClientCA      string `yaml:"client_ca" kind:"path" doc:"PEM file of the authorities that sign client certificates; relative to this file. Empty: clients are asked for none. Revocation is not looked at."`
	RequireClient bool   `yaml:"require_client_certificate" kind:"bool" doc:"No connection without a client certificate. false: it is taken if there is one."`
	UserFrom      string `yaml:"user_from" kind:"enum" enum:"san cn uri" doc:"What in a client certificate names the user. san: the first mail address, or else the first DNS name, of subjectAltName. cn: the common name of the subject. uri: the first URI of subjectAltName, such as a SPIFFE ID."`
	MinVersion    string `yaml:"min_version" kind:"enum" enum:"1.2 1.3" doc:"Lowest TLS version of the listener. What clients speak inside a CONNECT is the policy's to say."`
}

// Timeouts bound each stage of a connection.
type Timeouts struct {
	Connect       time.Duration `yaml:"connect" kind:"duration" min:"1ms" max:"1h" doc:"To resolve a name and connect to it. Longer: a 504."`
	ClientHello   time.Duration `yaml:"client_hello" kind:"duration" min:"1ms" max:"1h" doc:"From the 200 of a CONNECT to the whole TLS ClientHello."`
	RequestHeader time.Duration `yaml:"request_header" kind:"duration" min:"1ms" max:"1h" doc:"To receive the header of a request."`
	Idle          time.Duration `yaml:"idle" kind:"duration" min:"1ms" max:"365d" doc:"A tunnel with no byte in either direction for so long is closed."`
	Drain         time.Duration `yaml:"drain" kind:"duration" min:"0s" max:"24h" doc:"On SIGTERM: how long live tunnels may go on before they are cut."`
}

// Limits bound what clients can make the proxy hold.
type Limits struct {
	Tunnels          int `yaml:"tunnels" kind:"count" max:"10000000" doc:"Tunnels at a time; more are answered 503. 0: no limit."`
	TunnelsPerSource int `yaml:"tunnels_per_source" kind:"count" max:"10000000" doc:"Tunnels at a time from one client address, of IPv6 from one /64; more are answered 429. 0: no limit."`
	ClientHelloBytes int `yaml:"client_hello_bytes" kind:"size" min:"1KiB" max:"1MiB" doc:"Longest TLS ClientHello, in bytes; a longer one is refused as hello_too_large."`
	HeaderBytes      int `yaml:"header_bytes" kind:"size" min:"1KiB" max:"1MiB" doc:"Longest request header, in bytes; a longer one is answered 431."`

	TunnelsPerGroup      int `yaml:"tunnels_per_group" kind:"count" max:"10000000" doc:"Tunnels at a time from all clients of one group; more are answered 503. 0: no limit."`
	ConnectionsPerSource int `yaml:"connections_per_source" kind:"count" max:"10000000" doc:"Connections at a time from one client address, of IPv6 from one /64, that are no tunnels: without a request yet, or with plain HTTP; more are answered 429. 0: no limit."`
	ConnectionsPerSecond int `yaml:"connections_per_second" kind:"count" max:"1000000" doc:"New connections a second from one client address, of IPv6 from one /64, in the long run; more are answered 429. 0: no limit."`
	ConnectionsBurst     int `yaml:"connections_burst" kind:"count" max:"1000000" doc:"New connections from one client address at once, after a pause. 0: as many as connections_per_second."`
	URLBytes             int `yaml:"url_bytes" kind:"size" min:"256" max:"1MiB" doc:"Longest request target (URL), in bytes; a longer one is answered 414."`
}

// DNS holds the settings of the resolver.
type DNS struct {
	Listen        []string      `yaml:"listen" kind:"listen" doc:"Addresses to listen on, host:port, UDP and TCP. []: no resolver for clients; the proxy still resolves by these settings."`
	TLSListen     []string      `yaml:"tls_listen" kind:"listen" doc:"Addresses for DNS over TLS (RFC 7858), host:port, usually :853. Needs dns.tls.certificate and dns.tls.key. []: none."`
	HTTPSListen   []string      `yaml:"https_listen" kind:"listen" doc:"Addresses for DNS over HTTPS (RFC 8484), host:port, with the path /dns-query and HTTP/1.1 or HTTP/2. Needs dns.tls.certificate and dns.tls.key. []: none."`
	TLS           DNSTLS        `yaml:"tls" doc:"The TLS of tls_listen and https_listen."`
	ProxyProtocol ProxyProtocol `yaml:"proxy_protocol" doc:"PROXY protocol from load balancers in front of the resolver, over TCP, TLS and HTTPS."`

	Upstreams         []string    `yaml:"upstreams" kind:"upstream" doc:"Resolvers to forward to: an address or udp://address:port (then TCP if truncated), tcp://address:port, tls://host#name or https://host/path#name, where #name is the name in the certificate of a host given as an address. []: those of this machine (/etc/resolv.conf)."`
	UpstreamMode      string      `yaml:"upstream_mode" kind:"enum" enum:"sequential fastest" doc:"Which of several resolvers is asked first: in the order they are listed, or the one that answers fastest. Those that fail come last either way."`
	Zones             []Zone      `yaml:"zones" doc:"Conditional forwarding: names below a zone go to the zone's own upstreams."`
	Records           []Record    `yaml:"records" doc:"Records answered here, before any upstream is asked."`
	HostsFile         string      `yaml:"hosts_file" kind:"path" doc:"A hosts file, answered before any upstream, for proxy and resolver alike. Empty: none."`
	Deny              string      `yaml:"deny" kind:"enum" enum:"refused nxdomain nodata sinkhole" doc:"What a refused query is answered with."`
	HTTPSRecords      string      `yaml:"https_records" kind:"enum" enum:"pass strip_ech nodata" doc:"HTTPS and SVCB answers: as they are, without ech (so that clients send a readable SNI), or none."`
	CNAMEs            string      `yaml:"cnames" kind:"enum" enum:"trust inspect" doc:"The names that an allowed name is an alias of: answered whole, or each decided too."`
	EDNSSize          int         `yaml:"edns_size" kind:"size" min:"512" max:"4096" doc:"Largest UDP message offered and sent, in bytes (RFC 6891). Above 1232 answers may be fragmented."`
	CaseRandomisation bool        `yaml:"case_randomisation" kind:"bool" doc:"Send names over UDP with letters in random case, and ignore answers that do not repeat it: forged answers are rarer still. Resolvers that do not keep the case are not heard then."`
	HealthName        string      `yaml:"health_name" kind:"opt_name" doc:"A name that is answered to everybody, whatever the policy and the upstreams say: A 127.0.0.1, AAAA ::1, TXT ok. Empty: none."`
	SearchDomains     []string    `yaml:"search_domains" kind:"name" doc:"Suffixes that clients append while they search, such as cluster.local: unlisted names below them are answered NXDOMAIN, whatever dns.deny says."`
	Cache             Cache       `yaml:"cache" doc:"Answers kept."`
	Limits            DNSLimits   `yaml:"limits" doc:"What one client can ask for, and have sent to it."`
	TunnelGuard       TunnelGuard `yaml:"tunnel_guard" doc:"Looks for data in the names that are asked for."`
}

// DNSTLS holds the certificate of the resolver's encrypted listeners.
type DNSTLS struct {
	Certificate string `yaml:"certificate" kind:"path" doc:"PEM file of the certificate and the chain to its authority; relative to this file. Read again when it changes."`
	Key         string `yaml:"key" kind:"path" doc:"PEM file of the certificate's key; relative to this file."`
}

// A Zone forwards the names below it to upstreams of its own.
type Zone struct {
	Zone                string         `yaml:"zone" kind:"name" required:"true" doc:"The zone: this name and every name below it."`
	Upstreams           []string       `yaml:"upstreams" kind:"upstream" required:"true" doc:"The zone's resolvers, written as dns.upstreams."`
	PrivateDestinations []netip.Prefix `yaml:"private_destinations" kind:"prefix" doc:"Private addresses that allowed names of the zone may lead to, where no rule of the policy says so. []: none."`
}

// A Record is answered by the resolver itself.
type Record struct {
	Name  string        `yaml:"name" kind:"name" required:"true" doc:"Owner name."`
	Type  string        `yaml:"type" kind:"enum" enum:"A AAAA CNAME TXT PTR SRV" required:"true" doc:"Type of the record."`
	Value string        `yaml:"value" kind:"text" required:"true" doc:"An address, a name, a text or, for SRV, priority weight port target."`
	TTL   time.Duration `yaml:"ttl" kind:"duration" default:"60s" max:"365d" doc:"How long clients may keep it. Left out: 60s."`
}

// Cache bounds the resolver's cache.
type Cache struct {
	Size       int64         `yaml:"size" kind:"size" max:"64GiB" doc:"Memory for answers, in bytes. 0: no cache."`
	MinTTL     time.Duration `yaml:"min_ttl" kind:"duration" max:"24h" doc:"Answers with a shorter TTL are kept this long."`
	MaxTTL     time.Duration `yaml:"max_ttl" kind:"duration" min:"1s" max:"7d" doc:"Answers with a longer TTL are kept this long."`
	ServeStale time.Duration `yaml:"serve_stale" kind:"duration" max:"7d" doc:"While no upstream answers, expired answers are used for so long (RFC 8767). 0s: never."`
	Prefetch   bool          `yaml:"prefetch" kind:"bool" doc:"Ask again for an answer in use shortly before it expires, so that no client waits."`
}

// Admin holds the settings of the admin server.
type Admin struct {
	Listen      string   `yaml:"listen" kind:"admin" doc:"Address to listen on, host:port. Beyond loopback it needs token_file, or tls.client_ca. Empty: none."`
	Hosts       []string `yaml:"hosts" kind:"name" doc:"Names, besides localhost, that connections over loopback may ask for; others are refused, so that no web page can reach this server through a name of its own. []: none."`
	TokenFile   string   `yaml:"token_file" kind:"path" doc:"A file whose first line is the token that every request must carry, as Bearer token or as password of Basic; relative to this file. Read again when it changes. Empty: no token."`
	OpenMetrics bool     `yaml:"open_metrics" kind:"bool" doc:"/metrics needs neither token nor certificate. /healthz, /readyz and /proxy.pac never do."`
	TLS         AdminTLS `yaml:"tls" doc:"TLS of the admin server. Its files are read again when they change."`
}

// AdminTLS holds the certificate of the admin server and whom it takes for an operator.
type AdminTLS struct {
	Certificate string `yaml:"certificate" kind:"path" doc:"PEM file of the certificate and the chain to its authority; relative to this file. Empty: no TLS."`
	Key         string `yaml:"key" kind:"path" doc:"PEM file of the certificate's key; relative to this file."`
	ClientCA    string `yaml:"client_ca" kind:"path" doc:"PEM file of the authorities that sign operators' certificates; relative to this file. Each request needs such a certificate then, or the token if there is one. Empty: clients are asked for none."`
}

// Policy says where the policy document comes from.
type Policy struct {
	Source   string `yaml:"source" kind:"source" doc:"The policy file, or a folder of policy files (*.yaml, which make up one policy together), relative to this file. The word embedded: the starter policy inside the program."`
	LastGood string `yaml:"last_good" kind:"path" doc:"A file in which the last policy that was good is kept, with its list files (a zip archive). At the start it is used if source cannot be; if there is none either, everything is denied until source can be read. Its folder must exist and be writable. Empty: no copy, and a start without a good policy fails."`
}

// Log says what is written where.
type Log struct {
	Format string `yaml:"format" kind:"enum" enum:"json squid aviatrix" doc:"json: every event, one object a line. squid: Squid's native access.log. aviatrix: Aviatrix FQDN log. The last two have no lines for DNS queries, and messages go to stderr."`
	Output string `yaml:"output" kind:"output" doc:"stdout, stderr, a file, which SIGUSR1 reopens (relative to this file), or a syslog receiver (RFC 5424): syslog+udp://host:514, syslog+tcp://host:601 or syslog+unix:///dev/log."`
	DNS    string `yaml:"dns" kind:"enum" enum:"all denied sample" doc:"Which DNS queries are written: every one; those that are denied; or those, and of the allowed ones each source, name, type and response code once a minute. Metrics count every query."`
	Level  string `yaml:"level" kind:"enum" enum:"debug info warn error" live:"true" doc:"Least important message to write. Events are always written."`

	Facility string `yaml:"facility" kind:"enum" enum:"kern user mail daemon auth syslog lpr news uucp cron authpriv ftp ntp audit alert clock local0 local1 local2 local3 local4 local5 local6 local7" doc:"Facility of syslog messages."`
	Rotate   Rotate `yaml:"rotate" doc:"When a log file is put aside and a new one begun. Not for other outputs."`
}

// Rotate says when a log file is put aside.
type Rotate struct {
	Size     int64 `yaml:"size" kind:"size" max:"1024GiB" doc:"A file that would grow larger is put aside, in bytes. 0: never; leave that to logrotate and SIGUSR1."`
	Keep     int   `yaml:"keep" kind:"count" min:"1" max:"1000" doc:"Files put aside that are kept: FILE.1 is the youngest."`
	Compress bool  `yaml:"compress" kind:"bool" doc:"Compress files put aside with gzip: FILE.1.gz."`
}

// Discovery says what is remembered of what clients ask for.
type Discovery struct {
	Store     string        `yaml:"store" kind:"path" doc:"A file that keeps it over restarts; relative to this file. Its folder must exist and be writable. Empty: memory alone."`
	Entries   int           `yaml:"entries" kind:"count" max:"5000000" doc:"How many destinations are remembered, each with group, port, protocol and outcome, some 280 bytes each; for more those that are asked for least make room. 0: nothing is remembered."`
	Retention time.Duration `yaml:"retention" kind:"duration" min:"1d" max:"3650d" doc:"How long days are told apart, and how long a destination is remembered after it was last asked for."`
}
