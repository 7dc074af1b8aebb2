package policy

// Version is the only value of Document.Version so far.
const Version = 1

// A Document is a policy as operators write it (policy.yaml), before it is
// compiled. Strings are as written. [ParseDocument] makes one from YAML and
// remembers where each value stood, so that Compile's errors can say so.
type Document struct {
	Version         int     `yaml:"version"`
	UnmatchedSource string  `yaml:"unmatched_source,omitempty"`
	Lists           []List  `yaml:"lists,omitempty"`
	Deny            []Rule  `yaml:"deny,omitempty"`
	Groups          []Group `yaml:"groups,omitempty"`

	parts []part // where it was read; none for a Document made in Go
}

// A List is a named set of name patterns that rules refer to as @name.
type List struct {
	Name  string   `yaml:"name"`
	Names []string `yaml:"names,omitempty"`
	File  string   `yaml:"file,omitempty"`
}

// A Group holds the rules for the users it lists, and for the sources whose longest
// matching prefix it has.
type Group struct {
	Name         string   `yaml:"name"`
	Sources      []string `yaml:"sources,omitempty"`
	Users        []string `yaml:"users,omitempty" json:",omitempty"` // of JSON: equal documents keep their revision
	Extends      []string `yaml:"extends,omitempty"`
	Mode         string   `yaml:"mode,omitempty"`
	ObserveUntil string   `yaml:"observe_until,omitempty"`
	TLS          *TLSRule `yaml:"tls,omitempty"`
	Allow        []Rule   `yaml:"allow,omitempty"`
	Deny         []Rule   `yaml:"deny,omitempty"`
}

// A Rule allows or denies destinations. In YAML a bare string stands for {names: [that string]}.
type Rule struct {
	ID                  string   `yaml:"id,omitempty"`
	Names               []string `yaml:"names,omitempty"`
	Addresses           []string `yaml:"addresses,omitempty"`
	Ports               []string `yaml:"ports,omitempty"` // numbers or ranges such as 8000-8010
	Protocol            string   `yaml:"protocol,omitempty"`
	QTypes              []string `yaml:"qtypes,omitempty"`
	PrivateDestinations []string `yaml:"private_destinations,omitempty"`
	AllowPublicSuffix   bool     `yaml:"allow_public_suffix,omitempty"`
	TLS                 *TLSRule `yaml:"tls,omitempty"`
	Expires             string   `yaml:"expires,omitempty"`
	Owner               string   `yaml:"owner,omitempty"`
	Reason              string   `yaml:"reason,omitempty"`
}

// A TLSRule restricts what a ClientHello may say. Empty fields inherit: a rule
// from its group, a group from the defaults (match, deny, 1.2).
type TLSRule struct {
	SNI        string `yaml:"sni,omitempty"`
	ECH        string `yaml:"ech,omitempty"`
	MinVersion string `yaml:"min_version,omitempty"`
}
