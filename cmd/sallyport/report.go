package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"sallyport/policy"
)

// reportFormats are the outputs of check for programs.
var reportFormats = map[string]func(io.Writer, *checkReport) error{
	"json": writeReportJSON, "sarif": writeReportSARIF, "github": writeReportGitHub,
}

func writeReportJSON(out io.Writer, r *checkReport) error {
	type compiled struct {
		Source   string `json:"source"`
		Revision string `json:"revision"`
		Groups   int    `json:"groups"`
		Names    int    `json:"names"`
	}
	v := struct {
		OK          bool         `json:"ok"`
		Policy      *compiled    `json:"policy,omitempty"`
		Diagnostics []diagnostic `json:"diagnostics"`
	}{OK: r.ok(), Diagnostics: r.diagnostics()}
	if r.policy != nil {
		v.Policy = &compiled{r.source, r.policy.Revision(), len(r.policy.GroupNames()), r.policy.Names()}
	}
	return encode(out, v)
}

// encode writes v as JSON that people can read too.
func encode(out io.Writer, v any) error {
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// writeReportGitHub writes workflow commands, which GitHub Actions turns into
// annotations of the lines they are about.
func writeReportGitHub(out io.Writer, r *checkReport) error {
	// As the runner undoes it: https://github.com/actions/toolkit, packages/core/src/command.ts.
	data := strings.NewReplacer("%", "%25", "\r", "%0D", "\n", "%0A")
	property := strings.NewReplacer("%", "%25", "\r", "%0D", "\n", "%0A", ":", "%3A", ",", "%2C")
	for _, d := range r.diagnostics() {
		var props []string
		for _, p := range []struct {
			key   string
			value string
		}{{"file", filepath.ToSlash(d.File)}, {"line", number(d.Line)}, {"col", number(d.Column)}, {"title", "sallyport: " + d.Kind}} {
			if p.value != "" {
				props = append(props, p.key+"="+property.Replace(p.value))
			}
		}
		message := d.Message
		if d.Path != "" {
			message = d.Path + ": " + message
		}
		if _, err := fmt.Fprintf(out, "::%s %s::%s\n", d.Severity, strings.Join(props, ","), data.Replace(message)); err != nil {
			return err
		}
	}
	return nil
}

// number returns n in decimal, "" for 0, which stands for unknown.
func number(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

// The parts of SARIF 2.1.0 (OASIS) that code scanning reads.
type (
	sarifLog struct {
		Schema  string     `json:"$schema"`
		Version string     `json:"version"`
		Runs    []sarifRun `json:"runs"`
	}
	sarifRun struct {
		Tool    sarifTool     `json:"tool"`
		Results []sarifResult `json:"results"`
	}
	sarifTool struct {
		Driver sarifDriver `json:"driver"`
	}
	sarifDriver struct {
		Name    string      `json:"name"`
		Version string      `json:"version"`
		Rules   []sarifRule `json:"rules"`
	}
	sarifRule struct {
		ID               string    `json:"id"`
		ShortDescription sarifText `json:"shortDescription"`
	}
	sarifText struct {
		Text string `json:"text"`
	}
	sarifResult struct {
		RuleID    string          `json:"ruleId"`
		Level     string          `json:"level"`
		Message   sarifText       `json:"message"`
		Locations []sarifLocation `json:"locations,omitempty"`
	}
	sarifLocation struct {
		Physical sarifPhysical `json:"physicalLocation"`
	}
	sarifPhysical struct {
		Artifact sarifArtifact `json:"artifactLocation"`
		Region   *sarifRegion  `json:"region,omitempty"`
	}
	sarifArtifact struct {
		URI string `json:"uri"`
	}
	sarifRegion struct {
		StartLine   int `json:"startLine"`
		StartColumn int `json:"startColumn,omitempty"`
	}
)

func writeReportSARIF(out io.Writer, r *checkReport) error {
	kinds := policy.FindingKinds()
	kinds["mistake"] = "The settings or the policy cannot be used as they are."
	v, _ := build()
	driver := sarifDriver{Name: "sallyport", Version: v}
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		driver.Rules = append(driver.Rules, sarifRule{kind, sarifText{kinds[kind]}})
	}
	results := []sarifResult{}
	for _, d := range r.diagnostics() {
		message := d.Message
		if d.Path != "" {
			message = d.Path + ": " + message
		}
		res := sarifResult{RuleID: d.Kind, Level: d.Severity, Message: sarifText{message}}
		if d.File != "" {
			loc := sarifLocation{sarifPhysical{Artifact: sarifArtifact{fileURI(d.File)}}}
			if d.Line > 0 {
				loc.Physical.Region = &sarifRegion{d.Line, d.Column}
			}
			res.Locations = []sarifLocation{loc}
		}
		results = append(results, res)
	}
	return encode(out, sarifLog{
		Schema:  "https://json.schemastore.org/sarif-2.1.0.json",
		Version: "2.1.0",
		Runs:    []sarifRun{{sarifTool{driver}, results}},
	})
}

// fileURI returns name as a URI reference; relative names stay relative.
func fileURI(name string) string {
	u := url.URL{Path: filepath.ToSlash(name)}
	if filepath.IsAbs(name) {
		u.Scheme = "file"
	}
	return u.String()
}
