package gc

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/store"
)

// Why tells what holds one version or one blob.
type Why struct {
	Digest   digest.Digest
	Blob     bool          // it is a file, a config or a manifest of no version; else a version
	There    bool          // it is in the store
	Size     int64         // bytes; of a version, of its distinct blobs
	Versions []VersionInfo // the version itself, or those that need the blob
	Lease    string        // name of a lease that holds it
	Other    string        // what else holds it: an entry of another tool
	Trash    []string      // IDs of removals that need it to be undone
	Events   []store.Event // of the history, about it; newest first
	Failed   []error       // sources that could not tell their uses

	// Inventory is what was seen of all versions; of blobs, what manifests say.
	Inventory *Inventory
}

// Why finds every root that holds what a digest names. What nothing knows is a
// store.ErrNotFound. It reads all manifests, but asks the file system about no
// other blob than this one.
func (c *Collector) Why(ctx context.Context, d digest.Digest) (Why, error) {
	w, err := c.why(ctx, d)
	if err != nil {
		return w, fmt.Errorf("find out what holds %s: %w", d, err)
	}
	return w, nil
}

func (c *Collector) why(ctx context.Context, d digest.Digest) (Why, error) {
	w := Why{Digest: d}
	h, ok := store.HashOf(d)
	if !ok {
		return w, fmt.Errorf("it is no SHA-256 digest: %w", store.ErrNotFound)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.known()
	if entries, err := c.Store.Index(); err == nil {
		g.update(entries)
	}
	var r roots
	err := c.Store.Exclusive(ctx, func(x *store.Exclusive) error {
		g.update(x.Index())
		found, failed, err := c.gather(ctx, x)
		for _, f := range failed {
			w.Failed = append(w.Failed, f)
		}
		r = found
		return err
	})
	if err != nil {
		return w, err
	}
	if w.Size, w.There, err = c.Store.Stat(d); err != nil {
		return w, err
	}
	inv := &Inventory{Time: c.now(), byDigest: map[digest.Digest]int{}, Blobs: make([]BlobInfo, len(g.hashes))}
	for n, size := range g.sizes {
		inv.Blobs[n].Size = max(0, size)
	}
	w.Inventory = inv
	if inv.Usage, err = c.Store.UsageBesideBlobs(); err != nil {
		return w, err
	}
	used, err := c.Store.LastUsed()
	if err != nil {
		return w, err
	}
	if err := inv.versions(c.Store, g, r, used); err != nil {
		return w, err
	}
	n, known := g.number[h]
	switch v, is := inv.Version(d); {
	case is:
		w.Versions, w.Size = []VersionInfo{*v}, v.Size
	case known:
		w.Blob = true
		for _, v := range inv.Versions {
			if slices.Contains(v.Layers, n) {
				w.Versions = append(w.Versions, v)
			}
		}
		w.Other = inv.Blobs[n].Held
	default:
		w.Blob = true
	}
	w.Lease = r.leased[d]
	if err := w.past(c.Store); err != nil {
		return w, err
	}
	if !w.There && len(w.Versions) == 0 && len(w.Trash) == 0 && len(w.Events) == 0 {
		return w, store.ErrNotFound
	}
	return w, nil
}

// past finds what the trash and the history say of it.
func (w *Why) past(st *store.Store) error {
	removals, err := st.Trash()
	if err != nil {
		return err
	}
	for _, r := range removals {
		needs := slices.ContainsFunc(r.Blobs, func(b store.Blob) bool { return b.Digest == w.Digest }) ||
			slices.ContainsFunc(r.References, func(d v1.Descriptor) bool { return d.Digest == w.Digest })
		if needs {
			w.Trash = append(w.Trash, r.ID)
		}
	}
	events, err := st.History()
	if err != nil {
		return err
	}
	for _, e := range slices.Backward(events) {
		if slices.ContainsFunc(e.Versions, func(v store.RemovedVersion) bool { return v.Digest == w.Digest }) {
			w.Events = append(w.Events, e)
		}
	}
	return nil
}

// Find gives the digests that begin with some hex digits: of versions if there
// are any, else of blobs.
func (c *Collector) Find(digits string) ([]digest.Digest, error) {
	versions, err := c.Store.Versions()
	if err != nil {
		return nil, err
	}
	var out []digest.Digest
	for _, v := range versions {
		if strings.HasPrefix(v.Digest.Encoded(), digits) {
			out = append(out, v.Digest)
		}
	}
	if len(out) > 0 {
		return out, nil
	}
	err = c.Store.Blobs(func(h store.Hash, _ func() (store.BlobStat, bool, error)) error {
		if d := h.Digest(); strings.HasPrefix(d.Encoded(), digits) {
			out = append(out, d)
		}
		return nil
	})
	return out, err
}
