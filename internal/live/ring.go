package live

// A Cursor reads decisions in their order. It is for one goroutine.
type Cursor struct{}

// A Tally counts talkers.
type Tally struct{}
