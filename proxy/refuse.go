package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"sallyport/policy"
)

// Error types of Proxy-Status (RFC 9209, section 2.3).
const (
	statusRequestDenied   = "http_request_denied"
	statusRequestError    = "http_request_error"
	statusLoop            = "proxy_loop_detected"
	statusLimit           = "connection_limit_reached"
	statusDNSError        = "dns_error"
	statusDNSTimeout      = "dns_timeout"
	statusRefused         = "connection_refused"
	statusConnectTimeout  = "connection_timeout"
	statusUnroutable      = "destination_ip_unroutable"
	statusUnavailable     = "destination_unavailable"
	statusTerminated      = "connection_terminated"
	statusResponseTimeout = "http_response_timeout"
	statusProtocolError   = "http_protocol_error"
)

// TLS alerts (RFC 8446, section 6.2; RFC 6066, section 3).
const (
	alertAccessDenied     = 49
	alertUnrecognizedName = 112
)

const (
	retryAfter = "5" // seconds, for Retry-After
	maxShown   = 256 // bytes of a client's string that answers and events repeat

	// answerTime is how long a client may take to take in a refusal. The kernel
	// does that for it, unless the client left earlier answers unread.
	answerTime = 5 * time.Second
)

// A refusal ends a request: what the client is told, and what the event says. It
// is an error so that it can come back through net/http's Transport.
type refusal struct {
	decision policy.Decision // never passes
	status   int             // HTTP status
	token    string          // error type of Proxy-Status
	err      error           // the cause for operators, or nil; clients never see it
}

// Error says what failed, for operators.
func (r *refusal) Error() string {
	if r.err != nil {
		return r.err.Error()
	}
	return r.decision.Reason.String()
}

func (r *refusal) Unwrap() error { return r.err }

// denied is the refusal of what policy does not let pass.
func denied(d policy.Decision) *refusal {
	return &refusal{decision: d, status: http.StatusForbidden, token: statusRequestDenied}
}

// badRequest refuses a malformed request.
func badRequest(d policy.Decision, err error) *refusal {
	r := &refusal{
		decision: d.Refuse(policy.ReasonBadRequest),
		status:   http.StatusBadRequest, token: statusRequestError, err: err,
	}
	var h *headError
	if errors.As(err, &h) {
		r.status = h.status
	}
	return r
}

func looped(d policy.Decision) *refusal {
	return &refusal{decision: d.Refuse(policy.ReasonLoop), status: http.StatusForbidden, token: statusLoop}
}

// resolveFailed is the refusal for an error of upstream.Dialer.Resolve.
func resolveFailed(d policy.Decision, err error) *refusal {
	if isExhausted(err) {
		return limited(d, http.StatusServiceUnavailable, err)
	}
	r := &refusal{decision: d.Refuse(policy.ReasonResolveFailed), status: http.StatusBadGateway, token: statusDNSError, err: err}
	if isTimeout(err) {
		r.status, r.token = http.StatusGatewayTimeout, statusDNSTimeout
	}
	return r
}

// connectFailed is the refusal for an error of upstream.Dialer.Dial. Of several
// attempts' errors the one that says most about the far side counts.
func connectFailed(d policy.Decision, err error) *refusal {
	if isExhausted(err) {
		return limited(d, http.StatusServiceUnavailable, err)
	}
	r := &refusal{decision: d.Refuse(policy.ReasonConnectFailed), status: http.StatusBadGateway, token: statusUnavailable, err: err}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		r.token = statusRefused
	case isTimeout(err):
		r.status, r.token = http.StatusGatewayTimeout, statusConnectTimeout
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EADDRNOTAVAIL):
		r.token = statusUnroutable
	case errors.Is(err, syscall.ECONNRESET):
		r.token = statusTerminated
	}
	return r
}

// exchangeFailed is the refusal for an error of an HTTP exchange with the far
// side, unless it is a refusal already.
func exchangeFailed(d policy.Decision, err error) *refusal {
	var r *refusal
	if errors.As(err, &r) {
		return r
	}
	r = &refusal{decision: d.Refuse(policy.ReasonConnectFailed), status: http.StatusBadGateway, token: statusTerminated, err: err}
	switch {
	case isTimeout(err):
		r.status, r.token = http.StatusGatewayTimeout, statusResponseTimeout
	case isMalformed(err):
		r.token = statusProtocolError
	}
	return r
}

// isMalformed reports whether err is about what a response said.
func isMalformed(err error) bool {
	var op *net.OpError
	return !errors.As(err, &op) && strings.Contains(err.Error(), "malformed")
}

// isTimeout reports whether a deadline is the cause of err.
func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.As(err, &t) && t.Timeout()
}

// alert returns the TLS alert that tells a client of r.
func (r *refusal) alert() byte {
	switch r.decision.Reason {
	case policy.ReasonSNIMismatch, policy.ReasonSNIMissing:
		return alertUnrecognizedName
	}
	return alertAccessDenied
}

// alertRecord is the record of a fatal alert (RFC 8446, sections 5.1 and 6).
func alertRecord(description byte) []byte {
	const alert, fatal = 21, 2
	return []byte{alert, 3, 3, 0, 2, fatal, description}
}

// An answer is what an HTTP client is told of a refusal.
type answer struct {
	*refusal
	id, help string
	source   netip.Addr
	name     string // as asked for; whatever the client sent
	port     uint16
	asJSON   bool

	challenge string // value of Proxy-Authenticate, sent with a 407
	keep      bool   // the connection goes on after the answer
}

