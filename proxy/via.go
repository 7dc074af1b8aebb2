package proxy

import (
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"sallyport/policy"
)

// pseudonym is what this process calls itself in Via (RFC 9110, section 7.6.3). It
// is another one in each process, so that a chain of gates is no loop.
var pseudonym = "sallyport-" + strings.TrimSuffix(newPrefix(), "-")

// viaFields are the values of Via for what arrived as HTTP/1.0, HTTP/1.1 and HTTP/2.
// They are full: what is appended to them goes elsewhere.
var viaFields = [3][1]string{{"1.0 " + pseudonym}, {"1.1 " + pseudonym}, {"2.0 " + pseudonym}}

// addVia adds Via to what arrived as HTTP/major.minor.
func addVia(h http.Header, major, minor int) {
	field := viaFields[min(max(minor, 0), 1)][:]
	if major == 2 {
		field = viaFields[2][:]
	}
	if vs := h["Via"]; len(vs) > 0 {
		field = append(slices.Clip(vs), field...)
	}
	h["Via"] = field
}

// extendVia returns the value of Via for a request that this process makes of one
// whose Via is via.
func extendVia(via string) string {
	if via == "" {
		return viaFields[1][0]
	}
	return via + ", " + viaFields[1][0]
}

var errLooped = errors.New("the Via field says that it has been through this proxy")

// hasLooped reports whether a request has been through this process before.
func hasLooped(h http.Header) bool {
	for _, v := range h["Via"] {
		if strings.Contains(v, pseudonym) {
			return true
		}
	}
	return false
}

// loopedBack is the refusal of a request that has been through this process.
func loopedBack(d policy.Decision) *refusal {
	r := looped(d)
	r.err = errLooped
	return r
}

// errTrace refuses TRACE (RFC 9110, section 9.3.8): its answer repeats the fields of
// the request, and shows to scripts what is kept from them.
var errTrace = &headError{http.StatusNotImplemented, "TRACE is not forwarded"}

// forwardsLeft takes one from Max-Forwards, which counts for OPTIONS alone as TRACE
// goes no further (RFC 9110, section 7.6.2). last says that it has arrived.
func forwardsLeft(r *http.Request) (last bool, err error) {
	vs := r.Header["Max-Forwards"]
	if r.Method != http.MethodOptions || len(vs) == 0 {
		return false, nil
	}
	n, err := strconv.ParseUint(vs[0], 10, 31)
	if err != nil || len(vs) > 1 {
		return false, badHead("Max-Forwards")
	}
	if n > 0 {
		r.Header["Max-Forwards"] = []string{strconv.FormatUint(n-1, 10)}
	}
	return n == 0, nil
}

// methods is what Allow says to OPTIONS with Max-Forwards: 0.
const methods = "CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"

// options answers an OPTIONS request in place of its destination.
func (ex *exchange) options() {
	h := ex.Header()
	h.Set("Allow", methods)
	addVia(h, 1, 1)
	h.Set("Content-Length", "0")
	ex.WriteHeader(http.StatusOK)
}
