// Package dnsfilter is the resolver of the gate: a forwarding DNS server that
// decides each question, and each address answered, by the policy of its source.
//
//	source ─► Server ─► Decide ─► Resolver: hosts file ► records ► cache ► zone or upstream
//	                       └─────► refusal           proxy ─► LookupNetIP ─┘
//
// A [Resolver] finds answers. It knows no sources and takes no decisions, so one
// cache serves everybody: it holds what the upstreams said, by name, type and the
// DO and CD bits, and verdicts cannot leak through it. The proxy resolves through
// the same Resolver in-process ([Resolver.LookupNetIP]) and decides names and
// addresses itself. A [Server] puts listeners for UDP, TCP, TLS and HTTPS before it.
//
// # What is decided
//
// The name asked for, for the source, before anything is sent: what does not pass
// is refused, whatever its type, and not one packet goes upstream. So are names
// that are no [policy.Name]: binary labels, escapes, names that end in a number.
// The refusal is Config.Deny; to a query with EDNS it says why (RFC 8914): 15
// Blocked, or 18 Prohibited for a source that is in no group.
//
// Each address answered (A, AAAA and the hints of HTTPS and SVCB) is decided again
// as the Destination of the name asked for, and removed unless it passes. If that
// leaves nothing the answer is NODATA with reason private_destination, or a refusal
// if it was a deny rule. Signatures over what was changed are removed with it.
//
// With CNAMEs trust, the chain of a listed name is answered whole, wherever it
// leads; with inspect, every name on the way must be allowed for the source too.
// Either way an alias's target is no more listed than before: a client that asks
// for it by itself is refused as usual, and CONNECT to it as well. What inspect
// refuses is not asked for, as far as an upstream leaves the chain to us.
//
// # The operator's own answers
//
// Config.Records are answered to every source that belongs to a group, unless a
// deny rule covers the name: they go nowhere. What the hosts file says about such a
// name counts instead, for clients and the proxy alike. A record that is a CNAME to
// a name elsewhere does go somewhere, and its name is decided like any other.
// Names of the hosts file are decided like any other as well; the file only says
// what their addresses are (and that they have no HTTPS or SVCB records). Private
// addresses in either are answered: the operator put them there. The proxy checks
// the address of each connection all the same.
//
// # What it does not do
//
// It does not recurse or validate DNSSEC: the upstreams do, and DO, CD and AD are
// passed through. EDNS options of clients, client subnet (RFC 7871) among them, are
// not passed on, nor is the additional section of answers. It cannot see what is
// encoded in allowed names below a wildcard.
package dnsfilter
