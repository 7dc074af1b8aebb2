package proxy

import (
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"sallyport/policy"
)

// pacPath is where a proxy auto-configuration file is asked for.
const pacPath = "/proxy.pac"

const pacType = "application/x-ns-proxy-autoconfig"

// pacHead is the part of the file before the proxy's address. Engines differ in
// what they know besides ECMAScript 3, so it uses nothing else, none of the
// predefined functions either: some of those resolve names.
const pacHead = `// Proxy auto-configuration by sallyport.
function FindProxyForURL(url, host) {
  host = host.toLowerCase().replace(/\.$/, "");
  if (host.indexOf(".") < 0 && host.indexOf(":") < 0) return "DIRECT";
  if (host === "::1" || host === "[::1]" || /\.localhost$/.test(host)) return "DIRECT";
  var m = /^(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})$/.exec(host);
  if (m) {
    var n = ((m[1] * 256 + m[2] * 1) * 256 + m[3] * 1) * 256 + m[4] * 1;
`

// PAC returns the proxy auto-configuration file for clients that reach this proxy
// as proxy, such as "PROXY host:port" or "HTTPS host:port": loopback, names without a dot and what direct lists (see
// Config.PACDirect) go out without it, everything else through it and never past
// it. The caller vouches for proxy and direct; they stand in the file as they are.
func PAC(proxy string, direct []string) []byte {
	b := append(make([]byte, 0, 1024), pacHead...)
	var names []string
	for _, d := range append([]string{"127.0.0.0/8"}, direct...) {
		if p, err := netip.ParsePrefix(d); err == nil && p.Addr().Is4() {
			four := p.Masked().Addr().As4()
			first := uint64(four[0])<<24 | uint64(four[1])<<16 | uint64(four[2])<<8 | uint64(four[3])
			last := first + 1<<(32-p.Bits()) - 1
			b = append(b, "    if (n >= "...)
			b = strconv.AppendUint(b, first, 10)
			b = append(b, " && n <= "...)
			b = strconv.AppendUint(b, last, 10)
			b = append(append(append(b, `) return "DIRECT"; // `...), d...), '\n')
		} else {
			names = append(names, d)
		}
	}
	b = append(b, "  }\n"...)
	for _, d := range names {
		switch below := strings.TrimPrefix(d, "*"); {
		case strings.HasPrefix(below, "."):
			b = append(b, `  if (("." + host).slice(-`+strconv.Itoa(len(below))+`) === "`+below+`"`...)
			if below != d { // not the name itself
				b = append(b, ` && host.length > `+strconv.Itoa(len(below))...)
			}
		default:
			b = append(b, `  if (host === "`+d+`"`...)
		}
		b = append(b, ") return \"DIRECT\";\n"...)
	}
	return append(b, `  return "`+proxy+"\";\n}\n"...)
}

// How a proxy is spoken to, in the file.
const (
	pacPlain  = "PROXY"
	pacSecure = "HTTPS"
)

// servePAC answers a request for the file with the address at which the client
// reached the proxy: host, as the request's Host field has it, if that is a plain
// name or address, and otherwise local, the connection's own address. Only what
// was parsed gets into the file, in its canonical form.
func (s *Server) servePAC(w http.ResponseWriter, scheme, host string, local netip.AddrPort) {
	h := w.Header()
	h.Set("Content-Type", pacType)
	h.Set("Cache-Control", "no-store") // the next client may have reached us elsewhere
	h.Set("X-Content-Type-Options", "nosniff")
	w.Write(PAC(scheme+" "+pacAddress(host, local), s.cfg.PACDirect))
}

// servePACTo answers a request for the file that came over conn, a listener's.
func (s *Server) servePACTo(conn net.Conn, w http.ResponseWriter, r *http.Request) {
	scheme, host := pacPlain, r.Host
	if peerOf(conn) != nil {
		if scheme = pacSecure; !hasPort(host) {
			host += ":443"
		}
	}
	s.servePAC(w, scheme, host, addrPort(conn.LocalAddr()))
}

// pacAddress returns host:port of the proxy, host if that is well-formed.
func pacAddress(host string, local netip.AddrPort) string {
	if !hasPort(host) {
		host += defaultPort // the client asked http://host/proxy.pac
	}
	name, addr, port, err := policy.ParseAuthority(host)
	if err != nil || !addr.IsValid() && name.IsZero() {
		return local.String()
	}
	return authority(name, addr.Unmap(), port)
}

// isPAC reports whether r asks the proxy itself for its auto-configuration file.
func isPAC(r *http.Request) bool {
	return r.RequestURI == pacPath && (r.Method == http.MethodGet || r.Method == http.MethodHead)
}

// PACHandler returns a handler that serves the file on another listener, with the
// address of the proxy's own first listener, a plain one if there is one. One that listens on every address is
// reached at the host that the client reached the other listener at.
func (s *Server) PACHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		scheme, all := pacPlain, s.addrs
		if len(all) == 0 {
			scheme, all = pacSecure, s.secure.addrs
		}
		if len(all) == 0 {
			http.NotFound(w, r)
			return
		}
		own := all[0]
		if !own.Addr().IsUnspecified() {
			s.servePAC(w, scheme, own.String(), own)
			return
		}
		port := strconv.Itoa(int(own.Port()))
		host := r.Host
		if hasPort(host) {
			host = host[:strings.LastIndexByte(host, ':')]
		}
		local := own
		if l, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
			local = netip.AddrPortFrom(addrPort(l).Addr(), own.Port())
		}
		s.servePAC(w, scheme, host+":"+port, local)
	})
}
