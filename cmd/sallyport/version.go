package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// Set by the linker in releases: -X main.version=… -X main.revision=….
var (
	version  = "devel"
	revision = ""
)

// build returns the version, and the commit if it is known.
func build() (v, rev string) {
	if revision != "" {
		return version, revision
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return version, s.Value
			}
		}
	}
	return version, "unknown"
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, rev := build()
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "sallyport %s (%s, %s %s/%s)\n", v, rev, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
