// Package wire reads plain DNS queries, and builds and patches the answers to them,
// in the form they have on the wire (RFC 1035, section 4): no allocation, no copy but
// of the name asked for. A query that is anything but plain is left to those who
// unpack messages.
package wire

import (
	"encoding/binary"

	"sallyport/policy"
)

const (
	headerSize = 12
	maxName    = 255 // bytes on the wire (RFC 1035, section 2.3.4)
	maxLabel   = 63
	typeOPT    = 41
	classIN    = 1
	edeOption  = 15 // RFC 8914, section 2
)

// Options of an OPT record.
const (
	OptionNSID    = 3  // RFC 5001
	OptionCookie  = 10 // RFC 7873
	OptionPadding = 12 // RFC 7830

	firstUnknown = 20    // no option from here on means anything to anybody here
	optionHeader = 4     // bytes of an option before its data
	minCookie    = 8     // bytes of COOKIE: the client's part
	minServed    = 8 + 8 // the same with a server's part, which is 8 to 32 bytes long
	maxCookie    = 8 + 32
)

// Sizes of what an answer may carry beside its records.
const (
	OPTSize    = 11 // an OPT record without options
	edeOverOPT = 6  // code and length of the option, and the info code
)

// Bits of the third and fourth byte of a message.
const (
	bitQR     = 0x80
	bitTC     = 0x02
	bitRD     = 0x01
	bitRA     = 0x80
	bitAD     = 0x20
	bitCD     = 0x10
	notQuery  = 0xF8 // QR and the opcode
	maskRcode = 0x0F
)

// A Query is one plain question: opcode QUERY, one [policy.WireName], class IN, and nothing beside it but an OPT record of EDNS version 0,
// without options or with such as say nothing about the question: a cookie, padding, NSID, and unknown ones.
type Query struct {
	Type    uint16 // QTYPE, never 0
	EDNS    bool   // there is an OPT record (RFC 6891)
	UDPSize uint16 // what the requestor takes, as it says; 0 without EDNS
	DO      bool   // DNSSEC OK (RFC 3225)
	CD      bool   // Checking Disabled (RFC 4035)
	AD      bool   // Authentic Data is asked for (RFC 6840, section 5.7)
	Padded  bool   // there is padding (RFC 7830)
	Cookie  []byte // in packet: the data of the first COOKIE option (RFC 7873), 8 or 16 to 40 bytes; nil without one

	// Name is what is asked for, in lower case; parsed, so that it is a name.
	Name policy.WireName

	packet []byte
	size   int // of the name on the wire
	key    [maxName + keyTail]byte
}

// Parse reads packet, which q borrows until the next Parse, and reports whether it
// holds a plain query. Otherwise q is undefined. Bits that mean nothing in a query
// (AA, TC, RA, Z, RCODE) are ignored, as are EDNS flags other than DO.
func (q *Query) Parse(packet []byte) bool {
	if len(packet) < headerSize+5 || packet[2]&notQuery != 0 ||
		binary.BigEndian.Uint32(packet[4:]) != 1<<16 || binary.BigEndian.Uint16(packet[8:]) != 0 || packet[10] != 0 || packet[11] > 1 {
		return false
	}
	end, err := q.Name.Parse(packet[headerSize:])
	if err != nil || headerSize+end+4 > len(packet) {
		return false
	}
	rest := packet[headerSize+end:]
	q.Type = binary.BigEndian.Uint16(rest)
	if q.Type == 0 || binary.BigEndian.Uint16(rest[2:]) != classIN {
		return false
	}
	q.packet, q.size = packet, end
	q.CD, q.AD = packet[3]&bitCD != 0, packet[3]&bitAD != 0
	q.EDNS, q.UDPSize, q.DO, q.Padded, q.Cookie = false, 0, false, false, nil
	if rest = rest[4:]; packet[11] == 1 {
		return len(rest) >= OPTSize && q.readOPT(rest)
	}
	return len(rest) == 0
}

// readOPT reads the OPT record that is p.
func (q *Query) readOPT(p []byte) bool {
	if p[0] != 0 || binary.BigEndian.Uint16(p[1:]) != typeOPT || p[6] != 0 || int(binary.BigEndian.Uint16(p[9:])) != len(p)-OPTSize {
		return false // another record, a version other than 0, or bytes behind it
	}
	q.EDNS, q.UDPSize, q.DO = true, binary.BigEndian.Uint16(p[3:]), p[7]&0x80 != 0
	return len(p) == OPTSize || q.readOptions(p[OPTSize:])
}

