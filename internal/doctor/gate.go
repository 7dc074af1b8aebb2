package doctor

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"sallyport/policy"
)

// maxSkew is by how much clocks may differ before certificates and expiry dates are
// in doubt.
const maxSkew = 2 * time.Minute

// gate returns what there is to ask of the proxy.
func (c *Config) gate(proxy *url.URL) []job {
	if proxy == nil {
		return []job{result(problem("proxy", "there is no proxy to look at", "name one with --proxy, or set https_proxy"))}
	}
	g := gate{proxy}
	jobs := []job{g.denied}
	if c.Allowed == "" {
		return append(jobs, result(skipped("allowed", "no name that should pass was given (--allowed)")))
	}
	return append(jobs, g.allowed)
}

func result(r Result) job { return func(context.Context, *Config) []Result { return []Result{r} } }

// gate is the proxy to ask.
type gate struct{ url *url.URL }

// dial connects to the proxy, with TLS if its URL says so.
func (g gate) dial(ctx context.Context, c *Config) (net.Conn, error) {
	d := net.Dialer{Timeout: c.Timeout}
	conn, err := d.DialContext(ctx, "tcp", g.url.Host)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	if g.url.Scheme != "https" {
		return conn, nil
	}
	secure := tls.Client(conn, &tls.Config{ServerName: g.url.Hostname(), RootCAs: c.Roots, Time: c.Now})
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return secure, nil
}

// connect asks for target. The connection is a tunnel if the answer is 200.
func (g gate) connect(ctx context.Context, c *Config, target string) (net.Conn, *bufio.Reader, *http.Response, error) {
	conn, err := g.dial(ctx, c)
	if err != nil {
		return nil, nil, nil, err
	}
	head := "CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\nUser-Agent: sallyport-doctor\r\n"
	if u := g.url.User; u != nil {
		password, _ := u.Password()
		head += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password)) + "\r\n"
	}
	r := bufio.NewReader(conn)
	if _, err = conn.Write([]byte(head + "\r\n")); err == nil {
		var resp *http.Response
		if resp, err = http.ReadResponse(r, &http.Request{Method: http.MethodConnect}); err == nil {
			return conn, r, resp, nil
		}
	}
	conn.Close()
	return nil, nil, nil, err
}

// unreachable says why there was no answer from the proxy.
func (g gate) unreachable(err error) Result {
	where := g.url.Redacted()
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return problem("proxy", where+" speaks no TLS", "write http:// instead of https://: what is inside the tunnel is encrypted all the same")
	}
	if authority, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return problem("proxy", where+" has a certificate of an authority that is not trusted here: "+authority.Error(), "add its authority to this machine's, or name it with --ca")
	}
	if invalid, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return problem("proxy", where+" has a certificate that is no good: "+invalid.Error(), "dial it by a name in the certificate; look at the clock, and at when the certificate ends")
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return problem("proxy", where+" does not resolve: "+dns.Error(), "use its address, or a record (dns.records) of the gate's resolver")
	}
	return problem("proxy", where+" cannot be reached: "+err.Error(), "is sallyport running (/healthz), does it listen there (proxy.listen), is the way to it open?")
}

// denied asks for what the policy does not allow. From how that is refused much can
// be told.
func (g gate) denied(ctx context.Context, c *Config) (found []Result) {
	if c.Denied == "" {
		return []Result{skipped("denied", "no name that should be refused was given (--denied)")}
	}
	target := net.JoinHostPort(c.Denied, "443")
	conn, _, resp, err := g.connect(ctx, c, target)
	if err != nil {
		return []Result{g.unreachable(err)}
	}
	defer conn.Close()
	reason := resp.Header.Get("X-Sallyport-Reason")
	_, known := policy.ParseReason(reason)
	said := fmt.Sprintf("%s says %d to CONNECT %s", g.url.Redacted(), resp.StatusCode, target)
	switch {
	case resp.StatusCode == http.StatusBadRequest && g.url.Scheme == "http" && reason == "bad_request":
		return []Result{problem("proxy", said+": it may be a TLS port", "write https:// before its host, or dial proxy.listen")}
	case resp.StatusCode == http.StatusOK:
		found = append(found, problem("denied", said+": a name that should be refused passes", "is this the gate? does the policy allow everything? sallyport explain tells"))
	case !known:
		found = append(found, problem("proxy", said+", and not as sallyport does: something else answers", "correct the address of the proxy"))
	default:
		found = append(found, ok("proxy", g.url.Redacted()+" is a sallyport"), reasonOf(said, reason))
	}
	return append(found, clock(c, resp.Header.Get("Date")))
}

