// Package policy decides what may leave the network.
//
// The model in one page:
//
//	user or source ──longest prefix──► group ──rules──► Decision
//
// A [Document] is what operators write. [Compile] turns it into a [Policy],
// which never changes afterwards; a [Store] holds the one in force and swaps it
// whole. [Policy.Decide] is a pure function of a [Request]: it does no I/O, reads
// no clock, does not allocate and is safe for concurrent use. Proxy, resolver
// and every command ask it, and nothing else, so they cannot disagree.
//
// # Which group
//
// A user that a group lists belongs to that group, wherever the user comes from.
// For everybody else the longest source prefix that contains the client's address
// names the group (IPv4-mapped addresses count as IPv4). No prefix: unmatched_source, which is
// deny unless the document names a group there.
//
// # Which rule
//
// First the document's deny rules (guardrails), then those of the group and of
// the groups it extends, then their allow rules. Deny wins, whatever the order
// of lines and however specific the allow. Nothing matches: denied, not_listed.
// Where several rules would give the same answer, the one whose ID sorts first
// is named, so that the answer never depends on the order of lines.
//
// # In stages
//
// A proxy knows more as a connection goes on, and asks again each time with the
// same Request filled in further: the name and port (before any DNS query), each
// resolved address (Destination), what the client speaks (Protocol) and the facts
// of its TLS ClientHello (TLS). A rule that fails on a fact that is not known yet
// has not failed. The last answer is the one that counts.
//
// # Observe
//
// In a group that observes, what would have been denied is answered with the
// verdict [Observe] and the reason it would have been denied for. Guardrails and
// address checks deny even there; so do malformed requests, which callers refuse
// before they ask.
package policy
