package test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sallyport/configs"
	"sallyport/internal/config"
	"sallyport/policy"
	"sallyport/policy/provider/file"
)

// goFile is one parsed source file; path is relative to the root of the repository.
type goFile struct {
	path string
	ast  *ast.File
}

func (f goFile) isTest() bool { return strings.HasSuffix(f.path, "_test.go") }

// root is the repository as this package's tests see it.
const root = ".."

// walk calls visit for every file below root that people wrote.
func walk(t *testing.T, visit func(path string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if slices.Contains([]string{".git", "bin", "dist", "local", "node_modules", "testdata", "vendor"}, d.Name()) {
				return fs.SkipDir
			}
			return nil
		}
		visit(path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// parseAll parses every Go file, whatever its build constraints.
func parseAll(t *testing.T) (*token.FileSet, []goFile) {
	t.Helper()
	fset := token.NewFileSet()
	var files []goFile
	walk(t, func(path string) {
		if filepath.Ext(path) != ".go" {
			return
		}
		f, err := parser.ParseFile(fset, path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Error(err)
			return
		}
		rel, _ := filepath.Rel(root, path)
		files = append(files, goFile{filepath.ToSlash(rel), f})
	})
	return fset, files
}

func TestExportedIdentifiersAreDocumented(t *testing.T) {
	fset, files := parseAll(t)
	documented := map[string]bool{} // packages
	for _, f := range files {
		if f.isTest() {
			continue
		}
		dir := filepath.Dir(f.path)
		documented[dir] = documented[dir] || f.ast.Doc != nil
		for _, decl := range f.ast.Decls {
			for _, id := range undocumented(decl) {
				t.Errorf("%s: %s is exported and has no doc comment: say what it does, its bounds and units, its errors, who owns what",
					fset.Position(id.Pos()), id.Name)
			}
		}
	}
	for dir, ok := range documented {
		if !ok {
			t.Errorf("%s: no package comment: say what the package is for before any code", dir)
		}
	}
}

// undocumented returns the exported identifiers of decl that lack a comment. For
// constants and variables the comment of the group, or one at the end of the line,
// counts.
func undocumented(decl ast.Decl) (ids []*ast.Ident) {
	switch d := decl.(type) {
	case *ast.FuncDecl:
		if d.Name.IsExported() && d.Doc == nil && (d.Recv == nil || receiverIsExported(d.Recv)) {
			ids = append(ids, d.Name)
		}
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			switch s := spec.(type) {
			case *ast.TypeSpec:
				if s.Name.IsExported() && s.Doc == nil && (d.Doc == nil || d.Lparen.IsValid()) {
					ids = append(ids, s.Name)
				}
			case *ast.ValueSpec:
				for _, id := range s.Names {
					if id.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
						ids = append(ids, id)
					}
				}
			}
		}
	}
	return ids
}

func receiverIsExported(recv *ast.FieldList) bool {
	typ := recv.List[0].Type
	for {
		switch x := typ.(type) {
		case *ast.StarExpr:
			typ = x.X
		case *ast.IndexExpr:
			typ = x.X
		case *ast.IndexListExpr:
			typ = x.X
		case *ast.Ident:
			return x.IsExported()
		default:
			return false
		}
	}
}

// An underscore in a file name means a build constraint or a test to the go tool;
// anywhere else it only looks like one.
func TestFileNames(t *testing.T) {
	systems := []string{"_linux", "_other", "_unix", "_darwin", "_freebsd", "_windows", "_amd64", "_arm64"}
	_, files := parseAll(t)
	for _, f := range files {
		stem := strings.TrimSuffix(strings.TrimSuffix(filepath.Base(f.path), ".go"), "_test")
		for _, s := range systems {
			stem = strings.TrimSuffix(stem, s)
		}
		if strings.Contains(stem, "_") {
			t.Errorf("%s: underscores are for _test and for operating systems (%v); write the words together", f.path, systems)
		}
	}
}

func TestPackageNames(t *testing.T) {
	vague := []string{"util", "utils", "helper", "helpers", "common", "misc", "base", "manager"}
	_, files := parseAll(t)
	for _, f := range files {
		if slices.Contains(vague, f.ast.Name.Name) {
			t.Errorf("%s: package %s says nothing: name it after what it provides", f.path, f.ast.Name.Name)
		}
	}
}

