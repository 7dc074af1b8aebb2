//go:build !linux

package proxy

import (
	"context"
	"errors"
	"io"
	"net"
)

// Lanes need epoll: elsewhere there are none.
type lane struct{}

func (*lane) closeDoors() {}
func (*lane) cutAll()     {}
func (*lane) stop()       {}

func (*lane) dialExchange(context.Context, string, string) (net.Conn, error) {
	return nil, errors.ErrUnsupported
}

type visit struct{}

func (*visit) decline() {}

func (*visit) relayRest(*exchange, io.Reader, []byte) (int64, error) { return 0, errors.ErrUnsupported }
func (*visit) copyRest(*exchange, io.Reader, []byte) (int64, error)  { return 0, errors.ErrUnsupported }

func (c *clientConn) lane() *lane { return nil }

type passage struct{}

func (*passage) cut(*tunnel) {}

func (s *Server) useLanes(net.Listener) bool { return false }
func (s *Server) startLanes()                {}
func (s *Server) eachLane(func(*lane))       {}
func (s *Server) inLanes() int               { return 0 }
