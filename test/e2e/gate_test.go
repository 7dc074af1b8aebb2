// Package e2e runs the real binary between real clients and real origins, all on
// loopback, and asserts what a user sees.
package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait of these tests.
const patience = 20 * time.Second

// binary is the program under test, built once by TestMain.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "sallyport-e2e")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "sallyport")
	if built := os.Getenv("SALLYPORT_E2E_BINARY"); built != "" { // a test that runs another in a network namespace
		binary = built
		code := m.Run()
		os.RemoveAll(dir)
		os.Exit(code)
	}
	build := exec.Command("go", "build", "-o", binary, "sallyport/cmd/sallyport")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// gate is a running sallyport.
type gate struct {
	t                 *testing.T
	dir               string
	cmd               *exec.Cmd
	proxy, dns, admin string
	exited            chan struct{}
	exitErr           error

	sink   func(line map[string]any) bool // takes a line that lines need not keep; nil: none
	hold   sync.Mutex                     // whoever has it keeps stdout from being read
	mu     sync.Mutex                     // guards lines, stderr
	lines  []map[string]any
	more   chan struct{} // closed and renewed with each line
	stderr bytes.Buffer
}

// start runs the gate with the policy in policy.yaml and settings that suit tests.
// The listeners take free ports, which the startup lines tell.
func start(t *testing.T, w *world, policy string, extra ...string) *gate {
	t.Helper()
	return startAs(t, w, []string{binary}, policy, extra...)
}

// startAs is start with a command line that the program's arguments are added to.
func startAs(t *testing.T, w *world, program []string, policy string, extra ...string) *gate {
	t.Helper()
	g := beginAs(t, w, program, policy, extra...)
	g.until("ready", func() bool { return g.ready().Ready })
	return g
}

// begin is start without waiting until the gate is ready.
func begin(t *testing.T, w *world, policy string, extra ...string) *gate {
	t.Helper()
	return beginAs(t, w, []string{binary}, policy, extra...)
}

func beginAs(t *testing.T, w *world, program []string, policy string, extra ...string) *gate {
	t.Helper()
	return beginWith(t, w, program, nil, policy, extra...)
}

// beginWith is beginAs with descriptors for the program, from number 3 on.
func beginWith(t *testing.T, w *world, program []string, inherited []*os.File, policy string, extra ...string) *gate {
	t.Helper()
	g := &gate{t: t, dir: t.TempDir(), exited: make(chan struct{}), more: make(chan struct{})}
	g.write("policy.yaml", policy)
	g.write("sallyport.yaml", fmt.Sprintf(`
proxy:
  listen: ["127.0.0.1:0"]
  help_url: https://wiki.example/egress
  timeouts: {connect: 3s, client_hello: 2s, request_header: 5s, idle: 1m, drain: 10s}
dns:
  listen: ["127.0.0.1:0"]
  upstreams: ["udp://%s"]
  hosts_file: ""
admin: {listen: "127.0.0.1:0"}
policy: {source: policy.yaml}
`, w.dns))
	args := slices.Concat(program[1:], []string{"run", "--config", g.path("sallyport.yaml")}, extra)
	g.cmd = exec.Command(program[0], args...)
	g.cmd.ExtraFiles = inherited
	stdout, err := g.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := g.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var readers sync.WaitGroup
	readers.Go(func() { g.readEvents(stdout) })
	readers.Go(func() { g.readStderr(stderr) })
	go func() {
		readers.Wait()
		g.exitErr = g.cmd.Wait()
		close(g.exited)
	}()
	t.Cleanup(func() {
		g.cmd.Process.Kill()
		<-g.exited
		if t.Failed() {
			g.mu.Lock()
			defer g.mu.Unlock()
			for _, l := range g.lines {
				b, _ := json.Marshal(l)
				t.Logf("stdout: %s", b)
			}
			t.Logf("stderr: %s", g.stderr.String())
		}
	})
	g.proxy = g.listener("proxy")
	g.dns = g.listener("dns")
	g.admin = g.listener("admin")
	return g
}

func (g *gate) path(name string) string { return filepath.Join(g.dir, name) }

// write puts a file in place by renaming, as editors and deployment tools do.
func (g *gate) write(name, text string) {
	g.t.Helper()
	tmp := g.path("." + name + ".new")
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		g.t.Fatal(err)
	}
	if err := os.Rename(tmp, g.path(name)); err != nil {
		g.t.Fatal(err)
	}
}

