package dnsfilter

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/rs/zerolog"

	"sallyport/dnsfilter/wire"
	"sallyport/policy"
)

const (
	fileCheck    = time.Second // how often a file is looked at, at most
	maxFile      = 64 << 20    // bytes read of one
	maxHostsLine = 64 << 10    // bytes
	hostsTTL     = 10          // seconds; the file may change at any time
	maxHostAddrs = 64          // kept for one name
)

// A watched file is read again when it has become another one, or its size or
// modification time has changed. It is looked at when it is needed, which takes no
// watcher, follows every symbolic link and works on every file system.
type watched struct {
	path string
	load func(r io.Reader) error // r is empty if the file is missing; an error keeps what was loaded before
	now  func() time.Time

	next  atomic.Int64 // when to look again, in Unix nanoseconds
	mu    sync.Mutex   // guards what follows, and load
	last  fs.FileInfo  // nil if there was no file
	seen  bool
	short bool // of descriptors, when it was to be read
}

// refresh looks at the file if it is time to, and loads it if it has changed.
// One caller in a second does so; the others return at once. An error is
// returned once for each state of the file.
func (w *watched) refresh() error {
	now, next := w.now().UnixNano(), w.next.Load()
	early := now < next && next-now <= int64(fileCheck) // it is more if the clock was set back
	if early || !w.next.CompareAndSwap(next, now+int64(fileCheck)) {
		return nil
	}
	if !w.mu.TryLock() { // a large file is still being loaded: not everybody waits for that
		return nil
	}
	defer w.mu.Unlock()
	fi, err := os.Stat(w.path)
	if err != nil {
		fi = nil
	}
	if w.seen && same(w.last, fi) {
		return nil
	}
	err = w.read(fi)
	again := w.short
	w.short = isExhausted(err)
	w.last, w.seen = fi, !w.short // or what it says now would not be read before it changes once more
	if again && w.short {
		return nil
	}
	return err
}

// same reports whether a and b describe one state of one file: a symbolic link that was
// swapped leads to another file, however much it looks like the last one.
func same(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

// forget has the next refresh load the file, whether it looks changed or not.
func (w *watched) forget() {
	w.mu.Lock()
	w.seen = false
	w.mu.Unlock()
	w.next.Store(0)
}

func (w *watched) read(fi fs.FileInfo) error {
	if fi != nil && fi.Size() > maxFile {
		return fmt.Errorf("%s is larger than %d bytes", w.path, maxFile)
	}
	f, err := openRegular(w.path)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, w.load(strings.NewReader("")))
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return w.load(io.LimitReader(f, maxFile))
}

// openRegular opens path, unless opening or reading it could block or do
// something: only regular files are opened.
func openRegular(path string) (*os.File, error) {
	info, err := os.Stat(path)
	if err == nil {
		err = checkRegular(path, info)
	}
	if err != nil {
		return nil, err
	}
	// It may have been replaced since: O_NONBLOCK keeps a FIFO from blocking here.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if info, err = f.Stat(); err == nil {
		err = checkRegular(path, info)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func checkRegular(path string, info fs.FileInfo) error {
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		return fmt.Errorf("open %s: it is a folder; name a regular file", path)
	}
	return fmt.Errorf("open %s: it is a pipe, socket or device; name a regular file", path)
}

// hosts is a hosts file (hosts(5)): names and their addresses.
type hosts struct {
	file   *watched
	logger zerolog.Logger
	table  atomic.Pointer[hostsTable]
}

// A hostsTable is what a hosts file says.
type hostsTable struct {
	addrs map[string][]netip.Addr      // by name on the wire
	names map[netip.Addr][]policy.Name // the first of each line
}

func newHosts(path string, now func() time.Time, logger zerolog.Logger) *hosts {
	h := &hosts{logger: logger}
	h.table.Store(new(hostsTable))
	h.file = &watched{path: path, now: now, load: h.load}
	return h
}

func (h *hosts) load(r io.Reader) error {
	table := &hostsTable{make(map[string][]netip.Addr), make(map[netip.Addr][]policy.Name)}
	lines := bufio.NewReaderSize(r, maxHostsLine)
	first, skipped := 0, 0
	for n, long := 1, false; ; {
		line, more, err := lines.ReadLine()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if !long && (more || !table.add(string(line))) {
			if skipped++; first == 0 {
				first = n
			}
		}
		if long = more; !more {
			n++
		}
	}
	if skipped > 0 {
		h.logger.Warn().Str("file", h.file.path).Int("line", first).Int("skipped", skipped).
			Msgf("bad lines are skipped, whole or in part, this is the first: a line is an address and names, of at most %d bytes", maxHostsLine)
	}
	h.table.Store(table)
	return nil
}

