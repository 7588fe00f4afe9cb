package reference

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func TestParse(t *testing.T) {
	t.Parallel()
	hex := strings.Repeat("ab", 32)
	for in, want := range map[string]Reference{
		"hf://Qwen/Qwen2.5-0.5B": {Kind: Hub, Repo: "Qwen/Qwen2.5-0.5B", Revision: "main"},
		"hf://gpt2@v1.0":         {Kind: Hub, Repo: "gpt2", Revision: "v1.0"},
		"hf://o/n@refs/pr/1":     {Kind: Hub, Repo: "o/n", Revision: "refs/pr/1"},
		"qwen":                   {Kind: Short, Repo: "qwen"},
		"qwen:1.9.3":             {Kind: Short, Repo: "qwen", Tag: "1.9.3"},
		"team/qwen2.5:latest":    {Kind: Short, Repo: "team/qwen2.5", Tag: "latest"},
		"qwen:~1.9":              {Kind: Short, Repo: "qwen", Constraint: "~1.9"},
		"qwen:^2":                {Kind: Short, Repo: "qwen", Constraint: "^2"},
		"qwen:>=1.2, <2":         {Kind: Short, Repo: "qwen", Constraint: ">=1.2, <2"},
		"qwen:1.9.x":             {Kind: Short, Repo: "qwen", Constraint: "1.9.x"},
		"qwen@sha256:" + hex:     {Kind: Short, Repo: "qwen", Digest: digest.Digest("sha256:" + hex)},
		"sha256:" + hex:          {Kind: Digest, Digest: digest.Digest("sha256:" + hex)},
	} {
		got, err := Parse(in)
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", in, diff)
		}
		again, err := Parse(got.String())
		if err != nil || again != got {
			t.Errorf("%q: its canonical form %q is read as %v, %v", in, got, again, err)
		}
	}
}

func TestWhatIsNoReferenceIsRefusedWithAReason(t *testing.T) {
	t.Parallel()
	for in, reason := range map[string]string{
		"":                         "empty",
		"Qwen":                     "lower-case: qwen",
		"hf://":                    "not a hub repository",
		"hf://a/b/c":               "more parts",
		"hf://../x":                "not a hub repository",
		"hf://o/n@../x":            "not a revision",
		"hf://o/n@a..b":            "not a revision",
		"hf://o--x/n":              "not a hub repository",
		"s3://bucket/x":            "only hf://",
		"sha256:abc":               "not a digest",
		"qwen@sha256:zz":           "not a digest",
		"qwen:":                    "not a tag",
		"qwen:a/b":                 "not a tag",
		"qwen:~x.y":                "not a version constraint",
		"../qwen":                  "not a name",
		"qwen/..":                  "not a name",
		"registry.example.com/a:1": "registry",
		"localhost/a":              "registry",
		strings.Repeat("a", 600):   "longer",
		"a\x00b":                   "not a name",
		"-a":                       "not a name",
	} {
		_, err := Parse(in)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: got %v, want ErrInvalid with %q", in, err, reason)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"hf://o/n@main", "qwen:~1.9", "a/b:1", "sha256:" + strings.Repeat("0", 64), "x@sha256:" + strings.Repeat("0", 64)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := Parse(s)
		if err != nil {
			return
		}
		again, err := Parse(r.String())
		if err != nil || again != r {
			t.Fatalf("%q: its canonical form %q is read as %v, %v", s, r, again, err)
		}
		for _, part := range []string{r.Repo, r.Revision, r.Tag} {
			for _, seg := range strings.Split(part, "/") {
				if seg == ".." || seg == "." || strings.ContainsAny(seg, "\x00\\") {
					t.Fatalf("%q has the part %q", s, part)
				}
			}
		}
	})
}
