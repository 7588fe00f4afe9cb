// Package atomicfile replaces small files as a whole.
//
// A reader sees the old content or the new, never a part. After Write has
// returned the new content also survives a power cut; a crash before that
// leaves the old content, and perhaps a temporary file whose name begins with
// TempPrefix, which readers of a folder must pass over and SweepTemp removes.
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
)

// TempPrefix begins the name of a file that is being written.
const TempPrefix = ".tmp-"

// Write replaces path by data, durably: the file is fsynced, renamed into
// place, and its folder is fsynced.
func Write(path string, data []byte, perm fs.FileMode) error {
	return write(path, data, perm, true)
}

// WriteVolatile replaces path by data atomically with regard to other
// processes and to the death of this one, but not durably: after a power cut
// the file may be old, missing or empty. It is for state that a reboot makes
// void, kept in a folder named by the boot id.
func WriteVolatile(path string, data []byte, perm fs.FileMode) error {
	return write(path, data, perm, false)
}

func write(path string, data []byte, perm fs.FileMode, durable bool) (err error) {
	dir := filepath.Dir(path)
	f, err := disk.CreateTemp(dir, fmt.Sprintf("%s%d-*", TempPrefix, os.Getpid()))
	if err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			err = errors.Join(fmt.Errorf("replace %s: %w", path, err), ignoreAbsent(disk.Remove(f.Name())))
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Chmod(perm); err != nil {
		return err
	}
	if durable {
		if err = f.Sync(); err != nil {
			return err
		}
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = disk.Rename(f.Name(), path); err != nil {
		return err
	}
	if durable {
		return disk.SyncDir(dir)
	}
	return nil
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// IsTemp tells whether a file name is that of a write under way or cut short.
func IsTemp(name string) bool { return strings.HasPrefix(name, TempPrefix) }

// SweepDead removes what writers on this host left in dir, files or whole
// folders, whose process is no more: TempPrefix, its number, a dash, anything.
// It needs no lock, and leaves what it cannot tell.
func SweepDead(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), TempPrefix)
		if !ok {
			continue
		}
		number, _, _ := strings.Cut(rest, "-")
		pid, err := strconv.Atoi(number)
		if err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		if err := disk.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// SweepTemp removes what writers that died have left in dir. The caller must
// hold the lock under which files of dir are written.
func SweepTemp(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !IsTemp(e.Name()) || e.IsDir() {
			continue // a folder is somebody else's
		}
		if err := ignoreAbsent(disk.Remove(filepath.Join(dir, e.Name()))); err != nil {
			return err
		}
	}
	return nil
}
