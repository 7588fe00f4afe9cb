package usage

import (
	"cmp"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Held is one container with all that it uses.
type Held struct {
	Container
	Running  bool            // it has processes: running, paused, or between two runs
	Versions []digest.Digest // sorted
	PIDs     []int           // processes that are known to show them, sorted
	GPUs     []string        // as Use.GPU, sorted
}

// ByContainer puts together what several sources found of each container, in
// the order of their labels. Uses by others than containers are left out.
//
// Mount tables know the containers of an engine by a process alone where its
// cgroups have no ID; the engine's own word for that process tells which
// container it is.
func ByContainer(uses []Use) []Held {
	known := map[int]Container{}
	for _, u := range uses {
		if u.PID != 0 && u.Container.Engine != "" {
			known[u.PID] = u.Container
		}
	}
	held := map[string]*Held{}
	for _, u := range uses {
		c := u.Container
		if c.ID == "" {
			c = known[u.PID]
		}
		if c.ID == "" {
			continue
		}
		h := held[c.key()]
		if h == nil {
			h = &Held{}
			held[c.key()] = h
		}
		h.add(c, u)
	}
	out := make([]Held, 0, len(held))
	for _, h := range held {
		slices.Sort(h.Versions)
		slices.Sort(h.PIDs)
		slices.Sort(h.GPUs)
		out = append(out, *h)
	}
	slices.SortFunc(out, func(a, b Held) int {
		return cmp.Or(cmp.Compare(a.Label(), b.Label()), cmp.Compare(a.ID, b.ID))
	})
	return out
}

func (h *Held) add(c Container, u Use) {
	// Docker's containers are containerd's too; Docker has their names.
	if h.ID == "" || h.Engine == "" && c.Engine != "" || h.Name == "" && c.Name != "" {
		h.Container = c
	}
	h.Running = h.Running || u.PID != 0 || c.running()
	if !slices.Contains(h.Versions, u.Version) {
		h.Versions = append(h.Versions, u.Version)
	}
	if u.PID != 0 && !slices.Contains(h.PIDs, u.PID) {
		h.PIDs = append(h.PIDs, u.PID)
	}
	if u.GPU != "" && !slices.Contains(h.GPUs, u.GPU) {
		h.GPUs = append(h.GPUs, u.GPU)
	}
}

// key is the same for all that sources say of one container. IDs of engines
// that make them up are unique; those that a person chose are unique in their
// namespace.
func (c Container) key() string {
	if len(c.ID) == 64 || c.Namespace == "" {
		return c.ID
	}
	return c.Namespace + "/" + c.ID
}

func (c Container) running() bool {
	switch c.State {
	case "running", "paused", "pausing", "restarting":
		return true
	}
	return false
}

// Tally counts containers.
type Tally struct {
	Running int
	Stopped int // created, exited, dead: they can be started again
}

func (t *Tally) count(h Held) {
	if h.Running {
		t.Running++
	} else {
		t.Stopped++
	}
}

// Counts tells how many containers use each version and each layer. What none
// uses is not in the maps.
type Counts[Layer comparable] struct {
	Versions map[digest.Digest]Tally
	Layers   map[Layer]Tally
}

// Count counts the containers of versions and, through these, of their layers:
// a container counts once for a layer, whichever of its versions have it.
func Count[Layer comparable](held []Held, layers func(version digest.Digest) []Layer) Counts[Layer] {
	c := Counts[Layer]{Versions: map[digest.Digest]Tally{}, Layers: map[Layer]Tally{}}
	of := map[digest.Digest][]Layer{}
	for _, h := range held {
		mine := map[Layer]bool{}
		for _, v := range h.Versions {
			if _, ok := of[v]; !ok {
				of[v] = layers(v)
			}
			t := c.Versions[v]
			t.count(h)
			c.Versions[v] = t
			for _, l := range of[v] {
				mine[l] = true
			}
		}
		for l := range mine {
			t := c.Layers[l]
			t.count(h)
			c.Layers[l] = t
		}
	}
	return c
}
