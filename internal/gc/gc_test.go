package gc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage"
)

func open(t *testing.T, dir string) *store.Store {
	t.Helper()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ref(t *testing.T, name string) reference.Reference {
	t.Helper()
	r, err := reference.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func publish(ctx context.Context, s *store.Store, name string, contents ...string) (store.Version, error) {
	return publishModel(ctx, s, name, func(*modelpack.Model) {}, contents...)
}

func publishModel(ctx context.Context, s *store.Store, name string, edit func(*modelpack.Model), contents ...string) (store.Version, error) {
	l, err := s.NewLease(ctx, "node", "test")
	if err != nil {
		return store.Version{}, err
	}
	defer l.Release()
	var m modelpack.Model
	for i, content := range contents {
		d, err := s.PutBlob(ctx, l, []byte(content))
		if err != nil {
			return store.Version{}, err
		}
		m.Files = append(m.Files, modelpack.File{Path: fmt.Sprint("f", i), Digest: d, Size: int64(len(content))})
	}
	r, err := reference.Parse(name)
	if err != nil {
		return store.Version{}, err
	}
	edit(&m)
	return s.Publish(ctx, l, m, []reference.Reference{r})
}

// collect is a collector for the node "node".
func collect(s *store.Store, sources ...usage.Source) *Collector {
	return &Collector{Store: s, Node: "node", Sources: sources}
}

func mustPublish(t *testing.T, s *store.Store, name string, contents ...string) store.Version {
	t.Helper()
	v, err := publish(t.Context(), s, name, contents...)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// has tells whether the blob of a content is there.
func has(t *testing.T, s *store.Store, content string) bool {
	t.Helper()
	_, ok, err := s.Stat(digest.FromString(content))
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

type uses []usage.Use

func (uses) Name() string { return "test" }

func (u uses) Uses(context.Context) ([]usage.Use, error) { return u, nil }

type broken struct{ error }

func (broken) Name() string { return "broken" }

func (b broken) Uses(context.Context) ([]usage.Use, error) { return nil, b.error }

func checkClean(t *testing.T, s *store.Store) {
	t.Helper()
	if problems, err := s.Verify(t.Context(), nil, nil); err != nil || len(problems) > 0 {
		t.Errorf("verify: %v %v", problems, err)
	}
}

func TestRemoveTakesOnlyWhatNothingElseReaches(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "m:1", "shared", "only in 1")
	mustPublish(t, s, "m:2", "shared", "only in 2")
	dry, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	if !has(t, s, "only in 1") {
		t.Fatal("a dry run removed a blob")
	}
	got, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{Reason: "test"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(dry.Blobs, got.Blobs) || dry.Bytes != got.Bytes {
		t.Errorf("the dry run said %v, the run did %v", dry.Blobs, got.Blobs)
	}
	if has(t, s, "only in 1") || !has(t, s, "shared") || !has(t, s, "only in 2") {
		t.Error("the wrong blobs are left")
	}
	if got.Kept != int64(len("shared")) {
		t.Errorf("%d bytes were said to be shared, want %d", got.Kept, len("shared"))
	}
	checkClean(t, s)
	// Repeated, it says so; undone, everything is back.
	again, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{})
	if err != nil || !again.Already {
		t.Errorf("repeat: %+v %v, want Already", again, err)
	}
	err = s.Exclusive(t.Context(), func(x *store.Exclusive) error { _, err := x.Restore(got.ID, nil); return err })
	if err != nil {
		t.Fatal(err)
	}
	if !has(t, s, "only in 1") {
		t.Error("undo did not bring the blob back")
	}
	if _, err := s.Resolve(ref(t, "m:1")); err != nil {
		t.Error(err)
	}
	checkClean(t, s)
}

func TestRemoveOfOneNameLeavesTheOthers(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	v := mustPublish(t, s, "m:1", "a")
	if _, err := s.Tag(t.Context(), v.Digest, ref(t, "m:stable")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"m", "m:~1"} {
		if _, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, name)}, Options{}); !errors.Is(err, ErrAmbiguous) {
			t.Errorf("%s: got %v, want ErrAmbiguous", name, err)
		}
	}
	got, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{})
	if err != nil || len(got.Versions) != 0 || got.Bytes != 0 || !has(t, s, "a") {
		t.Errorf("got %+v %v; the version has another name and must stay", got, err)
	}
	got, err = collect(s).Remove(t.Context(), []reference.Reference{ref(t, string(v.Digest))}, Options{Now: true})
	if err != nil || len(got.Versions) != 1 || has(t, s, "a") {
		t.Errorf("got %+v %v; by its digest the whole version goes", got, err)
	}
	// "Now" is said of what is removed now; the trash keeps the rest.
	if trash, err := s.Trash(); err != nil || len(trash) != 1 || trash[0].References[0].Annotations[v1.AnnotationRefName] != "m:1" {
		t.Errorf("the trash has %v, %v; the earlier removal was to be kept", trash, err)
	}
}

