package admin

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
)

// problem is an error as a program reads it (RFC 9457).
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
}

// fail answers with a problem.
func fail(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(problem{"about:blank", http.StatusText(status), status, err.Error()}) // whoever asked has gone away
}

// failed answers with the problem that err is.
func failed(w http.ResponseWriter, err error) {
	switch {
	case errors.Is(err, ErrBadRequest):
		fail(w, http.StatusBadRequest, err)
	case errors.Is(err, ErrUnavailable):
		fail(w, http.StatusServiceUnavailable, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		fail(w, http.StatusServiceUnavailable, errors.New("it takes too long"))
	default:
		fail(w, http.StatusInternalServerError, err)
	}
}

// writeJSON answers with v.
func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // whoever asked has gone away
}
