package discovery

import (
	"context"
	"time"

	"github.com/rs/zerolog"

	"sallyport/policy/event"
)

// Options say what a Store remembers and where.
type Options struct {
	// File keeps it over restarts. Its folder must exist. "": memory alone.
	File string
	// Entries bounds the pairs remembered, and as many rules; 0 is 200000.
	Entries int
	// Retention is how long days are told apart, and how long a pair is remembered
	// after it was last seen; 0 is 90 days.
	Retention time.Duration
	// Interval is how often changes are written to File; 0 is one minute. That is what
	// a crash loses.
	Interval time.Duration
	Logger   zerolog.Logger   // for what an operator should act on
	Now      func() time.Time // nil is time.Now
}

// A Store remembers. It is an [event.Observer] that neither blocks nor allocates for
// what it knows already.
type Store struct{}

var _ event.Observer = (*Store)(nil)

// Open returns a Store with what File remembers. A file that cannot be read is set
// aside, with a warning, and a new one begun; so it is with one that another process
// has, which is left alone while memory alone is used. The error is about Options.
func Open(o Options) (*Store, error) { return &Store{}, nil }

// Observe implements event.Observer.
func (s *Store) Observe(ev *event.Event) {}

// Run writes what has changed every Interval, until ctx ends; then it writes what is
// left and closes the file. Observe may go on, for nothing.
func (s *Store) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// Close closes the file of a Store that does not come to Run.
func (s *Store) Close() error { return nil }

// Pairs returns the pairs that q chooses, the most frequent first.
func (s *Store) Pairs(q Query) ([]Pair, error) { return nil, nil }

// Rules returns the use of every rule that was used.
func (s *Store) Rules() map[RuleKey]Use { return nil }

// Stats returns a snapshot.
func (s *Store) Stats() Stats { return Stats{} }
