//go:build faults

package gc

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
)

// At every step between two changes of the disk a removal is killed. What was
// published and not named stays whole, nothing half-removed can be seen, and
// the same call again succeeds.
func TestRemoveKilledAtEveryStep(t *testing.T) {
	if dir := testenv.Child(); dir != "" {
		if _, err := collect(open(t, dir)).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{}); err != nil {
			t.Fatal(err)
		}
		return
	}
	everyStep(t, func(t *testing.T, s *store.Store) {
		if _, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{}); err != nil {
			t.Fatalf("the same call again: %v", err)
		}
		if has(t, s, "only in 1") {
			t.Error("a blob that nothing reaches is left")
		}
		if _, err := s.Resolve(ref(t, "m:1")); err == nil {
			t.Error("the removed name is still there")
		}
	})
}

// Undo likewise: afterwards, or after the same call again, everything is back.
func TestUndoKilledAtEveryStep(t *testing.T) {
	undo := func(t *testing.T, s *store.Store) {
		trash, err := s.Trash()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range trash {
			err := s.Exclusive(t.Context(), func(x *store.Exclusive) error { _, err := x.Restore(r.ID, nil); return err })
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if dir := testenv.Child(); dir != "" {
		s := open(t, dir)
		// Its steps come first and are the same each time; only those of undo
		// are new here, but a kill in any of them must be harmless.
		if _, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{}); err != nil {
			t.Fatal(err)
		}
		undo(t, s)
		return
	}
	everyStep(t, func(t *testing.T, s *store.Store) {
		if _, err := collect(s).Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		undo(t, s)
		if _, err := s.Resolve(ref(t, "m:1")); err != nil {
			t.Errorf("after undo: %v", err)
		}
		if !has(t, s, "only in 1") {
			t.Error("after undo a blob is missing")
		}
	})
}

func everyStep(t *testing.T, check func(*testing.T, *store.Store)) {
	for n := 1; ; n++ {
		dir := filepath.Join(t.TempDir(), "s")
		s := open(t, dir)
		mustPublish(t, s, "m:1", "shared", "only in 1")
		mustPublish(t, s, "m:2", "shared", "only in 2")
		killed := testenv.Rerun(t, dir, fmt.Sprintf("kill:%d", n))
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			checkClean(t, s)
			if _, err := s.Resolve(ref(t, "m:2")); err != nil {
				t.Errorf("a version that was not named is gone: %v", err)
			}
			check(t, s)
			checkClean(t, s)
			if !has(t, s, "shared") || !has(t, s, "only in 2") {
				t.Error("a blob of another version is gone")
			}
		})
		if !killed {
			if n < 10 {
				t.Fatalf("only %d steps were found", n-1)
			}
			t.Logf("killed at each of %d steps", n-1)
			return
		}
	}
}
