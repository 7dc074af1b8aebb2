package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/config"
	"sallyport/policy"
)

// testFile is what test reads beside the policy if nothing else is named.
const testFile = "policy_test.yaml"

func newTest(o *options) *cobra.Command {
	var junit string
	cmd := &cobra.Command{
		Use:   "test [FILE...]",
		Short: "Hold the policy to assertions",
		Long: "Hold the policy to assertions: who asks for what, and which verdict, reason and\n" +
			"rule are expected. Without FILE, " + testFile + " beside the policy is read.\n\n" +
			"Exit status: 0 all hold, 1 some do not, 2 error.",
		Example: "  sallyport test --policy policy.yaml\n" +
			"  sallyport test --policy policy.yaml --junit report.xml tests/*.yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			settings, err := o.load()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				if settings.Policy.Source == config.Embedded {
					return usageError(errors.New("the embedded policy has no tests; name a policy with --policy, or the file with the tests"))
				}
				args = []string{filepath.Join(filepath.Dir(settings.Policy.Source), testFile)}
			}
			cases, err := readTests(args, time.Now())
			if err != nil {
				return usageError(err)
			}
			p, _, err := newSource(settings).load()
			if err != nil {
				return usageError(err)
			}
			zones := dnsConfig(settings.DNS)
			for i := range cases {
				r := &cases[i].request
				r.PrivateZone = zones.PrivateZone(r.Name, r.Destination)
			}
			return runTests(cmd.OutOrStdout(), p, cases, junit)
		},
	}
	cmd.Flags().StringVar(&junit, "junit", "", "also write a JUnit XML report to this file")
	return cmd
}

// A testCase is one assertion, ready to be asked.
type testCase struct {
	*policy.Assertion
	file    string
	pos     policy.Pos
	request policy.Request
	at      string // as written; "": now
}

// readTests reads every file; its error has the mistakes of all of them.
func readTests(files []string, now time.Time) (cases []testCase, err error) {
	var errs []error
	for _, file := range files {
		more, err := readTestFile(file, now)
		cases, errs = append(cases, more...), append(errs, err)
	}
	return cases, errors.Join(errs...)
}

func readTestFile(file string, now time.Time) (cases []testCase, err error) {
	data, err := readBounded(file, policy.MaxDocument)
	if err != nil {
		return nil, fmt.Errorf("tests: %w", err)
	}
	all, err := policy.ParseAssertions(file, data)
	if err != nil {
		return nil, err
	}
	var mistakes policy.Errors
	wrong := func(path string, err error) {
		mistakes = append(mistakes, &policy.Error{Pos: all.Pos(path), Path: path, Err: err})
	}
	if all.At != "" {
		if now, err = parseTime(all.At); err != nil {
			wrong("at", fmt.Errorf("%q: %w", all.At, err))
		}
	}
	for i := range all.Tests {
		a := &all.Tests[i]
		path := fmt.Sprintf("tests[%d]", i)
		c := testCase{Assertion: a, file: file, pos: all.Pos(path), at: a.At}
		if c.at == "" {
			c.at = all.At
		}
		q := question{target: a.Target, source: a.Source, user: a.User, sni: a.SNI, destination: a.Destination, at: a.At}
		if a.DNS != "" {
			if q.target, q.dns = a.DNS, a.QType; q.dns == "" {
				q.dns = "A"
			}
		}
		if c.request, err = q.request(now); err != nil {
			wrong(path+"."+testField(a, err), err)
		}
		cases = append(cases, c)
	}
	if len(mistakes) > 0 {
		return nil, mistakes
	}
	return cases, nil
}

// testField returns the key of a that holds the field of a question err is about.
func testField(a *policy.Assertion, err error) string {
	e, ok := errors.AsType[*fieldError](err)
	switch {
	case !ok:
		return "target"
	case e.field == "dns":
		return "qtype"
	case e.field == "target" && a.DNS != "":
		return "dns"
	}
	return e.field
}

// readBounded reads a file of at most limit bytes, and one byte more of a larger one.
func readBounded(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit+1))
}

// label names a test for people.
func (c *testCase) label() string {
	if c.Name != "" {
		return c.Name
	}
	return c.asks()
}

