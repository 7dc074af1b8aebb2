package admin

import (
	"compress/gzip"
	"net/http"
	"strings"
	"sync"
)

// worthCompressing is the size of answers from which on they are compressed, in bytes:
// what fits a packet arrives no sooner.
const worthCompressing = 1400

var zippers = sync.Pool{New: func() any {
	z, err := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	if err != nil {
		panic(err) // the level is one
	}
	return z
}}

// A compressed is an answer that is compressed if its first, and usually only, write
// is worth it. There is nothing secret in it beside what the client chose whose length
// could tell it.
type compressed struct {
	http.ResponseWriter

	z       *gzip.Writer
	decided bool
}

// compress returns w, or one around it if r accepts that. The caller closes it.
func compress(w http.ResponseWriter, r *http.Request) *compressed {
	w.Header().Set("Vary", "Accept-Encoding")
	return &compressed{ResponseWriter: w, decided: !AcceptsGzip(r.Header.Get("Accept-Encoding")) || r.Method == http.MethodHead}
}

// Unwrap is for http.ResponseController.
func (c *compressed) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// WriteHeader implements http.ResponseWriter. The field of a compressed answer must be
// there by then, so that it is sent with the first write.
func (c *compressed) WriteHeader(status int) {
	if status != http.StatusOK {
		c.decided = true
	}
	if c.decided {
		c.ResponseWriter.WriteHeader(status)
	}
}

// Write implements http.ResponseWriter.
func (c *compressed) Write(p []byte) (int, error) {
	if !c.decided {
		c.decided = true
		if h := c.Header(); len(p) >= worthCompressing && h.Get("Content-Encoding") == "" && h.Get("Content-Length") == "" {
			h.Set("Content-Encoding", "gzip")
			c.z = zippers.Get().(*gzip.Writer)
			c.z.Reset(c.ResponseWriter)
		}
	}
	if c.z != nil {
		return c.z.Write(p)
	}
	return c.ResponseWriter.Write(p)
}

// close ends the answer.
func (c *compressed) close() {
	if c.z == nil {
		return
	}
	_ = c.z.Close() // whoever asked has gone away
	c.z.Reset(nil)
	zippers.Put(c.z)
	c.z = nil
}

// AcceptsGzip reports whether an Accept-Encoding field lists gzip without refusing
// it (RFC 9110, section 12.5.3).
func AcceptsGzip(field string) bool {
	for coding := range strings.SplitSeq(field, ",") {
		name, weight, _ := strings.Cut(coding, ";")
		if strings.EqualFold(strings.TrimSpace(name), "gzip") {
			q, ok := strings.CutPrefix(strings.TrimSpace(weight), "q=0")
			return !ok || strings.Trim(q, ".0") != ""
		}
	}
	return false
}
