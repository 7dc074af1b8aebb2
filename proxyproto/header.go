// Package proxyproto reads the header of the PROXY protocol, versions 1 and 2, by
// which a load balancer says on whose behalf it connects:
// https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt, "the specification"
// below.
//
// It takes exactly the header off a stream, in whatever pieces that arrives, and
// bounds it. github.com/pires/go-proxyproto, which reads more leniently in some
// places and refuses a version 1 header in more than one piece, is the tests'
// witness.
//
// Whether a peer may say such a thing at all is the caller's to decide.
package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"
	"strconv"
	"strings"
)

// MaxLength bounds a header, in bytes. Version 2 could announce 64 KiB; 4 KiB
// leave room for a client certificate and its names.
const MaxLength = 4 << 10

var (
	// ErrMissing means that the stream starts with something else.
	ErrMissing = errors.New("no PROXY protocol header")

	// ErrMalformed means that the stream starts with a header that is not as the
	// specification wants it, or one longer than MaxLength.
	ErrMalformed = errors.New("malformed PROXY protocol header")

	// ErrIncomplete means that Parse was given a good beginning, and needs more
	// bytes. Read does not return it.
	ErrIncomplete = errors.New("incomplete PROXY protocol header")
)

// malformed returns an ErrMalformed that says what is wrong. It quotes nothing
// that the peer sent.
func malformed(what string) error { return fmt.Errorf("%w: %s", ErrMalformed, what) }

// A Header is what a load balancer says of a connection.
type Header struct {
	// Source is the client, never IPv4-mapped. It is zero if the header does not
	// tell: the command LOCAL, by which a load balancer checks health on its own
	// behalf, UNKNOWN in version 1, and Unix sockets. The connection's own peer is
	// then who asks (sections 2.1 and 2.2 of the specification).
	Source netip.AddrPort

	// VPCEndpoint is the AWS VPC endpoint that the client came through, as Network
	// Load Balancers tell it, or "". It is whatever the load balancer sent, at most
	// maxEndpoint bytes.
	VPCEndpoint string
}

const (
	signature1 = "PROXY "
	signature2 = "\r\n\r\n\x00\r\nQUIT\n"

	maxLine = 107 // bytes of a version 1 header with its CRLF (section 2.1)
	fixed   = 16  // bytes of a version 2 header before what its length counts (section 2.2)

	commandLocal = 0x20 // version 2 in the upper half
	commandProxy = 0x21

	unspecified  = 0x00
	overIPv4     = 0x11 // stream in the lower half
	overIPv6     = 0x21
	overUnix     = 0x31
	typeCRC32C   = 0x03
	typeAWS      = 0xea // PP2_TYPE_AWS
	awsEndpoint  = 0x01 // PP2_SUBTYPE_AWS_VPCE_ID
	maxEndpoint  = 255  // bytes kept of an endpoint's name
	recordHeader = 3    // bytes of a TLV before its value
)

// lengths of the addresses that each family has in front of the TLVs.
var lengths = map[byte]int{unspecified: 0, overIPv4: 12, overIPv6: 36, overUnix: 216}

// Starts reports whether b, the first bytes of a stream, could be or begin a
// header. It is false for no bytes.
func Starts(b []byte) bool {
	n := len(b)
	return n > 0 && (hasPrefix(b, signature2[:min(n, len(signature2))]) || hasPrefix(b, signature1[:min(n, len(signature1))]))
}

func hasPrefix(b []byte, s string) bool { return len(b) >= len(s) && string(b[:len(s)]) == s }

// Read reads a header from r, which may end in the middle of one. buf holds what
// was received before and may be empty; its spare capacity is read into. rest is
// what was received after the header, or on an error everything. It shares memory
// with buf, unless that was too small.
//
// The error wraps ErrMissing or ErrMalformed, or is r's own, with
// io.ErrUnexpectedEOF for an end in the middle. The caller sets the read deadline.
func Read(r io.Reader, buf []byte) (h Header, rest []byte, err error) {
	for {
		h, n, err := Parse(buf)
		if err == nil {
			return h, buf[n:], nil
		}
		if !errors.Is(err, ErrIncomplete) {
			return Header{}, buf, err
		}
		if len(buf) == cap(buf) {
			buf = append(make([]byte, 0, MaxLength), buf...) // an incomplete header is shorter
		}
		m, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+m]
		if m == 0 && err != nil {
			if errors.Is(err, io.EOF) && len(buf) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return Header{}, buf, err
		}
	}
}

