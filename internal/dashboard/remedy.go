package dashboard

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sallyport/policy"
)

// A refusal is something that was denied, or would have been: what its remedy
// depends on. Fields that are not known are zero.
type refusal struct {
	Group       string // "": the source belongs to none
	Source      string // address of a client that asked
	User        string
	Name        string // name or literal address, as the client sent it
	Port        uint16
	DNS         bool   // a question to the resolver
	HTTP        bool   // a plain HTTP request
	QType       string // of the question
	SNI         string
	MinVersion  string     // highest TLS version offered, such as 1.1
	Destination netip.Addr // that the name led to
	Reason      string
	Rule        string // ID of the rule that denied
}

// A remedy says to people why something was denied and what would allow it.
type remedy struct {
	Why   string // what happened, one sentence
	Todo  string // what to do about it
	Where string // where the rule belongs, such as: groups: ci-runners: allow
	Rule  string // a YAML list with the rule that would allow exactly this; "": no rule would
	// Explain is the command that shows the decision at a shell; "" if what was asked
	// for cannot be written there.
	Explain string
	Link    string // the explain page with the same question, or ""
}

// reasons has, for each reason, what it means and what to do. docs/logging.md says the same.
var reasons = map[string]struct{ why, todo string }{
	"matched":              {"An allow rule matched.", ""},
	"not_listed":           {"No allow rule of the group covers it.", "List it, if it should be reachable."},
	"explicit_deny":        {"A deny rule matched, and deny wins over every allow.", "Narrow or remove the deny rule; no allow rule helps."},
	"unmatched_source":     {"No group has the client's address.", "Look for NAT between client and gate; add the prefix to a group."},
	"port_not_allowed":     {"The name is listed, but not on this port.", "Add the port to the rule, or this rule."},
	"protocol_not_allowed": {"The name is listed, but not for this protocol.", "Look at the protocol of its rule, or add this one."},
	"rule_expired":         {"The rule that would have matched has expired.", "Renew its expires, remove it, or add this rule."},
	"ip_literal":           {"An address was asked for, and no rule lists it.", "Make the client use the name, or list the address."},
	"private_destination":  {"The name leads outside global address space.", "Name the prefix in private_destinations of its rule, if that is meant."},
	"sni_mismatch":         {"The ClientHello names somebody else than the CONNECT.", "sni: listed, if the client reuses connections; otherwise look closer."},
	"sni_missing":          {"The ClientHello has no server name.", "sni: optional, for an old client."},
	"not_tls":              {"The client did not speak TLS where the rule wants it.", "protocol: tcp relays without looking, if that is meant."},
	"tls_version":          {"The highest TLS version offered is too old.", "Update the client, or lower min_version for this name alone."},
	"ech_not_allowed":      {"Encrypted ClientHello is offered.", "ech: allow for browsers; keep dns.https_records: strip_ech."},
	"hello_malformed":      {"The ClientHello cannot be read, or reads in two ways.", "Look at the client; no rule helps."},
	"hello_too_large":      {"The ClientHello is too large.", "Raise proxy.limits.client_hello_bytes."},
	"hello_timeout":        {"No whole ClientHello came in time.", "Where the server speaks first, use protocol: tcp with ports."},
	"host_mismatch":        {"The Host of a request inside a CONNECT is not its authority.", "Look at the client; no rule helps."},
	"bad_request":          {"The request is malformed.", "Look at the client; no rule helps."},
	"loop":                 {"The request would come back to this proxy.", "Look at the proxy settings of the client or of a parent proxy."},
	"qtype_not_allowed":    {"The name is listed, but not for this DNS type.", "Add the type to qtypes, or this rule."},
	"limit_exceeded":       {"A limit of the settings was reached.", "The event's error says which limit."},
	"auth_required":        {"Credentials are needed, and there were none.", "Look for the same client's next request, with a user."},
	"auth_failed":          {"The credentials are wrong.", "The event's error names the user, if there is one."},
	"resolve_failed":       {"The name did not resolve.", "Look at the resolver's upstreams."},
	"connect_failed":       {"No address of it could be reached.", "Look at the way out, and at the destination."},
	"policy_revoked":       {"A new policy, or other users, no longer allow it.", "Look at what changed: sallyport diff."},
}

