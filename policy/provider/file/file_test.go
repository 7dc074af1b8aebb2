package file

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/goleak"

	"sallyport/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// policyFor returns a policy that allows name and nothing else.
func policyFor(name string) string {
	return "version: 1\ngroups: [{name: g, sources: [10.0.0.0/8], allow: [" + name + "]}]\n"
}

const policyWithList = `version: 1
lists: [{name: l, file: lists/l.txt}]
groups: [{name: g, sources: [10.0.0.0/8], allow: ["@l"]}]
`

// write writes a file in place, and its folder if need be.
func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// must fails the test on err.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func allows(p *policy.Policy, name string) bool {
	return p.Decide(policy.Request{Source: netip.MustParseAddr("10.0.0.1"), Name: policy.MustName(name), Port: 443}).Verdict == policy.Allow
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "policy.yaml")
	write(t, path, policyWithList)
	write(t, filepath.Join(dir, "lists/l.txt"), "a.example\n")
	p, warnings, err := New(path).Load()
	if err != nil || len(warnings) > 0 || !allows(p, "a.example") || allows(p, "b.example") {
		t.Fatalf("Load: %v, %v", warnings, err)
	}

	absolute := filepath.Join(dir, "elsewhere.txt")
	write(t, absolute, "b.example\n")
	write(t, path, strings.Replace(policyWithList, "lists/l.txt", absolute, 1))
	if p, _, err = New(path).Load(); err != nil || !allows(p, "b.example") {
		t.Errorf("Load with an absolute list file: %v", err)
	}

	write(t, path, "version: 1\ngroup: []\n")
	var mistakes policy.Errors
	if p, _, err = New(path).Load(); p != nil || !errors.As(err, &mistakes) || mistakes[0].Pos != (policy.Pos{File: path, Line: 2, Column: 1}) {
		t.Errorf("Load of a broken policy: %v", err)
	}
}

func TestLoadRefusesWhatIsNoRegularFile(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "folder"), 0o755))
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o644))
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	must(t, err)
	defer l.Close()
	big, err := os.Create(filepath.Join(dir, "big"))
	must(t, err)
	must(t, big.Truncate(maxList+1))
	must(t, big.Close())
	for name, want := range map[string]string{
		filepath.Join(dir, "folder"):       "folder",
		filepath.Join(dir, "pipe"):         "it is a named pipe; name a regular file",
		filepath.Join(dir, "socket"):       "it is a socket; name a regular file",
		"/dev/zero":                        "it is a device; name a regular file",
		filepath.Join(dir, "none"):         "no such file or directory",
		filepath.Join(dir, "folder/../ü/"): "no such file or directory",
		filepath.Join(dir, "big"):          "larger than",
	} {
		if _, _, err := New(name).Load(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Load of %s: %v; want %q", name, err, want)
		}
		path := filepath.Join(dir, "policy.yaml")
		write(t, path, strings.Replace(policyWithList, "lists/l.txt", name, 1))
		if _, _, err := New(path).Load(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Load of a list file %s: %v; want %q", name, err, want)
		}
	}
}

func TestLoadStopsAtLimitOfGrowingFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "12345")
	read := reading{files: map[string]state{}}
	f, err := read.open(path, 8)
	must(t, err)
	write(t, path, "1234567890")
	b := make([]byte, 20)
	if n, err := f.Read(b); n != 0 || err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("Read = %d, %v", n, err)
	}
	f.Close()
	if read.files[path].problem == "" {
		t.Error("the state of the file says nothing of it")
	}
}

