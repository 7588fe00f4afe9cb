package volume

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/mounttable"
	"github.com/larder-project/larder/internal/overlay"
)

// Holder is a mount namespace that shows one of our mounts: a container, as a
// rule.
type Holder struct {
	PID        int    // one process in it
	Mountpoint string // as seen there

	own bool // it is this process's own
	// doubtful: in a mount namespace that a user namespace of somebody's own
	// owns, and no mount of ours is known to have its number. It is made up,
	// or the one trace of a mount that lost its record.
	doubtful bool
	place    string // what the mount covers; see mounttable.Namespace.Place
}

// shown is a mount of ours in some namespace.
type shown struct {
	Holder
	view   string // as in kernelUse.views
	device string // MAJOR:MINOR
}

// kernelUse is what the mount tables of all namespaces say of our mounts. It
// knows folders by their path below the state, for the state may have had
// another path where the mount was made: in a managed plugin, or through a bind
// mount.
type kernelUse struct {
	uppers  map[string][]shown  // by upper folder: uppers/run/NAME/ID/upper
	devices map[string][]shown  // by MAJOR:MINOR
	views   map[string][]Holder // doubtful ones too
}

// scanKernel reads the mount table of every mount namespace once. A table that
// cannot be read is an error: what it shows would be taken for unused.
func (m *Manager) scanKernel(ctx context.Context) (kernelUse, error) {
	use := kernelUse{uppers: map[string][]shown{}, devices: map[string][]shown{}, views: map[string][]Holder{}}
	spaces, err := mounttable.Read(ctx, mounttable.Query{
		Contains: "/" + viewsDir + "/",
		Want: func(i *mountinfo.Info) bool {
			if i.FSType != "overlay" {
				return false
			}
			view, _ := overlayFolders(i.VFSOptions)
			_, _, ours := m.ourView(view)
			return ours
		},
	})
	if err != nil {
		return use, err
	}
	made := m.madeHere(spaces)
	for _, ns := range spaces {
		for _, mount := range ns.Mounts {
			dir, upper := overlayFolders(mount.VFSOptions)
			view, state, _ := m.ourView(dir)
			s := shown{
				Holder: Holder{PID: ns.PIDs[0], Mountpoint: mount.Mountpoint, own: ns.Own, place: ns.Place(mount)},
				view:   view, device: deviceOf(mount),
			}
			s.doubtful = ns.Foreign && !made(s.device)
			use.views[view] = append(use.views[view], s.Holder)
			if s.doubtful {
				continue
			}
			use.devices[s.device] = append(use.devices[s.device], s)
			if rel, ok := strings.CutPrefix(upper, filepath.Join(state, uppersDir)+"/"); ok {
				rel = filepath.Join(uppersDir, rel)
				use.uppers[rel] = append(use.uppers[rel], s)
			}
		}
	}
	return use, nil
}

// madeHere tells whether a mount with a device number is one that this host
// made. In a foreign mount namespace anybody can mount an overlay that names our
// folders, but he cannot choose its number. Records are read when one is asked
// for that no other mount table shows; where they are damaged, all are ours.
func (m *Manager) madeHere(spaces []mounttable.Namespace) func(device string) bool {
	made := map[string]bool{}
	for _, ns := range spaces {
		if ns.Foreign {
			continue
		}
		for _, mount := range ns.Mounts {
			made[deviceOf(mount)] = true
		}
	}
	readRecords := sync.OnceValue(func() error {
		records, err := m.allMounts()
		for _, mr := range records {
			made[mr.Device] = true
		}
		return err
	})
	return func(device string) bool {
		if made[device] {
			return true
		}
		return readRecords() != nil || made[device]
	}
}

func deviceOf(mount *mountinfo.Info) string {
	return fmt.Sprintf("%d:%d", mount.Major, mount.Minor)
}

// viewsName is the folder of this boot's views below STATE/views. The state's
// id in it is what mounts are known by, whatever the path.
func (m *Manager) viewsName() string { return m.boot + "." + m.id[:idShown] }

const idShown = 12 // digits of the state's id

// ourView tells whether the folder of a view in a mount's options is one of
// this state. It gives its path below the state, and the state's path where the
// mount was made.
//
// A Larder before this rule named the folder by the boot alone. Its mounts are
// known by the path, or by there being such a view here: a mount of another
// state may be taken for ours then, which only keeps something.
func (m *Manager) ourView(dir string) (view, state string, ours bool) {
	views, key := filepath.Split(dir)
	views = filepath.Clean(views)
	name := filepath.Base(views)
	state, ours = strings.CutSuffix(filepath.Dir(views), "/"+viewsDir)
	if !ours {
		return "", "", false
	}
	view = filepath.Join(viewsDir, name, key)
	if name == m.boot {
		return view, state, state == m.state || exists(filepath.Join(m.state, view))
	}
	return view, state, strings.HasSuffix(name, "."+m.id[:idShown])
}

// anyViewIn tells whether a view in the folder STATE/views/NAME is mounted.
func (u kernelUse) anyViewIn(name string) bool {
	for view := range u.views {
		if filepath.Base(filepath.Dir(view)) == name {
			return true
		}
	}
	return false
}

