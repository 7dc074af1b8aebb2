package dnsfilter

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"

	"sallyport/policy"
)

// refusedTTL of sinkhole addresses, in seconds: short, for a reload may allow the name.
const refusedTTL = 10

// refusal returns the answer to a query that d denies, as denial says.
func refusal(denial Denial, d policy.Decision, q dns.Question) *reply {
	rep := &reply{local: true, ede: dns.ExtendedErrorCodeBlocked, why: d.Reason.String()}
	if prohibits(d.Reason) {
		rep.ede = dns.ExtendedErrorCodeProhibited
	}
	switch denial {
	case DenyNXDomain:
		rep.rcode = dns.RcodeNameError
	case DenyNodata:
	case DenySinkhole:
		switch q.Qtype {
		case dns.TypeA:
			rep.answer = []dns.RR{addressRR(q.Name, netip.IPv4Unspecified(), refusedTTL)}
		case dns.TypeAAAA:
			rep.answer = []dns.RR{addressRR(q.Name, netip.IPv6Unspecified(), refusedTTL)}
		}
	default:
		rep.rcode = dns.RcodeRefused
	}
	return rep
}

// prohibits reports whether it is the source that is refused for reason, rather than
// what it asks for.
func prohibits(reason policy.Reason) bool {
	return reason == policy.ReasonUnmatchedSource || reason == policy.ReasonLimitExceeded
}

// filter removes from rep what req's source may not have: the addresses that do
// not pass as its Destination, and what Config.HTTPSRecords and Config.CNAMEs say.
// It returns the decision on what is left: d, or a denial if nothing of it is.
func (s *Server) filter(rep *reply, req policy.Request, d policy.Decision) policy.Decision {
	if s.cfg.CNAMEs == CNAMEsInspect {
		if denied, ok := s.inspect(rep, req); !ok {
			return denied
		}
	}
	var private policy.Decision // the last denial of an address
	passes := func(a netip.Addr) bool {
		r := req
		r.Destination, r.PrivateZone = a, s.resolver.PrivateZone(r.Name, a)
		got := s.cfg.Decider.Decide(r)
		if !got.Passes() {
			private = got
		}
		return got.Passes()
	}
	if !s.strip(rep, req.QType, passes) {
		return d
	}
	rep.answer, rep.authority = nil, nil
	rep.ede, rep.why = dns.ExtendedErrorCodeBlocked, private.Reason.String()
	return private
}

// strip removes from rep the addresses that do not pass, what Config.HTTPSRecords
// says, and the signatures over what it changed. It reports whether that left
// nothing of the type asked for.
func (s *Server) strip(rep *reply, qtype uint16, passes func(netip.Addr) bool) (emptied bool) {
	var changed []uint16 // types whose signatures no longer hold
	left := false        // something of the type asked for
	rep.answer = slices.DeleteFunc(rep.answer, func(rr dns.RR) bool {
		drop := false
		if a, ok := addressOf(rr); ok {
			drop = !passes(a)
		} else if sb := serviceBinding(rr); sb != nil {
			hints := filterHints(sb, passes)
			ech := s.cfg.HTTPSRecords == HTTPSStripECH && stripECH(sb)
			if hints || ech {
				changed = append(changed, rr.Header().Rrtype)
			}
		}
		if drop {
			changed = append(changed, rr.Header().Rrtype)
		}
		left = left || !drop && rr.Header().Rrtype == qtype
		return drop
	})
	if len(changed) == 0 {
		return false
	}
	rep.ad = false
	rep.answer = slices.DeleteFunc(rep.answer, func(rr dns.RR) bool {
		sig, ok := rr.(*dns.RRSIG)
		return ok && slices.Contains(changed, sig.TypeCovered)
	})
	return !left
}

// inspector returns what says whether the resolver may ask for the name that the
// aliases in an answer to req lead to; nil if it always may.
func (s *Server) inspector(req policy.Request) func(*reply) bool {
	if s.cfg.CNAMEs != CNAMEsInspect {
		return nil
	}
	return func(rep *reply) bool {
		_, ok := s.inspect(rep, req)
		return ok
	}
}

// inspect decides every name that rep leads to. It returns the first denial, if
// there is one, and notes in rep which name it was.
func (s *Server) inspect(rep *reply, req policy.Request) (policy.Decision, bool) {
	for _, rr := range rep.answer {
		target, leads := leadsTo(rr)
		if !leads {
			continue
		}
		if d := s.decide(&req, target); !d.Passes() {
			rep.err = fmt.Errorf("alias to %s: %v", strings.TrimSuffix(target, "."), d.Reason)
			return d, false
		}
	}
	return policy.Decision{}, true
}

// leadsTo returns the name that rr leads to, if it is another than rr's own.
func leadsTo(rr dns.RR) (target string, leads bool) {
	target = targetOf(rr)
	return target, target != "" && target != "." && !strings.EqualFold(target, rr.Header().Name)
}

// targetOf returns the name that rr leads to, "" if it is no alias.
func targetOf(rr dns.RR) string {
	switch rr := rr.(type) {
	case *dns.CNAME:
		return rr.Target
	case *dns.DNAME:
		return rr.Target
	}
	if sb := serviceBinding(rr); sb != nil {
		return sb.Target
	}
	return ""
}
