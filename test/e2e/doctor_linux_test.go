package e2e

import (
	"bytes"
	"context"
	bytesorder "encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// Addresses beyond the gate, in a network namespace that has no others.
const (
	beyond4 = "203.0.113.1"
	beyond6 = "2001:db8::1"
	cloud4  = "169.254.169.253"
)

// TestDoctor runs sallyport doctor in a network namespace of its own, so that it may
// try what it likes: first one without a way around the gate, then one with all.
func TestDoctor(t *testing.T) {
	const inside = "SALLYPORT_E2E_NETNS"
	if os.Getenv(inside) != "" {
		testDoctor(t)
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^TestDoctor$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), inside+"=1", "SALLYPORT_E2E_BINARY="+binary)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) {
		t.Skip("a network namespace needs root with CAP_SYS_ADMIN: ", err)
	}
	t.Logf("inside:\n%s", out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(out, []byte("--- PASS: TestDoctor ")) {
		t.Skip("nothing was tested inside")
	}
}

func testDoctor(t *testing.T) {
	interfaceUp(t)
	w := newWorld(t)
	g := start(t, w, fmt.Sprintf(`
version: 1
groups:
  - {name: client, sources: [127.0.0.0/8], allow: [{names: [api.ok.test], ports: [%d], private_destinations: [127.0.0.0/8]}]}
`, w.tlsPort), "--set", "dns.listen=127.0.0.2:53", "--set", "dns.health_name=health.ok.test")
	g.write("resolv.conf", "nameserver 127.0.0.2\n")

	type finding struct{ Check, Status, What, Fix string }
	// examine runs doctor in the environment env, and returns its problems. What answers has
	// patience to do so, however slow the machine is; what is silent, a firewall, takes
	// all of step.
	examine := func(status int, step time.Duration, env []string, args ...string) (problems, rest []finding) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, binary, slices.Concat([]string{
			"doctor", "--json", "--resolv-conf", g.path("resolv.conf"), "--health-name", "health.ok.test", "--timeout", step.String(),
			"--direct", beyond4 + "," + beyond6, "--cloud", cloud4, "--allowed", fmt.Sprintf("api.ok.test:%d", w.tlsPort),
		}, args)...)
		cmd.Env = env
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if exitCode(err) != status {
			t.Errorf("exit status %d, want %d: %v: %s%s", exitCode(err), status, err, out, stderr.String())
		}
		var report struct {
			OK       bool
			Problems int
			Results  []finding
		}
		if err := json.Unmarshal(out, &report); err != nil || report.OK != (status == 0) {
			t.Fatalf("%v: %s", err, out)
		}
		for _, f := range report.Results {
			if f.Status == "problem" {
				problems = append(problems, f)
			} else {
				rest = append(rest, f)
			}
		}
		if len(problems) != report.Problems {
			t.Errorf("%d problems, said to be %d", len(problems), report.Problems)
		}
		return problems, rest
	}
	env := strings.Fields(runEnv(t, g))

	problems, rest := examine(0, patience, env)
	if len(problems) != 0 {
		t.Errorf("nothing is wrong, and yet: %q", problems)
	}
	for _, check := range []string{"environment", "proxy", "denied", "clock", "allowed", "resolver", "direct", "cloud"} {
		if !slices.ContainsFunc(rest, func(f finding) bool { return f.Check == check && f.Status == "ok" }) {
			t.Errorf("no %s is ok: %q", check, rest)
		}
	}
	g.line(0, map[string]any{"event": "connect", "name": "denied.sallyport.invalid", "reason": "not_listed"})
	g.line(0, map[string]any{"event": "dns", "name": "denied.sallyport.invalid", "reason": "not_listed", "rcode": "REFUSED"})

	// Now everything leads around it.
	addAddress(t, beyond4)
	addAddress(t, beyond6)
	addAddress(t, cloud4)
	for _, a := range []string{beyond4, beyond6} {
		for _, port := range []string{"443", "853"} {
			hangUp(listen(t, net.JoinHostPort(a, port)))
			serveQUIC(t, net.JoinHostPort(a, port))
		}
		serveDNS(t, net.JoinHostPort(a, "53"))
	}
	serveDNS(t, cloud4+":53")
	g.write("resolv.conf", "nameserver 127.0.0.2\nnameserver "+beyond4+"\n")
	problems, _ = examine(1, patience, append(env, "no_proxy=*", "NO_PROXY=*"))
	var want []string
	for _, a := range []string{beyond4, "[" + beyond6 + "]"} {
		for _, p := range []string{":443/tcp", ":443/udp", ":53/udp", ":53/tcp", ":853/tcp", ":853/udp"} {
			want = append(want, "direct "+a+p)
		}
	}
	want = append(want, "cloud "+cloud4+":53/udp", "cloud "+cloud4+":53/tcp", "resolver "+beyond4+":53 does not know the health name",
		"resolver "+beyond4+":53 answers NameError", "environment no_proxy has *")
	for _, p := range want {
		if !slices.ContainsFunc(problems, func(f finding) bool { return strings.HasPrefix(f.Check+" "+f.What, p) && f.Fix != "" }) {
			t.Errorf("not found: %s", p)
		}
	}
	if len(problems) != len(want) {
		t.Errorf("%d problems, want %d: %q", len(problems), len(want), problems)
	}

	// Closed again, by a firewall that says nothing.
	if out, err := exec.Command("nft", "list", "tables").CombinedOutput(); err != nil {
		t.Logf("no nft here, so silence is not tested: %v %s", err, out)
		return
	}
	firewall := exec.Command("nft", "-f", "-")
	firewall.Stdin = strings.NewReader(fmt.Sprintf(`table inet t {
	chain c {
		type filter hook input priority 0; policy accept;
		ip daddr { %s, %s } drop
		ip6 daddr %s drop
	}
}`, beyond4, cloud4, beyond6))
	if out, err := firewall.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v %s", err, out)
	}
	g.write("resolv.conf", "nameserver 127.0.0.2\n")
	problems, rest = examine(0, patience/2, env)
	if len(problems) != 0 {
		t.Errorf("behind the firewall: %q", problems)
	}
	if !slices.ContainsFunc(rest, func(f finding) bool { return f.What == beyond4+":443/udp (QUIC): no answer" }) {
		t.Errorf("%q", rest)
	}
}

