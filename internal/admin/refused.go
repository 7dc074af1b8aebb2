package admin

import (
	"log"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// Why requests are turned away before they are looked at.
const (
	refusedNone        = iota // no credential; a browser asks like that first
	refusedToken              // a token that is wrong, or no longer right
	refusedCertificate        // a certificate that is not an operator's
	refusedHandshake          // TLS that came to nothing for another reason
	refusedHost               // for another host: DNS rebinding, or admin.hosts is not complete
	refusedOrigin             // from a page of another origin, or as one could
	refusedMany               // connections beyond the share of one source
	refusals
)

var refusalNames = [refusals]string{"no_credential", "wrong_token", "wrong_certificate", "handshake", "other_host", "other_origin", "too_many"}

// sayEvery is how often a kind of refusal is logged.
const sayEvery = 10 * time.Second

// A refusal counts requests that were turned away for one reason.
type refusal struct {
	count, held atomic.Uint64 // held: since one was logged
	said        atomic.Int64  // Unix nanoseconds; 0: never
}

// Refused returns how many requests were turned away since the start, by why: a closed set.
func (s *Server) Refused() map[string]uint64 {
	counts := map[string]uint64{}
	for i, name := range refusalNames {
		counts[name] = s.refused[i].count.Load()
	}
	return counts
}

// refuse counts a request that is turned away, and logs one of its kind every
// sayEvery. What is no sign of anybody's mistake is counted alone.
func (s *Server) refuse(why int, from, text string) {
	r := &s.refused[why]
	r.count.Add(1)
	if why == refusedNone || why == refusedHandshake {
		return
	}
	now, last := time.Now().UnixNano(), r.said.Load()
	if last != 0 && now-last < int64(sayEvery) || !r.said.CompareAndSwap(last, now) {
		r.held.Add(1)
		return
	}
	s.logger.Warn().Str("listener", "admin").Str("src", from).Str("reason", refusalNames[why]).Uint64("more", r.held.Swap(0)).
		Str("error", clip(text)).Msg("a request to the admin listener was refused; said every 10 s at most")
}

// unproved says what is wrong with the credential of r, which does not allow it.
func (c *credentials) unproved(r *http.Request) int {
	switch {
	case c.hasToken && r.Header.Get("Authorization") != "":
		return refusedToken
	case r.TLS != nil && len(r.TLS.PeerCertificates) > 0:
		return refusedCertificate
	}
	return refusedNone
}

// An errorLog takes what net/http has to say.
type errorLog struct{ s *Server }

// newErrorLog returns what http.Server.ErrorLog wants.
func newErrorLog(s *Server) *log.Logger { return log.New(errorLog{s}, "", 0) }

// Write implements io.Writer. A handshake that the client ended is the client's affair.
func (l errorLog) Write(p []byte) (int, error) {
	text := strings.TrimSpace(string(p))
	rest, ok := strings.CutPrefix(text, "http: TLS handshake error from ")
	if !ok {
		l.s.logger.Error().Str("listener", "admin").Msg(text)
		return len(p), nil
	}
	from, text, _ := strings.Cut(rest, ": ")
	why := refusedHandshake
	if strings.Contains(text, "certificate") && !strings.Contains(text, "remote error") {
		why = refusedCertificate
	}
	l.s.refuse(why, from, text)
	return len(p), nil
}
