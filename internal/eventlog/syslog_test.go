package eventlog

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// readFrame reads one octet-counted message (RFC 6587, section 3.4.1).
func readFrame(r *bufio.Reader) (string, error) {
	head, err := r.ReadString(' ')
	if err != nil {
		return "", err
	}
	n, err := strconv.Atoi(strings.TrimSuffix(head, " "))
	if err != nil || n > 2*maxLine {
		return "", fmt.Errorf("a frame begins with %q", head)
	}
	b := make([]byte, n)
	_, err = io.ReadFull(r, b)
	return string(b), err
}

// message is an RFC 5424 message without structured data.
var message = regexp.MustCompile(`^<([0-9]{1,3})>1 ([0-9-]{10}T[0-9:]{8}\.[0-9]{3}Z) (\S+) sallyport ([0-9]+) (\S+) - (.*)$`)

// idOf returns the id of the event in a message.
func idOf(t *testing.T, msg string) string {
	t.Helper()
	m := message.FindStringSubmatch(msg)
	if m == nil {
		t.Fatalf("no message of RFC 5424: %q", msg)
	}
	var ev struct{ ID, Message string }
	if err := json.Unmarshal([]byte(m[6]), &ev); err != nil {
		t.Fatalf("%s: %v", m[6], err)
	}
	return ev.ID + ev.Message
}

func TestSyslogMessages(t *testing.T) {
	dir := t.TempDir()
	datagram := func(network, address string) (net.Addr, func() (string, error)) {
		pc, err := net.ListenPacket(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { pc.Close() })
		return pc.LocalAddr(), func() (string, error) {
			b := make([]byte, 1<<16)
			n, _, err := pc.ReadFrom(b)
			return string(b[:n]), err
		}
	}
	stream := func(network, address string) (net.Addr, func() (string, error)) {
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		var r *bufio.Reader
		return l.Addr(), func() (string, error) {
			if r == nil {
				c, err := l.Accept()
				if err != nil {
					return "", err
				}
				t.Cleanup(func() { c.Close() })
				r = bufio.NewReader(c)
			}
			return readFrame(r)
		}
	}
	for _, tt := range []struct {
		scheme, network, address string
		listen                   func(string, string) (net.Addr, func() (string, error))
	}{
		{"syslog+udp://", "udp", "127.0.0.1:0", datagram},
		{"syslog+tcp://", "tcp", "127.0.0.1:0", stream},
		{"syslog+unix://", "unixgram", filepath.Join(dir, "gram"), datagram},
		{"syslog+unix://", "unix", filepath.Join(dir, "stream"), stream},
	} {
		t.Run(tt.network, func(t *testing.T) {
			addr, read := tt.listen(tt.network, tt.address)
			w := open(t, Options{Output: tt.scheme + addr.String(), Node: "gate-1", Facility: "local3"})
			stop := start(t, w)
			observed := tunnel()
			observed.Decision.Verdict, observed.Decision.Reason = policy.Observe, policy.ReasonNotListed
			w.Observe(tunnel())
			w.Observe(&event.Event{Time: when, Kind: event.DNS, Decision: denied, Name: strings.Repeat("\x00", 5000), Error: strings.Repeat("\x00", 5000)})
			w.Observe(observed)
			w.Observe(&event.Event{Time: when, Kind: event.Config, Name: "policy", Error: "bad"})
			log := w.Logger()
			log.Warn().Msg("odd\n")
			for _, want := range []string{
				`^<158>1 2026-03-04T04:06:07\.089Z gate-1 sallyport [0-9]+ connect - \{"time":"2026-03-04T04:06:07\.089Z","event":"connect",.*\}$`,
				`^<156>1 \S+ gate-1 sallyport [0-9]+ dns - \{.*"verdict":"deny".*\}$`,
				`^<157>1 \S+ gate-1 sallyport [0-9]+ connect - \{.*"verdict":"observe".*\}$`,
				`^<155>1 \S+ gate-1 sallyport [0-9]+ config - \{.*"ok":false.*\}$`,
				`^<156>1 \S+ gate-1 sallyport [0-9]+ message - \{"level":"warn",.*"message":"odd\\n"\}$`,
			} {
				got, err := read()
				if err != nil {
					t.Fatal(err)
				}
				if !regexp.MustCompile(want).MatchString(got) {
					t.Errorf("got %.300q, want %s", got, want)
				}
			}
			if err := stop(); err != nil || w.Dropped() != 0 {
				t.Errorf("%v, %d dropped", err, w.Dropped())
			}
		})
	}
}

