package pull

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/source/directory"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
)

const localName = "local:1"

func writeTree(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for p, b := range files {
		at := filepath.Join(dir, p)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func folderSource(t testing.TB, dir string) *directory.Source {
	t.Helper()
	s, err := directory.New(dir, directory.Options{References: []reference.Reference{ref(t, localName)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// onBoth runs a test on a file system that clones and on one that does not.
func onBoth(t *testing.T, f func(t *testing.T, dir string, how How)) {
	t.Run("xfs", func(t *testing.T) { f(t, testenv.LoopFS(t, "xfs", 320<<20).Dir, Cloned) })
	t.Run("ext4", func(t *testing.T) { f(t, testenv.LoopFS(t, "ext4", 128<<20).Dir, Copied) })
}

func TestImport(t *testing.T) {
	onBoth(t, func(t *testing.T, dir string, how How) {
		files := sampleFiles()
		from := filepath.Join(dir, "model")
		writeTree(t, from, files)
		st := openStore(t, filepath.Join(dir, "store"))
		res := mustRun(t, st, folderSource(t, from), Options{})
		checkVersion(t, st, localName, files)
		for _, f := range res.Files {
			want := how
			if f.Size == 0 {
				want = Copied
			}
			// Equal small files may meet: the second finds the first.
			if f.How != want && !strings.HasSuffix(f.Path, "config.json") {
				t.Errorf("%s was %s, want %s", f.Path, f.How, want)
			}
		}
		for _, f := range res.Model.Files {
			if f.GitOID != gitOID(files[f.Path]) {
				t.Errorf("%s has git id %s", f.Path, f.GitOID)
			}
		}
		for p, b := range files {
			if have, err := os.ReadFile(filepath.Join(from, p)); err != nil || !bytes.Equal(have, b) {
				t.Errorf("the original %s is not what it was (%v)", p, err)
			}
		}
		if again := mustRun(t, st, folderSource(t, from), Options{}); !again.Unchanged || again.Fetched != 0 {
			t.Errorf("a second import: unchanged %v, copied %d bytes", again.Unchanged, again.Fetched)
		}
		// Whoever writes to the original does not change the blob.
		writeTree(t, from, map[string][]byte{"model-1.safetensors": noise(99, 1<<20+4097)})
		checkVersion(t, st, localName, files)
		files["model-1.safetensors"] = noise(99, 1<<20+4097)
		if res := mustRun(t, st, folderSource(t, from), Options{}); res.Fetched != 1<<20+4097 {
			t.Errorf("after one file changed, %d bytes were taken", res.Fetched)
		}
		checkVersion(t, st, localName, files)
	})
}

func TestImportMoves(t *testing.T) {
	onBoth(t, func(t *testing.T, dir string, how How) {
		files := sampleFiles()
		from := filepath.Join(dir, "model")
		writeTree(t, from, files)
		inode := inodeOf(t, filepath.Join(from, "model-1.safetensors"))
		if err := os.Chown(filepath.Join(from, "model-1.safetensors"), 12345, 12345); err != nil {
			t.Fatal(err)
		}
		st := openStore(t, filepath.Join(dir, "store"))
		res := mustRun(t, st, folderSource(t, from), Options{Move: true})
		checkVersion(t, st, localName, files)
		for _, f := range res.Files {
			want := map[bool]How{true: Moved, false: how}[f.Size >= moveAtLeast]
			if f.How != want && f.Size > 100 {
				t.Errorf("%s was %s, want %s", f.Path, f.How, want)
			}
			if _, err := os.Lstat(filepath.Join(from, f.Path)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is still in the folder (%v)", f.Path, err)
			}
		}
		blob := st.BlobPath(digest.FromBytes(files["model-1.safetensors"]))
		if inodeOf(t, blob) != inode {
			t.Error("the moved file is a copy")
		}
		var now unix.Stat_t
		if err := unix.Stat(blob, &now); err != nil {
			t.Fatal(err)
		}
		if now.Mode&0o7777 != 0o444 || now.Uid != 0 || now.Nlink != 1 {
			t.Errorf("the blob has mode %o, owner %d and %d names; want 444, 0, 1", now.Mode&0o7777, now.Uid, now.Nlink)
		}
	})
}

func inodeOf(t testing.TB, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// A file that somebody could still write to is not taken over, for the blob
// would change with it.
func TestImportMoveCopiesWhatOthersHold(t *testing.T) {
	content := noise(5, 2<<20)
	tests := []struct {
		name string
		hold func(t *testing.T, path string)
	}{
		{"open for writing", func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
		}},
		{"mapped for writing", func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
			t.Cleanup(func() { _ = unix.Munmap(m) })
		}},
		{"under another name", func(t *testing.T, path string) {
			if err := os.Link(path, path+".other"); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := testenv.LoopFS(t, "ext4", 64<<20).Dir
			path := filepath.Join(dir, "model.gguf")
			if err := os.WriteFile(path, content, 0o644); err != nil {
				t.Fatal(err)
			}
			inode := inodeOf(t, path)
			tt.hold(t, path)
			st := openStore(t, filepath.Join(dir, "store"))
			res := mustRun(t, st, folderSource(t, path), Options{Move: true})
			if res.Files[0].How != Copied || inodeOf(t, st.BlobPath(res.Files[0].Digest)) == inode {
				t.Errorf("the file was %s", res.Files[0].How)
			}
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the original is still there (%v)", err)
			}
			checkVersion(t, st, localName, map[string][]byte{"model.gguf": content})
		})
	}
}

// When publishing fails, files that were to be moved are where they were.
func TestImportMoveKeepsFilesOnFailure(t *testing.T) {
	dir := testenv.LoopFS(t, "ext4", 64<<20).Dir
	files := sampleFiles()
	from := filepath.Join(dir, "model")
	writeTree(t, from, files)
	st := openStore(t, filepath.Join(dir, "store"))
	index := filepath.Join(st.Dir(), "index.json")
	good, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(index, []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), st, folderSource(t, from), Options{Node: "test", Move: true}); !errors.Is(err, store.ErrDamaged) {
		t.Fatalf("error %v, want store.ErrDamaged", err)
	}
	for p, b := range files {
		if have, err := os.ReadFile(filepath.Join(from, p)); err != nil || !bytes.Equal(have, b) {
			t.Errorf("after a failed move, %s: %v", p, err)
		}
	}
	if err := os.WriteFile(index, good, 0o644); err != nil {
		t.Fatal(err)
	}
	mustRun(t, st, folderSource(t, from), Options{Move: true})
	checkVersion(t, st, localName, files)
	for p := range files {
		if _, err := os.Lstat(filepath.Join(from, p)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still in the folder (%v)", p, err)
		}
	}
}

// A folder cannot be moved across file systems; it is copied and removed.
func TestImportMovesAcrossFileSystems(t *testing.T) {
	files := sampleFiles()
	from := filepath.Join(t.TempDir(), "model")
	writeTree(t, from, files)
	st := openStore(t, filepath.Join(testenv.LoopFS(t, "ext4", 64<<20).Dir, "store"))
	res := mustRun(t, st, folderSource(t, from), Options{Move: true})
	for _, f := range res.Files {
		if f.How == Moved || f.How == Cloned {
			t.Errorf("%s was %s", f.Path, f.How)
		}
	}
	checkVersion(t, st, localName, files)
	for p := range files {
		if _, err := os.Lstat(filepath.Join(from, p)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still in the folder (%v)", p, err)
		}
	}
}

// disturber changes a file when it is opened, after the source has looked at
// it.
type disturber struct {
	*directory.Source
	path    string
	disturb func(path string) error
}

func (d *disturber) OpenFile(f source.File) (*os.File, error) {
	file, err := d.Source.OpenFile(f)
	if err == nil && f.Path == filepath.Base(d.path) {
		err = d.disturb(d.path)
	}
	return file, err
}

func TestImportFindsChangedFile(t *testing.T) {
	tests := []struct {
		name    string
		disturb func(path string) error
	}{
		{"shorter", func(path string) error { return os.Truncate(path, 100) }},
		{"longer", func(path string) error { return os.Truncate(path, 8<<20) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			writeTree(t, dir, map[string][]byte{"model.gguf": noise(6, 2<<20), "a": noise(7, 100)})
			st := openStore(t, t.TempDir())
			src := &disturber{folderSource(t, dir), filepath.Join(dir, "model.gguf"), tt.disturb}
			if _, err := Run(t.Context(), st, src, Options{Node: "test"}); !errors.Is(err, source.ErrChanged) {
				t.Fatalf("error %v, want source.ErrChanged", err)
			}
			if versions, err := st.Versions(); err != nil || len(versions) > 0 {
				t.Errorf("versions %v, %v", versions, err)
			}
			if left := leftovers(t, st); len(left) > 0 {
				t.Errorf("left in ingest: %v", left)
			}
		})
	}
	t.Run("written to while it is copied", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "model.gguf")
		writeTree(t, dir, map[string][]byte{"model.gguf": noise(6, 2<<20)})
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		before, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		it := &item{want: source.File{Path: "model.gguf", Size: 2 << 20}}
		if err := unchanged(f, before, it); err != nil {
			t.Fatal(err)
		}
		later := time.Now().Add(time.Second)
		if err := os.Chtimes(path, later, later); err != nil {
			t.Fatal(err)
		}
		if err := unchanged(f, before, it); !errors.Is(err, source.ErrChanged) {
			t.Errorf("error %v, want source.ErrChanged", err)
		}
	})
}

// The lease by which a file is held still is given and lost as promised.
func TestHoldStill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	still := holdStill(f)
	if !still.held() {
		t.Fatal("no lease on a file that nobody writes")
	}
	opened := make(chan error, 1)
	go func() {
		w, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			err = w.Close()
		}
		opened <- err
	}()
	for deadline := time.Now().Add(10 * time.Second); still.held(); {
		if time.Now().After(deadline) {
			t.Fatal("somebody opens the file for writing, and the lease does not show it")
		}
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-opened:
		t.Fatalf("the file was opened for writing under the lease (%v)", err)
	default:
	}
	still.release()
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if holdStill(f).held() {
		t.Error("a lease was given on a file that is open for writing")
	}
}