// A test that sleeps is slow on a quick machine and fails on a slow one. Three
// uses are no synchronisation: inside synctest.Test, where only the bubble's own
// clock moves; as the step of a loop that polls a condition; and to shape traffic,
// marked on its line by a comment that begins with "pace:".
func TestNoTestSleeps(t *testing.T) {
	fset, files := parseAll(t)
	for _, f := range files {
		if !f.isTest() {
			continue
		}
		paced := map[int]bool{}
		for _, group := range f.ast.Comments {
			for _, c := range group.List {
				if strings.HasPrefix(c.Text, "// pace:") {
					paced[fset.Position(c.Pos()).Line] = true
				}
			}
		}
		var visit func(n ast.Node) bool
		visit = func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ForStmt:
				if n.Cond != nil && n.Post != nil { // the step of a polling loop
					ast.Inspect(n.Body, visit)
					return false
				}
			case *ast.CallExpr:
				switch {
				case isCall(n, "synctest", "Test"):
					return false
				case isCall(n, "time", "Sleep") && !paced[fset.Position(n.Pos()).Line]:
					t.Errorf("%s: a test sleeps. Wait for what you mean instead: receive from a channel, read until a deadline, "+
						"poll a condition with a bound (for !done(); …; time.Sleep), or put the code into testing/synctest, where time "+
						"is the test's own. A pause that shapes traffic is marked: // pace: why", fset.Position(n.Pos()))
				}
			}
			return true
		}
		ast.Inspect(f.ast, visit)
	}
}

// Policy decides by the time it is given, so that a decision can be replayed.
func TestPolicyReadsNoClock(t *testing.T) {
	fset, files := parseAll(t)
	for _, f := range files {
		if filepath.Dir(f.path) != "policy" || f.isTest() {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				for _, fn := range []string{"Now", "Since", "Until", "After", "NewTimer", "NewTicker"} {
					if isCall(call, "time", fn) {
						t.Errorf("%s: policy asks the clock; time enters as Request.Time", fset.Position(call.Pos()))
					}
				}
			}
			return true
		})
	}
}

func isCall(call *ast.CallExpr, pkg, fn string) bool {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != fn {
		return false
	}
	id, ok := sel.X.(*ast.Ident)
	return ok && id.Name == pkg
}

// TestReasonsAreDocumented keeps the page that operators look a reason up in whole.
func TestReasonsAreDocumented(t *testing.T) {
	page := readDoc(t, "docs/logging.md")
	for _, r := range policy.Reasons() {
		if !strings.Contains(page, fmt.Sprintf("`%s`", r)) {
			t.Errorf("docs/logging.md does not explain the reason %s", r)
		}
	}
}

// TestMetricsAreDocumented compares the metrics that are exported with those on the page, both ways.
func TestMetricsAreDocumented(t *testing.T) {
	exported := map[string]bool{}
	for name := range families(t) {
		exported[name] = strings.HasPrefix(name, "sallyport_")
	}
	page := readDoc(t, "docs/metrics.md")
	for name, ours := range exported {
		if ours && !strings.Contains(page, "`"+name) {
			t.Errorf("docs/metrics.md does not explain %s", name)
		}
	}
	for _, name := range regexp.MustCompile(`sallyport_[a-z_]+[a-z]`).FindAllString(page, -1) {
		if base := strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count"); !exported[name] && !exported[base] {
			t.Errorf("docs/metrics.md explains %s, which is not exported", name)
		}
	}
}

// TestExamplesAreGood holds every whole policy in the documentation, and the files
// in deploy, against the code.
func TestExamplesAreGood(t *testing.T) {
	fence := regexp.MustCompile("(?ms)^```yaml\n(version: 1\n.*?)^```")
	walk(t, func(path string) {
		switch {
		case filepath.Ext(path) == ".md":
			page, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range fence.FindAllSubmatch(page, -1) {
				if _, warnings, err := policy.Load(path, m[1], policy.Options{}); err != nil || len(warnings) > 0 {
					t.Errorf("a policy in %s: %v %v", path, err, warnings)
				}
			}
		case !strings.HasPrefix(filepath.ToSlash(path), root+"/deploy/"):
		case filepath.Base(path) == "policy.yaml":
			if _, warnings, err := file.New(path).Load(); err != nil || len(warnings) > 0 {
				t.Errorf("%s: %v %v", path, err, warnings)
			}
		case filepath.Base(path) == "sallyport.yaml":
			if _, _, err := config.Load(config.LoadOptions{File: path, Default: configs.Settings}); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
	})
}

// TestDependenciesAreDocumented wants a line, with the version, for each module
// that a package or test of ours imports, and no other lines.
func TestDependenciesAreDocumented(t *testing.T) {
	versions := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) (v\S+)`).FindAllStringSubmatch(readDoc(t, "go.mod"), -1) {
		versions[m[1]] = m[2]
	}
	want := map[string]bool{} // "module | version"
	for _, p := range listPackages(t) {
		for _, imp := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			for module, version := range versions {
				if within(imp, module) {
					want[module+" | "+version] = true
				}
			}
		}
	}
	page := readDoc(t, "docs/dependencies.md")
	for _, row := range regexp.MustCompile(`(?m)^\| (\S+\.\S+/\S+ \| v\S+)`).FindAllStringSubmatch(page, -1) {
		if !want[row[1]] {
			t.Errorf("docs/dependencies.md has %q, which nothing imports in that version", row[1])
		}
		delete(want, row[1])
	}
	for missing := range want {
		t.Errorf("docs/dependencies.md has no line %q: what it does, what we would use instead, where it lives", missing)
	}
}

func TestLocalLinksLeadSomewhere(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:\s]+)(#[^)]*)?\)`)
	walk(t, func(path string) {
		if filepath.Ext(path) != ".md" {
			return
		}
		page, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(page), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), filepath.FromSlash(m[1]))); err != nil {
				t.Errorf("%s: link to %s leads nowhere", path, m[1])
			}
		}
	})
}

