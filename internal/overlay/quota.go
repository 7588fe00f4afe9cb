package overlay

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/larder-project/larder/internal/disk"
)

// Project ids of uppers lie between these, far from the small ones that
// people and Docker give out and from 1048577 on, where Kubernetes begins.
const (
	firstProject = 0x4c000000
	lastProject  = 0x4cffffff
)

// projectLock is the file under which ids are given out.
const projectLock = "projects.lock"

// quotaEnforced tells whether project quotas are switched on for the file
// system that holds dir.
func quotaEnforced(dir string) (bool, error) {
	on, err := disk.ProjectQuotaOn(dir)
	if errors.Is(err, disk.ErrNotSupported) {
		return false, nil
	}
	return on, err
}

// newProject gives dir, which is empty or was begun here before, a project id
// of its own with a limit. The id is in dir's own attributes, so nothing else
// need remember it. After a crash in between, dir has an id without a limit,
// and nothing has been written.
func newProject(ctx context.Context, dir, stateDir string, bytes int64) error {
	id, err := disk.Project(dir)
	if err != nil {
		return noQuota(err)
	}
	// A limit that nobody enforces would be set without a word.
	if on, err := quotaEnforced(dir); err != nil || !on {
		return noQuota(err)
	}
	if id < firstProject || id > lastProject {
		if id, err = takeProject(ctx, dir, stateDir); err != nil {
			return err
		}
	}
	if err := disk.SetProjectLimit(dir, id, bytes); err != nil {
		return fmt.Errorf("set the quota of project %d: %w", id, err)
	}
	return nil
}

func noQuota(err error) error {
	if err == nil || errors.Is(err, disk.ErrNotSupported) {
		return fmt.Errorf("%w: the file system has no project quotas, or they are switched off; %s", ErrLimit, quotaAdvice)
	}
	return fmt.Errorf("look for project quotas: %w", err)
}

const quotaAdvice = "mount XFS with the option prjquota; for ext4, `tune2fs -O project,quota -Q prjquota DEVICE` while it is not mounted, then mount it with prjquota"

// takeProject finds an id that no file has and no limit is set for. The search
// begins at a number made of the name, so that it is short and ids of uppers
// that were just removed are not used again at once.
func takeProject(ctx context.Context, dir, stateDir string) (uint32, error) {
	unlock, err := lockFile(ctx, filepath.Join(stateDir, projectLock))
	if err != nil {
		return 0, err
	}
	defer unlock()
	h := fnv.New32a()
	_, _ = h.Write([]byte(dir))
	const ids = lastProject - firstProject + 1
	start := h.Sum32() % ids
	for i := range uint32(ids) {
		id := firstProject + (start+i)%ids
		used, err := disk.ProjectInUse(dir, id)
		if err != nil {
			return 0, fmt.Errorf("look for a free project id: %w", err)
		}
		if used {
			continue
		}
		// From here on the folder itself counts as use of the id.
		if err := disk.SetProject(dir, id); err != nil {
			return 0, fmt.Errorf("set project id: %w", err)
		}
		return id, nil
	}
	return 0, fmt.Errorf("%w: all %d project ids are in use", ErrLimit, ids)
}

// removeProject empties dir and takes back the limit of its project. The
// folder itself keeps the id until it goes, so that a repetition finds it.
func removeProject(dir string) error {
	id, err := disk.Project(dir)
	if errors.Is(err, disk.ErrNotSupported) || err == nil && (id < firstProject || id > lastProject) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read project id: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := disk.RemoveTree(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	// Quotas may have been switched off since: then no limit is left to take
	// back.
	if err := disk.SetProjectLimit(dir, id, 0); err != nil && !errors.Is(err, disk.ErrNotSupported) {
		return fmt.Errorf("take back the quota of project %d: %w", id, err)
	}
	return nil
}

// lockFile waits for the exclusive lock of a file, which it makes if need be.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := disk.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = disk.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err != nil {
		return nil, err
	}
	for {
		got, err := f.Lock(true)
		if got {
			return func() { _ = f.Close() }, nil
		}
		if err != nil {
			_ = f.Close()
			return nil, err
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("wait for %s: %w", path, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
