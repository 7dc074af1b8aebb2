package dnsfilter

import (
	"context"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/miekg/dns"
)

// starved is an upstream that no socket can be had for, until it is fed.
type starved struct {
	cannedHour
	fed atomic.Bool
}

func (s *starved) exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
	if !s.fed.Load() {
		return nil, &net.OpError{Op: "dial", Net: "udp", Err: os.NewSyscallError("socket", syscall.EMFILE)}
	}
	return s.cannedHour.exchange(ctx, q)
}

// A lack of descriptors is told to the caller, is no fault of the upstream and is
// not remembered: the next question is asked at once.
func TestALackOfDescriptorsIsNotRemembered(t *testing.T) {
	clock := newClock()
	r := newResolver(t, Config{Decider: people, Cache: Cache{Size: mib}, Upstreams: []string{"192.0.2.53"}, Now: clock.now}, nil)
	s := new(starved)
	u := &upstream{exchanger: s, text: "starved"}
	r.pool.ups.Store(&[]*upstream{u})
	if _, err := r.LookupNetIP(context.Background(), "ip4", "api.ok.test"); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("LookupNetIP without descriptors: %v, want EMFILE", err)
	}
	if !u.standing(clock.now()).penalty.IsZero() || !r.UpstreamOK() {
		t.Error("the upstream is held to have failed")
	}
	if r.Stats().UpstreamFailures == 0 {
		t.Error("no failure is counted")
	}
	s.fed.Store(true)
	if addrs, err := r.LookupNetIP(context.Background(), "ip4", "api.ok.test"); err != nil || len(addrs) != 2 {
		t.Errorf("LookupNetIP with descriptors again: %v, %v", addrs, err)
	}
}

// hungry is an upstream whose name cannot be looked up for lack of descriptors, as
// package net tells it.
type hungry struct{ cannedHour }

func (hungry) exchange(context.Context, *dns.Msg) (*dns.Msg, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{
		Err: "dial udp 192.0.2.1:53: socket: " + syscall.EMFILE.Error(), Name: "dns.test", IsTemporary: true}}
}

func TestALackOfDescriptorsForALookUpIsNobodysFault(t *testing.T) {
	clock := newClock()
	r := newResolver(t, Config{Decider: people, Upstreams: []string{"tls://dns.test"}, Now: clock.now}, nil)
	u := &upstream{exchanger: new(hungry), text: "hungry"}
	r.pool.ups.Store(&[]*upstream{u})
	for range downAfter {
		if _, err := r.LookupNetIP(context.Background(), "ip4", "api.ok.test"); err == nil {
			t.Fatal("an answer")
		}
	}
	if s := u.standing(clock.now()); s.down || !s.penalty.IsZero() || u.failed.Load() > 0 {
		t.Error("the upstream is held to have failed")
	}
	if isExhausted(&net.DNSError{Err: "no such host", IsNotFound: true}) {
		t.Error("a name that does not exist is a lack of descriptors")
	}
}
