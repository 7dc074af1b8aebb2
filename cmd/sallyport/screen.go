package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// What a terminal is told (ECMA-48, and the alternate screen of xterm).
const (
	screenOn    = "\x1b[?1049h\x1b[?25l" // a screen of its own, without a cursor
	screenOff   = "\x1b[?25h\x1b[?1049l"
	screenHome  = "\x1b[H"
	screenLine  = "\x1b[K\r\n" // clears the rest of a line
	screenRest  = "\x1b[K\x1b[J"
	screenSlice = 200 * time.Millisecond // how often a new size or the end is noticed
)

// isScreen reports whether a person sits there.
func isScreen(in, out *os.File) bool {
	return term.IsTerminal(int(in.Fd())) && term.IsTerminal(int(out.Fd()))
}

// showTop shows snapshots until q is typed or ctx ends.
func showTop(ctx context.Context, c *adminClient, in, out *os.File, every time.Duration) (err error) {
	before, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	defer func() {
		_, werr := io.WriteString(out, screenOff)
		err = errors.Join(err, werr, term.Restore(int(in.Fd()), before))
	}()
	if _, err := io.WriteString(out, screenOn); err != nil {
		return err
	}
	var s *snapshot
	var next time.Time
	shown, problem := [2]int{}, ""
	for ctx.Err() == nil {
		width, height, err := term.GetSize(int(out.Fd()))
		if err != nil || width <= 0 || height <= 0 {
			width, height = 80, 24
		}
		size, refresh := [2]int{width, height}, !time.Now().Before(next)
		if refresh {
			problem = ""
			fresh, err := c.snapshot(ctx)
			if err != nil {
				problem = clean(err.Error(), 300)
			} else {
				s = fresh
			}
			next = time.Now().Add(every)
		}
		if refresh || size != shown {
			shown = size
			if _, err := io.WriteString(out, frame(s, problem, width, height)); err != nil {
				return err
			}
		}
		switch key, err := readKey(in, min(screenSlice, time.Until(next))); {
		case err != nil:
			return err
		case key == 'q' || key == 'Q' || key == 3 || key == 4: // ^C and ^D too
			return nil
		case key == ' ' || key == '\r':
			next = time.Time{}
		}
	}
	return nil
}

// frame returns what draws a whole screen.
func frame(s *snapshot, problem string, width, height int) string {
	lines := []string{"waiting for the gate"}
	if s != nil {
		lines = s.lines(layoutOf(height - 1))
	}
	foot := "q quits, space refreshes"
	if problem != "" {
		foot = "trying again: " + problem
	}
	lines = append(lines[:min(len(lines), max(0, height-1))], foot)
	var b strings.Builder
	b.WriteString(screenHome)
	for i, line := range lines {
		b.WriteString(line[:min(len(line), width)])
		if i < len(lines)-1 {
			b.WriteString(screenLine)
		}
	}
	b.WriteString(screenRest)
	return b.String()
}

// readKey returns a byte that was typed within patience, or 0.
func readKey(in *os.File, patience time.Duration) (byte, error) {
	fds := []unix.PollFd{{Fd: int32(in.Fd()), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, int(max(0, patience).Milliseconds()))
	if n <= 0 || err != nil {
		if errors.Is(err, unix.EINTR) {
			err = nil
		}
		return 0, err
	}
	var b [1]byte
	if k, err := in.Read(b[:]); err != nil || k == 0 {
		return 0, fmt.Errorf("terminal: %w", errors.Join(err, io.ErrUnexpectedEOF))
	}
	return b[0], nil
}
