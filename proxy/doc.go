// Package proxy is the explicit forward proxy: CONNECT with a look at the TLS
// ClientHello, and plain HTTP.
//
// One CONNECT, in this order:
//
//	who asks          the peer, or from a load balancer its PROXY header (asker.go)
//	rate              of new connections; too many are refused after the head (rate.go)
//	request head      read strictly, under a deadline and a size bound (front.go, head.go)
//	who asks          credentials or a certificate, if there are any (credentials.go, tlsfront.go)
//	target            parsed; Decide on name and port, before any DNS query
//	limits, loop      a place among the tunnels; never back to this proxy
//	addresses         resolved once; Decide on each (reach.go)
//	connection        to one of the addresses that passed, and no other
//	200               only now: a far side that fails is a truthful 502 or 504
//	first bytes       ClientHello, HTTP, or something else; Decide on that
//	relay             the bytes seen, unchanged, then both ways (tunnel.go)
//	event             one, at the end
//
// A connection that starts with another method goes on to net/http and from there
// through goproxy, every request decided on its own (forward.go). So does HTTP
// inside a CONNECT, with the authority fixed. A CONNECT that arrives on such a
// connection later is taken back from net/http by Hijack, with the bytes that
// were buffered, and goes the way above.
//
// Clients may speak TLS to the proxy (tlsfront.go). With HTTP/1.1 such a connection
// is like any other; with HTTP/2 each stream is a connection of its own (http2.go,
// stream.go).
//
// net/http serves a connection from its first head that is not CONNECT, but reads
// through a framing (framing.go): one strict parser sees every head, and the framing
// follows every body to its end. net/http gets one message at a time, and the head
// of each as a whole once it is in order, so that it cannot see a request where we
// see none. Responses go the same way in the other direction (response.go).
// Everything is written anew to the far side in one unambiguous form.
//
// A new policy visits what outlives a decision: tunnels (tunnel.go) and the exchanges
// under way on connections of net/http (revoke.go).
//
// # What is not protected against
//
// What happens inside TLS: an HTTP host other than the server name, a name hidden
// in an encrypted ClientHello that a rule allows, a second ClientHello after a
// HelloRetryRequest.
package proxy
