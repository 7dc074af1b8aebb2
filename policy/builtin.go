package policy

import "net/netip"

// builtinNames are denied unless an allow rule names them exactly: a wildcard such
// as *.internal is seldom meant to hand out the credentials of the machine.
var builtinNames = []struct {
	id       string
	patterns []string
}{
	{"builtin:cloud-metadata", []string{
		"metadata.google.internal", "metadata.goog", "metadata", // Google Cloud
		"instance-data.ec2.internal", "instance-data", // Amazon EC2
		"metadata.azure.internal", "metadata.tencentyun.com", "metadata.platformequinix.com",
	}},
	// A resolver of the network answers these to say that encrypted DNS and relays
	// around it are unwanted (Mozilla's canary domain; RFC 9462, section 4; Apple's
	// iCloud Private Relay).
	{"builtin:encrypted-dns", []string{
		"use-application-dns.net", ".resolver.arpa", "mask.icloud.com", "mask-h2.icloud.com",
	}},
}

// platformAddresses are where clouds serve credentials and control to every
// machine. private_destinations must name such an address itself; a prefix around
// it is not enough.
var platformAddresses = []netip.Addr{
	netip.MustParseAddr("169.254.169.254"), // metadata of nearly every cloud
	netip.MustParseAddr("169.254.170.2"),   // Amazon ECS task credentials
	netip.MustParseAddr("169.254.170.23"),  // Amazon EKS pod identity
	netip.MustParseAddr("fd00:ec2::254"),   // Amazon EC2 over IPv6
	netip.MustParseAddr("fd00:ec2::23"),    // Amazon EKS pod identity over IPv6
	netip.MustParseAddr("fd20:ce::254"),    // Google Cloud over IPv6
	netip.MustParseAddr("100.100.100.200"), // Alibaba Cloud
	netip.MustParseAddr("192.0.0.192"),     // Oracle Cloud, classic
	netip.MustParseAddr("168.63.129.16"),   // Azure platform
}
