package dnsfilter

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// trusting returns prefixes.
func trusting(t *testing.T, texts ...string) (ps []netip.Prefix) {
	t.Helper()
	for _, s := range texts {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	return ps
}

// An authority has a certificate for example.com, and who trusts it.
type authority struct {
	certificate tls.Certificate
	roots       *x509.CertPool
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(7), DNSNames: []string{"example.com"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(parsed)
	return authority{tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: parsed}, roots}
}

// postOver asks over HTTP/1.1 on a connection.
func postOver(raw net.Conn, config *tls.Config, q *dns.Msg) (*dns.Msg, error) {
	p, err := q.Pack()
	if err != nil {
		return nil, err
	}
	config = config.Clone()
	config.NextProtos = []string{"http/1.1"}
	c := tls.Client(raw, config)
	r, err := http.NewRequest(http.MethodPost, "https://example.com"+dohPath, bytes.NewReader(p))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", dnsMessage)
	if err := r.Write(c); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	m := new(dns.Msg)
	return m, m.Unpack(body)
}

// browser returns an HTTP client from an address, of HTTP/2 if two is set.
func browser(t *testing.T, from string, config *tls.Config, two bool) *http.Client {
	t.Helper()
	config = config.Clone()
	config.NextProtos = nil
	tr := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: two,
		DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext}
	if !two {
		tr.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

func TestHTTPSAnswersAsUDPDoes(t *testing.T) {
	o := newOrigin(t, "api.ok.test. 300 IN A 192.0.2.1", "api.ok.test. 60 IN A 192.0.2.2", soa)
	b, trust := startSecure(t, Config{Cache: Cache{Size: mib}}, o)
	url := "https://" + b.server.HTTPSAddrs()[0].String() + dohPath
	for _, two := range []bool{false, true} {
		for _, tt := range []struct {
			from, name, cache string
			rcode, records    int
		}{
			{alice, "api.ok.test.", "private, max-age=60", dns.RcodeSuccess, 2},
			{alice, "api.ok.test.", "private, max-age=60", dns.RcodeSuccess, 2},
			{alice, "none.cdn.test.", "private, max-age=60", dns.RcodeNameError, 0},
			{alice, "evil.test.", "no-store", dns.RcodeRefused, 0},
			{bob, "api.ok.test.", "no-store", dns.RcodeRefused, 0},
		} {
			q := withEDNS(question(tt.name, dns.TypeA))
			q.Id = 0
			q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_PADDING{Padding: make([]byte, 20)}}
			p, err := q.Pack()
			if err != nil {
				t.Fatal(err)
			}
			client := browser(t, tt.from, trust, two)
			get, err := client.Get(url + "?dns=" + base64.RawURLEncoding.EncodeToString(p))
			if err != nil {
				t.Fatal(err)
			}
			post, err := client.Post(url, dnsMessage, bytes.NewReader(p))
			if err != nil {
				t.Fatal(err)
			}
			for _, resp := range []*http.Response{get, post} {
				body, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				m := new(dns.Msg)
				if err != nil || m.Unpack(body) != nil {
					t.Fatalf("%s: %v %x", resp.Status, err, body)
				}
				if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != dnsMessage || len(body)%468 != 0 || (resp.ProtoMajor == 2) != two {
					t.Errorf("%s %s: %s of %d bytes, %v", resp.Proto, tt.name, resp.Status, len(body), resp.Header)
				}
				if m.Rcode != tt.rcode || len(m.Answer) != tt.records || m.Id != 0 {
					t.Errorf("%s from %s: %v", tt.name, tt.from, m)
				}
				age, want := resp.Header.Get("Cache-Control"), tt.cache
				if age != want && age != strings.Replace(want, "60", "59", 1) && age != strings.Replace(want, "60", "58", 1) && age != strings.Replace(want, "60", "57", 1) {
					t.Errorf("%s from %s: Cache-Control %q, want %q or a little less", tt.name, tt.from, age, want)
				}
			}
			if ev := b.events.of(t, tt.from, strings.TrimSuffix(tt.name, ".")+" A"); ev.Listener != "dns_https" || ev.RCode != dns.RcodeToString[tt.rcode] {
				t.Errorf("event %+v", ev)
			}
		}
	}
}

// doh returns a request as net/http hands it to a handler.
func dohRequest(method, target, kind, body string) *http.Request {
	r := httptest.NewRequest(method, "https://example.com/", strings.NewReader(body))
	r.URL.Path, r.URL.RawQuery, _ = strings.Cut(target, "?")
	if kind != "" {
		r.Header.Set("Content-Type", kind)
	}
	return r
}

func TestHTTPSRequests(t *testing.T) {
	p, err := question("evil.test.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	w, text := newTestWeb(t, Config{Decider: people, Upstreams: []string{"127.0.0.1:9"}}), base64.RawURLEncoding.EncodeToString(p)
	long := strings.Repeat("x", maxDoHQuery+1)
	response := bytes.Clone(p)
	response[2] |= 0x80
	for _, tt := range []struct {
		name, method, target, kind, body string
		want                             int
	}{
		{"GET", "GET", "/dns-query?dns=" + text, "", "", 200},
		{"GET with another variable", "GET", "/dns-query?ct=x&dns=" + text, "", "", 200},
		{"POST", "POST", "/dns-query", dnsMessage, string(p), 200},
		{"POST with a parameter", "POST", "/dns-query", "Application/DNS-Message; charset=x", string(p), 200},
		{"a query that is malformed DNS", "POST", "/dns-query", dnsMessage, string(p[:len(p)-1]), 200},
		{"another path", "GET", "/?dns=" + text, "", "", 404},
		{"a path below", "GET", "/dns-query/x?dns=" + text, "", "", 404},
		{"HEAD", "HEAD", "/dns-query?dns=" + text, "", "", 405},
		{"PUT", "PUT", "/dns-query", dnsMessage, string(p), 405},
		{"GET without dns", "GET", "/dns-query", "", "", 400},
		{"GET with two", "GET", "/dns-query?dns=" + text + "&dns=" + text, "", "", 400},
		{"GET in the wrong alphabet", "GET", "/dns-query?dns=" + text + "+/", "", "", 400},
		{"GET with a line break", "GET", "/dns-query?dns=" + text[:4] + "%0A" + text[4:], "", "", 400},
		{"GET with bad escapes", "GET", "/dns-query?dns=%zz", "", "", 400},
		{"GET with too little", "GET", "/dns-query?dns=AAAA", "", "", 400},
		{"GET with too much", "GET", "/dns-query?dns=" + strings.Repeat("A", 6000), "", "", 414},
		{"POST of another type", "POST", "/dns-query", "application/dns-json", string(p), 415},
		{"POST without a type", "POST", "/dns-query", "", string(p), 415},
		{"POST with too much", "POST", "/dns-query", dnsMessage, long, 413},
		{"POST with nothing", "POST", "/dns-query", dnsMessage, "", 400},
		{"a response", "POST", "/dns-query", dnsMessage, string(response), 400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rec := httptest.NewRecorder()
			w.ServeHTTP(rec, inFrom(w, dohRequest(tt.method, tt.target, tt.kind, tt.body)))
			if rec.Code != tt.want {
				t.Errorf("%d %s, want %d", rec.Code, rec.Body, tt.want)
			}
			if h := rec.Header(); tt.want != 200 && h.Get("Cache-Control") != "no-store" || tt.want == 405 && h.Get("Allow") != "GET, POST" {
				t.Errorf("header %v", h)
			}
		})
	}
	coded := dohRequest("POST", "/dns-query", dnsMessage, string(p))
	coded.Header.Set("Content-Encoding", "gzip")
	rec := httptest.NewRecorder()
	if w.ServeHTTP(rec, inFrom(w, coded)); rec.Code != 415 {
		t.Errorf("with a content coding: %d", rec.Code)
	}
	w.s.inFlight.Store(maxInFlight)
	rec = httptest.NewRecorder()
	if w.ServeHTTP(rec, inFrom(w, dohRequest("POST", "/dns-query", dnsMessage, string(p)))); rec.Code != 200 {
		t.Errorf("what is answered at once is not: %d", rec.Code)
	}
	if p, err = question("api.ok.test.", dns.TypeA).Pack(); err != nil {
		t.Fatal(err)
	}
	rec = httptest.NewRecorder()
	if w.ServeHTTP(rec, inFrom(w, dohRequest("POST", "/dns-query", dnsMessage, string(p)))); rec.Code != 503 || rec.Header().Get("Retry-After") == "" {
		t.Errorf("with too much under way: %d %v", rec.Code, rec.Header())
	}
	if n := w.s.inFlight.Load(); n != maxInFlight {
		t.Errorf("%d queries under way are left over", n-maxInFlight)
	}
}

// newTestWeb returns a web without a listener.
func newTestWeb(t testing.TB, c Config) *web {
	t.Helper()
	return NewServer(newResolver(t, c, nil)).web
}

// inFrom gives r the connection that it has come in by, from alice.
func inFrom(w *web, r *http.Request) *http.Request {
	c := &conn{Conn: new(stalled), conns: &w.s.secureConns, client: netip.MustParseAddrPort(alice + ":4711")}
	return r.WithContext(context.WithValue(r.Context(), connKey{}, c))
}

// A header that is too long is answered 431, a request of HTTP/1.0 or without TLS not as DNS.
func TestHTTPSBoundsHeaders(t *testing.T) {
	b, trust := startSecure(t, Config{}, newOrigin(t))
	for _, two := range []bool{false, true} {
		r, err := http.NewRequest("GET", "https://"+b.server.HTTPSAddrs()[0].String()+dohPath, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Long", strings.Repeat("x", maxDoHRequest+9<<10))
		resp, err := browser(t, alice, trust, two).Do(r)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode != 431 {
				t.Errorf("HTTP/2 %v: %s", two, resp.Status)
			}
		} else if !two { // HTTP/2 may end the connection
			t.Error(err)
		}
	}
}

func TestFreshness(t *testing.T) {
	rr := func(texts ...string) (rrs []dns.RR) { return parseRRs(t, texts) }
	for _, tt := range []struct {
		name       string
		rcode      int
		answer, ns []dns.RR
		want       string
	}{
		{"the shortest", 0, rr("a.test. 300 IN CNAME b.test.", "b.test. 20 IN A 192.0.2.1"), nil, "private, max-age=20"},
		{"nothing there", 0, nil, rr("test. 60 IN SOA a.test. b.test. 1 2 3 4 60"), "private, max-age=60"},
		{"no such name", dns.RcodeNameError, nil, rr("test. 61 IN SOA a.test. b.test. 1 2 3 4 60"), "private, max-age=61"},
		{"refused", dns.RcodeRefused, nil, nil, "no-store"},
		{"failed", dns.RcodeServerFailure, rr("b.test. 20 IN A 192.0.2.1"), nil, "no-store"},
		{"no records", 0, nil, nil, "no-store"},
		{"for the moment", 0, rr("b.test. 0 IN A 192.0.2.1"), nil, "private, max-age=0"},
	} {
		m := withEDNS(question("a.test.", dns.TypeA))
		m.Rcode, m.Answer, m.Ns = tt.rcode, tt.answer, tt.ns
		p, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		if got := freshness(p); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// FuzzDoH has arbitrary requests answered: nothing crashes, what is 200 is a DNS message that
// answers the query, and everything else is no answer at all.
func FuzzDoH(f *testing.F) {
	p, err := withEDNS(question("api.ok.test.", dns.TypeA)).Pack()
	if err != nil {
		f.Fatal(err)
	}
	text := base64.RawURLEncoding.EncodeToString(p)
	f.Add("GET", "/dns-query?dns="+text, "", []byte(nil))
	f.Add("POST", "/dns-query", dnsMessage, p)
	f.Add("GET", "/dns-query?dns="+text+"&dns=%41", "", []byte("x"))
	f.Add("POST", "/dns-query", "text/plain; =", p[:5])
	f.Add("POST", "/dns-query", dnsMessage, make([]byte, maxDoHQuery+1))
	w := newTestWeb(f, Config{Decider: people, Cache: Cache{Size: mib}, Upstreams: []string{"192.0.2.53"}, Now: newClock().now})
	w.s.resolver.pool.ups.Store(&[]*upstream{{exchanger: onlyListed{f}, text: "canned"}})
	f.Fuzz(func(t *testing.T, method, target, kind string, body []byte) {
		r := dohRequest("GET", target, kind, string(body))
		r.Method = method
		packet, status := readDoH(httptest.NewRecorder(), dohRequestAgain(r, body))
		rec := httptest.NewRecorder()
		w.ServeHTTP(rec, inFrom(w, r))
		if (rec.Code == 200) != (rec.Header().Get("Content-Type") == dnsMessage) {
			t.Fatalf("%d with %v", rec.Code, rec.Header())
		}
		if rec.Code != 200 {
			if rec.Code < 400 {
				t.Fatalf("status %d", rec.Code)
			}
			return
		}
		if status != 200 || len(packet) > maxDoHQuery {
			t.Fatalf("%d for what is %d, a query of %d bytes", rec.Code, status, len(packet))
		}
		checkAnswer(t, packet, rec.Body.Bytes())
		if c := rec.Header().Get("Cache-Control"); c != "no-store" && !strings.HasPrefix(c, "private, max-age=") || rec.Header().Get("Content-Length") != fmt.Sprint(rec.Body.Len()) {
			t.Fatalf("header %v", rec.Header())
		}
	})
}

// dohRequestAgain returns r with its body unread.
func dohRequestAgain(r *http.Request, body []byte) *http.Request {
	again := r.Clone(r.Context())
	again.Body = io.NopCloser(bytes.NewReader(body))
	return again
}
