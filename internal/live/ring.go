package live

import (
	"fmt"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

const (
	// ringSlots is how many decisions are kept; a power of two. A slot takes some 700
	// bytes, once it was used.
	ringSlots = 1 << 12
	// slotText bounds the text of one decision, in bytes.
	slotText = 512
	// wakeEvery is after how many decisions a Tally is woken.
	wakeEvery = ringSlots / 4
	// patience is how often a reader tries for a slot that is being written.
	patience = 64

	maxID     = 64
	maxGroup  = 64 // as the policy bounds it
	maxName   = 256
	maxRule   = 128
	maxShort  = 32
	maxUser   = 64
	maxReport = 200 // of an error
)

// The texts of a slot, in their order.
const (
	textID = iota
	textGroup
	textName
	textRule
	textPolicy
	textUser
	textMethod
	textSNI
	textError
	texts
)

// A Ring keeps the newest decisions. It is an [event.Observer] that neither blocks
// nor allocates; readers poll it, so that they cost it nothing either.
type Ring struct {
	began time.Time
	wake  chan struct{} // every wakeEvery decisions; holds one
	next  atomic.Uint64 // number of the newest decision, from 1
	slots [ringSlots]slot
}

// A slot holds one decision. Whoever has set busy owns the rest.
type slot struct {
	busy         atomic.Bool
	seq          uint64
	time         time.Time
	kind         event.Kind
	listener     string // a constant, as are the next two
	qtype, rcode string
	source, dst  netip.AddrPort
	verdict      policy.Verdict
	mode         policy.Mode
	reason       policy.Reason
	port         uint16
	status       int
	up, down     int64
	duration     time.Duration
	ends         [texts]uint16 // of the texts in text
	text         [slotText]byte
}

var _ event.Observer = (*Ring)(nil)

// NewRing returns an empty Ring.
func NewRing() *Ring { return &Ring{began: time.Now(), wake: make(chan struct{}, 1)} }

// Observe implements event.Observer. Of two that meet at one slot, which takes a
// whole round of the ring, the later one is not kept. A Config event is none here.
func (r *Ring) Observe(ev *event.Event) {
	if ev.Kind == event.Config {
		return
	}
	seq := r.next.Add(1)
	if s := &r.slots[seq%ringSlots]; s.busy.CompareAndSwap(false, true) {
		if s.seq < seq {
			s.seq = seq
			s.set(ev)
		}
		s.busy.Store(false)
	}
	if seq%wakeEvery == 0 {
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
}

// set copies ev.
func (s *slot) set(ev *event.Event) {
	d := &ev.Decision
	s.time, s.kind, s.listener, s.qtype, s.rcode = ev.Time, ev.Kind, ev.Listener, ev.QType, ev.RCode
	s.source, s.dst = ev.Source, ev.Destination
	s.verdict, s.mode, s.reason = d.Verdict, d.Mode, d.Reason
	s.port, s.status, s.up, s.down, s.duration = ev.Port, ev.Status, ev.BytesUp, ev.BytesDown, ev.Duration
	s.put(textID, 0, ev.ID, maxID)
	s.put(textGroup, s.ends[textID], d.Group, maxGroup)
	s.put(textName, s.ends[textGroup], ev.Name, maxName)
	s.put(textRule, s.ends[textName], d.Rule, maxRule)
	s.put(textPolicy, s.ends[textRule], d.Revision, maxShort)
	s.put(textUser, s.ends[textPolicy], ev.User, maxUser)
	s.put(textMethod, s.ends[textUser], ev.Method, maxShort)
	s.put(textSNI, s.ends[textMethod], ev.SNI, maxName)
	s.put(textError, s.ends[textSNI], ev.Error, maxReport)
}

// ellipsis stands for what was cut off.
const ellipsis = "…"

// put copies at most limit bytes of a text to where it begins.
func (s *slot) put(which int, begin uint16, text string, limit int) {
	n := copy(s.text[begin:min(int(begin)+limit, slotText)], text)
	if n < len(text) && n >= len(ellipsis) {
		copy(s.text[int(begin)+n-len(ellipsis):], ellipsis)
	}
	s.ends[which] = begin + uint16(n)
}

// bytes returns a text, which is the slot's.
func (s *slot) bytes(which int) []byte {
	begin := uint16(0)
	if which > 0 {
		begin = s.ends[which-1]
	}
	return s.text[begin:s.ends[which]]
}

// take makes s the reader's, unless somebody writes it for long.
func (s *slot) take() bool {
	for range patience {
		if s.busy.CompareAndSwap(false, true) {
			return true
		}
		runtime.Gosched()
	}
	return false
}

func (s *slot) release() { s.busy.Store(false) }

// matches is Filter.Match.
func (s *slot) matches(f *Filter) bool {
	return (f.Group == "" || f.Group == string(s.bytes(textGroup))) &&
		(f.Verdict == "" || f.Verdict == s.verdict.String()) &&
		(f.Reason == "" || f.Reason == s.reason.String()) &&
		(f.Listener == "" || f.Listener == s.listener) &&
		(f.Name == "" || containsFold(s.bytes(textName), f.Name))
}

// containsFold reports whether part is in text, whatever the case of ASCII letters.
func containsFold(text []byte, part string) bool {
	for i := 0; i+len(part) <= len(text); i++ {
		n := 0
		for n < len(part) && lower(text[i+n]) == lower(part[n]) {
			n++
		}
		if n == len(part) {
			return true
		}
	}
	return false
}

func lower(b byte) byte {
	if 'A' <= b && b <= 'Z' {
		b += 'a' - 'A'
	}
	return b
}

// decision returns a copy.
func (s *slot) decision() Decision {
	text := func(which int) string { return strings.ToValidUTF8(string(s.bytes(which)), "\ufffd") }
	d := Decision{
		Seq: s.seq, Time: s.time.UTC(), Event: string(s.kind), ID: text(textID),
		Group: text(textGroup), User: text(textUser), Mode: s.mode.String(), Listener: s.listener,
		Method: text(textMethod), Name: text(textName), Port: s.port, SNI: text(textSNI),
		QType: s.qtype, RCode: s.rcode, Verdict: s.verdict.String(), Reason: s.reason.String(),
		Rule: text(textRule), Policy: text(textPolicy), Status: s.status, BytesUp: s.up, BytesDown: s.down,
		DurationMS: float64(s.duration.Microseconds()) / 1000, Error: text(textError),
	}
	if s.source.IsValid() {
		d.Src, d.SrcPort = s.source.Addr().String(), s.source.Port()
	}
	if s.dst.IsValid() {
		d.Dst = s.dst.Addr().String()
	}
	return d
}

// Recent returns the newest decisions that f takes, newest first, limit at most.
func (r *Ring) Recent(f Filter, limit int) []Decision {
	found := []Decision{}
	newest := r.next.Load()
	for i := uint64(0); i < min(newest, ringSlots) && len(found) < limit; i++ {
		s := &r.slots[(newest-i)%ringSlots]
		if !s.take() {
			continue
		}
		if s.seq == newest-i && s.matches(&f) {
			found = append(found, s.decision())
		}
		s.release()
	}
	return found
}

// A Cursor reads decisions in their order. It is for one goroutine, and holds nothing
// of the ring: what it is too slow for is lost to it, and counted.
type Cursor struct {
	r     *Ring
	at    uint64 // the last one read
	stuck uint64 // was not there when it was looked for last
	lost  uint64
}

// Follow returns a Cursor that begins after the newest decision or, if resume is the
// ID of a Cursor of the same Ring, where that was.
func (r *Ring) Follow(resume string) *Cursor {
	c := &Cursor{r: r, at: r.next.Load()}
	epoch, at, _ := strings.Cut(resume, "-")
	if n, err := strconv.ParseUint(at, 10, 64); err == nil && epoch == r.epoch() && n <= c.at {
		c.at = n
	}
	return c
}

// epoch tells Rings of different processes apart.
func (r *Ring) epoch() string { return strconv.FormatInt(r.began.UnixNano(), 36) }

// ID says where c is.
func (c *Cursor) ID() string { return fmt.Sprintf("%s-%d", c.r.epoch(), c.at) }

// Lost returns how many decisions c was too slow for, whether or not it would have
// wanted them.
func (c *Cursor) Lost() uint64 { return c.lost }

// Next returns the next decision that f takes, or false if there is none yet.
func (c *Cursor) Next(f *Filter) (d Decision, ok bool) {
	c.scan(ringSlots, func(s *slot) bool {
		if ok = s.matches(f); ok {
			d = s.decision()
		}
		return !ok
	})
	return d, ok
}

// scan calls f with at most limit slots in order, until f returns false, and returns
// how many it has passed. f may not keep the slot.
func (c *Cursor) scan(limit int, f func(*slot) bool) (passed int) {
	newest := c.r.next.Load()
	if newest-c.at > ringSlots {
		c.lost += newest - c.at - ringSlots
		c.at = newest - ringSlots
	}
	for c.at < newest && passed < limit {
		want := c.at + 1
		s := &c.r.slots[want%ringSlots]
		if !s.take() {
			return passed
		}
		goOn := true
		switch {
		case s.seq == want:
			goOn = f(s)
		case s.seq > want || c.stuck == want: // overwritten, or never written
			c.lost++
		default: // somebody is about to write it
			c.stuck = want
			s.release()
			return passed
		}
		s.release()
		c.at = want
		if passed++; !goOn {
			break
		}
	}
	return passed
}