// The other formats are the same lines; messages then go to standard error.
func TestSyslogSquid(t *testing.T) {
	w := open(t, Options{Output: "syslog+udp://127.0.0.1:9", Format: Squid})
	w.Observe(tunnel())
	log := w.Logger()
	log.Info().Msg("x")
	if got := string(w.events.pending); !strings.HasPrefix(got, "<30>1 2026-03-04T04:06:07.089Z - sallyport ") || !strings.Contains(got, " connect - 1772597168.324   1234 ") {
		t.Errorf("%q", got)
	}
	if got := string(w.messages.pending); !strings.HasPrefix(got, `{"level":"info"`) {
		t.Errorf("%q", got)
	}
}

func TestSyslogAddress(t *testing.T) {
	for output, want := range map[string]string{
		"syslog+udp://logs.example:514": "udp logs.example:514", "syslog+tcp://[2001:db8::1]:601": "tcp [2001:db8::1]:601", "syslog+unix:///dev/log": "unix /dev/log",
		"syslog+udp://logs.example": "", "syslog+udp://:514": "", "syslog+udp://a:0": "", "syslog+udp://a:70000": "", "syslog+tls://a:6514": "", "syslog://a:1": "", "syslog+unix://dev/log": "", "syslog+tcp://a:1/x": "",
	} {
		network, address, err := SyslogAddress(output)
		if got := strings.TrimSpace(network + " " + address); err == nil && got != want || (err != nil) != (want == "") {
			t.Errorf("SyslogAddress(%q) = %q, %v; want %q", output, got, err, want)
		}
	}
	for _, o := range []Options{{Output: "syslog+tcp://a"}, {Output: "syslog+udp://a:1", Facility: "loud"}} {
		if _, err := Open(o); err == nil {
			t.Errorf("Open(%+v) works", o)
		}
	}
}

