package overlay

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/view"
)

// limits are the ways to bound an upper, each on file systems where it is
// what Auto chooses, or is asked for.
var limits = []struct {
	fstype  string
	options []string
	ask     Backend
	want    Backend
	mkfs    []string // where mkfs.ext4 is
}{
	{"ext4", []string{"prjquota"}, Auto, Quota, nil},
	{"xfs", []string{"prjquota"}, Auto, Quota, nil},
	{"ext4", nil, Auto, Loop, mkfsNames},
	{"ext4", nil, Auto, Loop, nil},
	{"xfs", nil, Auto, Loop, mkfsNames},
	{"btrfs", nil, Auto, Loop, nil},
	{"xfs", []string{"prjquota"}, Loop, Loop, mkfsNames},
	{"ext4", nil, Tmpfs, Tmpfs, nil},
}

func onLimits(t *testing.T, test func(t *testing.T, h *host, viewDir string, limit Limit)) {
	t.Helper()
	const size = 24 << 20
	for _, c := range limits {
		name := fmt.Sprintf("%s %s %s", c.fstype, c.options, c.ask)
		if c.want == Loop && c.mkfs == nil {
			name += " without mkfs"
		}
		t.Run(name, func(t *testing.T) {
			testenv.NeedPrograms(t, "mkfs.ext4")
			defer func(names []string) { mkfsNames = names }(mkfsNames)
			mkfsNames = c.mkfs
			h := newHost(t, testenv.LoopFS(t, c.fstype, 400<<20, c.options...).Dir)
			m := h.model(map[string][]byte{"big": random(t, 40<<20), "small": []byte("small")})
			dir := h.view(view.Spec{Models: []view.Model{m}}, methods(t)[0])
			limit := Limit{Bytes: size, Backend: c.ask}
			u, err := NewUpper(t.Context(), filepath.Join(h.state, "probe"), dir, h.state, limit)
			if err != nil {
				t.Fatal(err)
			}
			if u.Backend != c.want {
				t.Errorf("the limit is kept by %q, want %q", u.Backend, c.want)
			}
			if err := RemoveUpper(u.Dir); err != nil {
				t.Fatal(err)
			}
			test(t, h, dir, limit)
		})
	}
}

func TestLimitIsKept(t *testing.T) {
	onLimits(t, func(t *testing.T, h *host, dir string, limit Limit) {
		for _, uid := range []uint32{0, 1000} {
			mt, _ := h.mount(dir, methods(t)[0], limit)
			var st unix.Statfs_t
			if err := unix.Statfs(mt.Target, &st); err != nil {
				t.Fatal(err)
			}
			if free := int64(st.Bavail) * st.Bsize; free > limit.Bytes || free < limit.Bytes*6/10 {
				t.Errorf("of a limit of %d bytes, df shows %d as free", limit.Bytes, free)
			}
			// Writing goes on until the limit, and fails there, whoever writes.
			out, err := as(uid, `dd if=/dev/zero of="$1/fill" bs=64k count=640 conv=fsync`, mt.Target)
			if err == nil {
				t.Errorf("user %d wrote 40 MiB into %d bytes", uid, limit.Bytes)
			}
			fi, err := os.Stat(filepath.Join(mt.Target, "fill"))
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if n := fi.Size(); n > limit.Bytes || n < limit.Bytes*6/10 {
				t.Errorf("user %d could write %d of %d bytes: %s", uid, n, limit.Bytes, out)
			}
			// The same for a file that has to be copied up whole.
			err = appendTo(filepath.Join(mt.Target, "big"))
			if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
				t.Errorf("copy-up beyond the limit: %v", err)
			}
			// Reading goes on, and what was written can be deleted.
			wantBytes(t, filepath.Join(mt.Target, "small"), []byte("small"))
			if err := os.Remove(filepath.Join(mt.Target, "fill")); err != nil {
				t.Error(err)
			}
			if err := appendTo(filepath.Join(mt.Target, "small")); err != nil {
				t.Errorf("write after space was made: %v", err)
			}
		}
	})
}

