package gc

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
)

func refs(t *testing.T, names ...string) (out []reference.Reference) {
	for _, n := range names {
		out = append(out, ref(t, n))
	}
	return out
}

// On a full disk the trash can be emptied, also where the removal that is
// condemned first holds a blob that another one needs.
func TestTheTrashIsEmptiedOnAFullDiskThoughFilesGoToAnotherRemoval(t *testing.T) {
	t.Parallel()
	fsys := testenv.LoopFS(t, "ext4", 32<<20)
	s := open(t, filepath.Join(fsys.Dir, "s"))
	big := make([]byte, 4<<20)
	mustPublish(t, s, "a:1", "shared", string(big))
	mustPublish(t, s, "b:1", "shared", "b alone")
	c := collect(s)
	now := time.Now()
	c.Now = func() time.Time { return now }
	if _, err := c.Remove(t.Context(), refs(t, "a:1"), Options{}); err != nil {
		t.Fatal(err)
	}
	now = now.Add(-time.Hour) // the clock was set back: the later removal is the older one
	if _, err := c.Remove(t.Context(), refs(t, "b:1"), Options{}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(fsys.Dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{1 << 20, 4096, 512, 1} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, n))
		}
	}
	_ = f.Close()
	gone, freed, err := c.EmptyTrash(t.Context(), now.Add(24*time.Hour), store.Limit{})
	if err != nil || len(gone) != 2 || freed < 4<<20 {
		t.Errorf("emptied %d removals and %d bytes: %v", len(gone), freed, err)
	}
}

// One version cannot be read and a removal of another was cut short: rm of the
// damaged one is the remedy, and must work.
func TestADamagedVersionDoesNotKeepARemovalFromBeingFinished(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	a := mustPublish(t, s, "a:1", "of a")
	mustPublish(t, s, "b:1", "of b")
	c := collect(s)
	r, err := c.Remove(t.Context(), refs(t, "b:1"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.Dir(), "trash", r.ID)
	if err := os.Rename(filepath.Join(dir, "removal.json"), filepath.Join(dir, "pending.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(s.BlobPath(a.Digest), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.BlobPath(a.Digest), []byte("rotten"), 0o444); err != nil {
		t.Fatal(err)
	}
	if _, err := collect(s).Remove(t.Context(), refs(t, "a:1"), Options{}); err != nil {
		t.Errorf("rm of the damaged version: %v", err)
	}
	if _, _, err := collect(s).EmptyTrash(t.Context(), time.Now().Add(time.Hour), store.Limit{}); err != nil {
		t.Errorf("empty trash: %v", err)
	}
}

// A read error that passes (here: a folder in the manifest's place) while the
// trash is emptied in part must not delete what the rest needs to be undone.
func TestTheTrashStaysWhereItCannotBeReadWhatUndoNeeds(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	a := mustPublish(t, s, "a:1", "shared", "of a")
	mustPublish(t, s, "b:1", "shared", "of b")
	c := collect(s)
	now := time.Now()
	c.Now = func() time.Time { return now }
	ra, err := c.Remove(t.Context(), refs(t, "a:1"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Remove(t.Context(), refs(t, "b:1"), Options{}); err != nil {
		t.Fatal(err)
	}
	man := filepath.Join(s.Dir(), "trash", ra.ID, a.Digest.Encoded())
	if err := os.Rename(man, man+".aside"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(man, 0o755); err != nil { // EISDIR stands for EIO, EMFILE, ESTALE
		t.Fatal(err)
	}
	err = s.Exclusive(t.Context(), func(x *store.Exclusive) error {
		_, err := x.Condemn(func(r store.Removal) bool { return r.ID != ra.ID })
		return err
	})
	if err == nil {
		t.Error("a removal was condemned, and it is not known what the other needs of it")
	}
	if _, err := s.Shred(t.Context(), store.Limit{}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(man), os.Rename(man+".aside", man)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Undo(t.Context(), ra.ID); err != nil {
		t.Errorf("undo once the disk reads again: %v", err)
	}
}

// What an artifact manifest of another tool reaches stays.
func TestWhatAnUnknownManifestNamesStays(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	l, err := s.NewLease(t.Context(), "node", "test")
	if err != nil {
		t.Fatal(err)
	}
	blob, err := s.PutBlob(t.Context(), l, []byte("of another tool"))
	if err != nil {
		t.Fatal(err)
	}
	const kind = "application/vnd.oci.artifact.manifest.v1+json"
	man, _ := json.Marshal(map[string]any{"mediaType": kind, "artifactType": "x/y", "blobs": []v1.Descriptor{{MediaType: "x/y", Digest: blob, Size: 15}}})
	d, err := s.PutBlob(t.Context(), l, man)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.Dir(), "index.json")
	var index v1.Index
	data, _ := os.ReadFile(path)
	if err := json.Unmarshal(data, &index); err != nil {
		t.Fatal(err)
	}
	index.Manifests = append(index.Manifests, v1.Descriptor{MediaType: kind, Digest: d, Size: int64(len(man)), Annotations: map[string]string{v1.AnnotationRefName: "x"}})
	data, _ = json.Marshal(index)
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	_ = l.Release()
	dropLeftovers(t, s, 0)
	if _, ok, _ := s.Stat(digest.FromString("of another tool")); !ok {
		t.Error("the blob of an artifact manifest in index.json was deleted for good")
	}
}
