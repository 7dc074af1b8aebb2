package file

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// quiet is how long no further event must come before files are looked at, so
	// that most are whole again; patience bounds the wait if events never cease.
	quiet    = 100 * time.Millisecond
	patience = time.Second
	// pollEvery is how often files are looked at without any event.
	pollEvery = 5 * time.Second
	// maxRest bounds how many polls pass until a watcher that failed is tried again.
	maxRest = 60
	// maxLinks bounds the symbolic links on the way to a file, as the kernel does.
	maxLinks = 40
)

// system is what a watch needs of the operating system.
type system struct {
	poll       time.Duration
	newWatcher func() (*fsnotify.Watcher, error)
}

var defaultSystem = system{pollEvery, fsnotify.NewWatcher}

// Watch calls changed each time the policy file, or a list file that it named when
// it was last loaded, may have changed since; at once if there has been no Load. It
// calls changed from its own goroutine, a tenth of a second after the last event of
// a burst, and expects it to Load, or another goroutine to do so.
//
// Watch returns nil when ctx ends, and an error only if the policy file's folder is
// not there to begin with. If the system's notification fails it goes on by looking
// every few seconds, and tries to have notification back less and less often.
func (p *Provider) Watch(ctx context.Context, changed func()) error {
	if err := checkFolder(p.path); err != nil {
		return err
	}
	w := watch{provider: p}
	w.start()
	defer w.stop()
	poll := time.NewTicker(p.system.poll)
	defer poll.Stop()
	look := time.NewTimer(0) // something may have changed since Load
	defer look.Stop()
	var since time.Time // of the first event that has not been looked at
	for {
		due := false
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-w.events():
			w.heard(ok)
		case err, ok := <-w.errors():
			if !ok {
				err = fsnotify.ErrClosed
			}
			if !errors.Is(err, fsnotify.ErrEventOverflow) { // then we look, as after an event
				w.fail(err)
			}
		case <-p.loaded: // perhaps with other list files
		case <-poll.C:
			w.revive()
			due = since.IsZero()
		case <-look.C:
			due = true
		}
		if !due {
			if since.IsZero() {
				since = time.Now()
			}
			look.Reset(min(quiet, time.Until(since.Add(patience))))
			continue
		}
		since = time.Time{}
		w.follow() // before looking, so that nothing comes between
		if p.changed() {
			changed()
		}
	}
}

// A watch is one run of Watch.
type watch struct {
	provider *Provider
	watcher  *fsnotify.Watcher // nil: polling only
	rest     int               // polls until the next attempt to have a watcher
	pause    int               // rest after the next failure
	reported string            // the last problem
}

func (w *watch) start() {
	watcher, err := w.provider.system.newWatcher()
	if err != nil {
		w.fail(err)
		return
	}
	w.watcher = watcher
}

func (w *watch) stop() {
	if w.watcher != nil {
		w.watcher.Close() // releases a descriptor; nothing could be done about an error
		w.watcher = nil
	}
}

// fail gives the watcher up for a while.
func (w *watch) fail(err error) {
	w.report(err)
	w.stop()
	w.pause = min(max(1, 2*w.pause), maxRest)
	w.rest = w.pause
}

// heard notes that the watcher works, or else that it has ended.
func (w *watch) heard(ok bool) {
	if !ok {
		w.fail(fsnotify.ErrClosed)
		return
	}
	w.pause, w.reported = 0, ""
}

// revive counts one poll, and tries to have a watcher again if it is time.
func (w *watch) revive() {
	if w.watcher != nil {
		return
	}
	if w.rest--; w.rest <= 0 {
		w.start()
	}
}

// report tells of a problem once, however often it comes back.
func (w *watch) report(err error) {
	if f := w.provider.OnError; f != nil && err.Error() != w.reported {
		f(err)
	}
	w.reported = err.Error()
}

func (w *watch) events() <-chan fsnotify.Event {
	if w.watcher == nil {
		return nil
	}
	return w.watcher.Events
}

func (w *watch) errors() <-chan error {
	if w.watcher == nil {
		return nil
	}
	return w.watcher.Errors
}

// follow has the watcher watch the folders that matter now, and no others.
func (w *watch) follow() {
	if w.watcher == nil {
		return
	}
	w.provider.mu.Lock()
	paths := slices.Collect(maps.Keys(w.provider.files))
	w.provider.mu.Unlock()
	wanted := map[string]bool{}
	for _, path := range paths {
		for _, dir := range folders(path) {
			wanted[dir] = true
		}
	}
	for dir := range wanted {
		// Known ones too: there may be another folder under the name. One that is
		// gone by now has sent an event that is looked at next.
		if err := w.watcher.Add(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			w.report(err)
		}
	}
	for _, dir := range w.watcher.WatchList() {
		if !wanted[dir] {
			_ = w.watcher.Remove(dir) // it may be gone already
		}
	}
}

// folders returns the folders in which a change can change what path leads to: those
// of all symbolic links on the way and that of the file, or as far as there is a way.
func folders(path string) []string {
	if !filepath.IsAbs(path) {
		dir, err := os.Getwd()
		if err != nil {
			dir = "."
		}
		path = dir + string(filepath.Separator) + path
	}
	volume := filepath.VolumeName(path)
	root := volume + string(filepath.Separator)
	at, rest := root, split(path[len(volume):])
	var dirs []string
	for links := 0; len(rest) > 0 && links <= maxLinks; {
		next := filepath.Join(at, rest[0]) // at holds no links, so that Join may resolve ".."
		info, err := os.Lstat(next)
		if err != nil || len(rest) == 1 || info.Mode()&os.ModeSymlink != 0 {
			dirs = append(dirs, at)
		}
		if err != nil {
			break
		}
		rest = rest[1:]
		if info.Mode()&os.ModeSymlink == 0 {
			at = next
			continue
		}
		target, err := os.Readlink(next)
		if err != nil {
			break
		}
		if filepath.IsAbs(target) {
			at, target = root, target[len(filepath.VolumeName(target)):]
		}
		rest = append(split(target), rest...)
		links++
	}
	return dirs
}

// split returns the elements of path.
func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r < 0x80 && os.IsPathSeparator(uint8(r)) })
}