// reasonOf says what the reason of a refusal tells.
func reasonOf(said, reason string) Result {
	said += ", " + show(reason)
	switch reason {
	case "unmatched_source":
		return problem("denied", said+": no group of the policy has this machine", "add its network to a group; if the gate sees another address, NAT is between")
	case "auth_required", "auth_failed":
		return problem("denied", said+": the gate wants credentials that are right", "put user:password@ before the host in the proxy's URL")
	case "limit_exceeded":
		return problem("denied", said+": too many connections, or it is stopping", "try again; look at proxy.limits")
	case "resolve_failed", "connect_failed", "private_destination":
		return problem("denied", said+": the name was not refused as such; the group observes, or lists it", "sallyport explain tells; in a group that observes this is as it should be")
	}
	return ok("denied", said)
}

// clock compares the time of this machine with the gate's.
func clock(c *Config, date string) Result {
	there, err := http.ParseTime(date)
	if err != nil {
		return skipped("clock", "the proxy does not say what time it is")
	}
	if skew := c.Now().Sub(there).Round(time.Second); skew.Abs() > maxSkew {
		return problem("clock", fmt.Sprintf("this machine's clock differs by %s from the gate's", skew), "set both by NTP: certificates and expiry dates depend on it")
	}
	return ok("clock", "the clock agrees with the gate's")
}

// allowed asks for what the policy allows, and speaks TLS through the tunnel: its
// certificate is verified as programs here do.
func (g gate) allowed(ctx context.Context, c *Config) []Result {
	conn, r, resp, err := g.connect(ctx, c, c.Allowed)
	if err != nil {
		return []Result{skipped("allowed", "the proxy does not answer")}
	}
	defer conn.Close()
	said := fmt.Sprintf("%s says %d to CONNECT %s", g.url.Redacted(), resp.StatusCode, c.Allowed)
	if resp.StatusCode != http.StatusOK {
		reason := resp.Header.Get("X-Sallyport-Reason")
		return []Result{problem("allowed", said+", "+show(reason), "sallyport explain --source <this machine> "+c.Allowed+" on the gate tells why")}
	}
	name, port, err := net.SplitHostPort(c.Allowed)
	if err != nil || port != "443" {
		return []Result{ok("allowed", said)}
	}
	secure := tls.Client(early{conn, r}, &tls.Config{ServerName: name, RootCAs: c.Roots, Time: c.Now})
	err = secure.HandshakeContext(ctx)
	if op, is := errors.AsType[*net.OpError](err); is && op.Op == "remote error" {
		return []Result{ok("allowed", said), problem("tls", "the tunnel to "+c.Allowed+" is broken off: "+op.Err.Error(), "the log of the gate tells why: a rule about TLS, or the destination")}
	}
	if invalid, is := errors.AsType[*tls.CertificateVerificationError](err); is {
		return []Result{ok("allowed", said), problem("tls", "the certificate of "+c.Allowed+" is not trusted here: "+invalid.Error(),
			"install the system's certificate authorities (ca-certificates); look at the clock. sallyport opens no TLS: if an unknown authority signed it, something else between does")}
	}
	if err != nil {
		return []Result{ok("allowed", said), problem("tls", "no TLS with "+c.Allowed+": "+err.Error(), "the log of the gate tells more")}
	}
	return []Result{ok("allowed", said), ok("tls", "the certificate of "+c.Allowed+" is trusted here")}
}

// early is a connection of which r has read ahead.
type early struct {
	net.Conn
	r *bufio.Reader
}

func (e early) Read(p []byte) (int, error) { return e.r.Read(p) }
