// Package lastgood keeps a copy of the last policy that was good, with its list
// files, so that a gate can start although the source of its policy cannot be read.
//
// The copy is one zip archive: readable with any tool, checked by its checksums,
// and replaced whole by a rename. Its entries are never unpacked by this program.
// The comment of an entry is the name that the policy has for it.
package lastgood

import (
	"archive/zip"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"sallyport/policy"
)

const (
	// maxEntries bounds the files of a copy.
	maxEntries = 10_000
	// maxList bounds a list file, in bytes.
	maxList = 1 << 30

	policies = "policy/" // folder of the entries that are policy files, in their order
	lists    = "lists/"
)

// Content is what a policy was made of.
type Content struct {
	Revision string // of the policy
	Policies []File // policy files, in their order
	Lists    []File
}

// A File is a policy file or a list file. An error of its reader, or of closing it,
// says that it is not what the policy was made of.
type File struct {
	Name string // of a policy file: for messages; of a list file: as the policy names it
	Open func() (io.ReadCloser, error)
}

// Write puts c at the path name, unless what is there has the same revision. The
// folder must exist. The file is readable by its owner alone, and is complete or not
// there.
func Write(name string, c Content) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("last good policy: %w", err)
		}
	}()
	if old, err := zip.OpenReader(name); err == nil {
		same := old.Comment == c.Revision
		old.Close()
		if same {
			return nil
		}
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err = errors.Join(write(f, c), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

func write(f io.Writer, c Content) error {
	if len(c.Policies) == 0 || len(c.Policies)+len(c.Lists) > maxEntries {
		return fmt.Errorf("%d files; a policy has 1 to %d", len(c.Policies)+len(c.Lists), maxEntries)
	}
	z := zip.NewWriter(f)
	now := time.Now()
	for _, part := range []struct {
		folder string
		files  []File
	}{{policies, c.Policies}, {lists, c.Lists}} {
		for i, file := range part.files {
			w, err := z.CreateHeader(&zip.FileHeader{
				Name:    fmt.Sprintf("%s%04d-%s", part.folder, i, path.Base(filepath.ToSlash(file.Name))),
				Comment: file.Name, Method: zip.Deflate, Modified: now,
			})
			if err != nil {
				return err
			}
			if err := copyFile(w, file); err != nil {
				return err
			}
		}
	}
	return errors.Join(z.SetComment(c.Revision), z.Close())
}

func copyFile(w io.Writer, file File) error {
	r, err := file.Open()
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, r.Close())
}

// Load compiles the policy of the copy at the path name, and tells when it was
// written. Positions in warnings and errors are in the files that were copied. An
// error wraps fs.ErrNotExist if there is no copy.
func Load(name string) (p *policy.Policy, warnings []*policy.Error, written time.Time, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("last good policy: %w", err)
		}
	}()
	z, err := zip.OpenReader(name)
	if err != nil {
		return nil, nil, time.Time{}, fmt.Errorf("%s: %w", name, err)
	}
	defer z.Close()
	if len(z.File) > maxEntries {
		return nil, nil, time.Time{}, fmt.Errorf("%s: more than %d entries", name, maxEntries)
	}
	var fragments []policy.Fragment
	files := map[string]*zip.File{}
	for _, f := range z.File {
		switch {
		case strings.HasPrefix(f.Name, policies):
			data, err := read(f)
			if err != nil {
				return nil, nil, time.Time{}, fmt.Errorf("%s: %s: %w", name, f.Name, err)
			}
			fragments = append(fragments, policy.Fragment{File: f.Comment, Data: data})
			written = f.Modified
		case strings.HasPrefix(f.Name, lists):
			files[f.Comment] = f
		}
	}
	if len(fragments) == 0 {
		return nil, nil, time.Time{}, fmt.Errorf("%s: no policy is in it", name)
	}
	p, warnings, err = policy.LoadFragments(fragments, policy.Options{
		Now: time.Now(),
		Open: func(list string) (io.ReadCloser, error) {
			f, ok := files[list]
			if !ok {
				return nil, fmt.Errorf("%s: list file %s is not in it", name, list)
			}
			r, err := f.Open()
			if err != nil {
				return nil, err
			}
			return &bounded{r, maxList}, nil
		},
	})
	return p, warnings, written, err
}

// read returns a policy file.
func read(f *zip.File) ([]byte, error) {
	r, err := f.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(&bounded{r, policy.MaxDocument})
}

// bounded fails where an entry goes on beyond left bytes: archives can hold more
// than their size tells.
type bounded struct {
	io.ReadCloser
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, errors.New("too large")
	}
	return n, err
}
