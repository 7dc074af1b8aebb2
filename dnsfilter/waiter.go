package dnsfilter

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	maxQuerySize = 512 // bytes; a question and an OPT record are much shorter
	padBlock     = 128 // bytes; encrypted queries are padded to multiples (RFC 8467, section 4.1)
	idAttempts   = 16  // to find an ID that is free
	idBuckets    = 256 // of the table of IDs
	truncated    = 0x2 // TC in the third byte of a message
)

var errNoID = errors.New("no free query ID on this connection")

// A waiter is one query on its way over a socket or connection that others share.
type waiter struct {
	packet []byte // the query as it is sent, in buf
	name   int    // where its question's name ends in packet; type and class follow
	exact  bool   // the answer must repeat the case of its name (0x20)
	id     uint16
	random [2 + 1 + 32]byte // an ID, the choice of a socket, letter case
	asked  time.Time
	chain  *waiter     // the next one in its bucket; guarded by the lock of waiters
	answer chan answer // has room for the one answer; not used with a flight
	buf    [maxQuerySize]byte

	// Of a query that nobody waits for: what its answer ends, which no goroutine does
	// until then, and when it has waited long enough.
	flight *flight
	pool   *pool
	up     *upstream
	due    time.Time
	copied []byte // a copy of packet, which gets the ID too
}

// answer is what became of a query: a packet that matches it, or an error.
type answer struct {
	packet []byte
	err    error
}

// waiterPool holds waiters without a query. Nobody else knows of them.
var waiterPool = sync.Pool{New: func() any { return &waiter{answer: make(chan answer, 1)} }}

// how a query is dressed for its way.
type dress struct {
	exact  bool // letters of the name in random case (0x20)
	padded bool // to a multiple of padBlock, if the query has EDNS
}

// newWaiter returns a waiter for query. The caller frees it when no table holds it.
func newWaiter(query *dns.Msg, d dress) (*waiter, error) {
	w := waiterPool.Get().(*waiter)
	p, err := pack(w.buf[:0], query)
	if err != nil {
		w.free()
		return nil, err
	}
	w.packet, w.exact, w.asked = p, d.exact, time.Now()
	for w.name = headerSize; p[w.name] != 0; { // PackBuffer made it: one question, not compressed
		w.name += 1 + int(p[w.name])
	}
	w.name++
	n := len(w.random)
	if !d.exact {
		n = 3
	}
	rand.Read(w.random[:n]) // never fails
	if d.exact {
		randomCase(p[headerSize:w.name], w.random[3:])
	}
	if d.padded {
		w.packet = pad(p)
	}
	return w, nil
}

// pack appends query to an empty buf, without the detours of miekg/dns if it is one
// that key.query makes: one name without escapes, an OPT record without options or none.
func pack(buf []byte, query *dns.Msg) ([]byte, error) {
	const recursion, authentic, checking, do = 1 << 8, 1 << 5, 1 << 4, 1 << 15
	name, bits := query.Question[0].Name, uint16(0)
	opt := query.IsEdns0()
	if len(name) < 2 || strings.ContainsRune(name, '\\') || len(query.Extra) > 1 || (len(query.Extra) == 1) != (opt != nil) || opt != nil && len(opt.Option) > 0 {
		return query.PackBuffer(buf[:cap(buf)])
	}
	if query.RecursionDesired {
		bits |= recursion
	}
	if query.AuthenticatedData {
		bits |= authentic
	}
	if query.CheckingDisabled {
		bits |= checking
	}
	be := binary.BigEndian
	buf = be.AppendUint16(be.AppendUint16(buf, query.Id), bits)
	buf = be.AppendUint64(buf, 1<<48|uint64(len(query.Extra)))
	for rest := name; rest != ""; {
		i := strings.IndexByte(rest, '.')
		if i < 1 || i > 63 {
			return nil, fmt.Errorf("name %q: %w", name, dns.ErrRdata)
		}
		buf = append(append(buf, byte(i)), rest[:i]...)
		rest = rest[i+1:]
	}
	buf = append(buf, 0)
	buf = be.AppendUint16(be.AppendUint16(buf, query.Question[0].Qtype), query.Question[0].Qclass)
	if opt != nil {
		flags := uint32(0)
		if opt.Do() {
			flags = do
		}
		buf = be.AppendUint16(append(buf, 0), dns.TypeOPT)
		buf = be.AppendUint32(be.AppendUint16(buf, opt.UDPSize()), flags)
		buf = be.AppendUint16(buf, 0)
	}
	return buf, nil
}

