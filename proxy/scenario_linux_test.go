package proxy

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"sallyport/policy/event"
)

// A scenario is one client's connection and what becomes of it, made from a seed.
// Each step is over before the next begins: both sides have seen what it leads to.
type scenario struct {
	t   *testing.T
	r   *rand.Rand
	g   *gate
	o   *origin
	log strings.Builder // what client and origin saw

	text   string // of the policy
	client *client
	far    *net.TCPConn
}

// seen records what a step led to.
func (s *scenario) seen(format string, a ...any) { fmt.Fprintf(&s.log, format+"\n", a...) }

// pieces sends b in up to four parts.
func (s *scenario) pieces(c net.Conn, b []byte) {
	for n := s.r.IntN(4); n > 0 && len(b) > 1; n-- {
		i := 1 + s.r.IntN(len(b)-1)
		c.Write(b[:i])
		b = b[i:]
	}
	c.Write(b)
}

// TestSameWithoutLanes: whatever client and origin do, they and the log see the same
// with lanes and without.
func TestSameWithoutLanes(t *testing.T) {
	seeds := uint64(120)
	if testing.Short() {
		seeds = 30
	}
	o := listen(t, "127.0.0.1:0")
	text := policyFor("", o.port()) + fmt.Sprintf("      - {id: any, names: [.any.test], ports: [%d], private_destinations: [127.0.0.0/8], protocol: tcp}\n", o.port())
	with, without := startGate(t, text, true), startGate(t, text, false)
	for seed := range seeds {
		var logs [2]string
		for i, g := range []*gate{with, without} {
			s := &scenario{t: t, r: rand.New(rand.NewPCG(seed, 1)), g: g, o: o, text: text}
			s.run()
			logs[i] = s.log.String()
		}
		if logs[0] != logs[1] {
			t.Errorf("seed %d, in a lane:\n%swithout:\n%s", seed, logs[0], logs[1])
		}
		if t.Failed() {
			return
		}
	}
	for _, g := range []*gate{with, without} {
		g.quiet()
		if st := g.srv.Stats(); st.Panics != 0 {
			t.Errorf("%+v", st)
		}
	}
}

func (s *scenario) run() {
	name := []string{"www.ok.test", "www.ok.test", "www.any.test", "www.any.test", "www.no.test"}[s.r.IntN(5)]
	s.g.resolver.set(name, "127.0.0.1")
	s.client = s.g.dial()
	defer s.client.Close()
	head := fmt.Appendf(nil, "CONNECT %s:%d HTTP/1.1\r\nHost: %[1]s\r\nUser-Agent: scenario/%d\r\n\r\n", name, s.o.port(), s.r.IntN(10))
	early := s.r.IntN(6) == 0
	switch s.r.IntN(12) {
	case 0:
		head = head[:s.r.IntN(len(head))]
		s.pieces(s.client, head)
		s.client.CloseWrite()
		s.answer()
		if len(head) > 0 {
			s.event()
		}
		return
	case 1:
		head = bytes.Replace(head, []byte("Host:"), []byte("Host :"), 1)
	case 2:
		head = bytes.Replace(head, []byte("User-Agent:"), []byte("Via: 1.1 "+pseudonym+"\r\nUser-Agent:"), 1)
	}
	first := hello(name)
	switch s.r.IntN(8) {
	case 0:
		first = hello("other.ok.test")
	case 1:
		first = []byte("SSH-2.0-test\r\n")
	case 2:
		first[9] ^= 0xff
	case 3:
		first = append(first, make([]byte, s.r.IntN(100<<10))...)
	}
	if early {
		head = append(head, first...)
	}
	s.pieces(s.client, head)
	if !s.answer() {
		s.event()
		return
	}
	s.far = s.o.accept(s.t).(*net.TCPConn)
	defer s.far.Close()
	leave := !early && s.r.IntN(8) == 0
	if leave { // without a word, or in the middle
		first = first[:s.r.IntN(len(first))]
	}
	if !early {
		s.pieces(s.client, first)
	}
	if leave {
		s.client.CloseWrite()
	}
	got := make([]byte, len(first))
	n, err := io.ReadFull(s.far, got)
	s.seen("origin: %d of the first bytes, as sent %v, %v", n, bytes.Equal(got[:n], first[:n]), kind(err))
	if err == nil && !leave {
		s.talk()
	}
	s.client.Close()
	s.far.Close()
	s.event()
}

