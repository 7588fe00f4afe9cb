package pull

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
)

// The tests below break a pull, an import and a move off at every step between
// two changes of the disk: by killing the process, by a disk that is full from
// then on, by a power cut. What must hold afterwards is in recovers.

const beforeName = "before:1"

func beforeFiles() map[string][]byte {
	return map[string][]byte{"model.gguf": noise(50, 10<<10), "config.json": []byte("before\n")}
}

// crashFiles are few, so that there are not too many steps: one file in pieces
// whose progress is saved, one LFS file, one known by git id alone.
func crashFiles() map[string][]byte {
	return map[string][]byte{
		"model-1.safetensors": noise(1, 400<<10),
		"model-2.safetensors": noise(2, 20<<10),
		"sub/config.json":     []byte(`{"model_type": "crash"}`),
	}
}

// scene is a place for one attempt: a store with an earlier version in it, and
// perhaps a folder to import.
type scene struct {
	dir   string
	files map[string][]byte
	hub   *hubtest.Server
	task  task
}

// newScene makes a scene below dir, which is on the file system under test.
func newScene(t *testing.T, dir, kind string, files map[string][]byte, hub *hubtest.Server) *scene {
	t.Helper()
	s := &scene{dir: dir, files: files, hub: hub, task: task{Store: filepath.Join(dir, "store")}}
	before := filepath.Join(dir, "before")
	writeTree(t, before, beforeFiles())
	task{Store: s.task.Store, Folder: before, Name: beforeName}.do(t)
	switch kind {
	case "pull":
		s.task.Hub = hub.URL
	case "move":
		s.task.Move = true
		fallthrough
	default:
		s.task.Folder, s.task.Name = filepath.Join(dir, "model"), localName
		writeTree(t, s.task.Folder, files)
	}
	return s
}

func (s *scene) name() string {
	if s.task.Hub != "" {
		return name
	}
	return localName
}

// recovers checks what must hold whatever happened, then runs the task again.
func (s *scene) recovers(t *testing.T) {
	t.Helper()
	st, err := store.Open(s.task.Store)
	if err != nil {
		t.Fatal(err)
	}
	checkVersion(t, st, beforeName, beforeFiles())
	versions, err := st.Versions()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := st.Verify(t.Context(), versions, nil)
	if err != nil || len(problems) > 0 {
		t.Fatalf("verify: %v, %v", problems, err)
	}
	_, err = st.Resolve(ref(t, s.name()))
	published := err == nil
	if published {
		checkVersion(t, st, s.name(), s.files)
	} else if !errors.Is(err, store.ErrNotFound) {
		t.Fatal(err)
	}
	blobs, err := os.ReadDir(filepath.Join(st.BlobsDir(), "sha256"))
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, e := range blobs {
		b, err := os.ReadFile(filepath.Join(st.BlobsDir(), "sha256", e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if digest.FromBytes(b).Encoded() != e.Name() {
			t.Errorf("blob %s has other bytes (%d of them)", e.Name(), len(b))
		}
		have[e.Name()] = true
	}
	if t.Failed() {
		return
	}
	if s.task.Folder != "" {
		gone := 0
		for p, b := range s.files {
			at, err := os.ReadFile(filepath.Join(s.task.Folder, p))
			switch {
			case errors.Is(err, fs.ErrNotExist) && published && s.task.Move:
				gone++
			case err != nil || !bytes.Equal(at, b):
				t.Fatalf("the original of %s is lost (%v); published: %v", p, err, published)
			}
		}
		_, err := os.Lstat(filepath.Join(s.task.Folder, ".larder-moved"))
		if gone == len(s.files) && errors.Is(err, fs.ErrNotExist) {
			return // all was done; to move nothing once more is an error
		}
	}
	if s.task.Hub != "" {
		s.hub.ResetRequests()
	}
	s.task.do(t)
	checkVersion(t, st, s.name(), s.files)
	checkVersion(t, st, beforeName, beforeFiles())
	if s.task.Hub != "" {
		for p, b := range s.files {
			if have[digest.FromBytes(b).Encoded()] && s.hub.Sent(p) > 0 {
				t.Errorf("%s was there, and was asked for again", p)
			}
		}
	}
	if s.task.Move {
		for p := range s.files {
			if _, err := os.Lstat(filepath.Join(s.task.Folder, p)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is still where it was (%v)", p, err)
			}
		}
	}
	for _, left := range leftovers(t, st) {
		// A kill may leave a file that was being written under a name of its
		// own, and the record of progress of what is a blob now: some bytes.
		if !strings.HasPrefix(left, ".tmp-") && !strings.HasSuffix(left, ".progress") {
			t.Errorf("left in ingest: %s", left)
		}
	}
}

// killed tells whether a process died by SIGKILL, as a fault does it.
func killed(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}

func serve(t *testing.T, files map[string][]byte) *hubtest.Server {
	t.Helper()
	hub := hubtest.Start(t, hubtest.Options{})
	if _, err := hub.Repo("org/model").CommitMap("main", files); err != nil {
		t.Fatal(err)
	}
	return hub
}

// eachStep runs a scene for every step that the task has, and for some more:
// parallel work makes their number vary a little.
func eachStep(t *testing.T, scenes func(n int) *scene, try func(t *testing.T, n int, s *scene)) {
	steps := scenes(0).task.steps(t)
	if steps < 20 {
		t.Fatalf("the task has %d steps; the faults are not built in", steps)
	}
	for n := 1; n <= steps; n++ {
		s := scenes(n)
		t.Run(fmt.Sprint(n), func(t *testing.T) { try(t, n, s) })
		if t.Failed() {
			t.Logf("%d of %d steps were tried", n, steps)
			return
		}
		if err := os.RemoveAll(s.dir); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKillAtEveryStep(t *testing.T) {
	hub := serve(t, crashFiles())
	for _, kind := range []string{"pull", "import", "move"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			dir := testenv.LoopFS(t, "ext4", 128<<20).Dir
			reached := 0
			eachStep(t,
				func(n int) *scene { return newScene(t, filepath.Join(dir, fmt.Sprint(n)), kind, crashFiles(), hub) },
				func(t *testing.T, n int, s *scene) {
					cmd, stderr := s.task.command(t, fmt.Sprintf("kill:%d", n))
					if err := cmd.Run(); killed(err) {
						reached = n
					} else if err != nil {
						t.Fatalf("%v\n%s", err, stderr)
					}
					s.recovers(t)
				})
			if reached < 20 {
				t.Errorf("only %d steps were reached", reached)
			}
		})
	}
}

func TestFullDiskAtEveryStep(t *testing.T) {
	hub := serve(t, crashFiles())
	for _, kind := range []string{"pull", "import"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			eachStep(t,
				func(n int) *scene { return newScene(t, filepath.Join(dir, fmt.Sprint(n)), kind, crashFiles(), hub) },
				func(t *testing.T, n int, s *scene) {
					cmd, stderr := s.task.command(t, fmt.Sprintf("full:%d:%d", n, syscall.ENOSPC))
					err := cmd.Run()
					var exit *exec.ExitError
					if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
						t.Fatalf("%v\n%s", err, stderr)
					}
					if err != nil && !strings.Contains(stderr.String(), "no space left") {
						t.Errorf("the error does not say what is wrong: %s", stderr)
					}
					s.recovers(t)
				})
		})
	}
}

