package upstream

import (
	"context"
	"net"
	"net/netip"
)

// Through returns a Dialer like d that makes each connection by calling connect
// instead of opening a TCP connection: another network than the host's, such as
// one in memory. connect is given an address that was checked, and must connect
// there and nowhere else; the bound on the time is its context.
func (d Dialer) Through(connect func(context.Context, netip.AddrPort) (net.Conn, error)) Dialer {
	d.connect = connect
	return d
}
