package config

import (
	"fmt"
	"net/netip"
)

// check finds settings of the admin server that need others. What its TLS lacks shows
// when its files are read.
func (a *Admin) check(wrong func(path, format string, args ...any)) {
	if err := a.Exposed(); err != nil {
		wrong("admin.listen", "%w", err)
	}
}

// Exposed returns an error if others than this machine could use the admin server
// without a credential. Whoever changes Listen after [Load] asks again.
func (a *Admin) Exposed() error {
	if a.Listen == "" || a.loopback() || a.TokenFile != "" || a.TLS.ClientCA != "" {
		return nil
	}
	return fmt.Errorf("%s is beyond loopback, where everybody who reaches it could close tunnels and stop the gate; "+
		"write 127.0.0.1 as its host, or a file with a token as admin.token_file, or who signs operators' certificates as admin.tls.client_ca", quote(a.Listen))
}

// loopback reports whether this machine alone can reach the admin server.
func (a *Admin) loopback() bool {
	at, err := netip.ParseAddrPort(a.Listen)
	return err == nil && at.Addr().Unmap().IsLoopback() // no host is every address
}

// InClear reports whether the token crosses a network unencrypted.
func (a *Admin) InClear() bool {
	return a.Listen != "" && !a.loopback() && a.TokenFile != "" && a.TLS.Certificate == ""
}
