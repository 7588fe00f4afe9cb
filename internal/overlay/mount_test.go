package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/view"
)

func TestViewHasTheModelsBytesAndOnlyItsNames(t *testing.T) {
	onFileSystems(t, func(t *testing.T, h *host) {
		files := map[string][]byte{
			"config.json":       []byte(`{"a":1}`),
			"model.safetensors": random(t, 3<<20+17),
			"onnx/deep/m.onnx":  random(t, 70_000),
			"empty":             {},
			"copy.bin":          []byte(`{"a":1}`),
		}
		m := h.model(files)
		for _, method := range methods(t) {
			for _, ro := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/ro=%t", method, ro), func(t *testing.T) {
					h := h.sub(t)
					dir := h.view(view.Spec{Models: []view.Model{m}, ReadOnly: ro}, method)
					var target string
					if ro {
						target = h.mountReadOnly(dir, method).Target
					} else {
						mt, _ := h.mount(dir, method, Limit{})
						target = mt.Target
					}
					for name, data := range files {
						wantBytes(t, filepath.Join(target, name), data)
						fi, err := os.Stat(filepath.Join(target, name))
						if err != nil || fi.Size() != int64(len(data)) {
							t.Errorf("%s: size %d, error %v", name, fi.Size(), err)
						}
					}
					if d := cmp.Diff([]string{"config.json", "copy.bin", "empty", "model.safetensors", "onnx"}, names(t, target)); d != "" {
						t.Errorf("names in the view (-want +got):\n%s", d)
					}
					if _, err := os.Stat(filepath.Join(target, "sha256")); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("the blobs' folder is to be seen in the view: %v", err)
					}
					var st unix.Statfs_t
					if err := unix.Statfs(target, &st); err != nil || st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 {
						t.Errorf("mounted without nosuid,nodev: flags %#x, error %v", st.Flags, err)
					}
					err := os.WriteFile(filepath.Join(target, "new"), nil, 0o644)
					if ro && !errors.Is(err, unix.EROFS) || !ro && err != nil {
						t.Errorf("write into a view with ro=%t: %v", ro, err)
					}
				})
			}
		}
	})
}

// The blobs' layer has one folder at its root, sha256. A model may have a
// folder or a file of that name itself.
func TestModelWithAnEntryNamedAsTheBlobsFolder(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	for name, files := range map[string]map[string][]byte{
		"folder": {"sha256/a": []byte("in a"), "sha256/b/c": []byte("in c"), "z": []byte("in z")},
		"file":   {"sha256": []byte("a file"), "z": []byte("in z")},
	} {
		for _, method := range methods(t) {
			t.Run(name+"/"+string(method), func(t *testing.T) {
				h := h.sub(t)
				dir := h.view(view.Spec{Models: []view.Model{h.model(files)}}, method)
				m, _ := h.mount(dir, method, Limit{})
				for name, data := range files {
					wantBytes(t, filepath.Join(m.Target, name), data)
				}
				if d := cmp.Diff([]string{"sha256", "z"}, names(t, m.Target)); d != "" {
					t.Errorf("names (-want +got):\n%s", d)
				}
				if name == "folder" {
					if d := cmp.Diff([]string{"a", "b"}, names(t, filepath.Join(m.Target, "sha256"))); d != "" {
						t.Errorf("names in sha256 (-want +got):\n%s", d)
					}
				}
			})
		}
	}
}

