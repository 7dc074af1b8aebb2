package proxyproto

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"

	witness "github.com/pires/go-proxyproto"
)

// header2 returns a header of version 2 with what follows its addresses.
func header2(command, family byte, addresses []byte, records ...byte) string {
	b := append([]byte(signature2), command, family)
	b = binary.BigEndian.AppendUint16(b, uint16(len(addresses)+len(records)))
	return string(append(append(b, addresses...), records...))
}

func record(typ byte, value string) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{typ}, uint16(len(value))), value...)
}

// summed appends a checksum to a header.
func summed(header string, wrong uint32) string {
	b := append([]byte(header), typeCRC32C, 0, 4, 0, 0, 0, 0)
	binary.BigEndian.PutUint16(b[14:], uint16(len(b)-fixed))
	sum := crc32.Checksum(b, castagnoli) ^ wrong
	binary.BigEndian.PutUint32(b[len(b)-4:], sum)
	return string(b)
}

var (
	four = []byte{10, 20, 1, 5, 192, 0, 2, 1, 0xc0, 0x01, 0x0c, 0x38}
	six  = func() []byte {
		a, b := netip.MustParseAddr("2001:db8::5").As16(), netip.MustParseAddr("2001:db8::1").As16()
		return append(append(a[:], b[:]...), 0xc0, 0x01, 0x0c, 0x38)
	}()
	mapped = func() []byte {
		a := netip.MustParseAddr("::ffff:10.20.1.5").As16()
		return append(append(a[:], a[:]...), 0xc0, 0x01, 0x0c, 0x38)
	}()
)

// good are headers and what they say; "" is a source that they do not tell.
var good = []struct{ name, header, source, endpoint string }{
	{"v1 IPv4", "PROXY TCP4 10.20.1.5 192.0.2.1 49153 3128\r\n", "10.20.1.5:49153", ""},
	{"v1 IPv6", "PROXY TCP6 2001:db8::5 2001:db8::1 49153 3128\r\n", "[2001:db8::5]:49153", ""},
	{"v1 mapped", "PROXY TCP6 ::ffff:10.20.1.5 ::ffff:192.0.2.1 49153 3128\r\n", "10.20.1.5:49153", ""},
	{"v1 ports", "PROXY TCP4 10.20.1.5 192.0.2.1 0 65535\r\n", "10.20.1.5:0", ""},
	{"v1 unknown", "PROXY UNKNOWN\r\n", "", ""},
	{"v1 unknown, longest", "PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n", "", ""},
	{"v2 IPv4", header2(commandProxy, overIPv4, four), "10.20.1.5:49153", ""},
	{"v2 IPv6", header2(commandProxy, overIPv6, six), "[2001:db8::5]:49153", ""},
	{"v2 mapped", header2(commandProxy, overIPv6, mapped), "10.20.1.5:49153", ""},
	{"v2 unix", header2(commandProxy, overUnix, make([]byte, 216)), "", ""},
	{"v2 unspecified", header2(commandProxy, unspecified, nil), "", ""},
	{"v2 local", header2(commandLocal, unspecified, nil), "", ""},
	{"v2 local with addresses", header2(commandLocal, overIPv4, four), "", ""},
	{"v2 local, family and rest ignored", header2(commandLocal, 0x77, []byte("xyz")), "", ""},
	{"v2 endpoint", header2(commandProxy, overIPv4, four, record(typeAWS, "\x01vpce-08d2bf15fac5001c9")...), "10.20.1.5:49153", "vpce-08d2bf15fac5001c9"},
	{"v2 other AWS subtype", header2(commandProxy, overIPv4, four, record(typeAWS, "\x02vpce-1")...), "10.20.1.5:49153", ""},
	{"v2 empty endpoint", header2(commandProxy, overIPv4, four, record(typeAWS, "\x01")...), "10.20.1.5:49153", ""},
	{"v2 endpoint after others", header2(commandProxy, overIPv6, six, append(append(record(0x04, "\x00\x00"), record(0x02, "host.test")...), record(typeAWS, "\x01vpce-1")...)...), "[2001:db8::5]:49153", "vpce-1"},
	{"v2 checksum", summed(header2(commandProxy, overIPv4, four, record(typeAWS, "\x01vpce-1")...), 0), "10.20.1.5:49153", "vpce-1"},
	{"v2 long", header2(commandProxy, overIPv4, four, record(0x04, strings.Repeat("x", MaxLength-fixed-12-recordHeader))...), "10.20.1.5:49153", ""},
}

