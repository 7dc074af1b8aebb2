package proxy

import (
	"cmp"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"sallyport/policy"
	"sallyport/proxy/htpasswd"
)

// Auth says how clients prove with Basic credentials who they are. The zero value
// looks at no credentials. They are forwarded to nobody either way.
type Auth struct {
	Users    *htpasswd.File // nil: credentials are not looked at
	Realm    string         // shown to people who are asked for a password; "": sallyport. ASCII without quotes and backslashes
	Required bool           // nobody passes without credentials or a client certificate

	// HasUsers reports whether the policy lists users, so that a source that no
	// group has may still be let pass by its credentials. nil: it never does.
	HasUsers func() bool
}

const (
	defaultRealm = "sallyport"

	maxCredentials = 1024 // bytes of a Proxy-Authorization field
	maxVerified    = 8192 // credentials known to be right
	maxWaiting     = 256  // requests that wait for a verification
	verifyPatience = 10 * time.Second

	// What one source may guess: so many at once, and then one in attemptEvery.
	maxAttempts       = 32
	attemptEvery      = 6 * time.Second
	maxAttemptSources = 4096 // sources whose attempts are counted
)

// maxVerifying bounds how many passwords are hashed at a time, so that guessing
// leaves processors for everything else.
var maxVerifying = max(1, runtime.GOMAXPROCS(0)/2)

// credentials verifies users and passwords. Those that were right are known from
// then on, under a keyed hash: only the first request of a client costs time.
type credentials struct {
	challenge string // value of Proxy-Authenticate (RFC 7617, sections 2 and 2.1)

	book atomic.Pointer[book] // nil: no users are known
	key  [sha256.Size]byte    // of digests; never leaves the process

	verifying chan struct{} // holds a place for each verification
	waiting   atomic.Int32
	attempts  attempts
}

// A book is the users of one file, and which credentials were right. What was
// verified against one file says nothing about the next.
type book struct {
	file *htpasswd.File

	mu       sync.Mutex // guards what follows
	verified map[digest]struct{}
	flights  map[digest]*flight
}

// digest stands for a user and a password.
type digest [sha256.Size]byte

// flight is a verification under way, which everybody with the same credentials
// waits for.
type flight struct {
	done chan struct{}
	err  error // set before done is closed
}

var (
	errTooManyAttempts = errors.New("too many wrong credentials from this source")
	errBusyVerifying   = errors.New("too many credentials to verify at a time")
	errNoBasic         = errors.New("not Basic credentials, or malformed ones")
	errWrongPassword   = errors.New("unknown user or wrong password")
)

func (c *credentials) init(a Auth) {
	c.challenge = `Basic realm="` + cmp.Or(a.Realm, defaultRealm) + `", charset="UTF-8"`
	rand.Read(c.key[:])
	c.verifying = make(chan struct{}, maxVerifying)
	c.attempts.m = make(map[netip.Addr]attempt)
	if a.Users != nil {
		c.set(a.Users)
	}
}

func (c *credentials) set(f *htpasswd.File) {
	c.book.Store(&book{file: f, verified: make(map[digest]struct{}), flights: make(map[digest]*flight)})
}

// enabled reports whether credentials are looked at.
func (c *credentials) enabled() bool { return c.book.Load() != nil }

// verify returns nil if password is user's, and hash, which changes with it. stop
// ends a wait.
func (c *credentials) verify(source netip.Addr, user, password string, stop <-chan struct{}) (hash string, err error) {
	b := c.book.Load()
	d := c.digest(user, password)
	f, first := b.enter(d)
	switch {
	case f == nil:
	case first:
		f.err = c.try(b.file, source, user, password, stop)
		b.leave(d, f)
		err = f.err
	default:
		<-f.done // which is bounded as the flight is
		err = f.err
	}
	return b.file.Hash(user), err
}

// digest hides a user and a password from whoever reads this process's memory
// later, and from timing.
func (c *credentials) digest(user, password string) (d digest) {
	h := hmac.New(sha256.New, c.key[:])
	h.Write([]byte(user))
	h.Write([]byte{':'}) // which no name has
	h.Write([]byte(password))
	h.Sum(d[:0])
	return d
}

// enter returns nil if d is known to be right, else the flight for it and whether
// the caller is to fly it.
func (b *book) enter(d digest) (f *flight, first bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.verified[d]; ok {
		return nil, false
	}
	if f = b.flights[d]; f == nil {
		f, first = &flight{done: make(chan struct{})}, true
		b.flights[d] = f
	}
	return f, first
}

// leave ends a flight.
func (b *book) leave(d digest, f *flight) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.flights, d)
	if f.err == nil {
		for old := range b.verified {
			if len(b.verified) < maxVerified {
				break
			}
			delete(b.verified, old) // any of them: it is verified again when it comes again
		}
		b.verified[d] = struct{}{}
	}
	close(f.done)
}

// try spends one of the source's attempts, which is given back unless it was wrong,
// and a processor for a while.
func (c *credentials) try(f *htpasswd.File, source netip.Addr, user, password string, stop <-chan struct{}) error {
	from := limitKey(source)
	if !c.attempts.take(from, time.Now()) {
		return errTooManyAttempts
	}
	if err := c.await(stop); err != nil {
		c.attempts.giveBack(from)
		return err
	}
	ok := f.Verify(user, password)
	<-c.verifying
	if !ok {
		return errWrongPassword
	}
	c.attempts.giveBack(from)
	return nil
}

