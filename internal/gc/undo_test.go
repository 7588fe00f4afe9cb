package gc

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
)

func remove(t *testing.T, s *store.Store, names ...string) Result {
	t.Helper()
	refs := make([]reference.Reference, len(names))
	for i, n := range names {
		refs[i] = ref(t, n)
	}
	r, err := collect(s).Remove(t.Context(), refs, Options{Reason: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func undo(t *testing.T, s *store.Store, id string, only ...digest.Digest) {
	t.Helper()
	if _, err := collect(s).Undo(t.Context(), id, only...); err != nil {
		t.Fatal(err)
	}
}

func resolves(t *testing.T, s *store.Store, name string) bool {
	t.Helper()
	_, err := s.Resolve(ref(t, name))
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

// A blob that two versions share lies with the one that was removed last.
func TestUndoFindsSharedBlobsWithOtherRemovals(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "a:1", "shared", "only a")
	mustPublish(t, s, "b:1", "shared", "only b")
	first, second := remove(t, s, "a:1"), remove(t, s, "b:1")
	undo(t, s, first.ID)
	if !resolves(t, s, "a:1") || resolves(t, s, "b:1") || !has(t, s, "shared") || !has(t, s, "only a") || has(t, s, "only b") {
		t.Error("a is not back whole, or b has come with it")
	}
	checkClean(t, s)
	// The other one has lent a blob and can be undone all the same.
	undo(t, s, second.ID)
	if !resolves(t, s, "b:1") || !has(t, s, "only b") {
		t.Error("b is not back")
	}
	checkClean(t, s)
	if trash, err := s.Trash(); err != nil || len(trash) != 0 {
		t.Errorf("the trash still has %v, %v", trash, err)
	}
}

// Emptying deletes no blob that a removal that stays needs.
func TestEmptyingLeavesWhatOthersNeedToBeUndone(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "a:1", "shared", "only a")
	mustPublish(t, s, "b:1", "shared", "only b")
	first := remove(t, s, "a:1")
	second, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "b:1")}, Options{Now: true})
	if err != nil || second.ID != "" {
		t.Fatalf("%+v, %v", second, err)
	}
	undo(t, s, first.ID)
	if !resolves(t, s, "a:1") || !has(t, s, "shared") {
		t.Error("a is not back whole")
	}
	checkClean(t, s)
}

// A version is whole or not there: one whose blob is nowhere is not restored.
func TestUndoRefusesWhatIsNotWhole(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "a:1", "one", "two")
	r := remove(t, s, "a:1")
	if err := os.Remove(filepath.Join(s.Dir(), "trash", r.ID, digest.FromString("two").Encoded())); err != nil {
		t.Fatal(err)
	}
	if _, err := collect(s).Undo(t.Context(), r.ID); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	if resolves(t, s, "a:1") || has(t, s, "one") {
		t.Error("a part was restored")
	}
	checkClean(t, s)
}

// A removal without a version is refused, and stays in the trash as it is.
func TestUndoRefusesLeftovers(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	lease, err := s.NewLease(t.Context(), "node", "pull")
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Release()
	if _, err := s.PutBlob(t.Context(), lease, []byte("in no version")); err != nil {
		t.Fatal(err)
	}
	if err := lease.Release(); err != nil {
		t.Fatal(err)
	}
	var r store.Removal
	err = s.Exclusive(t.Context(), func(x *store.Exclusive) (err error) {
		r, err = x.Remove(store.Removal{Blobs: []store.Blob{{Digest: digest.FromString("in no version"), Size: 13}}})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := collect(s).Undo(t.Context(), r.ID); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	trash, err := s.Trash()
	if err != nil || len(trash) != 1 || len(trash[0].Blobs) != 1 {
		t.Errorf("trash after the refusal: %v, %v", trash, err)
	}
}

func TestUndoOfOneVersionOfARemoval(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	a := mustPublish(t, s, "a:1", "shared", "only a")
	mustPublish(t, s, "b:1", "shared", "only b")
	r := remove(t, s, "a:1", "b:1")
	if got := len(r.Versions); got != 2 || r.Kept != 0 {
		t.Fatalf("%+v", r)
	}
	undo(t, s, r.ID, a.Digest)
	if !resolves(t, s, "a:1") || resolves(t, s, "b:1") {
		t.Error("not a alone is back")
	}
	trash, err := s.Trash()
	if err != nil || len(trash) != 1 || len(trash[0].References) != 1 {
		t.Fatalf("the trash has %+v, %v", trash, err)
	}
	if slices.ContainsFunc(trash[0].Blobs, func(b store.Blob) bool { return b.Digest == digest.FromString("shared") }) {
		t.Error("the record still lists a blob that is back")
	}
	if _, err := collect(s).Undo(t.Context(), r.ID, a.Digest); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a second time: %v", err)
	}
	undo(t, s, r.ID)
	if !resolves(t, s, "b:1") {
		t.Error("b is not back")
	}
	checkClean(t, s)
}

// A name that another version has by now is not taken away.
func TestUndoLeavesNamesThatWereGivenAnew(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	old := mustPublish(t, s, "a:1", "old")
	r := remove(t, s, "a:1")
	now := mustPublish(t, s, "a:1", "new")
	undo(t, s, r.ID)
	if v, err := s.Resolve(ref(t, "a:1")); err != nil || v.Digest != now.Digest {
		t.Errorf("a:1 is %s, %v; want the new one", v.Digest, err)
	}
	if v, err := s.Resolve(ref(t, "a@"+string(old.Digest))); err != nil || v.Digest != old.Digest {
		t.Errorf("the restored version: %v, %v", v, err)
	}
	checkClean(t, s)
}

// A pull that brought the same version back makes its removal void.
func TestRemovalOfWhatWasPulledAgainIsDropped(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "a:1", "one")
	remove(t, s, "a:1")
	mustPublish(t, s, "a:1", "one")
	if _, _, err := collect(s).EmptyTrash(t.Context(), time.Time{}, store.Limit{}); err != nil {
		t.Fatal(err)
	}
	if trash, err := s.Trash(); err != nil || len(trash) != 0 {
		t.Errorf("the trash has %v, %v", trash, err)
	}
	if !resolves(t, s, "a:1") || !has(t, s, "one") {
		t.Error("the version that was pulled again is gone")
	}
	checkClean(t, s)
}

