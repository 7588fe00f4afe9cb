package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-multierror"

	"github.com/larder-project/larder/internal/overlay"
	"github.com/larder-project/larder/internal/pull"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/source/directory"
	"github.com/larder-project/larder/internal/store"
)

// absorbRun takes over what a run's container downloaded into its hub cache:
// whole revisions whose files have the digests they are named by. The mount
// has been left by its container.
//
// What a revision shares with the view below (a new commit of a model that the
// store has) can only be seen in the mount, so that is read first and copied;
// then the mount goes, and what lies whole in the upper is moved.
//
// A container can claim anything about what it downloaded. So no reference
// that is there already moves: a commit that is new is added under its own
// name, and a branch is set only where the store had none.
func (m *Manager) absorbRun(ctx context.Context, mr mountRecord) error {
	upper := upperOf(mr.Upper)
	whole, err := directory.HubCache(upper)
	if err != nil {
		return nil // the container kept no cache
	}
	skipped := len(whole.Skipped) > 0
	if err := whole.Close(); err != nil {
		return err
	}
	var failed *multierror.Error
	if skipped {
		if mounted, err := overlay.IsMounted(mr.Target); err != nil {
			return err
		} else if mounted {
			failed = multierror.Append(failed, m.absorbCache(ctx, mr.Target, false))
		}
	}
	if err := m.unmount(mr.Target); err != nil {
		return err
	}
	failed = multierror.Append(failed, m.absorbCache(ctx, upper, true))
	return failed.ErrorOrNil()
}

// upperOf is the folder that took a mount's writes; see overlay.Upper.
func upperOf(dir string) string {
	if inside := filepath.Join(dir, "fs", "upper"); exists(inside) {
		return inside
	}
	return filepath.Join(dir, "upper")
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func (m *Manager) absorbCache(ctx context.Context, dir string, move bool) error {
	cache, err := directory.HubCache(dir)
	if err != nil {
		return err
	}
	defer cache.Close()
	var failed *multierror.Error
	for _, src := range cache.Sources {
		local, ok := src.(*directory.Source)
		if !ok {
			continue
		}
		guarded := &newcomer{Source: local, store: m.store}
		snap, err := guarded.Snapshot(ctx)
		if err == nil && len(snap.References) == 0 {
			continue // the store has this commit
		}
		if err == nil {
			_, err = pull.Run(ctx, m.store, guarded, pull.Options{Node: m.node, Move: move})
		}
		if err != nil {
			failed = multierror.Append(failed, fmt.Errorf("take over %s: %w", snap.Source, err))
			continue
		}
		m.log.Info("took over a model that a container downloaded", "model", snap.Source, "revision", snap.Revision)
	}
	return failed.ErrorOrNil()
}

// newcomer is a source whose snapshot takes no reference away from a version
// that is in the store.
type newcomer struct {
	*directory.Source
	store *store.Store
}

// Snapshot implements source.Source.
func (n *newcomer) Snapshot(ctx context.Context) (source.Snapshot, error) {
	snap, err := n.Source.Snapshot(ctx)
	if err != nil {
		return snap, err
	}
	name, err := reference.Parse(snap.Source + "@" + snap.Revision)
	if err != nil {
		return snap, fmt.Errorf("a cache without a commit: %w", err)
	}
	if _, err := n.store.Resolve(name); err == nil {
		snap.References = nil
		return snap, nil
	} else if !errors.Is(err, store.ErrNotFound) {
		return snap, err
	}
	refs := []reference.Reference{name}
	for _, r := range snap.References {
		if _, err := n.store.Resolve(r); errors.Is(err, store.ErrNotFound) && r != name {
			refs = append(refs, r)
		}
	}
	snap.References = refs
	return snap, nil
}

// Absorb takes over what the runs that have ended left in their caches, and
// then deletes their uppers. It may take long, and holds no lock while it
// reads. Volumes with the option absorb need somebody who calls it.
func (m *Manager) Absorb(ctx context.Context) error {
	names, err := m.mountedNames(m.boot)
	if err != nil {
		return err
	}
	var failed *multierror.Error
	for _, name := range names {
		records, err := m.readMounts(name)
		if err != nil {
			failed = multierror.Append(failed, err)
			continue
		}
		for _, mr := range records {
			if !mr.Absorb || !mr.Leaving {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			failed = multierror.Append(failed, m.takeOver(ctx, mr))
		}
	}
	return failed.ErrorOrNil()
}

// takeOver absorbs what an ended run left, and deletes the rest.
func (m *Manager) takeOver(ctx context.Context, mr mountRecord) error {
	if err := m.absorbRun(ctx, mr); err != nil {
		if ctx.Err() != nil || errors.Is(err, store.ErrFull) || errors.Is(err, overlay.ErrBusy) {
			return err // later, when there is room
		}
		// What cannot be taken over now cannot be later.
		m.log.Warn("take over what a container downloaded", "volume", mr.Volume, "id", mr.ID, "error", err)
	}
	return m.absorbed(ctx, mr)
}

// absorbed ends a run whose cache has been taken over.
func (m *Manager) absorbed(ctx context.Context, mr mountRecord) error {
	unlock, err := m.lock(ctx, mr.Volume)
	if err != nil {
		return err
	}
	defer unlock()
	now, ok, err := m.readMount(mr.Volume, mr.ID)
	if err != nil || !ok || !now.Leaving {
		return err // gone, or begun anew
	}
	now.Absorb = false
	if err := m.writeMount(now); err != nil {
		return err
	}
	if err := m.leave(ctx, now); !errors.Is(err, errHeld) {
		return err
	}
	return nil
}
