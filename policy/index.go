package policy

import (
	"cmp"
	"encoding/binary"
	"errors"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strings"
	"unsafe"
)

// A ref says that a rule of an owner matches where the ref stands.
type ref struct {
	owner uint32 // 0: the document's deny rules; otherwise group index + 1
	rule  uint32 // index into Policy.rules
	form  form   // how the pattern was spelt, for rules whose ID is their pattern
}

type form uint8

const (
	formNone  form = iota // the rule has an ID of its own
	formExact             // x.com
	formBelow             // *.x.com
	formBoth              // .x.com
)

func compareRefs(a, b ref) int {
	return cmp.Or(cmp.Compare(a.owner, b.owner), cmp.Compare(a.rule, b.rule), cmp.Compare(a.form, b.form))
}

// A posting names an interned, sorted set of refs. Most names of a long list
// share one. The zero posting is empty.
type posting uint32

// postings interns sets of refs.
type postings struct {
	sets   [][]ref
	ids    map[string]posting     // nil once compiled
	unions map[[2]posting]posting // nil once compiled
}

func newPostings() postings {
	return postings{sets: [][]ref{nil}, ids: map[string]posting{"": 0}, unions: map[[2]posting]posting{}}
}

// intern returns the posting of refs, which it sorts.
func (ps *postings) intern(refs []ref) posting {
	slices.SortFunc(refs, compareRefs)
	refs = slices.Compact(refs)
	key := make([]byte, 0, 9*len(refs))
	for _, r := range refs {
		key = binary.LittleEndian.AppendUint32(key, r.owner)
		key = binary.LittleEndian.AppendUint32(key, r.rule)
		key = append(key, byte(r.form))
	}
	if id, ok := ps.ids[string(key)]; ok {
		return id
	}
	id := posting(len(ps.sets))
	ps.sets = append(ps.sets, slices.Clone(refs))
	ps.ids[string(key)] = id
	return id
}

// union returns the posting of all refs of a and b.
func (ps *postings) union(a, b posting) posting {
	if a == b || b == 0 {
		return a
	}
	if a == 0 {
		return b
	}
	key := [2]posting{min(a, b), max(a, b)}
	id, ok := ps.unions[key]
	if !ok {
		id = ps.intern(slices.Concat(ps.sets[a], ps.sets[b]))
		ps.unions[key] = id
	}
	return id
}

// seal drops what only compiling needs.
func (ps *postings) seal() { ps.ids, ps.unions = nil, nil }

// A glob is a pattern with a wildcard inside, filed under its fixed part.
type glob struct {
	labels      []string
	apex, below bool
	text        string
	refs        posting
}

// nameIndex finds every pattern that matches a name with one probe a label. It is
// an open-addressing hash table over the fixed parts of all patterns of all rules,
// which lie one after the other in the chunks of the arena. A record is
//
//	exact posting (4) | below posting (4) | length (1) | "*." name
//
// where exact holds for the name itself and below for the names under it. The
// leading "*." lets a rule's ID be cut from the arena in each of its spellings.
// A name costs its length + 11 bytes + 8 bytes a slot at a load of 3/8 to 3/4.
type nameIndex struct {
	seed  uint64
	slots []slot
	used  int
	arena [][]byte          // each of chunkSize bytes at most; what grows is never copied as a whole
	depth [128]uint64       // by number of labels: which six bits the hashes of fixed parts begin with; others need no probe
	root  uint32            // offset of the record of the root, or 0
	globs map[uint32][]glob // by offset of the record of the fixed part
}

type slot struct {
	hash uint32
	off  uint32 // of the record: chunk of the arena and place in it; 0: empty
}

const (
	recordHeader = 9 // bytes before "*."
	minSlots     = 16
	chunkBits    = 20 // of an offset: the place in a chunk
	chunkSize    = 1 << chunkBits
	maxChunks    = 1 << (32 - chunkBits)
	// hashFactor is odd, with as many one bits as zero bits.
	hashFactor = 0x9e3779b97f4a7c15
)

