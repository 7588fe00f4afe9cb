package overlay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/view"
)

// Backend names what bounds the size of an upper.
type Backend string

// The backends.
const (
	// Auto is a project quota where the file system has it, else a loop image.
	Auto Backend = "auto"
	// Plain is a folder without a limit.
	Plain Backend = "plain"
	// Quota is a project quota of XFS or ext4. A writer sees the limit as the
	// size of the file system, and ENOSPC or EDQUOT at its end.
	Quota Backend = "quota"
	// Tmpfs keeps what is written in memory; it is gone after a reboot.
	Tmpfs Backend = "tmpfs"
	// Loop is an ext4 file system in a sparse file, of which a few percent go
	// to the file system itself.
	Loop Backend = "loop"
)

// Limit says how much an upper may hold. The zero Limit is none.
type Limit struct {
	// Bytes is the most that may be written; 0 is no limit, and then Backend
	// must be Auto, Plain or empty, or Tmpfs (bounded by half of the memory).
	Bytes   int64
	Backend Backend // empty: Auto
}

// Smallest limits. Below them the file system's own needs leave nothing.
const (
	MinBytes     = 1 << 20
	MinLoopBytes = 16 << 20
)

// ErrLimit is wrapped where a limit is too small, or cannot be had here.
var ErrLimit = errors.New("limit cannot be set")

// Upper is a folder that takes what is written, and the work folder that
// overlay wants beside it.
type Upper struct {
	Dir     string // as given to NewUpper
	Upper   string
	Work    string
	Backend Backend // in use: never Auto
}

// Names below the folder of an upper. A plain or quota upper has upper and
// work in the folder itself, the others below fs, which is a mount.
const (
	upperName = "upper"
	workName  = "work"
	fsName    = "fs"
	imageName = "image"
)

// NewUpper makes dir an upper for the view built at viewDir, or takes it up
// again if it is one: after a crash in the middle of NewUpper, and after a
// reboot (a loop image is mounted again; what was in a tmpfs is gone). The
// parent of dir must exist, and be on a file system that overlay can write to.
//
// stateDir holds the lock under which project ids are given out; all callers
// with uppers on one file system must name the same.
//
// A fresh upper gets mode and owner of the view's root, which overlay shows
// from the upper. Later changes that a container makes to them stay.
//
// Nothing is made durable but a loop image's own file system.
func NewUpper(ctx context.Context, dir, viewDir, stateDir string, limit Limit) (Upper, error) {
	if err := limit.check(); err != nil {
		return Upper{}, err
	}
	if err := disk.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return Upper{}, fmt.Errorf("make upper: %w", err)
	}
	backend, err := chooseBackend(dir, limit)
	if err != nil {
		return Upper{}, fmt.Errorf("make upper %s: %w", dir, err)
	}
	u := Upper{Dir: dir, Backend: backend}
	inside := dir
	switch backend {
	case Plain:
	case Quota:
		err = newProject(ctx, dir, stateDir, limit.Bytes)
	case Tmpfs:
		inside, err = mountTmpfs(dir, limit.Bytes)
	case Loop:
		inside, err = mountImage(ctx, dir, limit.Bytes)
	}
	if err != nil {
		return Upper{}, fmt.Errorf("make upper %s: %w", dir, err)
	}
	u.Upper, u.Work = filepath.Join(inside, upperName), filepath.Join(inside, workName)
	if err := makeFolders(u, viewDir); err != nil {
		return Upper{}, fmt.Errorf("make upper %s: %w", dir, err)
	}
	return u, nil
}

func (l Limit) check() error {
	switch l.Backend {
	case "", Auto, Plain, Quota, Tmpfs, Loop:
	default:
		return fmt.Errorf("%w: backend %.50q is not known", ErrLimit, l.Backend)
	}
	unlimited := l.Backend == "" || l.Backend == Auto || l.Backend == Plain || l.Backend == Tmpfs
	switch {
	case l.Bytes == 0 && unlimited:
		return nil
	case l.Bytes == 0:
		return fmt.Errorf("%w: %s needs a size", ErrLimit, l.Backend)
	case l.Backend == Plain:
		return fmt.Errorf("%w: a plain upper has no size", ErrLimit)
	case l.Bytes < MinBytes:
		return fmt.Errorf("%w: a size of %d bytes is too small, the least is 1 MiB", ErrLimit, l.Bytes)
	}
	return nil
}

// CheckLimit refuses a limit that no upper below dir could have on this host.
func CheckLimit(dir string, limit Limit) error {
	if err := limit.check(); err != nil {
		return err
	}
	backend, err := chooseBackend(dir, limit)
	if err == nil && backend == Loop {
		err = checkLoop(limit)
	}
	return err
}

