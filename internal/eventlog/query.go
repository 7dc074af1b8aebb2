package eventlog

import (
	"net/netip"
	"strconv"
	"time"

	"sallyport/policy/event"
)

// observeQuery writes the line that observeJSON would write of a DNS query. There are
// far more queries than anything else.
func (w *Writer) observeQuery(ev *event.Event) {
	b := getScratch()
	line := appendQuery((*b)[:0], ev, w.node)
	_, _ = w.events.Write(line)
	putScratch(b, line)
}

func appendQuery(dst []byte, ev *event.Event, node string) []byte {
	d := &ev.Decision
	dst = append(dst, `{"time":`...)
	dst = appendStamp(dst, ev.Time)
	dst = append(dst, `,"event":"dns"`...)
	dst = appendText(dst, `,"id":`, ev.ID, maxID)
	dst = appendText(dst, `,"node":`, node, maxNode)
	if ev.Source.IsValid() {
		dst = appendAddress(dst, `,"src":`, ev.Source.Addr())
		dst = append(dst, `,"src_port":`...)
		dst = strconv.AppendUint(dst, uint64(ev.Source.Port()), 10)
	}
	if d.Group != "" {
		dst = appendText(dst, `,"group":`, d.Group, maxGroup)
		dst = appendText(dst, `,"mode":`, d.Mode.String(), maxShort)
	}
	dst = appendText(dst, `,"listener":`, ev.Listener, maxShort)
	dst = appendText(dst, `,"name":`, ev.Name, maxName)
	dst = appendText(dst, `,"verdict":`, d.Verdict.String(), maxShort)
	dst = appendText(dst, `,"reason":`, d.Reason.String(), maxShort)
	dst = appendText(dst, `,"rule":`, d.Rule, maxRule)
	dst = appendText(dst, `,"policy":`, d.Revision, maxPolicy)
	dst = appendText(dst, `,"qtype":`, ev.QType, maxShort)
	dst = appendText(dst, `,"rcode":`, ev.RCode, maxShort)
	if len(ev.Answers) > 0 {
		dst = append(dst, `,"answers":`...)
		dst = appendList(dst, ev.Answers, maxListed, maxAnswer)
	}
	dst = append(dst, `,"duration_ms":`...)
	dst = appendMillis(dst, ev.Duration)
	if ev.DNSTime > 0 {
		dst = append(dst, `,"dns_ms":`...)
		dst = appendMillis(dst, ev.DNSTime)
	}
	dst = appendText(dst, `,"error":`, ev.Error, maxError)
	return append(dst, '}', '\n')
}

// appendText appends a key and s in at most limit bytes and the quotes; nothing if s is empty.
func appendText(dst []byte, key, s string, limit int) []byte {
	if s == "" {
		return dst
	}
	return appendQuoted(append(dst, key...), s, limit)
}

// appendAddress appends a key and a.
func appendAddress(dst []byte, key string, a netip.Addr) []byte {
	if dst = append(dst, key...); a.Zone() != "" {
		return appendQuoted(dst, a.String(), maxShort)
	}
	return append(a.AppendTo(append(dst, '"')), '"')
}

// appendStamp appends t in RFC 3339 with milliseconds, in UTC.
func appendStamp(dst []byte, t time.Time) []byte {
	t = t.UTC()
	dst = t.AppendFormat(append(dst, '"'), time.RFC3339) // this layout has a fast path
	ms := t.Nanosecond() / 1_000_000
	return append(dst[:len(dst)-1], '.', byte('0'+ms/100), byte('0'+ms/10%10), byte('0'+ms%10), 'Z', '"')
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

// appendList appends the first few of items as an array.
func appendList(dst []byte, items []string, most, limit int) []byte {
	dst = append(dst, '[')
	for i, s := range items[:min(len(items), most)] {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendQuoted(dst, s, limit)
	}
	return append(dst, ']')
}
