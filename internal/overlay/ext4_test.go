package overlay

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/testenv"
)

// An ext4 that was made without mkfs.ext4 is one for e2fsck, before and after
// the kernel has written into it, whatever its size.
func TestOwnExt4IsSound(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "e2fsck")
	sizes := []int64{
		MinLoopBytes, 1<<30 + 12345, MinLoopBytes + 1, MinLoopBytes + 1<<20 - 1, MinLoopBytes + 1<<20 + 511, 100_000_000,
		smallImage - 1024, smallImage, 1<<30 + 16<<20 - 1, 1<<30 + 16<<20, largeImage + 1<<20,
	}
	if os.Getenv(underKernel) != "" {
		sizes = sizes[:2] // it is slow
	}
	for _, size := range sizes {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			dir := t.TempDir()
			image := filepath.Join(dir, imageName)
			f, err := disk.Create(image, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(size); err != nil {
				t.Fatal(err)
			}
			if err := formatExt4(f, size); err != nil {
				t.Fatal(err)
			}
			check := func(when string) {
				t.Helper()
				if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
					t.Errorf("%s: %v\n%s", when, err, out)
				}
			}
			check("fresh")
			fi, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			if got, most := disk.Allocated(fi), size/64+256<<10; got > most {
				t.Errorf("it takes %d bytes, want at most %d: it is not sparse", got, most)
			}
			inside, err := mountImage(t.Context(), dir, size)
			if err != nil {
				t.Fatal(err)
			}
			free, capacity, err := disk.Free(inside)
			if err != nil || free < size*6/10 || capacity > size {
				t.Errorf("%d bytes of %d are free, %v", free, capacity, err)
			}
			for i := range 700 {
				name := filepath.Join(inside, fmt.Sprint("folder", i%7), fmt.Sprintf("a file with a long name %0100d", i))
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, make([]byte, i*10), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if err := Unmount(inside); err != nil {
				t.Fatal(err)
			}
			check("written to")
		})
	}
}
