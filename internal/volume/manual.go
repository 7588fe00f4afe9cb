package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

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
	if name == "" {
		name = manualPrefix + id[:12]
	}
	if err := m.Create(ctx, name, raw); err != nil {
		return err
	}
	err = m.mountAt(ctx, name, id, target)
	if err != nil && strings.HasPrefix(name, manualPrefix) {
		err = errors.Join(err, m.Remove(context.WithoutCancel(ctx), name))
	}
	return err
}

func (m *Manager) mountAt(ctx context.Context, name, id, target string) error {
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
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
	mr, err := m.begin(ctx, r, o, mountRecord{Volume: name, ID: id, Target: target, Manual: true})
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
	if mounted, err := overlay.IsMounted(target); err != nil || mounted {
		return "", errors.Join(fmt.Errorf("something is mounted at %s already", target), err)
	}
	entries, err := os.ReadDir(target)
	if err != nil {
		return "", err
	}
	if len(entries) > 0 {
		return "", fmt.Errorf("%s is not empty: the mount would hide what is in it", target)
	}
	return target, nil
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
	all, err := m.Mounts(ctx)
	if err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	for _, one := range all {
		if one.Target != target {
			continue
		}
		if !one.Manual {
			return fmt.Errorf("unmount %s: %w: it belongs to a container's volume %s; stop the container", target, ErrInUse, one.Volume)
		}
		return m.endManual(ctx, one)
	}
	return fmt.Errorf("unmount %s: %w; larder ps lists the mounts", target, ErrNotMounted)
}

func (m *Manager) endManual(ctx context.Context, one Mounted) error {
	unlock, err := m.lock(ctx, one.Volume)
	if err != nil {
		return err
	}
	mr, ok, err := m.readMount(one.Volume, one.ID)
	absorb := err == nil && ok && mr.Absorb
	if err == nil && ok && !absorb {
		err = m.detach(ctx, mr)
	}
	if absorb || errors.Is(err, errHeld) && !errors.Is(err, overlay.ErrBusy) {
		// Unmounted here; what was written goes when Reap finds it free. Or it
		// is absorbed now: there may be no plugin to do it later.
		mr.Refs, mr.Leaving = 0, true
		err = m.writeMount(mr)
	}
	unlock()
	if absorb && err == nil {
		err = m.takeOver(ctx, mr)
	}
	if errors.Is(err, overlay.ErrBusy) {
		return fmt.Errorf("unmount %s: %w: %w", one.Target, ErrInUse, err)
	}
	if err == nil && strings.HasPrefix(one.Volume, manualPrefix) {
		err = m.Remove(ctx, one.Volume)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", one.Target, err)
	}
	return nil
}