// bad are headers that are refused, with a part of the reason.
var bad = []struct{ name, header, want string }{
	{"v1 no such family", "PROXY UDP4 10.20.1.5 192.0.2.1 1 2\r\n", "TCP4"},
	{"v1 nothing", "PROXY \r\n", "TCP4"},
	{"v1 too few", "PROXY TCP4 10.20.1.5 192.0.2.1 1\r\n", "two ports"},
	{"v1 too many", "PROXY TCP4 10.20.1.5 192.0.2.1 1 2 3\r\n", "two ports"},
	{"v1 two spaces", "PROXY TCP4  10.20.1.5 192.0.2.1 1 2\r\n", "two ports"},
	{"v1 other family", "PROXY TCP4 2001:db8::5 2001:db8::1 1 2\r\n", "address"},
	{"v1 other family in TCP6", "PROXY TCP6 10.20.1.5 192.0.2.1 1 2\r\n", "address"},
	{"v1 bad destination", "PROXY TCP4 10.20.1.5 nobody 1 2\r\n", "address"},
	{"v1 zone", "PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n", "address"},
	{"v1 octal", "PROXY TCP4 010.20.1.5 192.0.2.1 1 2\r\n", "address"},
	{"v1 port too large", "PROXY TCP4 10.20.1.5 192.0.2.1 65536 2\r\n", "port"},
	{"v1 signed port", "PROXY TCP4 10.20.1.5 192.0.2.1 +1 2\r\n", "port"},
	{"v1 port with zero", "PROXY TCP4 10.20.1.5 192.0.2.1 01 2\r\n", "port"},
	{"v1 bare LF", "PROXY TCP4 10.20.1.5 192.0.2.1 1 2\n", "bare LF"},
	{"v1 no end", "PROXY UNKNOWN " + strings.Repeat("x", 107), "107"},
	{"v1 too long", "PROXY UNKNOWN " + strings.Repeat("x", 92) + "\r\n", "107"},
	{"v2 version 1", header2(0x11, overIPv4, four), "version 2"},
	{"v2 command", header2(0x22, overIPv4, four), "version 2"},
	{"v2 datagram", header2(commandProxy, 0x12, four), "stream"},
	{"v2 family", header2(commandProxy, 0x41, four), "stream"},
	{"v2 short for IPv4", header2(commandProxy, overIPv4, four[:11]), "too short"},
	{"v2 short for IPv6", header2(commandProxy, overIPv6, four), "too short"},
	{"v2 too long", header2(commandProxy, overIPv4, make([]byte, MaxLength-fixed+1)), "4 KiB"},
	{"v2 local too long", header2(commandLocal, unspecified, make([]byte, MaxLength)), "4 KiB"},
	{"v2 record cut off", header2(commandProxy, overIPv4, four, 0xea, 0), "cut off"},
	{"v2 value cut off", header2(commandProxy, overIPv4, four, 0xea, 0, 9, 1, 'v'), "cut off"},
	{"v2 wrong checksum", summed(header2(commandProxy, overIPv4, four), 1), "checksum"},
	{"v2 short checksum", header2(commandProxy, overIPv4, four, typeCRC32C, 0, 1, 0), "checksum"},
	{"v2 two checksums", summed(summed(header2(commandProxy, overIPv4, four), 0), 0), "checksum"},
}

func wantHeader(source, endpoint string) Header {
	h := Header{VPCEndpoint: endpoint}
	if source != "" {
		h.Source = netip.MustParseAddrPort(source)
	}
	return h
}

func TestRead(t *testing.T) {
	const after = "CONNECT a.test:443 HTTP/1.1\r\n\r\n\x16\x03\x01"
	for _, tt := range good {
		t.Run(tt.name, func(t *testing.T) {
			want := wantHeader(tt.source, tt.endpoint)
			stream := tt.header + after
			for split := 0; split <= len(stream); split += 1 + len(stream)/300 { // what came before, and one byte at a time
				r := iotest.OneByteReader(strings.NewReader(stream[split:]))
				h, rest, err := Read(r, []byte(stream[:split]))
				tail, _ := io.ReadAll(r)
				if h != want || string(rest)+string(tail) != after || err != nil {
					t.Fatalf("split at %d: %+v, %q %q, %v", split, h, rest, tail, err)
				}
				if split <= len(tt.header) && len(rest) > 0 {
					t.Fatalf("split at %d: %q read beyond the header", split, rest)
				}
			}
			h, rest, err := Read(strings.NewReader(stream), make([]byte, 0, 2*MaxLength))
			if h != want || string(rest) != after || err != nil {
				t.Errorf("at once: %+v, %q, %v", h, rest, err)
			}
			for n := range len(tt.header) {
				if h, m, err := Parse([]byte(tt.header[:n])); !errors.Is(err, ErrIncomplete) || h != (Header{}) || m != 0 {
					t.Fatalf("the first %d bytes: %+v, %d, %v", n, h, m, err)
				}
			}
		})
	}
}