func (g *gate) readEvents(r io.Reader) {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		g.hold.Lock()
		g.hold.Unlock() //nolint:staticcheck // a gate to wait at
		var line map[string]any
		if err := json.Unmarshal(sc.Bytes(), &line); err != nil {
			g.t.Errorf("a line of stdout is not JSON: %v\n%q", err, sc.Text())
			continue
		}
		if len(sc.Bytes()) > 16<<10 {
			g.t.Errorf("a line of %d bytes", len(sc.Bytes()))
		}
		g.mu.Lock()
		if g.sink != nil && g.sink(line) {
			g.mu.Unlock()
			continue
		}
		g.lines = append(g.lines, line)
		close(g.more)
		g.more = make(chan struct{})
		g.mu.Unlock()
	}
}

func (g *gate) readStderr(r io.Reader) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		g.mu.Lock()
		g.stderr.WriteString(sc.Text() + "\n")
		close(g.more)
		g.more = make(chan struct{})
		g.mu.Unlock()
	}
}

// line waits for a line of stdout from index from on that has all the keys of want,
// and returns it.
func (g *gate) line(from int, want map[string]any) map[string]any {
	g.t.Helper()
	timeout := time.After(patience)
	for {
		g.mu.Lock()
		lines, more := g.lines, g.more
		g.mu.Unlock()
	next:
		for _, l := range lines[min(from, len(lines)):] {
			for k, v := range want {
				if fmt.Sprint(l[k]) != fmt.Sprint(v) {
					continue next
				}
			}
			return l
		}
		select {
		case <-more:
		case <-timeout:
			g.t.Fatalf("no line with %v", want)
		}
	}
}

// mark returns the index of the next line of stdout.
func (g *gate) mark() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.lines)
}

// listener waits for the startup line of a listener and returns its address.
func (g *gate) listener(name string) string {
	g.t.Helper()
	l := g.line(0, map[string]any{"message": "listening", "listener": name})
	return fmt.Sprint(l["addr"])
}

// until waits until cond holds.
func (g *gate) until(what string, cond func() bool) {
	g.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			g.t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// readyz is the JSON of /readyz.
type readyz struct {
	Ready    bool
	Draining bool
	Policy   struct {
		Revision   string
		LastGood   bool `json:"last_good"`
		LastReload struct {
			OK    bool
			At    string
			Error string
		} `json:"last_reload"`
	}
	status int
}

func (g *gate) ready() readyz {
	var r readyz
	resp, err := http.Get("http://" + g.admin + "/readyz")
	if err != nil {
		return r
	}
	defer resp.Body.Close()
	json.NewDecoder(resp.Body).Decode(&r)
	r.status = resp.StatusCode
	return r
}

func (g *gate) metrics() string {
	g.t.Helper()
	resp, err := http.Get("http://" + g.admin + "/metrics")
	if err != nil {
		g.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	return string(b)
}

// reload writes a new policy and waits until it was tried.
func (g *gate) reload(policy string) readyz {
	g.t.Helper()
	before := g.ready().Policy.LastReload.At
	g.write("policy.yaml", policy)
	var r readyz
	g.until("reload", func() bool {
		r = g.ready()
		return r.Policy.LastReload.At != before
	})
	return r
}

func (g *gate) signal(s syscall.Signal) {
	g.t.Helper()
	if err := g.cmd.Process.Signal(s); err != nil {
		g.t.Fatal(err)
	}
}

// wait returns the exit status.
func (g *gate) wait() int {
	g.t.Helper()
	select {
	case <-g.exited:
	case <-time.After(patience):
		g.t.Fatal("the program does not exit")
	}
	return exitCode(g.exitErr)
}

func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

// tool runs an external program and returns its output and exit status. A missing
// program skips the test, except in CI, which installs it.
func tool(t *testing.T, name string, args ...string) (string, int) {
	t.Helper()
	return toolWith(t, nil, name, args...)
}

// toolWith is tool with descriptors for the program, from number 3 on.
func toolWith(t *testing.T, inherited []*os.File, name string, args ...string) (string, int) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("%s is missing; make test installs it", name)
		}
		t.Skipf("%s is not installed; run make test, which installs it", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.ExtraFiles = inherited
	for _, kv := range os.Environ() { // what the machine says about proxies is not part of the test
		if !strings.Contains(strings.ToLower(strings.SplitN(kv, "=", 2)[0]), "proxy") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	out, err := cmd.CombinedOutput()
	return string(out), exitCode(err)
}

// sallyport runs a command of the program.
func (g *gate) sallyport(args ...string) (string, int) {
	g.t.Helper()
	return tool(g.t, binary, append(args, "--config", g.path("sallyport.yaml"))...)
}
