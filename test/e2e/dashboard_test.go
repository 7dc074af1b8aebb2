package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/browser"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/miekg/dns"

	"sallyport/policy"
)

// artifacts is where screenshots are kept, for people to look at.
const artifacts = "../artifacts"

// firstPaint is what the first page may cost on the wire, in bytes, with everything
// that it needs and both directions counted.
const firstPaint = 100_000

// TestDashboard looks at the pages of a running gate with a real browser.
func TestDashboard(t *testing.T) {
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("chromium is missing; make test installs it")
		}
		t.Skip("chromium is not installed; run make test as root on Debian, which installs it")
	}
	t.Setenv("SALLYPORT_PROXY_TIMEOUTS_IDLE", "10m") // one tunnel stays open
	w := newWorld(t)
	g := start(t, w, policyText(w, ""))
	tunnel := openTunnel(t, w, g)
	for i := range 60 { // as many as the first page shows
		g.query(ciSource, fmt.Sprintf("name-%d-of-many-that-were-asked-for.example.test.", i%6))
	}
	g.makeTraffic(w)

	wire := newWire(t, g.admin)
	b := openBrowser(t, chromium, "http://"+wire.addr)
	b.watches(t)

	t.Run("first paint", func(t *testing.T) {
		b.visit(t, "/")
		b.until(t, "charts are drawn", `document.querySelectorAll(".plot canvas").length === 3`)
		b.until(t, "the stream is open", `document.querySelector("#live-state").textContent.startsWith("live")`)
		n := wire.bytes.Load()
		t.Logf("the first page took %d bytes on the wire", n)
		if n > firstPaint || n < 10_000 {
			t.Errorf("the first page took %d bytes on the wire, want at most %d, and more than nothing", n, firstPaint)
		}
	})

	t.Run("pages", func(t *testing.T) {
		pages := []struct{ name, path, want string }{
			{"overview", "/", "Top denied"},
			{"discovery", "/discovery", "other.test"},
			{"proposal", "/discovery?proposal=web", "web.ok.test"},
			{"explain", "/explain?source=" + ciSource + "&target=www.evil.test:443", "explicit_deny"},
			{"policy", "/policy", "Guardrails"},
			{"tunnels", "/tunnels", "echo.ok.test"},
			{"health", "/health", "Upstream DNS"},
		}
		for _, scheme := range []string{"light", "dark"} {
			b.prefers(t, scheme)
			for _, p := range pages {
				b.visit(t, p.path)
				b.until(t, p.path+" says "+p.want, fmt.Sprintf(`document.body.innerText.includes(%q)`, p.want))
				if p.path == "/" {
					b.until(t, "charts are drawn", `document.querySelectorAll(".plot canvas").length === 3`)
					b.eval(t, `document.querySelector(".denied summary").click()`)
				}
				b.overflows(t, p.path)
				b.shoot(t, p.name+"-"+scheme)
			}
			background := b.text(t, `getComputedStyle(document.body).backgroundColor`)
			if dark := strings.HasPrefix(background, "rgb(15,"); dark != (scheme == "dark") {
				t.Errorf("%s: the background is %s", scheme, background)
			}
		}
		b.prefers(t, "light")
		b.viewport(t, 390, 844)
		for _, p := range pages {
			b.visit(t, p.path)
			b.overflows(t, p.path+" on a small screen")
			b.shoot(t, p.name+"-small")
		}
		b.viewport(t, 1360, 900)
	})

	t.Run("without scripts", func(t *testing.T) {
		disable := func(value bool) {
			if _, err := chromedp.Call(b.ctx, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: value}); err != nil {
				t.Fatal(err)
			}
		}
		disable(true)
		defer disable(false)
		for path, want := range map[string]string{
			"/?name=other.test": "other.test:443", "/policy?q=threats": "@threats", "/tunnels?q=echo": "echo.ok.test",
			"/explain?source=" + ciSource + "&target=other.test:443": "not_listed", "/discovery": "Seen", "/health": "Upstream DNS",
		} {
			b.visit(t, path)
			b.until(t, path+" says "+want, fmt.Sprintf(`document.querySelector("main").innerText.includes(%q)`, want))
			b.until(t, "what needs scripts is hidden", `[...document.querySelectorAll(".js-only")].every((e) => e.getClientRects().length === 0)`)
		}
	})

	t.Run("live decisions", func(t *testing.T) {
		b.visit(t, "/")
		b.until(t, "the stream is open", `document.querySelector("#live-state").textContent === "live"`)
		g.curl(ciSource, "https://arrives.test/")
		b.until(t, "a decision arrives", `document.querySelector("#rows tr").innerText.includes("arrives.test:443")`)
		b.eval(t, `document.querySelector("#pause").click()`)
		g.curl(ciSource, "https://while-paused.test/")
		b.until(t, "it is counted while paused", `/^paused, [1-9]/.test(document.querySelector("#live-state").textContent)`)
		if strings.Contains(b.text(t, `document.querySelector("#rows").innerText`), "while-paused") {
			t.Error("a decision was shown while paused")
		}
		b.keys(t, "s")
		b.until(t, "it is shown afterwards", `document.querySelector("#rows").innerText.includes("while-paused.test:443")`)
	})

	t.Run("filters", func(t *testing.T) {
		b.visit(t, "/")
		b.keys(t, "/")
		b.until(t, "/ focuses the filter", `document.activeElement.name === "name"`)
		b.keys(t, "arrives")
		b.until(t, "only rows with the name are left",
			`document.querySelectorAll("#rows tr").length > 0 && [...document.querySelectorAll("#rows tr")].every((r) => r.innerText.includes("arrives"))`)
		b.until(t, "the address keeps the filter", `new URLSearchParams(location.search).get("name") === "arrives"`)
		b.visit(t, "/?verdict=observe&group=web")
		b.until(t, "a deep link filters",
			`document.querySelectorAll("#rows tr").length > 0 && [...document.querySelectorAll("#rows tr")].every((r) => r.innerText.includes("observe"))`)
		b.until(t, "the stream is open", `document.querySelector("#live-state").textContent === "live"`)
		g.curl(ciSource, "https://other-group.test/")
		before := b.text(t, `document.querySelector("#rows tr").dataset.seq`)
		g.observe(w)
		b.until(t, "the stream is filtered", fmt.Sprintf(`document.querySelector("#rows tr").dataset.seq !== %q`, before))
		if strings.Contains(b.text(t, `document.querySelector("#rows").innerText`), "other-group") {
			t.Error("the filter let another group through")
		}
	})

	t.Run("keys", func(t *testing.T) {
		for key, path := range map[string]string{"o": "/", "d": "/discovery", "e": "/explain", "p": "/policy", "t": "/tunnels", "h": "/health"} {
			b.visit(t, "/no/such/page")
			b.keys(t, "g")
			b.keys(t, key)
			b.until(t, "g "+key+" leads to "+path, fmt.Sprintf(`location.pathname === %q && document.readyState === "complete"`, path))
			b.until(t, "it is marked", `document.querySelectorAll("nav [aria-current=page]").length === 1`)
		}
		b.forget(`status of 404`)
		b.keys(t, "?")
		b.until(t, "? lists the keys", `document.querySelector("#keys").open`)
		b.shoot(t, "keys-light")
		b.visit(t, "/policy")
		b.keys(t, "\t")
		b.until(t, "the first tab reaches the skip link, visibly",
			`document.activeElement.className === "skip" && document.activeElement.getBoundingClientRect().top >= 0`)
		b.keys(t, "/")
		b.keys(t, "threats")
		b.until(t, "the policy is narrowed as one types", `[...document.querySelectorAll("tbody tr")].some((r) => r.hidden) && [...document.querySelectorAll("tbody tr")].some((r) => !r.hidden)`)
	})

	t.Run("copy", func(t *testing.T) {
		b.visit(t, "/")
		row := `[...document.querySelectorAll(".denied details")].find((d) => d.innerText.includes("other.test:443"))`
		b.until(t, "other.test is among the top denied", row+` !== undefined`)
		b.eval(t, row+`.open = true`)
		b.eval(t, row+`.id = "copied"`)
		b.do(t, chromedp.Click(chromedp.CSS("#copied .snippet button")))
		b.until(t, "the button says so", `document.querySelector("#copied .snippet button").textContent === "Copied"`)
		rule := b.text(t, `navigator.clipboard.readText()`)
		text := policyText(w, "      "+strings.ReplaceAll(strings.TrimSpace(rule), "\n", "\n      "))
		p, _, err := policy.Load("policy.yaml", []byte(text), policy.Options{})
		if err != nil {
			t.Fatalf("what was copied is no rule: %v\n%s", err, rule)
		}
		q := policy.Request{Source: netip.MustParseAddr(ciSource), Name: policy.MustName("other.test"), Port: 443, Time: time.Now()}
		if d := p.Decide(q); d.Verdict != policy.Allow {
			t.Errorf("with the rule that was copied: %v %v\n%s", d.Verdict, d.Reason, rule)
		}
		command := b.text(t, `document.querySelectorAll("#copied pre")[1].textContent`)
		if want := "sallyport explain --source " + ciSource + " other.test:443"; command != want {
			t.Errorf("the command is %q, want %q", command, want)
		}
		out, code := g.sallyport(strings.Fields(command)[1:]...)
		wants(t, fmt.Sprintf("the command (status %d)", code), out, "not_listed")
	})

	t.Run("explain", func(t *testing.T) {
		b.visit(t, "/explain")
		b.do(t, chromedp.SendKeys(chromedp.CSS("input[name=source]"), ciSource),
			chromedp.SendKeys(chromedp.CSS("input[name=target]"), fmt.Sprintf("api.ok.test:%d\r", w.tlsPort)))
		b.until(t, "the answer", `document.querySelector(".verdict-line")?.innerText.includes("allow")`)
		out, _ := g.sallyport("explain", "--source", ciSource, fmt.Sprintf("api.ok.test:%d", w.tlsPort))
		shown := b.text(t, `document.querySelector("main").innerText`)
		for _, line := range strings.Split(out, "\n") {
			for _, fact := range strings.Fields(line) {
				if fact == "verdict" || fact == "reason" { // a badge and a sentence there
					continue
				}
				if !strings.Contains(strings.ToLower(shown), strings.ToLower(strings.Trim(fact, "(),"))) {
					t.Errorf("the page lacks %q of\n%s\nin\n%s", fact, out, shown)
				}
			}
		}
		b.visit(t, "/explain?source=nonsense&target=x")
		b.until(t, "a mistake is told", `document.querySelector("[role=alert]")?.innerText.includes("nonsense")`)
		b.forget(`status of 400`)
	})

	t.Run("hostile names", func(t *testing.T) {
		b.visit(t, "/")
		b.until(t, "the stream is open", `document.querySelector("#live-state").textContent === "live"`)
		g.sendHostile()
		// Once as the stream brings them, once as the server renders them.
		for _, how := range []string{"streamed", "rendered"} {
			b.until(t, how, `document.querySelector("#rows").innerText.includes("<script>pwned")`)
			b.until(t, how+": a bidirectional override is written out", `document.querySelector("#rows").innerText.includes("u202e")`)
			if n := b.text(t, `String(document.querySelectorAll("#rows script, #rows img, #rows svg, main script, main img").length + (window.pwned ?? 0))`); n != "0" {
				t.Errorf("%s: a name became an element, or ran", how)
			}
			if s := b.text(t, `document.body.innerText`); strings.ContainsAny(s, "\u202e\u200b\x00\x7f") {
				t.Errorf("%s: a character without a shape reached the page", how)
			}
			b.shoot(t, "hostile-"+how)
			b.visit(t, "/")
		}
	})

	t.Run("close a tunnel", func(t *testing.T) {
		b.visit(t, "/tunnels")
		b.do(t, chromedp.Click(chromedp.CSS("button[data-close]")))
		b.until(t, "it asks", `document.querySelector("#closing").open && document.querySelector("#closing").innerText.includes("echo.ok.test")`)
		b.shoot(t, "closing-light")
		b.do(t, chromedp.Click(chromedp.CSS("#closing button.danger")))
		b.until(t, "it says so", `document.querySelector("#said").textContent === "The tunnel is closed."`)
		tunnel.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, tunnel); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the tunnel is open")
		}
		g.line(0, map[string]any{"event": "connect", "name": "echo.ok.test", "reason": "matched"})
		b.until(t, "it leaves the list", `document.querySelector("#tunnels").innerText.includes("No tunnel is open")`)
	})

	t.Run("nothing else", func(t *testing.T) {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, url := range b.requests {
			if !strings.HasPrefix(url, b.base+"/") && !strings.HasPrefix(url, "data:") {
				t.Errorf("a request went to %s", url)
			}
		}
		if len(b.requests) < 20 {
			t.Errorf("only %d requests were seen: %v", len(b.requests), b.requests)
		}
		for _, msg := range b.mistakes {
			t.Errorf("the console says: %s", msg)
		}
	})

	t.Run("with a token", func(t *testing.T) {
		const token = "0123456789abcdef-of-a-test"
		g.write("token", token+"\n")
		t.Setenv("SALLYPORT_ADMIN_TOKEN_FILE", g.path("token"))
		guarded := start(t, w, policyText(w, ""))
		for _, path := range []string{"/", "/policy", "/no/such"} {
			resp, err := http.Get("http://" + guarded.admin + path)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s without the token: %d", path, resp.StatusCode)
			}
		}
		b.do(t, chromedp.Navigate("http://anybody:"+token+"@"+guarded.admin+"/"))
		b.until(t, "the stream is open", `document.querySelector("#live-state").textContent === "live"`)
		b.until(t, "charts are drawn", `document.querySelectorAll(".plot canvas").length === 3`)
		guarded.curl(ciSource, "https://arrives.test/")
		b.until(t, "a decision arrives", `document.querySelector("#rows tr").innerText.includes("arrives.test:443")`)
	})

	t.Run("loss and return", func(t *testing.T) {
		b.visit(t, "/")
		b.until(t, "the stream is open", `document.querySelector("#live-state").textContent === "live"`)
		wire.cut()
		b.until(t, "the loss is shown", `!document.querySelector("#lost").hidden`)
		b.shoot(t, "lost-light")
		g.curl(ciSource, "https://unseen.test/")
		wire.mend(t)
		b.until(t, "it is mended", `document.querySelector("#lost").hidden && document.querySelector("#live-state").textContent === "live"`)
		b.until(t, "what was missed is there", `document.querySelector("#rows").innerText.includes("unseen.test:443")`)
	})
}

