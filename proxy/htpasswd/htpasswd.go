// Package htpasswd reads the files of users that Apache's htpasswd writes, with
// bcrypt hashes alone, and tells whether a password is a user's.
//
// A line is user:hash; empty lines and those that start with # are skipped. Other
// schemes (MD5, SHA-1, crypt, plain text) are mistakes: they can be guessed by the
// million. bcrypt looks at the first 72 bytes of a password, as htpasswd does.
package htpasswd

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/bcrypt"

	"sallyport/policy"
)

const (
	maxFile     = 8 << 20 // bytes of a file
	maxMistakes = 100     // reported in one go
	maxUser     = 255     // bytes of a user's name, as in a policy

	// maxCost bounds what one verification takes: about a second. Each step more
	// doubles it.
	maxCost = 14

	maxPassword = 72 // bytes that bcrypt looks at
	hashLength  = 60 // bytes: $2y$10$, a salt of 22, a hash of 31
)

// A File is the users of one file. It never changes, and is safe for concurrent use.
type File struct {
	users  map[string]string // hash by name
	hashes []string          // of users, in the order of the file
	seed   maphash.Seed
}

// Load reads the file called name. Its error is a policy.Errors with every mistake,
// located; no hash and no password is in it.
func Load(name string) (*File, error) {
	data, err := read(name)
	if err != nil {
		if pe, ok := errors.AsType[*os.PathError](err); ok { // the position names the file already
			err = pe.Err
		}
		return nil, policy.Errors{{Pos: policy.Pos{File: name}, Err: fmt.Errorf("read users: %w", err)}}
	}
	return Parse(name, data)
}

// read reads up to one byte more than a file may have.
func read(name string) ([]byte, error) {
	// O_NONBLOCK: a named pipe in the file's place must not block for ever.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && !info.Mode().IsRegular() {
		return nil, errors.New("it is no regular file")
	}
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}

// Parse reads data, which errors call name. It keeps nothing of data.
func Parse(name string, data []byte) (*File, error) {
	f := &File{users: map[string]string{}, seed: maphash.MakeSeed()}
	var mistakes policy.Errors
	wrong := func(line, column int, err error) {
		if len(mistakes) < maxMistakes {
			mistakes = append(mistakes, &policy.Error{Pos: policy.Pos{File: name, Line: line, Column: column}, Err: err})
		}
	}
	if len(data) > maxFile {
		return nil, policy.Errors{{Pos: policy.Pos{File: name}, Err: fmt.Errorf("the file is larger than %d bytes", maxFile)}}
	}
	n := 0
	for line := range bytes.Lines(data) {
		n++
		line = bytes.TrimRight(line, " \t\r\n")
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		user, hash, ok := strings.Cut(string(line), ":")
		switch err := checkHash(hash); {
		case !ok: // the line may be a password: not repeated
			wrong(n, 1, errors.New("no colon; write user:hash, as htpasswd -B does"))
		case !ValidUser(user):
			wrong(n, 1, fmt.Errorf("not the name of a user; use 1 to %d characters without spaces and control characters", maxUser))
		case f.users[user] != "":
			wrong(n, 1, fmt.Errorf("user %s is listed already; keep one line", user))
		case err != nil:
			wrong(n, len(user)+2, fmt.Errorf("user %s: %w", user, err))
		default:
			f.users[user] = hash
			f.hashes = append(f.hashes, hash)
		}
	}
	if len(mistakes) > 0 {
		return nil, mistakes
	}
	return f, nil
}

// ValidUser reports whether s can be the name of a user, in this file and in a
// policy: 1 to 255 bytes of printable UTF-8 without spaces and colons.
func ValidUser(s string) bool {
	return s != "" && len(s) <= maxUser && utf8.ValidString(s) &&
		!strings.ContainsFunc(s, func(r rune) bool { return r == ':' || unicode.IsSpace(r) || !unicode.IsPrint(r) })
}

// schemes are the beginnings of hashes that are not read.
var schemes = []struct{ prefix, name string }{
	{"$apr1$", "MD5 (htpasswd -m)"}, {"$1$", "MD5"}, {"{SHA}", "SHA-1 (htpasswd -s)"}, {"{SSHA}", "SHA-1"},
	{"$5$", "SHA-256 crypt"}, {"$6$", "SHA-512 crypt"}, {"$y$", "yescrypt"}, {"$7$", "scrypt"}, {"$argon2", "Argon2"},
	{"$2x$", "bcrypt with a known mistake ($2x$)"},
}

// checkHash says what is wrong with hash, without repeating it.
func checkHash(hash string) error {
	for _, s := range schemes {
		if strings.HasPrefix(hash, s.prefix) {
			return fmt.Errorf("the password is hashed with %s; only bcrypt is read: write it anew with htpasswd -B", s.name)
		}
	}
	if len(hash) < 4 || hash[:2] != "$2" || strings.IndexByte("aby", hash[2]) < 0 || hash[3] != '$' {
		return errors.New("the password is not hashed with bcrypt; only $2y$, $2a$ and $2b$ are read: write it anew with htpasswd -B")
	}
	cost, err := bcrypt.Cost([]byte(hash))
	if err != nil || len(hash) != hashLength || hash[6] != '$' || strings.Trim(hash[7:], bcryptDigits) != "" {
		return errors.New("the bcrypt hash is damaged; write it anew with htpasswd -B")
	}
	if cost > maxCost {
		return fmt.Errorf("the bcrypt cost is %d, which takes seconds for each check; write it anew with htpasswd -B -C 10, at most %d", cost, maxCost)
	}
	return nil
}

// bcryptDigits are what salt and hash are written in.
const bcryptDigits = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

// Verify reports whether password is user's. It takes as long for a user that does
// not exist as for one that does, which is tens of milliseconds or more: callers
// bound how many run.
func (f *File) Verify(user, password string) bool {
	hash, known := f.users[user]
	if !known {
		if len(f.hashes) == 0 {
			return false
		}
		// Which user's cost an unknown one gets is fixed: else he would show by
		// varying.
		hash = f.hashes[maphash.String(f.seed, user)%uint64(len(f.hashes))]
	}
	err := bcrypt.CompareHashAndPassword([]byte(hash), []byte(password[:min(len(password), maxPassword)]))
	return known && err == nil
}

// Hash returns the line's hash of user, or "". It changes with the password.
func (f *File) Hash(user string) string { return f.users[user] }

// Len returns the number of users.
func (f *File) Len() int { return len(f.users) }

// Equal reports whether f and g have the same users with the same hashes.
func (f *File) Equal(g *File) bool {
	if len(f.users) != len(g.users) {
		return false
	}
	for user, hash := range f.users {
		if g.users[user] != hash {
			return false
		}
	}
	return true
}
