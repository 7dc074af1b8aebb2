package discovery

import (
	"hash/maphash"
	"math/bits"
	"strings"
	"sync"
	"sync/atomic"

	"sallyport/policy"
	"sallyport/policy/event"
)

// The classes of entries, each with a share of the bound that others cannot take.
const (
	classDeny = iota
	classAllow
	classObserve
	classes
)

// shares are the parts of the bound, in fifths, that a class keeps while others want
// more. What a class does not use, others may.
var shares = [classes]int{classDeny: 1, classAllow: 2, classObserve: 2}

const (
	maxShards  = 64
	minEntries = 256 // of a shard: with fewer, luck would decide who is evicted
	candidates = 8   // looked at for one that is evicted
)

// identity is what tells entries apart.
type identity struct {
	group, rule string
	name        []byte
	port, qtype uint16
	protocol    protocol
	verdict     policy.Verdict
	reason      policy.Reason
}

func (i *identity) key() useKey {
	return useKey{i.group, i.rule, i.reason == policy.ReasonExplicitDeny}
}

// protocol is a Protocol as a number.
type protocol uint8

const (
	protocolUnknown protocol = iota
	protocolTLS
	protocolHTTP
	protocolTCP
	protocolDNS
	protocols
)

var protocolNames = [protocols]Protocol{Unknown, TLS, HTTP, TCP, DNS}

// usage is traffic of some time.
type usage struct{ count, up, down uint64 }

func (u *usage) add(v usage) {
	u.count += v.count
	u.up += v.up
	u.down += v.down
}

// A dayUsage is the traffic of a day.
type dayUsage struct {
	usage
	day uint16
}

// An entry is what is remembered of a Pair. The lock of its shard guards it. There may be
// hundreds of thousands: it takes three cache lines, of which an event touches each once.
type entry struct {
	next        *entry // with the same hash
	name        string
	rule        *use // group and rule, and the rule's use
	first, last uint32
	day         uint16 // of today
	port, qtype uint16
	protocol    protocol
	verdict     policy.Verdict
	reason      policy.Reason
	listeners   uint8     // a set
	dirty       bool      // something has changed since it was written
	gone        bool      // evicted
	place       uint32    // in its class
	before      *dayUsage // of the day before, until it is written; or nil

	total usage
	today usage
	hash  uint64 // of its identity
	id    uint64 // in the file; 0: it has not been written yet

	sources sources
}

func (e *entry) group() string { return e.rule.key.group }

func (e *entry) ruleID() string { return e.rule.key.rule }

func (e *entry) is(i *identity) bool {
	return e.name == string(i.name) && e.port == i.port && e.qtype == i.qtype && e.protocol == i.protocol &&
		e.verdict == i.verdict && e.reason == i.reason && e.group() == i.group && e.ruleID() == i.rule
}

// class returns where e counts.
func (e *entry) class() int { return min(int(e.verdict), classes-1) }

// hit counts traffic from an address with hash source.
func (e *entry) hit(at uint32, u usage, source uint64, listener uint8) {
	day := uint16(at / secondsADay)
	switch {
	case day > e.day:
		if e.today.count > 0 {
			e.before = &dayUsage{e.today, e.day}
		}
		e.day, e.today = day, usage{}
	case day < e.day:
		day = e.day // ends that came out of order around midnight
	}
	e.total.add(u)
	e.today.add(u)
	if source != 0 {
		e.sources.add(source, day)
	}
	e.last = max(e.last, at)
	e.listeners |= listener
	e.dirty = true
}

// worth orders entries for eviction: how often it was seen, halved for every day since.
func (e *entry) worth(now uint32) uint64 {
	if now <= e.last {
		return e.total.count
	}
	return e.total.count >> min((now-e.last)/secondsADay, 63)
}

// A shard is a part of the table.
type shard struct {
	mu      sync.Mutex // guards the rest; held for some hundred nanoseconds
	index   map[uint64]*entry
	byClass [classes][]*entry
	random  uint64
	removed []removal // rows of the file that have lost their entry

	_ [64]byte // what others write often is not in the same cache line
}

// A removal is an entry to remove from the file.
type removal struct {
	id   uint64
	days [2]uint16 // on which it may have rows; 0: none
}

// A table holds entries.
type table struct {
	seed   maphash.Seed
	shards []shard
	room   int          // entries of a shard
	keep   [classes]int // of these, the share of each class
	uses   uses

	evicted, evictedHits atomic.Uint64
}

