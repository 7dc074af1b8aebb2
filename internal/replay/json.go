package replay

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"unicode/utf16"
	"unicode/utf8"
)

// A record is what a line says, as far as it matters here. The bytes belong to the
// line, or to the scanner, until the next one.
type record struct {
	time, event, id, src, group, name, sni, tlsVersion, verdict, reason, rule, policy, dst, parent, qtype, user []byte

	port, status uint16
	ech          bool
	answers      [][]byte

	ended  bool   // time is that of the end, as Squid logs it
	millis uint64 // then: how long it took
}

var (
	errJSON  = errors.New("not a JSON object")
	errType  = errors.New("a known key has a value of another type")
	errDepth = errors.New("nested too deeply")
)

// maxDepth bounds arrays and objects in each other.
const maxDepth = 32

// A scanner reads one JSON object a line (RFC 8259): strictly, and without making
// anything of what is not asked for. It reads what encoding/json reads, which the
// fuzz test holds it against; it only wants keys spelled exactly, and UTF-8.
type scanner struct {
	b     []byte
	i     int
	texts []byte // what strings with escapes stand for
}

// scan reads line into rec.
func (s *scanner) scan(line []byte, rec *record) error {
	*rec = record{answers: rec.answers[:0]}
	s.b, s.i, s.texts = line, 0, s.texts[:0]
	if s.next() != '{' {
		return errJSON
	}
	s.i++
	if s.next() == '}' {
		s.i++
		return s.end()
	}
	for {
		if s.next() != '"' {
			return errJSON
		}
		key, err := s.text()
		if err != nil {
			return err
		}
		if s.next() != ':' {
			return errJSON
		}
		s.i++
		s.next()
		if err := s.value(key, rec); err != nil {
			return err
		}
		switch s.next() {
		case ',':
			s.i++
		case '}':
			s.i++
			return s.end()
		default:
			return errJSON
		}
	}
}

// end reports whether the line ends here.
func (s *scanner) end() error {
	s.next()
	if s.i < len(s.b) {
		return errJSON
	}
	return nil
}

// next skips white space and returns the byte there, 0 at the end.
func (s *scanner) next() byte {
	for ; s.i < len(s.b); s.i++ {
		switch c := s.b[s.i]; c {
		case ' ', '\t', '\r', '\n':
		default:
			return c
		}
	}
	return 0
}

// value reads the value of key.
func (s *scanner) value(key []byte, rec *record) error {
	var to *[]byte
	switch string(key) {
	case "time":
		to = &rec.time
	case "event":
		to = &rec.event
	case "id":
		to = &rec.id
	case "src":
		to = &rec.src
	case "group":
		to = &rec.group
	case "name":
		to = &rec.name
	case "sni":
		to = &rec.sni
	case "tls_version":
		to = &rec.tlsVersion
	case "verdict":
		to = &rec.verdict
	case "reason":
		to = &rec.reason
	case "rule":
		to = &rec.rule
	case "policy":
		to = &rec.policy
	case "dst":
		to = &rec.dst
	case "parent":
		to = &rec.parent
	case "qtype":
		to = &rec.qtype
	case "user":
		to = &rec.user
	case "port":
		return s.number(&rec.port)
	case "status":
		return s.number(&rec.status)
	case "ech":
		return s.truth(&rec.ech)
	case "answers":
		return s.list(&rec.answers)
	default:
		return s.skip(0)
	}
	if s.peek() != '"' {
		return s.otherType()
	}
	t, err := s.text()
	*to = t
	return err
}

func (s *scanner) peek() byte {
	if s.i < len(s.b) {
		return s.b[s.i]
	}
	return 0
}

// otherType says that a value is not what its key wants, unless it is no JSON at all.
func (s *scanner) otherType() error {
	if err := s.skip(0); err != nil {
		return err
	}
	return errType
}

// text reads a string. What it returns is valid until the next line.
func (s *scanner) text() ([]byte, error) {
	start := s.i + 1
	ascii := true
	for i := start; i < len(s.b); i++ {
		for i+8 <= len(s.b) {
			at := special(binary.LittleEndian.Uint64(s.b[i:]))
			if i += at; at < 8 {
				break
			}
		}
		if i == len(s.b) {
			break
		}
		switch c := s.b[i]; {
		case c == '"':
			s.i = i + 1
			t := s.b[start:i]
			if !ascii && !utf8.Valid(t) {
				return nil, errJSON
			}
			return t, nil
		case c == '\\':
			return s.escaped(start, i)
		case c < ' ':
			return nil, errJSON
		case c >= utf8.RuneSelf:
			ascii = false
		}
	}
	return nil, errJSON
}

// special returns which of the eight bytes of x, as they stand in memory, is the first
// that is a quote, a backslash, a control character or not ASCII; 8 for none. (For the
// arithmetic see "Determine if a word has a byte less than n" in S. E. Anderson's Bit
// Twiddling Hacks; borrows spoil only what stands behind the first.)
func special(x uint64) int {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	quote, back := x^ones*'"', x^ones*'\\'
	found := (x | (x-ones*' ')&^x | (quote-ones)&^quote | (back-ones)&^back) & high
	return bits.TrailingZeros64(found) / 8
}

