package eventlog

import (
	"net/netip"
	"sync"
	"time"

	"sallyport/policy"
)

// A memo is a line being made, with what the lines before it had in common with it: under
// load most are of one second, many of one source, and nearly all of a few decisions.
type memo struct {
	line   []byte
	second int64  // Unix time
	date   []byte // of second, up to the fraction and with the quote before
	source netip.Addr
	src    []byte // of source, as appendAddress has it
	said   [3]said
}

// memos holds those that nobody uses.
var memos = sync.Pool{New: func() any { return &memo{line: make([]byte, 0, 1024)} }}

// free gives m back; grown is what became of its line.
func (m *memo) free(grown []byte) {
	if cap(grown) <= 2*maxLine {
		m.line = grown[:0]
		memos.Put(m)
	}
}

// appendStamp is the function of that name.
func (m *memo) appendStamp(dst []byte, t time.Time) []byte {
	if second := t.Unix(); second != m.second || m.date == nil {
		stamp := appendStamp(m.date[:0], t)
		m.second, m.date = second, stamp[:len(stamp)-len(`.000Z"`)]
	}
	return append(appendFraction(append(dst, m.date...), t), '"')
}

// appendSource is appendAddress with the key of a source.
func (m *memo) appendSource(dst []byte, a netip.Addr) []byte {
	if a != m.source || m.src == nil {
		m.source, m.src = a, appendAddress(m.src[:0], `,"src":`, a)
	}
	return append(dst, m.src...)
}

// said is what lines say of a decision: head before the name and tail after it. It keeps
// no strings of a policy, which would keep the policy.
type said struct {
	known                 bool
	mode                  policy.Mode
	reason                policy.Reason
	group, rule, revision []byte
	head, tail            []byte
}

// of returns what lines say of d.
func (m *memo) of(d *policy.Decision) *said {
	s := &m.said[min(int(d.Verdict), len(m.said)-1)]
	if s.known && s.mode == d.Mode && s.reason == d.Reason && string(s.group) == d.Group && string(s.rule) == d.Rule && string(s.revision) == d.Revision {
		return s
	}
	s.known, s.mode, s.reason = true, d.Mode, d.Reason
	s.group, s.rule, s.revision = append(s.group[:0], d.Group...), append(s.rule[:0], d.Rule...), append(s.revision[:0], d.Revision...)
	s.head = s.head[:0]
	if d.Group != "" {
		s.head = appendText(s.head, `,"group":`, d.Group, maxGroup)
		s.head = appendText(s.head, `,"mode":`, d.Mode.String(), maxShort)
	}
	s.tail = appendText(s.tail[:0], `,"verdict":`, d.Verdict.String(), maxShort)
	s.tail = appendText(s.tail, `,"reason":`, d.Reason.String(), maxShort)
	s.tail = appendText(s.tail, `,"rule":`, d.Rule, maxRule)
	s.tail = appendText(s.tail, `,"policy":`, d.Revision, maxPolicy)
	return s
}
