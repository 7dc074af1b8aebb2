// Package doctor finds out on a client machine whether the gate is in use, and
// whether anything gets around it. It sends little: a few packets to the gate, to
// the resolvers of the machine, and to addresses beyond the gate that nothing here
// should reach.
package doctor

import (
	"context"
	"crypto/x509"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Status is the outcome of a check.
type Status string

// The outcomes.
const (
	OK      Status = "ok"
	Problem Status = "problem" // something to fix
	Skipped Status = "skipped" // not looked at, and why
)

// A Result is one thing that was looked at.
type Result struct {
	Check  string `json:"check"` // what it is about, a closed set: environment, proxy, allowed, denied, tls, clock, resolver, direct, cloud
	Status Status `json:"status"`
	What   string `json:"what"`          // what was found
	Fix    string `json:"fix,omitempty"` // what to do about a problem
}

// Config says what to look at. Zero fields are not looked at, but for the timeout.
type Config struct {
	Env       []string // as os.Environ
	Proxy     string   // URL of the proxy; "": what Env says
	Roots     *x509.CertPool
	Allowed   string           // name:port that the policy allows
	Denied    string           // name that it does not
	Health    string           // dns.health_name of the gate
	Metadata  bool             // programs may ask a cloud's metadata service past the gate
	Resolvers []netip.AddrPort // of this machine
	Direct    []netip.Addr     // addresses beyond the gate that answer on 443, 53 and 853
	Cloud     []netip.Addr     // resolvers that a cloud gives to its machines

	Timeout time.Duration      // of one probe; 0: 3 s
	Now     func() time.Time   // nil: time.Now
	Exists  func(string) error // whether a file can be read; nil: every one can
}

const (
	defaultTimeout = 3 * time.Second

	// maxTargets bounds each list of a Config: what is more is not looked at.
	maxTargets = 16
)

// A job is something to look at on its own.
type job func(context.Context, *Config) []Result

// Run looks at everything at the same time, and returns what it found in a fixed
// order. It ends within twice the timeout or so: no probe has more than two steps
// that wait for anybody.
func Run(ctx context.Context, c Config) []Result {
	if c.Timeout <= 0 {
		c.Timeout = defaultTimeout
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Exists == nil {
		c.Exists = func(string) error { return nil }
	}
	proxy, results := c.environment()
	jobs := c.gate(proxy)
	jobs = append(jobs, c.resolvers()...)
	jobs = append(jobs, c.direct()...)
	found := make([][]Result, len(jobs))
	var wg sync.WaitGroup
	for i, j := range jobs {
		wg.Go(func() { found[i] = c.run(ctx, j) })
	}
	wg.Wait()
	return append(results, slices.Concat(found...)...)
}

// run runs one job within the bound.
func (c *Config) run(ctx context.Context, j job) []Result {
	ctx, cancel := context.WithTimeout(ctx, 2*c.Timeout)
	defer cancel()
	return j(ctx, c)
}

// Problems returns how many of the results are problems.
func Problems(results []Result) (n int) {
	for _, r := range results {
		if r.Status == Problem {
			n++
		}
	}
	return n
}

func ok(check, what string) Result           { return Result{check, OK, what, ""} }
func skipped(check, what string) Result      { return Result{check, Skipped, what, ""} }
func problem(check, what, fix string) Result { return Result{check, Problem, what, fix} }
