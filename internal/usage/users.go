package usage

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
)

// User is one container, or one process in none, with all that it uses.
type User struct {
	Container                 // zero for a process in none
	Running   bool            // it has processes: running, paused, or between two runs
	Versions  []digest.Digest // sorted
	PIDs      []int           // processes that are known to show them, sorted
	GPUs      []string        // as Use.GPU, sorted
}

// Label is how a person knows the user.
func (u User) Label() string {
	if u.ID == "" {
		return fmt.Sprintf("process %d", u.PIDs[0])
	}
	return u.Container.Label()
}

// Users puts together what several sources found of each container and each
// process, in the order of their labels. Uses by neither, such as volumes, are
// left out.
//
// Mount tables know the containers of an engine by a process alone where its
// cgroups have no ID; the engine's own word for that process tells which
// container it is.
func Users(uses []Use) []User {
	known := map[int]Container{}
	for _, u := range uses {
		if u.PID != 0 && u.Container.ID != "" && u.Container.Engine != "" {
			known[u.PID] = u.Container
		}
	}
	users := map[string]*User{}
	for _, u := range uses {
		c := u.Container
		if c.ID == "" {
			c = known[u.PID]
		}
		key := c.key()
		switch {
		case c.ID == "" && u.PID == 0:
			continue
		case c.ID == "":
			key = fmt.Sprintf("process %d", u.PID)
		}
		if users[key] == nil {
			users[key] = &User{}
		}
		users[key].add(c, u)
	}
	out := make([]User, 0, len(users))
	for _, u := range users {
		slices.Sort(u.Versions)
		slices.Sort(u.PIDs)
		slices.Sort(u.GPUs)
		out = append(out, *u)
	}
	slices.SortFunc(out, func(a, b User) int {
		return cmp.Or(cmp.Compare(a.Label(), b.Label()), cmp.Compare(a.ID, b.ID))
	})
	return out
}

func (u *User) add(c Container, use Use) {
	// Docker's containers are containerd's too; Docker has their names.
	if u.ID == "" || u.Engine == "" && c.Engine != "" || u.Name == "" && c.Name != "" {
		u.Container = c
	}
	u.Running = u.Running || use.PID != 0 || c.running()
	if !slices.Contains(u.Versions, use.Version) {
		u.Versions = append(u.Versions, use.Version)
	}
	if use.PID != 0 && !slices.Contains(u.PIDs, use.PID) {
		u.PIDs = append(u.PIDs, use.PID)
	}
	if use.GPU != "" && !slices.Contains(u.GPUs, use.GPU) {
		u.GPUs = append(u.GPUs, use.GPU)
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

func (t Tally) with(u User) Tally {
	if u.Running {
		t.Running++
	} else {
		t.Stopped++
	}
	return t
}

// Counts tells how many containers use each version and each layer. What none
// uses is not in the maps.
type Counts[Layer comparable] struct {
	Versions map[digest.Digest]Tally
	Layers   map[Layer]Tally
}

// Count counts the containers of versions and, through these, of their layers:
// a container counts once for a layer, whichever of its versions have it.
// Processes in no container do not count.
func Count[Layer comparable](users []User, layers func(version digest.Digest) []Layer) Counts[Layer] {
	c := Counts[Layer]{Versions: map[digest.Digest]Tally{}, Layers: map[Layer]Tally{}}
	of := map[digest.Digest][]Layer{}
	for _, u := range users {
		if u.ID == "" {
			continue
		}
		mine := map[Layer]bool{}
		for _, v := range u.Versions {
			if _, ok := of[v]; !ok {
				of[v] = layers(v)
			}
			c.Versions[v] = c.Versions[v].with(u)
			for _, l := range of[v] {
				mine[l] = true
			}
		}
		for l := range mine {
			c.Layers[l] = c.Layers[l].with(u)
		}
	}
	return c
}
