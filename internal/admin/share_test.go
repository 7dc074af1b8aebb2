package admin

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"
)

// elsewhere is a listener whose connections come from where it is told.
type elsewhere struct {
	net.Listener
	from atomic.Pointer[net.TCPAddr] // nil: from where they do
}

type moved struct {
	net.Conn
	from net.Addr
}

func (c moved) RemoteAddr() net.Addr { return c.from }

func (l *elsewhere) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if from := l.from.Load(); err == nil && from != nil {
		return moved{c, from}, nil
	}
	return c, err
}

// A client that leaks connections takes the listener neither from others nor from who
// is on this machine.
func TestConnectionShares(t *testing.T) {
	s := New(Config{Listen: "127.0.0.1:0", Metrics: http.NotFoundHandler()})
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	at := s.Addrs()[0].String()
	l := &elsewhere{Listener: s.listener}
	s.listener = l
	done := make(chan error, 1)
	go func() { done <- s.Serve(t.Context()) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	// ask opens a connection from a source, and reports whether it is served.
	ask := func(from string) bool {
		t.Helper()
		var a *net.TCPAddr
		if from != "" {
			a = &net.TCPAddr{IP: net.ParseIP(from), Port: 1}
		}
		l.from.Store(a)
		c, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(time.Minute))
		fmt.Fprint(c, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			c.Close()
			return false
		}
		io.Copy(io.Discard, resp.Body)
		open = append(open, c)
		return resp.StatusCode == http.StatusOK
	}
	const sources = maxConnections/connectionShare - 1
	for i := range sources {
		for j := range connectionShare {
			from := fmt.Sprintf("192.0.2.%d", i)
			if i%2 == 1 {
				from = fmt.Sprintf("2001:db8:0:%d::%d", i, j) // one network
			}
			if !ask(from) {
				t.Fatalf("connection %d of source %d is refused", j, i)
			}
		}
	}
	for _, from := range []string{"192.0.2.0", "2001:db8:0:1::ffff", "192.0.2.99"} { // the last: the rest is for loopback
		if ask(from) {
			t.Errorf("%s has one too many", from)
		}
	}
	for i := range connectionShare {
		if !ask("") {
			t.Fatalf("connection %d of loopback is refused", i)
		}
	}
	if n := s.Refused()["too_many"]; n != 3 {
		t.Errorf("%d were counted", n)
	}
	open[0].Close()
	for limit := time.Now().Add(time.Minute); !ask("192.0.2.0"); { // when the server has noticed
		if time.Now().After(limit) {
			t.Fatal("a place is not given back")
		}
	}
}
