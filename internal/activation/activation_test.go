package activation

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestMain is also the process that sockets are handed to: it prints what it has taken.
func TestMain(m *testing.M) {
	if os.Getenv("TAKE_SOCKETS") == "" {
		os.Exit(m.Run())
	}
	all, err := Take([]Name{{Name: "tcp"}, {Name: "both", UDP: true}})
	fmt.Println(all["tcp"].Addrs(), all["both"].Addrs(), len(all["both"].TCP), len(all["both"].UDP), err, os.Getenv("LISTEN_FDS") == "")
	Close(all)
	os.Exit(0)
}

func TestTake(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv6loopback})
	if err != nil {
		udp, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}) // a machine without IPv6
	}
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	stream, err := tcp.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	datagrams, err := udp.File()
	if err != nil {
		t.Fatal(err)
	}
	defer datagrams.Close()
	s, d := tcp.Addr().String(), udp.LocalAddr().String()
	for _, tt := range []struct {
		name, pid, count, names string
		files                   []*os.File
		want                    string
	}{
		{"each", "$$", "3", "tcp:both:both", []*os.File{stream, stream, datagrams}, fmt.Sprintf("[%s] [%s %s] 1 1 <nil> true", s, d, s)},
		{"twice the same", "$$", "2", "tcp:tcp", []*os.File{stream, stream}, fmt.Sprintf("[%s] [] 0 0 <nil> true", s)},
		{"none", "$$", "0", "", nil, "[] [] 0 0 <nil> true"},
		{"another process's", "1", "1", "tcp", []*os.File{stream}, "[] [] 0 0 <nil> true"},
		{"without names", "$$", "1", "", []*os.File{stream}, `socket 3 is called ""; in its unit write FileDescriptorName= and one of tcp, both`},
		{"datagrams", "$$", "2", "tcp:tcp", []*os.File{stream, datagrams}, "[] [] 0 0 socket 4 (tcp) takes datagrams"},
		{"too many", "$$", "99999", "", nil, `LISTEN_FDS: "99999" is no number of sockets up to 256`},
		{"no number", "$$", "x", "", nil, `LISTEN_FDS: "x" is no number`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command("sh", "-c", "LISTEN_PID="+tt.pid+` exec "$0"`, os.Args[0])
			cmd.Env = append(os.Environ(), "TAKE_SOCKETS=1", "LISTEN_FDS="+tt.count, "LISTEN_FDNAMES="+tt.names)
			cmd.ExtraFiles = tt.files
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), tt.want) {
				t.Errorf("%v: %s, want %s", err, out, tt.want)
			}
		})
	}
}