// openTunnel opens a tunnel to the echo service that stays.
func openTunnel(t *testing.T, w *world, g *gate) net.Conn {
	t.Helper()
	c := dialFrom(t, ciSource, g.proxy)
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "CONNECT echo.ok.test:%d HTTP/1.1\r\nHost: echo.ok.test\r\n\r\n", w.echoPort)
	br := bufio.NewReader(c)
	for {
		line, err := br.ReadString('\n')
		if err != nil {
			t.Fatalf("the tunnel: %v", err)
		}
		if strings.HasPrefix(line, "220") { // the service's greeting
			break
		}
	}
	c.SetDeadline(time.Time{})
	return c
}

// makeTraffic has something of every verdict decided.
func (g *gate) makeTraffic(w *world) {
	for range 3 {
		g.curl(ciSource, "https://other.test/")
	}
	g.curl(ciSource, "--cacert", w.caFile, fmt.Sprintf("https://api.ok.test:%d/", w.tlsPort))
	g.curl(ciSource, fmt.Sprintf("http://api.ok.test:%d/big", w.httpPort), "-o", "/dev/null")
	g.curl(ciSource, "https://www.evil.test/")
	g.curl(ciSource, "https://"+strings.Repeat(strings.Repeat("a", 59)+".", 4)+"test/")
	g.observe(w)
	g.curl(noSource, "https://api.ok.test/")
	g.dig(ciSource, "api.ok.test")
	g.dig(ciSource, "nowhere.test", "TXT")
}

