package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/configs"
	"sallyport/dnsfilter"
	"sallyport/internal/config"
	"sallyport/policy"
	"sallyport/policy/provider/file"
)

func newCheck(o *options) *cobra.Command {
	var strict bool
	var output string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Validate settings and policy",
		Long: "Validate settings and policy. Every mistake is printed, one a line, as\n" +
			"file:line:column: path: what is wrong, and what to write instead. Warnings are\n" +
			"for what is legal and seldom meant.\n\n" +
			"Exit status: 0 good, 2 not; with --strict, 2 for warnings too.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			write, known := reportFormats[output]
			if output != "text" && !known {
				return usageError(fmt.Errorf("--output %q: write text, json, sarif or github", output))
			}
			r := inspect(o, strict)
			if output == "text" {
				return r.writeText(cmd.OutOrStdout(), cmd.ErrOrStderr())
			}
			if err := write(cmd.OutOrStdout(), r); err != nil {
				return err
			}
			if !r.ok() {
				return &exitError{code: exitUsage}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&strict, "strict", false, "let warnings fail")
	f.StringVar(&output, "output", "text", "text, json, sarif or github (annotations of GitHub Actions)")
	return cmd
}

// A checkReport is what check found out.
type checkReport struct {
	source   string // where the policy comes from; "" if the settings do not say
	settings string // the settings file, or ""
	strict   bool
	policy   *policy.Policy // nil with err
	warnings []*policy.Error
	err      error
}

// inspect validates settings and policy.
func inspect(o *options, strict bool) *checkReport {
	r := &checkReport{strict: strict}
	settings, err := o.load()
	if err != nil {
		r.err = err
		return r
	}
	r.source, r.settings = settings.Policy.Source, settings.File
	r.policy, r.warnings, r.err = newSource(settings).load()
	r.addIdentity(settings.Proxy)
	r.addDNSIdentity(settings.DNS)
	r.addAdmin(settings.Admin)
	r.addSettings(o, dnsfilter.Check(dnsConfig(settings.DNS)))
	_, err = newRoutes(&settings.Proxy)
	r.addSettings(o, err)
	if r.policy != nil {
		r.warnings = append(r.warnings, strangeGroups(&settings, r.policy)...)
	}
	return r
}

// addSettings adds what resolver and proxy find wrong with their settings, which were
// loaded from where o says.
func (r *checkReport) addSettings(o *options, err error) {
	if err == nil {
		return
	}
	from, _ := o.loadOptions() // which were good when they were loaded
	at := config.Locate(from)
	var mistakes policy.Errors
	for _, e := range flatten(err) {
		mistakes = append(mistakes, r.located(at, e))
	}
	slices.SortStableFunc(mistakes, func(a, b *policy.Error) int {
		return cmp.Or(cmp.Compare(a.Pos.File, b.Pos.File), cmp.Compare(a.Pos.Line, b.Pos.Line), cmp.Compare(a.Pos.Column, b.Pos.Column))
	})
	if others, ok := errors.AsType[policy.Errors](r.err); ok {
		r.err = append(mistakes, others...)
		return
	}
	r.err = errors.Join(mistakes, r.err)
}

// flatten returns the errors that err joins, each by itself.
func flatten(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error }) //nolint:errorlint // level by level
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, flatten(e)...)
	}
	return all
}

// located returns err, which begins with the path of a setting, with the place where that
// is written, or the settings file.
func (r *checkReport) located(at func(path string) policy.Pos, err error) *policy.Error {
	e := &policy.Error{Pos: policy.Pos{File: r.settings}, Err: err}
	for rest := err.Error(); ; {
		path, what, ok := strings.Cut(rest, ": ")
		if e.Path != "" {
			path = e.Path + "." + path
		}
		pos := at(path)
		if !ok || pos == (policy.Pos{}) {
			return e
		}
		e.Pos, e.Path, e.Err, rest = pos, path, errors.New(what), what
	}
}

func (r *checkReport) ok() bool { return r.err == nil && (!r.strict || len(r.warnings) == 0) }

func (r *checkReport) writeText(stdout, stderr io.Writer) error {
	for _, w := range r.warnings {
		fmt.Fprintln(stderr, "warning:", w)
	}
	switch {
	case r.err != nil:
		return usageError(r.err)
	case !r.ok():
		return usageError(fmt.Errorf("%s: %d warnings, which --strict makes fail", r.source, len(r.warnings)))
	}
	_, err := fmt.Fprintf(stdout, "ok: %s: revision %s, %d groups, %d name patterns, %d warnings\n",
		r.source, r.policy.Revision(), len(r.policy.GroupNames()), r.policy.Names(), len(r.warnings))
	return err
}

// A diagnostic is one mistake or warning, for programs.
type diagnostic struct {
	Severity string `json:"severity"` // error or warning
	Kind     string `json:"kind"`     // mistake, or the kind of finding
	File     string `json:"file,omitempty"`
	Line     int    `json:"line,omitempty"`
	Column   int    `json:"column,omitempty"`
	Path     string `json:"path,omitempty"` // such as groups[0].allow[2]
	Message  string `json:"message"`
}

// diagnostics returns mistakes and warnings in the order of the text output.
func (r *checkReport) diagnostics() []diagnostic {
	ds := []diagnostic{}
	for _, w := range r.warnings {
		ds = append(ds, r.diagnostic("warning", w))
	}
	if r.err == nil {
		return ds
	}
	mistakes, ok := errors.AsType[policy.Errors](r.err)
	if !ok {
		return append(ds, diagnostic{Severity: "error", Kind: "mistake", File: r.source, Message: r.err.Error()})
	}
	for _, e := range mistakes {
		ds = append(ds, r.diagnostic("error", e))
	}
	return ds
}

func (r *checkReport) diagnostic(severity string, e *policy.Error) diagnostic {
	kind := "mistake"
	if f, ok := errors.AsType[*policy.Finding](e.Err); ok {
		kind = f.Kind
	}
	return diagnostic{severity, kind, r.file(e.Pos.File), e.Pos.Line, e.Pos.Column, e.Path, e.Err.Error()}
}

// file returns name as seen from the working directory: the policy names its list
// files from where it is itself.
func (r *checkReport) file(name string) string {
	if r.source == "" || name == "" || filepath.IsAbs(name) {
		return name
	}
	folder := filepath.Dir(r.source)
	if info, err := os.Stat(r.source); err == nil && info.IsDir() {
		folder = r.source
	}
	if name == r.source || name == r.settings || filepath.Dir(name) == filepath.Clean(folder) {
		return name
	}
	return filepath.Join(folder, name)
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
		p, warnings, err := s.files.Load()
		if _, located := errors.AsType[policy.Errors](err); !located && errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w; name the policy with --policy FILE, or with policy.source in the settings", err)
		}
		return p, warnings, err
	}
	return policy.Load("the embedded policy", configs.Policy, policy.Options{})
}
