package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/viper"

	"sallyport/policy"
)

// FileVariable is the environment variable that names the settings file if --config does not.
const FileVariable = envPrefix + "CONFIG"

// LoadOptions say where Load looks.
type LoadOptions struct {
	File    string     // settings file; "": the one FileVariable names, or none
	Flags   []Override // what the command line sets; relative paths stay relative to the working directory
	Env     []string   // as os.Environ gives it; relative paths as with Flags
	Default []byte     // settings in YAML for what nothing else sets: every key
}

// Load returns the settings of this process. Its error is a [policy.Errors] with
// every mistake of every layer, one a line: each says where it is (file:line:column,
// a variable or a flag), which setting, and what to write instead. warnings are
// environment variables that look like settings and are none; they come with an
// error too.
func Load(o LoadOptions) (s Settings, warnings []string, err error) {
	layers, warnings := o.layers()
	if s, err = merge(layers[0], layers[1], layers[2], layers[3]); err != nil {
		return Settings{}, warnings, err
	}
	// What a layer got wrong is not in s, so that check sees the layer below instead.
	if mistakes := arrange(layers, s.check(origin(layers))); len(mistakes) > 0 {
		return Settings{}, warnings, mistakes
	}
	s.File = o.file()
	if s.Node == "" {
		if s.Node, err = os.Hostname(); err != nil {
			return Settings{}, warnings, fmt.Errorf("host name for node: %w", err)
		}
	}
	return s, warnings, nil
}

// Locate returns a function that says where the value in force at a path, such as
// dns.records[2].ttl, is written in what Load reads. It is the zero Pos where nothing is.
func Locate(o LoadOptions) func(path string) policy.Pos {
	layers, _ := o.layers()
	return origin(layers)
}

// file returns the name of the settings file, "" if there is none.
func (o LoadOptions) file() string {
	if o.File != "" {
		return o.File
	}
	return lookup(o.Env, FileVariable)
}

// layers reads what Load lays over each other, the last on top, with Load's warnings.
func (o LoadOptions) layers() (layers []*layer, warnings []string) {
	env, warnings := envLayer(o.Env)
	return []*layer{yamlLayer("embedded settings", "", o.Default), fileLayer(o.file()), env, flagLayer(o.Flags)}, warnings
}

// lookup returns the value of name in environ; the last one counts.
func lookup(environ []string, name string) (value string) {
	for _, kv := range environ {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			value = v
		}
	}
	return value
}

// fileLayer reads the settings file, if there is one.
func fileLayer(name string) *layer {
	if name == "" {
		return newLayer("")
	}
	data, err := readFile(name)
	if err != nil {
		l := newLayer("")
		l.mistake(policy.Pos{File: name}, "", "read settings: %w", err)
		return l
	}
	return yamlLayer(name, filepath.Dir(name), data)
}

// readFile reads up to one byte more than a settings file may have.
func readFile(name string) ([]byte, error) {
	// O_NONBLOCK: a named pipe in the file's place must not block for ever.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err == nil {
		defer f.Close()
		var data []byte
		if info, serr := f.Stat(); serr == nil && !info.Mode().IsRegular() {
			return nil, errors.New("it is no regular file")
		}
		if data, err = io.ReadAll(io.LimitReader(f, maxFile+1)); err == nil {
			return data, nil
		}
	}
	// The position names the file already.
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		err = pe.Err
	}
	return nil, err
}

// delimiter keeps viper from splitting keys at dots, which names have.
const delimiter = "::"

// merge lays the checked layers over each other. viper decides which layer wins;
// the values have their final types already, so that it converts nothing.
func merge(def, file, env, flags *layer) (s Settings, err error) {
	v := viper.NewWithOptions(viper.KeyDelimiter(delimiter))
	for key, value := range flatten(def.values, "") {
		v.SetDefault(key, value)
	}
	for _, l := range []*layer{file, env} {
		if err := v.MergeConfigMap(l.values); err != nil {
			return s, fmt.Errorf("merge settings: %w", err)
		}
	}
	for key, value := range flatten(flags.values, "") {
		v.Set(key, value)
	}
	err = v.UnmarshalExact(&s, func(dc *mapstructure.DecoderConfig) {
		dc.TagName, dc.DecodeHook, dc.WeaklyTypedInput = "yaml", nil, false
	})
	if err != nil {
		return s, fmt.Errorf("merge settings: %w", err)
	}
	return s, nil
}

