package dnsfilter

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/miekg/dns"
)

const (
	maxIdleConns = 8                // to one HTTPS upstream, and TLS sessions remembered of one upstream
	maxDoHHeader = 16 << 10         // bytes of the header of an answer over HTTPS
	pingAfter    = 10 * time.Second // without a frame of an HTTP/2 connection
	pingTimeout  = 3 * time.Second  // for its answer; the connection is closed then
	dohIdle      = 30 * time.Second // before an unused HTTPS connection is closed
)

// errMalformed is an answer to the question asked whose records cannot be read.
var errMalformed = errors.New("malformed answer")

// errOtherQuestion is an answer over HTTPS to another question than the one asked.
var errOtherQuestion = errors.New("the answer does not match the question")

// An exchanger asks one server one question, which has an empty OPT record at its end
// or none. The answer matches the question, and the ID as sent. The context has a
// deadline. close ends what is under way and waits for it.
type exchanger interface {
	exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error)
	close()
}

// A doh asks over HTTPS (RFC 8484).
type doh struct {
	url    string
	client *http.Client
}

// newDoH returns a doh for url. If dial is not "", it is dialled instead of the
// URL's host, whose name the certificate must carry all the same.
func newDoH(url, dial string, config *tls.Config) *doh {
	t := &http.Transport{
		TLSClientConfig:        config,
		ForceAttemptHTTP2:      true,
		MaxConnsPerHost:        maxIdleConns,
		MaxIdleConnsPerHost:    maxIdleConns,
		IdleConnTimeout:        dohIdle,
		MaxResponseHeaderBytes: maxDoHHeader,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
	}
	if dial != "" {
		t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, dial)
		}
	}
	noRedirect := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &doh{url, &http.Client{Transport: t, CheckRedirect: noRedirect}}
}

const dnsMessage = "application/dns-message"

func (d *doh) exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	w, err := newWaiter(query, dress{padded: true})
	if err != nil {
		return nil, err
	}
	// Not freed: the transport may read the body after Do has returned.
	w.packet[0], w.packet[1] = 0, 0 // RFC 8484, section 4.1
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.url, bytes.NewReader(w.packet))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", dnsMessage)
	req.Header.Set("Accept", dnsMessage)
	resp, err := d.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != dnsMessage {
		return nil, fmt.Errorf("%s with content type %q", resp.Status, resp.Header.Get("Content-Type"))
	}
	p, err := io.ReadAll(io.LimitReader(resp.Body, dns.MaxMsgSize+1))
	if err != nil {
		return nil, err
	}
	if len(p) < headerSize || p[0]|p[1] != 0 || !w.answeredBy(p) {
		return nil, errOtherQuestion
	}
	return w.unpack(p)
}

func (d *doh) close() { d.client.CloseIdleConnections() }
