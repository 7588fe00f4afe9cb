package e2e

import (
	"debug/elf"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
)

// What "make install" puts in place is whole: static programs, completion, and
// units against which systemd has nothing to say.
func TestWhatMakeInstallPutsInPlace(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "make", "systemd-analyze")
	t.Parallel()
	prefix := t.TempDir()
	units := filepath.Join(prefix, "units")
	if out, err := exec.CommandContext(t.Context(), "make", "-C", checkout, "install", "PREFIX="+prefix, "UNITDIR="+units).CombinedOutput(); err != nil {
		t.Fatalf("make install: %v\n%s", err, out)
	}
	for _, program := range []string{"larder", "larder-plugin", "larder-sidecar"} {
		binary, err := elf.Open(filepath.Join(prefix, "bin", program))
		ok(t, err)
		if binary.Section(".interp") != nil {
			t.Errorf("%s is not a static program", program)
		}
		ok(t, binary.Close())
	}
	for _, file := range []string{"bash-completion/completions/larder", "zsh/site-functions/_larder", "fish/vendor_completions.d/larder.fish"} {
		if !strings.Contains(read(t, filepath.Join(prefix, "share", file)), "__complete") {
			t.Errorf("%s is no completion", file)
		}
	}
	socket, plugin, sidecar := filepath.Join(units, "larder-plugin.socket"), filepath.Join(units, "larder-plugin.service"), filepath.Join(units, "larder-sidecar.service")
	verify := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", "--recursive-errors=no", socket, plugin, sidecar)
	out, err := verify.CombinedOutput()
	if err != nil || strings.Contains(string(out), "larder") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	neverSets(t, read(t, plugin), "PrivateMounts", "ProtectSystem") // or no container sees its mounts
	neverSets(t, read(t, sidecar), "ProtectProc", "PrivateUsers")   // or it does not see what containers use
}

// neverSets looks for settings that a comment of the unit says must not be made,
// these two among them.
func neverSets(t *testing.T, unit string, listed ...string) {
	t.Helper()
	setting := regexp.MustCompile(`\b([A-Z]\w+)=`)
	never := map[string]bool{}
	for line := range strings.Lines(unit) {
		if strings.HasPrefix(line, "#   ") {
			for _, m := range setting.FindAllStringSubmatch(line, -1) {
				never[m[1]] = true
			}
		}
	}
	for _, name := range listed {
		if !never[name] {
			t.Fatalf("the unit does not list %s among what must not be set: %v", name, never)
		}
	}
	for line := range strings.Lines(unit) {
		if name, _, ok := strings.Cut(line, "="); ok && never[name] {
			t.Errorf("%s must not be set, as the unit itself says", strings.TrimSpace(line))
		}
	}
}
