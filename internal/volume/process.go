package volume

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/mounttable"
	"github.com/larder-project/larder/internal/overlay"
)

// VersionsOfProcess gives the versions that a process works with, sorted. A
// process in another mount namespace, as one in a container, has to do with all
// that is mounted there; one in ours with the mounts in which it holds
// something open. A process that has ended works with none.
func (m *Manager) VersionsOfProcess(pid int) ([]digest.Digest, error) {
	views, err := m.viewsOfProcess(pid)
	if mounttable.Gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find what process %d works with: %w", pid, err)
	}
	found := map[digest.Digest]bool{}
	for dir := range views {
		versions, err := readViewRecord(dir + recordSuffix)
		if err != nil {
			return nil, err
		}
		for _, d := range versions {
			found[d] = true
		}
	}
	return slices.Sorted(maps.Keys(found)), nil
}

func (m *Manager) viewsOfProcess(pid int) (map[string]bool, error) {
	dir := filepath.Join(mounttable.Proc, strconv.Itoa(pid))
	own, err := os.Readlink(filepath.Join(mounttable.Proc, "thread-self/ns/mnt"))
	if err != nil {
		return nil, err
	}
	theirs, err := os.Readlink(filepath.Join(dir, "ns/mnt"))
	if err != nil {
		return nil, err
	}
	mounts, err := m.viewMounts(filepath.Join(dir, "mountinfo"))
	if err != nil {
		return nil, err
	}
	if len(mounts) > 0 && theirs == own {
		held, err := overlay.MountsHeld(pid)
		switch {
		case errors.Is(err, errors.ErrUnsupported): // then it may be any of them
		case err != nil:
			return nil, err
		default:
			maps.DeleteFunc(mounts, func(id int, _ string) bool { return !held[id] })
		}
	}
	views := map[string]bool{}
	for _, view := range mounts {
		views[view] = true
	}
	return views, nil
}

// viewMounts gives the folders of the views that a mount table shows, by the
// numbers of their mounts.
func (m *Manager) viewMounts(table string) (map[int]string, error) {
	f, err := os.Open(table)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := map[int]string{}
	_, err = mountinfo.GetMountsFromReader(f, func(i *mountinfo.Info) (skip, stop bool) {
		if i.FSType == "overlay" {
			dir, _ := overlayFolders(i.VFSOptions)
			if view, _, ours := m.ourView(dir); ours {
				out[i.ID] = filepath.Join(m.state, view)
			}
		}
		return true, false
	})
	return out, err
}
