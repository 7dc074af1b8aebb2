//go:build !linux

package proxy

// canProbe says that silent can tell. Here it cannot, and http.Transport carries all.
const canProbe = false

func (c *upstreamConn) silent() bool { return false }