func TestReadRefuses(t *testing.T) {
	for _, tt := range bad {
		for _, r := range []io.Reader{strings.NewReader(tt.header), iotest.OneByteReader(strings.NewReader(tt.header))} {
			h, _, err := Read(r, nil)
			if h != (Header{}) || !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: %+v, %v", tt.name, h, err)
			}
		}
	}
	for _, s := range []string{"CONNECT a.test:443 HTTP/1.1\r\n", "PROXYTCP4", "PROXx", "\r\n\r\n\r", "\r\n\r\nGET", "\x16\x03\x01", "proxy TCP4"} {
		h, rest, err := Read(iotest.OneByteReader(strings.NewReader(s)), nil)
		if h != (Header{}) || !errors.Is(err, ErrMissing) || !strings.HasPrefix(s, string(rest)) || len(rest) == 0 {
			t.Errorf("%q: %+v, %q, %v", s, h, rest, err)
		}
	}
	for s, want := range map[string]error{"": io.EOF, "P": io.ErrUnexpectedEOF, "PROXY TCP4 10": io.ErrUnexpectedEOF, signature2: io.ErrUnexpectedEOF} {
		if h, rest, err := Read(strings.NewReader(s), nil); h != (Header{}) || string(rest) != s || !errors.Is(err, want) {
			t.Errorf("%q: %+v, %q, %v", s, h, rest, err)
		}
	}
}

func TestStarts(t *testing.T) {
	for _, s := range []string{"P", "PROXY", "PROXY TCP4", "\r", "\r\n\r\n", signature2, signature2 + "x"} {
		if !Starts([]byte(s)) {
			t.Errorf("%q could be a header", s)
		}
	}
	for _, s := range []string{"", "POST / HTTP/1.1", "PROXY\t", "GET", "\r\n\r\n\r\n", "\n"} {
		if Starts([]byte(s)) {
			t.Errorf("%q is no header", s)
		}
	}
}

// FuzzParse compares Parse with another implementation, where that is not more
// lenient or more strict by design.
func FuzzParse(f *testing.F) {
	for _, tt := range good {
		f.Add([]byte(tt.header + "GET"))
	}
	for _, tt := range bad {
		f.Add([]byte(tt.header))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, n, err := Parse(b)
		if err != nil && (h != (Header{}) || n != 0) || err == nil && (n < len(signature1) || n > min(len(b), MaxLength)) {
			t.Fatalf("Parse = %+v, %d, %v", h, n, err)
		}
		if err == nil {
			if again, m, err := Parse(b[:n]); again != h || m != n || err != nil {
				t.Fatalf("without what follows: %+v, %d, %v; with it: %+v, %d", again, m, err, h, n)
			}
			for m := range n {
				if _, _, err := Parse(b[:m]); !errors.Is(err, ErrIncomplete) {
					t.Fatalf("%d of %d bytes: %v", m, n, err)
				}
			}
		}
		br := bufio.NewReaderSize(bytes.NewReader(b), 2*MaxLength)
		wh, werr := witness.Read(br)
		switch {
		case errors.Is(err, ErrIncomplete), errors.Is(err, ErrMissing):
			if werr == nil {
				t.Fatalf("Parse = %v; the witness has %+v", err, wh)
			}
		case err != nil:
			if werr == nil && !ownChoice(b, wh) {
				t.Fatalf("Parse = %v; the witness has %+v", err, wh)
			}
		case werr != nil:
			// The witness refuses what the specification leaves to receivers: PROXY with
			// an unspecified family, and LOCAL with an undefined one.
			if b[0] != '\r' || b[13] != unspecified && b[12] != commandLocal {
				t.Fatalf("Parse = %+v; the witness says %v", h, werr)
			}
		default:
			compare(t, h, wh)
			if rest, _ := io.ReadAll(br); len(rest) != len(b)-n {
				t.Fatalf("%d bytes; the witness took %d", n, len(b)-len(rest))
			}
		}
	})
}

// ownChoice reports whether we refuse on purpose what the witness has read as wh.
func ownChoice(b []byte, wh *witness.Header) bool {
	if wh.Version == 1 {
		return false
	}
	if wh.TransportProtocol.IsDatagram() || fixed+int(binary.BigEndian.Uint16(b[14:])) > MaxLength {
		return true
	}
	records, err := wh.TLVs()
	if err != nil {
		return true // the witness looks at them only when asked
	}
	for _, r := range records {
		if r.Type == witness.PP2_TYPE_CRC32C {
			return true // it does not verify it
		}
	}
	return false
}

func compare(t *testing.T, h Header, wh *witness.Header) {
	var source netip.AddrPort
	if a, ok := wh.SourceAddr.(*net.TCPAddr); ok && wh.Command != witness.LOCAL {
		source = netip.AddrPortFrom(a.AddrPort().Addr().Unmap(), uint16(a.Port))
	}
	var endpoint string
	if records, err := wh.TLVs(); err == nil && wh.Command != witness.LOCAL {
		for _, r := range records {
			if r.Type == witness.PP2Type(typeAWS) && len(r.Value) > 1 && r.Value[0] == awsEndpoint && endpoint == "" {
				endpoint = string(r.Value[1:min(len(r.Value), 1+maxEndpoint)])
			}
		}
	}
	if h.Source != source || h.VPCEndpoint != endpoint {
		t.Fatalf("Parse = %+v; the witness has source %v, endpoint %q", h, source, endpoint)
	}
}

func BenchmarkParse(b *testing.B) {
	for _, name := range []string{"v1 IPv4", "v2 IPv4"} {
		for _, tt := range good {
			if tt.name == name {
				header := []byte(tt.header)
				b.Run(name, func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						if _, _, err := Parse(header); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}