// observe has something let pass that would have been denied: the SNI is another's.
func (g *gate) observe(w *world) {
	g.curl(webSource, "--cacert", w.caFile, "--connect-to", fmt.Sprintf("api.ok.test:%d:web.ok.test:%[1]d", w.tlsPort),
		fmt.Sprintf("https://api.ok.test:%d/", w.tlsPort))
}

// sendHostile has names decided that would do harm on a careless page.
func (g *gate) sendHostile() {
	for _, target := range []string{
		"<script>pwned=1</script>:443", `"><img/src=x/onerror=pwned=1>:443`, "'onmouseover='pwned=1:443", "</td></table><svg/onload=pwned=1>:443",
		"evil\u202emoc.elpmaxe:443", "zero\u200bwidth.test:443", "\xff\xfe.test:443",
	} {
		c := dialFrom(g.t, ciSource, g.proxy)
		c.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", target)
		if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
			g.t.Errorf("CONNECT %s: %v", target, err)
		}
		c.Close()
	}
	for _, name := range []string{`<script>pwned\=1</script>.test.`, `evil\226\128\174moc.test.`, `new\010line.test.`} {
		g.query(ciSource, name)
	}
}

// query asks the resolver for addresses.
func (g *gate) query(src, name string) {
	g.t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(name, dns.TypeA)
	client := dns.Client{Timeout: patience, Dialer: &net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(src)}}}
	if _, _, err := client.Exchange(m, g.dns); err != nil {
		g.t.Errorf("query for %s: %v", name, err)
	}
}