// answer reads the answer to the CONNECT, and reports whether there is a tunnel.
func (s *scenario) answer() bool {
	line, err := s.client.ReadString('\n')
	s.seen("client: %q, %v", line, kind(err))
	for err == nil && line != "\r\n" {
		line, err = s.client.ReadString('\n')
		if strings.HasPrefix(line, "X-Sallyport-Reason") || strings.HasPrefix(line, "Proxy-Status") {
			s.seen("client: %q", line)
		}
	}
	return err == nil && strings.Contains(s.log.String(), " 200 ")
}

// talk has both sides say things in turn, and end.
func (s *scenario) talk() {
	ends := [2]*net.TCPConn{s.client.TCPConn, s.far}
	var ended [2]bool
	for range 1 + s.r.IntN(8) {
		from := s.r.IntN(2)
		to := 1 - from
		switch what := s.r.IntN(10); {
		case what < 7 && !ended[from]:
			s.say(ends[from], ends[to], from)
		case what == 7 && !ended[from]:
			ended[from] = true
			ends[from].CloseWrite()
			n, err := ends[to].Read(make([]byte, 1))
			s.seen("%d hears the end: %d, %v", to, n, kind(err))
		case what == 8:
			ends[from].SetLinger(0)
			ends[from].Close()
			s.seen("%d resets", from)
			return
		case what == 9 && s.r.IntN(3) == 0:
			s.revoke(ends, ended)
			return
		}
		if ended[0] && ended[1] {
			return
		}
	}
	for i, e := range ends { // in good order
		if !ended[i] {
			e.CloseWrite()
			n, err := ends[1-i].Read(make([]byte, 1))
			s.seen("%d hears the end: %d, %v", 1-i, n, kind(err))
		}
	}
}

// say sends some bytes and waits until they have arrived.
func (s *scenario) say(from, to *net.TCPConn, who int) {
	b := make([]byte, 1+s.r.IntN(1<<s.r.IntN(20)))
	for i := range b {
		b[i] = byte(s.r.Uint32())
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		from.Write(b)
	}()
	got := make([]byte, len(b))
	n, err := io.ReadFull(to, got)
	<-done
	s.seen("%d said %d bytes: %d arrived, as sent %v, %v", who, len(b), n, bytes.Equal(got, b), kind(err))
}

// revoke has the policy change under the tunnel, and back.
func (s *scenario) revoke(ends [2]*net.TCPConn, ended [2]bool) {
	s.g.store.Swap(compile(s.t, s.text+"    deny: [.test]\n"))
	for i, e := range ends {
		if !ended[1-i] {
			n, err := e.Read(make([]byte, 1))
			s.seen("%d hears of the policy: %d, %v", i, n, kind(err))
		}
	}
	s.g.store.Swap(compile(s.t, s.text))
}

// kind names an error without addresses and system calls.
func kind(err error) string {
	switch {
	case err == nil:
		return "ok"
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return "the end"
	case isTimeout(err):
		return "time-out"
	}
	return "broken"
}

// event records what the log says of the connection.
func (s *scenario) event() {
	port := s.client.LocalAddr().(*net.TCPAddr).Port
	ev := s.g.event(func(*event.Event) bool { return true })
	if int(ev.Source.Port()) != port {
		s.t.Errorf("the event of another connection: %+v", ev)
	}
	what, _, _ := strings.Cut(ev.Error, ":")
	if ev.Error != "" && ev.Duration > time.Hour {
		s.t.Error(ev.Duration)
	}
	s.seen("event: %v %s %s:%d %q %q %v %x %v %v %d, up %d, down %d, to %v, %v, error %q", ev.Kind, ev.Method, ev.Name, ev.Port, ev.UserAgent, ev.SNI, ev.ALPN,
		ev.TLSVersion, ev.Protocol, decided(&ev), ev.Status, ev.BytesUp, ev.BytesDown, ev.Destination, ev.JA4, what)
}

func decided(ev *event.Event) string {
	d := &ev.Decision
	return fmt.Sprint(d.Verdict, d.Reason, d.Rule, d.Group, d.Mode)
}
