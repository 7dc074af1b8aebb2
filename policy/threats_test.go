package policy

import (
	"fmt"
	"testing"
)

// TestT31SharedPlatforms warns of wildcards over suffixes below which anybody can
// rent a name: whoever fronts one domain by another does it there.
func TestT31SharedPlatforms(t *testing.T) {
	warned := func(pattern string) bool {
		text := fmt.Sprintf("version: 1\ngroups:\n  - {name: g, sources: [10.0.0.0/8], allow: [%q]}\n", pattern)
		_, warnings, err := Load("policy.yaml", []byte(text), Options{})
		if err != nil {
			t.Fatalf("%s: %v", pattern, err)
		}
		return len(warnings) > 0
	}
	for _, suffix := range []string{
		"workers.dev", "pages.dev", "cloudfront.net", "azurewebsites.net", "blob.core.windows.net", "github.io", "gitlab.io", "netlify.app", "vercel.app", "herokuapp.com",
		"s3.amazonaws.com", "web.app", "firebaseapp.com", "ngrok.io", "fly.dev", "onrender.com",
	} {
		for _, form := range []string{"*." + suffix, "." + suffix} {
			if !warned(form) {
				t.Errorf("%s: no warning", form)
			}
		}
		if name := "ours." + suffix; warned(name) {
			t.Errorf("%s: a warning for one name", name)
		}
	}
	if warned(".debian.org") {
		t.Error(".debian.org: a warning for a name of one owner")
	}
}
