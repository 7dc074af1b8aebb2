package eventlog

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"sync"
)

// Rotate says when a log file is put aside. The zero value never does.
type Rotate struct {
	Size     int64 // bytes after which a new file is begun; 0: never
	Keep     int   // files kept beside the one that is written, path.1 the youngest; at least one
	Compress bool  // files put aside are compressed: path.1.gz
}

// A rotation puts the files of one sink aside. Only the sink's goroutine uses it, and
// it has one file compressed at a time in another, which close waits for.
type rotation struct {
	Rotate
	size    int64 // of the file that is written
	failing bool  // the last turn failed, and that was said

	life    context.Context // ends compressing
	stop    context.CancelFunc
	running sync.WaitGroup
	busy    chan struct{} // holds a value while a file is compressed
	warn    func(err error)
}

func newRotation(r Rotate, f *os.File, warn func(error)) *rotation {
	if r.Size <= 0 {
		return nil
	}
	r.Keep = max(r.Keep, 1)
	rot := &rotation{Rotate: r, busy: make(chan struct{}, 1), warn: warn}
	rot.life, rot.stop = context.WithCancel(context.Background())
	rot.opened(f)
	return rot
}

// opened notes that f is written from now on.
func (r *rotation) opened(f *os.File) {
	r.size = 0
	if fi, err := f.Stat(); err == nil {
		r.size = fi.Size()
		if !fi.Mode().IsRegular() {
			r.Size = 1<<63 - 1 // a device or a pipe has no end
		}
	}
}

// due reports whether n more bytes need a new file. While a file is compressed none
// is begun: the names would move under it.
func (r *rotation) due(n int) bool {
	return r.size > 0 && r.size+int64(n) > r.Size && len(r.busy) == 0
}

// turn puts path, which is f, aside and returns the file to go on with. On an error
// that is nil, and the next attempt comes after as many bytes again.
func (r *rotation) turn(path string, f *os.File) (*os.File, error) {
	r.size = 0
	// Somebody else may have moved or removed the file, and be about to say so.
	aside := at(path, f)
	if aside {
		if err := r.shift(path); err != nil {
			return nil, err
		}
	}
	next, err := openFile(path)
	if err != nil {
		return nil, err
	}
	r.opened(next)
	if r.Compress && aside {
		r.busy <- struct{}{}
		r.running.Go(func() { r.compress(path + ".1") })
	}
	return next, nil
}

// at reports whether f is what path names.
func at(path string, f *os.File) bool {
	mine, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(mine, there)
}

// shift moves path to path.1, that to path.2 and so on; the last one goes.
func (r *rotation) shift(path string) error {
	aside := func(n int, suffix string) string { return path + "." + strconv.Itoa(n) + suffix }
	for _, suffix := range []string{"", ".gz"} {
		if err := os.Remove(aside(r.Keep, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for n := r.Keep - 1; n > 0; n-- {
			if err := os.Rename(aside(n, suffix), aside(n+1, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return os.Rename(path, aside(1, ""))
}

// compress replaces name by name.gz.
func (r *rotation) compress(name string) {
	defer func() { <-r.busy }()
	if err := gzipFile(r.life, name); err != nil && r.life.Err() == nil && !errors.Is(err, fs.ErrNotExist) {
		r.warn(fmt.Errorf("compress: %w", err))
	}
}

func gzipFile(ctx context.Context, name string) (err error) {
	in, err := os.Open(name)
	if err != nil {
		return err
	}
	defer in.Close()
	part := name + ".gz.part"
	out, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	z := gzip.NewWriter(out)
	_, err = io.Copy(z, untilDone{ctx, in})
	if err = errors.Join(err, z.Close(), out.Close()); err != nil {
		os.Remove(part)
		return err
	}
	if err := os.Rename(part, name+".gz"); err != nil {
		return err
	}
	return os.Remove(name)
}

// untilDone reads until ctx ends.
type untilDone struct {
	ctx context.Context
	io.Reader
}

func (u untilDone) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.Reader.Read(p)
}

// close ends compressing; a file that is not finished stays as it was.
func (r *rotation) close() {
	r.stop()
	r.running.Wait()
}
