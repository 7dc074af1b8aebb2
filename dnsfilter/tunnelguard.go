package dnsfilter

import (
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/bits"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/publicsuffix"

	"sallyport/policy"
)

// A TunnelGuard says what becomes of names that look as if data were carried in them:
// a source asks for very many names below one registrable domain, and they are long and
// have no pattern. Only names that upstreams would be asked for count, each once a minute, for what
// the cache answers carries nothing out.
type TunnelGuard struct {
	Mode TunnelMode // "" is TunnelOff

	// UniqueNamesPerMinute is how many names below a domain one source may ask for before
	// they are looked at, 8 to 2000; 0 is 300. A quarter of it is enough if the names are long,
	// four times as many are too many whatever they look like.
	UniqueNamesPerMinute int

	Exempt []string // names at and below which nothing counts, such as those of a CDN
}

// TunnelMode says what becomes of what looks like a tunnel.
type TunnelMode string

// The modes of a TunnelGuard.
const (
	TunnelOff     TunnelMode = "off"     // nobody looks
	TunnelObserve TunnelMode = "observe" // it is counted and logged
	TunnelRefuse  TunnelMode = "refuse"  // the names are refused too, as long as it goes on
)

const (
	defaultUnique = 300 // names a minute
	minUnique     = 8
	maxUnique     = 2000

	trailSets   = 512  // of trailWays pairs of source and domain, about 900 bytes each
	trailWays   = 4    // pairs in a set
	trailBits   = 4096 // of the sketch that counts the names of a pair
	dataLength  = 16   // bytes below the domain, on average, of what looks like data
	longLength  = 40   // the same, of names of which fewer are enough
	dataEntropy = 3.5  // bits a byte over all names: host names and counters have less, encoded data more
	maxSaid     = 32   // lines in the log a minute
)

func (g TunnelGuard) withDefaults() TunnelGuard {
	if g.Mode == "" {
		g.Mode = TunnelOff
	}
	if g.UniqueNamesPerMinute == 0 {
		g.UniqueNamesPerMinute = defaultUnique
	}
	return g
}

// check returns every mistake in g, after withDefaults.
func (g TunnelGuard) check() error {
	var errs []error
	switch g.Mode {
	case TunnelOff, TunnelObserve, TunnelRefuse:
	default:
		errs = append(errs, fmt.Errorf("dns.tunnel_guard.mode: %q is none of off, observe, refuse", g.Mode))
	}
	if n := g.UniqueNamesPerMinute; n < minUnique || n > maxUnique {
		errs = append(errs, fmt.Errorf("dns.tunnel_guard.unique_names_per_minute: %d is not between %d and %d", n, minUnique, maxUnique))
	}
	for i, s := range g.Exempt {
		if _, err := policy.ParseName(s); err != nil {
			errs = append(errs, fmt.Errorf("dns.tunnel_guard.exempt[%d]: %w", i, err))
		}
	}
	return errors.Join(errs...)
}

// A tunnelGuard holds a TunnelGuard to the names asked for. It knows a bounded number
// of pairs of source and domain; of those in one set, the one with the fewest names makes
// room for another, so that a tunnel is not forgotten for what is beside it.
type tunnelGuard struct {
	s      *Server
	c      TunnelGuard
	exempt []string
	seed   maphash.Seed
	sets   [trailSets]trailSet

	mu     sync.Mutex // guards what follows
	minute int64      // of the lines in the log
	said   int
}

type trailSet struct {
	mu     sync.Mutex // guards trails
	trails [trailWays]*trail
}

// A trail is what one source has asked for below one domain within a minute.
type trail struct {
	source    netip.Addr
	proven    bool // it is: what others forge is in another trail
	domain    string
	minute    int64
	names     int                   // distinct, as far as the sketch tells them apart
	bytes     int                   // of them, below the domain
	letters   ['z' - '-' + 1]uint32 // how often each stands in them
	sketch    [trailBits / 64]uint64
	suspected bool // they look like a tunnel
	before    bool // those of the minute before did
}

// newTunnelGuard returns the guard of s, or nil if it has none.
func newTunnelGuard(s *Server) *tunnelGuard {
	if s.cfg.TunnelGuard.Mode == TunnelOff {
		return nil
	}
	g := &tunnelGuard{s: s, c: s.cfg.TunnelGuard, seed: maphash.MakeSeed()}
	for _, text := range g.c.Exempt {
		if n, err := policy.ParseName(text); err == nil { // New has checked them
			g.exempt = append(g.exempt, n.String())
		}
	}
	return g
}