func readDoc(t *testing.T, path string) string {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(path)))
	if err != nil {
		t.Fatal(err)
	}
	return string(page)
}

// TestThreatsAreTested keeps the page of threats honest: every case has one row, in
// order, each test that a row names exists, and each test that is named after a
// case stands in the row of that case.
func TestThreatsAreTested(t *testing.T) {
	tests := map[string]bool{}
	_, files := parseAll(t)
	for _, f := range files {
		for _, decl := range f.ast.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && f.isTest() && fn.Recv == nil && regexp.MustCompile(`^(Test|Fuzz)`).MatchString(fn.Name.Name) {
				tests[fn.Name.Name] = true
			}
		}
	}
	page := readDoc(t, "docs/threats.md")
	rows := map[string]string{}
	last := ""
	for _, m := range regexp.MustCompile(`(?m)^\| (T\d\d) \|(.*)\|([^|\n]*)\|$`).FindAllStringSubmatch(page, -1) {
		number, proof := m[1], m[3]
		if number <= last {
			t.Errorf("docs/threats.md: %s stands after %s", number, last)
		}
		last, rows[number] = number, proof
		honest := strings.HasPrefix(strings.TrimSpace(proof), "– ")
		named := regexp.MustCompile("`((?:Test|Fuzz)\\w+)`").FindAllStringSubmatch(proof, -1)
		own := false
		for _, n := range named {
			if !tests[n[1]] {
				t.Errorf("docs/threats.md: %s: there is no %s", number, n[1])
			}
			own = own || strings.HasPrefix(n[1], "Test"+number)
		}
		switch {
		case len(named) > 0 && !own && !honest:
			t.Errorf("docs/threats.md: no test in the row of %s is named Test%[1]s…", number)
		case len(named) == 0 && !honest:
			t.Errorf("docs/threats.md: %s names no test and does not say why (–, and the reason)", number)
		}
	}
	for n := 1; n <= 71; n++ {
		if number := fmt.Sprintf("T%02d", n); rows[number] == "" {
			t.Errorf("docs/threats.md has no row for %s", number)
		}
	}
	for test := range tests {
		m := regexp.MustCompile(`^TestT(\d\d)[A-Z]`).FindStringSubmatch(test)
		if m == nil {
			continue
		}
		if row, ok := rows["T"+m[1]]; ok && !strings.Contains(row, "`"+test+"`") {
			t.Errorf("docs/threats.md: the row of T%s does not name %s", m[1], test)
		}
	}
}

// TestT71MonotonicDeadlines: every deadline in proxy comes from time.Now, whose
// monotonic reading survives a jump of the wall clock. What drops that reading is
// not used there but for showing a time.
func TestT71MonotonicDeadlines(t *testing.T) {
	fset, files := parseAll(t)
	for _, f := range files {
		if !strings.HasPrefix(f.path, "proxy/") || f.isTest() {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			where := fset.Position(call.Pos())
			switch sel.Sel.Name {
			case "Round", "Truncate", "In", "Local", "AddDate", "UnixNano", "UnixMilli":
				t.Errorf("%s: %s loses the monotonic reading of a time", where, sel.Sel.Name)
			case "Unix", "UnixMicro":
				if lit, ok := call.Args[0].(*ast.BasicLit); !ok || lit.Value != "1" { // long ago, on purpose
					t.Errorf("%s: a time from the wall clock", where)
				}
			case "SetDeadline", "SetReadDeadline", "SetWriteDeadline":
				ast.Inspect(call.Args[0], func(n ast.Node) bool {
					if inner, ok := n.(*ast.CallExpr); ok && (isCall(inner, "time", "Date") || isCall(inner, "time", "Parse")) {
						t.Errorf("%s: a deadline from the wall clock", where)
					}
					return true
				})
			}
			return true
		})
	}
}
