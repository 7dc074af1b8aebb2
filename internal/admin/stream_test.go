package admin

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyport/internal/live"
	"sallyport/policy"
	"sallyport/policy/event"
)

func decided(name string, v policy.Verdict) *event.Event {
	return &event.Event{Time: time.Now(), Kind: event.Connect, ID: "c1", Source: netip.MustParseAddrPort("10.1.2.3:4567"), Listener: "proxy", Name: name,
		Port: 443, Decision: policy.Decision{Verdict: v, Reason: policy.ReasonNotListed, Group: "ci"}}
}

// ringConfig is a Config whose decisions come from a Ring.
func ringConfig() (Config, *live.Ring) {
	r := live.NewRing()
	return Config{API: API{Recent: r.Recent, Follow: r.Follow}}, r
}

// A follower is a client of a stream.
type follower struct {
	t    *testing.T
	resp *http.Response
	in   *bufio.Scanner
}

func follow(t *testing.T, url string, header ...string) *follower {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	r, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Accept", "text/event-stream")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	f := &follower{t, resp, bufio.NewScanner(resp.Body)}
	if kind := resp.Header.Get("Content-Type"); resp.StatusCode == 200 && kind != "text/event-stream" {
		t.Fatal(kind)
	}
	return f
}

// next returns the fields of the next event, or of a block without one; nil at the end.
func (f *follower) next() map[string]string {
	f.t.Helper()
	fields := map[string]string{}
	for f.in.Scan() {
		if f.in.Text() == "" {
			return fields
		}
		k, v, _ := strings.Cut(f.in.Text(), ": ")
		if _, twice := fields[k]; twice {
			f.t.Errorf("%s twice", k)
		}
		fields[k] = v
	}
	return nil
}

func (f *follower) decision() (d live.Decision, id string) {
	f.t.Helper()
	e := f.next()
	if e["event"] != "decision" {
		f.t.Fatalf("%v", e)
	}
	if err := json.Unmarshal([]byte(e["data"]), &d); err != nil {
		f.t.Fatal(err)
	}
	return d, e["id"]
}

func TestStream(t *testing.T) {
	c, ring := ringConfig()
	url := serveConfig(t, c) + "/api/v1/decisions"
	ring.Observe(decided("before.test", policy.Deny))
	f := follow(t, url+"?verdict=deny")
	if e := f.next(); e["retry"] != "2000" || e["id"] == "" {
		t.Errorf("%v", e)
	}
	ring.Observe(decided("allowed.test", policy.Allow))
	hostile := "evil.test\n\ndata: {}\nevent: decision\r\x1b]0;x\x07</script>\u2028"
	ring.Observe(decided(hostile, policy.Deny))
	ring.Observe(decided("second.test", policy.Deny))
	d, id := f.decision()
	if d.Name != hostile || d.Src != "10.1.2.3" || d.Verdict != "deny" {
		t.Errorf("%+v", d)
	}
	if d, _ := f.decision(); d.Name != "second.test" {
		t.Errorf("%+v", d)
	}
	again := follow(t, url, "Last-Event-ID", id)
	again.next()
	if d, _ := again.decision(); d.Name != "second.test" {
		t.Errorf("%+v", d)
	}
	// From the list to the stream nothing is missed.
	var list struct {
		Cursor    string
		Decisions []live.Decision
	}
	_, _, body := request(t, "GET", url+"?limit=2")
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list.Decisions) != 2 || list.Decisions[0].Name != "second.test" {
		t.Fatalf("%v, %s", err, body)
	}
	ring.Observe(decided("third.test", policy.Deny))
	on := follow(t, url+"?after="+list.Cursor)
	on.next()
	if d, _ := on.decision(); d.Name != "third.test" {
		t.Errorf("%+v", d)
	}
	if bad := follow(t, url+"?verdict=x"); bad.resp.StatusCode != 400 {
		t.Errorf("%d", bad.resp.StatusCode)
	}
}

// TestStreamOutlivesTimeouts has the bounds of a request pass while it streams.
func TestStreamOutlivesTimeouts(t *testing.T) {
	c, ring := ringConfig()
	url, _ := serveServer(t, c, func(s *Server) {
		s.http.ReadTimeout, s.http.WriteTimeout, s.beat = 100*time.Millisecond, 100*time.Millisecond, 50*time.Millisecond
	})
	f := follow(t, url+"/api/v1/decisions")
	f.next()
	for range 10 { // half a second
		if e := f.next(); e == nil {
			t.Fatal("it was cut")
		}
	}
	ring.Observe(decided("late.test", policy.Deny))
	for e := f.next(); e["event"] != "decision"; e = f.next() {
		if e == nil {
			t.Fatal("it was cut")
		}
	}
}

