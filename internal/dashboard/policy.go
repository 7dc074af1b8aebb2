package dashboard

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"sallyport/internal/admin"
	"sallyport/policy"
)

// expiresSoon is how long before its date something is marked.
const expiresSoon = 30 * 24 * time.Hour

// maxNames bounds the names of one rule on the policy page; how many more there are
// is said.
const maxNames = 8

// A mark is a short remark with a colour.
type mark struct{ Class, Text string }

// A ruleRow is a rule on the policy page.
type ruleRow struct {
	admin.RuleDetail
	Effect       string
	From         *groupLink // the group that wrote it, where that is another one
	Destinations []string
	MoreNames    int
	Also         []string // private destinations, and files of lists
	Limits       string   // ports, protocol and TLS
	Hits         uint64
	Known        bool // Hits is
	Unused       bool
	LastUsed     string
	Expiry       *mark
	Note         string // owner and reason
	Text         string // what a filter looks at
}

// ruleRows are the rules of a group, or those that it inherits.
type ruleRows struct {
	Of     string
	Narrow bool // a filter was set
	Rows   []ruleRow
}

type groupLink struct{ Name, Anchor string }

// A groupCard is a group on the policy page.
type groupCard struct {
	admin.GroupDetail
	Anchor                       string
	ObserveUntil                 *mark
	Extends                      []groupLink
	Own, Inherited               ruleRows
	DiscoveryLink, DecisionsLink string
}

// shows are the choices of the policy page beside a text.
var shows = []string{"unused", "expiring", "observing"}

func (d *dashboard) policy(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	v := struct {
		Policy     *admin.PolicyDetail
		Error      string
		Text, Show string
		Shows      []string
		Narrow     bool
		Guardrails ruleRows
		Groups     []groupCard
	}{Text: q.Get("q"), Show: q.Get("show"), Shows: shows}
	v.Narrow = v.Text != "" || v.Show != ""
	if d.API.Policy == nil {
		v.Error = "The policy is not known here."
	} else if p, err := d.API.Policy(); err != nil {
		v.Error = err.Error()
	} else {
		v.Policy = p
		b := policyPage{now: time.Now(), text: v.Text, show: v.Show, anchors: map[string]groupLink{}, byName: map[string]*admin.GroupDetail{}}
		v.Guardrails = ruleRows{"every group", v.Narrow, b.rows(nil, p.Deny, "deny", nil)}
		for i := range p.Groups {
			g := &p.Groups[i]
			b.anchors[g.Name] = groupLink{g.Name, fmt.Sprintf("group-%d", i+1)}
			b.byName[g.Name] = g
		}
		for i := range p.Groups {
			c := b.card(&p.Groups[i], v.Narrow)
			if !v.Narrow || len(c.Own.Rows)+len(c.Inherited.Rows) > 0 || v.Show == "observing" && v.Text == "" && c.Mode == policy.ModeObserve.String() {
				v.Groups = append(v.Groups, c)
			}
		}
	}
	d.render(w, r, http.StatusOK, "policy", "Policy", v)
}

// A policyPage turns the policy into cards.
type policyPage struct {
	now        time.Time
	text, show string
	anchors    map[string]groupLink
	byName     map[string]*admin.GroupDetail
}

func (b *policyPage) card(g *admin.GroupDetail, narrow bool) groupCard {
	c := groupCard{
		GroupDetail: *g, Anchor: b.anchors[g.Name].Anchor, ObserveUntil: b.until(g.ObserveUntil, "observes until", "observed until"),
		DiscoveryLink: "/discovery?" + url.Values{"group": {g.Name}}.Encode(), DecisionsLink: "/?" + url.Values{"group": {g.Name}}.Encode() + "#live",
	}
	for _, name := range g.Extends {
		c.Extends = append(c.Extends, b.anchors[name])
	}
	c.Own = ruleRows{g.Name, narrow, b.both(g, g, nil)}
	c.Inherited = ruleRows{g.Name + ", inherited", narrow, nil}
	seen := map[string]bool{g.Name: true}
	for todo := g.Extends; len(todo) > 0; todo = todo[1:] { // ends: each group once
		a := b.byName[todo[0]]
		if a == nil || seen[a.Name] {
			continue
		}
		seen[a.Name] = true
		from := b.anchors[a.Name]
		c.Inherited.Rows = append(c.Inherited.Rows, b.both(g, a, &from)...)
		todo = append(todo[:len(todo):len(todo)], a.Extends...)
	}
	return c
}

