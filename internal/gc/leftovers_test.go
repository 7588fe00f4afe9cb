package gc

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
)

func dropLeftovers(t *testing.T, s *store.Store, hold time.Duration) int64 {
	t.Helper()
	c := collect(s)
	inv, err := c.Look(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n, err := c.DropLeftovers(t.Context(), inv.Leftovers(hold), store.Limit{})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestLeftoversAreWhatNothingNeeds(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "m:1", "needed")
	lease, err := s.NewLease(t.Context(), "node", "pull")
	if err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"orphan", "of a pull under way"} {
		l := lease
		if content == "orphan" {
			if l, err = s.NewLease(t.Context(), "node", "pull"); err != nil {
				t.Fatal(err)
			}
			defer l.Release()
		}
		if _, err := s.PutBlob(t.Context(), l, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if content == "orphan" {
			if err := l.Release(); err != nil {
				t.Fatal(err)
			}
		}
	}
	broken, err := s.Ingest(t.Context(), "sha256-broken")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := broken.File().WriteAt([]byte("half"), 0); err != nil {
		t.Fatal(err)
	}
	if err := broken.Close(); err != nil {
		t.Fatal(err)
	}
	busy, err := s.Ingest(t.Context(), "sha256-busy")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	if n := dropLeftovers(t, s, time.Hour); n != 0 || !has(t, s, "orphan") {
		t.Errorf("%d bytes of this minute went as older than an hour", n)
	}
	if n := dropLeftovers(t, s, 0); n == 0 {
		t.Error("nothing went")
	}
	if has(t, s, "orphan") || !has(t, s, "of a pull under way") || !has(t, s, "needed") {
		t.Error("the wrong blobs are left")
	}
	left, err := filepath.Glob(filepath.Join(s.Dir(), "ingest", "*"))
	if err != nil || len(left) != 1 || filepath.Base(left[0]) != "sha256-busy" {
		t.Errorf("left in ingest: %v, %v", left, err)
	}
	if err := lease.Release(); err != nil {
		t.Fatal(err)
	}
	dropLeftovers(t, s, 0)
	if has(t, s, "of a pull under way") {
		t.Error("what the pull left is still there")
	}
	checkClean(t, s)
}

// Files of a removal that was cut short, and files that are needed to undo one,
// are nobody's leftovers.
func TestLeftoversAreNotWhatUndoNeeds(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "cut:1", "of a removal cut short")
	mustPublish(t, s, "m:1", "leased", "other")
	lease, err := s.NewLease(t.Context(), "node", "pull")
	if err != nil {
		t.Fatal(err)
	}
	if err := lease.Hold(t.Context(), digest.FromString("leased")); err != nil {
		t.Fatal(err)
	}
	r, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	// The pull ends, and what it held stays behind in the store.
	if err := lease.Release(); err != nil {
		t.Fatal(err)
	}
	cut := remove(t, s, "cut:1")
	dir := filepath.Join(s.Dir(), "trash", cut.ID)
	if err := os.Rename(filepath.Join(dir, "removal.json"), filepath.Join(dir, "pending.json")); err != nil {
		t.Fatal(err)
	}
	content := digest.FromString("of a removal cut short")
	if err := os.Rename(filepath.Join(dir, content.Encoded()), s.BlobPath(content)); err != nil {
		t.Fatal(err)
	}
	dropLeftovers(t, s, 0)
	for _, id := range []string{r.ID, cut.ID} {
		undo(t, s, id)
	}
	if !resolves(t, s, "m:1") || !resolves(t, s, "cut:1") {
		t.Error("not everything is back")
	}
	checkClean(t, s)
}
