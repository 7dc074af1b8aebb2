package proxy

import (
	"errors"
	"net/http"
	"net/textproto"
	"sync"
)

// maxInterims bounds the 1xx responses before another one. Some servers send one
// every few seconds while they work.
const maxInterims = 100

var errInterims = errors.New("malformed response: too many 1xx")

// interim passes 1xx responses on (RFC 9110, section 15.2). They are written by the
// goroutines of the round trip, and none once that is over: from then on the
// handler has the header.
type interim struct {
	mu        sync.Mutex // guards what follows, and writing
	over      bool       // the final response is on its way
	continued bool       // 100 was sent
	n         int
}

// end says that no 1xx may follow.
func (i *interim) end() {
	i.mu.Lock()
	i.over = true
	i.mu.Unlock()
}

// got1xx passes a 1xx response on, but not to clients of HTTP/1.0, who do not know
// them.
func (ex *exchange) got1xx(status int, header textproto.MIMEHeader) error {
	i := &ex.interim
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.n++; i.n > maxInterims {
		return errInterims
	}
	if i.over || !ex.modern || status == http.StatusContinue && i.continued {
		return nil
	}
	i.continued = i.continued || status == http.StatusContinue
	h := http.Header(header)
	stripHopByHop(h)
	out := ex.Header()
	for k, vs := range h {
		out[k] = vs
	}
	addVia(out, 1, 1)
	ex.ResponseWriter.WriteHeader(status)
	clear(out)
	return nil
}

// proceed tells a client that expects it to send its content. It is called when the
// far side wants that, or has not said so within expectPatience.
func (ex *exchange) proceed() {
	i := &ex.interim
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.over && !i.continued {
		i.continued = true
		ex.ResponseWriter.WriteHeader(http.StatusContinue)
	}
}
