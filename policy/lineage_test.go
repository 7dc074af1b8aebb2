package policy

import (
	"maps"
	"slices"
	"testing"
)

func TestLineages(t *testing.T) {
	d := Document{Groups: []Group{
		{Name: "base"},
		{Name: "web", Extends: []string{"base"}},
		{Name: "mail", Extends: []string{"base", "nobody"}},
		{Name: "all", Extends: []string{"web", "mail"}},
		{Name: "egg", Extends: []string{"hen"}},
		{Name: "hen", Extends: []string{"egg"}},
	}}
	want := map[string][]string{
		"base": {"base"}, "web": {"web", "base"}, "mail": {"mail", "base"}, "all": {"all", "web", "mail", "base"},
		"egg": {"egg", "hen"}, "hen": {"hen", "egg"},
	}
	if got := d.Lineages(); !maps.EqualFunc(got, want, slices.Equal) {
		t.Errorf("%v, want %v", got, want)
	}
}