func TestModeAndOwnerBelongToTheView(t *testing.T) {
	onFileSystems(t, func(t *testing.T, h *host) {
		m := h.model(map[string][]byte{"a.bin": []byte("data"), "d/b.bin": []byte("more")})
		blob := h.blob(m.Pack.Files[0].Digest)
		before := attributes(t, blob)
		for _, method := range metacopy(t) {
			for _, c := range []struct {
				name            string
				spec            view.Spec
				root, dir, file string
				canWrite        map[uint32]bool // may this user make a file, and add to a.bin?
			}{
				{"default", view.Spec{}, "0777 0:0", "0777 0:0", "0666 0:0", map[uint32]bool{1000: true, 1001: true}},
				{"owned", view.Spec{UID: p(uint32(1000)), GID: p(uint32(7)), Mode: p(os.FileMode(0o640))}, "0750 1000:7", "0750 1000:7", "0640 1000:7", map[uint32]bool{1000: true, 1001: false}},
				{"others read", view.Spec{Mode: p(os.FileMode(0o644))}, "0755 0:0", "0755 0:0", "0644 0:0", map[uint32]bool{1000: false}},
			} {
				t.Run(string(method)+"/"+c.name, func(t *testing.T) {
					h := h.sub(t)
					c.spec.Models = []view.Model{m}
					mt, _ := h.mount(h.view(c.spec, method), method, Limit{})
					for path, want := range map[string]string{".": c.root, "d": c.dir, "a.bin": c.file, "d/b.bin": c.file} {
						if got := attributes(t, filepath.Join(mt.Target, path)); got != want {
							t.Errorf("%s is %s, want %s", path, got, want)
						}
					}
					for uid, can := range c.canWrite {
						out, err := as(uid, `echo x > "$1/new-$2" && echo y >> "$1/a.bin"`, mt.Target, fmt.Sprint(uid))
						if (err == nil) != can {
							t.Errorf("user %d writes: %v %s, want %t", uid, err, out, can)
						}
					}
				})
			}
		}
		if after := attributes(t, blob); after != before {
			t.Errorf("the blob's attributes went from %s to %s", before, after)
		}
		for _, f := range m.Pack.Files {
			if len(read(t, h.blob(f.Digest))) != 4 {
				t.Error("a blob has changed")
			}
		}
	})
}

