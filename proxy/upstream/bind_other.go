//go:build !linux

package upstream

import "syscall"

func bindLate(syscall.RawConn) error { return nil }
