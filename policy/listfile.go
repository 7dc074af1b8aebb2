package policy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"unicode/utf8"
)

// maxListLine bounds a line of a list file, in bytes.
const maxListLine = 4096

// listError is a list file that cannot be read on, with the line where.
type listError struct {
	line int
	err  error
}

func (e *listError) Error() string { return fmt.Sprintf("line %d: %v", e.line, e.err) }

// readList calls yield for each word of a list file: one pattern a line, or a
// hosts file's "0.0.0.0 name name". "#" begins a comment; CRLF and a byte order
// mark do not matter. word is valid until yield returns. It holds one line at a
// time, however long the file is.
func readList(r io.Reader, yield func(line, column int, word []byte)) error {
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 0, maxListLine), maxListLine)
	line := 0
	for sc.Scan() {
		line++
		text := sc.Bytes()
		if line == 1 {
			text = bytes.TrimPrefix(text, []byte("\ufeff"))
		}
		if i := bytes.IndexByte(text, '#'); i >= 0 {
			text = text[:i]
		}
		if !utf8.Valid(text) {
			return &listError{line, errors.New("invalid UTF-8; save the file as UTF-8 text")}
		}
		if err := splitLine(text, func(column int, word []byte) { yield(line, column, word) }); err != nil {
			return &listError{line, err}
		}
	}
	if errors.Is(sc.Err(), bufio.ErrTooLong) {
		return &listError{line + 1, fmt.Errorf("longer than %d bytes; a list file has one pattern a line", maxListLine)}
	}
	return sc.Err()
}

// splitLine yields the patterns of one line.
func splitLine(text []byte, yield func(column int, word []byte)) error {
	words, hosts := 0, false
	for i := 0; i < len(text); {
		if text[i] <= ' ' {
			i++
			continue
		}
		end := i
		for end < len(text) && text[end] > ' ' {
			end++
		}
		word := text[i:end]
		words++
		switch {
		case words == 1 && isAddress(word):
			hosts = true
		case words > 1 && !hosts:
			return fmt.Errorf("%q follows a pattern; write one pattern a line", clip(string(word)))
		case hosts && isHostsNoise(string(word)):
		default:
			yield(i+1, word)
		}
		i = end
	}
	return nil
}

func isAddress(word []byte) bool {
	if c := word[0]; c != ':' && !(c >= '0' && c <= '9') && !(c|0x20 >= 'a' && c|0x20 <= 'f') {
		return false
	}
	_, err := netip.ParseAddr(string(word))
	return err == nil
}

// isHostsNoise reports whether name is one of those every hosts file has for the
// machine itself.
func isHostsNoise(name string) bool {
	switch name {
	case "localhost", "localhost.localdomain", "local", "broadcasthost", "0.0.0.0",
		"ip6-localhost", "ip6-loopback", "ip6-localnet", "ip6-mcastprefix", "ip6-allnodes",
		"ip6-allrouters", "ip6-allhosts":
		return true
	}
	return false
}
