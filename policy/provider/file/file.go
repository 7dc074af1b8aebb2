// Package file loads a policy from a file, with the list files that it names, and
// tells when any of them has changed.
//
// What counts is content: a [Provider] remembers a hash of what it loaded last, so
// that neither a touched file nor an event that was for another file is a change.
// It watches folders rather than files, and those of every symbolic link on the
// way, so it follows editors that rename, Kubernetes volumes that swap a link, and
// folders that are removed and made again. Where the system reports nothing
// (network file systems, no watches left) it looks every few seconds.
package file

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyport/policy"
	"sallyport/policy/provider/lastgood"
)

const (
	// maxList bounds a list file, in bytes. The policy itself is bounded by
	// [policy.MaxDocument].
	maxList = 1 << 30
	// settled is how old the last change of a file must be for its size and time to
	// stand for its content: file systems give changes in quick succession one time.
	settled = 2 * time.Second
	// large is a size in bytes from which on hashing a file takes long.
	large = 1 << 20
	// maxChecks bounds how often a check begins again because a Load came between.
	maxChecks = 3
)

// A Provider loads the policy from one file. Its methods may be called from
// several goroutines.
type Provider struct {
	// OnError, if set before Watch, is told why changes are noticed only every few
	// seconds for a while. Watch calls it from its goroutine.
	OnError func(error)
	// Background, if set before Watch, runs what Watch does that takes long, and returns
	// when it has ended. Watch calls it from its goroutine.
	Background func(func())

	path   string
	loaded chan struct{} // a Load has ended
	system system

	mu    sync.Mutex // guards the rest
	loads int
	files map[string]state // what was read last, by path
	good  good             // what the last good policy was made of
}

// good is what a policy was made of.
type good struct {
	revision string
	policies []string          // paths of the policy files, in their order
	lists    map[string]string // path of each list file, by its name in the policy
	files    map[string]state  // what was read
}

// New returns a Provider for the policy file at path, or for the folder of
// fragments at path. It touches no file.
func New(path string) *Provider {
	path = filepath.Clean(path)
	return &Provider{
		path:   path,
		loaded: make(chan struct{}, 1),
		system: defaultSystem,
		files:  map[string]state{path: {}},
	}
}

// Load reads and compiles the policy. Of a folder it reads every *.yaml file in the
// order of names, but for hidden ones; together they are the policy (see
// [policy.LoadFragments]). Names of list files are relative to the folder of the
// policy file, or to the folder. Only regular files are read; anything else is refused
// at once. An error for mistakes in the policy is a [policy.Errors].
func (p *Provider) Load() (*policy.Policy, []*policy.Error, error) {
	read := newReading()
	compiled, warnings, err := p.load(&read)
	p.mu.Lock()
	p.files = read.files
	if err == nil {
		p.good = good{compiled.Revision(), read.policies, read.lists, read.files}
	}
	p.loads++
	p.mu.Unlock()
	select {
	case p.loaded <- struct{}{}:
	default: // Watch has not noticed the last one yet
	}
	return compiled, warnings, err
}

func (p *Provider) load(read *reading) (*policy.Policy, []*policy.Error, error) {
	files, folder := []string{p.path}, filepath.Dir(p.path)
	if isFolder(p.path) {
		var err error
		if files, err = read.list(p.path); err != nil {
			return nil, nil, fmt.Errorf("policy: %w", err)
		}
		folder = p.path
	}
	var fragments []policy.Fragment
	for _, name := range files {
		f, err := read.open(name, policy.MaxDocument)
		if err != nil {
			return nil, nil, fmt.Errorf("policy: %w", err)
		}
		data, err := io.ReadAll(f)
		f.Close()
		if err != nil {
			return nil, nil, fmt.Errorf("policy: %w", err)
		}
		fragments = append(fragments, policy.Fragment{File: name, Data: data})
	}
	read.policies = files
	return policy.LoadFragments(fragments, policy.Options{
		Now: time.Now(),
		Open: func(name string) (io.ReadCloser, error) {
			path := name
			if !filepath.IsAbs(path) {
				path = filepath.Join(folder, path)
			}
			read.lists[name] = path
			return read.open(path, maxList)
		},
	})
}

// Keep writes what the last good policy was loaded from to the path name, for
// [lastgood.Load]. It is an error if a file has changed meanwhile; the change will be
// loaded, and then can be kept, in its turn.
func (p *Provider) Keep(name string) error {
	p.mu.Lock()
	g := p.good
	p.mu.Unlock()
	again := func(name, path string, limit int64) lastgood.File {
		return lastgood.File{Name: name, Open: func() (io.ReadCloser, error) {
			read := newReading()
			f, err := read.open(path, limit)
			if err != nil {
				return nil, err
			}
			return &same{f, &read, g.files[path].sum}, nil
		}}
	}
	c := lastgood.Content{Revision: g.revision}
	for _, path := range g.policies {
		c.Policies = append(c.Policies, again(path, path, policy.MaxDocument))
	}
	for _, list := range slices.Sorted(maps.Keys(g.lists)) {
		c.Lists = append(c.Lists, again(list, g.lists[list], maxList))
	}
	return lastgood.Write(name, c)
}

// same is a file that is read again; what is read must be what was read before.
type same struct {
	*tracked
	read   *reading
	before [sha256.Size]byte
}

// Close reports a difference.
func (s *same) Close() error {
	err := s.tracked.Close()
	if path := s.file.Name(); err == nil && s.read.files[path].sum != s.before {
		err = fmt.Errorf("%s has changed meanwhile", path)
	}
	return err
}

