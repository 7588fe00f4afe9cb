package overlay

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// User is a mount namespace in which a file system is mounted.
type User struct {
	Namespace   uint64 // inode number of the namespace
	PIDs        []int  // processes in it, at least one
	Mountpoints []string
}

// Users tells in which mount namespaces the file systems of devs are mounted.
// All of /proc is read once, and the mount table once for each namespace. With
// skipOwn the caller's own namespace is passed over.
//
// It sees the processes of the caller's PID namespace and those below it, so
// it must run in that of the engine or above. A /proc that cannot be read is
// an error, and so is a process whose namespace cannot be asked for: never
// "no users". Processes that end meanwhile are none. A namespace that is made
// while Users runs may be missed; a caller that acts on "no users" must keep
// new ones from being made, as by unmounting its own mount first.
func Users(ctx context.Context, skipOwn bool, devs ...Device) (map[Device][]User, error) {
	return users(ctx, "/proc", skipOwn, devs)
}

func users(ctx context.Context, proc string, skipOwn bool, devs []Device) (map[Device][]User, error) {
	want := make(map[Device]bool, len(devs))
	for _, d := range devs {
		want[d] = true
	}
	skip := ""
	if skipOwn {
		var err error
		if skip, err = os.Readlink(filepath.Join(proc, "thread-self/ns/mnt")); err != nil {
			return nil, fmt.Errorf("find users of mounts: %w", err)
		}
	}
	pids, err := processes(proc)
	if err != nil {
		return nil, fmt.Errorf("find users of mounts: %w", err)
	}
	spaces := make(map[string]*namespace)
	for _, pid := range pids {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("find users of mounts: %w", err)
		}
		if err := visit(proc, pid, skip, want, spaces); err != nil {
			return nil, fmt.Errorf("find users of mounts: process %d: %w", pid, err)
		}
	}
	out := make(map[Device][]User)
	for link, ns := range spaces {
		id, err := namespaceID(link)
		if err != nil {
			return nil, fmt.Errorf("find users of mounts: %w", err)
		}
		for dev, points := range ns.mounts {
			out[dev] = append(out[dev], User{Namespace: id, PIDs: ns.pids, Mountpoints: points})
		}
	}
	for _, list := range out {
		slices.SortFunc(list, func(a, b User) int { return cmp.Compare(a.Namespace, b.Namespace) })
	}
	return out, nil
}

type namespace struct {
	pids   []int
	read   bool
	mounts map[Device][]string
}

// visit notes the namespaces of a process. Its threads are asked one by one: a
// thread may have a mount namespace of its own, and engines written in Go make
// use of that.
func visit(proc string, pid int, skip string, want map[Device]bool, spaces map[string]*namespace) error {
	tasks := filepath.Join(proc, strconv.Itoa(pid), "task")
	d, err := os.Open(tasks)
	if err != nil {
		return ignoreGone(err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return ignoreGone(err)
	}
	for _, tid := range names {
		link, err := os.Readlink(filepath.Join(tasks, tid, "ns/mnt"))
		if err != nil {
			if err := ignoreGone(err); err != nil {
				return err
			}
			continue
		}
		if link == skip {
			continue
		}
		ns := spaces[link]
		if ns == nil {
			ns = &namespace{}
			spaces[link] = ns
		}
		if len(ns.pids) == 0 || ns.pids[len(ns.pids)-1] != pid {
			ns.pids = append(ns.pids, pid)
		}
		if ns.read {
			continue
		}
		mounts, err := readMounts(filepath.Join(tasks, tid, "mountinfo"), want)
		if err != nil {
			if err := ignoreGone(err); err != nil {
				return err
			}
			// The next process of this namespace is asked. If there is none,
			// the namespace has ended.
			continue
		}
		// A thread that ended after the first look, and whose number was
		// given out again, would have shown the mounts of another namespace.
		if now, err := os.Readlink(filepath.Join(tasks, tid, "ns/mnt")); err != nil || now != link {
			continue
		}
		ns.read, ns.mounts = true, mounts
	}
	return nil
}

// readMounts gives the mountpoints of the wanted devices in a mount table.
func readMounts(path string, want map[Device]bool) (map[Device][]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	infos, err := mountinfo.GetMountsFromReader(bufio.NewReaderSize(f, 64<<10), func(i *mountinfo.Info) (skip, stop bool) {
		return !want[Device{uint32(i.Major), uint32(i.Minor)}], false
	})
	if err != nil {
		return nil, err
	}
	out := make(map[Device][]string)
	for _, i := range infos {
		dev := Device{uint32(i.Major), uint32(i.Minor)}
		out[dev] = append(out[dev], i.Mountpoint)
	}
	return out, nil
}

// ignoreGone passes over what /proc answers about a process that has ended or
// is a zombie.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// processes lists the numbers in proc. None at all means that proc is not
// what it should be.
func processes(proc string) ([]int, error) {
	d, err := os.Open(proc)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	if len(pids) == 0 {
		return nil, fmt.Errorf("%s lists no process; is it mounted?", proc)
	}
	slices.Sort(pids)
	return pids, nil
}

func namespaceID(link string) (uint64, error) {
	s := strings.TrimSuffix(strings.TrimPrefix(link, "mnt:["), "]")
	id, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read mount namespace %q: %w", link, err)
	}
	return id, nil
}

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
	pids, err := processes("/proc")
	if err != nil {
		return nil, fmt.Errorf("find open files: %w", err)
	}
	var out []Holder
	for _, pid := range pids {
		if err := ctx.Err(); err != nil {
			return out, err
		}
		dir := filepath.Join("/proc", strconv.Itoa(pid))
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
