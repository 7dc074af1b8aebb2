package policy

import (
	"fmt"
	"strings"
	"testing"
)

// Names that fill several chunks of the arena are all found, and come in their order.
func TestIndexOfManyChunks(t *testing.T) {
	x, ps := newNameIndex(), newPostings()
	var names []string
	for i := range 30_000 {
		names = append(names, fmt.Sprintf("n%d.%s.example", i, strings.Repeat("x", i%60+1)))
	}
	for i, name := range names {
		refs := ps.intern([]ref{{owner: uint32(i % 7), rule: uint32(i % 11)}})
		if err := x.add(&ps, pattern{base: name, apex: i%2 == 0, below: i%3 == 0}, refs); err != nil {
			t.Fatal(err)
		}
	}
	x.seal()
	if len(x.arena) < 2 {
		t.Fatalf("%d chunks", len(x.arena))
	}
	for i, name := range names {
		want := ps.intern([]ref{{owner: uint32(i % 7), rule: uint32(i % 11)}})
		exact, below := x.lookup(name)
		if (exact == want) != (i%2 == 0) || (below == want) != (i%3 == 0) {
			t.Fatalf("%s: %d and %d, want %d", name, exact, below, want)
		}
	}
	if exact, below := x.lookup("n30000.x.example"); exact != 0 || below != 0 {
		t.Error("a name is found that is not there")
	}
	i := 0
	x.records(func(name string, _, _ posting) {
		if name != names[i] {
			t.Fatalf("record %d is %s, want %s", i, name, names[i])
		}
		i++
	})
	if i != len(names) {
		t.Errorf("%d records, want %d", i, len(names))
	}
}
