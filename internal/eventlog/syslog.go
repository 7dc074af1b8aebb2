package eventlog

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"sallyport/policy"
	"sallyport/policy/event"
)

// Bounds of a syslog output.
const (
	dialTimeout  = 10 * time.Second
	stallTimeout = 30 * time.Second // a receiver that takes nothing for so long is connected to anew
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 15 * time.Second
	maxFrames    = 64 << 10 // bytes written to a stream at once
	sendBuffer   = 256 << 10
)

// Facilities are the names of syslog's facilities (RFC 5424, section 6.2.1), in order.
var Facilities = []string{
	"kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp",
	"ntp", "audit", "alert", "clock", "local0", "local1", "local2", "local3", "local4", "local5", "local6", "local7",
}

// Severities of RFC 5424, section 6.2.1, as far as they are used.
const (
	severityError   = 3
	severityWarning = 4
	severityNotice  = 5
	severityInfo    = 6
	severityDebug   = 7
)

// IsSyslog reports whether output is meant as a syslog address.
func IsSyslog(output string) bool {
	return strings.HasPrefix(output, "syslog") && strings.Contains(output, "://")
}

// SyslogAddress reads syslog+udp://host:514, syslog+tcp://host:601 or
// syslog+unix:///dev/log into a network and an address for [net.Dial].
func SyslogAddress(output string) (network, address string, err error) {
	scheme, address, _ := strings.Cut(output, "://")
	network = strings.TrimPrefix(scheme, "syslog+")
	switch network {
	case "unix":
		if !strings.HasPrefix(address, "/") {
			return "", "", errors.New("behind syslog+unix:// write the path of a socket, such as syslog+unix:///dev/log")
		}
		return network, address, nil
	case "udp", "tcp":
		host, port, err := net.SplitHostPort(address)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" || strings.ContainsAny(host, "/@ ") {
			return "", "", fmt.Errorf("behind %s:// write host:port, such as %s://logs.example:514", scheme, scheme)
		}
		return network, address, nil
	}
	return "", "", errors.New("write syslog+udp://, syslog+tcp:// or syslog+unix://")
}

// A header makes the part of a syslog message before the line itself (RFC 5424,
// section 6). Structured data there is none: the line says everything.
type header struct {
	facility int
	origin   string // HOSTNAME APP-NAME PROCID
}

func newHeader(facility, node string) (*header, error) {
	h := &header{facility: -1}
	for i, name := range Facilities {
		if name == facility || facility == "" && name == "daemon" {
			h.facility = i
		}
	}
	if h.facility < 0 {
		return nil, fmt.Errorf("log facility %q is none of %s", facility, strings.Join(Facilities, ", "))
	}
	b := appendToken(nil, node, "-", 255, &inWord)
	h.origin = " " + string(b) + " sallyport " + strconv.Itoa(os.Getpid()) + " "
	return h, nil
}

// append begins a message. id is its MSGID.
func (h *header) append(dst []byte, severity int, at time.Time, id string) []byte {
	dst = strconv.AppendInt(append(dst, '<'), int64(h.facility*8+severity), 10)
	dst = append(dst, ">1 "...)
	dst = appendTime(dst, at)
	dst = append(dst, h.origin...)
	dst = append(dst, id...)
	return append(dst, " - "...)
}

// severityOf says how much an event matters.
func severityOf(ev *event.Event) int {
	switch {
	case ev.Kind == event.Config && ev.Error != "":
		return severityError
	case ev.Kind == event.Config, ev.Decision.Verdict == policy.Observe:
		return severityNotice
	case ev.Decision.Verdict == policy.Deny:
		return severityWarning
	}
	return severityInfo
}

// severityOfLevel is that of a message.
func severityOfLevel(l zerolog.Level) int {
	switch {
	case l >= zerolog.ErrorLevel && l < zerolog.NoLevel:
		return severityError
	case l == zerolog.WarnLevel:
		return severityWarning
	case l <= zerolog.DebugLevel:
		return severityDebug
	}
	return severityInfo
}

