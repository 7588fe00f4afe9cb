// Package mounttable reads what is mounted in every mount namespace of this
// host, from /proc.
//
// It is the kernel's own account of who sees a file system: it catches bind
// copies in containers of which every engine and every record has forgotten.
// It sees the processes of the caller's PID namespace and those below it, so
// it must run in that of the engines or above.
package mounttable

import (
	"bytes"
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

// Proc is where the kernel shows processes.
const Proc = "/proc"

// Namespace is a mount namespace that shows wanted mounts.
type Namespace struct {
	// ID is the inode number of the namespace, 0 where the kernel does not
	// tell it for want of the right to trace its processes.
	ID  uint64
	Own bool // it is the caller's
	// Foreign: it belongs to another user namespace than the caller's, and
	// whoever owns that mounts in it what he likes, with any folders named in
	// the options; copies of the host's mounts keep their device number there.
	// False where it cannot be told.
	Foreign bool
	PIDs    []int // processes in it, at least one
	Mounts  []*mountinfo.Info

	parents map[int]*mountinfo.Info // by the number of a mount in Mounts
}

// Place names what a mount covers: the device of a file system and the path of
// the folder in it. A copy of a mount in another namespace has the same place
// whatever its mountpoint is called there; a mount on another folder has not.
// It is empty where the kernel does not show what lies below the mount, as to
// a process that has changed its root.
func (n Namespace) Place(m *mountinfo.Info) string {
	parent := n.parents[m.ID]
	if parent == nil {
		return ""
	}
	return place(parent, m.Mountpoint)
}

// place is that of a path on a mount.
func place(on *mountinfo.Info, path string) string {
	rest, ok := strings.CutPrefix(path, strings.TrimSuffix(on.Mountpoint, "/"))
	if !ok || rest != "" && rest[0] != '/' {
		return ""
	}
	return fmt.Sprintf("%d:%d:%s", on.Major, on.Minor, filepath.Join(on.Root, rest))
}

// PlaceOf is the place of a folder of the caller's own namespace, whether
// something is mounted on it or not. It reads the caller's mount table.
func PlaceOf(dir string) (string, error) {
	on, path, err := mountOf(dir)
	if err != nil {
		return "", err
	}
	return place(on, path), nil
}

// Of is the mount of the caller's own namespace that holds a folder.
func Of(dir string) (*mountinfo.Info, error) {
	on, _, err := mountOf(dir)
	return on, err
}

// mountOf finds the mount that holds a folder, and the folder's real path. The
// number of the mount comes from an open file: on paths, a mount can lie under
// another.
func mountOf(dir string) (_ *mountinfo.Info, _ string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("find the mount that holds %s: %w", dir, err)
		}
	}()
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	path, err := os.Readlink(fmt.Sprintf("%s/self/fd/%d", Proc, f.Fd()))
	if err != nil {
		return nil, "", err
	}
	info, err := os.ReadFile(fmt.Sprintf("%s/self/fdinfo/%d", Proc, f.Fd()))
	if err != nil {
		return nil, "", err
	}
	id := ""
	for line := range strings.Lines(string(info)) {
		if rest, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			id = strings.TrimSpace(rest)
		}
	}
	table, err := os.ReadFile(filepath.Join(Proc, "thread-self/mountinfo"))
	if err != nil {
		return nil, "", err
	}
	found, err := parse(table, func(line []byte) bool { return string(field(line)) == id })
	if err != nil {
		return nil, "", err
	}
	if len(found) != 1 {
		return nil, "", fmt.Errorf("mount %q is not in the table", id)
	}
	return found[0], path, nil
}

// Query says what to look for.
type Query struct {
	Proc string // empty: Proc
	// Contains is a text that the line of a wanted mount contains. Lines
	// without it, which are most, are not parsed.
	Contains string
	// Want picks mounts. It may be called from a table that turns out to be
	// that of a process which has ended.
	Want func(*mountinfo.Info) bool
}

// Read gives the namespaces that show wanted mounts. All of /proc is read once,
// and the mount table once for each namespace.
//
// A /proc that cannot be read is an error, and so is a process whose mounts
// cannot be read: never "no users". Processes that end meanwhile are none. A
// namespace that is made while Read runs may be missed; a caller that acts on
// "no users" must keep new ones from being made, as by unmounting its own mount
// first.
func Read(ctx context.Context, q Query) ([]Namespace, error) {
	if q.Proc == "" {
		q.Proc = Proc
	}
	out, err := read(ctx, q)
	if err != nil {
		return nil, fmt.Errorf("read mount tables: %w", err)
	}
	return out, nil
}

