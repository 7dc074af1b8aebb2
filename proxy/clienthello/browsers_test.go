package clienthello

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"

	utls "github.com/refraction-networking/utls"
)

const browserName = "api.ok.test"

// browserHellos returns ClientHello messages as browsers send them, to
// browserName. Keys, GREASE and the order of extensions change at each call.
func browserHellos(tb testing.TB) map[string][]byte {
	tb.Helper()
	hellos := make(map[string][]byte)
	for _, id := range []utls.ClientHelloID{
		utls.HelloFirefox_55, utls.HelloFirefox_56, utls.HelloFirefox_63, utls.HelloFirefox_65,
		utls.HelloFirefox_99, utls.HelloFirefox_102, utls.HelloFirefox_105, utls.HelloFirefox_120,
		utls.HelloChrome_58, utls.HelloChrome_62, utls.HelloChrome_70, utls.HelloChrome_72,
		utls.HelloChrome_83, utls.HelloChrome_87, utls.HelloChrome_96, utls.HelloChrome_100,
		utls.HelloChrome_102, utls.HelloChrome_106_Shuffle, utls.HelloChrome_115_PQ, utls.HelloChrome_120,
		utls.HelloChrome_120_PQ, utls.HelloChrome_131, utls.HelloChrome_133,
		utls.HelloIOS_11_1, utls.HelloIOS_12_1, utls.HelloIOS_13, utls.HelloIOS_14,
		utls.HelloAndroid_11_OkHttp, utls.HelloEdge_85, utls.HelloEdge_106, utls.HelloSafari_16_0,
		utls.Hello360_7_5, utls.Hello360_11_0, utls.HelloQQ_11_1,
	} {
		client, server := net.Pipe()
		conn := utls.UClient(client, &utls.Config{ServerName: browserName}, id)
		err := conn.BuildHandshakeState()
		client.Close()
		server.Close()
		if err != nil {
			tb.Fatalf("utls: %s: %v", id.Str(), err)
		}
		hellos[id.Str()] = conn.HandshakeState.Hello.Raw
	}
	hellos["Go"] = goHello(tb)
	return hellos
}

// goHello returns the ClientHello message of crypto/tls.
func goHello(tb testing.TB) []byte {
	tb.Helper()
	conn := &memoryConn{}
	config := &tls.Config{ServerName: browserName, NextProtos: []string{"h2"}}
	if err := tls.Client(conn, config).Handshake(); !errors.Is(err, io.EOF) {
		tb.Fatal(err)
	}
	return conn.written.Bytes()[recordHeaderLen:]
}

// A memoryConn is a peer that has said all it will say, and keeps what it is told.
type memoryConn struct {
	net.Conn // nil: what is not overridden is not called
	unread   bytes.Reader
	written  bytes.Buffer
}

func (c *memoryConn) Read(p []byte) (int, error)  { return c.unread.Read(p) }
func (c *memoryConn) Write(p []byte) (int, error) { return c.written.Write(p) }
func (c *memoryConn) Close() error                { return nil }

func TestBrowsers(t *testing.T) {
	tests := []struct {
		client string
		want   view
	}{
		{"Chrome-58", view{browserName, 0x0303, false, false, "h2 http/1.1"}},
		{"Chrome-102", view{browserName, 0x0304, false, false, "h2 http/1.1"}},
		{"Chrome-115_PQ", view{browserName, 0x0304, false, true, "h2 http/1.1"}},
		{"Chrome-120", view{browserName, 0x0304, true, false, "h2 http/1.1"}},
		{"Chrome-120_PQ", view{browserName, 0x0304, true, true, "h2 http/1.1"}},
		{"Chrome-131", view{browserName, 0x0304, true, true, "h2 http/1.1"}},
		{"Chrome-133", view{browserName, 0x0304, true, true, "h2 http/1.1"}},
		{"Firefox-55", view{browserName, 0x0303, false, false, "h2 http/1.1"}},
		{"Firefox-105", view{browserName, 0x0304, false, false, "h2 http/1.1"}},
		{"Firefox-120", view{browserName, 0x0304, true, false, "h2 http/1.1"}},
		{"Safari-16.0", view{browserName, 0x0304, false, false, "h2 http/1.1"}},
		{"Go", view{browserName, 0x0304, false, true, "h2"}},
		{"Android-11", view{browserName, 0x0303, false, false, ""}},
	}
	hellos := browserHellos(t)
	for _, tt := range tests {
		t.Run(tt.client, func(t *testing.T) {
			h, _, err := Parse(inRecord(hellos[tt.client]), 0)
			if err != nil || viewOf(h) != tt.want {
				t.Errorf("Parse = %+v, %v; want %+v", viewOf(h), err, tt.want)
			}
		})
	}
}
