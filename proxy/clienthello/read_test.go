package clienthello

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"testing/iotest"
)

// countingReader counts the calls that reach r.
type countingReader struct {
	r     io.Reader
	calls int
}

func (c *countingReader) Read(p []byte) (int, error) {
	c.calls++
	return c.r.Read(p)
}

func TestReadSingleSegment(t *testing.T) {
	raw := inRecord(hello(sni("api.ok.test"), ext(21, make([]byte, 1500))))
	r := &countingReader{r: bytes.NewReader(raw)}
	h, got, err := Read(r, nil, 0)
	if err != nil || h.ServerName != "api.ok.test" || !bytes.Equal(got, raw) {
		t.Fatalf("Read = %q, %d bytes, %v", h.ServerName, len(got), err)
	}
	if r.calls != 1 {
		t.Errorf("Read called its reader %d times, want once", r.calls)
	}
}

func TestReadBuffered(t *testing.T) {
	raw := append(inRecord(hello(sni("api.ok.test"))), "early data"...)
	for n := range len(raw) + 1 {
		buf := append(make([]byte, 0, 8192), raw[:n]...)
		h, got, err := Read(after(raw[n:]), buf, 0)
		if err != nil || h.ServerName != "api.ok.test" {
			t.Fatalf("Read with %d bytes buffered = %q, %v", n, h.ServerName, err)
		}
		if &got[0] != &buf[:1][0] {
			t.Fatalf("Read with %d bytes buffered left the buffer it was given", n)
		}
		if !bytes.Equal(got, raw[:len(got)]) || len(got) < len(raw)-len("early data") {
			t.Fatalf("Read with %d bytes buffered lost bytes: %x", n, got)
		}
	}
}

// TestReadNotTLS wants the verdict as soon as the bytes allow, and no later.
func TestReadNotTLS(t *testing.T) {
	tests := []struct{ name, first, rest string }{
		{"HTTP", "G", "ET / HTTP/1.1\r\n\r\n"},
		{"SSH", "S", "SH-2.0-OpenSSH\r\n"},
		{"SSLv2 hello", "\x80", "\x2e\x01\x00\x02"},
		{"alert", "\x15", "\x03\x01\x00\x02\x02\x28"},
		{"application data", "\x17", "\x03\x03\x00\x01\x00"},
		{"DTLS", "\x16\xfe", "\xff\x00\x00"},
		{"record version 2.0", "\x16\x02", "\x00\x00\x05"},
		{"NUL", "\x00", "\x00"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, got, err := Read(after([]byte(tt.first)), nil, 0)
			if !errors.Is(err, ErrNotTLS) || string(got) != tt.first {
				t.Errorf("Read(%q) = %q, %v; want ErrNotTLS", tt.first, got, err)
			}
			_, got, err = Read(after([]byte(tt.first+tt.rest)), nil, 0)
			if !errors.Is(err, ErrNotTLS) || string(got) != tt.first+tt.rest {
				t.Errorf("Read(%q) = %q, %v; want ErrNotTLS", tt.first+tt.rest, got, err)
			}
		})
	}
}

func TestReadTooLarge(t *testing.T) {
	padded := hello(sni("api.ok.test"), ext(21, make([]byte, 3000)))
	oneRecord := len(inRecord(padded))
	tests := []struct {
		name  string
		raw   []byte // all that the peer sends before it stalls
		limit int
		want  error
	}{
		{"at the limit", inRecord(padded), oneRecord, nil},
		{"a byte over, from the headers", inRecord(padded)[:9], oneRecord - 1, ErrTooLarge},
		{"over with the header of another record", inRecords(padded, len(padded)-1)[:9], oneRecord + recordHeaderLen - 1, ErrTooLarge},
		{"16 MiB announced", []byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff}, 0, ErrTooLarge},
		{"over the default", []byte{22, 3, 1, 0x40, 0, 1, 0, 0x40, 0}, 0, ErrTooLarge},
		{"small records at the limit", inRecords(padded, 100), len(inRecords(padded, 100)), nil},
		{"small records over the limit", inRecords(padded, 100), len(inRecords(padded, 100)) - 1, ErrTooLarge},
		{"records of a byte", inRecords(padded, 1), 6 * len(padded), nil},
		{"limit below the headers", inRecord(padded)[:9], 1, ErrTooLarge},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, r := range []io.Reader{after(tt.raw), iotest.OneByteReader(after(tt.raw))} {
				h, got, err := Read(r, nil, tt.limit)
				if !errors.Is(err, tt.want) || tt.want == nil && h.ServerName != "api.ok.test" {
					t.Errorf("Read(limit %d) = %q, %v; want %v", tt.limit, h.ServerName, err, tt.want)
				}
				if !bytes.HasPrefix(tt.raw, got) {
					t.Errorf("Read(limit %d) changed the bytes", tt.limit)
				}
			}
		})
	}
}

