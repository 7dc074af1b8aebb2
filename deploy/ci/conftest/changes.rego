# What a pull request may open, judged on the difference of the two policies:
#
#	sallyport diff --output json main/policy.yaml policy.yaml > diff.json
#	conftest test --policy deploy/ci/conftest --namespace changes diff.json
package changes

import rego.v1

# How many destinations one pull request may open before somebody has to look twice.
max_opened := 50

opened contains {"group": group.new, "change": change} if {
	some group in input.groups
	some change in group.changes
	change.opened
}

# What is relayed without looking is opened for a while, not for ever.
deny contains msg if {
	some o in opened
	some facet in o.change.facets
	endswith(facet, "/tcp")
	not o.change.until
	msg := sprintf("%s: %s %s is opened without an end; add expires", [o.group, o.change.target, facet])
}

# Credentials of machines and clusters.
deny contains msg if {
	some o in opened
	some prefix in object.get(o.change, "to", [])
	some address in ["169.254.169.254/32", "fd00:ec2::254/128", "168.63.129.16/32"]
	net.cidr_contains(prefix, address)
	msg := sprintf("%s: %s may lead to %s, where clouds serve credentials", [o.group, o.change.target, address])
}

deny contains msg if {
	some o in opened
	o.change.target in {"*", "0.0.0.0/0", "::/0"}
	msg := sprintf("%s: %s is everything", [o.group, o.change.target])
}

deny contains msg if {
	some group in input.groups
	startswith(group.new_mode, "observe")
	msg := sprintf("%s: denials would no longer be applied (%s)", [group.new, group.new_mode])
}

warn contains msg if {
	count(opened) > max_opened
	msg := sprintf("%d destinations are opened at once", [count(opened)])
}

warn contains msg if {
	some group in input.groups
	group.whole
	group.old == ""
	msg := sprintf("further sources get everything that %s allows", [group.new])
}
