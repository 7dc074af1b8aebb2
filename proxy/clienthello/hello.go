package clienthello

// A Hello is what a ClientHello says, as far as an egress policy asks.
//
// ALPN and JA4 read the bytes that Read or Parse were given: call them before
// reusing that memory, which a Hello keeps alive. The fields are values of their
// own.
type Hello struct {
	// ServerName is the host_name of the server_name extension in lower case:
	// labels of letters, digits, '-' and '_', without a final dot, never an IP
	// address. It is empty if the client sent none.
	ServerName string

	// MaxVersion is the highest version offered among SSL 3.0 (0x0300) to
	// TLS 1.3 (0x0304), or 0 if there is none of them: a version made up to pass
	// for a high one must not satisfy a minimum. It comes from
	// supported_versions, else from legacy_version, which cannot offer more than
	// TLS 1.2 (RFC 8446, section 4.2.1).
	MaxVersion uint16

	// ECH reports an outer encrypted_client_hello extension (RFC 9849), or its
	// predecessor encrypted_server_name: the name the client is really after may
	// be another one. GREASE ECH cannot be told from the real thing.
	ECH bool

	// PostQuantum reports a key_share for ML-KEM, hybrid or alone, or for one of
	// its Kyber drafts.
	PostQuantum bool

	legacyVersion uint16
	cipherSuites  vector
	extensions    vector
}

// Extensions that are read, from the IANA registry except the last, which was
// the code point of draft-ietf-tls-esni before it became ECH.
const (
	extServerName          = 0x0000
	extSignatureAlgorithms = 0x000d
	extALPN                = 0x0010
	extPreSharedKey        = 0x0029
	extSupportedVersions   = 0x002b
	extKeyShare            = 0x0033
	extECH                 = 0xfe0d
	extESNI                = 0xffce
)

const (
	versionSSL30 = 0x0300
	versionTLS12 = 0x0303
	versionTLS13 = 0x0304
)

// parseBody reads the body of a ClientHello message (RFC 8446, section 4.1.2).
// A ClientHello of TLS 1.2 and before may end where the extensions would start.
func parseBody(body vector) (Hello, error) {
	version, okVersion := body.uint16()
	_, okRandom := body.take(32)
	_, okSession := body.vector8()
	suites, okSuites := body.vector16()
	_, okCompression := body.vector8()
	if !okVersion || !okRandom || !okSession || !okSuites || !okCompression || len(suites)%2 != 0 {
		return Hello{}, malformed("fields before the extensions")
	}
	h := Hello{legacyVersion: version, cipherSuites: suites}
	if version >= versionSSL30 {
		h.MaxVersion = min(version, versionTLS12)
	}
	if len(body) == 0 {
		return h, nil
	}
	extensions, ok := body.vector16()
	if !ok || len(body) != 0 {
		return Hello{}, malformed("extensions vector")
	}
	h.extensions = extensions
	if err := h.readExtensions(); err != nil {
		return Hello{}, err
	}
	return h, nil
}

func (h *Hello) readExtensions() error {
	var seen extensionSet
	for rest := h.extensions; len(rest) > 0; {
		id, data, ok := rest.extension()
		if !ok {
			return malformed("extension length")
		}
		if !seen.add(id) {
			return malformed("duplicate extension")
		}
		if id == extPreSharedKey && len(rest) > 0 {
			return malformed("pre_shared_key is not the last extension")
		}
		if err := h.readExtension(id, data); err != nil {
			return err
		}
	}
	return nil
}

func (h *Hello) readExtension(id uint16, data vector) (err error) {
	switch id {
	case extServerName:
		h.ServerName, err = readServerName(data)
	case extSignatureAlgorithms:
		list, ok := data.vector16()
		if !ok || len(data) != 0 || len(list) == 0 || len(list)%2 != 0 {
			return malformed("signature_algorithms")
		}
	case extALPN:
		err = checkALPN(data)
	case extSupportedVersions:
		h.MaxVersion, err = readSupportedVersions(data)
	case extKeyShare:
		h.PostQuantum, err = readKeyShare(data)
	case extECH:
		h.ECH = true
		err = checkECH(data)
	case extESNI:
		h.ECH = true
	}
	return err
}

// ALPN returns the application protocols offered, in the client's order of
// preference (RFC 7301, section 3.1), or nil. They are the client's own bytes,
// neither printable nor UTF-8 by promise.
func (h *Hello) ALPN() []string {
	data, _ := h.extension(extALPN)
	list, _ := data.vector16()
	var protocols []string
	for len(list) > 0 {
		name, ok := list.vector8()
		if !ok {
			break
		}
		if protocols == nil {
			protocols = make([]string, 0, 2) // h2 and http/1.1, mostly
		}
		protocols = append(protocols, protocolName(name))
	}
	return protocols
}

// protocolName spares the common protocols an allocation.
func protocolName(name []byte) string {
	switch string(name) {
	case "h2":
		return "h2"
	case "http/1.1":
		return "http/1.1"
	}
	return string(name)
}