func TestChangedComparesContent(t *testing.T) {
	dir := t.TempDir()
	path, list := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "lists/l.txt")
	write(t, path, policyWithList)
	write(t, list, "a.example\n")
	p := New(path)
	steps := []struct {
		name string
		do   func()
		want bool
	}{
		{"before the first Load", func() {}, true},
		{"after Load", func() { p.Load() }, false},
		{"touched", func() { now := time.Now(); must(t, os.Chtimes(path, now, now.Add(time.Hour))) }, false},
		{"written anew", func() { write(t, list, "a.example\n") }, false},
		{"replaced by the same", func() {
			write(t, list+"~", "a.example\n")
			must(t, os.Rename(list+"~", list))
		}, false},
		{"changed in the same moment, to the same length", func() { write(t, list, "b.example\n") }, true},
		{"looked at again", func() {}, false},
		{"changed long ago", func() {
			write(t, list, "c.example\n")
			must(t, os.Chtimes(list, time.Time{}, time.Now().Add(-time.Hour)))
		}, true},
		{"not changed since", func() {}, false},
		{"removed", func() { must(t, os.Remove(list)) }, true},
		{"still removed", func() {}, false},
		{"Load of a missing list", func() { p.Load() }, false},
		{"made again", func() { write(t, list, "c.example\n") }, true},
		{"a folder instead", func() {
			must(t, os.Remove(list))
			must(t, os.Mkdir(list, 0o755))
		}, true},
		{"a policy without the list", func() {
			write(t, path, policyFor("a.example"))
			p.Load()
			must(t, os.Remove(list))
		}, false},
	}
	for _, s := range steps {
		s.do()
		if got := p.changed(); got != s.want {
			t.Errorf("%s: changed() = %v, want %v", s.name, got, s.want)
		}
	}
}

// A watched is a Provider under Watch and what it has loaded.
type watched struct {
	*Provider
	t     *testing.T
	loads chan load
}

type load struct {
	policy *policy.Policy
	err    error
}

// watchFile loads path and watches it until the test ends. Each change is loaded.
// Polling is off unless set says otherwise.
func watchFile(t *testing.T, path string, set func(*Provider)) *watched {
	t.Helper()
	w := &watched{New(path), t, make(chan load, 1000)}
	w.system.poll = time.Hour
	w.OnError = func(err error) { t.Errorf("OnError(%v)", err) }
	if set != nil {
		set(w.Provider)
	}
	started, newWatcher := make(chan struct{}, 1), w.system.newWatcher
	w.system.newWatcher = func() (*fsnotify.Watcher, error) {
		select {
		case started <- struct{}{}:
		default:
		}
		return newWatcher()
	}
	w.Load()
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		if err := w.Watch(ctx, w.reload); err != nil {
			t.Errorf("Watch: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); done.Wait() })
	<-started
	return w
}

func (w *watched) reload() {
	p, _, err := w.Load()
	w.loads <- load{p, err}
}

// wants waits for a load that ok takes.
func (w *watched) wants(what string, ok func(load) bool) {
	w.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case l := <-w.loads:
			if ok(l) {
				return
			}
		case <-deadline:
			w.t.Fatalf("no load with %s", what)
		}
	}
}

func (w *watched) wantsName(name string) {
	w.t.Helper()
	w.wants(name, func(l load) bool { return l.err == nil && allows(l.policy, name) })
}

func (w *watched) wantsError() {
	w.t.Helper()
	w.wants("an error", func(l load) bool { return l.err != nil })
}

// TestChangedInBackground: what takes long to hash is hashed where Background says, the rest is not.
func TestChangedInBackground(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	list := filepath.Join(filepath.Dir(path), "lists/l.txt")
	write(t, path, policyWithList)
	write(t, list, "a.example\n")
	p := New(path)
	aside := 0
	p.Background = func(f func()) { aside++; f() }
	if _, _, err := p.Load(); err != nil {
		t.Fatal(err)
	}
	if p.changed() || aside != 0 {
		t.Errorf("two small files that have not changed: hashed aside %d times, want 0", aside)
	}
	write(t, list, "a.example\n"+strings.Repeat("# large\n", large/8))
	if !p.changed() || aside != 1 {
		t.Errorf("a large file that has changed: hashed aside %d times, want 1", aside)
	}
}

func TestWatchPolicyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	write(t, path, policyFor("a.example"))
	w := watchFile(t, path, nil)

	write(t, path, policyFor("in-place.example"))
	w.wantsName("in-place.example")

	write(t, path+"~", policyFor("renamed.example"))
	must(t, os.Rename(path+"~", path))
	w.wantsName("renamed.example")

	must(t, os.Rename(path, path+".bak")) // as vi does
	write(t, path, policyFor("saved.example"))
	w.wantsName("saved.example")

	must(t, os.Remove(path))
	w.wantsError()
	write(t, path, policyFor("again.example"))
	w.wantsName("again.example")

	write(t, path, "version: 1\ngroups: [")
	w.wantsError()
	write(t, path, policyFor("mended.example"))
	w.wantsName("mended.example")
}

func TestWatchListFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "policy.yaml")
	write(t, path, policyFor("a.example"))
	w := watchFile(t, path, nil)

	write(t, path, policyWithList) // names a list in a folder that there is not
	w.wantsError()
	write(t, filepath.Join(dir, "lists/l.txt"), "a.example\n")
	w.wantsName("a.example")
	write(t, filepath.Join(dir, "lists/l.txt"), "b.example\n")
	w.wantsName("b.example")
	must(t, os.RemoveAll(filepath.Join(dir, "lists")))
	w.wantsError()
	write(t, filepath.Join(dir, "lists/l.txt"), "c.example\n")
	w.wantsName("c.example")
}

// TestWatchFolder removes the policy's own folder, and puts another in its place.
func TestWatchFolder(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "sallyport")
	path := filepath.Join(dir, "policy.yaml")
	write(t, path, policyFor("a.example"))
	w := watchFile(t, path, nil)
	write(t, path, policyFor("watching.example")) // without the folder to begin with, Watch is an error
	w.wantsName("watching.example")

	must(t, os.RemoveAll(dir))
	w.wantsError()
	write(t, path, policyFor("b.example"))
	w.wantsName("b.example")

	write(t, filepath.Join(parent, "new/policy.yaml"), policyFor("c.example"))
	must(t, os.Rename(dir, filepath.Join(parent, "old")))
	must(t, os.Rename(filepath.Join(parent, "new"), dir))
	w.wantsName("c.example")
	write(t, path, policyFor("d.example"))
	w.wantsName("d.example")
}

// TestFragments loads and watches a folder of policy files.
func TestFragments(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "policy.d")
	write(t, filepath.Join(dir, "10-a.yaml"), policyFor("a.example"))
	write(t, filepath.Join(dir, "README"), "not a policy")
	write(t, filepath.Join(dir, ".hidden.yaml"), "not a policy")
	w := watchFile(t, dir+"/", nil)
	if p, _, err := w.Load(); err != nil || !allows(p, "a.example") {
		t.Fatalf("Load = %v, %v", p, err)
	}

	write(t, filepath.Join(dir, "20-b.yaml"), "version: 1\nlists: [{name: l, file: l.txt}]\ngroups: [{name: b, sources: [10.99.0.0/16], allow: [\"@l\"]}]\n")
	w.wants("a missing list", func(l load) bool { return l.err != nil && strings.Contains(l.err.Error(), "20-b.yaml:2:") })
	write(t, filepath.Join(dir, "l.txt"), "list.example\n")
	w.wants("two fragments", func(l load) bool { return l.err == nil && len(l.policy.GroupNames()) == 2 })

	write(t, filepath.Join(dir, "10-a.yaml"), policyFor("changed.example"))
	w.wantsName("changed.example")
	write(t, filepath.Join(dir, "30-c.yaml"), policyFor("c.example")) // the same group again
	w.wants("a conflict", func(l load) bool { return l.err != nil && strings.Contains(l.err.Error(), "30-c.yaml") })
	must(t, os.Remove(filepath.Join(dir, "30-c.yaml")))
	w.wantsName("changed.example")
	must(t, os.Remove(filepath.Join(dir, "20-b.yaml")))
	w.wants("one fragment", func(l load) bool { return l.err == nil && len(l.policy.GroupNames()) == 1 })
	must(t, os.Remove(filepath.Join(dir, "10-a.yaml")))
	w.wants("no fragment", func(l load) bool { return l.err != nil && strings.Contains(l.err.Error(), "0 *.yaml files") })
}

