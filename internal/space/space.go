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
	var n int64
	root := filepath.Join(state, uppersName)
	top, err := os.Stat(root)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("measure uppers: %w", err)
	}
	here, _ := disk.Device(top)
	err = filepath.WalkDir(root, func(_ string, e fs.DirEntry, err error) error {
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
		if dev, _ := disk.Device(fi); dev != here {
			if fi.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		n += disk.Allocated(fi)
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("measure uppers: %w", err)
	}
	return n, nil
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
