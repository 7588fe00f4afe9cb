package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Holder is a mount namespace, other than this process's own, that shows one
// of our mounts: a container, as a rule.
type Holder struct {
	PID        int    // one process in it
	Mountpoint string // as seen there
}

// kernelUse is what the mount tables of all namespaces say of our mounts.
type kernelUse struct {
	upper  map[string][]Holder // by upper folder, in other namespaces
	view   map[string][]Holder // by view folder, in other namespaces
	device map[string][]Holder // by MAJOR:MINOR, in other namespaces
	views  map[string]bool     // view folders mounted anywhere
}

// scanKernel reads the mount table of every mount namespace once, that of this
// process only where withOwn says so: it can be long. A table that cannot be
// read is an error: what it shows would be taken for unused.
func scanKernel(ctx context.Context, state string, withOwn bool) (kernelUse, error) {
	use := kernelUse{upper: map[string][]Holder{}, view: map[string][]Holder{}, device: map[string][]Holder{}, views: map[string]bool{}}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return use, fmt.Errorf("read mount tables: %w; is /proc mounted?", err)
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return use, fmt.Errorf("read mount tables: %w; is /proc mounted?", err)
	}
	// Without CAP_SYS_PTRACE, or where a security module says no, the name of
	// another's namespace is hidden, but not its table. Mount IDs are unique in
	// the kernel, so the first one tells which namespace it is.
	ownFirst, err := firstMountID(os.Getpid())
	if err != nil {
		return use, err
	}
	seen := map[string]bool{own: true, ownFirst: true}
	if withOwn {
		if _, err := use.read(state, os.Getpid(), true); err != nil {
			return use, err
		}
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return use, err
		}
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		if errors.Is(err, fs.ErrPermission) {
			ns, err = firstMountID(pid)
		}
		if gone(err) || err == nil && (ns == "" || seen[ns]) {
			continue
		}
		if err != nil {
			return use, fmt.Errorf("read mount tables: %w", err)
		}
		// A process that ends meanwhile does not speak for its namespace:
		// another one may still be in it.
		if seen[ns], err = use.read(state, pid, false); err != nil {
			return use, err
		}
	}
	return use, nil
}

// firstMountID is the ID of the first mount in a process's table: the same for
// all that share the namespace and the root folder. It is empty for a process
// that has ended.
func firstMountID(pid int) (string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if gone(err) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read mount tables: %w", err)
	}
	defer f.Close()
	head := make([]byte, 32)
	n, err := f.Read(head)
	if gone(err) || errors.Is(err, io.EOF) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read mount tables: %w", err)
	}
	id, _, _ := bytes.Cut(head[:n], []byte(" "))
	return string(id), nil
}

// gone tells that a process ended while it was looked at. Zombies have no
// namespace left: their links read as ENOENT, and mountinfo as EINVAL.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL)
}

// read adds what the mount table of a process shows. It reports whether there
// was one.
func (u kernelUse) read(state string, pid int, ours bool) (bool, error) {
	table, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if gone(err) || err == nil && len(table) == 0 {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read mount tables: %w", err)
	}
	// Most tables show none of our mounts; a quick look spares parsing them.
	if !bytes.Contains(table, []byte("/views/")) {
		return true, nil
	}
	mounts, err := mountinfo.GetMountsFromReader(bytes.NewReader(table), func(i *mountinfo.Info) (skip, stop bool) {
		return i.FSType != "overlay", false
	})
	if err != nil {
		return false, fmt.Errorf("read mount table of process %d: %w", pid, err)
	}
	views := filepath.Join(state, "views") + "/"
	for _, m := range mounts {
		view, upper := overlayFolders(m.VFSOptions)
		if !strings.HasPrefix(view, views) {
			continue
		}
		u.views[view] = true
		if ours {
			continue
		}
		h := Holder{PID: pid, Mountpoint: m.Mountpoint}
		dev := fmt.Sprintf("%d:%d", m.Major, m.Minor)
		u.device[dev] = append(u.device[dev], h)
		u.view[view] = append(u.view[view], h)
		if upper != "" {
			u.upper[upper] = append(u.upper[upper], h)
		}
	}
	return true, nil
}

// overlayFolders gives the topmost lower layer and the upper layer from the
// super options of an overlay mount. The kernel shows the options as they were
// given, with ':' ',' and '\' in a path escaped by a backslash.
func overlayFolders(options string) (view, upper string) {
	for _, opt := range splitEscaped(options, ',') {
		key, value, _ := strings.Cut(opt, "=")
		switch key {
		case "lowerdir":
			view = unescape(splitEscaped(value, ':')[0])
		case "lowerdir+":
			if view == "" {
				view = unescape(value)
			}
		case "upperdir":
			upper = unescape(value)
		}
	}
	return view, upper
}

func splitEscaped(s string, sep byte) []string {
	var out []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case sep:
			out = append(out, s[start:i])
			start = i + 1
		}
	}
	return append(out, s[start:])
}

func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// bootID is the kernel's name for the time since it started.
func bootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// bootSeconds is the time since boot, which no one can set.
func bootSeconds() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0
	}
	return t.Sec
}
