package huggingface

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestToken(t *testing.T) {
	dir := t.TempDir()
	write := func(path, content string) string {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("home/.cache/huggingface/token", "of_home\n")
	write("hf/token", "  of_hf_home\r\n")
	write("xdg/huggingface/token", "of_xdg")
	write("home/other/token", "of_tilde")
	own := write("own", "of_path\n")
	empty := write("empty", "\n")
	long := write("long", strings.Repeat("x", 100_000))
	home := filepath.Join(dir, "home")

	for _, c := range []struct {
		name string
		env  map[string]string
		want string
		bad  bool
	}{
		{name: "nothing"},
		{name: "HF_TOKEN", env: map[string]string{"HF_TOKEN": " a\n", "HUGGING_FACE_HUB_TOKEN": "b", "HOME": home}, want: "a"},
		{name: "the old name", env: map[string]string{"HUGGING_FACE_HUB_TOKEN": "b", "HOME": home}, want: "b"},
		{name: "empty is none", env: map[string]string{"HF_TOKEN": " \n", "HOME": home}, want: "of_home"},
		{name: "home", env: map[string]string{"HOME": home}, want: "of_home"},
		{name: "XDG_CACHE_HOME", env: map[string]string{"HOME": home, "XDG_CACHE_HOME": dir + "/xdg"}, want: "of_xdg"},
		{name: "HF_HOME", env: map[string]string{"HOME": home, "XDG_CACHE_HOME": dir + "/xdg", "HF_HOME": dir + "/hf"}, want: "of_hf_home"},
		{name: "HF_HOME with a tilde", env: map[string]string{"HOME": home, "HF_HOME": "~/other"}, want: "of_tilde"},
		{name: "HF_HOME with a variable", env: map[string]string{"HOME": home, "D": dir, "HF_HOME": "$D/hf"}, want: "of_hf_home"},
		{name: "HF_TOKEN_PATH", env: map[string]string{"HOME": home, "HF_HOME": dir + "/hf", "HF_TOKEN_PATH": own}, want: "of_path"},
		{name: "empty file", env: map[string]string{"HF_TOKEN_PATH": empty}},
		{name: "no file", env: map[string]string{"HF_TOKEN_PATH": dir + "/absent"}},
		{name: "below a file", env: map[string]string{"HF_TOKEN_PATH": own + "/token"}},
		{name: "a folder", env: map[string]string{"HF_TOKEN_PATH": dir}, bad: true},
		{name: "no token at all", env: map[string]string{"HF_TOKEN_PATH": long}, bad: true},
		{name: "not to be used", env: map[string]string{"HF_TOKEN": "a", "HOME": home, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}},
		{name: "not to be used, in words", env: map[string]string{"HF_TOKEN": "a", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "True"}},
		{name: "to be used", env: map[string]string{"HF_TOKEN": "a", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}, want: "a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Token(func(name string) string { return c.env[name] })
			if got != c.want || (err != nil) != c.bad {
				t.Errorf("token %.20q, error %v; want %q", got, err, c.want)
			}
		})
	}
}