// A remote is a syslog receiver. It connects when there is something to send, and
// again, ever more patiently, when that fails; meanwhile the sink's queue fills.
//
// Over streams lines are framed by counting octets (RFC 6587, section 3.4.1), and kept
// until the receiver's kernel has acknowledged them: what a broken connection has
// swallowed is sent again. Where the system does not say what was acknowledged (on
// other systems than Linux, and for unix streams) that counts which was sent.
type remote struct {
	network, address string
	sink             *sink
	backoff          time.Duration
	cut              chan struct{} // closed to give up

	mu   sync.Mutex // guards conn and dial, for cutOff
	conn net.Conn
	gone bool // cutOff was called

	stream bool
	kept   []byte // lines sent and not acknowledged, then lines not sent
	next   int    // in kept: where the latter begin
	base   uint64 // bytes of this connection before kept
	sent   uint64 // bytes of this connection
	frames []byte
}

func newRemote(network, address string, s *sink) *remote {
	return &remote{network: network, address: address, sink: s, cut: make(chan struct{})}
}

var errCutOff = errors.New("cut off")

// write sends a batch of lines, waiting for the receiver as long as it takes. It
// returns how many were lost, and why; only cutOff or the receiver's refusal loses any.
func (r *remote) write(batch []byte) (lost int, err error) {
	r.kept = append(r.kept, batch...)
	for {
		if err := r.connect(); err != nil {
			lost += countLines(r.kept)
			r.kept, r.next = nil, 0
			return lost, err
		}
		n, refused, err := r.flush()
		lost += n
		if err == nil {
			return lost, refused
		}
		r.sink.failed(err, 0)
		r.disconnect()
	}
}

// connect returns when there is a connection, or with errCutOff.
func (r *remote) connect() error {
	if r.conn != nil && r.stream && ended(r.conn) {
		r.disconnect()
	}
	for r.conn == nil {
		if r.backoff > 0 {
			t := time.NewTimer(r.backoff)
			select {
			case <-t.C:
			case <-r.cut:
				t.Stop()
				return errCutOff
			}
		}
		r.backoff = min(max(2*r.backoff, firstBackoff), maxBackoff)
		conn, err := r.dial()
		if err != nil {
			r.sink.failed(err, 0)
			select {
			case <-r.cut:
				return errCutOff
			default:
				continue
			}
		}
		r.mu.Lock()
		if r.gone {
			r.mu.Unlock()
			conn.Close()
			return errCutOff
		}
		r.conn = conn
		r.mu.Unlock()
		if b, ok := conn.(interface{ SetWriteBuffer(int) error }); ok {
			_ = b.SetWriteBuffer(sendBuffer)
		}
		network := conn.RemoteAddr().Network()
		r.stream = network == "tcp" || network == "unix"
		r.base, r.sent = 0, 0
	}
	return nil
}

// dial tries unix sockets of both kinds, as syslog(3) does.
func (r *remote) dial() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go cancelWhen(r.cut, stop, cancel)
	var d net.Dialer
	if r.network != "unix" {
		return d.DialContext(ctx, r.network, r.address)
	}
	conn, err := d.DialContext(ctx, "unixgram", r.address)
	if errors.Is(err, syscall.EPROTOTYPE) {
		conn, err = d.DialContext(ctx, "unix", r.address)
	}
	return conn, err
}

// cancelWhen cancels if cut comes before stop.
func cancelWhen(cut, stop <-chan struct{}, cancel context.CancelFunc) {
	select {
	case <-cut:
		cancel()
	case <-stop:
	}
}

