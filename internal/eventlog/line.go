package eventlog

import (
	"net/netip"
	"strconv"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

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
	if ev.Kind == event.DNS && w.format != JSON { // neither format knows DNS
		return
	}
	to := w.events
	if ev.Kind == event.Config {
		to = w.messages
	}
	m := memos.Get().(*memo)
	line := m.line
	if w.syslog != nil && to == w.events {
		line = w.syslog.append(line, severityOf(ev), ev.Time, string(ev.Kind))
	}
	switch {
	case ev.Kind == event.Config:
		line = appendConfig(line, ev, w.node)
	case w.format == Squid:
		line = appendSquid(line, ev)
	case w.format == Aviatrix:
		line = appendAviatrix(line, ev, w.node)
	default:
		line = m.appendJSON(line, ev, w.node)
	}
	to.put(line)
	m.free(line)
}

func appendConfig(dst []byte, ev *event.Event, node string) []byte {
	dst = append(dst, `{"time":`...)
	dst = appendStamp(dst, ev.Time)
	dst = append(dst, `,"event":"config"`...)
	dst = appendText(dst, `,"node":`, node, maxNode)
	dst = appendText(dst, `,"what":`, ev.Name, maxShort)
	dst = strconv.AppendBool(append(dst, `,"ok":`...), ev.Error == "")
	dst = appendText(dst, `,"policy":`, ev.Decision.Revision, maxPolicy)
	dst = appendText(dst, `,"error":`, ev.Error, maxError)
	return append(dst, '}', '\n')
}

// appendJSON appends the keys that the contract names, in its order. A key whose
// value is not known, or cannot be for this kind of event, is left out.
func (m *memo) appendJSON(dst []byte, ev *event.Event, node string) []byte {
	said := m.of(&ev.Decision)
	dst = append(dst, `{"time":`...)
	dst = m.appendStamp(dst, ev.Time)
	dst = appendText(dst, `,"event":`, string(ev.Kind), maxShort)
	dst = appendText(dst, `,"id":`, ev.ID, maxID)
	dst = appendText(dst, `,"node":`, node, maxNode)
	if ev.Source.IsValid() {
		dst = m.appendSource(dst, ev.Source.Addr())
		dst = appendNumber(dst, `,"src_port":`, int64(ev.Source.Port()))
	}
	dst = appendText(dst, `,"vpc_endpoint":`, ev.VPCEndpoint, maxVPC)
	dst = append(dst, said.head...)
	dst = appendText(dst, `,"listener":`, ev.Listener, maxShort)
	dst = appendText(dst, `,"method":`, ev.Method, maxMethod)
	dst = appendText(dst, `,"name":`, ev.Name, maxName)
	if ev.Port != 0 {
		dst = appendNumber(dst, `,"port":`, int64(ev.Port))
	}
	if ev.Kind != event.DNS {
		dst = appendHello(dst, ev)
	}
	dst = append(dst, said.tail...)
	if ev.Destination.IsValid() {
		dst = appendAddress(dst, `,"dst":`, ev.Destination.Addr())
	}
	dst = appendText(dst, `,"parent":`, ev.Parent, maxAnswer)
	if ev.Status != 0 {
		dst = appendNumber(dst, `,"status":`, int64(ev.Status))
	}
	dst = appendText(dst, `,"qtype":`, ev.QType, maxShort)
	dst = appendText(dst, `,"rcode":`, ev.RCode, maxShort)
	dst = appendList(dst, `,"answers":`, ev.Answers, maxListed, maxAnswer)
	if ev.Kind != event.DNS {
		dst = appendNumber(dst, `,"bytes_up":`, ev.BytesUp)
		dst = appendNumber(dst, `,"bytes_down":`, ev.BytesDown)
	}
	dst = appendMillis(append(dst, `,"duration_ms":`...), ev.Duration)
	if ev.DNSTime > 0 {
		dst = appendMillis(append(dst, `,"dns_ms":`...), ev.DNSTime)
	}
	if ev.ConnTime > 0 {
		dst = appendMillis(append(dst, `,"connect_ms":`...), ev.ConnTime)
	}
	dst = appendText(dst, `,"user":`, ev.User, maxUser)
	dst = appendText(dst, `,"user_agent":`, ev.UserAgent, maxAgent)
	dst = appendText(dst, `,"error":`, ev.Error, maxError)
	return append(dst, '}', '\n')
}

