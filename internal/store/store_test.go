package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func lease(t *testing.T, s *Store) *Lease {
	t.Helper()
	l, err := s.NewLease(t.Context(), "node", "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Release(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func refs(t *testing.T, names ...string) []reference.Reference {
	t.Helper()
	out := make([]reference.Reference, len(names))
	for i, n := range names {
		r, err := reference.Parse(n)
		if err != nil {
			t.Fatal(err)
		}
		out[i] = r
	}
	return out
}

// publish stores a model of small files, given as path and content.
func publish(t *testing.T, s *Store, m modelpack.Model, files map[string]string, names ...string) Version {
	t.Helper()
	l, err := s.NewLease(t.Context(), "node", "test")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	for path, content := range files {
		d, err := s.PutBlob(t.Context(), l, []byte(content))
		if err != nil {
			t.Fatal(err)
		}
		m.Files = append(m.Files, modelpack.File{Path: path, Digest: d, Size: int64(len(content))})
	}
	v, err := s.Publish(t.Context(), l, m, refs(t, names...))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestPublishedModelIsFoundByEveryName(t *testing.T) {
	t.Parallel()
	s := open(t)
	commit := strings.Repeat("c", 40)
	v := publish(t, s, modelpack.Model{Source: "hf://org/name", Revision: commit}, map[string]string{"a": "1", "d/b": "2"}, "hf://org/name@main", "qwen:1.9.3")
	// Another process sees the same.
	again, err := Open(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"hf://org/name", "hf://org/name@" + commit, "qwen", "qwen:1.9.3", "qwen:~1.9", string(v.Digest), "qwen@" + string(v.Digest)} {
		got, err := again.Resolve(refs(t, name)[0])
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if diff := cmp.Diff(v, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	m, err := again.Model(v.Digest)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range m.Files {
		fi, err := os.Stat(s.BlobPath(f.Digest))
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode() != 0o444 {
			t.Errorf("blob of %s has mode %v, want 0444", f.Path, fi.Mode())
		}
	}
	problems, err := again.Verify(t.Context(), nil, nil)
	if err != nil || len(problems) > 0 {
		t.Errorf("verify: %v %v", problems, err)
	}
}

func TestNewestVersion(t *testing.T) {
	t.Parallel()
	s := open(t)
	for _, tag := range []string{"1.9.3", "1.10.0", "2.0.0-rc1", "1.9.12", "nightly"} {
		publish(t, s, modelpack.Model{}, map[string]string{"a": tag}, "qwen:"+tag)
	}
	for i, tag := range []string{"b", "a"} {
		publish(t, s, modelpack.Model{}, map[string]string{"a": fmt.Sprint("words", i)}, "words:"+tag)
	}
	for name, want := range map[string]string{
		"qwen": "qwen:1.10.0", "qwen:~1.9": "qwen:1.9.12", "qwen:1.9.x": "qwen:1.9.12", "qwen:^1": "qwen:1.10.0",
		"qwen:>=2.0.0-0": "qwen:2.0.0-rc1", "words": "words:a",
	} {
		got, err := s.Resolve(refs(t, name)[0])
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !slices.Contains(got.References, want) {
			t.Errorf("%s is %v, want %s", name, got.References, want)
		}
	}
}

func TestMissingModelNamesWhatIsNear(t *testing.T) {
	t.Parallel()
	s := open(t)
	publish(t, s, modelpack.Model{}, map[string]string{"a": "1"}, "qwen:1.9.3")
	publish(t, s, modelpack.Model{Source: "hf://Qwen/Qwen2.5-0.5B"}, map[string]string{"a": "2"}, "hf://Qwen/Qwen2.5-0.5B@main")
	for name, want := range map[string]string{
		"qwne": "qwen:1.9.3", "qwen:1.9.4": "qwen:1.9.3", "qwen:~3": "qwen:1.9.3",
		"hf://Qwen/Qwen2.5-0.5b": "hf://Qwen/Qwen2.5-0.5B@main", "hf://Qwen/Qwen2.5-0.5B@v1": "hf://Qwen/Qwen2.5-0.5B@main",
	} {
		_, err := s.Resolve(refs(t, name)[0])
		var missing *NotFoundError
		if !errors.As(err, &missing) || !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: got %v, want a NotFoundError", name, err)
		} else if !slices.Contains(missing.Near, want) {
			t.Errorf("%s: near is %v, want %s among it", name, missing.Near, want)
		}
	}
}

func TestMovedReferenceLeavesTheOldVersionReachable(t *testing.T) {
	t.Parallel()
	s := open(t)
	commits := []string{strings.Repeat("1", 40), strings.Repeat("2", 40)}
	old := publish(t, s, modelpack.Model{Source: "hf://o/n", Revision: commits[0]}, map[string]string{"a": "1"}, "hf://o/n@main")
	publish(t, s, modelpack.Model{Source: "hf://o/n", Revision: commits[1]}, map[string]string{"a": "2"}, "hf://o/n@main")
	got, err := s.Resolve(refs(t, "hf://o/n@"+commits[0])[0])
	if err != nil || got.Digest != old.Digest {
		t.Errorf("old commit: got %v %v, want %s", got, err, old.Digest)
	}
	first := publish(t, s, modelpack.Model{}, map[string]string{"a": "3"}, "m:1")
	publish(t, s, modelpack.Model{}, map[string]string{"a": "4"}, "m:1")
	got, err = s.Resolve(refs(t, "m@"+string(first.Digest))[0])
	if err != nil || got.Digest != first.Digest {
		t.Errorf("old tag: got %v %v, want %s", got, err, first.Digest)
	}
}

func TestPublishRefusesWhatIsNotWhole(t *testing.T) {
	t.Parallel()
	s := open(t)
	l := lease(t, s)
	d, err := s.PutBlob(t.Context(), l, []byte("here"))
	if err != nil {
		t.Fatal(err)
	}
	missing := modelpack.File{Path: "x", Digest: digest.FromString("not here"), Size: 8}
	if _, err := s.Publish(t.Context(), l, modelpack.Model{Files: []modelpack.File{missing}}, refs(t, "m:1")); !errors.Is(err, ErrNotFound) {
		t.Errorf("missing blob: got %v, want ErrNotFound", err)
	}
	wrong := modelpack.File{Path: "x", Digest: d, Size: 5}
	if _, err := s.Publish(t.Context(), l, modelpack.Model{Files: []modelpack.File{wrong}}, refs(t, "m:1")); !errors.Is(err, ErrDamaged) {
		t.Errorf("wrong size: got %v, want ErrDamaged", err)
	}
	good := modelpack.File{Path: "x", Digest: d, Size: 4}
	for _, name := range []string{"m", "m:~1", string(d)} {
		if _, err := s.Publish(t.Context(), l, modelpack.Model{Files: []modelpack.File{good}}, refs(t, name)); err == nil {
			t.Errorf("reference %s was accepted, though it names no one entry", name)
		}
	}
	if versions, err := s.Versions(); err != nil || len(versions) != 0 {
		t.Errorf("versions after refusals: %v %v, want none", versions, err)
	}
}

func TestParallelPublicationsLoseNothing(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "store")
	const writers, each = 8, 6
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			s, err := Open(dir) // each as if a process of its own, creation included
			if err != nil {
				t.Error(err)
				return
			}
			for i := range each {
				publish(t, s, modelpack.Model{}, map[string]string{"same": "shared by all", "own": fmt.Sprint(w, i)}, fmt.Sprintf("m%d:%d", w, i))
			}
		})
	}
	wg.Wait()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	versions, err := s.Versions()
	if err != nil || len(versions) != writers*each {
		t.Fatalf("%d versions, %v; want %d", len(versions), err, writers*each)
	}
	if problems, err := s.Verify(t.Context(), nil, nil); err != nil || len(problems) > 0 {
		t.Errorf("verify: %v %v", problems, err)
	}
}

