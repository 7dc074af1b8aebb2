package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

const (
	maxAdminAnswer  = 16 << 20 // bytes of one answer
	adminPatience   = 5 * time.Second
	defaultAdminURL = "http://127.0.0.1:9128"
)

// adminFlags say how a command reaches the admin API of a gate.
type adminFlags struct{ url, tokenFile, ca, cert, key string }

func (a *adminFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&a.url, "admin", defaultAdminURL, "URL of the gate's admin listener")
	f.StringVar(&a.tokenFile, "token-file", "", "file whose first line is the token of the admin API")
	f.StringVar(&a.ca, "cacert", "", "PEM file of the authority of the admin listener's certificate; default: the system's")
	f.StringVar(&a.cert, "cert", "", "PEM file of a client certificate")
	f.StringVar(&a.key, "key", "", "PEM file of its key")
}

// An adminClient asks the admin API of a gate.
type adminClient struct {
	base  *url.URL
	token string
	http  *http.Client
}

// client returns what asks as the flags say.
func (a *adminFlags) client() (*adminClient, error) {
	u, err := url.Parse(a.url)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("--admin %q: write a URL such as %s", a.url, defaultAdminURL)
	}
	c := &adminClient{base: u}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if a.tokenFile != "" {
		data, err := readBounded(a.tokenFile, maxToken)
		if err != nil {
			return nil, fmt.Errorf("--token-file: %w", err)
		}
		line, _, _ := strings.Cut(string(data), "\n")
		c.token = strings.TrimSpace(line)
	}
	if a.ca != "" {
		data, err := readBounded(a.ca, maxPEM)
		if err != nil {
			return nil, fmt.Errorf("--cacert: %w", err)
		}
		if config.RootCAs = x509.NewCertPool(); !config.RootCAs.AppendCertsFromPEM(data) {
			return nil, fmt.Errorf("--cacert %s: holds no certificate", a.ca)
		}
	}
	if a.cert != "" || a.key != "" {
		pair, err := tls.LoadX509KeyPair(a.cert, a.key)
		if err != nil {
			return nil, fmt.Errorf("--cert, --key: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	c.http = &http.Client{
		// No proxy: that of the environment may be the very gate.
		Transport: &http.Transport{TLSClientConfig: config, MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Minute},
		Timeout:   adminPatience,
		// The token is for this server alone.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// close gives connections back.
func (c *adminClient) close() { c.http.CloseIdleConnections() }

// ask returns what the API answers at path, such as top?by=name, if that is a 200. The
// caller closes the body. at is the whole address, for errors.
func (c *adminClient) ask(ctx context.Context, path string) (resp *http.Response, at *url.URL, err error) {
	if at, err = c.base.Parse("/api/v1/" + path); err != nil {
		return nil, nil, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, nil, err
	}
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	if resp, err = c.http.Do(r); err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, nil, fmt.Errorf("%s: %s: %s", at, resp.Status, problemOf(resp.Header.Get("Content-Type"), io.LimitReader(resp.Body, maxAdminAnswer)))
	}
	return resp, at, nil
}

// get reads what the API answers at path into v.
func (c *adminClient) get(ctx context.Context, path string, v any) error {
	resp, at, err := c.ask(ctx, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return fmt.Errorf("%s does not answer as sallyport's admin API does", at)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAdminAnswer)).Decode(v); err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	return nil
}

// errNoProblem is what is said of an error that is no problem document.
var errNoProblem = errors.New("is this sallyport's admin listener?")

// problemOf returns what an answer says went wrong.
func problemOf(kind string, body io.Reader) string {
	var p struct{ Detail string }
	if kind != "application/problem+json" || json.NewDecoder(body).Decode(&p) != nil {
		return errNoProblem.Error()
	}
	return p.Detail
}
