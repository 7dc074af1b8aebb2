package policy

// DecideFor is Decide for whoever is of the group called name: Source and User do not
// choose it. ok is false if there is no such group.
func (p *Policy) DecideFor(name string, r Request) (d Decision, ok bool) {
	e := eval{p: p}
	for i := range p.groups {
		if p.groups[i].name == name {
			e.g = &p.groups[i]
		}
	}
	d.Reason, d.Revision = ReasonUnmatchedSource, p.revision
	if e.g == nil {
		return d, false
	}
	r.Destination = r.Destination.Unmap().WithZone("")
	e.decideInGroup(&r, nil, &d)
	return d, true
}
