package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"sallyport/internal/doctor"
	"sallyport/policy"
)

// What doctor tries if it is not told otherwise: public resolvers, which answer on
// every port that matters, and the resolvers of clouds (AWS, Azure, Google).
var (
	directTargets = []string{"1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "2001:4860:4860::8888"}
	cloudTargets  = []string{"169.254.169.253", "fd00:ec2::253", "168.63.129.16", "169.254.169.254"}
)

const deniedName = "denied.sallyport.invalid" // which nobody can list with success (RFC 6761, section 6.4)

func newDoctor() *cobra.Command {
	var c doctor.Config
	var resolvConf, ca string
	var resolvers, direct, cloud []string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "On a client: is the gate in use, and does anything get around it?",
		Long: "On a client: is the gate in use, and does anything get around it? Says what to fix.\n\n" +
			"Looks at the variables of the environment, the proxy, the resolvers of this machine, and\n" +
			"tries to get out past them: TLS, QUIC and DNS to addresses beyond the gate, and the\n" +
			"resolvers of clouds. All at the same time, within seconds.\n\n" +
			"Exit status: 0 nothing to fix, 1 something to fix, 2 wrong command line.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.Env = os.Environ()
			c.Exists = readable
			var errs []error
			if cmd.Flags().Changed("timeout") && (c.Timeout < time.Millisecond || c.Timeout > time.Minute) {
				errs = append(errs, errors.New("--timeout: write 1ms to 1m"))
			}
			if c.Allowed != "" {
				name, _, _, err := policy.ParseAuthority(c.Allowed)
				if err == nil && name.IsZero() {
					err = errors.New("write a name, not an address")
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("--allowed: %w", err))
				}
			}
			for _, name := range []struct{ flag, value string }{{"--denied", c.Denied}, {"--health-name", c.Health}} {
				if _, err := policy.ParseName(name.value); name.value != "" && err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", name.flag, err))
				}
			}
			var err error
			if c.Direct, err = addresses(direct); err != nil {
				errs = append(errs, fmt.Errorf("--direct: %w", err))
			}
			if c.Cloud, err = addresses(cloud); err != nil {
				errs = append(errs, fmt.Errorf("--cloud: %w", err))
			}
			if c.Resolvers, err = resolverAddresses(resolvers, resolvConf); err != nil {
				errs = append(errs, err)
			}
			if c.Roots, err = roots(ca); err != nil {
				errs = append(errs, err)
			}
			if len(errs) > 0 {
				return usageError(errors.Join(errs...))
			}
			results := doctor.Run(cmd.Context(), c)
			write := writeResults
			if asJSON {
				write = writeResultsJSON
			}
			if err := write(cmd.OutOrStdout(), results); err != nil {
				return usageError(err)
			}
			if doctor.Problems(results) > 0 {
				return &exitError{exitFailure, nil}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Proxy, "proxy", "", "URL of the proxy; default: https_proxy or http_proxy")
	f.StringVar(&c.Allowed, "allowed", "", "name:port that the policy allows, to try")
	f.StringVar(&c.Denied, "denied", deniedName, "name that the policy does not allow, to try")
	f.StringVar(&c.Health, "health-name", "", "dns.health_name of the gate")
	f.BoolVar(&c.Metadata, "metadata", false, "programs may ask the cloud's metadata service past the gate: no_proxy may list it")
	f.StringSliceVar(&resolvers, "resolver", nil, "address, or address:port, of this machine's resolver (repeatable); default: those of --resolv-conf")
	f.StringVar(&resolvConf, "resolv-conf", "/etc/resolv.conf", "file that names the resolvers")
	f.StringSliceVar(&direct, "direct", directTargets, "addresses beyond the gate, that answer on 443, 53 and 853; empty: none")
	f.StringSliceVar(&cloud, "cloud", cloudTargets, "resolvers that a cloud gives to its machines; empty: none")
	f.StringVar(&ca, "ca", "", "PEM file of further certificate authorities")
	f.DurationVar(&c.Timeout, "timeout", 3*time.Second, "of one step")
	f.BoolVar(&asJSON, "json", false, "for programs")
	return cmd
}

// readable returns why the file or folder called name cannot be read, or nil.
func readable(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return f.Close()
}

func addresses(texts []string) (all []netip.Addr, err error) {
	for _, t := range texts {
		a, err := netip.ParseAddr(strings.TrimSpace(t))
		if err != nil {
			return nil, fmt.Errorf("%q: write an address", t)
		}
		all = append(all, a)
	}
	return all, nil
}

// resolverAddresses returns the resolvers that were given, or else those of the file.
func resolverAddresses(given []string, file string) (all []netip.AddrPort, err error) {
	for _, t := range given {
		ap, err := netip.ParseAddrPort(t)
		if a, aerr := netip.ParseAddr(t); aerr == nil {
			ap, err = netip.AddrPortFrom(a, 53), nil
		}
		if err != nil {
			return nil, fmt.Errorf("--resolver: %q: write an address, or address:port", t)
		}
		all = append(all, ap)
	}
	if len(given) > 0 || file == "" {
		return all, nil
	}
	if all, err = doctor.Nameservers(file); err != nil {
		return nil, fmt.Errorf("--resolv-conf: %w", err)
	}
	return all, nil
}

// roots returns the certificate authorities of the system and those in file; nil
// for the system's alone.
func roots(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil //nolint:nilnil // which crypto/tls takes for the system's
	}
	pem, err := readBounded(file, maxPEM)
	if err != nil {
		return nil, fmt.Errorf("--ca: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--ca: %s holds no certificate in PEM", file)
	}
	return pool, nil
}

// harmless returns s, some of which may come from the network, without what could do
// harm in a terminal.
func harmless(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// writeResults writes problems first, each with what to do about it.
func writeResults(w io.Writer, results []doctor.Result) error {
	var b strings.Builder
	for _, status := range []doctor.Status{doctor.Problem, doctor.OK, doctor.Skipped} {
		for _, r := range results {
			if r.Status != status {
				continue
			}
			fmt.Fprintf(&b, "%-8s %-12s %s\n", r.Status, r.Check, harmless(r.What))
			if r.Fix != "" {
				fmt.Fprintf(&b, "         %-12s → %s\n", "", harmless(r.Fix))
			}
		}
	}
	switch n := doctor.Problems(results); n {
	case 0:
		b.WriteString("Nothing to fix.\n")
	case 1:
		b.WriteString("One thing to fix.\n")
	default:
		fmt.Fprintf(&b, "%d things to fix.\n", n)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func writeResultsJSON(w io.Writer, results []doctor.Result) error {
	return encode(w, struct {
		OK       bool            `json:"ok"`
		Problems int             `json:"problems"`
		Results  []doctor.Result `json:"results"`
	}{doctor.Problems(results) == 0, doctor.Problems(results), results})
}
