package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/policy/event"
)

// cannedOrigin answers every request with 1 KiB, as cheaply as can be.
func cannedOrigin(b *testing.B) (port int) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 1024\r\n\r\n" + string(make([]byte, 1024)))
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				br := bufio.NewReader(c)
				for {
					line, err := br.ReadSlice('\n')
					if err != nil {
						return
					}
					if len(line) == 2 {
						if _, err := c.Write(answer); err != nil {
							return
						}
					}
				}
			})
		}
	})
	b.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).Port
}

// BenchmarkHTTP is plain HTTP on 32 connections that are kept alive: GET, 1 KiB.
func BenchmarkHTTP(b *testing.B) {
	const clients = 32
	port := cannedOrigin(b)
	g := start(b, policyFor("", port), func(c *Config) { c.Observer = event.Observers(nil) })
	g.resolver.set("api.ok.test", "127.0.0.1")
	request := fmt.Appendf(nil, "GET http://api.ok.test:%d/x HTTP/1.1\r\nHost: api.ok.test:%[1]d\r\nUser-Agent: bench/1\r\nAccept: */*\r\n\r\n", port)
	conns := make([]*client, clients)
	for i := range conns {
		conns[i] = g.dial()
		conns[i].SetDeadline(time.Time{}) // a benchmark takes as long as it takes
	}
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ReportAllocs()
	b.ResetTimer()
	cpu := cpuTime(b)
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if _, err := c.TCPConn.Write(request); err != nil {
					b.Error(err)
					return
				}
				for {
					line, err := c.Reader.ReadSlice('\n')
					if err != nil {
						b.Error(err)
						return
					}
					if len(line) == 2 {
						break
					}
				}
				if _, err := io.CopyN(io.Discard, c.Reader, 1024); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
	b.ReportMetric(float64(cpuTime(b)-cpu)/1e3/float64(b.N), "cpu-µs/req")
}

// cpuTime returns what the process has used so far, clients and origin included, in ns.
func cpuTime(b *testing.B) int64 {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return r.Utime.Nano() + r.Stime.Nano()
}
