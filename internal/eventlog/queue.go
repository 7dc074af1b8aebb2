package eventlog

// Queued returns how many lines wait to be written, and their size in bytes, of both
// outputs together. What is being written does not wait any more.
func (w *Writer) Queued() (lines, bytes int) {
	lines, bytes = w.events.queued()
	if w.messages != w.events {
		l, b := w.messages.queued()
		lines, bytes = lines+l, bytes+b
	}
	return lines, bytes
}

func (s *sink) queued() (lines, bytes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lines, len(s.pending)
}
