// Package activation takes over sockets that the service manager has bound for this
// process: systemd's socket activation, sd_listen_fds(3). It is a page of code on
// package net; the library for it, go-systemd, passes over what it cannot use in silence,
// and a listener that is not there has to be an error.
package activation

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

const (
	firstDescriptor = 3   // SD_LISTEN_FDS_START
	maxSockets      = 256 // taken over
)

// The variables of the protocol. They are for one process alone.
var variables = []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}

// A Name is what a socket unit may call its sockets (FileDescriptorName=).
type Name struct {
	Name string
	UDP  bool // its sockets may be for UDP too
}

// Sockets are what the sockets of one name are.
type Sockets struct {
	TCP []net.Listener
	UDP []*net.UDPConn
}

// Addrs returns the addresses, each once, as host:port.
func (s Sockets) Addrs() (addrs []string) {
	add := func(a net.Addr) {
		if text := a.String(); !slices.Contains(addrs, text) {
			addrs = append(addrs, text)
		}
	}
	for _, c := range s.UDP {
		add(c.LocalAddr())
	}
	for _, l := range s.TCP {
		add(l.Addr())
	}
	return addrs
}

// Take returns the sockets that were handed to this process, by name; none without
// such. The environment no longer speaks of them afterwards. An error says which socket
// cannot be used, and what to write instead; all are closed then. The caller owns the
// sockets.
func Take(names []Name) (map[string]Sockets, error) {
	env := make(map[string]string)
	for _, v := range variables {
		env[v] = os.Getenv(v)
		os.Unsetenv(v) // fails for impossible names only
	}
	if env["LISTEN_PID"] != strconv.Itoa(os.Getpid()) { // or they are somebody else's
		return nil, nil //nolint:nilnil // a nil map has no sockets
	}
	n, err := strconv.ParseUint(env["LISTEN_FDS"], 10, 16)
	if err != nil || n > maxSockets {
		return nil, fmt.Errorf("LISTEN_FDS: %q is no number of sockets up to %d", env["LISTEN_FDS"], maxSockets)
	}
	called := strings.Split(env["LISTEN_FDNAMES"], ":")
	taken := make(map[string]Sockets)
	for i := range int(n) {
		name := ""
		if i < len(called) {
			name = called[i]
		}
		if terr := take(taken, names, name, firstDescriptor+i); terr != nil && err == nil {
			err = terr
		}
	}
	if err != nil {
		Close(taken)
		return nil, err
	}
	return taken, nil
}

// Close closes sockets that nobody has use for.
func Close(all map[string]Sockets) {
	for _, s := range all {
		for _, l := range s.TCP {
			l.Close()
		}
		for _, c := range s.UDP {
			c.Close()
		}
	}
}

// take adds the socket that is the descriptor fd.
func take(taken map[string]Sockets, names []Name, name string, fd int) error {
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), name)
	defer f.Close() // package net works on a copy
	i := slices.IndexFunc(names, func(n Name) bool { return n.Name == name })
	if i < 0 {
		var all []string
		for _, n := range names {
			all = append(all, n.Name)
		}
		return fmt.Errorf("socket %d is called %q; in its unit write FileDescriptorName= and one of %s", fd, name, strings.Join(all, ", "))
	}
	s := taken[name]
	if l, err := net.FileListener(f); err == nil {
		if _, ok := l.(*net.TCPListener); !ok {
			l.Close()
			return fmt.Errorf("socket %d (%s) is for %s; write ListenStream= with an IP address or a port", fd, name, l.Addr().Network())
		}
		s.TCP = append(s.TCP, l)
		taken[name] = s
		return nil
	}
	c, err := net.FilePacketConn(f)
	if err != nil {
		return fmt.Errorf("socket %d (%s): %w", fd, name, err)
	}
	u, ok := c.(*net.UDPConn)
	if !ok || !names[i].UDP {
		c.Close()
		return fmt.Errorf("socket %d (%s) takes datagrams; write ListenStream= instead of ListenDatagram=", fd, name)
	}
	s.UDP = append(s.UDP, u)
	taken[name] = s
	return nil
}
