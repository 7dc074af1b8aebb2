package dnsfilter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func TestLookupNetIP(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(path, []byte("127.0.0.1 localhost\n::1 localhost\n10.0.0.1 db\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o := newOrigin(t, soa, "both.test. 60 IN A 192.0.2.1", "both.test. 60 IN A 192.0.2.2", "both.test. 60 IN AAAA 2001:db8::1",
		"four.test. 60 IN A 192.0.2.3", "alias.test. 60 IN CNAME both.test.", "none.test. 60 IN TXT x")
	r := newResolver(t, Config{HostsFile: path, Cache: Cache{Size: mib}, Records: []Record{
		{Name: "proxy.internal", Type: "A", Value: "10.0.0.10"}, {Name: "out.internal", Type: "CNAME", Value: "four.test"},
	}}, o)
	for _, tt := range []struct{ network, host, want string }{
		{"ip", "both.test", "[2001:db8::1 192.0.2.1 192.0.2.2]"},
		{"ip4", "both.test", "[192.0.2.1 192.0.2.2]"},
		{"ip6", "both.test", "[2001:db8::1]"},
		{"ip", "Both.TEST.", "[2001:db8::1 192.0.2.1 192.0.2.2]"},
		{"ip", "four.test", "[192.0.2.3]"},
		{"ip", "alias.test", "[2001:db8::1 192.0.2.1 192.0.2.2]"},
		{"ip", "localhost", "[::1 127.0.0.1]"},
		{"ip", "db", "[10.0.0.1]"},
		{"ip", "proxy.internal", "[10.0.0.10]"},
		{"ip", "out.internal", "[192.0.2.3]"},
		{"ip", "absent.test", "not found"},
		{"ip", "none.test", "not found"},
		{"ip6", "four.test", "not found"},
		{"ip", "single", "not found"}, // and nothing appended to it
		{"ip", "192.0.2.1", "not found"},
		{"ip", "2001:db8::1", "not found"},
		{"ip", "127.1", "not found"},
		{"ip", "0x7f000001", "not found"},
		{"ip", "two..dots", "not found"},
		{"ip", "", "not found"},
		{"tcp", "both.test", "error"},
	} {
		t.Run(tt.network+" "+tt.host, func(t *testing.T) {
			for range 2 { // the second time from the cache
				addrs, err := r.LookupNetIP(context.Background(), tt.network, tt.host)
				got := fmt.Sprint(addrs)
				var de *net.DNSError
				if errors.As(err, &de) {
					if got = "error"; de.IsNotFound {
						got = "not found"
					}
					if de.Name != tt.host {
						t.Errorf("error names %q", de.Name)
					}
				}
				if got != tt.want {
					t.Errorf("LookupNetIP() = %v, %v, want %s", addrs, err, tt.want)
				}
			}
		})
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, q := range o.asked {
		if name := q.Question[0].Name; name == "single.test." || name == "localhost." || name == "db." {
			t.Errorf("upstream was asked for %s", name)
		}
	}
}

func TestLookupNetIPWaitsForTheOtherFamilyButNotLong(t *testing.T) {
	zone := []string{"a.test. 60 IN A 192.0.2.1", "a.test. 60 IN AAAA 2001:db8::1"}
	for _, slow := range []uint16{dns.TypeA, dns.TypeAAAA} {
		o := newOrigin(t, zone...)
		release := make(chan struct{})
		o.set(func(w dns.ResponseWriter, q, m *dns.Msg) {
			if q.Question[0].Qtype == slow {
				<-release
			}
			w.WriteMsg(m)
		})
		r := newResolver(t, Config{Cache: Cache{Size: mib}}, o)
		begin := time.Now()
		addrs, err := r.LookupNetIP(context.Background(), "ip", "a.test")
		if took := time.Since(begin); err != nil || len(addrs) != 1 || took < resolutionDelay || took > time.Second {
			t.Errorf("LookupNetIP() = %v, %v after %v", addrs, err, took)
		}
		close(release) // what was slow is remembered all the same
		eventually(t, "both families", func() bool {
			addrs, err := r.LookupNetIP(context.Background(), "ip", "a.test")
			return err == nil && len(addrs) == 2
		})
	}
}

func TestLookupNetIPErrors(t *testing.T) {
	only := func(qtype uint16, behave func(w dns.ResponseWriter, q, m *dns.Msg)) func(dns.ResponseWriter, *dns.Msg, *dns.Msg) {
		return func(w dns.ResponseWriter, q, m *dns.Msg) {
			if q.Question[0].Qtype == qtype {
				behave(w, q, m)
			} else {
				w.WriteMsg(m)
			}
		}
	}
	silence := func(dns.ResponseWriter, *dns.Msg, *dns.Msg) {}
	servfail := func(w dns.ResponseWriter, q, m *dns.Msg) { w.WriteMsg(m.SetRcode(q, dns.RcodeServerFailure)) }
	for _, tt := range []struct {
		name              string
		behave            func(w dns.ResponseWriter, q, m *dns.Msg)
		timeout, notFound bool
	}{
		{"silence", silence, true, false},
		{"SERVFAIL", servfail, false, false},
		{"NODATA and silence", only(dns.TypeAAAA, silence), true, false},
		{"SERVFAIL and NODATA", only(dns.TypeA, servfail), false, false},
		{"NODATA", nil, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := newOrigin(t, soa, "a.test. 60 IN TXT x")
			o.set(tt.behave)
			r := newResolver(t, Config{}, o)
			hasty(r)
			_, err := r.LookupNetIP(context.Background(), "ip", "a.test")
			var de *net.DNSError
			if !errors.As(err, &de) || de.IsTimeout != tt.timeout || de.IsNotFound != tt.notFound {
				t.Errorf("LookupNetIP() = %#v", err)
			}
		})
	}
	t.Run("deadline of the caller", func(t *testing.T) {
		o := newOrigin(t)
		o.set(silence)
		r := newResolver(t, Config{}, o)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		_, err := r.LookupNetIP(ctx, "ip", "a.test")
		var de *net.DNSError
		if !errors.As(err, &de) || !de.IsTimeout || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("LookupNetIP() = %#v", err)
		}
	})
}