// readOptions reads the options that p consists of.
func (q *Query) readOptions(p []byte) bool {
	for len(p) > 0 {
		if len(p) < optionHeader {
			return false
		}
		code, length := binary.BigEndian.Uint16(p), int(binary.BigEndian.Uint16(p[2:]))
		if p = p[optionHeader:]; length > len(p) {
			return false
		}
		switch {
		case code == OptionCookie && q.Cookie == nil: // of several the first counts
			if length != minCookie && length < minServed || length > maxCookie {
				return false
			}
			q.Cookie = p[:length]
		case code == OptionPadding:
			q.Padded = true
		case code == OptionNSID || code == OptionCookie || code >= firstUnknown: // ignored
		default:
			return false
		}
		p = p[length:]
	}
	return true
}

// keyTail is what Key has beyond the name.
const keyTail = 3

// Key returns the name in lower case with the type and the bits that make it another
// question to upstreams, as [AppendKey] does. It is valid until the next Parse.
func (q *Query) Key() []byte { return AppendKey(q.AppendName(q.key[:0]), q.Type, q.DO, q.CD) }

// AppendName appends the name in lower case.
func (q *Query) AppendName(dst []byte) []byte { return append(dst, q.Name.Bytes()...) }

// AppendKey appends to a name on the wire what makes it a key: the type, DO and CD.
func AppendKey(name []byte, qtype uint16, do, cd bool) []byte {
	var bits byte
	if do {
		bits |= 1
	}
	if cd {
		bits |= 2
	}
	return append(name, byte(qtype>>8), byte(qtype), bits)
}

// AppendName appends the name that text spells, labels joined by dots without a dot
// at the end, as it is on the wire. The text must be that of a name: labels of 1 to 63 bytes
// without escapes, 253 bytes at most.
func AppendName(dst []byte, text string) []byte {
	start := len(dst)
	dst = append(append(dst, 0), text...)
	for i := start + 1; i < len(dst); i++ {
		if dst[i] == '.' {
			dst[start] = byte(i - start - 1)
			start = i
		}
	}
	dst[start] = byte(len(dst) - start - 1)
	return append(dst, 0)
}

// AppendText appends a name on the wire as labels joined by dots, without escapes
// and without a dot at the end.
func AppendText(dst, name []byte) []byte {
	for i := 0; i < len(name) && name[i] != 0; {
		if i > 0 {
			dst = append(dst, '.')
		}
		end := i + 1 + int(name[i])
		dst = append(dst, name[i+1:end]...)
		i = end
	}
	return dst
}

// AppendHeader begins a response to q: header and question, with the question as it
// was asked, no records, RA set.
func (q *Query) AppendHeader(dst []byte, rcode int) []byte {
	start := len(dst)
	dst = append(dst, q.packet[:headerSize+q.size+4]...)
	h := dst[start:]
	q.patch(h)
	h[3] = h[3]&^(bitAD|maskRcode) | byte(rcode)&maskRcode
	clear(h[6:headerSize])
	return dst
}

// AppendAnswer begins a response to q with the whole of answer, which is a message
// that answers q's question in whatever spelling, without OPT. The ID, RD and CD and
// the spelling become q's; AD is set if authentic is.
func (q *Query) AppendAnswer(dst, answer []byte, authentic bool) []byte {
	start := len(dst)
	dst = append(dst, answer...)
	h := dst[start:]
	rcode := h[3] & maskRcode
	copy(h, q.packet[:4])
	copy(h[headerSize:], q.packet[headerSize:headerSize+q.size])
	q.patch(h)
	h[3] = h[3]&^(bitAD|maskRcode) | rcode
	if authentic {
		h[3] |= bitAD
	}
	return dst
}

// patch makes the second word of the query in h that of a response.
func (q *Query) patch(h []byte) {
	h[2] = bitQR | h[2]&bitRD
	h[3] = bitRA | h[3]&(bitCD|bitAD|maskRcode)
}

// AppendTruncated is AppendAnswer for an answer that is too large: it sets TC and
// leaves the records away.
func (q *Query) AppendTruncated(dst, answer []byte, authentic bool) []byte {
	start := len(dst)
	dst = q.AppendHeader(dst, int(answer[3]&maskRcode))
	dst[start+2] |= bitTC
	if authentic {
		dst[start+3] |= bitAD
	}
	return dst
}

// AppendAddress appends to the message that begins at start of dst an answer: that
// the name asked for has the address addr, 4 or 16 bytes, for ttl seconds.
func (q *Query) AppendAddress(dst []byte, start int, addr []byte, ttl uint32) []byte {
	dst[start+7]++
	dst = append(dst, 0xC0, headerSize, byte(q.Type>>8), byte(q.Type), 0, classIN)
	dst = binary.BigEndian.AppendUint32(dst, ttl)
	return append(append(dst, 0, byte(len(addr))), addr...)
}

