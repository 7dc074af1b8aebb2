package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/admin"
	"sallyport/internal/discovery"
	"sallyport/policy"
)

const (
	viewRules = 10_000 // rules of a policy that are shown, at most
	viewNames = 100    // names of one rule that are
)

// A policyView is the policy in force for people to read, made once for each revision.
type policyView struct {
	mu       sync.Mutex // guards the rest, and lets one be made at a time
	made     bool
	detail   admin.PolicyDetail
	lineages map[string][]string
	uses     func() map[discovery.RuleKey]discovery.Use // nil: how often rules were used is not known
}

// policyDetail answers what is in force.
func (g *gate) policyDetail() (*admin.PolicyDetail, error) {
	v := &g.adminState.policy
	v.mu.Lock()
	defer v.mu.Unlock()
	p := g.store.Policy()
	if p == nil {
		return nil, fmt.Errorf("%w: no policy is in force", admin.ErrUnavailable)
	}
	if !v.made || v.detail.Revision != p.Revision() {
		doc, err := p.Document()
		if err != nil {
			return nil, err
		}
		v.detail, v.lineages, v.made = newPolicyDetail(doc), doc.Lineages(), true
		v.detail.Revision = p.Revision()
	}
	g.status.mu.Lock()
	loaded := g.status.policy.LoadedAt
	g.status.mu.Unlock()
	return v.now(p, loaded), nil
}

// now returns a copy with what changes while a policy is in force.
func (v *policyView) now(p *policy.Policy, loaded time.Time) *admin.PolicyDetail {
	d := v.detail
	d.LoadedAt = loaded
	var uses map[discovery.RuleKey]discovery.Use
	if v.uses != nil {
		uses = discovery.UsesByWriter(v.lineages, v.uses())
	}
	d.Deny = used(d.Deny, "", true, uses)
	d.Groups = slices.Clone(d.Groups)
	for i := range d.Groups {
		g := &d.Groups[i]
		g.Mode = p.ModeAt(g.Name, time.Now()).String()
		g.Allow, g.Deny = used(g.Allow, g.Name, false, uses), used(g.Deny, g.Name, true, uses)
	}
	return &d
}

// used returns a copy of rules with their uses.
func used(rules []admin.RuleDetail, owner string, deny bool, uses map[discovery.RuleKey]discovery.Use) []admin.RuleDetail {
	if uses == nil {
		return rules
	}
	rules = slices.Clone(rules)
	for i := range rules {
		r := &rules[i]
		use := uses[discovery.RuleKey{Group: owner, Rule: r.ID, Deny: deny}]
		hits, last := use.Hits, use.LastUsed.UTC()
		if r.Hits = &hits; hits > 0 {
			r.LastUsed = &last
		}
	}
	return rules
}

func newPolicyDetail(doc *policy.Document) admin.PolicyDetail {
	left := viewRules
	d := admin.PolicyDetail{UnmatchedSource: "deny", Groups: []admin.GroupDetail{}}
	if doc.UnmatchedSource != "" {
		d.UnmatchedSource = doc.UnmatchedSource
	}
	files := map[string]string{}
	for i := range doc.Lists {
		files[doc.Lists[i].Name] = doc.Lists[i].File
	}
	rules := func(path string, rules []policy.Rule, of *policy.TLSRule) []admin.RuleDetail {
		ids := policy.RuleIDs(rules)
		out := make([]admin.RuleDetail, 0, min(left, len(rules)))
		for i := range rules {
			if left == 0 {
				d.Truncated = true
				break
			}
			left--
			r := &rules[i]
			out = append(out, admin.RuleDetail{
				ID: ids[i], Names: some(r.Names, viewNames), NameCount: len(r.Names), Addresses: some(r.Addresses, viewNames),
				Ports: some(r.Ports, viewNames), Protocol: r.Protocol, QTypes: some(r.QTypes, viewNames),
				PrivateDestinations: some(r.PrivateDestinations, viewNames), TLS: tlsOf(r.TLS, of), Lists: listsOf(r.Names, files),
				Owner: r.Owner, Reason: r.Reason, Expires: r.Expires, Where: doc.Where(fmt.Sprintf("%s[%d]", path, i)).String(),
			})
		}
		return out
	}
	d.Deny = rules("deny", doc.Deny, nil)
	for i := range doc.Groups {
		g, path := &doc.Groups[i], fmt.Sprintf("groups[%d]", i)
		d.Groups = append(d.Groups, admin.GroupDetail{
			Name: g.Name, Sources: some(g.Sources, viewRules), Users: some(g.Users, viewRules), Extends: some(g.Extends, viewRules),
			ObserveUntil: g.ObserveUntil, Allow: rules(path+".allow", g.Allow, g.TLS), Deny: rules(path+".deny", g.Deny, nil),
		})
	}
	return d
}

// tlsOf returns what a rule wants of TLS: what it says itself, and else its group; nil if
// neither says anything.
func tlsOf(rule, group *policy.TLSRule) *admin.TLSDetail {
	var d admin.TLSDetail
	for _, t := range []*policy.TLSRule{rule, group} {
		if t != nil {
			d.SNI, d.ECH, d.MinVersion = cmp.Or(d.SNI, t.SNI), cmp.Or(d.ECH, t.ECH), cmp.Or(d.MinVersion, t.MinVersion)
		}
	}
	if d == (admin.TLSDetail{}) {
		return nil
	}
	return &d
}

// listsOf returns the lists that names refer to; never nil.
func listsOf(names []string, files map[string]string) []admin.ListDetail {
	lists := []admin.ListDetail{}
	for _, n := range names[:min(len(names), viewNames)] {
		if list, ok := strings.CutPrefix(n, "@"); ok {
			lists = append(lists, admin.ListDetail{Name: list, File: files[list]})
		}
	}
	return lists
}

// some returns a copy of the first of items; never nil.
func some(items []string, most int) []string {
	return append([]string{}, items[:min(most, len(items))]...)
}
