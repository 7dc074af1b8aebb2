package policy

import (
	"fmt"
	"strings"
)

// A Pos is a place in a file. Line and Column count from 1; 0 means unknown.
type Pos struct {
	File         string
	Line, Column int
}

// String returns file:line:column, without the parts that are unknown.
func (p Pos) String() string {
	if p.Line == 0 {
		return p.File
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

// An Error is a mistake in a policy document, or a warning about one, located
// for the person who will mend it. Unwrap returns the cause.
type Error struct {
	Pos  Pos    // file:line:column of the offending value
	Path string // such as groups[2].allow[0].names[1]; "" for the whole document
	Err  error  // what is wrong, and what to write instead
}

// Error returns "file:line:column: path: what is wrong".
func (e *Error) Error() string {
	var b strings.Builder
	for _, s := range []string{e.Pos.String(), e.Path} {
		if s != "" {
			b.WriteString(s + ": ")
		}
	}
	return b.String() + e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errors are all the mistakes of one document, in the order of their positions.
type Errors []*Error

// Error returns one mistake a line.
func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap lets errors.Is and errors.As look at each mistake.
func (es Errors) Unwrap() []error {
	errs := make([]error, len(es))
	for i, e := range es {
		errs[i] = e
	}
	return errs
}
