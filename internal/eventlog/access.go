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
// as Squid 5 and 6 write it, with strip_query_terms. The time is that of the end. Two things differ on
// purpose: %<st counts the body or the tunnel alone, and what is not printable ASCII
// is percent-encoded everywhere, so that a line has ten words whatever a client sent.
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
	dst = appendToken(dst, ev.Method, "NONE", maxMethod, &inWord)
	dst = append(dst, ' ')
	dst = appendTarget(dst, ev)
	dst = append(dst, ' ')
	dst = appendUser(dst, ev.User)
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
	dst = append(dst, ' ')
	mime, _, _ := strings.Cut(ev.ContentType, ";")
	dst = appendToken(dst, strings.TrimSpace(mime), "-", maxType, &inWord)
	return append(dst, '\n')
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
	case r == policy.ReasonResolveFailed || r == policy.ReasonConnectFailed:
		if ev.Kind != event.HTTP {
			return "NONE_NONE" // a tunnel that was never opened
		}
		return tag
	case ev.Decision.Passes():
		if ev.Aborted || ev.Status == 0 && ev.Method != "" {
			return tag + "_ABORTED" // either side left before the end
		}
		return tag
	case r == policy.ReasonBadRequest:
		return "NONE_NONE"
	}
	return "TCP_DENIED"
}

// appendTarget appends what was asked for: host:port of a tunnel, the URL without its
// query otherwise.
func appendTarget(dst []byte, ev *event.Event) []byte {
	if ev.Name == "" {
		return append(dst, "error:invalid-request"...)
	}
	if ev.Kind == event.HTTP {
		dst = append(dst, "http://"...)
	}
	if strings.Contains(ev.Name, ":") && !strings.HasPrefix(ev.Name, "[") {
		dst = append(dst, '[')
		dst = appendToken(dst, ev.Name, "", maxName, &inWord)
		dst = append(dst, ']')
	} else {
		dst = appendToken(dst, ev.Name, "", maxName, &inWord)
	}
	if ev.Port != 0 && (ev.Kind != event.HTTP || ev.Port != 80) {
		dst = append(dst, ':')
		dst = strconv.AppendUint(dst, uint64(ev.Port), 10)
	}
	if ev.Kind != event.HTTP {
		return dst
	}
	if !strings.HasPrefix(ev.Path, "/") {
		dst = append(dst, '/')
	}
	if ev.Path == "*" {
		return dst
	}
	return appendToken(dst, ev.Path, "", maxPath, &inPath)
}

// appendAviatrix appends the line of ev as an Aviatrix gateway with an FQDN filter
// logs it. Such a gateway knows names alone, so that every denial but that by a
// deny rule is NOT_WHITELISTED, and a failure on the way is none.
func appendAviatrix(dst []byte, ev *event.Event, node string) []byte {
	dst = ev.Time.UTC().AppendFormat(dst, "2006-01-02T15:04:05.000000-07:00")
	dst = append(dst, ' ')
	dst = appendToken(dst, node, "-", maxNode, &inWord)
	dst = append(dst, " sallyport: AviatrixFQDNRule0[CRIT]decide() L#0  Gateway="...)
	dst = appendToken(dst, node, "-", maxNode, &inWord)
	dst = append(dst, " S_IP="...)
	dst = appendAddr(dst, ev.Source)
	dst = append(dst, " D_IP="...)
	dst = appendAddr(dst, ev.Destination)
	dst = append(dst, " hostname="...)
	if ev.Name != "" {
		dst = appendToken(dst, ev.Name, "", maxName, &inWord)
	} else {
		dst = appendToken(dst, ev.SNI, "-", maxSNI, &inWord)
	}
	dst = append(dst, aviatrixState(ev.Decision)...)
	if ev.Decision.Rule != "" {
		dst = append(dst, " Rule="...)
		dst = appendToken(dst, ev.Decision.Rule, "", maxRule, &inWord)
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

// appendUser appends a user as %[un does: lower-case hex for what is not printable
// ASCII and for %, [ and ], and \\ for a backslash. A space, which Squid leaves, is
// encoded too, for it would make two columns of one.
func appendUser(dst []byte, s string) []byte {
	if s == "" {
		return append(dst, '-')
	}
	start := len(dst)
	for i := 0; i < len(s) && len(dst)-start+3 <= maxUser; i++ {
		switch c := s[i]; {
		case c <= ' ' || c > '~' || c == '%' || c == '[' || c == ']':
			dst = append(dst, '%', hexDigits[c>>4], hexDigits[c&15])
		case c == '\\':
			dst = append(dst, '\\', '\\')
		default:
			dst = append(dst, c)
		}
	}
	return dst
}

// A charset says which bytes a token may have as they are.
type charset [256]bool

// Every printable ASCII character may be in a path, which is percent-encoded
// already. In other words % means itself, and what quotes is encoded too.
var (
	inPath = printableBut("")
	inWord = printableBut("%\"\\")
)

func printableBut(these string) (set charset) {
	for c := '!'; c <= '~'; c++ {
		set[c] = !strings.ContainsRune(these, c)
	}
	return set
}

const upperHex = "0123456789ABCDEF"

// appendToken appends s as one word of at most limit bytes, or none if s is empty:
// what is not in the set is percent-encoded.
func appendToken(dst []byte, s, none string, limit int, as *charset) []byte {
	if s == "" {
		return append(dst, none...)
	}
	start := len(dst)
	for i := 0; i < len(s) && len(dst)-start+3 <= limit; i++ {
		if c := s[i]; as[c] {
			dst = append(dst, c)
		} else {
			dst = append(dst, '%', upperHex[c>>4], upperHex[c&15])
		}
	}
	return dst
}
