package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// ErrAuthority is wrapped by every error of ParseAuthority that is not about the name.
var ErrAuthority = errors.New("not host:port")

// ParseAuthority takes a CONNECT target apart (RFC 9112, section 3.2.3): a name or
// an IPv4 address, or an IPv6 address in brackets, then a colon and a port in
// canonical decimal. Zone identifiers, user information and everything else that
// a URI may hold are refused. Either name or addr is zero.
func ParseAuthority(s string) (name Name, addr netip.Addr, port uint16, err error) {
	if strings.IndexByte(s, '@') >= 0 { // never repeated: it may be a password
		return name, addr, 0, fmt.Errorf("%w: it holds user information; write the host and port alone", ErrAuthority)
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return name, addr, 0, fmt.Errorf("%w: %q has no port; write it out, as in example.com:443", ErrAuthority, clip(s))
	}
	host := s[:i]
	port, ok := ParsePort(s[i+1:])
	if !ok {
		return name, addr, 0, fmt.Errorf("%w: %q is not a port from 1 to 65535", ErrAuthority, clip(s[i+1:]))
	}
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		addr, err = netip.ParseAddr(host[1 : len(host)-1])
		if err != nil || !addr.Is6() || addr.Zone() != "" {
			return name, netip.Addr{}, 0, fmt.Errorf("%w: %q is not an IPv6 address without zone", ErrAuthority, clip(host))
		}
		return name, addr, port, nil
	}
	if addr, err = netip.ParseAddr(host); err == nil {
		if !addr.Is4() {
			return name, netip.Addr{}, 0, fmt.Errorf("%w: an IPv6 address is written in brackets, as in [2001:db8::1]:443", ErrAuthority)
		}
		return name, addr, port, nil
	}
	name, err = ParseName(host)
	return name, netip.Addr{}, port, err
}
