package gc

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
)

// Inventory is what a store holds and who uses it, at one moment.
type Inventory struct {
	Time     time.Time
	Versions []VersionInfo // newest first
	Blobs    []BlobInfo
	Partials []store.Partial // in ingest/, left by pulls that broke off
	Usage    store.Usage     // of blobs, their lengths instead of what they take
	Trash    []store.Removal
	Leases   []store.LiveLease // of pulls and imports under way

	// Failed are the sources that could not tell their uses. Where there are
	// any, what seems unused may be used.
	Failed []*usage.Error

	byDigest map[digest.Digest]int // of Versions
}

// VersionInfo is one version with its uses.
type VersionInfo struct {
	store.Version
	Layers   []int32   // its distinct blobs, the manifest first: indices into Inventory.Blobs
	Size     int64     // bytes of its distinct blobs
	Unique   int64     // of these, bytes of blobs that nothing else needs
	LastUsed time.Time // zero: never known to be used
	Pulled   time.Time // when it was last asked for again; zero: never
	Pin      *store.Pin
	Uses     []usage.Use
	Damaged  string // why its manifest cannot be read; empty as a rule
}

// BlobInfo is one blob.
type BlobInfo struct {
	Hash     store.Hash
	Size     int64     // bytes; 0 for one that is not there
	Since    time.Time // when it came; zero for one that a version needs
	Versions int32     // how many versions need it
	Held     string    // what else needs it: a lease, an entry of another tool
	There    bool      // it is in the store; else a version lacks it
	Undo     bool      // a removal in the trash needs it to be undone
}

// Version finds a version of the inventory.
func (inv *Inventory) Version(d digest.Digest) (*VersionInfo, bool) {
	i, ok := inv.byDigest[d]
	if !ok {
		return nil, false
	}
	return &inv.Versions[i], true
}

// Look takes the inventory. Sources that fail are in it; what of the store
// itself cannot be read is an error.
func (c *Collector) Look(ctx context.Context) (*Inventory, error) {
	inv, err := c.look(ctx)
	if err != nil {
		return nil, fmt.Errorf("take inventory: %w", err)
	}
	return inv, nil
}

func (c *Collector) look(ctx context.Context) (*Inventory, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Most manifests are read before the lock is taken.
	if entries, err := c.Store.Index(); err == nil {
		c.known().update(entries)
	}
	inv := &Inventory{Time: c.Time(), byDigest: map[digest.Digest]int{}}
	r, failed := c.ask(ctx, askTime)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var entries []v1.Descriptor
	g := c.known()
	err := c.Store.Exclusive(ctx, func(x *store.Exclusive) (err error) {
		entries = x.Index()
		g.update(entries)
		return r.fromStore(c, x)
	})
	if err != nil {
		return nil, err
	}
	inv.Failed, inv.Leases = failed, r.leases
	seen, err := c.seen()
	if err != nil {
		return nil, err
	}
	if inv.Trash, err = c.Store.Trash(); err != nil {
		return nil, err
	}
	if inv.Partials, err = c.Store.Partials(); err != nil {
		return nil, err
	}
	if inv.Usage, err = c.Store.UsageBesideBlobs(); err != nil {
		return nil, err
	}
	if err := inv.blobs(c.Store, g, r); err != nil {
		return nil, err
	}
	return inv, inv.versions(c.Store, g, entries, r, seen)
}

// blobs lists what the graph knows and what lies in the store besides.
func (inv *Inventory) blobs(st *store.Store, g *graph, r roots) error {
	inv.Blobs = make([]BlobInfo, len(g.hashes))
	for n, h := range g.hashes {
		inv.Blobs[n].Hash = h
	}
	err := st.Blobs(func(h store.Hash, stat func() (store.BlobStat, bool, error)) error {
		n := g.id(h)
		if int(n) == len(inv.Blobs) {
			inv.Blobs = append(inv.Blobs, BlobInfo{Hash: h})
		}
		b := &inv.Blobs[n]
		// A blob that a manifest describes is what that says; of the others the
		// file system is asked.
		if g.needed[n] > 0 && g.sizes[n] >= 0 {
			b.Size, b.There = g.sizes[n], true
		} else {
			st, there, err := stat()
			if err != nil || !there {
				return err
			}
			b.Size, b.Since, b.There = st.Size, st.Since, true
		}
		inv.Usage.Blobs += b.Size
		inv.Usage.Files++
		return nil
	})
	if err != nil {
		return err
	}
	undo, err := st.Undoable()
	if err != nil {
		return err
	}
	for d := range undo {
		if h, ok := store.HashOf(d); ok {
			if n, ok := g.number[h]; ok {
				inv.Blobs[n].Undo = true
			}
		}
	}
	for d, lease := range r.leased {
		if h, ok := store.HashOf(d); ok {
			if n, ok := g.number[h]; ok {
				inv.Blobs[n].Held = "lease " + lease
			}
		}
	}
	return nil
}

