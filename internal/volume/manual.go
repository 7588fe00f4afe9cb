package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/gofrs/flock"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/overlay"
)

// manualPrefix begins the names of volumes made for one manual mount.
const manualPrefix = "manual-"

// MountAt mounts a model at a folder of a person's choice, without an engine.
// With an empty name the volume is made for this mount and goes with it; a
// name makes a volume that keeps what its scope says, or takes one up again.
// The folder must be empty; it is made when it is missing.
func (m *Manager) MountAt(ctx context.Context, name string, raw map[string]string, target string) error {
	target, err := cleanTarget(target)
	if err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	id := newID()
	r := record{Name: name, Options: raw}
	if name == "" {
		r.Name, r.Manual = manualPrefix+id[:12], true
	}
	if err := CheckName(r.Name); err != nil {
		return err
	}
	o, err := ParseOptions(r.Name, raw)
	if err != nil {
		return err
	}
	if o.Pull != PullNever {
		return fmt.Errorf("mount: %w option pull=%s: a mount fetches nothing; larder pull %s does", ErrInvalid, o.Pull, o.Models[0])
	}
	unlock, err := m.lock(ctx, r.Name)
	if err != nil {
		return err
	}
	defer m.finishDrops(ctx, r.Name)
	defer unlock()
	if err := m.create(ctx, r, o); err != nil {
		return fmt.Errorf("create volume %s: %w", r.Name, err)
	}
	if err = m.mountAt(ctx, r.Name, id, target); err != nil && r.Manual {
		err = errors.Join(err, m.dropManual(context.WithoutCancel(ctx), r.Name))
	}
	return err
}

// mountAt mounts a volume, whose lock the caller holds.
func (m *Manager) mountAt(ctx context.Context, name, id, target string) error {
	r, err := m.readRecord(name)
	if err != nil {
		return err
	}
	o, err := ParseOptions(name, r.Options)
	if err != nil {
		return fmt.Errorf("mount volume %s: %w", name, err)
	}
	if o.Scope == ScopeVolume {
		others, err := m.readMounts(name)
		if err != nil {
			return err
		}
		if len(others) > 0 {
			return fmt.Errorf("mount volume %s: %w: its writes are mounted at %s already", name, ErrInUse, others[0].Target)
		}
	}
	// Other volumes, with other locks, may be on their way to the same folder.
	l := flock.New(filepath.Join(m.state, "locks", "manual"), flock.SetPermissions(0o600))
	if _, err := l.TryLockContext(ctx, lockRetry); err != nil {
		return fmt.Errorf("lock %s: %w", l.Path(), err)
	}
	defer l.Close()
	if err := checkTarget(target); err != nil {
		return fmt.Errorf("mount volume %s: %w", name, err)
	}
	mr, err := m.begin(ctx, r, o, mountRecord{Volume: name, ID: id, Target: target, Place: m.placeOf(target), Manual: true})
	if err == nil {
		err = m.attach(ctx, o, mr)
	}
	if err != nil {
		return fmt.Errorf("mount volume %s at %s: %w", name, target, err)
	}
	return nil
}

// cleanTarget makes a folder that can be mounted on, and gives its real path.
func cleanTarget(target string) (string, error) {
	target, err := filepath.Abs(target)
	if err != nil {
		return "", err
	}
	if err := disk.MkdirAll(target, 0o755); err != nil {
		return "", err
	}
	if target, err = filepath.EvalSymlinks(target); err != nil {
		return "", err
	}
	return target, checkTarget(target)
}

func checkTarget(target string) error {
	if mounted, err := overlay.IsMounted(target); err != nil || mounted {
		return errors.Join(fmt.Errorf("something is mounted at %s already", target), err)
	}
	entries, err := os.ReadDir(target)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s is not empty: the mount would hide what is in it", target)
	}
	return nil
}

// ErrNotMounted is returned for a folder at which Larder has mounted nothing.
var ErrNotMounted = errors.New("not mounted by larder")

// UnmountAt ends a manual mount. A mount that an engine asked for is refused:
// the engine ends it.
func (m *Manager) UnmountAt(ctx context.Context, target string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	if real, err := filepath.EvalSymlinks(target); err == nil {
		target = real
	}
	all, damaged := m.allMounts()
	for _, mr := range all {
		if mr.Target != target {
			continue
		}
		if !mr.Manual {
			return fmt.Errorf("unmount %s: %w: it belongs to a container's volume %s; stop the container", target, ErrInUse, mr.Volume)
		}
		if err := m.endManual(ctx, mr.Volume, mr.ID); err != nil {
			return fmt.Errorf("unmount %s: %w", target, err)
		}
		if mr.Absorb { // there may be no plugin to do it
			return m.Absorb(ctx)
		}
		return nil
	}
	if damaged != nil { // it may be the one
		return fmt.Errorf("unmount %s: %w", target, damaged)
	}
	return fmt.Errorf("unmount %s: %w; larder ps lists the mounts", target, ErrNotMounted)
}

func (m *Manager) endManual(ctx context.Context, name, id string) error {
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer m.finishDrops(ctx, name)
	defer unlock()
	mr, ok, err := m.readMount(name, id)
	if err != nil {
		return err
	}
	if !ok {
		return m.dropManual(ctx, name)
	}
	err = m.detach(ctx, mr)
	var elsewhere *elsewhereError
	switch {
	case err == nil:
		return m.dropManual(ctx, name)
	case errors.As(err, &elsewhere):
		return fmt.Errorf("%w: %w", ErrInUse, err)
	case errors.Is(err, overlay.ErrBusy):
		return fmt.Errorf("%w: %w", ErrInUse, err)
	case errors.Is(err, errHeld):
		// It is unmounted here. Copies in other namespaces hold what was
		// written, and the rest goes with the last of them: Reap sees to it.
		mr.Refs, mr.Leaving = 0, true
		return m.writeMount(mr)
	}
	return err
}
