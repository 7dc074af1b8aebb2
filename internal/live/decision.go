// Package live shows what a gate is doing now: the newest decisions, as a bounded
// ring that can be read back and followed, and who is seen most, as bounded
// summaries. It is fed by events and never in their way.
package live

import "time"

// A Decision is an event as the admin API shows it. Strings are bounded copies and
// may hold anything that a client sent; JSON escapes it. Keys are those of the log.
type Decision struct {
	Seq        uint64    `json:"seq"` // counts all decisions since the start, from 1
	Time       time.Time `json:"time"`
	Event      string    `json:"event"`
	ID         string    `json:"id"`
	Src        string    `json:"src"`
	SrcPort    uint16    `json:"src_port,omitempty"`
	Group      string    `json:"group"`
	User       string    `json:"user,omitempty"`
	Mode       string    `json:"mode"`
	Listener   string    `json:"listener"`
	Method     string    `json:"method,omitempty"`
	Name       string    `json:"name"`
	Port       uint16    `json:"port,omitempty"`
	SNI        string    `json:"sni,omitempty"`
	QType      string    `json:"qtype,omitempty"`
	RCode      string    `json:"rcode,omitempty"`
	Verdict    string    `json:"verdict"`
	Reason     string    `json:"reason"`
	Rule       string    `json:"rule"`
	Policy     string    `json:"policy"`
	Dst        string    `json:"dst,omitempty"`
	Status     int       `json:"status,omitempty"`
	BytesUp    int64     `json:"bytes_up"`
	BytesDown  int64     `json:"bytes_down"`
	DurationMS float64   `json:"duration_ms"`
	Error      string    `json:"error,omitempty"`
}

// A Filter chooses decisions. Its zero value takes all; a field that is not empty
// wants equality, Name that the name contains it, whatever the case of letters.
type Filter struct {
	Group, Verdict, Reason, Listener string
	Name                             string
}

// By is what talkers are counted by.
type By string

// What [Tally.Top] counts by.
const (
	ByName   By = "name"   // name asked for, whatever became of it
	BySource By = "source" // client address
	ByGroup  By = "group"
	ByDenied By = "denied" // name, of what was denied or is let pass by observing alone
)

// A Talker is one line of a list of the most frequent.
type Talker struct {
	Key       string `json:"key"`
	Group     string `json:"group,omitempty"`   // of the last decision about it
	Reason    string `json:"reason,omitempty"`  // with ByDenied: the last one
	Verdict   string `json:"verdict,omitempty"` // likewise; what passed because its group observes counts as denied
	Count     uint64 `json:"count"`             // decisions, at most Error too many
	Error     uint64 `json:"error"`             // how far Count may be too high (space-saving)
	BytesUp   int64  `json:"bytes_up"`          // since it was last taken into the list
	BytesDown int64  `json:"bytes_down"`
}

// Top is the most frequent, most first.
type Top struct {
	Since   time.Time `json:"since"`   // what it covers begins then
	Skipped uint64    `json:"skipped"` // decisions that came too fast to be counted here
	Talkers []Talker  `json:"talkers"`
}
