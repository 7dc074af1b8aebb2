package dnsfilter

import (
	"crypto/rand"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"sync/atomic"
	"time"
)

// Sizes and times of DNS cookies (RFC 7873; RFC 9018 for the server's part).
const (
	clientCookie     = 8  // bytes a client sends at first, and in front of the server's
	minServer        = 8  // bytes of any server's part
	maxServer        = 32 // the same, at most
	cookieSize       = 24 // bytes of both parts as this server makes them
	cookieOptionSize = 4 + cookieSize
	cookieVersion    = 1              // RFC 9018, section 4
	cookieMaxAge     = 3600           // seconds that one is good for (RFC 9018, section 4.3)
	cookieMaxAhead   = 300            // seconds that its time may be ahead of ours
	cookieRenew      = 1800           // seconds after which a client gets another
	secretLife       = 24 * time.Hour // then cookies are made with another; those made with the last one are good for cookieMaxAge
)

// cookies makes and knows the cookies by which clients show that they receive what is
// sent to their address: a server cookie is a SipHash of it. What follows from that is
// for others to say; nobody is refused for a bad one here.
type cookies struct{ secrets atomic.Pointer[secrets] }

// secrets are what cookies are made with, since born, and were made with before.
type secrets struct {
	current, previous [16]byte
	born              time.Time
}

// at returns the secrets as of now, new ones if they have had their time.
func (c *cookies) at(now time.Time) *secrets {
	old := c.secrets.Load()
	if old != nil && now.Sub(old.born) < secretLife {
		return old
	}
	s := &secrets{born: now}
	rand.Read(s.current[:]) // never fails
	if old != nil {
		s.previous = old.current
	} else {
		rand.Read(s.previous[:])
	}
	if !c.secrets.CompareAndSwap(old, s) {
		return c.secrets.Load()
	}
	return s
}

// validCookie reports whether got has the length of a COOKIE option (RFC 7873, section 5.2.2).
func validCookie(got []byte) bool {
	n := len(got) - clientCookie
	return n == 0 || n >= minServer && n <= maxServer
}

// proven reports whether got, the COOKIE option of a query from an address or nothing,
// proves that the client receives what is sent there: it has a server's part that this
// server made for it, not long ago. A limit of rates may spare such a client.
func (c *cookies) proven(got []byte, from netip.Addr, now time.Time) bool {
	s := c.at(now)
	_, ok := cookieAge(got, now)
	return ok && (madeWith(&s.current, got, from) || madeWith(&s.previous, got, from))
}

// cookieAge returns how old the server's part of got says it is, in seconds, and whether
// it may be one of this server's that is still good.
func cookieAge(got []byte, now time.Time) (age int32, ok bool) {
	if len(got) != cookieSize || got[clientCookie] != cookieVersion {
		return 0, false
	}
	age = int32(uint32(now.Unix()) - binary.BigEndian.Uint32(got[12:])) // RFC 1982
	return age, age <= cookieMaxAge && age >= -cookieMaxAhead
}

func madeWith(secret *[16]byte, got []byte, from netip.Addr) bool {
	head := [16]byte(got)
	return hashCookie(secret, &head, from) == binary.LittleEndian.Uint64(got[16:])
}

// answer makes of got, the valid COOKIE option of a query from an address, the one to
// answer with: got itself while it is young, otherwise another.
func (c *cookies) answer(dst *[cookieSize]byte, got []byte, from netip.Addr, now time.Time) {
	s := c.at(now)
	if age, ok := cookieAge(got, now); ok && age <= cookieRenew && madeWith(&s.current, got, from) {
		copy(dst[:], got)
		return
	}
	var head [16]byte
	copy(head[:clientCookie], got)
	head[clientCookie] = cookieVersion
	binary.BigEndian.PutUint32(head[12:], uint32(now.Unix()))
	copy(dst[:], head[:])
	binary.LittleEndian.PutUint64(dst[16:], hashCookie(&s.current, &head, from))
}

// hashCookie returns the hash of a cookie's first 16 bytes and the client's address.
func hashCookie(secret, head *[16]byte, from netip.Addr) uint64 {
	var buf [16 + 16]byte
	copy(buf[:], head[:])
	if from.Is4() {
		a := from.As4()
		return sipHash(secret, buf[:16+copy(buf[16:], a[:])])
	}
	a := from.As16()
	copy(buf[16:], a[:])
	return sipHash(secret, buf[:])
}

// sipHash is SipHash-2-4 (Aumasson and Bernstein 2012).
func sipHash(key *[16]byte, p []byte) uint64 {
	k0, k1 := binary.LittleEndian.Uint64(key[:]), binary.LittleEndian.Uint64(key[8:])
	v0, v1, v2, v3 := k0^0x736f6d6570736575, k1^0x646f72616e646f6d, k0^0x6c7967656e657261, k1^0x7465646279746573
	round := func() {
		v0 += v1
		v1 = bits.RotateLeft64(v1, 13) ^ v0
		v0 = bits.RotateLeft64(v0, 32)
		v2 += v3
		v3 = bits.RotateLeft64(v3, 16) ^ v2
		v0 += v3
		v3 = bits.RotateLeft64(v3, 21) ^ v0
		v2 += v1
		v1 = bits.RotateLeft64(v1, 17) ^ v2
		v2 = bits.RotateLeft64(v2, 32)
	}
	last := uint64(len(p)) << 56
	for ; len(p) >= 8; p = p[8:] {
		m := binary.LittleEndian.Uint64(p)
		v3 ^= m
		round()
		round()
		v0 ^= m
	}
	for i, b := range p {
		last |= uint64(b) << (8 * i)
	}
	v3 ^= last
	round()
	round()
	v0 ^= last
	v2 ^= 0xff
	for range 4 {
		round()
	}
	return v0 ^ v1 ^ v2 ^ v3
}
