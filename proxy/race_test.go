//go:build race

package proxy

const raceEnabled = true // memory is not what it is without the detector
