// Package test looks at the repository as a whole: its import arrows, its
// documentation, and the program from outside.
package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "sallyport"

// goPackage is what `go list -json` says of a package, as far as it matters here.
type goPackage struct {
	ImportPath   string
	Imports      []string // of the code that is shipped
	TestImports  []string
	XTestImports []string
	Deps         []string // of the code that is shipped, transitively
	CgoFiles     []string
}

// tree returns the first element of p's path below the module: policy, proxy, internal …
func (p goPackage) tree() string { return treeOf(p.ImportPath) }

func treeOf(importPath string) string {
	rest, ok := strings.CutPrefix(importPath, module+"/")
	if !ok {
		return ""
	}
	first, _, _ := strings.Cut(rest, "/")
	return first
}

// listPackages returns every package of the module.
func listPackages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports,Deps,CgoFiles", module+"/...")
	cmd.Dir = ".."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	var pkgs []goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		pkgs = append(pkgs, p)
	}
}

// within reports whether importPath is root or lies below it.
func within(importPath, root string) bool {
	return importPath == root || strings.HasPrefix(importPath, root+"/")
}

func isStandard(importPath string) bool {
	first, _, _ := strings.Cut(importPath, "/")
	return !strings.Contains(first, ".") && first != module
}

// height orders the trees: a package imports its own tree and lower ones. Two
// trees of one height never meet, which keeps proxy and dnsfilter apart.
var height = map[string]int{
	"policy":    0,
	"configs":   0, // embedded files; imports nothing of ours
	"proxy":     1,
	"dnsfilter": 1,
	"internal":  2,
	"cmd":       3,
	"test":      4, // nothing may import it

	"proxyproto": 0, // a leaf that proxy and dnsfilter both read, and neither should get from the other
}

func TestImportsPointDownwards(t *testing.T) {
	for _, p := range listPackages(t) {
		from, ok := height[p.tree()]
		if !ok {
			t.Errorf("%s: a new top-level folder: give it a place in height, here and in docs/architecture.md", p.ImportPath)
			continue
		}
		for _, imp := range p.Imports {
			if !within(imp, module) || treeOf(imp) == p.tree() {
				continue
			}
			if to := height[treeOf(imp)]; to >= from {
				t.Errorf("%s imports %s: the arrows are cmd → internal → proxy, dnsfilter → policy, and there are no others", p.ImportPath, imp)
			}
		}
	}
}

func TestPolicyCoreIsPure(t *testing.T) {
	allowed := []string{ // besides the standard library
		"github.com/gaissmai/bart",
		"go.yaml.in/yaml/v3",
		"golang.org/x/net/idna",
		"golang.org/x/net/publicsuffix",
		"golang.org/x/text",
	}
	impure := []string{"log", "net", "net/http", "os/exec", "os/signal", "syscall"}
	for _, p := range listPackages(t) {
		if p.ImportPath != module+"/policy" {
			continue
		}
		for _, imp := range p.Imports {
			switch {
			case slices.Contains(impure, imp):
				t.Errorf("policy imports %s: its core is values in and a Decision out, without sockets, processes or logs", imp)
			case isStandard(imp), slices.ContainsFunc(allowed, func(a string) bool { return within(imp, a) }):
			default:
				t.Errorf("policy imports %s: its core knows no server, no settings and no logger; only %v", imp, allowed)
			}
		}
		return
	}
	t.Fatalf("package %s/policy is missing", module)
}

// leaves read bytes that strangers wrote. They may be read and fuzzed on their own.
var leaves = []string{"proxy/clienthello", "proxy/htpasswd", "proxyproto", "proxy/relay", "dnsfilter/wire", "policy/squidconf"}

func TestLeavesStayLeaves(t *testing.T) {
	for _, p := range listPackages(t) {
		if !slices.Contains(leaves, strings.TrimPrefix(p.ImportPath, module+"/")) {
			continue
		}
		for _, imp := range p.Imports {
			if !isStandard(imp) && !strings.HasPrefix(imp, "golang.org/x/") && !within(imp, module+"/policy") {
				t.Errorf("%s imports %s: a package that reads bytes imports the standard library, golang.org/x and at most policy", p.ImportPath, imp)
			}
		}
	}
}

