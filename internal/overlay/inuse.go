package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// UpperInUse asks the kernel whether an overlay on the upper in dir lives
// anywhere: also in a mount namespace that this process cannot see, and one
// that was unmounted lazily and that an open file keeps alive.
//
// An overlay marks its upper and work folders as its own, and another one that
// is to have an index is refused them (ovl_report_in_use in
// fs/overlayfs/super.c). So one is made on the work folder and an empty upper,
// without being mounted anywhere, and let go of at once. Where this cannot be
// done (before Linux 5.2, under a filter of system calls, on a full file
// system) the answer is no, and mount tables are all there is.
func UpperInUse(dir string) (bool, error) {
	inside, scratch := dir, filepath.Join(filepath.Dir(dir), fmt.Sprintf("%s%d-%s", atomicfile.TempPrefix, os.Getpid(), filepath.Base(dir)))
	if mounted, err := IsMounted(filepath.Join(dir, fsName)); err != nil {
		return false, fmt.Errorf("look at upper: %w", err)
	} else if mounted { // upper and work must be on one mount
		inside = filepath.Join(dir, fsName)
		scratch = filepath.Join(inside, probeName)
	}
	work := filepath.Join(inside, workName)
	if _, err := os.Lstat(work); errors.Is(err, fs.ErrNotExist) {
		return false, nil // it was never mounted
	}
	used, err := isOthers(work, scratch)
	for _, cannot := range []error{unix.ENOSPC, unix.EDQUOT, unix.EPERM, disk.ErrNotSupported} {
		if errors.Is(err, cannot) {
			err = nil
		}
	}
	if err := errors.Join(err, disk.RemoveAll(scratch)); err != nil {
		return false, fmt.Errorf("find out whether upper %s is in use: %w", dir, err)
	}
	return used, nil
}

func isOthers(work, scratch string) (bool, error) {
	if err := disk.RemoveAll(scratch); err != nil { // of one that was killed
		return false, err
	}
	folders := map[string]string{"workdir": work, "upperdir": filepath.Join(scratch, "upper"), "lowerdir": filepath.Join(scratch, "lower")}
	for _, d := range []string{scratch, folders["upperdir"], folders["lowerdir"]} {
		if err := disk.Mkdir(d, 0o700); err != nil {
			return false, err
		}
	}
	options := [][2]string{{"index", "on"}, {"redirect_dir", "off"}, {"metacopy", "off"}}
	for key, path := range folders {
		// An option is at most 255 bytes long, and a comma ends it.
		f, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return false, err
		}
		defer f.Close()
		options = append(options, [2]string{key, fmt.Sprintf("/proc/self/fd/%d", f.Fd())})
	}
	err := disk.MakeFileSystem("overlay", options)
	switch {
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, unix.EPERM):
		return false, err
	}
	// Whatever else the kernel has against it comes after that check. The
	// index is of no use to the mounts that follow.
	return false, disk.RemoveAll(filepath.Join(work, "index"))
}
