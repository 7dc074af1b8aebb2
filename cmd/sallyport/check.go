package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"sallyport/configs"
	"sallyport/internal/config"
	"sallyport/policy"
	"sallyport/policy/provider/file"
)

func newCheck(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Validate settings and policy",
		Long: "Validate settings and policy. Every mistake is printed, one a line, as\n" +
			"file:line:column: path: what is wrong, and what to write instead.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			settings, err := o.load()
			if err != nil {
				return err
			}
			p, warnings, err := newSource(settings).load()
			for _, w := range warnings {
				fmt.Fprintln(cmd.ErrOrStderr(), "warning:", w)
			}
			if err != nil {
				return usageError(err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "ok: %s: revision %s, %d groups, %d name patterns, %d warnings\n",
				settings.Policy.Source, p.Revision(), len(p.GroupNames()), p.Names(), len(warnings))
			return err
		},
	}
}

// source is where the policy comes from.
type source struct {
	files *file.Provider // nil: the embedded policy
}

func newSource(s config.Settings) source {
	if s.Policy.Source == config.Embedded {
		return source{}
	}
	return source{file.New(s.Policy.Source)}
}

// load reads and compiles the policy; warnings come with an error too.
func (s source) load() (*policy.Policy, []*policy.Error, error) {
	if s.files != nil {
		return s.files.Load()
	}
	d, err := policy.ParseDocument("the embedded policy", configs.Policy)
	if err != nil {
		return nil, nil, err
	}
	return policy.Compile(d, policy.Options{})
}
