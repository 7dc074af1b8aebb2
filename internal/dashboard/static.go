package dashboard

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net/http"
	"path"
	"strings"

	"sallyport/internal/admin"
)

//go:embed static
var embedded embed.FS

// assets is the path that static files are served below.
const assets = "/assets/"

// contentTypes are the types of what is served from static; other files (licences)
// are there for people and are not served.
var contentTypes = map[string]string{
	".css": "text/css; charset=utf-8",
	".js":  "text/javascript; charset=utf-8",
	".svg": "image/svg+xml",
}

// An asset is one static file, in memory in both of its encodings.
type asset struct {
	contentType   string
	etag          string
	plain, zipped []byte
}

// A library is every static file. Each has a path with the hash of its content in
// it, so that a browser may keep it for ever and never holds a stale one.
type library struct {
	byPath map[string]asset  // by path of a request
	paths  map[string]string // by name of the file
}

// newLibrary reads and compresses the embedded files. It fails only if the program
// was built wrongly.
func newLibrary() (*library, error) {
	l := &library{map[string]asset{}, map[string]string{}}
	entries, err := fs.ReadDir(embedded, "static")
	if err != nil {
		return nil, fmt.Errorf("embedded files: %w", err)
	}
	for _, e := range entries {
		ext := path.Ext(e.Name())
		if contentTypes[ext] == "" {
			continue
		}
		body, err := embedded.ReadFile("static/" + e.Name())
		if err != nil {
			return nil, fmt.Errorf("embedded file %s: %w", e.Name(), err)
		}
		sum := sha256.Sum256(body)
		hash := hex.EncodeToString(sum[:8])
		p := assets + strings.TrimSuffix(e.Name(), ext) + "." + hash + ext
		l.paths[e.Name()] = p
		l.byPath[p] = asset{contentTypes[ext], `"` + hash + `"`, body, compress(body, gzip.BestCompression)}
	}
	return l, nil
}

// compress returns body as gzip has it, at one of gzip's levels.
func compress(body []byte, level int) []byte {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err == nil {
		_, err = w.Write(body)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil { // a level that is none: a buffer takes everything
		panic(err)
	}
	return b.Bytes()
}

// ServeHTTP answers GET and HEAD below /assets/.
func (l *library) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a, ok := l.byPath[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	h := w.Header()
	h.Set("Content-Type", a.contentType)
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	h.Set("Vary", "Accept-Encoding")
	h.Set("ETag", a.etag)
	if r.Header.Get("If-None-Match") == a.etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	body := a.plain
	if admin.AcceptsGzip(r.Header.Get("Accept-Encoding")) {
		h.Set("Content-Encoding", "gzip")
		body = a.zipped
	}
	h.Set("Content-Length", fmt.Sprint(len(body)))
	_, _ = w.Write(body) // whoever asked has gone away
}
