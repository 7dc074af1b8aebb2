package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"sallyport/internal/config"
	"sallyport/policy"
	"sallyport/proxy"
	"sallyport/proxy/htpasswd"
)

const (
	maxPEM = 1 << 20 // bytes of a certificate's, key's or authorities' file

	// identityPoll is how often the files of users and certificates are looked at.
	identityPoll = 2 * time.Second
)

// loadUsers reads the users, nil if there are none. Its error is a policy.Errors.
func loadUsers(s config.Auth) (*htpasswd.File, error) {
	if s.Htpasswd == "" {
		return nil, nil //nolint:nilnil // no file is a legal setting
	}
	return htpasswd.Load(s.Htpasswd)
}

// certificates are the files of proxy.tls as they were read.
type certificates struct {
	proxy.TLSIdentity
	sum     [sha256.Size]byte // of all files
	leaf    *x509.Certificate // nil: no certificate is set
	section string            // of the settings: proxy.tls or dns.tls
}

// loadCertificates reads the certificates that a section of the settings names. Its
// error is a policy.Errors.
func loadCertificates(section string, s config.TLS) (c certificates, err error) {
	c.section = section
	var mistakes policy.Errors
	sum := sha256.New()
	read := func(key, name string) []byte {
		if name == "" {
			return nil
		}
		data, err := readBounded(name, maxPEM)
		if err == nil && len(data) > maxPEM {
			err = fmt.Errorf("larger than %d bytes", maxPEM)
		}
		if err != nil {
			if pe, ok := errors.AsType[*os.PathError](err); ok { // the position names the file already
				err = pe.Err
			}
			mistakes = append(mistakes, &policy.Error{Pos: policy.Pos{File: name}, Path: key, Err: err})
		}
		fmt.Fprintln(sum, key, len(data))
		sum.Write(data)
		return data
	}
	cert, key := read(section+".certificate", s.Certificate), read(section+".key", s.Key)
	authorities := read(section+".client_ca", s.ClientCA)
	if len(mistakes) > 0 {
		return c, mistakes
	}
	if s.Certificate != "" && s.Key != "" {
		if c.Certificate, err = tls.X509KeyPair(cert, key); err != nil {
			mistakes = append(mistakes, &policy.Error{
				Pos: policy.Pos{File: s.Certificate}, Path: section + ".certificate",
				Err: fmt.Errorf("with the key %s: %w; write a PEM certificate with its chain, and its own key", s.Key, err),
			})
		} else {
			c.leaf = c.Certificate.Leaf
		}
	}
	if s.ClientCA != "" {
		c.ClientCAs = x509.NewCertPool()
		if !c.ClientCAs.AppendCertsFromPEM(authorities) {
			mistakes = append(mistakes, &policy.Error{
				Pos: policy.Pos{File: s.ClientCA}, Path: section + ".client_ca",
				Err: errors.New("holds no certificate; write the authorities in PEM"),
			})
		}
	}
	if len(mistakes) > 0 {
		return c, mistakes
	}
	c.RequireClient, c.UserFrom = s.RequireClient, proxy.UserFrom(s.UserFrom)
	if s.MinVersion == "1.3" {
		c.MinVersion = tls.VersionTLS13
	}
	sum.Sum(c.sum[:0])
	return c, nil
}

// warning says what is legal about c and will not work, or nil.
func (c *certificates) warning(file string, now time.Time) *policy.Error {
	if c.leaf == nil || now.After(c.leaf.NotBefore) && now.Before(c.leaf.NotAfter) {
		return nil
	}
	return &policy.Error{
		Pos: policy.Pos{File: file}, Path: c.section + ".certificate",
		Err: fmt.Errorf("the certificate is valid from %s to %s only; clients will refuse it",
			c.leaf.NotBefore.UTC().Format(time.DateOnly), c.leaf.NotAfter.UTC().Format(time.DateOnly)),
	}
}

