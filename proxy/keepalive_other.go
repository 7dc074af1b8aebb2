//go:build !linux

package proxy

import "net"

// listenConfig returns how the proxy listens.
func listenConfig() *net.ListenConfig { return &net.ListenConfig{KeepAliveConfig: keepAlive} }