// appendHello appends the facts of a ClientHello, if one was read.
func appendHello(dst []byte, ev *event.Event) []byte {
	dst = appendText(dst, `,"sni":`, ev.SNI, maxSNI)
	dst = appendList(dst, `,"alpn":`, ev.ALPN, maxALPNs, maxALPN)
	if ev.TLSVersion != 0 || ev.ECH {
		dst = strconv.AppendBool(append(dst, `,"ech":`...), ev.ECH)
		dst = strconv.AppendBool(append(dst, `,"post_quantum":`...), ev.PostQuantum)
	}
	switch v := ev.TLSVersion; {
	case v == 0:
	case v > 0x0300 && v <= 0x0304:
		dst = append(append(dst, `,"tls_version":"1.`...), '0'+byte(v-0x0301), '"')
	default:
		dst = append(strconv.AppendUint(append(dst, `,"tls_version":"0x`...), uint64(v), 16), '"')
	}
	return appendText(dst, `,"ja4":`, ev.JA4, maxShort)
}

// appendText appends a key and s in at most limit bytes and the quotes; nothing if s is empty.
func appendText(dst []byte, key, s string, limit int) []byte {
	if s == "" { // most are, and this much is inlined
		return dst
	}
	return appendKeyed(dst, key, s, limit)
}

func appendKeyed(dst []byte, key, s string, limit int) []byte {
	dst = append(dst, key...)
	if len(s) <= limit && plain(s) {
		return append(append(append(dst, '"'), s...), '"')
	}
	return appendQuoted(dst, s, limit)
}

func appendNumber(dst []byte, key string, n int64) []byte {
	return strconv.AppendInt(append(dst, key...), n, 10)
}

// appendAddress appends a key and a.
func appendAddress(dst []byte, key string, a netip.Addr) []byte {
	if dst = append(dst, key...); a.Zone() != "" {
		return appendQuoted(dst, a.String(), maxShort)
	}
	return append(a.AppendTo(append(dst, '"')), '"')
}

// appendStamp appends t in RFC 3339 with milliseconds, in UTC, and in quotes.
func appendStamp(dst []byte, t time.Time) []byte {
	return append(appendTime(append(dst, '"'), t), '"')
}

func appendTime(dst []byte, t time.Time) []byte {
	t = t.UTC()
	dst = t.AppendFormat(dst, time.RFC3339) // this layout has a fast path
	return appendFraction(dst[:len(dst)-1], t)
}

// appendFraction appends the milliseconds of t, and that it is in UTC.
func appendFraction(dst []byte, t time.Time) []byte {
	ms := t.Nanosecond() / 1_000_000
	return append(dst, '.', byte('0'+ms/100), byte('0'+ms/10%10), byte('0'+ms%10), 'Z')
}

// appendMillis appends d in milliseconds, to the microsecond.
func appendMillis(dst []byte, d time.Duration) []byte {
	us := max(d, 0).Microseconds()
	dst = strconv.AppendInt(dst, us/1000, 10)
	if f := us % 1000; f != 0 {
		dst = append(dst, '.', byte('0'+f/100), byte('0'+f/10%10), byte('0'+f%10))
		for dst[len(dst)-1] == '0' {
			dst = dst[:len(dst)-1]
		}
	}
	return dst
}

// appendList appends a key and the first few of items as an array; nothing if there are none.
func appendList(dst []byte, key string, items []string, most, limit int) []byte {
	if len(items) == 0 {
		return dst
	}
	dst = append(append(dst, key...), '[')
	for i, s := range items[:min(len(items), most)] {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendQuoted(dst, s, limit)
	}
	return append(dst, ']')
}

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
