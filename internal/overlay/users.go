package overlay

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
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
	// Namespace is the inode number of the namespace, 0 where the kernel does
	// not tell it for want of the right to trace its processes.
	Namespace   uint64
	PIDs        []int // processes in it, at least one
	Mountpoints []string
}

// Users tells in which mount namespaces the file systems of devs are mounted.
// All of /proc is read once, and the mount table once for each namespace. With
// skipOwn the caller's own namespace is passed over.
//
// It sees the processes of the caller's PID namespace and those below it, so
// it must run in that of the engine or above. A /proc that cannot be read is
// an error, and so is a process whose mounts cannot be read: never "no users".
// Processes that end meanwhile are none. A namespace that is made while Users
// runs may be missed; a caller that acts on "no users" must keep new ones from
// being made, as by unmounting its own mount first.
func Users(ctx context.Context, skipOwn bool, devs ...Device) (map[Device][]User, error) {
	return users(ctx, "/proc", skipOwn, devs)
}

func users(ctx context.Context, proc string, skipOwn bool, devs []Device) (map[Device][]User, error) {
	out, err := func() (map[Device][]User, error) {
		s := scan{proc: proc, want: make(map[Device]bool, len(devs)), spaces: make(map[string]*namespace)}
		for _, d := range devs {
			s.want[d] = true
		}
		own, err := os.Readlink(filepath.Join(proc, "thread-self/ns/mnt"))
		if err != nil {
			return nil, err
		}
		pids, err := processes(proc)
		if err != nil {
			return nil, err
		}
		for _, pid := range pids {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			if err := s.process(pid); err != nil {
				return nil, fmt.Errorf("process %d: %w", pid, err)
			}
		}
		return s.result(own, skipOwn)
	}()
	if err != nil {
		return nil, fmt.Errorf("find users of mounts: %w", err)
	}
	return out, nil
}

type scan struct {
	proc      string
	want      map[Device]bool
	spaces    map[string]*namespace // by the text of the link in /proc
	strangers []*namespace          // of processes whose link cannot be read
}

// namespace is what was seen of one. A mount's number is its own in all the
// kernel: the same mount seen from another namespace would have another.
type namespace struct {
	pids   []int
	mounts map[int]mountPoint
	// whole: the mounts were read through a process that sees all of them. A
	// process that has changed its root sees only those below it.
	whole bool
}

type mountPoint struct {
	dev  Device
	path string
}

// process notes the namespaces of a process. Its threads are asked one by one:
// a thread may have a mount namespace of its own, and engines written in Go
// make use of that.
func (s *scan) process(pid int) error {
	tasks := filepath.Join(s.proc, strconv.Itoa(pid), "task")
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
		if err := s.task(filepath.Join(tasks, tid), pid); err != nil {
			return err
		}
	}
	return nil
}

func (s *scan) task(task string, pid int) error {
	link, err := os.Readlink(filepath.Join(task, "ns/mnt"))
	if errors.Is(err, fs.ErrPermission) {
		// The mounts themselves can be read without the right to trace.
		mounts, err := s.read(task)
		if err != nil {
			return ignoreGone(err)
		}
		s.strangers = append(s.strangers, &namespace{pids: []int{pid}, mounts: mounts})
		return nil
	}
	if err != nil {
		return ignoreGone(err)
	}
	ns := s.spaces[link]
	if ns == nil {
		ns = &namespace{mounts: make(map[int]mountPoint)}
		s.spaces[link] = ns
	}
	if !slices.Contains(ns.pids, pid) {
		ns.pids = append(ns.pids, pid)
	}
	if ns.whole {
		return nil
	}
	root, _ := os.Readlink(filepath.Join(task, "root"))
	mounts, err := s.read(task)
	if err != nil {
		// The next process of this namespace is asked. If there is none, the
		// namespace has ended.
		return ignoreGone(err)
	}
	// A thread that ended after the first look, and whose number was given out
	// again, would have shown the mounts of another namespace.
	if now, err := os.Readlink(filepath.Join(task, "ns/mnt")); err != nil || now != link {
		return nil
	}
	maps.Copy(ns.mounts, mounts)
	ns.whole = root == "/"
	return nil
}

// read gives the mounts of the wanted devices that a task sees.
func (s *scan) read(task string) (map[int]mountPoint, error) {
	f, err := os.Open(filepath.Join(task, "mountinfo"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	infos, err := mountinfo.GetMountsFromReader(bufio.NewReaderSize(f, 64<<10), func(i *mountinfo.Info) (skip, stop bool) {
		return !s.want[Device{uint32(i.Major), uint32(i.Minor)}], false
	})
	if err != nil {
		return nil, err
	}
	out := make(map[int]mountPoint, len(infos))
	for _, i := range infos {
		out[i.ID] = mountPoint{Device{uint32(i.Major), uint32(i.Minor)}, i.Mountpoint}
	}
	return out, nil
}

func (s *scan) result(own string, skipOwn bool) (map[Device][]User, error) {
	out := make(map[Device][]User)
	seen := make(map[int]*namespace)
	report := func(id uint64, ns *namespace) {
		points := make(map[Device][]string)
		for _, n := range slices.Sorted(maps.Keys(ns.mounts)) {
			m := ns.mounts[n]
			points[m.dev] = append(points[m.dev], m.path)
		}
		for dev, list := range points {
			out[dev] = append(out[dev], User{Namespace: id, PIDs: ns.pids, Mountpoints: list})
		}
	}
	for link, ns := range s.spaces {
		id, err := namespaceID(link)
		if err != nil {
			return nil, err
		}
		for n := range ns.mounts {
			seen[n] = ns
		}
		if !skipOwn || link != own {
			report(id, ns)
		}
	}
	var rest []*namespace
	for _, ns := range s.strangers {
		maps.DeleteFunc(ns.mounts, func(n int, _ mountPoint) bool {
			other := seen[n]
			if other != nil && !slices.Contains(other.pids, ns.pids[0]) {
				other.pids = append(other.pids, ns.pids[0])
			}
			return other != nil
		})
		for n := range ns.mounts {
			seen[n] = ns
		}
		if len(ns.mounts) > 0 {
			rest = append(rest, ns)
		}
	}
	for _, ns := range rest {
		report(0, ns)
	}
	for _, list := range out {
		slices.SortFunc(list, func(a, b User) int {
			return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.PIDs[0], b.PIDs[0]))
		})
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
