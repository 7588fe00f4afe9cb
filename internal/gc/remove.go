package gc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
)

// Options of a removal by names.
type Options struct {
	Reason string // recorded with the removal
	DryRun bool   // decide and report, change nothing
	Now    bool   // delete for good, not to be undone
}

// Result is what a removal did, or with DryRun would do.
type Result struct {
	ID         string          // of the removal in the trash; empty when nothing was moved
	References []string        // that are gone
	Versions   []digest.Digest // that are gone with their last reference
	Blobs      []store.Blob    // that nothing else needs, moved to the trash
	Bytes      int64           // sum of their sizes
	Kept       int64           // bytes of the versions that others share and that stay
	Already    bool            // an earlier call had removed them; see the trash
}

// PinnedError says that a version that was to be removed is pinned.
type PinnedError struct {
	Name string
	Pin  store.Pin
}

// Error implements error.
func (e *PinnedError) Error() string { return fmt.Sprintf("%s is %s", e.Name, e.Pin.Text()) }

// Is makes errors.Is(err, ErrPinned) and errors.Is(err, store.ErrInUse) true.
func (e *PinnedError) Is(target error) bool { return target == ErrPinned || target == store.ErrInUse }

// Hint says what to do next.
func (e *PinnedError) Hint() string { return "take the pin away first: larder unpin " + e.Name }

