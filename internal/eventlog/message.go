package eventlog

import (
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rs/zerolog"
)

// Logger returns the logger for messages to operators: lines with "level" and
// "message" where events have "event". SetLevel applies to it at once.
func (w *Writer) Logger() zerolog.Logger { return w.logger }

// stamp adds what every message has. zerolog's own timestamp has a format that is
// global to the process.
type stamp struct{ node string }

// Run implements zerolog.Hook.
func (s stamp) Run(e *zerolog.Event, _ zerolog.Level, _ string) {
	appendTime(e, time.Now())
	text(e, "node", s.node, maxNode)
}

// messageWriter queues messages that are important enough.
type messageWriter struct{ w *Writer }

// Write implements io.Writer, for messages without a level.
func (m messageWriter) Write(p []byte) (int, error) { return m.WriteLevel(zerolog.NoLevel, p) }

// WriteLevel implements zerolog.LevelWriter.
func (m messageWriter) WriteLevel(l zerolog.Level, p []byte) (int, error) {
	if l < zerolog.Level(m.w.level.Load()) {
		return len(p), nil
	}
	b := getScratch()
	line := appendSafe((*b)[:0], p)
	if len(line) > maxLine {
		line = appendQuoted(append(line[:0], `{"level":"error","message":"a message was too long","clipped":`...), string(p), maxLine/2)
		line = append(line, "}\n"...)
	}
	_, _ = m.w.messages.Write(line)
	putScratch(b, line)
	return len(p), nil
}

// appendSafe appends line, which is JSON, and escapes what is legal inside JSON
// strings but breaks lines or moves cursors: U+2028 and the like. Outside strings
// JSON is all ASCII.
func appendSafe(dst, line []byte) []byte {
	for i := 0; i < len(line); {
		if c := line[i]; c < utf8.RuneSelf {
			dst = append(dst, c)
			i++
			continue
		}
		r, size := utf8.DecodeRune(line[i:])
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			dst = appendEscaped(dst, r)
		} else {
			dst = append(dst, line[i:i+size]...)
		}
		i += size
	}
	return dst
}