func newTable(entries int) *table {
	n := 1
	for n < maxShards && entries/(2*n) >= minEntries {
		n *= 2
	}
	t := &table{seed: maphash.MakeSeed(), shards: make([]shard, n), room: max(entries/n, classes)}
	for c, fifths := range shares {
		t.keep[c] = max(t.room*fifths/5, 1)
	}
	for i := range t.shards {
		t.shards[i].index = map[uint64]*entry{}
		t.shards[i].random = maphash.Bytes(t.seed, []byte{byte(i)}) | 1
	}
	t.uses = uses{known: map[useKey]*use{}, room: entries}
	return t
}

// find returns where i is, or would be.
func (t *table) find(i *identity) (*shard, uint64) {
	h := maphash.Bytes(t.seed, i.name)
	h = mix(h, uint64(i.port)<<40|uint64(i.qtype)<<24|uint64(i.protocol)<<16|uint64(i.verdict)<<8|uint64(i.reason))
	h = mix(h, maphash.String(t.seed, i.group)^bits.RotateLeft64(maphash.String(t.seed, i.rule), 1))
	return &t.shards[h%uint64(len(t.shards))], h
}

// get returns the entry of i in sh, or makes it. The caller holds sh.mu.
func (t *table) get(sh *shard, h uint64, i *identity, at uint32) *entry {
	for e := sh.index[h]; e != nil; e = e.next {
		if e.is(i) {
			return e
		}
	}
	e := &entry{
		name: string(i.name), rule: t.uses.get(i.key()), hash: h, first: at, last: at, day: uint16(at / secondsADay),
		port: i.port, qtype: i.qtype, protocol: i.protocol, verdict: i.verdict, reason: i.reason,
	}
	if n := len(sh.byClass[classDeny]) + len(sh.byClass[classAllow]) + len(sh.byClass[classObserve]); n >= t.room {
		t.evict(sh, e.class(), at)
	}
	sh.insert(e)
	return e
}

// insert adds e.
func (sh *shard) insert(e *entry) {
	c := e.class()
	e.next = sh.index[e.hash]
	sh.index[e.hash] = e
	e.place = uint32(len(sh.byClass[c]))
	sh.byClass[c] = append(sh.byClass[c], e)
}

// evict forgets an entry of the class that is furthest above its share, once another one
// of class comes: of a few, that which is worth least.
func (t *table) evict(sh *shard, class int, now uint32) {
	victims, most := class, -t.room
	for c := range classes {
		over := len(sh.byClass[c]) - t.keep[c]
		if c == class {
			over++
		}
		if over > most && len(sh.byClass[c]) > 0 {
			victims, most = c, over
		}
	}
	all := sh.byClass[victims]
	var worst *entry
	for range min(candidates, len(all)) {
		e := all[sh.pick(len(all))]
		if worst == nil || e.worth(now) < worst.worth(now) || e.worth(now) == worst.worth(now) && e.last < worst.last {
			worst = e
		}
	}
	t.evicted.Add(1)
	t.evictedHits.Add(worst.total.count)
	sh.remove(worst)
}

// pick returns a number below n (xorshift, Marsaglia 2003).
func (sh *shard) pick(n int) int {
	sh.random ^= sh.random << 13
	sh.random ^= sh.random >> 7
	sh.random ^= sh.random << 17
	hi, _ := bits.Mul64(sh.random, uint64(n))
	return int(hi)
}

// remove forgets e. The caller holds sh.mu.
func (sh *shard) remove(e *entry) {
	if first := sh.index[e.hash]; first == e {
		if e.next == nil {
			delete(sh.index, e.hash)
		} else {
			sh.index[e.hash] = e.next
		}
	} else {
		for first.next != e {
			first = first.next
		}
		first.next = e.next
	}
	all := sh.byClass[e.class()]
	last := all[len(all)-1]
	all[e.place], last.place = last, e.place
	all[len(all)-1] = nil
	sh.byClass[e.class()] = all[:len(all)-1]
	e.gone = true
	if e.id != 0 {
		r := removal{id: e.id, days: [2]uint16{e.day}}
		if e.before != nil {
			r.days[1] = e.before.day
		}
		sh.removed = append(sh.removed, r)
	}
}

