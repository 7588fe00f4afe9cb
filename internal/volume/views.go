package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/go-multierror"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// DropViews deletes the views of this boot that nothing shows or is about to
// show. Without it they would take inodes for every version and set of options
// that was ever mounted, and where they are made of hard links, the space of
// removed versions.
//
// The caller holds the store's lock exclusively. A mount is recorded with its
// versions inside that lock, shared, before its view is looked for. So a view
// whose versions are all in one record may be needed, and stays; any other is
// built anew when a mount that begins later wants it.
//
// After a crash in between, a view has lost its name and is swept, or is gone
// and its record is left, which the next call drops.
func (m *Manager) DropViews(ctx context.Context) error {
	if !m.seesAll() {
		return nil // what it cannot see may be mounted
	}
	needed, err := m.viewsNeeded()
	if err != nil {
		return fmt.Errorf("drop views: %w", err)
	}
	use, err := m.scanKernel(ctx)
	if err != nil {
		return fmt.Errorf("drop views: %w", err)
	}
	dir := filepath.Join(m.state, viewsDir, m.viewsName())
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("drop views: %w", err)
	}
	var failed *multierror.Error
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("drop views: %w", err)
		}
		key, isRecord := strings.CutSuffix(e.Name(), recordSuffix)
		if !isRecord || atomicfile.IsTemp(key) {
			continue
		}
		path := filepath.Join(dir, key)
		// A record that cannot be read tells nothing of who needs the view.
		versions, err := readViewRecord(path + recordSuffix)
		shown := len(use.views[filepath.Join(viewsDir, m.viewsName(), key)]) > 0
		if shown || err == nil && needed(versions) {
			continue
		}
		if err != nil && exists(path) {
			failed = multierror.Append(failed, err)
			continue
		}
		if err := dropView(path); err != nil {
			failed = multierror.Append(failed, fmt.Errorf("drop view %s: %w", key, err))
		}
	}
	failed = multierror.Append(failed, atomicfile.SweepDead(dir))
	return failed.ErrorOrNil()
}

// dropView takes the view's name away first: nobody mounts half of one.
func dropView(path string) error {
	if exists(path) {
		aside := filepath.Join(filepath.Dir(path), fmt.Sprintf("%s%d-%s", atomicfile.TempPrefix, os.Getpid(), filepath.Base(path)))
		if err := errors.Join(disk.RemoveAll(aside), disk.Rename(path, aside)); err != nil {
			return err
		}
		if err := disk.RemoveAll(aside); err != nil {
			return err
		}
	}
	return ignoreAbsent(disk.Remove(path + recordSuffix))
}

// viewsNeeded tells of the versions of a view whether some record has them
// all: of a mount, or of a download that is to be looked at over its view.
func (m *Manager) viewsNeeded() (func(versions []digest.Digest) bool, error) {
	mounts, err := m.allMounts()
	if err != nil {
		return nil, err
	}
	asides, err := m.asides()
	if err != nil {
		return nil, err
	}
	sets := map[string]map[digest.Digest]bool{} // runs of one catalog have the same
	add := func(versions []digest.Digest) {
		name := fmt.Sprint(versions)
		if sets[name] == nil {
			sets[name] = make(map[digest.Digest]bool, len(versions))
			for _, d := range versions {
				sets[name][d] = true
			}
		}
	}
	for _, mr := range mounts {
		add(mr.Versions)
	}
	for _, a := range asides {
		add(a.Versions)
	}
	return func(versions []digest.Digest) bool {
		for _, set := range sets {
			if !slices.ContainsFunc(versions, func(d digest.Digest) bool { return !set[d] }) {
				return true
			}
		}
		return false
	}, nil
}