// serverFirst are ports of protocols that are no TLS from their first byte, so that
// only protocol: tcp carries them.
var serverFirst = []uint16{21, 22, 23, 25, 110, 143, 389, 587, 1433, 1521, 3306, 5432, 5672, 6379, 9418, 11211, 27017}

// remedyFor returns what would help against r.
func remedyFor(r refusal) remedy {
	m := remedy{Why: reasons[r.Reason].why, Todo: reasons[r.Reason].todo}
	if m.Why == "" {
		m.Why = "Denied for " + visible(r.Reason) + "."
	}
	name, addr, ok := r.target()
	if !ok {
		if m.Todo == "" || slices.Contains([]string{"not_listed", "ip_literal"}, r.Reason) {
			m.Todo = "What was asked for is not a name that a rule could list."
		}
		return m
	}
	m.Explain = r.explain(name, addr)
	if r.Group == "" && r.Reason != "unmatched_source" {
		return m
	}
	rule := r.rule(name, addr)
	if rule == "" {
		return m
	}
	m.Where, m.Rule = "groups: "+r.Group+": allow", rule
	if r.Reason == "unmatched_source" {
		src, err := netip.ParseAddr(r.Source)
		if err != nil {
			m.Where, m.Rule = "", ""
			return m
		}
		m.Where = "groups"
		m.Rule = fmt.Sprintf("- name: new-group\n  sources: [%s]\n  allow:\n    %s", scalar(netip.PrefixFrom(src, src.BitLen()).String()),
			strings.ReplaceAll(rule, "\n", "\n    "))
	}
	return m
}

// target returns what was asked for, as a name or as an address.
func (r *refusal) target() (name string, addr netip.Addr, ok bool) {
	if a, err := netip.ParseAddr(strings.Trim(r.Name, "[]")); err == nil && a.Zone() == "" {
		return "", a.Unmap(), !r.DNS
	}
	n, err := policy.ParseName(r.Name)
	if err != nil || n.String() == "" {
		return "", addr, false
	}
	return n.String(), addr, true
}

// rule returns a YAML list with the rule that would allow r and as little else as
// the language can say, or "".
func (r *refusal) rule(name string, addr netip.Addr) string {
	var keys []string // beside names or addresses
	more := ""        // further rules
	if r.DNS {
		switch {
		case r.Reason == "explicit_deny" && !strings.HasPrefix(r.Rule, "builtin:"), !r.ruleHelps():
			return ""
		case r.QType != "" && !slices.Contains([]string{"A", "AAAA", "CNAME", "HTTPS", "SVCB"}, r.QType):
			if _, ok := policy.ParseQType(r.QType); !ok {
				return ""
			}
			keys = append(keys, "qtypes: ["+r.QType+"]")
		}
		return "- {names: [" + scalar(name) + "], " + strings.Join(append([]string{"protocol: dns"}, keys...), ", ") + "}\n"
	}
	tcp := slices.Contains(serverFirst, r.Port) && !r.HTTP
	switch r.Reason {
	case "explicit_deny":
		if !strings.HasPrefix(r.Rule, "builtin:") {
			return ""
		}
	case "private_destination":
		if !r.Destination.IsValid() {
			return ""
		}
		d := r.Destination.Unmap()
		keys = append(keys, "private_destinations: ["+scalar(netip.PrefixFrom(d, d.BitLen()).String())+"]")
	case "sni_mismatch":
		keys = append(keys, "tls: {sni: listed}")
		sni, err := policy.ParseName(r.SNI)
		if err != nil || sni.String() == "" {
			return ""
		}
		more = (&refusal{Port: r.Port, Reason: "not_listed"}).rule(sni.String(), netip.Addr{})
	case "sni_missing":
		keys = append(keys, "tls: {sni: optional}")
	case "tls_version":
		v := r.MinVersion
		if !slices.Contains([]string{"1.0", "1.1", "1.2"}, v) {
			v = "1.0"
		}
		keys = append(keys, "tls: {min_version: "+strconv.Quote(v)+"}")
	case "ech_not_allowed":
		keys = append(keys, "tls: {ech: allow}")
	case "not_tls", "hello_timeout":
		tcp = true
	default:
		if !r.ruleHelps() {
			return ""
		}
	}
	switch {
	case r.Port == 0:
		return ""
	case tcp:
		keys = append([]string{fmt.Sprintf("ports: [%d], protocol: tcp", r.Port)}, keys...)
	case r.Port != 443 && r.Port != 80:
		keys = append([]string{fmt.Sprintf("ports: [%d]", r.Port)}, keys...)
	case (r.Port == 80) != r.HTTP && r.Reason == "protocol_not_allowed": // TLS on 80, or HTTP on 443
		keys = append([]string{fmt.Sprintf("ports: [%d]", r.Port)}, keys...)
	}
	switch {
	case addr.IsValid():
		keys = append([]string{"addresses: [" + scalar(addr.String()) + "]"}, keys...)
	case len(keys) == 0:
		return "- " + scalar(name) + "\n" + more
	default:
		keys = append([]string{"names: [" + scalar(name) + "]"}, keys...)
	}
	return "- {" + strings.Join(keys, ", ") + "}\n" + more
}