// The owner of a file may give it another project, without any privilege. A
// quota does not hold against that, and the manual says so; a loop image does.
func TestALoopImageHoldsAgainstAnOwnerWhoLeavesHisProject(t *testing.T) {
	testenv.NeedPrograms(t, "chattr")
	for _, fstype := range []string{"xfs", "ext4"} {
		t.Run(fstype, func(t *testing.T) {
			h := newHost(t, testenv.LoopFS(t, fstype, 400<<20, "prjquota").Dir)
			dir := h.view(view.Spec{Models: []view.Model{h.model(map[string][]byte{"f": []byte("f")})}}, methods(t)[0])
			for backend, holds := range map[Backend]bool{Quota: false, Loop: true} {
				limit := Limit{Bytes: 24 << 20, Backend: backend}
				mt, _ := h.mount(dir, methods(t)[0], limit)
				out, _ := as(1000, `mkdir "$1" && chattr -p 0 "$1"; dd if=/dev/zero of="$1/fill" bs=64k count=640 conv=fsync`, filepath.Join(mt.Target, "own"))
				fi, err := os.Stat(filepath.Join(mt.Target, "own", "fill"))
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				if n := fi.Size(); n > limit.Bytes == holds {
					t.Errorf("%s: %d bytes were written, the limit is %d; want it to hold: %t\n%s", backend, n, limit.Bytes, holds, out)
				}
			}
		})
	}
}

func appendTo(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.Write([]byte("x"))
	return errors.Join(err, f.Sync(), f.Close())
}

// What was written stays when an upper is mounted again, but in a tmpfs after
// a reboot.
func TestLimitedUpperIsTakenUpAgain(t *testing.T) {
	onLimits(t, func(t *testing.T, h *host, dir string, limit Limit) {
		mt, u := h.mount(dir, methods(t)[0], limit)
		if err := os.WriteFile(filepath.Join(mt.Target, "kept"), []byte("kept"), 0o644); err != nil {
			t.Fatal(err)
		}
		remount := func() {
			t.Helper()
			again, err := NewUpper(t.Context(), u.Dir, dir, h.state, limit)
			if err != nil {
				t.Fatal(err)
			}
			if again != u {
				t.Errorf("the upper was %+v and is %+v", u, again)
			}
			h.do(mt)
		}
		if err := Unmount(mt.Target); err != nil {
			t.Fatal(err)
		}
		remount()
		wantBytes(t, filepath.Join(mt.Target, "kept"), []byte("kept"))

		// A reboot takes all mounts.
		if err := Unmount(mt.Target); err != nil {
			t.Fatal(err)
		}
		for _, backend := range []Backend{Tmpfs, Loop} {
			if u.Backend == backend {
				if err := Unmount(filepath.Join(u.Dir, fsName)); err != nil {
					t.Fatal(err)
				}
			}
		}
		remount()
		if u.Backend == Tmpfs {
			if _, err := os.Stat(filepath.Join(mt.Target, "kept")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("in a new tmpfs: %v", err)
			}
			return
		}
		wantBytes(t, filepath.Join(mt.Target, "kept"), []byte("kept"))
	})
}

// What was written under a project quota is not hidden by a new loop image once
// the mount option has gone, and is there again when that is back.
func TestUpperUnderAQuotaIsRefusedWithoutIt(t *testing.T) {
	for _, fstype := range []string{"xfs", "ext4"} {
		t.Run(fstype, func(t *testing.T) {
			f := testenv.LoopFS(t, fstype, 400<<20, "prjquota")
			h := newHost(t, f.Dir)
			dir := h.view(view.Spec{Models: []view.Model{h.model(map[string][]byte{"f": []byte("f")})}}, methods(t)[0])
			limit := Limit{Bytes: 24 << 20}
			mt, u := h.mount(dir, methods(t)[0], limit)
			if err := os.WriteFile(filepath.Join(mt.Target, "kept"), []byte("kept"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := Unmount(mt.Target); err != nil {
				t.Fatal(err)
			}
			f.Unmount()
			if out, err := exec.Command("mount", "-t", fstype, "-o", "loop,noquota", f.Image, f.Dir).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for _, backend := range []Backend{Auto, Loop} {
				v, err := NewUpper(t.Context(), u.Dir, dir, h.state, Limit{Bytes: limit.Bytes, Backend: backend})
				if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), quotaAdvice) {
					t.Errorf("%s without quotas: %+v, %v; want ErrLimit and how to get them back", backend, v, err)
				}
			}
			f.Unmount()
			f.Mount()
			for _, backend := range []Backend{Auto, Loop} {
				again, err := NewUpper(t.Context(), u.Dir, dir, h.state, Limit{Bytes: limit.Bytes, Backend: backend})
				if err != nil || again != u {
					t.Fatalf("%s with quotas again: %+v, %v; want %+v", backend, again, err, u)
				}
			}
			h.do(mt)
			wantBytes(t, filepath.Join(mt.Target, "kept"), []byte("kept"))
		})
	}
}

