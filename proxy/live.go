package proxy

import (
	"net/netip"
	"slices"
	"time"

	"sallyport/policy"
)

// A LiveTunnel is a tunnel as it is now.
type LiveTunnel struct {
	ID          string // as in X-Sallyport-Id and in the event to come
	Source      netip.AddrPort
	User        string // "": nobody has proved who he is
	Group, Rule string // of the decision that set it up
	Name        string // as the client wrote it
	Port        uint16
	Destination netip.AddrPort // address dialled; of a parent, if there is one
	Since       time.Time
	BytesUp     int64 // so far
	BytesDown   int64
}

// listBatch is how many tunnels are copied under the lock that new tunnels wait for.
const listBatch = 256

// LiveTunnels returns the newest tunnels, newest first and limit at most, and how many
// there are.
func (s *Server) LiveTunnels(limit int) ([]LiveTunnel, int) {
	var all []*tunnel
	s.tunnels.each(func(t *tunnel) { all = append(all, t) })
	slices.SortFunc(all, func(a, b *tunnel) int { return b.ev.Time.Compare(a.ev.Time) }) // which never changes
	live := []LiveTunnel{}
	for batch := range slices.Chunk(all, listBatch) {
		if len(live) >= limit {
			break
		}
		live = s.tunnels.appendLive(live, batch)
	}
	return live[:min(limit, len(live))], len(all)
}

// appendLive copies those of batch that have not ended. Their owners change events
// only after they have taken them out.
func (ts *tunnels) appendLive(live []LiveTunnel, batch []*tunnel) []LiveTunnel {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for _, t := range batch {
		if _, there := ts.live[t]; !there {
			continue
		}
		ev := &t.ev
		live = append(live, LiveTunnel{
			ID: ev.ID, Source: ev.Source, User: ev.User, Group: ev.Decision.Group, Rule: ev.Decision.Rule,
			Name: ev.Name, Port: ev.Port, Destination: ev.Destination, Since: ev.Time,
			BytesUp: t.up.Load(), BytesDown: t.down.Load(),
		})
	}
	return live
}

// byOperator stands in tunnel.revoked for an operator who has closed it.
var byOperator = new(policy.Decision)

// closedByOperator is the error of such a tunnel's event, which keeps its decision.
const closedByOperator = "closed by an operator"

// CloseTunnel closes the tunnel with an ID, as a policy that revokes it would, and
// reports whether there is one. Its event comes when its owner has noticed.
func (s *Server) CloseTunnel(id string) bool {
	found := false
	s.tunnels.each(func(t *tunnel) {
		if t.ev.ID == id { // which never changes
			found = true
			t.revoked.CompareAndSwap(nil, byOperator)
			t.cut()
		}
	})
	return found
}
