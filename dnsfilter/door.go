package dnsfilter

// A door is the way that a query came in by.
type door uint8

// The doors. What comes in by all but the first is encrypted.
const (
	doorDNS   door = iota // UDP and TCP
	doorTLS               // RFC 7858
	doorHTTPS             // RFC 8484
)

// String returns the door as events have it: Event.Listener.
func (d door) String() string {
	switch d {
	case doorTLS:
		return "dns_tls"
	case doorHTTPS:
		return "dns_https"
	}
	return "dns"
}

// secret reports whether what goes through d is encrypted, so that answers are worth padding.
func (d door) secret() bool { return d != doorDNS }
