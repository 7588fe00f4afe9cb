package volume

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/mounttable"
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
	views := filepath.Join(state, "views") + "/"
	spaces, err := mounttable.Read(ctx, mounttable.Query{
		SkipOwn:  !withOwn,
		Contains: "/views/",
		Want: func(i *mountinfo.Info) bool {
			if i.FSType != "overlay" {
				return false
			}
			view, _ := overlayFolders(i.VFSOptions)
			return strings.HasPrefix(view, views)
		},
	})
	if err != nil {
		return use, err
	}
	for _, ns := range spaces {
		for _, m := range ns.Mounts {
			view, upper := overlayFolders(m.VFSOptions)
			use.views[view] = true
			if ns.Own {
				continue
			}
			h := Holder{PID: ns.PIDs[0], Mountpoint: m.Mountpoint}
			dev := fmt.Sprintf("%d:%d", m.Major, m.Minor)
			use.device[dev] = append(use.device[dev], h)
			use.view[view] = append(use.view[view], h)
			if upper != "" {
				use.upper[upper] = append(use.upper[upper], h)
			}
		}
	}
	return use, nil
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
