package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

const (
	// MaxDocument bounds the text of a policy, in bytes. Long lists of names belong
	// in list files, which are not kept in memory as YAML.
	MaxDocument = 64 << 20
	// maxItems bounds the list items, keys and lines of a policy, and so the memory
	// that its YAML takes: some 160 bytes for each value.
	maxItems = 1 << 20
	// maxDepth bounds how deep values may nest.
	maxDepth = 32
)

// parse returns the only value of the YAML text, or nil after it has reported why not.
func (d *decoder) parse(data []byte) *yaml.Node {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if d.checkText(data); len(d.errs) > 0 {
		return nil
	}
	root, err := parseYAML(data)
	if err != nil {
		// By far the commonest slip is a pattern or a list that lacks its quotes. Such
		// values are all found at once, and with them out of the way further mistakes.
		if mended := d.unquoted(data); mended != nil {
			data = mended
			root, err = parseYAML(mended)
		}
	}
	switch {
	case err != nil:
		d.syntax(data, err)
		return nil
	case root == nil || root.Kind == yaml.ScalarNode && root.Tag == "!!null":
		d.failAt(1, 1, nil, "the policy is empty; begin it with version: %d", Version)
		return nil
	}
	if n := below(root, maxDepth); n != nil {
		d.fail(n, nil, "values nest deeper than %d levels; a policy needs six", maxDepth)
		return nil
	}
	d.addPaths(root)
	return root
}

// errSecond is a second document in the text, found at line.
type errSecond struct{ line int }

func (e errSecond) Error() string { return "a second document" }

// parseYAML returns the only value in data; nil if there is none.
func parseYAML(data []byte) (n *yaml.Node, err error) {
	// The parser panics on a broken invariant of its own. A policy may come from the
	// network, and no text in it may stop the gate.
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("yaml: the parser gave up (%v)", r)
		}
	}()
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var first, second yaml.Node
	if err := dec.Decode(&first); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if err := dec.Decode(&second); err == nil {
		return nil, errSecond{second.Line}
	} else if !errors.Is(err, io.EOF) {
		return nil, err
	}
	return first.Content[0], nil
}

// below returns the first value that stands deeper than levels below n, or nil.
func below(n *yaml.Node, levels int) *yaml.Node {
	if levels < 0 {
		return n
	}
	for _, c := range n.Content {
		if deep := below(c, levels-1); deep != nil {
			return deep
		}
	}
	return nil
}

// checkText refuses what is no text, what editors do not show, and what the parser
// needs unbounded time or memory for.
func (d *decoder) checkText(data []byte) {
	if len(data) > MaxDocument {
		d.failAt(1, 1, nil, "the policy is larger than %d MiB; move names to list files (lists: [{name: feed, file: feed.txt}])", MaxDocument>>20)
		return
	}
	items, line := 0, 0
	for text := range bytes.Lines(data) {
		line++
		text = bytes.TrimSuffix(bytes.TrimSuffix(text, []byte("\n")), []byte("\r"))
		indent := len(text) - len(bytes.TrimLeft(text, " \t"))
		if tab := bytes.IndexByte(text[:indent], '\t'); tab >= 0 {
			d.failAt(line, tab+1, nil, "a tab in the indentation; YAML wants spaces")
		}
		if len(text) > 0 && text[0] == '%' {
			// Directives serve nothing here, and many of them take the parser hours.
			d.failAt(line, 1, nil, "a line that begins with %% is a YAML directive; remove it, or indent it")
		}
		if items += 1 + countItems(text); items > maxItems {
			d.failAt(line, 1, nil, "the policy has more than %d values; move names to list files (lists: [{name: feed, file: feed.txt}])", maxItems)
			return
		}
		d.checkCharacters(text, line)
	}
}

// countItems bounds from above the values that a line adds, less one.
func countItems(text []byte) int {
	n := 0
	for i, b := range text {
		switch b {
		case ',', '[', '{':
			n++
		case '-', ':', '?':
			if i+1 < len(text) && (text[i+1] == ' ' || text[i+1] == '\t') {
				n++
			}
		}
	}
	return n
}

// checkCharacters reports the first character of a line that cannot stand in a policy.
func (d *decoder) checkCharacters(text []byte, line int) {
	column := 1
	for i := 0; i < len(text); column++ {
		if b := text[i]; b >= ' ' && b < 0x7f || b == '\t' {
			i++
			continue
		}
		r, size := utf8.DecodeRune(text[i:])
		switch {
		case r == utf8.RuneError && size <= 1:
			d.failAt(line, column, nil, "invalid UTF-8 (byte 0x%02x); save the file as UTF-8 text", text[i])
			return
		case r == '\r':
			d.failAt(line, column, nil, "a carriage return inside a line; end lines with a newline")
			return
		case isInvisible(r):
			d.failAt(line, column, nil, "the invisible character %U; remove it", r)
			return
		}
		i += size
	}
}

