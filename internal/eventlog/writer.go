// Package eventlog writes one line for each event, and the messages of the program
// between them, to standard output, standard error, a file or a syslog receiver.
//
// Logging never holds up traffic. Whoever logs copies a finished line into a queue
// with a bound and goes on; one goroutine writes the queue out, as much at a time
// as has come together. What does not fit, and what cannot be written because a
// disk is full or a reader is gone, is dropped and counted.
//
// That goroutine rests a few milliseconds after each batch, so that under load a
// line costs neither a wake-up nor a system call of its own.
package eventlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"sallyport/policy/event"
)

// Bounds of the queue of each output. A batch that is being written counts extra,
// so that an output which is blocked holds twice as much.
const (
	maxQueueBytes = 4 << 20
	maxQueueLines = 1 << 15
	keepBytes     = 256 << 10 // a buffer that grew larger is given back when it is empty
	hurryBytes    = 128 << 10 // with so much to write the writer does not rest
)

// rest is how long lines are collected after a batch was written.
const rest = 5 * time.Millisecond

const (
	flushTimeout  = 2 * time.Second // what a blocked output gets at the end
	cancelTimeout = time.Second     // and then, to notice that it is cut off
)

// Format is how events look.
type Format string

// The formats.
const (
	JSON     Format = "json"     // every event and message, one JSON object a line
	Squid    Format = "squid"    // Squid's native access.log; no lines for DNS queries
	Aviatrix Format = "aviatrix" // Aviatrix FQDN log; no lines for DNS queries
)

// Options say what a Writer writes where.
type Options struct {
	Format Format // "" is JSON
	Output string // stdout, stderr, the path of a file, which is appended to, or what SyslogAddress reads; "" is stdout
	Level  string // least important message: debug, info, warn or error; "" is info
	Node   string // name of this process in every line

	Rotate   Rotate // of the file; other outputs have none
	Facility string // of syslog messages; "" is daemon

	Stdout, Stderr *os.File // nil: the process's own
}

// A Writer writes events and messages. It is an [event.Observer]. In the JSON
// format both go to the same output; the other formats have no place for messages
// and for config events, which then go to standard error, as JSON.
type Writer struct {
	format   Format
	node     string
	level    atomic.Int32
	dropped  atomic.Uint64
	events   *sink
	messages *sink   // the same as events in the JSON format
	syslog   *header // of lines in events; nil: none
	logger   zerolog.Logger
}

var _ event.Observer = (*Writer)(nil)

// Open opens the output. Nothing is written before Run runs.
func Open(o Options) (*Writer, error) {
	if o.Stdout == nil {
		o.Stdout = os.Stdout
	}
	if o.Stderr == nil {
		o.Stderr = os.Stderr
	}
	w := &Writer{format: o.Format, node: o.Node}
	if w.format == "" {
		w.format = JSON
	}
	if w.format != JSON && w.format != Squid && w.format != Aviatrix {
		return nil, fmt.Errorf("log format %q is none of json, squid, aviatrix", o.Format)
	}
	if err := w.SetLevel(o.Level); err != nil {
		return nil, err
	}
	w.events = w.newSink(o.Stderr)
	switch {
	case o.Output == "" || o.Output == "stdout":
		w.events.name, w.events.file = "stdout", o.Stdout
	case o.Output == "stderr":
		w.events.name, w.events.file = "stderr", o.Stderr
	case IsSyslog(o.Output):
		network, address, err := SyslogAddress(o.Output)
		if err != nil {
			return nil, fmt.Errorf("log output %s: %w", o.Output, err)
		}
		if w.syslog, err = newHeader(o.Facility, o.Node); err != nil {
			return nil, err
		}
		w.events.name, w.events.remote = o.Output, newRemote(network, address, w.events)
	default:
		f, err := openFile(o.Output)
		if err != nil {
			return nil, fmt.Errorf("log output: %w", err)
		}
		w.events.name, w.events.path, w.events.file = o.Output, o.Output, f
		w.events.rotation = newRotation(o.Rotate, f, w.warn)
	}
	w.messages = w.events
	if w.format != JSON {
		w.messages = w.newSink(o.Stderr)
		w.messages.name, w.messages.file = "stderr", o.Stderr
	}
	w.logger = zerolog.New(messageWriter{w}).Hook(stamp{w.node})
	return w, nil
}

func (w *Writer) newSink(stderr *os.File) *sink {
	return &sink{
		dropped: &w.dropped, stderr: stderr, lost: w.reportLost, warn: w.warn,
		wake: make(chan struct{}, 1), hurry: make(chan struct{}, 1),
	}
}

// openFile opens path for appending. It does not wait for the reader of a named pipe.
func openFile(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NONBLOCK, 0o640)
}

// SetLevel changes which messages are written from now on; "" is info.
func (w *Writer) SetLevel(level string) error {
	if level == "" {
		level = "info"
	}
	l, err := zerolog.ParseLevel(level)
	if err != nil {
		return fmt.Errorf("log level %q: %w", level, err)
	}
	w.level.Store(int32(l))
	return nil
}