func TestRemovedUpperGivesBackItsSpace(t *testing.T) {
	onLimits(t, func(t *testing.T, h *host, dir string, limit Limit) {
		before := used(t, h.root)
		mt, u := h.mount(dir, methods(t)[0], limit)
		id, _ := disk.Project(u.Dir)
		if err := os.WriteFile(filepath.Join(mt.Target, "f"), random(t, 8<<20), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := Unmount(mt.Target); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := RemoveUpper(u.Dir); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Lstat(u.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the folder: %v", err)
		}
		// XFS frees blocks, and the kernel a loop device, a little later.
		after := used(t, h.root)
		for range 100 {
			if after <= before+2<<20 {
				break
			}
			time.Sleep(50 * time.Millisecond)
			after = used(t, h.root)
		}
		if after > before+2<<20 {
			t.Errorf("used before: %d bytes, after: %d", before, after)
		}
		if u.Backend == Quota {
			if id == 0 {
				t.Fatal("the upper had no project id")
			}
			if used, err := disk.ProjectInUse(h.state, id); used || err != nil {
				t.Errorf("project %d is in use after its upper went (%v)", id, err)
			}
		}
	})
}

func TestProjectIdsAreUnique(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20, "prjquota").Dir)
	dir := h.view(view.Spec{Models: []view.Model{h.model(map[string][]byte{"f": []byte("f")})}}, methods(t)[0])
	const n = 20
	uppers := make([]Upper, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			var err error
			uppers[i], err = NewUpper(t.Context(), filepath.Join(h.state, fmt.Sprint("u", i)), dir, h.state, Limit{Bytes: 2 << 20})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	seen := map[uint32]string{}
	for _, u := range uppers {
		id, err := disk.Project(u.Upper)
		if err != nil || id < firstProject {
			t.Fatalf("project of %s: %d, %v", u.Upper, id, err)
		}
		if other := seen[id]; other != "" {
			t.Errorf("%s and %s have the project id %d", u.Dir, other, id)
		}
		seen[id] = u.Dir
	}
	// An id that somebody else uses is passed over, though it is the first
	// that this name would get.
	one := filepath.Join(h.state, "again")
	u, err := NewUpper(t.Context(), one, dir, h.state, Limit{Bytes: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	first, _ := disk.Project(u.Dir)
	if err := RemoveUpper(one); err != nil {
		t.Fatal(err)
	}
	if err := disk.SetProjectLimit(h.state, first, 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := NewUpper(t.Context(), one, dir, h.state, Limit{Bytes: 2 << 20}); err != nil {
		t.Fatal(err)
	}
	if second, _ := disk.Project(one); second == first {
		t.Errorf("project id %d has a limit of somebody else, and was given out", first)
	}
}

func TestLimitsThatCannotBeKept(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	dir := h.view(view.Spec{Models: []view.Model{h.model(map[string][]byte{"f": []byte("f")})}}, methods(t)[0])
	for _, limit := range []Limit{
		{Bytes: -1}, {Bytes: 1}, {Bytes: MinBytes - 1, Backend: Tmpfs}, {Bytes: MinLoopBytes - 1, Backend: Loop},
		{Bytes: MinBytes}, // on this file system it would be a loop image
		{Backend: Quota}, {Backend: Loop}, {Bytes: 1 << 30, Backend: Plain}, {Bytes: 1 << 30, Backend: "zfs"},
		{Bytes: 1 << 30, Backend: Quota}, // not on this file system
	} {
		_, err := NewUpper(t.Context(), filepath.Join(h.state, "u"), dir, h.state, limit)
		if !errors.Is(err, ErrLimit) {
			t.Errorf("%+v: error %v", limit, err)
		}
		if err := RemoveUpper(filepath.Join(h.state, "u")); err != nil {
			t.Error(err)
		}
	}
}

// A container makes what it likes in its upper. Removing it must reach no file
// outside, and must come to an end.
func TestRemovalOfAHostileUpper(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	h := newHost(t, testenv.LoopFS(t, "ext4", 200<<20).Dir)
	dir := h.view(view.Spec{Models: []view.Model{h.model(map[string][]byte{"f": []byte("f")})}}, methods(t)[0])
	outside := filepath.Join(h.root, "outside")
	if err := os.MkdirAll(filepath.Join(outside, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(outside, "file"), []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	mt, u := h.mount(dir, methods(t)[0], Limit{})
	script := `
set -e
cd "$1"
ln -s "$2" link
ln -s "$2/file" file
ln -s . self
ln -s ../../../../../../../outside up
mkfifo fifo
mkdir closed && touch closed/in && chmod 0 closed
mkdir .deep-1 .deep-2; touch .deep-3
`
	if out, err := as(0, script, mt.Target, outside); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	nest(t, mt.Target, 3000)
	if err := Unmount(mt.Target); err != nil {
		t.Fatal(err)
	}
	if err := RemoveUpper(u.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(u.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the upper: %v", err)
	}
	wantBytes(t, filepath.Join(outside, "file"), []byte("precious"))
	if got := names(t, outside); len(got) != 2 {
		t.Errorf("outside there is %v", got)
	}
}

// An owner of files may give them another project, and a folder that hands on
// its own takes in none of another.
func TestRemovalWhateverProjectsAContainerSet(t *testing.T) {
	for _, fstype := range []string{"xfs", "ext4"} {
		t.Run(fstype, func(t *testing.T) {
			h := newHost(t, testenv.LoopFS(t, fstype, 400<<20, "prjquota").Dir)
			dir := h.view(view.Spec{Models: []view.Model{h.model(map[string][]byte{"f": []byte("f")})}}, methods(t)[0])
			mt, u := h.mount(dir, methods(t)[0], Limit{Bytes: 24 << 20})
			nest(t, mt.Target, 200)
			if err := disk.SetProject(mt.Target, 0); err != nil {
				t.Fatal(err)
			}
			if err := Unmount(mt.Target); err != nil {
				t.Fatal(err)
			}
			if err := RemoveUpper(u.Dir); err != nil {
				t.Errorf("%.300v", err)
			}
			if _, err := os.Lstat(u.Dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the upper: %v", err)
			}
		})
	}
}

// A mount inside an upper that Larder did not make is not emptied.
func TestRemovalStopsAtAnotherMount(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	dir := h.view(view.Spec{Models: []view.Model{h.model(map[string][]byte{"f": []byte("f")})}}, methods(t)[0])
	u, err := NewUpper(t.Context(), filepath.Join(h.state, "u"), dir, h.state, Limit{})
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(u.Upper, "other")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("t", other, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(other, "file"), []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := RemoveUpper(u.Dir); err == nil {
		t.Error("no error")
	}
	wantBytes(t, filepath.Join(other, "file"), []byte("precious"))
	if err := unix.Unmount(other, 0); err != nil {
		t.Fatal(err)
	}
	if err := RemoveUpper(u.Dir); err != nil {
		t.Error(err)
	}
}

// A NewUpper that died between upper and work is taken up, with the owner that
// the view's root has.
func TestHalfMadeUpperIsFinished(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	m := h.model(map[string][]byte{"f": []byte("f")})
	dir := h.view(view.Spec{Models: []view.Model{m}, UID: p(uint32(12)), GID: p(uint32(34)), Mode: p(os.FileMode(0o600))}, methods(t)[0])
	half := filepath.Join(h.state, "half")
	if err := os.MkdirAll(filepath.Join(half, upperName), 0o755); err != nil {
		t.Fatal(err)
	}
	u, err := NewUpper(t.Context(), half, dir, h.state, Limit{})
	if err != nil {
		t.Fatal(err)
	}
	if got := attributes(t, u.Upper); got != "0700 12:34" {
		t.Errorf("the upper is %s", got)
	}
}

// nest makes folders one in another, deeper than a path can say.
func nest(t *testing.T, dir string, depth int) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range depth {
		if err := unix.Mkdirat(fd, "folder", 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, "folder", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(fd)
		fd = next
	}
	_ = unix.Close(fd)
}

// An overlay that no mount table of this namespace shows keeps its upper in
// use: one that an open file holds after it was unmounted lazily stands for all
// that cannot be seen.
func TestUpperInUseIsWhatTheKernelSays(t *testing.T) {
	onLimits(t, func(t *testing.T, h *host, dir string, limit Limit) {
		m, u := h.mount(dir, methods(t)[0], limit)
		want := func(want bool, when string) {
			t.Helper()
			if got, err := UpperInUse(u.Dir); got != want || err != nil {
				t.Errorf("%s: got %v, %v; want %v", when, got, err, want)
			}
		}
		want(true, "mounted")
		name := filepath.Join(m.Target, "kept")
		if err := os.WriteFile(name, []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Unmount(m.Target, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		want(true, "held by an open file")
		f.Close()
		want(false, "nowhere mounted")
		for _, left := range []string{filepath.Join(u.Work, "index"), filepath.Join(filepath.Dir(u.Work), probeName)} {
			if _, err := os.Lstat(left); err == nil {
				t.Errorf("it left %s", left)
			}
		}
		if got := names(t, filepath.Dir(u.Dir)); slices.ContainsFunc(got, atomicfile.IsTemp) {
			t.Errorf("it left something beside the upper: %v", got)
		}
		h.do(m)
		if got := string(read(t, name)); got != "x" {
			t.Errorf("mounted again it has %q", got)
		}
		if err := Unmount(m.Target); err != nil {
			t.Fatal(err)
		}
		if err := RemoveUpper(u.Dir); err != nil {
			t.Fatal(err)
		}
		want(false, "removed")
	})
}