func TestImportFullDisk(t *testing.T) {
	for _, fstype := range []string{"tmpfs", "ext4"} {
		t.Run(fstype, func(t *testing.T) {
			options := map[string]string{"tmpfs": "size=3m"}[fstype]
			fs := testenv.LoopFS(t, fstype, 16<<20, options)
			st := openStore(t, filepath.Join(fs.Dir, "store"))
			from := t.TempDir()
			writeTree(t, from, map[string][]byte{"model.gguf": noise(8, 32<<20), "a": noise(7, 100)})
			_, err := Run(t.Context(), st, folderSource(t, from), Options{Node: "test"})
			if !errors.Is(err, store.ErrFull) || !strings.Contains(err.Error(), "is needed") {
				t.Fatalf("error %v, want store.ErrFull with what is needed", err)
			}
			if left := leftovers(t, st); len(left) > 0 {
				t.Errorf("left in ingest: %v", left)
			}
		})
	}
}

// A hub cache comes in with its commits, refs and git ids; what its names
// promise is checked.
func TestImportHubCache(t *testing.T) {
	commit := strings.Repeat("d", 40)
	files := map[string][]byte{"model.safetensors": noise(11, 1<<20), "config.json": []byte("{}\n")}
	cache := func(t *testing.T) string {
		dir := filepath.Join(t.TempDir(), "hub")
		repo := filepath.Join(dir, "models--org--model")
		sum, oid := digest.FromBytes(files["model.safetensors"]).Encoded(), gitOID(files["config.json"])
		writeTree(t, repo, map[string][]byte{
			"blobs/" + sum: files["model.safetensors"], "blobs/" + oid: files["config.json"], "refs/main": []byte(commit),
		})
		snap := filepath.Join(repo, "snapshots", commit)
		if err := os.MkdirAll(snap, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, blob := range map[string]string{"model.safetensors": sum, "config.json": oid} {
			if err := os.Symlink("../../blobs/"+blob, filepath.Join(snap, name)); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	only := func(t *testing.T, dir string) source.Source {
		c, err := directory.HubCache(dir)
		if err != nil || len(c.Sources) != 1 {
			t.Fatalf("%d sources, skipped %v, %v", len(c.Sources), c.Skipped, err)
		}
		t.Cleanup(func() { c.Close() })
		return c.Sources[0]
	}
	t.Run("whole", func(t *testing.T) {
		dir, st := cache(t), openStore(t, t.TempDir())
		res := mustRun(t, st, only(t, dir), Options{})
		checkVersion(t, st, name, files)
		type id struct{ Source, Revision, Config, Weights string }
		got := id{res.Model.Source, res.Model.Revision, res.Model.Files[0].GitOID, res.Model.Files[1].GitOID}
		if diff := cmp.Diff(id{"hf://org/model", commit, gitOID(files["config.json"]), ""}, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		// The same model from the hub: nothing is asked for.
		hub := newFake(t, files, name)
		if res := mustRun(t, st, hub, Options{}); res.Fetched != 0 || hub.bytes != 0 {
			t.Errorf("a pull after the import fetched %d bytes", hub.bytes)
		}
		// And again: no file is read, for their names say what they are.
		if res := mustRun(t, st, only(t, dir), Options{Move: true}); res.Reused == 0 || res.Fetched != 0 {
			t.Errorf("a second import: %+v", res)
		}
		if c, err := directory.HubCache(dir); err != nil || len(c.Sources) != 0 {
			t.Errorf("after a move the cache has %d revisions (%v)", len(c.Sources), err)
		}
		checkVersion(t, st, name, files)
	})
	for _, damaged := range []string{"model.safetensors", "config.json"} {
		t.Run("damaged "+damaged, func(t *testing.T) {
			dir, st := cache(t), openStore(t, t.TempDir())
			at, err := filepath.EvalSymlinks(filepath.Join(dir, "models--org--model/snapshots", commit, damaged))
			if err != nil {
				t.Fatal(err)
			}
			b := bytes.Clone(files[damaged])
			b[len(b)/2] ^= 1
			if err := os.WriteFile(at, b, 0o644); err != nil {
				t.Fatal(err)
			}
			for _, move := range []bool{false, true} {
				_, err = Run(t.Context(), st, only(t, dir), Options{Node: "test", Move: move})
				var wrong *MismatchError
				if !errors.As(err, &wrong) || wrong.Path != damaged {
					t.Errorf("error %v, want a mismatch of %s", err, damaged)
				}
				if versions, err := st.Versions(); err != nil || len(versions) > 0 {
					t.Errorf("versions %v, %v", versions, err)
				}
			}
		})
	}
}

// The store's copy of a file has rotted, its length has not: a move must not
// delete the only good copy.
func TestAMoveKeepsTheOnlyGoodCopy(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	data := noise(1, 2<<20)
	st := openStore(t, filepath.Join(dir, "store"))
	from := filepath.Join(dir, "one")
	writeTree(t, from, map[string][]byte{"w.bin": data})
	res := mustRun(t, st, folderSource(t, from), Options{})
	blob := st.BlobPath(res.Files[0].Digest)
	_ = os.Chmod(blob, 0o644)
	bad := bytes.Clone(data)
	bad[77] ^= 1
	if err := os.WriteFile(blob, bad, 0o444); err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), st, folderSource(t, from), Options{Node: "test", Move: true}); err == nil || !strings.Contains(err.Error(), "--quarantine") {
		t.Errorf("got %v, want that the store's copy is damaged", err)
	}
	if out, err := os.ReadFile(filepath.Join(from, "w.bin")); err != nil || !bytes.Equal(out, data) {
		t.Fatalf("the only good copy is gone: %v", err)
	}
	// What the error says to do helps.
	if err := os.Remove(blob); err != nil { // as verify --quarantine does
		t.Fatal(err)
	}
	mustRun(t, st, folderSource(t, from), Options{Move: true})
	if in, err := os.ReadFile(blob); err != nil || !bytes.Equal(in, data) {
		t.Errorf("the store's copy is not the good one: %v", err)
	}
	if _, err := os.Stat(filepath.Join(from, "w.bin")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file was not moved: %v", err)
	}
}

// hooked calls hook when a file is opened.
type hooked struct {
	*directory.Source
	hook func()
}

func (h hooked) Open(ctx context.Context, f source.File, off, n int64) (io.ReadCloser, error) {
	h.hook()
	return h.Source.Open(ctx, f, off, n)
}

// A move that is gone on with after a crash holds the blobs in whose favour it
// deletes the originals.
func TestAMoveThatGoesOnHoldsWhatItReliesOn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	st := openStore(t, filepath.Join(dir, "store"))
	from := filepath.Join(dir, "one")
	writeTree(t, from, map[string][]byte{"w.bin": noise(1, 2<<20)})
	src := folderSource(t, from)
	res := mustRun(t, st, src, Options{})
	if err := src.BeginMove(res.Version.Digest); err != nil {
		t.Fatal(err)
	}
	blob := res.Files[0].Digest
	src2 := hooked{folderSource(t, from), func() {
		// another process: rm, and the trash emptied
		err := st.Exclusive(t.Context(), func(x *store.Exclusive) error {
			leased, err := x.Leased()
			if err != nil {
				return err
			}
			if _, held := leased[blob]; held {
				return nil
			}
			r := store.Removal{References: x.Index(), Blobs: []store.Blob{{Digest: blob, Size: 2 << 20}}}
			if r, err = x.Remove(r); err != nil {
				return err
			}
			_, err = x.Condemn(func(store.Removal) bool { return true })
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Shred(t.Context(), store.Limit{}); err != nil {
			t.Fatal(err)
		}
	}}
	if _, err := Run(t.Context(), st, src2, Options{Node: "test", Move: true}); err != nil {
		t.Error(err)
	}
	_, there, _ := st.Stat(blob)
	_, e := os.Stat(filepath.Join(from, "w.bin"))
	if !there && e != nil {
		t.Error("the file is neither in the store nor where it was")
	}
}