func read(ctx context.Context, q Query) ([]Namespace, error) {
	s := scan{q: q, spaces: make(map[string]*namespace), firsts: make(map[string]bool)}
	own, err := os.Readlink(filepath.Join(q.Proc, "thread-self/ns/mnt"))
	if err != nil {
		return nil, fmt.Errorf("%w; is /proc mounted?", err)
	}
	pids, err := Processes(q.Proc)
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
	return s.result(own)
}

type scan struct {
	q         Query
	spaces    map[string]*namespace // by the text of the link in /proc
	strangers []*namespace          // of processes whose link cannot be read
	firsts    map[string]bool       // first mounts of those
}

// namespace is what was seen of one. A mount's number is its own in all the
// kernel: the same mount seen from another namespace would have another.
type namespace struct {
	pids    []int
	mounts  map[int]*mountinfo.Info
	parents map[int]*mountinfo.Info // by the number of the mount that lies on it
	// whole: the mounts were read through a process that sees all of them. A
	// process that has changed its root sees only those below it.
	whole   bool
	foreign bool
}

// process notes the namespaces of a process. Its threads are asked one by one:
// a thread may have a mount namespace of its own, and engines written in Go
// make use of that.
func (s *scan) process(pid int) error {
	dir := filepath.Join(s.q.Proc, strconv.Itoa(pid))
	tasks := filepath.Join(dir, "task")
	var st unix.Stat_t
	if err := unix.Stat(tasks, &st); err != nil {
		return ignoreGone(err)
	}
	if st.Nlink == 2+1 { // it has one thread, as most have
		return s.task(dir, pid)
	}
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
		return s.stranger(task, pid)
	}
	if err != nil {
		return ignoreGone(err)
	}
	ns := s.spaces[link]
	if ns == nil {
		ns = &namespace{mounts: make(map[int]*mountinfo.Info), parents: make(map[int]*mountinfo.Info)}
		s.spaces[link] = ns
	}
	if n := len(ns.pids); n == 0 || ns.pids[n-1] != pid {
		ns.pids = append(ns.pids, pid)
	}
	if ns.whole {
		return nil
	}
	root, _ := os.Readlink(filepath.Join(task, "root"))
	seen, err := s.table(task)
	foreign := seen != nil && len(seen.mounts) > 0 && s.foreign(task)
	if err != nil || seen == nil {
		// The next process of this namespace is asked. If there is none, the
		// namespace has ended.
		return err
	}
	// A thread that ended after the first look, and whose number was given out
	// again, would have shown the mounts of another namespace.
	if now, err := os.Readlink(filepath.Join(task, "ns/mnt")); err != nil || now != link {
		return nil
	}
	maps.Copy(ns.mounts, seen.mounts)
	maps.Copy(ns.parents, seen.parents)
	ns.whole = root == "/"
	ns.foreign = ns.foreign || foreign
	return nil
}

// nsGetUserns is NS_GET_USERNS of linux/nsfs.h: it opens the user namespace
// that owns a namespace, unless that lies above the caller's.
const nsGetUserns = 0xb701

