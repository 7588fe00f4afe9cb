package retention

import (
	"os"
	"strings"
	"testing"
)

func TestExplanations(t *testing.T) {
	t.Parallel()
	explain := func(p *Policy) string {
		text := p.Explain()
		if w := p.Warnings(); len(w) > 0 {
			text += "\n" + strings.Join(w, "\n") + "\n"
		}
		return text
	}
	for _, name := range Profiles() {
		p, err := Profile(name)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "profile-"+name+".golden", explain(p))
	}
	for _, name := range []string{"all", "warned", "nothing"} {
		data, err := os.ReadFile("testdata/" + name + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		p, err := Parse(name+".yaml", data)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name+".golden", explain(p))
	}
}

func TestOnePatternCoversAnotherOnlyIfSurely(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		a, b string
		want bool
	}{
		{"*", "anything", true}, {"*", "ci-*", true}, {"ci-*", "ci-*-?", true}, {"ci-*", "ci-x", true}, {"ci-?", "ci-?", true},
		{"ci-*", "c*", false}, {"ci-?", "ci-*", false}, {"ci-?", "ci-x", false}, {"*", "[a-z]", false}, {"a*b", "a*", false},
	} {
		if got := covers(tc.a, tc.b); got != tc.want {
			t.Errorf("%q covers %q: %t", tc.a, tc.b, got)
		}
	}
}
