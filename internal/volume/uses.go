package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
)

// Sources are the uses that this node's records and the kernel know of. They
// are there on every node, whatever engines run on it.
func (m *Manager) Sources() []usage.Source { return []usage.Source{records{m}, mounts{m}} }

// records are the versions of volumes, and of mounts that have a record.
type records struct{ m *Manager }

func (records) Name() string { return "volumes" }

func (r records) Uses(context.Context) ([]usage.Use, error) {
	names, err := r.m.names(recordSuffix)
	if err != nil {
		return nil, err
	}
	var out []usage.Use
	for _, name := range names {
		uses, err := r.m.usesOf(name)
		if err != nil {
			return nil, err
		}
		out = append(out, uses...)
	}
	mounted, err := r.m.allMounts()
	if err != nil {
		return nil, err
	}
	aside, err := r.m.asideUses()
	if err != nil {
		return nil, err
	}
	out = append(out, aside...)
	for _, mr := range mounted {
		for _, d := range mr.Versions {
			out = append(out, usage.Use{Version: d, By: fmt.Sprintf("a mount of volume %s at %s", mr.Volume, mr.Target)})
		}
	}
	return out, nil
}

// allMounts reads every mount record of this boot. With the error, it gives
// those that can be read.
func (m *Manager) allMounts() ([]mountRecord, error) {
	names, err := m.mountedNames(m.boot)
	if err != nil {
		return nil, err
	}
	var out []mountRecord
	var damaged error
	for _, name := range names {
		some, err := m.readMounts(name)
		out = append(out, some...)
		damaged = errors.Join(damaged, err)
	}
	return out, damaged
}

func (m *Manager) usesOf(name string) ([]usage.Use, error) {
	r, err := m.readRecord(name)
	if errors.Is(err, ErrNotFound) {
		return nil, nil // removed just now
	}
	if err != nil {
		return nil, err
	}
	o, err := ParseOptions(name, r.Options)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", name, err)
	}
	by := "volume " + name
	var out []usage.Use
	for _, d := range r.Pinned {
		out = append(out, usage.Use{Version: d, By: by})
	}
	if o.Catalog || len(r.Pinned) > 0 {
		return out, nil // a catalog shows what is there, it keeps nothing
	}
	for i, ref := range o.Models {
		v, err := m.store.Resolve(ref)
		if errors.Is(err, store.ErrNotFound) {
			continue // what is not there cannot be kept
		}
		if err != nil {
			return nil, err
		}
		use := usage.Use{Version: v.Digest, By: by, Reference: ref.String()}
		if ref.Kind == reference.Short && !ref.Fixed() {
			use.Reference = nameOf(v, o, i)
		}
		out = append(out, use)
	}
	return out, nil
}

// mounts are the versions of every view that the kernel shows in any mount
// namespace, record or not.
type mounts struct{ m *Manager }

func (mounts) Name() string { return "mounts" }

func (s mounts) Uses(ctx context.Context) ([]usage.Use, error) {
	if blind := s.m.Blind(); blind != "" {
		return nil, errors.New(blind + "; " + BlindHint)
	}
	use, err := s.m.scanKernel(ctx)
	if err != nil {
		return nil, err
	}
	var out []usage.Use
	containers := map[int]string{} // by process: one may show many views
	for view, holders := range use.views {
		versions, err := readViewRecord(filepath.Join(s.m.state, view) + recordSuffix)
		if errors.Is(err, fs.ErrNotExist) && !slices.ContainsFunc(holders, func(h Holder) bool { return !h.doubtful }) {
			continue // a made-up mount of a view that never was
		}
		if err != nil {
			return nil, err
		}
		for _, h := range holders {
			u := usage.Use{By: "a mount on this host at " + h.Mountpoint}
			if !h.own {
				u.By, u.PID = fmt.Sprintf("process %d, which shows it at %s", h.PID, h.Mountpoint), h.PID
				id, known := containers[h.PID]
				if !known {
					id = usage.ContainerID(h.PID)
					containers[h.PID] = id
				}
				u.Container.ID = id
			}
			for _, d := range versions {
				u.Version = d
				out = append(out, u)
			}
		}
	}
	return out, nil
}

func readViewRecord(path string) ([]digest.Digest, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &damagedError{
			text: "a view is mounted, and its record, which says of what versions, cannot be read", err: err,
			hint: "restart larder-plugin and start any container on the view's volume: its mount writes the record anew",
		}
	}
	if err != nil {
		return nil, fmt.Errorf("read view record: %w", err)
	}
	var r viewRecord
	if err := decodeStrict(data, &r); err != nil {
		return nil, &damagedError{
			text: "the record " + path + " of a view that is mounted cannot be read", err: err,
			hint: "restart larder-plugin and start any container on the view's volume: its mount writes the record anew",
		}
	}
	return r.Versions, nil
}