// isInvisible reports whether r is a control character, a line break that editors
// do not show, or one that turns the direction of the text: with those a policy
// could read otherwise than it acts.
func isInvisible(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) ||
		r == '\u2028' || r == '\u2029' || r == '\ufeff' || r == '\ufffe' || r == '\uffff'
}

// unquoted reports values that begin with a character that YAML gives another
// meaning, and returns data with that character replaced, so that the rest can be
// parsed; nil if there is none. It is for text that is no YAML: what it takes for
// such a value may in odd cases be none.
func (d *decoder) unquoted(data []byte) []byte {
	var mended []byte
	s := scanner{}
	line := 0
	for text := range bytes.Lines(data) {
		line++
		for _, at := range s.indicators(bytes.TrimRight(text, "\r\n")) {
			if mended == nil {
				mended = bytes.Clone(data)
			}
			value := text[at.from:at.to]
			d.failAt(line, utf8.RuneCount(text[:at.from])+1, nil, "%s begins with %q, which YAML gives another meaning; put it in quotes: %q", clip(string(value)), value[0], clip(string(value)))
			mended[s.offset+at.from] = 'x'
		}
		s.offset += len(text)
	}
	return mended
}

// A scanner finds where plain values begin, line by line.
type scanner struct {
	offset int  // bytes before the line
	flow   int  // open brackets
	quote  byte // the quote that is open, or 0
	inText bool // a block scalar is open
	block  int  // and has the lines that are indented deeper than this
}

// span is a part of a line.
type span struct{ from, to int }

// indicators returns the values of a line that begin with an indicator.
func (s *scanner) indicators(text []byte) []span {
	var found []span
	indent := len(text) - len(bytes.TrimLeft(text, " "))
	if s.inText && (indent == len(text) || indent > s.block) {
		return nil
	}
	s.inText = false
	start := s.quote == 0 // a value may begin here
	for i := indent; i < len(text); i++ {
		b := text[i]
		blank := i+1 == len(text) || text[i+1] == ' ' || text[i+1] == '\t'
		switch {
		case s.quote != 0:
			if b == '\\' && s.quote == '"' {
				i++
			} else if b == s.quote {
				s.quote = 0
			}
		case b == ' ' || b == '\t':
		case b == '#' && (i == 0 || text[i-1] == ' ' || text[i-1] == '\t'):
			return found
		case start && (b == '"' || b == '\''):
			s.quote, start = b, false
		case start && (b == '|' || b == '>') && s.flow == 0:
			s.inText, s.block = true, indent
			return found
		case start && (b == '[' || b == '{'):
			s.flow++
		case s.flow > 0 && (b == ']' || b == '}'):
			s.flow--
			start = false
		case s.flow > 0 && b == ',', b == ':' && blank, start && (b == '-' || b == '?') && blank:
			start = true
		case start && (b == '*' || b == '@' || b == '%' || b == '`'):
			end := s.end(text, i)
			found = append(found, span{i, end})
			i, start = end-1, false
		default:
			start = false
		}
	}
	return found
}

// end returns where the plain value that begins at i ends.
func (s *scanner) end(text []byte, i int) int {
	for i++; i < len(text); i++ {
		blank := i+1 == len(text) || text[i+1] == ' ' || text[i+1] == '\t'
		switch b := text[i]; {
		case b == '#' && (text[i-1] == ' ' || text[i-1] == '\t'), b == ':' && blank,
			s.flow > 0 && strings.IndexByte(",[]{}", b) >= 0:
			return len(bytes.TrimRight(text[:i], " \t"))
		}
	}
	return len(bytes.TrimRight(text, " \t"))
}

// addPaths gives the mistakes found so far the paths of the values they stand at.
func (d *decoder) addPaths(root *yaml.Node) {
	if len(d.errs) == 0 {
		return
	}
	at := map[Pos]*Error{}
	for _, e := range d.errs {
		at[e.Pos] = e
	}
	var walk func(n *yaml.Node, p *place)
	walk = func(n *yaml.Node, p *place) {
		if e := at[Pos{d.file, n.Line, n.Column}]; e != nil && n.Kind == yaml.ScalarNode {
			e.Path = p.String()
		}
		for i, c := range n.Content {
			switch {
			case n.Kind == yaml.SequenceNode:
				walk(c, &place{up: p, index: i})
			case i%2 == 1 && isIdentifier(n.Content[i-1].Value):
				walk(c, &place{up: p, key: n.Content[i-1].Value})
			}
		}
	}
	walk(root, nil)
}