// both returns the deny and the allow rules that a wrote and g has.
func (b *policyPage) both(g, a *admin.GroupDetail, from *groupLink) []ruleRow {
	return append(b.rows(g, a.Deny, "deny", from), b.rows(g, a.Allow, "allow", from)...)
}

// rows returns those of rules that the filter takes.
func (b *policyPage) rows(g *admin.GroupDetail, rules []admin.RuleDetail, effect string, from *groupLink) []ruleRow {
	var rows []ruleRow
	for i := range rules {
		r := ruleRow{RuleDetail: rules[i], Effect: effect, From: from, Expiry: b.until(rules[i].Expires, "expires", "expired")}
		names := r.Names[:min(len(r.Names), maxNames)]
		r.MoreNames = max(r.NameCount, len(r.Names)) - len(names)
		r.Destinations = append(append(r.Destinations, names...), r.Addresses...)
		r.Limits = limits(&r.RuleDetail)
		if h := r.RuleDetail.Hits; h != nil {
			r.Hits, r.Known = *h, true
			r.Unused = *h == 0
		}
		if t := r.RuleDetail.LastUsed; t != nil {
			r.LastUsed = ago(b.now, *t)
		}
		r.Note = strings.Join(notEmpty(r.Owner, r.Reason), ": ")
		if len(r.PrivateDestinations) > 0 {
			r.Also = append(r.Also, "to private "+strings.Join(r.PrivateDestinations, ", "))
		}
		for _, l := range r.Lists {
			if l.File != "" {
				r.Also = append(r.Also, "@"+l.Name+" from "+l.File)
			}
		}
		r.Text = strings.Join(slices.Concat([]string{effect, r.ID, r.Limits, r.Owner, r.Reason, r.Where}, r.Names, r.Addresses, r.Also), " ")
		if g != nil {
			r.Text += " " + g.Name
		}
		if b.takes(g, &r) {
			rows = append(rows, r)
		}
	}
	return rows
}

func (b *policyPage) takes(g *admin.GroupDetail, r *ruleRow) bool {
	switch b.show {
	case "unused":
		if !r.Unused {
			return false
		}
	case "expiring":
		if r.Expiry == nil || r.Expiry.Class == "" {
			return false
		}
	case "observing":
		if g == nil || g.Mode != policy.ModeObserve.String() {
			return false
		}
	}
	return contains(r.Text, b.text)
}

// limits says what r restricts beside its destinations.
func limits(r *admin.RuleDetail) string {
	var parts []string
	if len(r.Ports) > 0 {
		parts = append(parts, strings.Join(r.Ports, ", "))
	}
	if r.Protocol != "" {
		parts = append(parts, r.Protocol)
	}
	if len(r.QTypes) > 0 {
		parts = append(parts, "DNS "+strings.Join(r.QTypes, ", "))
	}
	if t := r.TLS; t != nil {
		for _, f := range [][2]string{{"SNI ", t.SNI}, {"ECH ", t.ECH}, {"TLS ≥ ", t.MinVersion}} {
			if f[1] != "" {
				parts = append(parts, f[0]+f[1])
			}
		}
	}
	return strings.Join(parts, " · ")
}

func notEmpty(all ...string) []string {
	var some []string
	for _, s := range all {
		if s != "" {
			some = append(some, s)
		}
	}
	return some
}

// until marks a date: nil for none, in no colour if it is far away.
func (b *policyPage) until(date, before, after string) *mark {
	if date == "" {
		return nil
	}
	t, err := time.Parse(time.DateOnly, date)
	if err != nil {
		if t, err = time.Parse(time.RFC3339, date); err != nil {
			return &mark{"warn", before + " " + date}
		}
	}
	left := t.Sub(b.now)
	switch {
	case left <= 0:
		return &mark{"bad", after + " " + date}
	case left < expiresSoon:
		return &mark{"warn", before + " " + date + ", in " + span(left)}
	}
	return &mark{"", before + " " + date}
}
