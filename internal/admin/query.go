package admin

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A query reads the parameters of a request and keeps the first mistake.
type query struct {
	values url.Values
	known  []string
	err    error
}

func queryOf(r *http.Request) *query {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		err = errors.New("the query is not application/x-www-form-urlencoded")
	}
	return &query{values: values, err: err}
}

func (q *query) wrong(name, format string, args ...any) {
	if q.err == nil {
		q.err = fmt.Errorf("%s: %w", name, fmt.Errorf(format, args...))
	}
}

func (q *query) text(name string) string {
	q.known = append(q.known, name)
	if len(q.values[name]) > 1 {
		q.wrong(name, "given twice; give it once")
	}
	return q.values.Get(name)
}

// number returns a number from 1 to most, def if there is none.
func (q *query) number(name string, def, most int) int {
	s := q.text(name)
	if s == "" {
		return def
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > most {
		q.wrong(name, "%q is not a number from 1 to %d", clip(s), most)
	}
	return n
}

// choice returns one of a few words, the first if there is none.
func (q *query) choice(name string, words ...string) string {
	s := q.text(name)
	if s == "" {
		return words[0]
	}
	if !slices.Contains(words, s) {
		q.wrong(name, "%q is none of %s", clip(s), strings.Trim(strings.Join(words, ", "), ", "))
	}
	return s
}

// maxAgo bounds how far back a question goes.
const maxAgo = 10 * 365 * 24 * time.Hour

// since returns a time: a date, one of RFC 3339, or one so long ago: 90m, 24h, 7d.
func (q *query) since(name string, now time.Time) (t time.Time) {
	s := q.text(name)
	if s == "" {
		return t
	}
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, s); err == nil {
			return t
		}
	}
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int
		n, err = strconv.Atoi(days)
		d = time.Duration(min(n, 100_000)) * 24 * time.Hour
	}
	if err != nil || d < 0 || d > maxAgo {
		q.wrong(name, "%q is no time; write 7d, 24h, 2027-01-31 or 2027-01-31T18:00:00Z", clip(s))
		return t
	}
	return now.Add(-d)
}

// done returns the first mistake. What was not read is one.
func (q *query) done() error {
	for name := range q.values {
		if !slices.Contains(q.known, name) {
			q.wrong(clip(name), "is no parameter of this; there are: %s", strings.Join(q.known, ", "))
		}
	}
	if q.err != nil {
		return fmt.Errorf("%w: %w", ErrBadRequest, q.err)
	}
	return nil
}
