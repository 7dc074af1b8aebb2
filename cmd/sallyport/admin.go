package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"sallyport/internal/admin"
	"sallyport/internal/config"
	"sallyport/internal/eventlog"
	"sallyport/internal/live"
	"sallyport/policy"
	"sallyport/policy/event"
)

const (
	minToken = 16      // bytes: shorter ones can be guessed
	maxToken = 4 << 10 // bytes
	maxAsked = 8       // reloads that wait for the one under way
	others   = 0o007   // permissions of a token's file that are worth a warning
)

// An adminState is what the admin API needs of a running gate.
type adminState struct {
	started  time.Time
	ring     *live.Ring
	tally    *live.Tally
	sampler  *admin.Sampler
	policy   policyView
	sum      [sha256.Size]byte         // of the credentials in force
	asked    chan chan<- admin.Outcome // reloads asked for
	stopping chan struct{}             // drain and stop
}

// newAdmin makes g.admin. Nobody observes for it unless it listens.
func (g *gate) newAdmin() (warnings []*policy.Error, err error) {
	s := g.settings.Admin
	credentials, sum, warnings, err := loadAdmin(s)
	if err != nil {
		return nil, err
	}
	a := &g.adminState
	a.started, a.sum = time.Now(), sum
	a.asked, a.stopping = make(chan chan<- admin.Outcome, maxAsked), make(chan struct{}, 1)
	v, _ := build()
	c := admin.Config{
		Listen: s.Listen, Hosts: s.Hosts, OpenMetrics: s.OpenMetrics, Credentials: credentials,
		Status: g.readiness, Metrics: g.metrics.Handler(), PAC: g.proxy.PACHandler(),
		API: admin.API{
			Version: v, Node: g.settings.Node, Started: a.started, LogDropped: g.log.Dropped,
			TunnelCount: func() int { return g.proxy.Stats().Tunnels },
			Policy:      g.policyDetail, Explain: g.explain,
			Tunnels: g.liveTunnels, CloseTunnel: g.closeTunnel,
			Reload: g.reloadNow, Drain: g.drainNow,
		},
	}
	if a.ring != nil {
		a.tally, a.sampler = live.NewTally(a.ring), admin.NewSampler(g.counts)
		c.API.Recent, c.API.Follow, c.API.Top, c.API.Series = a.ring.Recent, a.ring.Follow, a.tally.Top, a.sampler.Series
	}
	g.offerDiscovery(&c.API)
	c.Logger = g.logger
	g.admin = admin.New(withPages(c))
	if s.Listen != "" {
		g.metrics.ObserveAdmin(g.admin.Refused)
	}
	return warnings, nil
}

// maxQueriesShown is how many queries of a second the live view has. Its ring holds
// fewer, and nobody reads as fast.
const maxQueriesShown = 10_000

// observers returns who is told of connections and who of queries. The live view sees
// the queries that log.dns names, also where the format of the log has no lines for
// them: there all of them would be work for nothing, and a sample does.
func (g *gate) observers() (connections, queries event.Observer) {
	isJSON := g.settings.Log.Format == string(eventlog.JSON)
	var ring, some event.Observers
	if g.settings.Admin.Listen != "" {
		g.adminState.ring = live.NewRing()
		ring = event.Observers{g.adminState.ring}
		some = event.Observers{&atMost{most: maxQueriesShown, to: g.adminState.ring}}
	}
	connections = append(event.Observers{g.metrics, g.log}, ring...)
	switch {
	case isJSON:
		queries = append(event.Observers{g.log}, some...)
	case len(some) > 0:
		queries = some
	}
	return connections, queries
}

