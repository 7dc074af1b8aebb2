package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"go.yaml.in/yaml/v3"
)

// TestPipelines runs what the templates in deploy/ci run, step by step, in a
// repository with one change. Each step is a script in $WORK/steps.
func TestPipelines(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/ci", Setup: func(env *testscript.Env) error {
		steps, err := pipelineSteps("../../deploy/ci")
		if err != nil {
			return err
		}
		dir := filepath.Join(env.WorkDir, "steps")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		for name, text := range steps {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				return err
			}
		}
		return nil
	}})
}

// pipelineSteps returns the scripts of both templates, as github-NAME and gitlab-NAME.
func pipelineSteps(dir string) (map[string]string, error) {
	var workflow struct {
		Jobs map[string]struct {
			Steps []struct{ Name, Run string }
		}
	}
	var jobs map[string]yaml.Node
	for name, v := range map[string]any{"github-action.yml": &workflow, "gitlab.yml": &jobs} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		if err := yaml.Unmarshal(text, v); err != nil {
			return nil, err
		}
	}
	steps := map[string]string{}
	for _, s := range workflow.Jobs["policy"].Steps {
		if s.Run != "" {
			steps["github-"+s.Name] = s.Run
		}
	}
	for name, n := range jobs {
		var job struct{ Script []string }
		if short, ok := strings.CutPrefix(name, "egress policy "); ok {
			if err := n.Decode(&job); err != nil {
				return nil, err
			}
			steps["gitlab-"+short] = strings.Join(job.Script, "\n")
		}
	}
	return steps, nil
}