func TestVersionInUseIsRefusedByEveryKindOfUse(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	v := mustPublish(t, s, "m:1", "a")
	try := func(sources ...usage.Source) error {
		_, err := collect(s, sources...).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{})
		return err
	}
	var inUse *InUseError
	if err := try(uses{{Version: v.Digest, By: "volume x"}}); !errors.As(err, &inUse) || !errors.Is(err, store.ErrInUse) || inUse.Uses[0].By != "volume x" {
		t.Errorf("a volume: got %v", err)
	}
	failure := errors.New("mount table unreadable")
	if err := try(uses{}, broken{failure}); !errors.Is(err, failure) {
		t.Errorf("a root that cannot be read: got %v, want it to stop the removal", err)
	}
	if err := s.Shared(t.Context(), func() error { return s.Use("other", v.Digest) }); err != nil {
		t.Fatal(err)
	}
	if err := try(); !errors.Is(err, store.ErrInUse) {
		t.Errorf("another node: got %v, want ErrInUse", err)
	}
	// A name that a volume goes by stays though the version has another one.
	if _, err := s.Tag(t.Context(), v.Digest, ref(t, "m:2")); err != nil {
		t.Fatal(err)
	}
	if err := try(uses{{Version: v.Digest, By: "volume x", Reference: "m:1"}}); !errors.Is(err, store.ErrInUse) {
		t.Errorf("the name that a volume goes by: got %v, want ErrInUse", err)
	}
	if !has(t, s, "a") {
		t.Error("a refused removal removed a blob")
	}
	if err := try(); err != nil { // m:2 stays, and with it the other node's version
		t.Errorf("a mere name: %v", err)
	}
}

func TestLeasedBlobsStay(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "m:1", "held", "free")
	l, err := s.NewLease(t.Context(), "node", "pull")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	if err := l.Hold(t.Context(), digest.FromString("held")); err != nil {
		t.Fatal(err)
	}
	if _, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{}); err != nil {
		t.Fatal(err)
	}
	if !has(t, s, "held") || has(t, s, "free") {
		t.Error("the wrong blobs are left")
	}
}

func TestDamagedManifestOfAnotherVersionStopsRemoval(t *testing.T) {
	t.Parallel()
	dir := t.TempDir() + "/s"
	s := open(t, dir)
	mustPublish(t, s, "m:1", "a")
	other := mustPublish(t, s, "m:2", "b")
	if err := os.Remove(s.BlobPath(other.Digest)); err != nil {
		t.Fatal(err)
	}
	if _, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{}); err == nil {
		t.Error("removed, though what another version needs is not known")
	}
	if !has(t, s, "a") {
		t.Error("a refused removal removed a blob")
	}
	// The damaged one itself can go.
	if _, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:2")}, Options{}); err != nil {
		t.Error(err)
	}
}

func TestPullsThatReuseWhatIsBeingRemovedEndWhole(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	stop := make(chan struct{})
	var removing, pulling sync.WaitGroup
	removing.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			versions, err := s.Versions()
			if err != nil {
				t.Error(err)
				return
			}
			for _, v := range versions {
				if slices.ContainsFunc(v.References, func(r string) bool { return r == "old:1" }) {
					_, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "old:1")}, Options{Now: true})
					if err != nil && !errors.Is(err, store.ErrNotFound) {
						t.Error(err)
					}
				}
			}
		}
	})
	for w := range 4 {
		pulling.Go(func() {
			own := open(t, s.Dir())
			for i := range 15 {
				mustPublish(t, own, "old:1", "shared one", "shared two", fmt.Sprint("old", w, i))
				mustPublish(t, own, fmt.Sprintf("new%d:%d", w, i), "shared one", "shared two", fmt.Sprint("new", w, i))
			}
		})
	}
	pulling.Wait()
	close(stop)
	removing.Wait()
	checkClean(t, s)
	versions, err := s.Versions()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, v := range versions {
		if slices.ContainsFunc(v.References, func(r string) bool { return r[:3] == "new" }) {
			n++
		}
	}
	if n != 60 {
		t.Errorf("%d of 60 new versions are there", n)
	}
}

func TestReachVisitsEachOnceAndFailsOnWhatItCannotRead(t *testing.T) {
	t.Parallel()
	node := func(name string) v1.Descriptor { return v1.Descriptor{Digest: digest.FromString(name)} }
	graph := map[digest.Digest][]v1.Descriptor{
		node("a").Digest: {node("b"), node("c")},
		node("b").Digest: {node("c"), node("a")}, // a cycle, which no honest store has
	}
	visits := 0
	got, err := Reach([]v1.Descriptor{node("a"), node("a")}, func(d v1.Descriptor) ([]v1.Descriptor, error) {
		visits++
		return graph[d.Digest], nil
	})
	if err != nil || len(got) != 3 || visits != 3 {
		t.Errorf("reached %d in %d visits, %v; want 3 in 3", len(got), visits, err)
	}
	failure := errors.New("unreadable")
	if _, err := Reach([]v1.Descriptor{node("a")}, func(v1.Descriptor) ([]v1.Descriptor, error) { return nil, failure }); !errors.Is(err, failure) {
		t.Errorf("got %v, want the failure", err)
	}
}

func TestTrashIsEmptiedByAge(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "m:1", "a")
	if _, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{}); err != nil {
		t.Fatal(err)
	}
	empty := func(before time.Time) int {
		gone, _, err := collect(s).EmptyTrash(t.Context(), before, store.Limit{})
		if err != nil {
			t.Fatal(err)
		}
		return len(gone)
	}
	if n := empty(time.Now().Add(-time.Hour)); n != 0 {
		t.Errorf("%d removals of this minute were deleted as older than an hour", n)
	}
	if n := empty(time.Now().Add(time.Minute)); n != 1 {
		t.Errorf("%d removals were deleted, want 1", n)
	}
}

func TestMain(m *testing.M) { os.Exit(testenv.PrivateMounts(m.Run)) }
