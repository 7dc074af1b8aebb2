package lastgood

import (
	"archive/zip"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/policy"
)

// text returns a File with that content.
func text(name, content string) File {
	return File{name, func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil }}
}

const document = `version: 1
lists: [{name: l, file: ../lists/l.txt}, {name: m, file: /etc/lists/l.txt}]
groups: [{name: g, sources: [10.0.0.0/8], allow: ["@l", "@m"]}]
`

func content() Content {
	return Content{Revision: "r1", Policies: []File{text("/etc/policy.d/a.yaml", document), text("/etc/policy.d/b.yaml", "version: 1\ngroups: [{name: h, users: [u]}]\n")},
		Lists: []File{text("../lists/l.txt", "a.test\n"), text("/etc/lists/l.txt", "b.test\nc.test\n")}}
}

func TestWriteAndLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "last-good.zip")
	if _, _, _, err := Load(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load without a copy: %v", err)
	}
	began := time.Now().Add(-3 * time.Second) // zip counts in steps of two seconds
	if err := Write(path, content()); err != nil {
		t.Fatal(err)
	}
	p, _, written, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if p.Names() != 3 || len(p.GroupNames()) != 2 || written.Before(began) || written.After(time.Now()) {
		t.Errorf("Load: %d names, groups %v, written %v", p.Names(), p.GroupNames(), written)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the copy has mode %v, %v", info.Mode(), err)
	}
	// The same revision is not written again.
	before, _ := os.Stat(path)
	if err := Write(path, content()); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.Stat(path); !os.SameFile(before, after) {
		t.Error("the same revision was written again")
	}
	c := content()
	c.Revision, c.Lists[0] = "r2", text("../lists/l.txt", "x.test\ny.test\n")
	if err := Write(path, c); err != nil {
		t.Fatal(err)
	}
	if p, _, _, err = Load(path); err != nil || p.Names() != 4 {
		t.Errorf("Load after the second Write: %v, %v", p, err)
	}
}

func TestWriteLeavesTheOldCopy(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "last-good.zip")
	if err := Write(path, content()); err != nil {
		t.Fatal(err)
	}
	changed := errors.New("has changed meanwhile")
	c := content()
	c.Revision = "r2"
	c.Lists[1].Open = func() (io.ReadCloser, error) { return nil, changed }
	if err := Write(path, c); !errors.Is(err, changed) {
		t.Errorf("Write: %v, want %v", err, changed)
	}
	if p, _, _, err := Load(path); err != nil || p.Names() != 3 {
		t.Errorf("the old copy: %v", err)
	}
	files, _ := os.ReadDir(dir)
	if len(files) != 1 {
		t.Errorf("files left behind: %v", files)
	}
	if err := Write(filepath.Join(dir, "none", "x.zip"), c); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Write into a folder that is not there: %v", err)
	}
}

func TestLoadOfBadCopies(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.zip")
	if err := Write(good, content()); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	flipped := append([]byte(nil), whole...)
	flipped[64] ^= 0x55 // in the data of the first entry
	missing := content()
	missing.Revision, missing.Lists = "r3", nil
	none := filepath.Join(dir, "missing.zip")
	if err := Write(none, missing); err != nil {
		t.Fatal(err)
	}
	bomb := filepath.Join(dir, "bomb.zip")
	f, err := os.Create(bomb)
	if err != nil {
		t.Fatal(err)
	}
	z := zip.NewWriter(f)
	w, err := z.Create(policies + "0000-x.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(w, zeros{}, policy.MaxDocument+1); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(z.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		data []byte
		path string
	}{
		{name: "empty"}, {name: "cut short", data: whole[:len(whole)-30]}, {name: "damaged", data: flipped}, {name: "not an archive", data: []byte("version: 1\n")},
		{name: "without a list", path: none}, {name: "a bomb", path: bomb}, {name: "a folder", path: dir},
	} {
		if tt.path == "" {
			tt.path = filepath.Join(dir, "bad.zip")
			if err := os.WriteFile(tt.path, tt.data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if p, _, _, err := Load(tt.path); err == nil || p != nil || !strings.HasPrefix(err.Error(), "last good policy: ") {
			t.Errorf("%s: a policy %t, %v; want an error", tt.name, p != nil, err)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