func TestPowerCutAtEveryStep(t *testing.T) {
	files := crashFiles()
	delete(files, "model-2.safetensors")
	for _, fstype := range []string{"ext4", "xfs"} {
		for _, kind := range []string{"pull", "move"} {
			t.Run(fstype+" "+kind, func(t *testing.T) {
				t.Parallel()
				hub := serve(t, files)
				disk := testenv.LoopFS(t, fstype, 320<<20)
				eachStep(t,
					func(n int) *scene {
						s := newScene(t, filepath.Join(disk.Dir, fmt.Sprint(n)), kind, files, hub)
						// What was there before the attempt was durable before the cut.
						d, err := os.Open(disk.Dir)
						if err != nil {
							t.Fatal(err)
						}
						defer d.Close()
						if err := unix.Syncfs(int(d.Fd())); err != nil {
							t.Fatal(err)
						}
						return s
					},
					func(t *testing.T, n int, s *scene) {
						cmd, stderr := s.task.command(t, fmt.Sprintf("cut:%d:%s", n, disk.Dir))
						if err := cmd.Run(); err != nil && !killed(err) {
							t.Fatalf("%v\n%s", err, stderr)
						}
						disk.Unmount()
						disk.Mount()
						s.recovers(t)
					})
			})
		}
	}
}

// A move that was cut off while it removed the originals is not taken for a
// model of fewer files.
func TestBrokenOffMove(t *testing.T) {
	dir := t.TempDir()
	files := crashFiles()
	from := filepath.Join(dir, "model")
	writeTree(t, from, files)
	st := openStore(t, filepath.Join(dir, "store"))
	res := mustRun(t, st, folderSource(t, from), Options{})
	src := folderSource(t, from)
	if err := src.BeginMove(res.Version.Digest); err != nil {
		t.Fatal(err)
	}
	first := slices.Sorted(maps.Keys(files))[0]
	if err := os.Remove(filepath.Join(from, first)); err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), st, folderSource(t, from), Options{Node: "test"}); err == nil || !strings.Contains(err.Error(), "--move") {
		t.Errorf("an import of the rest: error %v", err)
	}
	other := openStore(t, filepath.Join(dir, "other"))
	if _, err := Run(t.Context(), other, folderSource(t, from), Options{Node: "test", Move: true}); err == nil || !strings.Contains(err.Error(), ".larder-moved") {
		t.Errorf("a move of the rest into another store: error %v", err)
	}
	writeTree(t, from, map[string][]byte{"model-2.safetensors": noise(77, 20<<10), "new.txt": []byte("new")})
	if _, err := Run(t.Context(), st, folderSource(t, from), Options{Node: "test", Move: true}); err == nil || !strings.Contains(err.Error(), "new.txt") || !strings.Contains(err.Error(), "model-2") {
		t.Errorf("a move of the rest with files that were never moved: error %v", err)
	}
	for _, stays := range []string{"model-2.safetensors", "new.txt"} {
		if err := os.Remove(filepath.Join(from, stays)); err != nil {
			t.Errorf("%s was removed: %v", stays, err)
		}
	}
	again, err := Run(t.Context(), st, folderSource(t, from), Options{Node: "test", Move: true})
	if err != nil || again.Version.Digest != res.Version.Digest {
		t.Fatalf("a move of the rest: %v, %v", again.Version, err)
	}
	checkVersion(t, st, localName, files)
	if left, err := filepath.Glob(from + "/*"); err != nil || len(left) != 1 || filepath.Base(left[0]) != "sub" {
		t.Errorf("left in the folder: %v, %v", left, err)
	}
	if _, err := os.Lstat(filepath.Join(from, ".larder-moved")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the note is still there (%v)", err)
	}
}
