package main_test

import data.main
import rego.v1

day := ((24 * 60) * 60) * 1000000000

in_days(n) := time.format([time.now_ns() + (n * day), "UTC", "2006-01-02"])

allowing(rule) := {"version": 1, "groups": [{"name": "g", "allow": ["a.example", rule]}]}

test_bare_strings_pass if count(main.deny) == 0 with input as allowing("b.example")

test_tcp if {
	main.deny == {
		"groups[0].allow[1]: protocol: tcp needs expires",
		"groups[0].allow[1]: protocol: tcp needs id",
		"groups[0].allow[1]: protocol: tcp needs owner",
	} with input as allowing({"names": ["a.example"], "ports": [22], "protocol": "tcp", "reason": "PAY-1"})
}

test_weakened if {
	count(main.deny) == 2 with input as allowing({"names": ["a.example"], "tls": {"ech": "allow"}, "private_destinations": ["10.0.0.0/8"]})
	count(main.deny) == 0 with input as allowing({"names": ["a.example"], "tls": {"ech": "allow"}, "reason": "browsers"})
	main.deny == {"groups[0].allow[1]: allow_public_suffix needs a reason"} with input as allowing({"names": ["*.com"], "allow_public_suffix": true})
}

test_dates if {
	count(main.deny) == 0 with input as allowing({"names": ["a.example"], "expires": in_days(300)})
	count(main.deny) == 1 with input as allowing({"names": ["a.example"], "expires": in_days(400)})
	count(main.deny) == 0 with input as {"groups": [{"name": "g", "mode": "observe", "observe_until": in_days(30)}]}
	count(main.deny) == 1 with input as {"groups": [{"name": "g", "mode": "observe", "observe_until": in_days(300)}]}
}

test_unmatched_source if {
	count(main.deny) == 0 with input as {"unmatched_source": "deny"}
	count(main.deny) == 1 with input as {"unmatched_source": "g"}
}