// addIdentity checks the files of users and certificates, and whether the users that
// the policy lists can prove who they are.
func (r *checkReport) addIdentity(s config.Proxy) {
	_, err := loadUsers(s.Auth)
	r.addMistakes(err)
	c, err := loadCertificates("proxy.tls", s.TLS)
	r.addMistakes(err)
	if w := c.warning(s.TLS.Certificate, time.Now()); w != nil {
		r.warnings = append(r.warnings, w)
	}
	known := s.Auth.Htpasswd != "" || len(s.TLSListen) > 0 && s.TLS.ClientCA != ""
	if r.settings != "" && r.policy != nil && r.policy.HasUsers() && !known {
		r.warnings = append(r.warnings, &policy.Error{
			Pos: policy.Pos{File: r.settings}, Path: "proxy.auth",
			Err: errors.New("the policy lists users, and nobody can prove to be one; write proxy.auth.htpasswd, or proxy.tls.client_ca with proxy.tls_listen"),
		})
	}
}

// addMistakes adds located mistakes.
func (r *checkReport) addMistakes(err error) {
	mistakes, ok := errors.AsType[policy.Errors](err)
	if !ok {
		return
	}
	if others, ok := errors.AsType[policy.Errors](r.err); ok {
		r.err = append(mistakes, others...)
		return
	}
	r.err = errors.Join(mistakes, r.err)
}

// reloadUsers puts the users in force as the file has them now.
func (g *gate) reloadUsers() error {
	f, err := loadUsers(g.settings.Proxy.Auth)
	if err != nil || f.Equal(g.users) {
		return err
	}
	g.users = f
	g.proxy.SetUsers(f)
	g.logger.Info().Int("users", f.Len()).Msg("users reloaded")
	return nil
}

// reloadCertificates puts the certificates in force as the files have them now.
func (g *gate) reloadCertificates() error {
	return errors.Join(g.reloadProxyCertificates(), g.reloadDNSCertificate())
}

func (g *gate) reloadProxyCertificates() error {
	if g.certificates.leaf == nil {
		return nil
	}
	c, err := loadCertificates("proxy.tls", g.settings.Proxy.TLS)
	if err != nil || c.sum == g.certificates.sum {
		return err
	}
	g.certificates = c
	g.proxy.SetTLS(c.TLSIdentity)
	g.logger.Info().Time("expires", c.leaf.NotAfter).Msg("certificate reloaded")
	return nil
}

// identityFiles returns the files whose changes matter while the gate runs.
func (g *gate) identityFiles() (files []string) {
	t := g.settings.Proxy.TLS
	all := []string{g.settings.Proxy.Auth.Htpasswd}
	if len(g.settings.Proxy.TLSListen) > 0 {
		all = append(all, t.Certificate, t.Key, t.ClientCA)
	}
	if d := g.settings.DNS; isEncrypted(d) {
		all = append(all, d.TLS.Certificate, d.TLS.Key)
	}
	for _, f := range all {
		if f != "" {
			files = append(files, f)
		}
	}
	return append(files, g.adminFiles()...)
}

// watchIdentity asks for a reload when one of the files has changed, and has stayed
// so from one look to the next: it may be under the pen.
func (g *gate) watchIdentity(ctx context.Context) {
	files := g.identityFiles()
	tick := time.NewTicker(identityPoll)
	defer tick.Stop()
	inForce := stamps(files)
	last := inForce
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := stamps(files)
		if now == last && now != inForce {
			inForce = now
			request(g.changed)
		}
		last = now
	}
}

// stamps returns what changes when one of the files does.
func stamps(files []string) (stamp [sha256.Size]byte) {
	h := sha256.New()
	for _, name := range files {
		stampFile(h, name)
	}
	h.Sum(stamp[:0])
	return stamp
}

func stampFile(w io.Writer, name string) {
	info, err := os.Stat(name)
	if err != nil {
		fmt.Fprintln(w, name, err)
		return
	}
	fmt.Fprintln(w, name, info.Size(), info.ModTime().UnixNano())
}
