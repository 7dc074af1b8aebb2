//go:build !linux

package proxy

import "net"

// Lanes need epoll: elsewhere there are none.
type lane struct{}

func (*lane) closeDoors() {}
func (*lane) cutAll()     {}
func (*lane) stop()       {}

type passage struct{}

func (*passage) cut(*tunnel) {}

func (s *Server) useLanes(net.Listener) bool { return false }
func (s *Server) startLanes()                {}
func (s *Server) eachLane(func(*lane))       {}
func (s *Server) inLanes() int               { return 0 }
