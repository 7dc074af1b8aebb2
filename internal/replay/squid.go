package replay

import (
	"bytes"
	"errors"
	"net/url"
	"strconv"
)

var errSquid = errors.New("not a line of Squid's native access.log")

// squidLine reads a line of Squid's native format into rec, as if the gate had
// written it:
//
//	1772597168.324   1234 10.20.1.5 TCP_TUNNEL/200 56789 CONNECT api.example:443 - HIER_DIRECT/203.0.113.7 -
//
// What Squid refused is explicit_deny, for it does not say why. A name whose request
// failed otherwise was let through by its policy.
func squidLine(line []byte, rec *record) error {
	*rec = record{answers: rec.answers[:0], ended: true}
	var f [10][]byte
	n := 0
	for rest := line; len(rest) > 0 && n < len(f); n++ {
		rest = bytes.TrimLeft(rest, " ")
		i := bytes.IndexByte(rest, ' ')
		if i < 0 {
			i = len(rest)
		}
		f[n], rest = rest[:i], rest[i:]
	}
	if n < 9 { // %mt may be missing
		return errSquid
	}
	seconds, ms, ok := bytes.Cut(f[0], []byte{'.'})
	tag, status, ok2 := bytes.Cut(f[3], []byte{'/'})
	hier, dst, ok3 := bytes.Cut(f[8], []byte{'/'})
	code, err := strconv.ParseUint(string(status), 10, 16)
	elapsed, eerr := strconv.ParseInt(string(f[1]), 10, 64)
	if !ok || !ok2 || !ok3 || err != nil || eerr != nil || len(ms) != 3 || len(seconds) == 0 || len(seconds) > 11 {
		return errSquid
	}
	rec.time, rec.src, rec.status, rec.millis = f[0], f[2], uint16(code), uint64(max(elapsed, 0))
	if user, err := url.PathUnescape(string(f[7])); err == nil && user != "-" {
		rec.user = bytes.ReplaceAll([]byte(user), []byte(`\\`), []byte(`\`))
	}
	direct := bytes.HasSuffix(hier, []byte("DIRECT"))
	switch {
	case direct && len(dst) > 0 && dst[0] != '-':
		rec.dst = dst
	case !direct && len(dst) > 0 && dst[0] != '-':
		rec.parent = dst
	}
	rec.verdict, rec.reason = []byte("allow"), []byte("matched")
	switch {
	case code == 407:
		rec.verdict, rec.reason = []byte("deny"), []byte("auth_required")
	case bytes.HasPrefix(tag, []byte("TCP_DENIED")):
		rec.verdict, rec.reason = []byte("deny"), []byte("explicit_deny")
	case bytes.HasPrefix(tag, []byte("NONE")) && code == 400, bytes.HasPrefix(f[6], []byte("error:")):
		rec.verdict, rec.reason = []byte("deny"), []byte("bad_request")
	}
	return squidTarget(f[5], f[6], rec)
}

// squidTarget reads what was asked for. Of https:// URLs, which Squid logs where it
// looks inside, the host and port count.
func squidTarget(method, target []byte, rec *record) error {
	authority, port := target, uint64(0)
	rec.event = []byte("connect")
	if string(method) != "CONNECT" {
		scheme, rest, ok := bytes.Cut(target, []byte("://"))
		switch {
		case !ok:
			return nil // error:invalid-request and the like: there is no name
		case string(scheme) == "http":
			rec.event, port = []byte("http"), 80
		case string(scheme) == "https":
			port = 443
		default:
			rec.event = append([]byte(nil), scheme...)
			return nil
		}
		if i := bytes.IndexAny(rest, "/?#"); i >= 0 {
			rest = rest[:i]
		}
		authority = rest
	}
	host := authority
	if i := bytes.LastIndexByte(authority, ':'); i > bytes.LastIndexByte(authority, ']') {
		n, err := strconv.ParseUint(string(authority[i+1:]), 10, 16)
		if err != nil {
			return errSquid
		}
		host, port = authority[:i], n
	}
	if len(host) > 1 && host[0] == '[' && host[len(host)-1] == ']' {
		host = host[1 : len(host)-1]
	}
	rec.name, rec.port = host, uint16(port)
	return nil
}
