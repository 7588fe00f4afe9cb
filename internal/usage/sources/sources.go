// Package sources puts together all that knows what is in use on a node, as the
// settings have it: this node's records and mount tables first, then Docker,
// containerd, the kubelet and GPUs.
//
// A source that is asked where it is there (auto) is remembered once it has
// been seen. From then on its absence means that it is stopped, not that it
// uses nothing: an engine whose socket is gone for an upgrade still has its
// stopped containers. Only a person can tell that it was taken off the node.
package sources

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/containerd"
	"github.com/larder-project/larder/internal/usage/csi"
	"github.com/larder-project/larder/internal/usage/docker"
	"github.com/larder-project/larder/internal/usage/gpu"
	"github.com/larder-project/larder/internal/volume"
)

// Set is the sources of a node.
type Set struct {
	own   []usage.Source
	asked []*asked
}

// Of gives the sources of the node whose volumes m has.
func Of(c config.Config, m *volume.Manager) *Set {
	seen := memory{dir: m.State()}
	helper := cmp.Or(c.GPUHelper, gpu.Helper)
	gpus := gpu.New(c.GPUHelper, m.VersionsOfProcess)
	return &Set{own: m.Sources(), asked: []*asked{
		{name: "docker", mode: c.UsageDocker, wanted: []string{c.DockerHost}, seen: seen,
			open: func(host string) usage.Source { return docker.New(host, c.DockerDrivers, m.Places) }},
		{name: "containerd", mode: c.UsageContainerd, wanted: c.Containerd, seen: seen,
			open: func(address string) usage.Source { return containerd.New(address, m.Places) }},
		{name: "csi", mode: c.UsageCSI, wanted: []string{c.Kubelet}, seen: seen,
			open: func(kubelet string) usage.Source { return csi.New(kubelet, m.Places) }},
		{name: "gpu", mode: c.UsageGPU, wanted: []string{helper}, seen: seen,
			open: func(string) usage.Source { return gpus }},
	}}
}

// Sources lists the sources to be asked before anything is removed.
func (s *Set) Sources() []usage.Source {
	out := slices.Clone(s.own)
	for _, a := range s.asked {
		if a.mode != config.Off {
			out = append(out, a)
		}
	}
	return out
}

// Watch calls changed, one call at a time, when containers may have begun or
// ended a use, until the context ends.
func (s *Set) Watch(ctx context.Context, changed func()) {
	var watching sync.WaitGroup
	var calling sync.Mutex
	one := func() {
		calling.Lock()
		defer calling.Unlock()
		if ctx.Err() == nil {
			changed()
		}
	}
	for _, a := range s.asked {
		if a.mode == config.Off {
			continue
		}
		for _, address := range a.wanted {
			if w, ok := a.open(address).(watcher); ok {
				watching.Go(func() { w.Watch(ctx, one) })
			}
		}
	}
	watching.Wait()
}

// watcher is a source that is told of events.
type watcher interface {
	Watch(ctx context.Context, changed func())
}

// State is how one source does.
type State string

// The states.
const (
	Answers State = "on"
	Failing State = "failing"
	Absent  State = "absent" // asked as soon as it is there
	Off     State = "off"
)

// Status is one source, as a person wants to know of it.
type Status struct {
	Source string
	State  State
	Uses   int
	At     []string // where it answers
	Err    error    // why it is failing
}

// Status asks every source.
func (s *Set) Status(ctx context.Context) []Status {
	out := make([]Status, len(s.own)+len(s.asked))
	var asking sync.WaitGroup
	for i, source := range s.own {
		asking.Go(func() {
			uses, err := source.Uses(ctx)
			out[i] = Status{Source: source.Name(), State: Answers, Uses: len(uses), Err: err}
			if err != nil {
				out[i].State = Failing
			}
		})
	}
	for i, a := range s.asked {
		asking.Go(func() { out[len(s.own)+i] = a.status(ctx) })
	}
	asking.Wait()
	return out
}

// asked is one kind of source, at all the places where it may be.
type asked struct {
	name   string
	mode   config.Mode
	wanted []string // where the settings say that it is
	seen   memory
	open   func(address string) usage.Source
}

// Name implements usage.Source.
func (a *asked) Name() string { return a.name }

// Uses implements usage.Source.
func (a *asked) Uses(ctx context.Context) ([]usage.Use, error) {
	uses, _, err := a.ask(ctx)
	return uses, err
}

func (a *asked) status(ctx context.Context) Status {
	s := Status{Source: a.name, State: Off}
	if a.mode == config.Off {
		return s
	}
	uses, at, err := a.ask(ctx)
	s.Uses, s.At, s.Err = len(uses), at, err
	switch {
	case err != nil:
		s.State = Failing
	case len(at) > 0:
		s.State = Answers
	default:
		s.State = Absent
	}
	return s
}

// ask asks at every place; at are those where something answered.
func (a *asked) ask(ctx context.Context) (uses []usage.Use, at []string, err error) {
	if a.mode == config.On {
		for _, address := range a.wanted {
			found, err := a.open(address).Uses(ctx)
			if err != nil {
				return nil, at, err
			}
			uses, at = append(uses, found...), append(at, address)
		}
		return uses, at, nil
	}
	known, err := a.seen.of(a.name)
	if err != nil {
		return nil, nil, err
	}
	addresses := slices.Clone(a.wanted)
	for _, s := range known {
		if !slices.Contains(addresses, s.Address) {
			addresses = append(addresses, s.Address)
		}
	}
	for _, address := range addresses {
		found, err := a.open(address).Uses(ctx)
		before := slices.IndexFunc(known, func(s sight) bool { return s.Address == address })
		absent := errors.Is(err, usage.ErrAbsent)
		switch {
		case absent && before >= 0:
			return nil, at, &GoneError{known[before]}
		case absent:
			continue
		case before < 0 && !elsewhere(address):
			// Remembered before it is believed, and also where it fails.
			if e := a.seen.add(a.name, address); e != nil {
				return nil, at, errors.Join(e, err)
			}
		}
		if err != nil {
			return nil, at, err
		}
		uses, at = append(uses, found...), append(at, address)
	}
	return uses, at, nil
}

// elsewhere tells that an address may lead to another host. Whatever is there
// was never seen on this node; it is asked as long as the settings name it.
func elsewhere(address string) bool {
	scheme, _, ok := strings.Cut(address, "://")
	return ok && scheme != "unix"
}

// GoneError says that a source was seen on this node and is not there now.
type GoneError struct{ sight }

// Error implements error.
func (e *GoneError) Error() string {
	return fmt.Sprintf("it was seen at %s on %s and is gone; if it was uninstalled, set usage.%s: off", e.Address, e.Time.Local().Format("2006-01-02"), e.Source)
}

// Hint says what to do next.
func (e *GoneError) Hint() string {
	return fmt.Sprintf("start it again; LARDER_USAGE_%s=off leaves it out; if it only moved, delete %s", strings.ToUpper(e.Source), e.path)
}
