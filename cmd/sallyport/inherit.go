package main

import (
	"errors"
	"fmt"

	"sallyport/dnsfilter"
	"sallyport/internal/activation"
	"sallyport/internal/config"
)

// inherited are the sockets that the service manager has bound for this process, by the
// name of the listener that they are for.
type inherited map[string]activation.Sockets

// takeSockets returns what this process was handed.
func takeSockets() (inherited, error) {
	return activation.Take([]activation.Name{{Name: "proxy"}, {Name: "proxy_tls"}, {Name: "dns", UDP: true}, {Name: "dns_tls"}, {Name: "dns_https"}, {Name: "admin"}})
}

// apply puts the addresses of sockets in the place of those that the settings have for
// the same listener, so that everything else sees what is so.
func (in inherited) apply(s *config.Settings) error {
	for name, addrs := range map[string]*[]string{
		"proxy": &s.Proxy.Listen, "proxy_tls": &s.Proxy.TLSListen,
		"dns": &s.DNS.Listen, "dns_tls": &s.DNS.TLSListen, "dns_https": &s.DNS.HTTPSListen,
	} {
		if got := in[name].Addrs(); len(got) > 0 {
			*addrs = got
		}
	}
	if got := in["admin"].Addrs(); len(got) > 1 {
		return fmt.Errorf("%d sockets are called admin; the admin server has one address", len(got))
	} else if len(got) == 1 {
		s.Admin.Listen = got[0]
	}
	var errs []error
	if len(s.Proxy.TLSListen) > 0 && (s.Proxy.TLS.Certificate == "" || s.Proxy.TLS.Key == "") {
		errs = append(errs, errors.New("a socket is called proxy_tls, and TLS needs a certificate; write proxy.tls.certificate and proxy.tls.key"))
	}
	if len(s.DNS.TLSListen)+len(s.DNS.HTTPSListen) > 0 && (s.DNS.TLS.Certificate == "" || s.DNS.TLS.Key == "") {
		errs = append(errs, errors.New("a socket is called dns_tls or dns_https, and TLS needs a certificate; write dns.tls.certificate and dns.tls.key"))
	}
	return errors.Join(errs...)
}

// handOver gives the servers their sockets, instead of those that they would bind.
func (in inherited) handOver(g *gate) {
	g.proxy.Inherit(in["proxy"].TCP, in["proxy_tls"].TCP)
	g.dns.Inherit(dnsfilter.Sockets{UDP: in["dns"].UDP, TCP: in["dns"].TCP, TLS: in["dns_tls"].TCP, HTTPS: in["dns_https"].TCP})
	if l := in["admin"].TCP; len(l) == 1 {
		g.admin.Inherit(l[0])
	}
}