// shardOf returns the shard of an entry.
func (t *table) shardOf(e *entry) *shard { return &t.shards[e.hash%uint64(len(t.shards))] }

// each calls f with every entry under its lock, which is given up every few entries. An
// entry that comes or goes meanwhile may be missed, and one may be met twice.
func (t *table) each(f func(*entry)) {
	const few = 64
	for i := range t.shards {
		sh := &t.shards[i]
		for c := range classes {
			for from, done := 0, false; !done; from += few {
				sh.mu.Lock()
				all := sh.byClass[c]
				for _, e := range all[min(from, len(all)):min(from+few, len(all))] {
					f(e)
				}
				done = from+few >= len(all)
				sh.mu.Unlock()
			}
		}
	}
}

// size returns the number of entries.
func (t *table) size() (n int) {
	for i := range t.shards {
		sh := &t.shards[i]
		sh.mu.Lock()
		for _, all := range sh.byClass {
			n += len(all)
		}
		sh.mu.Unlock()
	}
	return n
}

// A use counts the hits of a rule.
type use struct {
	key   useKey
	hits  atomic.Uint64
	last  atomic.Uint32
	dirty atomic.Bool
	lost  bool // there was no room for it: it stands for a key only
}

func (u *use) hit(at uint32) {
	u.hits.Add(1)
	if u.last.Load() < at {
		u.last.Store(at)
	}
	if !u.dirty.Load() {
		u.dirty.Store(true)
	}
}

// A useKey names a rule. Its strings are plain ones: a unique.Handle cannot be made while
// a collection is marking, and those who answer queries would wait for the end of that.
type useKey struct {
	group, rule string // rule may be "", of what no rule decided
	deny        bool
}

// uses holds the use of each rule.
type uses struct {
	mu    sync.Mutex // guards known
	known map[useKey]*use
	room  int
	lost  atomic.Uint64 // hits
}

// get returns the use of k, which it does not keep: its strings may be part of a policy.
func (us *uses) get(k useKey) *use {
	us.mu.Lock()
	defer us.mu.Unlock()
	u := us.known[k]
	if u == nil {
		kept := useKey{strings.Clone(k.group), strings.Clone(k.rule), k.deny}
		u = &use{key: kept, lost: len(us.known) >= us.room}
		if !u.lost {
			us.known[kept] = u
		}
	}
	return u
}

// used reports whether the rule that a decision names has matched, rather than come
// closest. What the caller of Decide refused afterwards had matched before, unless the
// group observes: then it need not have.
func used(d *policy.Decision) bool {
	switch d.Reason {
	case policy.ReasonMatched, policy.ReasonExplicitDeny:
		return true
	case policy.ReasonHelloMalformed, policy.ReasonHelloTooLarge, policy.ReasonHelloTimeout, policy.ReasonHostMismatch,
		policy.ReasonBadRequest, policy.ReasonLoop, policy.ReasonLimitExceeded, policy.ReasonResolveFailed, policy.ReasonConnectFailed:
		return d.Mode == policy.ModeEnforce
	}
	return false
}

// spoken returns what ev says was spoken.
func spoken(ev *event.Event) protocol {
	switch ev.Kind {
	case event.DNS:
		return protocolDNS
	case event.HTTP:
		return protocolHTTP
	case event.TLS:
		return protocolTLS
	case event.TCP:
		return protocolTCP
	}
	switch ev.Protocol {
	case policy.ProtocolTLS:
		return protocolTLS
	case policy.ProtocolHTTP:
		return protocolHTTP
	case policy.ProtocolTCP:
		if ev.BytesUp+ev.BytesDown > 0 || ev.Decision.Verdict == policy.Deny { // else nobody said anything
			return protocolTCP
		}
	}
	return protocolUnknown
}

// listeners are the doors, each a bit of entry.listeners.
var listenerNames = [...]string{"dns", "dns_https", "dns_tls", "proxy", "proxy_tls", "transparent"} // sorted

// listenerSets has for each set the names in it.
var listenerSets = func() (sets [1 << len(listenerNames)][]string) {
	for set := range sets {
		sets[set] = []string{}
		for i, name := range listenerNames {
			if set>>i&1 == 1 {
				sets[set] = append(sets[set], name)
			}
		}
	}
	return sets
}()

func listenerBit(s string) uint8 {
	for i, name := range listenerNames {
		if name == s {
			return 1 << i
		}
	}
	return 0
}
