package policy

import (
	"errors"
	"unsafe"
)

// maxWire bounds a name in wire form, its last octet included (RFC 1035, section 3.1).
const maxWire = 255

// ErrWireName is wrapped by every error of WireName.Parse.
var ErrWireName = errors.New("not a domain name in wire form")

// A WireName is a domain name in the form of DNS messages (RFC 1035, section 3.1):
// labels, each behind an octet with its length, in lower case. It is what a Name is
// for text: exactly those names that are a Name too can be a WireName. It is large;
// keep one for each goroutine and use it again. The zero value is no name.
type WireName struct {
	wire   [maxWire]byte // with the last, empty label
	size   int           // octets of wire that count
	labels int           // how many labels there are, without the empty one
	starts [maxWire / 2]uint8
}

// Parse makes n the name at the start of msg, and returns how many octets it takes
// there. The name must not be compressed, as in a question. n keeps nothing of
// msg. After an error, which wraps ErrWireName, n is no name.
func (n *WireName) Parse(msg []byte) (int, error) {
	n.size, n.labels = 0, 0
	i, labels := 0, 0
	for {
		if i >= len(msg) || i >= maxWire {
			return 0, ErrWireName
		}
		size := int(msg[i])
		n.wire[i] = msg[i]
		if size == 0 {
			break
		}
		end := i + 1 + size
		// The top two bits of a length are for compression and other extensions.
		if size > maxLabel || end >= len(msg) || end >= maxWire {
			return 0, ErrWireName
		}
		for k, c := range msg[i+1 : end] {
			folded := wireFold[c]
			if folded == 0 {
				return 0, ErrWireName
			}
			n.wire[i+1+k] = folded
		}
		if msg[i+1] == '-' || msg[end-1] == '-' {
			return 0, ErrWireName
		}
		n.starts[labels] = uint8(i)
		labels++
		i = end
	}
	if labels == 0 || isNumber(n.label(labels-1)) {
		return 0, ErrWireName
	}
	n.size, n.labels = i+1, labels
	return n.size, nil
}

// wireFold maps the octets that a label may hold to lower case, and others to 0.
var wireFold = func() (t [256]byte) {
	for c := range t {
		switch {
		case c >= 'A' && c <= 'Z':
			t[c] = byte(c) | 0x20
		case nameByte[c]:
			t[c] = byte(c)
		}
	}
	return t
}()

// Bytes returns the wire form, with the empty label at its end; nil if n is no
// name. It belongs to n and holds until the next Parse.
func (n *WireName) Bytes() []byte {
	if n.size == 0 {
		return nil
	}
	return n.wire[:n.size]
}

// Name returns the same name in text form, which it allocates.
func (n *WireName) Name() Name {
	if n.size == 0 {
		return Name{}
	}
	return Name{string(n.text(make([]byte, 0, n.size), n.labels))}
}

// label returns label i, counted from the left. It belongs to n.
func (n *WireName) label(i int) string {
	start := n.starts[i]
	size := n.wire[start]
	return unsafe.String(&n.wire[start+1], size)
}

// text appends the first labels of n to buf, with dots between them.
func (n *WireName) text(buf []byte, labels int) []byte {
	for i := range labels {
		if i > 0 {
			buf = append(buf, '.')
		}
		buf = append(buf, n.label(i)...)
	}
	return buf
}

// matchWire is match for a name in wire form.
func (x *nameIndex) matchWire(n *WireName, e *eval, r *Request) {
	if x.root != 0 {
		x.visitWire(n, n.labels, x.root, e, r)
	}
	h := x.seed
	for i := n.labels - 1; i >= 0; i-- {
		h = extend(h, n.label(i))
		if x.depth[(n.labels-i)&127]>>(h>>58)&1 != 0 {
			if off := x.findWire(n, i, h); off != 0 {
				x.visitWire(n, i, off, e, r)
			}
		}
	}
}

// findWire is find for the labels of n from label i on.
func (x *nameIndex) findWire(n *WireName, i int, h uint64) uint32 {
	hash := uint32(h >> 32)
	mask := uint32(len(x.slots) - 1)
	for k := hash & mask; ; k = (k + 1) & mask {
		s := x.slots[k]
		if s.off == 0 {
			return 0
		}
		if s.hash == hash && n.is(i, x.text(s.off)[2:]) {
			return s.off
		}
	}
}

// is reports whether the labels of n from label i on are those of name.
func (n *WireName) is(i int, name string) bool {
	if len(name) != n.size-2-int(n.starts[i]) {
		return false
	}
	for ; i < n.labels; i++ {
		label := n.label(i)
		if name[:len(label)] != label {
			return false
		}
		if len(name) == len(label) {
			return true
		}
		if name[len(label)] != '.' {
			return false
		}
		name = name[len(label)+1:]
	}
	return false
}

// visitWire is visit for the record of the fixed part that begins with label i.
func (x *nameIndex) visitWire(n *WireName, i int, off uint32, e *eval, r *Request) {
	if i == 0 {
		if refs := x.exact(off); refs != 0 {
			e.consider(hit{refs: refs, text: x.text(off)}, r)
		}
	} else if refs := x.below(off); refs != 0 {
		e.consider(hit{refs: refs, text: x.text(off), below: true}, r)
	}
	if x.globs == nil {
		return
	}
	if globs := x.globs[off]; len(globs) > 0 {
		var buf [maxWire]byte
		left := n.text(buf[:0], i)
		x.visitGlobs(globs, unsafe.String(unsafe.SliceData(left), len(left)), e, r)
	}
}
