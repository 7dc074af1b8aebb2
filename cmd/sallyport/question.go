package main

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"sallyport/policy"
)

// A question is a request as people write it: on the command line of explain or in
// a test. Empty fields are not known.
type question struct {
	target, source, user, sni, dns, destination, at string
}

// A fieldError is a mistake in one field of a question.
type fieldError struct {
	field string // as explain's flag is called, or target
	value string // what stands there; "" if that is not the point
	err   error
}

func (e *fieldError) Error() string {
	if e.value == "" {
		return e.err.Error()
	}
	return fmt.Sprintf("%q: %v", e.value, e.err)
}

func (e *fieldError) Unwrap() error { return e.err }

// flagError says which flag or argument err is about.
func flagError(err error) error {
	e, ok := errors.AsType[*fieldError](err)
	switch {
	case !ok:
		return err
	case e.field == "target" && e.value == "":
		return fmt.Errorf("target: %w", e.err)
	case e.field == "target":
		return fmt.Errorf("target %w", e)
	case e.value == "":
		return fmt.Errorf("--%s: %w", e.field, e.err)
	}
	return fmt.Errorf("--%s %w", e.field, e)
}

// request turns q into what proxy or resolver would ask. Errors are *fieldErrors.
func (q *question) request(now time.Time) (policy.Request, error) {
	r := policy.Request{User: q.user, Time: now}
	var err error
	if r.Source, err = netip.ParseAddr(q.source); err != nil {
		return r, &fieldError{"source", q.source, errors.New("not an address; write one such as 10.20.1.5")}
	}
	if q.destination != "" {
		if r.Destination, err = netip.ParseAddr(q.destination); err != nil {
			return r, &fieldError{"destination", q.destination, errors.New("not an address")}
		}
	}
	if q.at != "" {
		if r.Time, err = parseTime(q.at); err != nil {
			return r, &fieldError{"at", q.at, err}
		}
	}
	if q.dns != "" {
		return r, q.question(&r)
	}
	return r, q.connection(&r)
}

// parseTime reads a date, which stands for its beginning (UTC), or a time.
func parseTime(s string) (time.Time, error) {
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	return time.Time{}, errors.New("write 2027-01-31 or 2027-01-31T18:00:00Z")
}

// question fills in a question to the resolver.
func (q *question) question(r *policy.Request) (err error) {
	r.Protocol = policy.ProtocolDNS
	var ok bool
	if r.QType, ok = policy.ParseQType(q.dns); !ok {
		return &fieldError{"dns", q.dns, errors.New("not a type of DNS data; write one such as A, HTTPS, TXT or TYPE65400")}
	}
	if q.sni != "" {
		return &fieldError{"sni", "", errors.New("goes with a connection, not with --dns")}
	}
	if r.Name, err = policy.ParseName(q.target); err != nil {
		return &fieldError{"target", "", err}
	}
	return nil
}

// connection fills in a CONNECT or a plain HTTP request.
func (q *question) connection(r *policy.Request) (err error) {
	authority := q.target
	if strings.Contains(authority, "://") {
		u, err := url.Parse(authority)
		if err != nil || u.Scheme != "http" || u.Host == "" {
			return &fieldError{"target", q.target, errors.New("write host:port for what goes through CONNECT, as https does, or http://host/")}
		}
		r.Protocol, authority = policy.ProtocolHTTP, u.Host
		if u.Port() == "" {
			authority += ":80"
		}
	}
	if r.Name, r.Address, r.Port, err = policy.ParseAuthority(authority); err != nil {
		return &fieldError{"target", "", err}
	}
	if r.Address.IsValid() && !r.Destination.IsValid() {
		r.Destination = r.Address
	}
	if q.sni == "" {
		return nil
	}
	r.Protocol = policy.ProtocolTLS
	r.TLS = policy.TLS{Seen: true, MaxVersion: 0x0304}
	if r.TLS.SNI, err = policy.ParseName(q.sni); err != nil {
		return &fieldError{"sni", "", err}
	}
	return nil
}