// free returns w to the pool.
func (w *waiter) free() {
	w.packet, w.flight, w.pool, w.up, w.copied = nil, nil, nil, nil, nil
	waiterPool.Put(w)
}

// randomCase gives the letters of a name on the wire the case that bits say.
func randomCase(name, bits []byte) {
	for i, c := range name {
		if lower := c | 0x20; lower >= 'a' && lower <= 'z' && c >= 'A' && bits[i/8]>>(i%8)&1 != 0 {
			name[i] = c ^ 0x20 // lengths of labels are below 'A'
		}
	}
}

// pad adds the padding option (RFC 7830) to a query that ends with an empty OPT record.
func pad(p []byte) []byte {
	const optSize, optionHeader = 11, 4
	if binary.BigEndian.Uint16(p[10:]) == 0 || len(p) < headerSize+optSize {
		return p // no EDNS
	}
	if binary.BigEndian.Uint16(p[len(p)-2:]) != 0 {
		return p // it has options
	}
	fill := (padBlock - (len(p)+optionHeader)%padBlock) % padBlock
	binary.BigEndian.PutUint16(p[len(p)-2:], uint16(optionHeader+fill))
	p = binary.BigEndian.AppendUint16(p, dns.EDNS0PADDING)
	p = binary.BigEndian.AppendUint16(p, uint16(fill))
	return append(p, make([]byte, fill)...)
}

// unpack returns the message in p, which answers w.
func (w *waiter) unpack(p []byte) (*dns.Msg, error) {
	if w.exact && len(p) > headerSize { // or there is no question; spelt as it was before, and what is compressed with it
		copy(p[headerSize:w.name], lowered(p[headerSize:w.name]))
	}
	m := new(dns.Msg)
	if err := unpack(m, p); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	return m, nil
}

// lowered lowers the letters of a name on the wire, in place.
func lowered(name []byte) []byte {
	for i, c := range name {
		if c >= 'A' && c <= 'Z' {
			name[i] = c + 'a' - 'A'
		}
	}
	return name
}

// answeredBy reports whether p is a response to w, whose ID it has: the same
// opcode and question (RFC 5452, section 9.1). A server that does not know EDNS may
// leave the question away when it says FORMERR.
func (w *waiter) answeredBy(p []byte) bool {
	const response, opcode, rcode = 0x80, 0x78, 0x0F
	if len(p) < headerSize || p[2]&response == 0 || p[2]&opcode != 0 {
		return false
	}
	questions := binary.BigEndian.Uint16(p[4:])
	if questions == 0 {
		return len(p) == headerSize && p[3]&rcode == dns.RcodeFormatError
	}
	end := w.name + 4
	if questions != 1 || len(p) < end {
		return false
	}
	asked, got := w.packet[headerSize:end], p[headerSize:end]
	n := len(asked) - 4
	if string(asked[n:]) != string(got[n:]) {
		return false
	}
	if w.exact {
		return string(asked[:n]) == string(got[:n])
	}
	for i := range n {
		if a, b := asked[i], got[i]; a != b && (a|0x20 != b|0x20 || a|0x20 < 'a' || a|0x20 > 'z') {
			return false
		}
	}
	return true
}

// waiters are the queries on their way over one socket or connection, by ID.
type waiters struct {
	ignored *atomic.Uint64 // answers that match no query, or came too late

	mu      sync.Mutex         // guards what follows
	buckets [idBuckets]*waiter // chains of those whose IDs end alike
	n       int
	err     error // why there can be no more
}

