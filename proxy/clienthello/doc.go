// Package clienthello reads the TLS ClientHello at the start of a byte stream,
// so that a proxy can decide where a connection may go without ending TLS:
// which server name the client asks for, which protocols and versions it
// offers, and whether it hides a second name (ECH).
//
// [Read] is for connections, [Parse] for bytes already in hand. Both undo the
// record layer (RFC 8446, section 5.1): the message may be cut anywhere, into
// TCP segments and into records. The work is linear in the bytes, however small
// the pieces, and memory grows with what has arrived, never with a length the
// peer claims. Read keeps every byte it received, in order, for the caller to
// forward or to try as another protocol.
//
// # Errors
//
// Policy has to tell these apart, and none of them looks like another:
//
//   - no error and an empty ServerName: a good ClientHello without SNI;
//   - [ErrNotTLS]: the first byte (or two) cannot start a TLS handshake record;
//     HTTP, SSH and an SSLv2-style hello show this at once;
//   - [ErrMalformed]: TLS, but not a ClientHello that every server reads alike;
//   - [ErrTooLarge]: more than the limit, told from the lengths the client
//     announces and not only when that many bytes have arrived;
//   - the reader's own error: a deadline passed, a reset; [io.EOF] if the peer
//     closed before the first byte, [io.ErrUnexpectedEOF] if in the middle.
//
// # Strictness
//
// A name filter is only as good as its agreement with the server behind it: a
// hello that two parsers may read differently is a way around. So whatever
// RFC 8446, 5246, 6066, 7301 or 9849 forbid in the parts read here is
// malformed. What is accepted is what the server of crypto/tls accepts, less
// the following.
//
// Records and messages:
//
//   - the major version of each record is 3 (crypto/tls: below 16);
//   - nothing comes between the records of the ClientHello, not even a warning
//     alert, and it does not start with one;
//   - the record that ends the ClientHello carries nothing more (RFC 8446,
//     section 5.1: the message may precede a key change).
//
// The server_name extension (RFC 6066, section 3):
//
//   - exactly one name, of type host_name;
//   - letters, digits, hyphens and underscores in labels of 1 to 63 bytes, 253
//     bytes in all: no final dot, no U-labels, no NUL. Upper case is folded.
//     Where hyphens stand, and whether an A-label decodes, is not judged;
//   - not an IP address in any spelling that inet_aton knows: the last label is
//     neither decimal nor 0x and hexadecimal digits.
//
// The encrypted_client_hello extension (RFC 9849, section 5): an outer one with
// a payload and nothing after it. The inner form has no business on the wire.
//
// A duplicate extension of any type, bytes left over in a vector, and a
// pre_shared_key that is not last are malformed here as they are in crypto/tls.
//
// Tolerated: GREASE (RFC 8701) everywhere; unknown extensions, suites, groups
// and versions; any minor record version and any legacy_version; a hello
// without extensions. Extensions that no field of [Hello] and no part of
// [Hello.JA4] depends on are delimited, but what is inside is the server's
// business: here crypto/tls may be the stricter one.
//
// # What it cannot see
//
// The name inside an encrypted ClientHello, the HTTP host inside the tunnel,
// and a second ClientHello after a HelloRetryRequest.
package clienthello
