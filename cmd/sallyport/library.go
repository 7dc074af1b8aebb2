package main

import (
	stdlog "log"
	"strings"

	"github.com/rs/zerolog"
)

// maxLibraryLine bounds in bytes what is kept of a line that a library prints.
const maxLibraryLine = 512

// libraryLog takes what libraries print through the log package. net/http does so
// for an origin that says something unasked, and repeats it: peers would write to
// our standard error, as much as they like.
type libraryLog struct{ logger zerolog.Logger }

func (l libraryLog) Write(p []byte) (int, error) {
	l.logger.Debug().Msg(strings.TrimSpace(string(p[:min(len(p), maxLibraryLine)])))
	return len(p), nil
}

// takeLibraryLog leads the log package to logger, at level debug.
func takeLibraryLog(logger zerolog.Logger) {
	stdlog.SetFlags(0)
	stdlog.SetOutput(libraryLog{logger})
}
