package discovery

import "testing"

func TestHarmless(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "api.example": "api.example", "a-b.example": "a-b.example", "1; 2": "1; 2",
		"=1+1": "'=1+1", "+1": "'+1", "-1": "'-1", "@SUM(1)": "'@SUM(1)", "|calc": "'|calc", "%1": "'%1", "\uff1d1": "'\uff1d1", "\uff0d1": "'\uff0d1",
		"a;=cmd|' /C calc'!A0": "a;'=cmd|' /C calc'!A0", `a; "=1`: `a; "'=1`, "a;;@x": "a;;'@x",
	} {
		if got := Harmless(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
