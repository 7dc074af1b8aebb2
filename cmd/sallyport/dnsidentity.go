package main

import (
	"time"

	"sallyport/internal/config"
)

// isEncrypted reports whether the resolver has listeners that need a certificate.
func isEncrypted(s config.DNS) bool { return len(s.TLSListen)+len(s.HTTPSListen) > 0 }

// loadDNSCertificate is loadCertificates for dns.tls.
func loadDNSCertificate(s config.DNS) (certificates, error) {
	return loadCertificates("dns.tls", config.TLS{Certificate: s.TLS.Certificate, Key: s.TLS.Key})
}

// addDNSIdentity checks the files of dns.tls.
func (r *checkReport) addDNSIdentity(s config.DNS) {
	c, err := loadDNSCertificate(s)
	r.addMistakes(err)
	if w := c.warning(s.TLS.Certificate, time.Now()); w != nil {
		r.warnings = append(r.warnings, w)
	}
}

// reloadDNSCertificate puts the certificate of dns.tls in force as the files have it now.
func (g *gate) reloadDNSCertificate() error {
	if g.dnsCertificate.leaf == nil {
		return nil
	}
	c, err := loadDNSCertificate(g.settings.DNS)
	if err != nil || c.sum == g.dnsCertificate.sum {
		return err
	}
	g.dnsCertificate = c
	g.dns.SetCertificate(c.Certificate)
	g.logger.Info().Time("expires", c.leaf.NotAfter).Msg("certificate of the resolver reloaded")
	return nil
}
