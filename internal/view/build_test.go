package view

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/testenv"
)

// blobs makes a store's folder of blobs with the contents given.
func blobs(t testing.TB, contents ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "blobs")
	if err := os.MkdirAll(filepath.Join(dir, "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range contents {
		if err := os.WriteFile(blobPath(dir, c), []byte(c), 0o444); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func blobPath(dir, content string) string {
	return filepath.Join(dir, "sha256", file("", content).Digest.Encoded())
}

func xattr(t *testing.T, path, name string) string {
	t.Helper()
	buf := make([]byte, 256)
	n, err := unix.Lgetxattr(path, name, buf)
	if errors.Is(err, unix.ENODATA) {
		return "none"
	}
	if err != nil {
		t.Fatalf("%s of %s: %v", name, path, err)
	}
	return string(buf[:n])
}

func TestBuildWritesMetadataOnly(t *testing.T) {
	t.Parallel()
	testenv.NeedRoot(t)
	weights := strings.Repeat("w", 1<<20)
	store := blobs(t, weights, "{}", "")
	old := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	if err := os.Chtimes(blobPath(store, weights), old, old); err != nil {
		t.Fatal(err)
	}
	tree := plan(t, Spec{Layout: Files, UID: p(uint32(1000)), Mode: p(fs.FileMode(0o606)), Models: []Model{
		model("x", file("sub/w.bin", weights), file("c.json", "{}"), file("empty", "")),
	}})
	for _, method := range []Method{DataOnly, Lower} {
		dir := filepath.Join(t.TempDir(), "view")
		if err := Build(t.Context(), dir, tree, method, store); err != nil {
			t.Fatal(err)
		}
		for _, e := range tree.Entries {
			name := filepath.Join(dir, e.Path)
			fi, err := os.Lstat(name)
			if err != nil {
				t.Fatal(err)
			}
			st := fi.Sys().(*syscall.Stat_t)
			if fi.Mode().Perm() != e.Mode || st.Uid != 1000 || st.Gid != 0 {
				t.Errorf("%s is %v %d:%d", e.Path, fi.Mode(), st.Uid, st.Gid)
			}
			if e.Kind != Blob {
				continue
			}
			if fi.Size() != e.Size || st.Blocks*512 > 4096 {
				t.Errorf("%s has %d bytes in %d blocks", e.Path, fi.Size(), st.Blocks)
			}
			redirect, metacopy := "/sha256/"+e.Digest.Encoded(), ""
			if e.Size == 0 {
				redirect, metacopy = "none", "none"
			}
			if got := xattr(t, name, xattrRedirect); got != redirect {
				t.Errorf("%s points to %s", e.Path, got)
			}
			if got := xattr(t, name, xattrMetacopy); got != metacopy {
				t.Errorf("%s has metacopy %q", e.Path, got)
			}
			if strings.HasSuffix(e.Path, "w.bin") && !fi.ModTime().Equal(old) {
				t.Errorf("%s shows the time %v, its blob %v", e.Path, fi.ModTime(), old)
			}
		}
		fi, err := os.Lstat(filepath.Join(dir, "sha256"))
		if hidden := err == nil && fi.Mode()&os.ModeCharDevice != 0; hidden != (method == Lower) {
			t.Errorf("%s: whiteout of the blobs' folder: %t (%v)", method, hidden, err)
		}
	}
}

func TestBuildOfHardLinks(t *testing.T) {
	t.Parallel()
	testenv.NeedRoot(t)
	store := blobs(t, "one", "two")
	models := []Model{model("x", file("a", "one"), file("b/c", "two"))}
	dir := filepath.Join(filepath.Dir(store), "view")
	if err := Build(t.Context(), dir, plan(t, Spec{Layout: HF, Models: models}), HardLink, store); err != nil {
		t.Fatal(err)
	}
	a, err := os.Stat(filepath.Join(dir, "models--x/snapshots", models[0].Digest.Encoded()[:40], "a"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.Stat(blobPath(store, "one"))
	if err != nil || !os.SameFile(a, b) {
		t.Errorf("the file is not the blob itself (%v)", err)
	}
	for name, spec := range map[string]Spec{
		"uid": {UID: p(uint32(0))}, "gid": {GID: p(uint32(1))}, "mode": {Mode: p(fs.FileMode(0o444))},
	} {
		spec.Layout, spec.Models = Files, models
		err := Build(t.Context(), filepath.Join(filepath.Dir(store), name), plan(t, spec), HardLink, store)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "hard links") {
			t.Errorf("%s with hard links: %v", name, err)
		}
	}
	elsewhere := filepath.Join(testenv.LoopFS(t, "tmpfs", 0).Dir, "view")
	err = Build(t.Context(), elsewhere, plan(t, Spec{Layout: Files, Models: models}), HardLink, store)
	if !errors.Is(err, unix.EXDEV) || !strings.Contains(err.Error(), "one file system") {
		t.Errorf("on another file system: %v", err)
	}
}

func TestBuildRefusesAStoreWithGaps(t *testing.T) {
	t.Parallel()
	testenv.NeedRoot(t)
	m := model("x", file("sub/a.bin", "one"))
	tree := plan(t, Spec{Layout: Files, Models: []Model{m}})
	for name, damage := range map[string]func(path string) error{
		"is not in the store": os.Remove,
		"instead of 3":        func(path string) error { return os.Truncate(path, 2) },
		"damaged":             func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)) },
	} {
		for _, method := range []Method{DataOnly, Lower, HardLink} {
			store := blobs(t, "one")
			if err := damage(blobPath(store, "one")); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(filepath.Dir(store), "view")
			err := Build(t.Context(), dir, tree, method, store)
			if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "sub/a.bin") || !strings.Contains(err.Error(), string(m.Pack.Files[0].Digest)) {
				t.Errorf("%s: error %v, want one with %q, file and digest", method, err, name)
			}
			wantOnly(t, filepath.Dir(store), "blobs")
		}
	}
}