func TestReadMalformedKeepsBytes(t *testing.T) {
	raw := append(inRecord(hello(sni("192.0.2.1"))), "more"...)
	if _, got, err := Read(after(raw), nil, 0); !errors.Is(err, ErrMalformed) || !bytes.Equal(got, raw) {
		t.Errorf("Read = %x, %v; want %x, ErrMalformed", got, err, raw)
	}
}

func TestReadError(t *testing.T) {
	raw := inRecord(hello(sni("api.ok.test")))
	tests := []struct {
		name string
		r    io.Reader
		want error
		n    int
	}{
		{"EOF at once", bytes.NewReader(nil), io.EOF, 0},
		{"EOF after the first byte", bytes.NewReader(raw[:1]), io.ErrUnexpectedEOF, 1},
		{"EOF before the last byte", bytes.NewReader(raw[:len(raw)-1]), io.ErrUnexpectedEOF, len(raw) - 1},
		{"EOF between records", bytes.NewReader(inRecords(hello(), 20)[:25]), io.ErrUnexpectedEOF, 25},
		{"EOF with the last byte", iotest.DataErrReader(bytes.NewReader(raw)), nil, len(raw)},
		{"deadline", io.MultiReader(bytes.NewReader(raw[:7]), iotest.ErrReader(os.ErrDeadlineExceeded)), os.ErrDeadlineExceeded, 7},
		{"reader that does nothing", idleReader{}, io.ErrNoProgress, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, got, err := Read(tt.r, nil, 0)
			if err != tt.want || len(got) != tt.n { //nolint:errorlint // r's own error, unwrapped
				t.Errorf("Read = %d bytes, %v; want %d, %v", len(got), err, tt.n, tt.want)
			}
		})
	}
}

type idleReader struct{}

func (idleReader) Read([]byte) (int, error) { return 0, nil }

func TestParseIncomplete(t *testing.T) {
	for _, raw := range [][]byte{inRecord(hello(sni("api.ok.test"))), inRecords(hello(sni("api.ok.test")), 3)} {
		for n := range raw {
			if _, _, err := Parse(raw[:n], 0); !errors.Is(err, ErrIncomplete) {
				t.Fatalf("Parse(%x) = %v, want ErrIncomplete", raw[:n], err)
			}
		}
	}
}

// TestReadEveryCut cuts a hello everywhere: into two reads, into two records,
// into bytes, into records of n bytes. Nothing may change what is seen.
func TestReadEveryCut(t *testing.T) {
	for name, msg := range browserHellos(t) {
		t.Run(name, func(t *testing.T) { checkEveryCut(t, msg) })
	}
	t.Run("ticket of 8 KiB and name last", func(t *testing.T) {
		checkEveryCut(t, hello(ext(35, make([]byte, 8<<10)), ech(0, "payload"), versions(0x0304),
			keyShare(0x11ec, 29), alpn("h2"), sni(browserName)))
	})
}

func checkEveryCut(t *testing.T, msg []byte) {
	whole := inRecord(msg)
	first, _, err := Parse(whole, 0)
	if err != nil || first.ServerName != browserName {
		t.Fatalf("Parse = %q, %v; want %q", first.ServerName, err, browserName)
	}
	want, ja4 := viewOf(first), first.JA4()
	check := func(what string, n int, r io.Reader, sent []byte) {
		t.Helper()
		h, raw, err := Read(r, nil, 8*len(msg))
		if err != nil || viewOf(h) != want || h.JA4() != ja4 || !bytes.Equal(raw, sent) {
			t.Fatalf("%s at %d: Read = %+v, %v; want %+v", what, n, viewOf(h), err, want)
		}
	}
	for n := range len(whole) {
		check("two reads", n, io.MultiReader(bytes.NewReader(whole[:n]), bytes.NewReader(whole[n:])), whole)
	}
	for n := 1; n < len(msg); n++ {
		records := append(inRecord(msg[:n]), inRecord(msg[n:])...)
		check("two records", n, bytes.NewReader(records), records)
	}
	for _, n := range []int{1, 2, 3, 4, 5, 7, 64, 511, 512, 1400} {
		records := inRecords(msg, n)
		check("records", n, bytes.NewReader(records), records)
		check("records in bytes", n, iotest.OneByteReader(bytes.NewReader(records)), records)
		check("records in halves", n, iotest.HalfReader(bytes.NewReader(records)), records)
	}
	check("bytes", 1, iotest.OneByteReader(bytes.NewReader(whole)), whole)
}

