package directory

import (
	"bytes"
	"errors"
	"io"
	"net"
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
	"github.com/larder-project/larder/internal/source/sourcetest"
	"github.com/larder-project/larder/internal/testenv"
)

// folder writes files, content by path, below a new folder.
func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		write(t, filepath.Join(dir, name), content)
	}
	return dir
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, target, name string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, name string) *Source {
	t.Helper()
	ref, err := reference.Parse("test:1")
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(name, Options{References: []reference.Reference{ref}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func paths(snap source.Snapshot) []string {
	var out []string
	for _, f := range snap.Files {
		out = append(out, f.Path)
	}
	return out
}

func content(t *testing.T, s source.Source, f source.File) string {
	t.Helper()
	rc, err := s.Open(t.Context(), f, 0, f.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	data, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestContract(t *testing.T) {
	sourcetest.Run(t, func(t *testing.T, files map[string][]byte) source.Source {
		text := map[string]string{}
		for name, data := range files {
			text[name] = string(data)
		}
		return open(t, folder(t, text))
	})
}

func TestFolder(t *testing.T) {
	dir := folder(t, map[string]string{
		"model.gguf":                        "weights",
		".gitattributes":                    "* -text",
		".git/config":                       "no",
		"sub/.git":                          "gitdir: elsewhere",
		".cache/huggingface/download/x.etc": "no",
		".cache/other":                      "yes",
	})
	link(t, "../model.gguf", filepath.Join(dir, "sub/same.gguf"))
	s := open(t, dir)
	snap, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{".cache/other", ".gitattributes", "model.gguf", "sub/same.gguf"}, paths(snap)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if got := content(t, s, snap.Files[3]); got != "weights" {
		t.Errorf("through the link: %q", got)
	}
}

func TestSingleFile(t *testing.T) {
	dir := folder(t, map[string]string{"a.gguf": "weights", "b": "other"})
	link(t, "a.gguf", filepath.Join(dir, "named.gguf"))
	s := open(t, filepath.Join(dir, "named.gguf"))
	snap, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a.gguf"}, paths(snap)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if got := content(t, s, snap.Files[0]); got != "weights" {
		t.Errorf("content %q", got)
	}
}

func TestRefusals(t *testing.T) {
	outside := folder(t, map[string]string{"secret": "secret"})
	tests := []struct {
		name  string
		makes func(t *testing.T, dir string)
		says  []string
	}{
		{"empty folder", func(*testing.T, string) {}, []string{"no files"}},
		{"link out, absolute", func(t *testing.T, dir string) { link(t, outside+"/secret", dir+"/sub/leak") }, []string{"sub/leak", "outside", outside}},
		{"link out, relative", func(t *testing.T, dir string) {
			link(t, "../../"+filepath.Base(filepath.Dir(outside))+"/"+filepath.Base(outside)+"/secret", dir+"/leak")
		}, []string{"/leak", "outside"}},
		{"link through a linked folder", func(t *testing.T, dir string) {
			link(t, outside, dir+"/way")
			link(t, "way/secret", dir+"/leak")
		}, []string{"outside"}},
		{"dangling link", func(t *testing.T, dir string) { link(t, "nothing", dir+"/gone") }, []string{"/gone", "missing"}},
		{"link to itself", func(t *testing.T, dir string) { link(t, "loop", dir+"/loop") }, []string{"/loop"}},
		{"link to a folder", func(t *testing.T, dir string) {
			write(t, dir+"/real/file", "x")
			link(t, "real", dir+"/again")
		}, []string{"/again", "folder"}},
		{"FIFO", func(t *testing.T, dir string) {
			if err := unix.Mkfifo(dir+"/pipe", 0o644); err != nil {
				t.Fatal(err)
			}
		}, []string{"/pipe", "FIFO"}},
		{"link to a FIFO", func(t *testing.T, dir string) {
			if err := unix.Mkfifo(dir+"/.pipe", 0o644); err != nil {
				t.Fatal(err)
			}
			link(t, ".pipe", dir+"/+link")
		}, []string{"FIFO"}},
		{"socket", func(t *testing.T, dir string) {
			l, err := net.Listen("unix", dir+"/s")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}, []string{"/s", "socket"}},
		{"control character", func(t *testing.T, dir string) { write(t, dir+"/a\nb", "x") }, []string{"control character"}},
		{"backslash", func(t *testing.T, dir string) { write(t, dir+`/a\b`, "x") }, []string{"backslash"}},
		{"not UTF-8", func(t *testing.T, dir string) { write(t, dir+"/a\xff", "x") }, []string{"UTF-8"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "d") // short: a socket's path is limited
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			tt.makes(t, dir)
			_, err = open(t, dir).Snapshot(t.Context())
			if !errors.Is(err, source.ErrInvalid) {
				t.Fatalf("error %v, want source.ErrInvalid", err)
			}
			for _, want := range tt.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
		})
	}
	t.Run("device", func(t *testing.T) {
		testenv.NeedRoot(t)
		dir := t.TempDir()
		if err := unix.Mknod(dir+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
			t.Fatal(err)
		}
		if _, err := open(t, dir).Snapshot(t.Context()); !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "device") {
			t.Errorf("error %v", err)
		}
		if _, err := New(dir+"/null", Options{}); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("as a model of its own: error %v", err)
		}
	})
	t.Run("missing", func(t *testing.T) {
		if _, err := New(t.TempDir()+"/nothing", Options{}); !errors.Is(err, source.ErrNotFound) {
			t.Errorf("error %v, want source.ErrNotFound", err)
		}
	})
}

func TestChangedFile(t *testing.T) {
	tests := []struct {
		name   string
		change func(t *testing.T, file string)
	}{
		{"longer", func(t *testing.T, file string) { write(t, file, "weights and more") }},
		{"shorter", func(t *testing.T, file string) { write(t, file, "w") }},
		{"replaced", func(t *testing.T, file string) {
			write(t, file+".new", "WEIGHTS")
			if err := os.Rename(file+".new", file); err != nil {
				t.Fatal(err)
			}
		}},
		{"written in place", func(t *testing.T, file string) {
			write(t, file, "WEIGHTS")
			later := time.Now().Add(time.Minute)
			if err := os.Chtimes(file, later, later); err != nil {
				t.Fatal(err)
			}
		}},
		{"gone", func(t *testing.T, file string) {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}},
		{"a link out of the folder", func(t *testing.T, file string) {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			link(t, "/etc/passwd", file)
		}},
		{"a FIFO", func(t *testing.T, file string) {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mkfifo(file, 0o644); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := folder(t, map[string]string{"m": "weights"})
			s := open(t, dir)
			snap, err := s.Snapshot(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			tt.change(t, dir+"/m")
			f, err := s.OpenFile(snap.Files[0])
			if err == nil {
				f.Close()
				t.Fatal("a file that changed after it was listed was opened")
			}
			if tt.name != "a link out of the folder" && !errors.Is(err, source.ErrChanged) {
				t.Errorf("error %v, want source.ErrChanged", err)
			}
			if err := s.Remove(snap.Files[0]); err == nil {
				t.Error("a file that is not the one listed was removed")
			}
		})
	}
	t.Run("while it is read", func(t *testing.T) {
		dir := folder(t, map[string]string{"m": "weights"})
		s := open(t, dir)
		snap, err := s.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		rc, err := s.Open(t.Context(), snap.Files[0], 0, 7)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		if _, err := io.ReadFull(rc, make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		write(t, dir+"/m", "WEIGHTS")
		later := time.Now().Add(time.Minute)
		if err := os.Chtimes(dir+"/m", later, later); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(rc); !errors.Is(err, source.ErrChanged) {
			t.Errorf("read %q and error %v, want source.ErrChanged", rest, err)
		}
	})
}

func TestRemove(t *testing.T) {
	dir := folder(t, map[string]string{"m": "weights", "other/n": "more"})
	link(t, "m", dir+"/l")
	s := open(t, dir)
	snap, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range snap.Files {
		if err := s.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Finish(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"m", "l", "other/n"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there (%v)", name, err)
		}
	}
}

func TestPlace(t *testing.T) {
	dir := folder(t, map[string]string{"m": "weights"})
	link(t, "m", dir+"/l")
	s := open(t, dir)
	snap, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sole := map[string]bool{}
	for _, f := range snap.Files {
		name, ok, err := s.Place(f)
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(name)
		if err != nil || !bytes.Equal(data, []byte("weights")) {
			t.Errorf("Place(%s) = %s: %q, %v", f.Path, name, data, err)
		}
		sole[f.Path] = ok
	}
	if diff := cmp.Diff(map[string]bool{"l": false, "m": true}, sole); diff != "" {
		t.Errorf("files that may be taken over (-want +got):\n%s", diff)
	}
}

// linked is a folder with a file and a link to it.
func linked(t *testing.T) string {
	t.Helper()
	dir := folder(t, map[string]string{"a.bin": "old"})
	if err := os.Symlink("a.bin", filepath.Join(dir, "b.bin")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// While a folder is moved into a store, a link in it is replaced by a new file
// (mv new link): the new file was never read, and stays.
func TestALinkThatWasReplacedStays(t *testing.T) {
	t.Parallel()
	dir := linked(t)
	s, err := New(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	snap, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fresh := filepath.Join(dir, "..", "fresh")
	if err := os.WriteFile(fresh, []byte("never read"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(fresh, filepath.Join(dir, "b.bin")); err != nil {
		t.Fatal(err)
	}
	if err := s.BeginMove(digest.FromString("v")); err != nil {
		t.Fatal(err)
	}
	for _, f := range snap.Files {
		if err := s.Remove(f); (f.Path == "b.bin") != errors.Is(err, source.ErrChanged) {
			t.Errorf("remove %s: %v", f.Path, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "b.bin")); err != nil {
		t.Errorf("the file that nobody read is lost: %v", err)
	}
}

// A crash after the link's target was removed: the same command goes on.
func TestAMoveGoesOnPastALinkThatLeadsNowhere(t *testing.T) {
	t.Parallel()
	dir := linked(t)
	s, err := New(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	snap, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.BeginMove(digest.FromString("v")); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(snap.Files[0]); err != nil { // as removeOriginals does, in order
		t.Fatal(err)
	}
	s.Close() // the crash
	again, err := New(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err := again.Snapshot(t.Context()); err != nil {
		t.Errorf("the same command again: %v", err)
	}
}
