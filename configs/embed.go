// Package configs holds the configuration that the program carries inside it, and
// annotated examples beside it.
package configs

import _ "embed"

//go:generate go test -run TestSchemas -update .

// Settings is sallyport.yaml: the value of every setting that nothing else sets.
//
//go:embed sallyport.yaml
var Settings []byte

// Policy is policy.yaml: the starter policy, which serves loopback alone.
//
//go:embed policy.yaml
var Policy []byte
