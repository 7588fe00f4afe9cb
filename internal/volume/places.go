package volume

import (
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/usage"
)

// Places reads the records of all mounts once, for a source that asks of many
// paths. What it gives is not for concurrent use.
func (m *Manager) Places() (usage.Places, error) {
	mounted, err := m.allMounts()
	if err != nil {
		return nil, err
	}
	p := &places{m: m, byVolume: map[string][]digest.Digest{}, byTarget: map[string][]digest.Digest{}, asked: map[string][]digest.Digest{}}
	for _, mr := range mounted {
		p.byVolume[mr.Volume] = append(p.byVolume[mr.Volume], mr.Versions...)
		p.byTarget[mr.Target] = append(p.byTarget[mr.Target], mr.Versions...)
	}
	return p, nil
}

type places struct {
	m        *Manager
	byVolume map[string][]digest.Digest // versions of its mounts
	byTarget map[string][]digest.Digest
	asked    map[string][]digest.Digest // answers of OfVolume
}

// OfVolume implements usage.Places: the versions that a volume is bound to or
// means now, and those of its mounts.
func (p *places) OfVolume(name string) ([]digest.Digest, bool, error) {
	if CheckName(name) != nil {
		return nil, false, nil
	}
	out, ok := p.asked[name]
	if !ok {
		uses, err := p.m.usesOf(name)
		if err != nil {
			return nil, false, err
		}
		for _, u := range uses {
			out = append(out, u.Version)
		}
		out = append(out, p.byVolume[name]...)
		p.asked[name] = out
	}
	return out, len(out) > 0, nil
}

// AtPath implements usage.Places: the versions of the mounts at a folder or
// around it. The path is taken as it is, with no link followed.
func (p *places) AtPath(path string) ([]digest.Digest, bool, error) {
	var out []digest.Digest
	for path = filepath.Clean(path); ; path = filepath.Dir(path) {
		out = append(out, p.byTarget[path]...)
		if path == filepath.Dir(path) {
			return out, len(out) > 0, nil
		}
	}
}