// ruleHelps reports whether an allow rule for the target would have changed the
// decision.
func (r *refusal) ruleHelps() bool {
	return slices.Contains([]string{
		"not_listed", "unmatched_source", "port_not_allowed", "protocol_not_allowed", "rule_expired", "ip_literal",
		"qtype_not_allowed", "explicit_deny", "policy_revoked",
	}, r.Reason)
}

// explain returns the command that shows what the policy says to r.
func (r *refusal) explain(name string, addr netip.Addr) string {
	src, err := netip.ParseAddr(r.Source)
	if err != nil {
		return ""
	}
	target := r.Target()
	cmd := "sallyport explain --source " + src.String()
	if r.User != "" && plain(r.User) {
		cmd += " --user '" + strings.ReplaceAll(r.User, "'", `'\''`) + "'"
	}
	if r.Destination.IsValid() && !addr.IsValid() {
		cmd += " --destination " + r.Destination.String()
	}
	switch {
	case r.DNS:
		cmd, target = cmd+" --dns "+r.question(), name
	case !r.HTTP && r.SNI != "":
		if sni, err := policy.ParseName(r.SNI); err == nil {
			cmd += " --sni " + sni.String()
		}
	}
	if strings.ContainsAny(target, "[]") { // which a shell would read as a pattern
		target = "'" + target + "'"
	}
	return cmd + " " + target
}

// question is the type asked for, in letters that a shell leaves alone.
func (r *refusal) question() string {
	if _, ok := policy.ParseQType(r.QType); !ok {
		return "A"
	}
	return r.QType
}

// Target is what was asked for, as explain's form and command take it; "" if it
// is neither a name nor an address.
func (r *refusal) Target() string {
	name, addr, ok := r.target()
	switch {
	case !ok:
		return ""
	case r.DNS:
		return name
	}
	host := name
	if addr.IsValid() {
		host = addr.String()
	}
	hostPort := host + ":" + strconv.Itoa(int(r.Port))
	if addr.Is6() {
		hostPort = "[" + host + "]:" + strconv.Itoa(int(r.Port))
	}
	if r.HTTP {
		return "http://" + hostPort + "/"
	}
	return hostPort
}

// scalar returns s as a YAML string, in quotes where a reader of YAML might take
// it for something else. s is a name, an address or a prefix.
func scalar(s string) string {
	if strings.Contains(s, ".") && s[0] >= 'a' && s[0] <= 'z' && !strings.ContainsAny(s, `:"'#{}[],&*!|>%@ `) {
		return s
	}
	if a, err := netip.ParsePrefix(s); err == nil && a.Addr().Is4() {
		return s
	}
	return strconv.Quote(s)
}