// A wire is a TCP relay in front of the admin server. It counts what crosses it, and
// can be cut.
type wire struct {
	addr, to string
	bytes    atomic.Int64

	mu       sync.Mutex // guards what follows
	listener net.Listener
	conns    map[net.Conn]bool
	wg       sync.WaitGroup
}

func newWire(t *testing.T, to string) *wire {
	w := &wire{addr: "127.0.0.1:0", to: to, conns: map[net.Conn]bool{}}
	w.mend(t)
	t.Cleanup(func() {
		w.cut()
		w.wg.Wait()
	})
	return w
}

// mend listens, at the address that was used before.
func (w *wire) mend(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.addr, w.listener = l.Addr().String(), l
	w.mu.Unlock()
	w.wg.Go(func() { w.serve(l) })
}

// cut closes everything.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listener.Close()
	for c := range w.conns {
		c.Close()
	}
}

func (w *wire) serve(l net.Listener) {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", w.to)
		if err != nil {
			near.Close()
			return
		}
		w.mu.Lock()
		w.conns[near], w.conns[far] = true, true
		w.mu.Unlock()
		for _, pair := range [][2]net.Conn{{near, far}, {far, near}} {
			w.wg.Go(func() {
				_, _ = io.Copy(io.MultiWriter(pair[0], counter{&w.bytes}), pair[1]) // until either side ends
				pair[0].Close()
				pair[1].Close()
				w.mu.Lock()
				delete(w.conns, pair[0])
				w.mu.Unlock()
			})
		}
	}
}

