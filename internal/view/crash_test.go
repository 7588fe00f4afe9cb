package view

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/testenv"
)

// A builder that dies at any step leaves no folder under the view's name
// unless it is whole, and whoever comes next builds it.
func TestBuildKilledAtEveryStep(t *testing.T) {
	testenv.NeedRoot(t)
	contents := []string{"one", "two"}
	tree := func() Tree {
		return plan(t, Spec{Layout: HF, Models: []Model{model("x", file("a", contents[0]), file("b/c", contents[1]))}})
	}
	if store := testenv.Child(); store != "" {
		if err := Build(t.Context(), filepath.Join(filepath.Dir(store), "view"), tree(), Lower, store); err != nil {
			t.Fatal(err)
		}
		return
	}
	for step := 1; ; step++ {
		store := blobs(t, contents...)
		dir := filepath.Join(filepath.Dir(store), "view")
		killed := testenv.Rerun(t, store, fmt.Sprintf("kill:%d", step))
		if _, err := os.Lstat(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		} else if err == nil {
			wantWhole(t, dir, tree())
		}
		if err := Build(t.Context(), dir, tree(), Lower, store); err != nil {
			t.Fatalf("after a death at step %d: %v", step, err)
		}
		wantWhole(t, dir, tree())
		entries, err := os.ReadDir(filepath.Dir(store))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != "view" && e.Name() != "blobs" && !atomicfile.IsTemp(e.Name()) {
				t.Errorf("after a death at step %d there is %s", step, e.Name())
			}
		}
		if !killed {
			if step < 20 {
				t.Fatalf("only %d steps were seen", step)
			}
			return
		}
	}
}

func wantWhole(t *testing.T, dir string, tree Tree) {
	t.Helper()
	for _, e := range tree.Entries {
		if _, err := os.Lstat(filepath.Join(dir, e.Path)); err != nil {
			t.Error(err)
		}
		if e.Kind == Blob && xattr(t, filepath.Join(dir, e.Path), xattrRedirect) == "none" {
			t.Errorf("%s points nowhere", e.Path)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, blobFolder)); err != nil {
		t.Error(err)
	}
}
