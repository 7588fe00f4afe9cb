package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-multierror"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/overlay"
)

// How long a mount that no container shows may wait for one, in seconds since
// boot. An engine gives a Mount two minutes, mounts all volumes of a container
// one after another, and then starts it.
const (
	startGrace = 15 * 60 // after Mount, when no container ever showed it
	endGrace   = 30      // when one did and is gone
)

func isNotEmpty(err error) bool {
	return errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY)
}

// holdersOfUpper lists who shows a mount with this upper, in any namespace but
// our own. The upper is either the folder itself or lies below its own mount.
func (u kernelUse) holdersOfUpper(dir string) []Holder {
	for _, at := range []string{filepath.Join(dir, "upper"), filepath.Join(dir, "fs", "upper")} {
		if h := u.upper[at]; len(h) > 0 {
			return h
		}
	}
	return nil
}

// holders lists who shows a mount in another namespace. A copy of the host's
// own tree, as every new namespace begins with and as a container has that sees
// the host's root, keeps a mount alive, but nobody uses the volume by it: it is
// left out.
func (u kernelUse) holders(mr mountRecord) []Holder {
	var all []Holder
	if mr.Upper != "" {
		all = u.holdersOfUpper(mr.Upper)
	} else if d, err := overlay.DeviceOf(mr.Target); err == nil {
		all = u.device[d.String()]
	}
	own := mr.Target
	if !mr.Manual {
		own = "/" + mr.Volume + "/" + filepath.Base(mr.Target)
	}
	return slices.DeleteFunc(slices.Clone(all), func(h Holder) bool { return strings.HasSuffix(h.Mountpoint, own) })
}

// How long a mount waits for copies of the host's tree that hold its upper: a
// container that starts has one for some milliseconds.
const copyGrace = 3 * time.Second

