package admin

import (
	"context"
	"sync"
	"time"
)

const (
	// seriesStep is how often a Sampler looks.
	seriesStep = 10 * time.Second
	// seriesMinutes is how far back a Series goes, at most.
	seriesMinutes = 60
	// seriesSteps bounds what a Sampler keeps.
	seriesSteps = seriesMinutes * int(time.Minute/seriesStep)
)

// Counts are counters since the start, but for Tunnels.
type Counts struct {
	Decisions, DNSQueries VerdictCounts
	BytesUp, BytesDown    int64
	Tunnels               int // open now
}

// VerdictCounts are counters by verdict.
type VerdictCounts struct{ Allow, Deny, Observe uint64 }

// A Sampler looks at counters regularly and keeps the last hour.
type Sampler struct {
	read func() Counts

	mu      sync.Mutex // guards what follows
	samples []counted  // oldest first, one more than steps
}

// counted are Counts at a time.
type counted struct {
	at time.Time
	Counts
}

// NewSampler returns a Sampler of what read returns. Run samples.
func NewSampler(read func() Counts) *Sampler { return &Sampler{read: read} }

// Run samples until ctx ends.
func (s *Sampler) Run(ctx context.Context) error {
	tick := time.NewTicker(seriesStep)
	defer tick.Stop()
	s.sample(time.Now())
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			s.sample(now)
		}
	}
}

func (s *Sampler) sample(now time.Time) {
	c := counted{now, s.read()}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.samples) > seriesSteps {
		s.samples = append(s.samples[:0], s.samples[1:]...)
	}
	s.samples = append(s.samples, c)
}

// Series returns the last minutes, as far as they were sampled.
func (s *Sampler) Series(minutes int) Series {
	s.mu.Lock()
	defer s.mu.Unlock()
	steps := max(0, min(minutes*int(time.Minute/seriesStep), len(s.samples)-1))
	verdicts := func() Verdicts {
		return Verdicts{make([]float64, 0, steps), make([]float64, 0, steps), make([]float64, 0, steps)}
	}
	out := Series{
		StepSeconds: int(seriesStep / time.Second), Time: make([]int64, 0, steps), Decisions: verdicts(), DNSQueries: verdicts(),
		BytesUp: make([]float64, 0, steps), BytesDown: make([]float64, 0, steps), Tunnels: make([]int, 0, steps),
	}
	for i := len(s.samples) - steps; i < len(s.samples); i++ {
		a, b := &s.samples[i-1], &s.samples[i]
		seconds := b.at.Sub(a.at).Seconds()
		out.Time = append(out.Time, b.at.Unix())
		out.Decisions.add(&a.Decisions, &b.Decisions, seconds)
		out.DNSQueries.add(&a.DNSQueries, &b.DNSQueries, seconds)
		out.BytesUp = append(out.BytesUp, rate(uint64(a.BytesUp), uint64(b.BytesUp), seconds))
		out.BytesDown = append(out.BytesDown, rate(uint64(a.BytesDown), uint64(b.BytesDown), seconds))
		out.Tunnels = append(out.Tunnels, b.Tunnels)
	}
	return out
}

func (v *Verdicts) add(a, b *VerdictCounts, seconds float64) {
	v.Allow = append(v.Allow, rate(a.Allow, b.Allow, seconds))
	v.Deny = append(v.Deny, rate(a.Deny, b.Deny, seconds))
	v.Observe = append(v.Observe, rate(a.Observe, b.Observe, seconds))
}

// rate is how much a counter has grown, a second. It may have lost the counts of
// groups that a new policy does not have.
func rate(a, b uint64, seconds float64) float64 {
	if b <= a || seconds <= 0 {
		return 0
	}
	return float64(b-a) / seconds
}
