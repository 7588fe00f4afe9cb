package overlay

import (
	"context"
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
	try := func(link string) bool {
		var st unix.Statx_t
		if unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st) == nil && st.Mnt_id == mount {
			path, _ := os.Readlink(link)
			if !slices.Contains(out, path) {
				out = append(out, path)
			}
		}
		return len(out) < enough
	}
	for _, name := range []string{"cwd", "root", "exe"} {
		try(filepath.Join(dir, name))
	}
	for _, sub := range []string{"fd", "map_files"} {
		d, err := os.Open(filepath.Join(dir, sub))
		if err != nil {
			continue
		}
		names, _ := d.Readdirnames(-1)
		_ = d.Close()
		for _, name := range names {
			if !try(filepath.Join(dir, sub, name)) {
				return out
			}
		}
	}
	return out
}
