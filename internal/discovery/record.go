package discovery

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"slices"
	"strings"

	"sallyport/policy"
)

// What is in the file: big-endian numbers as keys, so that neighbours in time are
// neighbours in the file; varints in values; and at the end of each value a CRC-32C of
// key and value, for the file itself says nothing of the pages between its first two.

// errRecord is what a record is that cannot be understood.
var errRecord = errors.New("a record is damaged")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sealed appends the checksum of key and what follows start in dst.
func sealed(dst []byte, start int, key []byte) []byte {
	sum := crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, dst[start:])
	return binary.BigEndian.AppendUint32(dst, sum)
}

// unsealed returns value without its checksum, after a look at that.
func unsealed(key, value []byte) ([]byte, error) {
	n := len(value) - 4
	if n < 0 || crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value[:n]) != binary.BigEndian.Uint32(value[n:]) {
		return nil, errRecord
	}
	return value[:n], nil
}

func idKey(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

func appendUsage(dst []byte, u usage) []byte {
	dst = binary.AppendUvarint(dst, u.count)
	dst = binary.AppendUvarint(dst, u.up)
	return binary.AppendUvarint(dst, u.down)
}

func appendText(dst []byte, s string) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(s))), s...)
}

// appendEntry appends e as a record.
func appendEntry(dst []byte, e *entry) []byte {
	for _, n := range []uint64{uint64(e.first), uint64(e.last), uint64(e.day), uint64(e.port), uint64(e.qtype), uint64(e.listeners)} {
		dst = binary.AppendUvarint(dst, n)
	}
	dst = appendUsage(appendUsage(dst, e.total), e.today)
	for _, s := range []string{
		e.group(), e.ruleID(), e.name, e.verdict.String(), e.reason.String(), string(protocolNames[e.protocol]),
	} {
		dst = appendText(dst, s)
	}
	for _, w := range e.sources {
		if w == 0 && !e.sources.estimates() {
			break
		}
		dst = binary.BigEndian.AppendUint64(dst, w)
	}
	return dst
}

// A reader takes a record apart. After the first mistake everything is zero.
type reader struct {
	data []byte
	bad  bool
}

func (r *reader) number(limit uint64) uint64 {
	v, n := binary.Uvarint(r.data)
	if n <= 0 || v > limit {
		r.data, r.bad = nil, true
		return 0
	}
	r.data = r.data[n:]
	return v
}

func (r *reader) text() string {
	n := r.number(uint64(len(r.data)))
	if n > uint64(len(r.data)) {
		r.data, r.bad = nil, true
		return ""
	}
	s := string(r.data[:n])
	r.data = r.data[n:]
	return s
}

const anyNumber = 1<<64 - 1

func (r *reader) usage() usage {
	return usage{r.number(anyNumber), r.number(anyNumber), r.number(anyNumber)}
}

// sources reads to the end.
func (r *reader) sources() (s sources) {
	if len(r.data)%8 != 0 || len(r.data) > 8*len(s) {
		r.bad = true
		return s
	}
	for i := 0; len(r.data) > 0; i++ {
		s[i], r.data = binary.BigEndian.Uint64(r.data), r.data[8:]
	}
	return s
}

// readEntry is the reverse of appendEntry.
func readEntry(data []byte) (*entry, error) {
	r := reader{data: data}
	e := &entry{
		first: uint32(r.number(1<<32 - 1)), last: uint32(r.number(1<<32 - 1)), day: uint16(r.number(1<<16 - 1)),
		port: uint16(r.number(1<<16 - 1)), qtype: uint16(r.number(1<<16 - 1)), listeners: uint8(r.number(1<<8 - 1)),
		total: r.usage(), today: r.usage(),
	}
	group, rule := r.text(), r.text()
	e.name = r.text()
	verdict, reason, spoken := r.text(), r.text(), r.text()
	e.sources = r.sources()
	v, vok := parseVerdict(verdict)
	why, rok := policy.ParseReason(reason)
	p := slices.Index(protocolNames[:], Protocol(spoken))
	if r.bad || !vok || !rok && reason != "" || p < 0 || len(e.name) > maxName {
		return nil, errRecord
	}
	e.verdict, e.reason, e.protocol = v, why, protocol(p)
	e.rule = &use{key: useKey{group, rule, why == policy.ReasonExplicitDeny}}
	return e, nil
}

func parseVerdict(s string) (policy.Verdict, bool) {
	for _, v := range []policy.Verdict{policy.Deny, policy.Allow, policy.Observe} {
		if v.String() == s {
			return v, true
		}
	}
	return policy.Deny, false
}

func readUsage(data []byte) (usage, error) {
	r := reader{data: data}
	u := r.usage()
	if r.bad || len(r.data) > 0 {
		return usage{}, errRecord
	}
	return u, nil
}

// The rules' key is their identity: a letter for the section, group, a zero, rule.
func useRecordKey(k useKey) []byte {
	section := byte('a')
	if k.deny {
		section = 'd'
	}
	key := append([]byte{section}, k.group...)
	return append(append(key, 0), k.rule...)
}

func readUseKey(key []byte) (useKey, error) {
	group, rule, ok := strings.Cut(string(key), "\x00")
	if !ok || group == "" || group[0] != 'a' && group[0] != 'd' {
		return useKey{}, errRecord
	}
	return useKey{group[1:], rule, group[0] == 'd'}, nil
}