func TestLibrariesHaveOneHome(t *testing.T) {
	homes := []struct {
		library string
		trees   []string // where it may be imported; "" at the end of a path means exactly that package
		tests   bool     // tests elsewhere may use it, as an independent witness
		why     string
	}{
		{"github.com/spf13/viper", []string{"internal/config"}, false, "settings are read in one place, and policy never is (a dot in a key splits domains)"},
		{"github.com/elazarl/goproxy", []string{"proxy"}, false, "goproxy forwards plain HTTP and nothing else"},
		{"github.com/miekg/dns", []string{"dnsfilter"}, true, "its types stay out of every signature, so that it can be replaced"},
		{"github.com/prometheus", []string{"internal/metrics"}, true, "everybody else counts, one package exports"},
		{"github.com/spf13/cobra", []string{"cmd/sallyport"}, false, "commands belong to the program"},
		{"go.etcd.io/bbolt", []string{"internal/discovery"}, true, "its files can be damaged in ways that only discovery is prepared for"},
		{"github.com/gaissmai/bart", []string{"policy"}, false, "its API is v0, so it is kept where a change is cheap"},
	}
	pkgs := listPackages(t)
	for _, h := range homes {
		for _, p := range pkgs {
			if slices.ContainsFunc(h.trees, func(tree string) bool { return within(p.ImportPath, module+"/"+tree) }) {
				continue
			}
			imports := p.Imports
			if !h.tests {
				imports = slices.Concat(p.Imports, p.TestImports, p.XTestImports)
			}
			for _, imp := range imports {
				if within(imp, h.library) {
					t.Errorf("%s imports %s, which belongs in %v: %s", p.ImportPath, imp, h.trees, h.why)
				}
			}
		}
	}
}

func TestNeverImported(t *testing.T) {
	excepted := map[string]string{ // importer and path: why it may
		"sallyport/proxy log":          "http.Server.ErrorLog takes nothing else; it is led into zerolog",
		"sallyport/internal/admin log": "http.Server.ErrorLog takes nothing else; it is led into zerolog",
		"sallyport/cmd/sallyport log":  "what libraries print through it is led into zerolog",
	}
	never := []struct{ path, why string }{
		{"go.etcd.io/etcd", "a policy comes from a file; another transport gets a leaf of its own first (docs/roadmap.md)"},
		{"github.com/coreos/etcd", "the old name of etcd's client, with the same reason"},
		{"github.com/pkg/errors", "errors and fmt wrap errors"},
		{"github.com/sirupsen/logrus", "one logger is enough: zerolog"},
		{"log", "it writes past the event queue; zerolog arrives as a value"},
		{"io/ioutil", "deprecated"},
		{"math/rand", "math/rand/v2 needs no seed; where anybody might guess, crypto/rand"},
		{"net/http/httputil", "ReverseProxy is not a forward proxy: it trusts and adds X-Forwarded-For"},
		{"net/http/pprof", "its import alone adds handlers to a global mux"},
		{"expvar", "its import alone adds a handler to a global mux"},
		{"plugin", "the binary is static"},
		{"C", "the binary is static: CGO_ENABLED=0"},
	}
	for _, p := range listPackages(t) {
		if len(p.CgoFiles) > 0 {
			t.Errorf("%s uses cgo in %v: the binary is static", p.ImportPath, p.CgoFiles)
		}
		for _, n := range never {
			for _, imp := range p.Imports {
				exact := isStandard(n.path) // log, but not log/slog
				if (exact && imp == n.path || !exact && within(imp, n.path)) && excepted[p.ImportPath+" "+imp] == "" {
					t.Errorf("%s imports %s: %s", p.ImportPath, imp, n.why)
				}
			}
		}
	}
}

// TestNotLinked looks at everything that ends up in the binary, however far down.
func TestNotLinked(t *testing.T) {
	never := []struct{ path, why string }{
		{"testing", "test code in the product"},
		{"net/http/pprof", "profiles on a global mux"},
		{"github.com/refraction-networking/utls", "imitates browsers in tests only"},
		{"github.com/chromedp", "drives a browser in tests only"},
		{"github.com/rogpeppe/go-internal/testscript", "for tests only"},
		{"go.uber.org/goleak", "for tests only"},
		{"google.golang.org/grpc", "nothing here speaks it, and it would double the binary"},
	}
	main := module + "/cmd/sallyport"
	for _, p := range listPackages(t) {
		if p.ImportPath != main {
			continue
		}
		for _, n := range never {
			for _, dep := range p.Deps {
				exact := isStandard(n.path)
				if exact && dep == n.path || !exact && within(dep, n.path) {
					t.Errorf("%s: %s\n%s", dep, n.why, whoNeeds(dep))
				}
			}
		}
		return
	}
	t.Fatalf("package %s is missing", main)
}

// whoNeeds says how a package got into the binary.
func whoNeeds(dep string) string {
	cmd := exec.Command("go", "list", "-deps", "-f", fmt.Sprintf("{{range .Imports}}{{if eq . %q}}{{$.ImportPath}}{{end}}{{end}}", dep), module+"/cmd/sallyport")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		return err.Error()
	}
	return "imported by " + strings.Join(strings.Fields(string(out)), ", ")
}