func TestDamagedListIsALoudErrorAndChangesNothing(t *testing.T) {
	t.Parallel()
	s := open(t)
	publish(t, s, modelpack.Model{}, map[string]string{"a": "1"}, "m:1")
	index := filepath.Join(s.Dir(), v1.ImageIndexFile)
	good, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	for what, content := range map[string]string{
		"empty": "", "cut short": string(good[:len(good)/2]), "other JSON": "{}", "null list": `{"schemaVersion":2,"manifests":null}`,
		"text behind": string(good) + "x", "a digest of nothing": `{"schemaVersion":2,"manifests":[{"digest":"sha256:zz"}]}`,
	} {
		if err := os.WriteFile(index, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Versions(); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: versions: got %v, want ErrDamaged", what, err)
		}
		l := lease(t, s)
		d, err := s.PutBlob(t.Context(), l, []byte("2"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Publish(t.Context(), l, modelpack.Model{Files: []modelpack.File{{Path: "a", Digest: d, Size: 1}}}, refs(t, "m:2")); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: publish: got %v, want ErrDamaged", what, err)
		}
		if err := s.Exclusive(t.Context(), func(*Exclusive) error { t.Errorf("%s: went on to remove", what); return nil }); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: remove: got %v, want ErrDamaged", what, err)
		}
		if got, err := os.ReadFile(index); err != nil || string(got) != content {
			t.Errorf("%s: the file was changed to %q, %v", what, got, err)
		}
	}
}

