package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// world is everything outside the gate: origins and an authoritative DNS server,
// all on loopback addresses.
type world struct {
	caFile    string // PEM of the CA that signed the TLS origin's certificate
	tlsPort   int
	httpPort  int
	echoPort  int // a TCP service that speaks first and then echoes
	dns       string
	hits      atomic.Int64 // requests that reached the HTTP and TLS origins
	questions atomic.Int64 // queries below test that reached the DNS server
}

// originAddr is where every listed name lives.
const originAddr = "127.0.0.10"

func newWorld(t *testing.T) *world {
	w := &world{}
	handler := http.HandlerFunc(w.serveHTTP)

	cert, caPEM := newCertificate(t)
	w.caFile = t.TempDir() + "/ca.pem"
	if err := os.WriteFile(w.caFile, caPEM, 0o644); err != nil {
		t.Fatal(err)
	}
	l := listen(t, originAddr+":0")
	w.tlsPort = l.Addr().(*net.TCPAddr).Port
	serve(t, &http.Server{Handler: handler}, tls.NewListener(l, &tls.Config{
		Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"},
	}))

	l = listen(t, originAddr+":0")
	w.httpPort = l.Addr().(*net.TCPAddr).Port
	serve(t, &http.Server{Handler: handler}, l)

	l = listen(t, originAddr+":0")
	w.echoPort = l.Addr().(*net.TCPAddr).Port
	go acceptEcho(l)

	w.startDNS(t)
	return w
}

func (w *world) serveHTTP(rw http.ResponseWriter, r *http.Request) {
	w.hits.Add(1)
	switch r.URL.Path {
	case "/headers":
		r.Header.Write(rw)
		fmt.Fprintf(rw, "Host: %s\n", r.Host)
	case "/upload":
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(rw, "%d bytes", n)
	case "/big":
		rw.Header().Set("Content-Length", "8388608")
		io.CopyN(rw, zeros{}, 8<<20)
	default:
		fmt.Fprintf(rw, "hello from %s%s", r.Host, r.URL.Path)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func serve(t *testing.T, s *http.Server, l net.Listener) {
	s.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that the gate cut
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
}

// acceptEcho greets each connection, as SSH and SMTP servers do, and then echoes.
func acceptEcho(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.WriteString(c, "220 welcome\r\n")
			io.Copy(c, c)
		}()
	}
}

// startDNS serves the zone "test": every name has an address, some a lying one.
func (w *world) startDNS(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.53:0")
	if err != nil {
		t.Fatal(err)
	}
	w.dns = pc.LocalAddr().String()
	l := listen(t, w.dns)
	mux := dns.HandlerFunc(w.answer)
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: mux}, {Listener: l, Handler: mux}} {
		started, done := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { defer close(done); s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { s.Shutdown(); <-done })
	}
}

func (w *world) answer(rw dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg).SetReply(q)
	name := strings.ToLower(q.Question[0].Name)
	if strings.HasSuffix(name, ".test.") { // not the readiness probe
		w.questions.Add(1)
	}
	add := func(text string) {
		rr, err := dns.NewRR(q.Question[0].Name + " 60 IN " + text)
		if err != nil {
			panic(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	switch q.Question[0].Qtype {
	case dns.TypeA:
		switch name {
		case "rebind.ok.test.":
			add("A 192.168.7.7")
		case "gone.ok.test.":
			m.Rcode = dns.RcodeNameError
		case "alias.ok.test.":
			add("CNAME target.elsewhere.test.")
			rr, _ := dns.NewRR("target.elsewhere.test. 60 IN A " + originAddr)
			m.Answer = append(m.Answer, rr)
		default:
			add("A " + originAddr)
		}
	case dns.TypeHTTPS:
		add(`HTTPS 1 . alpn="h2" ech="AEX+DQBBpQAgACB/"`)
	case dns.TypeTXT:
		add(`TXT "secret"`)
	}
	if len(m.Answer) == 0 {
		soa, _ := dns.NewRR("test. 60 IN SOA ns.test. root.test. 1 60 60 60 60")
		m.Ns = append(m.Ns, soa)
	}
	rw.WriteMsg(m)
}

// newCertificate returns a certificate for every name below ok.test and the PEM of
// the CA that signed it.
func newCertificate(t *testing.T) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "origin"},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		DNSNames: []string{"api.ok.test", "*.ok.test", "*.cdn.test", "evil.test"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: key},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})
}

// dialFrom connects to addr from the source address src.
func dialFrom(t *testing.T, src, addr string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(src), 0)), Timeout: 5 * time.Second}
	c, err := d.DialContext(context.Background(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}
