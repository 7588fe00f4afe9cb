package overlay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/mounttable"
)

// Holder is a process that keeps a mount busy.
type Holder struct {
	PID     int
	Command string   // short name, as the process or its program set it
	Paths   []string // what it holds below the mount, at most a few
}

func (h Holder) String() string { return fmt.Sprintf("pid %d (%s)", h.PID, h.Command) }

// OpenFiles tells which processes of the caller's mount namespace have their
// working folder, root, program, an open file or a mapping in the mount at
// target: those for which Unmount gives ErrBusy. It is for messages, and slow;
// processes that cannot be looked into are left out.
func OpenFiles(ctx context.Context, target string) ([]Holder, error) {
	var want unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &want); err != nil {
		return nil, &fs.PathError{Op: "statx", Path: target, Err: err}
	}
	if want.Mask&unix.STATX_MNT_ID == 0 {
		return nil, nil // before Linux 5.8
	}
	pids, err := mounttable.Processes(mounttable.Proc)
	if err != nil {
		return nil, fmt.Errorf("find open files: %w", err)
	}
	var out []Holder
	for _, pid := range pids {
		if err := ctx.Err(); err != nil {
			return out, err
		}
		dir := filepath.Join(mounttable.Proc, strconv.Itoa(pid))
		if paths := heldPaths(dir, want.Mnt_id); len(paths) > 0 {
			comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
			out = append(out, Holder{PID: pid, Command: strings.TrimSpace(string(comm)), Paths: paths})
		}
	}
	return out, nil
}

func heldPaths(dir string, mount uint64) []string {
	const enough = 4
	var out []string
	_ = eachHeld(dir, func(link string) (bool, error) {
		var st unix.Statx_t
		if unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st) == nil && st.Mnt_id == mount {
			path, _ := os.Readlink(link)
			if !slices.Contains(out, path) {
				out = append(out, path)
			}
		}
		return len(out) < enough, nil
	})
	return out
}

// MountsHeld gives the mounts in which a process has its working folder, root,
// program, an open file or a mapping, by their numbers in the mount table. A
// process that has ended holds none. Before Linux 5.8 it cannot be told, and
// the error is errors.ErrUnsupported.
func MountsHeld(pid int) (map[int]bool, error) {
	out := map[int]bool{}
	err := eachHeld(filepath.Join(mounttable.Proc, strconv.Itoa(pid)), func(link string) (bool, error) {
		var st unix.Statx_t
		err := unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st)
		switch {
		case mounttable.Gone(err):
			return true, nil // closed meanwhile
		case err != nil:
			return false, &fs.PathError{Op: "statx", Path: link, Err: err}
		case st.Mask&unix.STATX_MNT_ID == 0:
			return false, errors.ErrUnsupported
		}
		out[int(st.Mnt_id)] = true
		return true, nil
	})
	if mounttable.Gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find what process %d holds: %w", pid, err)
	}
	return out, nil
}

// eachHeld calls see with the links of a process's folder in /proc that lead to
// what it holds, until that says no.
func eachHeld(dir string, see func(link string) (more bool, err error)) error {
	for _, name := range []string{"cwd", "root", "exe"} {
		if more, err := see(filepath.Join(dir, name)); err != nil || !more {
			return err
		}
	}
	for _, sub := range []string{"fd", "map_files"} {
		d, err := os.Open(filepath.Join(dir, sub))
		if err != nil {
			return err
		}
		names, err := d.Readdirnames(-1)
		_ = d.Close()
		if err != nil {
			return err
		}
		for _, name := range names {
			if more, err := see(filepath.Join(dir, sub, name)); err != nil || !more {
				return err
			}
		}
	}
	return nil
}