// A counter counts what is written to it.
type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

// A pageBrowser is a browser with one tab.
type pageBrowser struct {
	ctx  context.Context
	base string // URL of the admin server

	mu       sync.Mutex // guards what follows
	requests []string   // URLs
	mistakes []string   // of the console, and dialogs
}

// openBrowser starts chromium without a display.
func openBrowser(t *testing.T, chromium, base string) *pageBrowser {
	t.Helper()
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(chromium), chromedp.Flag("proxy-server", "direct://"))
	if os.Getuid() == 0 {
		options = append(options, chromedp.NoSandbox) // which chromium cannot have as root
	}
	ctx, cancel := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(cancel)
	ctx, _ = chromedp.NewContext(ctx)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		_ = chromedp.Cancel(ctx) // it is killed next
	})
	b := &pageBrowser{ctx: ctx, base: base}
	if err := chromedp.Listen(ctx, b.note); err != nil {
		t.Fatalf("start chromium: %v", err)
	}
	for _, name := range []string{"clipboard-read", "clipboard-write"} {
		if _, err := chromedp.CallBrowser(ctx, browser.SetPermission, browser.SetPermissionParams{
			Permission: &browser.PermissionDescriptor{Name: name}, Setting: browser.PermissionSettingGranted, Origin: base,
		}); err != nil {
			t.Fatal(err)
		}
	}
	b.viewport(t, 1360, 900)
	return b
}

// note keeps what happens in the tab. It is called by the goroutine that reads from
// the browser.
func (b *pageBrowser) note(ev any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch ev := ev.(type) {
	case *network.EventRequestWillBeSent:
		b.requests = append(b.requests, ev.Request.URL)
	case *runtime.EventExceptionThrown:
		b.mistakes = append(b.mistakes, "exception: "+ev.ExceptionDetails.Text)
	case *runtime.EventConsoleAPICalled:
		if ev.Type == runtime.ConsoleAPICalledTypeError || ev.Type == runtime.ConsoleAPICalledTypeWarning {
			b.mistakes = append(b.mistakes, fmt.Sprintf("%s: %s", ev.Type, ev.Args[0].Value))
		}
	case *cdplog.EventEntryAdded:
		if ev.Entry.Level == cdplog.EntryLevelError || ev.Entry.Level == cdplog.EntryLevelWarning {
			b.mistakes = append(b.mistakes, fmt.Sprintf("%s: %s %s", ev.Entry.Level, ev.Entry.Text, ev.Entry.URL))
		}
	case *page.EventJavascriptDialogOpening:
		b.mistakes = append(b.mistakes, "a dialog: "+ev.Message)
	}
}

