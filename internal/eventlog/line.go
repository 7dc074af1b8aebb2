package eventlog

import (
	"net/netip"
	"strconv"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rs/zerolog"

	"sallyport/policy/event"
)

// maxLine bounds a line, in bytes with its newline. The bounds below add up to
// less, however much escaping makes of what a client sent: they count what is
// written, not what came in.
const (
	maxLine   = 16 << 10
	maxID     = 128
	maxNode   = 256
	maxGroup  = 256
	maxRule   = 256
	maxPolicy = 128
	maxVPC    = 256
	maxMethod = 64
	maxName   = 1024
	maxSNI    = 1024
	maxShort  = 64 // closed sets: listener, qtype, rcode, ja4
	maxUser   = 256
	maxAgent  = 1024
	maxError  = 4096
	maxPath   = 8192
	maxType   = 128
	maxALPN   = 64 // each
	maxAnswer = 300
	maxALPNs  = 8 // in number
	maxListed = 16
)

// Observe implements event.Observer: it queues the line of ev.
//
// Of a Config event, Name says what was loaded (policy or settings), Decision.Revision
// what is in force, and Error what was wrong; without an Error the load went well.
func (w *Writer) Observe(ev *event.Event) {
	switch {
	case ev.Kind == event.Config:
		w.observeConfig(ev)
	case w.format == JSON && ev.Kind == event.DNS:
		w.observeQuery(ev)
	case w.format == JSON:
		w.observeJSON(ev)
	case ev.Kind == event.DNS: // neither format knows DNS
	default:
		b := getScratch()
		line := (*b)[:0]
		if w.format == Squid {
			line = appendSquid(line, ev)
		} else {
			line = appendAviatrix(line, ev, w.node)
		}
		_, _ = w.events.Write(line)
		putScratch(b, line)
	}
}

func (w *Writer) observeConfig(ev *event.Event) {
	e := w.config.Log()
	appendTime(e, ev.Time)
	e.Str("event", string(ev.Kind))
	text(e, "node", w.node, maxNode)
	text(e, "what", ev.Name, maxShort)
	e.Bool("ok", ev.Error == "")
	text(e, "policy", ev.Decision.Revision, maxPolicy)
	text(e, "error", ev.Error, maxError)
	e.Send()
}

// observeJSON writes the keys that the contract names, in its order. A key whose
// value is not known, or cannot be for this kind of event, is left out.
func (w *Writer) observeJSON(ev *event.Event) {
	d := &ev.Decision
	e := w.lines.Log()
	appendTime(e, ev.Time)
	e.Str("event", string(ev.Kind))
	text(e, "id", ev.ID, maxID)
	text(e, "node", w.node, maxNode)
	if ev.Source.IsValid() {
		address(e, "src", ev.Source.Addr())
		e.Uint16("src_port", ev.Source.Port())
	}
	text(e, "vpc_endpoint", ev.VPCEndpoint, maxVPC)
	if d.Group != "" {
		text(e, "group", d.Group, maxGroup)
		e.Str("mode", d.Mode.String())
	}
	text(e, "listener", ev.Listener, maxShort)
	text(e, "method", ev.Method, maxMethod)
	text(e, "name", ev.Name, maxName)
	if ev.Port != 0 {
		e.Uint16("port", ev.Port)
	}
	hello(e, ev)
	e.Str("verdict", d.Verdict.String())
	text(e, "reason", d.Reason.String(), maxShort)
	text(e, "rule", d.Rule, maxRule)
	text(e, "policy", d.Revision, maxPolicy)
	if ev.Destination.IsValid() {
		address(e, "dst", ev.Destination.Addr())
	}
	text(e, "parent", ev.Parent, maxAnswer)
	if ev.Status != 0 {
		e.Int("status", ev.Status)
	}
	text(e, "qtype", ev.QType, maxShort)
	text(e, "rcode", ev.RCode, maxShort)
	list(e, "answers", ev.Answers, maxListed, maxAnswer)
	if ev.Kind != event.DNS {
		e.Int64("bytes_up", ev.BytesUp).Int64("bytes_down", ev.BytesDown)
	}
	millis(e, "duration_ms", ev.Duration)
	if ev.DNSTime > 0 {
		millis(e, "dns_ms", ev.DNSTime)
	}
	if ev.ConnTime > 0 {
		millis(e, "connect_ms", ev.ConnTime)
	}
	text(e, "user", ev.User, maxUser)
	text(e, "user_agent", ev.UserAgent, maxAgent)
	text(e, "error", ev.Error, maxError)
	e.Send()
}

