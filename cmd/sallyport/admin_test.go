package main

import (
	"fmt"
	"testing"

	"sallyport/dnsfilter"
	"sallyport/internal/config"
	"sallyport/policy/event"
)

// TestObservers says who is told of what, by the settings: without an admin listener
// nobody observes for it, and queries are not observed only to be forgotten.
func TestObservers(t *testing.T) {
	number := func(o event.Observer) int {
		if o == nil {
			return 0
		}
		return len(o.(event.Observers))
	}
	for _, tt := range []struct {
		format, admin, dns   string
		connections, queries int
		events               dnsfilter.Events
	}{
		{"json", "127.0.0.1:0", "all", 3, 2, "all"},
		{"json", "127.0.0.1:0", "denied", 3, 2, "denied"},
		{"json", "", "all", 2, 1, "all"},
		{"squid", "127.0.0.1:0", "all", 3, 1, "sample"},
		{"aviatrix", "127.0.0.1:0", "denied", 3, 1, "denied"},
		{"squid", "", "all", 2, 0, "sample"},
	} {
		g := &gate{settings: config.Settings{Admin: config.Admin{Listen: tt.admin}, Log: config.Log{Format: tt.format, DNS: tt.dns}}}
		g.observer, g.queries = g.observers()
		c := g.dnsConfig()
		got := fmt.Sprint(number(g.observer), number(g.queries), c.Events, c.Observer == nil)
		if want := fmt.Sprint(tt.connections, tt.queries, tt.events, tt.queries == 0); got != want {
			t.Errorf("%+v: %s, want %s", tt, got, want)
		}
	}
}