func isFolder(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// maxFragments bounds the files of a folder.
const maxFragments = 1000

// list returns the policy files in the folder at path, in the order of names, and
// notes which there are.
func (r *reading) list(path string) ([]string, error) {
	names, err := filepath.Glob(filepath.Join(escapeGlob(path), "[^.]*.yaml"))
	if err == nil && (len(names) == 0 || len(names) > maxFragments) {
		err = fmt.Errorf("%s: %d *.yaml files; a folder of policy files has 1 to %d", path, len(names), maxFragments)
	}
	if err != nil {
		r.files[path] = state{problem: err.Error()}
		return nil, err
	}
	r.files[path] = state{sum: sha256.Sum256([]byte(strings.Join(names, "\x00")))}
	return names, nil
}

// escapeGlob returns path as a pattern that matches it alone.
func escapeGlob(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// changed reports whether any file differs from what was read of it last, by Load
// or by changed itself.
func (p *Provider) changed() bool {
	for range maxChecks {
		p.mu.Lock()
		files, loads := maps.Clone(p.files), p.loads
		p.mu.Unlock()
		differs := false
		for path, before := range files {
			now := p.inspect(path, before)
			differs = differs || now.sum != before.sum || now.problem != before.problem
			files[path] = now
		}
		p.mu.Lock()
		if p.loads == loads {
			p.files = files
			p.mu.Unlock()
			return differs
		}
		p.mu.Unlock()
	}
	return true
}

// A state is what is known of a file.
type state struct {
	info    fs.FileInfo // nil if it cannot be read
	seen    time.Time   // when info was taken
	sum     [sha256.Size]byte
	problem string // why it cannot be read
}

// inspect returns the present state of path, and reads the file only if it may
// differ from before.
func (p *Provider) inspect(path string, before state) state {
	read := newReading()
	if path == p.path && isFolder(path) {
		_, _ = read.list(path) // the state says what is wrong
		return read.files[path]
	}
	limit := int64(maxList)
	if path == p.path || filepath.Dir(path) == p.path && filepath.Ext(path) == ".yaml" {
		limit = policy.MaxDocument
	}
	f, err := read.open(path, limit)
	if err != nil {
		return read.files[path]
	}
	if b := before.info; b != nil && os.SameFile(b, f.state.info) && b.Size() == f.state.info.Size() &&
		b.ModTime().Equal(f.state.info.ModTime()) && before.seen.Sub(b.ModTime()) > settled {
		f.file.Close()
		return before
	}
	if p.Background != nil && f.state.info.Size() >= large {
		p.Background(func() { f.Close() })
	} else {
		f.Close()
	}
	return read.files[path]
}

// A reading notes the state of every file that is read.
type reading struct {
	files    map[string]state
	policies []string          // as in good
	lists    map[string]string // as in good
}

func newReading() reading { return reading{files: map[string]state{}, lists: map[string]string{}} }

// open opens the regular file at path for reading up to limit bytes.
func (r *reading) open(path string, limit int64) (*tracked, error) {
	f, info, err := openRegular(path)
	if err == nil && info.Size() > limit {
		f.Close()
		err = errTooLarge(path, limit)
	}
	if err != nil {
		r.files[path] = state{problem: err.Error()}
		return nil, err
	}
	return &tracked{file: f, limit: limit, sum: sha256.New(), state: state{info: info, seen: time.Now()},
		done: func(s state) { r.files[path] = s }}, nil
}

func errTooLarge(path string, limit int64) error {
	return fmt.Errorf("read %s: larger than %d MiB", path, limit>>20)
}

// openRegular opens path, unless opening or reading it could block or do
// something: only regular files are opened.
func openRegular(path string) (*os.File, fs.FileInfo, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, err
	}
	if err := checkRegular(path, info); err != nil {
		return nil, nil, err
	}
	// It may have been replaced since: O_NONBLOCK keeps a FIFO from blocking here.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	if info, err = f.Stat(); err == nil {
		err = checkRegular(path, info)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

func checkRegular(path string, info fs.FileInfo) error {
	var kind string
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		kind = "a folder"
	case mode&fs.ModeNamedPipe != 0:
		kind = "a named pipe"
	case mode&fs.ModeSocket != 0:
		kind = "a socket"
	default:
		kind = "a device"
	}
	return fmt.Errorf("open %s: it is %s; name a regular file", path, kind)
}

// tracked is an open file whose content is hashed as it is read.
type tracked struct {
	file  *os.File
	read  int64
	limit int64
	sum   hash.Hash
	state state
	done  func(state)
}

// Read reads on; a file that has grown over its limit meanwhile is an error.
func (t *tracked) Read(b []byte) (int, error) {
	n, err := t.file.Read(b)
	t.sum.Write(b[:n])
	if t.read += int64(n); t.read > t.limit {
		return 0, errTooLarge(t.file.Name(), t.limit)
	}
	return n, err
}

// Close reads what is left, for the hash, and notes the state of the file.
func (t *tracked) Close() error {
	if _, err := io.Copy(io.Discard, t); err != nil {
		t.state.problem = err.Error()
	}
	t.sum.Sum(t.state.sum[:0])
	t.done(t.state)
	return t.file.Close()
}

// checkFolder reports why the folder of path cannot be watched.
func checkFolder(path string) error {
	dir := filepath.Dir(path)
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = &fs.PathError{Op: "open", Path: dir, Err: syscall.ENOTDIR}
	}
	if err != nil {
		return fmt.Errorf("watch %s: %w", path, err)
	}
	return nil
}