// refuses counts name, which d allows and upstreams would be asked for, and reports
// whether it is refused.
func (g *tunnelGuard) refuses(name policy.Name, d *policy.Decision, source netip.Addr, proven bool, now time.Time) bool {
	text := name.String()
	domain := registrable(text)
	if len(domain) >= len(text) {
		return false
	}
	for _, e := range g.exempt {
		if below([]byte(text), e) {
			return false
		}
	}
	source = prefixOf(source, 32, sourceBits6)
	data := text[:len(text)-len(domain)-1]
	from := source.As16()
	h := maphash.String(g.seed, domain) ^ maphash.Bytes(g.seed, from[:])
	set := &g.sets[h%trailSets]
	set.mu.Lock()
	t := set.find(source, proven, domain)
	minute := now.Unix() / 60
	t.turn(minute)
	isNew := t.add(data, g.hash(data))
	first, names, bytes := false, 0, 0
	if isNew && !t.suspected && t.suspicious(g.c.UniqueNamesPerMinute) {
		t.suspected, first, names, bytes = true, true, t.count(), t.bytes/t.names
	}
	suspected := t.suspected || t.before
	set.mu.Unlock()
	if !suspected {
		return false
	}
	if isNew {
		g.s.counts.suspected.Add(1)
	}
	if first && g.mayLog(minute) {
		g.s.cfg.Logger.Warn().Stringer("src", source).Str("group", d.Group).Str("domain", domain).Str("rule", d.Rule).
			Int("names", names).Int("bytes", bytes).Str("mode", string(g.c.Mode)).
			Msg("a source asks for so many names below a domain that they look like a tunnel; said once a minute")
	}
	if g.c.Mode != TunnelRefuse {
		return false
	}
	g.s.counts.tunnelsRefused.Add(1)
	return true
}

func (g *tunnelGuard) hash(data string) uint64 { return maphash.String(g.seed, data) }

// mayLog reports whether there may be another line in this minute.
func (g *tunnelGuard) mayLog(minute int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.minute != minute {
		g.minute, g.said = minute, 0
	}
	g.said++
	return g.said <= maxSaid
}

// registrable returns the part of name that somebody has registered below a public
// suffix, or name if it is one.
func registrable(name string) string {
	suffix, _ := publicsuffix.PublicSuffix(name)
	if len(suffix) >= len(name) {
		return name
	}
	rest := name[:len(name)-len(suffix)-1]
	return name[strings.LastIndexByte(rest, '.')+1:]
}

// find returns the trail of a pair, or one that is made into it. The caller holds mu.
func (set *trailSet) find(source netip.Addr, proven bool, domain string) *trail {
	victim := 0
	for i, t := range set.trails {
		if t == nil {
			victim = i
			set.trails[i] = new(trail)
			break
		}
		if t.source == source && t.proven == proven && t.domain == domain {
			return t
		}
		if v := set.trails[victim]; t.minute < v.minute || t.minute == v.minute && t.names < v.names {
			victim = i
		}
	}
	t := set.trails[victim]
	*t = trail{source: source, proven: proven, domain: strings.Clone(domain)}
	return t
}

// turn begins anew if t is of another minute.
func (t *trail) turn(minute int64) {
	if t.minute != minute {
		*t = trail{source: t.source, proven: t.proven, domain: t.domain, minute: minute, before: t.suspected && minute == t.minute+1}
	}
}

// add notes a name by what stands below the domain, and its hash, and reports whether
// it is new.
func (t *trail) add(data string, h uint64) bool {
	word, bit := h%trailBits/64, uint64(1)<<(h/trailBits%64)
	if t.sketch[word]&bit != 0 {
		return false
	}
	t.sketch[word] |= bit
	t.names++
	t.bytes += len(data)
	for i := range len(data) {
		t.letters[min(max(data[i], '-'), 'z')-'-']++ // a Name has no others
	}
	return true
}

// count returns how many names there were: the sketch takes some for others (linear counting).
func (t *trail) count() int {
	set := 0
	for _, w := range t.sketch {
		set += bits.OnesCount64(w)
	}
	return int(-trailBits * math.Log(max(1-float64(set)/trailBits, 1./trailBits)))
}

// suspicious reports whether the names look like a tunnel, where limit names of the usual
// length are too many.
func (t *trail) suspicious(limit int) bool {
	if t.names < limit/4 {
		return false
	}
	n, length := t.count(), t.bytes/t.names
	return n >= 4*limit ||
		n >= limit && length >= dataLength && t.entropy() >= dataEntropy ||
		length >= longLength && t.entropy() >= dataEntropy
}

// entropy returns the bits that each byte of the names carries at most, as far as
// their frequencies tell.
func (t *trail) entropy() float64 {
	sum := 0.
	for _, n := range t.letters {
		if n > 0 {
			p := float64(n) / float64(t.bytes)
			sum -= p * math.Log2(p)
		}
	}
	return sum
}