// Whoever has lost the list is told how to have it again, and that way works.
func TestLostListIsRestoredFromItsCopy(t *testing.T) {
	t.Parallel()
	index, layout := v1.ImageIndexFile, v1.ImageLayoutFile
	for what, lose := range map[string]func(dir string) error{
		"emptied": func(dir string) error { return os.Truncate(filepath.Join(dir, index), 0) },
		"gone":    func(dir string) error { return os.Remove(filepath.Join(dir, index)) },
		// Such a store is not taken for one whose making was cut short.
		"gone with the layout file": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, index)), os.Remove(filepath.Join(dir, layout)))
		},
	} {
		s := open(t)
		publish(t, s, modelpack.Model{}, map[string]string{"a": "1"}, "m:1")
		publish(t, s, modelpack.Model{}, map[string]string{"a": "2"}, "m:2")
		want, err := s.Versions()
		if err != nil {
			t.Fatal(err)
		}
		if err := lose(s.Dir()); err != nil {
			t.Fatal(err)
		}
		versions := func() ([]Version, error) {
			s, err := Open(s.Dir())
			if err != nil {
				return nil, err
			}
			return s.Versions()
		}
		_, err = versions()
		from, to := filepath.Join(s.Dir(), copyName), filepath.Join(s.Dir(), index)
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "cp "+from+" "+to) {
			t.Fatalf("%s: %v; want ErrDamaged and what to type", what, err)
		}
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, data, 0o644); err != nil {
			t.Fatal(err)
		}
		got, err := versions()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
}