// loadAdmin reads the files of the admin server's credentials. sum tells their
// contents apart. Its error is a policy.Errors.
func loadAdmin(s config.Admin) (c admin.Credentials, sum [sha256.Size]byte, warnings []*policy.Error, err error) {
	if s.Listen == "" {
		return c, sum, nil, nil
	}
	var mistakes policy.Errors
	h := sha256.New()
	wrong := func(path, file string, err error) {
		if pe, ok := errors.AsType[*os.PathError](err); ok { // the position names the file already
			err = pe.Err
		}
		mistakes = append(mistakes, &policy.Error{Pos: policy.Pos{File: file}, Path: path, Err: err})
	}
	read := func(path, file string, limit int64) []byte {
		if file == "" {
			return nil
		}
		data, err := readBounded(file, limit)
		if err == nil && int64(len(data)) > limit {
			err = fmt.Errorf("larger than %d bytes", limit)
		}
		if err != nil {
			wrong(path, file, err)
		}
		fmt.Fprintln(h, path, len(data))
		h.Write(data)
		return data
	}
	if err := s.Exposed(); err != nil { // the address may come from elsewhere than the settings
		wrong("admin.listen", "", err)
	}
	if data := read("admin.token_file", s.TokenFile, maxToken); s.TokenFile != "" && len(mistakes) == 0 {
		line, _, _ := strings.Cut(string(data), "\n")
		if c.Token = strings.TrimSpace(line); len(c.Token) < minToken || strings.ContainsFunc(c.Token, func(r rune) bool { return r <= ' ' || r > '~' }) {
			wrong("admin.token_file", s.TokenFile, fmt.Errorf("its first line is no token: write at least %d printable ASCII characters without spaces, such as openssl rand -hex 32 prints", minToken))
		}
		if info, err := os.Stat(s.TokenFile); err == nil && info.Mode()&others != 0 {
			warnings = append(warnings, &policy.Error{Pos: policy.Pos{File: s.TokenFile}, Path: "admin.token_file",
				Err: fmt.Errorf("every user of this machine can read or write it (%04o); take that away: chmod o= %s", info.Mode().Perm(), s.TokenFile)})
		}
	}
	cert, key := read("admin.tls.certificate", s.TLS.Certificate, maxPEM), read("admin.tls.key", s.TLS.Key, maxPEM)
	authorities := read("admin.tls.client_ca", s.TLS.ClientCA, maxPEM)
	if len(mistakes) > 0 {
		return admin.Credentials{}, sum, warnings, mistakes
	}
	switch {
	case s.TLS.Certificate != "" && s.TLS.Key != "":
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			wrong("admin.tls.certificate", s.TLS.Certificate, fmt.Errorf("with the key %s: %w; write a PEM certificate with its chain, and its own key", s.TLS.Key, err))
		}
		c.Certificate = &pair
	case s.TLS != config.AdminTLS{}:
		wrong("admin.tls", "", errors.New("TLS needs a certificate and its key; write admin.tls.certificate and admin.tls.key, or leave admin.tls out"))
	}
	if s.TLS.ClientCA != "" {
		if c.ClientCAs = x509.NewCertPool(); !c.ClientCAs.AppendCertsFromPEM(authorities) {
			wrong("admin.tls.client_ca", s.TLS.ClientCA, errors.New("holds no certificate; write the authorities in PEM"))
		}
	}
	if len(mistakes) > 0 {
		return admin.Credentials{}, sum, warnings, mistakes
	}
	if s.InClear() {
		warnings = append(warnings, &policy.Error{Path: "admin.listen",
			Err: fmt.Errorf("the token crosses the network to %s unencrypted; write admin.tls.certificate and admin.tls.key, or keep it on loopback", s.Listen)})
	}
	h.Sum(sum[:0])
	return c, sum, warnings, nil
}

// addAdmin checks the files of the admin server's credentials.
func (r *checkReport) addAdmin(s config.Admin) {
	_, _, warnings, err := loadAdmin(s)
	for _, w := range warnings {
		if w.Pos.File == "" {
			w.Pos.File = r.settings
		}
	}
	r.warnings = append(r.warnings, warnings...)
	r.addMistakes(err)
}

// adminFiles returns the files of the admin server's credentials.
func (g *gate) adminFiles() (files []string) {
	s := g.settings.Admin
	for _, f := range []string{s.TokenFile, s.TLS.Certificate, s.TLS.Key, s.TLS.ClientCA} {
		if f != "" && s.Listen != "" {
			files = append(files, f)
		}
	}
	return files
}