// syntaxHints translate what the parser says. Those marked block complain about the
// place where a structure begins, not about the line that does not fit it.
var syntaxHints = []struct {
	says, text string
	parser     bool // the line is counted from 0
	block      bool
}{
	{"did not find expected key", "this line does not fit the keys above it; check its indentation, its quotes and the colon after its key", true, true},
	{"did not find expected '-' indicator", "this line does not fit the list above it; begin it with \"- \" or check its indentation", true, true},
	{"did not find expected ',' or ']'", "the list that begins here with [ has no comma after each item, or no ]", true, false},
	{"did not find expected ',' or '}'", "the mapping that begins here with { has no comma after each value, or no }", true, false},
	{"did not find expected node content", "a value is missing or begins with a character that YAML gives another meaning; put strings in quotes", true, false},
	{"did not find expected <document start>", "nothing may follow the end of the document", true, false},
	{"found undefined tag handle", "put a string that begins with ! in quotes", true, false},
	{"mapping values are not allowed", "a key and its value do not fit here; check the indentation, and put a string with \": \" in it in quotes", false, false},
	{"block sequence entries are not allowed", "a list item does not fit here; write it on a line of its own", false, false},
	{"could not find expected ':'", "this line has no colon and space after its key", false, false},
	{"found unexpected end of stream", "the quotes that open here are not closed", false, false},
	{"found unexpected document indicator", "the quotes that open here are not closed", false, false},
	{"found character that cannot start any token", "a value begins with a character that YAML gives another meaning; put it in quotes, and use spaces, not tabs", false, false},
	{"found unknown escape character", "a backslash means something in double quotes; use single quotes", false, false},
	{"exceeded max depth", "values nest too deep; a policy needs six levels", false, false},
}

// syntax reports why data is no YAML.
func (d *decoder) syntax(data []byte, err error) {
	var second errSecond
	if errors.As(err, &second) {
		d.failAt(second.line, 1, nil, "a second document begins here; a policy is one document")
		return
	}
	says := strings.TrimPrefix(err.Error(), "yaml: ")
	line, text := 0, ""
	if n, _ := fmt.Sscanf(says, "line %d:", &line); n == 1 {
		_, says, _ = strings.Cut(says, ": ")
	}
	for _, h := range syntaxHints {
		if !strings.HasPrefix(says, h.says) {
			continue
		}
		text = h.text
		if h.parser {
			line++
		}
		if h.block {
			line = failingLine(data, says)
		}
	}
	if text == "" {
		text = "this is not YAML: " + clip(says)
	}
	line, column := firstColumn(data, line)
	d.failAt(line, column, nil, "%s", text)
}

// failingLine returns the first line with which data is no YAML for the reason
// says. The parser names the beginning of the structure instead, but reads no
// further than it must: the line is among the last it has read.
func failingLine(data []byte, says string) int {
	r := &lineReader{rest: data}
	_ = yaml.NewDecoder(r).Decode(new(yaml.Node)) // it fails, as it did before
	line := r.lines
	for back := 1; back <= 8 && back < r.lines; back++ {
		_, err := parseYAML(firstLines(data, r.lines-back))
		if err == nil || !strings.HasSuffix(err.Error(), says) {
			break
		}
		line = r.lines - back
	}
	return line
}

// A lineReader hands out one line a call and counts them.
type lineReader struct {
	rest  []byte
	lines int
}

func (r *lineReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		return 0, io.EOF
	}
	end := bytes.IndexByte(r.rest, '\n') + 1
	if end == 0 {
		end = len(r.rest)
	}
	n := copy(p, r.rest[:end])
	r.rest = r.rest[n:]
	if n == end {
		r.lines++
	}
	return n, nil
}

// firstLines returns the first n lines of data.
func firstLines(data []byte, n int) []byte {
	end := 0
	for text := range bytes.Lines(data) {
		if n--; n < 0 {
			break
		}
		end += len(text)
	}
	return data[:end]
}

// firstColumn returns line, or the nearest that data has, and the column of its first character.
func firstColumn(data []byte, line int) (int, int) {
	lines := max(1, bytes.Count(data, []byte("\n")))
	line = min(max(1, line), lines)
	text := bytes.TrimRight(firstLines(data, line)[len(firstLines(data, line-1)):], "\r\n")
	return line, len(text) - len(bytes.TrimLeft(text, " \t")) + 1
}
