// Package space adds up what models, sharing and the writes of containers take
// on the disk.
package space

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
)

// uppersName is the folder below STATE that holds what containers wrote.
const uppersName = "uppers"

// Uppers is how many bytes on the disk hold what containers wrote. Blocks that
// an upper shares with the store, because a write into a large file cloned it,
// are counted as if they were its own. What is mounted below (a tmpfs, the
// inside of a loop image) is not counted: the one is memory, the other is
// counted as its image.
func Uppers(ctx context.Context, state string) (int64, error) {
	root := filepath.Join(state, uppersName)
	top, err := os.Stat(root)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("measure uppers: %w", err)
	}
	here, _ := disk.Device(top)
	n, err := measure(ctx, root, here)
	if err != nil {
		return 0, fmt.Errorf("measure uppers: %w", err)
	}
	return n, nil
}

// longPath is where a folder is walked by a new path: far from the 4,096 bytes
// that a path may have, as the kernel takes longer for longer ones.
const longPath = 512

// measure adds up what lies below root on one device. A container can nest
// folders deeper than a path can say: such a one is opened, and walked by its
// descriptor.
func measure(ctx context.Context, root string, device uint64) (n int64, err error) {
	err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		var fi fs.FileInfo
		if err == nil {
			fi, err = e.Info()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed just now
		}
		if err != nil {
			return err
		}
		if dev, _ := disk.Device(fi); dev != device {
			if fi.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !fi.IsDir() || len(path) < longPath {
			n += disk.Allocated(fi)
			return nil
		}
		dir, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return fs.SkipDir
		}
		if err != nil {
			return err
		}
		defer dir.Close()
		below, err := measure(ctx, fmt.Sprintf("/proc/self/fd/%d/.", dir.Fd()), device)
		n += below
		if err != nil {
			return err
		}
		return fs.SkipDir
	})
	return n, err
}

// SameFileSystem tells whether two folders are on one file system, so that
// what is written over a model can share blocks with it. A folder that is not
// there stands for its parent.
func SameFileSystem(a, b string) bool {
	x, okA := device(a)
	y, okB := device(b)
	return okA && okB && x == y
}

func device(path string) (uint64, bool) {
	for {
		fi, err := os.Stat(path)
		if err == nil {
			return disk.Device(fi)
		}
		parent := filepath.Dir(path)
		if !errors.Is(err, fs.ErrNotExist) || parent == path {
			return 0, false
		}
		path = parent
	}
}