// add adds what a line says, and reports whether all of it could be.
func (t *hostsTable) add(line string) (good bool) {
	line, _, _ = strings.Cut(line, "#")
	fields := strings.Fields(line)
	if len(fields) == 0 {
		return true
	}
	addr, err := netip.ParseAddr(fields[0])
	if err != nil || len(fields) == 1 {
		return false
	}
	if addr.Zone() != "" { // which has no form in the DNS, but its place in the file
		return true
	}
	addr, good = addr.Unmap(), true
	for i, f := range fields[1:] {
		name, err := policy.ParseName(f)
		switch {
		case err != nil:
			good = false
			continue
		case i == 0 && len(t.names[addr]) < maxHostAddrs && !slices.Contains(t.names[addr], name):
			t.names[addr] = append(t.names[addr], name)
		}
		key := string(wire.AppendName(nil, name.String()))
		if len(t.addrs[key]) < maxHostAddrs && !slices.Contains(t.addrs[key], addr) {
			t.addrs[key] = append(t.addrs[key], addr)
		}
	}
	return good
}

// reply answers what asks for the addresses of a name in the file or the names of an
// address, or could lead around them; nil for everything else, and without a file.
func (h *hosts) reply(k key) *reply {
	if h == nil {
		return nil
	}
	if k.qtype == dns.TypePTR {
		return h.table.Load().reverse(k)
	}
	var buf [keySize]byte
	addrs, ok := h.find(wire.AppendName(buf[:0], k.name.String()), k.qtype)
	if !ok {
		return nil
	}
	rep := &reply{local: true}
	for _, a := range addrs {
		if addressType(a) == k.qtype {
			rep.answer = append(rep.answer, addressRR(k.fqdn(), a, hostsTTL))
		}
	}
	return rep
}

// find returns the addresses of name, in lower case on the wire, if that is what a query
// of the type is answered with.
func (h *hosts) find(name []byte, qtype uint16) (addrs []netip.Addr, ok bool) {
	if h == nil {
		return nil, false
	}
	switch qtype {
	case dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB:
		addrs, ok = h.table.Load().addrs[string(name)]
	}
	return addrs, ok
}

// mayHave reports whether a query for name, in lower case on the wire, could be answered
// from the file.
func (h *hosts) mayHave(name []byte, qtype uint16) bool {
	if h != nil && qtype == dns.TypePTR {
		return len(h.table.Load().names) > 0
	}
	_, ok := h.find(name, qtype)
	return ok
}

// reverse answers a question for the names of an address (RFC 1035, section 3.5; RFC
// 3596, section 2.5), nil if the file has none.
func (t *hostsTable) reverse(k key) *reply {
	if len(t.names) == 0 {
		return nil
	}
	addr, ok := reverseAddr(k.name.String())
	if !ok || t.names[addr] == nil {
		return nil
	}
	rep := &reply{local: true}
	for _, name := range t.names[addr] {
		h := dns.RR_Header{Name: k.fqdn(), Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: hostsTTL}
		rep.answer = append(rep.answer, &dns.PTR{Hdr: h, Ptr: fqdn(name)})
	}
	return rep
}

// reverseAddr returns the address that name stands for in the reverse zones.
func reverseAddr(name string) (netip.Addr, bool) {
	if four, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(four, ".")
		slices.Reverse(parts)
		a, err := netip.ParseAddr(strings.Join(parts, "."))
		return a, err == nil && a.Is4()
	}
	six, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(six) != 63 {
		return netip.Addr{}, false
	}
	var b strings.Builder
	for i := 62; i >= 0; i -= 2 {
		if i < 62 && six[i+1] != '.' {
			return netip.Addr{}, false
		}
		b.WriteByte(six[i])
		if i%8 == 0 && i > 0 {
			b.WriteByte(':')
		}
	}
	a, err := netip.ParseAddr(b.String())
	return a, err == nil && a.Is6()
}

// addressType returns the type of record that holds a.
func addressType(a netip.Addr) uint16 {
	if a.Is4() {
		return dns.TypeA
	}
	return dns.TypeAAAA
}

// addressRR returns the record that says that name has address a.
func addressRR(name string, a netip.Addr, ttl uint32) dns.RR {
	h := dns.RR_Header{Name: name, Rrtype: addressType(a), Class: dns.ClassINET, Ttl: ttl}
	if a.Is4() {
		return &dns.A{Hdr: h, A: a.AsSlice()}
	}
	return &dns.AAAA{Hdr: h, AAAA: a.AsSlice()}
}
