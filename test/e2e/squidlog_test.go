package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Squid's log analysers read what log.format: squid writes, and count what was sent.
func TestSquidAnalysers(t *testing.T) {
	w := newWorld(t)
	access := filepath.Join(t.TempDir(), "access.log")
	open := fmt.Sprintf("      - {id: plain, names: [plain.ok.test], ports: [%d], protocol: tcp, private_destinations: [127.0.0.0/8]}", w.httpPort)
	// Only the access log goes to the file: messages, which the harness reads, are on stderr.
	g := startAs(t, w, []string{"sh", "-c", `exec "$@" 2>&1`, "sh", binary}, policyText(w, open),
		"--set", "log.format=squid", "--set", "log.output="+access)

	const gets, heads, tunnels, denials = 7, 3, 2, 5
	api := fmt.Sprintf("http://api.ok.test:%d", w.httpPort)
	for i := range gets {
		g.curl(ciSource, fmt.Sprintf("%s/page%d?q=secret", api, i))
	}
	for range heads {
		g.curl(ciSource, "-I", api+"/page")
	}
	for range tunnels {
		g.curl(ciSource, "-p", fmt.Sprintf("http://plain.ok.test:%d/big", w.httpPort))
	}
	for range denials {
		g.curl(ciSource, "https://other.test/")
	}
	g.curl(ciSource, "http://pastes.evil.test/")
	const requests = gets + heads + tunnels + denials + 1
	lines := func() []string {
		b, err := os.ReadFile(access)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	}
	g.until("every line is written", func() bool { return len(lines()) == requests })
	g.signal(syscall.SIGTERM)
	g.wait()

	shape := regexp.MustCompile(`^[0-9]{10}\.[0-9]{3} [ 0-9]{5}[0-9]+ 127\.0\.1\.1 ` +
		`(TCP_MISS/200 [0-9]+ (GET|HEAD) http://api\.ok\.test:[0-9]+/page[0-9]?\?? - HIER_DIRECT/127\.0\.0\.10 (text/plain|-)` +
		`|TCP_TUNNEL/200 [0-9]+ CONNECT plain\.ok\.test:[0-9]+ - HIER_DIRECT/127\.0\.0\.10 -` +
		`|TCP_DENIED/403 0 (CONNECT other\.test:443|GET http://pastes\.evil\.test/) - HIER_NONE/- text/plain)$`)
	bytes := 0
	for _, l := range lines() {
		if !shape.MatchString(l) {
			t.Errorf("not a line of Squid's: %s", l)
			continue
		}
		n, err := strconv.Atoi(strings.Fields(l)[4])
		if err != nil {
			t.Fatal(err)
		}
		bytes += n
	}
	if body := gets*len("hello from api.ok.test:/page0") + gets*len(strconv.Itoa(w.httpPort)); bytes < body+tunnels*8<<20 || bytes > body+tunnels*(8<<20+1024) {
		t.Errorf("%d bytes in the log, want %d and the heads in the tunnels", bytes, body+tunnels*8<<20)
	}

	t.Run("calamaris", func(t *testing.T) {
		out, code := tool(t, "sh", "-c", `command -v calamaris >/dev/null || exit 77; calamaris -a -F unformatted <"$1"`, "sh", access)
		if code == 77 {
			tool(t, "calamaris") // says that it is missing
		}
		wants(t, "calamaris", out, "invalid lines: lines 0 \n",
			fmt.Sprintf("Total amount: requests %d \n", requests), fmt.Sprintf("Total Bandwidth: Byte %d \n", bytes),
			fmt.Sprintf("\n TCP_DENIED %d ", denials+1), fmt.Sprintf("\n TCP_TUNNEL %d ", tunnels), fmt.Sprintf("\nHEAD %d ", heads))
	})
	t.Run("sarg", func(t *testing.T) {
		dir := t.TempDir()
		conf := filepath.Join(dir, "sarg.conf")
		if err := os.WriteFile(conf, []byte("resolve_ip no\nlastlog 0\ntemporary_dir "+dir+"\nreport_type topusers topsites users_sites denied\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		out, code := tool(t, "sarg", "-f", conf, "-l", access, "-o", filepath.Join(dir, "out"), "-x")
		if code != 0 {
			t.Fatalf("sarg: %d\n%s", code, out)
		}
		wants(t, "sarg", out, fmt.Sprintf("Records read: %d, written: %d, excluded: 0", requests, requests), fmt.Sprintf("squid log format: %d entries", requests))
		totals, err := filepath.Glob(filepath.Join(dir, "out", "*", "sarg-general"))
		if err != nil || len(totals) != 1 {
			t.Fatalf("reports %v: %v", totals, err)
		}
		total, err := os.ReadFile(totals[0])
		if err != nil {
			t.Fatal(err)
		}
		wants(t, "sarg-general", string(total), fmt.Sprintf("TOTAL\t%d\t%d\t", requests, bytes))
		page, err := os.ReadFile(filepath.Join(filepath.Dir(totals[0]), "denied.html"))
		if err != nil {
			t.Fatal(err)
		}
		wants(t, "denied.html", string(page), "other.test:443", "http://pastes.evil.test/")
	})
}