func tooSmallForLoop(limit Limit) error {
	return fmt.Errorf("%w: a size of %d bytes is too small for a loop image, the least is 16 MiB; %s", ErrLimit, limit.Bytes, whyLoop(limit))
}

// whyLoop is why a limit is kept by a loop image.
func whyLoop(limit Limit) string {
	if limit.Backend == Loop {
		return "only loop images are asked for (setting volumes.limit)"
	}
	return "the file system below has no project quotas (`larder doctor` says how to get them)"
}

// chooseBackend stays with what dir was made as: a limit that was set is not
// lost because a mount option has gone.
func chooseBackend(dir string, limit Limit) (Backend, error) {
	switch {
	case limit.Backend == Tmpfs:
		return Tmpfs, nil
	case limit.Bytes == 0:
		return Plain, nil
	case limit.Backend == Quota:
		return Quota, nil
	}
	if _, err := os.Lstat(filepath.Join(dir, imageName)); err == nil {
		return Loop, nil
	}
	// Only an upper under a quota has a limit, and its work folder in dir.
	_, absent := os.Lstat(filepath.Join(dir, workName))
	underQuota := absent == nil
	var on bool
	var err error
	if limit.Backend != Loop || underQuota {
		on, err = quotaEnforced(dir)
	}
	switch {
	case err != nil:
		return "", err
	case on:
		return Quota, nil
	case underQuota:
		return "", fmt.Errorf("%w: what is kept here was written under a project quota, which nothing enforces now; %s; nothing of it is lost", ErrLimit, quotaAdvice)
	case limit.Bytes < MinLoopBytes:
		return "", tooSmallForLoop(limit)
	}
	return Loop, nil
}

// makeFolders makes upper, then work. That work is there tells that upper is
// finished and may hold a container's files, so that its owner and mode are
// left alone from then on.
func makeFolders(u Upper, viewDir string) error {
	if _, err := os.Lstat(u.Work); err == nil {
		return nil
	}
	mode, uid, gid, err := view.Root(viewDir)
	if err != nil {
		return err
	}
	err = disk.Mkdir(u.Upper, mode)
	again := errors.Is(err, fs.ErrExist)
	if err != nil && !again {
		return err
	}
	if uid != 0 || gid != 0 || again {
		if err := disk.Lchown(u.Upper, uid, gid); err != nil {
			return err
		}
	}
	if again {
		if err := disk.Chmod(u.Upper, mode); err != nil {
			return err
		}
	}
	return disk.Mkdir(u.Work, 0o700)
}

// RemoveUpper deletes an upper and what was written into it, and gives back
// its mount, loop device or project id. It can be repeated after a crash at
// any step, and on a folder that is gone.
//
// Nothing may use the upper any more, and the caller must know that:
// an overlay holds the file system of its upper, but not its mount, so the
// kernel does not say EBUSY for an overlay that is still mounted, only for a
// process that has files of the upper itself open (ErrBusy).
func RemoveUpper(dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	inside := filepath.Join(dir, fsName)
	for tries := 0; ; {
		mounted, err := IsMounted(inside)
		if err != nil {
			return fmt.Errorf("remove upper %s: %w", dir, err)
		}
		if !mounted {
			break
		}
		err = Unmount(inside)
		if tries++; errors.Is(err, ErrBusy) && tries < 20 {
			// A process that this one is starting has, until its program
			// runs, what was open here, such as UpperInUse's folders.
			time.Sleep(5 * time.Millisecond)
			continue
		}
		if err != nil {
			return fmt.Errorf("remove upper %s: %w", dir, err)
		}
	}
	if err := removeProject(dir); err != nil {
		return fmt.Errorf("remove upper %s: %w", dir, err)
	}
	if err := disk.RemoveTree(dir); err != nil {
		return fmt.Errorf("remove upper %s: %w", dir, err)
	}
	return nil
}

// mountTmpfs mounts a tmpfs at dir/fs, unless one is there.
func mountTmpfs(dir string, bytes int64) (string, error) {
	inside, mounted, err := inner(dir)
	if err != nil || mounted {
		return inside, err
	}
	opts := "mode=0700"
	if bytes > 0 {
		opts = fmt.Sprintf("size=%d,%s", bytes, opts)
	}
	if err := disk.Mount(source, inside, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
		return "", err
	}
	return inside, nil
}

// inner makes dir/fs and tells whether something is mounted there.
func inner(dir string) (inside string, mounted bool, err error) {
	inside = filepath.Join(dir, fsName)
	if err := disk.Mkdir(inside, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", false, err
	}
	mounted, err = IsMounted(inside)
	return inside, mounted, err
}

// allocated is how many bytes a file takes on its file system.
func allocated(fi fs.FileInfo) int64 {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fi.Size()
	}
	return st.Blocks * 512
}
