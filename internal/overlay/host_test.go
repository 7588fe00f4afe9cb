package overlay

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/view"
)

// host is a store and a state folder, and the means to mount views of them.
type host struct {
	t     testing.TB
	root  string // holds all the rest
	blobs string
	state string
	n     *int // uppers and targets made so far
}

func newHost(t testing.TB, root string) *host {
	t.Helper()
	h := &host{t: t, root: root, blobs: filepath.Join(root, "store", "blobs"), state: filepath.Join(root, "node"), n: new(int)}
	for _, d := range []string{filepath.Join(h.blobs, "sha256"), h.state} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

// sub is the same host for a sub-test.
func (h *host) sub(t testing.TB) *host {
	c := *h
	c.t = t
	return &c
}

// model puts files into the store and describes them.
func (h *host) model(files map[string][]byte) view.Model {
	h.t.Helper()
	m := view.Model{Repo: "org/name"}
	for name, data := range files {
		d := digest.FromBytes(data)
		if err := os.WriteFile(h.blob(d), data, 0o444); err != nil && !errors.Is(err, fs.ErrPermission) {
			h.t.Fatal(err)
		}
		m.Pack.Files = append(m.Pack.Files, modelpack.File{Path: name, Digest: d, Size: int64(len(data))})
	}
	manifest, _, err := modelpack.Build(m.Pack)
	if err != nil {
		h.t.Fatal(err)
	}
	m.Digest = digest.FromBytes(manifest)
	return m
}

func (h *host) blob(d digest.Digest) string { return filepath.Join(h.blobs, "sha256", d.Encoded()) }

// view builds a view, and returns its folder.
func (h *host) view(spec view.Spec, method view.Method) string {
	h.t.Helper()
	if spec.Layout == "" {
		spec.Layout = view.Files
	}
	tree, err := view.Plan(spec)
	if err != nil {
		h.t.Fatal(err)
	}
	dir := filepath.Join(h.state, tree.Key(method))
	if err := view.Build(h.t.Context(), dir, tree, method, h.blobs); err != nil {
		h.t.Fatal(err)
	}
	return dir
}

// mount makes an upper and a target and mounts the view, until the test ends.
func (h *host) mount(viewDir string, method view.Method, limit Limit) (Mount, Upper) {
	h.t.Helper()
	*h.n++
	u, err := NewUpper(h.t.Context(), filepath.Join(h.state, "upper-"+strconv.Itoa(*h.n)), viewDir, h.state, limit)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		if err := RemoveUpper(u.Dir); err != nil {
			h.t.Error(err)
		}
	})
	m := Mount{Target: h.target(), View: viewDir, Blobs: h.blobs, Upper: u.Upper, Work: u.Work, Method: method}
	h.do(m)
	return m, u
}

func (h *host) mountReadOnly(viewDir string, method view.Method) Mount {
	h.t.Helper()
	m := Mount{Target: h.target(), View: viewDir, Blobs: h.blobs, ReadOnly: true, Method: method}
	h.do(m)
	return m
}

func (h *host) target() string {
	h.t.Helper()
	*h.n++
	target := filepath.Join(h.state, "target-"+strconv.Itoa(*h.n))
	if err := os.Mkdir(target, 0o755); err != nil {
		h.t.Fatal(err)
	}
	return target
}

func (h *host) do(m Mount) {
	h.t.Helper()
	if err := m.Do(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		if err := Unmount(m.Target); err != nil && !errors.Is(err, ErrNotMounted) {
			h.t.Error(err)
		}
	})
}

func random(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wantBytes compares without printing megabytes.
func wantBytes(t testing.TB, path string, want []byte) {
	t.Helper()
	if got := read(t, path); !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes that differ from the %d expected", path, len(got), len(want))
	}
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// attributes are mode and owner, as "0644 1:2".
func attributes(t testing.TB, path string) string {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := fi.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%#o %d:%d", fi.Mode().Perm(), st.Uid, st.Gid)
}

// used is how many bytes the file system of dir has given out, after all that
// was written has been given its blocks.
func used(t testing.TB, dir string) int64 {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		t.Fatal(err)
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

// as runs a shell command as another user.
func as(uid uint32, script string, args ...string) ([]byte, error) {
	cmd := exec.Command("sh", append([]string{"-c", script, "sh"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	cmd.Dir = "/"
	return cmd.CombinedOutput()
}

// onFileSystems runs a test with store and state on one file system of each
// kind.
func onFileSystems(t *testing.T, test func(t *testing.T, h *host)) {
	t.Helper()
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			fs := testenv.LoopFS(t, kind, 400<<20)
			if err := os.Chmod(fs.Dir, 0o755); err != nil {
				t.Fatal(err)
			}
			test(t, newHost(t, fs.Dir))
		})
	}
}

func p[T any](v T) *T { return &v }