// fields calls set with every header field of the answer but Content-Length, in
// the order in which they are sent.
func (a *answer) fields(set func(key, value string)) {
	reason := a.decision.Reason.String()
	set("Proxy-Status", `sallyport; error=`+a.token+`; details="`+reason+`"`)
	set("X-Sallyport-Reason", reason)
	set("X-Sallyport-Id", a.id)
	set("Cache-Control", "no-store")
	if a.status == http.StatusTooManyRequests || a.status == http.StatusServiceUnavailable {
		set("Retry-After", retryAfter)
	}
	if a.status == http.StatusProxyAuthRequired {
		set("Proxy-Authenticate", a.challenge)
	}
	set("Content-Type", answerType(a.asJSON))
}

// answerType is the media type of an answer's body.
func answerType(asJSON bool) string {
	if asJSON {
		return "application/json"
	}
	return "text/plain; charset=utf-8"
}

// body returns the page for the client: who asked for what, why it was refused,
// and where to ask for access.
func (a *answer) body() []byte {
	reason := a.decision.Reason.String()
	if a.asJSON {
		b, err := json.Marshal(struct {
			Source string `json:"source"`
			Name   string `json:"name"`
			Port   uint16 `json:"port"`
			Reason string `json:"reason"`
			Detail string `json:"detail"`
			Rule   string `json:"rule"`
			ID     string `json:"id"`
			Help   string `json:"help_url"`
		}{a.source.String(), printable(a.name), a.port, reason, explanations[a.decision.Reason], a.decision.Rule, a.id, a.help})
		if err != nil {
			return nil // cannot happen: strings and a number
		}
		return append(b, '\n')
	}
	b := append(make([]byte, 0, 512), "Refused by sallyport, the egress proxy of this network.\n\n"...)
	line := func(key, value string) {
		if value != "" {
			b = append(append(append(b, key...), value...), '\n')
		}
	}
	line("source: ", a.source.String())
	line("name:   ", printable(a.name))
	if a.port != 0 {
		line("port:   ", strconv.Itoa(int(a.port)))
	}
	why := reason
	if x := explanations[a.decision.Reason]; x != "" {
		why += " (" + x + ")"
	}
	line("reason: ", why)
	line("rule:   ", a.decision.Rule)
	line("id:     ", a.id)
	line("help:   ", a.help)
	return b
}

// append appends the whole response to b. The connection ends after it, unless keep
// is set.
func (a *answer) append(b []byte, phrase string) []byte {
	field := func(key, value string) {
		b = append(append(append(append(b, key...), ": "...), value...), "\r\n"...)
	}
	body := a.body()
	b = append(b, "HTTP/1.1 "...)
	b = append(strconv.AppendInt(b, int64(a.status), 10), ' ')
	b = append(append(b, phrase...), "\r\n"...)
	a.fields(field)
	field("Date", time.Now().UTC().Format(http.TimeFormat))
	field("Content-Length", strconv.Itoa(len(body)))
	if !a.keep {
		field("Connection", "close")
	}
	return append(append(b, "\r\n"...), body...)
}

// phrase is the reason phrase of r's status: on CONNECT, where clients show
// little else of a refusal, it says who refused.
func (r *refusal) phrase(connect bool) string {
	if connect && r.status == http.StatusForbidden {
		return "Forbidden by egress policy"
	}
	return http.StatusText(r.status)
}

// explanations say to people what each reason means.
var explanations = map[policy.Reason]string{
	policy.ReasonNotListed:          "no rule of your group lists this name",
	policy.ReasonExplicitDeny:       "a rule forbids this destination",
	policy.ReasonUnmatchedSource:    "your address belongs to no group",
	policy.ReasonPortNotAllowed:     "the name is listed, but not on this port",
	policy.ReasonProtocolNotAllowed: "the name is listed, but not for this protocol",
	policy.ReasonRuleExpired:        "the rule for this name has expired",
	policy.ReasonIPLiteral:          "addresses must be listed; ask for a name",
	policy.ReasonPrivateDestination: "the name points to an address that is not public",
	policy.ReasonHostMismatch:       "the Host field differs from the CONNECT target",
	policy.ReasonBadRequest:         "the request is malformed",
	policy.ReasonLoop:               "the request would come back to this proxy",
	policy.ReasonLimitExceeded:      "too many tunnels, connections or wrong passwords, or the proxy is stopping; try again later",
	policy.ReasonAuthRequired:       "the proxy wants to know who asks: a user name and password are needed",
	policy.ReasonAuthFailed:         "the user name or the password is wrong",
	policy.ReasonResolveFailed:      "the name could not be resolved",
	policy.ReasonConnectFailed:      "the destination could not be reached",
}

// printable returns s without anything that could do harm in a terminal or a
// page, cut to maxShown bytes.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == utf8.RuneError || strings.ContainsRune("<>&\"'`", r) {
			return '?'
		}
		return r
	}, clip(s))
}

// shown returns a target that cannot be parsed as events show it: without user
// information, which may hold a password.
func shown(target string) string {
	return clip(target[strings.LastIndexByte(target, '@')+1:])
}

// clip returns a copy of s that shares no memory with it, cut to maxShown bytes.
func clip(s string) string { return strings.Clone(s[:min(len(s), maxShown)]) }