// escaped reads a string that began at start and has its first escape at i.
func (s *scanner) escaped(start, i int) ([]byte, error) {
	from := len(s.texts)
	s.texts = append(s.texts, s.b[start:i]...)
	for i < len(s.b) {
		c := s.b[i]
		switch {
		case c == '"':
			s.i = i + 1
			t := s.texts[from:]
			if !utf8.Valid(t) {
				return nil, errJSON
			}
			return t, nil
		case c < ' ':
			return nil, errJSON
		case c != '\\':
			s.texts = append(s.texts, c)
			i++
			continue
		}
		if i+1 >= len(s.b) {
			return nil, errJSON
		}
		i += 2
		switch c := s.b[i-1]; c {
		case '"', '\\', '/':
			s.texts = append(s.texts, c)
		case 'b':
			s.texts = append(s.texts, '\b')
		case 'f':
			s.texts = append(s.texts, '\f')
		case 'n':
			s.texts = append(s.texts, '\n')
		case 'r':
			s.texts = append(s.texts, '\r')
		case 't':
			s.texts = append(s.texts, '\t')
		case 'u':
			r, ok := hex4(s.b[i:])
			if !ok {
				return nil, errJSON
			}
			i += 4
			if utf16.IsSurrogate(r) {
				r2 := rune(-1)
				if i+6 <= len(s.b) && s.b[i] == '\\' && s.b[i+1] == 'u' {
					r2, _ = hex4(s.b[i+2:])
				}
				if r = utf16.DecodeRune(r, r2); r != utf8.RuneError {
					i += 6
				}
			}
			s.texts = utf8.AppendRune(s.texts, r)
		default:
			return nil, errJSON
		}
	}
	return nil, errJSON
}

func hex4(b []byte) (r rune, ok bool) {
	if len(b) < 4 {
		return -1, false
	}
	for _, c := range b[:4] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return -1, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// number reads an integer from 0 to 65535.
func (s *scanner) number(to *uint16) error {
	start := s.i
	if c := s.peek(); c != '-' && (c < '0' || c > '9') {
		return s.otherType()
	}
	if err := s.skip(0); err != nil {
		return err
	}
	n := 0
	for _, c := range s.b[start:s.i] {
		if c < '0' || c > '9' || n > 0xffff {
			return errType
		}
		n = n*10 + int(c-'0')
	}
	if n > 0xffff {
		return errType
	}
	*to = uint16(n)
	return nil
}

func (s *scanner) truth(to *bool) error {
	c := s.peek()
	if err := s.skip(0); err != nil {
		return err
	}
	if c != 't' && c != 'f' {
		return errType
	}
	*to = c == 't'
	return nil
}

// list reads an array of strings.
func (s *scanner) list(to *[][]byte) error {
	if s.peek() != '[' {
		return s.otherType()
	}
	*to = (*to)[:0]
	s.i++
	if s.next() == ']' {
		s.i++
		return nil
	}
	for {
		if s.next() != '"' {
			return s.otherType()
		}
		t, err := s.text()
		if err != nil {
			return err
		}
		*to = append(*to, t)
		switch s.next() {
		case ',':
			s.i++
		case ']':
			s.i++
			return nil
		default:
			return errJSON
		}
	}
}

// skip reads a value of any kind.
func (s *scanner) skip(depth int) error {
	if depth > maxDepth {
		return errDepth
	}
	switch c := s.next(); c {
	case '"':
		_, err := s.text()
		return err
	case '{', '[':
		return s.skipNested(c, depth)
	case 't':
		return s.literal("true")
	case 'f':
		return s.literal("false")
	case 'n':
		return s.literal("null")
	}
	return s.skipNumber()
}

func (s *scanner) skipNested(open byte, depth int) error {
	s.i++
	last := open + 2 // ] and } stand two behind [ and {
	if s.next() == last {
		s.i++
		return nil
	}
	for {
		if open == '{' {
			if s.next() != '"' {
				return errJSON
			}
			if _, err := s.text(); err != nil {
				return err
			}
			if s.next() != ':' {
				return errJSON
			}
			s.i++
		}
		if err := s.skip(depth + 1); err != nil {
			return err
		}
		switch s.next() {
		case ',':
			s.i++
		case last:
			s.i++
			return nil
		default:
			return errJSON
		}
	}
}

func (s *scanner) literal(word string) error {
	if len(s.b)-s.i < len(word) || string(s.b[s.i:s.i+len(word)]) != word {
		return errJSON
	}
	s.i += len(word)
	return nil
}

// skipNumber reads a number: -0.5e+3 and the like.
func (s *scanner) skipNumber() error {
	if s.peek() == '-' {
		s.i++
	}
	if s.peek() == '0' {
		s.i++
	} else if !s.digits() {
		return errJSON
	}
	if s.peek() == '.' {
		s.i++
		if !s.digits() {
			return errJSON
		}
	}
	if c := s.peek(); c == 'e' || c == 'E' {
		s.i++
		if c := s.peek(); c == '+' || c == '-' {
			s.i++
		}
		if !s.digits() {
			return errJSON
		}
	}
	return nil
}

// digits skips digits and reports whether there were any.
func (s *scanner) digits() bool {
	start := s.i
	for s.i < len(s.b) && s.b[s.i] >= '0' && s.b[s.i] <= '9' {
		s.i++
	}
	return s.i > start
}
