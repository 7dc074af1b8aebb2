package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"sallyport/internal/config"
	"sallyport/policy"
)

func newSchema() *cobra.Command {
	return &cobra.Command{
		Use:       "schema policy|settings",
		Short:     "Print the JSON Schema of a file, for editors",
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"policy", "settings"},
		RunE: func(cmd *cobra.Command, args []string) error {
			text := policy.Schema()
			if args[0] == "settings" {
				text = config.Schema()
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s", text)
			return err
		},
	}
}
