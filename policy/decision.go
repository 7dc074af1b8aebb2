package policy

import (
	"net/netip"
	"time"
)

// Protocol is what a client speaks to its destination, as far as is known.
type Protocol uint8

const (
	ProtocolUnknown Protocol = iota // a CONNECT whose content has not been seen
	ProtocolTLS                     // a TLS ClientHello came first
	ProtocolHTTP                    // plain HTTP, absolute-form or inside CONNECT
	ProtocolTCP                     // neither TLS nor HTTP, or relayed without looking
	ProtocolDNS                     // a question to the resolver
)

// TLS holds the facts of a ClientHello that rules may restrict.
type TLS struct {
	Seen       bool   // the hello was read; false: the facts below are not known yet
	SNI        Name   // server_name (RFC 6066, section 3); zero if absent
	MaxVersion uint16 // highest version offered (RFC 8446, section 4.2.1), such as 0x0304
	ECH        bool   // an encrypted_client_hello extension is present (RFC 9849)
}

// Request describes one attempt to leave the network, as far as it is known.
// The zero value of a field means "not known" or "does not apply".
type Request struct {
	Source      netip.Addr // client address; IPv4-mapped counts as IPv4
	User        string     // who the client has proved to be; "" for nobody. Never taken from what a client merely says
	Name        Name       // destination name; zero if the client gave an address
	Address     netip.Addr // destination address that the client gave itself; used if Name is zero
	Port        uint16     // destination port; 0 for a DNS question
	Protocol    Protocol   // what the client speaks
	QType       uint16     // DNS type of the question (RFC 1035, section 3.2.2), with ProtocolDNS
	TLS         TLS        // facts of the ClientHello, with ProtocolTLS
	Destination netip.Addr // address that Name resolved to and that is about to be dialled or answered
	PrivateZone bool       // Name is in a zone of the settings that may lead to Destination though it is private
	Time        time.Time  // when; the zero value lies after every expiry date
}

// Verdict is the answer to a Request. The zero value is Deny.
type Verdict uint8

const (
	Deny    Verdict = iota // refuse
	Allow                  // let pass: a rule matched
	Observe                // let pass and record: would have been denied, but the group observes
)

// String returns deny, allow or observe.
func (v Verdict) String() string { return [...]string{"deny", "allow", "observe"}[v] }

// Mode says whether a group's denials are applied. The zero value applies them.
type Mode uint8

const (
	ModeEnforce Mode = iota // denials are applied
	ModeObserve             // denials are recorded only
)

// String returns enforce or observe.
func (m Mode) String() string { return [...]string{"enforce", "observe"}[m] }

// Inspect says what an allowed CONNECT may carry, and so what the proxy must
// look for before it relays. The zero value relays nothing.
type Inspect uint8

const (
	InspectTLS  Inspect = 1 << iota // a ClientHello, to be decided again with its facts
	InspectHTTP                     // plain HTTP, each request to be decided on its own
	InspectNone                     // anything: relay without looking
)

// Decision is a Verdict with the evidence for it. The zero value denies.
type Decision struct {
	Verdict  Verdict // Deny, Allow or Observe
	Mode     Mode    // mode of the group at Request.Time
	Reason   Reason  // why; ReasonMatched for Allow
	Inspect  Inspect // what to look for, with a verdict that passes and ProtocolUnknown
	Rule     string  // ID of the rule that decided, or ""; clone it to keep it, for it may be a part of the policy's memory
	Group    string  // name of the group, or ""
	Revision string  // revision of the policy that decided
}

// Passes reports whether traffic may go on: the verdict is Allow or Observe.
func (d Decision) Passes() bool { return d.Verdict != Deny }

// Refuse returns d turned into a denial for reason, for what callers find out
// themselves: malformed input, limits, failed connections. It denies in every mode.
func (d Decision) Refuse(reason Reason) Decision {
	d.Verdict, d.Reason, d.Inspect = Deny, reason, 0
	return d
}

// Reason says why a Decision came out as it did. It is a closed set, a log value
// and a metric label.
type Reason uint8

// The reasons. Those marked "caller" are never returned by Decide.
const (
	ReasonNone               Reason = iota // no decision was taken
	ReasonMatched                          // an allow rule matched
	ReasonNotListed                        // no allow rule covers the name or address
	ReasonExplicitDeny                     // a deny rule matched
	ReasonUnmatchedSource                  // no group has the source
	ReasonPortNotAllowed                   // listed, but not on this port
	ReasonProtocolNotAllowed               // listed, but not for this protocol
	ReasonRuleExpired                      // the rule that would have matched has expired
	ReasonIPLiteral                        // an address was asked for and no rule lists it
	ReasonPrivateDestination               // the destination is not globally reachable and no rule names its prefix
	ReasonSNIMismatch                      // server_name differs from the CONNECT name
	ReasonSNIMissing                       // no server_name
	ReasonNotTLS                           // not TLS where the rule wants TLS
	ReasonTLSVersion                       // highest offered version below min_version
	ReasonECHNotAllowed                    // Encrypted ClientHello offered
	ReasonHelloMalformed                   // caller: the ClientHello cannot be parsed
	ReasonHelloTooLarge                    // caller: the ClientHello exceeds the limit
	ReasonHelloTimeout                     // caller: no whole ClientHello in time
	ReasonHostMismatch                     // caller: Host differs from the authority
	ReasonBadRequest                       // caller: malformed request
	ReasonLoop                             // caller: the request would come back to this proxy
	ReasonQTypeNotAllowed                  // listed, but not for this DNS type
	ReasonLimitExceeded                    // caller: a limit was reached
	ReasonAuthRequired                     // caller: credentials are missing
	ReasonAuthFailed                       // caller: credentials are wrong
	ReasonResolveFailed                    // caller: the name did not resolve
	ReasonConnectFailed                    // caller: no address could be reached
	ReasonPolicyRevoked                    // caller: a new policy no longer allows a live tunnel
	reasonCount
)

var reasonNames = [reasonCount]string{
	"", "matched", "not_listed", "explicit_deny", "unmatched_source", "port_not_allowed",
	"protocol_not_allowed", "rule_expired", "ip_literal", "private_destination",
	"sni_mismatch", "sni_missing", "not_tls", "tls_version", "ech_not_allowed",
	"hello_malformed", "hello_too_large", "hello_timeout", "host_mismatch", "bad_request",
	"loop", "qtype_not_allowed", "limit_exceeded", "auth_required", "auth_failed",
	"resolve_failed", "connect_failed", "policy_revoked",
}

// String returns the reason as it stands in logs and metrics, such as not_listed.
func (r Reason) String() string {
	if r < reasonCount {
		return reasonNames[r]
	}
	return ""
}

// Reasons returns every reason but ReasonNone, in a fixed order.
func Reasons() []Reason {
	rs := make([]Reason, 0, reasonCount-1)
	for r := ReasonMatched; r < reasonCount; r++ {
		rs = append(rs, r)
	}
	return rs
}

// ParseReason returns the reason named s.
func ParseReason(s string) (Reason, bool) {
	for r, n := range reasonNames {
		if n == s && s != "" {
			return Reason(r), true
		}
	}
	return ReasonNone, false
}