// Remove takes references away, and moves to the trash what only they reached.
// Names it refuses: those that match nothing (store.ErrNotFound), several
// versions (ErrAmbiguous), or a version in use or pinned (store.ErrInUse). It
// removes all or nothing.
func (c *Collector) Remove(ctx context.Context, names []reference.Reference, o Options) (Result, error) {
	finished, err := c.Recover(ctx)
	if err != nil {
		return Result{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// Most manifests are read before the lock is taken.
	if entries, err := c.Store.Index(); err == nil {
		c.known().update(entries)
	}
	var result Result
	err = c.exclusive(ctx, func(x *store.Exclusive, r roots) error {
		gone, err := selectEntries(c.Store, x.Index(), names)
		if errors.Is(err, store.ErrNotFound) {
			if r, ok := removedBefore(c.Store, finished, names); ok {
				result = r
				return nil
			}
		}
		if err != nil {
			return err
		}
		t, err := c.decide(x, r, gone)
		if err != nil {
			return err
		}
		if err := t.refuse(r); err != nil {
			return err
		}
		result = t.result()
		if o.DryRun {
			return nil
		}
		removal, err := c.carryOut(ctx, x, r, t, store.Removal{Time: c.Time(), Node: c.Node, By: "rm", Reason: o.Reason, Versions: t.removed(nil)})
		if err != nil {
			return err
		}
		result.ID = removal.ID
		if o.Now {
			_, err = x.Condemn(func(r store.Removal) bool { return r.ID == removal.ID })
			result.ID = ""
		}
		return err
	})
	if err == nil && o.Now && !o.DryRun {
		_, err = c.Store.Shred(ctx, store.Limit{})
	}
	return result, err
}

// carryOut has the store remove what was decided, and tidies up behind it.
func (c *Collector) carryOut(ctx context.Context, x *store.Exclusive, r roots, t taking, removal store.Removal) (store.Removal, error) {
	removal.References, removal.Blobs = t.entries, t.blobs
	removal, err := x.Remove(removal)
	if err != nil {
		return removal, err
	}
	if c.Views != nil {
		if err := c.Views.DropViews(ctx); err != nil {
			c.log().Warn("drop the views of what was removed", "error", err)
		}
	}
	return removal, x.Forget(c.Node, r.here)
}

// taking is what goes with some entries of index.json.
type taking struct {
	entries  []v1.Descriptor
	versions []digest.Digest         // that lose their last entry
	staying  map[digest.Digest]bool  // that keep one
	frees    map[digest.Digest]int64 // by version: bytes that go with it, after those before it
	blobs    []store.Blob
	bytes    int64
	kept     int64 // bytes of the versions that something else needs
}

// decide finds what goes with entries of the index. It refuses where what
// stays cannot be read.
func (c *Collector) decide(x *store.Exclusive, r roots, gone []v1.Descriptor) (taking, error) {
	t := taking{entries: gone, staying: map[digest.Digest]bool{}, frees: map[digest.Digest]int64{}}
	leaving := make(map[entry]bool, len(gone))
	for _, d := range gone {
		leaving[entryOf(d)] = true
	}
	for _, d := range x.Index() {
		if !leaving[entryOf(d)] {
			t.staying[d.Digest] = true
		}
	}
	going := map[digest.Digest]bool{}
	for _, d := range gone {
		if !t.staying[d.Digest] && !going[d.Digest] {
			going[d.Digest] = true
			t.versions = append(t.versions, d.Digest)
		}
	}
	g := c.known()
	g.update(x.Index())
	if err := g.unreadable(going); err != nil {
		return t, err
	}
	held, err := c.held(g, r)
	if err != nil {
		return t, err
	}
	less, seen := map[int32]int32{}, map[int32]int32{}
	for _, v := range t.versions {
		for _, n := range g.layers[v] {
			less[n]++
		}
	}
	for _, v := range t.versions {
		for _, n := range g.layers[v] {
			seen[n]++
			goes := less[n] == g.needed[n] && !held[n]
			if goes && seen[n] < less[n] || !goes && seen[n] > 1 {
				continue // it goes with the last that needs it, or is counted as kept
			}
			h := g.hashes[n].Digest()
			size, there, err := c.Store.Stat(h)
			switch {
			case err != nil && !errors.Is(err, store.ErrDamaged):
				return t, err
			case !there:
			case goes:
				t.blobs = append(t.blobs, store.Blob{Digest: h, Size: size})
				t.frees[v] += size
				t.bytes += size
			default:
				t.kept += size
			}
		}
	}
	// Manifests go first: what is half removed must not look whole.
	slices.SortFunc(t.blobs, func(a, b store.Blob) int {
		if going[a.Digest] != going[b.Digest] {
			if going[a.Digest] {
				return -1
			}
			return 1
		}
		return strings.Compare(string(a.Digest), string(b.Digest))
	})
	return t, nil
}

// held are the blobs that something else than an entry of the index needs:
// leases, and versions that are in use though no entry names them any more.
func (c *Collector) held(g *graph, r roots) (map[int32]bool, error) {
	out := map[int32]bool{}
	for d := range r.leased {
		if h, ok := store.HashOf(d); ok {
			if n, ok := g.number[h]; ok {
				out[n] = true
			}
		}
	}
	for d := range r.uses {
		if g.live[d] {
			continue
		}
		if _, there, err := c.Store.Stat(d); err != nil {
			return nil, fmt.Errorf("find what %s needs, which %s uses: %w; nothing was removed", d, r.uses[d][0].By, err)
		} else if !there {
			continue // it is gone altogether
		}
		blobs, err := links(g.src, v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: d})
		if err != nil {
			return nil, fmt.Errorf("find what %s needs, which %s uses: %w; nothing was removed", d, r.uses[d][0].By, err)
		}
		for _, b := range blobs {
			out[g.id(b.hash)] = true
		}
	}
	return out, nil
}

// refuse says no when a version in use or pinned would lose its last reference,
// or the reference that its user goes by.
func (t taking) refuse(r roots) error {
	for _, d := range t.entries {
		name := d.Annotations[v1.AnnotationRefName]
		if name == "" {
			name = string(d.Digest)
		}
		var by []usage.Use
		for _, u := range r.uses[d.Digest] {
			if !t.staying[d.Digest] || u.Reference != "" && u.Reference == d.Annotations[v1.AnnotationRefName] {
				by = append(by, u)
			}
		}
		if len(by) > 0 {
			return &InUseError{Name: name, Uses: by}
		}
		if pin, ok := r.pins[d.Digest]; ok && !t.staying[d.Digest] {
			return &PinnedError{Name: name, Pin: pin}
		}
	}
	return nil
}

func (t taking) result() Result {
	out := Result{Versions: t.versions, Blobs: t.blobs, Bytes: t.bytes, Kept: t.kept}
	for _, d := range t.entries {
		out.References = append(out.References, d.Annotations[v1.AnnotationRefName])
	}
	return out
}

// removed describes the versions that go, for the record. describe adds to
// what is known of each; it may be nil.
func (t taking) removed(describe func(*store.RemovedVersion)) []store.RemovedVersion {
	out := make([]store.RemovedVersion, 0, len(t.versions))
	for _, v := range t.versions {
		one := store.RemovedVersion{Digest: v, References: []string{}, Bytes: t.frees[v]}
		for _, d := range t.entries {
			if ref := d.Annotations[v1.AnnotationRefName]; d.Digest == v && ref != "" {
				one.References = append(one.References, ref)
			}
		}
		if len(one.References) > 0 {
			if r, err := reference.Parse(one.References[0]); err == nil {
				one.Model = r.Source()
			}
		}
		if describe != nil {
			describe(&one)
		}
		out = append(out, one)
	}
	return out
}

// entry is what tells entries of index.json apart.
type entry struct {
	digest digest.Digest
	name   string
}

func entryOf(d v1.Descriptor) entry { return entry{d.Digest, d.Annotations[v1.AnnotationRefName]} }
