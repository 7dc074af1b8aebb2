package replay

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
)

// maxLine bounds a line in bytes; longer ones are skipped and count as malformed. The
// gate's own have at most 16 KiB.
const maxLine = 256 << 10

var errTooLong = errors.New("the line is too long")

// Read decides all lines of in, which may be compressed with gzip whatever its name.
// Lines that cannot be read are counted, and so is an end in the middle of a
// compressed stream. The error is that of in, if it could not be read at all.
func (r *Replay) Read(name string, in io.Reader) error {
	plain := bufio.NewReaderSize(in, maxLine)
	if magic, err := plain.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b {
		z, err := gzip.NewReader(plain)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		plain = bufio.NewReaderSize(z, maxLine)
	}
	for n := uint64(1); ; n++ {
		line, err := plain.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			r.rep.Lines++
			r.rep.Malformed++
			r.problem(name, n, errTooLong)
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = plain.ReadSlice('\n')
			}
		} else if lerr := r.Line(line); lerr != nil {
			r.problem(name, n, lerr)
		}
		switch {
		case err == nil:
		case err == io.EOF:
			return nil
		case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, gzip.ErrChecksum), errors.Is(err, gzip.ErrHeader):
			r.rep.Lines++
			r.rep.Malformed++
			r.problem(name, n, err)
			return nil
		default:
			return fmt.Errorf("%s: %w", name, err)
		}
	}
}

func (r *Replay) problem(name string, line uint64, err error) {
	if len(r.rep.Problems) < maxProblems {
		r.rep.Problems = append(r.rep.Problems, Problem{name, line, err.Error()})
	}
}