func TestFolderWithOtherFilesIsNotMadeAStore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis.doc"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrNotStore) {
		t.Errorf("got %v, want ErrNotStore", err)
	}
	if err := os.WriteFile(filepath.Join(dir, v1.ImageLayoutFile), []byte(`{"imageLayoutVersion":"9"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrDamaged) {
		t.Errorf("later version: got %v, want ErrDamaged", err)
	}
}

func TestOtherToolsEntriesSurvive(t *testing.T) {
	t.Parallel()
	s := open(t)
	foreign := v1.Descriptor{MediaType: "application/vnd.example.thing", Digest: digest.FromString("x"), Size: 1, Annotations: map[string]string{v1.AnnotationRefName: "theirs"}}
	index := emptyIndex()
	index.Manifests = append(index.Manifests, foreign)
	if err := s.writeIndex(index); err != nil {
		t.Fatal(err)
	}
	publish(t, s, modelpack.Model{}, map[string]string{"a": "1"}, "m:1")
	entries, err := s.Index()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(foreign, entries[0]); diff != "" {
		t.Errorf("foreign entry (-want +got):\n%s", diff)
	}
}

func TestLeaseLastsAsLongAsItsOwner(t *testing.T) {
	t.Parallel()
	s := open(t)
	d := digest.FromString("x")
	held := func() bool {
		var out map[digest.Digest]string
		err := s.Exclusive(t.Context(), func(x *Exclusive) (err error) { out, err = x.Leased(); return err })
		if err != nil {
			t.Fatal(err)
		}
		return out[d] != ""
	}
	l, err := s.NewLease(t.Context(), "node", "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Hold(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if !held() {
		t.Error("a lease whose owner lives does not count")
	}
	// As when the owner dies: the kernel closes its files and nothing else.
	path := l.path
	if err := l.file.Close(); err != nil {
		t.Fatal(err)
	}
	if held() {
		t.Error("a lease whose owner has died still counts")
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file of a dead lease is left: %v", err)
	}
}

func TestUnreadableLeaseStopsRemoval(t *testing.T) {
	t.Parallel()
	s := open(t)
	l := lease(t, s)
	if _, err := l.file.Write([]byte("not a digest\n")); err != nil {
		t.Fatal(err)
	}
	err := s.Exclusive(t.Context(), func(x *Exclusive) error { _, err := x.Leased(); return err })
	if !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, want ErrDamaged", err)
	}
}

func TestSecondWriterOfABlobWaitsAndFindsIt(t *testing.T) {
	t.Parallel()
	s := open(t)
	l := lease(t, s)
	data := []byte("content")
	d := digest.FromBytes(data)
	key := "sha256-" + d.Encoded()
	first, err := s.Ingest(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if !s.Locked(key) {
		t.Error("an ingest that is open is not reported as locked")
	}
	waited := make(chan error, 1)
	go func() {
		second, err := s.Ingest(t.Context(), key)
		if err == nil {
			if _, ok, statErr := s.Stat(d); statErr != nil || !ok {
				err = fmt.Errorf("the blob is not there: %w", statErr)
			}
			err = errors.Join(err, second.Discard())
		}
		waited <- err
	}()
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Ingest(short, key); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("impatient writer: got %v, want DeadlineExceeded", err)
	}
	if _, err := first.File().Write(data); err != nil {
		t.Fatal(err)
	}
	if err := l.Hold(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Commit(t.Context(), d, int64(len(data))); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
	got, err := os.ReadFile(s.BlobPath(d))
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("blob is %q, %v", got, err)
	}
}

func TestCommitDoesNotReplaceABlob(t *testing.T) {
	t.Parallel()
	s := open(t)
	l := lease(t, s)
	d, err := s.PutBlob(t.Context(), l, []byte("content"))
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(s.BlobPath(d))
	if err != nil {
		t.Fatal(err)
	}
	i, err := s.Ingest(t.Context(), "git-"+strings.Repeat("a", 40))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := i.File().Write([]byte("content")); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Commit(t.Context(), d, 7); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(s.BlobPath(d))
	if err != nil {
		t.Fatal(err)
	}
	// A running container's view points at that very inode.
	if !os.SameFile(before, after) {
		t.Error("the blob's file was replaced")
	}
}

func TestVerifyNamesWhatIsDamaged(t *testing.T) {
	t.Parallel()
	s := open(t)
	v := publish(t, s, modelpack.Model{}, map[string]string{"cut": "aaaa", "flipped": "bbbb", "gone": "cccc", "fine": "dddd"}, "m:1")
	blob := func(content string) string { return s.BlobPath(digest.FromString(content)) }
	for _, err := range []error{
		os.Chmod(blob("aaaa"), 0o644), os.Truncate(blob("aaaa"), 2),
		os.Chmod(blob("bbbb"), 0o644), os.WriteFile(blob("bbbb"), []byte("bbbx"), 0o644),
		os.Remove(blob("cccc")),
		os.WriteFile(blob("unreferenced"), []byte("other"), 0o444),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	problems, err := s.Verify(t.Context(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, p := range problems {
		got[p.What+" "+string(p.Digest)] = strings.Join(p.Files, " ")
	}
	want := map[string]string{
		"size " + string(digest.FromString("aaaa")):            "m:1:cut",
		"content " + string(digest.FromString("bbbb")):         "m:1:flipped",
		"missing " + string(digest.FromString("cccc")):         "m:1:gone",
		"content " + string(digest.FromString("unreferenced")): "",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	// What is damaged is taken out, and brought in again by the same publication.
	for _, p := range problems {
		moved, err := s.Quarantine(t.Context(), p)
		if err != nil || moved != (p.What != "missing") {
			t.Fatalf("quarantine of %s, which is %s: %t, %v", p.Digest, p.What, moved, err)
		}
	}
	again := publish(t, s, modelpack.Model{}, map[string]string{"cut": "aaaa", "flipped": "bbbb", "gone": "cccc", "fine": "dddd"}, "m:1")
	if again.Digest != v.Digest {
		t.Errorf("the same files are version %s, were %s", again.Digest, v.Digest)
	}
	if now, err := s.Verify(t.Context(), nil, nil); err != nil || len(now) > 0 {
		t.Errorf("verify after repair: %v %v", now, err)
	}
	// Who found the damage at the same time comes too late: the new one stays.
	for _, p := range problems {
		if len(p.Files) == 0 {
			continue
		}
		if moved, err := s.Quarantine(t.Context(), p); err != nil || moved && p.What != "missing" {
			t.Errorf("quarantine of what was repaired meanwhile: %t, %v", moved, err)
		}
	}
	if now, err := s.Verify(t.Context(), nil, nil); err != nil || len(now) > 0 && now[0].What != "missing" {
		t.Errorf("verify after that: %v %v", now, err)
	}
	var ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err := s.Verify(ctx, nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled verify: got %v", err)
	}
}

func TestDamagedManifestIsNotUsed(t *testing.T) {
	t.Parallel()
	s := open(t)
	v := publish(t, s, modelpack.Model{}, map[string]string{"a": "1"}, "m:1")
	path := s.BlobPath(v.Digest)
	if err := errors.Join(os.Chmod(path, 0o644), os.WriteFile(path, []byte(`{}`), 0o644)); err != nil {
		t.Fatal(err)
	}
	fresh, err := Open(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.Model(v.Digest); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, want ErrDamaged", err)
	}
	if _, err := fresh.Links(v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: v.Digest}); !errors.Is(err, ErrDamaged) {
		t.Errorf("links: got %v, want ErrDamaged", err)
	}
}

func TestTwoStatesCannotSpeakForOneNode(t *testing.T) {
	t.Parallel()
	s := open(t)
	if err := errors.Join(s.Claim("n", "one"), s.Claim("n", "one"), s.Claim("m", "two")); err != nil {
		t.Fatal(err)
	}
	if err := s.Claim("n", "two"); !errors.Is(err, ErrInUse) {
		t.Errorf("got %v, want ErrInUse", err)
	}
}

func FuzzParseIndex(f *testing.F) {
	good, err := json.Marshal(emptyIndex())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"sha256:` + strings.Repeat("a", 64) + `"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		index, err := parseIndex(data)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("got %v, want ErrDamaged", err)
			}
			return
		}
		if index.Manifests == nil {
			t.Fatal("a list that is not there was read as an empty one")
		}
		versionsOf(index)
	})
}

func TestLeasesAreListedWhileTheirOwnersLive(t *testing.T) {
	t.Parallel()
	s := open(t)
	list := func() (out []LiveLease) {
		t.Helper()
		err := s.Exclusive(t.Context(), func(x *Exclusive) (err error) {
			out, err = x.Leases()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	l, err := s.NewLease(t.Context(), "node", "pull")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Hold(t.Context(), digest.FromString("a"), digest.FromString("b")); err != nil {
		t.Fatal(err)
	}
	got := list()
	if len(got) != 1 || got[0].Node != "node" || got[0].Purpose != "pull" || got[0].Digests != 2 || time.Since(got[0].Since) > time.Hour {
		t.Errorf("leases %+v", got)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	if got := list(); len(got) > 0 {
		t.Errorf("after its release: %+v", got)
	}
}

// A process that is not root dies between the chmod and the rename of Commit;
// the same pull again goes on. Of the test, which runs as root, one thread has
// a file system's rights taken away.
func TestAPartialThatCommitMadeReadOnlyIsOpenedAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	again := func() error {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Setfsuid(65534); err != nil {
			return err
		}
		s, err := Open(filepath.Join(dir, "store"))
		if err != nil {
			return err
		}
		i, err := s.Ingest(t.Context(), "sha256-x")
		if err != nil {
			return err
		}
		if err := errors.Join(i.File().Chmod(0o444), i.Close()); err != nil { // as Commit begins, and then death
			return err
		}
		if i, err = s.Ingest(t.Context(), "sha256-x"); err != nil {
			return err
		}
		if _, err := i.File().WriteAt([]byte("x"), 0); err != nil {
			return err
		}
		// While the Commit lives, whoever waits for it leaves it read-only.
		if err := i.File().Chmod(0o444); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := s.Ingest(ctx, "sha256-x"); !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("a second ingest: %w", err)
		}
		if fi, err := i.File().Stat(); err != nil || fi.Mode().Perm() != 0o444 {
			return fmt.Errorf("mode %v, %w", fi.Mode(), err)
		}
		if err := i.Close(); err != nil {
			return err
		}
		// Nor does it wait for what it may not make.
		ingest := filepath.Join(dir, "store", "ingest")
		if err := os.Chmod(ingest, 0o555); err != nil {
			return err
		}
		if _, err := s.Ingest(t.Context(), "sha256-y"); !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("in a folder that it may not write: %w", err)
		}
		return os.Chmod(ingest, 0o755)
	}
	done := make(chan error)
	go func() { done <- again() }()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A list of references that is gone with its copy is not taken for an empty
// one, and what the error says to do about it helps.
func TestAListOfReferencesThatIsGoneWithItsCopy(t *testing.T) {
	t.Parallel()
	s := open(t)
	publish(t, s, modelpack.Model{}, map[string]string{"a": "content"}, "m:1")
	index := filepath.Join(s.Dir(), "index.json")
	if err := errors.Join(os.Remove(index), os.Truncate(filepath.Join(s.Dir(), copyName), 0)); err != nil {
		t.Fatal(err)
	}
	again, err := Open(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	_, err = again.Versions()
	if !errors.Is(err, ErrDamaged) {
		t.Fatalf("got %v, want ErrDamaged", err)
	}
	_, rest, _ := strings.Cut(err.Error(), "echo '")
	advice, _, ok := strings.Cut(rest, "'")
	if !ok {
		t.Fatalf("%v does not say what to do", err)
	}
	if err := os.WriteFile(index, []byte(advice+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	publish(t, again, modelpack.Model{}, map[string]string{"a": "content"}, "m:1")
	if v, err := again.Versions(); err != nil || len(v) != 1 {
		t.Errorf("after the advice was followed: %v, %v", v, err)
	}
}
