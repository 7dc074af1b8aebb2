package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"sallyport/internal/live"
)

const (
	// streamPause is how often a stream looks for decisions.
	streamPause = 50 * time.Millisecond
	// streamBeat is how often a stream says something, be it nothing.
	streamBeat = 15 * time.Second
	// streamPatience bounds what a stream waits for its client to read.
	streamPatience = 10 * time.Second
	// streamBatch bounds what a stream sends at a time, in bytes and a decision.
	streamBatch = 64 << 10
	// streamRetry is after how long a client should come again.
	streamRetry = 2 * time.Second
)

// streamDecisions answers with decisions as they are taken, as server-sent events
// (HTML Standard, section 9.2): "decision", and "lost" with the number of those that
// this client, or the limit of a stream, was too slow for. The ring is its queue: a
// client that does not read holds one batch, and is left after streamPatience.
func (s *Server) streamDecisions(w http.ResponseWriter, r *http.Request) {
	if !has(w, s.api.Follow != nil) {
		return
	}
	q := queryOf(r)
	f := filter(q)
	resume := q.text("after")
	if last := r.Header.Get("Last-Event-Id"); last != "" {
		resume = last
	}
	if err := q.done(); err != nil {
		failed(w, err)
		return
	}
	client, err := s.streams.take(r.RemoteAddr)
	if err != nil {
		w.Header().Set("Retry-After", "30")
		fail(w, http.StatusServiceUnavailable, err)
		return
	}
	defer s.streams.leave(client)
	st := &stream{rc: http.NewResponseController(w), w: w, cursor: s.api.Follow(resume), filter: f, patience: s.patience}
	if err := st.rc.SetReadDeadline(time.Time{}); err != nil { // that of the request, which was read
		fail(w, http.StatusInternalServerError, err)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	fmt.Fprintf(&st.out, "retry: %d\nid: %s\n\n", streamRetry.Milliseconds(), st.cursor.ID())
	st.run(r.Context(), s.beat, func() bool { return s.credentials.Load().allows(r) })
}

// streams counts those that are open, so that no client has them all.
type streams struct {
	share int // of one client

	mu       sync.Mutex // guards the rest
	open     int
	byClient map[netip.Addr]int
}

// take has a place for a client at remote, an address and a port, until leave.
func (st *streams) take(remote string) (netip.Addr, error) {
	at, _ := netip.ParseAddrPort(remote) // what is no address is one client
	client := at.Addr().Unmap()
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.byClient[client] >= st.share:
		return client, fmt.Errorf("%d streams of this address are open", st.share)
	case st.open >= maxStreams:
		return client, errors.New("too many streams are open")
	}
	st.open++
	st.byClient[client]++
	return client, nil
}

// leave gives a place back.
func (st *streams) leave(client netip.Addr) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.open--
	if st.byClient[client]--; st.byClient[client] == 0 {
		delete(st.byClient, client)
	}
}

// count returns how many are open.
func (st *streams) count() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.open
}

// A stream is one client that follows decisions.
type stream struct {
	rc       *http.ResponseController
	w        http.ResponseWriter
	cursor   *live.Cursor
	filter   live.Filter
	patience time.Duration
	lost     uint64 // as the client knows
	out      bytes.Buffer
}

// run goes on until the client leaves, does not read, or may no longer.
func (st *stream) run(ctx context.Context, every time.Duration, allowed func() bool) {
	tick, beat := time.NewTicker(streamPause), time.NewTicker(every)
	defer tick.Stop()
	defer beat.Stop()
	for st.send() == nil {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			st.collect()
		case <-beat.C:
			if !allowed() {
				return
			}
			st.out.WriteString(": still here\n\n")
		}
	}
}

// collect takes what has come.
func (st *stream) collect() {
	for st.out.Len() < streamBatch {
		d, ok := st.cursor.Next(&st.filter)
		if !ok {
			break
		}
		text, err := json.Marshal(d)
		if err != nil { // strings and numbers
			panic(err)
		}
		fmt.Fprintf(&st.out, "id: %s\nevent: decision\ndata: %s\n\n", st.cursor.ID(), text)
	}
	if lost := st.cursor.Lost(); lost != st.lost {
		fmt.Fprintf(&st.out, "id: %s\nevent: lost\ndata: {\"lost\":%d,\"total\":%d}\n\n", st.cursor.ID(), lost-st.lost, lost)
		st.lost = lost
	}
}

// send writes what was collected.
func (st *stream) send() error {
	if st.out.Len() == 0 {
		return nil
	}
	if err := st.rc.SetWriteDeadline(time.Now().Add(st.patience)); err != nil {
		return err
	}
	if _, err := st.w.Write(st.out.Bytes()); err != nil {
		return err
	}
	st.out.Reset()
	return st.rc.Flush()
}
