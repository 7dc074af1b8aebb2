# A VPC whose instances get the gates as their resolvers. One gate in each
# availability zone; both enforce the same policy, so the order does not matter.
#
# The VPC's own resolver stays reachable at the second address of the VPC and at
# 169.254.169.253, whatever security groups say: a program that asks it directly
# gets an answer. Close that with a Route 53 Resolver DNS Firewall rule group that
# blocks everything for this VPC (sallyport's upstreams then must not be that
# resolver), or turn enable_dns_support off. Names resolved that way still meet
# the proxy, and the firewall rule that leaves it the only way out.

variable "vpc_id" {
  type = string
}

variable "gate_addresses" {
  type        = list(string)
  description = "private addresses of the machines that run sallyport"
}

resource "aws_vpc_dhcp_options" "egress" {
  domain_name_servers = var.gate_addresses
  # Time comes from the link-local server, which needs no way out.
  ntp_servers = ["169.254.169.123"]
  tags        = { Name = "egress-gate" }
}

resource "aws_vpc_dhcp_options_association" "egress" {
  vpc_id          = var.vpc_id
  dhcp_options_id = aws_vpc_dhcp_options.egress.id
}