// runEnv returns what sallyport env says of the gate.
func runEnv(t *testing.T, g *gate) string {
	t.Helper()
	out, code := g.sallyport("env", "--format", "docker", "--address", g.proxy)
	if code != 0 {
		t.Fatal(out)
	}
	return out
}

// interfaceUp brings up lo, the only interface of a new namespace.
func interfaceUp(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		t.Skip("lo cannot be brought up: ", err)
	}
}

// addAddress gives lo an address more, as ip address add would.
func addAddress(t *testing.T, text string) {
	t.Helper()
	a := netip.MustParseAddr(text)
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	family := byte(unix.AF_INET)
	if a.Is6() {
		family = unix.AF_INET6
	}
	raw := a.AsSlice()
	attr := func(typ uint16) []byte {
		b := bytesorder.NativeEndian.AppendUint16(nil, uint16(4+len(raw)))
		return append(bytesorder.NativeEndian.AppendUint16(b, typ), raw...)
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	body := []byte{family, byte(a.BitLen()), unix.IFA_F_PERMANENT | unix.IFA_F_NODAD, unix.RT_SCOPE_UNIVERSE}
	body = bytesorder.NativeEndian.AppendUint32(body, uint32(lo.Index))
	body = append(append(body, attr(unix.IFA_LOCAL)...), attr(unix.IFA_ADDRESS)...)
	h := unix.NlMsghdr{Len: uint32(unix.NLMSG_HDRLEN + len(body)), Type: unix.RTM_NEWADDR, Flags: unix.NLM_F_REQUEST | unix.NLM_F_ACK | unix.NLM_F_CREATE, Seq: 1}
	msg := append(unsafe.Slice((*byte)(unsafe.Pointer(&h)), unix.NLMSG_HDRLEN), body...)
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil || n < unix.NLMSG_HDRLEN+4 {
		t.Fatal(n, err)
	}
	if errno := int32(bytesorder.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])); errno != 0 {
		t.Fatalf("address %s: %v", text, syscall.Errno(-errno))
	}
}

// hangUp closes each connection that l takes, so that nobody waits for what it says.
func hangUp(l net.Listener) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
}

// serveDNS answers every query NXDOMAIN.
func serveDNS(t *testing.T, addr string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	handler := dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) { rw.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeNameError)) })
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: handler}, {Listener: listen(t, addr), Handler: handler}} {
		started, done := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { defer close(done); s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { s.Shutdown(); <-done })
	}
}

// serveQUIC negotiates the version with whoever asks (RFC 9000, section 17.2.1).
func serveQUIC(t *testing.T, addr string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { pc.Close(); <-done })
	go func() {
		defer close(done)
		b := make([]byte, 2048)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			if n < 1200 {
				continue
			}
			answer := append([]byte{0xc0, 0, 0, 0, 0, 8}, b[15:23]...)
			answer = append(append(answer, 8), b[6:14]...)
			pc.WriteTo(append(answer, 0, 0, 0, 1), from)
		}
	}()
}