// TestWatchKubernetesVolume swaps the ..data link of a ConfigMap volume.
func TestWatchKubernetesVolume(t *testing.T) {
	dir := t.TempDir()
	publish := func(version, name string) {
		write(t, filepath.Join(dir, version, "policy.yaml"), policyWithList)
		write(t, filepath.Join(dir, version, "lists/l.txt"), name+"\n")
		must(t, os.Symlink(version, filepath.Join(dir, "..data_tmp")))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	publish("..1", "a.example")
	must(t, os.Symlink("..data/policy.yaml", filepath.Join(dir, "policy.yaml")))
	must(t, os.Symlink("..data/lists", filepath.Join(dir, "lists")))
	w := watchFile(t, filepath.Join(dir, "policy.yaml"), nil)
	publish("..2", "b.example")
	must(t, os.RemoveAll(filepath.Join(dir, "..1")))
	w.wantsName("b.example")
	publish("..3", "c.example")
	must(t, os.RemoveAll(filepath.Join(dir, "..2")))
	w.wantsName("c.example")
}

// TestWatchLinkedFolder swaps a link in the middle of the path, far from the file.
func TestWatchLinkedFolder(t *testing.T) {
	dir := t.TempDir()
	current := filepath.Join(dir, "current")
	write(t, filepath.Join(dir, "releases/1/etc/policy.yaml"), policyFor("a.example"))
	write(t, filepath.Join(dir, "releases/2/etc/policy.yaml"), policyFor("b.example"))
	must(t, os.Symlink(filepath.Join(dir, "releases/1"), current))
	w := watchFile(t, filepath.Join(current, "etc/policy.yaml"), nil)
	must(t, os.Symlink("releases/2", current+"~"))
	must(t, os.Rename(current+"~", current))
	w.wantsName("b.example")
	write(t, filepath.Join(dir, "releases/2/etc/policy.yaml"), policyFor("c.example"))
	w.wantsName("c.example")
}

func TestWatchBeforeLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	p := New(path)
	ctx, cancel := context.WithCancel(context.Background())
	calls := 0
	if err := p.Watch(ctx, func() { calls++; cancel() }); err != nil || calls != 1 {
		t.Errorf("Watch = %v after %d calls", err, calls)
	}
}

func TestWatchWithoutFolder(t *testing.T) {
	dir := t.TempDir()
	err := New(filepath.Join(dir, "none/policy.yaml")).Watch(t.Context(), nil)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Watch in a missing folder: %v", err)
	}
	write(t, filepath.Join(dir, "file"), "")
	err = New(filepath.Join(dir, "file/policy.yaml")).Watch(t.Context(), nil)
	if !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("Watch below a file: %v", err)
	}
}

// TestWatchPolls has no watcher at first, then one, which dies.
func TestWatchPolls(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	write(t, path, policyFor("a.example"))
	noWatcher := errors.New("too many watchers")
	problems := make(chan error, 100)
	watchers := make(chan *fsnotify.Watcher, 1)
	attempts := 0
	w := watchFile(t, path, func(p *Provider) {
		p.OnError = func(err error) { problems <- err }
		p.system = system{poll: time.Millisecond, newWatcher: func() (*fsnotify.Watcher, error) {
			if attempts++; attempts < 4 {
				return nil, noWatcher
			}
			watcher, err := fsnotify.NewWatcher()
			if err == nil {
				watchers <- watcher
			}
			return watcher, err
		}}
	})
	write(t, path, policyFor("b.example"))
	w.wantsName("b.example")
	if err := <-problems; err != noWatcher {
		t.Errorf("first problem: %v", err)
	}
	must(t, (<-watchers).Close())
	if err := <-problems; err != fsnotify.ErrClosed {
		t.Errorf("second problem: %v", err)
	}
	write(t, path, policyFor("c.example"))
	w.wantsName("c.example")
	must(t, (<-watchers).Close()) // there is another
}

func TestFolders(t *testing.T) {
	dir := t.TempDir()
	if real, err := filepath.EvalSymlinks(dir); err != nil || real != dir {
		t.Skipf("the folder of tests, %s, is a link: %v", dir, err)
	}
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	must(t, os.Symlink("a/b", filepath.Join(dir, "l")))
	must(t, os.Symlink("../../l/./file", filepath.Join(dir, "a/b/m")))
	must(t, os.Symlink("loop", filepath.Join(dir, "loop")))
	for path, want := range map[string]string{
		"a/b/file":       "a/b",
		"a/none/file":    "a",
		"l/file":         ". a/b",
		"l/m":            ". a/b . a/b",
		"l/../file":      ". a",
		"l/../../x/file": ". .",
	} {
		var got []string
		for _, d := range folders(dir + "/" + path) {
			rel, err := filepath.Rel(dir, d)
			must(t, err)
			got = append(got, rel)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("folders(%s) = %v, want %s", path, got, want)
		}
	}
	if got := folders(dir + "/loop"); len(got) != maxLinks+1 {
		t.Errorf("folders of a loop: %d", len(got))
	}
}