// Dropped returns how many lines were lost so far.
func (w *Writer) Dropped() uint64 { return w.dropped.Load() }

// Reopen opens the path of the output again, as after a rotation. On an error the
// file that is open stays in use. For stdout and stderr it does nothing.
func (w *Writer) Reopen() error {
	if w.events.path == "" {
		return nil
	}
	f, err := openFile(w.events.path)
	if err != nil {
		return fmt.Errorf("reopen log output: %w", err)
	}
	w.events.replace(f)
	return nil
}

// Run writes until ctx is done, and then what is still queued: an output that
// takes nothing more gets two seconds. The error says how many lines that lost.
// Cancel ctx when nobody logs any more. Run may be called once.
//
// While it runs, a reader that has gone away costs lines but does not end the
// process by SIGPIPE.
func (w *Writer) Run(ctx context.Context) error {
	pipe := make(chan os.Signal, 1)
	signal.Notify(pipe, syscall.SIGPIPE)
	defer signal.Stop(pipe)

	sinks := []*sink{w.events}
	if w.messages != w.events {
		sinks = append(sinks, w.messages)
	}
	var running sync.WaitGroup
	for _, s := range sinks {
		running.Go(func() { s.run(ctx) })
	}
	done := make(chan struct{})
	go closeAfter(&running, done)

	<-ctx.Done()
	before := w.Dropped()
	if waitFor(done, flushTimeout) {
		return nil
	}
	for _, s := range sinks {
		s.cutOff()
	}
	// A write to an inherited descriptor may be stuck in the kernel, where nothing
	// reaches it; the process is about to end, which does.
	if !waitFor(done, cancelTimeout) {
		return errors.New("flush log: the output is blocked")
	}
	return fmt.Errorf("flush log: the output is blocked; %d lines lost", w.Dropped()-before)
}

// closeAfter closes done when all that are running have ended.
func closeAfter(running *sync.WaitGroup, done chan<- struct{}) {
	running.Wait()
	close(done)
}

func waitFor(done <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}

// reportLost logs that n lines are missing before this place in the log.
func (w *Writer) reportLost(n uint64) {
	w.logger.Warn().Uint64("dropped", n).Msg("log lines were lost")
}

// warn logs that something about the output did not work.
func (w *Writer) warn(err error) {
	w.logger.Warn().Err(err).Msg("the log goes on in the same file")
}

// A sink is one output with its queue.
type sink struct {
	name     string    // for people
	path     string    // to reopen, or ""
	remote   *remote   // a syslog receiver, or nil
	rotation *rotation // of the file, or nil
	stderr   *os.File
	dropped  *atomic.Uint64 // shared by all sinks of a Writer
	lost     func(n uint64) // is told of lines lost once writing works again
	warn     func(err error)
	wake     chan struct{} // something to do, after there was nothing
	hurry    chan struct{} // much to do

	mu      sync.Mutex // guards what follows
	pending []byte     // whole lines
	lines   int        // in pending
	file    *os.File   // replaced by replace, used by run; nil with a remote
	next    *os.File   // to be used from the next batch on
	missing uint64     // lines dropped and not reported yet
	closed  bool       // run has ended: nothing is written any more

	// Only run uses these.
	torn    []byte // rest of a line that was written in part, to be completed first
	failing bool   // the last write failed, and that was said
}

// put queues a copy of line. It never blocks and never fails.
func (s *sink) put(line []byte) {
	s.mu.Lock()
	ok := !s.closed && s.lines < maxQueueLines && len(s.pending)+len(line) <= maxQueueBytes
	first, much := false, false
	if ok {
		first = s.lines == 0
		s.pending = append(s.pending, line...)
		s.lines++
		much = len(s.pending) >= hurryBytes && len(s.pending)-len(line) < hurryBytes
	} else {
		s.missing++
	}
	s.mu.Unlock()
	switch {
	case !ok:
		s.dropped.Add(1)
	case first:
		signalTo(s.wake)
	case much:
		signalTo(s.hurry)
	}
}

func signalTo(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default: // it is known already
	}
}

// replace has f used from the next batch on.
func (s *sink) replace(f *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		f.Close()
		return
	}
	if s.next != nil {
		s.next.Close()
	}
	s.next = f
	signalTo(s.wake)
}

// cutOff makes a write that is under way fail, where the descriptor allows it.
func (s *sink) cutOff() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.remote != nil {
		s.remote.cutOff()
		return
	}
	_ = s.file.SetWriteDeadline(time.Now()) // no deadlines for this kind of file: Run gives up on it
}

// run writes batches until ctx is done and the queue is empty.
func (s *sink) run(ctx context.Context) {
	var spare []byte
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		stopping := false
		select {
		case <-s.wake:
		case <-ctx.Done():
			stopping = true
		}
		for {
			batch := s.take(spare)
			if len(batch) == 0 {
				spare = batch
				break
			}
			s.send(batch)
			if spare = batch[:0]; cap(spare) > keepBytes {
				spare = nil
			}
		}
		if stopping && s.close() {
			return
		}
		pause.Reset(rest)
		select {
		case <-pause.C:
		case <-s.hurry:
		case <-ctx.Done():
		}
	}
}