// hello writes the facts of a ClientHello, if one was read.
func hello(e *zerolog.Event, ev *event.Event) {
	text(e, "sni", ev.SNI, maxSNI)
	list(e, "alpn", ev.ALPN, maxALPNs, maxALPN)
	if ev.TLSVersion != 0 || ev.ECH {
		e.Bool("ech", ev.ECH)
		e.Bool("post_quantum", ev.PostQuantum)
	}
	switch v := ev.TLSVersion; {
	case v == 0:
	case v > 0x0300 && v <= 0x0304:
		e.Str("tls_version", [...]string{"1.0", "1.1", "1.2", "1.3"}[v-0x0301])
	default:
		e.Str("tls_version", "0x"+strconv.FormatUint(uint64(v), 16))
	}
	text(e, "ja4", ev.JA4, maxShort)
}

// millis writes d in milliseconds, to the microsecond.
func millis(e *zerolog.Event, key string, d time.Duration) {
	var b [24]byte
	e.RawJSON(key, appendMillis(b[:0], d))
}

// appendTime writes t in RFC 3339 with milliseconds, in UTC.
func appendTime(e *zerolog.Event, t time.Time) {
	var b [40]byte
	e.RawJSON("time", appendStamp(b[:0], t))
}

func address(e *zerolog.Event, key string, a netip.Addr) {
	if a.Zone() != "" {
		text(e, key, a.String(), maxShort)
		return
	}
	var b [64]byte
	q := append(b[:0], '"')
	q = a.AppendTo(q)
	e.RawJSON(key, append(q, '"'))
}

// text writes s in at most limit bytes and the quotes; nothing if s is empty.
func text(e *zerolog.Event, key, s string, limit int) {
	switch {
	case s == "":
	case len(s) <= min(limit, shortText) && plain(s): // nearly always
		var b [shortText + 2]byte
		q := append(append(b[:0], '"'), s...)
		e.RawJSON(key, append(q, '"'))
	default:
		b := getScratch()
		q := appendQuoted((*b)[:0], s, limit)
		e.RawJSON(key, q)
		putScratch(b, q)
	}
}

// list writes the first few of items as an array; nothing if there are none.
func list(e *zerolog.Event, key string, items []string, most, limit int) {
	if len(items) == 0 {
		return
	}
	b := getScratch()
	q := appendList((*b)[:0], items, most, limit)
	e.RawJSON(key, q)
	putScratch(b, q)
}

// shortText is the length up to which a text is quoted on the stack.
const shortText = 126

// plain reports whether s needs no escaping.
func plain(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

const ellipsis = "…"

// appendQuoted appends s as a JSON string of at most limit bytes and the quotes;
// what does not fit is replaced by "…". Bytes that are not UTF-8 become U+FFFD.
// Runes that are not printable, which includes every line break and everything
// that moves a cursor or turns the direction of writing, are escaped.
func appendQuoted(dst []byte, s string, limit int) []byte {
	dst = append(dst, '"')
	if len(s) <= limit && plain(s) {
		return append(append(dst, s...), '"')
	}
	start, fits := len(dst), len(dst) // up to fits there is room for the ellipsis
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == '"' || r == '\\':
			dst = append(dst, '\\', byte(r))
		case r == utf8.RuneError && size == 1 || !unicode.IsPrint(r):
			dst = appendEscaped(dst, r)
		default:
			dst = append(dst, s[i:i+size]...)
		}
		i += size
		if len(dst)-start > limit {
			return append(append(dst[:fits], ellipsis...), '"')
		}
		if len(dst)-start <= limit-len(ellipsis) {
			fits = len(dst)
		}
	}
	return append(dst, '"')
}

const hexDigits = "0123456789abcdef"

// appendEscaped appends r as \u1234, above U+FFFF as a surrogate pair.
func appendEscaped(dst []byte, r rune) []byte {
	if r > 0xffff {
		r -= 0x10000
		dst = appendEscaped(dst, 0xd800+r>>10)
		r = 0xdc00 + r&0x3ff
	}
	return append(dst, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}

// scratch holds buffers to build a line or a part of one in.
var scratch = sync.Pool{New: func() any { return new(make([]byte, 0, 1024)) }}

func getScratch() *[]byte { return scratch.Get().(*[]byte) }

// putScratch gives b back; grown is what became of it.
func putScratch(b *[]byte, grown []byte) {
	if cap(grown) <= 2*maxLine {
		*b = grown[:0]
		scratch.Put(b)
	}
}