// awaitUpper makes sure that no container shows an earlier mount of an upper.
// Copies of the host's tree are waited for; one that stays is a mount
// namespace somebody made and in which nobody uses the volume.
func (m *Manager) awaitUpper(ctx context.Context, mr mountRecord) error {
	for deadline := time.Now().Add(copyGrace); ; {
		use, err := scanKernel(ctx, m.state, false)
		if err != nil {
			return err
		}
		if users := use.holders(mr); len(users) > 0 {
			return fmt.Errorf("%w: process %d still shows an earlier mount of it at %s; end that container first", ErrInUse, users[0].PID, users[0].Mountpoint)
		}
		copies := use.holdersOfUpper(mr.Upper)
		if len(copies) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			m.log.Warn("a mount namespace keeps a copy of an earlier mount", "volume", mr.Volume, "process", copies[0].PID, "mountpoint", copies[0].Mountpoint)
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Reap looks at every mount record of this boot and takes away what nobody
// uses: mounts whose last Unmount was held up or never came, and records whose
// mount has gone. It also notes which mounts a container shows.
func (m *Manager) Reap(ctx context.Context) error {
	names, err := m.mountedNames(m.boot)
	if err != nil {
		return err
	}
	var failed *multierror.Error
	if err := m.sweepRemoving(ctx); err != nil {
		failed = multierror.Append(failed, err)
	}
	if len(names) == 0 {
		return failed.ErrorOrNil()
	}
	// One look at the mount tables for all volumes: with thousands of
	// containers it takes long.
	look, err := scanKernel(ctx, m.state, false)
	if err != nil {
		return errors.Join(err, failed.ErrorOrNil())
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := m.reapVolume(ctx, name, look); err != nil {
			failed = multierror.Append(failed, fmt.Errorf("reap volume %s: %w", name, err))
		}
	}
	return failed.ErrorOrNil()
}

func (m *Manager) mountedNames(boot string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(m.state, "mounts", boot))
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var names []string
	for _, e := range entries {
		if CheckName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// reapVolume notes what an earlier look shows to be in use. What seems to be
// due is looked at again under the volume's lock, where no mount can begin.
func (m *Manager) reapVolume(ctx context.Context, name string, look kernelUse) error {
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	records, err := m.readMounts(name)
	if err != nil {
		return err
	}
	now := bootSeconds()
	again := false
	for i, mr := range records {
		used := len(look.holders(mr)) > 0
		if used && !mr.Leaving && !mr.Seen {
			records[i].Seen = true
			if err := m.writeMount(records[i]); err != nil {
				return err
			}
		}
		mounted, err := overlay.IsMounted(mr.Target)
		if err != nil {
			return err
		}
		again = again || due(mr, used, mounted, now)
	}
	if !again {
		return nil
	}
	use, err := scanKernel(ctx, m.state, false)
	if err != nil {
		return err
	}
	for _, mr := range records {
		mounted, err := overlay.IsMounted(mr.Target)
		if err != nil {
			return err
		}
		if !due(mr, len(use.holders(mr)) > 0, mounted, now) {
			continue
		}
		err = m.leave(ctx, mr)
		if err == nil {
			m.log.Info("took away a mount that nobody uses", "volume", name, "id", mr.ID, "leaving", mr.Leaving, "seen", mr.Seen)
		} else if !errors.Is(err, errHeld) {
			return err
		}
	}
	return nil
}

// due tells that a mount is to be taken away: its last user has left, or it has
// gone by itself, or no container has shown it for so long that none will.
func due(mr mountRecord, used, mounted bool, now int64) bool {
	switch {
	case used, mr.Manual && mounted:
		return false
	case mr.Leaving:
		return true
	case !mounted:
		return now-mr.Called > endGrace // Mount is repeating it, or did so just now in vain
	}
	return mr.Seen && now-mr.Called > endGrace || now-mr.Called > startGrace
}

// Sweep is done once at the start: it deletes what earlier boots and crashes
// left behind, and nothing that a mount table shows or a record names.
func (m *Manager) Sweep(ctx context.Context) error {
	var failed *multierror.Error
	use, err := scanKernel(ctx, m.state, true)
	if err != nil {
		return err
	}
	failed = multierror.Append(failed, m.sweepRuns(ctx, use), m.sweepTargets(ctx), m.sweepRemoving(ctx), m.sweepBoots(use))
	for _, dir := range []string{".", "volumes", "views/" + m.boot} {
		failed = multierror.Append(failed, atomicfile.SweepDead(filepath.Join(m.state, dir)))
	}
	return failed.ErrorOrNil()
}

// sweepRuns deletes uppers of runs that no record of this boot names.
func (m *Manager) sweepRuns(ctx context.Context, use kernelUse) error {
	runs := filepath.Join(m.state, "uppers", "run")
	volumes, err := os.ReadDir(runs)
	if err != nil {
		return fmt.Errorf("sweep uppers: %w", err)
	}
	for _, v := range volumes {
		if err := m.sweepRunsOf(ctx, v.Name(), use); err != nil {
			return fmt.Errorf("sweep uppers of volume %s: %w", v.Name(), err)
		}
	}
	return nil
}

func (m *Manager) sweepRunsOf(ctx context.Context, name string, use kernelUse) error {
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	ids, err := os.ReadDir(filepath.Join(m.state, "uppers", "run", name))
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, e := range ids {
		dir := m.runUpper(name, e.Name())
		if _, err := os.Lstat(m.mountRecordPath(name, e.Name())); err == nil || len(use.holdersOfUpper(dir)) > 0 {
			continue
		}
		// A mount of ours that lost its record: the record is void (another
		// boot id) or was deleted by hand.
		target := filepath.Join(m.Path(name), e.Name())
		if mounted, err := overlay.IsMounted(target); err != nil {
			return err
		} else if mounted {
			if err := overlay.Unmount(target); err != nil {
				m.log.Warn("a mount without a record is held", "volume", name, "target", target, "reason", err)
				continue
			}
		}
		if err := errors.Join(overlay.RemoveUpper(dir), removeEmpty(target)); err != nil {
			return err
		}
	}
	return errors.Join(removeEmpty(filepath.Join(m.state, "uppers", "run", name)), removeEmpty(m.Path(name)))
}

// sweepTargets removes mountpoints on which nothing is mounted.
func (m *Manager) sweepTargets(ctx context.Context) error {
	volumes, err := os.ReadDir(m.mnt)
	if err != nil {
		return fmt.Errorf("sweep mountpoints: %w", err)
	}
	for _, v := range volumes {
		unlock, err := m.lock(ctx, v.Name())
		if err != nil {
			return err
		}
		targets, err := os.ReadDir(m.Path(v.Name()))
		for _, t := range targets {
			// A mountpoint in use is busy, one with files in it is not empty:
			// both stay.
			err = errors.Join(err, removeEmpty(filepath.Join(m.Path(v.Name()), t.Name())))
		}
		err = errors.Join(ignoreAbsent(err), removeEmpty(m.Path(v.Name())))
		unlock()
		if err != nil {
			return fmt.Errorf("sweep mountpoints: %w", err)
		}
	}
	return nil
}

// sweepRemoving finishes removals of volumes.
func (m *Manager) sweepRemoving(ctx context.Context) error {
	names, err := m.names(removingSuffix)
	if err != nil {
		return err
	}
	for _, name := range names {
		unlock, err := m.lock(ctx, name)
		if err != nil {
			return err
		}
		err = m.finishRemove(ctx, name)
		unlock()
		if err != nil {
			m.log.Warn("a removed volume's files are still held", "volume", name, "reason", err)
		}
	}
	return nil
}

// sweepBoots deletes records and views of earlier boots.
func (m *Manager) sweepBoots(use kernelUse) error {
	for _, kind := range []string{"mounts", "views"} {
		boots, err := os.ReadDir(filepath.Join(m.state, kind))
		if err != nil {
			return fmt.Errorf("sweep %s: %w", kind, err)
		}
		for _, b := range boots {
			dir := filepath.Join(m.state, kind, b.Name())
			if b.Name() == m.boot || kind == "views" && use.anyViewBelow(dir) {
				continue
			}
			if err := disk.RemoveAll(dir); err != nil {
				return fmt.Errorf("sweep %s: %w", kind, err)
			}
		}
	}
	return nil
}

func (u kernelUse) anyViewBelow(dir string) bool {
	for v := range u.views {
		if strings.HasPrefix(v, dir+"/") {
			return true
		}
	}
	return false
}

// Remove deletes a volume and what was written into it. A volume that a
// container shows is refused with ErrInUse, whatever an engine believes.
func (m *Manager) Remove(ctx context.Context, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Lstat(m.recordPath(name)); err != nil {
		return m.notFound(name)
	}
	records, err := m.readMounts(name)
	if err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	use, err := scanKernel(ctx, m.state, false)
	if err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	// Its record may be gone while a container still shows the mount.
	shared := mountRecord{Volume: name, Target: filepath.Join(m.Path(name), sharedTarget), Upper: m.volumeUpper(name)}
	if holders := use.holders(shared); len(holders) > 0 {
		return fmt.Errorf("remove volume %s: %w: process %d shows it at %s", name, ErrInUse, holders[0].PID, holders[0].Mountpoint)
	}
	for _, mr := range records {
		if mr.Manual {
			return fmt.Errorf("remove volume %s: %w: it is mounted at %s; larder umount ends that", name, ErrInUse, mr.Target)
		}
		if len(use.holders(mr)) > 0 {
			return fmt.Errorf("remove volume %s: %w: a running container shows it", name, ErrInUse)
		}
	}
	// No container shows any of its mounts: those that are left come from an
	// engine that was killed or forgot to unmount.
	for _, mr := range records {
		mr.Refs, mr.Leaving = 0, true
		if err := m.writeMount(mr); err != nil {
			return fmt.Errorf("remove volume %s: %w", name, err)
		}
		// A copy of the host's tree that still holds a run's writes does not
		// hold up the removal: Reap deletes them when it has gone.
		if err := m.leave(ctx, mr); errors.Is(err, overlay.ErrBusy) {
			return fmt.Errorf("remove volume %s: %w: %w", name, ErrInUse, err)
		} else if err != nil && !errors.Is(err, errHeld) {
			return fmt.Errorf("remove volume %s: %w", name, err)
		}
	}
	removing := filepath.Join(m.state, "volumes", name+removingSuffix)
	if err := disk.Rename(m.recordPath(name), removing); err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	if err := disk.SyncDir(filepath.Dir(removing)); err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	if err := m.finishRemove(ctx, name); err != nil {
		m.log.Warn("a removed volume's files are still held", "volume", name, "reason", err)
	}
	return nil
}

// finishRemove deletes what a volume whose record says "removing" has written,
// then that record.
func (m *Manager) finishRemove(ctx context.Context, name string) error {
	removing := filepath.Join(m.state, "volumes", name+removingSuffix)
	if _, err := os.Lstat(m.recordPath(name)); err == nil {
		// Created anew meanwhile; the upper is the new volume's.
		return ignoreAbsent(disk.Remove(removing))
	}
	use, err := scanKernel(ctx, m.state, false)
	if err != nil {
		return err
	}
	if len(use.holdersOfUpper(m.volumeUpper(name))) > 0 {
		return errHeld
	}
	if err := overlay.RemoveUpper(m.volumeUpper(name)); err != nil {
		return err
	}
	return ignoreAbsent(disk.Remove(removing))
}

// Mounts lists the live mounts of all volumes with who shows them.
func (m *Manager) Mounts(ctx context.Context) ([]Mounted, error) {
	names, err := m.mountedNames(m.boot)
	if err != nil {
		return nil, err
	}
	use, err := scanKernel(ctx, m.state, false)
	if err != nil {
		return nil, err
	}
	var out []Mounted
	for _, name := range names {
		records, err := m.readMounts(name)
		if err != nil {
			return nil, err
		}
		for _, mr := range records {
			one := mounted(mr)
			one.Holders = use.holders(mr)
			out = append(out, one)
		}
	}
	return out, nil
}