// extension returns the data of the extension with that number, if there is one.
func (h *Hello) extension(id uint16) (vector, bool) {
	for rest := h.extensions; len(rest) > 0; {
		found, data, ok := rest.extension()
		if !ok {
			break
		}
		if found == id {
			return data, true
		}
	}
	return nil, false
}

// checkALPN checks a ProtocolNameList (RFC 7301, section 3.1).
func checkALPN(data vector) error {
	list, ok := data.vector16()
	if !ok || len(data) != 0 || len(list) == 0 {
		return malformed("application_layer_protocol_negotiation")
	}
	for len(list) > 0 {
		if name, ok := list.vector8(); !ok || len(name) == 0 {
			return malformed("application_layer_protocol_negotiation")
		}
	}
	return nil
}

// readSupportedVersions returns the highest version known in a SupportedVersions
// (RFC 8446, section 4.2.1), or 0.
func readSupportedVersions(data vector) (uint16, error) {
	list, ok := data.vector8()
	if !ok || len(data) != 0 || len(list) == 0 || len(list)%2 != 0 {
		return 0, malformed("supported_versions")
	}
	var highest uint16
	for len(list) > 0 {
		version, _ := list.uint16()
		if version >= versionSSL30 && version <= versionTLS13 {
			highest = max(highest, version)
		}
	}
	return highest, nil
}

// readKeyShare reports whether a KeyShareClientHello (RFC 8446, section 4.2.8)
// has a post-quantum share.
func readKeyShare(data vector) (postQuantum bool, err error) {
	list, ok := data.vector16()
	if !ok || len(data) != 0 {
		return false, malformed("key_share")
	}
	for len(list) > 0 {
		group, okGroup := list.uint16()
		key, okKey := list.vector16()
		if !okGroup || !okKey || len(key) == 0 {
			return false, malformed("key_share")
		}
		postQuantum = postQuantum || isPostQuantum(group)
	}
	return postQuantum, nil
}

// isPostQuantum knows the ML-KEM groups of the IANA registry, and the two Kyber
// groups with which browsers went before them.
func isPostQuantum(group uint16) bool {
	switch group {
	case 0x11eb, 0x11ec, 0x11ed, 0x11ee, // P-256, X25519, P-384 and curveSM2 hybrids
		0x0200, 0x0201, 0x0202, // ML-KEM-512, -768, -1024
		0x6399, 0x639a: // X25519 and P-256 with Kyber768Draft00
		return true
	}
	return false
}

// checkECH checks an outer ECHClientHello (RFC 9849, section 5). The inner form
// is only ever sent encrypted.
func checkECH(data vector) error {
	form, ok := data.take(1)
	if !ok || form[0] != 0 {
		return malformed("encrypted_client_hello is not an outer one")
	}
	_, okSuite := data.take(5) // HPKE KDF and AEAD, config_id
	_, okEnc := data.vector16()
	payload, okPayload := data.vector16()
	if !okSuite || !okEnc || !okPayload || len(payload) == 0 || len(data) != 0 {
		return malformed("encrypted_client_hello structure")
	}
	return nil
}

// An extensionSet remembers which extensions were seen. Real clients send some
// twenty, which fit into few; beyond them a bitmap keeps the cost of a hostile
// hello linear.
type extensionSet struct {
	few [48]uint16
	n   int
	all *[1 << 16 / 64]uint64
}

// add reports whether id was not in the set before.
func (s *extensionSet) add(id uint16) bool {
	if s.all == nil {
		for _, seen := range s.few[:s.n] {
			if seen == id {
				return false
			}
		}
		if s.n < len(s.few) {
			s.few[s.n] = id
			s.n++
			return true
		}
		s.all = new([1 << 16 / 64]uint64)
		for _, seen := range s.few {
			s.all[seen/64] |= 1 << (seen % 64)
		}
	}
	word, bit := &s.all[id/64], uint64(1)<<(id%64)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}

// A vector is the unread rest of some bytes in TLS presentation language
// (RFC 8446, section 3). Its methods take from the front, or report false.
type vector []byte

func (v *vector) take(n int) (vector, bool) {
	if len(*v) < n {
		return nil, false
	}
	head := (*v)[:n:n]
	*v = (*v)[n:]
	return head, true
}

func (v *vector) uint16() (uint16, bool) {
	if len(*v) < 2 {
		return 0, false
	}
	n := uint16((*v)[0])<<8 | uint16((*v)[1])
	*v = (*v)[2:]
	return n, true
}

// vector8 takes a vector with a length of one byte.
func (v *vector) vector8() (vector, bool) {
	if len(*v) < 1 {
		return nil, false
	}
	n := int((*v)[0])
	*v = (*v)[1:]
	return v.take(n)
}

// vector16 takes a vector with a length of two bytes.
func (v *vector) vector16() (vector, bool) {
	n, ok := v.uint16()
	if !ok {
		return nil, false
	}
	return v.take(int(n))
}

// extension takes an Extension (RFC 8446, section 4.2).
func (v *vector) extension() (id uint16, data vector, ok bool) {
	if id, ok = v.uint16(); !ok {
		return 0, nil, false
	}
	data, ok = v.vector16()
	return id, data, ok
}