// errIndexFull is returned when the arena outgrows its 32-bit offsets.
var errIndexFull = errors.New("the names of this policy need more than 4 GiB")

func newNameIndex() nameIndex {
	// Offset 0 means "empty slot", so the arena begins with a byte of padding.
	return nameIndex{seed: rand.Uint64(), slots: make([]slot, minSlots), arena: [][]byte{make([]byte, 1)}}
}

// extend adds the label to the left of a name to the name's running hash. Labels
// count from the right, so that one pass over a name gives the hash of each of its
// suffixes. It takes eight bytes at a step and folds 128-bit products, as wyhash does.
func extend(h uint64, label string) uint64 {
	b := unsafe.Slice(unsafe.StringData(label), len(label))
	h ^= uint64(len(b)) << 56
	for ; len(b) > 8; b = b[8:] {
		h = fold(h ^ binary.LittleEndian.Uint64(b))
	}
	var tail uint64
	switch n := len(b); {
	case n >= 4:
		tail = uint64(binary.LittleEndian.Uint32(b)) | uint64(binary.LittleEndian.Uint32(b[n-4:]))<<32
	case n > 0:
		tail = uint64(b[0]) | uint64(b[n/2])<<8 | uint64(b[n-1])<<16
	}
	return fold(h ^ tail)
}

func fold(h uint64) uint64 {
	hi, lo := bits.Mul64(h, hashFactor)
	return hi ^ lo
}

// record returns the record at off, and what follows it in its chunk.
func (x *nameIndex) record(off uint32) []byte {
	return x.arena[off>>chunkBits][off&(chunkSize-1):]
}

func (x *nameIndex) exact(off uint32) posting {
	return posting(binary.LittleEndian.Uint32(x.record(off)))
}

func (x *nameIndex) below(off uint32) posting {
	return posting(binary.LittleEndian.Uint32(x.record(off)[4:]))
}

// text returns "*." and the name of the record at off, without copying: the arena
// never changes once compiled.
func (x *nameIndex) text(off uint32) string {
	r := x.record(off)
	return unsafe.String(&r[recordHeader], int(r[8])+2)
}

// find returns the record of the fixed part name whose running hash is h, or 0.
func (x *nameIndex) find(name string, h uint64) uint32 {
	hash := uint32(h >> 32)
	mask := uint32(len(x.slots) - 1)
	for i := hash & mask; ; i = (i + 1) & mask {
		s := x.slots[i]
		if s.off == 0 {
			return 0
		}
		if s.hash == hash && x.text(s.off)[2:] == name {
			return s.off
		}
	}
}

// hash returns the running hash of name.
func (x *nameIndex) hash(name string) uint64 {
	h := x.seed
	for end := len(name); end > 0; {
		i := strings.LastIndexByte(name[:end], '.') + 1
		h = extend(h, name[i:end])
		end = i - 1
	}
	return h
}

// insert returns the record for the fixed part name, making it if need be.
func (x *nameIndex) insert(name string) (uint32, error) {
	h := x.hash(name)
	if off := x.find(name, h); off != 0 {
		return off, nil
	}
	last := len(x.arena) - 1
	if len(x.arena[last])+recordHeader+2+len(name) > chunkSize {
		if len(x.arena) == maxChunks {
			return 0, errIndexFull
		}
		x.arena = append(x.arena, make([]byte, 0, chunkSize))
		last++
	}
	if (x.used+1)*4 > len(x.slots)*3 {
		x.grow()
	}
	off := uint32(last<<chunkBits + len(x.arena[last]))
	x.arena[last] = append(x.arena[last], 0, 0, 0, 0, 0, 0, 0, 0, byte(len(name)), '*', '.')
	x.arena[last] = append(x.arena[last], name...)
	if name == "" {
		x.root = off
	} else {
		n := strings.Count(name, ".") + 1
		x.depth[n] |= 1 << (h >> 58)
	}
	x.place(slot{uint32(h >> 32), off})
	x.used++
	return off, nil
}