// Parse returns the header at the start of b and its length in bytes. The error
// wraps ErrMissing, ErrMalformed or ErrIncomplete.
func Parse(b []byte) (h Header, n int, err error) {
	switch {
	case len(b) > 0 && !Starts(b):
		return Header{}, 0, ErrMissing
	case len(b) < len(signature1):
		return Header{}, 0, ErrIncomplete
	case b[0] == signature1[0]:
		return parse1(b)
	}
	return parse2(b)
}

// parse1 parses a header of version 1: a line in words (section 2.1).
func parse1(b []byte) (h Header, n int, err error) {
	head := b[:min(len(b), maxLine)]
	end := bytes.IndexByte(head, '\n')
	switch {
	case end < 0 && len(head) == maxLine:
		return Header{}, 0, malformed("a line of more than 107 bytes")
	case end < 0:
		return Header{}, 0, ErrIncomplete
	case b[end-1] != '\r':
		return Header{}, 0, malformed("the line ends in a bare LF")
	}
	words := strings.Split(string(b[len(signature1):end-1]), " ")
	if words[0] == "UNKNOWN" { // the rest of the line is not looked at
		return Header{}, end + 1, nil
	}
	if words[0] != "TCP4" && words[0] != "TCP6" || len(words) != 5 {
		return Header{}, 0, malformed("not TCP4, TCP6 or UNKNOWN with two addresses and two ports")
	}
	h.Source, err = endpoint1(words[0], words[1], words[3])
	if err == nil {
		_, err = endpoint1(words[0], words[2], words[4])
	}
	if err != nil {
		return Header{}, 0, err
	}
	return h, end + 1, nil
}

// endpoint1 parses an address and a port of version 1.
func endpoint1(family, addr, port string) (netip.AddrPort, error) {
	a, err := netip.ParseAddr(addr)
	if err != nil || a.Zone() != "" || a.Is4() != (family == "TCP4") {
		return netip.AddrPort{}, malformed("not an address of " + family)
	}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil || len(port) > 1 && port[0] == '0' {
		return netip.AddrPort{}, malformed("not a port")
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(p)), nil
}

// parse2 parses a header of version 2 (section 2.2).
func parse2(b []byte) (h Header, n int, err error) {
	if len(b) < fixed {
		return Header{}, 0, ErrIncomplete
	}
	command, family := b[12], b[13]
	addresses, known := lengths[family]
	n = fixed + int(binary.BigEndian.Uint16(b[14:]))
	switch {
	case command != commandLocal && command != commandProxy:
		return Header{}, 0, malformed("neither LOCAL nor PROXY of version 2")
	case n > MaxLength:
		return Header{}, 0, malformed("longer than 4 KiB")
	case command == commandProxy && !known:
		return Header{}, 0, malformed("neither a stream over IPv4, IPv6 or a Unix socket, nor unspecified")
	case command == commandProxy && n < fixed+addresses:
		return Header{}, 0, malformed("too short for its addresses")
	case len(b) < n:
		return Header{}, 0, ErrIncomplete
	case command == commandLocal: // the rest, the family too, is not looked at
		return Header{}, n, nil
	}
	block := b[fixed:n]
	switch family {
	case overIPv4:
		h.Source = netip.AddrPortFrom(netip.AddrFrom4([4]byte(block)), binary.BigEndian.Uint16(block[8:]))
	case overIPv6:
		h.Source = netip.AddrPortFrom(netip.AddrFrom16([16]byte(block)).Unmap(), binary.BigEndian.Uint16(block[32:]))
	}
	if err := h.records(b[:n], fixed+addresses); err != nil {
		return Header{}, 0, err
	}
	return h, n, nil
}

// records goes through the TLVs of b, a whole header, from at on.
func (h *Header) records(b []byte, at int) error {
	summed := false
	for at < len(b) {
		if len(b)-at < recordHeader {
			return malformed("a TLV is cut off")
		}
		typ, length := b[at], int(binary.BigEndian.Uint16(b[at+1:]))
		at += recordHeader
		if len(b)-at < length {
			return malformed("a TLV is cut off")
		}
		value := b[at : at+length]
		switch {
		case typ == typeCRC32C:
			if summed || length != crc32.Size || binary.BigEndian.Uint32(value) != checksum(b, at) {
				return malformed("the checksum is wrong")
			}
			summed = true
		case typ == typeAWS && length > 1 && value[0] == awsEndpoint && h.VPCEndpoint == "":
			h.VPCEndpoint = string(value[1:min(length, 1+maxEndpoint)])
		}
		at += length
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum returns the CRC32C of b with zeros for the checksum at at (section 2.2.3).
func checksum(b []byte, at int) uint32 {
	sum := crc32.Update(0, castagnoli, b[:at])
	sum = crc32.Update(sum, castagnoli, make([]byte, crc32.Size))
	return crc32.Update(sum, castagnoli, b[at+crc32.Size:])
}