// TestStreamLosesAndSaysSo goes on from where it was, and more has come since than is kept.
func TestStreamLosesAndSaysSo(t *testing.T) {
	c, ring := ringConfig()
	url := serveConfig(t, c) + "/api/v1/decisions"
	cursor := ring.Follow("").ID()
	const all = 20_000
	for i := range all {
		ring.Observe(decided(fmt.Sprintf("n%d.test", i), policy.Deny))
	}
	f := follow(t, url+"?after="+cursor)
	f.next()
	seen, lost := 0, 0
	for seen+lost < all {
		e := f.next()
		switch e["event"] {
		case "decision":
			seen++
		case "lost":
			var l struct{ Lost, Total int }
			if err := json.Unmarshal([]byte(e["data"]), &l); err != nil || l.Lost < 1 {
				t.Fatalf("%v, %v", e, err)
			}
			if lost += l.Lost; lost != l.Total {
				t.Errorf("%d lost, it says %d", lost, l.Total)
			}
		case "":
			if e == nil {
				t.Fatal("it ended")
			}
		}
	}
	if seen+lost != all || seen == 0 || lost < all/2 {
		t.Errorf("%d seen, %d lost", seen, lost)
	}
}

// TestStuckClient does not read. Events go on at full speed, and the client is left.
func TestStuckClient(t *testing.T) {
	c, ring := ringConfig()
	url, s := serveServer(t, c, func(s *Server) { s.patience = 200 * time.Millisecond })
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprintf(conn, "GET /api/v1/decisions HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
	for s.streams.count() == 0 {
		time.Sleep(time.Millisecond) // pace: until the stream has begun
	}
	name := strings.Repeat("long.", 40) + "test"
	for s.streams.count() > 0 { // 10,000 a second
		for range 100 {
			ring.Observe(decided(name, policy.Deny))
		}
		time.Sleep(10 * time.Millisecond) // pace: of the events
	}
	if got := ring.Recent(live.Filter{}, 1); len(got) != 1 {
		t.Error("nothing was kept")
	}
}

func TestTooManyStreams(t *testing.T) {
	c, _ := ringConfig()
	url, s := serveServer(t, c, func(s *Server) { s.streams.share = maxStreams })
	for range maxStreams {
		follow(t, url+"/api/v1/decisions")
	}
	over := follow(t, url+"/api/v1/decisions")
	if over.resp.StatusCode != http.StatusServiceUnavailable || over.resp.Header.Get("Retry-After") == "" {
		t.Errorf("%d", over.resp.StatusCode)
	}
	if _, resp, _ := request(t, "GET", url+"/api/v1/decisions"); resp.StatusCode != 200 {
		t.Errorf("the list: %d", resp.StatusCode)
	}
	if s.streams.count() != maxStreams {
		t.Errorf("%d streams", s.streams.count())
	}
}

// TestStreamsOfOneClient has one address take all that it can get.
func TestStreamsOfOneClient(t *testing.T) {
	c, _ := ringConfig()
	c.Listen = "127.0.0.1:0"
	url, s := serveServer(t, c)
	for range maxStreams {
		follow(t, url+"/api/v1/decisions")
	}
	if n := s.streams.count(); n != streamShare {
		t.Errorf("one address has %d streams", n)
	}
	port := url[strings.LastIndexByte(url, ':'):]
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
	conn, err := dialer.Dial("tcp", "127.0.0.1"+port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /api/v1/decisions HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, " 200 ") {
		t.Errorf("another address: %q, %v", line, err)
	}
}

// TestStreamEndsWithTheToken takes the token away from one who follows.
func TestStreamEndsWithTheToken(t *testing.T) {
	c, _ := ringConfig()
	c.Credentials.Token = token
	url, s := serveServer(t, c, func(s *Server) { s.beat = 10 * time.Millisecond })
	f := follow(t, url+"/api/v1/decisions", "Authorization", "Bearer "+token)
	f.next()
	if e := f.next(); e == nil {
		t.Fatal("it ended at once")
	}
	s.SetCredentials(Credentials{Token: token + "new"})
	for f.next() != nil {
	}
	if _, err := f.resp.Body.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // of a body
		t.Errorf("%v", err)
	}
}

