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

	"sallyport/policy"
)

const (
	fileCheck    = time.Second // how often a file is looked at, at most
	maxFile      = 64 << 20    // bytes read of one
	maxHostsLine = 64 << 10    // bytes
	hostsTTL     = 10          // seconds; the file may change at any time
	maxHostAddrs = 64          // kept for one name
)

// A watched file is read again when its size or modification time has changed.
type watched struct {
	path string
	load func(r io.Reader) error // r is empty if the file is missing; an error keeps what was loaded before
	now  func() time.Time

	next  atomic.Int64 // when to look again, in Unix nanoseconds
	mu    sync.Mutex   // guards what follows, and load
	mtime time.Time
	size  int64
	seen  bool
}

// refresh looks at the file if it is time to, and loads it if it has changed.
// One caller in a second does so; the others return at once. An error is
// returned once for each state of the file.
func (w *watched) refresh() error {
	now, next := w.now(), w.next.Load()
	if now.UnixNano() < next || !w.next.CompareAndSwap(next, now.Add(fileCheck).UnixNano()) {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var mtime time.Time
	var size int64
	fi, err := os.Stat(w.path)
	if err == nil {
		mtime, size = fi.ModTime(), fi.Size()
	}
	if w.seen && mtime.Equal(w.mtime) && size == w.size {
		return nil
	}
	w.mtime, w.size, w.seen = mtime, size, true
	return w.read(size)
}

// forget has the next refresh load the file, whether it looks changed or not.
func (w *watched) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = false
	w.next.Store(0)
}

func (w *watched) read(size int64) error {
	if size > maxFile {
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
	table  atomic.Pointer[map[policy.Name][]netip.Addr]
}

func newHosts(path string, now func() time.Time, logger zerolog.Logger) *hosts {
	h := &hosts{logger: logger}
	h.table.Store(new(map[policy.Name][]netip.Addr))
	h.file = &watched{path: path, now: now, load: h.load}
	return h
}

func (h *hosts) load(r io.Reader) error {
	table := make(map[policy.Name][]netip.Addr)
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
		switch {
		case !more && !long:
			addHosts(table, string(line))
		case !long:
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
			Msgf("lines of over %d bytes are skipped, this is the first; split them, an address may stand on several lines", maxHostsLine)
	}
	h.table.Store(&table)
	return nil
}

// addHosts adds to table what a line says.
func addHosts(table map[policy.Name][]netip.Addr, line string) {
	line, _, _ = strings.Cut(line, "#")
	fields := strings.Fields(line)
	if len(fields) < 2 {
		return
	}
	addr, err := netip.ParseAddr(fields[0])
	if err != nil || addr.Zone() != "" { // a zone has no form in the DNS
		return
	}
	for _, f := range fields[1:] {
		name, err := policy.ParseName(f)
		if err == nil && len(table[name]) < maxHostAddrs && !slices.Contains(table[name], addr.Unmap()) {
			table[name] = append(table[name], addr.Unmap())
		}
	}
}

// reply answers what asks for the addresses of a name in the file, or could
// lead around them; nil for everything else, and without a file.
func (h *hosts) reply(k key) *reply {
	if h == nil {
		return nil
	}
	switch k.qtype {
	case dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB:
	default:
		return nil
	}
	addrs, ok := (*h.table.Load())[k.name]
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
