package main

import (
	"bytes"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/volume"
)

func page(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestEveryVerbAndFlagIsInTheManual(t *testing.T) {
	t.Parallel()
	text := page(t, "cli.md")
	var visit func(*cobra.Command)
	visit = func(c *cobra.Command) {
		if c.Runnable() && c.HasParent() && !strings.Contains(text, c.Name()) {
			t.Errorf("docs/cli.md does not mention %s", c.CommandPath())
		}
		c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
			if f.Name != "help" && !strings.Contains(text, "--"+f.Name) && !strings.Contains(text, "-"+f.Shorthand+"`") && !strings.Contains(text, "`-"+f.Shorthand+" ") {
				t.Errorf("docs/cli.md does not mention --%s of %s", f.Name, c.CommandPath())
			}
		})
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	a := &app{out: os.Stdout, err: os.Stderr, lookup: os.LookupEnv}
	visit(a.root())
}

func TestEverySettingIsInTheManual(t *testing.T) {
	t.Parallel()
	text := page(t, "cli.md")
	for _, k := range config.Keys() {
		row := "| `" + k.Name + "` |"
		at := strings.Index(text, row)
		if at < 0 {
			t.Errorf("docs/cli.md has no row for the setting %s", k.Name)
			continue
		}
		line, _, _ := strings.Cut(text[at:], "\n")
		for _, want := range append(k.Env, k.Default) {
			if !strings.Contains(line, want) {
				t.Errorf("docs/cli.md: the row of %s does not have %q: %s", k.Name, want, line)
			}
		}
		flag := "--" + k.Flag + "`"
		if k.Program != "" {
			flag = k.Program + " " + flag
		}
		if k.Flag != "" && !strings.Contains(line, "`"+flag) {
			t.Errorf("docs/cli.md: the row of %s does not have %s", k.Name, flag)
		}
	}
}

func TestEveryVolumeOptionIsOnItsPage(t *testing.T) {
	t.Parallel()
	text := page(t, "options.md")
	for _, name := range options(t) {
		if !regexp.MustCompile("(?m)^\\|[^|]*`" + name + "`").MatchString(text) {
			t.Errorf("docs/options.md has no row for %s", name)
		}
	}
}

// options lists the names of all options of volumes.
func options(t *testing.T) []string {
	t.Helper()
	_, err := volume.ParseOptions("x", map[string]string{"zzz": ""})
	if err == nil {
		t.Fatal("an unknown option is accepted")
	}
	_, list, ok := strings.Cut(err.Error(), "known are ")
	if !ok {
		t.Fatalf("the refusal does not list the options: %v", err)
	}
	return strings.Split(list, ", ")
}

func TestCompletionOffersTheOptionsOfAMountAndTheirValues(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	a := &app{out: &out, err: io.Discard, lookup: os.LookupEnv}
	root := a.root()
	root.SetArgs([]string{"__complete", "mount", "tiny", "folder", "--option", ""})
	if err := root.Execute(); err != nil {
		t.Fatal(err)
	}
	offered := map[string]bool{}
	for line := range strings.Lines(out.String()) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			continue
		}
		offered[key] = true
		if value == "" {
			continue // a number, which a person knows
		}
		raw := map[string]string{"model": "tiny", "layout": "hf"}
		raw[key] = value
		if _, err := volume.ParseOptions("x", raw); err != nil {
			t.Errorf("%s=%s is offered and refused: %v", key, value, err)
		}
	}
	for _, name := range options(t) {
		// The model is an argument; mount fetches nothing.
		if want := name != "model" && name != "pull"; offered[name] != want {
			t.Errorf("completion offers %s: %v, want %v", name, offered[name], want)
		}
	}
}

func TestEveryExitCodeHasAWord(t *testing.T) {
	t.Parallel()
	text := page(t, "cli.md")
	for exit := exitFailed; exit <= exitDamaged; exit++ {
		if !strings.Contains(text, "`"+code(exit)+"`") {
			t.Errorf("docs/cli.md does not have the code %s", code(exit))
		}
	}
}