// watches makes sure that mistakes would be seen: of scripts, and against the
// security policy.
func (b *pageBrowser) watches(t *testing.T) {
	t.Helper()
	b.visit(t, "/health")
	b.eval(t, `console.error("canary")`)
	b.eval(t, `document.body.insertAdjacentHTML("beforeend", "<p style='color: red'>")`)
	for _, want := range []string{"canary", "Content Security Policy"} {
		b.seen(t, want)
		b.forget(want)
	}
}

// seen waits for a mistake that contains text.
func (b *pageBrowser) seen(t *testing.T, text string) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; <-tick.C {
		b.mu.Lock()
		all := strings.Join(b.mistakes, "\n")
		b.mu.Unlock()
		if strings.Contains(all, text) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the console does not say %q but %q", text, all)
		}
	}
}

// forget drops expected mistakes that contain text.
func (b *pageBrowser) forget(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var rest []string
	for _, m := range b.mistakes {
		if !strings.Contains(m, text) {
			rest = append(rest, m)
		}
	}
	b.mistakes = rest
}

func (b *pageBrowser) do(t *testing.T, steps ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		t.Fatal(err)
	}
}

func (b *pageBrowser) visit(t *testing.T, path string) {
	t.Helper()
	b.do(t, chromedp.Navigate(b.base+path))
}

// keys presses keys as a keyboard does: what a page makes of a key can keep its
// character out of the field.
func (b *pageBrowser) keys(t *testing.T, keys string) {
	t.Helper()
	for _, r := range keys {
		p := input.DispatchKeyEventParams{Type: input.DispatchKeyEventTypeKeyDown, Key: string(r), Text: string(r)}
		if r == '\t' {
			p.Key, p.Code, p.Text, p.WindowsVirtualKeyCode = "Tab", "Tab", "", 9
		}
		for _, p.Type = range []input.DispatchKeyEventType{input.DispatchKeyEventTypeKeyDown, input.DispatchKeyEventTypeKeyUp} {
			if _, err := chromedp.Call(b.ctx, input.DispatchKeyEvent, p); err != nil {
				t.Fatal(err)
			}
			p.Text = ""
		}
	}
}

func (b *pageBrowser) eval(t *testing.T, expression string) {
	t.Helper()
	b.do(t, chromedp.Evaluate[chromedp.Void](expression))
}

// text evaluates an expression whose value, or what it promises, is a string.
func (b *pageBrowser) text(t *testing.T, expression string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	s, err := chromedp.Run(ctx, chromedp.Evaluate[string](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		t.Fatalf("%s: %v", expression, err)
	}
	return s
}

// until waits until the expression holds on the page. A page that is being left has
// no answer, which is as good as no.
func (b *pageBrowser) until(t *testing.T, what, expression string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, 3*patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := chromedp.Run(ctx, chromedp.Evaluate[bool](`Boolean(`+expression+`)`))
		if err == nil && ok {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			b.shoot(t, "failed")
			t.Fatalf("not within %v: %s (%s; %v); the page says\n%s", 3*patience, what, expression, err, b.text(t, `location.href + "\n" + document.body.innerText`))
		}
	}
}

// prefers sets the colour scheme.
func (b *pageBrowser) prefers(t *testing.T, scheme string) {
	t.Helper()
	if _, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	}); err != nil {
		t.Fatal(err)
	}
}

func (b *pageBrowser) viewport(t *testing.T, width, height int64) {
	t.Helper()
	b.do(t, chromedp.EmulateViewport(width, height))
}

// overflows wants that the page is as wide as the window: what is wider scrolls in
// its own box.
func (b *pageBrowser) overflows(t *testing.T, what string) {
	t.Helper()
	if s := b.text(t, `document.documentElement.scrollWidth > innerWidth ? document.documentElement.scrollWidth + " > " + innerWidth : ""`); s != "" {
		t.Errorf("%s is wider than the window: %s", what, s)
	}
}

// shoot keeps a picture of the whole page.
func (b *pageBrowser) shoot(t *testing.T, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	png, err := chromedp.Run(ctx, chromedp.FullScreenshot(100))
	if err != nil {
		t.Errorf("screenshot %s: %v", name, err)
		return
	}
	if err := os.MkdirAll(artifacts, 0o755); err != nil {
		t.Logf("screenshots are not kept: %v", err)
		return
	}
	if err := os.WriteFile(filepath.Join(artifacts, name+".png"), png, 0o644); err != nil {
		t.Logf("screenshots are not kept: %v", err)
	}
}
