package metrics

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/policy/event"
)

// PolicyStats are facts of the policy in force.
type PolicyStats struct {
	Groups, Rules, Names int
	LoadedAt             time.Time // when it came into force; zero: there is none
	LastGood             bool      // it is the copy of the last good one
	NextExpiry           time.Time // when the next rule expires; zero: none does
	Observing            []Observing
}

// Observing is a group in mode observe.
type Observing struct {
	Group string
	Until time.Time // from when on it enforces, or has enforced
}

// What can be reloaded, as Config events name it.
var reloadables = [...]string{"policy", "settings", "users", "certificates", "admin"}

// reloads counts attempts to reload, by what and whether it went well.
type reloads [len(reloadables) + 1][2]atomic.Uint64

func (r *reloads) count(ev *event.Event) {
	failed := 0
	if ev.Error != "" {
		failed = 1
	}
	r[indexOf(reloadables[:], ev.Name)][failed].Add(1)
}

func (r *reloads) collect(counter emit) {
	for what := range r {
		ok, failed := r[what][0].Load(), r[what][1].Load()
		if what == len(reloadables) && ok+failed == 0 {
			continue
		}
		counter(reloadsDesc, ok, label(reloadables[:], what), "ok")
		counter(reloadsDesc, failed, label(reloadables[:], what), "failed")
	}
}

var (
	reloadsDesc      = desc("reloads_total", "Attempts to reload while the program ran.", "what", "result")
	groupsDesc       = desc("policy_groups", "Groups of the policy in force.")
	rulesDesc        = desc("policy_rules", "Rules of the policy in force; the bare names of a section are one.")
	namesDesc        = desc("policy_names", "Name patterns of the policy in force.")
	loadedDesc       = desc("policy_loaded_timestamp_seconds", "When the policy in force came into force, in Unix time.")
	lastGoodDesc     = desc("policy_last_good", "Whether the policy in force is the copy of the last good one, for its source could not be used.")
	nextExpiryDesc   = desc("policy_next_expiry_timestamp_seconds", "When the next rule expires, in Unix time.")
	observeUntilDesc = desc("group_observe_until_timestamp_seconds", "When a group in mode observe begins to enforce, in Unix time; it may have begun.", "group")
)

func (s *PolicyStats) collect(gauge emitGauge) {
	gauge(groupsDesc, float64(s.Groups))
	gauge(rulesDesc, float64(s.Rules))
	gauge(namesDesc, float64(s.Names))
	if !s.LoadedAt.IsZero() {
		gauge(loadedDesc, unix(s.LoadedAt))
	}
	gauge(lastGoodDesc, truth(s.LastGood))
	if !s.NextExpiry.IsZero() {
		gauge(nextExpiryDesc, unix(s.NextExpiry))
	}
	for _, o := range s.Observing {
		gauge(observeUntilDesc, unix(o.Until), o.Group)
	}
}

type emitGauge func(d *prometheus.Desc, v float64, labels ...string)

// unix is t in seconds since 1970.
func unix(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

// truth is 1 for yes.
func truth(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}
