package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/testenv"
)

func TestRandomBytesRepeatBySeed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var files [3][]byte
	for i, seed := range []uint64{1, 1, 2} {
		path := filepath.Join(dir, "f")
		if err := writeRandom(path, 3*mib+5, seed); err != nil {
			t.Fatal(err)
		}
		var err error
		if files[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	if int64(len(files[0])) != 3*mib+5 {
		t.Errorf("wrote %d bytes", len(files[0]))
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("one seed gave two contents")
	}
	if bytes.Equal(files[0], files[2]) || bytes.Equal(files[0][:mib], files[0][mib:2*mib]) {
		t.Error("the content repeats")
	}
}

// The figures of space and cache are only as good as these.
func TestSpaceAndCacheAreMeasured(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "mkfs.xfs", "losetup")
	h, err := newHost(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.close(); err != nil {
			t.Error(err)
		}
	})
	fs, err := h.fileSystem(t.Context(), "xfs", 512*mib)
	if err != nil {
		t.Fatal(err)
	}
	before, err := used(fs)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(fs, "f")
	if err := writeRandom(path, 32*mib, 1); err != nil {
		t.Fatal(err)
	}
	after, err := used(fs)
	if err != nil {
		t.Fatal(err)
	}
	if d := after - before; d < 32*mib || d > 33*mib {
		t.Errorf("a file of 32 MiB took %s", size(d))
	}
	// Advice rather than drop_caches: other tests run on this machine.
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if n, err := resident(path); err != nil || n != 0 {
		t.Errorf("after it was dropped, %s of it is cached (%v)", size(n), err)
	}
	if _, err := readAll(path); err != nil {
		t.Fatal(err)
	}
	if n, err := resident(path); err != nil || n != 32*mib {
		t.Errorf("after it was read, %s of it is cached (%v)", size(n), err)
	}
}

func TestOverlayOptionsAreReadBack(t *testing.T) {
	testenv.NeedRoot(t)
	dir := t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "at"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	at := filepath.Join(dir, "at")
	data := "lowerdir=" + dir + "/lower,upperdir=" + dir + "/upper,workdir=" + dir + "/work,metacopy=on,redirect_dir=on"
	if err := unix.Mount("overlay", at, "overlay", 0, data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmountAll(at); err != nil {
			t.Error(err)
		}
	})
	got, err := overlayOptions(at)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"lowerdir=" + dir + "/lower": true, "metacopy=on": true, "redirect_dir=on": true}
	for _, o := range got {
		delete(want, o)
	}
	if len(want) > 0 {
		t.Errorf("overlayOptions = %q, without %v", got, want)
	}
	if _, err := overlayOptions(dir); err == nil {
		t.Error("a folder where nothing is mounted has options")
	}
}