// disconnect closes the connection. What it has not delivered is to be sent again.
func (r *remote) disconnect() {
	if r.conn == nil {
		return
	}
	if r.stream {
		r.forgetAcknowledged()
		if tcp, ok := r.conn.(*net.TCPConn); ok && len(r.kept) > 0 {
			tcp.SetLinger(0) // what the kernel still has must not arrive as well
		}
	}
	r.mu.Lock()
	r.conn.Close()
	r.conn = nil
	r.mu.Unlock()
	r.next = 0
}

// flush sends what is in kept and was not sent. err is the connection's; refused says
// why lines were lost while it goes on.
func (r *remote) flush() (lost int, refused, err error) {
	if !r.stream {
		return r.sendEach()
	}
	for r.next < len(r.kept) {
		r.frames = r.frames[:0]
		from := r.next
		for r.next < len(r.kept) && len(r.frames) < maxFrames {
			line := r.kept[r.next:]
			line = line[:lineEnd(line)-1]
			r.frames = strconv.AppendInt(r.frames, int64(len(line)), 10)
			r.frames = append(append(r.frames, ' '), line...)
			r.next += len(line) + 1
		}
		r.conn.SetWriteDeadline(time.Now().Add(stallTimeout))
		if r.isCut() {
			return 0, nil, errCutOff // the deadline just set would have undone cutOff's
		}
		n, err := r.conn.Write(r.frames)
		r.sent += uint64(n)
		if err != nil {
			r.next = from
			return 0, nil, err
		}
		r.backoff = 0
	}
	r.forgetAcknowledged()
	if cap(r.kept) > keepBytes && len(r.kept) < keepBytes/4 {
		r.kept = append([]byte(nil), r.kept...)
	}
	return 0, nil, nil
}

// sendEach sends each line in a datagram of its own.
func (r *remote) sendEach() (lost int, refused, err error) {
	defer func() {
		if r.kept = append(r.kept[:0], r.kept[r.next:]...); cap(r.kept) > keepBytes && len(r.kept) == 0 {
			r.kept = nil
		}
		r.next = 0
	}()
	again := false
	for r.next < len(r.kept) {
		line := r.kept[r.next:]
		end := lineEnd(line)
		_, err := r.conn.Write(line[:end-1])
		switch {
		case err == nil:
			r.backoff = 0
		case r.network == "udp" && errors.Is(err, syscall.ECONNREFUSED) && !again:
			// This tells of an earlier datagram; the one at hand was not sent.
			again, refused = true, err
			lost++
			continue
		case errors.Is(err, syscall.EMSGSIZE), errors.Is(err, syscall.ENOBUFS), again:
			lost++
			refused = err
		default:
			return lost, refused, err
		}
		again = false
		r.next += end
	}
	return lost, refused, nil
}

// forgetAcknowledged drops the lines from kept that the receiver's kernel has.
func (r *remote) forgetAcknowledged() {
	have, ok := acknowledged(r.conn)
	if !ok {
		have = r.sent
	}
	i := 0
	for i < r.next {
		end := lineEnd(r.kept[i:])
		frame := uint64(len(strconv.Itoa(end-1)) + end)
		if r.base+frame > have {
			break
		}
		r.base += frame
		i += end
	}
	r.kept = append(r.kept[:0], r.kept[i:]...)
	r.next -= i
}

func (r *remote) isCut() bool {
	select {
	case <-r.cut:
		return true
	default:
		return false
	}
}

// cutOff makes write return soon. It may be called from another goroutine.
func (r *remote) cutOff() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.gone {
		return
	}
	r.gone = true
	close(r.cut)
	if r.conn != nil {
		r.conn.SetWriteDeadline(time.Now())
	}
}

// close ends the connection and returns how many lines were lost on it: those that
// the receiver will not get, because it has gone.
func (r *remote) close() (lost int) {
	if r.conn == nil {
		return countLines(r.kept)
	}
	if r.stream && ended(r.conn) {
		r.disconnect()
		return countLines(r.kept)
	}
	r.conn.Close() // the kernel goes on sending what it has
	return 0
}
