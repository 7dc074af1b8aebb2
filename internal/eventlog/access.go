package eventlog

import (
	"net/netip"
	"strconv"
	"strings"

	"sallyport/policy"
	"sallyport/policy/event"
)

// appendSquid appends the line of ev in Squid's native format, its
//
//	logformat squid %ts.%03tu %6tr %>a %Ss/%03>Hs %<st %rm %ru %[un %Sh/%<a %mt
//
// The time is that of the end, paths and content types are not known.
func appendSquid(dst []byte, ev *event.Event) []byte {
	end := ev.Time.Add(ev.Duration).UnixMilli()
	dst = strconv.AppendInt(dst, end/1000, 10)
	dst = append(dst, '.')
	dst = appendPadded(dst, end%1000, 3, '0')
	dst = append(dst, ' ')
	dst = appendPadded(dst, max(ev.Duration, 0).Milliseconds(), 6, ' ')
	dst = append(dst, ' ')
	dst = appendAddr(dst, ev.Source)
	dst = append(dst, ' ')
	dst = append(dst, squidTag(ev)...)
	dst = append(dst, '/')
	dst = appendPadded(dst, int64(ev.Status), 3, '0')
	dst = append(dst, ' ')
	dst = strconv.AppendInt(dst, ev.BytesDown, 10)
	dst = append(dst, ' ')
	dst = appendToken(dst, ev.Method, "NONE", maxMethod)
	dst = append(dst, ' ')
	dst = appendTarget(dst, ev)
	dst = append(dst, ' ')
	dst = appendToken(dst, ev.User, "-", maxUser)
	if ev.Destination.IsValid() {
		if ev.Parent != "" {
			dst = append(dst, " FIRSTUP_PARENT/"...)
		} else {
			dst = append(dst, " HIER_DIRECT/"...)
		}
		dst = appendAddr(dst, ev.Destination)
	} else {
		dst = append(dst, " HIER_NONE/-"...)
	}
	return append(dst, " -\n"...)
}

// squidTag is Squid's request status. What failed on the way is no denial to it.
func squidTag(ev *event.Event) string {
	tag := "TCP_TUNNEL"
	if ev.Kind == event.HTTP {
		tag = "TCP_MISS"
	}
	switch r := ev.Decision.Reason; {
	case r == policy.ReasonPolicyRevoked:
		return tag + "_ABORTED"
	case ev.Decision.Passes() || r == policy.ReasonResolveFailed || r == policy.ReasonConnectFailed:
		return tag
	case r == policy.ReasonBadRequest:
		return "NONE_NONE"
	}
	return "TCP_DENIED"
}

// appendTarget appends what was asked for: host:port of a tunnel, the URL otherwise.
func appendTarget(dst []byte, ev *event.Event) []byte {
	if ev.Name == "" {
		return append(dst, "error:invalid-request"...)
	}
	if ev.Kind == event.HTTP {
		dst = append(dst, "http://"...)
	}
	if strings.Contains(ev.Name, ":") && !strings.HasPrefix(ev.Name, "[") {
		dst = append(dst, '[')
		dst = appendToken(dst, ev.Name, "", maxName)
		dst = append(dst, ']')
	} else {
		dst = appendToken(dst, ev.Name, "", maxName)
	}
	if ev.Kind != event.HTTP || ev.Port != 80 {
		dst = append(dst, ':')
		dst = strconv.AppendUint(dst, uint64(ev.Port), 10)
	}
	if ev.Kind == event.HTTP {
		dst = append(dst, '/')
	}
	return dst
}

// appendAviatrix appends the line of ev as an Aviatrix gateway with an FQDN filter
// logs it. Such a gateway knows names alone, so that every denial but that by a
// deny rule is NOT_WHITELISTED, and a failure on the way is none.
func appendAviatrix(dst []byte, ev *event.Event, node string) []byte {
	dst = ev.Time.UTC().AppendFormat(dst, "2006-01-02T15:04:05.000000-07:00")
	dst = append(dst, ' ')
	dst = appendToken(dst, node, "-", maxNode)
	dst = append(dst, " sallyport: AviatrixFQDNRule0[CRIT]decide() L#0  Gateway="...)
	dst = appendToken(dst, node, "-", maxNode)
	dst = append(dst, " S_IP="...)
	dst = appendAddr(dst, ev.Source)
	dst = append(dst, " D_IP="...)
	dst = appendAddr(dst, ev.Destination)
	dst = append(dst, " hostname="...)
	if ev.Name != "" {
		dst = appendToken(dst, ev.Name, "", maxName)
	} else {
		dst = appendToken(dst, ev.SNI, "-", maxSNI)
	}
	dst = append(dst, aviatrixState(ev.Decision)...)
	if ev.Decision.Rule != "" {
		dst = append(dst, " Rule="...)
		dst = appendToken(dst, ev.Decision.Rule, "", maxRule)
	}
	return append(dst, '\n')
}

func aviatrixState(d policy.Decision) string {
	switch d.Reason {
	case policy.ReasonMatched, policy.ReasonResolveFailed, policy.ReasonConnectFailed:
		return " state=MATCHED"
	case policy.ReasonExplicitDeny:
		return " state=MATCHED drop_reason=BLACKLISTED"
	}
	if d.Passes() { // observed
		return " state=NO_MATCH"
	}
	return " state=NO_MATCH drop_reason=NOT_WHITELISTED"
}

// appendPadded appends n in at least width places.
func appendPadded(dst []byte, n int64, width int, pad byte) []byte {
	var b [20]byte
	digits := strconv.AppendInt(b[:0], n, 10)
	for range width - len(digits) {
		dst = append(dst, pad)
	}
	return append(dst, digits...)
}

func appendAddr(dst []byte, ap netip.AddrPort) []byte {
	if !ap.IsValid() {
		return append(dst, '-')
	}
	return ap.Addr().WithZone("").AppendTo(dst)
}

const upperHex = "0123456789ABCDEF"

// appendToken appends s as one word of at most limit bytes, or none if s is empty:
// all but printable ASCII, and what quotes, is percent-encoded, as Squid does.
func appendToken(dst []byte, s, none string, limit int) []byte {
	if s == "" {
		return append(dst, none...)
	}
	start := len(dst)
	for i := 0; i < len(s) && len(dst)-start+3 <= limit; i++ {
		switch c := s[i]; {
		case c <= ' ' || c > '~' || c == '%' || c == '"' || c == '\\':
			dst = append(dst, '%', upperHex[c>>4], upperHex[c&15])
		default:
			dst = append(dst, c)
		}
	}
	return dst
}
