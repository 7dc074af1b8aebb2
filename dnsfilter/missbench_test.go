package dnsfilter

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"

	"sallyport/policy"
)

// mirror answers every query over UDP with one address and next to no work, until
// the benchmark ends.
func mirror(tb testing.TB) (addr string) {
	tb.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		tb.Fatal(err)
	}
	c.SetReadBuffer(4 << 20)
	done := make(chan struct{})
	go func() {
		defer close(done)
		var p [512]byte
		for {
			n, from, err := c.ReadFromUDPAddrPort(p[:])
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(mirrored(p[:n]), from)
		}
	}()
	tb.Cleanup(func() { c.Close(); <-done })
	return c.LocalAddr().String()
}

// mirrored turns a query into an answer with one address.
func mirrored(q []byte) []byte {
	end := 12
	for q[end] != 0 {
		end += int(q[end]) + 1
	}
	end += 5
	a := append(q[:end:end], 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 5, 5, 5, 5)
	a[2] |= 0x80
	binary.BigEndian.PutUint16(a[6:], 1)
	binary.BigEndian.PutUint16(a[10:], 0)
	return a
}

// BenchmarkExchange is a question that only an upstream on loopback can answer,
// many of them at a time: the way of a miss behind the handler.
func BenchmarkExchange(b *testing.B) {
	r := newResolver(b, Config{Cache: Cache{Size: mib}, Upstreams: []string{mirror(b)}}, nil)
	var n atomic.Uint64
	b.SetParallelism(64)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			name := policy.MustName("n" + strconv.FormatUint(n.Add(1), 36) + ".allowed.test")
			rep, err := r.resolve(context.Background(), key{name: name, qtype: dns.TypeA}, nil)
			if err != nil || len(rep.answer) != 1 {
				b.Errorf("%v: %+v, %v", name, rep, err)
				return
			}
			if a, _ := addressOf(rep.answer[0]); a != netip.AddrFrom4([4]byte{5, 5, 5, 5}) {
				b.Errorf("%v is %v", name, a)
				return
			}
		}
	})
}