// await takes a place among the verifications.
func (c *credentials) await(stop <-chan struct{}) error {
	select {
	case c.verifying <- struct{}{}:
		return nil
	default:
	}
	defer c.waiting.Add(-1)
	if c.waiting.Add(1) > maxWaiting {
		return errBusyVerifying
	}
	timeout := time.NewTimer(verifyPatience)
	defer timeout.Stop()
	select {
	case c.verifying <- struct{}{}:
		return nil
	case <-timeout.C:
	case <-stop:
	}
	return errBusyVerifying
}

// attempts counts wrong credentials by source.
type attempts struct {
	mu sync.Mutex             // guards m
	m  map[netip.Addr]attempt // by limitKey
}

// attempt is what a source has spent. It gets one back in attemptEvery.
type attempt struct {
	spent int
	at    time.Time // when spent was true
}

// take spends an attempt, if there is one.
func (as *attempts) take(from netip.Addr, now time.Time) bool {
	as.mu.Lock()
	defer as.mu.Unlock()
	a := as.m[from].after(now)
	if a.spent >= maxAttempts {
		return false
	}
	if len(as.m) >= maxAttemptSources {
		as.makeRoom(now)
	}
	a.spent++
	as.m[from] = a
	return true
}

// giveBack undoes take.
func (as *attempts) giveBack(from netip.Addr) {
	as.mu.Lock()
	defer as.mu.Unlock()
	a := as.m[from]
	if a.spent--; a.spent <= 0 {
		delete(as.m, from)
	} else {
		as.m[from] = a
	}
}

// makeRoom forgets sources that have nothing spent any more, or else any one.
func (as *attempts) makeRoom(now time.Time) {
	for from, a := range as.m {
		if a.after(now).spent == 0 {
			delete(as.m, from)
		}
	}
	for from := range as.m {
		if len(as.m) < maxAttemptSources {
			return
		}
		delete(as.m, from)
	}
}

// after returns a as it is at now.
func (a attempt) after(now time.Time) attempt {
	if a.spent == 0 {
		return attempt{at: now}
	}
	if back := int(now.Sub(a.at) / attemptEvery); back > 0 {
		a.spent = max(0, a.spent-back)
		a.at = a.at.Add(time.Duration(back) * attemptEvery)
	}
	return a
}

// parseBasic takes a Proxy-Authorization value apart (RFC 7617, section 2).
func parseBasic(value string) (user, password string, ok bool) {
	scheme, token, found := strings.Cut(value, " ")
	if !found || len(value) > maxCredentials || !strings.EqualFold(scheme, "basic") {
		return "", "", false
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(strings.TrimLeft(token, " "))
	if err != nil || !utf8.Valid(raw) {
		return "", "", false
	}
	user, password, ok = strings.Cut(string(raw), ":")
	return user, password, ok && htpasswd.ValidUser(user) && !strings.ContainsFunc(password, unicode.IsControl)
}

// who is whom a client has proved to be, with credentials or a certificate.
type who struct {
	user string // "": nobody
	hash string // of the password, as the file has it; "": a certificate says so
}

// identify finds out who sends a request with so many Proxy-Authorization fields, of
// which value is one. Where a certificate has named a user too, both must name the
// same.
func (s *Server) identify(conn *peer, source netip.Addr, fields int, value string) (who, *refusal) {
	var w who
	if conn != nil {
		w.user = conn.user
	}
	enabled := s.users.enabled()
	switch {
	case (fields == 0 || !enabled) && w.user == "" && s.cfg.Auth.Required:
		return w, authRequired(policy.Decision{})
	case !enabled, fields == 0:
		return w, nil
	}
	user, password, ok := parseBasic(value)
	if fields > 1 || !ok {
		return who{}, authFailed(errNoBasic)
	}
	hash, err := s.users.verify(source, user, password, s.life.Done())
	switch {
	case errors.Is(err, errTooManyAttempts):
		return who{}, limited(policy.Decision{}, http.StatusTooManyRequests, err)
	case errors.Is(err, errBusyVerifying):
		return who{}, limited(policy.Decision{}, http.StatusServiceUnavailable, err)
	case err != nil:
		if hash != "" { // the name is no secret, as it is one; others may be passwords in the wrong place
			err = errors.New("wrong password for user " + user)
		}
		return who{}, authFailed(err)
	case w.user != "" && w.user != user:
		return who{}, authFailed(errors.New("the certificate is of user " + w.user + ", the password of user " + user))
	}
	return who{user, hash}, nil
}

// deniedTo is the refusal of d. It asks for credentials where they could change the
// answer: nobody is known yet, and no group has the source.
func (s *Server) deniedTo(w *who, d policy.Decision) *refusal {
	if d.Reason == policy.ReasonUnmatchedSource && w.user == "" && s.users.enabled() &&
		s.cfg.Auth.HasUsers != nil && s.cfg.Auth.HasUsers() {
		return authRequired(d)
	}
	return denied(d)
}

func authRequired(d policy.Decision) *refusal {
	return &refusal{decision: d.Refuse(policy.ReasonAuthRequired), status: http.StatusProxyAuthRequired, token: statusRequestDenied}
}

func authFailed(err error) *refusal {
	return &refusal{
		decision: policy.Decision{}.Refuse(policy.ReasonAuthFailed),
		status:   http.StatusProxyAuthRequired, token: statusRequestDenied, err: err,
	}
}

// SetUsers puts another file of users in force: credentials are verified anew, and
// tunnels and requests of users whose password has changed or who are no longer
// listed end. It does nothing if the Server was made without users.
func (s *Server) SetUsers(f *htpasswd.File) {
	if !s.users.enabled() || f == nil {
		return
	}
	s.users.set(f)
	s.Recheck()
}

// isStill reports whether the hash of user's password is still hash; "" means that
// there was none.
func (c *credentials) isStill(user, hash string) bool {
	return hash == "" || c.book.Load().file.Hash(user) == hash
}
