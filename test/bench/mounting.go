package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/test/engine"
)

const (
	manyName  = "bench-many" // a model of manyFiles files
	manyFiles = 100
)

// mounting is part 4: the plugin's Mount beside the least that any plugin must
// do, with ever more mounts live; and docker run to its end.
func (b *bench) mounting(ctx context.Context) error {
	s, err := b.setStage(ctx)
	if err != nil {
		return err
	}
	many := filepath.Join(b.host.dir, "many")
	if err := modelFolder(many, mib, manyFiles, 4); err != nil {
		return err
	}
	if _, err := timed(b.larder(ctx, s.root, "import", many, manyName)); err != nil {
		return err
	}
	if err := b.mountCalls(ctx, s); err != nil {
		return err
	}
	return b.dockerRun(ctx, s, many)
}

// mounted is one volume with one mount.
type mounted struct{ volume, id, at string }

func (s *stage) mountNew(name string) (mounted, time.Duration, error) {
	m := mounted{volume: name, id: randomID()}
	if err := s.calls.create(m.volume, map[string]string{"model": manyName}); err != nil {
		return m, 0, err
	}
	began := time.Now()
	var err error
	m.at, err = s.calls.mount(m.volume, m.id)
	return m, time.Since(began), err
}

func (s *stage) unmountAway(m mounted) error {
	if err := s.calls.unmount(m.volume, m.id); err != nil {
		return err
	}
	// Where the host's mounts are private, a process with a mount namespace of
	// its own that was made meanwhile keeps a copy of ours as long as it lives.
	// The plugin refuses to forget such a mount, and is right.
	var err error
	for range 100 {
		if err = s.calls.remove(m.volume); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func randomID() string {
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails
	return hex.EncodeToString(id[:])
}

func (b *bench) mountCalls(ctx context.Context, s *stage) (err error) {
	var live []mounted
	defer func() {
		for _, m := range live {
			if e := s.unmountAway(m); err == nil {
				err = e
			}
		}
	}()
	results := make([]calls, len(b.Live))
	for i, n := range b.Live {
		for len(live) < n {
			m, _, err := s.mountNew(fmt.Sprintf("live-%d", len(live)))
			if err != nil {
				return err
			}
			live = append(live, m)
		}
		floor, err := newFloor(s, live[0].at)
		if err != nil {
			return err
		}
		r := &results[i]
		r.live = n
		for round := range b.Mounts {
			if err := ctx.Err(); err != nil {
				return err
			}
			err := inTurns(round, func() error {
				m, took, err := s.mountNew(fmt.Sprintf("timed-%d-%d", n, round))
				if err != nil {
					return err
				}
				r.mount = append(r.mount, took)
				return s.unmountAway(m)
			}, func() error {
				took, err := floor.once(round)
				r.floor = append(r.floor, took)
				return err
			})
			if err != nil {
				return err
			}
		}
		b.add(r.overFloor(0.5, 2))
		b.add(r.overFloor(0.99, 4))
	}
	few, most := results[0], results[len(results)-1]
	b.add(grown(few, most, 0.5, 1.25))
	b.add(grown(few, most, 0.99, 1.5))
	return nil
}

// calls are the times of Mount with so many mounts live, and of the floor.
type calls struct {
	live         int
	mount, floor []time.Duration
}

// overFloor judges a percentile of Mount by that of the floor.
func (c calls) overFloor(p, bar float64) figure {
	mount, least := percentile(c.mount, p), percentile(c.floor, p)
	return figure{
		Part:   4,
		What:   fmt.Sprintf("Mount with %d live, p%.0f", c.live, 100*p),
		Larder: span(mount),
		Beside: span(least), Other: "the least a plugin must do",
	}.atMost(ratio(mount, least), bar, "×")
}

// grown judges how much slower Mount becomes with more mounts live by how much
// slower the floor becomes, which is the kernel's part of it.
func grown(few, most calls, p, bar float64) figure {
	growth := func(a, b []time.Duration) (float64, string) {
		before, after := percentile(a, p), percentile(b, p)
		return ratio(after, before), fmt.Sprintf("%s to %s, %s ×", span(before), span(after), number(ratio(after, before)))
	}
	mount, mountText := growth(few.mount, most.mount)
	floor, floorText := growth(few.floor, most.floor)
	return figure{
		Part:   4,
		What:   fmt.Sprintf("Mount, from %d live to %d, p%.0f", few.live, most.live, 100*p),
		Larder: mountText,
		Beside: floorText, Other: "the least a plugin must do",
	}.atMost(mount/floor, bar, "×")
}

// floor does what no volume plugin that keeps a state can do without: an empty
// call on the same socket, two mkdir, one mount(2) of the same overlay, and one
// file replaced with fsync.
type floor struct {
	calls   *driver
	dir     string
	flags   uintptr
	options []string // of the overlay, less upperdir and workdir
}

func newFloor(s *stage, like string) (*floor, error) {
	options, err := overlayOptions(like)
	if err != nil {
		return nil, err
	}
	f := &floor{calls: s.calls, dir: filepath.Join(s.fs, "floor"), flags: unix.MS_NOSUID | unix.MS_NODEV, options: options}
	return f, os.MkdirAll(filepath.Join(f.dir, "at"), 0o755)
}

// overlayOptions reads from the mount table what an overlay was mounted with.
func overlayOptions(target string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for _, l := range strings.Split(string(data), "\n") {
		before, after, ok := strings.Cut(l, " - ")
		fields, rest := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || unescape(fields[4]) != target {
			continue
		}
		if len(rest) < 3 || rest[0] != "overlay" {
			return nil, fmt.Errorf("read the options of %s: it is mounted as %s, not as an overlay", target, rest[0])
		}
		var options []string
		for _, o := range strings.Split(unescape(rest[2]), ",") {
			switch name, _, _ := strings.Cut(o, "="); name {
			case "rw", "ro", "upperdir", "workdir", "uuid", "xino":
			default:
				options = append(options, o)
			}
		}
		return options, nil
	}
	return nil, fmt.Errorf("%s is not in the mount table", target)
}

func (f *floor) once(round int) (time.Duration, error) {
	upper, work := filepath.Join(f.dir, fmt.Sprintf("upper-%d", round)), filepath.Join(f.dir, fmt.Sprintf("work-%d", round))
	at := filepath.Join(f.dir, "at")
	data := strings.Join(append([]string{"upperdir=" + upper, "workdir=" + work}, f.options...), ",")
	began := time.Now()
	if err := f.calls.call("VolumeDriver.Capabilities", nil, nil); err != nil {
		return 0, err
	}
	if err := os.Mkdir(upper, 0o755); err != nil {
		return 0, err
	}
	if err := os.Mkdir(work, 0o755); err != nil {
		return 0, err
	}
	if err := unix.Mount("overlay", at, "overlay", f.flags, data); err != nil {
		return 0, fmt.Errorf("mount the floor's overlay (%s): %w", data, err)
	}
	err := replaceDurably(filepath.Join(f.dir, "record.json"), make([]byte, 512))
	took := time.Since(began)
	if err != nil {
		return 0, err
	}
	if err := unix.Unmount(at, unix.UMOUNT_NOFOLLOW); err != nil {
		return 0, err
	}
	for _, dir := range []string{upper, work} {
		if err := os.RemoveAll(dir); err != nil {
			return 0, err
		}
	}
	return took, nil
}

// replaceDurably writes a file under another name, makes its bytes durable and
// puts it in place. The folder is not synced: that would be a second fsync.
func replaceDurably(path string, content []byte) error {
	f, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// dockerRun times containers that do nothing, with the model from Larder, from
// a bind mount, and from a volume of the local driver that holds a copy.
func (b *bench) dockerRun(ctx context.Context, s *stage, model string) error {
	local := "bench-local"
	if _, err := s.engine.Docker(ctx, "volume", "create", local); err != nil {
		return err
	}
	at, err := s.engine.Docker(ctx, "volume", "inspect", "--format", "{{.Mountpoint}}", local)
	if err != nil {
		return err
	}
	if _, err := command(ctx, "cp", "-r", model+"/.", strings.TrimSpace(at)); err != nil {
		return err
	}
	named := "bench-run"
	if err := s.calls.create(named, map[string]string{"model": manyName}); err != nil {
		return err
	}
	run := func(times *[]time.Duration, mount ...string) func() error {
		return func() error {
			args := append([]string{"run", "--rm", "--network", "none"}, mount...)
			began := time.Now()
			_, err := s.engine.Docker(ctx, append(args, engine.Image, "cat", "/models/config.json")...)
			*times = append(*times, time.Since(began))
			return err
		}
	}
	var larder, bind, copied []time.Duration
	for round := range b.Runs + 1 {
		err := inTurns(round,
			run(&larder, "--volume-driver", s.driver, "--volume", named+":/models"),
			run(&bind, "--volume", model+":/models"),
			run(&copied, "--volume", local+":/models"))
		if err != nil {
			return err
		}
		if round == 0 { // the first of each finds nothing in the caches
			larder, bind, copied = nil, nil, nil
		}
	}
	b.add(figure{
		Part:   4,
		What:   "docker run, to its end",
		Larder: span(median(larder)),
		Beside: span(median(bind)), Other: "with a bind mount",
	}.atMost(ratio(median(larder), median(bind)), 1.05, "×"))
	b.add(figure{
		Part:   4,
		What:   "docker run, to its end",
		Larder: span(median(larder)),
		Beside: span(median(copied)), Other: "with the local driver on a copy",
	}.atMost(ratio(median(larder), median(copied)), 1.05, "×"))
	return s.calls.remove(named)
}