func (x *nameIndex) place(s slot) {
	mask := uint32(len(x.slots) - 1)
	i := s.hash & mask
	for x.slots[i].off != 0 {
		i = (i + 1) & mask
	}
	x.slots[i] = s
}

func (x *nameIndex) grow() {
	old := x.slots
	x.slots = make([]slot, 2*len(old))
	for _, s := range old {
		if s.off != 0 {
			x.place(s)
		}
	}
}

// add files p for refs.
func (x *nameIndex) add(ps *postings, p pattern, refs posting) error {
	off, err := x.insert(p.base)
	if err != nil {
		return err
	}
	if len(p.glob) > 0 {
		if x.globs == nil {
			x.globs = map[uint32][]glob{}
		}
		g := glob{p.glob, p.apex, p.below, p.text(), refs}
		for i, old := range x.globs[off] {
			if old.text == g.text {
				x.globs[off][i].refs = ps.union(old.refs, refs)
				return nil
			}
		}
		x.globs[off] = append(x.globs[off], g)
		return nil
	}
	if p.apex {
		binary.LittleEndian.PutUint32(x.record(off), uint32(ps.union(x.exact(off), refs)))
	}
	if p.below {
		binary.LittleEndian.PutUint32(x.record(off)[4:], uint32(ps.union(x.below(off), refs)))
	}
	return nil
}

// seal gives back what growing left over.
func (x *nameIndex) seal() {
	last := len(x.arena) - 1
	x.arena[last] = slices.Clip(slices.Clone(x.arena[last]))
}

// A hit is one pattern that matched.
type hit struct {
	refs  posting
	text  string // "*." and the fixed part, or the whole text of a glob; "" for an address
	glob  bool
	below bool // the name lies below the fixed part
}

// id returns the ID of a rule whose ID is its pattern, as spelt in form f.
func (h hit) id(f form) string {
	switch {
	case h.glob:
		return h.text
	case f == formExact:
		return h.text[2:]
	case f == formBoth:
		return h.text[1:]
	case h.text == "*.": // the pattern "*"
		return h.text[:1]
	}
	return h.text
}

// match calls yield for every pattern that matches name, from the shortest fixed
// part to the longest.
func (x *nameIndex) match(name string, e *eval, r *Request) {
	if x.root != 0 {
		x.visit(name, len(name), x.root, e, r)
	}
	h := x.seed
	for end, n := len(name), 1; end > 0; n++ {
		i := strings.LastIndexByte(name[:end], '.') + 1
		h = extend(h, name[i:end])
		if x.depth[n&127]>>(h>>58)&1 != 0 {
			if off := x.find(name[i:], h); off != 0 {
				x.visit(name, i, off, e, r)
			}
		}
		end = i - 1
	}
}

// visit looks at the record at off, of the fixed part name[i:]; i is len(name) for
// the root.
func (x *nameIndex) visit(name string, i int, off uint32, e *eval, r *Request) {
	if i == 0 {
		if refs := x.exact(off); refs != 0 {
			e.consider(hit{refs: refs, text: x.text(off)}, r)
		}
	} else if refs := x.below(off); refs != 0 {
		e.consider(hit{refs: refs, text: x.text(off), below: true}, r)
	}
	if x.globs != nil {
		x.visitGlobs(x.globs[off], strings.TrimSuffix(name[:i], "."), e, r)
	}
}

// visitGlobs looks at patterns with a wildcard inside; left is what the name has to
// the left of their fixed part.
func (x *nameIndex) visitGlobs(globs []glob, left string, e *eval, r *Request) {
	for i := range globs {
		if g := &globs[i]; globMatch(g.labels, left, g.apex, g.below) {
			e.consider(hit{refs: g.refs, text: g.text, glob: true}, r)
		}
	}
}
