package config

import (
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"sallyport/policy"
)

// Direct is the value of a group's parent that stands for none.
const Direct = "direct"

// parseParent reads the URL of a parent proxy. What it says of a wrong one never
// repeats a password.
func parseParent(_ *field, s string) (any, error) {
	if s == "" {
		return s, nil
	}
	bad := fmt.Errorf(`%s is not a parent proxy; write http://host:port or https://host:port, with user:password@ before the host if it wants credentials`, quote(redacted(s)))
	u, err := url.Parse(s)
	if err != nil || len(s) > maxText || !printable(s, 0x7e) || u.Scheme != "http" && u.Scheme != "https" ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return nil, bad
	}
	if p, ok := port(u.Port()); !ok || p == 0 {
		return nil, fmt.Errorf("%s has no port; write one, such as %q", quote(redacted(s)), u.Scheme+"://"+u.Hostname()+":3128")
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err != nil {
		if _, err := policy.ParseName(u.Hostname()); err != nil {
			return nil, fmt.Errorf("%s: %w", quote(redacted(s)), err)
		}
	} else if ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() {
		return nil, bad
	}
	if u.User != nil {
		password, _ := u.User.Password()
		if err := CheckCredentials(u.User.Username() + ":" + password); err != nil {
			return nil, fmt.Errorf("%s: %w", quote(redacted(s)), err)
		}
	}
	return s, nil
}

// redacted returns the URL s without user and password.
func redacted(s string) string {
	i := strings.LastIndexByte(s, '@')
	if i < 0 {
		return s
	}
	scheme, _, ok := strings.Cut(s, "://")
	if !ok || len(scheme) > 8 {
		return "…" + s[i:]
	}
	return scheme + "://…" + s[i:]
}

// CheckCredentials finds out whether s is user:password as Basic can carry it
// (RFC 7617, section 2). Its errors never repeat s.
func CheckCredentials(s string) error {
	user, password, ok := strings.Cut(s, ":")
	switch {
	case !ok || user == "":
		return fmt.Errorf("the credentials are not user:password")
	case strings.Contains(password, "\n"):
		return fmt.Errorf("the credentials have more than one line")
	case len(s) > maxText || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("the credentials are longer than %d bytes or have a control character", maxText)
	}
	return nil
}

func parseGroupParent(f *field, s string) (any, error) {
	if s == Direct {
		return s, nil
	}
	return parseParent(f, s)
}

// parseAddress reads an address of this machine.
func parseAddress(_ *field, s string) (any, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() || ip.Is4In6() {
		return nil, fmt.Errorf(`%s is not an address of this machine; write one such as "192.0.2.7" or "2001:db8::7"`, quote(s))
	}
	return ip, nil
}

// parseSuffix reads name, .name or *.name, and returns its canonical form.
func parseSuffix(_ *field, s string) (any, error) {
	mark := ""
	for _, m := range []string{"*.", "."} {
		if strings.HasPrefix(s, m) {
			mark = m
			break
		}
	}
	n, err := policy.ParseName(s[len(mark):])
	if err != nil {
		return nil, fmt.Errorf(`%s: %w; write a name such as "host.corp.example", ".corp.example" for it and all below it, or "*.corp.example" for all below it`, quote(s), err)
	}
	return mark + n.String(), nil
}

// parseDirect reads what clients reach without the proxy: a suffix, an IPv4
// prefix or an IPv4 address.
func parseDirect(f *field, s string) (any, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		switch {
		case p.Addr().Is6():
			return nil, fmt.Errorf("%s: PAC files know no IPv6 prefixes; write names, or an IPv4 prefix", quote(s))
		case p != p.Masked():
			return nil, fmt.Errorf("%s has bits set after the prefix; write %q", quote(s), p.Masked())
		}
		return p.String(), nil
	}
	if ip, err := netip.ParseAddr(s); err == nil && ip.Is4() {
		return netip.PrefixFrom(ip, 32).String(), nil
	}
	return parseSuffix(f, s)
}

// checkRoutes finds the mistakes in how ways out fit together.
func (p *Proxy) checkRoutes(wrong func(path, format string, args ...any)) {
	oneEach := func(path string, addrs []netip.Addr) {
		if len(addrs) > 2 || len(addrs) == 2 && addrs[0].Is4() == addrs[1].Is4() {
			wrong(path, "more than one address of a family; write at most one IPv4 and one IPv6 address")
		}
	}
	credentials := func(path, parent, file string) {
		switch {
		case file == "":
		case parent == Direct || parent == "" && path != "proxy.parent_credentials_file": // that one may wait for its parent
			wrong(path, "credentials without a parent beside them; write the parent too, or leave this out")
		case strings.Contains(parent, "@"):
			wrong(path, "the parent's URL has credentials already; keep one of the two")
		}
	}
	oneEach("proxy.source_address", p.SourceAddress)
	credentials("proxy.parent_credentials_file", p.Parent, p.ParentCredentialsFile)
	seen := map[string]bool{}
	for i, g := range p.Groups {
		at := "proxy.groups[" + strconv.Itoa(i) + "]."
		if seen[g.Group] {
			wrong(at+"group", "%s has a way out already; keep one", quote(g.Group))
		}
		seen[g.Group] = true
		oneEach(at+"source_address", g.SourceAddress)
		credentials(at+"parent_credentials_file", g.Parent, g.ParentCredentialsFile)
	}
}

// UseRoutes takes the ways out from next, which a reload applies, and keeps the rest.
func (p *Proxy) UseRoutes(next *Proxy) {
	p.Parent, p.ParentCredentialsFile = next.Parent, next.ParentCredentialsFile
	p.ParentTarget, p.ParentResolves = next.ParentTarget, next.ParentResolves
	p.SourceAddress, p.Groups = next.SourceAddress, next.Groups
}
