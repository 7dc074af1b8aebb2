// Command sallyport is an egress gate: a forward proxy and a DNS resolver that let
// out what one policy lists, per source.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"sallyport/configs"
	"sallyport/internal/config"
)

// Exit statuses.
const (
	exitFailure = 1 // it did not work; for explain: denied; for test: failed; for diff: different
	exitUsage   = 2 // bad configuration, policy or command line
)

// exitError ends the program with a status. A nil err says nothing further.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func usageError(err error) error { return &exitError{exitUsage, err} }

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go stopOnSignal(signals, stop)
	err := newRoot().ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := exitUsage // what cobra finds wrong with the command line
	var exit *exitError
	if errors.As(err, &exit) {
		code = exit.code
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(os.Stderr, text)
	}
	return code
}

// stopOnSignal stops what runs at the first signal and ends the process at the
// second. It lives as long as the process.
func stopOnSignal(signals <-chan os.Signal, stop context.CancelFunc) {
	<-signals
	stop()
	<-signals
	os.Exit(exitFailure)
}

func newRoot() *cobra.Command {
	var o options
	root := &cobra.Command{
		Use:   "sallyport",
		Short: "An egress gate: one allowlist for a forward proxy and a DNS resolver",
		Long: "sallyport lets out what its policy lists, per source network, through a forward\n" +
			"proxy (CONNECT with a look at the TLS ClientHello, plain HTTP) and a DNS resolver.",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError(fmt.Errorf("%w; see %s --help", err, cmd.CommandPath()))
	})
	flags := root.PersistentFlags()
	flags.StringVar(&o.file, "config", "", "settings file (sallyport.yaml)")
	flags.StringVar(&o.policy, "policy", "", "policy file (policy.yaml); as --set policy.source=FILE")
	flags.StringVar(&o.level, "log-level", "", "debug, info, warn or error; as --set log.level=LEVEL")
	flags.StringArrayVar(&o.set, "set", nil, "any setting, such as --set proxy.listen=:3128 (repeatable)")
	root.AddCommand(newRun(&o), newCheck(&o), newExplain(&o), newTest(&o), newDiff(), newReplay(&o), newEnv(&o), newDoctor(), newSchema(), newTop(), newVersion(), newLearn(&o), newReport(&o))
	return root
}

// options are the flags that every command has.
type options struct {
	file, policy, level string
	set                 []string
}

// load returns the settings of this process and tells of variables that look like
// settings and are none.
func (o *options) load() (config.Settings, error) {
	from, err := o.loadOptions()
	if err != nil {
		return config.Settings{}, err
	}
	s, warnings, err := config.Load(from)
	for _, w := range warnings {
		fmt.Fprintln(os.Stderr, "warning:", w)
	}
	if err != nil {
		return s, usageError(err)
	}
	return s, nil
}

// loadOptions returns where the settings come from.
func (o *options) loadOptions() (config.LoadOptions, error) {
	var overrides []config.Override
	for _, kv := range o.set {
		path, value, ok := strings.Cut(kv, "=")
		if !ok {
			return config.LoadOptions{}, usageError(fmt.Errorf("--set %q: write key=value, such as --set proxy.listen=:3128", kv))
		}
		overrides = append(overrides, config.Override{Flag: "--set", Path: path, Value: value})
	}
	if o.policy != "" {
		overrides = append(overrides, config.Override{Flag: "--policy", Path: "policy.source", Value: o.policy})
	}
	if o.level != "" {
		overrides = append(overrides, config.Override{Flag: "--log-level", Path: "log.level", Value: o.level})
	}
	return config.LoadOptions{File: o.file, Flags: overrides, Env: os.Environ(), Default: configs.Settings}, nil
}