// byID returns the query with an ID, nil if there is none. The caller holds mu, as for
// those below.
func (ws *waiters) byID(id uint16) *waiter {
	w := ws.buckets[id%idBuckets]
	for w != nil && w.id != id {
		w = w.chain
	}
	return w
}

// insert adds w, which has an ID that is free.
func (ws *waiters) insert(w *waiter) {
	b := &ws.buckets[w.id%idBuckets]
	w.chain, *b = *b, w
	ws.n++
}

// drop forgets w, which is there.
func (ws *waiters) drop(w *waiter) {
	b := &ws.buckets[w.id%idBuckets]
	for *b != w {
		b = &(*b).chain
	}
	*b, w.chain = w.chain, nil
	ws.n--
}

// each calls f with every query. f may drop it.
func (ws *waiters) each(f func(*waiter)) {
	for i := range ws.buckets {
		for w := ws.buckets[i]; w != nil; {
			next := w.chain
			f(w)
			w = next
		}
	}
}

// add registers w under a random ID, which it writes into the query (RFC 5452,
// section 9.2).
func (ws *waiters) add(w *waiter) error {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.err != nil {
		return ws.err
	}
	id := binary.BigEndian.Uint16(w.random[:])
	for range idAttempts {
		if ws.byID(id) == nil {
			w.id = id
			ws.insert(w)
			binary.BigEndian.PutUint16(w.packet, id)
			if w.copied != nil {
				binary.BigEndian.PutUint16(w.copied, id)
			}
			return nil
		}
		rand.Read(w.random[:2]) // never fails
		id = binary.BigEndian.Uint16(w.random[:])
	}
	return errNoID
}

// deliver hands p to the query that it answers. What answers none is counted and
// forgotten: whoever asked goes on waiting.
func (ws *waiters) deliver(p []byte) bool {
	w := ws.take(p)
	if w == nil {
		return false
	}
	w.answer <- answer{packet: append([]byte(nil), p...)}
	return true
}

// take removes the query that p answers and returns it. Without one it counts p, and
// returns nil.
func (ws *waiters) take(p []byte) *waiter {
	if len(p) >= headerSize {
		id := binary.BigEndian.Uint16(p)
		ws.mu.Lock()
		w := ws.byID(id)
		if w != nil && w.answeredBy(p) {
			ws.drop(w)
			ws.mu.Unlock()
			return w
		}
		ws.mu.Unlock()
	}
	ws.ignored.Add(1)
	return nil
}

// wait returns the answer to w, which has been added, or an error when ctx is done.
func (ws *waiters) wait(ctx context.Context, w *waiter) ([]byte, error) {
	select {
	case a := <-w.answer:
		return a.packet, a.err
	case <-ctx.Done():
	}
	if ws.remove(w) {
		return nil, ctx.Err()
	}
	a := <-w.answer // at the last moment
	return a.packet, a.err
}

// remove forgets w and reports whether it was still there. If not, its answer is in its channel.
func (ws *waiters) remove(w *waiter) bool {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.byID(w.id) != w {
		return false
	}
	ws.drop(w)
	return true
}

// fail ends every query with err, and those that would be added.
func (ws *waiters) fail(err error) {
	var flights []*waiter
	ws.mu.Lock()
	if ws.err == nil {
		ws.err = err
	}
	ws.each(func(w *waiter) {
		ws.drop(w)
		if w.flight != nil {
			flights = append(flights, w)
			return
		}
		w.answer <- answer{err: err}
	})
	ws.mu.Unlock()
	for _, w := range flights {
		w.failed(err)
	}
}

// end lets no more queries in, with err, and reports true if none is under way.
func (ws *waiters) end(err error) bool {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.n > 0 {
		return false
	}
	if ws.err == nil {
		ws.err = err
	}
	return true
}

func (ws *waiters) count() int {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	return ws.n
}