// reloadAdmin puts the credentials of the admin server in force as the files have
// them now.
func (g *gate) reloadAdmin() error {
	c, sum, _, err := loadAdmin(g.settings.Admin)
	if err != nil || sum == g.adminState.sum {
		return err
	}
	g.adminState.sum = sum
	g.admin.SetCredentials(c)
	g.logger.Info().Msg("credentials of the admin server reloaded")
	return nil
}

// reloadNow answers a request for a reload.
func (g *gate) reloadNow(ctx context.Context, by string) (admin.Outcome, error) {
	g.logger.Info().Str("by", by).Msg("a reload was asked for over the admin API")
	before := g.store.Revision()
	done := make(chan admin.Outcome, 1)
	g.status.mu.Lock()
	draining := g.status.draining
	g.status.mu.Unlock()
	if draining {
		return admin.Outcome{}, fmt.Errorf("%w: the gate is stopping", admin.ErrUnavailable)
	}
	select {
	case g.adminState.asked <- done:
	default:
		return admin.Outcome{}, fmt.Errorf("%w: %d reloads wait already", admin.ErrUnavailable, maxAsked)
	}
	select {
	case o := <-done:
		o.Changed = o.Revision != before
		return o, nil
	case <-ctx.Done():
		return admin.Outcome{Revision: g.store.Revision(), At: time.Now().UTC()}, ctx.Err()
	}
}

// reloadOutcome tells who asked for a reload how it went.
func reloadOutcome(revision string, err error, at time.Time) admin.Outcome {
	o := admin.Outcome{OK: err == nil, Revision: revision, At: at.UTC()}
	if err != nil {
		o.Errors = strings.Split(err.Error(), "\n")
	}
	return o
}

// drainNow answers a request to stop.
func (g *gate) drainNow(by string) {
	g.logger.Warn().Str("by", by).Msg("the admin API was asked to drain and stop")
	request(g.adminState.stopping)
}

// explain answers as "sallyport explain --json" does.
func (g *gate) explain(x admin.ExplainQuery) ([]byte, error) {
	q := question{target: x.Target, source: x.Source, user: x.User, sni: x.SNI, dns: x.DNS, destination: x.Destination, at: x.At}
	r, err := q.request(time.Now())
	if err != nil {
		if e, ok := errors.AsType[*fieldError](err); ok {
			err = fmt.Errorf("%s: %w", e.field, e)
		}
		return nil, fmt.Errorf("%w: %w", admin.ErrBadRequest, err)
	}
	p := g.store.Policy()
	if p == nil {
		return nil, fmt.Errorf("%w: no policy is in force", admin.ErrUnavailable)
	}
	r.PrivateZone = g.resolver.PrivateZone(r.Name, r.Destination)
	var b bytes.Buffer
	err = writeExplanationJSON(&b, q, p.Explain(r))
	return b.Bytes(), err
}

func (g *gate) liveTunnels(limit int) ([]admin.Tunnel, int) {
	all, n := g.proxy.LiveTunnels(limit)
	out := make([]admin.Tunnel, len(all))
	for i, t := range all {
		out[i] = admin.Tunnel{
			ID: t.ID, Src: t.Source.Addr().String(), Group: t.Group, User: t.User, Name: t.Name, Port: t.Port, Rule: t.Rule,
			Since: t.Since.UTC(), BytesUp: t.BytesUp, BytesDown: t.BytesDown,
		}
		if t.Destination.IsValid() {
			out[i].Dst = t.Destination.Addr().String()
		}
	}
	return out, n
}

func (g *gate) closeTunnel(id, by string) bool {
	found := g.proxy.CloseTunnel(id)
	if found {
		g.logger.Info().Str("id", id).Str("by", by).Msg("a tunnel was closed over the admin API")
	}
	return found
}

// counts are what the series of the admin API are made of.
func (g *gate) counts() admin.Counts {
	connections, queries := g.metrics.Totals()
	st := g.proxy.Stats()
	return admin.Counts{
		Decisions: admin.VerdictCounts(connections), DNSQueries: admin.VerdictCounts(queries),
		BytesUp: st.BytesUp, BytesDown: st.BytesDown, Tunnels: st.Tunnels,
	}
}