func wantOnly(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("in %s (-want +got):\n%s", dir, d)
	}
}

func TestBuildByManyAtOnce(t *testing.T) {
	t.Parallel()
	testenv.NeedRoot(t)
	store := blobs(t, "one", "two")
	tree := plan(t, Spec{Layout: Files, Models: []Model{model("x", file("a", "one"), file("b/c", "two"))}})
	parent := t.TempDir()
	results := make(chan error)
	const n = 16
	for range n {
		go func() { results <- Build(t.Context(), filepath.Join(parent, "view"), tree, DataOnly, store) }()
	}
	for range n {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	wantOnly(t, parent, "view")
}

func TestBuildStopsWhenToldTo(t *testing.T) {
	t.Parallel()
	testenv.NeedRoot(t)
	parent := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	tree := plan(t, Spec{Layout: Files, Models: []Model{model("x", file("a", "one"))}})
	if err := Build(ctx, filepath.Join(parent, "view"), tree, DataOnly, blobs(t, "one")); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	wantOnly(t, parent)
}

// A folder whose parent hands down its group is no other view.
func TestBuildBelowASetgidFolder(t *testing.T) {
	t.Parallel()
	testenv.NeedRoot(t)
	parent := t.TempDir()
	if err := errors.Join(os.Chown(parent, 0, 99), os.Chmod(parent, 0o755|fs.ModeSetgid)); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(parent, "view")
	tree := plan(t, Spec{Layout: Files, Models: []Model{model("x", file("d/a", "one"))}})
	if err := Build(t.Context(), dir, tree, DataOnly, blobs(t, "one")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".", "d", "d/a"} {
		fi, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st := fi.Sys().(*syscall.Stat_t); st.Gid != 0 || fi.Mode()&fs.ModeSetgid != 0 {
			t.Errorf("%s has group %d and mode %v", name, st.Gid, fi.Mode())
		}
	}
}

// The largest manifest that is read makes a view in seconds and in little
// memory.
func TestBuildOfAHundredThousandFiles(t *testing.T) {
	testenv.NeedRoot(t)
	if testing.Short() {
		t.Skip("-short")
	}
	store := blobs(t, "one")
	files := make([]modelpack.File, modelpack.MaxFiles)
	for i := range files {
		files[i] = file(fmt.Sprintf("d%03d/f%06d", i%1000, i), "one")
	}
	m := model("x", file("a", "one"))
	m.Pack.Files = files
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	start := time.Now()
	tree := plan(t, Spec{Layout: Files, Models: []Model{m}})
	planned := time.Now()
	dir := filepath.Join(testenv.LoopFS(t, "tmpfs", 0).Dir, "view")
	if err := Build(t.Context(), dir, tree, DataOnly, store); err != nil {
		t.Fatal(err)
	}
	built := time.Now()
	runtime.ReadMemStats(&after)
	t.Logf("%d files: planned in %v, built in %v, heap %d MiB", len(files), planned.Sub(start), built.Sub(planned), after.HeapSys>>20)
	if took := built.Sub(start); took > time.Minute {
		t.Errorf("it took %v", took)
	}
	if after.HeapSys-before.HeapSys > 400<<20 {
		t.Errorf("the heap grew by %d MiB", (after.HeapSys-before.HeapSys)>>20)
	}
}
