# What a team may want of a policy beyond what `sallyport check` finds. Samples: keep
# what you need and change the numbers.
#
#	conftest test --policy deploy/ci/conftest policy.yaml
package main

import rego.v1

# The longest that an exception and a group that observes may live.
max_exception_days := 366

max_observe_days := 92

# Every allow rule that is more than a bare string, with where it stands.
rules contains {"at": sprintf("groups[%d].allow[%d]", [g, i]), "rule": rule} if {
	some g, i
	rule := input.groups[g].allow[i]
	is_object(rule)
}

# Relayed without looking: somebody answers for it, and not for ever.
deny contains msg if {
	some r in rules
	r.rule.protocol == "tcp"
	some key in ["id", "owner", "reason", "expires"]
	not r.rule[key]
	msg := sprintf("%s: protocol: tcp needs %s", [r.at, key])
}

# A weaker ClientHello, a wide pattern or private addresses: say why.
deny contains msg if {
	some r in rules
	some what in weakened(r.rule)
	not r.rule.reason
	msg := sprintf("%s: %s needs a reason", [r.at, what])
}

weakened(rule) := {what |
	some what, present in {
		"tls": object.get(rule, "tls", null) != null,
		"allow_public_suffix": object.get(rule, "allow_public_suffix", false),
		"private_destinations": object.get(rule, "private_destinations", []) != [],
	}
	present
}

deny contains msg if {
	some r in rules
	days_until(r.rule.expires) > max_exception_days
	msg := sprintf("%s: expires %s is more than %d days ahead", [r.at, r.rule.expires, max_exception_days])
}

deny contains msg if {
	some g, group in input.groups
	group.mode == "observe"
	days_until(group.observe_until) > max_observe_days
	msg := sprintf("groups[%d]: observe_until %s is more than %d days ahead", [g, group.observe_until, max_observe_days])
}

# Whoever is not known gets nothing.
deny contains "unmatched_source: sources that no group names must stay denied" if {
	object.get(input, "unmatched_source", "deny") != "deny"
}

days_until(date) := (time.parse_ns("2006-01-02", substring(date, 0, 10)) - time.now_ns()) / (((24 * 60) * 60) * 1000000000)
