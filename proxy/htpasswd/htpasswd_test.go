package htpasswd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/bcrypt"
)

// The hashes were made by crypt(3) of libxcrypt, which this package does not use.
const users = `# made for tests
anna:$2y$04$abcdefghijklmnopqrstuuMpJrcCqxu./d72BVUEfVMDuscd4ndPG

scott:$2a$05$abcdefghijklmnopqrstuuidFhfDZGjd4MKbhrHXQQrcYS1IRYxwe` + "\r" + `
deploy-bot:$2b$04$abcdefghijklmnopqrstuudAV6i5Cq6SPBey/gzDWETbwdB3VNepO  ` + `
long:$2y$04$abcdefghijklmnopqrstuubzadhGtS2zEF.gu0yd0opP6cVzb.e0i`

func TestVerify(t *testing.T) {
	f, err := Parse("users", []byte(users))
	if err != nil {
		t.Fatal(err)
	}
	if f.Len() != 4 {
		t.Errorf("Len() = %d", f.Len())
	}
	for _, tt := range []struct {
		user, password string
		want           bool
	}{
		{"anna", "s3cret-pässwört", true},
		{"scott", "tiger", true},
		{"deploy-bot", "b-ok", true},
		{"long", strings.Repeat("x", 80), true},
		{"long", strings.Repeat("x", 72), true}, // bcrypt sees no more
		{"long", strings.Repeat("x", 71), false},
		{"anna", "", false},
		{"anna", "tiger", false},
		{"Anna", "s3cret-pässwört", false},
		{"nobody", "tiger", false},
		{"", "", false},
	} {
		if got := f.Verify(tt.user, tt.password); got != tt.want {
			t.Errorf("Verify(%q, %q) = %v", tt.user, tt.password, got)
		}
	}
	none, err := Parse("users", nil)
	if err != nil || none.Verify("anna", "x") {
		t.Errorf("an empty file: %v, or it knows somebody", err)
	}
	same, err := Parse("users", []byte(users))
	if err != nil || !f.Equal(same) || f.Equal(none) || none.Equal(f) {
		t.Error("Equal does not tell files apart")
	}
}

func TestMistakes(t *testing.T) {
	const good = "$2y$04$abcdefghijklmnopqrstuuMpJrcCqxu./d72BVUEfVMDuscd4ndPG"
	for _, tt := range []struct{ text, want string }{
		{"anna:$apr1$abcdefgh$secrethash", "users:1:6: user anna: the password is hashed with MD5 (htpasswd -m); only bcrypt is read"},
		{"\nanna:{SHA}secrethash=", "users:2:6: user anna: the password is hashed with SHA-1 (htpasswd -s)"},
		{"anna:$6$salt$secrethash", "SHA-512 crypt"},
		{"anna:$2x$04$" + good[7:], "$2x$"},
		{"anna:secrethash", "users:1:6: user anna: the password is not hashed with bcrypt"},
		{"anna:", "not hashed with bcrypt"},
		{"anna:" + good[:59], "the bcrypt hash is damaged"},
		{"anna:" + good + "A", "damaged"},
		{"anna:" + good[:20] + "!" + good[21:], "damaged"},
		{"anna:" + good + ":more", "damaged"},
		{"anna:$2y$03$" + good[7:], "damaged"},
		{"anna:$2y$15$" + good[7:], "the bcrypt cost is 15"},
		{"anna:$2y$31$" + good[7:], "the bcrypt cost is 31"},
		{"secrethash", "users:1:1: no colon"},
		{":" + good, "users:1:1: not the name of a user"},
		{"an na:" + good, "not the name of a user"},
		{"an\x1bna:" + good, "not the name of a user"},
		{"an\xffna:" + good, "not the name of a user"},
		{strings.Repeat("a", 256) + ":" + good, "not the name of a user"},
		{"anna:" + good + "\nbert:" + good + "\nanna:" + good, "users:3:1: user anna is listed already"},
		{strings.Repeat("x", maxFile+1), "larger than"},
	} {
		_, err := Parse("users", []byte(tt.text))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Parse(%.60q): %v, want %q", tt.text, err, tt.want)
		} else if strings.Contains(err.Error(), "secrethash") {
			t.Errorf("Parse(%.60q) repeats the hash: %v", tt.text, err)
		}
	}
	many, err := Parse("users", []byte(strings.Repeat("x\n", 1000)))
	if many != nil || strings.Count(err.Error(), "\n") != maxMistakes-1 {
		t.Errorf("%d mistakes reported", strings.Count(err.Error(), "\n")+1)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "users")
	if _, err := Load(name); err == nil || !strings.HasPrefix(err.Error(), name+": read users: no such file") {
		t.Errorf("a missing file: %v", err)
	}
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a folder: %v", err)
	}
	if err := os.WriteFile(name, []byte(users), 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := Load(name); err != nil || f.Hash("scott") == "" || f.Hash("nobody") != "" {
		t.Errorf("Load: %v", err)
	}
}

// Whatever is taken for a hash, bcrypt can work with.
func FuzzParse(f *testing.F) {
	f.Add([]byte(users))
	f.Add([]byte("a:$2y$04$abcdefghijklmnopqrstuuMpJrcCqxu./d72BVUEfVMDuscd4ndPG"))
	f.Add([]byte("a:$2b$99$abcdefghijklmnopqrstuuMpJrcCqxu./d72BVUEfVMDuscd4ndPG:b"))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse("users", data)
		if err != nil {
			return
		}
		for user, hash := range file.users {
			if !ValidUser(user) {
				t.Errorf("user %q", user)
			}
			if cost, err := bcrypt.Cost([]byte(hash)); err != nil || cost > maxCost {
				t.Errorf("hash %q: cost %d, %v", hash, cost, err)
			}
			if !strings.Contains(hash, "$04$") { // the others take their time
				continue
			}
			if err := bcrypt.CompareHashAndPassword([]byte(hash), []byte("x")); err != nil && !errors.Is(err, bcrypt.ErrMismatchedHashAndPassword) {
				t.Errorf("hash %q: %v", hash, err)
			}
		}
	})
}
