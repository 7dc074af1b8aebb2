package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"sallyport/internal/admin"
)

// openTerminal returns both ends of a pseudo terminal of width by height.
func openTerminal(t *testing.T, width, height uint16) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no pseudo terminals here: %v", err)
	}
	t.Cleanup(func() { person.Close() })
	raw, err := person.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var number int
	control := func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
		if err == nil {
			err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height})
		}
	}
	if cerr := raw.Control(control); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo terminals here: %v", err)
	}
	t.Cleanup(func() { program.Close() })
	return person, program
}

func resize(t *testing.T, terminal *os.File, width, height uint16) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height}); err != nil {
		t.Fatal(err)
	}
}

// TestTopOnATerminal looks, makes the window smaller, and types q.
func TestTopOnATerminal(t *testing.T) {
	c, err := (&adminFlags{url: fakeGate(t, admin.Credentials{})}).client()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	person, program := openTerminal(t, 120, 40)
	if !isScreen(program, program) {
		t.Fatal("no terminal")
	}
	before, err := term.GetState(int(program.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- showTop(t.Context(), c, program, program, time.Hour) }()
	var seen strings.Builder
	until := func(want string) {
		t.Helper()
		person.SetReadDeadline(time.Now().Add(time.Minute))
		buf := make([]byte, 4096)
		for !strings.Contains(seen.String(), want) {
			n, err := person.Read(buf)
			if err != nil {
				t.Fatalf("no %q in %q: %v", want, seen.String(), err)
			}
			seen.Write(buf[:n])
		}
	}
	until("q quits")
	if out := seen.String(); !strings.HasPrefix(out, screenOn+screenHome+"sallyport v1.2.3 on gate-1") || strings.Contains(out, "\x1b[2J") || strings.Contains(out, "\a") {
		t.Errorf("%q", out)
	}
	seen.Reset()
	resize(t, program, 30, 5)
	until("q quits, space refreshes" + screenRest)
	for _, line := range strings.Split(strings.TrimPrefix(seen.String(), screenHome), screenLine) {
		if strings.TrimSuffix(line, screenRest) != line && !strings.HasPrefix(line, "q quits") || len(line) > 40 {
			t.Errorf("%q", line)
		}
	}
	seen.Reset()
	person.Write([]byte(" "))
	until("q quits")
	person.Write([]byte("q"))
	until(screenOff)
	if err := <-done; err != nil {
		t.Error(err)
	}
	after, err := term.GetState(int(program.Fd()))
	if err != nil || *after != *before {
		t.Errorf("the terminal is left otherwise: %v", err)
	}
}