// TestReadKeepsEveryByte sends data right behind the hello.
func TestReadKeepsEveryByte(t *testing.T) {
	sent := append(inRecord(hello(sni("api.ok.test"))), bytes.Repeat([]byte("0123456789"), 1000)...)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		r := &cutReader{rest: sent, rng: rng}
		h, raw, err := Read(r, make([]byte, 0, rng.IntN(9000)), 0)
		if err != nil || h.ServerName != "api.ok.test" || !bytes.Equal(slices.Concat(raw, r.rest), sent) {
			t.Fatalf("Read = %q, %v; %d bytes returned, %d left of %d", h.ServerName, err, len(raw), len(r.rest), len(sent))
		}
	}
}

// cutReader returns random pieces of rest.
type cutReader struct {
	rest []byte
	rng  *rand.Rand
}

func (r *cutReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.rest[:1+r.rng.IntN(len(r.rest))])
	r.rest = r.rest[n:]
	return n, nil
}

func TestReadAllocs(t *testing.T) {
	msg := browserHellos(t)["Chrome-133"]
	buf := make([]byte, 0, 4096)
	allocs := func(raw []byte, buf []byte, oneByte bool) float64 {
		var src bytes.Reader
		r := io.Reader(&src)
		if oneByte {
			r = iotest.OneByteReader(&src)
		}
		return testing.AllocsPerRun(20, func() {
			src.Reset(raw)
			if _, _, err := Read(r, buf, 8*len(raw)); err != nil {
				t.Fatal(err)
			}
		})
	}
	// The name; with no buffer given, the buffer too.
	if got := allocs(inRecord(msg), buf, false); got != 1 {
		t.Errorf("Read of one segment: %v allocations, want 1", got)
	}
	if got := allocs(inRecord(msg), nil, false); got != 2 {
		t.Errorf("Read of one segment without a buffer: %v allocations, want 2", got)
	}
	// The worst a client can do: both buffers grow by doubling, no more.
	if got := allocs(inRecords(msg, 1), nil, true); got > 20 {
		t.Errorf("Read of records of a byte, in bytes: %v allocations, want at most 20", got)
	}
}

func BenchmarkRead(b *testing.B) {
	msg := browserHellos(b)["Chrome-133"]
	bench := func(name string, raw []byte, oneByte bool) {
		b.Run(name, func(b *testing.B) {
			var src bytes.Reader
			r := io.Reader(&src)
			if oneByte {
				r = iotest.OneByteReader(&src)
			}
			buf := make([]byte, 0, 2*len(raw))
			b.SetBytes(int64(len(raw)))
			b.ReportAllocs()
			for b.Loop() {
				src.Reset(raw)
				if _, _, err := Read(r, buf, 2*len(raw)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	bench("Chrome", inRecord(msg), false)
	bench("Chrome in two records", inRecords(msg, 1400), false)
	bench("Chrome in records of a byte in bytes", inRecords(msg, 1), true)
	bench("16 KiB in bytes", inRecord(hello(sni("api.ok.test"), ext(21, make([]byte, 16000)))), true)
	bench("4000 extensions", inRecord(hello(manyEmptyExtensions(4000))), false)
}

func manyEmptyExtensions(n int) []byte {
	var list []byte
	for id := range uint16(n) {
		list = append(list, ext(0x4000+id)...)
	}
	return list
}

func BenchmarkJA4(b *testing.B) {
	h, _, err := Parse(inRecord(browserHellos(b)["Chrome-133"]), 0)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		h.JA4()
	}
}
