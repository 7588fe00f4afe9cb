package main

import (
	"cmp"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/cleanup"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/usage"
)

// summary is an inventory added up.
type summary struct {
	logical int64 // bytes that a copy of each version would take
	stored  int64 // bytes that their distinct blobs take
	shared  int64 // of these, bytes that several versions have
	unique  int64 // and bytes that one version alone has

	used, pinned, damaged int // versions

	containers usage.Tally
	layersUsed int64 // blobs that a container has
	layerUses  int64 // containers, added up over these blobs
	gpus       []string
	pulls      int

	models []modelSummary // the largest first
}

// modelSummary is one model.
type modelSummary struct {
	name       string
	versions   int
	bytes      int64 // of its distinct blobs
	uses       int
	containers usage.Tally
}

// summaries keeps the summary of the last inventory.
type summaries struct {
	mu  sync.Mutex
	of  *gc.Inventory
	sum summary
}

func (s *summaries) get(inv *gc.Inventory) summary {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of != inv {
		s.of, s.sum = inv, summarize(inv)
	}
	return s.sum
}

func summarize(inv *gc.Inventory) summary {
	var s summary
	for _, b := range inv.Blobs {
		switch {
		case b.Versions == 0 || !b.There:
			continue
		case b.Versions > 1:
			s.shared += b.Size
		default:
			s.unique += b.Size
		}
		s.stored += b.Size
	}
	var uses []usage.Use
	models := map[string]*modelSummary{}
	blobs := map[string]map[int32]bool{} // of a model of several versions
	for i := range inv.Versions {
		v := &inv.Versions[i]
		s.logical += v.Size
		uses = append(uses, v.Uses...)
		if len(v.Uses) > 0 {
			s.used++
		}
		if v.Pin != nil {
			s.pinned++
		}
		if v.Damaged != "" {
			s.damaged++
		}
		name := cleanup.ModelOf(v.References, v.Digest)
		m := models[name]
		if m == nil {
			m = &modelSummary{name: name}
			models[name], blobs[name] = m, map[int32]bool{}
		}
		m.versions++
		m.uses += len(v.Uses)
		for _, b := range v.Layers {
			if !blobs[name][b] {
				blobs[name][b] = true
				m.bytes += inv.Blobs[b].Size
			}
		}
	}
	s.count(inv, uses, models)
	for _, l := range inv.Leases {
		if l.Purpose == "pull" {
			s.pulls++
		}
	}
	for _, m := range models {
		s.models = append(s.models, *m)
	}
	slices.SortFunc(s.models, func(a, b modelSummary) int {
		return cmp.Or(cmp.Compare(b.bytes, a.bytes), cmp.Compare(a.name, b.name))
	})
	return s
}

// count counts containers: in all, by model, and by blob.
func (s *summary) count(inv *gc.Inventory, uses []usage.Use, models map[string]*modelSummary) {
	users := usage.Users(uses)
	blobs := usage.Count(users, func(d digest.Digest) []int32 {
		if v, ok := inv.Version(d); ok {
			return v.Layers
		}
		return nil
	})
	s.layersUsed = int64(len(blobs.Layers))
	for _, t := range blobs.Layers {
		s.layerUses += int64(t.Running + t.Stopped)
	}
	byModel := usage.Count(users, func(d digest.Digest) []string {
		if v, ok := inv.Version(d); ok {
			return []string{cleanup.ModelOf(v.References, d)}
		}
		return nil
	})
	for name, t := range byModel.Layers {
		models[name].containers = t
	}
	for _, u := range users {
		switch {
		case u.ID == "": // a process in none
		case u.Running:
			s.containers.Running++
		default:
			s.containers.Stopped++
		}
		for _, g := range u.GPUs {
			if !slices.Contains(s.gpus, g) {
				s.gpus = append(s.gpus, g)
			}
		}
	}
	slices.Sort(s.gpus)
}