// flatten returns the values in m by key as viper writes it.
func flatten(m map[string]any, prefix string) map[string]any {
	flat := map[string]any{}
	for k, v := range m {
		if sub, ok := v.(map[string]any); ok {
			for k, v := range flatten(sub, prefix+k+delimiter) {
				flat[k] = v
			}
		} else {
			flat[prefix+k] = v
		}
	}
	return flat
}

// origin returns a function that says where the value in force at a path was written.
func origin(layers []*layer) func(path string) policy.Pos {
	return func(path string) policy.Pos {
		for i := len(layers) - 1; i >= 0; i-- {
			if pos, ok := layers[i].positions[path]; ok {
				return pos
			}
		}
		return policy.Pos{}
	}
}

// arrange returns the mistakes of all layers and more, by place, and not too many.
func arrange(layers []*layer, more policy.Errors) policy.Errors {
	var mistakes policy.Errors
	for _, l := range layers {
		mistakes = append(mistakes, l.mistakes...)
	}
	mistakes = append(mistakes, more...)
	rank := map[string]int{}
	for _, m := range mistakes {
		if _, ok := rank[m.Pos.File]; !ok {
			rank[m.Pos.File] = len(rank)
		}
	}
	slices.SortStableFunc(mistakes, func(a, b *policy.Error) int {
		return cmp.Or(cmp.Compare(rank[a.Pos.File], rank[b.Pos.File]),
			cmp.Compare(a.Pos.Line, b.Pos.Line), cmp.Compare(a.Pos.Column, b.Pos.Column))
	})
	if more := len(mistakes) - maxMistakes; more > 0 {
		mistakes = append(mistakes[:maxMistakes:maxMistakes],
			&policy.Error{Err: fmt.Errorf("and at least %d more mistakes", more)})
	}
	return mistakes
}

// check finds the mistakes that only show when all settings are known.
func (s *Settings) check(at func(path string) policy.Pos) (mistakes policy.Errors) {
	wrong := func(path, format string, args ...any) {
		mistakes = append(mistakes, &policy.Error{Pos: at(path), Path: path, Err: fmt.Errorf(format, args...)})
	}
	s.Proxy.checkIdentity(wrong)
	s.Admin.check(wrong)
	if len(s.Proxy.Listen)+len(s.Proxy.TLSListen)+len(s.DNS.Listen)+len(s.DNS.TLSListen)+len(s.DNS.HTTPSListen) == 0 {
		wrong("proxy.listen", "neither proxy.listen nor dns.listen has an address, so nothing would run; write one")
	}
	if s.DNS.Cache.MinTTL > s.DNS.Cache.MaxTTL {
		wrong("dns.cache.min_ttl", "%s is longer than dns.cache.max_ttl, %s; write a shorter one", s.DNS.Cache.MinTTL, s.DNS.Cache.MaxTTL)
	}
	s.Proxy.checkRoutes(wrong)
	taken := map[string]string{}
	claim := func(path, addr string) {
		if other, ok := taken[addr]; ok && !strings.HasSuffix(addr, ":0") {
			wrong(path, "%s is taken by %s already; write another port", quote(addr), other)
		}
		taken[addr] = path
	}
	for i, a := range s.Proxy.Listen {
		claim(fmt.Sprintf("proxy.listen[%d]", i), a)
	}
	for i, a := range s.Proxy.TLSListen {
		claim(fmt.Sprintf("proxy.tls_listen[%d]", i), a)
	}
	for i, a := range s.DNS.Listen {
		claim(fmt.Sprintf("dns.listen[%d]", i), a)
	}
	for i, a := range s.DNS.TLSListen {
		claim(fmt.Sprintf("dns.tls_listen[%d]", i), a)
	}
	for i, a := range s.DNS.HTTPSListen {
		claim(fmt.Sprintf("dns.https_listen[%d]", i), a)
	}
	s.DNS.checkTLS(wrong)
	if s.Admin.Listen != "" {
		claim("admin.listen", s.Admin.Listen)
	}
	zones := map[string]bool{}
	for i, z := range s.DNS.Zones {
		if zones[z.Zone] {
			wrong(fmt.Sprintf("dns.zones[%d].zone", i), "%q is forwarded already; keep one", z.Zone)
		}
		zones[z.Zone] = true
		if len(z.Upstreams) == 0 {
			wrong(fmt.Sprintf("dns.zones[%d].upstreams", i), "empty; write the resolvers of %q, or leave the zone out", z.Zone)
		}
	}
	for i := range s.DNS.Records {
		if err := s.DNS.Records[i].check(); err != nil {
			wrong(fmt.Sprintf("dns.records[%d].value", i), "%w", err)
		}
	}
	return mistakes
}