// asks describes the request of c.
func (c *testCase) asks() string {
	var b strings.Builder
	b.WriteString(c.Source)
	if c.User != "" {
		b.WriteString(" as " + c.User)
	}
	if c.DNS != "" {
		qtype := c.QType
		if qtype == "" {
			qtype = "A"
		}
		b.WriteString(" dns " + qtype + " " + c.DNS)
	} else {
		b.WriteString(" -> " + c.Target)
	}
	for _, s := range []struct{ key, value string }{{"sni", c.SNI}, {"destination", c.Destination}, {"at", c.at}} {
		if s.value != "" {
			b.WriteString(", " + s.key + " " + s.value)
		}
	}
	return b.String()
}

// expected describes what c expects.
func (c *testCase) expected() string { return outcome(c.Expect, c.Reason, c.Rule) }

func got(d policy.Decision) string { return outcome(d.Verdict.String(), d.Reason.String(), d.Rule) }

func outcome(verdict, reason, rule string) string {
	s := verdict
	if reason != "" {
		s += ", reason " + reason
	}
	if rule != "" {
		s += ", rule " + rule
	}
	return s
}

func runTests(out io.Writer, p *policy.Policy, cases []testCase, junit string) error {
	failures := make([]*junitFailure, len(cases)) // nil for those that hold
	failed := 0
	for i := range cases {
		c := &cases[i]
		x := p.Explain(c.request)
		if c.Holds(x.Decision) {
			continue
		}
		failed++
		text := c.failure(x)
		fmt.Fprintf(out, "FAIL %s: %s\n%s\n", c.pos, c.label(), text)
		failures[i] = &junitFailure{"expected " + c.expected() + "; got " + got(x.Decision), "\n" + text}
	}
	if junit != "" {
		if err := writeJUnit(junit, cases, failures); err != nil {
			return usageError(fmt.Errorf("junit: %w", err))
		}
	}
	if _, err := fmt.Fprintf(out, "%d passed, %d failed\n", len(cases)-failed, failed); err != nil {
		return err
	}
	if failed > 0 {
		return &exitError{code: exitFailure}
	}
	return nil
}

// failure tells how x differs from what c expects.
func (c *testCase) failure(x policy.Explanation) string {
	var b strings.Builder
	d := x.Decision
	group := d.Group
	if group == "" {
		group = "none: no group has " + c.Source
	}
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "  request\t%s\n", c.asks())
	fmt.Fprintf(w, "- expected\t%s\n", c.expected())
	fmt.Fprintf(w, "+ got\t%s\n", got(d))
	fmt.Fprintf(w, "  group\t%s\n", group)
	w.Flush()
	if len(x.Candidates) == 0 {
		b.WriteString("  no rule covers it\n")
		return b.String()
	}
	var table strings.Builder
	w = tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	writeCandidates(w, x)
	w.Flush()
	for line := range strings.Lines(table.String()) {
		b.WriteString("    " + line)
	}
	return b.String()
}

// The elements of a JUnit report, as CI systems read them.
type (
	junitSuites struct {
		XMLName  xml.Name     `xml:"testsuites"`
		Name     string       `xml:"name,attr"`
		Tests    int          `xml:"tests,attr"`
		Failures int          `xml:"failures,attr"`
		Suites   []junitSuite `xml:"testsuite"`
	}
	junitSuite struct {
		Name     string      `xml:"name,attr"`
		Tests    int         `xml:"tests,attr"`
		Failures int         `xml:"failures,attr"`
		Errors   int         `xml:"errors,attr"`
		Cases    []junitCase `xml:"testcase"`
	}
	junitCase struct {
		Name    string        `xml:"name,attr"`
		Class   string        `xml:"classname,attr"`
		File    string        `xml:"file,attr"`
		Line    int           `xml:"line,attr"`
		Failure *junitFailure `xml:"failure"`
	}
	junitFailure struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",cdata"`
	}
)

// writeJUnit writes a report of the cases, one suite a file.
func writeJUnit(name string, cases []testCase, failures []*junitFailure) error {
	report := junitSuites{Name: "sallyport test", Tests: len(cases)}
	for i := range cases {
		c := &cases[i]
		n := len(report.Suites)
		if n == 0 || report.Suites[n-1].Name != c.file {
			report.Suites = append(report.Suites, junitSuite{Name: c.file})
			n++
		}
		s := &report.Suites[n-1]
		s.Tests++
		if failures[i] != nil {
			report.Failures++
			s.Failures++
		}
		s.Cases = append(s.Cases, junitCase{Name: c.label(), Class: c.file, File: c.file, Line: c.pos.Line, Failure: failures[i]})
	}
	text, err := xml.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(name, append([]byte(xml.Header), append(text, '\n')...), 0o644)
}
