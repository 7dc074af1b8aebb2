package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"sallyport/internal/config"
	"sallyport/policy"
	"sallyport/proxy"
	"sallyport/proxy/upstream"
)

// maxCredentials bounds a file with credentials, in bytes.
const maxCredentials = 4 << 10

// newRoutes returns the ways out that the settings describe. It reads the files
// with credentials.
func newRoutes(s *config.Proxy) (proxy.Routes, error) {
	var errs []error
	route := func(setting, parent, file string, source []netip.Addr) proxy.Route {
		r := proxy.Route{Source: newSourceAddress(source)}
		if parent == "" || parent == config.Direct {
			return r
		}
		p, err := newParent(parent, file)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", setting, err))
		}
		r.Parent = p
		return r
	}
	rs := proxy.Routes{
		Default:         route("proxy.parent_credentials_file", s.Parent, s.ParentCredentialsFile, s.SourceAddress),
		Groups:          map[string]proxy.Route{},
		ParentByAddress: s.ParentTarget == "address",
		ParentResolves:  s.ParentResolves,
	}
	for i, g := range s.Groups {
		r := route("proxy.groups["+strconv.Itoa(i)+"].parent_credentials_file", g.Parent, g.ParentCredentialsFile, g.SourceAddress)
		if g.Parent == "" {
			r.Parent = rs.Default.Parent
		}
		if len(g.SourceAddress) == 0 {
			r.Source = rs.Default.Source
		}
		rs.Groups[g.Group] = r
	}
	return rs, errors.Join(errs...)
}

func newSourceAddress(addrs []netip.Addr) (s upstream.Source) {
	for _, a := range addrs {
		if a.Is4() {
			s.V4 = a
		} else {
			s.V6 = a
		}
	}
	return s
}

// newParent returns the parent at s, which the settings have found good. file, if
// any, holds its credentials.
func newParent(s, file string) (*upstream.Parent, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("not a URL") // its error might repeat a password
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil {
		return nil, fmt.Errorf("port: %w", err)
	}
	p := &upstream.Parent{Host: u.Hostname(), Port: uint16(port)}
	if u.Scheme == "https" {
		p.TLS = &tls.Config{ServerName: p.Host, MinVersion: tls.VersionTLS12}
	}
	if u.User != nil {
		password, _ := u.User.Password()
		p.Credentials = u.User.Username() + ":" + password
	}
	if file != "" {
		p.Credentials, err = readCredentials(file)
	}
	return p, err
}

// readCredentials reads user:password from the one line of a file. Its errors
// never repeat what is in it.
func readCredentials(name string) (string, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a named pipe must not block for ever
	if err != nil {
		return "", err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s: it is no regular file", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxCredentials))
	if err != nil {
		return "", err
	}
	line := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if err := config.CheckCredentials(line); err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	return line, nil
}

// strangeGroups warns of groups that have a way out and are not in the policy: a
// group that was renamed would silently leave by another way.
func strangeGroups(s *config.Settings, p *policy.Policy) (warnings []*policy.Error) {
	names := p.GroupNames()
	for i, g := range s.Proxy.Groups {
		if !slices.Contains(names, g.Group) {
			warnings = append(warnings, &policy.Error{
				Pos: policy.Pos{File: s.File}, Path: fmt.Sprintf("proxy.groups[%d].group", i),
				Err: fmt.Errorf("the policy has no group %q, so this way out is used by nobody", g.Group),
			})
		}
	}
	return warnings
}

// reloadRoutes applies the ways out of s, and warns of those that nobody takes.
func (g *gate) reloadRoutes(s *config.Settings) error {
	routes, err := newRoutes(&s.Proxy)
	if err != nil {
		return err
	}
	g.proxy.SetRoutes(routes)
	g.settings.Proxy.UseRoutes(&s.Proxy)
	if p := g.store.Policy(); p != nil { // there is none if everything is denied
		g.warnStrangeGroups(p)
	}
	return nil
}

func (g *gate) warnStrangeGroups(p *policy.Policy) {
	for _, w := range strangeGroups(&g.settings, p) {
		g.logger.Warn().Msg(w.Error())
	}
}
