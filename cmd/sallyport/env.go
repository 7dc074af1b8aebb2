package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/policy"
)

func newEnv(o *options) *cobra.Command {
	var address, format string
	var more []string
	cmd := &cobra.Command{
		Use:   "env",
		Short: "Print the environment that makes clients use the proxy",
		Long: "Print the environment that makes clients use the proxy: http_proxy, https_proxy and\n" +
			"no_proxy, in both spellings: programs look for either.\n\n" +
			"With proxy.tls_listen alone the proxy's URL begins with https://; clients verify its\n" +
			"certificate, so that --address is to be a name in it.\n\n" +
			"Not through the proxy go localhost, 127.0.0.1, ::1 and what proxy.pac.direct lists.\n" +
			"Addresses of cloud metadata services do not stand in no_proxy: with them every\n" +
			"program would ask past the gate for credentials of the machine. Where that is\n" +
			"wanted, say so: --no-proxy 169.254.169.254.\n\n" +
			"Formats: sh (for eval or /etc/profile.d), systemd (lines of a unit), docker\n" +
			"(docker run --env-file, env_file of Compose, EnvironmentFile of systemd), json.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			write, ok := envFormats[format]
			if !ok {
				return usageError(fmt.Errorf("--format %q: write sh, systemd, docker or json", format))
			}
			s, err := o.load()
			if err != nil {
				return err
			}
			scheme, listen := "http://", s.Proxy.Listen
			if len(listen) == 0 && len(s.Proxy.TLSListen) > 0 { // clients can speak TLS alone
				scheme, listen = "https://", s.Proxy.TLSListen
			}
			to, err := proxyAddress(address, listen)
			if err != nil {
				return usageError(err)
			}
			without, err := noProxy(s.Proxy.PAC.Direct, more)
			if err != nil {
				return usageError(err)
			}
			return write(cmd.OutOrStdout(), environment(scheme+to, without))
		},
	}
	f := cmd.Flags()
	f.StringVar(&address, "address", "", "host:port, or host, at which clients reach the proxy; default: the first of proxy.listen")
	f.StringVar(&format, "format", "sh", "sh, systemd, docker or json")
	f.StringSliceVar(&more, "no-proxy", nil, "further hosts that are not reached through the proxy (repeatable)")
	return cmd
}

// A variable is one line of an environment.
type variable struct{ name, value string }

// environment returns the variables in the order in which they are printed.
// all_proxy is not among them: it would send to the proxy what it does not speak.
func environment(proxy, without string) []variable {
	var vs []variable
	for _, v := range []variable{{"http_proxy", proxy}, {"https_proxy", proxy}, {"no_proxy", without}} {
		vs = append(vs, v, variable{strings.ToUpper(v.name), v.value})
	}
	return vs
}

// envFormats write an environment. The values need no escaping: they are made of
// what envWord and policy names let through.
var envFormats = map[string]func(io.Writer, []variable) error{
	"sh":      envLines("export %s='%s'\n"),
	"systemd": envLines("Environment=\"%s=%s\"\n"),
	"docker":  envLines("%s=%s\n"),
	"json": func(w io.Writer, vs []variable) error {
		m := map[string]string{}
		for _, v := range vs {
			m[v.name] = v.value
		}
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(m)
	},
}

func envLines(format string) func(io.Writer, []variable) error {
	return func(w io.Writer, vs []variable) error {
		for _, v := range vs {
			if _, err := fmt.Fprintf(w, format, v.name, v.value); err != nil {
				return err
			}
		}
		return nil
	}
}

// proxyAddress returns host:port of the proxy for clients: as given, with the port
// of the first listener if there is none, or else that listener.
func proxyAddress(given string, listen []string) (string, error) {
	var own netip.AddrPort
	if len(listen) > 0 {
		host, port, err := net.SplitHostPort(listen[0])
		if err != nil {
			return "", err // cannot happen: the settings were checked
		}
		if host == "" {
			host = "::"
		}
		if own, err = netip.ParseAddrPort(net.JoinHostPort(host, port)); err != nil {
			return "", err
		}
	}
	if given == "" {
		switch {
		case len(listen) == 0:
			return "", errors.New("proxy.listen is empty: there is no proxy; name one with --address host:port")
		case own.Addr().IsUnspecified():
			return "", fmt.Errorf("proxy.listen is %q, every address of this machine; say with --address at which clients reach it, such as --address proxy.corp.example", listen[0])
		case own.Port() == 0:
			return "", fmt.Errorf("proxy.listen is %q, any free port; say with --address at which clients reach it", listen[0])
		}
		return own.String(), nil
	}
	if ip, err := netip.ParseAddr(strings.Trim(given, "[]")); err == nil && ip.Is6() {
		given = "[" + ip.String() + "]"
	}
	if strings.LastIndexByte(given, ':') <= strings.LastIndexByte(given, ']') {
		if own.Port() == 0 {
			return "", fmt.Errorf("--address %q: write the port too", given)
		}
		given = fmt.Sprintf("%s:%d", given, own.Port())
	}
	name, addr, port, err := policy.ParseAuthority(given)
	switch {
	case err != nil:
		return "", fmt.Errorf("--address: %w", err)
	case name.IsZero():
		return netip.AddrPortFrom(addr, port).String(), nil
	}
	return fmt.Sprintf("%s:%d", name, port), nil
}

// envWord is what stands in no_proxy without harm in a shell, a unit or JSON.
var envWord = regexp.MustCompile(`^[0-9A-Za-z.*:/_\[\]-]{1,253}$`)

// noProxy returns the value of no_proxy. Programs read it in their own ways: to
// some a leading dot means the names below alone, to others the name too, and few
// know "*.". So a suffix stands there in every spelling that means no more than it
// says to somebody who knows it.
func noProxy(direct, more []string) (string, error) {
	words := []string{"localhost", "127.0.0.1", "::1"}
	for _, d := range direct {
		switch {
		case strings.HasPrefix(d, "*."):
			words = append(words, d[1:])
		case strings.HasPrefix(d, "."):
			words = append(words, d[1:], d)
		case strings.HasSuffix(d, "/32"):
			words = append(words, strings.TrimSuffix(d, "/32"))
		default:
			words = append(words, d)
		}
	}
	for _, m := range more {
		if !envWord.MatchString(m) {
			return "", fmt.Errorf("--no-proxy %q: write hosts, addresses or prefixes", m)
		}
		words = append(words, m)
	}
	seen := map[string]bool{}
	words = slices.DeleteFunc(words, func(w string) bool {
		defer func() { seen[w] = true }()
		return seen[w]
	})
	return strings.Join(words, ","), nil
}
