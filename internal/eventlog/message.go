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
	b := getScratch()
	t := appendStamp((*b)[:0], time.Now())
	e.RawJSON("time", t)
	if s.node != "" {
		e.RawJSON("node", appendQuoted(t[len(t):], s.node, maxNode))
	}
	putScratch(b, t)
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
	line := (*b)[:0]
	if m.w.syslog != nil && m.w.messages == m.w.events {
		line = m.w.syslog.append(line, severityOfLevel(l), time.Now(), "message")
	}
	head := len(line)
	line = appendSafe(line, p)
	if len(line)-head > maxLine {
		line = appendQuoted(append(line[:head], `{"level":"error","message":"a message was too long","clipped":`...), string(p), maxLine/2)
		line = append(line, "}\n"...)
	}
	m.w.messages.put(line)
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