// foreign tells whether a task's mount namespace is known to belong to another
// user namespace than the caller's.
func (s *scan) foreign(task string) bool {
	var own, owner unix.Stat_t
	if unix.Stat(filepath.Join(s.q.Proc, "thread-self/ns/user"), &own) != nil {
		return false
	}
	ns, err := unix.Open(filepath.Join(task, "ns/mnt"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(ns)
	user, err := unix.IoctlRetInt(ns, nsGetUserns)
	if err != nil {
		return false
	}
	defer unix.Close(user)
	return unix.Fstat(user, &owner) == nil && (owner.Dev != own.Dev || owner.Ino != own.Ino)
}

// stranger notes a task whose namespace is hidden: without CAP_SYS_PTRACE, or
// where a security module says no. Its mounts can be read all the same.
func (s *scan) stranger(task string, pid int) error {
	first, err := firstMount(task)
	if err != nil || first == "" || s.firsts[first] {
		return err
	}
	seen, err := s.table(task)
	if err != nil || seen == nil {
		return err
	}
	seen.pids = []int{pid}
	s.strangers = append(s.strangers, seen)
	s.firsts[first] = true
	return nil
}

// firstMount is the number of the first mount in a task's table: the same for
// all that share the namespace and the root folder. It is empty for a task that
// has ended.
func firstMount(task string) (string, error) {
	f, err := os.Open(filepath.Join(task, "mountinfo"))
	if err != nil {
		return "", ignoreGone(err)
	}
	defer f.Close()
	head := make([]byte, 32)
	n, err := f.Read(head)
	if n == 0 {
		return "", nil // it has ended, or is a zombie
	}
	if err != nil {
		return "", ignoreGone(err)
	}
	id, _, _ := bytes.Cut(head[:n], []byte(" "))
	return string(id), nil
}

// table gives the wanted mounts that a task sees, and what they lie on. It is
// nil where the task has ended.
func (s *scan) table(task string) (*namespace, error) {
	text, err := os.ReadFile(filepath.Join(task, "mountinfo"))
	if err != nil {
		return nil, ignoreGone(err)
	}
	if len(text) == 0 {
		return nil, nil
	}
	out := &namespace{mounts: make(map[int]*mountinfo.Info), parents: make(map[int]*mountinfo.Info)}
	if !bytes.Contains(text, []byte(s.q.Contains)) {
		return out, nil
	}
	found, err := parse(text, func(line []byte) bool { return bytes.Contains(line, []byte(s.q.Contains)) })
	if err != nil {
		return nil, err
	}
	below := make(map[string]*mountinfo.Info)
	for _, m := range found {
		if s.q.Want(m) {
			out.mounts[m.ID] = m
			below[strconv.Itoa(m.Parent)] = nil
		}
	}
	if len(below) == 0 {
		return out, nil
	}
	found, err = parse(text, func(line []byte) bool { _, ok := below[string(field(line))]; return ok })
	if err != nil {
		return nil, err
	}
	for _, m := range found {
		below[strconv.Itoa(m.ID)] = m
	}
	for id, m := range out.mounts {
		if parent := below[strconv.Itoa(m.Parent)]; parent != nil {
			out.parents[id] = parent
		}
	}
	return out, nil
}

// parse reads the lines of a mount table that are wanted: to read all of some
// thousand is slow.
func parse(table []byte, want func(line []byte) bool) ([]*mountinfo.Info, error) {
	var lines []byte
	for line := range bytes.Lines(table) {
		if want(line) {
			lines = append(lines, line...)
		}
	}
	return mountinfo.GetMountsFromReader(bytes.NewReader(lines), nil)
}

// field is the first one of a line: the number of the mount.
func field(line []byte) []byte {
	id, _, _ := bytes.Cut(line, []byte(" "))
	return id
}

func (s *scan) result(own string) ([]Namespace, error) {
	var out []Namespace
	report := func(id uint64, own bool, ns *namespace) {
		if len(ns.mounts) == 0 {
			return
		}
		n := Namespace{ID: id, Own: own, Foreign: ns.foreign, PIDs: ns.pids, parents: ns.parents}
		for _, k := range slices.Sorted(maps.Keys(ns.mounts)) {
			n.Mounts = append(n.Mounts, ns.mounts[k])
		}
		out = append(out, n)
	}
	seen := make(map[int]*namespace)
	for link, ns := range s.spaces {
		id, err := namespaceID(link)
		if err != nil {
			return nil, err
		}
		for n := range ns.mounts {
			seen[n] = ns
		}
		report(id, link == own, ns)
	}
	for _, ns := range s.strangers {
		maps.DeleteFunc(ns.mounts, func(n int, _ *mountinfo.Info) bool { return seen[n] != nil })
		for n := range ns.mounts {
			seen[n] = ns
		}
		report(0, false, ns)
	}
	slices.SortFunc(out, func(a, b Namespace) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.PIDs[0], b.PIDs[0]))
	})
	return out, nil
}

// Gone tells that an error is what /proc answers about a process that has ended
// or is a zombie.
func Gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL)
}

func ignoreGone(err error) error {
	if Gone(err) {
		return nil
	}
	return err
}

// Processes lists the numbers of processes in proc, sorted. None at all means
// that proc is not what it should be, and is an error.
func Processes(proc string) ([]int, error) {
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
