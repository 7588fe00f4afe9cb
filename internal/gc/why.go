package gc

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/larder-project/larder/internal/modelpack"
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

	// Inventory has all versions, without their layers.
	Inventory *Inventory
}

// Why finds every root that holds what a digest names. What nothing knows is a
// store.ErrNotFound. No graph is made for it: of a version its roots tell all,
// and of a blob the manifests are searched for its name.
func (c *Collector) Why(ctx context.Context, d digest.Digest) (Why, error) {
	w := Why{Digest: d}
	if _, ok := store.HashOf(d); !ok {
		return w, fmt.Errorf("find out what holds %s: it is no SHA-256 digest: %w", d, store.ErrNotFound)
	}
	if err := c.why(ctx, &w); err != nil {
		return w, fmt.Errorf("find out what holds %s: %w", d, err)
	}
	return w, nil
}

func (c *Collector) why(ctx context.Context, w *Why) error {
	r, failed := c.ask(ctx, askTime)
	if err := ctx.Err(); err != nil {
		return err
	}
	for _, f := range failed {
		w.Failed = append(w.Failed, f)
	}
	var entries []v1.Descriptor
	err := c.Store.Exclusive(ctx, func(x *store.Exclusive) error {
		entries = x.Index()
		return r.fromStore(c, x)
	})
	if err != nil {
		return err
	}
	if w.Size, w.There, err = c.Store.Stat(w.Digest); err != nil {
		return err
	}
	w.Lease = r.leased[w.Digest]
	w.Inventory = &Inventory{Time: c.Time(), byDigest: map[digest.Digest]int{}}
	seen, err := c.seen()
	if err != nil {
		return err
	}
	if err := w.Inventory.versions(c.Store, newGraph(c.Store), entries, r, seen); err != nil {
		return err
	}
	if v, is := w.Inventory.Version(w.Digest); is {
		if m, err := c.Store.Model(w.Digest); err == nil {
			v.Size, _ = sizes(m)
			v.Size += w.Size
		} else {
			v.Damaged = err.Error()
		}
		w.Versions, w.Size = []VersionInfo{*v}, v.Size
	} else {
		w.Blob = true
		if err := w.search(ctx, c.Store, entries); err != nil {
			return err
		}
	}
	if err := w.past(c.Store); err != nil {
		return err
	}
	if !w.There && len(w.Versions) == 0 && len(w.Trash) == 0 && len(w.Events) == 0 {
		return store.ErrNotFound
	}
	return nil
}

// sizes adds up the distinct contents of a version.
func sizes(m modelpack.Model) (bytes int64, files int) {
	seen := map[digest.Digest]bool{}
	for _, f := range m.Files {
		if !seen[f.Digest] {
			seen[f.Digest] = true
			bytes += f.Size
		}
	}
	return bytes, len(seen)
}

// search finds the entries of index.json that need a blob.
func (w *Why) search(ctx context.Context, st *store.Store, entries []v1.Descriptor) error {
	h, _ := store.HashOf(w.Digest)
	var mu sync.Mutex
	needs := map[digest.Digest]bool{}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	seen := map[digest.Digest]bool{}
	for _, d := range entries {
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			// Most manifests do not have the digits anywhere; of the others it
			// is found out where.
			if text, err := os.ReadFile(st.BlobPath(d.Digest)); err == nil && store.IsModel(d) && !bytes.Contains(text, []byte(w.Digest.Encoded())) && !bytes.Contains(text, []byte(`\u`)) {
				return nil
			}
			blobs, err := links(st, d)
			if err != nil {
				return nil //nolint:nilerr // verify names what is damaged
			}
			if slices.ContainsFunc(blobs, func(l link) bool { return l.hash == h }) {
				mu.Lock()
				defer mu.Unlock()
				needs[d.Digest] = true
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, d := range entries {
		if v, is := w.Inventory.Version(d.Digest); !needs[d.Digest] {
			continue
		} else if is {
			w.Versions = append(w.Versions, *v)
			delete(needs, d.Digest)
		} else {
			w.Other = "an entry of another tool in index.json"
		}
	}
	return nil
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
