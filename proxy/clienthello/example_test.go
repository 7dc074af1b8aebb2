package clienthello_test

import (
	"errors"
	"fmt"
	"net"
	"time"

	"sallyport/proxy/clienthello"
)

// A proxy reads the hello under a deadline, decides, and forwards raw as it is.
func ExampleRead() {
	client, conn := net.Pipe()
	defer conn.Close()
	go func() {
		client.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		client.Close()
	}()

	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	hello, raw, err := clienthello.Read(conn, make([]byte, 0, 4096), clienthello.DefaultLimit)
	switch {
	case errors.Is(err, clienthello.ErrNotTLS):
		fmt.Printf("not TLS: %q\n", raw)
	case err != nil:
		fmt.Println("refused:", err)
	case hello.ServerName == "":
		fmt.Println("no server name")
	default:
		fmt.Println("asks for", hello.ServerName)
	}
	// Output: not TLS: "GET / HTTP/1.1\r\n\r\n"
}
