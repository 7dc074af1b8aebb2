package proxy

import (
	"fmt"
	"testing"

	"sallyport/policy"
)

func TestLiveTunnels(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	g := start(t, tcpPolicy(o.port()))
	for _, n := range []string{"a", "b", "c"} {
		g.resolver.set(n+".ok.test", "127.0.0.1")
	}
	if live, n := g.srv.LiveTunnels(10); len(live) != 0 || n != 0 {
		t.Fatalf("%+v, %d", live, n)
	}
	var all []*client
	for _, n := range []string{"a", "b", "c"} {
		c := g.connect(fmt.Sprintf("%s.ok.test:%d", n, o.port()))
		c.ping()
		all = append(all, c)
	}
	live, n := g.srv.LiveTunnels(2)
	if len(live) != 2 || n != 3 || live[0].Name != "c.ok.test" || live[1].Name != "b.ok.test" {
		t.Fatalf("%+v, %d", live, n)
	}
	b := live[1]
	if b.ID == "" || b.Group == "" || b.Rule == "" || int(b.Port) != o.port() || b.Destination.Port() != b.Port || b.BytesUp != 5 || b.BytesDown != 5 || b.Since.IsZero() || !b.Source.IsValid() {
		t.Errorf("%+v", b)
	}

	if g.srv.CloseTunnel("no such") {
		t.Error("a tunnel that is not there was closed")
	}
	if !g.srv.CloseTunnel(b.ID) {
		t.Error("the tunnel was not found")
	}
	if _, err := all[1].ReadByte(); err == nil {
		t.Error("the closed tunnel goes on")
	}
	ev := g.next()
	if ev.ID != b.ID || ev.Error != "closed by an operator" || ev.Decision.Reason != policy.ReasonMatched || ev.Decision.Verdict != policy.Allow || ev.BytesUp != 5 {
		t.Errorf("%+v", ev)
	}
	all[0].ping()
	all[2].ping()
	if live, n = g.srv.LiveTunnels(10); len(live) != 2 || n != 2 {
		t.Errorf("%+v, %d", live, n)
	}
	if g.srv.CloseTunnel(b.ID) {
		t.Error("it was closed twice")
	}
}

// TestLiveTunnelsWhileTheyEnd is for the race detector.
func TestLiveTunnelsWhileTheyEnd(t *testing.T) {
	o := listen(t, "127.0.0.1:0")
	o.echo(t)
	g := start(t, tcpPolicy(o.port()))
	g.resolver.set("a.ok.test", "127.0.0.1")
	for range 20 {
		c := g.connect(fmt.Sprintf("a.ok.test:%d", o.port()))
		c.ping()
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 50 {
				g.srv.LiveTunnels(10)
			}
		}()
		c.Close()
		g.next()
		<-done
	}
}
