package changes_test

import data.changes
import rego.v1

opening(change) := {"old": "a", "new": "b", "groups": [{"old": "g", "new": "g", "changes": [object.union({"opened": true, "kind": "name"}, change)]}]}

test_web_passes if count(changes.deny) == 0 with input as opening({"target": "a.example", "facets": ["443/tls", "80/http", "dns"]})

test_closing_passes if count(changes.deny) == 0 with input as opening({"opened": false, "target": "*", "facets": ["22/tcp"]})

test_tcp if {
	count(changes.deny) == 1 with input as opening({"target": "a.example", "facets": ["22/tcp"]})
	count(changes.deny) == 0 with input as opening({"target": "a.example", "facets": ["22/tcp"], "until": "2027-01-01"})
}

test_credentials if {
	count(changes.deny) == 1 with input as opening({"target": "a.example", "facets": ["80/http"], "to": ["169.254.169.254/32"]})
	count(changes.deny) == 0 with input as opening({"target": "a.example", "facets": ["80/http"], "to": ["10.0.0.0/8", "fd12::/16"]})
}

test_everything if {
	count(changes.deny) == 1 with input as opening({"target": "*", "facets": ["443/tls"]})
	changes.deny == {"g: denials would no longer be applied (observe until 2027-01-01)"} with input as {"groups": [{
		"old": "g", "new": "g",
		"old_mode": "enforce", "new_mode": "observe until 2027-01-01",
	}]}
}

test_warnings if {
	count(changes.warn) == 1 with input as {"groups": [{"old": "", "new": "g", "whole": true}]}
	count(changes.warn) == 1 with input as {"groups": [{"old": "g", "new": "g", "changes": [c |
		some i in numbers.range(1, 51)
		c := {"opened": true, "kind": "name", "target": sprintf("a%d.example", [i]), "facets": ["443/tls"]}
	]}]}
}
