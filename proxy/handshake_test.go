package proxy

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"sallyport/policy"
	"sallyport/policy/event"
)

// TestHandshakesThatFail: each is counted under its cause, and those that a
// certificate decides have an event.
func TestHandshakesThatFail(t *testing.T) {
	a, strangers := newSigner(t), newSigner(t)
	shake := func(c *tls.Config) func(net.Conn) {
		return func(raw net.Conn) {
			c.ServerName = "proxy.ok.test"
			client := tls.Client(raw, c)
			client.Handshake()
			client.Read(make([]byte, 1))
		}
	}
	for _, tt := range []struct {
		cause  string
		client func(net.Conn)
		edit   func(*Config)
		reason policy.Reason // of the event; none: there is none
	}{
		{"closed", func(c net.Conn) { c.Close() }, nil, 0},
		{"closed", func(c net.Conn) { c.Write(hello("proxy.ok.test")[:50]); c.Close() }, nil, 0},
		{"timeout", func(c net.Conn) { io.ReadAll(c) }, func(c *Config) { c.Timeouts.RequestHeader = 50 * time.Millisecond }, 0},
		{"not_tls", func(c net.Conn) { io.WriteString(c, "\x00\x00\x00\x00\x00\x00\x00"); io.ReadAll(c) }, nil, 0},
		{"not_tls", func(c net.Conn) { io.WriteString(c, "GET / HTTP/1.1\r\n\r\n"); io.ReadAll(c) }, nil, policy.ReasonBadRequest},
		{"no_client_certificate", shake(&tls.Config{RootCAs: ca().pool}), func(c *Config) { c.TLS.RequireClient = true }, policy.ReasonAuthRequired},
		{"no_client_certificate", shake(&tls.Config{RootCAs: ca().pool, MaxVersion: tls.VersionTLS12}), func(c *Config) { c.TLS.RequireClient = true }, policy.ReasonAuthRequired},
		{"bad_client_certificate", shake(&tls.Config{RootCAs: ca().pool, Certificates: []tls.Certificate{strangers.sign(t, forUser("x"))}}), nil, policy.ReasonAuthFailed},
		{"client_alert", shake(&tls.Config{RootCAs: strangers.pool}), nil, 0},
		{"protocol", shake(&tls.Config{RootCAs: ca().pool, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}), nil, 0},
	} {
		t.Run(tt.cause, func(t *testing.T) {
			g := start(t, doorPolicy(443), withTLS(withClients(a)), func(c *Config) {
				if tt.edit != nil {
					tt.edit(c)
				}
			})
			raw, err := net.Dial("tcp", g.tlsAddr())
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(patience))
			tt.client(raw)
			g.until(func() bool { return g.srv.Stats().Handshakes[tt.cause] == 1 })
			for cause, n := range g.srv.Stats().Handshakes {
				if n != 0 && cause != tt.cause {
					t.Errorf("%d counted as %s", n, cause)
				}
			}
			if tt.reason == policy.ReasonNone {
				return
			}
			if ev := g.next(); ev.Kind != event.HTTP || ev.Listener != "proxy_tls" || ev.Decision.Reason != tt.reason || ev.Error == "" || !ev.Source.IsValid() {
				t.Errorf("%+v", ev)
			}
		})
	}
	if st := start(t, doorPolicy(443)).srv.Stats(); st.Handshakes != nil || !st.CertificateExpiry.IsZero() {
		t.Errorf("without a TLS listener: %+v", st)
	}
	if st := start(t, doorPolicy(443), withTLS()).srv.Stats(); !st.CertificateExpiry.After(time.Now()) {
		t.Errorf("the certificate expires at %v", st.CertificateExpiry)
	}
}