func TestWritesStayInTheirView(t *testing.T) {
	onFileSystems(t, func(t *testing.T, h *host) {
		data := random(t, 1<<20)
		m := h.model(map[string][]byte{"a.bin": data, "b.bin": []byte("bee"), "d/c.bin": []byte("sea")})
		for _, method := range methods(t) {
			t.Run(string(method), func(t *testing.T) {
				h := h.sub(t)
				dir := h.view(view.Spec{Models: []view.Model{m}}, method)
				one, _ := h.mount(dir, method, Limit{})
				two, _ := h.mount(dir, method, Limit{})

				f, err := os.OpenFile(filepath.Join(one.Target, "a.bin"), os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt([]byte("changed"), 100); err != nil {
					t.Fatal(err)
				}
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
				for _, err := range []error{
					os.Remove(filepath.Join(one.Target, "b.bin")),
					os.Rename(filepath.Join(one.Target, "d"), filepath.Join(one.Target, "e")),
					os.WriteFile(filepath.Join(one.Target, "new"), []byte("new"), 0o600),
				} {
					if err != nil {
						t.Fatal(err)
					}
				}
				changed := append([]byte{}, data...)
				copy(changed[100:], "changed")
				wantBytes(t, filepath.Join(one.Target, "a.bin"), changed)
				wantBytes(t, filepath.Join(one.Target, "e/c.bin"), []byte("sea"))
				if d := cmp.Diff([]string{"a.bin", "e", "new"}, names(t, one.Target)); d != "" {
					t.Errorf("names where was written (-want +got):\n%s", d)
				}

				wantBytes(t, filepath.Join(two.Target, "a.bin"), data)
				wantBytes(t, filepath.Join(two.Target, "d/c.bin"), []byte("sea"))
				if d := cmp.Diff([]string{"a.bin", "b.bin", "d"}, names(t, two.Target)); d != "" {
					t.Errorf("names in the other view (-want +got):\n%s", d)
				}
			})
		}
		wantBytes(t, h.blob(fileNamed(m, "a.bin")), data)
	})
}

// After a reboot a view is built anew, and an upper of before is laid over it:
// what was written, changed in mode and renamed must be as it was.
func TestUpperOutlivesItsView(t *testing.T) {
	onFileSystems(t, func(t *testing.T, h *host) {
		data := random(t, 300_000)
		m := h.model(map[string][]byte{"a.bin": data, "b.bin": []byte("bee"), "d/c.bin": []byte("sea"), "d/e.bin": []byte("eee"), "gone": []byte("g")})
		for _, method := range methods(t) {
			t.Run(string(method), func(t *testing.T) {
				h := h.sub(t)
				spec := view.Spec{Models: []view.Model{m}}
				dir := h.view(spec, method)
				mt, u := h.mount(dir, method, Limit{})
				at := func(name string) string { return filepath.Join(mt.Target, name) }
				for _, err := range []error{
					os.Chmod(at("a.bin"), 0o600),
					os.Chown(at("a.bin"), 5, 6),
					os.Rename(at("b.bin"), at("d/renamed.bin")),
					os.Rename(at("d"), at("moved")),
					os.Chmod(at("moved/e.bin"), 0o640),
					os.Remove(at("gone")),
					os.WriteFile(at("moved/new"), []byte("new"), 0o644),
					os.Chmod(at("."), 0o711),
				} {
					if err != nil {
						t.Fatal(err)
					}
				}
				if err := Unmount(mt.Target); err != nil {
					t.Fatal(err)
				}
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
				if again := h.view(spec, method); again != dir {
					t.Fatalf("the view built again is %s, before it was %s", again, dir)
				}
				if _, err := NewUpper(t.Context(), u.Dir, dir, h.state, Limit{}); err != nil {
					t.Fatal(err)
				}
				h.do(mt)
				wantBytes(t, at("a.bin"), data)
				wantBytes(t, at("moved/renamed.bin"), []byte("bee"))
				wantBytes(t, at("moved/c.bin"), []byte("sea"))
				wantBytes(t, at("moved/e.bin"), []byte("eee"))
				wantBytes(t, at("moved/new"), []byte("new"))
				for name, want := range map[string]string{"a.bin": "0600 5:6", ".": "0711 0:0"} {
					if got := attributes(t, at(name)); got != want {
						t.Errorf("%s is %s, want %s", name, got, want)
					}
				}
				if d := cmp.Diff([]string{"a.bin", "moved"}, names(t, mt.Target)); d != "" {
					t.Errorf("names (-want +got):\n%s", d)
				}
				// And it can still be written.
				if err := os.WriteFile(at("moved/e.bin"), []byte("other"), 0); err != nil {
					t.Error(err)
				}
				wantBytes(t, at("moved/e.bin"), []byte("other"))
			})
		}
	})
}

func TestChangeOfModeCopiesNoData(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			h := newHost(t, testenv.LoopFS(t, kind, 400<<20).Dir)
			m := h.model(map[string][]byte{"big": random(t, 32<<20)})
			for _, method := range metacopy(t) {
				mt, _ := h.mount(h.view(view.Spec{Models: []view.Model{m}}, method), method, Limit{})
				before := used(t, h.root)
				big := filepath.Join(mt.Target, "big")
				if err := errors.Join(os.Chmod(big, 0o600), os.Chown(big, 3, 4), os.Rename(big, big+"2")); err != nil {
					t.Fatal(err)
				}
				if grown := used(t, h.root) - before; grown > 1<<20 {
					t.Errorf("%s: chmod, chown and rename of 32 MiB took %d bytes", method, grown)
				}
			}
		})
	}
}