// TestBusy has every place for an answer taken.
func TestBusy(t *testing.T) {
	api := fullAPI()
	release := make(chan struct{})
	api.Policy = func() (*PolicyDetail, error) { <-release; return &PolicyDetail{}, nil }
	url, s := serveServer(t, Config{API: api})
	done := make(chan int)
	for range maxAnswers {
		go func() {
			resp, err := http.Get(url + "/api/v1/policy")
			if err != nil {
				done <- 0
				return
			}
			resp.Body.Close()
			done <- resp.StatusCode
		}()
	}
	for len(s.answers) < maxAnswers {
		time.Sleep(time.Millisecond) // pace: until all are under way
	}
	if _, resp, _ := request(t, "GET", url+"/api/v1/series"); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("%d", resp.StatusCode)
	}
	if _, resp, _ := request(t, "GET", url+"/healthz"); resp.StatusCode != 200 {
		t.Errorf("healthz: %d", resp.StatusCode)
	}
	close(release)
	for range maxAnswers {
		if status := <-done; status != 200 {
			t.Errorf("%d", status)
		}
	}
}

func TestSampler(t *testing.T) {
	now := Counts{}
	s := NewSampler(func() Counts { return now })
	if got := s.Series(60); got.StepSeconds != 10 || got.Time == nil || len(got.Time) != 0 || got.Decisions.Deny == nil {
		t.Errorf("%+v", got)
	}
	at := time.Unix(1_900_000_000, 0)
	s.sample(at)
	now = Counts{Decisions: VerdictCounts{10, 20, 30}, DNSQueries: VerdictCounts{40, 50, 60}, BytesUp: 1000, BytesDown: 2000, Tunnels: 3}
	s.sample(at.Add(10 * time.Second))
	now.Decisions.Allow = 5 // a group is gone
	s.sample(at.Add(20 * time.Second))
	got := s.Series(60)
	want := Series{StepSeconds: 10, Time: []int64{1_900_000_010, 1_900_000_020}, Decisions: Verdicts{[]float64{1, 0}, []float64{2, 0}, []float64{3, 0}},
		DNSQueries: Verdicts{[]float64{4, 0}, []float64{5, 0}, []float64{6, 0}}, BytesUp: []float64{100, 0}, BytesDown: []float64{200, 0}, Tunnels: []int{3, 3}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v\nwant %v", got, want)
	}
	for i := range 2 * seriesSteps {
		s.sample(at.Add(time.Duration(i+3) * 10 * time.Second))
	}
	if got := s.Series(60); len(got.Time) != seriesSteps || len(s.samples) != seriesSteps+1 || got.Time[seriesSteps-1] != at.Unix()+int64(2*seriesSteps+2)*10 {
		t.Errorf("%d steps of %d", len(got.Time), len(s.samples))
	}
	if got := s.Series(1); len(got.Time) != 6 {
		t.Errorf("%d steps", len(got.Time))
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
}

// TestStreamOverHTTP2 is TestStreamOutlivesTimeouts for the other protocol.
func TestStreamOverHTTP2(t *testing.T) {
	cert := certificate(t, "gate", nil, time.Now().Add(time.Hour))
	c, ring := ringConfig()
	c.Credentials.Certificate = &cert
	url, _ := serveServer(t, c, func(s *Server) {
		s.http.ReadTimeout, s.http.WriteTimeout, s.beat = 200*time.Millisecond, 200*time.Millisecond, 50*time.Millisecond
	})
	roots := x509.NewCertPool()
	roots.AddCert(cert.Leaf)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, "GET", url+"/api/v1/decisions", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Accept", "text/event-stream")
	resp, err := tr.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.ProtoMajor != 2 || resp.StatusCode != 200 {
		t.Fatalf("%s %d", resp.Proto, resp.StatusCode)
	}
	f := &follower{t, resp, bufio.NewScanner(resp.Body)}
	f.next()
	for range 15 { // three quarters of a second
		if e := f.next(); e == nil {
			t.Fatalf("it was cut: %v", f.in.Err())
		}
	}
	ring.Observe(decided("late.test", policy.Deny))
	for e := f.next(); e["event"] != "decision"; e = f.next() {
		if e == nil {
			t.Fatalf("it was cut: %v", f.in.Err())
		}
	}
}
