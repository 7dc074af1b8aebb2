package admin

import (
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// A lockedBuffer is a log that a test reads.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestRefusedAreCountedAndLogged has somebody guess, whom the log must show but once.
func TestRefusedAreCountedAndLogged(t *testing.T) {
	var out lockedBuffer
	url, s := serveServer(t, Config{API: fullAPI(), Credentials: Credentials{Token: token}, Logger: zerolog.New(&out)})
	for range 50 {
		request(t, "GET", url+"/api/v1/status", "Authorization", "Bearer guess<b>")
		request(t, "GET", url+"/api/v1/status", "Authorization", "Basic "+basic("eve\n", ""))
		request(t, "GET", url+"/api/v1/status")
		request(t, "GET", url+"/api/v1/status", "Host", "evil.test")
		request(t, "GET", url+"/api/v1/status", "Origin", "null")
		ask(t, "POST", url+"/api/v1/drain")
	}
	if resp, _ := ask(t, "GET", url+"/healthz"); resp.StatusCode != 200 {
		t.Error(resp.StatusCode)
	}
	got := s.Refused()
	for why, want := range map[string]uint64{"wrong_token": 100, "no_credential": 50, "other_host": 50, "other_origin": 100, "wrong_certificate": 0, "handshake": 0} {
		if got[why] != want {
			t.Errorf("%s: %d, want %d", why, got[why], want)
		}
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	said := map[string]int{}
	for _, line := range lines {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil || strings.Contains(line, "guess") || strings.Contains(line, token) || strings.Contains(line, "\x1b") {
			t.Errorf("%s: %v", line, err)
		}
		reason, _ := m["reason"].(string)
		said[reason]++
	}
	// Generous, for a slow machine takes several of the 10 s.
	if said["wrong_token"] == 0 || said["wrong_token"] > 50 || said["other_host"] == 0 || said["other_origin"] == 0 || said["no_credential"] > 0 {
		t.Errorf("%v\n%s", said, out.String())
	}
}

// TestRefusedCertificate has a stranger show a certificate in the handshake.
func TestRefusedCertificate(t *testing.T) {
	later := time.Now().Add(time.Hour)
	ca, other, server := certificate(t, "operators", nil, later), certificate(t, "others", nil, later), certificate(t, "gate", nil, later)
	pool, roots := x509.NewCertPool(), x509.NewCertPool()
	pool.AddCert(ca.Leaf)
	roots.AddCert(server.Leaf)
	var out lockedBuffer
	url, s := serveServer(t, Config{API: fullAPI(), Credentials: Credentials{Certificate: &server, ClientCAs: pool}, Logger: zerolog.New(&out)})
	eve := certificate(t, "eve", &other, later)
	tr := &http.Transport{TLSClientConfig: &tls.Config{
		RootCAs: roots, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &eve, nil },
	}}
	defer tr.CloseIdleConnections()
	for range 3 {
		resp, err := (&http.Client{Transport: tr}).Get(url + "/api/v1/status")
		if err == nil {
			resp.Body.Close()
			t.Errorf("%d", resp.StatusCode)
		}
	}
	for range 1000 { // the server may learn of it later
		if s.Refused()["wrong_certificate"] == 3 {
			break
		}
		time.Sleep(10 * time.Millisecond) // pace: of looking
	}
	if got := s.Refused(); got["wrong_certificate"] != 3 {
		t.Errorf("%v", got)
	}
	if n := strings.Count(out.String(), "wrong_certificate"); n < 1 {
		t.Errorf("logged %d times: %s", n, out.String())
	}
}

func TestCompressedAnswers(t *testing.T) {
	api := fullAPI()
	api.Policy = func() (*PolicyDetail, error) {
		return &PolicyDetail{Groups: make([]GroupDetail, 1000)}, nil
	}
	s := New(Config{API: api, Metrics: http.NotFoundHandler()})
	get := func(path, accept string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("GET", "http://localhost"+path, nil)
		r.Header.Set("Accept-Encoding", accept)
		rec := httptest.NewRecorder()
		s.http.Handler.ServeHTTP(rec, r)
		return rec
	}
	plain := get("/api/v1/policy", "")
	for accept, zipped := range map[string]bool{"gzip": true, "br, gzip;q=0.5": true, "": false, "gzip;q=0": false, "br": false} {
		rec := get("/api/v1/policy", accept)
		body := io.Reader(rec.Body)
		if rec.Header().Get("Content-Encoding") == "gzip" != zipped || rec.Header().Get("Vary") != "Accept-Encoding" || rec.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%q: %v", accept, rec.Header())
			continue
		}
		if zipped {
			if rec.Body.Len()*5 > plain.Body.Len() {
				t.Errorf("%d of %d bytes", rec.Body.Len(), plain.Body.Len())
			}
			z, err := gzip.NewReader(body)
			if err != nil {
				t.Fatal(err)
			}
			body = z
		}
		if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, plain.Body.Bytes()) {
			t.Errorf("%q: %d bytes, %v", accept, len(got), err)
		}
	}
	if rec := get("/api/v1/nothing", "gzip"); rec.Header().Get("Content-Encoding") != "" {
		t.Error("a small answer is compressed")
	}
	if rec := get("/api/v1/policy?x=1", "gzip"); rec.Code != http.StatusBadRequest || rec.Header().Get("Content-Encoding") != "" {
		t.Errorf("%d %v", rec.Code, rec.Header())
	}
}
