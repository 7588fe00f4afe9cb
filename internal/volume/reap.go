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
	callGrace  = 2 * 60  // likewise, when somebody asks for the volume's removal
	endGrace   = 30      // when one did and is gone
)

// How long Reap waits for deletions. Longer ones go on beside the next Reap.
const deleteWait = 20 * time.Second

func isNotEmpty(err error) bool {
	return errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY)
}

// How long a mount waits for copies of the host's tree that hold its upper: a
// container that starts has one for some milliseconds.
const copyGrace = 3 * time.Second

// awaitUpper makes sure that no container shows an earlier mount of an upper.
// Copies of the host's tree are waited for; one that stays is a mount
// namespace somebody made and in which nobody uses the volume. What no mount
// table shows is never gone over: it may be a container that this process
// cannot see.
func (m *Manager) awaitUpper(ctx context.Context, mr mountRecord) error {
	for deadline := time.Now().Add(copyGrace); ; {
		use, err := m.scanKernel(ctx)
		if err != nil {
			return err
		}
		if users := use.users(m, mr); len(users) > 0 {
			return fmt.Errorf("%w: process %d still shows an earlier mount of it at %s; end that container first", ErrInUse, users[0].PID, users[0].Mountpoint)
		}
		used, err := overlay.UpperInUse(mr.Upper)
		if err != nil || !used {
			return err
		}
		if time.Now().After(deadline) {
			copies := use.ofUpper(m, mr.Upper)
			if len(copies) == 0 || !m.seesAll() {
				return fmt.Errorf("%w: an earlier mount of it lives on, and no mount table shows where: in a container that this process cannot see, or held by an open file; end the containers of volume %s first", ErrInUse, mr.Volume)
			}
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
// mount has gone. It also notes which mounts a container shows. Then it deletes
// what was dropped, by it or by a call that did not come to the end.
func (m *Manager) Reap(ctx context.Context) error {
	failed := multierror.Append(nil, m.sweepRemoving(ctx), m.reapMounts(ctx))
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, deleteWait)
	defer cancel()
	return multierror.Append(failed, m.deleteDropped(ctx, "")).ErrorOrNil()
}

func (m *Manager) reapMounts(ctx context.Context) error {
	names, err := m.mountedNames(m.boot)
	if err != nil || len(names) == 0 {
		return err
	}
	// One look at the mount tables for all volumes: with thousands of
	// containers it takes long.
	look, err := m.scanKernel(ctx)
	if err != nil {
		return err
	}
	var failed *multierror.Error
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
// due is looked at again under the volume's lock, where no mount can begin. A
// record that cannot be read is an error, and the others are looked at all the
// same.
func (m *Manager) reapVolume(ctx context.Context, name string, look kernelUse) error {
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	records, damaged := m.readMounts(name)
	now := bootSeconds()
	again := false
	for i, mr := range records {
		used := m.inUse(look, mr)
		if used && m.seesAll() && !mr.Leaving && !mr.Seen {
			records[i].Seen = true
			if err := m.writeMount(records[i]); err != nil {
				return errors.Join(err, damaged)
			}
		}
		mounted, err := isMounted(mr)
		if err != nil {
			return errors.Join(err, damaged)
		}
		again = again || due(mr, used, mounted, now)
	}
	if !again {
		return damaged
	}
	use, err := m.scanKernel(ctx)
	if err != nil {
		return errors.Join(err, damaged)
	}
	failed := multierror.Append(nil, damaged)
	for _, mr := range records {
		mounted, err := isMounted(mr)
		if err != nil {
			failed = multierror.Append(failed, err)
			continue
		}
		if !due(mr, m.inUse(use, mr), mounted, now) {
			continue
		}
		err = m.leave(ctx, mr)
		if err == nil {
			m.log.Info("took away a mount that nobody uses", "volume", name, "id", mr.ID, "leaving", mr.Leaving, "seen", mr.Seen)
			err = m.dropManual(ctx, name)
		}
		if !errors.Is(err, errHeld) {
			failed = multierror.Append(failed, err)
		}
	}
	return failed.ErrorOrNil()
}

// inUse tells whether a container may be using a mount. Of one that was left,
// only what can be seen counts: its engine has said so.
func (m *Manager) inUse(use kernelUse, mr mountRecord) bool {
	return !m.seesAll() && !mr.Leaving || len(use.users(m, mr)) > 0
}

// dropManual removes a volume that was made for a manual mount, once it has
// none. The caller holds its lock.
func (m *Manager) dropManual(ctx context.Context, name string) error {
	r, err := m.readRecord(name)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil || !r.Manual {
		return err
	}
	if mounts, err := m.readMounts(name); err != nil || len(mounts) > 0 {
		return err
	}
	return m.remove(ctx, name)
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
	use, err := m.scanKernel(ctx)
	if err != nil {
		return err
	}
	failed = multierror.Append(failed, m.sweepRuns(ctx, use), m.sweepTargets(ctx), m.sweepManual(ctx), m.sweepRemoving(ctx), m.sweepAsides(ctx), m.sweepBoots(use))
	for _, dir := range []string{".", "volumes", "uppers/volume", filepath.Join(viewsDir, m.viewsName())} {
		failed = multierror.Append(failed, atomicfile.SweepDead(filepath.Join(m.state, dir)))
	}
	return failed.ErrorOrNil()
}

// sweepManual removes volumes of manual mounts that have ended: by a reboot, or
// by the death of the command that was making one.
func (m *Manager) sweepManual(ctx context.Context) error {
	names, err := m.names(recordSuffix)
	if err != nil {
		return err
	}
	var failed *multierror.Error
	for _, name := range names {
		if r, err := m.readRecord(name); err != nil || !r.Manual {
			continue // damage is told of by whoever needs the volume
		}
		unlock, err := m.lock(ctx, name)
		if err != nil {
			return err
		}
		err = m.dropManual(ctx, name)
		unlock()
		if err != nil {
			failed = multierror.Append(failed, fmt.Errorf("sweep volume %s: %w", name, err))
		}
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
	ids, err := os.ReadDir(filepath.Dir(m.runUpper(name, "x")))
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, e := range ids {
		if _, err := os.Lstat(m.mountRecordPath(name, e.Name())); err == nil {
			continue
		}
		// A mount of ours that lost its record: the record is void (another
		// boot id) or was deleted by hand.
		mr := mountRecord{Volume: name, ID: e.Name(), Target: filepath.Join(m.Path(name), e.Name()), Upper: m.runUpper(name, e.Name())}
		mr.Place, mr.Absorb = m.placeOf(mr.Target), m.absorbs(name)
		if users := use.users(m, mr); len(users) > 0 {
			continue
		}
		if err := m.unmount(mr.Target); errors.Is(err, errHeld) {
			m.log.Warn("a mount without a record is held", "volume", name, "target", mr.Target, "reason", err)
			continue
		} else if err != nil {
			return err
		}
		if err := m.checkFree(ctx, mr, true, true); errors.Is(err, errHeld) {
			continue
		} else if err != nil {
			return err
		}
		if err := errors.Join(m.dropUpper(mr), removeEmpty(mr.Target)); err != nil {
			return err
		}
	}
	return errors.Join(removeEmpty(filepath.Dir(m.runUpper(name, "x"))), removeEmpty(m.Path(name)), removeEmpty(m.mountsDir(name)))
}

// absorbs tells whether a volume has the option absorb.
func (m *Manager) absorbs(name string) bool {
	r, err := m.readRecord(name)
	return err == nil && r.Options["absorb"] == "on"
}

// sweepTargets removes mountpoints on which nothing is mounted.
func (m *Manager) sweepTargets(ctx context.Context) error {
	volumes, err := os.ReadDir(m.mnt)
	if err != nil {
		return fmt.Errorf("sweep mountpoints: %w", err)
	}
	for _, v := range volumes {
		if !v.IsDir() || !m.madeFolder(v.Name()) {
			continue
		}
		unlock, err := m.lock(ctx, v.Name())
		if err != nil {
			return err
		}
		targets, err := os.ReadDir(m.Path(v.Name()))
		for _, t := range targets {
			if !m.madeTarget(v.Name(), t.Name()) {
				continue
			}
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

// mntIsOurs tells that the folder for mounts is no folder of the host's with
// other things in it (Config.Mounts).
func (m *Manager) mntIsOurs() bool { return m.mnt == filepath.Join(m.state, mntDir) }

// madeFolder tells whether a folder below the one for mounts is Larder's. In a
// folder of the host's, a volume or a mount, of this boot or an earlier one,
// must have the name.
func (m *Manager) madeFolder(name string) bool {
	if CheckName(name) != nil {
		return false
	}
	if m.mntIsOurs() || exists(m.recordPath(name)) || exists(filepath.Join(m.state, "volumes", name+removingSuffix)) {
		return true
	}
	of, err := filepath.Glob(filepath.Join(escapeGlob(m.state), "mounts", "*", name))
	return err == nil && len(of) > 0
}

// madeTarget tells likewise of a mountpoint in a folder that is Larder's.
func (m *Manager) madeTarget(name, id string) bool {
	if m.mntIsOurs() || id == sharedTarget || anonymous.MatchString(id) {
		return true // an engine's IDs are as its names for volumes without one
	}
	of, err := filepath.Glob(filepath.Join(escapeGlob(m.state), "mounts", "*", name, escapeGlob(id)+recordSuffix))
	return err == nil && len(of) > 0
}

// escapeGlob quotes what filepath.Glob gives a meaning.
func escapeGlob(path string) string { return globEscapes.Replace(path) }

var globEscapes = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`)

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
	for kind, now := range map[string]string{"mounts": m.boot, viewsDir: m.viewsName()} {
		boots, err := os.ReadDir(filepath.Join(m.state, kind))
		if err != nil {
			return fmt.Errorf("sweep %s: %w", kind, err)
		}
		for _, b := range boots {
			// An upgraded Larder may meet views of this boot under the name
			// that its predecessor gave them.
			if b.Name() == now || kind == viewsDir && use.anyViewIn(b.Name()) {
				continue
			}
			if err := disk.RemoveAll(filepath.Join(m.state, kind, b.Name())); err != nil {
				return fmt.Errorf("sweep %s: %w", kind, err)
			}
		}
	}
	return nil
}

// Remove deletes a volume and what was written into it. A volume that a
// container shows, or may be starting with, is refused with ErrInUse, whatever
// an engine believes; one that keeps writes under a record that cannot be read,
// with ErrDamaged.
func (m *Manager) Remove(ctx context.Context, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer m.finishDrops(ctx, name)
	defer unlock()
	_, err = m.readRecord(name)
	if errors.Is(err, ErrNotFound) || err != nil && exists(m.volumeUpper(name)) {
		return err
	}
	return m.remove(ctx, name) // a damaged record that covers nothing too
}

// remove is Remove with the volume's lock held.
func (m *Manager) remove(ctx context.Context, name string) error {
	records, err := m.readMounts(name)
	if err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	use, err := m.scanKernel(ctx)
	if err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	all := slices.Clone(records)
	if upper := m.volumeUpper(name); !slices.ContainsFunc(all, func(mr mountRecord) bool { return mr.Upper == upper }) {
		// Its record may be gone while a container still shows the mount.
		lost := mountRecord{Volume: name, Target: filepath.Join(m.Path(name), sharedTarget), Upper: upper}
		lost.Place = m.placeOf(lost.Target)
		all = append(all, lost)
	}
	for _, mr := range all {
		users := use.users(m, mr)
		switch {
		case mr.Manual && !mr.Leaving:
			return fmt.Errorf("remove volume %s: %w: it is mounted at %s; larder umount ends that", name, ErrInUse, mr.Target)
		case len(users) > 0:
			return fmt.Errorf("remove volume %s: %w: process %d shows it at %s", name, ErrInUse, users[0].PID, users[0].Mountpoint)
		case !m.seesAll() && len(use.of(m, mr)) > 0:
			return fmt.Errorf("remove volume %s: %w, as far as this process knows: %s; remove it by the engine, or run larder on the host", name, ErrInUse, m.Blind())
		case starting(mr):
			return fmt.Errorf("remove volume %s: %w: it was mounted a moment ago, for a container that may be starting; try again in two minutes", name, ErrInUse)
		}
	}
	// No container shows any of its mounts, or is about to: those that are left
	// come from an engine that was killed or forgot to unmount.
	for _, mr := range records {
		mr.Refs, mr.Leaving = 0, true
		if err := m.writeMount(mr); err != nil {
			return fmt.Errorf("remove volume %s: %w", name, err)
		}
		// What only copies of the host's tree still hold does not hold up the
		// removal: Reap finishes it when they have gone. It does likewise where
		// the plugin, in a mount namespace of its own, must unmount.
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

// starting tells that an engine has a mount, and has had no time to start the
// container with it.
func starting(mr mountRecord) bool {
	mounted := mr.Device != "" // else the call has failed, or is going on
	return mounted && mr.Refs > 0 && !mr.Seen && bootSeconds()-mr.Called < callGrace
}

// finishRemove drops what a volume whose record says "removing" has written,
// then that record.
func (m *Manager) finishRemove(ctx context.Context, name string) error {
	removing := filepath.Join(m.state, "volumes", name+removingSuffix)
	if _, err := os.Lstat(m.recordPath(name)); err == nil {
		// Created anew meanwhile; the upper is the new volume's.
		return ignoreAbsent(disk.Remove(removing))
	}
	upper := mountRecord{Volume: name, Upper: m.volumeUpper(name)}
	if exists(upper.Upper) {
		if err := m.checkFree(ctx, upper, true, true); err != nil {
			return err
		}
		if err := m.drop(name, upper.Upper); err != nil {
			return err
		}
	}
	return ignoreAbsent(disk.Remove(removing))
}

// Mounts lists the live mounts of all volumes with who shows them. With an
// error about records that cannot be read, it gives the others.
func (m *Manager) Mounts(ctx context.Context) ([]Mounted, error) {
	all, damaged := m.allMounts()
	use, err := m.scanKernel(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Mounted, len(all))
	for i, mr := range all {
		out[i] = mounted(mr)
		out[i].Holders = use.users(m, mr)
	}
	return out, damaged
}