// AppendOPT ends the message that begins at start of dst with an OPT record that
// offers size bytes; with an Extended DNS Error (RFC 8914) if ede is not 0, of up to
// 200 bytes of text.
func (q *Query) AppendOPT(dst []byte, start int, size, ede uint16, text string) []byte {
	dst[start+11]++
	var flags, length byte
	if q.DO {
		flags = 0x80
	}
	if ede != 0 {
		length = byte(edeOverOPT + len(text))
	}
	dst = append(dst, 0, 0, typeOPT, byte(size>>8), byte(size), 0, 0, flags, 0, 0, length)
	if ede != 0 {
		dst = append(dst, 0, edeOption, 0, length-4, byte(ede>>8), byte(ede))
		dst = append(dst, text...)
	}
	return dst
}

// AppendOption adds an option to the OPT record that begins at opt and ends dst.
func AppendOption(dst []byte, opt int, code uint16, data []byte) []byte {
	dst = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(dst, code), uint16(len(data)))
	dst = append(dst, data...)
	binary.BigEndian.PutUint16(dst[opt+9:], uint16(len(dst)-opt-OPTSize))
	return dst
}

// PadBlock is what padded answers are multiples of, in bytes (RFC 8467, section 4.1).
const PadBlock = 468

// Padding returns how many bytes the padding option (RFC 7830) of an answer of size
// bytes has to carry, so that the answer is not longer than limit. It is less than 0 if there
// is no room for the option.
func Padding(size, limit int) int {
	size += optionHeader
	return min((PadBlock-size%PadBlock)%PadBlock, limit-size)
}

// zeros is padding.
var zeros [PadBlock]byte

// AppendPadding pads the message that begins at start of dst, whose OPT record begins at
// opt and ends it, to a whole number of blocks, or limit.
func AppendPadding(dst []byte, start, opt, limit int) []byte {
	if n := Padding(len(dst)-start, limit); n >= 0 {
		dst = AppendOption(dst, opt, OptionPadding, zeros[:n])
	}
	return dst
}

// A Record is where one record of a message is.
type Record struct {
	Answer    bool   // it is in the answer section
	Type      uint16 // such as 1 for A
	TTL       int    // offset
	Data, End int    // offsets of RDATA
}

// Records calls visit for every record of a message. It returns false if that is none,
// if it has another number of questions than one, or is longer than a message can be;
// some records may have been visited by then.
func Records(message []byte, visit func(Record)) bool {
	if len(message) < headerSize || len(message) > 1<<16-1 || binary.BigEndian.Uint16(message[4:]) != 1 {
		return false
	}
	answers := int(binary.BigEndian.Uint16(message[6:]))
	records := answers + int(binary.BigEndian.Uint16(message[8:])) + int(binary.BigEndian.Uint16(message[10:]))
	at := skipName(message, headerSize)
	if at == 0 || at+4 > len(message) {
		return false
	}
	at += 4
	for i := range records { // each takes at least 11 bytes, or the loop ends
		if at = skipName(message, at); at == 0 || at+10 > len(message) {
			return false
		}
		r := Record{Answer: i < answers, Type: binary.BigEndian.Uint16(message[at:]), TTL: at + 4, Data: at + 10}
		r.End = r.Data + int(binary.BigEndian.Uint16(message[at+8:]))
		if at = r.End; at > len(message) {
			return false
		}
		visit(r)
	}
	return at == len(message)
}

// skipName returns where the name at the offset at ends, 0 if it does not.
func skipName(message []byte, at int) int {
	for at < len(message) {
		switch n := int(message[at]); {
		case n == 0:
			return at + 1
		case n >= 0xC0:
			return at + 2
		case n > maxLabel:
			return 0
		default:
			at += n + 1
		}
	}
	return 0
}

// EndOfName returns where the name at the offset at of message ends, 0 if it is no whole
// name of up to 255 bytes, or one with a pointer (RFC 1035, section 4.1.4) that does not
// point back.
func EndOfName(message []byte, at int) (end int) {
	size, begin := 0, at // begin: of the labels that at is among
	for at < len(message) {
		n := int(message[at])
		switch {
		case n == 0:
			if end == 0 {
				end = at + 1
			}
			return end
		case n >= 0xC0:
			if at+2 > len(message) {
				return 0
			}
			if end == 0 {
				end = at + 2
			}
			if at = n&0x3F<<8 | int(message[at+1]); at >= begin {
				return 0
			}
			begin = at
		case n > maxLabel:
			return 0
		default:
			if size += n + 1; size >= maxName {
				return 0
			}
			at += n + 1
		}
	}
	return 0
}

// Age lets age seconds pass for the records whose TTLs are at offsets of message.
func Age(message []byte, offsets []uint16, age uint32) {
	if age == 0 {
		return
	}
	for _, at := range offsets {
		ttl := binary.BigEndian.Uint32(message[at:])
		binary.BigEndian.PutUint32(message[at:], ttl-min(age, ttl))
	}
}