// A write of one byte costs a clone where the file system can, a copy where it
// cannot.
func TestFirstWriteIntoALargeFile(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	const size = 256 << 20
	for _, c := range []struct {
		kind   string
		clones bool
	}{{"xfs", true}, {"btrfs", true}, {"ext4", false}} {
		t.Run(c.kind, func(t *testing.T) {
			h := newHost(t, testenv.LoopFS(t, c.kind, 1<<30).Dir)
			m := h.model(map[string][]byte{"big": random(t, size)})
			mt, _ := h.mount(h.view(view.Spec{Models: []view.Model{m}}, methods(t)[0]), methods(t)[0], Limit{})
			before := used(t, h.root)
			start := time.Now()
			f, err := os.OpenFile(filepath.Join(mt.Target, "big"), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte{1}, 1<<20); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			took := time.Since(start)
			grown := used(t, h.root) - before
			t.Logf("one byte into %d MiB: %v, %d bytes more on disk", size>>20, took, grown)
			if c.clones && grown > 1<<20 {
				t.Errorf("on %s a write of one byte took %d bytes", c.kind, grown)
			}
			if !c.clones && grown < size {
				t.Errorf("on %s only %d bytes were copied: the test measures nothing", c.kind, grown)
			}
		})
	}
}

// All views read the one file: its pages are in memory once.
func TestPageCacheIsShared(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 400<<20).Dir)
	data := random(t, 64<<20)
	m := h.model(map[string][]byte{"big": data})
	blob := h.blob(m.Pack.Files[0].Digest)
	for _, method := range methods(t) {
		t.Run(string(method), func(t *testing.T) {
			h := h.sub(t)
			dir := h.view(view.Spec{Models: []view.Model{m}}, method)
			one, _ := h.mount(dir, method, Limit{})
			two, _ := h.mount(dir, method, Limit{})
			dropCache(t, blob)
			if n := resident(t, filepath.Join(two.Target, "big")); n > 10 {
				t.Fatalf("%d pages are in memory before anything was read", n)
			}
			wantBytes(t, filepath.Join(one.Target, "big"), data)
			want := len(data) / os.Getpagesize()
			for _, path := range []string{blob, filepath.Join(two.Target, "big")} {
				if n := resident(t, path); n < want*99/100 {
					t.Errorf("%d of %d pages of %s are in memory after another view was read", n, want, path)
				}
			}
		})
	}
}

func dropCache(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
}

// resident counts the pages of a file that are in memory.
func resident(t *testing.T, path string) int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	vec := make([]byte, (len(mem)+os.Getpagesize()-1)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mem[0])), uintptr(len(mem)), uintptr(unsafe.Pointer(&vec[0]))); errno != 0 {
		t.Fatal(errno)
	}
	n := 0
	for _, v := range vec {
		n += int(v & 1)
	}
	return n
}