// versions lists the versions among entries of index.json, with what g knows of
// their layers and the roots that hold them.
func (inv *Inventory) versions(st *store.Store, g *graph, entries []v1.Descriptor, r roots, seen seen) error {
	versions, err := st.Versions()
	if err != nil {
		return err
	}
	listed := make(map[digest.Digest]bool, len(entries))
	for _, d := range entries {
		listed[d.Digest] = true
	}
	for _, v := range versions {
		if !listed[v.Digest] {
			continue // came after the lock was given back
		}
		delete(listed, v.Digest)
		info := VersionInfo{Version: v, Layers: g.layers[v.Digest], LastUsed: seen.used[v.Digest], Pulled: seen.pulled[v.Digest], Uses: r.uses[v.Digest]}
		if p, ok := r.pins[v.Digest]; ok {
			info.Pin = &p
		}
		if err := g.broken[v.Digest]; err != nil {
			info.Damaged = err.Error()
		}
		if len(info.Uses) > 0 {
			info.LastUsed = inv.Time
		}
		inv.byDigest[v.Digest] = len(inv.Versions)
		inv.Versions = append(inv.Versions, info)
		for _, n := range info.Layers {
			inv.Blobs[n].Versions++
		}
	}
	for d := range listed { // entries of other tools
		for _, n := range g.layers[d] {
			inv.Blobs[n].Held = "an entry of another tool in index.json"
		}
	}
	for i := range inv.Versions {
		v := &inv.Versions[i]
		for _, n := range v.Layers {
			b := &inv.Blobs[n]
			v.Size += b.Size
			if b.Versions == 1 && b.Held == "" {
				v.Unique += b.Size
			}
		}
	}
	return nil
}

// seen is when versions were last used, and asked for again.
type seen struct{ used, pulled map[digest.Digest]time.Time }

func (c *Collector) seen() (s seen, err error) {
	s.used, s.pulled, err = c.Store.LastSeen()
	return s, err
}

// Input is what package retention plans from.
func (inv *Inventory) Input() retention.Input {
	in := retention.Input{
		Versions: make([]retention.Version, len(inv.Versions)),
		Blobs:    make([]retention.Blob, len(inv.Blobs)),
		Free:     inv.Usage.Free, Capacity: inv.Usage.Capacity, Trash: inv.Usage.Trash,
		Now: inv.Time,
	}
	for i, v := range inv.Versions {
		out := retention.Version{Digest: v.Digest, References: v.References, Created: v.Created, LastUsed: v.LastUsed, Pulled: v.Pulled, InUse: users(v.Uses), Damaged: v.Damaged, Layers: v.Layers}
		if v.Pin != nil {
			out.Pinned = v.Pin.Text()
		}
		in.Versions[i] = out
	}
	for i, b := range inv.Blobs {
		in.Blobs[i] = retention.Blob{Size: b.Size, Held: b.Held != ""}
	}
	return in
}

// Note records, in the store, that what is in use now was used now, and which
// versions this node uses, for the other nodes of a shared store. Records of
// use that have become void go. It does nothing where a source has failed: what
// was in use may still be.
func (c *Collector) Note(ctx context.Context, inv *Inventory) error {
	for _, v := range inv.Versions {
		if len(v.Uses) > 0 {
			c.Store.TouchUsage(c.Node, v.Digest)
		}
	}
	if len(inv.Failed) > 0 {
		return nil
	}
	noted, err := c.noted(inv)
	if err != nil || noted {
		return err
	}
	err = c.exclusive(ctx, func(x *store.Exclusive, r roots) error {
		for d := range r.here {
			if err := c.Store.Use(c.Node, d); err != nil {
				return err
			}
		}
		return x.Forget(c.Node, r.here)
	})
	if err != nil {
		return fmt.Errorf("record what this node uses: %w", err)
	}
	return nil
}

// noted tells whether the store's records of what this node uses are as the
// inventory has it: as a rule they are, and nothing need be locked.
func (c *Collector) noted(inv *Inventory) (bool, error) {
	users, err := c.Store.Users()
	if err != nil {
		return false, fmt.Errorf("record what this node uses: %w", err)
	}
	recorded := 0
	for _, nodes := range users {
		if slices.Contains(nodes, c.Node) {
			recorded++
		}
	}
	for _, v := range inv.Versions {
		if !slices.ContainsFunc(v.Uses, func(u usage.Use) bool { return u.Source != otherNodes }) {
			continue
		}
		if !slices.Contains(users[v.Digest], c.Node) {
			return false, nil
		}
		recorded--
	}
	return recorded == 0, nil
}
