//go:build !linux

package main

// isFirstThread reports that it does not matter.
func isFirstThread() bool { return false }

// giveWay does nothing: elsewhere threads have no priority of their own.
func giveWay() {}