// A receiver that accepts and never reads holds up nobody, neither does the end wait
// for it, and every line has either arrived or was counted.
func TestSyslogNeverReads(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w := open(t, Options{Output: "syslog+tcp://" + l.Addr().String()})
	stop := start(t, w)
	const n = 60000
	ev := &event.Event{Kind: event.Connect, Name: strings.Repeat("a", 500), UserAgent: strings.Repeat("b", 500)}
	began := time.Now()
	for range n {
		w.Observe(ev)
	}
	if d := time.Since(began); d > 20*time.Second {
		t.Errorf("%d events took %v", n, d)
	}
	if w.Dropped() == 0 {
		t.Error("nothing was dropped, so that there is no bound")
	}
	if got := cap(w.events.pending); got > 2*maxQueueBytes {
		t.Errorf("the queue holds %d bytes", got)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := stop(); err == nil || !strings.Contains(err.Error(), "lines lost") {
		t.Fatalf("Run = %v", err)
	}
	if got := cap(w.events.remote.kept); got > 3*maxQueueBytes {
		t.Errorf("%d bytes are kept to be sent again", got)
	}
	arrived := uint64(0)
	for r := bufio.NewReader(c); ; arrived++ {
		if _, err := readFrame(r); err != nil {
			break
		}
	}
	if arrived+w.Dropped() != n || arrived == 0 {
		t.Errorf("%d arrived and %d were dropped, of %d", arrived, w.Dropped(), n)
	}
}

// A receiver dies and comes back: what was logged meanwhile arrives, up to the bound
// of the queue; what did not fit is counted, to the line.
func TestSyslogComesBack(t *testing.T) {
	for _, meanwhile := range []int{10, maxQueueLines + 5000} {
		t.Run(fmt.Sprint(meanwhile), func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			address := l.Addr().String()
			_, stderr := pipe(t)
			w := open(t, Options{Output: "syslog+tcp://" + address, Stderr: stderr})
			stop := start(t, w)
			id := 0
			observe := func(n int) {
				for range n {
					w.Observe(&event.Event{Kind: event.Connect, ID: fmt.Sprint(id)})
					id++
				}
			}
			observe(100)
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			r := bufio.NewReader(c)
			for i := range 100 {
				msg, err := readFrame(r)
				if err != nil || idOf(t, msg) != fmt.Sprint(i) {
					t.Fatalf("%d: %q, %v", i, msg, err)
				}
			}
			l.Close()
			c.Close()
			observe(meanwhile)
			lost := w.Dropped()
			if l, err = net.Listen("tcp", address); err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if c, err = l.Accept(); err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			r = bufio.NewReader(c)
			// The queue has the first lines; then the log says what is missing, and goes on.
			arrived, told := 0, uint64(0)
			for ; arrived < meanwhile-int(lost); arrived++ {
				msg, err := readFrame(r)
				if err != nil {
					t.Fatal(err)
				}
				if got := idOf(t, msg); got != fmt.Sprint(100+arrived) {
					if n := regexp.MustCompile(`"dropped":([0-9]+)`).FindStringSubmatch(msg); n != nil {
						told, _ = strconv.ParseUint(n[1], 10, 64)
						arrived--
						continue
					}
					if lost == 0 {
						t.Fatalf("%s arrived instead of %d", got, 100+arrived)
					}
				}
			}
			observe(1)
			for last := ""; last != fmt.Sprint(id-1) || lost > 0 && told == 0; {
				msg, err := readFrame(r)
				if err != nil {
					t.Fatal(err)
				}
				if got := idOf(t, msg); got != "log lines were lost" {
					last = got
				}
				if n := regexp.MustCompile(`"dropped":([0-9]+)`).FindStringSubmatch(msg); n != nil {
					told, _ = strconv.ParseUint(n[1], 10, 64)
				}
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
			if w.Dropped() != lost || told != lost || (lost > 0) != (meanwhile > maxQueueLines) {
				t.Errorf("%d dropped while it was away, %d in the end, the log says %d", lost, w.Dropped(), told)
			}
		})
	}
}

// A connection that breaks with lines under way: those that the other side's kernel
// has not acknowledged are sent again.
func TestSyslogSentAgain(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, stderr := pipe(t)
	w := open(t, Options{Output: "syslog+tcp://" + l.Addr().String(), Stderr: stderr})
	s := w.events
	line := func(i int) []byte { return []byte(fmt.Sprintf("line %06d %s\n", i, strings.Repeat("x", 1000))) }
	var batch []byte
	const n = 3000
	for i := range n {
		batch = append(batch, line(i)...)
	}
	done := make(chan struct{})
	go func() { defer close(done); s.send(batch) }()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	first, err := readFrame(r)
	if err != nil || !strings.HasPrefix(first, "line 000000 ") {
		t.Fatalf("%q, %v", first, err)
	}
	// It breaks with more under way than fits into both kernels' buffers.
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
	if c, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r = bufio.NewReader(c)
	again, err := readFrame(r)
	if err != nil {
		t.Fatal(err)
	}
	from, err := strconv.Atoi(strings.Fields(again)[1])
	if err != nil {
		t.Fatal(err)
	}
	for i := from + 1; i < n; i++ {
		got, err := readFrame(r)
		if err != nil || got+"\n" != string(line(i)) {
			t.Fatalf("%d: %.30q, %v", i, got, err)
		}
	}
	<-done
	if from == 0 || from == n-1 {
		t.Logf("the break came at an edge: %d", from)
	}
	s.close()
	if w.Dropped() != 0 {
		t.Errorf("%d dropped", w.Dropped())
	}
}

// A receiver over UDP that is not there costs lines, never time.
func TestSyslogNobodyThere(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := pc.LocalAddr().String()
	pc.Close()
	_, stderr := pipe(t)
	w := open(t, Options{Output: "syslog+udp://" + address, Stderr: stderr})
	stop := start(t, w)
	for i := 0; w.Dropped() == 0 && i < 1e6; i++ {
		w.Observe(&event.Event{Kind: event.DNS})
	}
	if err := stop(); err != nil {
		t.Error(err)
	}

	w = open(t, Options{Output: "syslog+unix://" + filepath.Join(t.TempDir(), "none"), Stderr: stderr})
	stop = start(t, w)
	w.Observe(&event.Event{Kind: event.DNS})
	if err := stop(); err == nil || !strings.Contains(err.Error(), "1 lines lost") {
		t.Errorf("Run = %v", err)
	}
	if _, err := os.Stat(address); err == nil {
		t.Error("a file was made")
	}
}
