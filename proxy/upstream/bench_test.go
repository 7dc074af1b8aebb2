package upstream

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"
)

// BenchmarkDial connects to one address, as nearly every connection does: without
// a race, its goroutines and its timer.
func BenchmarkDial(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Read(make([]byte, 1)) // until the reset
			c.Close()
		}
	}()
	b.Cleanup(func() { l.Close(); <-done })
	to := l.Addr().(*net.TCPAddr).AddrPort()
	for _, bb := range []struct {
		name string
		d    Dialer
	}{{"direct", Dialer{}}, {"source", Dialer{Source: Source{V4: netip.MustParseAddr("127.0.0.1")}}}} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
			defer cancel()
			for b.Loop() {
				c, err := bb.d.Dial(ctx, []netip.AddrPort{to})
				if err != nil {
					b.Fatal(err)
				}
				c.(*net.TCPConn).SetLinger(0) // leaves no port waiting
				c.Close()
			}
		})
	}
}
