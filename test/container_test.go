package test

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The image cannot be built everywhere, but what it promises can be tested: a
// static binary that serves with nothing beside it, as nobody, writing nothing.

// TestDockerfileBuildsWithTheRightGo keeps the image's toolchain at the version of
// go.mod: the official images do not fetch another.
func TestDockerfileBuildsWithTheRightGo(t *testing.T) {
	want := regexp.MustCompile(`(?m)^go (\S+)$`).FindStringSubmatch(readDoc(t, "go.mod"))
	got := regexp.MustCompile(`(?m)^ARG GO_VERSION=(\S+)$`).FindStringSubmatch(readDoc(t, "Dockerfile"))
	if want == nil || got == nil || want[1] != got[1] {
		t.Errorf("Dockerfile has %v, go.mod %v", got, want)
	}
}

// buildStatic builds the program the way the Dockerfile does, into dir. Without
// -trimpath, though, which would build the standard library anew.
func buildStatic(t *testing.T, dir string) string {
	t.Helper()
	bin := filepath.Join(dir, "sallyport")
	cmd := exec.Command("go", "build", "-buildvcs=false",
		"-ldflags", "-s -w -X main.version=v0.0.0-test -X main.revision=0123abc", "-o", bin, "./cmd/sallyport")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

func TestBinaryIsStaticAndStamped(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the image is for Linux")
	}
	bin := buildStatic(t, t.TempDir())
	f, err := elf.Open(bin)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("the binary has a %v segment: it wants a dynamic linker, which a scratch image has not", p.Type)
		}
	}
	out, err := exec.Command(bin, "version").Output()
	if err != nil || !strings.Contains(string(out), "v0.0.0-test") || !strings.Contains(string(out), "0123abc") {
		t.Errorf("version: %q, %v: want what -ldflags set", out, err)
	}
}

// TestServesFromAnEmptyRoot runs the image's command line with a root directory
// that holds the binary alone and cannot be written to, as the image's user.
func TestServesFromAnEmptyRoot(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the image is for Linux")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to change the root directory and the user")
	}
	dir := t.TempDir()
	buildStatic(t, dir)
	if err := os.Chmod(dir, 0o555); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/sallyport", "run")
	cmd.Dir = "/"
	cmd.Env = []string{"SALLYPORT_PROXY_LISTEN=127.0.0.1:0", "SALLYPORT_DNS_LISTEN=127.0.0.1:0", "SALLYPORT_ADMIN_LISTEN=127.0.0.1:0"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir, Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, syscall.EPERM) {
			t.Skipf("this root may not change the root directory: %v", err)
		}
		t.Fatal(err)
	}
	want := map[string]bool{"proxy": true, "dns": true, "admin": true}
	for sc := bufio.NewScanner(stdout); len(want) > 0 && sc.Scan(); {
		var line struct{ Message, Listener string }
		if err := json.Unmarshal(sc.Bytes(), &line); err == nil && line.Message == "listening" {
			delete(want, line.Listener)
		}
	}
	if len(want) > 0 {
		t.Errorf("not listening: %v", want)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("SIGTERM: %v, want exit status 0\n%s", err, stderr.Bytes())
	}
}
