package doctor

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// metadata are the addresses where clouds hand out credentials of the machine.
var metadata = []netip.Addr{
	netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("169.254.170.2"), netip.MustParseAddr("169.254.170.23"),
	netip.MustParseAddr("100.100.100.200"), netip.MustParseAddr("168.63.129.16"), netip.MustParseAddr("fd00:ec2::254"),
}

// bundles are variables that replace the certificate authorities of a program.
var bundles = []string{"SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO", "AWS_CA_BUNDLE"}

const (
	envFix   = "set it as sallyport env prints it, in both spellings"
	noFix    = "list only what must go past the gate, as hosts and suffixes with a comma between them; see sallyport env"
	maxShown = 200 // bytes of a value that are shown
)

// environment looks at the variables that tell programs of a proxy, and returns the
// proxy to look at: nil if there is none.
func (c *Config) environment() (*url.URL, []Result) {
	const check = "environment"
	env := map[string]string{}
	for _, kv := range c.Env {
		if k, v, ok := strings.Cut(kv, "="); ok {
			env[k] = v
		}
	}
	var found []Result
	wrong := func(fix, format string, args ...any) {
		found = append(found, problem(check, fmt.Sprintf(format, args...), fix))
	}

	values := map[string]string{}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy"} {
		upper := strings.ToUpper(name)
		low, hasLow := env[name]
		up, hasUp := env[upper]
		values[name] = low
		switch {
		case !hasLow && !hasUp && name == "no_proxy":
		case !hasLow && !hasUp:
			wrong(envFix, "%s and %s are not set: programs that heed only them connect by themselves", name, upper)
		case !hasLow:
			values[name] = up
			wrong(envFix, "%s is set and %s is not: some programs read only one of them (curl reads http_proxy only in small letters)", upper, name)
		case !hasUp:
			wrong(envFix, "%s is set and %s is not: some programs read only one of them", name, upper)
		case low != up:
			wrong("keep one value for both", "%s and %s differ: %s, %s", name, upper, show(low), show(up))
		}
	}
	if a, b := values["http_proxy"], values["https_proxy"]; a != "" && b != "" && a != b {
		wrong("one proxy serves both: set them to the same", "http_proxy and https_proxy differ: %s, %s", show(a), show(b))
	}
	for _, name := range []string{"all_proxy", "ALL_PROXY"} {
		if v := env[name]; strings.HasPrefix(v, "socks") {
			wrong("unset it: the gate speaks HTTP", "%s is %s, which some programs prefer to the other variables", name, show(v))
		}
	}
	found = append(found, c.noProxy(values["no_proxy"])...)
	for _, name := range bundles {
		if file := env[name]; file != "" {
			if err := c.Exists(file); err != nil {
				wrong("correct it, or unset it", "%s names a file that cannot be read, so programs trust nobody: %v", name, err)
			}
		}
	}

	text := c.Proxy
	if text == "" {
		text = values["https_proxy"]
	}
	if text == "" {
		text = values["http_proxy"]
	}
	var proxy *url.URL
	if text != "" {
		var err error
		if proxy, err = parseProxy(text); err != nil {
			wrong("write http://host:port", "the proxy's URL: %v", err)
		} else if c.Proxy == "" && !strings.Contains(text, "://") {
			wrong("write http:// before it", "the proxy is given as %s, without a scheme: some programs refuse that", show(text))
		}
		for _, name := range []string{"https_proxy", "http_proxy"} {
			if e, err := parseProxy(values[name]); c.Proxy != "" && proxy != nil && values[name] != "" && (err != nil || e.Host != proxy.Host || e.Scheme != proxy.Scheme) {
				wrong(envFix, "%s leads to %s, not to %s", name, show(values[name]), proxy.Redacted())
			}
		}
	}
	if len(found) == 0 {
		found = append(found, ok(check, "the variables agree with each other"))
	}
	return proxy, found
}

// parseProxy reads the URL of a proxy as programs do.
func parseProxy(s string) (*url.URL, error) {
	if !strings.Contains(s, "://") {
		s = "http://" + s
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s is no URL", show(s))
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("%s: the gate does not speak %s", show(s), show(u.Scheme))
	case u.Hostname() == "":
		return nil, fmt.Errorf("%s names no host", show(s))
	case u.Port() == "":
		u.Host = net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
	}
	return u, nil
}

// noProxy looks at a value of no_proxy.
func (c *Config) noProxy(value string) (found []Result) {
	wrong := func(format string, args ...any) {
		found = append(found, problem("environment", fmt.Sprintf(format, args...), noFix))
	}
	if strings.ContainsAny(value, " \t;") {
		wrong("no_proxy has spaces or semicolons, on which programs do not agree: %s", show(value))
	}
	for word := range strings.FieldsFuncSeq(value, func(r rune) bool { return strings.ContainsRune(", \t;", r) }) {
		host := strings.TrimSuffix(word, ".")
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		host = strings.Trim(host, "[]")
		addr, addrErr := netip.ParseAddr(host)
		prefix, prefixErr := netip.ParsePrefix(word)
		switch {
		case host == "*":
			wrong("no_proxy has *: nothing goes through the proxy")
		case strings.Contains(word, "://"):
			wrong("no_proxy has a URL, %s, which means nothing: it lists hosts", show(word))
		case addrErr == nil && slices.Contains(metadata, addr.Unmap()):
			if !c.Metadata {
				wrong("no_proxy has %s: every program may ask past the gate for credentials of the machine (if that is meant: --metadata)", addr)
			}
		case prefixErr == nil && slices.ContainsFunc(metadata, prefix.Contains):
			wrong("no_proxy has %s, in which a cloud's metadata service lies: every program may ask past the gate for credentials of the machine", prefix)
		case prefixErr == nil:
			wrong("no_proxy has the prefix %s: Go, Python's requests and curl from 7.86 on know prefixes; wget, Java, Ruby and older ones do not, and use the proxy", prefix)
		case addrErr == nil:
		case strings.HasPrefix(word, "*."):
			wrong("no_proxy has %s: few programs know *.; write %s", show(word), show(word[1:]))
		case strings.Contains(word, "*"):
			wrong("no_proxy has %s: programs know no * within names", show(word))
		case !strings.Contains(strings.Trim(host, "."), ".") && strings.HasPrefix(word, "."):
			wrong("no_proxy has %s: every name below it goes past the proxy", show(word))
		}
	}
	return found
}

// show returns s for a person: bounded, with nothing that could harm a terminal, and
// without a password.
func show(s string) string {
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		if scheme, _, ok := strings.Cut(s[:i], "://"); ok {
			s = scheme + "://…@" + s[i+1:]
		} else {
			s = "…@" + s[i+1:]
		}
	}
	if len(s) > maxShown {
		s = s[:maxShown] + "…"
	}
	return fmt.Sprintf("%q", s)
}