// A removal of two versions is cut short, and one of them is pulled again
// before it is finished: the other one can still be undone.
func TestRemovalOfWhichAPartCameBackIsFinishedForTheRest(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "a:1", "shared", "only a")
	mustPublish(t, s, "b:1", "shared", "only b")
	r := remove(t, s, "a:1", "b:1")
	dir := filepath.Join(s.Dir(), "trash", r.ID)
	if err := os.Rename(filepath.Join(dir, "removal.json"), filepath.Join(dir, "pending.json")); err != nil {
		t.Fatal(err)
	}
	mustPublish(t, s, "a:1", "shared", "only a")
	finished, err := collect(s).Recover(t.Context())
	if err != nil || len(finished) != 1 || len(finished[0].References) != 1 || finished[0].References[0].Annotations[v1.AnnotationRefName] != "b:1" {
		t.Fatalf("finished %+v, %v", finished, err)
	}
	if !resolves(t, s, "a:1") || !has(t, s, "shared") || !has(t, s, "only a") {
		t.Error("what was pulled again is not whole")
	}
	checkClean(t, s)
	undo(t, s, r.ID)
	if !resolves(t, s, "b:1") || !has(t, s, "only b") {
		t.Error("the rest cannot be undone")
	}
	checkClean(t, s)
}

func TestPinnedVersionStays(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	v := mustPublish(t, s, "a:1", "one")
	if err := s.Pin(t.Context(), v.Digest, store.Pin{Time: time.Now(), Why: "production"}); err != nil {
		t.Fatal(err)
	}
	var pinned *PinnedError
	_, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "a:1")}, Options{})
	if !errors.Is(err, ErrPinned) || !errors.Is(err, store.ErrInUse) || !errors.As(err, &pinned) || pinned.Pin.Why != "production" {
		t.Errorf("got %v, want ErrPinned", err)
	}
	// Another name may go: the version stays.
	if _, err := s.Tag(t.Context(), v.Digest, ref(t, "a:2")); err != nil {
		t.Fatal(err)
	}
	remove(t, s, "a:1")
	if was, err := s.Unpin(t.Context(), v.Digest); err != nil || !was {
		t.Errorf("unpin: %t, %v", was, err)
	}
	remove(t, s, "a:2")
	if has(t, s, "one") {
		t.Error("it is still there")
	}
	if err := s.Pin(t.Context(), v.Digest, store.Pin{}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a pin on what is gone: %v", err)
	}
	// A pin whose record is damaged keeps too, and a folder that cannot be read
	// stops everything.
	v = mustPublish(t, s, "a:3", "three")
	if err := s.Pin(t.Context(), v.Digest, store.Pin{}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.Dir(), "pins", v.Digest.Encoded()), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "a:3")}, Options{}); !errors.Is(err, ErrPinned) {
		t.Errorf("a damaged pin: %v", err)
	}
	pins := filepath.Join(s.Dir(), "pins")
	if err := errors.Join(os.RemoveAll(pins), os.WriteFile(pins, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if _, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "a:3")}, Options{}); err == nil {
		t.Error("removed, though pins cannot be read")
	}
}

