package discovery

import (
	"math"
	"math/bits"
	"net/netip"
	"time"
)

// sources counts distinct client addresses. Up to MaxExactSources it knows each of them
// by 47 bits of a hash, with the day it was last seen on; a word that is 0 is free, and
// those after it. Beyond, which the highest bit of all tells, the same memory is the
// registers of a HyperLogLog (Flajolet and others, 2007), a byte each, whose standard
// error is 1.04/√64, 13 %.
type sources [MaxExactSources]uint64

const (
	registers = MaxExactSources * 8
	dayBits   = 16
	dayMask   = 1<<dayBits - 1
	isGuess   = 1 << 63
)

// sourceHash mixes an address. It is the same in every process, for it is kept; who
// chooses addresses that collide is counted as one, which is of no use to him.
func sourceHash(a netip.Addr) uint64 {
	b := a.As16()
	return mix(mix(be64(b[:8]), be64(b[8:])), 0x9e3779b97f4a7c15)&^(isGuess|dayMask) | 1<<dayBits // never 0
}

func be64(b []byte) (n uint64) {
	for _, c := range b {
		n = n<<8 | uint64(c)
	}
	return n
}

func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^0xa0761d6478bd642f, b^0xe7037ed1a0b428db)
	return hi ^ lo
}

// estimates reports whether s only knows about how many addresses there are.
func (s *sources) estimates() bool { return s[0]&isGuess != 0 }

// add counts the address with hash h, seen on day.
func (s *sources) add(h uint64, day uint16) {
	if s.estimates() {
		s.register(h)
		return
	}
	for i, w := range s {
		if w == 0 || w>>dayBits == h>>dayBits {
			s[i] = h&^dayMask | max(uint64(day), w&dayMask)
			return
		}
	}
	known := *s
	*s = sources{isGuess}
	for _, k := range known {
		s.register(k)
	}
	s.register(h)
}

// register adds a hash to an estimate.
func (s *sources) register(h uint64) {
	h <<= 1 // the highest bit is not part of it
	i := h >> 58
	rank := uint64(min(bits.LeadingZeros64(h&^(dayMask<<1)<<6), 41)) + 1
	s.raise(i, rank)
}

// raise sets register i to rank if that is higher.
func (s *sources) raise(i, rank uint64) {
	shift := i % 8 * 8
	if w := &s[i/8]; *w>>shift&0x7f < rank {
		*w = *w&^(0x7f<<shift) | rank<<shift
	}
}

// merge adds what o counted.
func (s *sources) merge(o *sources) {
	if s.estimates() && !o.estimates() || !s.estimates() && o.estimates() {
		a, exact := s, *o
		if !s.estimates() {
			exact = *s
			*s = *o
		}
		for _, w := range exact {
			if w != 0 {
				a.register(w)
			}
		}
		return
	}
	if !s.estimates() {
		for _, w := range o {
			if w != 0 {
				s.add(w, uint16(w&dayMask))
			}
		}
		return
	}
	for i := range uint64(registers) {
		s.raise(i, o[i/8]>>(i%8*8)&0x7f)
	}
}

// count returns the number of addresses seen on the day since or later; if guess is
// true about how many there ever were.
func (s *sources) count(since uint16) (n int, guess bool) {
	if !s.estimates() {
		for _, w := range s {
			if w != 0 && uint16(w&dayMask) >= since {
				n++
			}
		}
		return n, false
	}
	sum, empty := 0.0, 0
	for i := range registers {
		r := s[i/8] >> (i % 8 * 8) & 0x7f
		if r == 0 {
			empty++
		}
		sum += math.Ldexp(1, -int(r))
	}
	const alpha = 0.709 // for 64 registers
	e := alpha * registers * registers / sum
	if e <= 2.5*registers && empty > 0 {
		e = registers * math.Log(float64(registers)/float64(empty))
	}
	return max(int(e+0.5), MaxExactSources+1), true
}

// dayOf returns the day (UTC) that t lies in, counted from 1970.
func dayOf(t time.Time) uint16 {
	return uint16(min(max(t.Unix()/secondsADay, 0), math.MaxUint16))
}

// dateOf returns the beginning of day.
func dateOf(day uint16) time.Time { return time.Unix(int64(day)*secondsADay, 0).UTC() }

const secondsADay = 24 * 60 * 60
