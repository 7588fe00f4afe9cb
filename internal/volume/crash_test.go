//go:build faults

package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
)

// life is what an engine asks of the plugin for one container and its volume.
func life(t *testing.T, m *Manager, options map[string]string) {
	t.Helper()
	ctx := t.Context()
	if err := m.Create(ctx, "v", options); err != nil {
		t.Fatal(err)
	}
	dir, err := m.Mount(ctx, "v", "a")
	if err != nil {
		t.Fatal(err)
	}
	if options["access"] != "ro" {
		write(t, dir+"/new", "x")
	}
	if _, err := m.Mount(ctx, "v", "b"); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b"} {
		if err := m.Unmount(ctx, "v", id); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Remove(ctx, "v"); err != nil {
		t.Fatal(err)
	}
}

// The plugin is killed at every step between two changes of the disk or of the
// mount table. Started again, it serves the same calls, and at the end nothing
// is left over.
func TestPluginKilledAtEveryStep(t *testing.T) {
	lives := map[string]map[string]string{
		"run":    {"model": "m"},
		"volume": {"model": "m", "scope": "volume"},
		"ro":     {"model": "m", "access": "ro", "layout": "hf"},
		"size":   {"model": "m", "size": "16MiB"},
		"tmpfs":  {"model": "m", "upper": "tmpfs", "size": "1MiB", "uid": "1000"},
	}
	if root := testenv.Child(); root != "" {
		st, err := store.Open(filepath.Join(root, "store"))
		if err != nil {
			t.Fatal(err)
		}
		m, err := Open(t.Context(), Config{Store: st, State: filepath.Join(root, "node"), Node: "test"})
		if err != nil {
			t.Fatal(err)
		}
		life(t, m, lives[filepath.Base(root)])
		return
	}
	for name, options := range lives {
		steps := 0
		for killed := true; killed; steps++ {
			n := newNode(t)
			root := filepath.Join(t.TempDir(), name)
			if err := os.Rename(n.root, root); err != nil {
				t.Fatal(err)
			}
			n.root = root
			killed = testenv.Rerun(t, root, fmt.Sprintf("kill:%d", steps+1))
			n.check(options)
			if t.Failed() {
				t.Fatalf("%s: after a kill at step %d", name, steps+1)
			}
		}
		if steps < 30 {
			t.Errorf("%s: only %d steps were found", name, steps-1)
		}
		t.Logf("%s: killed at each of %d steps", name, steps-1)
	}
}

// check starts the plugin again and lives the same life.
func (n *node) check(options map[string]string) {
	n.t.Helper()
	n.reopen("")
	if err := errors.Join(n.Sweep(n.t.Context()), n.Reap(n.t.Context())); err != nil {
		n.t.Error(err)
	}
	life(n.t, n.Manager, options)
	n.empty()
	if problems, err := n.store.Verify(n.t.Context(), nil, nil); err != nil || len(problems) > 0 {
		n.t.Errorf("verify: %v %v", problems, err)
	}
}
