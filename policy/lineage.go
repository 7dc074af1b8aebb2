package policy

import "slices"

// Lineages returns by name each group of d: itself first, then the groups that it
// extends, directly or not. A name that is no group's is in no lineage; circles, which no
// policy in force has, do no harm.
func (d *Document) Lineages() map[string][]string {
	extends := make(map[string][]string, len(d.Groups))
	for i := range d.Groups {
		extends[d.Groups[i].Name] = d.Groups[i].Extends
	}
	lineages := make(map[string][]string, len(extends))
	for name := range extends {
		all := []string{name}
		for i := 0; i < len(all); i++ { // which grows
			for _, up := range extends[all[i]] {
				if _, known := extends[up]; known && !slices.Contains(all, up) {
					all = append(all, up)
				}
			}
		}
		lineages[name] = all
	}
	return lineages
}
