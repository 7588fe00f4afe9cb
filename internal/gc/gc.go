// Package gc removes versions of models and the blobs that nothing else needs.
//
// It gathers roots (package usage, leases, pins, other nodes), marks what they
// reach, and has the store carry removals out; which versions are to go it is
// told, by a person (Remove) or by a plan (Execute, made by package retention).
//
// Every removal is decided under the store's exclusive lock, from roots that
// are gathered again under that lock, whatever was found before. A root that
// cannot be read means that nothing is removed.
//
// # What holds after a crash
//
// See package store: a removal that was cut short is finished or cancelled by
// Recover, which every call here begins with; an emptying of the trash is gone
// on with by the next.
package gc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
)

// ErrAmbiguous is returned for a name that could mean several versions.
var ErrAmbiguous = errors.New("the name means several versions")

// ErrPinned is returned for a version that is pinned. It is a store.ErrInUse.
var ErrPinned = fmt.Errorf("pinned: %w", store.ErrInUse)

// InUseError says who uses a version that was to be removed.
type InUseError struct {
	Name string // what was to be removed
	Uses []usage.Use
}

// Error implements error.
func (e *InUseError) Error() string {
	return fmt.Sprintf("%s is in use by %s", e.Name, strings.Join(users(e.Uses), ", "))
}

// Is makes errors.Is(err, store.ErrInUse) true.
func (e *InUseError) Is(target error) bool { return target == store.ErrInUse }

// Hint says what to do next.
func (e *InUseError) Hint() string {
	return "stop the containers and remove the volumes that use it first; larder why tells each of them"
}

// users names who uses a version, each once.
func users(uses []usage.Use) []string {
	var by []string
	for _, u := range uses {
		if !slices.Contains(by, u.By) {
			by = append(by, u.By)
		}
	}
	return by
}

// Views are the views of versions on this node (package volume). They are
// dropped with the versions they show.
type Views interface {
	// DropViews deletes views that nothing shows. It is called while the
	// store's lock is held exclusively.
	DropViews(ctx context.Context) error
}

// Collector removes from one store, for one node. It may be kept: it remembers
// what manifests say. Its methods may be called side by side; what they decide
// is decided under the store's lock.
type Collector struct {
	Store   *store.Store
	Node    string           // name of this node
	Sources []usage.Source   // of uses on this node
	Views   Views            // nil: this node has none
	Now     func() time.Time // nil: time.Now
	Log     *slog.Logger     // nil: none

	mu    sync.Mutex // guards graph, and is taken before the store's lock
	graph *graph
}

// Time is the collector's own.
func (c *Collector) Time() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

func (c *Collector) log() *slog.Logger {
	if c.Log != nil {
		return c.Log
	}
	return slog.New(slog.DiscardHandler)
}

// known is the graph, which the caller has locked by c.mu.
func (c *Collector) known() *graph {
	if c.graph == nil {
		c.graph = newGraph(c.Store)
	}
	return c.graph
}

// How long sources may take: before anything is locked, and while the store is
// and mounts wait.
const (
	askTime    = 20 * time.Second
	lockedTime = 5 * time.Second
)

// roots are all reasons for versions and blobs to stay, gathered at one moment.
type roots struct {
	uses   map[digest.Digest][]usage.Use // other nodes' among them
	here   map[digest.Digest]bool        // versions that this node uses
	pins   map[digest.Digest]store.Pin
	leased map[digest.Digest]string // digests that running pulls rely on
	leases []store.LiveLease
}

// ask asks the sources, and nothing that is the store's own.
func (c *Collector) ask(ctx context.Context, limit time.Duration) (r roots, failed []*usage.Error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r = roots{uses: map[digest.Digest][]usage.Use{}, here: map[digest.Digest]bool{}}
	uses, failed := usage.Gather(ctx, c.Sources)
	for _, u := range uses {
		r.uses[u.Version] = append(r.uses[u.Version], u)
		r.here[u.Version] = true
	}
	return r, failed
}

// fromStore adds what the store itself knows: other nodes, pins, leases.
func (r *roots) fromStore(c *Collector, x *store.Exclusive) error {
	nodes, err := c.Store.Users()
	if err != nil {
		return err
	}
	for version, names := range nodes {
		for _, name := range names {
			if name != c.Node {
				r.uses[version] = append(r.uses[version], usage.Use{Version: version, Source: otherNodes, By: "node " + name})
			}
		}
	}
	if r.pins, err = c.Store.Pins(); err != nil {
		return err
	}
	if r.leases, err = x.Leases(); err != nil {
		return err
	}
	r.leased, err = x.Leased()
	return err
}

// otherNodes is the source of uses that other nodes of a shared store have
// recorded in it.
const otherNodes = "nodes"

// certain gathers all roots while the store is locked, so that none can come
// that is not seen. A source that fails is an error.
func (c *Collector) certain(ctx context.Context, x *store.Exclusive) (roots, error) {
	r, failed := c.ask(ctx, lockedTime)
	if len(failed) > 0 {
		return r, fmt.Errorf("%w; nothing was removed", failed[0])
	}
	if err := r.fromStore(c, x); err != nil {
		return r, fmt.Errorf("%w; nothing was removed", err)
	}
	return r, nil
}

// exclusive runs f with all roots and the store locked. The sources are asked
// once before: one that fails, or that takes its time, is then known before any
// mount has to wait for it.
func (c *Collector) exclusive(ctx context.Context, f func(*store.Exclusive, roots) error) error {
	if _, failed := c.ask(ctx, askTime); len(failed) > 0 {
		return fmt.Errorf("%w; nothing was removed", failed[0])
	}
	return c.Store.Exclusive(ctx, func(x *store.Exclusive) error {
		r, err := c.certain(ctx, x)
		if err != nil {
			return err
		}
		return f(x, r)
	})
}