// ofUpper lists what shows a mount with this upper, our own namespace among
// it. The upper is either in the folder itself or below its own mount.
func (u kernelUse) ofUpper(m *Manager, dir string) []shown {
	rel, err := filepath.Rel(m.state, dir)
	if err != nil {
		return nil
	}
	if s := u.uppers[filepath.Join(rel, "upper")]; len(s) > 0 {
		return s
	}
	return u.uppers[filepath.Join(rel, "fs", "upper")]
}

// of lists what shows a mount.
func (u kernelUse) of(m *Manager, mr mountRecord) []shown {
	if mr.Upper != "" {
		return u.ofUpper(m, mr.Upper)
	}
	device := mr.Device
	if device == "" {
		d, err := overlay.DeviceOf(mr.Target)
		if err != nil {
			return nil
		}
		device = d.String()
	}
	// The kernel gives the number of a mount that has gone to another one.
	return slices.DeleteFunc(slices.Clone(u.devices[device]), func(s shown) bool {
		return mr.View != "" && filepath.Base(s.view) != mr.View
	})
}

// users lists who uses a mount: all that show it but the host's own mount and
// copies of that. A new mount namespace begins with such a copy, and a
// container has one that sees the host's tree; it keeps a mount alive, but
// nobody uses the volume by it.
func (u kernelUse) users(m *Manager, mr mountRecord) []Holder {
	var out []Holder
	for _, s := range u.of(m, mr) {
		if !s.isCopy(mr) {
			out = append(out, s.Holder)
		}
	}
	return out
}

func (h Holder) isCopy(mr mountRecord) bool {
	if mr.Place != "" {
		return h.place == mr.Place
	}
	// The record is of a Larder that did not note the place.
	return strings.HasSuffix(h.Mountpoint, mr.Target)
}

// placeOf is the place of a mount to be made at target.
func (m *Manager) placeOf(target string) string {
	dir := filepath.Dir(target)
	rest, below := strings.CutPrefix(dir, m.mnt)
	if below {
		dir = m.mnt
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	at := m.mntPlace
	if !below || at == "" {
		var err error
		if at, err = mounttable.PlaceOf(dir); err != nil {
			m.log.Warn("copies of a mount will count as its users", "target", target, "error", err)
			return ""
		}
	}
	if !below {
		return filepath.Join(at, filepath.Base(target))
	}
	m.mntPlace = at
	return filepath.Join(at, rest, filepath.Base(target))
}

// seesAll tells whether the mount tables that this process can read are those
// of all containers that can show our mounts. Outside the first PID namespace
// of the host it sees no process above it, and who made the mounts may be there.
// That does not matter where the engine itself has been seen, or where somebody
// says that no container is elsewhere.
func (m *Manager) seesAll() bool { return !m.blind || m.engineSeen.Load() }

// EngineSeen is told that the engine is a process which this one can see, so
// that its containers are too.
func (m *Manager) EngineSeen() { m.engineSeen.Store(true) }

// Blind says why this process cannot tell whether a container still uses a
// mount, or is empty.
func (m *Manager) Blind() string {
	if m.seesAll() {
		return ""
	}
	return "it runs in a PID namespace of its own and does not see the processes of the host, so it cannot tell which mounts containers use"
}

// BlindHint is what to do about Blind.
const BlindHint = "run it on the host or in the host's PID namespace (docker run --pid=host, hostPID: true); " +
	"where the engine and all its containers run inside this one, set usage.pid-namespace: own"

// firstPIDNamespace is the inode number of the host's own PID namespace
// (PROC_PID_INIT_INO in include/linux/proc_ns.h).
const firstPIDNamespace = "pid:[4026531836]"

func inOwnPIDNamespace() (bool, error) {
	ns, err := os.Readlink(filepath.Join(mounttable.Proc, "self/ns/pid"))
	if err != nil {
		return false, fmt.Errorf("find the PID namespace: %w; is /proc mounted?", err)
	}
	return ns != firstPIDNamespace, nil
}

// overlayFolders gives the topmost lower layer and the upper layer from the
// super options of an overlay mount, as a mount table shows them: the options
// as they were given, in which ':' ',' and '\' of a path are escaped by a
// backslash, and then all of what would disturb the table (commas, spaces and
// that backslash among it) as octal numbers.
func overlayFolders(options string) (view, upper string) {
	for opt := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(opt, "=")
		switch key {
		case "lowerdir":
			view = unescape(firstLayer(fromOctal(value)))
		case "lowerdir+":
			if view == "" {
				view = unescape(fromOctal(value))
			}
		case "upperdir":
			upper = unescape(fromOctal(value))
		}
	}
	return view, upper
}

// fromOctal undoes the mount table's own escapes: \040 is a space.
func fromOctal(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && isOctal(s[i+1:i+4]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isOctal(s string) bool {
	return s[0] >= '0' && s[0] <= '3' && s[1] >= '0' && s[1] <= '7' && s[2] >= '0' && s[2] <= '7'
}

// firstLayer is what stands before the first colon that separates layers.
func firstLayer(s string) string {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case ':':
			return s[:i]
		}
	}
	return s
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

// bootID is the kernel's name for the time since it started. In a build that
// can be made to fail, tests may say that the host was rebooted.
func bootID() (string, error) {
	if id := os.Getenv("LARDER_BOOT_ID"); disk.FaultsEnabled && id != "" {
		return id, nil
	}
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