// checkIdentity finds settings about who asks that need others.
func (p *Proxy) checkIdentity(wrong func(path, format string, args ...any)) {
	if p.Auth.Required && p.Auth.Htpasswd == "" && (len(p.TLSListen) == 0 || p.TLS.ClientCA == "") {
		wrong("proxy.auth.required", "nobody could pass: there are no users; write proxy.auth.htpasswd too, or proxy.tls.client_ca with proxy.tls_listen, or false")
	}
	if p.TLS.RequireClient && p.TLS.ClientCA == "" {
		wrong("proxy.tls.require_client_certificate", "no authority is known that could sign one; write proxy.tls.client_ca too, or false")
	}
	if len(p.TLSListen) > 0 && (p.TLS.Certificate == "" || p.TLS.Key == "") {
		wrong("proxy.tls_listen", "TLS needs a certificate; write proxy.tls.certificate and proxy.tls.key, or []")
	}
}

// checkTLS finds encrypted listeners without a certificate.
func (d *DNS) checkTLS(wrong func(path, format string, args ...any)) {
	if d.TLS.Certificate != "" && d.TLS.Key != "" {
		return
	}
	for _, l := range []struct {
		path  string
		addrs []string
	}{{"dns.tls_listen", d.TLSListen}, {"dns.https_listen", d.HTTPSListen}} {
		if len(l.addrs) > 0 {
			wrong(l.path, "TLS needs a certificate; write dns.tls.certificate and dns.tls.key, or []")
		}
	}
}

// check finds out whether the value fits the type, and brings it into one spelling.
func (r *Record) check() error {
	switch r.Type {
	case "A", "AAAA":
		ip, err := netip.ParseAddr(r.Value)
		if err != nil || ip.Is4() != (r.Type == "A") || ip.Zone() != "" {
			return fmt.Errorf("%s is not the address of an %s record; write one such as %s", quote(r.Value), r.Type,
				map[string]string{"A": `"10.0.0.10"`, "AAAA": `"2001:db8::10"`}[r.Type])
		}
		r.Value = ip.String()
	case "CNAME", "PTR":
		n, err := policy.ParseName(r.Value)
		if err != nil {
			return fmt.Errorf("%w; write the name that %s stands for", err, r.Name)
		}
		r.Value = n.String()
	case "SRV":
		parts := strings.Fields(r.Value)
		ok := len(parts) == 4
		for i := 0; ok && i < 3; i++ {
			_, ok = port(parts[i]) // priority and weight have the same range
		}
		if ok {
			_, err := policy.ParseName(parts[3])
			ok = err == nil
		}
		if !ok {
			return fmt.Errorf(`%s is not the value of an SRV record; write priority, weight, port and target such as "10 5 443 host.corp.example"`, quote(r.Value))
		}
	case "TXT":
		if len(r.Value) > 255 {
			return errors.New("a TXT value has at most 255 bytes; write a shorter one")
		}
	}
	return nil
}