func TestHistoryOutlivesTheTrash(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "a:1", "one")
	mustPublish(t, s, "b:1", "two")
	first := remove(t, s, "a:1")
	undo(t, s, first.ID)
	second := remove(t, s, "a:1", "b:1")
	// A line that a crash cut short harms neither those before nor those after.
	f, err := os.OpenFile(filepath.Join(s.Dir(), "history.jsonl"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"event":"remov`); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	if _, _, err := collect(s).EmptyTrash(t.Context(), time.Now().Add(time.Hour), store.Limit{}); err != nil {
		t.Fatal(err)
	}
	events, err := s.History()
	if err != nil {
		t.Fatal(err)
	}
	var got [][2]string
	for _, e := range events {
		got = append(got, [2]string{e.Event, e.Removal})
	}
	want := [][2]string{{store.Removed, first.ID}, {store.Restored, first.ID}, {store.Removed, second.ID}, {store.Deleted, second.ID}}
	if !slices.Equal(got, want) {
		t.Fatalf("history %v, want %v", got, want)
	}
	if e := events[2]; len(e.Versions) != 2 || e.Bytes == 0 || e.Versions[0].Model != "a" || e.Versions[0].References[0] != "a:1" || e.Versions[0].Bytes == 0 {
		t.Errorf("the removal of two: %+v", e)
	}
}

// Blobs that somebody has open, or that have another name, are unlinked and
// never cut short; large ones are given back bit by bit.
func TestShreddingIsSlowAndCutsNobodysFile(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	big := func(n byte) string { return string(slices.Repeat([]byte{n}, 3<<20)) }
	mustPublish(t, s, "a:1", big(1), big(2), big(3))
	r := remove(t, s, "a:1")
	path := func(n byte) string {
		return filepath.Join(s.Dir(), "trash", r.ID, digest.FromString(big(n)).Encoded())
	}
	linked := filepath.Join(t.TempDir(), "linked")
	if err := os.Link(path(1), linked); err != nil {
		t.Fatal(err)
	}
	opened, err := os.Open(path(2))
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	begin := time.Now()
	gone, freed, err := collect(s).EmptyTrash(t.Context(), time.Now().Add(time.Hour), store.Limit{BytesPerSecond: 4 << 20})
	if err != nil || len(gone) != 1 {
		t.Fatalf("%v, %v", gone, err)
	}
	if d := time.Since(begin); d < time.Second {
		t.Errorf("9 MiB at 4 MiB/s took %s", d)
	}
	if freed < 9<<20 {
		t.Errorf("freed %d bytes", freed)
	}
	if fi, err := os.Stat(linked); err != nil || fi.Size() != 3<<20 {
		t.Errorf("the file with another name: %v, %v", fi, err)
	}
	if fi, err := opened.Stat(); err != nil || fi.Size() != 3<<20 {
		t.Errorf("the open file: %v, %v", fi, err)
	}
	if folders, err := filepath.Glob(filepath.Join(s.Dir(), "trash", "2*")); err != nil || len(folders) != 0 {
		t.Errorf("left in the trash: %v, %v", folders, err)
	}
}

// What shares a commit has names of its own when its last name moves.
func TestTwoVersionsOfOneCommitKeepTheirNames(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	const commit = "hf://o/r@0123456789abcdef0123456789abcdef01234567"
	publishHub := func(partial bool, contents ...string) store.Version {
		t.Helper()
		v, err := publishModel(t.Context(), s, "hf://o/r@main", func(m *modelpack.Model) {
			m.Source, m.Revision, m.Partial = "hf://o/r", "0123456789abcdef0123456789abcdef01234567", partial
		}, contents...)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	whole := publishHub(false, "one", "two")
	part := publishHub(true, "one")
	again := publishHub(false, "one", "two")
	if again.Digest != whole.Digest {
		t.Fatal("the same files are another version")
	}
	versions, err := s.Versions()
	if err != nil || len(versions) != 2 {
		t.Fatalf("%v, %v", versions, err)
	}
	if v, err := s.Resolve(ref(t, commit)); err != nil || v.Digest != whole.Digest {
		t.Errorf("the commit is version %s, %v; want the whole one", v.Digest, err)
	}
	if v, err := s.Resolve(ref(t, string(part.Digest))); err != nil || len(v.References) != 1 {
		t.Errorf("the partial one: %v, %v", v, err)
	}
}

// Who is in need does not wait for who takes his time.
func TestShreddingWithoutALimitWaitsForNobody(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "a:1", string(slices.Repeat([]byte{1}, 4<<20)), string(slices.Repeat([]byte{2}, 4<<20)))
	remove(t, s, "a:1")
	if _, err := collect(s).Condemn(t.Context(), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	slow := make(chan error)
	go func() {
		_, err := s.Shred(t.Context(), store.Limit{BytesPerSecond: 1 << 20})
		slow <- err
	}()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		n, err := s.Shredding()
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("nobody has begun to delete %d bytes, %v", n, err)
		}
		if n < 8<<20 {
			break
		}
	}
	if _, err := s.Shred(t.Context(), store.Limit{FilesPerSecond: 1}); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Shredding(); err != nil || n == 0 {
		t.Errorf("one with a limit did not leave the work to the other: %d bytes are left, %v", n, err)
	}
	begin := time.Now()
	if _, err := s.Shred(t.Context(), store.Limit{}); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Shredding(); err != nil || n != 0 || time.Since(begin) > 5*time.Second {
		t.Errorf("after %s %d bytes are left, %v", time.Since(begin), n, err)
	}
	if err := <-slow; err != nil {
		t.Error(err)
	}
}
