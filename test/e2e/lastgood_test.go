package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// A gate whose source is gone at the start serves the last good policy, list files
// included; without one it denies everything and says so, and recovers by itself.
func TestLastGoodPolicy(t *testing.T) {
	w := newWorld(t)
	kept := filepath.Join(t.TempDir(), "last-good.zip")
	list := filepath.Join(t.TempDir(), "names.txt")
	if err := os.WriteFile(list, []byte("api.ok.test\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const policy = "version: 1\nlists: [{name: l, file: LIST}]\ngroups:\n  - {name: g, sources: [127.0.0.0/8], allow: [{names: [\"@l\"], protocol: dns}]}\n"
	text := strings.Replace(policy, "LIST", list, 1)
	setting := []string{"--set", "policy.last_good=" + kept}

	g := start(t, w, text, setting...)
	revision := g.ready().Policy.Revision
	if g.ready().Policy.LastGood {
		t.Error("a policy that was loaded counts as a copy")
	}
	g.signal(syscall.SIGTERM)
	if code := g.wait(); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if err := os.Remove(list); err != nil {
		t.Fatal(err)
	}

	// Neither the list nor the policy is there.
	source := filepath.Join(t.TempDir(), "policy.yaml")
	g = start(t, w, text, append(setting, "--set", "policy.source="+source)...)
	r := g.ready()
	if r.Policy.Revision != revision || !r.Policy.LastGood || r.Policy.LastReload.OK || !strings.Contains(r.Policy.LastReload.Error, "no such file") {
		t.Errorf("/readyz with the last good policy: %+v, want revision %s", r, revision)
	}
	g.line(0, map[string]any{"event": "config", "what": "policy", "policy": revision})
	wants(t, "metrics", g.metrics(), "sallyport_policy_last_reload_success 0")
	wants(t, "allowed by the last good policy", g.dig("127.0.0.1", "api.ok.test"), "status: NOERROR")
	wants(t, "not in the last good policy", g.dig("127.0.0.1", "evil.test"), "status: REFUSED")

	// The source is back, while the settings have a mistake.
	g.write("sallyport.yaml", "mistake: 1\n")
	if err := os.WriteFile(source, []byte(policyText(w, "")), 0o644); err != nil {
		t.Fatal(err)
	}
	g.signal(syscall.SIGHUP)
	g.until("the policy of the source", func() bool {
		r := g.ready()
		return r.Policy.Revision != revision && !r.Policy.LastGood
	})
	g.signal(syscall.SIGTERM)
	g.wait()

	// Nothing was ever loaded.
	late := filepath.Join(t.TempDir(), "policy.yaml")
	g = begin(t, w, text, "--set", "policy.last_good="+filepath.Join(t.TempDir(), "none.zip"), "--set", "policy.source="+late)
	g.until("an answer of /readyz", func() bool { return g.ready().status != 0 })
	if r = g.ready(); r.Ready || r.status != 503 || r.Policy.Revision != "" || r.Policy.LastReload.OK {
		t.Errorf("/readyz without any policy: %+v", r)
	}
	wants(t, "without any policy", g.dig("127.0.0.1", "api.ok.test"), "status: REFUSED")
	g.line(0, map[string]any{"event": "dns", "reason": "unmatched_source"})
	out, _ := g.curl("127.0.0.1", "-sS", "http://api.ok.test/")
	wants(t, "plain HTTP without any policy", out, "unmatched_source")
	if err := os.WriteFile(late, []byte(policyText(w, "")), 0o644); err != nil {
		t.Fatal(err)
	}
	g.until("ready after the policy has appeared", func() bool { return g.ready().Ready })

	// A policy with mistakes and nothing to fall back on is an error as ever.
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	if err := os.WriteFile(bad, []byte("version: 2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, code := tool(t, binary, "run", "--policy", bad, "--set", "policy.last_good="+bad+".zip", "--set", "proxy.listen=127.0.0.1:0", "--set", "dns.listen=127.0.0.1:0", "--set", "admin.listen=127.0.0.1:0")
	if code != 2 {
		t.Errorf("a bad policy without a copy: exit status %d", code)
	}
	wants(t, "a bad policy without a copy", out, "bad.yaml:1:", "last good policy: ")
}