// take returns what is queued and leaves spare in its place.
func (s *sink) take(spare []byte) []byte {
	s.adopt()
	s.mu.Lock()
	defer s.mu.Unlock()
	batch := s.pending
	s.pending, s.lines = spare[:0], 0
	return batch
}

// adopt moves on to a file that was reopened. Files are touched without mu: a file
// system that hangs must not hold up those who log.
func (s *sink) adopt() {
	s.mu.Lock()
	next := s.next
	s.next = nil
	s.mu.Unlock()
	if next == nil {
		return
	}
	if s.rotation != nil && !at(s.path, next) { // put aside since it was opened
		if f, err := openFile(s.path); err == nil {
			next.Close()
			next = f
		}
	}
	s.swap(next)
	s.failing = false
	if s.rotation != nil {
		s.rotation.opened(next)
	}
}

// swap goes on with the file next.
func (s *sink) swap(next *os.File) {
	s.mu.Lock()
	old := s.file
	s.forget()
	s.file = next
	if s.closed { // cutOff has been here before
		_ = next.SetWriteDeadline(time.Now())
	}
	s.mu.Unlock()
	old.Close()
}

// close ends the queue if it is empty, and the output with it.
func (s *sink) close() bool {
	s.mu.Lock()
	if len(s.pending) > 0 && !s.closed {
		s.mu.Unlock()
		return false
	}
	s.closed = true
	s.forget()
	if s.next != nil {
		s.next.Close()
	}
	s.mu.Unlock()
	if s.rotation != nil {
		s.rotation.close()
	}
	if s.remote != nil {
		s.dropped.Add(uint64(s.remote.close()))
	}
	if s.path != "" {
		s.file.Close()
	}
	return true
}

// forget gives up the rest of a torn line. The caller holds mu.
func (s *sink) forget() {
	if len(s.torn) > 0 {
		s.torn = nil
		s.missing++
		s.dropped.Add(1)
	}
}

// send writes a batch of whole lines to wherever they go.
func (s *sink) send(batch []byte) {
	switch {
	case s.remote != nil:
		if lost, err := s.remote.write(batch); lost > 0 {
			s.failed(err, lost)
		} else {
			s.succeeded()
		}
	default:
		s.turn(len(batch))
		s.write(batch)
	}
}

// turn begins a new file if n more bytes are too many for this one.
func (s *sink) turn(n int) {
	if s.rotation == nil || len(s.torn) > 0 || !s.rotation.due(n) {
		return
	}
	next, err := s.rotation.turn(s.path, s.file)
	if err != nil {
		if !s.rotation.failing { // once, for the warning needs room in the same file
			s.rotation.failing = true
			s.warn(fmt.Errorf("rotate %s: %w", s.path, err))
		}
		return
	}
	s.rotation.failing = false
	s.swap(next)
}

// write writes a batch of whole lines to the file. If that fails in the middle of a line, the
// rest of that line is kept for the next time, so that no line is ever cut short.
func (s *sink) write(batch []byte) {
	if len(s.torn) > 0 {
		n, err := s.file.Write(s.torn)
		if s.torn = s.torn[n:]; err != nil {
			s.failed(err, countLines(batch))
			return
		}
	}
	n, err := s.file.Write(batch)
	if s.rotation != nil {
		s.rotation.size += int64(n)
	}
	if err == nil {
		s.succeeded()
		return
	}
	rest := batch[n:]
	if n > 0 && batch[n-1] != '\n' {
		end := bytes.IndexByte(rest, '\n') + 1
		s.torn = bytes.Clone(rest[:end])
		rest = rest[end:]
	}
	s.failed(err, countLines(rest))
}

var newline = []byte{'\n'}

func countLines(b []byte) int { return bytes.Count(b, newline) }

// lineEnd returns the length of b's first line, which there is, with its newline.
func lineEnd(b []byte) int { return bytes.IndexByte(b, '\n') + 1 }

// failed counts lines that could not be written, and says so once.
func (s *sink) failed(err error, lines int) {
	s.dropped.Add(uint64(lines))
	s.mu.Lock()
	s.missing += uint64(lines)
	cut := s.closed
	s.mu.Unlock()
	if s.failing || cut {
		return
	}
	s.failing = true
	if s.file != s.stderr {
		fmt.Fprintf(s.stderr, "sallyport: log output %s: %v; lines are dropped and counted until it works again\n", s.name, err)
	}
}

// succeeded reports what went missing before.
func (s *sink) succeeded() {
	s.failing = false
	s.mu.Lock()
	n := s.missing
	if s.lines >= maxQueueLines/2 || len(s.pending) >= maxQueueBytes/2 {
		n = 0 // later: the report must not be lost as well
	}
	s.missing -= n
	s.mu.Unlock()
	if n > 0 {
		s.lost(n)
	}
}