// Options are one text in which ':' ',' and '\' separate and quote.
func TestPathsWithSpecialCharacters(t *testing.T) {
	fsys := testenv.LoopFS(t, "ext4", 64<<20)
	for i, name := range []string{"a:b", "a,b", `a\b`, `a\:b`, `a\,b`, "with space", "Vorräte-模型", `end\`, `:,\ :`, "line\nbreak", "a=b,upperdir=x", "#c", `a\072b`} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(fsys.Dir, fmt.Sprint(i), name)
			if err := os.MkdirAll(root, 0o755); err != nil {
				t.Fatal(err)
			}
			h := newHost(t, root)
			m := h.model(map[string][]byte{"f": []byte("data of " + name)})
			for _, method := range methods(t) {
				dir := h.view(view.Spec{Models: []view.Model{m}}, method)
				mt, u := h.mount(dir, method, Limit{})
				wantBytes(t, filepath.Join(mt.Target, "f"), []byte("data of "+name))
				if err := os.WriteFile(filepath.Join(mt.Target, "w"), []byte("w"), 0o644); err != nil {
					t.Fatal(err)
				}
				wantBytes(t, filepath.Join(u.Upper, "w"), []byte("w"))
				ro := h.mountReadOnly(dir, method)
				wantBytes(t, filepath.Join(ro.Target, "f"), []byte("data of "+name))
				for _, target := range []string{mt.Target, ro.Target} {
					var st unix.Statfs_t
					if err := unix.Statfs(target, &st); err != nil || st.Type != unix.OVERLAYFS_SUPER_MAGIC {
						t.Errorf("%s is a file system of type %#x (%v), want an overlay", target, st.Type, err)
					}
				}
			}
		})
	}
}

func TestOptionsLongerThanThePageAreRefused(t *testing.T) {
	m := Mount{Target: "/t", View: "/" + strings.Repeat("v", 4000), Blobs: "/" + strings.Repeat("b", 200), ReadOnly: true, Method: view.DataOnly}
	if _, err := m.Options(); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("error %v", err)
	}
}

func TestUnmountTellsBusyFromNotMounted(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	m := h.model(map[string][]byte{"f": []byte("data")})
	mt, _ := h.mount(h.view(view.Spec{Models: []view.Model{m}}, methods(t)[0]), methods(t)[0], Limit{})
	if ok, err := IsMounted(mt.Target); !ok || err != nil {
		t.Fatalf("IsMounted = %t, %v", ok, err)
	}
	f, err := os.Open(filepath.Join(mt.Target, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Unmount(mt.Target); !errors.Is(err, ErrBusy) {
		t.Errorf("with a file open: %v", err)
	}
	holders, err := OpenFiles(t.Context(), mt.Target)
	if err != nil {
		t.Fatal(err)
	}
	want := []Holder{{PID: os.Getpid(), Command: "overlay.test", Paths: []string{filepath.Join(mt.Target, "f")}}}
	if d := cmp.Diff(want, holders); d != "" {
		t.Errorf("holders (-want +got):\n%s", d)
	}
	_ = f.Close()
	if err := Unmount(mt.Target); err != nil {
		t.Error(err)
	}
	if ok, err := IsMounted(mt.Target); ok || err != nil {
		t.Errorf("after it was unmounted: IsMounted = %t, %v", ok, err)
	}
	for _, path := range []string{mt.Target, filepath.Join(mt.Target, "absent")} {
		if err := Unmount(path); !errors.Is(err, ErrNotMounted) {
			t.Errorf("unmount of %s, where nothing is: %v", path, err)
		}
	}
	if ok, err := IsMounted(filepath.Join(mt.Target, "absent")); ok || err != nil {
		t.Errorf("of a path that is not there: IsMounted = %t, %v", ok, err)
	}
}

// A mapped file keeps a mount busy after it was closed.
func TestOpenFilesSeesMappings(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	m := h.model(map[string][]byte{"f": random(t, 5000)})
	mt, _ := h.mount(h.view(view.Spec{Models: []view.Model{m}}, methods(t)[0]), methods(t)[0], Limit{})
	f, err := os.Open(filepath.Join(mt.Target, "f"))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := syscall.Mmap(int(f.Fd()), 0, 5000, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	holders, err := OpenFiles(t.Context(), mt.Target)
	if err != nil || len(holders) != 1 || holders[0].PID != os.Getpid() {
		t.Errorf("holders %v, error %v", holders, err)
	}
	if err := syscall.Munmap(mem); err != nil {
		t.Fatal(err)
	}
}

func TestReadOnlyHardLinkViewNeedsAnEmptyTarget(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	m := h.model(map[string][]byte{"f": []byte("data")})
	mt := Mount{Target: h.target(), View: h.view(view.Spec{Models: []view.Model{m}}, view.HardLink), Blobs: h.blobs, ReadOnly: true, Method: view.HardLink}
	if err := os.WriteFile(filepath.Join(mt.Target, "stray"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := mt.Do(); err == nil {
		_ = Unmount(mt.Target)
		t.Error("what lay below would be seen in the view")
	}
}

func TestMountOfAViewThatIsNotThere(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	err := Mount{Target: h.target(), View: filepath.Join(h.state, "absent"), Blobs: h.blobs, ReadOnly: true, Method: view.DataOnly}.Do()
	if !errors.Is(err, unix.ENOENT) {
		t.Errorf("error %v", err)
	}
}

func fileNamed(m view.Model, name string) digest.Digest {
	for _, f := range m.Pack.Files {
		if f.Path == name {
			return f.Digest
		}
	}
	panic("no file " + name)
}
